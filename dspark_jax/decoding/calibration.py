"""Sequential Temperature Scaling of confidences (DSpark, 3.2.1), and how good they are by position.

Fitting and measuring are numpy in float64 on the host; only `calibrate` runs in a round. K positions of a block.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import name_shown, raise_all
from dspark_jax.types import Array

BINS = 20         # of the calibration error and the reliability diagram
FINE_BINS = 1000  # of the AUC
EPSILON = 1e-8    # predictions are clipped to EPSILON..1 - EPSILON
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)  # of temperatures
GRID = tuple(n / 10 for n in range(5, 51))  # 0.5, 0.6, ..., 5.0


@dataclasses.dataclass(frozen=True)
class Temperatures:
  """What was fitted for one drafter. ValueError, for all sets at once, unless each is block_size positive numbers."""
  block_size: int                        # G, the drafter's
  by_mode: dict[str, tuple[float, ...]]  # one set per mode of sampling: "greedy", "T=1", ...

  def __post_init__(self):
    raise_all("temperatures", [
        f"mode {mode!r} has {len(values)}, the drafter's block size is {self.block_size}: fit them for this drafter"
        for mode, values in self.by_mode.items() if len(values) != self.block_size] + [
        f"mode {mode!r} has {value} at position {k}, expected a finite number > 0: 1 leaves a confidence as it is"
        for mode, values in self.by_mode.items() for k, value in enumerate(values)
        if not SMALLEST <= value <= LARGEST])

  def for_mode(self, mode: str) -> Array:
    """f32[G]. ValueError for a mode without a fit: another mode's temperatures do not calibrate it."""
    if mode not in self.by_mode:
      known = ", ".join(map(name_shown, self.by_mode)) or "none"
      raise ValueError(f"no temperatures for mode {mode!r}, there are {known}: fit them on rounds sampled in that mode")
    return jnp.asarray(self.by_mode[mode], jnp.float32)


def mode_name(temperature: float) -> str:
  """The mode that rounds sampled at `temperature` are of; top-k and top-p make no mode of their own."""
  return "greedy" if temperature == 0 else f"T={temperature:g}"


def calibrate(confidence: Array, temperatures: Array) -> Array:
  """sigmoid(logit(confidence) / temperature): f32[B,G] in 0..1, in the same order at a position.

  confidence: f32[B,G] in 0..1; exactly 0 and 1 stay. temperatures: f32[G], or f32[B,G] where each row has its own; 1
  changes nothing but last bits.
  """
  if temperatures.shape not in (confidence.shape[1:], confidence.shape):
    raise ValueError(f"temperatures have shape {temperatures.shape}, confidences {confidence.shape}: expected one "
                     f"temperature per draft of a block")
  logits = jnp.log(confidence) - jnp.log1p(-confidence)
  return jax.nn.sigmoid(logits / jnp.broadcast_to(temperatures, logits.shape))


