"""Attention of training sequences on TPU: JAX's splash kernels, given the ranges of slots that our queries see.

Splash skips tiles of scores that no query sees; it takes what they see from masks that are known at compile time. Ours
follow from the data (anchors, documents), so that its `MaskInfo` is made here by hand, of traced values. That, and the
backward pass around a part that splash does not see, needs functions which are private to jax: they are called from
this file alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from dspark_jax.types import Array

NEG = -1e30
LANES = 128
TILE = 512  # queries and keys of a tile; 2048 do not fit the fast memory of a v5e or v5p
LONGEST = 2 ** 15  # slots of a sequence: two of them make one int32


def ranged_attention(q: Array, far_k: Array, far_v: Array, lo: Array, hi: Array, *own: Array, interpret: bool) -> Array:
  """Attention of queries over slots lo <= j < hi of a sequence, and over their own blocks: f[B,A,T,H,h] like q.

  q: f[B,A,T,H,h], scaled. far_k, far_v: f[B,S,K,h]. lo, hi: i32[B,A,T]. own: nothing, or k, v f[B,A,N,K,h] and which of
  them is seen, bool[B,A,T,N]. Queries that see nothing give 0. Differentiable in q and all keys and values. ValueError
  unless S is a multiple of 128, at most 2^15.
  """
  slots = far_k.shape[1]
  if slots % LANES or slots > LONGEST:
    raise ValueError(f"splash attends to sequences of a multiple of {LANES} tokens, at most {LONGEST}, got {slots}: "
                     f"choose another row length, or train by reference")

  # Row by row: all at once (vmap) hold every row's temporaries, and the kernels, whose ranges are read ahead, run one
  # after the other all the same.
  # Behind barriers, which the gradients pass, too: where a whole training step fuses its own operations with those of
  # the own block, the compiler of a TPU v5p dies (libtpu 0.0.52: "split of a padded window dim is not supported").
  q, far_k, far_v, own = jax.lax.optimization_barrier((q, far_k, far_v, own))
  out = jax.lax.map(lambda row: _attend(*row[:5], row[5:], interpret), (q, far_k, far_v, lo, hi, *own))
  return jax.lax.optimization_barrier(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, far_k, far_v, lo, hi, own, interpret):
  """One row of `ranged_attention`; own: (k, v, mask) or ()."""
  return _forward(q, far_k, far_v, lo, hi, own, interpret)[0]


def _forward(q, far_k, far_v, lo, hi, own, interpret):
  tiles = _Tiles(lo, hi, far_k)
  out, (lse,) = splash._splash_attention_forward(
      tiles.info(1), tiles.queries(q), *map(_heads_first, (far_k, far_v)), None, None, save_residuals=True,
      interpret=interpret, **tiles.static)
  # What sees nothing is undefined in splash: the mean of a tile that others see, or 0 / 0.
  some = (hi > lo)[None, :, :, None]
  out = jnp.where(some[..., None], tiles.grouped(out).astype(jnp.float32), 0)
  lse = jnp.where(some, tiles.grouped(lse), NEG)
  if own:
    k, v, mask = own
    scores = _own_scores(q, k, mask)
    top = scores.max(-1)
    weights = jnp.where(_per_head(mask), jnp.exp(scores - top[..., None]), 0)  # masked again: NEG - NEG is 0
    total = weights.sum(-1)
    near = jnp.einsum("katgn,ankh->katgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    near = near / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    near_lse = top + jnp.log(jnp.where(total > 0, total, 1))
    merged = jnp.logaddexp(lse, near_lse)
    share = lambda part: jnp.exp(part - merged)[..., None]
    out, lse = share(lse) * out + share(near_lse) * near, merged
  out = jnp.moveaxis(out, 0, 2).reshape(q.shape).astype(q.dtype)
  return out, (q, far_k, far_v, lo, hi, own, out, lse)


def _backward(interpret, saved, slope):
  # One softmax over both parts: with its result and its log-sum-exp, the backward pass of each part is as if the other
  # one were not there. Differentiating a merge of two parts instead would need the gradient of the parts' log-sum-exps,
  # which splash does not give.
  q, far_k, far_v, lo, hi, own, out, lse = saved
  tiles = _Tiles(lo, hi, far_k)
  flat = tiles.pad(jnp.moveaxis(lse, 3, 1).reshape(q.shape[2], -1))
  residuals = (tiles.queries(q), *map(_heads_first, (far_k, far_v)), None, None, tiles.queries(out), flat,
               tiles.info(1), tiles.info(0))
  *_, dq, dk, dv, _, _ = splash._splash_attention_bwd(
      save_residuals=False, interpret=interpret, res=residuals, do=tiles.queries(slope), **tiles.static)
  dq, own_slopes = tiles.grouped(dq), ()
  if own:
    k, v, mask = own
    grouped = lambda x: x.reshape(*mask.shape[:2], k.shape[2], -1, x.shape[-1])  # f[A,T,K,g,h]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.where(_per_head(mask), jnp.exp(_own_scores(q, k, mask) - lse[..., None]), 0)
    both = jnp.moveaxis(grouped(out.astype(jnp.float32) * slope.astype(jnp.float32)).sum(-1), 2, 0)
    inner = weights * (product("atkgh,ankh->katgn", grouped(slope), v) - both[..., None])
    inner, weights = inner.astype(q.dtype), weights.astype(q.dtype)
    dq = (dq.astype(jnp.float32) + product("katgn,ankh->katgh", inner, k)).astype(q.dtype)
    own_slopes = (product("katgn,atkgh->ankh", inner, grouped(q)).astype(k.dtype),
                  product("katgn,atkgh->ankh", weights, grouped(slope)).astype(v.dtype), None)
  dq = jnp.moveaxis(dq, 0, 2).reshape(q.shape)
  return dq, *(jnp.moveaxis(x, 0, 1) for x in (dk, dv)), None, None, own_slopes


_attend.defvjp(_forward, _backward)


def _heads_first(x):
  return jnp.moveaxis(x, -2, 0)


def _per_head(mask):
  return mask[None, :, :, None]


def _own_scores(q, k, mask):
  """f32[K,A,T,g,N] of q f[A,T,H,h] with k f[A,N,K,h]; NEG where mask bool[A,T,N] says no."""
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  return jnp.where(_per_head(mask), jnp.einsum("atkgh,ankh->katgn", q, k, preferred_element_type=jnp.float32), NEG)


class _Tiles:
  """Queries with ranges lo, hi i32[A,T] of the slots of keys f[S,K,h], in tiles that splash computes or skips."""

  def __init__(self, lo, hi, keys):
    slots, self.heads, self.shape = *keys.shape[:2], lo.shape
    self.count = lo.size
    size = min(TILE, -(-self.count // LANES) * LANES)
    self.padding = -self.count % size  # with queries that see nothing: tiles of them alone cost nothing
    lo, hi = (self.pad(x.reshape(1, -1))[0] for x in (lo, hi))
    keys = max(n for n in range(LANES, min(TILE, slots) + 1, LANES) if slots % n == 0)
    first = jnp.where(hi > lo, lo, slots).reshape(-1, size).min(1)
    end = jnp.where(hi > lo, hi, 0).reshape(-1, size).max(1)
    start = jnp.arange(0, slots, keys, dtype=jnp.int32)
    self.live = (start[None] < end[:, None]) & (start[None] + keys > first[:, None])  # bool[tiles of N, of slots]
    self.sequence = lo * (2 * LONGEST) + hi
    sizes = splash.BlockSizes(size, keys, keys, size, keys, keys, size, keys)
    self.static = dict(mask_value=splash.DEFAULT_MASK_VALUE, is_mqa=False, block_sizes=sizes, attn_logits_soft_cap=None,
                       residual_checkpoint_name=None, mask_function=_seen)

  def pad(self, x):
    """[H,A*T,...] with queries that fill the last tile."""
    return jnp.pad(x, [(0, 0), (0, self.padding)] + [(0, 0)] * (x.ndim - 2)) if self.padding else x

  def queries(self, x):
    """f[H,N,h] from f[A,T,H,h], padded."""
    return self.pad(_heads_first(x.reshape(self.count, *x.shape[2:])))

  def grouped(self, x):
    """f[K,A,T,g,...] from f[H,N,...]."""
    return jnp.moveaxis(x[:, :self.count].reshape(self.heads, -1, *self.shape, *x.shape[2:]), 1, 3)

  def info(self, axis: int) -> MaskInfo:
    """What splash reads of tiles that it walks over along the slots (axis 1) or along the queries (0)."""
    at = jax.lax.broadcasted_iota(jnp.int32, self.live.shape, axis)
    latest = jax.lax.cummax(jnp.where(self.live, at, -1), axis=axis)
    first = jnp.argmax(self.live, axis=axis, keepdims=True).astype(jnp.int32)
    # A tile that is skipped names one that was fetched before it, or will be next: it fetches nothing.
    fetched = jnp.where(latest < 0, first, latest)
    return MaskInfo(fetched[None], None, self.live[None].astype(jnp.int32), None, self.sequence)


def _seen(sequence, slot):
  """Whether queries see slots: bool, of what `_Tiles.sequence` says of them."""
  return (slot >= sequence >> 16) & (slot < sequence & (2 * LONGEST - 1))
