"""What the sequential head costs, in percent of a round: the same drafter with a vanilla head and without (DFlash).

When to use it: for the right half of the paper's figure 4 (infer.plots), on this machine and, with --compiler (after
`make tpu-compiler`), at Qwen3-8B size: bytes that must be read, and what a TPU compiler counts; nothing of that size
is run.

    python -m infer.head_cost --target smollm2 --out runs/head_cost.json
    python -m infer.head_cost --target smollm2 --blocks 4 8 12 16 --compiler v5e --out runs/head_cost.json

Weights are random: what a round costs does not depend on what it brings. Neither drafter has a confidence head.

At Qwen3-8B size `percent` is by the bytes that a round cannot but read (`must_read`), since decoding is bound by them.
percent_bytes_reported and percent_flops are by the compiler's cost analysis. That counts the body of a loop once: so
target layers are unrolled, the positions of a block are a Python loop (`Unrolled`), and the text of the program must
hold no loop; 36 unrolled layers compile for minutes, so 6 and 7 are compiled, and their difference is added for each of
the other 30. Its bytes count a weight that is copied ahead to on-chip memory several times (whole with each slice), a
layer 2.1 times, so its share of the head is too small. Its optimal_seconds come out negative, and are not used.

The last line of stdout is a JSON object, also written to --out: head_cost, a list with device, block_size and percent.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

import dspark_jax
from dspark_jax.config import to_json
from dspark_jax.decoding.generate import Requests, start
from dspark_jax.decoding.policy import All
from dspark_jax.decoding.round import Models, play
from dspark_jax.decoding.session import Session
from dspark_jax.drafters import heads
from dspark_jax.drafters.dspark import DSpark, DSparkChoices, DSparkConfig
from dspark_jax.programs import shell
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.programs.results import HeadCost, Results
from dspark_jax.targets.decoder import Decoder, TargetConfig
from dspark_jax.targets.sizes import MODELS

QWEN3_8B = MODELS["qwen3-8b"]
FEW = 6  # layers that are compiled: the least with five different taps
# A small slice of each generation: one of its devices is compiled for.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
CONTEXT = 2048  # cache slots of the compiled round
PROMPT = 48     # tokens before the measured rounds


@dataclasses.dataclass
class Settings:
  target: str
  """run on this machine"""
  out: Path
  """JSON file"""
  blocks: tuple[int, ...] = (4, 8, 12, 16)
  compiler: Literal["v5e", "v5p", "none"] = "none"
  rows: int = 1
  """requests of a round"""
  layers: int = 5
  """of the drafter"""
  rank: int = 256
  """of the head"""
  repeats: int = 15
  """medians are of so many, with and without the head in turn"""
  rounds: int = 4
  """timed as one program"""
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  small = [name for name in ("rows", "layers", "rank", "repeats", "rounds") if getattr(settings, name) < 1]
  if small or not settings.blocks or min(settings.blocks) < 1:
    raise ValueError(f"{', '.join(small) or 'blocks'}: expected at least 1")
  shell.check_out(settings.out)
  blocks = sorted(set(settings.blocks))
  # First of all, so that a missing compiler is seen before minutes of measuring.
  place = None if settings.compiler == "none" else absent_tpu(TOPOLOGIES[settings.compiler])
  with shell.stderr.status("loading"):
    target = shell.load_target(settings.target, settings.dtype)
  rows = []
  with shell.bar() as bar:
    task = bar.add_task("head cost", total=len(blocks) * (2 if place else 1), note="")
    for measure, on in ((measured, target), (counted, place)):
      for block in blocks if on is not None else ():
        rows.append(measure(settings, on, block))
        shell.say(f"{rows[-1].device}, block {block}: {rows[-1].percent:.2f} %")
        bar.update(task, advance=1)
  result = to_json(Results(head_cost=tuple(rows)))
  shell.write_json(settings.out, result)
  table = Table("device", "block", "percent of a round")
  for row in rows:
    table.add_row(row.device, str(row.block_size), f"{row.percent:.2f}")
  shell.say(table)
  return result


def drafter_config(target: TargetConfig, settings: Settings, block: int, rank: int) -> DSparkConfig:
  """A drafter over the whole vocabulary, with five taps, whatever the depth of the target: some may be the same."""
  last = target.num_layers - 2
  # Those of the released drafters for 36 layers, else evenly spaced: how many are read costs, not which.
  taps = (1, 9, 17, 25, 33) if last == 34 else tuple(round(i * last / 4) for i in range(5))
  return DSparkConfig.for_target(DSparkChoices(num_layers=settings.layers, taps=taps, block_size=block,
                                               markov_rank=rank,
                                               confidence="none"), target)


def percent(with_head: float, without: float) -> float:
  """The head's share of a round that has it, in percent."""
  return 100 * (with_head - without) / with_head


