"""Frozen dataclasses that describe models, from JSON and back. All that is wrong is collected and raised once."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from dspark_jax.nn.layers import BlockSpec


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
