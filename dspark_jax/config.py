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


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """A DSpark or DFlash drafter. `spec` repeats the target family's own block."""
  spec: BlockSpec
  num_layers: int
  vocab_size: int              # of the target
  num_target_layers: int
  taps: tuple[int, ...]
  mask_token_id: int
  block_size: int = 7          # G: drafts per round
  markov_rank: int = 256       # R; 0 without a sequential head
  markov_head: str = "vanilla"  # vanilla | gated | rnn
  confidence: str = "markov"   # none | hidden | markov: what the confidence head reads besides nothing
  sample_from_anchor: bool = True  # False: the original DFlash, whose anchor slot predicts nothing
  lens: bool = False           # slots start from drafters/lens.py instead of [anchor, mask, ...]; not in the paper
  draft_vocab_size: int = 0    # W; 0: the target's whole vocabulary

  def __post_init__(self):
    problems = common_problems(self)
    if not self.taps:
      problems.append("taps are empty: name at least one target layer")
    if self.markov_rank and self.markov_head not in ("vanilla", "gated", "rnn"):
      problems.append(f"markov_head is {self.markov_head!r}, expected vanilla, gated or rnn")
    if self.confidence not in ("none", "hidden", "markov"):
      problems.append(f"confidence is {self.confidence!r}, expected none, hidden or markov")
    if self.confidence == "markov" and not self.markov_rank:
      problems.append("confidence 'markov' reads the sequential head's embedding, but markov_rank is 0: use 'hidden' or 'none'")
    if self.lens and not self.sample_from_anchor:
      problems.append("a lens predicts a draft in every slot: sample_from_anchor must be true")
    if not 0 <= self.mask_token_id < self.vocab_size:
      problems.append(f"mask_token_id is {self.mask_token_id}, expected 0..{self.vocab_size - 1}")
    raise_all("drafter config", problems)

  @property
  def slots(self) -> int:
    """Block slots that are run for block_size drafts."""
    return self.block_size + (0 if self.sample_from_anchor else 1)

  @property
  def words(self) -> int:
    """W: columns of the draft logits."""
    return self.draft_vocab_size or self.vocab_size


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
  """An Eagle3 or MTP drafter. `spec` repeats the target family's own block."""
  spec: BlockSpec
  vocab_size: int              # of the target
  num_target_layers: int
  taps: tuple[int, ...] = ()   # MTP reads the target's last hidden states and needs none
  block_size: int = 7          # G: drafts per round, and steps that training unrolls
  draft_vocab_size: int = 0    # W; 0: the target's whole vocabulary

  def __post_init__(self):
    raise_all("drafter config", common_problems(self))

  @property
  def words(self) -> int:
    """W: columns of the draft logits."""
    return self.draft_vocab_size or self.vocab_size


def common_problems(config: DrafterConfig | RecurrentConfig) -> list[str]:
  """What is wrong with the fields that every drafter has."""
  problems, bad = [], [t for t in config.taps if not -1 <= t < config.num_target_layers - 1]
  if bad:
    problems.append(f"taps {bad} are out of range: the target has {config.num_target_layers} layers, allowed are -1 "
                    f"(embedding) to {config.num_target_layers - 2} (the last layer's stored form is ambiguous)")
  if config.block_size < 1:
    problems.append(f"block_size is {config.block_size}, expected at least 1")
  if not 0 <= config.draft_vocab_size <= config.vocab_size:
    problems.append(f"draft_vocab_size is {config.draft_vocab_size}, expected 0..{config.vocab_size}")
  return problems


def raise_all(what: str, problems: list[str]) -> None:
  """One ValueError for a list of problems; nothing for an empty list."""
  if problems:
    raise ValueError(f"{what}: " + "; ".join(problems))


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
