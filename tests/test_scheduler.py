"""Scheduling: goldens, Algorithm 1 as printed, Appendix A, and what a length must not depend on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding import scheduler
from dspark_jax.decoding.scheduler import Schedule
from dspark_jax.decoding.verify import accept_prob, residual
from folders import GOLDEN, complains, golden_cases

SCHEDULES = golden_cases("", "/lengths_no_break")
CASES, ROWS, BLOCK = 400, 4, 3


@jax.jit
def schedules(confidence, sps, live):
  """All that the scheduler says of one batch, jitted once per shape: (survival, early stop, no break)."""
  a = scheduler.survival(confidence)
  return a, scheduler.early_stop(a, sps, live), scheduler.best_prefix(a, sps, live)


all_schedules = jax.jit(jax.vmap(schedules))
all_top_k = jax.jit(jax.vmap(lambda confidence, capacity, live: scheduler.top_k(
    scheduler.survival(confidence), capacity, live)))


def printed(confidence, sps, live, stop):
  """Algorithm 1, line by line: (lengths, throughput). stop=False: the best prefix of the whole order."""
  order = visited(confidence, live)
  lengths = np.zeros(len(confidence), int)
  batch = tau = int(live.sum())
  best, best_lengths = tau * sps[batch] if batch else 0, lengths.copy()
  for a, row, _ in order:
    batch, tau = batch + 1, tau + a
    lengths[row] += 1
    if tau * sps[batch] > best:
      best, best_lengths = tau * sps[batch], lengths.copy()
    elif stop:
      break
  return best_lengths, best


def visited(confidence, live):
  """(survival, row, slot) of every draft that may be verified, in Algorithm 1's order."""
  drafts = [(np.prod(confidence[row, :slot + 1]), row, slot) for row, slot in np.ndindex(confidence.shape) if live[row]]
  return sorted((d for d in drafts if d[0] > 0), key=lambda d: (-d[0], d[1], d[2]))


def random_cases(seed=0):
  """(confidence, sps, live) of CASES batches: zeros, ones, ties, dips; in fractions that float32 adds exactly."""
  rng = np.random.default_rng(seed)
  confidence = rng.choice([0, 0.25, 0.5, 0.5, 1, 1], size=(CASES, ROWS, BLOCK)).astype(np.float32)
  sps = rng.integers(4, 9, size=(CASES, ROWS * (BLOCK + 1) + 1)).astype(np.float32)
  sps[CASES // 2:] = -np.sort(-sps[CASES // 2:], axis=1)
  sps[:, 0] = np.nan  # never read
  live = rng.random((CASES, ROWS)) < 0.8
  live[0] = False
  return confidence, sps, live


def golden(case):
  """(names, given, expected) of a golden's schedules."""
  given, expected = (dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))
  names = sorted(key.removesuffix("/confidence") for key in given if key.endswith("/confidence"))
  return names, given, expected


def padded(shape, array):
  return np.pad(array, [(0, n - size) for n, size in zip(shape, array.shape)])


