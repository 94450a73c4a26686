"""Training blocks: where they start, what they are fed, what they must predict (DSpark, 3.3).

Draft position k of a block stands at anchor + k; its previous token is x[anchor + k], its label x[anchor + k + 1].
Everything respects documents that share a row: `batch.segments` decides, 0 is padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dspark_jax.types import Array, Batch, Blocks


def candidates(batch: Batch) -> Array:
  """bool[B,T-1]: positions t that may be anchors: t and t + 1 are supervised and of one document."""
  # Both: in decoding the anchor is a token of the reply, and the one after it is the first label.
  same = batch.segments[:, :-1] == batch.segments[:, 1:]
  return batch.loss_mask[:, :-1] & batch.loss_mask[:, 1:] & same


def sample_blocks(key: Array, batch: Batch, num_anchors: int, block_size: int, row_length: int = 0) -> Blocks:
  """num_anchors blocks per row, at anchors drawn uniformly without replacement; ascending, dummies last. row_length: of
  whole rows, where the batch's padding was cut off: it has the anchors that it had with it."""
  # anchors[b] = sorted(random.sample(candidates of row b, num_anchors)): the highest of independent uniform scores are
  # such a sample, and rows with fewer candidates fill up with scores of -1, which sort behind as position `width`.
  allowed = candidates(batch)
  width = max(num_anchors, allowed.shape[1], row_length - 1)
  allowed = jnp.pad(allowed, ((0, 0), (0, width - allowed.shape[1])))
  score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
  score, drawn = jax.lax.top_k(score, num_anchors)
  anchors = jnp.sort(jnp.where(score >= 0, drawn, width).astype(jnp.int32), axis=1)
  keep = anchors < width
  return blocks_at(batch, jnp.where(keep, anchors, 0), keep, block_size)


def all_blocks(batch: Batch, block_size: int) -> Blocks:
  """One block per position i of a row, at anchor i + 1: what recurrent drafters are trained on; A = T.

  Draft position k is supervised where loss_mask[i + k] is set and i + k + 1 is in i's document: the reference's rule
  for Eagle3, which asks for the mask of the token before the previous one, and lets supervision resume after a gap.
  Where a label would be of another document, or past the row, it is -1: cross-entropy does not count there.
  """
  length = batch.tokens.shape[1]
  column = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), batch.tokens.shape)
  following = jnp.minimum(column + 1, length - 1)
  keep = (column + 1 < length) & (batch.segments > 0) & (_at(batch.segments, following) == batch.segments)
  blocks = blocks_at(batch, jnp.where(keep, following, 0), keep, block_size)
  seen = column[..., None] + jnp.arange(block_size, dtype=jnp.int32)[None, None]
  inside = (seen + 1 < length) & (_at(batch.segments, jnp.minimum(seen + 1, length - 1)) == batch.segments[..., None])
  # That rule is of a loss without labels: the last supervised column of a document has its label in the next one.
  known = (seen + 2 < length) & (_at(batch.segments, jnp.minimum(seen + 2, length - 1)) == batch.segments[..., None])
  return blocks.replace(labels=jnp.where(known, blocks.labels, -1),
                        supervised=keep[..., None] & inside & _at(batch.loss_mask, jnp.minimum(seen, length - 1)))


def blocks_at(batch: Batch, anchors: Array, keep: Array, block_size: int) -> Blocks:
  """The blocks at given anchors i32[B,A]; keep bool[B,A] is False for dummies, which must stand at 0.

  A draft position is supervised when it and every earlier one of its block have a label inside the row, inside the
  anchor's document and under the loss mask. Indices past the row are clamped (and not supervised).
  """
  last = batch.tokens.shape[1] - 1
  offset = jnp.arange(block_size, dtype=jnp.int32)[None, None]
  previous = jnp.where(keep[..., None], anchors[..., None] + offset, 0)
  label = jnp.where(keep[..., None], previous + 1, 0)
  tokens = _at(batch.tokens, jnp.minimum(label, last))
  same = _at(batch.segments, jnp.minimum(label, last)) == _at(batch.segments, anchors)[..., None]
  # The mask of the label, not of the position: read at anchor + k, supervision runs one token past the answer.
  ok = keep[..., None] & (label <= last) & same & _at(batch.loss_mask, jnp.minimum(label, last))
  supervised = jnp.cumprod(ok.astype(jnp.int32), axis=-1) > 0
  return Blocks(anchors, keep, _at(batch.tokens, jnp.minimum(previous, last)), tokens, supervised)


def _at(rows, index):
  """rows [B,T] at index i32[B,...]."""
  return jnp.take_along_axis(rows, index.reshape(index.shape[0], -1), axis=1).reshape(index.shape)
