"""Where the positions of a block start from: what the draft layers read before any of them has run.

A start gives f[...,T,D] for T positions, from the anchor's token and from what it `held`: in the drafter's state for a
round, read from the text in training. `Masks` is the paper's block [anchor, mask, mask, ...]: it holds nothing, and its
positions must fetch everything by attention. `Lens` is not in the paper: position k starts as
x_k = W_k [anchor ; tap_1 ; ... ; tap_n] + b_k, of the anchor's embedding and of the features one position before it,
each part scaled to rms 1. That one position tells much of what follows is known from "Future Lens" (Pal et al., 2023);
that W has a best value in closed form (`training.starts`) is what makes it a start.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.model import newest
from dspark_jax.nn.layers import Linear
from dspark_jax.types import Array, Batch, Target


@dataclasses.dataclass(frozen=True)
class Masks:
  """The embeddings of [anchor, mask, mask, ...]."""
  positions: int  # T
  mask_token_id: int

  def init_held(self, batch: int) -> None:
    """What the drafter's state holds for a start, before the first token."""
    return None

  def absorb(self, held: None, features: Array, n: Array) -> None:
    """What the state holds after the first n i32[B] of T new columns, features f[B,T,F]."""
    return None

  def held_at(self, batch: Batch, features: Array, anchors: Array) -> None:
    """What a state would hold at each anchor i32[B,A] of training sequences, features f[B,T,F]."""
    return None

  def __call__(self, target: Target, anchor: Array, held: None) -> Array:
    """f[...,T,D] of blocks with the anchor tokens i32[...]."""
    tokens = jnp.full((*anchor.shape, self.positions), self.mask_token_id, jnp.int32)
    return target.embed(tokens.at[..., 0].set(anchor))


class Lens(nnx.Module):
  """A linear prediction of the positions' hidden states. It holds the features before the anchor, f[...,F]."""

  def __init__(self, width: int, taps: int, positions: int, *, rngs: nnx.Rngs):
    self.positions = positions
    self.proj = Linear((1 + taps) * width, positions * width, rngs=rngs, bias=True)

  def init_held(self, batch: int) -> Array:
    outputs, inputs = self.proj.weight.shape
    return jnp.zeros((batch, inputs - outputs // self.positions), self.proj.weight.dtype)

  def absorb(self, held: Array, features: Array, n: Array) -> Array:
    return newest(features, n, held)

  def held_at(self, batch: Batch, features: Array, anchors: Array) -> Array:
    """Zeros where a document begins."""
    inside = jnp.take_along_axis(batch.positions, anchors, axis=1)[..., None] > 0
    return jnp.where(inside, jnp.take_along_axis(features, jnp.maximum(anchors - 1, 0)[..., None], axis=1), 0)

  def __call__(self, target: Target, anchor: Array, held: Array) -> Array:
    embedding = target.embed(anchor)
    inputs = lens_inputs(embedding, held).astype(self.proj.weight.dtype)
    return self.proj(inputs).reshape(*anchor.shape, self.positions, embedding.shape[-1])


def lens_inputs(embedding: Array, features: Array) -> Array:
  """f32[...,(1+n)*D]: embedding f[...,D] and features f[...,n*D], each D of them scaled to rms 1; zeros stay zeros."""
  x = jnp.concatenate([embedding.astype(jnp.float32), features.astype(jnp.float32)], axis=-1)
  parts = x.reshape(*x.shape[:-1], -1, embedding.shape[-1])
  return (parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + 1e-12)).reshape(x.shape)
