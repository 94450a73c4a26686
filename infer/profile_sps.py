"""Measure what every program of the serving engine costs on this machine: the table that its scheduler goes by.

When to use it: once per machine, target, drafter, dtype and engine (`--seats --capacity --chunk --sampling`), before
`infer.serve --policy scheduled`; it is measured at the engine's start where it is missing. Every program is the very
executable that serves, timed with all seats playing, at two contexts in turn: `seconds` are the median at the short
one, the slope what three of four show.

    python -m infer.profile_sps --target smollm2 --drafter runs/demo --seats 8 --out runs/cost.json
    python -m infer.profile_sps --target qwen3-4b --compiler v5e:1x1 --seats 32 --capacity 1024 --out runs/v5e.json

--compiler asks the compiler of a machine that is not here instead (`make tpu-compiler`), for planning: --target is then
a published size or a config.json, as for infer.compile, with a fresh drafter of --block-size and --draft-layers in
bfloat16. Its seconds are those of the compiled operations one after another, each at the chip's published bandwidth or
arithmetic, at a context of all slots; the slope is what a token of cache takes to be read.

The last line of stdout is a JSON object: the table (`dspark_jax.decoding.cost.Cost`), which --out keeps.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.table import Table

import dspark_jax
from dspark_jax.decoding import dispatch
from dspark_jax.decoding.cost import Cost, Step
from dspark_jax.decoding.engine import EngineConfig
from dspark_jax.decoding.executables import Executables, Knobs, empty_rows, lowered, new_rows
from dspark_jax.decoding.round import Chunk, Models, Rows
from dspark_jax.loading import target_config
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.cache import row_shardings
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import compiled, shell
from dspark_jax.programs.compilers import absent_devices, chip_of
from dspark_jax.types import Drafter
from infer import compile as compile_

SHORT, LONG = 1 / 8, 3 / 4  # of a seat's capacity: the two contexts
ADMINISTRATION = ("own", "copy", "retire")  # programs that are no round
CHAIN = 4                   # rounds of a run, dispatched one after another as the engine does
# Settings of one way to a table that the other does not know.
MEASURED, COMPILED = ("drafter", "repeats", "dtype"), ("block_size", "draft_layers")


@dataclasses.dataclass
class Settings:
  target: str
  drafter: str = "none"
  """drafter folder or run, or none"""
  compiler: str | None = None
  """a topology as for infer.compile, e.g. v5e:1x1"""
  seats: int = EngineConfig.seats
  capacity: int = EngineConfig.capacity
  """tokens of a seat, prompt and text and scratch"""
  chunk: int = EngineConfig.chunk
  """tokens of a prompt that are read beside a round"""
  buckets: tuple[int, ...] = ()
  """tokens of the packed programs; none given: 2, 3, 4 and 6 a seat"""
  sampling: Literal["greedy", "full", "truncated"] = EngineConfig.sampling
  """the most that requests may ask for"""
  repeats: int = 5
  """runs of which the median counts"""
  out: Path | None = None
  """keep the table here"""
  block_size: int = 7
  """of the drafter that --compiler makes"""
  draft_layers: int = 5
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  shell.at_least(settings, seats=1, chunk=1, repeats=1, capacity=64)
  word, unread = ("with", MEASURED) if settings.compiler else ("without", COMPILED)
  for name in unread:
    if (value := getattr(settings, name)) != getattr(Settings, name):
      raise ValueError(f"{name} is {value}, which means nothing {word} --compiler: leave it out")
  shell.check_out(settings.out)
  check_room(settings.capacity, settings.chunk, settings.block_size if settings.compiler else 0)
  check_engine(settings)
  if settings.compiler:
    cost = compiled_cost(settings)
  else:
    with shell.joint_mesh(settings.mesh):
      cost = measured_cost(settings)
  shell.say(table(cost))
  result = cost.to_json()
  if settings.out:
    shell.write_json(settings.out, result)
  return result


def check_engine(settings: Settings, drafter: Drafter | None = None) -> None:
  """ValueError for what no engine can be; buckets that are too large are seen with a drafter."""
  config = EngineConfig(survival="estimator", **{name: getattr(settings, name) for name in (
      "seats", "capacity", "chunk", "buckets", "sampling")})
  dispatch.check(config, drafter, None, measured=True)


def measured_cost(settings: Settings) -> Cost:
  """By running."""
  shell.check_drafter(settings.drafter, "none")
  target = shell.load_target(settings.target, settings.dtype, settings.kernels)
  drafter = None
  if settings.drafter != "none":
    drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
  check_engine(settings, drafter)
  check_room(settings.capacity, settings.chunk, drafter.block_size if drafter else 0)
  models = Models.of(target, drafter)
  rows = empty_rows(models, settings.seats, settings.capacity, settings.sampling)
  buckets = settings.buckets or dispatch.default_buckets(settings.seats, drafter.block_size if drafter else 0)
  with shell.stderr.status("compiling") as status:
    run = Executables(models, rows, lambda name: status.update(f"compiling {name}"), **how(settings, buckets))
  cost, _ = measure(run, rows, settings.repeats, target=settings.target, drafter=settings.drafter,
                    dtype=settings.dtype)
  return cost


def check_room(capacity: int, chunk: int, block: int) -> None:
  """ValueError where seats have no room for the two contexts at which costs are measured."""
  least = chunk + (CHAIN + 2) * (block + 1) + 16
  if capacity < least:
    raise ValueError(f"capacity is {capacity}, expected at least {least} to measure what rounds cost beside a chunk of "
                     f"{chunk} tokens and blocks of {block} drafts")


def how(settings: Settings, buckets: tuple[int, ...]) -> dict:
  """Of `executables.lowered`."""
  return dict(policy="scheduled", survival="estimator", buckets=tuple(buckets), chunk=settings.chunk, log_probs=False)


def compiled_cost(settings: Settings) -> Cost:
  """By a compiler, for a machine that is not here."""
  config, devices = target_config(settings.target), absent_devices(settings.compiler)
  chip, mesh = chip_of(devices[0]), settings.mesh.build(devices)
  asked = compile_.Settings(settings.target, settings.compiler, settings.seats, settings.capacity, settings.sampling,
                            settings.block_size, settings.draft_layers, settings.mesh, settings.kernels)
  buckets = settings.buckets or dispatch.default_buckets(settings.seats, settings.block_size)
  with jax.set_mesh(mesh):
    served = compile_.Served.of(asked, config, devices[0].platform)
    check_engine(settings, served.drafter)
    models = heads_of(served)
    rows = jax.eval_shape(lambda models: new_rows(models, settings.seats, settings.capacity, settings.sampling), models)
    rows = compiled.on(rows, row_shardings(rows))
    found = {}
    for name, program in lowered(models, rows, **how(settings, buckets)):
      if name in ADMINISTRATION:
        continue
      with shell.stderr.status(f"compiling {name}"):
        read = compiled.read(program)
      numbers = compiled.summary(read, chip, floor_bytes=1, useful_flops=1)
      found[name] = numbers["predicted_seconds"]
      shell.say(f"{name}: {1e3 * found[name]:.2f} ms, temporaries {numbers['temporary_bytes'] / 1e9:.3f} GB, not in "
                f"place {numbers['output_bytes'] / 1e9:.3f} GB")
  token = lambda cache: compiled.size(cache.layers) / settings.capacity / chip.bandwidth
  read = {"draft": token(rows.draft.cache)}
  step = lambda name: Step(found[name], read.get(name, token(rows.cache)))
  return Cost(
      machine=chip.name, device=devices[0].device_kind, target=settings.target,
      drafter=f"dspark, {settings.draft_layers} layers", dtype="bfloat16", seats=settings.seats,
      block=settings.block_size, capacity=settings.capacity, sampling=settings.sampling, context=settings.capacity,
      source=f"compiler {settings.compiler}", chunk=settings.chunk, plain=step("plain"),
      plain_chunk=step("plain+chunk"), draft=step("draft"), full=step("full"), full_chunk=step("full+chunk"),
      packed={size: step(str(size)) for size in buckets})


def heads_of(served: compile_.Served) -> Models:
  """The models with their heads, as shapes where their weights are."""
  models = jax.eval_shape(Models.of, served.target, served.drafter)
  weight = jax.tree.leaves((served.target.lm_head or served.target.embed_tokens).weight)[0]
  head, draft = models.head.replace(weight=weight), models.draft_head
  bias = draft.bias.replace(weight=jax.tree.leaves(served.drafter.markov_head.markov_w2)[0])
  return Models(served.target, served.drafter, head, draft.replace(base=head, bias=bias))


def measure(run: Executables, rows: Rows, repeats: int, *, target: str, drafter: str, dtype: str,
            within: float = math.inf) -> tuple[Cost, Rows]:
  """(what an engine's programs cost here, its rows, which are empty again). The rows given are gone.

  All programs take turns at both contexts: what a busy minute makes dear, is dear in all of them, and would else be a
  slope, or one program's price. within: seconds that no further turn may pass, after one to warm up and one that
  counts.
  """
  seats, block = rows.settings.calibration.shape
  capacity = rows.cache.layers[0].v.shape[-2]
  room = capacity - run.how["chunk"] - (CHAIN + 2) * (block + 1)
  contexts = [max(int(share * room), 1) for share in (SHORT, LONG)]
  names = [name for name in run.compiled if name not in ADMINISTRATION]
  runs = {(name, context): [] for name in names for context in contexts}
  ends, took = time.perf_counter() + within, 0.0
  with shell.bar() as bar:
    task = bar.add_task("measuring", total=(repeats + 1) * len(runs), note="")
    for turn in range(repeats + 1):
      began = time.perf_counter()
      if turn > 1 and began + took > ends:
        break
      for name, context in runs:
        bar.update(task, note=name)
        seconds, rows = timed(run, rows, name, context)
        runs[name, context].append(seconds)
        bar.update(task, advance=1)
      took = time.perf_counter() - began

  def step(name):
    if name not in names:
      return None
    short, long = (np.asarray(runs[name, context][1:]) for context in contexts)
    # What three of four pairs show at least: by medians every other program of a busy machine would have some slope.
    slope = max(float(np.quantile(long - short, 0.25)), 0.0) / (contexts[1] - contexts[0])
    return Step(float(np.median(short)), slope)
  sizes = sorted(int(name) for name in names if name.isdigit())
  return Cost(
      machine=platform.node(), device=jax.devices()[0].device_kind, target=target,
      drafter=None if block == 0 else drafter, dtype=dtype, seats=seats, block=block, capacity=capacity,
      sampling=rows.settings.sampling.mode, context=contexts[0], source="measured", chunk=run.how["chunk"],
      plain=step("plain"), plain_chunk=step("plain+chunk"), draft=step("draft"), full=step("full"),
      full_chunk=step("full+chunk"), packed={size: step(str(size)) for size in sizes}), rows


def timed(run: Executables, rows: Rows, name: str, context: int) -> tuple[float, Rows]:
  """(seconds of a round of one program, by a run of CHAIN rounds; the rows)."""
  seats, block = rows.settings.calibration.shape
  knobs, part = Knobs.empty(seats, block, run.how["survival"]), None
  if name.endswith("chunk"):  # of one real token, which costs what many do, so that its seat stays near the context
    part = Chunk(np.zeros(run.how["chunk"], np.int32), np.int32(1), np.int32(0), np.int32(0))
  rows = seated(run, rows, context, reading=part is not None)
  drafted = run("draft", rows, knobs) if block else None
  jax.block_until_ready((rows, drafted))
  began = time.perf_counter()
  for _ in range(CHAIN):
    if name == "draft":
      drafted = run(name, rows, knobs)
    elif name.startswith("plain"):
      rows, _ = run(name, rows, part)
    else:
      rows, _ = run(name, rows, drafted, part)
  jax.block_until_ready((rows, drafted))
  return (time.perf_counter() - began) / CHAIN, rows


def seated(run: Executables, rows: Rows, context: int, reading: bool) -> Rows:
  """Rows that all play, with so many tokens each; reading: but for the first."""
  one = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), rows.settings)
  one = one.replace(limit=np.full(1, 2 ** 30, np.int32), stop_ids=one.stop_ids - 1,
                    calibration=one.calibration + 1, sampling=one.sampling.replace(
                        temperature=np.float32([rows.settings.sampling.mode != "greedy"]), top_k=np.int32([20]),
                        top_p=np.float32([0.9])))
  seats = len(rows.done)
  for seat in range(seats):
    rows = run("own", rows, np.int32(seat), one, np.uint32(seat), np.int32(0), np.int32(context))
  done = np.arange(seats) < int(reading)
  return rows.replace(done=jax.device_put(done, rows.done.sharding))


def table(cost: Cost) -> Table:
  """The costs for people."""
  out = Table("round", "tokens", f"ms at {cost.context}", "us per 1,000 tokens of context", "rounds/s")
  for program in cost.programs():
    seconds = cost.seconds(program, cost.context)
    slope = 1e3 * (cost.seconds(program, cost.context + 1000) - seconds)
    tokens = {"plain": cost.seats, "full": cost.most}.get(program, program)
    out.add_row(str(program), str(tokens), f"{1e3 * seconds:.2f}", f"{1e3 * slope:.1f}",
                f"{1 / seconds:.1f}")
  return out


if __name__ == "__main__":
  # A compiler's mesh is of devices that are not here.
  shell.run(main, Settings, mesh=False)
