"""The families that can be a target, by the model_type of their Hugging Face config."""

from dspark_jax.targets import llama, qwen3

TARGETS = {"llama": llama.FAMILY, "qwen3": qwen3.FAMILY}
