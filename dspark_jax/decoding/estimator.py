"""How likely a draft is to survive, learnt while serving: for drafters with a confidence head and for those without.

A draft is the likelier to be kept the surer its drafter was of a word: the feature f is the logit of the largest
probability of the distribution that it was drawn from. It scores the distribution, never the drawn token, so what it
cuts off has no say in it (DSpark, Appendix A). The model is a logistic regression with a weight for each feature and an
intercept for each draft position:

  p_k = sigmoid(w f_k + b_k);  observed are k <= accepted and k < admitted, y_k = [k < accepted]

Every UPDATE rounds one damped Newton step is taken: the gradient of these rounds over the curvature of all up to now,
of which FORGETTING stays each time (recursive least squares with forgetting, for a logistic loss), and the less the
more these rounds surprise: by how many times what chance explains their squared gradients exceed it. Over the curvature
of the same rounds alone it would go nearly all the way to what the last hundred happened to say.

With f go two more features (`basis`): a drafter's logit is not the target's. The last may be the confidence head's own
logit. One state per kind of sampling and rule of verification: other drafts survive.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.sampling import argmax
from dspark_jax.types import Array

LIMIT = 40.0   # of a feature, either way
UPDATE = 100   # rounds between two steps
FORGETTING = 0.99  # of earlier curvature stays, where nothing surprises: what was learnt is of some 100 steps
LEAST = 0.5    # that stays after any surprise
DAMPING = 50   # observations that a step is shrunk by
RIDGE = 1e-3
FURTHEST = 4.0  # that a step moves the logits of survival of these rounds, on average
START = (0.5, -0.2)  # weight of the first feature, intercept; of the others 0
BASIS = 3  # features of `basis`


def feature(logits: Array, temperature: Array) -> Array:
  """The logit of the largest probability: f32[B,G], from draft logits f32[B,G,W]. temperature: f32[B], 0 counts as 1.

  -log of the sum over all but one largest of e^((z - max) / T), within LIMIT.
  """
  scaled = logits.astype(jnp.float32) - jnp.max(logits, axis=-1, keepdims=True)
  scaled = scaled / jnp.where(temperature > 0, temperature, 1.0)[:, None, None]
  # One of the largest is left out, not all: two equal ones are no certainty. Nor is it taken from the sum of all, in
  # which what is small would be lost.
  words = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 2)
  rest = jnp.sum(jnp.where(words == argmax(logits)[..., None], 0.0, jnp.exp(scaled)), axis=-1)
  return jnp.clip(-jnp.log(rest), -LIMIT, LIMIT)


def basis(feature: Array) -> Array:
  """What the logistic regression reads in place of f: f32[B,G,BASIS], from f32[B,G].

  f, the part of it below 0, and f behind the first position: the logit of survival falls faster below 0 than it rises
  above, and is flattest at the first draft. Of one weight for all, the calibration error of the first position stayed
  at 4.0 % (by chance 1.0) on the demo's drafter, however much was seen; of these it is 2.0 %.
  """
  later = jax.lax.broadcasted_iota(jnp.int32, feature.shape, feature.ndim - 1) > 0
  return jnp.stack([feature, jnp.minimum(feature, 0.0), jnp.where(later, feature, 0.0)], axis=-1)


def survive(features: Array, weights: Array, intercepts: Array) -> Array:
  """P(draft k is kept | those before it are): f32[B,G], from f32[B,G,F], f32[B,F] and f32[B,G]."""
  return jax.nn.sigmoid(jnp.sum(features * weights[:, None], axis=-1) + intercepts)


def observed(admitted: np.ndarray, accepted: np.ndarray, block: int) -> np.ndarray:
  """Drafts of which it is known whether they are kept: bool[N,block]; after the first rejection nothing is."""
  place, kept, tried = np.arange(block), accepted[:, None], admitted[:, None]
  return (place <= kept) & (place < tried)


def logit(confidence: Array) -> Array:
  """A confidence in 0..1 as a feature, within LIMIT."""
  return jnp.clip(jnp.log(confidence) - jnp.log1p(-confidence), -LIMIT, LIMIT)


@dataclasses.dataclass(eq=False)
class Estimator:
  """The state of one kind of sampling, on the host. features: F."""
  block: int
  features: int = 1

  def __post_init__(self):
    self.weights = np.zeros(self.features)
    self.weights[0] = START[0]
    self.intercepts = np.full(self.block, START[1])
    count, block = self.features, self.block
    self._a, self._b, self._c = np.zeros((count, count)), np.zeros((block, count)), np.zeros(block)
    self._n = np.zeros(block)
    self._begin()

  def observe(self, features: np.ndarray, admitted: np.ndarray, accepted: np.ndarray) -> None:
    """A round of rows: features f[N,G,F] of their drafts, how many were verified i[N], and of those kept i[N]."""
    self._pending.append((features, admitted, accepted))
    self._rounds += len(features)
    if self._rounds >= UPDATE:
      self.update()

  def _add(self, features, admitted, accepted):
    # Two logits of +inf are no feature.
    seen = observed(admitted, accepted, self.block) & np.isfinite(features).all(2)
    f = np.where(seen[..., None], features, 0.0)
    p = 1 / (1 + np.exp(-np.clip(f @ self.weights + self.intercepts, -LIMIT, LIMIT)))
    w, r = seen * p * (1 - p), seen * ((np.arange(self.block) < accepted[:, None]) - p)
    weighted = w[..., None] * f
    a, c = np.tensordot(weighted, f, ((0, 1), (0, 1))), w.sum(0)
    self._a += a
    self._b += weighted.sum(0)
    self._c += c
    self._g0 += np.tensordot(r, f, 2)
    self._g1 += r.sum(0)
    self._n += seen.sum(0)
    # Of each weight and intercept 1 on average, where the model is right.
    self._surprise = np.mean(np.append(self._g0 ** 2 / (np.diag(a) + RIDGE), self._g1 ** 2 / (c + RIDGE)))
    self._seen = f[seen], np.nonzero(seen)[1]

  def update(self) -> None:
    """One Newton step on what was observed since the last one."""
    # All at once: until now weights stood still, and a dozen small sums in every round are time of the host's.
    if self._pending:
      self._add(*map(np.concatenate, zip(*self._pending)))
    total, c = self._n.sum(), self._c + RIDGE
    if total:
      # The intercepts are eliminated: every position has its own.
      left = self._a + RIDGE * np.eye(self.features) - np.einsum("ki,kj->ij", self._b, self._b / c[:, None])
      step = np.linalg.solve(left, self._g0 - self._b.T @ (self._g1 / c)) * total / (total + DAMPING)
      step = np.maximum(step, -self.weights)  # surer drafts are never less likely to be kept
      shift = (self._g1 - self._b @ step) / c * self._n / (self._n + DAMPING)
      # Where all drafts are as good as certain the curvature vanishes, and the step would go anywhere.
      f, place = self._seen
      share = FURTHEST / max(np.abs(f @ step + shift[place]).mean(), FURTHEST) if len(f) else 1.0
      self.weights, self.intercepts = self.weights + share * step, self.intercepts + share * shift
    # Of 0.95, come what may, the intercepts were of some 40 prompts, and other prompts survive otherwise: the demo's
    # error of the first position was 2.2 % on average over halves of its prompts, and is 1.7 (by chance 1.0).
    stay = max(FORGETTING ** self._surprise, LEAST)
    self._a, self._b, self._c, self._n = (stay * x for x in (self._a, self._b, self._c, self._n))
    self._begin()

  def _begin(self):
    """A gradient at the new weights: that of the old ones says nothing of them."""
    self._g0, self._g1, self._rounds = np.zeros(self.features), np.zeros(self.block), 0
    self._surprise = 1.0
    self._pending: list[tuple[np.ndarray, ...]] = []
    self._seen = np.zeros((0, self.features)), np.zeros(0, int)  # features of drafts whose fate is known, and positions
