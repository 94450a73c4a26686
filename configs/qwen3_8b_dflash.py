# python -m train.train --config configs/qwen3_8b_dflash.py --data rows --mesh.fsdp -1
"""DFlash for Qwen3-8B: as for Qwen3-4B, with the same taps."""

from dataclasses import replace
from pathlib import Path

from configs.qwen3_4b_dflash import config as small

config = replace(small, target="Qwen/Qwen3-8B", out=Path("runs/qwen3_8b_dflash"))
