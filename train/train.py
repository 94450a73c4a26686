"""Train a drafter on a frozen target, which runs inside the training step, or whose hidden states were stored.

When to use it: to make a DSpark, DFlash, Eagle3 or MTP drafter for a target and data of your own. A run that is killed,
or stopped by SIGTERM, goes on exactly where it was when the same command is given again.

    python -m train.train --config configs/demo.py --data runs/answers.jsonl --steps 200
    python -m train.train --config configs/qwen3_4b.py --data answers.jsonl --out runs/qwen3-4b --mesh.fsdp -1

Flags override the experiment file. The word drafter:eagle3 (or drafter:dspark, drafter:mtp) chooses another kind of
drafter than the file's, from that kind's defaults: `drafter:eagle3 --drafter.taps 1 8 15 21 28`.

Data: a folder of train.prepare, or files: JSONL of conversations ({"messages": [...]}, or ShareGPT's {"conversations":
[...]}; with "tools") or of tokens (train.answers), or .txt, .md and .py; what of it is left out is counted by reason.
--features STORE reads what train.cache_hidden wrote for the same data and settings. The run folder holds run.json
(resolved configuration, those counts, the day that chat templates are told), metrics.jsonl, rows/ (what was prepared of
files), steps/ (Orbax) and drafter/ (what load_drafter reads).
The last line of stdout is a JSON object with the keys steps, loss, tau, accept_rate (by position), tokens_per_second
and checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import dspark_jax
from dspark_jax import metrics as means
from dspark_jax.checkpoints import state as checkpoints
from dspark_jax.data import chat, pipeline
from dspark_jax.data.features import Features, Memory
from dspark_jax.data.rows import Rows
from dspark_jax.data.words import bigram_factors, top_words
from dspark_jax.drafters import DRAFTERS
from dspark_jax.drafters.model import DrafterConfig, DrafterSettings
from dspark_jax.nn.sharding import made, shardings
from dspark_jax.programs import run_folder, shell
from dspark_jax.targets.decoder import TargetConfig
from dspark_jax.training import starts
from dspark_jax.training.step import StepConfig, init_state, span, train_step
from train import prepare
from train.config import TrainConfig, experiment, read_config
from train.features import check_early, features_of, given, stored_date, stored_dtype

PROGRAM = "train.train"
LOG = "metrics.jsonl"
SAID_BYTES = 2 ** 31  # of the target's outputs that are kept from fitting a lens to training
TIMED = 4             # steps whose median says how long one takes: the first of them may compile
FEWEST = 8            # steps of a run by the clock, even when no time is left: one that logs, saves and can be loaded


def main(config: TrainConfig) -> dict:
  if config.steps is None and config.minutes is None:
    raise ValueError("neither steps nor minutes are given: say how long to train with --steps or --minutes")
  if not config.data:
    raise ValueError("no data: give one or more files with --data")
  check_rows(config)
  check_early(config)
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
  rows = read_data(config, target.config.vocab_size, tokenizer)
  record = describe(config) | {"data": rows.digest}
  run = run_folder.resumed(config.out, record, shrunk=("drafter",)) if run_folder.is_begun(config.out) else None
  features = features_of(config, rows, target)
  drafter = build_drafter(config, target, rows, chat.stop_ids(tokenizer))
  # By the clock, any number will do: how many steps there are is known, and set, once some were timed.
  static = step_config(config)
  state = made(functools.partial(init_state, config=static, seed=config.seed, total_steps=config.steps or 1000),
               drafter)
  target = jax.tree.map(lambda x: x.astype(config.target_dtype), target)
  saved = checkpoints.checkpointer(config.out / "steps", config.save_every)
  fresh = saved.latest is None  # also of a run that was killed before its first checkpoint
  if run and not fresh and saved.latest.step == run["total_steps"] and (config.out / "drafter").exists():
    saved.close()
    shell.say(f"all {run['total_steps']} steps are done")
    return dict(steps=run["total_steps"], **summarise_saved(config), checkpoint=str(config.out))
  step = jax.jit(functools.partial(train_step, config=static), donate_argnums=0, out_shardings=(shardings(state), None))
  batch_of = lambda index: given(config, rows, features, index)
  with shell.stderr.status("compiling the training step"):
    batch, encoded = batch_of(0)
    compiled = step.lower(state, target, batch, encoded=encoded).compile()
  shell.say(f"step: {shell.memory_report(compiled)}")
  began, known = time.monotonic(), 0
  if fresh and getattr(config.drafter, "lens", False):  # not every kind has one
    drafter, features = fit_lens(config, state.drafter, target, batch_of, features, len(rows))
    state, known = state.replace(drafter=drafter), len(features)

  def advance(state, index):
    batch, encoded = batch_of(index)
    # In memory is what was said for the lens: those few steps are others than the one compiled above.
    run = compiled if config.features or encoded is None else step
    return run(state, target, batch, encoded=encoded)

  if run is None:
    left = (config.minutes or 0) * 60 - (time.monotonic() - began)
    run = new_run(config, {**record, "date": rows.manifest.date, "lost": rows.manifest.lost},
                  config.steps or steps_in(left, state, advance, known))
  state = state.replace(span=span(config.optimizer, run["total_steps"]))
  restored = checkpoints.restore(saved, state)
  if restored is not None:
    state = restored
    shell.say(f"resuming after step {int(state.step)} of {run['total_steps']}")
  run_folder.forget_after(config.out / LOG, int(state.step))
  state, last = loop(config, advance, state, saved, run["total_steps"])
  saved.close()
  dspark_jax.save_drafter(config.out / "drafter", state.drafter, target)
  return dict(steps=int(state.step), **last, checkpoint=str(config.out))


def read_data(config: TrainConfig, vocab_size: int, tokenizer) -> Rows:
  """The rows to train on: a prepared folder's, or those of the files, which are prepared in the run's folder once.
  ValueError, before anything is read, when that is another run's."""
  settings = prepare.Settings(config.target, config.data, config.out / "rows", row_length=config.row_length,
                              thinking=config.thinking, allow_special=config.allow_special)
  if not run_folder.is_begun(config.out):
    return prepare.rows_of(settings, tokenizer, vocab_size, stored_date(config), replace=True)
  run_folder.read_record(config.out, PROGRAM, {"config": dict, "data": str})
  run_folder.resumed(config.out, describe(config), shrunk=("drafter",))
  return prepare.rows_of(settings, tokenizer, vocab_size, run_folder.date_of(config.out))


