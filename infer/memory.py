"""What the TPU compiler says of the memory of training and decoding at Qwen3-4B size, on a machine without a TPU.

When to use it: to see that a training step or the decode loop fits before a pod is booked. Needs
`make tpu-compiler`; nothing is run and no weights exist.

    python -m infer.memory
    python -m infer.memory --topology v6e:2x2 --rows 8

The last line of stdout is a JSON object: per program the GB of arguments, outputs that are not donated arguments, and
temporaries; for training also the GB of gradients and for decoding of caches, which the temporaries hold.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from dspark_jax.decoding.generate import decode, start
from dspark_jax.decoding.round import Models
from dspark_jax.decoding.session import Session
from dspark_jax.drafters.dspark import DSpark, DSparkChoices, DSparkConfig
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.parameters import values
from dspark_jax.programs import shell
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.targets.decoder import Decoder, TargetConfig, stack_layers
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import StepConfig, init_state, train_step
from dspark_jax.types import Batch

# Qwen3-4B by its config.json, and the drafter that the paper's authors released for it.
SPEC = BlockSpec(2560, 9728, 32, 8, 128, 1e-6, 1e6, qk_norm=True)
TARGET = TargetConfig("qwen3", SPEC, 36, 151_936, True, 40_960)
DRAFTER = DSparkConfig.for_target(DSparkChoices(taps=(1, 9, 17, 25, 33), mask_token_id=151_669), TARGET)


@dataclasses.dataclass
class Settings:
  topology: str = "v5p:2x2x1"
  """any that libtpu knows; one of its devices is compiled for"""
  tokens: int = 4096
  """tokens of the training sequence"""
  anchors: int = 512
  chunk: int = LossConfig.chunk
  """draft positions whose logits exist at a time"""
  rows: int = 1
  """of the decode loop"""
  new_tokens: int = 2048
  """per row of the decode loop"""


def main(settings: Settings) -> dict:
  place = absent_tpu(settings.topology)
  on = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
  half = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)
  target = on(half(jax.eval_shape(lambda: stack_layers(Decoder(TARGET, rngs=nnx.Rngs(0))))))
  drafter = jax.eval_shape(lambda: DSpark(DRAFTER, rngs=nnx.Rngs(0)))
  out = {}
  # Shapes are all that the compiler needs: no array of this size is made.
  with shell.stderr.status("compiling a training step"):
    out["training_step"] = training(settings, target, drafter, on)
  for name, chosen in (("plain_decoding", None), ("speculative_decoding", on(half(drafter)))):
    with shell.stderr.status(f"compiling {name}"):
      out[name] = decoding(settings, target, chosen, on)
  table = Table("program", "arguments GB", "results GB", "temporaries GB")
  for name, row in out.items():
    table.add_row(name, *(f"{row[k]:.3f}" for k in ("arguments_gb", "results_gb", "temporaries_gb")))
  shell.say(table)
  return {"topology": settings.topology, **out}


def training(settings: Settings, target, drafter, on) -> dict:
  """One step at batch 1: bfloat16 compute, float32 masters, the state donated."""
  config = StepConfig(num_anchors=settings.anchors, compute_dtype="bfloat16", loss=LossConfig(chunk=settings.chunk))
  state = on(jax.eval_shape(lambda d: init_state(d, config, 0, total_steps=1), drafter))  # no shape depends on it
  whole = jax.ShapeDtypeStruct((1, settings.tokens), jnp.int32)
  batch = on(Batch(whole, jax.ShapeDtypeStruct(whole.shape, jnp.bool_), whole, whole))
  # Donated, as the program does it: else the old and the new state would both be counted.
  step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
  out, gradients = memory(step.lower(state, target, batch).compile()), size(jax.eval_shape(values, state.drafter))
  return {**out, "gradients_gb": gradients, "temporaries_beyond_gradients_gb": out["temporaries_gb"] - gradients}


def decoding(settings: Settings, target, drafter, on) -> dict:
  """The whole of `decode` for prompts of 128 tokens; its temporaries hold the caches, which are counted apart."""
  prompts = [[0] * 128] * settings.rows
  (batch,) = Session(target, drafter, budget=None).prepare(prompts, max_new_tokens=settings.new_tokens)
  args = *batch.args[:2], *on(batch.args[2:])
  begun = jax.eval_shape(lambda t, d, r: start(Models.of(t, d), r, batch.static["capacity"]), *args[:3])
  out = memory(decode.lower(*args, **batch.static).compile())
  caches = size((begun.cache, begun.draft))
  return {**out, "caches_gb": caches, "temporaries_beyond_caches_gb": out["temporaries_gb"] - caches}


def memory(compiled) -> dict:
  """GB, as the compiler reports them."""
  stats = compiled.memory_analysis()
  return dict(arguments_gb=stats.argument_size_in_bytes / 1e9,
              # What is donated is written in place and needs no memory of its own.
              results_gb=(stats.output_size_in_bytes - stats.alias_size_in_bytes) / 1e9,
              temporaries_gb=stats.temp_size_in_bytes / 1e9)


def size(tree) -> float:
  """GB of the arrays of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9


if __name__ == "__main__":
  shell.run(main, Settings)
