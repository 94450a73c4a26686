"""What a training step is given: its batch and, where that is known, what the target says of it.

Which store goes with which run: what train.cache_hidden writes and train.train checks.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.data import pipeline
from dspark_jax.data.features import Features, Memory, Online, Stored
from dspark_jax.data.rows import Rows, Some, row_indices
from dspark_jax.data.store import Store
from dspark_jax.loading import target_id
from dspark_jax.nn.sharding import place_rows, rows_here
from dspark_jax.types import Batch, TargetOutput
from train.config import MEMORY, TrainConfig


def of_run(config: TrainConfig, rows: Rows, target, stored: str = "") -> dict:
  """What a store and a run must have in common: fields of the store's manifest. stored: the id of the target there,
  which an older version may have given it."""
  return {"target": target_id(target, stored), "target_dtype": config.target_dtype, "taps": tuple(config.drafter.taps),
          "tokenizer": rows.manifest.tokenizer, "template": rows.manifest.template,
          "rows": f"{rows.digest} {rows.layout}"}


def features_of(config: TrainConfig, rows: Rows, target) -> Features:
  """Where a run has what the target says from. ValueError when its store is not whole, or of something else, or there
  is more to keep than may be."""
  if config.features is None:
    return Online()
  if config.features == MEMORY:
    width = target.config.spec.hidden_size + target.feature_width(tuple(config.drafter.taps))
    need = rows.manifest.tokens * width * jnp.dtype(config.target_dtype).itemsize / 1e9
    if need > config.memory_gb:
      raise ValueError(f"features are kept in memory, and those of {rows.manifest.tokens:,} tokens take {need:,.3g} "
                       f"GB, expected at most {config.memory_gb:g}: give a larger --memory-gb where the host has it, "
                       f"or store them with train.cache_hidden")
    return Memory(encoder(config, target))
  store = _store(config)
  store.check(of_run(config, rows, target, store.manifest.target))
  store.check_whole()
  return Stored(store, config.target_dtype)


def encoder(config: TrainConfig, target) -> Callable[[Batch], TargetOutput]:
  """A program of its own that asks the target."""
  return functools.partial(jax.jit(lambda target, batch: target.encode(batch, tuple(config.drafter.taps))), target)


def check_early(config: TrainConfig) -> None:
  """The checks of features that need no model, which may take minutes to load."""
  if config.features == MEMORY and jax.process_count() > 1:
    raise ValueError(f"features are kept in memory, and there are {jax.process_count()} processes, expected one: every "
                     f"epoch would bring each the rows of others; store them with train.cache_hidden")
  if store := _store(config):
    store.check({"taps": tuple(config.drafter.taps), "target_dtype": config.target_dtype})
    store.check_whole()


def stored_dtype(config: TrainConfig) -> str | None:
  """In what the features of a run are stored; None when the target says them."""
  store = _store(config)
  return store and store.manifest.dtype


def stored_date(config: TrainConfig) -> datetime.date | None:
  """The day that chat templates were told when the features of a run were stored: it must be told the same."""
  store = _store(config)
  return store and datetime.date.fromisoformat(store.manifest.date)


def _store(config):
  return None if config.features in (None, MEMORY) else Store(config.features)


class Batches:
  """The batch of any step and what the target says of it, where that is known, on the mesh. Of its rows this process
  reads those of its own devices, ahead of steps that follow one another. ValueError for fewer rows than processes."""

  def __init__(self, config: TrainConfig, data: Some, features: Features):
    if (processes := jax.process_count()) > len(data):
      raise ValueError(f"there are {processes} processes for {len(data)} rows, expected at least a row for each: run "
                       f"fewer processes, or give more data")
    self.config, self.data, self.features = config, data, features
    self.waited = 0.0  # seconds that the device waited, for all batches so far
    self.done = None   # a future of the time at which it has done all that it was given; None: it waits
    self._feed = self._ahead = None

  def rows(self, step: int) -> np.ndarray:
    """Which rows of the data a step has, in all processes: i64[B]."""
    return self.data.kept[row_indices(len(self.data), step, self.config.batch, seed=self.config.seed)]

  def samples(self, step: int) -> str:
    """The same for people, with where their documents are from."""
    rows = self.rows(step)
    return ", ".join(f"{row} ({' '.join(where)})" for row, where in zip(rows, self.data.rows.samples(rows)))

  def __call__(self, step: int) -> tuple[Batch, TargetOutput | None]:
    """(batch [B,T], its features)."""
    began = time.monotonic()
    if self._ahead is None or self._ahead[0] != step:
      self._begin(step)
    _, indices, batch = self._ahead
    encoded = self.features.at(step, indices, batch)
    self._ahead = self._next()
    self.features.ask(*self._ahead)  # read while the device computes
    now = time.monotonic()
    if self.done is None or self.done.done():  # else it is still at work
      self.waited += now - max(began, self.done.result() if self.done else began)
    return place_rows(batch), encoded

  def width(self, step: int) -> int:
    """The length T of the rows of a step that it was asked for."""
    return self._feed.width(step)

  def close(self) -> None:
    """Ends the threads that read ahead."""
    if self._feed is not None:
      self._feed.close()

  def _begin(self, step):
    self.close()
    self.features.forget()  # or the batch after the last one would stay in memory
    self._feed = pipeline.Feed(self.data, self.config.batch, seed=self.config.seed, start=step,
                               mine=rows_here(self.config.batch), lengths=self.config.lengths)
    self._ahead = self._next()

  def _next(self):
    step, indices, batch = next(self._feed)
    return step, self.data.kept[indices], batch
