# python -m train.train --config configs/demo.py --data runs/demo/answers.jsonl
"""A small drafter for SmolLM2-135M that two CPU cores can train in minutes (what `make demo` runs)."""

from pathlib import Path

from dspark_jax.drafters import DSpark
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import OptimizerConfig
from train.config import TrainConfig

config = TrainConfig(
    target="smollm2", out=Path("runs/demo"), minutes=8, batch=1, row_length=256, anchors=160,
    save_every=200, log_every=20, compute_dtype="bfloat16", target_dtype="bfloat16",
    drafter=DSpark.Settings(taps=(1, 8, 15, 21, 28), mask_token_id=0, num_layers=2, block_size=4, markov_rank=256,
                            draft_vocab_size=4096, from_target=True, from_bigrams=True, lens=True),
    optimizer=OptimizerConfig(learning_rate=1e-3), loss=LossConfig(chunk=128))
