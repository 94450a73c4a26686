# python -m train.train --config configs/qwen3_4b.py --data rows --mesh.fsdp -1
"""DSpark for Qwen3-4B by the reference: block 7, 5 layers, rank 256, ten epochs of 512 rows, 512 anchors each."""

from pathlib import Path

from dspark_jax.drafters import DSpark
from train.config import TrainConfig

# The rest is of the defaults, which are the reference's: AdamW at 6e-4, 4 % of warm-up, losses 0.1, 0.9, 1, decay 4.
# As many microbatches as suit up to 8 devices that hold a row or more each; 16 take --microbatches 32.
config = TrainConfig(
    target="Qwen/Qwen3-4B", out=Path("runs/qwen3_4b"), epochs=10, batch=512, microbatches=64, row_length=4096,
    anchors=512, compute_dtype="bfloat16", target_dtype="bfloat16",
    drafter=DSpark.Settings(taps=(1, 9, 17, 25, 33), mask_token_id=151669))
