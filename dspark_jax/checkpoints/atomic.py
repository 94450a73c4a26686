"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path):
  """Yields a scratch folder beside `folder` that takes its place when the block ends without an error.

  A full disk or a kill leaves the previous folder as it was; ValueError if the place is taken by a file.
  """
  folder = Path(folder)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file, expected a folder or nothing: choose another place")
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
  scratch.mkdir()
  try:
    yield scratch
    if folder.exists():
      folder.rename(old)
    scratch.rename(folder)
  finally:
    if old.exists() and not folder.exists():
      old.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
