"""How many drafts of each request are worth verifying (DSpark: 3.2.2, Algorithm 1; 5.2, Appendix A).

sps, everywhere: f[N+1], steps per second of the target over B tokens at entry B, with N >= R * (G + 1); measured per
engine. Entry 0 is not read.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.types import Array


@flax.struct.dataclass
class Schedule:
  """The drafts to verify, and what the engine is expected to make of them."""
  lengths: Array     # i32[R]  0..G; 0 in rows that are not live
  throughput: Array  # f[]     tokens per second, one token of the target's own per live row included

  @property
  def capacity(self) -> Array:
    """Drafts admitted, over all rows: i32[]."""
    return jnp.sum(self.lengths, axis=-1, dtype=jnp.int32)


def survival(confidence: Array) -> Array:
  """P(drafts 0..j are all accepted): f32[R,G], non-increasing, from f32[R,G]; in float64 if that comes in."""
  # A backend may multiply pairwise. That product can rise by a last bit where a confidence is 1, and the place of
  # draft j would then depend on draft j + 1.
  return jax.lax.cummin(jnp.cumprod(confidence, axis=1), axis=1)


def early_stop(survival: Array, sps: Array, live: Array | None = None) -> Schedule:
  """Algorithm 1: drafts are admitted by descending survival while each one raises the expected throughput.

  survival: f[R,G], of this round, non-increasing in G. live: bool[R], rows that run at all (None: every row).
  Lossless: stopping at the first draft that does not pay, no length depends on a draft that it cuts off.
  """
  rank, throughput = _visit(survival, sps, live)
  pays = throughput[1:] > throughput[:-1]
  return _admit(rank, throughput, jnp.sum(jnp.cumprod(pays.astype(jnp.int32)), dtype=jnp.int32))


def best_prefix(survival: Array, sps: Array, live: Array | None = None) -> Schedule:
  """The best of all prefixes of the same order, past any dip of the throughput; the shortest of equals.

  Not for this round's confidences: how late drafts turned out would decide whether early ones are verified, which
  biases the text (Appendix A: 0.85 / 0.15 for 0.7 / 0.3). With `old`, the confidences of two rounds before, lossless:
  `top_k(survival(confidence), best_prefix(survival(old), sps).capacity)`.
  """
  rank, throughput = _visit(survival, sps, live)
  return _admit(rank, throughput, jnp.argmax(throughput).astype(jnp.int32))


def top_k(survival: Array, capacity: Array, live: Array | None = None) -> Array:
  """Lengths that verify the `capacity` drafts most likely to survive, or all of positive survival: i32[R].

  survival: f[R,G], of this round. capacity: i32[], which must not depend on this round's drafts.
  """
  survival = _candidates(survival, live)
  return _lengths(_rank(survival), jnp.minimum(capacity, jnp.sum(survival > 0, dtype=jnp.int32)))


def check_curve(sps: Array, rows: int, block: int) -> None:
  """ValueError when the curve is too short for a batch of so many rows of so many drafts."""
  if sps.shape[0] <= rows * (block + 1):
    raise ValueError(f"the SPS curve ends at {sps.shape[0] - 1} tokens, {rows} rows of {block} drafts need "
                     f"{rows * (block + 1)}: measure it for this batch size")


def _visit(survival, sps, live):
  """Place of each draft in the order: i32[R,G]; throughput with the first n of them: f[R*G+1], -inf past the last."""
  rows, _ = survival.shape
  check_curve(sps, *survival.shape)
  survival = _candidates(survival, live)
  rank = _rank(survival)
  n_live = jnp.int32(rows) if live is None else jnp.sum(live, dtype=jnp.int32)
  # Every live row yields one token whatever its drafts do.
  gains = jnp.concatenate([n_live.astype(survival.dtype)[None], jnp.sort(survival.ravel(), descending=True)])
  batch = n_live + jnp.arange(gains.size, dtype=jnp.int32)
  throughput = jnp.cumsum(gains) * jnp.where(batch > 0, jnp.asarray(sps)[batch], 0).astype(survival.dtype)
  return rank, jnp.where((gains > 0).at[0].set(True), throughput, -jnp.inf)


def _admit(rank, throughput, n):
  return Schedule(_lengths(rank, n), throughput[n])


def _candidates(survival, live):
  """survival with 0 in dead rows and for NaN; what is 0 is never verified."""
  alive = survival > 0
  return jnp.where(alive if live is None else alive & live[:, None], survival, 0)


def _rank(survival):
  """Place of each draft by descending survival, ties by row, then position: i32[R,G]."""
  order = jnp.argsort(-survival.ravel(), stable=True).astype(jnp.int32)
  places = jnp.arange(order.size, dtype=jnp.int32)
  return jnp.zeros_like(order).at[order].set(places, unique_indices=True).reshape(survival.shape)


def _lengths(rank, n):
  return jnp.sum(rank < n, axis=1, dtype=jnp.int32)