def assert_golden(name, schedule, best, expected):
  rows = len(expected[f"{name}/lengths"])
  np.testing.assert_array_equal(schedule.lengths[:rows], expected[f"{name}/lengths"], name)
  np.testing.assert_allclose(schedule.throughput, expected[f"{name}/throughput"], rtol=1e-12, err_msg=name)
  np.testing.assert_array_equal(best.lengths[:rows], expected[f"{name}/lengths_no_break"], name)
  np.testing.assert_allclose(best.throughput, expected[f"{name}/throughput_no_break"], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", SCHEDULES)
def test_golden_schedules(case):
  """Kills: Theta without the bonus tokens, B off by one.

  All cases at once, so padded to one shape with dead rows and confidences of 0, which must change nothing.
  """
  names, given, expected = golden(case)
  rows, block = np.max([given[f"{name}/confidence"].shape for name in names], axis=0)
  tokens = max(rows * (block + 1) + 1, *(len(given[f"{name}/sps"]) for name in names))
  arrays = [[padded((rows, block), given[f"{name}/confidence"]) for name in names],
            [padded((tokens,), given[f"{name}/sps"]) for name in names],
            [padded((rows,), np.ones(len(expected[f"{name}/lengths"]), bool)) for name in names]]
  with jax.enable_x64(True):
    _, schedule, best = jax.tree.map(np.asarray, all_schedules(*map(np.stack, arrays)))
  cases = json.loads((GOLDEN / case / "meta.json").read_text())["cases"]
  assert sum(name[-1].isdigit() for name in names) == cases and schedule.throughput.dtype == np.float64
  for i, name in enumerate(names):
    assert_golden(name, *jax.tree.map(lambda x: x[i], (schedule, best)), expected)


@pytest.mark.parametrize("case, name", [(case, name) for case in SCHEDULES for name in golden(case)[0]
                                        if not name[-1].isdigit() or name[-1] == "7"])
def test_golden_schedules_in_their_own_shape(case, name):
  """Kills: a default of `live` that is not every row; a curve that must be longer than R * (G + 1)."""
  _, given, expected = golden(case)
  with jax.enable_x64(True):
    _, schedule, best = jax.tree.map(np.asarray, schedules(given[f"{name}/confidence"], given[f"{name}/sps"], None))
  assert_golden(name, schedule, best, expected)


@pytest.mark.parametrize("case", golden_cases("", "appendix/first_token_no_break"))
def test_appendix_a(case):
  """Kills: the search without a stop on this round's confidences, which turns 0.7 / 0.3 into 0.85 / 0.15.

  The first token's distribution is summed over both drafts, through the acceptance and the residual of `verify`.
  """
  _, given, expected = golden(case)
  p, q = (jnp.float32(given[f"appendix/{name}_probs"]) for name in ("target", "draft"))
  confidence = np.float32([given["appendix_high/confidence"], given["appendix_low/confidence"]])  # when x1 = A, B
  sps = np.float32([given["appendix_high/sps"], given["appendix_low/sps"]])
  _, schedule, best = all_schedules(confidence, sps, np.ones(confidence.shape[:2], bool))
  kept = np.diag(accept_prob(p, q))
  verified = kept + (1 - kept.sum(1, keepdims=True)) * np.asarray(residual(p, q))[None]
  first = lambda lengths: np.asarray(q) @ np.where(np.asarray(lengths) > 0, verified, np.asarray(p)[None])
  for lengths, name in ((schedule.lengths, "lengths"), (best.lengths, "lengths_no_break")):
    np.testing.assert_array_equal(lengths, [expected[f"appendix_{side}/{name}"] for side in ("high", "low")])
  np.testing.assert_allclose(first(schedule.lengths), expected["appendix/first_token_early_stop"], rtol=1e-6)
  np.testing.assert_allclose(first(best.lengths), expected["appendix/first_token_no_break"], rtol=1e-6)


def test_algorithm_1_as_printed():
  """Kills: >= for >, a stop that looks past the first failure, ties by slot, dead rows in B or tau, sps[0] read."""
  cases = random_cases()
  _, schedule, best = jax.tree.map(np.asarray, all_schedules(*cases))
  for i, case in enumerate(zip(*cases)):
    for found, stop in ((schedule, True), (best, False)):
      lengths, throughput = printed(*case, stop)
      np.testing.assert_array_equal(found.lengths[i], lengths, f"case {i}, stop={stop}")
      assert found.throughput[i] == throughput, (i, stop)
  # The cases are worth something: the two searches often differ.
  assert np.mean((schedule.lengths != best.lengths).any(1)) > 0.2
  assert (schedule.lengths.max(), best.lengths.max()) == (BLOCK, BLOCK)


def test_float32_throughput_of_a_large_batch():
  """Kills: throughput that drifts in float32, or lengths that are not the longest prefix on a flat curve."""
  rng = np.random.default_rng(1)
  confidence = rng.uniform(0.1, 1, size=(64, 7)).astype(np.float32)
  sps = np.linspace(2, 1, 64 * 8 + 1).astype(np.float32)
  everyone = np.ones(64, bool)
  _, schedule, best = jax.tree.map(np.asarray, schedules(confidence, sps, everyone))
  lengths, throughput = printed(confidence.astype(float), sps.astype(float), everyone, True)
  np.testing.assert_array_equal(schedule.lengths, lengths)
  np.testing.assert_allclose([schedule.throughput, best.throughput], throughput, rtol=1e-6)
  _, flat, _ = schedules(confidence, np.ones_like(sps), everyone)
  np.testing.assert_array_equal(flat.lengths, 7)


def test_top_k():
  """Kills: ranking without the ties' order, a zero or a dead row verified to fill K, a total other than asked for."""
  confidence, _, live = random_cases()
  capacity = np.random.default_rng(2).integers(0, ROWS * BLOCK + 3, CASES).astype(np.int32)
  found = np.asarray(all_top_k(confidence, capacity, live))
  for i in range(CASES):
    order = visited(confidence[i], live[i])
    chosen = [row for _, row, _ in order[:capacity[i]]]
    np.testing.assert_array_equal(found[i], np.bincount(chosen, minlength=ROWS), f"case {i}")
    assert found[i].sum() == min(capacity[i], len(order))
  assert found.max() == BLOCK


def test_stale_capacity():
  """Kills: a capacity that is not the number of drafts the unconstrained search admitted."""
  (old, sps, live), (now, _, _) = random_cases(3), random_cases(4)
  _, _, best = all_schedules(old, sps, live)
  np.testing.assert_array_equal(best.capacity, np.asarray(best.lengths).sum(1))
  lengths = np.asarray(all_top_k(now, best.capacity, live))
  positive = ((np.cumprod(now, axis=2) > 0) & live[..., None]).sum((1, 2))
  np.testing.assert_array_equal(lengths.sum(1), np.minimum(best.capacity, positive))
  # Ranked by the old survival it would be another schedule.
  assert (lengths != np.asarray(all_top_k(old, best.capacity, live))).any()


def changed_by_later_drafts(lengths_of, seed=5):
  """How many rows get another length when the confidences behind their cut are replaced.

  The confidence of slot j is made of drafts 0..j-1, so a length l may depend on slots 0..l and no later one.
  """
  confidence, sps, live = random_cases(seed)
  other = np.random.default_rng(seed + 1).choice([0, 0.25, 1], size=confidence.shape).astype(np.float32)
  lengths = np.asarray(lengths_of(confidence, sps, live))
  changed = 0
  for row in range(ROWS):
    behind = (np.arange(ROWS)[:, None] == row) & (np.arange(BLOCK) > lengths[:, row, None, None])
    again = np.asarray(lengths_of(np.where(behind, other, confidence), sps, live))
    changed += (again[:, row] != lengths[:, row]).sum()
  return changed


def test_no_length_depends_on_what_it_cuts_off():
  """Kills: any look ahead along a row; the unconstrained search on this round's confidences is caught at it."""
  capacity = np.random.default_rng(6).integers(0, ROWS * BLOCK, CASES).astype(np.int32)
  assert changed_by_later_drafts(lambda *case: all_schedules(*case)[1].lengths) == 0
  assert changed_by_later_drafts(lambda confidence, _, live: all_top_k(confidence, capacity, live)) == 0
  assert changed_by_later_drafts(lambda *case: all_schedules(*case)[2].lengths) > 10


def test_survival_never_rises_along_a_row(monkeypatch):
  """Kills: a plain cumulative product, on a backend that multiplies pairwise: it rises where confidences are 1."""
  rng = np.random.default_rng(0)
  confidence = np.where(rng.random((1000, 8)) < 0.5, rng.uniform(0.5, 1, (1000, 8)), 1).astype(np.float32)
  pairwise = lambda x, axis: jax.lax.associative_scan(jnp.multiply, x, axis=axis)
  monkeypatch.setattr(jnp, "cumprod", pairwise)
  plain, a = jax.jit(lambda c: (pairwise(c, 1), scheduler.survival(c)))(confidence)
  assert (np.diff(plain, axis=1) > 0).any() and not (np.diff(a, axis=1) > 0).any()
  np.testing.assert_allclose(a, np.cumprod(confidence.astype(float), axis=1), rtol=1e-6)


def test_nan_confidence_ends_the_row():
  """Kills: NaN sorted to the front and verified. The round itself fails such a row."""
  confidence = np.float32([[0.5, np.nan, 0.5], [np.nan] * 3, [1, 1, 1], [0.5, 0.5, 0.5]])
  _, schedule, best = schedules(confidence, np.ones(17, np.float32), None)
  np.testing.assert_array_equal(schedule.lengths, [1, 0, 3, 3])
  np.testing.assert_array_equal(best.lengths, [1, 0, 3, 3])


def test_one_compilation_and_fixed_types():
  """Kills: a capacity, curve or mask baked into the program, and types that differ from round to round."""
  (confidence, sps, live), size = random_cases(), schedules._cache_size()
  found = [schedules(confidence[i], sps[i], live[i])[1:] for i in range(3)]
  assert schedules._cache_size() <= size + 1
  for schedule in (s for pair in found for s in pair):
    assert isinstance(schedule, Schedule) and schedule.lengths.shape == (ROWS,)
    assert (schedule.lengths.dtype, schedule.throughput.dtype) == (jnp.int32, jnp.float32)
    assert schedule.capacity.dtype == jnp.int32


def test_without_drafts():
  """Kills: a block of no drafts, as in plain decoding, that fails; and 0 rows times an unmeasured entry."""
  _, schedule, best = schedules(np.zeros((2, 0), np.float32), np.float32([9, 3, 2]), np.array([True, False]))
  assert not np.asarray(schedule.lengths).any() and not np.asarray(best.lengths).any()
  assert schedule.throughput == best.throughput == 3
  _, dead, _ = schedules(np.ones((2, 1), np.float32), np.full(5, np.inf, np.float32), np.zeros(2, bool))
  assert dead.throughput == 0 and not np.asarray(dead.lengths).any()


def test_a_short_curve_is_refused():
  """Kills: a look-up past the curve's end, which JAX answers with its last entry."""
  for search in (scheduler.early_stop, scheduler.best_prefix):
    with complains("15", "16", "4 rows of 3 drafts", "measure"):
      search(jnp.ones((ROWS, BLOCK)), jnp.ones(16))
