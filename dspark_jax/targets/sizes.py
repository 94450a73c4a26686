"""Published targets by name, by their config.json: for programs that need a model's shape and none of its weights.

With -yarn they are what their model cards make of them for longer texts: YaRN with a factor of 4 over 32,768 positions.
"""

from __future__ import annotations

import dataclasses

from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.rope import Yarn
from dspark_jax.targets.decoder import TargetConfig


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, tied: bool) -> TargetConfig:
  return TargetConfig("qwen3", BlockSpec(width, mlp, heads, 8, 128, 1e-6, 1e6, qk_norm=True), layers, 151_936, tied,
                      40_960)


# By the last part of their hub id, in lower case: Qwen/Qwen3-4B is qwen3-4b.
MODELS = {"qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True), "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
          "qwen3-14b": _qwen3(5120, 17_408, 40, 40, tied=False)}
YARN = Yarn(4.0, 32_768)
MODELS |= {f"{name}-yarn": dataclasses.replace(
    config, spec=dataclasses.replace(config.spec, rope_scaling=YARN), max_positions=YARN.positions)
           for name, config in MODELS.items()}
