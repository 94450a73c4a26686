"""Compare the engine's policies at rising concurrency here: plain, fixed and scheduled over the same programs.

When to use it: to see from how many requests on drafting stops to pay here, and that the scheduler knows. Closed loop:
as many requests are always under way as there are seats, and what comes after that, while the last ones end, is not
counted. Answers are of half to one and a half times --new-tokens: all of one length, plain rows would end together,
and plain decoding alone would have no seat that waits. The policies alternate, so that a slow minute of the machine
hits all of them, and the median of the repeats counts. Where a CPU computes, tokens per second that it worked for them
are given, too: what others take of the machine does not change them. `alone` is an engine without any drafter. With
--device also what a round takes more in the engine than where the whole batch is one program on the device: the host's
part. With --profile also how long the device waited for the host, by the profiler and by the engine's own clock.

    python -m infer.concurrency --target smollm2 --drafter runs/demo
    python -m infer.concurrency --target smollm2 --drafter runs/demo --concurrency 1 8 --device
    python -m infer.concurrency --target smollm2 --drafter runs/demo --concurrency 8 --profile runs/trace

The last line of stdout is a JSON object: for each concurrency tokens per second (and per second of CPU) by policy,
accepted length, scheduled_over_others in each repeat, share of the drafts that were verified, rounds by program, and
the device's idle share; with --device plain_overhead and fixed_overhead, with --profile profiled_idle_share and
clocked_idle_share, as shares.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

import dspark_jax
from dspark_jax.decoding.engine import Engine, EngineConfig, Request
from dspark_jax.decoding.generate import decode
from dspark_jax.decoding.session import Session
from dspark_jax.nn.attention import QUERY_BLOCK, Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import shell, trace
from infer import bench, profile_sps

SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")
POLICIES = ("plain", "fixed", "scheduled")


@dataclasses.dataclass
class Settings:
  target: str
  drafter: str
  """drafter folder or run"""
  concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
  prompts: Path | None = None
  """JSONL as for infer.generate, of lines without settings of their own; default: held-out questions about the standard
  library"""
  prompt_tokens: int = 48
  """longer prompts are left out"""
  new_tokens: int = 64
  """of an answer, on average"""
  requests: int = 4
  """of each seat in a run"""
  repeats: int = 3
  device: bool = False
  """also compare with one program on the device, without an engine"""
  profile: Path | None = None
  """folder for a profiler's traces of the scheduled policy, an answer of each seat"""
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  shell.at_least(settings, prompt_tokens=1, new_tokens=2, repeats=1, requests=1)
  if not settings.concurrency or min(settings.concurrency) < 1:
    raise ValueError(f"concurrency is {settings.concurrency}, expected one or more numbers of at least 1")
  asked = bench.Settings(settings.target, settings.drafter, prompts=settings.prompts,
                         prompt_tokens=settings.prompt_tokens)
  prompts = bench.read_prompts(asked)
  shell.check_drafter(settings.drafter)
  target = shell.load_target(settings.target, settings.dtype, settings.kernels)
  drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
  rows = []
  for count in settings.concurrency:
    rows.append(compare(settings, target, drafter, bench.prompts_of(asked, target, prompts, count * settings.requests)))
    shell.say(table(rows))
    most = sorted(rows[-1]["scheduled"]["programs"].items(), key=lambda pair: -pair[1])
    shell.say(f"{count} requests: scheduled ran {', '.join(f'{name} {times}' for name, times in most)}")
    if settings.device:
      shell.say("{0} requests: a round takes {plain_overhead:.1%} more in the engine than on the device without a "
                "drafter, {fixed_overhead:.1%} with every draft".format(count, **rows[-1]))
    if settings.profile:
      shell.say("{0} requests: the device stood idle for {profiled_idle_share:.1%} by the profiler, "
                "{clocked_idle_share:.1%} by the engine's clock".format(count, **rows[-1]))
  return {"block_size": drafter.block_size, "concurrency": rows}


