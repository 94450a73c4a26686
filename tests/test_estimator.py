"""The online estimator of survival: by the formulas, by planted truths, and by what it must not look at."""

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding import estimator as subject
from dspark_jax.decoding.estimator import Estimator, basis, feature, logit, survive

BLOCK = 4


def rounds(count, weights, intercepts, seed=0, scale=2.0):
  """(features f64[n,G,F], drafts kept i[n]) of rounds that a planted model decides."""
  rng = np.random.default_rng(seed)
  f = scale * rng.normal(size=(count, len(intercepts), len(weights)))
  p = 1 / (1 + np.exp(-(f @ np.asarray(weights) + intercepts)))
  return f, np.cumprod(rng.random(p.shape) < p, axis=1).sum(1)


@pytest.mark.parametrize("weights", [(0.8,), (0.6, 0.9)])
def test_a_planted_model_is_found(weights):
  """Kills: a step in the wrong direction, positions that share an intercept, a second feature that is lost; and steps
  that take up what the last hundred rounds happened to say (survivals at the first position off by 0.037, 0.047)."""
  intercepts = np.array([0.7, 0.1, -0.4, -0.9])
  f, kept = rounds(20_000, weights, intercepts)
  found, states = Estimator(BLOCK, len(weights)), []
  for one, n in zip(f, kept):
    found.observe(one[None], np.array([BLOCK]), n[None])
    states.append(np.r_[found.weights, found.intercepts])
  late = np.array(states[len(states) // 2::subject.UPDATE])
  np.testing.assert_allclose(late.mean(0), np.r_[weights, intercepts], atol=0.12)
  first = [f[:1000, 0] @ state[:len(weights)] + state[len(weights)] for state in (*late, np.r_[weights, intercepts])]
  *p, truth = 1 / (1 + np.exp(-np.array(first)))
  assert np.sqrt(np.mean((np.array(p) - truth) ** 2)) < 0.02


def test_one_step_is_the_formula():
  """The sums by hand, loop by loop, for one feature. Kills: damping by another count, a ridge that is left out, b_k of
  another position."""
  f, kept = rounds(90, (0.5,), np.zeros(BLOCK), seed=3)
  admitted = np.random.default_rng(1).integers(0, BLOCK + 1, len(f))
  kept = np.minimum(kept, admitted)
  found, (omega, beta) = Estimator(BLOCK), subject.START
  a, g0 = 1e-3, 0.0
  b, c, g1, n = np.zeros(BLOCK), np.full(BLOCK, 1e-3), np.zeros(BLOCK), np.zeros(BLOCK)
  for one, there, y in zip(f[..., 0], admitted, kept):
    for k in range(BLOCK):
      if k <= y and k < there:
        p = 1 / (1 + np.exp(-(omega * one[k] + beta)))
        w, r = p * (1 - p), float(k < y) - p
        a, g0 = a + w * one[k] ** 2, g0 + r * one[k]
        b[k], c[k], g1[k], n[k] = b[k] + w * one[k], c[k] + w, g1[k] + r, n[k] + 1
  found.observe(f, admitted, kept)
  found.update()
  d_omega = (g0 - (b * g1 / c).sum()) / (a - (b ** 2 / c).sum()) * n.sum() / (n.sum() + 50)
  np.testing.assert_allclose(found.weights, [omega + d_omega])
  np.testing.assert_allclose(found.intercepts, beta + (g1 - b * d_omega) / c * n / (n + 50))


def test_nothing_is_learnt_past_the_first_rejection():
  """Kills: drafts behind a rejection, or behind the cut, that count as rejected; a NaN that stays for ever."""
  one, other = Estimator(BLOCK), Estimator(BLOCK)
  for seed in range(50):
    f = np.random.default_rng(seed).normal(size=(BLOCK, 1))
    one.observe(f[None], np.array([3]), np.array([1]))
    f[2:] = 1e6  # not observed: neither value nor label may matter
    other.observe(f[None], np.array([2]), np.array([1]))
    other.observe(np.full((1, BLOCK, 1), np.nan), np.array([3]), np.array([1]))
  one.update(), other.update()
  np.testing.assert_array_equal(one.intercepts, other.intercepts)
  assert one.intercepts[2] == subject.START[1]


def test_certain_drafts_that_are_rejected_do_not_end_it():
  """As of requests at a temperature of 0.01: all look certain, and half of them are kept. Kills: a step over a
  curvature that has vanished, to where no draft is ever verified again, and nothing learnt."""
  found = Estimator(BLOCK)
  certain = np.full((1, BLOCK, 1), 40.0)
  survival = lambda: survive(certain, found.weights[None], found.intercepts[None])
  for number in range(6000):
    found.observe(certain, np.array([BLOCK]), np.array([BLOCK * (number % 2)]))
    assert number % 100 or np.abs(found.intercepts).max() < 40
  assert 0.3 < survival()[0, 0] < 0.7
  f, kept = rounds(20_000, (0.5,), np.zeros(BLOCK), seed=3)
  for n in range(len(f)):
    found.observe(f[n:n + 1], np.array([BLOCK]), kept[n:n + 1])
  assert abs(found.weights[0] - 0.5) < 0.1 and np.abs(found.intercepts).max() < 0.4


@pytest.mark.parametrize("kept", [0, BLOCK])
def test_extremes_stay_finite(kept):
  """Kills: a division by weights that have vanished; all kept, or nothing, for thousands of rounds."""
  found = Estimator(BLOCK, 2)
  for seed in range(3000):
    found.observe(np.full((1, BLOCK, 2), 40.0 if kept else -40.0) * (seed % 3 > 0), np.array([BLOCK]), np.array([kept]))
  assert np.isfinite([*found.weights, *found.intercepts]).all() and (found.weights >= 0).all()
  p = survive(jnp.zeros((1, BLOCK, 2)), jnp.asarray(found.weights)[None], jnp.asarray(found.intercepts)[None])
  assert (p > 0.9).all() if kept else (p[:, 0] < 0.1).all()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_feature_is_the_logit_of_the_largest_probability(temperature):
  """In float64, by definition; ties and certainties. Kills: all of several largest left out, 1 - (1 - 1e-9) = 0."""
  rng = np.random.default_rng(0)
  logits = (3 * rng.normal(size=(5, 2, 50))).astype(np.float32)
  logits[0, 0, :2] = 30.0                     # two equal ones: logit 0
  logits[1, 0] = np.r_[20.0, np.full(49, -3)]  # e^-23 is far below what 1 + x can hold
  logits[2, 0] = np.r_[0.0, np.full(49, -np.inf)]
  z = logits.astype(np.float64) / (temperature or 1.0)
  z -= z.max(-1, keepdims=True)
  rest = np.exp(np.sort(z, axis=-1)[..., :-1]).sum(-1)
  with np.errstate(divide="ignore"):
    want = np.clip(-np.log(rest), -40, 40)
  got = np.asarray(feature(jnp.asarray(logits), jnp.full(5, temperature)))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_basis_by_hand():
  """Kills: a bend at another place or on the other side; a slope that the first position shares."""
  f = np.array([[-2.0, -1.0, 3.0, 0.0], [3.0, 2.0, -4.0, 1.0]], np.float32)
  want = np.stack([f, [[-2, -1, 0, 0], [0, 0, -4, 0]], [[0, -1, 3, 0], [0, 2, -4, 1]]], -1)
  np.testing.assert_array_equal(basis(jnp.asarray(f)), want)
  assert logit(jnp.asarray([0.0, 0.5, 1.0])).tolist() == [-40.0, 0.0, 40.0]


def test_what_is_believed_is_of_many_prompts():
  """Prompts of 50 rounds, each with a survival of its own (logits 0.3 apart). Kills: a memory of some 20 steps, whose
  survival at the first position is that of the last forty prompts: off by 0.008 on average, not 0.0035."""
  off = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    prompts = 0.3 * np.repeat(rng.normal(size=300), 50)
    truth = 1 / (1 + np.exp(-(prompts[:, None] + np.zeros(BLOCK))))
    kept = np.cumprod(rng.random(truth.shape) < truth, axis=1).sum(1)
    found = Estimator(BLOCK)
    for n in kept:
      found.observe(np.zeros((1, BLOCK, 1)), np.array([BLOCK]), n[None])
    off.append(abs(1 / (1 + np.exp(-found.intercepts[0])) - truth[:, 0].mean()))
  assert np.mean(off) < 0.0055, off


def test_a_logit_that_bends_is_followed():
  """Planted: the logit of survival falls by 1.1 per unit below 0, rises by 0.5 above, and by 0.3 more behind the first
  position. Kills: one weight for all, whose predictions are off by up to 0.08 however much it has seen."""
  rng = np.random.default_rng(0)
  f = 2 * rng.normal(size=(20_000, BLOCK)).astype(np.float32)
  truth = 1 / (1 + np.exp(-(0.5 * f + 0.6 * np.minimum(f, 0) + 0.3 * f * (np.arange(BLOCK) > 0))))
  kept = np.cumprod(rng.random(f.shape) < truth, axis=1).sum(1)
  read = np.asarray(basis(jnp.asarray(f)))
  off = {}
  for features in (1, subject.BASIS):
    found = Estimator(BLOCK, features)
    for one, n in zip(read[..., :features], kept):
      found.observe(one[None], np.array([BLOCK]), n[None])
    p = 1 / (1 + np.exp(-(read[..., :features] @ found.weights + found.intercepts)))
    off[features] = np.sqrt(np.mean((p[:, 0] - truth[:, 0]) ** 2))
  assert off[subject.BASIS] < 0.02 < 0.04 < off[1], off
