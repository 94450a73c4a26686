"""What a run leaves that may be killed: a record says what made it, finished work is appended as lines of JSON.

`out` is a folder, or a file of lines whose name ends in .jsonl. It has one owner at a time, and one run for good.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dspark_jax.data import chat
from dspark_jax.programs import hosts, shell
from dspark_jax.text import parsed, read_json

RECORD = "run.json"
SHOWN = 60  # characters of a setting that fit a sentence
# What the programs leave in their folders: where any of it lies without a record, nobody knows whose it is.
WORK = ("calibration.json", "drafter", "drafter.json", "metrics.jsonl", "report.md", "results.json", "rounds-*.jsonl",
        "samples/*.jsonl", "steps/*", "tensorboard/*")


def record_path(out: Path) -> Path:
  """Where the record is: in a folder, or beside a file of lines."""
  return out.with_name(f"{out.name}.{RECORD}") if out.suffix == ".jsonl" else out / RECORD


@contextlib.contextmanager
def owned(out: Path) -> Iterator[None]:
  """Keeps other runs away from `out` for as long as this block, or its process, lives.

  ValueError while another run has it, also one of this process: who calls another program's part owns its `out`, too;
  hosts.Apart in one of several processes.
  Of several processes of one run the first owns it for all. A mistake that is seen before there is any work leaves no
  record, which would refuse the corrected command.
  """
  if not hosts.first():
    yield
    return
  record = record_path(out)
  lock = record.with_name(f".{record.name}.lock")
  there = next(folder for folder in (lock.parent, *lock.parent.parents) if folder.exists())
  if not there.is_dir():
    raise ValueError(f"{there} is a file, expected a folder or nothing: choose another --out")
  made = there != lock.parent
  lock.parent.mkdir(parents=True, exist_ok=True)
  held = FileLock(lock)  # the system's, which ends with the process, however that ends
  try:
    held.acquire(blocking=False)
  except Timeout as error:
    # Where a host died, its lock may be kept by a file server for longer than a launcher takes to start all again.
    kind = hosts.Apart if hosts.here.processes > 1 else ValueError
    raise kind(f"{out} is in use by {lock.read_text() or 'another process'}: wait until it ends, or choose another "
               f"--out") from error
  begins = not record.exists()
  try:
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    yield
  except (ValueError, NotImplementedError):
    beside = _work(out) if out.suffix == ".jsonl" else set(out.iterdir()) - {record, lock}
    if begins and not beside:
      record.unlink(missing_ok=True)
    raise
  finally:
    lock.unlink(missing_ok=True)  # before it is released: who opened this file meanwhile sees that it is gone
    held.release()
    if made:
      with contextlib.suppress(OSError):
        lock.parent.rmdir()  # only when empty: a mistake that was seen before anything was written


def is_begun(out: Path) -> bool:
  """Whether there is a record of the run that `out` is of. ValueError when there is none, but a run's work."""
  if record_path(out).exists():
    return True
  if held := _work(out):
    where, names = record_path(out), ", ".join(path.name for path in held[:5])
    raise ValueError(f"{where.parent} holds {names} but no {where.name} that says where from: choose another --out, or "
                     f"move the old work away")
  return False


def _work(out):
  """What a run left beside its record: a file's lines, or those that failed, or what is in a folder."""
  if out.suffix == ".jsonl":
    return [path for path in (out, out.with_name(f"{out.stem}.failed.jsonl")) if path.is_file() and path.stat().st_size]
  return sorted(path for pattern in WORK for path in out.glob(pattern))


def claim(out: Path, record: dict[str, Any], *, newer=()) -> None:
  """Records what the work in `out` depends on. newer: see `resumed`. ValueError when that is another run's."""
  write_record(out, resumed(out, record, newer=newer) if is_begun(out) else record)


