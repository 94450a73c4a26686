"""What the target says of a training batch, by whoever knows it: the step itself, a program before it, memory, a store.

One protocol, `Features`; None stands for "nobody knows: run the target in the step".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np

from dspark_jax.data.store import Store, decoded
from dspark_jax.nn.sharding import place_rows
from dspark_jax.types import Batch, TargetOutput


class Features(Protocol):
  """Asked by step, with the numbers i64[B] of the batch's rows and the batch itself, on the host."""

  def at(self, step: int, indices: np.ndarray, batch: Batch) -> TargetOutput | None: ...  # [B,T,...], placed
  def ask(self, step: int, indices: np.ndarray, batch: Batch) -> None: ...  # it will be asked for soon
  def forget(self) -> None: ...  # what was said to be asked for soon will not be


class Online:
  """The target runs in the step."""

  def at(self, step: int, indices: np.ndarray, batch: Batch) -> None:
    return None

  def ask(self, step: int, indices: np.ndarray, batch: Batch) -> None:
    pass

  def forget(self) -> None:
    pass


class Heard(Online):
  """Of the first `until` steps the target has been asked before, by a program of its own: encode(batch). What it said
  then is given once, where it was kept; else it is asked again by the same program, so that the bits are the same."""

  def __init__(self, encode: Callable[[Batch], TargetOutput], until: int):
    self._encode, self.until, self._kept = encode, until, {}

  def keep(self, step: int, encoded: TargetOutput) -> None:
    """Keeps what was said of a step."""
    self._kept[step] = encoded

  def at(self, step: int, indices: np.ndarray, batch: Batch) -> TargetOutput | None:
    kept = self._kept.pop(step, None)
    return self._encode(place_rows(batch)) if kept is None and step < self.until else kept


class Memory(Online):
  """Keeps what the target said of a row, on the host: it is asked, by a program of its own, for rows not yet seen. For
  one process: the rows of another epoch go to others. until: the first steps whose rows are known, as in `Heard`."""

  def __init__(self, encode: Callable[[Batch], TargetOutput]):
    self._encode, self.until, self._kept = encode, 0, {}

  def at(self, step: int, indices: np.ndarray, batch: Batch) -> TargetOutput:
    used, numbers = np.asarray(batch.segments) > 0, indices.tolist()
    if any(row not in self._kept for row in numbers):
      said, self.until = jax.device_get(self._encode(place_rows(batch))), self.until + 1
      for at, row in enumerate(numbers):
        self._kept.setdefault(row, jax.tree.map(lambda x: x[at][used[at]], said))

    def padded(*rows):
      whole = np.zeros((*used.shape, rows[0].shape[1]), rows[0].dtype)
      whole[used] = np.concatenate(rows)
      return whole
    return place_rows(jax.tree.map(padded, *(self._kept[row] for row in numbers)))


class Stored:
  """Reads a hidden-state store, in threads where it is asked early."""

  def __init__(self, store: Store, dtype: str, threads: int = 2):
    """dtype: the target's, in which it would have spoken."""
    self.store, self._decoded = store, jax.jit(functools.partial(decoded, dtype=dtype))
    self._threads, self._asked = ThreadPoolExecutor(threads, thread_name_prefix="hidden-store"), {}

  def ask(self, step: int, indices: np.ndarray, batch: Batch) -> None:
    if step not in self._asked:
      self._asked[step] = self._threads.submit(self.store.take, indices, np.asarray(batch.segments))

  def forget(self) -> None:
    self._asked.clear()

  def at(self, step: int, indices: np.ndarray, batch: Batch) -> TargetOutput:
    self.ask(step, indices, batch)
    return self._decoded(place_rows(self._asked.pop(step).result()))
