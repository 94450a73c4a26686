"""Compile a training step for a machine that is not there, and see what it moves, computes and needs.

When to use it: before a pod is booked, to see that an experiment fits, and which batch, anchors and microbatches do.
Needs `make tpu-compiler`, or `make gpu-compiler`. Nothing is run, nothing is downloaded and no data are read: a target
that is not on this machine is taken by its published size (Qwen/Qwen3-4B). A step of that size compiles for some
minutes.

    python -m train.compile --config configs/qwen3_4b.py --topology v5p:2x2x1 --rows 44346
    python -m train.compile --config configs/qwen3_4b.py --topology v6e:4x4 --mesh.fsdp 16 --microbatches 32

Flags override the experiment file, as in train.train: --batch 1 --microbatches 1 for a step of one row. With --rows,
the number to train on (train.prepare says it), epochs become steps, and steps device hours. The floor is what a step
cannot but move: the frozen target read once per microbatch, but for an untied embedding, and the state (masters, both
moments) read and written once; on a mesh, a device's part. A step is bound by its products: useful / compiled flops is
what of them the formulas beside the models ask for (`training.step.step_flops`).

The last line of stdout is a JSON object with the keys step_seconds (what the operations take at the chip's published
rates, or what the useful flops do where that is more: kernels of our own are not among the former), steps, device_hours
(None where steps are not known), device_hours_per_billion_tokens, roofline_hours (the same of the useful flops alone,
at the peak of every chip that is known), useful_flops, compiled_flops, and step: its bytes, floor_bytes, over_floor,
temporary_bytes, peak_bytes, fits, cycles, both flops again, collectives (bytes by kind) and most (the operations that
move most, with file and line); all of step, and both flops, are of one device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.loading import new_drafter, target_config
from dspark_jax.nn.cache import row_shardings
from dspark_jax.nn.sharding import shardings
from dspark_jax.programs import compiled, shell
from dspark_jax.programs.compilers import CHIPS, absent_devices, chip_of
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import TargetConfig, scans, stack_layers
from dspark_jax.training.step import TrainState, init_state, step_flops, train_step
from dspark_jax.types import Batch, Target
from train.config import TrainConfig, experiment, read_config
from train.train import check_rows, check_target, step_config


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)  # as for train.train; it is not inherited
@dataclasses.dataclass(frozen=True)
class CompileConfig(TrainConfig):
  topology: str = "v5p:2x2x1"
  """any that libtpu knows: v5e:4x4, v5p:2x2x4, v6e:8x8, tpu7x:2x2x1 ...; or h100:1 to h100:8"""
  rows: int | None = None
  """rows that are trained on, from which the hours of epochs follow"""


def main(config: CompileConfig) -> dict:
  if config.rows is not None and config.rows < 1:
    raise ValueError(f"rows is {config.rows}, expected at least 1")
  about = target_config(config.target)
  drafting = check_target(config, about)
  devices = absent_devices(config.topology)
  chip, mesh = chip_of(devices[0]), config.mesh.build(devices)
  with shell.stderr.status("compiling a training step; minutes, for billions of parameters"), jax.set_mesh(mesh):
    check_rows(config)
    state, target, batch = arguments(config, about, drafting)
    found = compiled.read(lower(config, state, target, batch))
  blocks = config.row_length if state.drafter.every_position else config.anchors
  row = compiled.summary(
      found, chip, floor_bytes=floor(config, state, target),
      useful_flops=step_flops(about, drafting, rows=config.batch, length=config.row_length,
                              blocks=blocks) / mesh.size)
  for table in compiled.tables({"step": row}, chip):
    shell.say(table)
  told = costs(config, max(row["predicted_seconds"], row["roofline_seconds"]), mesh.size, row["useful_flops"])
  shell.say("{step_seconds:.3g} s a step, {device_hours_per_billion_tokens:.3g} device hours a billion tokens".format(
      **told) + (" and {device_hours:.3g} for {steps:,} steps".format(**told) if told["steps"] else ""))
  return {"target": config.target, "topology": config.topology, "chip": chip.name, "devices": mesh.size,
          "batch": config.batch, "step": row, **told,
          **{name: row[name] for name in ("fits", "useful_flops", "compiled_flops")}}


def floor(config: TrainConfig, state: TrainState, target: Target) -> int:
  """Bytes that a step cannot but move, of one device. Of an embedding that is not the head, too, only rows are read."""
  frozen = compiled.size(target) - (compiled.size(target.embed_tokens) if target.lm_head else 0)
  return config.microbatches * frozen + 2 * compiled.size(state)


def costs(config: CompileConfig, seconds: float, devices: int, flops: float) -> dict[str, Any]:
  """What a run costs whose step takes so many seconds on so many devices, of useful flops on each."""
  hours, billion = seconds * devices / 3600, 1e9 / (config.batch * config.row_length)
  steps = config.steps_over(config.rows or 0) if config.steps or config.rows else None
  return {"step_seconds": seconds, "steps": steps, "device_hours": steps and steps * hours,
          "device_hours_per_billion_tokens": hours * billion, "roofline_hours": {
              chip.name: flops * devices / chip.flops / 3600 * billion for chip in CHIPS.values()}}


def arguments(config: TrainConfig, about: TargetConfig, drafting: DrafterConfig) -> tuple[TrainState, Target, Batch]:
  """What a step is given, as shapes on the current mesh: no array of this size is made."""
  platform = jax.sharding.get_mesh().devices.flat[0].platform
  build = lambda: TARGETS[about.family].build(about, rngs=nnx.Rngs(0))
  built = (lambda: stack_layers(build())) if scans(platform) else build
  target = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(config.target_dtype), built()))
  target.use(config.kernels, platform)
  start = functools.partial(init_state, config=step_config(config), seed=0, total_steps=1)  # no shape depends on these
  state = jax.eval_shape(start, jax.eval_shape(lambda: new_drafter(drafting)))
  whole = jax.ShapeDtypeStruct((config.batch, config.row_length), jnp.int32)
  batch = Batch(whole, jax.ShapeDtypeStruct(whole.shape, jnp.bool_), whole, whole)
  return (*(compiled.on(tree, shardings(tree)) for tree in (state, target)), compiled.on(batch, row_shardings(batch)))


def lower(config: TrainConfig, state: TrainState, target: Target, batch: Batch) -> jax.stages.Lowered:
  """The step, with its state donated, as train.train runs it."""
  step = functools.partial(train_step, config=step_config(config))
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None)).lower(state, target, batch)


def resolved(path: str) -> CompileConfig:
  """The settings of an experiment file."""
  config = read_config(path)
  return CompileConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


if __name__ == "__main__":
  path, args = experiment(__doc__)
  shell.run(main, CompileConfig, default=lambda: resolved(path), args=args, mesh=False)