def date_of(out: Path) -> datetime.date:
  """The day that chat templates are told: that on which the run of `out` began, or today for a new one.

  With another day, its prompts might be other tokens, and it could not go on.
  """
  path = record_path(out)
  told = read_json(path).get("date") if is_begun(out) else None
  try:
    return datetime.date.today() if told is None else datetime.date.fromisoformat(told)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} has the date {str(told)[:40]!r}, expected YYYY-MM-DD: restore it, or choose another "
                     f"--out") from error


def encoding(tokenizer) -> dict[str, str]:
  """Of a record: what makes prompts of messages, beside the day."""
  return {"tokenizer": chat.fingerprint(tokenizer), "template": digest(json.dumps(tokenizer.chat_template).encode())}


def read_record(out: Path, program: str, parts: dict[str, type]) -> dict[str, Any]:
  """The record of a run of `program`. ValueError when it is another program's, or damaged: a part is missing."""
  path = record_path(out)
  known = {"program": program} | read_json(path)  # older records name none: their parts tell them apart
  if known["program"] != program:
    raise ValueError(f"{path} is of {known['program']!r:.40}, not of {program}: choose another --out")
  missing = [name for name, kind in parts.items() if not isinstance(known.get(name), kind)]
  if missing:
    raise ValueError(f"{path} has no {', '.join(missing)}, so it is another program's, or damaged: choose another "
                     f"--out")
  return known


def recorded(out: Path | None, *names: str) -> Any:
  """What the record of `out` has under these names, one inside the other; None where it has nothing or is not there."""
  found = read_json(record_path(out)) if out is not None and record_path(out).exists() else None
  for name in names:
    found = found.get(name) if isinstance(found, dict) else None
  return found


def write_record(out: Path, record: dict[str, Any]) -> None:
  """Writes the record whole or not at all: half of one would make the run look like somebody else's."""
  shell.write_json(record_path(out), record)


def merged(out: Path, known: dict[str, Any], new: dict[str, Any], *, free=(), growing=(), shrunk=(),
           remedy: str = "give the same ones to go on with it, or another --out") -> dict[str, Any]:
  """`known` with the parts of `new`, if both describe the same run; else a ValueError that names all that differs.

  A part is an object of settings, an object of digests by name that may get more names (`growing`), or a digest.
  free: settings that may change, since results do not mix them. A setting that `known` does not have was None. shrunk:
  settings that are objects, of which old records held fields that nothing read.
  """
  differ, both = [], known | new
  for name, part in new.items():
    if name in growing:
      old = known[name]
      differ += [f"{name}: {key} has changed since" for key, value in part.items() if old.get(key, value) != value]
      both[name] = old | part
    elif isinstance(part, dict):
      # Only what is asked for now: a setting of an older version, gone since, is no reason to refuse its run.
      fixed = {key: value for key, value in part.items() if key not in free}
      differ += _differences({key: known[name].get(key) for key in fixed}, fixed, shrunk)
    elif known.get(name, part) != part:
      differ.append(f"{name} has changed since")
  if differ:
    raise ValueError(f"{out} holds a run with other settings ({'; '.join(differ)}): {remedy}")
  return both


def resumed(out: Path, record: dict[str, Any], *, newer=(), **how) -> dict[str, Any]:
  """The record of the run in `out`, which must be the one that `record` describes. newer: parts that older records
  lack. how: see `merged`."""
  known = read_record(out, record["program"], {name: type(part) for name, part in record.items() if name not in newer})
  return merged(out, known, record, **how)


def _differences(was: dict, now: dict, shrunk=(), where: str = "") -> Iterator[str]:
  """One sentence per setting, also of the settings inside settings."""
  for key in was | now:
    a, b = was.get(key), now.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      a = {name: a[name] for name in a if name in b} if key in shrunk else a
      yield from _differences(a, b, shrunk, f"{where}{key}.")
    elif a != b:
      # Of a file that may be damaged: what would break the line is quoted, and cut.
      shown = (text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for x in (a, b)
               for text in [str(x) if str(x).isprintable() else repr(x)])
      yield "{}{} was {}, is {}".format(where, key, *shown)


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
