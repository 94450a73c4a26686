"""What a run tells while it trains: its two logs, where the time goes, held-out rows, text it drafts for, a profile."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

import dspark_jax
from dspark_jax import metrics as means
from dspark_jax.decoding.session import PROMPT_BUCKET
from dspark_jax.nn.sharding import everywhere, place_rows, rows_here
from dspark_jax.programs import hosts, run_folder
from dspark_jax.programs.compilers import CHIPS
from dspark_jax.training.losses import EPSILON, term_weights
from dspark_jax.training.step import StepConfig, batch_loss, blocks_of, step_flops
from train.config import TrainConfig

LOG = "metrics.jsonl"
NEW_TOKENS = 64  # per prompt that is decoded


class Journal:
  """metrics.jsonl and TensorBoard, by the first process; a run that goes on forgets what it was taken back."""

  def __init__(self, config: TrainConfig, step: int):
    self.path, self.board = config.out / LOG, None
    if hosts.first():
      run_folder.forget_after(self.path, step)
      self.board = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)

  def write(self, step: int, numbers: dict[str, Any]) -> None:
    """One line, and as many curves as it has numbers."""
    if self.board is None:
      return
    run_folder.append(self.path, [{"step": step, **numbers}])
    for name, value in flat(numbers):
      if value is not None:
        self.board.add_scalar(name, value, step)
    self.board.flush()

  def close(self) -> None:
    if self.board is not None:
      self.board.close()


def flat(numbers, prefix=""):
  """(name, number) of nested tables and lists; places in lists count from 1."""
  for name, value in numbers.items():
    if isinstance(value, list):
      value = dict(enumerate(value, 1))
    yield from flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


class Pace:
  """Where the time goes. began: time.monotonic() at the start of the program's work; flops: useful ones of a step, by
  the length of its rows."""

  def __init__(self, config: TrainConfig, flops: Callable[[int], float], began: float):
    device = jax.devices()[0]
    self.config, self.flops, self.began, self.devices = config, flops, began, _devices()
    self.peak = CHIPS[device.device_kind].flops if device.device_kind in CHIPS else None
    self.useful = 0.0
    self.begin(0.0)

  def begin(self, waited: float) -> None:
    """Steps begin now: what came before is none of their time. waited: as for `lap`."""
    self.last, self.apart, self.waited = time.monotonic(), 0.0, waited

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """For what is no step: saving, evaluating."""
    began = time.monotonic()
    yield
    self.apart += time.monotonic() - began

  def lap(self, widths: list[int], waited: float) -> dict[str, float | None]:
    """Of the steps since the last call, or `begin`, whose rows had these lengths. waited: seconds for data since the
    start of the program. goodput: the share of all time since then that went into steps; mfu: of what the device's
    maker states for bfloat16, None on a CPU."""
    now = time.monotonic()
    whole, wait = now - self.last - self.apart, waited - self.waited
    self.useful += whole - wait
    self.begin(waited)
    speed, tokens = sum(map(self.flops, widths)) / whole / self.devices, self.config.batch * sum(widths)
    return {"step_seconds": whole / len(widths), "data_wait": wait / whole,
            "tokens_per_second_per_device": tokens / whole / self.devices, "tflops_per_device": speed / 1e12,
            "mfu": self.peak and speed / self.peak, "goodput": self.useful / (now - self.began)}


def _devices():
  mesh = jax.sharding.get_mesh()
  return 1 if mesh.empty else mesh.size


def useful_flops(config: TrainConfig, target, drafter, length: int) -> float:
  """Of a step on rows of this length: the formulas beside the models."""
  blocks = length if drafter.every_position else config.anchors
  return step_flops(target.config, drafter.config, rows=config.batch, length=length, blocks=blocks,
                    target_runs=config.features is None)


class HeldOut:
  """The loss, and what else a step measures, on rows that are not trained on: the same rows and anchors each time, in
  any number of microbatches. Its terms are over all rows, as of one batch: a mean of means would go by their number."""

  def __init__(self, config: TrainConfig, static: StepConfig, target, rows):
    self.target, mine = target, rows_here(config.batch)
    self.batches = [rows.take(at + mine) for at in range(0, len(rows), config.batch)]
    key = jax.random.key_data(jax.random.key(config.seed + 1))
    self.step = jax.jit(functools.partial(_measured, key=np.asarray(key), static=static), out_shardings=everywhere())

  def __call__(self, state) -> dict[str, Any]:
    found = [self.step(state.drafter, self.target, place_rows(batch)) for batch in self.batches]
    metrics, terms = zip(*jax.device_get(found))
    loss = sum(float(term.sum / (term.weight + EPSILON)) for term in functools.reduce(means.add, terms).values())
    return {"loss": loss if math.isfinite(loss) else None, **summarise(metrics)}


def _measured(drafter, target, batch, *, key, static):
  """(metrics, the terms of the loss over their denominators), each of which adds up over batches."""
  key, config = jax.random.wrap_key_data(jnp.asarray(key)), static.loss
  metrics = batch_loss(drafter, target, batch, key, static)[1]
  weights = term_weights(drafter, blocks_of(drafter, batch, key, static), config, static.row_length)
  return metrics, {name: means.Mean(getattr(config, name) * metrics[name].sum, weight)
                   for name, weight in weights.items() if name in metrics}


class Drafted:
  """How many tokens a round commits when the drafter is used: greedy text after prompts of held-out documents."""

  def __init__(self, config: TrainConfig, target, rows, stops):
    batch = rows.take(np.arange(len(rows)))
    prompts = [tokens[:int(mask.argmax())].tolist() for tokens, mask, segments in zip(
        batch.tokens, batch.loss_mask, batch.segments) if mask.any() and (segments[:int(mask.argmax()) + 1] == 1).all()]
    # Plain text is supervised from its first token: it has no prompt.
    self.prompts = [prompt for prompt in prompts if 0 < len(prompt) <= 2 * PROMPT_BUCKET][:config.decode_prompts]
    if not self.prompts:
      raise ValueError(f"no held-out row begins with a prompt of 1 to {2 * PROMPT_BUCKET} tokens to decode from: give "
                       f"more --eval-rows, or leave --decode-every out")
    self.target, self.dtype, self.stops = target, jnp.dtype(config.target_dtype), tuple(stops)

  def __call__(self, state) -> dict[str, Any]:
    cast = lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    out = dspark_jax.generate(self.target, jax.tree.map(cast, state.drafter), self.prompts, max_new_tokens=NEW_TOKENS,
                              stop_token_ids=self.stops)
    length = out.accepted_length
    return {"accepted_length": length if length and math.isfinite(length) else None, "prompts": len(self.prompts)}


def summarise(window: list) -> dict:
  """Means over a window of steps, as plain numbers; None where nothing was observed, or a number is not finite."""
  total = functools.reduce(means.add, window)
  plain = lambda pair: np.asarray(means.mean(pair)).tolist()
  return {name: jax.tree.map(lambda x: x if np.isfinite(x) else None, plain(pair)) for name, pair in total.items()}


class Profile:
  """A trace of the steps that --profile-steps names, for TensorBoard's profiler or Perfetto; one of each process."""

  def __init__(self, config: TrainConfig):
    self.first, self.last = config.profile_steps or (0, 0)
    # JAX names the file by the host, which several processes may share.
    own = (f"process-{hosts.here.process}",) if hosts.here.processes > 1 else ()
    self.folder, self.on = config.out.joinpath("profile", *own), False

  def before(self, step: int) -> None:
    if step == self.first:
      jax.profiler.start_trace(str(self.folder))
      self.on = True

  def after(self, step: int, state) -> None:
    if self.on and step >= self.last:
      jax.block_until_ready(state)
      self.stop()

  def stop(self) -> None:
    if self.on:
      jax.profiler.stop_trace()
      self.on = False
