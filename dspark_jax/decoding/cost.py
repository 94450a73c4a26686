"""What the engine's programs cost on one machine, and which of them brings most tokens per second (DSpark: 3.2.2, 5.2).

On accelerators a verified token is nearly free below a knee, and real curves of steps per second dip and recover: what
is chosen is one of the programs that are there (plain, some buckets of packed tokens, the unpacked full one), the
draft's time included, by an unconstrained search. That is lossless only on the past: survivals of two rounds before.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np

from dspark_jax import config
from dspark_jax.config import Count, Natural, Range
from dspark_jax.text import read_json

Program = Literal["plain", "full"] | int  # an int: the bucket of so many packed tokens
PROBES = 0.01   # share of the time that looking whether drafts would pay again may take
LEAST = 0.1     # of a program's seconds: what a measured slope, extended to short contexts, cannot fall below


@dataclasses.dataclass(frozen=True)
class Step:
  """One executable of the engine."""
  seconds: Annotated[float, Range(0)]  # median of repeated runs at `Cost.context` committed tokens per row
  slope: float                         # seconds more per token of (mean context of the live rows - Cost.context)

  def at(self, more: float) -> float:
    """Seconds at a context that is longer by so many tokens."""
    return max(self.seconds + self.slope * more, LEAST * self.seconds)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What the engine's programs cost on one machine. JSON: `to_json`, `from_json`, `read`."""
  machine: str
  device: str              # jax's device_kind, or "cpu"
  target: str
  drafter: str | None
  dtype: str
  seats: Count             # R: rows of every program, whether they are live or not
  block: Natural           # G: drafts of a round
  capacity: Count          # S: slots of a seat
  sampling: Literal["greedy", "full", "truncated"]  # the most that requests of these programs may ask for
  context: Natural         # reference context of `Step.seconds`, in tokens
  source: str              # "measured", or what else the numbers come from
  plain: Step              # [R,1]: taps and absorbs, drafts nothing
  draft: Step | None       # propose and rank
  full: Step | None        # unpacked [R,G+1]: verification, commit, absorb
  packed: dict[int, Step]  # the same of N packed tokens, for N < R * (G + 1)
  chunk: Natural           # prompt tokens that the next two take along
  plain_chunk: Step
  full_chunk: Step | None

  def __post_init__(self):
    packed = {_tokens(name): step for name, step in self.packed.items()}
    object.__setattr__(self, "packed", dict(sorted(packed.items())))  # JSON's keys are text, and in any order
    problems = [f"the bucket {n} is not among 1..{self.most - 1}, what {self.seats} rows of {self.block} drafts fill"
                for n in self.packed if not 0 < n < self.most]
    problems += [f"{name} takes {step.seconds} seconds, expected more" for name, step in self._steps().items()
                 if not step.seconds > 0 and name != "draft"]
    drafted = [self.full is not None, self.full_chunk is not None, bool(self.packed), self.block > 0]
    if self.draft is None and any(drafted) or self.draft is not None and not (self.full and self.block):
      problems.append("draft, full and block, with packed and full_chunk, are there together or not at all")
    config.raise_all("a cost table", problems)

  @property
  def most(self) -> int:
    """Tokens of the full program: R * (G + 1)."""
    return self.seats * (self.block + 1)

  def _steps(self) -> dict[str, Step]:
    named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    named |= {f"packed {n}": step for n, step in self.packed.items()}
    return {name: step for name, step in named.items() if isinstance(step, Step)}

  def programs(self, *, chunk: bool = False) -> list[Program]:
    """Programs that are there, fewest tokens first; beside a prompt chunk only the unpacked ones."""
    drafted = self.full_chunk if chunk else self.full
    return ["plain", *([] if chunk else self.packed), *(["full"] if drafted else [])]

  def seconds(self, program: Program, context: float, *, chunk: bool = False) -> float:
    """Seconds of a round by this program at a mean context of the live rows, the draft's included for all but plain.

    KeyError for a bucket that is not there, and for one beside a prompt chunk.
    """
    more = context - self.context
    if program == "plain":
      return (self.plain_chunk if chunk else self.plain).at(more)
    if program == "full":
      step = self.full_chunk if chunk else self.full
    else:
      step = (self.packed if not chunk else {})[program]
    return step.at(more) + self.draft.at(more)

  def holding(self, tokens: int, context: float, *, chunk: bool = False) -> Program:
    """The drafted program that holds so many tokens in the least time; of equals the smallest. ValueError for none."""
    fits = [p for p in self.programs(chunk=chunk)[1:] if tokens <= (self.most if p == "full" else p)]
    if not fits:
      raise ValueError(f"no program holds {tokens} tokens, the largest has {self.most if self.full else self.seats}")
    return min(fits, key=lambda p: self.seconds(p, context, chunk=chunk))

  def sps(self, context: float) -> np.ndarray:
    """Steps per second at B verified tokens, what Algorithm 1 reads: f64[R*(G+1)+1], the draft included.

    Of the program that `holding` gives: constant up to a bucket's size, never interpolated. Entry 0 is not read.
    """
    seconds = np.full(self.most + 1, self.seconds("plain", context))  # stays where there is no drafter
    for program in reversed(self.programs()[1:]):
      size = self.most if program == "full" else program
      seconds[:size + 1] = self.seconds(self.holding(size, context), context)
    return 1 / seconds

  def probe_interval(self, context: float) -> int:
    """Plain rounds between drafted ones that see whether drafts would pay again: at least 1.

    The costliest of them, if its drafts bring nothing, then takes less than a hundredth of the time.
    """
    plain = self.seconds("plain", context)
    dearest = max(self.seconds(program, context) for program in self.programs())
    return max(1, math.ceil((dearest - plain) / (PROBES * plain)))

  def check(self, **found: Any) -> None:
    """ValueError unless these fields (device, target, seats ...) are what is found where the table is to be used."""
    others = [f"{name} {getattr(self, name)!r}, not {value!r}" for name, value in found.items()
              if getattr(self, name) != value]
    if others:
      raise ValueError(f"the cost table is of {', '.join(others)}: measure one of this engine with infer.profile_sps")

  def to_json(self) -> dict[str, Any]:
    """For JSON; programs write it with shell.write_json, whole or not at all."""
    return config.to_json(self) | {"packed": {str(n): config.to_json(step) for n, step in self.packed.items()}}


