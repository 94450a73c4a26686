"""Calibration: goldens, brute force, and what a temperature must keep."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dspark_jax.decoding import calibration
from dspark_jax.decoding.calibration import Temperatures, fit_temperatures, reliability
from folders import GOLDEN, complains, golden_cases

NAMES = ("ece", "auc", "brier", "pred_mean", "target_mean", "total_weight")
calibrate = jax.jit(calibration.calibrate)


def golden(case):
  return tuple(dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))


def survival(confidence):
  """f64[N,K], as the goldens take the product."""
  return np.cumprod(confidence, axis=1, dtype=np.float64)


def rounds(n=4000, block=4, sharpness=1.0, seed=0):
  """(confidence logits, accepted) of n blocks; sharpness 1 is perfectly calibrated, 2 twice too sure of itself."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0.8, 1.5, (n, block))
  accepted = np.cumprod(rng.random((n, block)) < special.expit(logits), axis=1)
  return sharpness * logits, accepted


@pytest.mark.parametrize("case", golden_cases("", "bin_count"))
def test_golden_metrics(case):
  """Kills: unobserved positions counted, ties of the AUC at 0 or 1, bins of equal count, unweighted summaries."""
  given, expected = golden(case)
  found = reliability(survival(special.expit(given["confidence_logits"])), given["prefix_labels"],
                      given["effective_length"])
  for name in (*NAMES, "bin_count", "bin_pred_sum", "bin_target_sum"):
    np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-6, atol=1e-9, err_msg=name)
  summary = {name.removeprefix("summary/"): value for name, value in expected.items() if name.startswith("summary/")}
  assert summary.keys() == found.summary().keys()
  np.testing.assert_allclose([found.summary()[name] for name in summary], list(summary.values()), rtol=1e-6)


@pytest.mark.parametrize("case", golden_cases("", "soft/ece"))
def test_golden_soft_labels(case):
  """Kills: soft labels rounded to 0 or 1, and a position that nothing observed taken for a perfect one."""
  given, expected = golden(case)
  pad = lambda x: np.pad(x, [(0, 0), (0, 1)], constant_values=np.nan)
  rows, block = given["soft_probs"].shape
  found = reliability(pad(given["soft_probs"]), pad(given["soft_targets"]), np.full(rows, block))
  for name in NAMES:
    np.testing.assert_allclose(getattr(found, name), expected[f"soft/{name}"], rtol=1e-9, err_msg=name)
  assert np.isnan(found.ece[block]) and np.isfinite(list(found.summary().values())).all()


def test_auc_is_the_share_of_ordered_pairs():
  """Kills: an AUC of positives below negatives, or one that bins hide. Values on a grid coarser than the bins."""
  rng = np.random.default_rng(0)
  predicted, accepted = rng.integers(0, 10, (80, 2)) / 10 + 0.05, rng.random((80, 2)) < 0.4
  for k in range(2):
    positive, negative = predicted[accepted[:, k], k], predicted[~accepted[:, k], k]
    pairs = np.sign(positive[:, None] - negative[None])
    assert math.isclose(reliability(predicted, accepted).auc[k], (pairs.mean() + 1) / 2)


def test_one_kind_of_label_has_no_auc():
  """Kills: 0 / 0 as an AUC of 0, and one such position that spoils the summary or the JSON."""
  logits, accepted = rounds(200, 3)
  accepted[:, 2] = 0
  found = reliability(survival(special.expit(logits)), accepted)
  assert np.isnan(found.auc).tolist() == [False, False, True] and np.isfinite(found.ece).all()
  assert math.isclose(found.summary()["auc_mean"], found.auc[:2].mean())
  plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
  assert plain["auc"][2] is None and plain["ece"] == found.ece.tolist() and plain["summary"] == found.summary()
  assert np.shape(plain["bin_count"]) == (3, 20)


