"""Where arrays live on a mesh of devices. The same code runs on one device, where nothing here does anything.

A mesh has three axes: `data` (rows apart, weights whole), `fsdp` (rows apart, and each device stores a part of every
weight, which is gathered where it is used) and `tensor` (heads, MLP columns and words apart). Modules name the logical
axes of their weights (`Linear(..., axes=("heads", "embed"))`); the two tables below say where those live. A program
makes a mesh the current one (`jax.set_mesh(MeshConfig(tensor=4).build())`), what is loaded is placed there, and XLA
does the rest, held to the plan by `constrain` inside every product: left alone it moves activations and logits, which
are larger than weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.nn.parameters import parameters
from dspark_jax.types import Array

NAMES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
# Where the logical axes of arrays in use live, and where those of stored weights and optimizer states do.
# words: a vocabulary whose rows are too short to be divided, as what lies along a TPU's lanes is padded to 128.
AXES = {"rows": ROWS, "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "words": "tensor", "embed": None,
        None: None}
STORED = {**AXES, "embed": "fsdp", "words": ("tensor", "fsdp")}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices share each kind of work; -1 for one of them: all that are left."""
  data: int = 1
  """devices, or groups of them, that work on other rows and hold whole copies of the weights"""
  fsdp: int = 1
  """devices that work on other rows, and share the storage of weights and optimizer state"""
  tensor: int = 1
  """devices that share the heads, the MLP and the vocabulary of every row"""

  def __str__(self):
    return f"the mesh is data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}"

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if sizes.count(-1) > 1 or not all(size >= 1 or size == -1 for size in sizes):
      raise ValueError(f"{self}: expected numbers from 1, and -1 (all devices that are left) at most once")

  def build(self, devices=None) -> Mesh:
    """The mesh of these devices (default: those of this process's default platform; of several, the first ones).

    ValueError when there are too few, or -1 leaves a rest.
    """
    devices, sizes = jax.devices() if devices is None else list(devices), dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    sizes = [size if size > 0 else len(devices) // known for size in sizes]
    rest = -1 in dataclasses.astuple(self) and len(devices) % known
    if rest or 0 in sizes or math.prod(sizes) > len(devices):
      raise ValueError(f"{self}, and there are {len(devices)} devices: choose sizes whose product they hold")
    axes = dict(axis_types=(AxisType.Auto,) * len(NAMES))
    # make_mesh knows which devices are neighbours; of a part of them it cannot.
    if math.prod(sizes) == len(devices) and len({_slice(d) for d in devices}) == 1:
      return jax.make_mesh(sizes, NAMES, devices=devices, **axes)
    if math.prod(sizes) == len(devices):
      return Mesh(_over_slices(sizes, devices), NAMES, **axes)
    return Mesh(np.asarray(devices[:math.prod(sizes)]).reshape(sizes), NAMES, **axes)

  def refuse(self, where: str) -> None:
    """ValueError for more than one device, in a program that would leave them idle. where: what asks for them."""
    if dataclasses.astuple(self) != (1, 1, 1):
      raise ValueError(f"{where}: {self}, but this program runs on one device: leave the mesh out, or give it to "
                       f"train.train")

  def use(self) -> contextlib.AbstractContextManager:
    """What makes the mesh of this process's devices the current one; nothing where one device is asked for."""
    return contextlib.nullcontext() if dataclasses.astuple(self) == (1, 1, 1) else jax.set_mesh(self.build())


def _slice(device):
  """Devices of one slice have links of their own; XLA counts every GPU host as one."""
  return getattr(device, "slice_index", 0)


def _over_slices(sizes, devices):
  """Devices of several slices [data,fsdp,tensor]: rows apart over these, first by `data`, neighbours inside."""
  count = len({_slice(d) for d in devices})
  outer = (math.gcd(sizes[0], count), count // math.gcd(sizes[0], count), 1)
  inner = tuple(size // n for size, n in zip(sizes, outer))
  alike = {sum(_slice(d) == one for d in devices) for one in map(_slice, devices)} == {math.prod(inner)}
  if sizes[1] % outer[1] == 0 and alike:
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
  return np.asarray(sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))).reshape(sizes)


def constrain(x: Array, *axes: str | None, stored: bool = False) -> Array:
  """x, held on the current mesh where its dimensions' logical axes live; x itself without a mesh.

  A dimension that its devices do not divide stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes, mesh, STORED if stored else AXES))


def local(size: int, axis: str) -> int:
  """How much of a dimension of `size` along a logical axis each device of the current mesh has."""
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else _devices(mesh, AXES[axis])
  return size if size % devices else size // devices


def each_its_part(function: Callable, places: tuple[tuple[str | None, ...], ...], *args: Array) -> Array:
  """function(*args), an array like the first, run by every device of the current mesh on its parts alone.

  places: the logical axes of each argument, as for `constrain`: rows that the mesh does not divide, one prompt among
  others, are run by every device. For what XLA cannot divide (kernels), or would copy, though no part needs another.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*args)
  specs = tuple(_spec(x.shape, axes, mesh, AXES) for x, axes in zip(args, places))
  # What kernels make has no types for `check_vma` to see.
  return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)


