"""Which program a round of the engine runs, from what was learnt two rounds before and from what each program costs.

On the host, in tens of microseconds. Every choice follows from the past alone, so any search is lossless; what this
round's drafts decide is only their own order (`executables.draft`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.decoding.cost import Cost, Program, choose
from dspark_jax.types import Drafter

POLICIES = ("plain", "fixed", "threshold", "early-stop", "scheduled")
BY_COST = ("early-stop", "scheduled")
# A choice goes by so many rounds of each row at most, and by about so many rows in all: a round of few rows says little
# of the next. In an earlier infer.simulate --lengths 1.8, by 4 rounds a single row lost 1 to 16 %.
ROUNDS, ROWS = 16, 128
LEARN, FORGET = 0.05, 0.002  # of what a round took: the share that it tells, and that each round takes from the others
FILLS, TILE = (2, 3, 4, 6), 4  # tokens per row of the packed programs, which have multiples of so many tokens
ODD = 4.0   # times what was predicted that a round counts for at most: one late round is no cost
STEPS = 64  # contexts are told apart in steps of so many tokens where a curve is made of them


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """What a round runs."""
  program: Program  # plain | full | a bucket's N
  tokens: int       # that the target runs for rows: R, R*(G+1) or N
  seconds: float    # predicted; 0 without a cost table


def check(config: Any, drafter: Drafter | None, cost: Cost | None, *, measured: bool, positions: int | None = None
          ) -> None:
  """ValueError when an engine cannot be, or choose, so. config: EngineConfig. measured: whether a missing table will
  be. positions: of the target, where it is known."""
  if positions is not None and config.capacity > (most := max(2 * positions, type(config).capacity)):
    raise ValueError(f"capacity is {config.capacity}, expected at most {most}: the target has {positions} positions, "
                     f"beyond which no text of a seat goes")
  if drafter and config.survival != "estimator" and not drafter.has_confidence:
    raise ValueError(f"survival is {config.survival!r}, but there is no confidence head in the drafter: use estimator")
  if config.policy in BY_COST and cost is None and not measured:
    raise ValueError(f"the policy {config.policy} goes by what rounds cost, and there is no cost table: measure one "
                     f"(python -m infer.profile_sps), or choose fixed or plain")
  if cost is not None and drafter:
    cost.check(seats=config.seats, block=drafter.block_size, capacity=config.capacity, chunk=config.chunk,
               sampling=config.sampling)
  if drafter and config.buckets and config.buckets[-1] >= config.seats * (drafter.block_size + 1):
    raise ValueError(f"buckets are {config.buckets}, expected fewer tokens than the {config.seats} seats of "
                     f"{drafter.block_size + 1} that the full program has")
  if cost is not None and config.buckets not in ((), tuple(cost.packed)):
    raise ValueError(f"buckets are {config.buckets}, those of the cost table {tuple(cost.packed)}: leave them out, or "
                     f"measure a table of these (python -m infer.profile_sps --buckets)")


def default_buckets(seats: int, block: int) -> tuple[int, ...]:
  """Tokens of the packed programs of an engine, rising, at most four.

  No powers of two: by a TPU's compiler a step costs more with every token, and on a CPU products of 24 or 96 tokens
  cost between those of the powers of two beside them.
  """
  sizes = {-(-fill * seats // TILE) * TILE for fill in FILLS}
  return tuple(sorted(size for size in sizes if seats < size < seats * (block + 1)))


def named(program: Program, chunk: bool) -> str:
  """What `executables` calls a program, with a chunk of a prompt beside it or without."""
  return f"{program}+chunk" if chunk else str(program)


class Pace:
  """What rounds of each program take, over what the table says: learnt from rounds that ran.

  A table is measured once, of full seats and one program after another; while serving, a machine that others use, a
  host that is late or a shorter text change what a program takes, and not all of them alike. What has not run for long
  is believed to be what the table says, so that a program which a busy minute made dear is tried again; less where what
  runs has long been faster, so that a machine which beats its whole table does not hold on to what it happened to play.
  """

  def __init__(self):
    self._ratios: dict[str, float] = {}
    self._usual = 1.0  # of whatever ran

  def landed(self, name: str, predicted: float, seconds: float) -> None:
    """A round of this program, `executables`' name, took so many seconds."""
    # No logarithms: of two rounds that are read at once the first takes all of the time, and the second none.
    ratio = self(name) + LEARN * (min(seconds / predicted, ODD) - self(name))
    self._usual += FORGET * (ratio - self._usual)
    believed = min(self._usual, 1.0)
    self._ratios = {other: old + FORGET * (believed - old) for other, old in self._ratios.items()} | {name: ratio}

  def __call__(self, name: str) -> float:
    return self._ratios.get(name, min(self._usual, 1.0))