def measured(settings: Settings, target, block: int) -> HeadCost:
  """The cost at one block size by the times of rounds with and without the head, and of its own part alone."""
  prompts = np.random.default_rng(0).integers(0, target.config.vocab_size, (settings.rows, PROMPT)).tolist()
  calls = {}
  for rank in (settings.rank, 0):
    # Both before anything is timed: compiling one between the others' calls would warm the machine unevenly.
    drafter = dspark_jax.new_drafter(drafter_config(target.config, settings, block, rank))
    drafter = jax.tree.map(lambda x: x.astype(settings.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, drafter)
    (batch,) = Session(target, drafter, budget=None).prepare(
        prompts, max_new_tokens=(settings.rounds + 1) * (block + 1))
    models, requests = Models.of(target, drafter), batch.args[2]
    calls["round", rank] = rounds(settings, models, requests, batch.static["capacity"])
    calls["block", rank] = block_alone(settings, models, requests)
  seconds = interleaved(calls, settings.repeats)
  median = {key: statistics.median(values) / settings.rounds for key, values in seconds.items()}
  # Neighbours in time are compared, so that their quartiles show the machine's unrest and not its drift.
  pairs = [percent(a, b) for a, b in zip(seconds["round", settings.rank], seconds["round", 0])]
  whole, without = median["round", settings.rank], median["round", 0]
  alone = median["block", settings.rank] - median["block", 0]
  # Without the target's folder: the same device, measured from two places, is one line in the figure.
  device = f"{Path(settings.target).name}, {settings.dtype}, this {jax.devices()[0].device_kind}"
  return HeadCost(
      device, block, percent(whole, without), percent_quartiles=tuple(np.percentile(pairs, [25, 75]).tolist()),
      round_seconds=whole, round_seconds_without=without, head_seconds_alone=alone, percent_alone=100 * alone / whole)


def rounds(settings: Settings, models: Models, requests: Requests, capacity: int) -> Callable:
  """A call that runs `rounds` whole rounds after the prompt, as one program."""
  begun = jax.jit(start, static_argnums=2)(models, requests, capacity)

  def run(models, rows):
    rows = jax.lax.fori_loop(0, settings.rounds, lambda _, rows: play(models, rows, All())[0], rows)
    return rows.replace(cache=None, draft=None)  # or the caches would be copied out, in the time that is measured

  compiled = jax.jit(run).lower(models, begun).compile()
  return lambda: compiled(models, begun)


def block_alone(settings: Settings, models: Models, requests: Requests) -> Callable:
  """A call that draws `rounds` blocks from given hidden states and base logits, and does nothing else of a round."""
  drafter = models.drafter
  rows, block, config = settings.rows, drafter.block_size, models.target.config
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(rows, block, config.spec.hidden_size)), settings.dtype)
  base = jnp.asarray(rng.normal(size=(rows, block, config.vocab_size)), jnp.float32)
  keys = jax.vmap(jax.random.key)(requests.seeds)

  def run(drafter, bias, sampling, hidden, base, keys):
    def body(_, anchor):
      # Moved by the anchor: without a head all blocks would be the same, and drawn only once.
      moved = base + anchor[:, None, None].astype(jnp.float32)
      proposal = heads.propose(drafter.markov_head, bias, None, hidden, moved, anchor, None, keys, sampling)
      return proposal.tokens[:, -1]
    return jax.lax.fori_loop(0, settings.rounds, body, jnp.zeros(rows, jnp.int32))

  args = drafter, models.draft_head.bias, requests.settings.sampling, hidden, base, keys
  compiled = jax.jit(run).lower(*args).compile()
  return lambda: compiled(*args)


def interleaved(calls: dict, repeats: int) -> dict[tuple, list[float]]:
  """Seconds of each call, after one to warm up: all in turn, so that what else the machine does hits all alike."""
  seconds = {key: [] for key in calls}
  for repeat in range(-1, repeats):
    for key in list(calls)[::-1 if repeat % 2 else 1]:  # to and fro: none always follows the same one
      began = time.perf_counter()
      jax.block_until_ready(calls[key]())
      if repeat >= 0:
        seconds[key].append(time.perf_counter() - began)
  return seconds


