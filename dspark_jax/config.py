"""Frozen dataclasses that describe models, from JSON and back. All that is wrong is collected and raised once."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import math
import re
import types
import typing
from typing import Annotated, Any

# Problems of one list, and characters of one value, of one problem and of all, that fit a sentence.
MOST, SHOWN, PROBLEM, ALL = 3, 60, 240, 450
# Of a file server, or a way to it, that does not answer now; and how TensorStore's drivers say so.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
AGAIN = r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED):|Input/output error"
PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null",
         Any: "anything"}


def raise_all(what: str, problems: list[str]) -> None:
  """One ValueError for a list of problems, the last of a long one counted alone; nothing for an empty list."""
  if problems:
    raise ValueError(f"{what}: {all_shown(problems)}")


def all_shown(problems: list[str]) -> str:
  """A list for a sentence: each one cut where it is long, and the last of many counted alone."""
  short = [problem if len(problem) <= PROBLEM else f"{problem[:PROBLEM]}..." for problem in problems]
  told = sum(total <= ALL for total in itertools.accumulate(len(problem) + 2 for problem in short)) or 1
  return "; ".join(short[:told] + ([f"and {len(short) - told} more"] if told < len(short) else []))


def shown(value) -> str:
  """A value from a file, for a sentence: on one line, printable, and cut where it is long."""
  text = repr(value)
  return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def name_shown(name: str) -> str:
  """A name from a file, for a sentence: as it is, where it is short and printable."""
  return name if name.isprintable() and len(name) <= 2 * SHOWN else shown(name)


def error_shown(error: BaseException) -> str:
  """What another library's error says, for a sentence: on one line, printable, and cut where it is long."""
  text = " ".join(str(error).split())
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:200]


def unwritten(what: str, place: object, error: Exception, remedy: str) -> OSError:
  """What to raise where another library could not write `what` into a place: with the remedy, as of a full disk; with
  EIO, which a program ends as one that may be started again for, where a store or file server does not answer now."""
  if getattr(error, "errno", None) in PASSING or re.search(AGAIN, str(error)):
    return OSError(errno.EIO, f"{what} cannot be written ({error_shown(error)})", str(place))
  return OSError(f"{what} cannot be written ({error_shown(error)}): {remedy}")


def wrong_choices(config) -> list[str]:
  """What is wrong with the fields of a dataclass that take one of a few values (`Literal`) or a number in a `Range`."""
  listed = lambda known: " or ".join(filter(None, (", ".join(map(str, known[:-1])), str(known[-1]))))
  problems = []
  for name, kind in _kinds(type(config)).items():
    value, origin, args = getattr(config, name), typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and value not in args:
      problems.append(f"{name} is {value!r}, expected {listed(args)}")
    if origin is Annotated and isinstance(args[1], Range) and not _fits(kind, value):
      problems.append(f"{name} is {shown(value)}, expected {_words(kind)}")
  return problems


def to_json(config) -> dict[str, Any]:
  """A dataclass, and those inside it, as a JSON object.

  A field that is None by default is left out while it is None: adding one changes no file, and no hash of one.
  """
  values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
  # A chain: value is its default, and that is None.
  return {field.name: _plain(value) for field, value in values.items() if not value is field.default is None}


