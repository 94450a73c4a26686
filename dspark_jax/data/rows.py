"""Packed training rows on disk: documents, several in a row of fixed length, read by the numbers of rows.

A folder holds
  manifest.json   what the rows were made of; written last: without it there are no rows
  tokens.npy      u16[N] or i32[N]  the documents one after another, row after row, without the padding
  loss_mask.npy   bool[N]           supervised tokens
  documents.npy   i64[D+1]          where each document begins among them, and where the last one ends
  rows.npy        i64[R+1]          the first document of each row, and how many there are
  sources.npy     i32[D,2]          which of the manifest's files a document is from, and its line (0: a text)
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.config import from_json
from dspark_jax.text import read_json
from dspark_jax.types import Batch

MANIFEST, FORMAT = "manifest.json", "dspark_jax rows 1"
ARRAYS = {"tokens": ("uint16", "int32"), "loss_mask": ("bool",), "documents": ("int64",), "rows": ("int64",),
          "sources": ("int32",)}
# Not the folder: its record has the day that chat templates were told, and with another one tokens might differ.
ANEW = f"delete its {MANIFEST} and run train.prepare again"
OPEN_ROWS = 1024     # rows that packing looks at for each document
CHUNK = 2 ** 20      # tokens that are in memory at once where all are gone through


@dataclass(frozen=True)
class Manifest:
  """What rows were made of, and what they hold."""
  tokenizer: str                    # hash of what it makes of text (data.chat)
  template: str                     # hash of the chat template
  vocab_size: int                   # no token is beyond
  row_length: int                   # tokens
  thinking: bool                    # as train.config has them: prompts ask for it,
  allow_special: bool               # and control tokens that data spells are control tokens
  date: str                         # the day that chat templates were told
  files: tuple[tuple[str, int, int], ...]  # path, bytes, time of the last change (ns)
  lost: dict[str, int]              # what is in no document, by reason (conversations.Lost)
  documents: int
  rows: int
  tokens: int
  supervised: int                   # tokens of these
  digest: str                       # of tokens and loss mask of the padded rows
  format: str = FORMAT


class Documents(NamedTuple):
  """Several documents, one after another."""
  tokens: np.ndarray     # int[N]
  loss_mask: np.ndarray  # bool[N]
  sizes: np.ndarray      # i32[D]


class Rows:
  """The rows in a folder. They can be pickled, which copies none of them. ValueError for a folder that has no whole
  ones."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = Path(folder)
    path = self.folder / MANIFEST
    if not path.exists():
      raise ValueError(f"{self.folder} has no {MANIFEST}, so it holds no prepared rows: run train.prepare (again, if "
                       f"it was stopped), or give files")
    found = read_json(path)
    if found.get("format") != FORMAT:
      raise ValueError(f"{path} has the format {str(found.get('format'))[:40]!r}, expected {FORMAT!r}: {ANEW}")
    self.manifest = m = from_json(Manifest, found, str(path))
    self._arrays = _opened(self.folder)
    shapes = {"tokens": (m.tokens,), "loss_mask": (m.tokens,), "documents": (m.documents + 1,), "rows": (m.rows + 1,),
              "sources": (m.documents, 2)}
    for name, shape in shapes.items():
      if self._arrays[name].shape != shape:
        raise ValueError(f"{self.folder / name}.npy has the shape {self._arrays[name].shape}, its manifest says "
                         f"{shape}: restore it, or {ANEW}")
    if not m.supervised:
      raise ValueError(f"{self.folder} has no supervised tokens, so there is nothing to learn: give other data")

  def __reduce__(self):
    return Rows, (self.folder,)  # memory maps would be pickled as copies

  def __len__(self) -> int:
    return self.manifest.rows

  @property
  def digest(self) -> str:
    return self.manifest.digest

  @property
  def layout(self) -> str:
    """What tells where documents and rows begin: hidden states depend on that, too."""
    return layout(self.folder)

  @property
  def fill(self) -> float:
    """Share of the places that hold a token, 0..1."""
    return self.manifest.tokens / (len(self) * self.manifest.row_length)

  def take(self, indices: np.ndarray, length: int | None = None) -> Batch:
    """The rows i64[B], in this order, as numpy arrays [B,T]. T: the length that rows were packed for, or another one
    that none of these exceeds."""
    shape = (len(indices), length or self.manifest.row_length)
    batch = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, bool, np.int32, np.int32)))
    for i, begins in enumerate(map(self._begins, indices)):
      first, last = begins[0], begins[-1]
      sizes, used = np.diff(begins), slice(last - first)
      batch.tokens[i, used] = self._arrays["tokens"][first:last]
      batch.loss_mask[i, used] = self._arrays["loss_mask"][first:last]
      batch.segments[i, used] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
      batch.positions[i, used] = np.arange(last - first) - np.repeat(begins[:-1] - first, sizes)
    return batch

  def lengths(self, indices: np.ndarray) -> np.ndarray:
    """How many tokens each of these rows holds, without its padding: i64[B]."""
    return np.array([begins[-1] - begins[0] for begins in map(self._begins, indices)], np.int64)

  def samples(self, indices: np.ndarray) -> list[list[str]]:
    """Where the documents of each of these rows come from, as file:line."""
    rows, files = self._arrays["rows"], [path for path, *_ in self.manifest.files]
    return [[f"{files[file]}:{line}" if line else files[file]
             for file, line in self._arrays["sources"][rows[row]:rows[row + 1]]] for row in indices]

  def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All documents, some millions of tokens at a time: (tokens int[n], loss mask bool[n], whether a document begins
    there bool[n])."""
    begins, first = self._arrays["documents"], 0
    while first < self.manifest.documents:
      last = max(int(np.searchsorted(begins, begins[first] + CHUNK, "right")) - 1, first + 1)
      part, is_first = slice(begins[first], begins[last]), np.zeros(begins[last] - begins[first], bool)
      is_first[begins[first:last] - begins[first]] = True
      yield _read(self._arrays["tokens"], part), _read(self._arrays["loss_mask"], part), is_first
      first = last

  def _begins(self, row: int) -> np.ndarray:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    rows = self._arrays["rows"]
    return self._arrays["documents"][rows[row]:rows[row + 1] + 1]


@dataclass(frozen=True)
class Some:
  """Some of the rows of a folder, as rows of their own."""
  rows: Rows
  kept: np.ndarray  # i64[R]  their numbers there

  def __len__(self) -> int:
    return len(self.kept)

  @property
  def manifest(self) -> Manifest:
    """Of all rows."""
    return self.rows.manifest

  def take(self, indices: np.ndarray, length: int | None = None) -> Batch:
    """As `Rows.take`, of these."""
    return self.rows.take(self.kept[indices], length)

  def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """As `Rows.chunks`, of the documents of these."""
    is_kept = np.zeros(len(self.rows), bool)
    is_kept[self.kept] = True
    is_kept, done = np.repeat(is_kept, np.diff(self.rows._arrays["rows"])), 0
    for chunk in self.rows.chunks():
      document = done + np.cumsum(chunk[2]) - 1
      done = document[-1] + 1
      yield tuple(part[is_kept[document]] for part in chunk)

  def lengths(self, indices: np.ndarray) -> np.ndarray:
    """As `Rows.lengths`, of these."""
    return self.rows.lengths(self.kept[indices])


def held_out(rows: Rows, count: int, *, seed: int) -> tuple[Some, Some]:
  """(rows to train on, `count` others), drawn by the seed, each in the order of the data. ValueError: none are left."""
  if count >= len(rows):
    raise ValueError(f"{count} of {len(rows)} rows are held out, expected fewer: give more data, or smaller "
                     f"--eval-rows")
  order = np.random.default_rng((seed, len(rows), count)).permutation(len(rows))
  return Some(rows, np.sort(order[count:])), Some(rows, np.sort(order[:count]))


def row_indices(n_rows: int, step: int, batch_size: int, *, seed: int) -> np.ndarray:
  """Which rows make the batch of a step, from 0: i64[batch_size].

  A pure function, so that resuming at a step needs nothing but its number. Every epoch is a permutation of
  all rows, drawn from (seed, epoch); a batch that crosses the end of an epoch goes on in the next one's.
  """
  index = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(index, n_rows)
  rows = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    rows[epochs == epoch] = _epoch(n_rows, seed, int(epoch))[offsets[epochs == epoch]]
  return rows


@functools.lru_cache(maxsize=2)  # of a million rows it takes 20 ms, and every step asks for it
def _epoch(n_rows, seed, epoch):
  return np.random.default_rng((seed, epoch)).permutation(n_rows)


def pack(sizes: np.ndarray, length: int, open_rows: int = OPEN_ROWS) -> np.ndarray:
  """The row of each document, i64[D]: the first one that has room for it, in order, among the open ones.

  sizes: i32[D], 1..length. A row is closed when no document fits into it any more; of more than `open_rows` the
  fullest one is. So time is linear in D, and up to there this is first-fit over all rows.
  """
  if not len(sizes):
    raise ValueError("no documents to pack: every one was dropped, or the files are empty")
  if sizes.min() < 1 or sizes.max() > length:
    wrong = int(np.argmax((sizes < 1) | (sizes > length)))
    raise ValueError(f"document {wrong} has {sizes[wrong]} tokens, expected 1 to {length}: leave it out, or cut it")
  least, n_rows, n_open = int(sizes.min()), 0, 0
  # The open rows in the order in which they were opened; one place more than may stay.
  room, number = np.zeros(open_rows + 1, np.int32), np.zeros(open_rows + 1, np.int64)
  where = np.empty(len(sizes), np.int64)
  for document, size in enumerate(map(int, sizes)):
    fits = room[:n_open] >= size
    at = int(fits.argmax()) if n_open else 0
    if not n_open or not fits[at]:
      at, room[n_open], number[n_open] = n_open, length, n_rows
      n_open, n_rows = n_open + 1, n_rows + 1
    room[at] -= size
    where[document] = number[at]
    closed = at if room[at] < least else int(room[:n_open].argmin()) if n_open > open_rows else None
    if closed is not None:
      for array in (room, number):
        array[closed:n_open - 1] = array[closed + 1:n_open]
      n_open -= 1
  return where


def write(folder: Path, parts: Iterable[Documents], sizes: np.ndarray, sources: np.ndarray, about: dict[str, Any]
          ) -> Manifest:
  """Packs documents into `folder` and returns the manifest, which the caller stores there last, as MANIFEST.

  parts: the documents, read once, in order; sizes i32[D] and sources i32[D,2] of all of them. about: the fields of the
  manifest that are no counts. Takes about 60 bytes of memory a document, and what one part takes.
  """
  length = about["row_length"]
  row = pack(sizes, length)
  order = np.argsort(row, kind="stable")  # in a row documents keep their order
  begins = np.concatenate([[0], np.cumsum(sizes[order], dtype=np.int64)])
  rows = np.concatenate([[0], np.cumsum(np.bincount(row))])
  for name, array in (("documents", begins), ("rows", rows), ("sources", sources[order])):
    np.save(folder / f"{name}.npy", array)
  begin = np.empty(len(sizes), np.int64)
  begin[order] = begins[:-1]
  dtypes = {"tokens": np.uint16 if about["vocab_size"] <= 2 ** 16 else np.int32, "loss_mask": bool}
  for name, dtype in dtypes.items():
    _make(folder / f"{name}.npy", dtype, begins[-1])
  done = supervised = 0
  for part in parts:
    starts = begin[done:done + len(part.sizes)]
    # for document, start in zip(part, starts): tokens[start:start + len(document)] = document
    to = np.repeat(starts - np.cumsum(part.sizes) + part.sizes, part.sizes) + np.arange(len(part.tokens))
    for name in dtypes:
      # Mapped anew for every part: a map that stays would count as memory of the process, page by page.
      np.load(folder / f"{name}.npy", mmap_mode="r+")[to] = getattr(part, name)
    done, supervised = done + len(part.sizes), supervised + int(part.loss_mask.sum())
  counts = dict(documents=len(sizes), rows=len(rows) - 1, tokens=int(begins[-1]), supervised=supervised)
  return Manifest(**about, **counts, digest=_digest(_opened(folder), length))


def layout(folder: Path) -> str:
  """`Rows.layout` of what `write` has made, also without a manifest."""
  arrays = _opened(folder)
  begins = (np.ascontiguousarray(arrays[name]).tobytes() for name in ("documents", "rows"))
  return hashlib.sha256(b"".join(begins)).hexdigest()[:16]


def to_json(manifest: Manifest) -> dict[str, Any]:
  """What MANIFEST holds."""
  return asdict(manifest)


def _make(path, dtype, size):
  array = np.lib.format.open_memmap(path, "w+", dtype, (int(size),))
  if hasattr(os, "posix_fallocate"):  # a full disk would be met in a page of the map, which ends the process
    with path.open("r+b") as file:
      os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)


def _opened(folder):
  arrays = {}
  for name, dtypes in ARRAYS.items():
    path = folder / f"{name}.npy"
    try:
      arrays[name] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise ValueError(f"{path} cannot be read ({type(error).__name__}), though there is a manifest: restore it, or "
                       f"{ANEW}") from error
    if str(arrays[name].dtype) not in dtypes:
      raise ValueError(f"{path} holds {arrays[name].dtype}, expected {' or '.join(dtypes)}: restore it, or {ANEW}")
  return arrays


def _read(array, part):
  """A part of a mapped array, read from its file: the pages of a map count as memory of the process."""
  first, last = int(part.start), int(part.stop)
  return np.fromfile(array.filename, array.dtype, last - first, offset=array.offset + first * array.itemsize)


def _digest(arrays, length):
  """Of the padded rows, tokens and then loss mask: what tells data apart, however they are stored."""
  begins, digest = arrays["documents"][arrays["rows"]], hashlib.sha256()
  step, n_rows = max(CHUNK // length, 1), len(begins) - 1
  for name, dtype in (("tokens", np.int32), ("loss_mask", bool)):
    for first in range(0, n_rows, step):
      at = begins[first:first + step + 1]
      padded = np.zeros((len(at) - 1) * length, dtype)
      to = np.repeat(np.arange(len(at) - 1) * length - at[:-1], np.diff(at)) + np.arange(at[0], at[-1])
      padded[to] = _read(arrays[name], slice(at[0], at[-1]))
      digest.update(padded.tobytes())
  return digest.hexdigest()[:16]
