"""Train a drafter on a frozen target, which runs inside the training step: no hidden-state files.

When to use it: to make a DSpark, DFlash, Eagle3 or MTP drafter for a target and data of your own. A run that is killed,
or stopped by SIGTERM, goes on exactly where it was when the same command is given again.

    python -m train.train --config configs/demo.py --data runs/answers.jsonl --steps 200
    python -m train.train --config configs/qwen3_4b.py --data answers.jsonl --out runs/qwen3-4b --mesh.fsdp -1

On several hosts the same command is given on each, with a run folder that all of them see: Slurm, Open MPI and TPU pods
say who they are, elsewhere --hosts.coordinator HOST:PORT --hosts.processes N --hosts.process I does. Process 0 speaks
and writes; SIGTERM to any of them saves and ends all; where one dies, the others end within --hosts.silence seconds
with its name, and the same command goes on, also with another number of hosts.

Flags override the experiment file. The word drafter:eagle3 (or drafter:dspark, drafter:mtp) chooses another kind of
drafter than the file's, from that kind's defaults: `drafter:eagle3 --drafter.taps 1 8 15 21 28`.

Data: JSONL of conversations ({"messages": [...]}, or ShareGPT's {"conversations": [...]}; with "tools") or of tokens
(train.answers), or .txt, .md and .py files; what of it is left out is counted by reason. The run folder holds run.json
(resolved configuration, those counts, the day that chat templates are told), metrics.jsonl and tensorboard/ (what
train.report draws), steps/ (Orbax) and drafter/ (what load_drafter reads).
The last line of stdout is a JSON object with the keys steps, loss, tau, accept_rate (by position), tokens_per_second
and checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import dspark_jax
from dspark_jax.checkpoints import state as checkpoints
from dspark_jax.data import chat, pipeline
from dspark_jax.drafters import DRAFTERS
from dspark_jax.drafters.model import DrafterConfig, DrafterSettings
from dspark_jax.nn.sharding import everywhere, made, place, place_rows, rows_share, shardings
from dspark_jax.programs import hosts, run_folder, shell
from dspark_jax.targets.decoder import TargetConfig
from dspark_jax.training import starts
from dspark_jax.training.step import StepConfig, init_state, span, train_step
from train.config import TrainConfig, experiment, read_config
from train.loop import loop, summarise_saved
from train.watch import LOG, Drafted, HeldOut, Pace, useful_flops

PROGRAM = "train.train"
SAID_BYTES = 2 ** 31  # of the target's outputs that are kept from fitting a lens to training
TIMED = 4             # steps whose median says how long one takes: the first of them may compile
FEWEST = 8            # steps of a run by the clock, even when no time is left: one that logs, saves and can be loaded


def main(config: TrainConfig) -> dict:
  if config.steps is None and config.minutes is None:
    raise ValueError("neither steps nor minutes are given: say how long to train with --steps or --minutes")
  if not config.data:
    raise ValueError("no data: give one or more files with --data")
  check_rows(config)
  if config.decode_every and hosts.here.processes > 1:
    raise ValueError("decode_every works in one process: leave it out, and decode a checkpoint with infer.evaluate")
  with run_folder.owned(config.out):
    return train(config, *shell.load(config.target, config.target_dtype, config.kernels))


def check_rows(config: TrainConfig) -> None:
  """ValueError unless the rows of a step divide among the current mesh's devices, and into microbatches."""
  mesh = jax.sharding.get_mesh()
  parts = config.microbatches * (1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"])
  if config.batch % parts:
    raise ValueError(f"batch is {config.batch}, expected a multiple of {parts}: rows are divided into "
                     f"{config.microbatches} microbatches of {parts // config.microbatches} devices (mesh data x fsdp)")


def train(config: TrainConfig, target, tokenizer) -> dict:
  """Trains (or goes on training), saves, and returns the result that the program prints. The caller owns the folder."""
  started = time.monotonic()
  date = datetime.date.fromisoformat(hosts.agree(lambda: run_folder.date_of(config.out).isoformat()))
  source, packed = read_data(config, target.config.vocab_size, tokenizer, date)
  record = describe(config, packed)
  hosts.check_same("run", record)
  run = hosts.agree(lambda: run_folder.resumed(config.out, record, shrunk=("drafter",))
                    if run_folder.is_begun(config.out) else None)
  drafter = build_drafter(config, target, source.documents, chat.stop_ids(tokenizer))
  data, apart = pipeline.held_out(packed, config.eval_rows, seed=config.seed)
  batch_of = Batches(config, data)
  # By the clock, any number will do: how many steps there are is known, and set, once some were timed.
  static = step_config(config)
  state = made(functools.partial(init_state, config=static, seed=config.seed, total_steps=config.steps or 1000),
               drafter)
  target = jax.tree.map(lambda x: x.astype(config.target_dtype), target)
  saved = checkpoints.checkpointer(config.out / "steps", config.save_every)
  fresh = saved.latest is None  # also of a run that was killed before its first checkpoint
  if hosts.agree(lambda: bool(run and not fresh and saved.latest.step == run["total_steps"]
                              and (config.out / "drafter").exists())):
    saved.close()
    shell.say(f"all {run['total_steps']} steps are done")
    return dict(steps=run["total_steps"], **summarise_saved(config), checkpoint=str(config.out))
  # The metrics whole everywhere, so that any process can read them.
  step = jax.jit(functools.partial(train_step, config=static), donate_argnums=0,
                 out_shardings=(shardings(state), everywhere()))
  with shell.stderr.status("compiling the training step"):
    compiled = step.lower(state, target, batch_of(0)).compile()
  shell.say(f"step: {shell.memory_report(compiled)}")
  said, began = {}, time.monotonic()
  if fresh and getattr(config.drafter, "lens", False):  # not every kind has one
    drafter, said = fit_lens(config, state.drafter, target, batch_of, len(data))
    state = state.replace(drafter=drafter)

  def advance(state, index):
    if index in said:  # the target has run on this batch, for the lens
      return step(state, target, batch_of(index), encoded=said[index])
    return compiled(state, target, batch_of(index))

  if run is None:
    left = (config.minutes or 0) * 60 - (time.monotonic() - began)
    steps = config.steps or steps_in(left, state, advance, len(said))
    run = hosts.agree(lambda: new_run(config, {**record, "date": str(date), "lost": dataclasses.asdict(source.lost)},
                                      steps))
  state = state.replace(span=place(span(config.optimizer, run["total_steps"])))
  restored = checkpoints.restore(saved, state, use_older=config.use_older)
  if restored is not None:
    state = restored
    shell.say(f"resuming after step {int(state.step)} of {run['total_steps']}")
  measures = measured(config, static, target, apart, chat.stop_ids(tokenizer))
  pace = Pace(config, useful_flops(config, target, state.drafter), started)
  state, last = loop(config, advance, state, saved, run["total_steps"], batch_of, pace, measures)
  saved.close()
  dspark_jax.save_drafter(config.out / "drafter", state.drafter, target)
  return dict(steps=int(state.step), **last, checkpoint=str(config.out))


def read_data(config: TrainConfig, vocab_size: int, tokenizer, date: datetime.date):
  """(what was read, its rows). ValueError when there is nothing to learn."""
  encode = functools.partial(chat.encode_conversation, enable_thinking=config.thinking, date=date,
                             allow_special=config.allow_special)
  source = pipeline.read_conversations(config.data, tokenizer, max_len=config.row_length, vocab_size=vocab_size,
                                       encode_conversation=encode)
  if not source.documents:
    raise ValueError(f"the data hold nothing to learn (left out: {source.lost}): give other data, or other settings")
  packed = pipeline.pack(source.documents, config.row_length)
  shell.say(f"data: {len(source.documents)} documents, {len(packed.rows.tokens)} rows of {config.row_length}, "
            f"{packed.fill:.0%} full; left out: {source.lost}")
  return source, packed


class Batches:
  """The batch of any step, on the mesh; of its rows this process reads those of its own devices."""

  def __init__(self, config: TrainConfig, data: pipeline.Some):
    self.config, self.data, self.waited = config, data, 0.0  # seconds, of all batches so far

  def rows(self, step: int) -> np.ndarray:
    """Which rows of the data it has, in all processes: i64[B]."""
    return self.data.kept[pipeline.row_indices(len(self.data), step, self.config.batch, seed=self.config.seed)]

  def __call__(self, step: int):
    began, (part, count) = time.monotonic(), rows_share()
    size = self.config.batch // count
    batch = self.data.rows.take(self.rows(step)[part * size:(part + 1) * size])
    self.waited += time.monotonic() - began
    return place_rows(batch)


def build_drafter(config: TrainConfig, target, documents, stops):
  """A fresh drafter for this target and data."""
  s = config.drafter
  words = None
  if s.draft_vocab_size:
    words = pipeline.top_words(documents, s.draft_vocab_size, target.config.vocab_size, stops)
  drafter = dspark_jax.new_drafter(drafter_config(s, target.config), words=words, seed=config.seed)
  if s.from_target:
    drafter = starts.from_target(drafter, target)
  if getattr(s, "from_bigrams", False):  # not every kind has a head for them
    factors = pipeline.bigram_factors(documents, words, target.config.vocab_size, s.markov_rank)
    drafter = starts.from_bigrams(drafter, *factors)
  return drafter


def drafter_config(settings: DrafterSettings, target: TargetConfig) -> DrafterConfig:
  """The drafter's own configuration for this target. ValueError when they do not fit."""
  return DRAFTERS[settings.kind].Config.for_target(settings, target)


def step_config(config: TrainConfig) -> StepConfig:
  """What of an experiment is static about a step."""
  return StepConfig(num_anchors=config.anchors, microbatches=config.microbatches, compute_dtype=config.compute_dtype,
                    loss=config.loss, optimizer=config.optimizer)


def measured(config: TrainConfig, static: StepConfig, target, apart, stops) -> dict:
  """What is measured every so many steps, by name, on the rows that are held out."""
  found = {}
  if config.eval_every:
    found["held_out"] = (config.eval_every, HeldOut(config, static, target, apart))
  if config.decode_every:
    found["drafted"] = (config.decode_every, Drafted(config, target, apart, stops))
  return found


def describe(config: TrainConfig, packed) -> dict:
  """What must be the same for a run to go on: settings that matter to the result, and the data."""
  settings = run_folder.plain(dataclasses.asdict(config))
  # These change where and how often something is written or computed, and how many steps there are: no step of it. Data
  # count by content, so that files may be moved or split.
  elsewhere = ("out", "data", "save_every", "log_every", "minutes", "mesh", "kernels", "hosts", "diverged_at",
               "use_older", "eval_every", "decode_every", "decode_prompts", "profile_steps")
  settings = {k: v for k, v in settings.items() if k not in elsewhere}
  for name in ("thinking", "allow_special", "eval_rows"):
    settings[name] = settings[name] or None  # what runs have that began before there was such a setting
  return {"program": PROGRAM, "config": settings,
          "data": run_folder.digest(packed.rows.tokens.tobytes(), packed.rows.loss_mask.tobytes())}


def new_run(config: TrainConfig, record: dict, total_steps: int) -> dict:
  """Writes the record of a run that begins."""
  run = {**record, "total_steps": total_steps, "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}
  run_folder.write_record(config.out, run)
  return run


def is_stopped(config: TrainConfig, result: dict) -> bool:
  """Whether SIGTERM ended a training before its last step; `result` is what it returned."""
  return result["steps"] < run_folder.read_record(config.out, PROGRAM, {"total_steps": int})["total_steps"]


def fit_lens(config: TrainConfig, drafter, target, batch_of, rows: int):
  """(the drafter with its lens fitted to the first batches, in at most half of the minutes; what the target said of
  them by index of the batch, up to SAID_BYTES: the first steps of training need not ask it again)."""
  total = math.ceil(min(config.lens_rows, rows) / config.batch)
  observe, moments, said = jax.jit(starts.observe, donate_argnums=0), made(starts.no_moments, drafter), {}
  began = time.monotonic()
  with shell.bar() as bar:
    task = bar.add_task("fitting the lens", total=total, note="")
    for index in range(total):
      # Blocked on, or the clock below would be that of the queue.
      moments, encoded = jax.block_until_ready(observe(moments, drafter, target, batch_of(index)))
      if (len(said) + 1) * sum(x.nbytes for x in jax.tree.leaves(encoded)) <= SAID_BYTES:
        said[index] = encoded
      bar.update(task, completed=index + 1, note=f"{(index + 1) * config.batch} rows")
      if config.steps is None and hosts.agree(lambda: time.monotonic() - began > config.minutes * 60 / 2):
        break
  shell.say(f"lens: fitted to {int(moments.count)} positions")
  return jax.jit(starts.from_moments)(drafter, target, starts.checked(moments)), said


def steps_in(left: float, state, advance, known: int) -> int:
  """How many steps fit into the seconds that are left, from timing a few on a copy of the state. The first `known` are
  quicker than those that follow: the target has already run."""
  state = jax.tree.map(jnp.copy, state)  # the steps are donated their state, and the run begins from this one

  def seconds(first):
    nonlocal state
    times = []
    for index in range(first, first + TIMED):
      began = time.perf_counter()
      state, _ = jax.block_until_ready(advance(state, index))
      times.append(time.perf_counter() - began)
    return np.median(times)

  slow = seconds(known)
  quick = seconds(0) if known else slow
  return hosts.agree(lambda: max(int(min(left / quick, known + max(left - known * quick, 0) / slow)), FEWEST))


if __name__ == "__main__":
  path, args = experiment(__doc__)
  shell.run(main, TrainConfig, default=lambda: read_config(path), args=args)
