# python -m train.train --config configs/qwen3_4b.py --data answers.jsonl
"""The paper's released setting for Qwen3-4B: block 7, 5 layers, rank 256, 512 anchors per sequence of 4096."""

from pathlib import Path

from dspark_jax.drafters import DSpark
from train.config import TrainConfig

config = TrainConfig(
    target="Qwen/Qwen3-4B", out=Path("runs/qwen3_4b"), steps=20_000, batch=8, row_length=4096, anchors=512,
    compute_dtype="bfloat16", target_dtype="bfloat16",
    drafter=DSpark.Settings(taps=(1, 9, 17, 25, 33), mask_token_id=151669))
