# python -m train.train --config configs/soak.py --data README.md docs/training.md
"""SmolLM2-135M and a small drafter in steps of a fraction of a second: what `make soak` runs and kills."""

from pathlib import Path

from dspark_jax.drafters import DSpark
from train.config import TrainConfig

config = TrainConfig(
    target="smollm2", out=Path("runs/soak/run"), steps=600, batch=2, row_length=16, anchors=4, save_every=10,
    log_every=1, drafter=DSpark.Settings(taps=(1, 15, 28), mask_token_id=0, num_layers=1, block_size=3, markov_rank=16,
                                         draft_vocab_size=512))
