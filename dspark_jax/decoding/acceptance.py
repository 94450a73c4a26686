"""What the rounds of a set of texts say about a drafter: accepted length, acceptance by position, reliability.

Numpy in float64 on the host. The first token of a text comes from its prompt and belongs to no round. G is the block
size, N the rounds of one text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from dspark_jax.decoding.calibration import Reliability, reliability

RESAMPLES = 1000  # 25 of them lie beyond either end of the interval
COVERAGE = 0.95   # of the bootstrap interval


@dataclasses.dataclass(frozen=True)
class Rounds:
  """The rounds of one text."""
  n_accept: np.ndarray           # i[N]  drafts kept, 0..G
  n_verify: np.ndarray           # i[N]  drafts verified, 0..G; up to a stop token among the kept drafts
  n_commit: np.ndarray           # i[N]  tokens delivered: n_accept + 1, less what the end of the text cut off
  confidence: np.ndarray | None  # f[N,G]  P(draft k is kept | those before it are); None without a confidence head

  @classmethod
  def of(cls, n_accept: list[int], n_verify: list[int], n_commit: list[int], confidence=None) -> Rounds:
    """From lists as JSON has them."""
    plain = [np.asarray(x, np.int64) for x in (n_accept, n_verify, n_commit)]
    confidence = None if confidence is None else np.asarray(confidence, np.float64)  # no rounds: [], of one axis
    return cls(*plain, confidence if confidence is None or confidence.ndim == 2 else confidence.reshape(0, 0))


def delivered(n_accept: list[int], tokens: int) -> list[int]:
  """Tokens that each round brought to a text of `tokens` tokens as it was delivered: see `Rounds.n_commit`."""
  # The first token is of the prompt's pass. Where a stop token or the limit ended the text, the last round said more.
  ends = np.minimum(np.cumsum([kept + 1 for kept in n_accept]), tokens - 1)
  return np.diff(ends, prepend=0).astype(int).tolist()


def accepted_length(n_commit: Iterable[int]) -> float | None:
  """Tokens delivered per round, bonus tokens included, over all of these rounds; None without a round."""
  n_commit = list(n_commit)
  return _ratio(sum(n_commit), len(n_commit))


def summary(texts: list[Rounds], block_size: int) -> dict[str, Any]:
  """The metrics of these texts, ready for JSON; None where nothing was observed.

  accepted_length: tokens per round; accepted_length_interval: of 95 %, by resampling texts. acceptance[k]: P(draft k is
  kept | those before it are, and it is verified), reached[k]: how often that was so. survival[k]: drafts kept /
  verified at position k (the reference's accept_rates_by_position), verified[k]: the latter. verify_rate: tokens /
  (drafts verified + rounds). drafts_per_round: drafts verified / rounds.
  """
  n_accept, n_verify, n_commit = (np.concatenate([np.zeros(0, np.int64), *(getattr(text, name) for text in texts)])
                                  for name in ("n_accept", "n_verify", "n_commit"))
  kept, reached, verified = positions(n_accept, n_verify, block_size)
  rounds, drafts = len(n_accept), int(n_verify.sum())
  return dict(
      rounds=rounds, accepted_length=accepted_length(n_commit), accepted_length_interval=interval([texts]),
      acceptance=[_ratio(a, b) for a, b in zip(kept, reached)], reached=reached.tolist(),
      survival=[_ratio(a, b) for a, b in zip(kept, verified)], verified=verified.tolist(),
      verify_rate=_ratio(n_commit.sum(), drafts + rounds), drafts_per_round=_ratio(drafts, rounds),
      accepted_tokens=int(n_accept.sum()), rejected_tokens=int(drafts - n_accept.sum()))


def positions(n_accept: np.ndarray, n_verify: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Per position, in how many rounds its draft was kept, verified with all before it kept, and verified: i[G] each."""
  place = np.arange(block_size)
  kept, there = place < n_accept[:, None], place < n_verify[:, None]
  # Up to the first rejection, which counts as reached (<=), but not past the cut: nobody saw what comes there.
  return kept.sum(0), ((place <= n_accept[:, None]) & there).sum(0), there.sum(0)


def interval(runs: list[list[Rounds]]) -> list[float] | None:
  """[low, high] of the accepted length, bootstrapped over texts: the rounds of one text are not independent.

  Several runs (drafters of the same kind trained with other seeds), which decoded the same texts in the same order, are
  resampled, too.
  """
  counts = _counts(runs)
  return _spread(_resampled(counts)) if counts.size else None


def difference(mine: list[dict[str, Rounds]], base: list[dict[str, Rounds]]) -> dict[str, Any]:
  """Accepted length of `mine` less that of `base`, on the same texts by id, a dictionary per run (see `interval`):
  {"difference", "interval" of 95 %, "by_run"}.

  Texts are resampled in pairs: some are easy for every drafter, which is no difference between them. So are runs, as
  those of one seed share the order of the data. ValueError for other texts, or another number of runs.
  """
  ids, all_ids = (join(*map(set, mine + base)) for join in (set.intersection, set.union))
  if ids != all_ids or len(mine) != len(base):
    raise ValueError(f"drafters are compared on other samples: {len(all_ids - ids)} of {len(all_ids)} were decoded "
                     f"with some of them only, in {len(mine)} and {len(base)} runs; evaluate them again")
  counts = _counts([[run[name] for name in mine[0]] for run in mine + base])
  if not counts.size:
    return {"difference": None, "interval": None, "by_run": [None] * len(mine)}
  length = lambda counts: counts[..., 0] / counts[..., 1]
  mine, base = np.split(counts, 2)
  return {"difference": float(length(mine.sum((0, 1))) - length(base.sum((0, 1)))),
          "interval": _spread(_resampled(mine) - _resampled(base)),
          "by_run": (length(mine.sum(1)) - length(base.sum(1))).tolist()}


def _counts(runs: list[list[Rounds]]) -> np.ndarray:
  """Tokens and rounds, i[runs,texts,2], of those texts that have rounds in every run."""
  counts = [[(text.n_commit.sum(), len(text.n_commit)) for text in run] for run in runs]
  counts = np.array(counts, np.int64).reshape(len(runs), -1, 2)
  # A text without rounds (its first token ended it) has no length, and runs are compared on the same texts.
  return counts[:, (counts[..., 1] > 0).all(0)]


def _resampled(counts: np.ndarray) -> np.ndarray:
  """Accepted lengths of RESAMPLES draws of texts and runs, the same for every call with as many: f[RESAMPLES]."""
  # Of each draw: sum(counts[r, t] for r in its runs for t in its texts), tokens / rounds. A ratio of sums: a mean over
  # texts would let a text of two rounds weigh as much as one of two hundred.
  rng = np.random.default_rng(0)
  runs, texts, _ = counts.shape
  drawn = rng.integers(0, texts, (RESAMPLES, 1, texts))  # the same texts for all runs of a draw, as in the data
  tokens, rounds = counts[rng.integers(0, runs, (RESAMPLES, runs, 1)), drawn].sum((1, 2)).T
  return tokens / rounds


def _spread(values: np.ndarray) -> list[float]:
  return np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()


def reliability_of(texts: list[Rounds], block_size: int, temperatures=None) -> Reliability | None:
  """How far the predicted survival of verified drafts can be trusted; None without confidences.

  temperatures: f[G], those that the confidences were calibrated with, to undo it (None: as they are).
  """
  texts = [text for text in texts if text.confidence is not None and len(text.n_accept)]
  if not texts:
    return None
  confidence = np.concatenate([text.confidence for text in texts])
  if temperatures is not None:
    confidence = uncalibrate(confidence, np.asarray(temperatures, np.float64))
  n_accept, n_verify = (np.concatenate([getattr(text, name) for text in texts]) for name in ("n_accept", "n_verify"))
  return reliability(np.cumprod(confidence, axis=1), np.arange(block_size) < n_accept[:, None], n_verify)


def uncalibrate(confidence: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
  """sigmoid(logit(confidence) * temperature): what `calibration.calibrate` was given, f[N,G]; exactly 0 and 1 stay."""
  with np.errstate(divide="ignore"):
    logits = (np.log(confidence) - np.log1p(-confidence)) * temperatures
  return np.exp(-np.logaddexp(0, -logits))  # 1 / (1 + exp(-x)) overflows


def _ratio(a, b) -> float | None:
  return float(a / b) if b else None
