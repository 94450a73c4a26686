# python -m train.compare --config configs/compare.py --data runs/demo/answers.jsonl
"""Eight drafters for SmolLM2-135M, trained alike: the paper's Table 1 in miniature, in an hour or two of two cores."""
from dataclasses import replace
from pathlib import Path
from dspark_jax.drafters import MTP, DSpark, Eagle3
from dspark_jax.training.losses import DFLASH, EAGLE3, LossConfig
from dspark_jax.training.step import OptimizerConfig
from train.config import CompareConfig, TrainConfig
alike = dict(taps=(1, 8, 15, 21, 28), block_size=5, draft_vocab_size=4096, from_target=True)
dspark = DSpark.Settings(num_layers=2, **alike)
dflash = replace(dspark, markov_rank=0, confidence="none")
ours, ce, soft = LossConfig(chunk=128), replace(DFLASH, chunk=128), replace(EAGLE3, chunk=128)
half, adamw = dict(compute_dtype="bfloat16", target_dtype="bfloat16"), OptimizerConfig("adamw", 1e-3)
base = TrainConfig("smollm2", dspark, Path("runs/compare"), steps=400, batch=1, row_length=256, anchors=128,
                   log_every=20, loss=ours, optimizer=adamw, **half)
config = CompareConfig(base, {
  "dspark-vanilla": (dspark, ours), "dspark-gated": (replace(dspark, markov_head="gated"), ours),
  "dspark-rnn": (replace(dspark, markov_head="rnn"), ours), "dflash": (dflash, ce),
  "dflash-5-layers": (replace(dflash, num_layers=5), ce), "eagle3": (Eagle3.Settings(**alike), soft),
  "mtp": (MTP.Settings(**alike), soft), "dspark-lens": (replace(dspark, lens=True), ours)})
