"""Cost tables of accelerators that are not here, for infer.simulate: fitted to a compiler's cycles, or from a roofline.

machines.json holds the cycles, in millions, with their source. A chip's steps are fitted, relative errors by least
squares, with what weights and caches take at the published bandwidth (times a factor), a price of a plain, packed and
unpacked row, one of a slot that several queries of a row look at, and a slope of tokens, with another past the knee. A
packed row is dearer than a plain one, since q, k and v are gathered to rows and back; `packing` is the part of that
which is kept: 0.5 for a gather of whole lanes before heads are split (measured at two of the points), 0 for a kernel
that reads packed queries. A model that a chip has no cycles for takes the other's slopes, in proportion to arithmetic.
H100: no compiler was asked; products take the longer of their weights' bytes and their arithmetic, caches their bytes,
at assumed shares of the published peaks; packing, attention's arithmetic and launches are free, which flatters what
verifies many tokens, and what packs them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np

from dspark_jax.config import from_json
from dspark_jax.decoding.cost import Cost, Step
from dspark_jax.decoding.dispatch import default_buckets
from dspark_jax.programs.compilers import CHIPS
from dspark_jax.targets.sizes import MODELS
from dspark_jax.text import read_json

PATH = Path(__file__).with_name("machines.json")
CHIP = {chip.name: chip for chip in CHIPS.values()}
KIND = {chip.name: kind for kind, chip in CHIPS.items()}
DRAFT_LAYERS, RANK = 5, 256  # of the released drafters, whose layers are the target's
SMALLER, LARGER = "qwen3-4b", "qwen3-8b"


@dataclasses.dataclass(frozen=True)
class Cycles:
  """A line of the compiler's table; millions of cycles."""
  chip: str
  model: str
  rows: int
  slots: int
  plain: float
  packed: dict[str, float]
  full: float | None = None


