"""Block attention: the one attention of the project.

Every use has the same form. Queries come in blocks; a block sees a range of *context* slots and, under a mask, its
*own* block. Plain decoding is one block of one token, verification one causal block of G+1, drafting one bidirectional
block of G, a prompt or a training sequence is a row of causal blocks whose context is the sequence itself, and drafter
training is A bidirectional blocks over the target's features. No mask of [queries, context + queries] is ever built:
the two parts are computed apart and merged by their common maximum.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.types import Array

NEG = -1e30  # finite, so that a row that sees nothing gives zeros rather than NaN
SCORE_BUDGET = 2 ** 25  # attention scores held at a time, in elements: 128 MB of float32


@flax.struct.dataclass
class Context:
  """Slots shared by all blocks of a row; query (a, t) sees slots lo <= j < hi."""
  k: Array   # f[B,K,h,S]  keys as columns: both products then read along S, on CPU in half the time
  v: Array   # f[B,K,S,h]
  lo: Array  # i32[B,A,T]
  hi: Array  # i32[B,A,T]


def attend(q: Array, k: Array, v: Array, own_mask: Array, context: Context) -> Array:
  """Attention of query blocks over their context and their own block: f[B,A,T,H,h]. Rows that see nothing give 0.

  q: f[B,A,T,H,h], k and v: f[B,A,N,K,h], own_mask: bool[B,A,T,N] (B and A may be 1): query t sees own key n.
  Blocks are processed in chunks, each recomputed in the backward pass, so that memory holds SCORE_BUDGET scores.
  """
  batch, blocks, length, heads, _ = q.shape
  own_mask = jnp.broadcast_to(own_mask, (batch, blocks, length, k.shape[2]))
  per_block = batch * length * heads * context.k.shape[3]
  chunk = max(c for c in range(1, blocks + 1) if blocks % c == 0 and (c == 1 or c * per_block <= SCORE_BUDGET))
  if chunk == blocks:
    return _attend(q, k, v, own_mask, context)

  def split(x):
    return jnp.moveaxis(x.reshape(batch, blocks // chunk, chunk, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(part):
    q, k, v, mask, lo, hi = part
    return _attend(q, k, v, mask, context.replace(lo=lo, hi=hi))

  out = jax.lax.map(one, jax.tree.map(split, (q, k, v, own_mask, context.lo, context.hi)))
  return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _attend(q, k, v, own_mask, context):
  batch, blocks, length, heads, width = q.shape
  groups = context.k.shape[1]
  q = q.reshape(batch, blocks, length, groups, heads // groups, width) * jnp.asarray(width ** -0.5, q.dtype)
  slots = jnp.arange(context.k.shape[3], dtype=jnp.int32).reshape(1, 1, 1, -1)
  visible = (slots >= context.lo[..., None]) & (slots < context.hi[..., None])
  # [B,K,A,T,g,S] and [B,K,A,T,g,N]: the products run per row and key head over all A*T*g queries at once
  visible, own_mask = visible[:, None, :, :, None, :], own_mask[:, None, :, :, None, :]
  far = jnp.einsum("batkgh,bkhs->bkatgs", q, context.k, preferred_element_type=jnp.float32)
  near = jnp.einsum("batkgh,baskh->bkatgs", q, k, preferred_element_type=jnp.float32)
  far, near = jnp.where(visible, far, NEG), jnp.where(own_mask, near, NEG)
  top = jax.lax.stop_gradient(jnp.maximum(far.max(-1, keepdims=True), near.max(-1, keepdims=True)))
  far, near = jnp.where(visible, jnp.exp(far - top), 0), jnp.where(own_mask, jnp.exp(near - top), 0)
  total = far.sum(-1) + near.sum(-1)
  out = (jnp.einsum("bkatgs,bksh->bkatgh", far.astype(v.dtype), context.v, preferred_element_type=jnp.float32)
         + jnp.einsum("bkatgs,baskh->bkatgh", near.astype(v.dtype), v, preferred_element_type=jnp.float32))
  out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
  return jnp.moveaxis(out, 1, 3).reshape(batch, blocks, length, heads, width).astype(v.dtype)


def attend_causally(q: Array, k: Array, v: Array, own_mask: Array, context: Context, block: int) -> Array:
  """Attention of rows f[B,T,H,h] cut into blocks of `block` tokens, as `attend` takes them: f[B,T,H,h]."""
  cut = lambda x: x.reshape(x.shape[0], -1, block, *x.shape[2:])
  return attend(cut(q), cut(k), cut(v), own_mask, context).reshape(q.shape)


def sequence(k: Array, v: Array, lo: Array, hi: Array) -> Context:
  """The context that keys and values f[B,S,K,h] of a whole sequence make."""
  return Context(jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2), lo, hi)


def causal(length: int) -> Array:
  """bool[1,1,length,length]: query t sees own keys s <= t."""
  return jnp.tril(jnp.ones((length, length), bool))[None, None]


def bidirectional(length: int) -> Array:
  """bool[1,1,length,length]: a draft block sees all of itself."""
  return jnp.ones((1, 1, length, length), bool)
