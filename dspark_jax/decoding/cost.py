"""What the engine's programs cost on one machine, and which of them brings most tokens a second for the survivals at
hand (DSpark, 3.2.2: SPS; 5.2).

A step's time is `seconds` at a reference context, and `slope` for every token by which the rows' mean context differs
from it. Nothing is interpolated between buckets: a program takes its time whether its tokens are asked for or not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import numpy as np

from dspark_jax.config import Count, Natural, Range, raise_all, wrong_choices

Program = str | int  # "plain", "full", or the tokens of a packed bucket
Seconds = Annotated[float, Range(0)]
PROBE = 0.01  # share of the time that may go to finding out whether drafting has begun to pay
LEAST = 0.1   # of a step's seconds: a slope that was measured at long contexts makes nothing free at short ones


@dataclasses.dataclass(frozen=True)
class Step:
  """One executable."""
  seconds: Seconds     # median of repeated runs at `Cost.context` committed tokens in each row
  slope: float = 0.0   # seconds more for a token more of the rows' mean context

  def at(self, distance: float) -> float:
    """Seconds so many tokens from the reference context."""
    return max(self.seconds + self.slope * distance, LEAST * self.seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket(Step):
  """Verification of packed tokens."""
  tokens: Count  # N, anchors included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What an engine's programs cost. `infer.profile_sps` measures it; JSON in and out by `config`."""
  machine: str
  device: str        # jax's device kind
  target: str
  drafter: str | None
  dtype: str
  seats: Count       # R: rows of every program
  block: Natural     # G; 0 without a drafter
  capacity: Count    # S slots of a seat
  context: Natural   # committed tokens of each row while it was measured
  source: str        # measured, or compiler and its topology
  chunk: Count       # tokens of a prompt beside a round
  plain: Step        # [R,1]: taps and absorbs, but does not draft
  plain_chunk: Step
  draft: Step | None = None  # the block, and the order of its drafts
  full: Step | None = None   # verification of [R,G+1], unpacked
  full_chunk: Step | None = None
  packed: tuple[Bucket, ...] = ()  # ascending

  def __post_init__(self):
    problems, sizes = wrong_choices(self), self.buckets
    most = self.seats * (self.block + 1)
    if sizes != tuple(sorted(set(sizes))) or sizes and not self.seats < sizes[0] <= sizes[-1] < most:
      problems.append(f"packed has buckets of {sizes} tokens, expected them ascending, above {self.seats} and below "
                      f"{most}, the tokens of a plain and a full round")
    drafts = (self.draft, self.full, self.full_chunk)
    if (self.block > 0) != all(drafts) or (self.block == 0 and any((*drafts, self.packed))):
      problems.append(f"block is {self.block}, expected draft, full and full_chunk where it is above 0, none of them "
                      f"(and nothing packed) where it is 0")
    raise_all("cost table", problems)

  @property
  def buckets(self) -> tuple[int, ...]:
    """Tokens of the packed programs."""
    return tuple(step.tokens for step in self.packed)

  @property
  def programs(self) -> tuple[Program, ...]:
    """What a round may run, by ascending tokens."""
    return ("plain", *self.buckets, *(["full"] if self.full else []))

  def tokens(self, program: Program) -> int:
    """That the target runs for the rows."""
    return {"plain": self.seats, "full": self.seats * (self.block + 1)}.get(program, program)

  def seconds(self, program: Program, context: float, chunk: bool = False) -> float:
    """Of a round at this mean context, its draft included; chunk: beside tokens of a prompt (plain and full alone)."""
    away = context - self.context
    if program == "plain":
      return (self.plain_chunk if chunk else self.plain).at(away)
    if chunk and program != "full":
      raise ValueError(f"a round of {program} packed tokens has no room for a prompt's: only plain and full have")
    if program == "full":
      verify = self.full_chunk if chunk else self.full
    else:
      verify = self.packed[self.buckets.index(program)]
    return self.draft.at(away) + verify.at(away)

  def sps(self, context: float) -> np.ndarray:
    """f64[R*(G+1)+1]: drafted rounds per second with so many tokens to verify, at a mean context. A step function: what
    exceeds a bucket costs the next."""
    sizes = np.asarray([self.tokens(program) for program in self.programs[1:]])
    rates = np.asarray([1 / max(self.seconds(program, context), 1e-12) for program in self.programs[1:]])
    return rates[np.searchsorted(sizes, np.arange(sizes[-1] + 1))]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A program, and what is expected of it."""
  program: Program
  budget: int               # drafts that it has room for
  seconds: float
  tokens_per_second: float


def choose(cost: Cost, survival: np.ndarray, context: float, *, chunk: bool = False, drafts: bool = False) -> Choice:
  """The program of the most expected tokens per second, the smallest of equals.

  survival: f[n,G] of the n live rows, non-increasing in G, or f[H,n,G] of H rounds, whose expectations are averaged: a
  round of few rows says little of the next, and going by it alone loses a fifth (infer.simulate --history 1). For a
  lossless choice none of them may be this round's: the search goes past dips of the curve. What is 0 or NaN brings
  nothing. chunk: of a prompt is read beside, for which plain and full have room. drafts: a plain round is none of the
  candidates. ValueError for more rows than seats.
  """
  rounds = survival if survival.ndim == 3 else survival[None]
  live = rounds.shape[1]
  ordered = np.where(rounds > 0, rounds, 0).reshape(len(rounds), -1)
  ordered.sort(axis=1)
  likeliest = ordered.mean(0)[::-1] if len(rounds) > 1 else ordered[0, ::-1]
  gains = np.concatenate([[live], live + np.cumsum(likeliest, dtype=np.float64)])
  best = None
  for program in cost.programs:
    if chunk and program not in ("plain", "full") or drafts and program == "plain" or cost.tokens(program) < live:
      continue
    budget = 0 if program == "plain" else cost.tokens(program) - live
    seconds = cost.seconds(program, context, chunk)
    rate = gains[min(budget, len(gains) - 1)] / max(seconds, 1e-12)
    if best is None or rate > best.tokens_per_second:
      best = Choice(program, budget, seconds, float(rate))
  if best is None:
    raise ValueError(f"no program has room for {live} rows: the cost table is of {cost.seats} seats")
  return best


def probe_interval(cost: Cost, context: float) -> int:
  """Plain rounds after which a drafted one is played, so that whether drafting has begun to pay becomes known. At worst
  it brings no more than a plain round, and costs PROBE of the time."""
  if not cost.full:
    return 2 ** 31
  least = min(cost.seconds(program, context) for program in cost.programs[1:])
  return max(math.ceil((least / max(cost.seconds("plain", context), 1e-12) - 1) / PROBE), 1)


def check_device(cost: Cost, device: str) -> None:
  """ValueError for a table of another kind of device."""
  if cost.device != device:
    raise ValueError(f"the cost table is of {cost.device} ({cost.source}), this is {device}: measure one here (python "
                     f"-m infer.profile_sps)")