def _plain(value):
  if dataclasses.is_dataclass(value):
    return to_json(value)
  if isinstance(value, (list, tuple)):
    return [_plain(part) for part in value]
  return {name: _plain(part) for name, part in value.items()} if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number that comes from JSON, in the type of its field: Annotated[float, Range(0, 1)]."""
  low: float
  high: float = math.inf


Count = Annotated[int, Range(1, 2 ** 31 - 1)]  # of layers, heads, tokens: what an int32 can count
Natural = Annotated[int, Range(0, 2 ** 31 - 1)]  # where there may be none


def from_json(cls, data: dict[str, Any], what: str):
  """A dataclass `cls` from a JSON object; all that is wrong in it, at any depth, is listed in one ValueError.

  Fields may be bool, int, float (finite; an int will do), str, None, Any, Literal, tuple, dict by text, unions of
  these, Annotated with a Range, and dataclasses. What a __post_init__ refuses is listed like the rest.
  """
  value, problems = _read(cls, data, "")
  raise_all(what, problems)
  return value


def read_known(cls, data: dict[str, Any]) -> tuple[Any, list[str]]:
  """(`cls` or None, what is wrong) from another program's JSON object: keys that `cls` lacks are passed over, at every
  depth, and null counts as missing."""
  return _read(cls, _known(cls, data), "")


def _known(kind, value):
  if not (dataclasses.is_dataclass(kind) and isinstance(value, dict)):
    return value
  return {name: _known(part, value[name]) for name, part in _kinds(kind).items() if value.get(name) is not None}


def _read(kind, value, path):
  """(`value` as `kind`, what is wrong with it). path: the keys that lead to it, as results[2].kind."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if dataclasses.is_dataclass(kind) and isinstance(value, dict):
    return _read_object(kind, value, path)
  if dataclasses.is_dataclass(kind) and isinstance(value, kind):  # read before, as what only the caller knows
    return value, []
  if origin in (typing.Union, types.UnionType):
    tried = [_read(option, value, path) for option in args]
    right = [found for found in tried if not found[1]]
    # Of what has the form of an option it is told what is wrong inside, not that it is no option.
    near = [found for option, found in zip(args, tried) if found != _refused(option, value, path)]
    return [*right, *near, _refused(kind, value, path)][0]
  if origin is tuple and isinstance(value, (list, tuple)):
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(kinds) == len(value):
      parts, problems = _read_parts(kind, value, path, [(f"[{i}]", *part) for i, part in enumerate(zip(kinds, value))])
      return (None if problems else tuple(parts)), problems
  if origin is dict and isinstance(value, dict):
    parts, problems = _read_parts(kind, value, path, [(f".{k}", args[1], v) for k, v in value.items()])
    return (None if problems else dict(zip(value, parts))), problems
  return (value, []) if _fits(kind, value) else _refused(kind, value, path)


def _read_object(cls, data, path):
  fields, kinds, at = {f.name: f for f in dataclasses.fields(cls)}, _kinds(cls), f"{path}." if path else ""
  required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
  read = {name: _read(kinds[name], value, f"{at}{name}") for name, value in data.items() if name in fields}
  problems = [f"unknown key {shown(at + k)}" for k in sorted(set(data) - set(fields))]
  problems += [f"key {at + k!r} is missing" for k in sorted(required - set(data))]
  problems += [problem for _, found in read.values() for problem in found]
  # Built of right values alone: of others, a __post_init__ that compares or counts would make a TypeError.
  try:
    return (None if problems else cls(**{name: value for name, (value, _) in read.items()})), problems
  except ValueError as error:  # of __post_init__
    return None, [f"{path}: {error}" if path else str(error)]


def _read_parts(kind, value, path, parts):
  """([values], problems) of a list or a dictionary: of plain values it is right or wrong as a whole."""
  read = [_read(part, v, f"{path}{name}") for name, part, v in parts]
  problems = [problem for _, found in read for problem in found]
  if problems and not any(dataclasses.is_dataclass(part) for _, part, _ in parts):
    return None, _refused(kind, value, path)[1]
  more = [f"and {len(problems) - MOST} more in {path}"] if len(problems) > MOST else []
  return [v for v, _ in read], problems[:MOST] + more


def _refused(kind, value, path):
  if not path:
    return None, [f"got {shown(value)}, expected an object with the keys {', '.join(_kinds(kind))}"]
  return None, [f"key {shown(path)} is {shown(value)}, expected {_words(kind)}"]


def _fits(kind, value):
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is typing.Annotated:
    return _fits(args[0], value) and args[1].low <= value <= args[1].high
  if origin is typing.Literal:
    return any(type(value) is type(choice) and value == choice for choice in args)  # True == 1 == 1.0
  if kind is float:
    return type(value) in (int, float) and -math.inf < value < math.inf  # json reads NaN and Infinity
  return kind is Any or type(value) is kind  # bool is an int to isinstance


def _words(kind):
  """What a field may be, for people."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is typing.Annotated:
    low, high = args[1].low, args[1].high
    if low == high:
      return str(low)
    return f"{_words(args[0])} " + (f"of at least {low}" if high == math.inf else f"in {low}..{high}")
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(_words, args))
  if origin is typing.Literal:
    return " or ".join(map(repr, args))
  if origin is tuple:
    return f"[{', '.join('...' if part is Ellipsis else _words(part) for part in args)}]"
  return PLAIN.get(kind, "an object")


@functools.cache
def _kinds(cls):
  return typing.get_type_hints(cls, include_extras=True)

