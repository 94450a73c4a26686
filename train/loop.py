"""The steps of a training run: what is logged, saved and watched between them."""

from __future__ import annotations

import functools
import time

import jax
import numpy as np

from dspark_jax import metrics as means
from dspark_jax.checkpoints import state as checkpoints
from dspark_jax.data import pipeline
from dspark_jax.programs import hosts, run_folder, shell
from train.config import TrainConfig

LOG = "metrics.jsonl"


def loop(config: TrainConfig, advance, state, saved, total_steps: int, n_rows: int):
  """(the state after the remaining steps, the numbers that the program prints). SIGTERM ends them early, after a save.

  advance: (state, index) -> (state, metrics). n_rows: of the data, to name those of a step.
  """
  first, window, result, began = int(state.step), [], {}, time.perf_counter()
  with hosts.stops() as stop, shell.bar() as bar:
    task = bar.add_task("training", total=total_steps, completed=first, note="")
    for index in range(first, total_steps):
      state, metrics = advance(state, index)
      window.append(metrics)
      hosts.beat(index + 1)
      stopped = stop(index + 1)
      finished = stopped or index + 1 == total_steps
      # Also when it saves: a run that goes on from there must not lack a line for the steps before.
      if finished or (index + 1) % config.log_every == 0 or (index + 1) % config.save_every == 0:
        window = jax.device_get(window)  # the only place where the host waits for the device
        check_finite(config, state, window, index, n_rows)
        result, window = summarise(window), []
        rate = (index + 1 - first) * config.batch * config.row_length / (time.perf_counter() - began)
        if hosts.first():
          run_folder.append(config.out / LOG, [{"step": index + 1, **result, "tokens_per_second": rate}])
        bar.update(task, completed=index + 1, note=f"loss {result['loss']:.3f}  tau {result['tau'] or 1:.2f}  "
                   f"{rate:.0f} tokens/s")
        result = {k: result[k] for k in ("loss", "tau", "accept_rate")} | {"tokens_per_second": rate}
      saved.save_checkpointables_async(index + 1, {"state": state}, force=finished)
      if stopped:
        shell.say(f"stopped by SIGTERM after step {index + 1}; the state is saved")
        break
  return state, result or summarise_saved(config)


def check_finite(config: TrainConfig, state, window: list, index: int, n_rows: int) -> None:
  """ValueError, with the rows of the data that it saw, where a step diverged. `state` is then saved apart: what is in
  steps/ stays whole. window: the metrics of the steps that end with the one of `index`, from 0."""
  for step, metrics in enumerate(window, index + 1 - len(window)):
    seen = {name: float(means.mean(metrics[name])) for name in ("loss", "grad_norm")}
    bad = [f"{name} {value:.3g}" for name, value in seen.items() if not abs(value) <= config.diverged_at]
    if bad:
      apart = checkpoints.checkpointer(config.out / "diverged", every=1)
      apart.save_checkpointables_async(index + 1, {"state": state}, force=True, overwrite=True)
      apart.close()
      rows = pipeline.row_indices(n_rows, step, config.batch, seed=config.seed)
      raise ValueError(f"step {step + 1} diverged ({', '.join(bad)}, expected at most {config.diverged_at:g}) on the "
                       f"rows {', '.join(map(str, rows))} of the data: look at these, or lower the learning rate; the "
                       f"state after step {index + 1} is in {config.out / 'diverged'}, the last checkpoint is whole")


def summarise(window: list) -> dict:
  """Means over a window of steps, as plain numbers; None where nothing was observed, or a number is not finite."""
  total = functools.reduce(means.add, window)
  plain = lambda pair: np.asarray(means.mean(pair)).tolist()
  return {name: jax.tree.map(lambda x: x if np.isfinite(x) else None, plain(pair)) for name, pair in total.items()}


def summarise_saved(config: TrainConfig) -> dict:
  """The last logged numbers of a run that had nothing left to do."""
  last = hosts.agree(lambda: run_folder.read_lines(config.out / LOG)[-1])
  return {k: last[k] for k in ("loss", "tau", "accept_rate", "tokens_per_second")}
