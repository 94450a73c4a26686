"""Measure a training step on this machine, its parts, and how near its arithmetic it comes.

When to use it: after a change to the loss, the drafter or the optimizer, and to see what a step costs here. Tokens are
random; what the target says of them is computed once and given, as from a store. The step's arithmetic is the formulas'
beside the models, over what a square product of 2,048 reaches in the same run. `products` are the six that the loss
has with the vocabulary, alone and in its shapes: no step is faster. --torch adds the same step in PyTorch as the
reference writes it (train/torch_step.py; extra `bench`), the two in turn, from the same weights and anchors.

    python -m train.bench
    python -m train.bench --torch --repeats 7
    python -m train.bench --anchors 512 --row-length 4096 --dtype bfloat16 --chunk 128

The last line of stdout is a JSON object with the keys step_seconds, gradients_seconds, loss_seconds, optimizer_seconds,
target_seconds (what a step has more where the target runs in it), products_seconds, gflop, square_gflop_per_second,
over_arithmetic, loss and, with --torch, torch_step_seconds, speedup_over_torch and torch_loss (of the first step, as
loss is).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dspark_jax.nn.parameters import values
from dspark_jax.programs import shell
from dspark_jax.training.losses import LossConfig, draft_loss
from dspark_jax.training.step import StepConfig, blocks_of, gradients, init_state, step_flops, train_step
from dspark_jax.types import Batch
from infer.bench import fastest, random_drafter

SQUARE = 2048


@dataclasses.dataclass
class Settings:
  target: str = "smollm2"
  row_length: int = 512
  anchors: int = 64
  layers: int = 5
  block_size: int = 7
  markov_rank: int = 256
  chunk: int = LossConfig.chunk
  """draft positions whose logits exist at a time"""
  dtype: Literal["float32", "bfloat16"] = "float32"
  repeats: int = 5
  """the fastest of so many is reported"""
  torch: bool = False
  """time PyTorch's step in turn with ours (extra `bench`)"""


def main(settings: Settings) -> dict:
  shell.at_least(settings, row_length=2, anchors=1, layers=1, block_size=1, markov_rank=1, chunk=1, repeats=1)
  if settings.anchors >= settings.row_length:
    raise ValueError(f"anchors are {settings.anchors}, expected fewer than the row's {settings.row_length} tokens")
  if settings.torch:
    check_torch(settings)
  target = shell.load_target(settings.target, settings.dtype)
  if settings.torch and target.config.spec.qk_norm:
    raise ValueError(f"{settings.target} norms queries and keys, which --torch does not: expected a Llama, or leave it "
                     f"out")
  drafter = random_drafter(settings, target)
  static = StepConfig(num_anchors=settings.anchors, compute_dtype=settings.dtype, loss=LossConfig(chunk=settings.chunk))
  state = init_state(drafter, static, seed=0, total_steps=1000)
  batch = random_batch(settings.row_length, target.vocab_size)
  result, encoded = parts(settings, static, state, target, batch)
  result |= whole(settings, static, state, target, batch, encoded)
  result["products_seconds"] = products(settings, target)
  result["optimizer_seconds"] = result["step_seconds"] - result["gradients_seconds"]
  square = jnp.ones((SQUARE, SQUARE), settings.dtype)
  seconds, _ = fastest(lambda f=jax.jit(jnp.matmul): f(square, square), settings.repeats)
  result["square_gflop_per_second"] = 2 * SQUARE ** 3 / seconds / 1e9
  result["gflop"] = step_flops(target.config, drafter.config, rows=1, length=settings.row_length,
                               blocks=settings.anchors, target_runs=False) / 1e9
  result["over_arithmetic"] = result["step_seconds"] * result["square_gflop_per_second"] / result["gflop"]
  shell.say(table(result))
  return result


def check_torch(settings: Settings) -> None:
  """ValueError where PyTorch's step cannot be run."""
  try:
    import torch  # noqa: F401
  except ImportError as error:
    raise ValueError(f"--torch needs torch ({error}): pip install -e '.[bench]'") from error
  if settings.dtype != "float32":
    raise ValueError(f"dtype is {settings.dtype}, expected float32 with --torch: its step has no other")


