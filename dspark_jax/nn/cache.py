"""The KV cache: slot = position, one length per row.

Rows are written at the end of the committed part before anybody knows whether they will stay; a row is committed by
advancing the length, rejected by not advancing it. Slots at or past the length are never read by a later call before
that call has overwritten them, so nothing is ever cleared.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.types import Array


@flax.struct.dataclass
class Cache:
  """k, v: per layer f[B,K,S,h], as a tuple (unrolled layers) or stacked f[L,B,K,S,h] (scanned layers)."""
  k: tuple[Array, ...] | Array
  v: tuple[Array, ...] | Array
  length: Array  # i32[B]  committed slots

  @property
  def capacity(self) -> int:
    return self.k[0].shape[-2]


def empty(num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype, *,
          stacked: bool = False) -> Cache:
  """A cache without a single committed slot."""
  shape, length = (batch, num_kv_heads, capacity, head_dim), jnp.zeros(batch, jnp.int32)
  if stacked:
    return Cache(jnp.zeros((num_layers, *shape), dtype), jnp.zeros((num_layers, *shape), dtype), length)
  return Cache(tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
               tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)), length)


def write(cache: Cache, layer, k: Array, v: Array) -> Cache:
  """The cache with rows k, v: f[B,T,K,h] of one layer at slots length..length+T-1, uncommitted.

  The caller keeps length + T <= capacity: a dynamic update that runs over the end would slide back over committed rows.
  """
  k, v = (jnp.swapaxes(x, 1, 2).astype(cache.k[0].dtype) for x in (k, v))
  if isinstance(cache.k, tuple):
    put = lambda old, new: old[:layer] + (_put(old[layer], new, cache.length),) + old[layer + 1:]
  else:
    put = lambda old, new: _put_stacked(old, layer, new, cache.length)
  return cache.replace(k=put(cache.k, k), v=put(cache.v, v))


def _put(old, new, start):
  if old.shape[0] == 1:  # one row: a plain in-place update instead of a scatter
    return jax.lax.dynamic_update_slice(old, new, (0, 0, start[0], 0))
  return jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, 0)))(old, new, start)


def _put_stacked(old, layer, new, start):
  batch, heads, length, _ = new.shape
  rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
  slots = start[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, None, :]
  return old.at[layer, rows, heads, slots].set(new, unique_indices=True, mode="drop")


def commit(cache: Cache, n: Array) -> Cache:
  """The cache after the first n: i32[B] of the rows just written have become final."""
  return cache.replace(length=cache.length + n)
