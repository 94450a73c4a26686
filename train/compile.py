"""Compile a training step for a machine that is not there, and see what it moves, computes and needs.

When to use it: before a pod is booked, to see that an experiment fits, and which batch, anchors and microbatches do.
Needs `make tpu-compiler`. Nothing is run, nothing is downloaded and no data are read: a target that is not on this
machine is taken by its published size (Qwen/Qwen3-4B). A step of that size compiles for some minutes.

    python -m train.compile --config configs/qwen3_4b.py --topology v5p:2x2x1 --batch 1
    python -m train.compile --config configs/qwen3_4b.py --topology v6e:4x4 --batch 16 --mesh.fsdp 16 --loss.chunk 512

Flags override the experiment file, as in train.train. The floor is what a step cannot but move: the frozen target read
once per microbatch, and the state (masters, both moments) read and written once; on a mesh, a device's part. A step is
bound by its products: useful / compiled flops is what of them the formulas beside the models ask for
(`training.step.step_flops`).

The last line of stdout is a JSON object with the key step: its bytes, floor_bytes, over_floor, temporary_bytes,
peak_bytes, fits, cycles, compiled_flops, useful_flops, collectives (bytes by kind) and most (the operations that move
most, with file and line), of one device.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.loading import new_drafter, target_config
from dspark_jax.nn.cache import row_shardings
from dspark_jax.nn.sharding import shardings
from dspark_jax.programs import compiled, shell
from dspark_jax.programs.compilers import absent_devices, chip_of
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import TargetConfig, stack_layers
from dspark_jax.training.step import TrainState, init_state, step_flops, train_step
from dspark_jax.types import Batch, Target
from train.config import TrainConfig, experiment, read_config
from train.train import drafter_config, step_config


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)  # as for train.train; it is not inherited
@dataclasses.dataclass(frozen=True)
class CompileConfig(TrainConfig):
  topology: str = "v5p:2x2x1"
  """any that libtpu knows: v5e:4x4, v5p:2x2x4, v6e:8x8, tpu7x:2x2x1 ..."""


def main(config: CompileConfig) -> dict:
  about = target_config(config.target)
  drafting = drafter_config(config.drafter, about)
  devices = absent_devices(config.topology)
  chip, mesh = chip_of(devices[0]), config.mesh.build(devices)
  with shell.stderr.status("compiling a training step; minutes, for billions of parameters"), jax.set_mesh(mesh):
    state, target, batch = arguments(config, about, drafting)
    found = compiled.read(lower(config, state, target, batch))
  blocks = config.row_length if state.drafter.every_position else config.anchors
  row = compiled.summary(
      found, chip, floor_bytes=config.microbatches * compiled.size(target) + 2 * compiled.size(state),
      useful_flops=step_flops(about, drafting, rows=config.batch, length=config.row_length,
                              blocks=blocks) / mesh.size)
  for table in compiled.tables({"step": row}, chip):
    shell.say(table)
  return {"target": config.target, "topology": config.topology, "chip": chip.name, "devices": mesh.size,
          "batch": config.batch, "step": row, "fits": row["fits"]}


def arguments(config: TrainConfig, about: TargetConfig, drafting: DrafterConfig) -> tuple[TrainState, Target, Batch]:
  """What a step is given, as shapes on the current mesh: no array of this size is made."""
  target = jax.eval_shape(lambda: jax.tree.map(
      lambda x: x.astype(config.target_dtype), stack_layers(TARGETS[about.family].build(about, rngs=nnx.Rngs(0)))))
  target.use(config.kernels, jax.sharding.get_mesh().devices.flat[0].platform)
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
