"""Qwen3 (dense): Llama's block with an RMSNorm on every query and key head."""

from __future__ import annotations

import functools

from dspark_jax.targets.decoder import Family, TargetConfig
from dspark_jax.targets.llama import block_keys, block_spec, decoder_config

qwen3_block = functools.partial(block_spec, qk_norm=True)


def from_hf(hf: dict) -> TargetConfig:
  """The configuration in a Hugging Face config.json; ValueError lists all that is missing or not supported."""
  return decoder_config("qwen3", hf, *qwen3_block(hf))


FAMILY = Family(from_hf, qwen3_block, block_keys, "Qwen3")