def fit_temperatures(confidence_logits: np.ndarray, accepted: np.ndarray, grid=GRID,
                     effective_length: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Temperatures f64[K], and the calibration error f64[K,M] at each of the M grid points given those before.

  confidence_logits: f[N,K]; the logit of a `Proposal.confidence` of 0 or 1 is infinite, and may be. accepted:
  [N,K], 1 iff drafts 0..k were all kept. Only the first effective_length (i[N], None: K) positions of a row are
  observed; the others may hold NaN. Left to right, the first minimum of the survival's error. ValueError for a
  position that no row observes.
  """
  grid = np.asarray(grid, np.float64)
  if grid.ndim != 1 or not grid.size or not np.all((grid > 0) & np.isfinite(grid)):
    raise ValueError(f"the grid of temperatures is {grid.tolist()}, expected a list of finite numbers > 0")
  logits, accepted, observed = _observations(confidence_logits, accepted, effective_length)
  if not observed.any(0).all():
    raise ValueError(f"position {np.argmin(observed.any(0))} is not observed in any of {len(logits)} rows: "
                     f"temperatures need rounds that verify whole blocks")
  best, table, before = [], [], 1.0
  for k in range(logits.shape[1]):
    predicted = before * _sigmoid(logits[:, k, None] / grid)  # f64[N,M]: every temperature of this position at once
    label, there = (np.broadcast_to(x[:, k, None], predicted.shape) for x in (accepted, observed))
    table.append(_error(*_bins(_clip(predicted), label, there)))
    best.append(int(np.argmin(table[-1])))
    before = predicted[:, best[-1], None]
  return grid[best], np.array(table)


@dataclasses.dataclass(frozen=True)
class Reliability:
  """Predicted survival against what was accepted, by position. NaN where a position was never observed."""
  ece: np.ndarray             # f64[K]  expected calibration error: mean |predicted - accepted| of bins, by count
  auc: np.ndarray             # f64[K]  P(an accepted prefix is ranked above a rejected one); NaN without both kinds
  brier: np.ndarray           # f64[K]  mean squared error
  pred_mean: np.ndarray       # f64[K]
  target_mean: np.ndarray     # f64[K]
  total_weight: np.ndarray    # f64[K]  rows observed
  bin_count: np.ndarray       # f64[K,BINS]  the reliability diagram: bin b is predictions in [b, b + 1) / BINS
  bin_pred_sum: np.ndarray    # f64[K,BINS]
  bin_target_sum: np.ndarray  # f64[K,BINS]

  def summary(self) -> dict[str, float]:
    """Means over positions weighted by rows, over the positions that have a value; NaN if none has."""
    return {name if name.endswith("_mean") else f"{name}_mean": _mean(getattr(self, name), self.total_weight)
            for name in ("ece", "auc", "brier", "pred_mean", "target_mean")}

  def to_json(self) -> dict[str, Any]:
    """Fields as nested lists, and `summary`; None for NaN, which JSON lacks."""
    plain = {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}
    return _without_nan(plain | {"summary": self.summary()})


def reliability(survival: np.ndarray, accepted: np.ndarray, effective_length: np.ndarray | None = None) -> Reliability:
  """How far predicted survival, f[N,K], can be trusted.

  accepted: [N,K], whether drafts 0..k were all kept, or the probability of it. effective_length: i[N], only the first
  so many positions of a row are observed (None: K); the others may hold NaN.
  """
  predicted, target, observed = _observations(survival, accepted, effective_length)
  predicted = _clip(predicted)
  bins = _bins(predicted, target, observed)
  count, pred_sum, target_sum = bins
  weight = count.sum(1)
  rows, _, positive = _bins(predicted, target, observed, FINE_BINS)
  square = (observed * (predicted - target) ** 2).sum(0)
  return Reliability(_error(*bins), _auc(positive, rows - positive), _ratio(square, weight),
                     _ratio(pred_sum.sum(1), weight), _ratio(target_sum.sum(1), weight), weight, *bins)


def _observations(predicted, target, effective_length):
  """(predicted, target) in float64, 0 where not observed, and bool[N,K]. ValueError for shapes that differ, or NaN."""
  predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
  if predicted.ndim != 2 or predicted.shape != target.shape:
    raise ValueError(f"predictions have shape {predicted.shape}, labels {target.shape}: expected two [rows, positions]")
  lengths = np.full(len(target), target.shape[1]) if effective_length is None else np.asarray(effective_length)
  if lengths.shape != target.shape[:1]:
    raise ValueError(f"effective_length has shape {lengths.shape}, expected one number for each of {len(target)} rows")
  observed = np.arange(target.shape[1]) < lengths[:, None]
  if np.isnan((predicted + target)[observed]).any():
    raise ValueError("NaN among the observed predictions or labels: the drafter is broken, or effective_length is "
                     "too long")
  return np.where(observed, predicted, 0), np.where(observed, target, 0), observed


def _bins(predicted, target, observed, bins=BINS):
  """Count, sum of predicted and sum of target of each column's bins: f64[K,bins] each. predicted: clipped."""
  columns = predicted.shape[1]
  predicted, target, column = predicted[observed], target[observed], np.nonzero(observed)[1]
  cell = column * bins + (predicted * bins).astype(int)  # clipped below 1: never the bin past the last
  return [np.bincount(cell, values, columns * bins).reshape(columns, bins)
          for values in (np.ones_like(predicted), predicted, target)]


def _error(count, pred_sum, target_sum):
  return _ratio(np.abs(pred_sum - target_sum).sum(1), count.sum(1))


def _auc(positive, negative):
  """From histograms f64[K,bins]; within a bin a pair counts 1/2."""
  below = np.cumsum(negative, axis=1) - negative
  return _ratio((positive * (below + negative / 2)).sum(1), positive.sum(1) * negative.sum(1))


def _ratio(a, b):
  return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b > 0)


def _mean(values, weights):
  there = ~np.isnan(values)
  return float(_ratio((values * weights)[there].sum(keepdims=True), weights[there].sum(keepdims=True))[0])


def _clip(predicted):
  return np.clip(predicted, EPSILON, 1 - EPSILON)


def _sigmoid(logits):
  return np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + exp(-x)) overflows


def _without_nan(tree):
  if isinstance(tree, dict):
    return {name: _without_nan(value) for name, value in tree.items()}
  if isinstance(tree, list):
    return [_without_nan(value) for value in tree]
  return None if math.isnan(tree) else tree
