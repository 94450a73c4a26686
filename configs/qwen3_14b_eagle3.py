# python -m train.train --config configs/qwen3_14b_eagle3.py --data rows --mesh.fsdp -1
"""Eagle3 for Qwen3-14B: as for Qwen3-4B, with taps of its 40 layers."""

from dataclasses import replace
from pathlib import Path

from configs.qwen3_4b_eagle3 import config as small

config = replace(small, target="Qwen/Qwen3-14B", out=Path("runs/qwen3_14b_eagle3"),
                 drafter=replace(small.drafter, taps=(1, 10, 19, 28, 37)))
