"""The folder of a run that may be killed: run.json says what made it, finished work is appended as lines of JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dspark_jax.programs import shell
from dspark_jax.text import parsed, read_json

RECORD = "run.json"


def is_begun(folder: Path, work: str | None = None) -> bool:
  """Whether `folder` says which run it is of. ValueError when it does not but holds files of one (pattern `work`)."""
  begun = (folder / RECORD).exists()
  held = sorted(path.name for path in folder.glob(work)) if work and not begun else []
  if held:
    raise ValueError(f"{folder} holds {', '.join(held[:5])} but no {RECORD} that says where from: choose another --out")
  return begun


def read_record(folder: Path, parts: dict[str, type]) -> dict[str, Any]:
  """The record of the run in `folder`. ValueError unless it has these parts: it is damaged, or another program's."""
  known = read_json(folder / RECORD)
  missing = [name for name, kind in parts.items() if not isinstance(known.get(name), kind)]
  if missing:
    raise ValueError(f"{folder / RECORD} has no {', '.join(missing)}, so it is another program's, or damaged: choose "
                     f"another --out")
  return known


def write_record(folder: Path, record: dict[str, Any]) -> None:
  """Writes the record whole or not at all: half of one would make the folder look like somebody else's."""
  shell.write_json(folder / RECORD, record)


def merged(folder: Path, known: dict[str, Any], new: dict[str, Any], *, free=(), growing=(), shrunk=()
           ) -> dict[str, Any]:
  """`known` with the parts of `new`, if both describe the same run; else a ValueError that names all that differs.

  A part is an object of settings, an object of digests by name that may get more names (`growing`), or a digest.
  free: settings that may change, since results do not mix them. A setting that `known` does not have was None. shrunk:
  settings that are objects, of which old records held fields that nothing read.
  """
  differ, out = [], known | new
  for name, part in new.items():
    if name in growing:
      old = known[name]
      differ += [f"{name}: {key} has changed since" for key, value in part.items() if old.get(key, value) != value]
      out[name] = old | part
    elif isinstance(part, dict):
      # Only what is asked for now: a setting of an older version, gone since, is no reason to refuse its run.
      fixed = {key: value for key, value in part.items() if key not in free}
      differ += _differences({key: known[name].get(key) for key in fixed}, fixed, shrunk)
    elif known[name] != part:
      differ.append(f"{name} has changed since")
  if differ:
    raise ValueError(f"{folder} holds a run with other settings ({'; '.join(differ)}): give the same ones to go on "
                     f"with it, or another --out")
  return out


def resumed(folder: Path, record: dict[str, Any], *, shrunk=()) -> dict[str, Any]:
  """The record of the run in `folder`, which must be the one that `record` describes. shrunk: see `merged`."""
  known = read_record(folder, {name: type(part) for name, part in record.items()})
  return merged(folder, known, record, shrunk=shrunk)


def _differences(was: dict, now: dict, shrunk=(), where: str = "") -> Iterator[str]:
  """One sentence per setting, also of the settings inside settings."""
  for key in was | now:
    a, b = was.get(key), now.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      a = {name: a[name] for name in a if name in b} if key in shrunk else a
      yield from _differences(a, b, shrunk, f"{where}{key}.")
    elif a != b:
      yield f"{where}{key} was {a}, is {b}"


def plain(settings: dict[str, Any]) -> dict[str, Any]:
  """Settings as JSON gives them back, so that they can be compared: tuples are lists, paths are text."""
  return json.loads(json.dumps(settings, default=str))


def digest(*parts: bytes) -> str:
  """What tells these bytes from others."""
  return hashlib.sha256(b"".join(parts)).hexdigest()[:16]  # 64 bits: runs differ by accident, not by design


def append(path: Path, records: list[dict[str, Any]]) -> None:
  """Appends finished work, a line each. One write: of what a kill cuts, all lines but the last are whole."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path, parse: Callable[[dict], Any] = lambda record: record, *,
               remedy: str = "delete the line") -> list:
  """parse(record) for every line, [] without a file. A last line that a kill cut in the middle is cut off, in the file
  too, or the next one would be appended to its half.

  ValueError for any other line that is no object, or that `parse` refuses, with the file, the line and the remedy.
  """
  found, at = [], 0
  if not path.exists():
    return found
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b"\n"):
        os.truncate(path, at)
        break
      where = f"{path}, line {number}"
      record = parsed(line, f"{where} is damaged, it", remedy=remedy)
      try:
        found.append(parse(record))
      except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{where} is damaged ({problem}): {remedy}") from error
      at += len(line)
  return found


def forget_after(path: Path, step: int) -> None:
  """Drops the lines of steps that a kill took back and that will be run again."""
  # Whole or not at all, as the log of hours is rewritten here.
  kept = read_lines(path, lambda record: record if record["step"] <= step else None)
  if path.exists():
    shell.write(path, "".join(json.dumps(record) + "\n" for record in kept if record is not None))
