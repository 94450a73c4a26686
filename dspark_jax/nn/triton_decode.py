"""Attention over a cache as a GPU kernel of our own: scores and weights never leave the multiprocessor that made them.

As many programs as keep a GPU busy share out the slots that a block sees, each with sums of its own, which are merged
with the block's own keys afterwards (flash decoding). Slots that nobody sees are neither fetched nor multiplied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dspark_jax.types import Array

NEG = -1e30
SLOTS = 64       # of a cache that are multiplied at a time
ROWS = 64        # queries that a program holds at most: with heads 128 wide 64 registers of a thread for their sums
FEWEST = 16      # of both that Triton multiplies
# Bytes of a tile of keys and of one of queries. With as many of values, and weights, they are in shared memory at once:
# 80 KB of the 99 that an L4 or an RTX has.
KEYS, QUERIES = 2 ** 14, 2 ** 15
PROGRAMS = 264   # two for each multiprocessor of an H100


def cached_attention(q: Array, k: Array, v: Array, own: Array, far_k: Array, far_v: Array, lo: Array, hi: Array, *,
                     interpret: bool) -> Array:
  """Attention of query blocks over slots lo <= j < hi of a cache and over their own block, f[B,K,A,R,h] like q.

  q: f[B,K,A,R,h], scaled; R rows per key head and block, a token's g query heads together. k, v: f[B,K,A,N,h], the own
  block, of which `own` bool[B,A,R,N] is seen; B and A of it may be 1. far_k: f[B,K,h,S], columns; far_v: f[B,K,S,h].
  lo, hi: i32[B,A]. h: a power of two. Rows that see nothing give 0. interpret: by Pallas' interpreter.
  """
  tops, totals, sums = _context(q, far_k, far_v, lo, hi, interpret=interpret)
  own = own[:, None]
  near = jnp.einsum("bkarh,bkanh->bkarn", q, k, preferred_element_type=jnp.float32)
  near = jnp.where(own, near, NEG)
  top = jnp.maximum(tops.max(0), near.max(-1))
  # Masked again: where a row sees nothing, top is NEG too and exp(NEG - NEG) is 1.
  near = jnp.where(own, jnp.exp(near - top[..., None]), 0)
  scale = jnp.exp(tops - top[None])
  total = (scale * totals).sum(0) + near.sum(-1)
  out = (scale[..., None] * sums).sum(0) + jnp.einsum("bkarn,bkanh->bkarh", near.astype(v.dtype), v,
                                                      preferred_element_type=jnp.float32)
  # Tiny, so that nothing seen is 0 / tiny and not 0 / 0.
  return (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).astype(q.dtype)


def _context(q, far_k, far_v, lo, hi, *, interpret):
  """The largest scores f32[P,B,K,A,R], the sums of weights, and those of weighted values f32[P,B,K,A,R,h], of each of P
  parts of the slots that a block sees."""
  (batch, heads, blocks, rows, width), slots = q.shape, far_v.shape[2]
  line = width * max(q.dtype.itemsize, far_k.dtype.itemsize)
  held = max(min(pl.next_power_of_2(rows), ROWS, QUERIES // line), FEWEST)
  groups = -(-rows // held)
  padded = jnp.pad(q, [(0, 0)] * 3 + [(0, groups * held - rows), (0, 0)])
  step = max(min(pl.next_power_of_2(slots), SLOTS, KEYS // line), FEWEST)
  parts = max(min(PROGRAMS // (batch * heads * blocks * groups), -(-slots // step)), 1)
  row, head = lambda i: jax.lax.div(i, heads), lambda i: jax.lax.rem(i, heads)
  block, group = lambda j: jax.lax.div(j, groups), lambda j: jax.lax.rem(j, groups)
  bound = pl.BlockSpec((None, None), lambda i, j, _: (row(i), block(j)))
  cached = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, j, _: (row(i), head(i), 0, 0))
  sums = lambda *end: pl.BlockSpec((None, None, None, None, held, *end),
                                   lambda i, j, p: (p, row(i), head(i), block(j), group(j), *[0] * len(end)))
  shapes = (padded.shape[:-1], padded.shape[:-1], padded.shape)
  found = pl.pallas_call(
      functools.partial(_kernel, step=step, slots=slots, parts=parts),
      grid=(batch * heads, blocks * groups, parts),
      in_specs=[bound, bound,
                pl.BlockSpec((None, None, None, held, width),
                             lambda i, j, _: (row(i), head(i), block(j), group(j), 0)),
                cached(width, slots), cached(slots, width)],
      out_specs=[sums(), sums(), sums(width)],
      out_shape=[jax.ShapeDtypeStruct((parts, *shape), jnp.float32) for shape in shapes],
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2), interpret=interpret, name="cached_attention",
  )(lo.astype(jnp.int32), hi.astype(jnp.int32), padded, far_k, far_v)
  return tuple(x[:, :, :, :, :rows] for x in found)


def _kernel(lo, hi, q, far_k, far_v, tops, totals, sums, *, step, slots, parts):
  """A part of the slots that a block sees, `step` of them at a time: all parts have as many steps, but for the last."""
  lo, hi, queries = lo[...], hi[...], q[...]
  first = jax.lax.div(lo, step)
  steps = jnp.maximum(jax.lax.div(hi + step - 1, step) - first, 0)
  mine = jax.lax.div(steps + parts - 1, parts)
  begin = first + pl.program_id(2) * mine
  end = jnp.minimum(begin + mine, first + steps)

  def attend(i, carry):
    top, total, summed = carry
    at = i * step + jnp.arange(step, dtype=jnp.int32)
    # Past the cache lies what is not ours: it is not read, as 0 * NaN is NaN.
    keys = plgpu.load(far_k.at[:, pl.ds(i * step, step)], mask=(at < slots)[None], other=0)
    values = plgpu.load(far_v.at[pl.ds(i * step, step), :], mask=(at < slots)[:, None], other=0)
    visible = ((at >= lo) & (at < hi))[None]
    scores = jnp.where(visible, _product(queries, keys), NEG)
    new = jnp.maximum(top, scores.max(-1))
    weights, scale = jnp.where(visible, jnp.exp(scores - new[:, None]), 0.0), jnp.exp(top - new)
    summed = scale[:, None] * summed + _product(weights.astype(values.dtype), values)
    return new, scale * total + weights.sum(-1), summed

  rows, width = queries.shape
  nothing = jnp.full(rows, NEG, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, width), jnp.float32)
  tops[...], totals[...], sums[...] = jax.lax.fori_loop(begin, end, attend, nothing)


def _product(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
