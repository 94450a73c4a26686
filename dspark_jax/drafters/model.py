"""What all drafters share: a configuration, the draft vocabulary, and the target's frozen head over it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import Count, Natural, raise_all, shown, wrong_choices
from dspark_jax.nn.cache import cut_row, insert_row, take_row
from dspark_jax.nn.layers import Block, BlockSpec
from dspark_jax.types import Array, DraftHead, Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterChoices:
  """What a user chooses of a drafter, whatever the target. A kind adds its own fields, none that it does not have."""
  taps: tuple[int, ...]
  """target layers that feed the drafter; -1 is the embedding, the last layer is not allowed"""
  block_size: Count = 7
  """G: drafts per round; a recurrent drafter is unrolled over as many steps in training"""
  draft_vocab_size: Natural = 0
  """W: draft over so many most frequent tokens of the data; 0: the whole vocabulary"""

  def __post_init__(self):
    raise_all("drafter config", self.problems())

  def problems(self) -> list[str]:
    """What is wrong with the fields; subclasses add what is wrong with theirs."""
    return wrong_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig(DrafterChoices):
  """The choices, and what follows from the target: all that a stored drafter says of its shape (`to_json`).

  A kind's own inherits its choices first, then this: `class XConfig(XChoices, DrafterConfig)`.
  """
  spec: BlockSpec         # the target family's own block
  vocab_size: Count       # of the target
  num_target_layers: Count

  @classmethod
  def for_target(cls, choices: DrafterChoices, target) -> DrafterConfig:
    """The configuration that these choices make for a target, given its configuration. ValueError: they do not fit."""
    follows = dict(spec=target.spec, vocab_size=target.vocab_size, num_target_layers=target.num_layers)
    chosen = [field.name for field in dataclasses.fields(cls) if field.name not in follows]
    return cls(**{name: getattr(choices, name) for name in chosen}, **follows)

  @property
  def words(self) -> int:
    """W: columns of the draft logits."""
    return self.draft_vocab_size or self.vocab_size

  def differences(self, stored: DrafterConfig) -> list[str]:
    """Why a stored drafter cannot be trained on as this one: all that differs but the rotary embedding, which has no
    weights."""
    if type(stored) is not type(self):
      return [f"it is a {type(stored).__name__}, the run's is a {type(self).__name__}"]
    rope = dict(rope_theta=self.spec.rope_theta, rope_scaling=self.spec.rope_scaling)
    stored = dataclasses.replace(stored, spec=dataclasses.replace(stored.spec, **rope))
    return [f"{name} is {shown(getattr(stored, name))}, the run's {shown(value)}" for name, value in vars(self).items()
            if value != getattr(stored, name)]

  def train_flops(self, length: int, blocks: int) -> float:
    """Of the drafter's own part of a training step, on a row of so many tokens with so many blocks: its products
    forward, and twice as many backward, but for gradients that nobody asks for, of the target's features and head. What
    grows neither with the model's width squared nor with the vocabulary (confidence, the step of a head) is left out.
    """
    raise NotImplementedError

  def problems(self) -> list[str]:
    problems, bad = super().problems(), [t for t in self.taps if not -1 <= t < self.num_target_layers - 1]
    if bad:
      problems.append(f"taps {bad} are out of range: the target has {self.num_target_layers} layers, allowed are -1 "
                      f"(embedding) to {self.num_target_layers - 2} (the last layer's stored form is ambiguous)")
    if self.draft_vocab_size > self.vocab_size:
      problems.append(f"draft_vocab_size is {self.draft_vocab_size}, expected 0..{self.vocab_size}")
    return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterSettings(DrafterChoices):
  """The choices, and how training starts: what an experiment says of its drafter. A kind's own has a field `kind`."""
  from_target: bool = False
  """start the draft layers from the target's last ones"""


class DraftWords(nnx.Variable):
  """i32[W] token ids, ascending: the reduced draft vocabulary. Not a parameter."""


class DraftModel(nnx.Module):
  """The part of the Drafter protocol that does not depend on how a block is made."""

  every_position = False
  has_confidence = False

  def __init__(self, config: DrafterConfig):
    self.config = config
    self.draft_words = DraftWords(jnp.arange(config.words, dtype=jnp.int32)) if config.draft_vocab_size else None

  @property
  def taps(self) -> tuple[int, ...]:
    return self.config.taps

  @property
  def block_size(self) -> int:
    return self.config.block_size

  @property
  def words(self) -> Array | None:
    """i32[W], or None when the draft vocabulary is the target's."""
    return None if self.draft_words is None else self.draft_words[...]

  def head(self, target: Target) -> DraftHead:
    return DraftHead(target.head(self.words), None)

  def insert(self, state: Any, row: Array, one: Any) -> Any:
    return insert_row(state, row, one)

  def take(self, state: Any, row: Array) -> Any:
    return take_row(state, row)

  def cut(self, state: Any, row: Array, n: Array) -> Any:
    return cut_row(state, row, n)

  def start_from(self, layers: list[Block]) -> None:
    """Sets the draft layers, and what feeds them, from as many layers of the target."""
    raise NotImplementedError


def newest(rows: Array, n: Array, before: Array) -> Array:
  """f[B,D]: row n - 1 of rows f[B,T,D], n: i32[B]; `before` f[B,D] where n is 0."""
  last = jnp.take_along_axis(rows, jnp.maximum(n - 1, 0)[:, None, None], axis=1)[:, 0]
  return jnp.where((n > 0)[:, None], last, before)


def last_of(weight: Array) -> Array:
  """A projection like f[D,n*D] that passes on the last of its n inputs."""
  width, inputs = weight.shape
  return jnp.eye(width, inputs, k=inputs - width, dtype=weight.dtype)
