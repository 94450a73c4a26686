# python -m train.train --config configs/qwen3_4b_dflash.py --data rows --mesh.fsdp -1
"""DFlash for Qwen3-4B, as the reference trains it beside DSpark: no sequential head, no confidence, cross entropy."""

from dataclasses import replace
from pathlib import Path

from configs.qwen3_4b import config as dspark
from dspark_jax.training.losses import DFLASH

config = replace(dspark, out=Path("runs/qwen3_4b_dflash"), loss=DFLASH,
                 drafter=replace(dspark.drafter, markov_rank=0, confidence="none"))
