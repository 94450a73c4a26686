"""Throughput of plain, fixed and scheduled decoding on machines that are not here, by drawing rounds at random.

When to use it: before a machine is rented, to see at which concurrency drafts pay there, what choosing a program each
round adds, and how far that depends on what is drafted. Nothing is run; machines.py says where costs come from, and
what was assumed is printed. With --costs the tables are files of infer.profile_sps.

    python -m infer.simulate --out runs/simulate
    python -m infer.simulate --out runs/simulate --costs runs/cost.json --concurrencies 1 8 --workloads chat

A request's rounds have one conditional acceptance c at all positions of a block, drawn anew each round from a Beta
distribution of `concentration`, so that draft k survives with c^k. Its mean is such that 1 + sum_k E[c^k] is the
accepted length: the paper's for Qwen3-4B, averaged over a column's benchmarks. Mixed traffic: each request is of one
of the three columns. Requests last STAY rounds. Of a round's drafts the first rejected one ends it, by c^k too: what
the scheduler sees is calibrated. The engine's own dispatcher chooses, from survivals at least two rounds old; this
round's only order the drafts. While it decodes plainly it sees nothing, and probes.

The last line of stdout is a JSON object: where plain decoding overtakes fixed, and what scheduled decoding gains on the
better of both, per machine, model and workload. All numbers are in OUT/simulate.json, figures beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from rich.table import Table

from dspark_jax.config import Range, raise_all, wrong_choices
from dspark_jax.decoding import cost as costs
from dspark_jax.decoding.cost import Cost
from dspark_jax.decoding.dispatch import ROUNDS, Dispatcher
from dspark_jax.decoding.engine import EngineConfig
from dspark_jax.programs import shell
from infer import figures, machines

# DSpark at temperature 1 with blocks of 7, Qwen3-4B: MT-Bench, Alpaca, Arena-Hard; MBPP, HumanEval, LiveCodeBench;
# GSM8K, MATH, AIME25.
PAPER = {"chat": (3.64, 3.54, 3.29), "code": (5.13, 5.38, 4.86), "mathematics": (6.11, 5.70, 4.89)}
COLUMNS = {name: sum(lengths) / len(lengths) for name, lengths in PAPER.items()}
WORKLOADS = {name: (length,) for name, length in COLUMNS.items()} | {"mixed": tuple(COLUMNS.values())}
CONTEXT = 1024  # slots of a seat where there is no table of another machine
STAY = 64  # rounds of a request
LAG = 2    # rounds until the host has read what a round said; before, it knows nothing, and nothing is counted
POLICIES = ("plain", "fixed", "scheduled")


@dataclasses.dataclass
class Settings:
  out: Path
  """folder for simulate.json and the figures"""
  chips: tuple[Literal["v5e", "v6e", "v5p", "h100"], ...] = ("v5e", "v6e", "v5p", "h100")
  models: tuple[Literal["qwen3-4b", "qwen3-8b"], ...] = ("qwen3-4b", "qwen3-8b")
  costs: tuple[Path, ...] = ()
  """cost tables of infer.profile_sps, instead of chips and models"""
  concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
  workloads: tuple[Literal["chat", "code", "mathematics", "mixed"], ...] = ("chat", "code", "mathematics", "mixed")
  lengths: tuple[float, ...] = ()
  """accepted lengths of more workloads, such as that of your own drafter"""
  context: int | None = None
  """slots of a seat, all read each round, default 1,024; of --costs the mean context, default: the table's own"""
  packing: Annotated[float, Range(0, 1)] = 0.5
  """part of the measured price of packing rows that is kept: 0 is a kernel that reads packed queries"""
  concentration: Annotated[float, Range(1e-9, 1e9)] = 3.0
  """of c over rounds; the larger, the less a round differs from the next"""
  draws: int = 4000
  """rows drawn, and at least 300 rounds"""
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one policy makes of one workload at one concurrency."""
  machine: str
  model: str
  workload: str
  concurrency: int
  policy: str
  tokens_per_second: float
  tokens_per_second_per_user: float
  accepted_length: float       # tokens per request and round
  budget: float                # tokens verified per request and round, the anchor included
  programs: dict[str, float]   # share of the rounds
  chips: int                   # that memory asks for; speeds are one chip's part of them


@dataclasses.dataclass(frozen=True)
class Rounds:
  """What is drawn once for all policies: T rounds of n rows with G drafts."""
  survival: np.ndarray  # f64[T,n,G]
  accepted: np.ndarray  # i64[T,n]    drafts that pass if all are verified
  request: np.ndarray   # i64[T,n]    of the row, by number

  @classmethod
  def draw(cls, lengths: tuple[float, ...], rounds: int, rows: int, block: int, concentration: float,
           rng: np.random.Generator) -> Rounds:
    """Rows of requests, each of one of these accepted lengths."""
    means = np.array([mean_acceptance(length, block, concentration) for length in lengths])
    kinds = rng.integers(len(means), size=(rounds // STAY + 2, rows))
    request = (np.arange(rounds)[:, None] + rng.integers(STAY, size=(1, rows))) // STAY  # they do not change together
    mean = means[np.take_along_axis(kinds, request, axis=0)]
    c = rng.beta(concentration * mean, concentration * (1 - mean)).clip(1e-12, 1 - 1e-12)
    # c^k is the chance of at least k: one uniform number gives them all.
    accepted = np.minimum(np.log(1 - rng.random(c.shape)) // np.log(c), block).astype(np.int64)
    return cls(c[..., None] ** np.arange(1, block + 1), accepted, request)

  def auroc(self) -> float:
    """Of the survival of the first draft as a prediction of its acceptance; NaN where all are alike."""
    order = np.argsort(self.survival[..., 0], axis=None)
    kept = self.accepted.ravel()[order] > 0
    below = np.cumsum(~kept)[kept].sum()
    return float(below / (kept.sum() * (~kept).sum())) if 0 < kept.sum() < kept.size else math.nan


def survivals(mean: float, block: int, concentration: float) -> np.ndarray:
  """E[c^k] for k of 1..G, of a Beta distribution: f64[G]."""
  i = np.arange(block)
  return np.cumprod((mean * concentration + i) / (concentration + i))


def mean_acceptance(length: float, block: int, concentration: float) -> float:
  """The mean of c that gives an accepted length, the bonus token included. ValueError for one that no block has."""
  if not 1 < length < block + 1:
    raise ValueError(f"an accepted length is {length}, expected more than 1 and less than {block + 1}, for blocks of "
                     f"{block}: choose other --workloads or --lengths")
  low, high = 0.0, 1.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if 1 + survivals(middle, block, concentration).sum() < length else (low, middle)
  return low


def scheduled(cost: Cost, drawn: Rounds, context: float) -> tuple[float, float, float, dict[str, float]]:
  """(seconds, tokens, verified tokens, share of each program) of choosing every round, as the engine does."""
  rounds, rows, block = drawn.survival.shape
  dispatcher = Dispatcher(EngineConfig(seats=cost.seats), cost, block, tuple(cost.packed))
  past = [collections.deque(maxlen=ROUNDS) for _ in range(rows)]  # confidences of each row's request
  seconds = tokens = verified = 0.0
  programs, drafted = {}, [False] * rounds
  for t in range(rounds):
    if t >= LAG and drafted[t - LAG]:
      for row in np.flatnonzero(drawn.request[t] == drawn.request[t - LAG]):
        past[row].append(np.full(block, drawn.survival[t - LAG, row, 0]))
        dispatcher.observe(past[row][-1])
    for row in np.flatnonzero(drawn.request[t] != drawn.request[max(t - 1, 0)]):
      past[row].clear()
    choice = dispatcher.choose(past, [context] * rows, False)
    lengths, drafted[t] = np.zeros(rows, np.int64), choice.program != "plain"
    if drafted[t]:
      # Survivals of a row never rise, so the likeliest are prefixes, of equals the first.
      likeliest = np.argsort(-drawn.survival[t], axis=None, kind="stable")[:choice.tokens - rows]
      lengths = np.bincount(likeliest // block, minlength=rows)
    if t < LAG:
      continue
    seconds += choice.seconds
    tokens += rows + np.minimum(drawn.accepted[t], lengths).sum()
    verified += rows + lengths.sum()
    programs[str(choice.program)] = programs.get(str(choice.program), 0) + 1 / (rounds - LAG)
  return seconds, tokens, verified, programs


def outcomes(cost: Cost, name: str, lengths: tuple[float, ...], rows: int, settings: Settings, chips: int
             ) -> tuple[list[Outcome], float]:
  """(what each policy makes of the same draws, AUROC of the first draft's survival)."""
  rng = np.random.default_rng([settings.seed, rows, *map(ord, name)])  # whatever else is simulated
  drawn = Rounds.draw(lengths, LAG + max(300, settings.draws // rows), rows, cost.block, settings.concentration, rng)
  counted = drawn.accepted[LAG:]
  rounds, size, context = counted.shape[0], counted.size, settings.context or cost.context
  runs = {"plain": (rounds * cost.seconds("plain", context), size, size, {"plain": 1.0}),
          "fixed": (rounds * cost.seconds("full", context), size + counted.sum(), size * (cost.block + 1),
                    {"full": 1.0}),
          "scheduled": scheduled(cost, drawn, context)}
  return [Outcome(cost.machine, cost.target, name, rows, policy, tokens / seconds, tokens / seconds / rows,
                  float(tokens / size), float(verified / size), programs, chips)
          for policy, (seconds, tokens, verified, programs) in runs.items()], drawn.auroc()


def main(settings: Settings) -> dict:
  raise_all("simulate", wrong_choices(settings))
  shell.at_least(settings, draws=1, seed=0)
  if settings.context is not None:
    shell.at_least(settings, context=1)
  if not settings.concurrencies or not all(1 <= count <= 65536 for count in settings.concurrencies):
    raise ValueError(f"concurrencies are {settings.concurrencies}, expected numbers of 1 to 65536")
  workloads = {name: WORKLOADS[name] for name in settings.workloads}
  workloads |= {f"length {length:g}": (length,) for length in settings.lengths}
  if not workloads:
    raise ValueError("there are no workloads and no lengths: give one of either")
  shell.check_out(settings.out, folder=True)
  found = tables(settings)
  for (_, cost_at), length in itertools.product(found, itertools.chain(*workloads.values())):
    mean_acceptance(length, cost_at(1)[0].block, settings.concentration)  # before minutes of drawing
  jobs = list(itertools.product(found, workloads.items(), sorted(set(settings.concurrencies))))
  rows, certainty = [], {}
  with shell.bar() as bar:
    task = bar.add_task("simulate", total=len(jobs), note="")
    for (_, cost_at), (name, lengths), concurrency in jobs:
      cost, chips = cost_at(concurrency)
      if concurrency <= cost.seats:
        more, certainty[name] = outcomes(cost, name, lengths, concurrency, settings, chips)
        rows += more
      bar.update(task, advance=1, note=f"{cost.machine} {cost.target} {name} {concurrency}")
  assumed = assumptions(settings, found, workloads, certainty)
  for line in assumed:
    shell.say(line)
  shell.say(table(rows))
  cases = summaries(rows)
  shell.write_json(settings.out / "simulate.json", {"assumptions": assumed, "cases": cases, "outcomes": [
      dataclasses.asdict(row) for row in rows]})
  drawn = {}
  for machine in dict.fromkeys(row.machine for row in rows):
    drawn |= figures.write(settings.out, [figures.Point(
        f"{row.machine}, {row.model}, {row.workload}", row.policy, row.concurrency, row.tokens_per_second,
        row.tokens_per_second_per_user, row.budget) for row in rows if row.machine == machine],
                           f"-{re.sub(r'[^a-z0-9.]+', '-', machine.lower())}")
  gains = [gain for case in cases for gain in case["gain_percent"].values()]
  return {"cases": cases, "least_gain_percent": min(gains), "most_gain_percent": max(gains), "figures": drawn}


def tables(settings: Settings) -> list[tuple[str, Callable[[int], tuple[Cost, int]]]]:
  """(name, concurrency -> (its cost table, chips that its memory asks for)) of each machine."""
  if settings.costs:
    given, known = [costs.read(path) for path in settings.costs], {}
    for path, cost in zip(settings.costs, given):
      if (other := known.setdefault((cost.machine, cost.target), path)) is not path:
        raise ValueError(f"{other} and {path} are both of {cost.target} on {cost.machine}: simulate one at a time")
      if (settings.context or 0) > cost.capacity:
        raise ValueError(f"context is {settings.context}, expected at most {cost.capacity}, the slots of a seat of "
                         f"{path}: leave it out for the table's own")
      if not cost.full:
        raise ValueError(f"{path} is of a target without a drafter: measure one with a drafter")
      if cost.seats < min(settings.concurrencies):
        raise ValueError(f"{path} is of {cost.seats} seats, fewer than any of the concurrencies: give smaller ones")
    return [(cost.source, lambda rows, cost=cost: (cost, 1)) for cost in given]
  context = settings.context or CONTEXT
  made = lambda chip, model: lambda rows: (
      machines.cost(chip, model, rows, context, packing=settings.packing),
      machines.chips_needed(model, chip, rows, context))
  return [(made(chip, model)(1)[0].source, made(chip, model)) for chip in dict.fromkeys(settings.chips)
          for model in dict.fromkeys(settings.models)]


def assumptions(settings: Settings, found: list, workloads: dict, certainty: dict[str, float]) -> list[str]:
  """What the numbers rest on, a sentence a line."""
  return [
      *dict.fromkeys(f"costs: {source}" for source, _ in found),
      *dict.fromkeys(f"decoding alone, every row live with {settings.context or cost_at(1)[0].context} tokens; no "
                     f"prompts, no host, no sampling overhead" for _, cost_at in found),
      *(f"{name}: accepted length {' / '.join(f'{x:.2f}' for x in lengths)}; AUROC of the first draft's survival "
        f"{certainty[name]:.2f} (the paper has 0.81 to 0.91)" for name, lengths in workloads.items()
        if name in certainty),
      "rows beyond one chip's memory: speeds are one chip's part, as if chips shared the work without a cost"]


def summaries(rows: list[Outcome]) -> list[dict]:
  """Per machine, model and workload: from where on plain decoding beats fixed, and the gain on the better of both."""
  cases = []
  for key, some in itertools.groupby(rows, lambda row: (row.machine, row.model, row.workload)):
    by = {(row.concurrency, row.policy): row for row in some}
    speed = lambda n, policy: by[n, policy].tokens_per_second
    better = lambda n: max(speed(n, "plain"), speed(n, "fixed"))
    counts = sorted({n for n, _ in by})
    plain = [n for n in counts if all(speed(m, "plain") > speed(m, "fixed") for m in counts if m >= n)]
    cases.append(dict(zip(("machine", "model", "workload"), key)) | {
        "plain_beats_fixed_from": min(plain, default=None),
        "better": {str(n): "plain" if speed(n, "plain") > speed(n, "fixed") else "fixed" for n in counts},
        "gain_percent": {str(n): round(100 * (speed(n, "scheduled") / better(n) - 1), 2) + 0.0 for n in counts},
        "over_plain": {str(n): round(speed(n, "scheduled") / speed(n, "plain"), 3) for n in counts},
        "budget": {str(n): round(by[n, "scheduled"].budget, 2) for n in counts},
        "chips": {str(n): by[n, "plain"].chips for n in counts}})
  return cases


def table(rows: list[Outcome]) -> Table:
  """For a terminal: the better of plain (p) and fixed (f), what scheduled adds in percent, and its mean budget."""
  counts = sorted({row.concurrency for row in rows})
  out = Table("concurrency", *map(str, counts), box=None, padding=(0, 1, 0, 0), caption="*: several chips' memory",
              title="plain or fixed, whichever is better, scheduled over it in %, and tokens it verifies per round")
  for case in summaries(rows):
    cells = []
    for n in map(str, counts):
      gain = case["gain_percent"].get(n)
      cells.append("" if gain is None else f"{case['better'][n][0]}{gain:+.1f}\n"
                                           f"{case['budget'][n]:.1f}{'*' if case['chips'][n] > 1 else ''}")
    out.add_row(f"{case['machine']} {case['model']}\n{case['workload']}", *cells)
  return out


if __name__ == "__main__":
  shell.run(main, Settings)
