"""Tokens of many rows side by side: products, norms and words see packed tokens [N], attention alone sees rows [B,T].

A round that verifies few of its drafts packs the anchors and the chosen drafts of all rows into one bucket of N tokens,
and pays for N. A chunk of one row's prompt may stand behind them, and shares the products.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax.numpy as jnp

from dspark_jax.nn.attention import Kernels, Place, attend, following
from dspark_jax.nn.cache import Full, extend
from dspark_jax.types import Array


@flax.struct.dataclass
class Chosen:
  """Which tokens of rows [B,T] are packed, and where: the first few of each row, one row after the other."""
  row: Array    # i32[N]    of each token
  step: Array   # i32[N]    its place in the row
  place: Array  # i32[B,T]  the token that is a step of a row; past a row's last one that again
  held: Array   # bool[B]   rows with a token at all

  @classmethod
  def of(cls, lengths: Array, size: int, steps: int) -> Chosen:
    """The first lengths i32[B], 0..steps, tokens of each row in a bucket of `size`, which holds their sum. What is left
    of the bucket are tokens that nobody reads."""
    last, token = jnp.cumsum(lengths, dtype=jnp.int32), jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(last[None] <= token[:, None], axis=1, dtype=jnp.int32), lengths.shape[0] - 1)
    first = last - lengths
    step = jnp.clip(token - first[row], 0, steps - 1)
    # A row's own last token, never the next row's: what is not finite in one row must not come into another's cache.
    own = jnp.minimum(jnp.arange(steps, dtype=jnp.int32)[None], jnp.maximum(lengths - 1, 0)[:, None])
    return cls(row, step, jnp.minimum(first[:, None] + own, size - 1), lengths > 0)

  def packed(self, x: Array) -> Array:
    """[N,...] of rows x [B,T,...]."""
    return x[self.row, self.step]

  def rows(self, x: Array) -> Array:
    """[B,T,...] of packed tokens x [N,...]; 0 in rows without a token."""
    # Heads go along as one axis: gathered apart, what a TPU moves of a token is padded to whole lanes per head.
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))[self.place]
    return jnp.where(self.held[:, None, None], flat, 0).reshape(*self.place.shape, *x.shape[1:])


@flax.struct.dataclass
class Packing:
  """What the tokens of a packed call are: those of the rows, then a chunk of one more."""
  chosen: Chosen | None  # of the rows' tokens; None: all of them
  seat: Array | None     # i32[]  the row that the chunk follows; None: there is no chunk
  steps: int = flax.struct.field(pytree_node=False)      # T: tokens of a row
  chunk: int = flax.struct.field(pytree_node=False, default=0)  # C: tokens of the chunk

  def join(self, tokens: Array, chunk: Array | None) -> Array:
    """[N+C,...]: the packed tokens of rows [B,T,...], and those of a chunk [C,...]."""
    if self.chosen:
      tokens = self.chosen.packed(tokens)
    else:
      tokens = tokens.reshape(tokens.shape[0] * tokens.shape[1], *tokens.shape[2:])
    return tokens if chunk is None else jnp.concatenate([tokens, chunk])

  def split(self, x: Array) -> tuple[Array, Array]:
    """(the rows' tokens [N,...], the chunk's [C,...]) of [N+C,...]."""
    n = x.shape[0] - self.chunk
    return x[:n], x[n:]

  def rows(self, x: Array) -> Array:
    """[B,T,...] of the rows' tokens [N,...]."""
    return self.chosen.rows(x) if self.chosen else x.reshape(x.shape[0] // self.steps, self.steps, *x.shape[1:])

  def place(self, length: Array, kernels: Kernels) -> PackedPlace:
    """Where these tokens stand after caches of length i32[B]."""
    if self.seat is not None:
      start = length[self.seat][None]
      # The row that a chunk is of plays no part: what it writes all the same lies behind the chunk.
      length = length.at[self.seat].add(self.chunk)
    positions = length[:, None] + jnp.arange(self.steps, dtype=jnp.int32)[None]
    rows = following(length, positions, kernels=kernels)
    if self.seat is None:
      return PackedPlace(self.join(positions, None), rows, None, self)
    # A kernel would read the stack of all rows: the one row that a chunk sees is sliced.
    chunk = following(start, start[:, None] + jnp.arange(self.chunk, dtype=jnp.int32)[None],
                      kernels=dataclasses.replace(kernels, decode="reference"))
    return PackedPlace(self.join(positions, chunk.positions[0]), rows, chunk, self)


@flax.struct.dataclass
class PackedPlace:
  """A `Place` for packed tokens."""
  positions: Array     # i32[N+C]
  rows: Place          # of all T tokens of every row
  chunk: Place | None  # of the chunk, a row of its own
  packing: Packing


def through(cache: Full | None, q: Array, k: Array, v: Array, place: Place | PackedPlace) -> tuple[Full | None, Array]:
  """(the cache with the tokens' keys and values written, what their queries f[...,H,h] find), for rows and packed
  tokens alike; k and v: f[...,K,h]. Without a cache (training sequences) tokens see their own row alone."""
  if isinstance(place, Place):
    cache, context = extend(cache, k, v, place.start)
    return cache, attend(q, k, v, place, context)
  packing = place.packing
  (q, q_chunk), (k, k_chunk), (v, v_chunk) = (packing.split(x) for x in (q, k, v))
  q, k, v = (packing.rows(x) for x in (q, k, v))
  if place.chunk is not None:
    # Both write before any of them reads: of a cache that is read in between, a CPU's compiler makes a copy.
    cache = cache.write(k_chunk[None], v_chunk[None], place.chunk.start, row=packing.seat)
  cache, context = extend(cache, k, v, place.rows.start)
  out = packing.join(attend(q, k, v, place.rows, context), None)
  if place.chunk is None:
    return cache, out
  found = attend(*(x[None] for x in (q_chunk, k_chunk, v_chunk)), place.chunk, cache.context(packing.seat))[0]
  return cache, jnp.concatenate([out, found])