class Dispatcher:
  """The policy's part that the host plays. config: EngineConfig. buckets: tokens of the packed programs, ascending."""

  def __init__(self, config: Any, cost: Cost | None, block: int, buckets: tuple[int, ...]):
    self.policy, self.cost, self.seats, self.block, self.buckets = config.policy, cost, config.seats, block, buckets
    self._thresholds = config.confidence_threshold, config.survival_threshold
    self._typical, self._plain_rounds, self._pace = np.ones(block), 0, Pace()
    self._curves: dict[int, np.ndarray] = {}
    self._sps = np.ones(config.seats * (block + 1) + 1, np.float32)

  @property
  def sps(self) -> np.ndarray:
    """f32[R*(G+1)+1]: rounds per second over tokens verified, at the context of the newest choice."""
    return self._sps

  def observe(self, confidence: np.ndarray) -> None:
    """A row's newest confidences f[G]: what new rows are taken to be like."""
    self._typical += 0.02 * (np.cumprod(confidence) - self._typical)

  def landed(self, name: str, predicted: float, seconds: float) -> None:
    """A round of this program took so many seconds; predicted: what `choose` said, 0 without a cost table."""
    if predicted:
      self._pace.landed(name, predicted, seconds)

  def choose(self, past: list[Sequence[np.ndarray]], contexts: list[int], chunk: bool) -> Dispatch:
    """For a round of rows with these confidences f[G] of their newest drafted rounds that were read, the newest last
    (none yet: an empty one), and so many committed tokens each; chunk: beside tokens of a prompt, which only plain and
    full have room for."""
    live, context = len(past), float(np.mean(contexts)) if contexts else 0.0
    if self.policy == "plain" or not live:
      return self._dispatch("plain", context, chunk)
    if self.policy == "fixed":
      return self._dispatch("full", context, chunk)
    if self.policy == "scheduled":
      return self._scheduled(past, context, chunk)
    need = live + self._wanted(past, context)
    program = "full" if chunk else next((size for size in self.buckets if size >= need), "full")
    return self._dispatch(program, context, chunk)

  def _survivals(self, past, rounds):
    """f[rounds,n,G] of the newest rounds of each row, the newest first; what a row lacks of them is typical."""
    # Not again what it has: one bad first round would end the drafts of its row, and with them what is known of it.
    found, newest = np.tile(self._typical, (rounds, len(past), 1)), [list(row)[:-rounds - 1:-1] for row in past]
    if known := list(itertools.chain(*newest)):  # all at once: a call for each of hundreds of rows takes milliseconds
      ages, rows = zip(*((age, row) for row, of_row in enumerate(newest) for age in range(len(of_row))))
      found[ages, rows] = np.cumprod(np.concatenate(known).reshape(-1, self.block), axis=1)
    return found

  def _scheduled(self, past, context, chunk):
    cost, survival = self.cost, self._survivals(past, min(ROUNDS, max(1, -(-ROWS // len(past)))))
    pace = lambda program, chunk: self._pace(named(program, chunk))
    choice = choose(cost, survival, context, chunk=chunk, pace=pace)
    self._plain_rounds = self._plain_rounds + 1 if choice.program == "plain" else 0
    if self._plain_rounds > cost.probe_interval(context) and cost.full:
      # Whoever no longer drafts would never learn that drafting has begun to pay.
      self._plain_rounds, never = 0, dataclasses.replace(cost.plain, seconds=np.inf)
      choice = choose(dataclasses.replace(cost, plain=never, plain_chunk=never), survival, context, chunk=chunk,
                      pace=pace)
    return self._dispatch(choice.program, context, chunk)

  def _wanted(self, past, context):
    """Drafts that the policy's rule on the device would have asked for."""
    if self.policy == "threshold":
      confidence = np.asarray([row[-1] if len(row) else np.ones(self.block) for row in past])
      enough = (confidence >= self._thresholds[0]) & (np.cumprod(confidence, axis=1) >= self._thresholds[1])
      return int(np.cumprod(enough, axis=1).sum())
    at, live, (survival,) = int(context) // STEPS, len(past), self._survivals(past, 1)
    if at not in self._curves:
      self._curves[at] = self.cost.sps(at * STEPS).astype(np.float32)
    self._sps = self._curves[at]
    gains = np.concatenate([[live], -np.sort(-survival.ravel())])
    throughput = np.cumsum(gains) * self._sps[live:live + gains.size]
    return int(np.cumprod(throughput[1:] > throughput[:-1]).sum())

  def _dispatch(self, program, context, chunk):
    tokens = {"plain": self.seats, "full": self.seats * (self.block + 1)}.get(program, program)
    return Dispatch(program, tokens, self.cost.seconds(program, context, chunk=chunk) if self.cost else 0.0)
