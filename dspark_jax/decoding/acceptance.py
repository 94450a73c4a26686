"""What the rounds of a set of texts say about a drafter: accepted length, acceptance by position, reliability.

Numpy in float64 on the host. The first token of a text comes from its prompt and belongs to no round. G is the block
size, N the rounds of one text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dspark_jax.decoding.calibration import Reliability, reliability

RESAMPLES = 1000
COVERAGE = 0.95  # of the bootstrap interval


@dataclasses.dataclass(frozen=True)
class Rounds:
  """The rounds of one text."""
  n_accept: np.ndarray           # i[N]  drafts kept, 0..G
  n_verify: np.ndarray           # i[N]  drafts verified, 0..G; up to a stop token among the kept drafts
  n_commit: np.ndarray           # i[N]  tokens that came of it: n_accept + 1, without the + 1 after such a stop token
  confidence: np.ndarray | None  # f[N,G]  P(draft k is kept | those before it are); None without a confidence head

  @classmethod
  def of(cls, n_accept: list[int], n_verify: list[int], n_commit: list[int], confidence=None) -> Rounds:
    """From lists as JSON has them."""
    plain = [np.asarray(x, np.int64) for x in (n_accept, n_verify, n_commit)]
    return cls(*plain, None if confidence is None else np.asarray(confidence, np.float64).reshape(len(n_accept), -1))


def commits(n_accept: list[int], count: int) -> list[int]:
  """Tokens of each round of a text of `count` tokens (before it is cut to a limit): see `Rounds.n_commit`."""
  lengths = [n + 1 for n in n_accept]
  surplus = 1 + sum(lengths) - count  # the bonus token that a stop token among the last round's drafts forbade
  assert surplus in (0, 1) and (lengths or not surplus), (n_accept, count)
  return lengths[:-1] + [lengths[-1] - surplus] if lengths else []


def summary(texts: list[Rounds], block_size: int) -> dict[str, Any]:
  """The metrics of these texts, ready for JSON; None where nothing was observed.

  accepted_length: tokens per round; accepted_length_interval: of 95 %, by resampling texts. acceptance[k]: P(draft k is
  kept | those before it are, and it is verified), reached[k]: how often that was so. survival[k]: drafts kept / verified
  at position k (the reference's accept_rates_by_position), verified[k]: the latter. verify_rate: tokens / (drafts
  verified + rounds). drafts_per_round: drafts verified / rounds.
  """
  n_accept, n_verify, n_commit = (np.concatenate([np.zeros(0, np.int64), *(getattr(text, name) for text in texts)])
                                  for name in ("n_accept", "n_verify", "n_commit"))
  kept, reached, verified = positions(n_accept, n_verify, block_size)
  rounds, drafts = len(n_accept), int(n_verify.sum())
  return dict(
      rounds=rounds, accepted_length=_ratio(n_commit.sum(), rounds), accepted_length_interval=interval(texts),
      acceptance=[_ratio(a, b) for a, b in zip(kept, reached)], reached=reached.tolist(),
      survival=[_ratio(a, b) for a, b in zip(kept, verified)], verified=verified.tolist(),
      verify_rate=_ratio(n_commit.sum(), drafts + rounds), drafts_per_round=_ratio(drafts, rounds),
      accepted_tokens=int(n_accept.sum()), rejected_tokens=int(drafts - n_accept.sum()))


def positions(n_accept: np.ndarray, n_verify: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Per position, in how many rounds its draft was kept, verified with all before it kept, and verified: i[G] each."""
  place = np.arange(block_size)
  kept, there = place < n_accept[:, None], place < n_verify[:, None]
  return kept.sum(0), ((place <= n_accept[:, None]) & there).sum(0), there.sum(0)


def interval(texts: list[Rounds]) -> list[float] | None:
  """[low, high] of the accepted length, bootstrapped over texts: the rounds of one text are not independent."""
  tokens = np.array([text.n_commit.sum() for text in texts if len(text.n_commit)])
  rounds = np.array([len(text.n_commit) for text in texts if len(text.n_commit)])
  if not len(rounds):
    return None
  drawn = np.random.default_rng(0).integers(0, len(rounds), (RESAMPLES, len(rounds)))
  lengths = tokens[drawn].sum(1) / rounds[drawn].sum(1)
  return np.quantile(lengths, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()


def difference(mine: dict[str, Rounds], base: dict[str, Rounds]) -> dict[str, Any]:
  """Accepted length of `mine` less that of `base`, on the same texts by id: {"difference", "interval" of 95 %}.

  Texts are resampled in pairs: some are easy for every drafter, which is no difference between them. ValueError for
  other texts.
  """
  if set(mine) != set(base):
    raise ValueError(f"drafters are compared on other samples: {len(set(mine) ^ set(base))} of {len(set(mine) | set(base))} "
                     f"were decoded with one of them only; evaluate both again")
  names = [name for name in mine if len(mine[name].n_commit) and len(base[name].n_commit)]
  if not names:
    return {"difference": None, "interval": None}
  count = lambda texts, of: np.array([of(texts[name].n_commit) for name in names], np.float64)
  drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
  length = lambda texts, rows: count(texts, np.sum)[rows].sum(-1) / count(texts, len)[rows].sum(-1)
  gap = length(mine, drawn) - length(base, drawn)
  whole = np.arange(len(names))
  return {"difference": float(length(mine, whole) - length(base, whole)),
          "interval": np.quantile(gap, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()}


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
  return np.exp(-np.logaddexp(0, -logits))


def _ratio(a, b) -> float | None:
  return float(a / b) if b else None
