"""The hidden-state store: what a target says of packed rows, on disk or in a bucket, read by the numbers of rows.

A store is a folder, or a URL (gs://bucket/name) that TensorStore reads, of
  manifest.json    a `Manifest`; everything in it but the counts must be the training run's own
  offsets          i64[R+1], little-endian: the tokens of row r are offsets[r] .. offsets[r+1]; N in all
  hidden/          zarr3 [N,D]: the target's hidden states after its final norm, as the head reads them
  features/        zarr3 [N,F]: raw outputs of the tapped layers, before any norm, in the order of the taps
  hidden_scales/, features_scales/   zarr3 f32 [N,1], [N,taps], of int8 stores alone

Tokens are numbered through the rows: padding (segment 0, at the end of a row) is not stored. A shard of an array is one
file, c/I/0, of `shard_tokens` tokens (the last one: of the rest) in chunks of `chunk_tokens`, by zarr3's codec
sharding_indexed; chunks are raw little-endian numbers, each followed by its CRC-32C. A shard appears whole or not at
all, and is finished when it is there in every array: nothing else records progress, so parallel writers need no common
state, but must own whole shards. What is missing reads as NaN, or as -128 in int8 arrays, whose numbers are x / scale,
rounded, where scale = max |x| / 127 of what a token has from one tap (or of its hidden state).
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from dspark_jax.config import Count, Range, error_shown, from_json, raise_all, to_json, unwritten, wrong_choices
from dspark_jax.text import parsed
from dspark_jax.types import Array, TargetOutput

FORMAT = "dspark_jax hidden states 1"
NORM = "hidden after the final norm, features before any"  # as Target.encode has them
MANIFEST, OFFSETS = "manifest.json", "offsets"
SHARD, CHUNK = 2 ** 14, 2 ** 8  # tokens; of Qwen3-4B with five taps: 503 MB, 7.9 MB
Tokens = Annotated[int, Range(0, 2 ** 62)]  # or bytes: more than an int32 counts
# How TensorStore begins to speak of files that are not what was written, and of rights. Whatever else it says is of the
# way to them.
DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")
CLOSED = ("PERMISSION_DENIED", "UNAUTHENTICATED")
TRIES = 3
AGAIN = "free some space and give the same command again; finished shards are kept"
# What a run must share with the store, in words.
SHARED = {"target": "target", "target_dtype": "target_dtype", "taps": "taps", "norm": "norm convention",
          "tokenizer": "tokenizer", "template": "chat template", "rows": "rows"}


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store is of. Hashes tell one thing from another, and say nothing else."""
  target: str              # loading.target_id
  target_dtype: Literal["float32", "bfloat16"]  # in which the target ran
  taps: tuple[int, ...]
  tokenizer: str           # hash
  template: str            # hash of the chat template
  rows: str                # digest of the rows: which tokens are where
  date: str                # the day that chat templates were told
  dtype: Literal["float32", "bfloat16", "int8"]
  batch: Count             # rows that the target ran at once: in other batches their last bits may differ
  n_rows: Count            # R
  n_tokens: Tokens         # N
  width: Count             # D
  feature_width: Count     # F
  offsets: Tokens          # CRC-32 of them
  shard_tokens: Count = SHARD
  chunk_tokens: Count = CHUNK
  norm: str = NORM
  format: str = FORMAT

  def __post_init__(self):
    raise_all("hidden-state store", wrong_choices(self))
    if self.shard_tokens % self.chunk_tokens:
      raise ValueError(f"shards of {self.shard_tokens} tokens are no whole chunks of {self.chunk_tokens}: choose a "
                       f"multiple")
    if not self.taps or self.feature_width % len(self.taps):
      raise ValueError(f"{len(self.taps)} taps cannot share {self.feature_width} features: restore the manifest")

  @property
  def arrays(self) -> dict[str, tuple[int, str]]:
    """(numbers a token, dtype) of each array."""
    scales = {"hidden_scales": (1, "float32"), "features_scales": (len(self.taps), "float32")}
    return {"hidden": (self.width, self.dtype), "features": (self.feature_width, self.dtype),
            **(scales if self.dtype == "int8" else {})}

  @property
  def n_shards(self) -> int:
    return -(-self.n_tokens // self.shard_tokens)

  def bounds(self, shard: int) -> tuple[int, int]:
    """The tokens of a shard: from the first up to before the second."""
    return shard * self.shard_tokens, min((shard + 1) * self.shard_tokens, self.n_tokens)

  def file_bytes(self, name: str, shard: int) -> int:
    """Of the file of a shard of an array: chunks with their checksums, the last one filled up, and the table."""
    (width, dtype), (start, stop) = self.arrays[name], self.bounds(shard)
    chunks = -(-(stop - start) // self.chunk_tokens)
    return (chunks * (self.chunk_tokens * width * jnp.dtype(dtype).itemsize + 4)
            + self.shard_tokens // self.chunk_tokens * 16 + 4)

  @property
  def bytes_per_token(self) -> int:
    return sum(width * jnp.dtype(dtype).itemsize for width, dtype in self.arrays.values())


def encoded(output: TargetOutput, taps: int, dtype: str) -> dict[str, Array]:
  """What the target says, as the arrays of a store of `dtype` have it: [...,D], [...,F] and, for int8, scales."""
  if dtype != "int8":
    return {"hidden": output.hidden.astype(dtype), "features": output.features.astype(dtype)}
  arrays = {}
  for name, parts in (("hidden", 1), ("features", taps)):
    x = getattr(output, name).astype(jnp.float32)
    grouped = x.reshape(*x.shape[:-1], parts, -1)
    scales = jnp.abs(grouped).max(-1) / 127
    numbers = jnp.round(grouped / jnp.where(scales > 0, scales, 1)[..., None])
    arrays |= {name: numbers.reshape(x.shape).astype(jnp.int8), f"{name}_scales": scales}
  return arrays


def decoded(arrays: dict[str, Array], dtype) -> TargetOutput:
  """The opposite of `encoded`, in the target's dtype."""
  def read(name):
    x, scales = arrays[name], arrays.get(f"{name}_scales")
    if scales is None:
      return x.astype(dtype)
    grouped = x.astype(jnp.float32).reshape(*scales.shape, -1)
    return (grouped * scales[..., None]).reshape(x.shape).astype(dtype)
  return TargetOutput(read("hidden"), read("features"))


def kvstore(place: str | os.PathLike) -> dict[str, Any]:
  """TensorStore's specification of where a store lies: a path, or a URL that it knows (file://, gs://, s3://)."""
  text = os.fspath(place)
  if "://" not in text:
    return {"driver": "file", "path": f"{os.path.abspath(text)}/"}
  try:
    return ts.KvStore.Spec(text if text.endswith("/") else f"{text}/").to_json()
  except ValueError as error:
    raise ValueError(f"{text} is no place for a store ({error_shown(error)}): give a folder, or a URL like "
                     f"gs://bucket/name") from error


def is_begun(place: str | os.PathLike) -> bool:
  """Whether there is a store, complete or not."""
  return _file(_opened(kvstore(place)), MANIFEST, place) is not None


class Store:
  """A hidden-state store, complete or not. Reads, and writes of different shards, may go on at the same time."""

  def __init__(self, place: str | os.PathLike):
    """Opens what is there. ValueError when that is no store, or damaged."""
    self.place, self._files = os.fspath(place), _opened(kvstore(place))
    told = _file(self._files, MANIFEST, place)
    if told is None:
      raise ValueError(f"{self.place} holds no hidden-state store: write it with train.cache_hidden, or give another "
                       f"place")
    where = f"{self.place}/{MANIFEST}"
    found = parsed(told, where)
    if found.get("format") != FORMAT:
      raise ValueError(f"{where} has the format {str(found.get('format'))[:40]!r}, this version reads {FORMAT!r}: "
                       f"write the store with this version")
    self.manifest = from_json(Manifest, found, f"{where} is damaged, restore it")
    offsets = _file(self._files, OFFSETS, place) or b""
    if zlib.crc32(offsets) != self.manifest.offsets or len(offsets) != 8 * (self.manifest.n_rows + 1):
      raise ValueError(f"{self.place}/{OFFSETS} is not what was written: restore it, or write the store again "
                       f"elsewhere")
    self.offsets = np.frombuffer(offsets, "<i8")

  @classmethod
  def begun(cls, place: str | os.PathLike, manifest: Manifest, offsets: np.ndarray) -> Store:
    """The store of this manifest, made where there is none yet; offsets: i64[R+1]. ValueError: it is another one's."""
    data = offsets.astype("<i8").tobytes()
    files, manifest = _opened(kvstore(place)), dataclasses.replace(manifest, offsets=zlib.crc32(data))
    if not is_begun(place):
      others = [key.decode(errors="replace") for key in files.list().result()]
      # What a killed first start leaves, and what owners of a folder keep there, does no harm.
      others = [key for key in others if key != OFFSETS and not key.startswith(".")]
      if others and not is_begun(place):  # asked again: another writer may have begun it meanwhile
        raise ValueError(f"{place} holds {others[0]} but no {MANIFEST}, so it is no store: choose another place")
      if not others:
        try:  # the manifest last: whoever reads it finds the rest; writers that come here at once write the same
          files.write(OFFSETS, data).result()
          files.write(MANIFEST, json.dumps(to_json(manifest), indent=1).encode() + b"\n").result()
        except Exception as error:  # TensorStore's are those of its drivers
          raise unwritten(f"{place}", place, error, AGAIN) from error
    store = cls(place)
    names = {field.name: field.name for field in dataclasses.fields(Manifest) if field.name != "date"}
    if differ := _differences(store.manifest, to_json(manifest), names | SHARED):
      raise ValueError(f"hidden store {place} was begun with other settings ({differ}): give the same ones to go on, "
                       f"or another place")
    return store

  def check(self, wanted: dict[str, Any]) -> None:
    """ValueError that names both, unless the store has these fields of SHARED; norm is always checked."""
    if differ := _differences(self.manifest, {"norm": NORM} | wanted, SHARED):
      raise ValueError(f"hidden store {self.place} does not fit this run ({differ}): write another one with "
                       f"train.cache_hidden, or change the run")

  def missing(self) -> list[int]:
    """The shards that are not finished, ascending."""
    there = [{int(found[1]) for key in self._files.list(ts.KvStore.KeyRange(f"{name}/c/", f"{name}/c0")).result()
              if (found := re.fullmatch(rf"{name}/c/(\d+)/0", key.decode()))} for name in self.manifest.arrays]
    return sorted(set(range(self.manifest.n_shards)) - set.intersection(*there))

  def check_whole(self) -> None:
    """ValueError when shards are missing or, on a file system, have another size than was written."""
    manifest = self.manifest
    if missing := self.missing():
      raise ValueError(f"hidden store {self.place} lacks {len(missing)} of {manifest.n_shards} shards, the first is "
                       f"{missing[0]}: give its train.cache_hidden command again, which writes what is missing")
    if "path" not in (spec := self._files.spec().to_json()) or spec["driver"] != "file":
      return  # of buckets, sizes cannot be asked for without reading
    for name in manifest.arrays:
      for shard in range(manifest.n_shards):
        size = (Path(spec["path"]) / name / "c" / str(shard) / "0").stat().st_size
        if size != (wanted := manifest.file_bytes(name, shard)):
          raise self._unreadable(name, shard, f"{size} bytes, {wanted} were written")

  def take(self, indices: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of rows i64[B], padded with zeros where segments i32[B,T] are 0: [B,T,...] each, for `decoded`.

    All reads are on their way before the first is waited for. ValueError for a shard that is damaged, and for rows that
    are not the store's; OSError (EIO) for one that cannot be read now, TRIES times.
    """
    rows, length = segments.shape
    sizes = self.offsets[indices + 1] - self.offsets[indices]
    if not np.array_equal(segments > 0, np.arange(length) < sizes[:, None]):
      raise ValueError(f"rows {indices.tolist()} have {(segments > 0).sum(1).tolist()} tokens, in the hidden store "
                       f"{self.place} {sizes.tolist()}: it is of other rows, write another one with train.cache_hidden")
    out, reads, per_shard = {}, [], self.manifest.shard_tokens
    for name, (width, dtype) in self.manifest.arrays.items():
      out[name] = np.zeros((rows, length, width), jnp.dtype(dtype))
      for i, start in enumerate(self.offsets[indices].tolist()):
        stored = self._arrays[name][start:start + int(sizes[i])]
        # Into the batch itself: as an array of its own, every row would be copied once more.
        row = out[name][i, :sizes[i]]
        reads.append((name, start, row, stored, ts.array(row).write(stored)))
    for name, start, row, stored, read in reads:
      self._wait(read, lambda: ts.array(row).write(stored), name, start)
      first = row[:, 0]
      if (lost := first == _fill(row.dtype) if row.dtype == np.int8 else np.isnan(first)).any():
        raise self._unreadable(name, (start + int(lost.argmax())) // per_shard, "it is gone, or holds NaN")
    return out

  def write(self, shard: int, arrays: dict[str, np.ndarray]) -> Callable[[], None]:
    """Begins to write a whole shard, [shard_tokens,...] each (the last one: of the rest); returns what waits until it
    is finished, with an OSError when it could not be. The arrays must not change until then."""
    start, stop = self.manifest.bounds(shard)
    done = []
    for name, array in arrays.items():
      assert len(array) == stop - start, (name, len(array), start, stop)
      # In a transaction a file is written once, and so appears whole.
      transaction = ts.Transaction()
      self._arrays[name].with_transaction(transaction)[start:stop].write(array).copy.result()
      done.append(transaction.commit_async())

    def wait():
      try:
        for future in done:
          future.result()
      except Exception as error:  # TensorStore's are those of its drivers
        raise unwritten(f"shard {shard} of {self.place}", self.place, error, AGAIN) from error
    return wait

  @functools.cached_property
  def _arrays(self):
    m, base = self.manifest, kvstore(self.place)
    arrays = {}
    for name, (width, dtype) in m.arrays.items():
      raw = {"name": "bytes", "configuration": {"endian": "little"}}
      if jnp.dtype(dtype).itemsize == 1:
        raw = {"name": "bytes"}
      checked = [raw, {"name": "crc32c"}]
      table = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
      grid = {"name": "regular", "configuration": {"chunk_shape": [m.shard_tokens, width]}}
      sharding = {"name": "sharding_indexed", "configuration": {
          "chunk_shape": [m.chunk_tokens, width], "codecs": checked, "index_codecs": table, "index_location": "end"}}
      spec = {"driver": "zarr3", "kvstore": {**base, "path": f"{base['path']}{name}/"},
              # By default chunks of one value are not stored, and nobody could tell them from lost ones.
              "store_data_equal_to_fill_value": True,
              "metadata": {"shape": [m.n_tokens, width], "data_type": dtype, "chunk_grid": grid, "codecs": [sharding],
                           "fill_value": _fill(dtype)}}
      try:
        arrays[name] = ts.open(spec, open=True, create=True).result()
      except Exception as error:  # TensorStore's are those of its drivers
        raise ValueError(f"{self.place}/{name} cannot be opened ({error_shown(error)}): restore {name}/zarr.json, or "
                         f"write the store again elsewhere") from error
    return arrays

  def _wait(self, read, again, name, start):
    """Waits for a read of the tokens from `start`; see `take` for what it raises. again: begins another one."""
    for left in reversed(range(TRIES)):
      try:
        return read.result()
      except Exception as error:  # TensorStore's are those of its drivers
        kind, found = str(error).partition(":")[0], re.search(r"/c/(\d+)/0", str(error))
        shard = int(found[1]) if found else start // self.manifest.shard_tokens
        if kind in DAMAGED:
          raise self._unreadable(name, shard, re.split(r"[:/] (?=[A-Z])", str(error))[-1]) from error
        what = f"shard {shard} of {name} cannot be read ({error_shown(error)})"
        if kind in CLOSED:
          raise ValueError(f"hidden store {self.place}: {what}: get the right to it") from error
        if not left:
          raise OSError(errno.EIO, what, f"hidden store {self.place}") from error
      read = again()

  def _unreadable(self, name, shard, why):
    return ValueError(f"hidden store {self.place}: shard {shard} of {name} cannot be read ({why[:200]}): delete "
                      f"{name}/c/{shard}, and give the store's train.cache_hidden command again, which writes it")


def fill(store: Store, shards: list[int], batch: int, say: Callable[[int, int], dict[str, np.ndarray]]
         ) -> Iterator[tuple[int, int]]:
  """Writes these shards, ascending; yields (tokens said, bytes written) so far after each of its batches and shards.

  say: (first row, row after the last) -> what the target says of all their tokens, [n,...] by array. It is asked for
  rows in batches that start at multiples of `batch`: whoever writes a shard, and however often it was begun, its
  numbers come from the same computation. OSError when a shard cannot be written; those before are finished.
  """
  offsets, n_rows = store.offsets, store.manifest.n_rows
  parts, next_row, said, written = [], -1, 0, 0  # parts: (first token, arrays), without a gap
  finished = lambda: None
  try:
    for shard in shards:
      start, stop = store.manifest.bounds(shard)
      parts = [(at, part) for at, part in parts if at + len(part["hidden"]) > start]
      if not parts:
        next_row = (int(np.searchsorted(offsets, start, "right")) - 1) // batch * batch
      while offsets[next_row] < stop and next_row < n_rows:
        first, next_row = next_row, min(next_row + batch, n_rows)
        parts.append((int(offsets[first]), say(first, next_row)))
        said += int(offsets[next_row] - offsets[first])
        yield said, written
      arrays = {name: np.concatenate([part[name][max(start - at, 0):stop - at] for at, part in parts])
                for name in store.manifest.arrays}
      finished()  # one is on its way while the target runs; a second one would be as much memory again
      finished = store.write(shard, arrays)
      written += sum(store.manifest.file_bytes(name, shard) for name in arrays)
      yield said, written
  finally:
    finished()  # also when the target fails: what was begun need not be said again


def _opened(spec):
  return ts.KvStore.open(spec).result()


def _file(files, key, place):
  """The bytes of a small file, None where there is none."""
  try:
    found = files.read(key).result()
  except Exception as error:  # TensorStore's are those of its drivers
    raise ValueError(f"{place} cannot be read ({error_shown(error)}): check the place, and the rights to it") from error
  return None if found.state == "missing" else found.value


def _fill(dtype):
  return -128 if dtype == "int8" else "NaN"


def _differences(manifest, wanted, names):
  """All that differs, in words, both values each; an empty text when nothing does."""
  plain = lambda value: list(value) if isinstance(value, (list, tuple)) else value
  differ = [f"{names[name]} {plain(getattr(manifest, name))} there, {plain(value)} here"
            for name, value in wanted.items() if name in names and plain(getattr(manifest, name)) != plain(value)]
  return "; ".join(differ)
