"""Attention over a cache as a TPU kernel of our own, whose cost follows what the rows have committed.

One program of the grid holds a block's queries and walks over the slots that the block sees, some at a time: slots that
nobody sees are neither fetched nor multiplied. Keys and values are taken from the whole stack of a cache: of a layer
that is sliced first, all slots would be copied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.types import Array

NEG = -1e30
SLOTS = 512  # of a cache that are fetched at a time
ROWS = 1024  # queries that a program holds at most, over its key heads: 1.5 MB of running sums
WIDTH = 1024  # of the keys that are fetched at a time, over key heads: with SLOTS 4 MB, two buffers of keys and values


def cached_attention(q: Array, k: Array, v: Array, own: Array, far_k: Array, far_v: Array, layer: Array, lo: Array,
                     hi: Array, *, interpret: bool) -> Array:
  """Attention of query blocks over slots lo <= j < hi of a layer's cache and over their own block, f[B,K,A,R,h] like q.

  q: f[B,K,A,R,h], scaled; R rows per key head and block, a token's g query heads together. k, v: f[B,K,A,N,h], the own
  block, of which `own` bool[B,A,R,N] is seen; B and A of it may be 1. far_k, far_v: f[L,B,K,S,h]. layer: i32[]. lo, hi:
  i32[B,A]. Rows that see nothing give 0. interpret: by Pallas' interpreter. HBM: 2 * K * h items per slot fetched, of
  which each block of a row takes ceil(hi / SLOTS) * SLOTS - floor(lo / SLOTS) * SLOTS, within S.
  """
  (batch, heads, blocks, rows, width), slots = q.shape, far_k.shape[3]
  step = min(SLOTS, slots)
  # Of heads that one program takes, as many as fit: a prompt's blocks have a hundred times the rows of a plain step.
  part = max(n for n in range(1, heads + 1)
             if heads % n == 0 and (n == 1 or n * rows <= ROWS and n * width <= WIDTH))
  bounds = jnp.stack([lo, hi], axis=-1).reshape(-1).astype(jnp.int32)
  # At least one step, which also writes what a block that sees nothing gives.
  steps = jnp.maximum(jax.lax.div(jnp.max(hi) + step - 1, step), 1)

  def fetched(b, heads, a, j, layer, bounds):
    # Past what is seen the last place stays, and before it the first one waits: what does not change is not fetched.
    at = 2 * (b * blocks + a)
    first = jax.lax.div(bounds[at], step)
    last = jnp.maximum(jax.lax.div(bounds[at + 1] + step - 1, step) - 1, first)
    return layer[0], b, heads, jnp.clip(j, first, last), 0

  block = lambda n: pl.BlockSpec((1, part, 1, n, width), lambda b, heads, a, j, *_: (b, heads, a, 0, 0))
  seen = lambda b, heads, a, j, *_: (b if own.shape[0] > 1 else 0, a if own.shape[1] > 1 else 0, 0, 0)
  cached = pl.BlockSpec((1, 1, part, step, width), fetched)
  kernel = functools.partial(_kernel, step=step, slots=slots, blocks=blocks)
  # As if all slots were seen: how many are is known only when it runs.
  seen_slots = batch * heads * blocks * slots * width
  cost = pl.CostEstimate(flops=4 * rows * seen_slots, transcendentals=rows * seen_slots // width,
                         bytes_accessed=2 * seen_slots * far_k.dtype.itemsize + 2 * q.nbytes + k.nbytes + v.nbytes)
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(batch, heads // part, blocks, steps),
          in_specs=[block(rows), block(k.shape[3]), block(k.shape[3]),
                    pl.BlockSpec((1, 1, *own.shape[2:]), seen), cached, cached],
          out_specs=block(rows),
          scratch_shapes=[pltpu.VMEM((part, rows, n), jnp.float32) for n in (1, 1, width)]),
      out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
      cost_estimate=cost, interpret=interpret, name="cached_attention",
  )(layer.reshape(1).astype(jnp.int32), bounds, q, k, v, own.astype(jnp.float32), far_k, far_v)


def _kernel(layer, bounds, q, k, v, own, far_k, far_v, out, top, total, summed, *, step, slots, blocks):
  """A step of a program: the own block first, then `step` slots at a time.

  The softmax runs along: of a head's rows, top is the largest score so far, total and summed are relative to it.
  """
  b, a, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  at = 2 * (b * blocks + a)
  lo, hi, start = bounds[at], bounds[at + 1], j * step

  def attend(head, keys, values, visible):
    """Adds keys and values [n,h] to the sums of a head; visible bool[R or 1,n]."""
    if keys.shape[0] == 1:  # a plain step's own block: Mosaic has no products over one key
      product = lambda weights, values: weights * values.astype(jnp.float32)
      scores = (q[0, head, 0].astype(jnp.float32) * keys.astype(jnp.float32)).sum(-1, keepdims=True)
    else:
      product = lambda weights, values: _contract(weights.astype(values.dtype), values, 0)
      scores = _contract(q[0, head, 0], keys, 1)
    scores = jnp.where(visible, scores, NEG)
    new = jnp.maximum(top[head], scores.max(-1, keepdims=True))
    # Masked again: of a row that has seen nothing yet, new is NEG too, and exp(NEG - NEG) is 1.
    weights, scale = jnp.where(visible, jnp.exp(scores - new), 0.0), jnp.exp(top[head] - new)
    top[head], total[head] = new, scale * total[head] + weights.sum(-1, keepdims=True)
    summed[head] = scale * summed[head] + product(weights, values)

  @pl.when(j == 0)
  def _():
    top[...] = jnp.full_like(top, NEG)
    total[...], summed[...] = jnp.zeros_like(total), jnp.zeros_like(summed)
    for head in range(q.shape[1]):
      attend(head, k[0, head, 0], v[0, head, 0], own[0, 0] > 0)

  @pl.when((start < hi) & (start + step > lo))
  def _():
    place = lambda axis: start + jax.lax.broadcasted_iota(jnp.int32, (1, step) if axis else (step, 1), axis)
    for head in range(q.shape[1]):
      values = far_v[0, 0, head]
      if slots % step:  # of a last step that reaches past the cache, the rest was never written: 0 * NaN is NaN
        values = jnp.where(place(0) < slots, values, jnp.zeros_like(values))
      attend(head, far_k[0, 0, head], values, (place(1) >= lo) & (place(1) < hi))

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    # Tiny, so that nothing seen is 0 / tiny and not 0 / 0.
    sums = jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)
    out[0, :, 0] = (summed[...] / sums).astype(out.dtype)


def _contract(a, b, axis):
  """f32: the sum over the last axis of a and `axis` of b."""
  return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
