"""One optimizer step: a pure function of (state, target, batch), to be jitted once with the state donated.

The frozen target runs inside the step; the drafter's masters are float32 and are cast to the compute dtype.
Parameters and optimizer moments are flat dictionaries under the names that checkpoints use.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dspark_jax.config import Range, raise_all, wrong_choices
from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.metrics import Mean, add, once, weighted
from dspark_jax.nn.parameters import values, with_values
from dspark_jax.targets.decoder import TargetConfig
from dspark_jax.training.anchors import all_blocks, candidates, sample_blocks
from dspark_jax.training.losses import LossConfig, draft_loss, term_weights
from dspark_jax.types import Array, Batch, Drafter, Target, TargetOutput


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The released settings."""
  name: Literal["adamw", "muon"] = "adamw"  # muon: matrices of the layers and fc; AdamW for everything else
  # One rate for both: Muon's updates are scaled to AdamW's size.
  learning_rate: Annotated[float, Range(1e-12, 1e3)] = 6e-4
  warmup_ratio: float = 0.04
  weight_decay: Annotated[float, Range(0, 1e3)] = 0.0
  clip: Annotated[float, Range(1e-9, 1e9)] = 1.0  # of the global gradient norm; 1e9 never clips
  b1: Annotated[float, Range(0, 1 - 1e-9)] = 0.9
  b2: Annotated[float, Range(0, 1 - 1e-9)] = 0.999
  eps: Annotated[float, Range(1e-30, 1)] = 1e-8

  def __post_init__(self):
    problems = wrong_choices(self)
    if not 0 <= self.warmup_ratio < 1:
      problems.append(f"warmup_ratio is {self.warmup_ratio}, expected 0 <= ratio < 1")
    raise_all("optimizer config", problems)


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """Everything static about a step."""
  num_anchors: int = 512
  row_length: int = 0    # of whole rows; a batch may have shorter ones (`sample_blocks`)
  microbatches: int = 1  # the batch is processed in so many parts; the result is that of the whole batch
  compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()

  def __post_init__(self):
    raise_all("step config", wrong_choices(self))


@flax.struct.dataclass
class TrainState:
  step: Array       # i32[]
  drafter: Drafter  # float32 masters
  opt_state: optax.OptState
  key: Array        # u32[2]  key data; step s draws its anchors from fold_in(key, s), resumed or not
  span: Array       # i32[2]  warm-up and total steps; traced, so that a run may time its steps before it fixes them


def span(config: OptimizerConfig, total_steps: int) -> Array:
  """i32[2]: W = int(warmup_ratio * total_steps), and total_steps."""
  return jnp.asarray([int(config.warmup_ratio * total_steps), total_steps], jnp.int32)


def schedule(config: OptimizerConfig, span: Array) -> optax.Schedule:
  """The rate of update s from 0: linear, peak at s = W - 1, then a cosine to 0 at the end of the span.

  cos(x) near pi cancels in float32 (optax's cosine is 7 % off on the last of 4000 steps): (1 + cos x) / 2 is
  written as sin^2((pi - x) / 2), where pi - x counts the remaining steps exactly.
  """
  warmup, total = span.astype(jnp.float32)

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    left = jnp.maximum(total - step, 0) / (total - warmup)
    shape = jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), jnp.sin(jnp.pi / 2 * left) ** 2)
    return config.learning_rate * shape

  return rate


def optimizer(config: OptimizerConfig, span: Array) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW or Muon, over a flat dictionary of parameters."""
  rate, common = schedule(config, span), dict(eps=config.eps, weight_decay=config.weight_decay)
  if config.name == "adamw":
    step = optax.adamw(rate, b1=config.b1, b2=config.b2, **common)
  else:
    # consistent_rms 0.2 gives Muon's updates AdamW's typical size (arXiv:2502.16982): one rate for both
    step = optax.contrib.muon(rate, adam_b1=config.b1, adam_b2=config.b2, consistent_rms=0.2, **common,
                              adam_weight_decay=config.weight_decay, muon_weight_dimension_numbers=_muon_axes)
  return optax.chain(optax.clip_by_global_norm(config.clip), step)


def _muon_axes(params):
  matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)  # stored [out,in]
  # by name alone: optax calls this again with placeholders in the place of arrays
  is_matrix = lambda name: name.startswith(("layers.", "fc.")) and not name.endswith(("norm.weight", ".bias"))
  return {name: matrix if is_matrix(name) else None for name in params}


def init_state(drafter: Drafter, config: StepConfig, seed: int, *, total_steps: int) -> TrainState:
  """The state before the first step. The drafter is copied: donating the state must not delete it."""
  dtype = lambda x: jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
  drafter = jax.tree.map(lambda x: jnp.array(x, dtype(x)), drafter)
  steps = span(config.optimizer, total_steps)
  opt_state = optimizer(config.optimizer, steps).init(values(drafter))
  return TrainState(jnp.zeros((), jnp.int32), drafter, opt_state, jax.random.key_data(jax.random.key(seed)), steps)


def train_step(state: TrainState, target: Target, batch: Batch, *, config: StepConfig,
               encoded: TargetOutput | None = None) -> tuple[TrainState, dict[str, Mean]]:
  """(the state after one update, metrics).

  encoded: what the target says of the batch, where that is stored; without it the target runs here. A loss
  that is not finite is returned as it is, in metrics["loss"]; the program stops on it.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  blocks = blocks_of(state.drafter, batch, key, config)
  params = values(state.drafter)
  loss, metrics, grads = gradients(state.drafter, params, target, batch, encoded, blocks, config)
  transform = optimizer(config.optimizer, state.span)
  with jax.numpy_dtype_promotion("standard"):  # Optax mixes Python floats and int32 counters
    updates, opt_state = transform.update(grads, state.opt_state, params)
  drafter = with_values(state.drafter, optax.apply_updates(params, updates))
  rows = jnp.ones(batch.tokens.shape[0])
  metrics |= {"loss": once(loss), "grad_norm": once(optax.tree.norm(grads)),
              "learning_rate": once(schedule(config.optimizer, state.span)(state.step)),
              "candidates": weighted(candidates(batch).sum(1).astype(jnp.float32), rows),
              "blocks": weighted(blocks.keep.sum(1).astype(jnp.float32), rows)}
  return state.replace(step=state.step + 1, drafter=drafter, opt_state=opt_state), metrics


