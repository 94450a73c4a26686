"""Which drafts of a round are verified: small pytrees with one pure function, `lengths`, behind `round.Policy`.

All of them are lossless: no length depends on a draft that it cuts off (DSpark: 3.2.2, Appendix A). A curve `sps` is
f32[N+1], steps per second of the target over B tokens at entry B, with N >= rows * (G + 1). It is of the whole batch:
under EarlyStop and Stale a row's lengths depend on its neighbours, and its text has the same distribution as alone, not
the same words.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding import scheduler
from dspark_jax.decoding.round import Policy, Rows
from dspark_jax.types import Array, Drafter


@flax.struct.dataclass
class All:
  """Every draft of every row."""
  needs_confidence = False

  def lengths(self, confidence: Array, rows: Rows) -> Array:
    return jnp.full(confidence.shape[0], confidence.shape[1], jnp.int32)


@flax.struct.dataclass
class Threshold:
  """Each row's drafts before the first whose confidence, or survival, is below the row's thresholds (`Settings`)."""
  needs_confidence = True

  def lengths(self, confidence: Array, rows: Rows) -> Array:
    """Lossless: whether a draft is verified depends on the drafts before it alone."""
    own, prefix = rows.settings.thresholds[:, :1], rows.settings.thresholds[:, 1:]
    enough = (confidence >= own) & (scheduler.survival(confidence) >= prefix)
    return jnp.sum(jnp.cumprod(enough.astype(jnp.int32), axis=1), axis=1)


@flax.struct.dataclass
class EarlyStop:
  """Drafts of all rows by descending survival, while each one raises the expected throughput (Algorithm 1)."""
  sps: Array
  needs_confidence = True

  def lengths(self, confidence: Array, rows: Rows) -> Array:
    return scheduler.early_stop(scheduler.survival(confidence), self.sps, ~rows.done).lengths


@flax.struct.dataclass
class Stale:
  """The drafts likeliest to survive, as many as would have been best for the confidences of two rounds before (5.2).

  Searching past dips of the curve is lossless on the past only. A row with less of a past, a new request, is verified
  whole, and takes its share of the capacity first.
  """
  sps: Array
  needs_confidence = True

  def lengths(self, confidence: Array, rows: Rows) -> Array:
    live, new = ~rows.done, (rows.rounds < rows.past.shape[1])[:, None]
    before, now = (scheduler.survival(jnp.where(new, 1, x)) for x in (rows.past[:, 0], confidence))
    capacity = scheduler.best_prefix(before, self.sps, live).capacity
    return jnp.where(new[:, 0], confidence.shape[1], scheduler.top_k(now, capacity, live))


def check(policy: Policy, batch: int, drafter: Drafter | None) -> None:
  """ValueError when the policy cannot decide for batches of so many rows of this drafter."""
  name = type(policy).__name__
  if policy.needs_confidence and not (drafter and drafter.has_confidence):
    raise ValueError(f"the policy {name} goes by confidences, but there is no "
                     f"{'confidence head in the drafter' if drafter else 'drafter'}: leave the policy out")
  curve = getattr(policy, "sps", None)
  if curve is None:
    return
  if np.ndim(curve) != 1 or not hasattr(curve, "shape"):
    raise ValueError(f"the SPS curve of the policy {name} is a {type(curve).__name__} of {np.ndim(curve)} dimensions, "
                     f"expected an array f32[N+1]")
  scheduler.check_curve(curve, batch, drafter.block_size)
