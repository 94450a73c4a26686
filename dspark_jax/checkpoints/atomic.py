"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def new_folder(folder: Path, ours: Callable[[Path], set[str]]):
  """Yields a scratch folder beside `folder` that takes its place when the block ends without an error.

  ours: gives the names of a folder that may be replaced, by what is in it. A full disk or a kill leaves the previous
  folder as it was, and what the kill left is swept away by the next call (of two writers at once the later one wins,
  the other one fails). ValueError as `check_place` has it. Of several processes all must call it, and get the same
  scratch folder; the first makes it and takes it into place.
  """
  folder = Path(folder).resolve()  # through links: what a link points to is replaced, not the link
  prefix = f".{folder.name}.new-"
  if jax.process_index():
    yield folder.with_name(prefix + _told(b"    ").hex())
    return
  check_place(folder, ours)  # puts back, too: of what the sweep below finds, `.old` may be the only copy
  folder.parent.mkdir(parents=True, exist_ok=True)
  old = _old(folder)
  for left in [old, *(p for p in folder.parent.iterdir() if p.name.startswith(prefix))]:
    shutil.rmtree(left, ignore_errors=True)
  # A sibling, as no rename crosses disks; its name is drawn, as another writer may be at work.
  drawn = secrets.token_bytes(4)
  scratch = folder.with_name(prefix + drawn.hex())
  scratch.mkdir()
  _told(drawn)
  try:
    yield scratch
    while True:
      # Two renames: none replaces a folder that is not empty.
      if folder.exists():
        folder.rename(old)
      try:
        scratch.rename(folder)
        break
      except OSError:
        if not (folder.exists() and scratch.exists()):
          raise
        # Else a reader has put the old one back in between: once more.
  finally:
    # First of all: where the second rename failed, `old` holds the only copy.
    put_back(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path, ours: Callable[[Path], set[str]]) -> None:
  """ValueError if the place of a `new_folder` is taken by a file, or by a folder with other things in it: they would be
  lost. To call before long work, too."""
  folder = Path(folder).resolve()
  put_back(folder)
  there = next(place for place in (folder, *folder.parents) if place.exists())
  if not there.is_dir():
    raise ValueError(f"{there} is a file, expected a folder or nothing: choose another place")
  others = sorted({p.name for p in folder.iterdir()} - ours(folder)) if there == folder else []
  if others:
    raise ValueError(f"{folder} holds {', '.join(others[:5])}, which would be lost, expected nothing, or what was "
                     f"written here before in the same format: choose another place")


def put_back(folder: Path) -> None:
  """Restores a folder that a kill caught between the two renames of `new_folder`; to do before reading."""
  folder = Path(folder).resolve()
  if not folder.exists() and _old(folder).exists():
    try:
      _old(folder).rename(folder)
    except OSError:
      if not folder.exists():
        raise
      # Else another process was faster, with this one or a new one.


def _told(drawn: bytes) -> bytes:
  """The bytes of the first process, in all of them."""
  return multihost_utils.broadcast_one_to_all(np.frombuffer(drawn, np.uint8)).astype(np.uint8).tobytes()


def _old(folder):
  return folder.with_name(f".{folder.name}.old")