def compare(settings: Settings, target, drafter, prompts: list[list[int]]) -> dict:
  """One concurrency: two engines, the one with the drafter by each policy in turn."""
  seats = len(prompts) // settings.requests
  longest, block = max(map(len, prompts)), drafter.block_size + 1
  # A prompt in one chunk: of two, prompts that wait to be read would leave seats empty from 16 requests on.
  whole = 8 if longest <= QUERY_BLOCK else QUERY_BLOCK
  chunk = -(-longest // whole) * whole
  capacity = -(-(longest + max(settings.new_tokens * 3 // 2 + 2 * block, chunk) + 8 * block + 24) // 64) * 64
  config = EngineConfig(seats=seats, capacity=capacity, sampling="greedy", queue=len(prompts), chunk=chunk)

  def measure(run, rows):
    return profile_sps.measure(run, rows, 5, target=settings.target, drafter=settings.drafter, dtype=settings.dtype)

  with shell.stderr.status(f"compiling for {seats} seats") as status:
    say = lambda name: status.update(f"compiling {name} for {seats} seats")
    alone = Engine(target, None, config, say=say)
    engine = Engine(target, drafter, config, measure=measure, say=say)
  shell.say(profile_sps.table(engine.cost))
  runs = {name: [] for name in ("alone", *POLICIES)}
  for repeat in range(settings.repeats + 1):  # the first warms up
    # There and back: none always comes after the one that has kept the machine busy for longest.
    for name in list(runs)[::(-1) ** repeat]:
      if name != "alone":
        engine.use(name)
      runs[name].append(run_once(alone if name == "alone" else engine, prompts, settings.new_tokens))
  found = {"concurrency": seats}
  for name, each in runs.items():
    typical = sorted(each[1:], key=lambda run: run["tokens_per_second"])[len(each[1:]) // 2]
    found[name] = typical | {speed: statistics.median(run[speed] for run in each[1:]) for speed in SPEEDS}
  found["scheduled_over_others"] = over_others({name: each[1:] for name, each in runs.items()})
  texts = {name: each[-1].pop("texts") for name, each in runs.items()}
  for each in found.values():
    if isinstance(each, dict):
      each.pop("texts", None)
  found["same_text"] = all(text == texts["alone"] for text in texts.values())
  if settings.profile:
    engine.use("scheduled")
    play = lambda: run_once(engine, prompts[:seats], settings.new_tokens)["idle_share"]
    shares = trace.idle_share(play, settings.profile / str(seats))
    found["profiled_idle_share"], found["clocked_idle_share"] = shares
  if settings.device:
    engine.use("fixed")
    for name, chosen, own in (("plain", None, alone), ("fixed", drafter, engine)):
      whole = Session(target, chosen, batch=seats, budget=None)
      found[f"{name}_overhead"] = overhead(own, whole, prompts[:seats], settings.new_tokens, settings.repeats)
  return found


def over_others(runs: dict[str, list[dict]]) -> list[float]:
  """Scheduled over the best of the others, tokens per second in each repeat: how far these are apart is what a machine
  alone can change."""
  speeds = {name: [run["tokens_per_second"] for run in each] for name, each in runs.items()}
  mine = speeds.pop("scheduled")
  return [speed / max(others) for speed, *others in zip(mine, *speeds.values())]


def overhead(engine: Engine, whole: Session, prompts: list[list[int]], new: int, repeats: int) -> float:
  """What a round takes more in the engine than in one program on the device that generates for all, as a share.

  Seconds and rounds are both differences, between answers of half and of one and a half times `new` tokens, as prompts
  are read otherwise there: seats that began one after another need other rounds than rows that began at once. The
  median of the repeats, in each of which both run side by side, there and back: the fastest of each, apart, differ by
  a third where a machine's speed comes and goes.
  """
  lengths = new // 2, new // 2 + new
  [batch] = whole.prepare(prompts, max_new_tokens=lengths[1])
  # At least the slots of the engine's seats: where attention is by reference, each slot costs, read or not.
  static = batch.static | {"capacity": max(batch.static["capacity"], engine.config.capacity)}

  def in_engine(n):
    before = engine.metrics().get("rounds", 0)
    for prompt in prompts:
      engine.submit(Request(tuple(prompt), max_new_tokens=n, reuse=False))
    for _ in engine.run():
      pass
    return engine.metrics()["rounds"] - before

  def on_device(n):
    target, drafter, requests, policy = batch.args
    settings = requests.settings.replace(limit=np.full_like(requests.settings.limit, n))
    return int(decode(target, drafter, requests.replace(settings=settings), policy, **static).rounds)

  def once(back):
    took = {}
    for run, n in [(in_engine, lengths[0]), (on_device, lengths[0]),
                   (on_device, lengths[1]), (in_engine, lengths[1])][::-1 if back else 1]:
      began = time.perf_counter()
      rounds = run(n)
      took[run, n] = np.asarray([time.perf_counter() - began, rounds])
    per_round = [seconds / rounds for run in (in_engine, on_device)
                 for seconds, rounds in [took[run, lengths[1]] - took[run, lengths[0]]]]
    return per_round[0] / per_round[1]

  return statistics.median([once(repeat % 2) for repeat in range(repeats + 1)][1:]) - 1  # the first compiles


def run_once(engine: Engine, prompts: list[list[int]], new: int) -> dict:
  """All prompts through the engine, without what it knows of them. new: tokens of an answer on average."""
  limits = np.random.default_rng(0).integers(-(-new // 2), new + new // 2 + 1, len(prompts)).tolist()
  before, began, spent = engine.metrics(), time.perf_counter(), time.process_time()
  ids = [engine.submit(Request(tuple(prompt), max_new_tokens=limit, reuse=False))
         for prompt, limit in zip(prompts, limits)]
  texts, playing, counted, full, worked = {id: [] for id in ids}, len(prompts), 0, 0.0, 0.0
  for event in engine.run():
    texts[event.id] += event.tokens
    if playing >= before["seats"]:  # every seat is taken
      counted += len(event.tokens)
      full, worked = time.perf_counter() - began, time.process_time() - spent
    playing -= event.finish is not None
  seconds, after = time.perf_counter() - began, engine.metrics()
  moved = {name: value - before.get(name, 0) for name, value in after.items()}
  share = lambda a, b: moved[a] / moved[b] if moved.get(b) else None
  return {"tokens_per_second": counted / full, "tokens_per_cpu_second": counted / worked,
          "accepted_length": share("round_tokens", "row_rounds"),
          "verified_share": share("verified", "drafted"),
          "idle_share": moved.get("idle_seconds", 0.0) / seconds,
          "predicted_over_measured": share("predicted_seconds", "round_seconds"),
          "programs": {name.removeprefix("program_"): int(value) for name, value in moved.items()
                       if name.startswith("program_") and value}, "texts": [texts[id] for id in ids]}


def table(rows: list[dict]) -> Table:
  """The result for people: tokens per second."""
  out = Table("requests", "no drafter", *POLICIES, "scheduled / best of the others", "in each repeat", "by CPU",
              "accepted length")
  for row in rows:
    clock, cpu = ([row[name][speed] for name in ("alone", *POLICIES)] for speed in SPEEDS)
    out.add_row(str(row["concurrency"]), *(f"{value:.1f}" for value in clock), f"{clock[-1] / max(clock[:-1]):.3f}",
                " ".join(f"{ratio:.2f}" for ratio in row["scheduled_over_others"]),
                f"{cpu[-1] / max(cpu[:-1]):.3f}", f"{row['fixed']['accepted_length']:.2f}")
  return out


if __name__ == "__main__":
  shell.run(main, Settings)
