"""What all drafters share: a configuration, the draft vocabulary, and the target's frozen head over it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.nn.cache import insert_row
from dspark_jax.nn.layers import Block
from dspark_jax.types import Array, DraftHead, Target


class DraftWords(nnx.Variable):
  """i32[W] token ids, ascending: the reduced draft vocabulary. Not a parameter."""


class DraftModel(nnx.Module):
  """The part of the Drafter protocol that does not depend on how a block is made."""

  every_position = False
  has_confidence = False

  def __init__(self, config):
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

  def start_from(self, layers: list[Block]) -> None:
    """Sets the draft layers, and what feeds them, from as many layers of the target."""
    raise NotImplementedError


def init_from_target(drafter: DraftModel, target: Target) -> DraftModel:
  """The drafter with layers and final norm started from the target's last layers; a start for training.

  What projects the taps starts as the last tap alone: the residual stream that is nearest to what those layers read in
  the target. ValueError when the drafter's block is not the target's.
  """
  config, count = drafter.config, len(drafter.layers)
  if config.spec != target.config.spec or count > target.config.num_layers:
    raise ValueError(f"{count} draft layers {config.spec} cannot start from the target's "
                     f"{target.config.num_layers} layers {target.config.spec}: use the target's own block")
  layers = target.last_layers(count)
  dtype = drafter.norm.weight[...].dtype
  new = jax.tree.map(lambda x: x, drafter)  # merging a split would share the variables with the argument
  new.start_from([jax.tree.map(lambda x: x.astype(dtype), layer) for layer in layers])
  new.norm.weight.set_value(target.norm.weight[...].astype(dtype))
  return new


def newest(rows: Array, n: Array, before: Array) -> Array:
  """f[B,D]: row n - 1 of rows f[B,T,D], n: i32[B]; `before` f[B,D] where n is 0."""
  last = jnp.take_along_axis(rows, jnp.maximum(n - 1, 0)[:, None, None], axis=1)[:, 0]
  return jnp.where((n > 0)[:, None], last, before)


def last_of(weight: Array) -> Array:
  """A projection like f[D,n*D] that passes on the last of its n inputs."""
  width, inputs = weight.shape
  return jnp.eye(width, inputs, k=inputs - width, dtype=weight.dtype)