def from_json(data: dict[str, Any], what: str = "a cost table") -> Cost:
  """The table in a JSON object; ValueError with all that is wrong, unknown and missing keys by name."""
  return config.from_json(Cost, data, what)


def read(path: str | os.PathLike) -> Cost:
  """The table in a file; ValueError for another file, and for all that is wrong in it."""
  data = read_json(path)
  if not {"plain", "seats", "capacity"} & data.keys():
    raise ValueError(f"{path} is no cost table: give a file that infer.profile_sps wrote")
  return from_json(data, f"{path} is no cost table, measure it again with infer.profile_sps")


def _tokens(name):
  if not str(name).isdecimal():
    raise ValueError(f"packed has the key {config.shown(name)}, expected a number of tokens")
  return int(name)


@dataclasses.dataclass(frozen=True)
class Choice:
  """The program of a round, and what it is predicted to bring."""
  program: Program
  budget: int               # K: drafts that may be admitted; a bucket is filled, since padding costs the same
  tokens_per_second: float
  seconds: float


def choose(cost: Cost, survival: np.ndarray, context: float, *, chunk: bool = False,
           pace: Callable[[Program, bool], float] = lambda program, chunk: 1.0) -> Choice:
  """The program with the most expected tokens per second; of equals the one with the fewest tokens.

  Beside a chunk it is the one whose tokens are worth most of the time that they take there, at the price of rounds
  without a chunk: prompts have to be read whatever is chosen, and a draft that takes longer beside one than its tokens
  would take afterwards costs more than it brings.

  survival: f[n,G] of the n live rows, non-increasing in G, from two rounds ago: chosen by this round's, the text would
  be biased (Appendix A). Or f[H,n,G] of several past rounds, whose expectations are averaged: with few rows a single
  round says little of the next. What is 0 or NaN is not verified. context: mean committed tokens of the live rows.
  pace: by what a program's seconds, with a chunk or without, are multiplied, as learnt from rounds that ran
  (`dispatch.Pace`). ValueError for more rows than seats, or other drafts than the table's.
  """
  rounds = survival if survival.ndim == 3 else survival[None]
  live = rounds.shape[1]
  if live > cost.seats or cost.block and rounds.shape[2] != cost.block:
    raise ValueError(f"survivals are of {live} rows and {rounds.shape[2]} drafts, the cost table of {cost.seats} and "
                     f"{cost.block}")
  # Drafts admitted one by one, likeliest first: entry K is what the K likeliest of them bring.
  gains = np.where(rounds > 0, rounds, 0).reshape(len(rounds), -1)
  gains.sort(axis=1)
  brought = np.cumsum(gains.mean(0)[::-1] if len(gains) > 1 else gains[0, ::-1], dtype=np.float64)

  def choices(chunk):
    for program in cost.programs(chunk=chunk) if live else ["plain"]:
      budget = 0 if program == "plain" else cost.seats * cost.block if program == "full" else program - live
      if budget < 1 and program != "plain":
        continue
      seconds = cost.seconds(program, context, chunk=chunk) * pace(program, chunk)
      tokens = float(live + (brought[min(budget, len(brought)) - 1] if budget else 0))
      yield Choice(program, budget, tokens / seconds, seconds)

  best = max(choices(False), key=lambda choice: choice.tokens_per_second)
  if not chunk:
    return best
  return max(choices(True), key=lambda choice: (choice.tokens_per_second - best.tokens_per_second) * choice.seconds)
