"""Rows -> the batch of any step, or of one step after another while the device computes (Grain)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from dspark_jax.data.rows import Rows, Some, row_indices
from dspark_jax.types import Batch

THREADS, AHEAD = 2, 4  # that read rows, and steps they may be ahead: threads beat processes where memory is mapped


def batch_at(rows: Rows, step: int, batch_size: int, *, seed: int) -> Batch:
  """The batch of a step, from 0: numpy arrays [batch_size,T]."""
  return rows.take(row_indices(len(rows), step, batch_size, seed=seed))


class Feed:
  """This process's part of the batches of steps start, start + 1, ...: (step, indices i64[b], Batch [b,T]) each.

  The global batch of a step is that of `batch_at`, whatever the number of processes. mine: which rows of it this
  process has, i64[b] below B (`nn.sharding.rows_here`); None: all. Threads read ahead, so that a step need not wait;
  `waited` is how many seconds it did. lengths: shorter T than that of the rows, of which a step takes the least into
  which all rows of its global batch fit; each is a shape more to compile, and pays where documents are long and leave
  rows half empty.
  """

  def __init__(self, rows: Rows | Some, batch: int, *, seed: int, start: int = 0, mine: np.ndarray | None = None,
               lengths: tuple[int, ...] = ()):
    whole = rows.manifest.row_length
    if not all(0 < length <= whole for length in lengths):
      raise ValueError(f"lengths are {lengths}, expected numbers up to {whole}, for which the rows were packed")
    import grain  # takes more than a second, and most of the library needs none
    source = Parts(rows, batch, seed, mine, (*sorted(lengths), whole))
    self.width = source.width
    data = grain.MapDataset.source(source)[start:]
    self._steps = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))
    self.waited = 0.0

  def __iter__(self) -> Iterator[tuple[int, np.ndarray, Batch]]:
    return self

  def __next__(self) -> tuple[int, np.ndarray, Batch]:
    began = time.perf_counter()
    try:
      return next(self._steps)
    finally:
      self.waited += time.perf_counter() - began

  def close(self) -> None:
    """Ends the threads."""
    self._steps.close()


class Parts:
  """The random access source behind a Feed: one process's part of the batch of any step. It can be pickled."""

  def __init__(self, rows: Rows | Some, batch: int, seed: int, mine: np.ndarray | None, lengths: tuple[int, ...]):
    self.rows, self.batch, self.seed, self.lengths = rows, batch, seed, lengths
    self.mine = slice(None) if mine is None else mine

  def __len__(self) -> int:
    return 2 ** 40  # epochs follow one another without an end

  def __getitem__(self, step: int) -> tuple[int, np.ndarray, Batch]:
    part = self.indices(step)[self.mine]
    return int(step), part, self.rows.take(part, self.width(step))

  def indices(self, step: int) -> np.ndarray:
    """Which rows the global batch has: i64[B]."""
    return row_indices(len(self.rows), step, self.batch, seed=self.seed)

  def width(self, step: int) -> int:
    """The length T of a step's rows."""
    # Of the global batch: all processes must run the same program.
    longest = self.rows.lengths(self.indices(step)).max() if len(self.lengths) > 1 else self.lengths[-1]
    return next(length for length in self.lengths if length >= longest)