def test_extreme_predictions():
  """Kills: 1 in a bin past the last, and an observed 0 or 1 that is lost."""
  found = reliability(np.array([[0.0], [1.0], [1.0], [0.0]]), np.array([[0], [1], [0], [1]]))
  np.testing.assert_array_equal(found.bin_count[0], [2] + [0] * 18 + [2])
  np.testing.assert_allclose([found.ece[0], found.auc[0], found.brier[0]], [0.5, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("case", golden_cases("", "ece_table"))
def test_golden_temperatures(case, monkeypatch):
  """Kills: each position on its own, the conditional label, 1 / T, bins not weighted by count."""
  given, expected = golden(case)
  count, real = json.loads((GOLDEN / case / "meta.json").read_text())["num_bins"], calibration._bins
  monkeypatch.setattr(calibration, "_bins", lambda said, was, seen, bins=count: real(said, was, seen, bins))
  temperatures, table = fit_temperatures(given["confidence_logits"], given["prefix_labels"], given["temperature_grid"])
  np.testing.assert_array_equal(temperatures, expected["temperatures"])
  np.testing.assert_allclose(table, expected["ece_table"], rtol=1e-6)
  logits = given["confidence_logits"].astype(np.float64)
  for confidence, name in ((special.expit(logits), "ece_before"), (special.expit(logits / temperatures), "ece_after")):
    found = reliability(survival(confidence), given["prefix_labels"])
    np.testing.assert_allclose(found.ece, expected[name], rtol=1e-6)


def test_the_grid_is_the_paper_s():
  """Kills: temperatures that no fit can find, as they are between those that are tried, or beyond them."""
  np.testing.assert_allclose(calibration.GRID, np.arange(5, 51) / 10, rtol=1e-12)


def test_what_was_fitted_is_what_calibrate_does():
  """Kills: a fit on logits that the round, which sees float32 probabilities, cannot follow: error or order differ."""
  logits, accepted = rounds(sharpness=2.0)
  confidence = np.float32(special.expit(np.float32(logits)))
  temperatures, table = fit_temperatures(special.logit(confidence), accepted)
  after = np.asarray(calibrate(confidence, np.float32(temperatures)))
  ece_before, ece_after = (reliability(survival(c), accepted).ece for c in (confidence, after))
  np.testing.assert_allclose(ece_after, table.min(1), atol=1e-4)
  assert (ece_after < 0.5 * ece_before).all()
  for before, now in zip(confidence.T, after.T):
    order = np.argsort(before)
    assert (np.diff(now[order]) >= -1e-6).all()


def test_perfect_confidences_are_left_alone():
  """Kills: an error that prefers some temperature by construction (by bin edges, clipping, or the wrong label)."""
  logits, accepted = rounds(100_000, 3)
  temperatures, table = fit_temperatures(logits, accepted, [0.5, 0.8, 1.0, 1.25, 2.0])
  np.testing.assert_array_equal(temperatures, 1)
  assert table[:, 2].max() < 0.01


def test_first_minimum():
  """Kills: the last of equals. Infinite logits give the same error at every temperature, and no NaN."""
  logits = np.where(rounds(50)[1], np.inf, -np.inf)
  temperatures, table = fit_temperatures(logits, logits > 0, [3.0, 1.0, 2.0])
  np.testing.assert_array_equal(temperatures, 3.0)
  np.testing.assert_allclose(table, 0, atol=1e-7)


def test_only_observed_positions_are_fitted():
  """Kills: effective_length ignored, or off by one: what is not observed is NaN, and must not be read."""
  logits, accepted = rounds(3000, 3, sharpness=1.7)
  lengths = np.random.default_rng(1).integers(0, 4, 3000)
  hidden = np.arange(3) >= lengths[:, None]
  whole = fit_temperatures(logits, accepted)
  temperatures, table = fit_temperatures(
      np.where(hidden, np.nan, logits), np.where(hidden, np.nan, accepted), effective_length=lengths)
  expected = []
  for k in range(3):  # position k of the rows that observe it, given the temperatures before
    rows = lengths > k
    scale = np.array([*temperatures[:k], 1.0])
    ece = [reliability(survival(special.expit(logits[rows, :k + 1] / [*scale[:k], t])), accepted[rows, :k + 1]).ece[k]
           for t in calibration.GRID]
    expected.append(ece)
  np.testing.assert_allclose(table, expected, rtol=1e-9)
  assert (table != whole[1]).any()
  with complains("position 2", "3000 rows"):
    fit_temperatures(logits, accepted, effective_length=np.minimum(lengths, 2))


def test_calibrate():
  """Kills: NaN at 0 or 1, T multiplied for divided, slots that swap their temperatures, T = 1 that changes a value."""
  confidence = np.float32([[0, 1e-20, 1e-6, 0.1], [0.5, 0.9, 1 - 1e-6, 1]])
  np.testing.assert_allclose(calibrate(confidence, np.ones(4, np.float32)), confidence, rtol=1e-5)
  temperatures = np.float32([0.5, 2, 3, 0.05])
  expected = special.expit(special.logit(confidence.astype(float)) / temperatures)
  np.testing.assert_allclose(calibrate(confidence, temperatures), expected, rtol=1e-5)
  assert calibrate(confidence, temperatures).dtype == jnp.float32
  ends = calibrate(np.float32([[0, 0, 0, 0], [1, 1, 1, 1]]), temperatures)
  np.testing.assert_array_equal(ends, np.float32([[0] * 4, [1] * 4]))


def test_temperatures_by_mode():
  """Kills: greedy rounds calibrated by what was fitted at temperature 1."""
  table = Temperatures(3, {"greedy": (1.0, 1.5, 2.0), "T=1": [0.9, 1.0, 1.1]})
  np.testing.assert_array_equal(table.for_mode("T=1"), np.float32([0.9, 1.0, 1.1]))
  assert table.for_mode("greedy").dtype == jnp.float32
  with complains("T=0.7", "greedy, T=1", "fit"):
    table.for_mode("T=0.7")
  with complains("none"):
    Temperatures(3, {}).for_mode("greedy")


@pytest.mark.parametrize("values, parts", [
    ((1.0, 1.0), ("greedy", "2", "3", "fit")), ((1.0,) * 4, ("greedy", "4", "3")),
    ((1.0, 0.0, 1.0), ("0.0", "position 1")), ((1.0, 1.0, -2.0), ("-2.0", "position 2")),
    ((math.inf, 1.0, 1.0), ("inf",)), ((math.nan, 1.0, 1.0), ("nan",))])
def test_wrong_temperatures_are_refused(values, parts):
  """Kills: a table of the wrong length that is broadcast or cut, and temperatures that turn confidences round."""
  with complains(*parts):
    Temperatures(3, {"greedy": values, "T=1": (1.0,) * 3})


def test_wrong_arrays_are_refused():
  """Kills: one temperature for all slots by broadcasting, NaN that lands in a bin, labels of another run."""
  with complains("(1,)", "(2, 3)"):
    calibration.calibrate(jnp.ones((2, 3)), jnp.ones(1))
  logits, accepted = rounds(10, 3)
  with complains("(10, 3)", "(9, 3)"):
    reliability(logits, accepted[:9])
  with complains("(9,)", "10 rows"):
    reliability(special.expit(logits), accepted, np.full(9, 3))
  with complains("NaN"):
    fit_temperatures(np.where(logits == logits[0, 0], np.nan, logits), accepted)
  for grid in ([], [1.0, 0.0], [1.0, math.inf]):
    with complains("grid"):
      fit_temperatures(logits, accepted, grid)


def test_nothing_observed():
  """Kills: an error of NumPy's where no round was observed at all; every number is NaN then, and JSON has none."""
  nothing = reliability(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(2))
  assert np.isnan(nothing.ece).all() and nothing.to_json()["summary"]["ece_mean"] is None