def build_drafter(config: TrainConfig, target, rows: Rows, stops):
  """A fresh drafter for this target and data."""
  s = config.drafter
  words = None
  if s.draft_vocab_size:
    words = top_words(rows, s.draft_vocab_size, target.config.vocab_size, stops)
  drafter = dspark_jax.new_drafter(drafter_config(s, target.config), words=words, seed=config.seed)
  if s.from_target:
    drafter = starts.from_target(drafter, target)
  if getattr(s, "from_bigrams", False):  # not every kind has a head for them
    factors = bigram_factors(rows, words, target.config.vocab_size, s.markov_rank)
    drafter = starts.from_bigrams(drafter, *factors)
  return drafter


def drafter_config(settings: DrafterSettings, target: TargetConfig) -> DrafterConfig:
  """The drafter's own configuration for this target. ValueError when they do not fit."""
  return DRAFTERS[settings.kind].Config.for_target(settings, target)


def step_config(config: TrainConfig) -> StepConfig:
  """What of an experiment is static about a step."""
  return StepConfig(num_anchors=config.anchors, microbatches=config.microbatches, compute_dtype=config.compute_dtype,
                    loss=config.loss, optimizer=config.optimizer)


def describe(config: TrainConfig) -> dict:
  """What must be the same for a run to go on, beside the data: settings that matter to the result."""
  settings = run_folder.plain(dataclasses.asdict(config))
  # These change where and how often something is written or computed, and how many steps there are: no step of it. Data
  # count by content, so that files may be moved or split.
  elsewhere = ("out", "data", "features", "save_every", "log_every", "minutes", "mesh", "kernels")
  settings = {k: v for k, v in settings.items() if k not in elsewhere}
  settings["features"] = stored_dtype(config)  # not where they are: a store may be moved
  for name in ("thinking", "allow_special"):
    settings[name] = settings[name] or None  # what runs have that began before there was such a setting
  return {"program": PROGRAM, "config": settings}


