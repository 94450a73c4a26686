"""Which hidden-state store goes with which training run: what train.cache_hidden writes and train.train checks."""

from __future__ import annotations

import datetime

from dspark_jax.data import pipeline
from dspark_jax.data.features import Features, Online, Stored
from dspark_jax.data.rows import Rows
from dspark_jax.data.store import Store
from dspark_jax.loading import target_id
from dspark_jax.nn.sharding import place_rows
from dspark_jax.types import Batch, TargetOutput
from train.config import TrainConfig


def of_run(config: TrainConfig, rows: Rows, target) -> dict:
  """What a store and a run must have in common: fields of the store's manifest. """
  return {"target": target_id(target), "target_dtype": config.target_dtype, "taps": tuple(config.drafter.taps),
          "tokenizer": rows.manifest.tokenizer, "template": rows.manifest.template, "rows": rows.digest}


def features_of(config: TrainConfig, rows: Rows, target) -> Features:
  """Where a run has what the target says from. ValueError when its store is not whole, or of something else."""
  if config.features is None:
    return Online()
  store = Store(config.features)
  store.check(of_run(config, rows, target))
  store.check_whole()
  return Stored(store, config.target_dtype)


def check_early(config: TrainConfig) -> None:
  """The checks of a store that need no model, which may take minutes to load."""
  if config.features is not None:
    store = Store(config.features)
    store.check({"taps": tuple(config.drafter.taps), "target_dtype": config.target_dtype})
    store.check_whole()


def stored_dtype(config: TrainConfig) -> str | None:
  """In what the features of a run are stored; None when the target says them."""
  return None if config.features is None else Store(config.features).manifest.dtype


def stored_date(config: TrainConfig) -> datetime.date | None:
  """The day that chat templates were told when the features of a run were stored: it must be told the same."""
  return None if config.features is None else datetime.date.fromisoformat(Store(config.features).manifest.date)


def given(config: TrainConfig, rows, features: Features, step: int) -> tuple[Batch, TargetOutput | None]:
  """(the batch of a step, what the target says of it where that is known), both on the current mesh."""
  numbers = lambda step: pipeline.row_indices(len(rows), step, config.batch, seed=config.seed)
  batch = pipeline.batch_at(rows, step, config.batch, seed=config.seed)
  encoded = features.at(step, numbers(step), batch)
  if config.features is not None:  # the next ones are read while the device computes
    features.ask(step + 1, numbers(step + 1), rows.take(numbers(step + 1)))
  return place_rows(batch), encoded
