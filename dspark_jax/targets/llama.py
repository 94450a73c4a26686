"""Llama (SmolLM2 among them): grouped-query attention, RoPE (also YaRN), no biases, no q/k norms."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from dspark_jax.config import Count, Range, raise_all, read_known, shown, to_json
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.rope import Theta, Yarn
from dspark_jax.targets.decoder import Family, TargetConfig

One = Annotated[float, Range(1, 1)]


@dataclasses.dataclass(frozen=True)
class Rope:
  """What is read of rope_parameters (also rope_scaling, the older form), and of the type yarn also what `Yarn` has."""
  rope_theta: Theta | None = None
  rope_type: Literal["default", "yarn"] | None = None
  type: Literal["default", "yarn"] | None = None  # the older spelling
  partial_rotary_factor: One = 1


@dataclasses.dataclass(frozen=True)
class BlockKeys:
  """What is read of a Hugging Face config.json about its layers.

  Of a key that takes one value, others are refused and not ignored: most leave no trace in the tensors, and would just
  compute something else.
  """
  hidden_size: Count
  intermediate_size: Count
  num_attention_heads: Count
  rms_norm_eps: Annotated[float, Range(0, 1)]
  num_key_value_heads: Count | None = None
  head_dim: Count | None = None
  rope_theta: Theta | None = None
  rope_parameters: Rope = Rope()
  rope_scaling: Rope = Rope()
  original_max_position_embeddings: Count | None = None
  partial_rotary_factor: One = 1
  attention_bias: Literal[False] = False
  mlp_bias: Literal[False] = False
  hidden_act: Literal["silu"] = "silu"
  use_sliding_window: Literal[False] = False
  sliding_window: Annotated[int, Range(0, 0)] = 0
  layer_types: tuple[Literal["full_attention"], ...] = ()


@dataclasses.dataclass(frozen=True)
class TargetKeys:
  """What is read of the rest."""
  num_hidden_layers: Count
  vocab_size: Count
  tie_word_embeddings: bool = False
  # Where no limit is given, positions have that of their int32: files of no maker leave it out, and a guess would
  # refuse prompts that the model was trained for.
  max_position_embeddings: Count = 2 ** 31 - 1
  is_causal: Literal[True] = True
  dual_chunk_attention_config: Literal[None] = None


def from_hf(hf: dict) -> TargetConfig:
  """The configuration in a Hugging Face config.json; ValueError lists all that is missing or not supported."""
  return decoder_config("llama", hf, *block_spec(hf))


def decoder_config(family: str, hf: dict, spec: BlockSpec | None, problems: list[str]) -> TargetConfig:
  """What Llama-like families share of a Hugging Face config.json, around what `block_spec` gave."""
  keys, wrong = read_known(TargetKeys, hf)
  raise_all(f"{family} config", problems + wrong)
  # A config that YaRN was added to still says how many positions there were without it.
  longer = spec.rope_scaling.positions if spec.rope_scaling else 0
  return TargetConfig(family, spec, keys.num_hidden_layers, keys.vocab_size, keys.tie_word_embeddings,
                      max(keys.max_position_embeddings, longer))


def block_spec(hf: dict[str, Any], *, qk_norm: bool = False) -> tuple[BlockSpec | None, list[str]]:
  """(spec, problems) from a Hugging Face config; both spellings of the rope are read and theta is never assumed."""
  # The switch before the number: Qwen's configs keep a window that use_sliding_window turns off.
  off = hf.get("use_sliding_window") is False
  keys, problems = read_known(BlockKeys, hf | {"sliding_window": None} if off else hf)
  sections = [part for part in (hf, hf.get("rope_parameters"), hf.get("rope_scaling")) if isinstance(part, dict)]
  thetas = [part["rope_theta"] for part in sections if part.get("rope_theta") is not None]
  if not thetas:
    problems.append("no rope theta: expected rope_parameters.rope_theta or rope_theta (a default would be silently "
                    "wrong)")
  elif any(theta != thetas[0] for theta in thetas):
    problems.append(f"rope_theta is {' and '.join(map(shown, thetas))} in different places: expected one")
  if problems:
    return None, problems
  heads = keys.num_attention_heads
  # head_dim is a number of its own (128 where Qwen3-30B-A3B's D / H is 64); the quotient is for files without it.
  head_dim, kv_heads = keys.head_dim or keys.hidden_size // heads, keys.num_key_value_heads or heads
  if head_dim < 2 or head_dim % 2:
    problems.append(f"heads are {head_dim} wide, expected an even number: a rotary embedding turns pairs")
  if heads % kv_heads:
    problems.append(f"key 'num_key_value_heads' is {kv_heads}, expected a divisor of num_attention_heads {heads}")
  scaling, wrong = _scaling(hf, keys)
  problems += wrong
  return None if problems else BlockSpec(keys.hidden_size, keys.intermediate_size, heads, kv_heads, head_dim,
                                         keys.rms_norm_eps, float(thetas[0]), qk_norm, scaling), problems


def _scaling(hf, keys):
  """(what the rotary embedding is scaled by or None, problems): exporters may say it in both places."""
  found, problems = {}, []
  for name in ("rope_parameters", "rope_scaling"):
    kinds = {getattr(keys, name).rope_type, getattr(keys, name).type} - {None}
    if len(kinds) > 1:
      problems.append(f"key {name!r} has rope_type {getattr(keys, name).rope_type!r} and type "
                      f"{getattr(keys, name).type!r}: expected one")
    elif kinds == {"yarn"}:
      scaling, wrong = read_known(Yarn, hf[name] | {"rope_type": "yarn"})
      found[scaling] = name
      problems += [f"{name}: {problem}" for problem in wrong]
    elif not kinds and isinstance(hf.get(name), dict) and hf[name].get("factor") not in (None, 1):
      problems.append(f"{name} has a factor and no rope_type: expected rope_type yarn beside it, or no factor")
  # transformers takes rope_scaling, whatever it says, and the length from outside of both.
  if len(found) > 1 or [*found.values()] == ["rope_parameters"] and hf.get("rope_scaling"):
    problems.append("rope_parameters and rope_scaling say different things of yarn: expected one of them")
  outer, scaling = keys.original_max_position_embeddings, next(iter(found), None)
  if scaling and outer not in (None, scaling.original_max_position_embeddings):
    problems.append(f"original_max_position_embeddings {outer} and {found[scaling]} say different things of yarn: "
                    f"expected one of them")
  return scaling, problems


def block_keys(spec: BlockSpec) -> dict[str, Any]:
  """What a Hugging Face config.json says of these layers; `block_spec` reads them back."""
  return dict(
      attention_bias=False, head_dim=spec.head_dim, hidden_act="silu", hidden_size=spec.hidden_size,
      intermediate_size=spec.intermediate_size, num_attention_heads=spec.num_heads,
      num_key_value_heads=spec.num_kv_heads, rms_norm_eps=spec.rms_norm_eps,
      rope_parameters={"rope_theta": spec.rope_theta, "rope_type": "default"} | (
          to_json(spec.rope_scaling) if spec.rope_scaling else {}))


FAMILY = Family(from_hf, block_spec, block_keys, "Llama")
