"""Frozen dataclasses that describe models, from JSON and back. All that is wrong is collected and raised once."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """The static description of one transformer layer."""
  hidden_size: int
  intermediate_size: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  qk_norm: bool = False


@dataclasses.dataclass(frozen=True)
class TargetConfig:
  """A frozen language model: `family` names a file in targets/."""
  family: str
  spec: BlockSpec
  num_layers: int
  vocab_size: int
  tie_word_embeddings: bool
  max_positions: int


def raise_all(what: str, problems: list[str]) -> None:
  """One ValueError for a list of problems; nothing for an empty list."""
  if problems:
    raise ValueError(f"{what}: " + "; ".join(problems))


def wrong_choices(config) -> list[str]:
  """What is wrong with the fields of a dataclass that take one of a few values (`Literal`)."""
  kinds = {name: typing.get_args(kind) for name, kind in typing.get_type_hints(type(config)).items()
           if typing.get_origin(kind) is typing.Literal}
  listed = lambda known: " or ".join(filter(None, (", ".join(map(str, known[:-1])), str(known[-1]))))
  return [f"{name} is {getattr(config, name)!r}, expected {listed(known)}" for name, known in kinds.items()
          if getattr(config, name) not in known]


def to_json(config) -> dict[str, Any]:
  return dataclasses.asdict(config)


def from_json(cls, data: dict[str, Any], what: str):
  """A config of type `cls` from a JSON object; unknown, missing and mistyped keys are listed in one ValueError."""
  fields, kinds = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
  if not isinstance(data, dict):
    raise ValueError(f"{what}: got {data!r}, expected an object with the keys {', '.join(fields)}")
  required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
  raise_all(what, [f"unknown key {k!r}" for k in sorted(set(data) - set(fields))]
            + [f"key {k!r} is missing" for k in sorted(required - set(data))]
            + [f"key {k!r} is {v!r}, expected {kinds[k]}" for k, v in data.items() if k in fields and not _is(v, kinds[k])])
  values = dict(data)
  if "spec" in values:
    values["spec"] = from_json(BlockSpec, values["spec"], f"{what}, spec")
  if "taps" in values:
    values["taps"] = tuple(values["taps"])
  return cls(**values)


def _is(value, kind):
  if kind is float:
    return type(value) in (int, float)
  if typing.get_origin(kind) is typing.Literal:
    return type(value) in map(type, typing.get_args(kind))  # which one it is, the config itself checks
  if typing.get_origin(kind) is tuple:
    return isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
  return dataclasses.is_dataclass(kind) or type(value) is kind  # a nested config checks itself


def hf_spec(hf: dict[str, Any], *, qk_norm: bool) -> tuple[BlockSpec, list[str]]:
  """(spec, problems) from a Hugging Face config; both spellings of the rope are read and theta is never assumed."""
  problems = [f"key {k!r} is {'missing' if hf.get(k) is None else repr(hf[k])}, expected a number"
              for k in ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "num_hidden_layers",
                        "vocab_size") if type(hf.get(k)) not in (int, float)]
  rope, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  theta = rope.get("rope_theta", hf.get("rope_theta"))
  if theta is None:
    problems.append("no rope theta: expected rope_parameters.rope_theta or rope_theta (a default would be silently wrong)")
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
  sliding = hf.get("use_sliding_window", hf.get("sliding_window"))
  if sliding or any(kind != "full_attention" for kind in hf.get("layer_types") or []):
    problems.append("a sliding window is trained in, which is not supported")
  if problems:
    return None, problems
  heads = hf["num_attention_heads"]
  return BlockSpec(hf["hidden_size"], hf["intermediate_size"], heads, hf.get("num_key_value_heads") or heads,
                   hf.get("head_dim") or hf["hidden_size"] // heads, hf["rms_norm_eps"], float(theta), qk_norm), []
