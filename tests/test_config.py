"""Dataclasses from JSON: what comes back, and what is refused at any depth with its key, what was got and expected."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import pytest

from dspark_jax.config import Range, from_json, to_json
from folders import complains


@dataclasses.dataclass(frozen=True)
class Point:
  x: int
  share: Annotated[float, Range(0, 1)] | None = None

  def __post_init__(self):
    if self.x == 13:
      raise ValueError("x is 13, expected a lucky number")


@dataclasses.dataclass(frozen=True)
class Circle:
  radius: Annotated[float, Range(0)]


@dataclasses.dataclass(frozen=True)
class Drawing:
  name: str
  kind: Literal["ink", "oil"]
  first: Point | Circle | None
  points: tuple[Point, ...]
  size: tuple[float, float]
  table: tuple[tuple[float | None, ...], ...]
  done: bool
  by_name: dict[str, Point] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] | None = None
  others: tuple[Point, ...] | None = None
  more: Any = None


DATA = dict(name="a", kind="ink", first={"x": 1}, points=[{"x": 1}, {"x": 2, "share": 0.5}], size=[1, 2.5], done=False,
            table=[[1.5, None], []], by_name={"b": {"x": 3}}, counts={"c": 1}, more=[{"d": None}])


def test_there_and_back():
  """Kills: tuples that stay lists, nested objects that stay dictionaries, numbers changed on the way, defaults lost."""
  read = from_json(Drawing, json.loads(json.dumps(DATA)), "f.json")
  assert read == Drawing("a", "ink", Point(1), (Point(1), Point(2, 0.5)), (1, 2.5), ((1.5, None), ()), False,
                         {"b": Point(3)}, {"c": 1}, None, [{"d": None}])
  assert from_json(Drawing, json.loads(json.dumps(to_json(read))), "f.json") == read
  assert to_json(read) == DATA  # so without `others`, which is None: a field added later changes no file
  assert type(read.size[0]) is int  # a file that is read and written again keeps its bytes
  assert from_json(Drawing, DATA | {"first": {"radius": 2.0}}, "f").first == Circle(2.0)
  assert from_json(Drawing, {k: v for k, v in DATA.items() if k != "by_name"}, "f").by_name == {}


@pytest.mark.parametrize("change, part", [
  ({"name": 1}, "key 'name' is 1, expected text"), ({"depth": 1}, "unknown key 'depth'"),
  ({"kind": "water"}, "key 'kind' is 'water', expected 'ink' or 'oil'"), ({"kind": None}, "key 'kind' is None"),
  ({"done": 1}, "key 'done' is 1, expected true or false"),
  ({"first": {"x": True}}, "key 'first.x' is True, expected an integer"),
  ({"first": 3}, "key 'first' is 3, expected an object or an object or null"),
  ({"first": {}}, "key 'first.x' is missing"), ({"first": {"radius": -1}}, "unknown key 'first.radius'"),
  ({"first": {"x": 13}}, "first: x is 13, expected a lucky number"),
  ({"points": {}}, "key 'points' is {}, expected [an object, ...]"),
  ({"points": [{"x": 1}, 2]}, "key 'points[1]' is 2"),
  ({"points": [{"x": 1, "share": 2}]}, "key 'points[0].share' is 2, expected a number in 0..1 or null"),
  ({"others": [{"x": 1}, {"x": "1"}]}, "key 'others[1].x' is '1', expected an integer"),
  ({"others": {}}, "key 'others' is {}, expected [an object, ...] or null"),
  ({"points": [{"x": 13}]}, "points[0]: x is 13"), ({"size": [1]}, "key 'size' is [1], expected [a number, a number]"),
  ({"size": [1, float("nan")]}, "key 'size' is [1, nan]"), ({"size": [1, float("inf")]}, "key 'size' is [1, inf]"),
  ({"size": "ab"}, "key 'size' is 'ab'"), ({"table": [[1.5, "2"]]}, "expected [[a number or null, ...], ...]"),
  ({"table": [[1.5] * 500, 3]}, "..., expected"), ({"by_name": {"b": {}}}, "key 'by_name.b.x' is missing"),
  ({"by_name": []}, "key 'by_name' is [], expected an object"),
  ({"counts": {"c": 1.5}}, "key 'counts' is {'c': 1.5}, expected")])
def test_what_is_refused(change, part):
  """Kills: a check that stops at the first level, at the first option of a union or at the type of a list; true for 1;
  NaN for a number; an error that names no key, or whose sentence is drowned in a value."""
  with complains("f.json: ", part):
    from_json(Drawing, DATA | change, "f.json")


def test_all_at_once_and_not_too_much():
  """Kills: one error per attempt; thousands of them for a list of one mistake."""
  bad = DATA | {"name": 1, "depth": 2, "first": {}, "points": [{"x": "1"}] * 1000}
  del bad["size"]
  with complains("unknown key 'depth'; key 'size' is missing; key 'name' is 1, expected text; key 'first.x' is missing",
                 "key 'points[2].x' is '1', expected an integer; and 997 more in points"):
    from_json(Drawing, bad, "f.json")
  for wrong in ([1], None, "x"):
    with complains("f.json: got ", "expected an object with the keys name, kind, first"):
      from_json(Drawing, wrong, "f.json")