def blocks_of(drafter, batch, key, config):
  """The blocks of a batch that are trained, all of them or at anchors drawn by the key, and at which temperature."""
  blocks = (all_blocks(batch, drafter.block_size) if drafter.every_position else
            sample_blocks(key, batch, config.num_anchors, drafter.block_size, config.row_length))
  if config.loss.temperatures == (1.0,):
    return blocks
  # In turn, so that every row has equal shares; from a drawn one on, as the blocks of recurrent drafters always stand
  # at the same tokens.
  (rows, count), kinds = blocks.anchors.shape, len(config.loss.temperatures)
  first = jax.random.randint(jax.random.fold_in(key, 1), (rows, 1), 0, kinds)
  return blocks.replace(temperature=(first + jnp.arange(count, dtype=jnp.int32)[None]) % kinds)


def batch_loss(drafter: Drafter, target: Target, batch: Batch, key: Array, config: StepConfig
               ) -> tuple[Array, dict[str, Mean]]:
  """(loss f32[], metrics) of a whole batch without a gradient, as `train_step` would see it; the key draws anchors."""
  blocks = blocks_of(drafter, batch, key, config)
  weights = term_weights(drafter, blocks, config.loss, config.row_length)
  return in_parts(lambda part: part_loss(values(drafter), drafter, target, part, weights, config),
                  (batch, None, blocks), config.microbatches)


def part_loss(params, drafter, target, part, weights, config):
  """(loss f32[], metrics) of a part (batch, what the target says of it or None, blocks), under the whole's weights."""
  (batch, encoded, blocks), dtype = part, jnp.dtype(config.compute_dtype)
  # Cast inside what is differentiated: gradients arrive in float32, at the masters.
  model = with_values(drafter, jax.tree.map(lambda x: x.astype(dtype), params))
  # In the target's dtype for the loss, where it is the teacher; only what the drafter reads is cast.
  seen = jax.lax.stop_gradient(target.encode(batch, drafter.taps) if encoded is None else encoded)
  outputs = model.train_outputs(target, batch, jax.tree.map(lambda x: x.astype(dtype), seen), blocks)
  return draft_loss(model, target, outputs, blocks=blocks, target_hidden=seen.hidden, config=config.loss,
                    weights=weights)


def step_flops(target: TargetConfig, drafter: DrafterConfig, *, rows: int, length: int, blocks: int,
               target_runs: bool = True) -> float:
  """Useful flops of a training step: the target forward (unless what it says is given), its words at every draft
  position (and, for a reduced draft vocabulary, its normaliser at every token), and the drafter. Full rows; causal
  attention sees half of one. blocks: per row; every position has one in recurrent drafters."""
  positions, words = blocks * drafter.block_size, target.head_flops / target.vocab_size
  teacher = positions * words * drafter.words + (length * target.head_flops if drafter.draft_vocab_size else 0)
  forward = length * target.flops(length / 2) if target_runs else 0
  return rows * (forward + teacher + drafter.train_flops(length, blocks))


def gradients(drafter, params, target, batch, encoded, blocks, config):
  """(loss f32[], metrics, gradients like params) of the whole batch, in config.microbatches parts.

  The denominators come from the blocks of all parts: a mean of means would weigh short parts too much.
  """
  weights = term_weights(drafter, blocks, config.loss, config.row_length)
  loss_of = lambda params, part: part_loss(params, drafter, target, part, weights, config)

  def one(part):
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params, part)
    return loss, metrics, grads

  return in_parts(one, (batch, encoded, blocks), config.microbatches)


def in_parts(one, whole, parts):
  """The sum of one(part) over so many parts of a whole (batch, ...), one after the other in memory."""
  if parts == 1:
    return one(whole)
  rows = whole[0].tokens.shape[0]
  if rows % parts:
    raise ValueError(f"{rows} rows cannot be split into {parts} microbatches: choose a divisor")
  # part i takes rows i, i + parts, ...: contiguous parts would each sit on a few devices of a sharded batch
  split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1), whole)
  shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], split))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(lambda total, part: (add(total, one(part)), None), zeros, split)[0]
