"""(sum, weight) pairs: means that add up over microbatches, steps and hosts. No writers."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.types import Array


@flax.struct.dataclass
class Mean:
  """A mean that has not been divided yet; a vector is one mean per entry."""
  sum: Array     # f32[...]
  weight: Array  # f32[...]


def weighted(values: Array, weights: Array, axis=None) -> Mean:
  """The mean of `values` under `weights` (bool or f32) over `axis`. A value of weight 0 may be NaN."""
  weights = weights.astype(jnp.float32)
  return Mean(jnp.where(weights > 0, weights * values, 0).sum(axis), weights.sum(axis))


def once(value: Array) -> Mean:
  """One observation of weight 1."""
  value = jnp.asarray(value, jnp.float32)
  return Mean(value, jnp.ones_like(value))


def add(a, b):
  """Two trees of Means of the same structure, observed together."""
  return jax.tree.map(jnp.add, a, b)


def mean(pair: Mean) -> Array:
  """f32[...]: sum / weight; NaN where nothing was observed."""
  return jnp.where(pair.weight > 0, pair.sum / jnp.where(pair.weight > 0, pair.weight, 1), jnp.nan)
