# python -m train.compare --config configs/lengths.py --data runs/demo/answers.jsonl --out runs/lengths
"""DSpark at proposal lengths 4, 8, 12 and 16 (the paper's Figure 4), with as many blocks per step for each."""
from dataclasses import replace
from pathlib import Path

from configs.compare import base, dspark, ours
from train.config import CompareConfig

start = replace(dspark, lens=True, from_bigrams=True)
config = CompareConfig(
  replace(base, out=Path("runs/lengths"), anchors=48),
  {f"block-{length}": (replace(start, block_size=length), ours) for length in (4, 8, 12, 16)},
  temperatures=(0.0,), samples=32)
