"""Llama (SmolLM2 among them): grouped-query attention, RoPE, no biases, no q/k norms."""

from dspark_jax.config import TargetConfig, hf_spec, raise_all


def from_hf(hf: dict) -> TargetConfig:
  """The configuration in a Hugging Face config.json; ValueError lists all that is missing or not supported."""
  return decoder_config("llama", hf, qk_norm=False)


def decoder_config(family: str, hf: dict, *, qk_norm: bool) -> TargetConfig:
  """What Llama-like families share of a Hugging Face config.json."""
  spec, problems = hf_spec(hf, qk_norm=qk_norm)
  raise_all(f"{family} config", problems)
  return TargetConfig(family, spec, hf["num_hidden_layers"], hf["vocab_size"], bool(hf.get("tie_word_embeddings")),
                      hf.get("max_position_embeddings") or 2 ** 31 - 1)
