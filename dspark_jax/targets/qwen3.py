"""Qwen3 (dense): Llama's block with an RMSNorm on every query and key head."""

from dspark_jax.config import TargetConfig
from dspark_jax.targets.llama import decoder_config


def from_hf(hf: dict) -> TargetConfig:
  """The configuration in a Hugging Face config.json; ValueError lists all that is missing or not supported."""
  return decoder_config("qwen3", hf, qk_norm=True)
