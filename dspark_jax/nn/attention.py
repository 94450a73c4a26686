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

from dspark_jax.nn.sharding import local
from dspark_jax.types import Array

NEG = -1e30  # finite, so that a row that sees nothing gives zeros rather than NaN
SCORE_BUDGET = 2 ** 25  # attention scores held at a time by a device, in elements: 128 MB of float32
QUERY_BLOCK = 128  # a prompt or a training sequence is cut into causal blocks of this many rows


@flax.struct.dataclass
class Place:
  """Where the rows of a call stand, for every layer alike: A blocks of T rows, each with N own keys.

  Row (a, t) sees the context's slots lo <= j < hi and the rows n of its own block that `own` names.
  """
  positions: Array     # i32[B,...]     of the rows, in the shape that they come in, for the rotary embedding
  lo: Array            # i32[B,A,T]
  hi: Array            # i32[B,A,T]
  own: Array           # bool[B,A,T,N]  B and A may be 1
  start: Array | None  # i32[B]         slot of the first row; None where nothing is cached


@flax.struct.dataclass
class Context:
  """Keys and values that all blocks of a row share."""
  k: Array  # f[B,K,S,h], or columns f[B,K,h,S]
  v: Array  # f[B,K,S,h]
  layout: str = flax.struct.field(pytree_node=False)  # of k: rows | columns


def following(start: Array, positions: Array, segments: Array | None = None) -> Place:
  """The place of rows that follow one another from slot start i32[B], causally: prompts, plain steps, verification,
  training sequences.

  positions: i32[B,T], of the rows in their document: nothing before its position 0 is seen. segments: i32[B,T], where
  several documents share a row. ValueError unless T is at most QUERY_BLOCK or a multiple of it.
  """
  batch, length = positions.shape
  block = min(length, QUERY_BLOCK)
  if length % block:
    raise ValueError(f"{length} tokens in a row: expected at most {QUERY_BLOCK} or a multiple of it; pad the prompt, "
                     f"or choose another row length")
  cut = lambda x: x.reshape(-1, length // block, block)
  steps = jnp.arange(length, dtype=jnp.int32)[None]
  own = jnp.tril(jnp.ones((block, block), bool))[None, None]
  if segments is not None:
    segments = cut(segments)
    own = own & (segments[..., :, None] == segments[..., None, :])
  # Of row t: lo is the slot of its document's position 0, hi that of the first row of its own block.
  lo, hi = start[:, None] + steps - positions, start[:, None] + steps // block * block
  return Place(positions, cut(lo), cut(hi), own, start)


def at_once(positions: Array, lo: Array, hi: Array, keep: Array | None = None) -> Place:
  """The place of blocks whose rows see all of their own block: positions, lo and hi i32[B,A,T].

  keep: bool[B,A], False for blocks that are no blocks and see nothing.
  """
  own = jnp.ones((1, 1, hi.shape[2], hi.shape[2]), bool)
  return Place(positions, lo, hi, own if keep is None else own & keep[..., None, None], None)


def sequence(k: Array, v: Array) -> Context:
  """The context that keys and values f[B,S,K,h] of a whole sequence make: slot = place in the row."""
  # Nobody writes into it later, so keys may lie as products read them fastest on CPU (nn/cache.py).
  return Context(jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2), "columns")


def attend(q: Array, k: Array, v: Array, place: Place, context: Context) -> Array:
  """Attention of query blocks over their context and their own block, in the shape of q. Rows that see nothing give 0.

  q: f[B,...,H,h], scaled already; k and v: f[B,...,K,h]; rows as place's A blocks of T and N. Blocks are processed in
  chunks, each recomputed in the backward pass, so that the memory of a device holds SCORE_BUDGET scores.
  """
  shape, (batch, blocks, length) = q.shape, place.hi.shape
  cut = lambda x: x.reshape(batch, blocks, -1, *x.shape[-2:])
  q, k, v = cut(q), cut(k), cut(v)
  per_block = local(batch, "rows") * length * local(q.shape[3], "heads") * context.v.shape[2]
  # A divisor, so that chunks have one shape without padding: dummy blocks would cost what real ones do.
  chunk = max(c for c in range(1, blocks + 1) if blocks % c == 0 and (c == 1 or c * per_block <= SCORE_BUDGET))
  if chunk < blocks:
    split = lambda x: jnp.moveaxis(x.reshape(batch, blocks // chunk, chunk, *x.shape[2:]), 1, 0)
    # A mask that all blocks share has A = 1, of which there are no parts.
    own = jnp.broadcast_to(place.own, (batch, blocks, *place.own.shape[2:]))
    parts = jax.tree.map(split, (q, k, v, Place(None, place.lo, place.hi, own, None)))
    out = jax.lax.map(jax.checkpoint(lambda part: attend(*part, context)), parts)
    return jnp.moveaxis(out, 0, 1).reshape(shape)
  heads, width, groups = *q.shape[3:], context.v.shape[1]
  q = q.reshape(batch, blocks, length, groups, heads // groups, width)
  slots = jnp.arange(context.v.shape[2], dtype=jnp.int32).reshape(1, 1, 1, -1)
  visible = (slots >= place.lo[..., None]) & (slots < place.hi[..., None])
  # [B,K,A,T,g,S] and [B,K,A,T,g,N]: the products run per row and key head over all A*T*g queries at once
  visible, own = visible[:, None, :, :, None, :], place.own[:, None, :, :, None, :]
  keys = {"rows": "bksh", "columns": "bkhs"}[context.layout]
  far = jnp.einsum(f"batkgh,{keys}->bkatgs", q, context.k, preferred_element_type=jnp.float32)
  near = jnp.einsum("batkgh,baskh->bkatgs", q, k, preferred_element_type=jnp.float32)
  far, near = jnp.where(visible, far, NEG), jnp.where(own, near, NEG)
  # A softmax is the same whatever is subtracted: no gradient through the maximum.
  top = jax.lax.stop_gradient(jnp.maximum(far.max(-1, keepdims=True), near.max(-1, keepdims=True)))
  # Masked again: where a row sees nothing, top is NEG too and exp(NEG - NEG) is 1.
  far, near = jnp.where(visible, jnp.exp(far - top), 0), jnp.where(own, jnp.exp(near - top), 0)
  total = far.sum(-1) + near.sum(-1)
  out = (jnp.einsum("bkatgs,bksh->bkatgh", far.astype(v.dtype), context.v, preferred_element_type=jnp.float32)
         + jnp.einsum("bkatgs,baskh->bkatgh", near.astype(v.dtype), v, preferred_element_type=jnp.float32))
  # Divided last, h times a query instead of S + N times; tiny, so that nothing seen is 0 / tiny and not 0 / 0.
  out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
  return jnp.moveaxis(out, 1, 3).reshape(shape).astype(v.dtype)
