"""Llama (SmolLM2 among them): grouped-query attention, RoPE, no biases, no q/k norms."""

from __future__ import annotations

from typing import Any

from dspark_jax.config import raise_all
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.targets.decoder import Family, TargetConfig


def from_hf(hf: dict) -> TargetConfig:
  """The configuration in a Hugging Face config.json; ValueError lists all that is missing or not supported."""
  return decoder_config("llama", hf, *block_spec(hf))


def decoder_config(family: str, hf: dict, spec: BlockSpec | None, problems: list[str]) -> TargetConfig:
  """What Llama-like families share of a Hugging Face config.json, around what `block_spec` gave."""
  raise_all(f"{family} config", problems)
  # Where no limit is given, positions have that of their int32.
  return TargetConfig(family, spec, hf["num_hidden_layers"], hf["vocab_size"], bool(hf.get("tie_word_embeddings")),
                      hf.get("max_position_embeddings") or 2 ** 31 - 1)


def block_spec(hf: dict[str, Any], *, qk_norm: bool = False) -> tuple[BlockSpec | None, list[str]]:
  """(spec, problems) from a Hugging Face config; both spellings of the rope are read and theta is never assumed."""
  problems = [f"key {k!r} is {'missing' if hf.get(k) is None else repr(hf[k])}, expected a number"
              for k in ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "num_hidden_layers",
                        "vocab_size") if type(hf.get(k)) not in (int, float)]
  rope, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  theta = rope.get("rope_theta", hf.get("rope_theta"))
  if theta is None:
    problems.append("no rope theta: expected rope_parameters.rope_theta or rope_theta (a default would be silently "
                    "wrong)")
  # Refused, not ignored: most of what follows leaves no trace in the tensors, and would just compute something else.
  for part in (rope, scaling):
    kind = part.get("rope_type", part.get("type", "default"))  # `type` is the older spelling
    if kind != "default":
      problems.append(f"rope_type {kind!r} is not supported, only 'default'")
  if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1):
    problems.append("a partial rotary embedding is not supported")
  for key in ("attention_bias", "mlp_bias"):
    if hf.get(key):
      problems.append(f"{key} is true, but only layers without biases are supported")
  if hf.get("hidden_act", "silu") != "silu":
    problems.append(f"hidden_act is {hf['hidden_act']!r}, only 'silu' is supported")
  # The switch before the number: Qwen's configs keep a window that use_sliding_window turns off.
  sliding = hf.get("use_sliding_window", hf.get("sliding_window"))
  if sliding or any(kind != "full_attention" for kind in hf.get("layer_types") or []):
    problems.append("a sliding window is trained in, which is not supported")
  if problems:
    return None, problems
  heads = hf["num_attention_heads"]
  # head_dim is a number of its own (128 where Qwen3-30B-A3B's D / H is 64); the quotient is for files without it.
  return BlockSpec(hf["hidden_size"], hf["intermediate_size"], heads, hf.get("num_key_value_heads") or heads,
                   hf.get("head_dim") or hf["hidden_size"] // heads, hf["rms_norm_eps"], float(theta), qk_norm), []


def block_keys(spec: BlockSpec) -> dict[str, Any]:
  """What a Hugging Face config.json says of these layers; `block_spec` reads them back."""
  return dict(
      attention_bias=False, head_dim=spec.head_dim, hidden_act="silu", hidden_size=spec.hidden_size,
      intermediate_size=spec.intermediate_size, num_attention_heads=spec.num_heads,
      num_key_value_heads=spec.num_kv_heads, rms_norm_eps=spec.rms_norm_eps,
      rope_parameters={"rope_theta": spec.rope_theta, "rope_type": "default"})


FAMILY = Family(from_hf, block_spec, block_keys, "Llama")