@dataclasses.dataclass(frozen=True)
class Draft:
  """Of a round's draft and absorption."""
  chip: str
  model: str
  rows: int
  slots: int
  cycles: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Shares of the published peaks that are taken for attained."""
  bandwidth: float
  flops: float


@dataclasses.dataclass(frozen=True)
class Machines:
  """What is in machines.json."""
  source: str
  clocks: str
  gigahertz: dict[str, float]
  block: int
  steps: tuple[Cycles, ...]
  drafts: tuple[Draft, ...]
  knees: dict[str, int]
  rooflines: dict[str, Roofline]


@functools.cache
def known() -> Machines:
  """The table."""
  return from_json(Machines, read_json(PATH), f"{PATH} is damaged")


def weights(model: str) -> float:
  """Bytes of the layers and the head in bfloat16, which are also the operations of a token: two a parameter."""
  return MODELS[model].flops(0) + MODELS[model].head_flops


def slot(model: str, layers: int | None = None) -> float:
  """Bytes of a token in the caches."""
  config = MODELS[model]
  return 4.0 * (layers or config.num_layers) * config.spec.num_kv_heads * config.spec.head_dim


def drafter(model: str) -> tuple[float, float]:
  """(bytes that a draft reads of weights, operations of a row's draft), the head over the whole vocabulary."""
  config, block = MODELS[model], known().block
  layers, sequential = drafter_parts(model)
  read = layers + config.head_flops + block * sequential
  return read, (block + 1) * layers + block * (config.head_flops + sequential)


def drafter_parts(model: str) -> tuple[float, float]:
  """Bytes of a drafter's layers with the product of its taps, and of its W2, as large as W1."""
  config = MODELS[model]
  return (DRAFT_LAYERS * (config.spec.flops(0) + 2 * config.spec.hidden_size ** 2), 2.0 * RANK * config.vocab_size)


def least_squares(columns: dict[str, list[float]], values: list[float]) -> tuple[dict[str, float], float]:
  """(a coefficient of each column, none below 0; the largest relative error), by relative errors."""
  names, values = list(columns), np.asarray(values)
  while True:
    matrix = np.stack([columns[name] for name in names], 1) / values[:, None]
    found, *_ = np.linalg.lstsq(matrix, np.ones(len(values)), rcond=None)
    if found.min() >= 0:
      error = np.abs(matrix @ found - 1).max()
      return dict.fromkeys(columns, 0.0) | dict(zip(names, found.tolist())), float(error)
    names.pop(int(found.argmin()))  # nothing gets cheaper by being more


@functools.cache
def fit(chip: str) -> tuple[dict[str, float], float]:
  """(seconds of a chip's steps by what they grow with, the largest relative error); ValueError without cycles."""
  table, points, values = known(), [], []
  steps = [step for step in table.steps if step.chip == chip]
  if not steps:
    raise ValueError(f"there are no cycles of {chip}: choose one of {', '.join(table.gigahertz)}")
  for step in steps:
    whole = {"full": (step.rows * (table.block + 1), step.full)} if step.full else {}
    kinds = {"plain": (step.rows, step.plain), **whole} | {n: (int(n), c) for n, c in step.packed.items()}
    for kind, (tokens, cycles) in kinds.items():
      points.append(grows_with(chip, step.model, kind if kind in ("plain", "full") else "packed", step.rows,
                               step.slots, tokens))
      values.append(cycles * 1e-3 / table.gigahertz[chip])
  names = dict.fromkeys(name for point in points for name in point)
  return least_squares({name: [point.get(name, 0.0) for point in points] for name in names}, values)


def grows_with(chip: str, model: str, kind: str, rows: int, slots: int, tokens: int) -> dict[str, float]:
  """What a step of a kind grows with. Attention is the same in both models, so rows and slots are the chip's."""
  memory = (weights(model) + rows * slots * slot(model)) / CHIP[chip].bandwidth
  wide = {} if kind == "plain" else {"columns": float(rows * slots)}  # more than one query a row
  return {"memory": memory, kind: float(rows), **wide, f"token {model}": float(tokens),
          f"past {model}": float(max(tokens - known().knees[chip], 0))}


@functools.cache
def fit_draft(chip: str, model: str) -> tuple[float, float, float]:
  """(seconds of any draft, more for each row, the largest relative error), beside its caches."""
  drafts = [d for d in known().drafts if (d.chip, d.model) == (chip, model)]
  read = CHIP[chip].bandwidth / fit(chip)[0]["memory"]
  seconds = [d.cycles * 1e-3 / known().gigahertz[chip] - d.rows * d.slots * slot(model, DRAFT_LAYERS) / read
             for d in drafts]
  if len(drafts) > 1:
    found, error = least_squares({"any": [1.0] * len(drafts), "row": [float(d.rows) for d in drafts]}, seconds)
    return found["any"], found["row"], error
  other = LARGER if model == SMALLER else SMALLER
  if drafts:  # one point tells how it compares with the other model's
    fixed, row, _ = fit_draft(chip, other)
    scale = seconds[0] / (fixed + row * drafts[0].rows)
  else:  # as both models compare on the chip that has both
    fixed, row, _ = fit_draft(chip, other)
    scale = fit_draft("v6e", model)[1] / fit_draft("v6e", other)[1]
  return fixed * scale, row * scale, 0.0


def fitted(chip: str, model: str) -> tuple[dict[str, float], str]:
  """(the chip's fit with this model's slopes, how they came): in proportion to its arithmetic where it has none."""
  found, error = fit(chip)
  slopes = {part: found.get(f"{part} {model}") for part in ("token", "past")}
  how = f"fit of steps within {100 * error:.0f} %"
  if slopes["token"] is None:
    other = LARGER if model == SMALLER else SMALLER
    slopes = {part: found[f"{part} {other}"] * weights(model) / weights(other) for part in slopes}
    how += f", slopes and draft scaled from {other}"
  return found | slopes, how


def cost(chip: str, model: str, seats: int, context: int, *, packing: float = 0.5) -> Cost:
  """The cost table of so many seats with `context` slots each, all of which are read."""
  block = known().block
  cached = lambda layers=None: seats * context * slot(model, layers)
  if chip in known().rooflines:
    attained, source = known().rooflines[chip], f"roofline estimate for {chip}"
    read, peak = CHIP[chip].bandwidth * attained.bandwidth, CHIP[chip].flops * attained.flops
    seconds = lambda kind, tokens: max(weights(model) / read, tokens * weights(model) / peak) + cached() / read
    size, work = drafter(model)
    draft = max(size / read, seats * work / peak) + cached(DRAFT_LAYERS) / read
  else:
    found, how = fitted(chip, model)
    source = f"{known().source}; {how}; clock {known().clocks}"
    read = CHIP[chip].bandwidth / found["memory"]
    price = found | {"packed": found["plain"] + packing * max(found["packed"] - found["plain"], 0)}
    seconds = lambda kind, tokens: (weights(model) + cached()) / read + seats * (
        price[kind] + (kind != "plain") * context * price["columns"]) + (
        tokens * price["token"] + max(tokens - known().knees[chip], 0) * price["past"])
    fixed, row, _ = fit_draft(chip, model)
    draft = fixed + row * seats + cached(DRAFT_LAYERS) / read
  slope = seats * slot(model) / read
  plain, full = Step(seconds("plain", seats), slope), Step(seconds("full", seats * (block + 1)), slope)
  return Cost(machine=chip, device=KIND[chip], target=model, drafter=f"dspark, {DRAFT_LAYERS} layers",
              dtype="bfloat16", seats=seats, block=block, capacity=context, sampling="greedy", context=context,
              source=source, plain=plain, draft=Step(draft, seats * slot(model, DRAFT_LAYERS) / read), full=full,
              packed={n: Step(seconds("packed", n), slope) for n in default_buckets(seats, block)}, chunk=0,
              plain_chunk=plain, full_chunk=full)  # prompts are not among what is simulated


def chips_needed(model: str, chip: str, seats: int, context: int) -> int:
  """Chips whose memory together holds target, drafter and caches: 1, 2, 4 ..."""
  config, (layers, sequential) = MODELS[model], drafter_parts(model)
  embedding = 0 if config.tie_word_embeddings else config.head_flops  # as large as the head
  size = weights(model) + embedding + layers + 2 * sequential
  size += seats * context * (slot(model) + slot(model, DRAFT_LAYERS))
  return 2 ** max(0, math.ceil(math.log2(size / CHIP[chip].memory)))