def shardings(tree: Any) -> Any:
  """A NamedSharding on the current mesh for every array of a tree of modules and of anything else; None without one.

  Modules' weights live where their logical axes are stored. So do arrays under the name of a parameter of one of the
  modules, in its shape: an optimizer's moments. Whatever else there is lives on all devices.
  """
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else jax.tree.map(lambda spec: NamedSharding(mesh, spec), _stored(tree, mesh))


def _stored(tree, mesh):
  """`shardings` as PartitionSpecs."""
  named = {}
  for module in jax.tree.leaves(tree, is_leaf=_is_module):
    if _is_module(module):
      named |= {name: (v.shape, _axes(v)) for name, v in parameters(module).items()}

  def place(path, leaf):
    shape, axes = leaf.shape, ()
    if isinstance(leaf, nnx.Variable):
      axes = _axes(leaf)
    elif path and getattr(path[-1], "key", None) in named and named[path[-1].key][0] == shape:
      axes = named[path[-1].key][1]
    return _spec(shape, axes, mesh, STORED)

  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return jax.tree.unflatten(jax.tree.structure(tree), [place(*leaf) for leaf in leaves])


def sharding_of(shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
  """Where an array in use lives on the current mesh, by the logical axes of its dimensions."""
  mesh = jax.sharding.get_mesh()
  return NamedSharding(mesh, _spec(shape, axes, mesh, AXES))


def everywhere() -> NamedSharding | None:
  """Where an array is whole on every device of the current mesh; None without one."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else NamedSharding(mesh, PartitionSpec())


def place(tree: Any) -> Any:
  """The tree with its arrays where `shardings` says; itself without a mesh."""
  return tree if jax.sharding.get_mesh().empty else jax.device_put(tree, shardings(tree))


def made(function: Callable, *args) -> Any:
  """function(*args), a tree that is born where `shardings` says: on a mesh no device ever holds an array whole."""
  mesh = jax.sharding.get_abstract_mesh()  # the mesh itself cannot be had where only shapes are asked for
  if mesh.empty:
    return function(*args)

  @jax.jit
  def born(*args):
    tree = function(*args)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, _stored(tree, mesh))
  return born(*args)


def rows_here(batch: int) -> np.ndarray:
  """Which rows of a batch of so many the devices of this process work on: i64[b], ascending; all without a mesh.

  They need not be neighbours, as a mesh has devices in the order of their links. Where `tensor` reaches over several
  processes, these have the same. ValueError where the batch cannot be divided among the devices.
  """
  mine, parts = _row_parts()
  if len(mine) == parts:
    return np.arange(batch)
  if batch % parts:
    raise ValueError(f"batch is {batch}, expected a multiple of {parts}, into which the mesh divides its rows: give "
                     f"another --batch, or a mesh with a smaller data x fsdp")
  return np.arange(batch).reshape(parts, -1)[mine].reshape(-1)


def _row_parts():
  """(which of the equal parts of a batch's rows are this process's, how many parts there are)."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return [0], 1
  parts = _devices(mesh, ROWS)
  groups = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in ROWS], [0, 1]).reshape(parts, -1)
  return [i for i, group in enumerate(groups) if any(d.process_index == jax.process_index() for d in group)], parts


def place_rows(tree: Any) -> Any:
  """A tree of arrays [B,...] with their rows apart on the current mesh; on the default device without one.

  Where a mesh spans processes, each gives its own rows (`rows_here`) in their order.
  """
  if jax.sharding.get_mesh().empty:
    return jax.device_put(tree)
  mine, parts = _row_parts()

  def place(x):
    x = np.asarray(x)
    total = len(x) * parts // len(mine)
    here = rows_here(total)

    def part(index):
      first, end, _ = index[0].indices(total)
      at = np.searchsorted(here, first)
      return x[at:at + end - first]
    shape = (total, *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding_of(shape, "rows"), part)
  return jax.tree.map(place, tree)


def on_host(tree: Any) -> Any:
  """The tree with its arrays whole on the host; on every process, where they span several. All must call it."""
  spans = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  # One array after the other: each is whole on every device for a moment.
  return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if spans(x) else jax.device_get(x),
                      tree)


def _is_module(x):
  return isinstance(x, nnx.Module)


def _axes(variable):
  axes = variable.get_metadata().get("axes", ())
  # Layers that are scanned are stacked along axes in front.
  return (None,) * (len(variable.shape) - len(axes)) + tuple(axes) if axes else ()


def _spec(shape, axes, mesh, table):
  where = [table[axis] for axis in axes] + [None] * (len(shape) - len(axes))
  return PartitionSpec(*(at if at and size % _devices(mesh, at) == 0 else None for size, at in zip(shape, where)))


def _devices(mesh, at):
  if not set(NAMES) <= set(mesh.axis_names):
    raise ValueError(f"the current mesh has the axes {mesh.axis_names}, expected data, fsdp and tensor: make it by "
                     f"MeshConfig(...).build()")
  names = (at,) if isinstance(at, str) else at or ()
  return math.prod(mesh.shape[name] for name in names)
