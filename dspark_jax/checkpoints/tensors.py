"""Tensors in files, and their way to the devices that hold them: read part by part, cast and placed on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
  """A tensor that is read when asked for: `stored[1:3]` a part, `np.asarray(stored)` all of it, both on the host."""
  shape: tuple[int, ...]
  dtype: np.dtype | str  # text: a type that is not read
  read: Callable[[tuple[slice, ...]], np.ndarray]

  def __getitem__(self, index):
    return self.read(index)

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.read(()), dtype)


def placed(names: np.ndarray, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype,
           sharding: jax.sharding.Sharding | None) -> jax.Array:
  """An array in `shape`, of the tensors of these names stacked along as many axes in front as `names` has.

  sharding: where it lives; None: on the default device. dtype: None for that of the tensors. Each process reads what
  its own devices hold, and has no more of it on the host than that and one tensor.
  """
  where = {None: (slice(None),) * len(shape)} if sharding is None else sharding.addressable_devices_indices_map(shape)
  # As pairs, which can be compared: devices that hold the same part have it read once.
  where = {device: tuple(cut.indices(size)[:2] for cut, size in zip(index, shape)) for device, index in where.items()}
  parts = dict.fromkeys(where.values())
  if names.ndim and dtype is None:
    dtype = np.result_type(*(tensors[name].dtype for name in names.flat))
  # Tensor by tensor, not device by device: a tensor that must be decoded is so once, and let go.
  for at, name in np.ndenumerate(names):
    tensor, stacked = tensors[name], len(at)
    for index in parts:
      if not all(start <= i < stop for i, (start, stop) in zip(at, index)):
        continue
      piece = tensor[tuple(slice(*ends) for ends in index[stacked:])]
      if not stacked:
        parts[index] = np.asarray(piece, dtype)
        continue
      if parts[index] is None:
        parts[index] = np.empty([stop - start for start, stop in index], dtype)
      parts[index][tuple(i - start for i, (start, _) in zip(at, index))] = piece
  arrays = [jax.device_put(parts[index], device) for device, index in where.items()]
  array = arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, arrays)
  # Devices copy while the host reads on: without this, parts of many parameters would wait there.
  return jax.block_until_ready(array)