def random_batch(length: int, vocab_size: int) -> Batch:
  """One row, all of it one document and supervised."""
  # From 10 on: the first ids of a vocabulary are its special tokens.
  tokens = jnp.asarray(np.random.default_rng(0).integers(10, vocab_size, (1, length)), jnp.int32)
  ones = jnp.ones_like(tokens)
  return Batch(tokens, ones.astype(bool), ones, jnp.arange(length, dtype=jnp.int32)[None])


def parts(settings: Settings, static: StepConfig, state, target, batch: Batch) -> tuple[dict, object]:
  """(seconds of the parts of a step, what the target says of the batch)."""
  drafter, blocks = state.drafter, first_blocks(state, batch, static)
  encode = jax.jit(lambda target: target.encode(batch, drafter.taps))
  target_seconds, encoded = fastest(lambda: encode(target), settings.repeats)
  whole = jax.jit(lambda drafter, target: gradients(drafter, values(drafter), target, batch, encoded, blocks, static))
  outputs = jax.jit(lambda drafter, target: drafter.train_outputs(target, batch, encoded, blocks))(drafter, target)

  def loss(outputs, drafter, target):
    return draft_loss(drafter, target, outputs, blocks=blocks, target_hidden=encoded.hidden, config=static.loss)
  alone = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True))
  return {"target_seconds": target_seconds,
          "gradients_seconds": fastest(lambda: whole(drafter, target), settings.repeats)[0],
          "loss_seconds": fastest(lambda: alone(outputs, drafter, target), settings.repeats)[0]}, encoded


def first_blocks(state, batch: Batch, static: StepConfig):
  """The blocks of the step that this state takes."""
  return blocks_of(state.drafter, batch, jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), static)


def products(settings: Settings, target) -> float:
  """Seconds of the loss's products with the vocabulary, those of its gradient included."""
  rows = min(settings.chunk, positions := settings.anchors * settings.block_size)
  sizes = dict(n=rows, w=target.vocab_size, d=target.config.spec.hidden_size, r=settings.markov_rank)
  seconds = 0
  # What the target says, what the drafter does and its sequential head; then backwards.
  for product in ("nd,wd->nw", "nd,wd->nw", "nr,wr->nw", "nw,wd->nd", "nw,wr->nr", "nw,nr->wr"):
    a, b = (jnp.ones([sizes[axis] for axis in axes], settings.dtype) for axes in product[:5].split(","))
    alone = jax.jit(functools.partial(jnp.einsum, product))
    seconds += fastest(lambda: alone(a, b), settings.repeats)[0]
  return seconds * -(-positions // rows)  # the last chunk is filled up


def whole(settings: Settings, static: StepConfig, state, target, batch: Batch, encoded) -> dict:
  """Seconds of whole steps, ours and PyTorch's in turn."""
  theirs = None
  if settings.torch:
    from train.torch_step import Step
    words, anchors = target.head().weight, first_blocks(state, batch, static).anchors[0]
    theirs = Step(state.drafter.config, values(state.drafter), target.embed(jnp.arange(target.vocab_size)), words,
                  encoded.features[0], encoded.hidden[0], batch.tokens[0], anchors)
  step = jax.jit(functools.partial(train_step, config=static), donate_argnums=0)
  step = step.lower(state, target, batch, encoded=encoded).compile()
  ours, others = [], []
  for _ in range(settings.repeats + 1):
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, target, batch, encoded=encoded))
    ours.append((time.perf_counter() - began, float(metrics["loss"].sum)))
    others += [theirs.seconds()] if theirs else []
  result = {"step_seconds": min(ours[1:])[0], "loss": ours[0][1]}
  if theirs:
    result |= {"torch_step_seconds": min(others[1:])[0], "torch_loss": others[0][1]}
    result["speedup_over_torch"] = result["torch_step_seconds"] / result["step_seconds"]
  return result


def table(result: dict) -> Table:
  """The result for people."""
  out = Table("what", "seconds")
  for name, seconds in result.items():
    if name.endswith("_seconds"):
      out.add_row(name.removesuffix("_seconds").replace("_", " "), f"{seconds:.3f}")
  out.caption = (f"{result['gflop']:.0f} GFLOP a step; a square product reaches "
                 f"{result['square_gflop_per_second']:.0f} GFLOP/s, the step takes {result['over_arithmetic']:.2f} "
                 f"times what that allows")
  return out


if __name__ == "__main__":
  shell.run(main, Settings)
