"""Safetensors folders <-> modules. Modules carry the stored names, so a family needs no table of tensors."""

from __future__ import annotations

import json
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


class Tensors(Mapping):
  """The tensors of a safetensors folder by name, read on access. ValueError names a missing or truncated file."""

  def __init__(self, folder: Path):
    index = folder / "model.safetensors.index.json"
    if index.exists():
      table = read_json(index)["weight_map"]
    elif (folder / "model.safetensors").exists():
      table = None
    else:
      raise ValueError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json")
    files = sorted(set(table.values())) if table else ["model.safetensors"]
    missing = [f for f in files if not (folder / f).exists()]
    raise_all(f"{folder}", [f"weight file {f} is missing: download it again" for f in missing])
    self._files = {f: _open(folder / f) for f in files}
    self._table = table or {name: files[0] for name in self._files[files[0]].keys()}
    raise_all(f"{folder}", [f"{name} is listed in the index but not in {f}" for name, f in self._table.items()
                            if name not in set(self._files[f].keys())] if table else [])

  def __getitem__(self, name):
    return self._files[self._table[name]].get_tensor(name)

  def __iter__(self):
    return iter(self._table)

  def __len__(self):
    return len(self._table)


def _open(path):
  try:
    return safe_open(path, framework="flax")
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({error}): it is truncated or no safetensors file; download it again") from error


def read_json(path: Path) -> dict:
  """The JSON object in a file; ValueError in one sentence when there is none."""
  try:
    return json.loads(Path(path).read_text())
  except FileNotFoundError as error:
    raise ValueError(f"{path} is missing: expected a JSON file there") from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON ({error}): restore it from where it came") from error


def read_folder(folder: Path) -> tuple[dict, Tensors]:
  """(config.json, tensors by stored name) of a Hugging Face folder."""
  return read_json(Path(folder) / "config.json"), Tensors(Path(folder))


def names(module: nnx.Module) -> dict[str, nnx.Variable]:
  """The parameters of a module by dotted path, which is their stored name."""
  return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def fill(build, tensors: Mapping, what: str, *, dtype=None, prefix=lambda name: name, extra_ok=()) -> nnx.Module:
  """The module build() with its parameters taken from `tensors`, in `dtype` (default: as stored).

  Every missing, unknown and misshapen tensor is listed in one ValueError. prefix maps a parameter's path to its stored
  name; stored names in extra_ok may stay unused.
  """
  module = nnx.eval_shape(build)
  wanted = {prefix(name): v for name, v in names(module).items()}
  problems = [f"tensor {n} is missing" for n in wanted if n not in tensors]
  problems += [f"tensor {n} is not part of this model" for n in tensors if n not in wanted and n not in extra_ok]
  for name, variable in wanted.items():
    if name in tensors:
      array = tensors[name]
      if tuple(array.shape) != tuple(variable.shape):
        problems.append(f"tensor {name} has shape {list(array.shape)}, expected {list(variable.shape)}")
      elif not problems:
        variable.set_value(jnp.asarray(array, dtype))
  raise_all(what, problems)
  return module


def write_folder(folder: Path, config: str, tensors: Mapping[str, jax.Array]) -> None:
  """Writes config.json (this very text) and model.safetensors; the folder appears whole or not at all."""
  with new_folder(folder) as new:
    (new / "config.json").write_text(config)
    save_file(dict(tensors), os.fspath(new / "model.safetensors"), metadata={"format": "pt"})
