"""The families that can be a target, by the model_type of their Hugging Face config."""

from dspark_jax.targets import llama, qwen3

TARGETS = {"llama": llama.from_hf, "qwen3": qwen3.from_hf}
