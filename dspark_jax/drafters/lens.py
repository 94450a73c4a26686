"""A linear start for the slots of a block: what is known before any layer, projected to each slot's hidden state.

Not in the paper, whose block is [anchor, mask, mask, ...] and whose slots must learn to fetch everything by attention.
Here slot k starts as x_k = W_k [anchor ; tap_1 ; ... ; tap_n] + b_k, of the anchor's embedding and of the features one
position before it, every part scaled to rms 1. That one position tells much of the tokens that follow is known from "Future
Lens" (Pal et al., 2023); that W has a best value in closed form (`training.lens`) is what makes it a start.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.nn.layers import Linear
from dspark_jax.types import Array


class Lens(nnx.Module):
  """f[...,T,D] for T slots, from the anchor's embedding f[...,D] and the features before it f[...,n*D]."""

  def __init__(self, width: int, taps: int, slots: int, *, rngs: nnx.Rngs):
    self.slots = slots
    self.proj = Linear((1 + taps) * width, slots * width, rngs=rngs, bias=True)

  def __call__(self, anchor: Array, features: Array) -> Array:
    inputs = lens_inputs(anchor, features).astype(self.proj.weight.dtype)
    return self.proj(inputs).reshape(*anchor.shape[:-1], self.slots, anchor.shape[-1])


def lens_inputs(anchor: Array, features: Array) -> Array:
  """f32[...,(1+n)*D]: anchor f[...,D] and features f[...,n*D], each D of them scaled to rms 1; zeros stay zeros."""
  x = jnp.concatenate([anchor.astype(jnp.float32), features.astype(jnp.float32)], axis=-1)
  parts = x.reshape(*x.shape[:-1], -1, anchor.shape[-1])
  return (parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + 1e-12)).reshape(x.shape)
