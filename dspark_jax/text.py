"""Text and JSON that people and other programs wrote: read, or refused in a sentence that says where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MARK = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it


def read_text(path: str | os.PathLike) -> str:
  """The text of a UTF-8 file, whatever the locale, without a byte-order mark; ValueError when it is none."""
  return _decoded(_bytes(path), path)


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
  """The JSON value in a file, an object or another `kind`; ValueError in one sentence when there is none."""
  return parsed(_bytes(path), path, kind)


def read_jsonl(path: str | os.PathLike, *, begin: int = 0, end: int | None = None, first: int = 1
               ) -> Iterator[tuple[int, dict[str, Any]]]:
  """(number, JSON object) of every line that is not blank; ValueError, with file and line, for a line of anything else.

  The file is read as it is asked for: it may be larger than the memory. begin, end: bytes of the file between which
  lines begin, the first of them with the number `first`.
  """
  with opened(path) as file:
    file.seek(begin)
    for number, line in enumerate(file, first):  # of bytes: JSON may hold U+2028, at which text would be split, too
      if end is not None and begin >= end:
        break
      begin += len(line)
      if line.strip() not in (b"", MARK):
        yield number, parsed(line, f"{path}, line {number}")


def parsed(data: bytes, where: str | os.PathLike, kind: type = dict, remedy: str | None = None) -> Any:
  """The JSON value in UTF-8 bytes, of this kind. ValueError for everything else: `where`, what is wrong, `remedy`."""
  text, remedy = _decoded(data, where, remedy), remedy or "restore or correct it"
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{where} has brackets nested too deep to read: {remedy}") from error
  except ValueError as error:  # also of integers with more digits than Python reads
    what = f"{error.msg}, at its character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
    raise ValueError(f"{where} is not JSON ({what}): {remedy}") from error
  if not isinstance(value, kind):
    raise ValueError(f"{where} holds {NAMES[type(value)]}, expected {NAMES[kind]}: {remedy}")
  if "\\ud" in text.lower():  # an escape can write half of a character, which is no text that could be encoded again
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      half = error.object[error.start]
      raise ValueError(f"{where} has the surrogate {half!r} without its other half, which is no text: remove it, or "
                       f"write the character itself") from error
  return value


NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number",
         type(None): "null"}


def opened(path: str | os.PathLike) -> BinaryIO:
  """The file, open for reading bytes; ValueError when there is none."""
  try:
    return Path(path).open("rb")
  except FileNotFoundError as error:
    raise ValueError(f"{path} is missing: check the path, or restore the file") from error
  except IsADirectoryError as error:
    raise ValueError(f"{path} is a folder, expected a file") from error


def _bytes(path):
  with opened(path) as file:
    return file.read()


def _decoded(data, where, remedy=None):
  try:
    return data.removeprefix(MARK).decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} is not UTF-8 (byte {data[error.start]:#04x} at its place {error.start}): "
                     f"{remedy or 'convert it to UTF-8'}") from error
