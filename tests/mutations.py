"""Inputs spoiled on purpose: each function takes a generator and a good file's bytes, and says what it did."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

ODD = (  # what stands in for a value: wrong types, and numbers and texts at the edges of what a reader expects
  None, True, False, 0, 1, -1, 0.5, -0.5, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 63, 10 ** 12, 10 ** 30, -10 ** 30, 1e308,
  1e-39, float("nan"), float("inf"), -0.0, "", " ", "x", "1", "\0", "\n", "\ud800", "\udcff", "e\u0301", "日本\u2028",
  "../../x", "/dev/zero", "x" * 100_000, "{", "{{", "[]", [], [[]], [None], [0] * 5, ["x"], list(range(3000)), {},
  {"x": None}, {"": {}}, {"rope_type": "yarn"}, {"content": "x"})
TEMPLATES = ("{% if", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[9].content }}", "{{ raise_exception('no') }}",
             "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ 'x' * 10 ** 11 }}", "{{ messages.__class__.__mro__ }}",
             "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ strftime_now('%Y') }}", "",
             "{{ messages | tojson }}")


def places(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
  """Every value inside a JSON value, with the keys that lead to it."""
  yield path, value
  inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, part in inside:
    yield from places(part, (*path, key))


def put(value: Any, path: tuple, change) -> Any:
  """A copy of a JSON value after change(container, key) at the end of a path."""
  value = json.loads(json.dumps(value))
  holder = value
  for key in path[:-1]:
    holder = holder[key]
  change(holder, path[-1])
  return value


def spoil_json(rng: random.Random, data: bytes, odd: tuple = ODD) -> tuple[str, bytes]:
  """One change of a JSON file, of objects and lists: of a value, of its keys, or of its text."""
  value = json.loads(data)
  # Tables of thousands of words would take all changes: every key of the upper levels is as likely.
  found = [path for path, _ in places(value) if path]
  upper = [path for path in found if len(path) <= 2]
  path = rng.choice(upper if rng.random() < 0.5 else found)
  ways = (replaced,) * 5 + (removed, renamed, swapped, doubled, nested, enlarged)
  what, text = rng.choice(ways)(rng, value, path, odd)
  return what, text.encode(errors="surrogatepass") if rng.random() < 0.9 else text.encode("utf-16", "surrogatepass")


def replaced(rng, value, path, odd):
  new = rng.choice(odd)
  return f"{path} = {new!r:.60}", json.dumps(put(value, path, lambda x, k: x.__setitem__(k, new)))


def removed(rng, value, path, odd):
  return f"{path} is removed", json.dumps(put(value, path, lambda x, k: x.__delitem__(k)))


def renamed(rng, value, path, odd):
  def rename(x, key):
    part = x.pop(key)
    x.update({name: part}) if isinstance(x, dict) else x.append({name: part})
  name = rng.choice(("", "x", "\ud800", "é\n", "__class__", "self", str(path[-1]).upper(), "x" * 5000))
  return f"{path} is renamed {name!r:.20}", json.dumps(put(value, path, rename))


def swapped(rng, value, path, odd):
  other = rng.choice([part for _, part in places(value)])
  return f"{path} = {other!r:.60}", json.dumps(put(value, path, lambda x, k: x.__setitem__(k, other)))


def doubled(rng, value, path, odd):
  more = f"{{{json.dumps(str(path[0]))}: {json.dumps(rng.choice(odd))}, "
  return f"{more:.60} twice", json.dumps(value).replace("{", more, 1)


def nested(rng, value, path, odd):
  opening, mark, depth = rng.choice(("[", '{"a":')), "@nested@", rng.choice((200, 5000, 100_000))
  text = json.dumps(put(value, path, lambda x, k: x.__setitem__(k, mark)))
  closing = "]" if opening == "[" else "}"
  return f"{path} = {depth} x {opening}", text.replace(f'"{mark}"', opening * depth + "1" + closing * depth)


def enlarged(rng, value, path, odd):
  digits = rng.choice((50, 400, 5000))
  text = json.dumps(put(value, path, lambda x, k: x.__setitem__(k, "@digits@")))
  return f"{path} = {digits} digits", text.replace('"@digits@"', "9" * digits)


def spoil_lines(rng: random.Random, data: bytes) -> tuple[str, bytes]:
  """One change of one line of a JSONL file."""
  lines = data.splitlines()
  index = rng.randrange(len(lines))
  what, lines[index] = spoil_json(rng, lines[index])
  return f"line {index + 1}: {what}", b"\n".join(lines) + rng.choice((b"\n", b""))


def spoil_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
  """A change that knows no format: bits, numbers, a piece lost or doubled, other bytes altogether."""
  # The first bytes of a file say how to read the rest.
  at = rng.randrange(min(len(data), rng.choice((16, 300, 3000, len(data)))) or 1)
  way = rng.choice(("bit", "bit", "cut", "number", "piece", "noise", "mark", "empty", "latin"))
  out = bytearray(data)
  if way == "bit":
    out[at] ^= 1 << rng.randrange(8)
  elif way == "cut":
    del out[at:]
  elif way == "number":
    out[at:at + 8] = struct.pack("<Q", rng.choice((0, 1, 2 ** 31, 2 ** 40, 2 ** 62, 2 ** 64 - 1)))
  elif way == "piece":
    out[at:at] = data[at:at + rng.randrange(1, 200)]
  elif way == "noise":
    out[at:at + 64] = rng.randbytes(64)
  elif way == "mark":
    out[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n"))
  elif way == "latin":
    out[at:at] = "é".encode("latin-1")
  else:
    out.clear()
  return f"{way} at {at}", bytes(out)


def spoil_safetensors(rng: random.Random, data: bytes) -> tuple[str, bytes]:
  """One change of the header: its JSON, its length, or two tensors that change places."""
  size = struct.unpack("<Q", data[:8])[0]
  header, rest = data[8:8 + size], data[8 + size:]
  if rng.random() < 0.3:
    table = json.loads(header)
    a, b = rng.sample([name for name in table if name != "__metadata__"], 2)
    table[a], table[b] = table[b], table[a]
    what, header = f"{a} and {b} swapped", json.dumps(table).encode()
  else:
    odd = ODD + ("F16", "I8", "F8_E4M3", "U64", [0, 2 ** 40], [-1, 3], [2 ** 40, 2 ** 40])
    what, header = spoil_json(rng, header, odd)
  length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, len(header) - 1, 2 ** 40, 2 ** 63))
  return what, struct.pack("<Q", length) + header + rest


def spoil_names(rng: random.Random, data: bytes, *, names: list[bytes]) -> tuple[str, bytes]:
  """A name inside a binary file becomes another one, or no UTF-8, of the same length; or what follows it changes."""
  name = rng.choice([name for name in names if name in data])
  new = rng.choice((rng.choice(names)[:len(name)].ljust(len(name), b"x"), b"\xff" * len(name), b"\0" * len(name)))
  if rng.random() < 0.5:
    return f"{name!r} becomes {new!r}", data.replace(name, new, 1)
  at = data.index(name) + len(name) + rng.choice((0, 4, 8, 12))
  number = struct.pack("<Q", rng.choice((0, 1, 2, 9, 12, 255, 2 ** 31, 2 ** 40, 2 ** 64 - 1)))[:rng.choice((1, 4, 8))]
  return f"{number!r} at {at}, after {name!r}", data[:at] + number + data[at + len(number):]
