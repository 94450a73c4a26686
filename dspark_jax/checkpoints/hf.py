"""Safetensors folders <-> modules. Modules carry the stored names, so a family needs no table of tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from dspark_jax.checkpoints.atomic import new_folder
from dspark_jax.config import raise_all
from dspark_jax.nn.parameters import parameters
from dspark_jax.text import read_json


class Tensors(Mapping):
  """The tensors of a safetensors folder by name, read on access. ValueError names a missing or truncated file."""

  def __init__(self, folder: Path):
    index, one = folder / "model.safetensors.index.json", "model.safetensors"
    table = read_json(index).get("weight_map") if index.exists() else None
    if index.exists() and not (isinstance(table, dict) and all(isinstance(f, str) for f in table.values())):
      raise ValueError(f"{index} has no weight_map from tensors to files: download it again")
    files = sorted(set(table.values())) if table else [one]
    missing = [f for f in files if not (folder / f).exists()]
    if missing == [one] and (pickles := [p.name for p in sorted(folder.glob("*.bin"))]):
      raise ValueError(f"{folder} has its weights in {', '.join(pickles)} only, which loading would execute as code: "
                       f"convert them to safetensors")
    raise_all(f"{folder}", [f"weight file {f} is missing: download it again" for f in missing])
    self._files = {f: _open(folder / f) for f in files}
    self._table = table or {name: one for name in self._files[one].keys()}
    # An index beside the shards of another download is found here, not as a KeyError halfway through loading.
    held = {f: set(opened.keys()) for f, opened in self._files.items()}
    raise_all(f"{folder}", [f"{name} is listed in the index but not in {f}: download both again"
                            for name, f in self._table.items() if name not in held[f]])

  @property
  def metadata(self) -> dict[str, str] | None:
    """The text entries of the (first) file's header. Only a single one has a fixed place in what safetensors writes."""
    return next(iter(self._files.values())).metadata()

  def __getitem__(self, name):
    return self._files[self._table[name]].get_tensor(name)

  def __iter__(self):
    return iter(self._table)

  def __len__(self):
    return len(self._table)


def _open(path):
  try:
    return safe_open(path, framework="flax")  # not numpy, which has no bfloat16
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({error}): it is truncated or no safetensors file; download it "
                     f"again") from error


def read_folder(folder: Path) -> tuple[dict, Tensors]:
  """(config.json, tensors by stored name) of a Hugging Face folder."""
  return read_json(Path(folder) / "config.json"), Tensors(Path(folder))


def fill(build, tensors: Mapping, what: str, *, dtype=None, stored=lambda name: (name,), extra_ok=(),
         problems=()) -> nnx.Module:
  """The module build() with its parameters taken from `tensors`, in `dtype` (default: as stored).

  Every missing, unknown and misshapen tensor is listed in one ValueError, after the `problems` found before. stored
  gives the names of the tensors that make a parameter, by its path: one, or several that are stacked along a new first
  axis (experts). Stored names in extra_ok may stay unused.
  """
  # Shapes alone: random weights that are about to be replaced would take the model's memory once more.
  module = nnx.eval_shape(build)
  wanted = {stored(name): v for name, v in parameters(module).items()}
  known = [part for parts in wanted for part in parts]
  problems = [*problems, *(f"tensor {n} is missing" for n in known if n not in tensors)]
  problems += [f"tensor {n} is not part of this model" for n in tensors if n not in known and n not in extra_ok]
  # Every tensor is read once, even when nothing can be loaded any more: its shape is checked for the list.
  for parts, variable in wanted.items():
    arrays, shape = [], variable.shape[len(parts) > 1:]  # of a part: without the axis along which several are stacked
    for name in parts:
      if name in tensors:
        array = tensors[name]
        # Integers are quantised weights, whose scales nobody here applies.
        if tuple(array.shape) != tuple(shape) or not jnp.issubdtype(array.dtype, jnp.floating):
          problems.append(f"tensor {name} is {array.dtype}{list(array.shape)}, expected floating point {list(shape)}")
        arrays.append(array)
    if not problems:
      arrays = [jnp.asarray(array, dtype) for array in arrays]
      variable.set_value(jnp.stack(arrays) if len(parts) > 1 else arrays[0])
  raise_all(what, problems)
  return module


def write_folder(folder: Path, config: str, tensors: Mapping[str, jax.Array], metadata: dict[str, str] | None) -> None:
  """Writes config.json (this very text) and model.safetensors; the folder appears whole or not at all."""
  with new_folder(folder, {"config.json", "model.safetensors"}) as new:
    (new / "config.json").write_bytes(config.encode())  # bytes: line ends as they came in
    try:
      save_file(dict(tensors), os.fspath(new / "model.safetensors"), metadata=metadata)
    except SafetensorError as error:
      raise OSError(f"{folder} cannot be written ({error}): free some space or choose another place") from error