class Unrolled(DSpark):
  """The same drafter with a block as a Python loop over its positions; for a vanilla head or none: no state."""

  def propose(self, target, head, state, anchor, keys, sampling):
    start = self.start(target, anchor, state.held)
    hidden = self.draft(start, state.cache, target.kernels)[:, -self.block_size:]
    base, parts = head.base(hidden), []
    for k in range(self.block_size):
      at = slice(k, k + 1)
      parts.append(heads.propose(self.markov_head, head.bias, None, hidden[:, at], base[:, at], anchor, None, keys,
                                 sampling))
      anchor = parts[-1].tokens[:, 0]
    return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)


def counted(settings: Settings, place, block: int, target: TargetConfig = QWEN3_8B) -> HeadCost:
  """The cost at one block size by what a round with and without the head must read, and by the compiler's counts."""
  few = dataclasses.replace(target, num_layers=FEW)
  more = dataclasses.replace(target, num_layers=FEW + 1)
  with_head, without = (round_cost(settings, few, block, rank, place) for rank in (settings.rank, 0))
  layer = {name: value - without[name] for name, value in round_cost(settings, more, block, 0, place).items()}
  whole = lambda cost: {name: value + (target.num_layers - FEW) * layer[name] for name, value in cost.items()}
  with_head, without = whole(with_head), whole(without)
  model = jax.eval_shape(lambda: Decoder(target, rngs=nnx.Rngs(0)))
  drafters = (jax.eval_shape(lambda: DSpark(drafter_config(target, settings, block, rank), rngs=nnx.Rngs(0)))
              for rank in (settings.rank, 0))
  read, read_without = (must_read(model, drafter, settings.rows, CONTEXT) for drafter in drafters)
  return HeadCost(
      "Qwen3-8B, bfloat16, bytes that must be read", block, percent(read, read_without), round_bytes=read,
      compiler=settings.compiler, percent_bytes_reported=percent(with_head["bytes"], without["bytes"]),
      percent_flops=percent(with_head["flops"], without["flops"]),
      round_bytes_reported=with_head["bytes"], round_flops=with_head["flops"])


def must_read(target: Decoder, drafter: DSpark | None, rows: int, context: int) -> int:
  """Bytes that a bfloat16 round (without a drafter: a plain step) of `rows` with so many tokens in their caches cannot
  but read: each layer's weights and caches once, the target's head twice (drafts, verification), and the projection of
  the sequential head once per position. Of embeddings only rows are read. Arrays may be shapes alone.
  """
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  spec, layers, head = target.config.spec, target.config.num_layers, count(target.lm_head or target.embed_tokens)
  weights = count((target.layers, target.norm)) + head
  if drafter:
    layers += drafter.config.num_layers
    weights += head + count((drafter.layers, drafter.fc, drafter.hidden_norm, drafter.norm, drafter.confidence_head))
    weights += drafter.block_size * count(drafter.markov_head.markov_w2) if drafter.markov_head else 0
  return 2 * (weights + 2 * layers * rows * context * spec.num_kv_heads * spec.head_dim)


def round_cost(settings: Settings, target: TargetConfig, block: int, rank: int, place) -> dict[str, float]:
  """bytes and flops of one greedy bfloat16 round without a loop. place: None is this machine."""
  on = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
  half = lambda tree: on(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree))
  drafter = half(jax.eval_shape(lambda: Unrolled(drafter_config(target, settings, block, rank), rngs=nnx.Rngs(0))))
  target = half(jax.eval_shape(lambda: Decoder(target, rngs=nnx.Rngs(0))))
  (batch,) = Session(target, drafter, budget=None).prepare([[0]] * settings.rows, max_new_tokens=128)
  models = on(jax.eval_shape(Models.of, target, drafter))
  begun = on(jax.eval_shape(lambda models, requests: start(models, requests, CONTEXT), models, on(batch.args[2])))
  compiled = jax.jit(play, donate_argnums=1).lower(models, begun, All()).compile()
  loops, cost = len(re.findall(r" while\(", compiled.as_text())), compiled.cost_analysis()
  assert place is None or not loops, f"{loops} loops in the compiled round, whose bodies are counted once"
  return {"bytes": cost["bytes accessed"], "flops": cost["flops"]}


if __name__ == "__main__":
  shell.run(main, Settings)
