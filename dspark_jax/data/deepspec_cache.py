"""The reference's target cache, read: what DeepSpec's scripts/data/prepare_target_cache.py writes (version 2).

A folder of manifest.json, samples.idx and shard-00000.bin, ... A sample is one conversation; its record in samples.idx
is `<QIIQQQQQ`: its number (0, 1, ...), its shard, its tokens T, and where in the shard its arrays begin, in bytes:
input ids i32[T], attention mask u8[T], loss mask u8[T], hidden states of the tapped layers bf16[T,F] (raw outputs in
the order of target_layer_ids; -1 is the embedding's), last hidden states bf16[T,D] (after the final norm). That is our
own convention, so numbers go over as they are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np

from dspark_jax.config import Count, Range, raise_all, read_known
from dspark_jax.text import read_json

RECORD = np.dtype([("sample", "<u8"), ("shard", "<u4"), ("tokens", "<u4"), ("input_ids", "<u8"),
                   ("attention_mask", "<u8"), ("loss_mask", "<u8"), ("features", "<u8"), ("hidden", "<u8")])
REMEDY = "copy the cache again, or prepare it with DeepSpec's own script"


@dataclasses.dataclass(frozen=True)
class Shard:
  shard_id: Annotated[int, Range(0)]
  file_name: str


@dataclasses.dataclass(frozen=True)
class CacheManifest:
  """What of manifest.json is read."""
  version: Literal[2]
  num_samples: Count
  target_layer_ids: tuple[int, ...]
  hidden_dtype: Literal["bfloat16"]  # its readers know float8, too; its script does not write that
  token_dtype: Literal["int32"]
  mask_dtype: Literal["uint8"]
  index_record_size: Literal[56]
  hidden_size: Count
  shards: tuple[Shard, ...]
  max_length: Count | None = None    # tokens of a sample


class Cache:
  """The samples of a folder, read when asked for. ValueError, with the folder, for one that is damaged or unknown."""

  def __init__(self, folder: str | os.PathLike):
    self.folder, self._shards = Path(folder), {}
    self.manifest, problems = read_known(CacheManifest, read_json(self.folder / "manifest.json"))
    raise_all(f"{self.folder / 'manifest.json'} is of no cache that can be read", problems)
    index = self.folder / "samples.idx"
    if not index.is_file() or index.stat().st_size != self.manifest.num_samples * RECORD.itemsize:
      raise self._damaged(f"samples.idx does not hold {self.manifest.num_samples} records of {RECORD.itemsize} bytes")
    self.index = np.memmap(index, RECORD, "r")
    if not np.array_equal(self.index["sample"], np.arange(len(self))):
      raise self._damaged("samples.idx does not number its samples 0, 1, ...")
    if not (self.index["tokens"] > 0).all() or self.index["shard"].max() >= len(self.manifest.shards):
      raise self._damaged(f"samples.idx has samples without tokens, or beyond its {len(self.manifest.shards)} shards")
    if [shard.shard_id for shard in self.manifest.shards] != list(range(len(self.manifest.shards))):
      raise self._damaged("its shards are not numbered 0, 1, ...")

  def __len__(self) -> int:
    return self.manifest.num_samples

  def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens i32[T], loss mask u8[T]) of every sample, in order. ValueError for one with tokens that were masked."""
    for sample in range(len(self)):
      if not self._array(sample, "attention_mask", "u1").all():
        raise ValueError(f"{self.folder}: sample {sample} has tokens that its attention mask hides, expected none: "
                         f"prepare the cache without padding")
      yield self._array(sample, "input_ids", "<i4"), self._array(sample, "loss_mask", "u1")

  def said(self, sample: int) -> dict[str, np.ndarray]:
    """What the target said of a sample: hidden bf16[T,D], features bf16[T,F]."""
    width, taps = self.manifest.hidden_size, len(self.manifest.target_layer_ids)
    return {"hidden": self._array(sample, "hidden", jnp.bfloat16, width),
            "features": self._array(sample, "features", jnp.bfloat16, taps * width)}

  def _array(self, sample, name, dtype, width=None):
    record, dtype = self.index[sample], np.dtype(dtype)
    shape = (int(record["tokens"]), *([width] if width else []))
    data, start, size = self._shard(int(record["shard"])), int(record[name]), int(np.prod(shape)) * dtype.itemsize
    if start + size > len(data):
      raise self._damaged(f"the {name} of sample {sample} reach beyond the end of its shard {record['shard']}")
    return np.asarray(data[start:start + size]).view(dtype).reshape(shape)

  def _shard(self, number):
    if number not in self._shards:
      name = self.manifest.shards[number].file_name
      if Path(name).name != name or not (self.folder / name).is_file():
        raise self._damaged(f"its shard {number}, {name[:40]!r}, is no file there")
      self._shards[number] = np.memmap(self.folder / name, np.uint8, "r")
    return self._shards[number]

  def _damaged(self, what):
    return ValueError(f"{self.folder} is damaged or incomplete ({what}): {REMEDY}")