def new_run(config: TrainConfig, record: dict, total_steps: int) -> dict:
  """Writes the record of a run that begins."""
  run = {**record, "total_steps": total_steps, "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}
  run_folder.write_record(config.out, run)
  return run


def is_stopped(config: TrainConfig, result: dict) -> bool:
  """Whether SIGTERM ended a training before its last step; `result` is what it returned."""
  return result["steps"] < run_folder.read_record(config.out, PROGRAM, {"total_steps": int})["total_steps"]


def fit_lens(config: TrainConfig, drafter, target, batch_of, features: Features, rows: int):
  """(the drafter with its lens fitted to the first batches, in at most half of the minutes; the features, with what the
  target said of them in memory, up to SAID_BYTES: the first steps of training need not ask it again)."""
  total = math.ceil(min(config.lens_rows, rows) / config.batch)
  observe, moments = jax.jit(starts.observe, donate_argnums=0), starts.no_moments(drafter)
  memory = Memory(0 if config.features else SAID_BYTES, features)
  began = time.monotonic()
  with shell.bar() as bar:
    task = bar.add_task("fitting the lens", total=total, note="")
    for index in range(total):
      # Blocked on, or the clock below would be that of the queue.
      moments, encoded = jax.block_until_ready(observe(moments, drafter, target, *batch_of(index)))
      memory.keep(index, encoded)
      bar.update(task, completed=index + 1, note=f"{(index + 1) * config.batch} rows")
      if config.steps is None and time.monotonic() - began > config.minutes * 60 / 2:
        break
  shell.say(f"lens: fitted to {int(moments.count)} positions")
  return jax.jit(starts.from_moments)(drafter, target, starts.checked(moments)), memory


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
  return max(int(min(left / quick, known + max(left - known * quick, 0) / slow)), FEWEST)


def loop(config: TrainConfig, advance, state, saved, total_steps: int):
  """Runs the remaining steps; SIGTERM ends them early, after a save."""
  stop = []  # a handler may run in the middle of a step: it leaves a note, and the loop ends the run
  previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
  first, window, result, began = int(state.step), [], {}, time.perf_counter()
  try:
    with shell.bar() as bar:
      task = bar.add_task("training", total=total_steps, completed=first, note="")
      for index in range(first, total_steps):
        state, metrics = advance(state, index)
        window.append(metrics)
        finished = bool(stop) or index + 1 == total_steps
        # Also when it saves: a run that goes on from there must not lack a line for the steps before.
        if finished or (index + 1) % config.log_every == 0 or (index + 1) % config.save_every == 0:
          result = summarise(window)
          window = []
          if result["loss"] is None or result["grad_norm"] is None:  # before a broken state could be saved
            raise ValueError(f"the loss is not finite at step {index + 1}: lower the learning rate; the last "
                             f"checkpoint is whole")
          rate = (index + 1 - first) * config.batch * config.row_length / (time.perf_counter() - began)
          run_folder.append(config.out / LOG, [{"step": index + 1, **result, "tokens_per_second": rate}])
          bar.update(task, completed=index + 1, note=f"loss {result['loss']:.3f}  tau {result['tau'] or 1:.2f}  "
                     f"{rate:.0f} tokens/s")
          result = {k: result[k] for k in ("loss", "tau", "accept_rate")} | {"tokens_per_second": rate}
        saved.save_checkpointables(index + 1, {"state": state}, force=finished)
        if finished and stop:
          shell.say(f"stopped by SIGTERM after step {index + 1}; the state is saved")
          break
  finally:
    signal.signal(signal.SIGTERM, previous)  # train.demo and train.compare go on after this
  return state, result or summarise_saved(config)


def summarise(window: list) -> dict:
  """Means over a window of steps, as plain numbers; None where nothing was observed, or a number is not finite."""
  total = functools.reduce(means.add, jax.device_get(window))
  plain = lambda pair: np.asarray(means.mean(pair)).tolist()
  return {name: jax.tree.map(lambda x: x if np.isfinite(x) else None, plain(pair)) for name, pair in total.items()}


def summarise_saved(config: TrainConfig) -> dict:
  """The last logged numbers of a run that had nothing left to do."""
  last = run_folder.read_lines(config.out / LOG)[-1]
  return {k: last[k] for k in ("loss", "tau", "accept_rate", "tokens_per_second")}


if __name__ == "__main__":
  path, args = experiment(__doc__)
  shell.run(main, TrainConfig, default=lambda: read_config(path), args=args)
