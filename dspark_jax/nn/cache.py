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
  """Per layer k f[B,K,h,S], v f[B,K,S,h], as tuples (unrolled layers) or stacked f[L,...] (scanned layers).

  Keys are stored as columns, so that the product with the queries reads them along S as they lie.
  """
  k: tuple[Array, ...] | Array
  v: tuple[Array, ...] | Array
  length: Array  # i32[B]  committed slots

  @property
  def capacity(self) -> int:
    return self.v[0].shape[-2]


def empty(num_layers: int, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype, *,
          stacked: bool = False) -> Cache:
  """A cache without a single committed slot."""
  def zeros(*shape):
    one = lambda *lead: jnp.zeros((*lead, batch, num_kv_heads, *shape), dtype)
    return one(num_layers) if stacked else tuple(one() for _ in range(num_layers))
  return Cache(zeros(head_dim, capacity), zeros(capacity, head_dim), jnp.zeros(batch, jnp.int32))


def write(cache: Cache, layer, k: Array, v: Array) -> Cache:
  """The cache with rows k, v: f[B,T,K,h] of one layer at slots length..length+T-1, uncommitted.

  The caller keeps length + T <= capacity: a dynamic update that runs over the end would slide back over committed rows.
  """
  put = _put if isinstance(cache.k, tuple) else _put_stacked
  dtype = cache.k[0].dtype
  return cache.replace(k=put(cache.k, layer, jnp.transpose(k, (0, 2, 3, 1)).astype(dtype), cache.length, 3),
                       v=put(cache.v, layer, jnp.swapaxes(v, 1, 2).astype(dtype), cache.length, 2))


def _put(old, layer, new, start, axis):
  at = lambda slot: tuple(slot if a == axis else 0 for a in range(1, 4))
  if new.shape[0] == 1:  # a plain in-place update instead of a scatter
    written = jax.lax.dynamic_update_slice(old[layer], new, (0, *at(start[0])))
  else:
    written = jax.vmap(lambda o, n, s: jax.lax.dynamic_update_slice(o, n, at(s)))(old[layer], new, start)
  return old[:layer] + (written,) + old[layer + 1:]


def _put_stacked(old, layer, new, start, axis):
  index = [i.astype(jnp.int32) for i in jnp.ogrid[tuple(slice(n) for n in new.shape)]]
  index[axis] = index[axis] + start[:, None, None, None]
  return old.at[(layer, *index)].set(new, unique_indices=True, mode="drop")


def commit(cache: Cache, n: Array) -> Cache:
  """The cache after the first n: i32[B] of the rows just written have become final."""
  return cache.replace(length=cache.length + n)
