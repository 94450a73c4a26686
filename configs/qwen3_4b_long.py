# python -m train.train --config configs/qwen3_4b_long.py --data rows32k --start-from runs/qwen3_4b --mesh.fsdp -1
"""A second stage for texts of up to 131,072 tokens: rows of 32,768, a target with YaRN, a lower rate, one epoch.

The target is a copy of Qwen3-4B with `"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
"original_max_position_embeddings": 32768}` in its config.json, as its model card has it; the drafter turns as it does.
"""

from dataclasses import replace
from pathlib import Path

from configs.qwen3_4b import config as first
from dspark_jax.training.step import OptimizerConfig

# As many tokens a step as before, with a quarter of the blocks; neither they nor the rate were tuned.
config = replace(first, target="targets/qwen3-4b-yarn", out=Path("runs/qwen3_4b_long"), epochs=1, batch=64,
                 microbatches=8, row_length=32_768, anchors=1024, optimizer=OptimizerConfig(learning_rate=1e-4))
