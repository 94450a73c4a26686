"""The steps of a training run: what is logged, saved and watched between them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable

import jax

from dspark_jax import metrics as means
from dspark_jax.checkpoints import state as checkpoints
from dspark_jax.programs import hosts, run_folder, shell
from train.config import TrainConfig
from train.watch import LOG, Journal, Pace, Profile, summarise


def loop(config: TrainConfig, advance, state, saved, total_steps: int, batches, pace: Pace, measures: dict,
         stop: Callable[[int], bool]):
  """(the state after the remaining steps, the numbers that the program prints). `stop` ends them early, after a save.

  advance: (state, index) -> (state, metrics). batches: `samples(index)`, which rows of the data a step has,
  `width(index)`, how long these are, and `waited`, the seconds that the device waited for them since the newest step
  was `done` (a future of that time). measures: by name (every so many steps, a function of the state that gives
  numbers). stop: of hosts.stops.
  """
  first, window, result, tokens, began = int(state.step), [], {}, 0, time.perf_counter()
  journal, profile = Journal(config, first), Profile(config)
  with (shell.bar() as bar, contextlib.closing(journal), contextlib.ExitStack() as end,
        concurrent.futures.ThreadPoolExecutor(1) as clock):
    end.callback(profile.stop)
    task = bar.add_task("training", total=total_steps, completed=first, note="")
    pace.begin(batches.waited)
    for index in range(first, total_steps):
      profile.before(index + 1)
      state, metrics = advance(state, index)
      with pace.aside():
        profile.after(index + 1, state)
      window.append(metrics)
      before, batches.done = batches.done, clock.submit(when_ready, metrics)
      if before is not None:
        # One step waits in the queue, so that the device never does; with more of them a signal would be heard late.
        with hosts.waiting():
          before.result()
      hosts.beat(index + 1)
      stopped = stop(index + 1)
      finished = stopped or index + 1 == total_steps
      due = [name for name, (every, _) in measures.items() if (index + 1) % every == 0]
      # Also when it saves: a run that goes on from there must not lack a line for the steps before.
      if finished or due or any((index + 1) % every == 0 for every in (config.log_every, config.save_every)):
        with hosts.waiting():
          window = jax.device_get(window)
        widths = [batches.width(step) for step in range(index + 1 - len(window), index + 1)]
        speed = pace.lap(widths, batches.waited)
        check_finite(config, state, window, index, batches)
        result, window = summarise(window), []
        tokens += config.batch * sum(widths)
        rate = tokens / (time.perf_counter() - began)
        with pace.aside():
          found = {name: measures[name][1](state) for name in due}
        journal.write(index + 1, {**result, "tokens_per_second": rate, **speed, **found})
        bar.update(task, completed=index + 1, note=f"loss {result['loss']:.3f}  tau {result['tau'] or 1:.2f}  "
                   f"{rate:.0f} tokens/s")
        result = {k: result[k] for k in ("loss", "tau", "accept_rate")} | {"tokens_per_second": rate}
      with pace.aside():
        saved.save_checkpointables_async(index + 1, {"state": state}, force=finished)
      if stopped:
        shell.say(f"stopped by SIGTERM after step {index + 1}; the state is saved")
        break
  return state, result or summarise_saved(config)


def when_ready(arrays) -> float:
  """The time by time.monotonic() at which they are there: now, or once a device has made them."""
  jax.block_until_ready(arrays)
  return time.monotonic()


def check_finite(config: TrainConfig, state, window: list, index: int, batches) -> None:
  """ValueError, with the rows of the data that it saw, where a step diverged. `state` is then saved apart: what is in
  steps/ stays whole. window: the metrics of the steps that end with the one of `index`, from 0."""
  for step, metrics in enumerate(window, index + 1 - len(window)):
    seen = {name: float(means.mean(metrics[name])) for name in ("loss", "grad_norm")}
    bad = [f"{name} {value:.3g}" for name, value in seen.items() if not abs(value) <= config.diverged_at]
    if bad:
      apart = checkpoints.checkpointer(config.out / "diverged", every=1)
      apart.save_checkpointables_async(index + 1, {"state": state}, force=True, overwrite=True)
      apart.close()
      raise ValueError(f"step {step + 1} diverged ({', '.join(bad)}, expected at most {config.diverged_at:g}) on the "
                       f"rows {batches.samples(step)} of the data: look at these, or lower the learning rate; the "
                       f"state after step {index + 1} is in {config.out / 'diverged'}, the last checkpoint is whole")


def summarise_saved(config: TrainConfig) -> dict:
  """The last logged numbers of a run that had nothing left to do."""
  told = lambda line: {k: line[k] for k in ("loss", "tau", "accept_rate", "tokens_per_second")}
  lines = hosts.agree(lambda: run_folder.read_lines(config.out / LOG, told)[-1:])
  if not lines:
    raise ValueError(f"{config.out / LOG} has no lines, and the run is finished: restore it; the drafter is in "
                     f"{config.out / 'drafter'} all the same")
  return lines[0]
