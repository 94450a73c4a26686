# python -m train.train --config configs/qwen3_4b_eagle3.py --data rows --mesh.fsdp -1
"""Eagle3 for Qwen3-4B, unrolled over 7 tokens, on the loss of the reference: soft cross entropy, decay 0.8 per step."""

from dataclasses import replace
from pathlib import Path

from configs.qwen3_4b import config as dspark
from dspark_jax.drafters import Eagle3
from dspark_jax.training.losses import EAGLE3

config = replace(dspark, out=Path("runs/qwen3_4b_eagle3"), loss=EAGLE3,
                 drafter=Eagle3.Settings(taps=dspark.drafter.taps))
