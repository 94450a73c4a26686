"""Train a drafter on a frozen target, which runs inside the training step, or whose hidden states were stored.

When to use it: to make a DSpark, DFlash, Eagle3 or MTP drafter for a target and data of your own. A run that is killed,
or stopped by SIGTERM, goes on exactly where it was when the same command is given again.

    python -m train.train --config configs/demo.py --data runs/answers.jsonl --steps 200
    python -m train.train --config configs/qwen3_4b.py --microbatches 32 --data rows --out runs/q3 --mesh.fsdp -1

On several hosts the same command is given on each, with a run folder that all of them see: Slurm, Open MPI, xpk and
GKE say who they are (Open MPI 5 needs --hosts.coordinator HOST:PORT); on TPU VMs outside GKE --hosts.processes N alone
is given, elsewhere --hosts.coordinator, --hosts.processes N and --hosts.process I. Process 0 speaks and writes; SIGTERM
to any of them saves and ends all; where one dies, the others end within --hosts.silence seconds with its name, and the
same command goes on, also with another number of hosts.

Flags override the experiment file. The word drafter:eagle3 (or drafter:dspark, drafter:mtp) chooses another kind of
drafter than the file's, from that kind's defaults: `drafter:eagle3 --drafter.taps 1 8 15 21 28`.

--start-from DRAFTER begins a run with the weights of a trained drafter: a second stage, on longer rows or other data.

Data: a folder of train.prepare, or files: JSONL of conversations ({"messages": [...]}, or ShareGPT's {"conversations":
[...]}; with "tools") or of tokens (train.answers), or .txt, .md and .py; what of it is left out is counted by reason.
--features STORE reads what train.cache_hidden wrote for the same data and settings; --features memory keeps what the
target said of a row for later epochs. The run folder holds run.json (resolved configuration, those counts, the day that
chat templates are told), metrics.jsonl and tensorboard/ (what train.report draws), rows/ (what was prepared of files),
steps/ (Orbax) and drafter/ (what load_drafter reads).
The last line of stdout is a JSON object with the keys steps, loss, tau, accept_rate (by position), tokens_per_second
and checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dspark_jax
from dspark_jax.checkpoints import state as checkpoints
from dspark_jax.data import chat
from dspark_jax.data.features import Features, Heard
from dspark_jax.data.rows import Rows, Some, held_out
from dspark_jax.data.words import bigram_factors, top_words
from dspark_jax.drafters import DRAFTERS
from dspark_jax.drafters.model import DrafterConfig, DrafterSettings
from dspark_jax.loading import drafter_from, drafter_id, locate_target, target_config, target_id
from dspark_jax.nn.sharding import everywhere, made, place, shardings
from dspark_jax.programs import hosts, run_folder, shell
from dspark_jax.targets.decoder import TargetConfig
from dspark_jax.training import starts
from dspark_jax.training.step import StepConfig, init_state, span, train_step
from train import prepare
from train.config import TrainConfig, experiment, read_config
from train.features import Batches, check_early, encoder, features_of, stored_date, stored_dtype
from train.loop import loop, summarise_saved
from train.watch import LOG, Drafted, HeldOut, Pace, useful_flops

PROGRAM = "train.train"
SAID_BYTES = 2 ** 31  # of the target's outputs that are kept from fitting a lens to training
TIMED = 4   # steps whose median says how long one takes: the first of them may compile
FEWEST = 8  # steps of a run by the clock, even when no time is left: one that logs, saves and can be loaded


def main(config: TrainConfig) -> dict:
  check_same_settings(config)
  if config.steps is config.epochs is config.minutes is None:
    raise ValueError("neither steps nor epochs nor minutes are given: say how long to train with one of them")
  if not config.data:
    raise ValueError("no data: give one or more files with --data")
  check_rows(config)
  check_early(config)
  if config.start_from:
    shell.check_drafter(config.start_from)
  with run_folder.owned(config.out):
    check_target(config, target_config(locate_target(config.target)))
    hosts.agree(lambda: prepare.check_data(config.data) and None)  # the others need not see them
    hosts.agree(lambda: check_run(config))
    return train(config, *shell.load(config.target, config.target_dtype, config.kernels))


def check_same_settings(config: TrainConfig) -> None:
  """ValueError where this process was given other settings than process 0: with other programs, or saves at other
  steps, all would wait for ever. How it finds the others, and where its data lie, is its own affair: data count by
  content."""
  settings = run_folder.plain(dataclasses.asdict(config))
  for own in ("hosts", "data", "features"):
    del settings[own]
  hosts.check_same("configuration", settings)


def check_rows(config: TrainConfig) -> None:
  """ValueError unless the rows of a step divide among the current mesh's devices, and into microbatches."""
  mesh = jax.sharding.get_mesh()
  parts = config.microbatches * (1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"])
  if config.batch % parts:
    raise ValueError(f"batch is {config.batch}, expected a multiple of {parts}, for {config.microbatches} microbatches "
                     f"of {parts // config.microbatches} devices (mesh data x fsdp): give other --microbatches, or "
                     f"another --batch")


def check_target(config: TrainConfig, target: TargetConfig) -> DrafterConfig:
  """The drafter's own configuration. ValueError for one, or for rows, that the target cannot take: of it this much is
  there before its weights are loaded."""
  if config.row_length > target.max_positions:
    raise ValueError(f"row_length is {config.row_length}, expected at most the target's {target.max_positions} "
                     f"positions: give a smaller --row-length, or a target with longer ones (rope_scaling)")
  return drafter_config(config.drafter, target)


def check_run(config: TrainConfig) -> None:
  """ValueError where the run folder is another run's, as far as settings tell."""
  if run_folder.is_begun(config.out):
    run_folder.read_record(config.out, PROGRAM, {"config": dict, "data": str})
    begun(config.out, describe(config))


def train(config: TrainConfig, target, tokenizer) -> dict:
  """Trains (or goes on training), saves, and returns the result that the program prints. The caller owns the folder."""
  started, about = time.monotonic(), check_target(config, target.config)
  rows = read_data(config, target.config.vocab_size, tokenizer)
  record, stops = describe(config) | {"data": rows.digest}, chat.stop_ids(tokenizer)
  stored = hosts.agree(lambda: run_folder.recorded(config.out, "target"))
  record |= {"target": target_id(target, stored), "layout": rows.layout}
  started_from = config.start_from and drafter_from(config.start_from, about)
  record["config"]["start_from"] = started_from and drafter_id(started_from)  # not where it is: it may be moved
  hosts.check_same("run", record)  # its data and target, by content
  run = hosts.agree(lambda: begun(config.out, record) if run_folder.is_begun(config.out) else None)
  data, apart = held_out(rows, config.eval_rows, seed=config.seed)
  asked = config.steps_over(len(data))
  saved = checkpoints.checkpointer(config.out / "steps", config.save_every)
  fresh = hosts.agree(lambda: saved.latest is None)  # also of a run that was killed before its first checkpoint
  static = step_config(config)
  target = jax.tree.map(lambda x: x.astype(config.target_dtype), target)
  # Not by the drafter alone: a run that SIGTERM stopped has left one, too. Older records do not say.
  ended = lambda: run.get("finished", not fresh and saved.latest.step == run["total_steps"])
  if hosts.agree(lambda: bool(run and ended() and (config.out / "drafter").exists())):
    saved.close()
    shell.say(f"all {run['total_steps']} steps are done")
    return dict(steps=run["total_steps"], **summarise_saved(config), checkpoint=str(config.out))
  # By the clock, any number will do: how many steps there are is known, and set, once some were timed.
  begin = functools.partial(init_state, config=static, seed=config.seed, total_steps=asked or 1000)
  if fresh:
    state = made(begin, started_from or build_drafter(config, target, data, stops))
  else:  # only shapes: weights, and bigrams more so, would take longer to make than to restore
    blank = lambda: begin(dspark_jax.new_drafter(about))
    state = checkpoints.restore(saved, jax.eval_shape(blank), use_older=config.use_older, everyone=hosts.everyone)
    shell.say(f"resuming after step {int(state.step)} of {run['total_steps']}")
  with contextlib.closing(Batches(config, data, features_of(config, rows, target))) as batches:
    fitted = 0  # batches that the lens is fitted to
    if not started_from and getattr(config.drafter, "lens", False):  # not every kind has one
      fitted = (run or {}).get("lens_batches") or math.ceil(min(config.lens_rows, len(data)) / config.batch)
      batches.features = heard(config, target, batches, fitted)
    advance = stepper(config, static, state, target, batches)
    began = time.monotonic()
    if fresh and fitted:
      drafter, fitted = fit_lens(config, state.drafter, target, batches, fitted, timed=run is asked is None)
      state = state.replace(drafter=drafter)
    if run is None:
      left = (config.minutes or 0) * 60 - (time.monotonic() - began)
      steps = asked or steps_in(left, state, advance, getattr(batches.features, "until", 0))
      more = {"date": rows.manifest.date, "lost": rows.manifest.lost, "lens_batches": fitted}
      run = hosts.agree(lambda: new_run(config, record | more, steps))
    if fresh:
      state = state.replace(span=place(span(config.optimizer, run["total_steps"])))
    # Not of the state itself, which the first step is donated.
    flops = functools.partial(useful_flops, config, target, jax.eval_shape(lambda: state.drafter))
    pace = Pace(config, flops, started)
    with hosts.stops(int(state.step)) as stop:  # until all is written: who sends SIGTERM may send another
      state, last = loop(config, advance, state, saved, run["total_steps"], batches, pace,
                         measured(config, static, target, apart, stops), stop)
      saved.close()
      dspark_jax.save_drafter(config.out / "drafter", state.drafter, target)
      if int(state.step) == run["total_steps"]:
        hosts.agree(lambda: run_folder.write_record(config.out, run | {"finished": True}))
  return dict(steps=int(state.step), **last, checkpoint=str(config.out))


def stepper(config: TrainConfig, static: StepConfig, state, target, batches: Batches):
  """A function (state, index of the step) -> (state, metrics), compiled: for steps that are given what the target says,
  and for those that ask it; for each length of rows."""
  # The metrics whole everywhere, so that any process can read them.
  step = jax.jit(functools.partial(train_step, config=static), donate_argnums=0,
                 out_shardings=(shardings(state), everywhere()))
  # Without a mesh as shapes: a restored state is committed to its device, which would be another program, compiled
  # again, and not surely with the same bits.
  like = jax.eval_shape(lambda x: x, state) if jax.sharding.get_mesh().empty else state
  compiled = {}

  def program(batch, encoded):
    if (kind := (encoded is None, batch.tokens.shape[1])) not in compiled:
      with shell.stderr.status("compiling the training step"):
        compiled[kind] = step.lower(like, target, batch, encoded=encoded).compile()
      shell.say(f"step: {shell.memory_report(compiled[kind])}")
    return compiled[kind]

  def advance(state, index):
    batch, encoded = batches(index)
    step_program = program(batch, encoded)
    with hosts.waiting():  # where more steps are under way than a device's queue holds
      return step_program(state, target, batch, encoded=encoded)
  program(*batches(int(state.step)))
  return advance


def read_data(config: TrainConfig, vocab_size: int, tokenizer) -> Rows:
  """The rows to train on: a prepared folder's, or those of the files, which are prepared in the run's folder once, by
  the first process. ValueError, before anything is read, when that is another run's."""
  settings = prepare.Settings(config.target, config.data, config.out / "rows", row_length=config.row_length,
                              thinking=config.thinking, allow_special=config.allow_special)

  def prepared():
    if not run_folder.is_begun(config.out):
      return prepare.rows_of(settings, tokenizer, vocab_size, stored_date(config), replace=True)
    check_run(config)
    return prepare.rows_of(settings, tokenizer, vocab_size, run_folder.date_of(config.out))
  return Rows(hosts.agree(lambda: str(prepared().folder)))


def build_drafter(config: TrainConfig, target, rows: Some, stops):
  """A fresh drafter for this target and the rows that are trained on."""
  s = config.drafter
  words = None
  if s.draft_vocab_size:
    with shell.stderr.status("counting words"):
      words = top_words(rows, s.draft_vocab_size, target.config.vocab_size, stops)
  drafter = dspark_jax.new_drafter(drafter_config(s, target.config), words=words, seed=config.seed)
  if s.from_target:
    with shell.stderr.status("starting from the target"):
      drafter = starts.from_target(drafter, target)
  if getattr(s, "from_bigrams", False):  # not every kind has a head for them
    with shell.stderr.status("counting bigrams"):
      factors = bigram_factors(rows, words, target.config.vocab_size, s.markov_rank)
      drafter = starts.from_bigrams(drafter, *factors)
  return drafter


def drafter_config(settings: DrafterSettings, target: TargetConfig) -> DrafterConfig:
  """The drafter's own configuration for this target. ValueError when they do not fit."""
  return DRAFTERS[settings.kind].Config.for_target(settings, target)


def step_config(config: TrainConfig) -> StepConfig:
  """What of an experiment is static about a step."""
  return StepConfig(num_anchors=config.anchors, row_length=config.row_length, microbatches=config.microbatches,
                    compute_dtype=config.compute_dtype, loss=config.loss, optimizer=config.optimizer)


def measured(config: TrainConfig, static: StepConfig, target, apart, stops) -> dict:
  """What is measured every so many steps, by name, on the rows that are held out."""
  found = {}
  if config.eval_every:
    found["held_out"] = (config.eval_every, HeldOut(config, static, target, apart))
  if config.decode_every:
    found["drafted"] = (config.decode_every, Drafted(config, target, apart, stops))
  return found


def describe(config: TrainConfig) -> dict:
  """What must be the same for a run to go on, beside the data: settings that matter to the result."""
  settings = run_folder.plain(dataclasses.asdict(config))
  # These change where and how often something is written or computed, and how many steps there are: no step of it. Data
  # count by content, so that files may be moved or split.
  elsewhere = ("out", "data", "features", "save_every", "log_every", "minutes", "mesh", "kernels", "hosts",
               "diverged_at", "use_older", "start_from", "eval_every", "decode_every", "decode_prompts",
               "profile_steps", "microbatches", "memory_gb")
  settings = {k: v for k, v in settings.items() if k not in elsewhere}
  settings["features"] = stored_dtype(config)  # not where they are: a store may be moved
  # What runs have that began before there was such a setting.
  for name in ("thinking", "allow_special", "eval_rows", "lengths"):
    settings[name] = settings[name] or None
  if config.loss.temperatures == (1.0,):
    del settings["loss"]["temperatures"]
  return {"program": PROGRAM, "config": settings}


def begun(out: Path, record: dict) -> dict:
  """The record of the run in `out`. ValueError where that is another than `record` describes."""
  # The target by what it is, wherever it lies; where an older record does not say, by where it lies.
  moved = ("target",) if run_folder.recorded(out, "target") else ()
  resumed = functools.partial(run_folder.resumed, out, record, shrunk=("drafter",), newer=("target", "layout"))
  try:
    return resumed(free=moved)
  except ValueError as error:
    try:
      resumed(free=(*moved, "steps", "epochs"))
    except ValueError:
      raise error from None
    raise ValueError(f"{error}; for more steps on what it has learned give --start-from {out} and another --out, where "
                     f"optimizer and schedule begin anew") from error


def new_run(config: TrainConfig, record: dict, total_steps: int) -> dict:
  """Writes the record of a run that begins."""
  run = {**record, "total_steps": total_steps, "finished": False,
         "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}
  run_folder.write_record(config.out, run)
  return run


def is_stopped(config: TrainConfig, result: dict) -> bool:
  """Whether SIGTERM ended a training before its last step; `result` is what it returned."""
  return result["steps"] < run_folder.read_record(config.out, PROGRAM, {"total_steps": int})["total_steps"]


def heard(config: TrainConfig, target, batches: Batches, fitted: int) -> Features:
  """Where the steps of a run with a lens have what the target says from: of the batches that the lens is fitted to, up
  to SAID_BYTES of it, it has been asked then."""
  if config.features:
    return batches.features
  encode, batch = encoder(config, target), batches(0)[0]
  said = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(encode, batch)))
  return Heard(encode, min(fitted, SAID_BYTES * batch.tokens.shape[1] // (said * config.row_length)))


def fit_lens(config: TrainConfig, drafter, target, batches: Batches, total: int, *, timed: bool):
  """(the drafter with its lens fitted to the first `total` batches, how many these were). timed: in half of the
  minutes, at most."""
  features = batches.features
  observe, moments = jax.jit(starts.observe, donate_argnums=0), made(starts.no_moments, drafter)
  began = time.monotonic()
  with shell.bar() as bar:
    task = bar.add_task("fitting the lens", total=total, note="")
    for index in range(total):
      batch, encoded = batches(index)
      # Blocked on, or the clock below would be that of the queue.
      moments = jax.block_until_ready(observe(moments, drafter, target, batch, encoded))
      if isinstance(features, Heard) and encoded is not None:
        features.keep(index, encoded)
      bar.update(task, completed=index + 1, note=f"{(index + 1) * config.batch} rows")
      if timed and hosts.agree(lambda: time.monotonic() - began > config.minutes * 60 / 2):
        break
  shell.say(f"lens: fitted to {int(moments.count)} positions")
  if isinstance(features, Heard):
    features.until = min(features.until, index + 1)
  fitted = jax.jit(starts.from_moments, out_shardings=shardings(drafter))
  return fitted(drafter, target, starts.checked(moments)), index + 1


def steps_in(left: float, state, advance, known: int) -> int:
  """How many steps fit into the seconds that are left, from timing a few on a copy of the state. The first `known` are
  quicker than those that follow: the target has already run."""
  shell.say("timing a few steps, to see how many fit into the minutes")
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
