"""The record of a run and its lines: what goes on after a kill, what is refused, and in which words."""

import json
from pathlib import Path

import pytest

from dspark_jax.programs import run_folder
from folders import complains, files

RECORDS = [{"id": "1", "text": "a\u2028b"}, {"id": "2", "text": "c"}, {"id": "3", "text": "é"}]
CONFIG = {"seed": 0, "taps": [0, 1], "drafter": {"lens": False, "layers": 2}, "limit": None}


@pytest.fixture
def lines(tmp_path) -> Path:
  run_folder.append(tmp_path / "new" / "lines.jsonl", RECORDS[:2])
  run_folder.append(tmp_path / "new" / "lines.jsonl", RECORDS[2:])
  return tmp_path / "new" / "lines.jsonl"


# Lines


def test_lines_come_back(lines, tmp_path):
  """Kills: lines split at U+2028, an append that writes over, a missing file that is an error or is made."""
  assert run_folder.read_lines(lines) == RECORDS and len(lines.read_text().split("\n")) == 4
  assert run_folder.read_lines(lines, lambda record: record["id"]) == ["1", "2", "3"]
  assert run_folder.read_lines(tmp_path / "none.jsonl") == [] and not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("lost", [1, 2, 5, 20])
def test_a_torn_last_line_is_cut_off(lost, lines):
  """Kills: a kill in the middle of a write that ends the run for good, half a line that the next one is glued to, a
  whole line (its end alone is missing) kept without its end, lines before it lost."""
  lines.write_bytes(lines.read_bytes()[:-lost])
  assert run_folder.read_lines(lines) == RECORDS[:2] and lines.read_bytes().endswith(b"\n")
  run_folder.append(lines, RECORDS[2:])
  assert run_folder.read_lines(lines) == RECORDS


def test_a_file_of_one_torn_line(lines):
  """Kills: a file that a kill left without a single whole line, which then cannot be read, or is never cut."""
  lines.write_bytes(b'{"id"')
  assert run_folder.read_lines(lines) == [] and lines.read_bytes() == b""


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("line, problem", [
  (b"}{", "Expecting value"), (b"", "Expecting value"), (b"[1]", "holds a list, expected an object"),
  (b"null", "holds null"), (b"\xff\xfe", "is not UTF-8"),
  (b'{"text": "a"}', "KeyError 'id'"), (b'{"id": 3}', "its id is no text")])
def test_a_damaged_line_is_named(number, line, problem, lines):
  """Kills: a whole but broken last line taken for a torn one; a line dropped in silence; an error without its place; a
  file that was refused and is changed all the same."""
  def parse(record):
    if not isinstance(record["id"], str):
      raise ValueError("its id is no text")
  rows = lines.read_bytes().split(b"\n")
  rows[number - 1] = line
  lines.write_bytes(b"\n".join(rows) + b'{"to')
  before = lines.read_bytes()
  with complains(f"lines.jsonl, line {number} is damaged", problem, ": delete the line and wait"):
    run_folder.read_lines(lines, parse, remedy="delete the line and wait")
  assert lines.read_bytes() == before


def test_steps_taken_back_are_forgotten(tmp_path):
  """Kills: a step logged twice after a kill, the newest whole step lost with those after it, numbers that change."""
  log = tmp_path / "metrics.jsonl"
  run_folder.forget_after(log, 3)
  assert not log.exists()
  rows = [{"step": step, "loss": 0.1 + 0.2 * step, "tau": None} for step in range(1, 6)]
  run_folder.append(log, rows)
  log.write_text(log.read_text() + '{"step": 6, "lo')
  run_folder.forget_after(log, 3)
  assert run_folder.read_lines(log) == rows[:3] and [p.name for p in tmp_path.iterdir()] == [log.name]


# The record


def test_the_same_run_goes_on(tmp_path):
  """Kills: settings that JSON spells otherwise (tuples, paths) taken for others; a new setting that is off refused."""
  assert not run_folder.is_begun(tmp_path, work="*.jsonl")
  config = run_folder.plain(CONFIG | {"taps": (0, 1), "target": Path("x")})
  run_folder.write_record(tmp_path / "run", {"config": config, "data": "d1", "total_steps": 7})
  assert run_folder.is_begun(tmp_path / "run", work="*")
  now = {"config": config | {"new": None}, "data": "d1"}
  known = run_folder.resumed(tmp_path / "run", now)
  assert known["total_steps"] == 7 and known["config"]["target"] == "x"
  assert run_folder.plain(now) == now


@pytest.mark.parametrize("change, parts", [
  ({"seed": 1}, ["(seed was 0, is 1)"]), ({"limit": 3}, ["(limit was None, is 3)"]),
  ({"new": 2}, ["(new was None, is 2)"]),
  ({"taps": [0]}, ["(taps was [0, 1], is [0])"]), ({"seed": 1, "limit": 3}, ["seed was 0, is 1; limit was None, is 3"]),
  ({"drafter": {"lens": True, "layers": 2}}, ["(drafter.lens was False, is True)"]),
  ({"drafter": {"lens": False}}, ["(drafter.layers was 2, is None)"]),
  ({"drafter": None}, ["drafter was {", "is None"]),
  ("data", ["(data has changed since)"])])
def test_another_run_is_refused(change, parts, tmp_path):
  """Kills: going on with half of one experiment and half of another; a refusal that does not say what differs."""
  record = {"config": CONFIG, "data": "d1"}
  run_folder.write_record(tmp_path, record)
  before = files(tmp_path)
  new = record | {"data": "d2"} if change == "data" else {"config": CONFIG | change, "data": "d1"}
  with complains(f"{tmp_path} holds a run with other settings (", *parts,
                 "give the same ones to go on with it, or another --out"):
    run_folder.resumed(tmp_path, new)
  assert files(tmp_path) == before


def test_what_may_change_and_grow():
  """Kills: a free setting that is refused or not taken over; a name added to a growing part that is refused or lost;
  one that stands for something else now and is accepted."""
  known = {"settings": {"seed": 0, "drafters": ["a"]}, "samples": {"x": "1"}, "versions": {"jax": "1"}}
  rules = dict(free=("drafters",), growing=("samples",))
  new = {"settings": {"seed": 0, "drafters": ["b"]}, "samples": {"y": "2"}}
  assert run_folder.merged(Path("f"), known, new, **rules) == {
      "settings": {"seed": 0, "drafters": ["b"]}, "samples": {"x": "1", "y": "2"}, "versions": {"jax": "1"}}
  with complains("f holds a run with other settings (seed was 0, is 1; samples: x has changed since)"):
    run_folder.merged(Path("f"), known, {"settings": {"seed": 1}, "samples": {"x": "3"}}, **rules)


@pytest.mark.parametrize("text, part", [
  ("", "run.json is not JSON"), ('{"config": {', "run.json is not JSON"), ("[]", "expected an object"),
  ("{}", "has no config, data, so it is another program's, or damaged: choose another --out"),
  ('{"config": [], "data": "d1"}', "has no config, so"), ('{"config": {}, "data": 1}', "has no data, so")])
def test_damaged_or_foreign_records(text, part, tmp_path):
  """Kills: a traceback, or a run that takes over somebody else's folder."""
  (tmp_path / "run.json").write_text(text)
  with complains("run.json", part):
    run_folder.resumed(tmp_path, {"config": CONFIG, "data": "d1"})
  assert (tmp_path / "run.json").read_text() == text


def test_work_without_a_record(lines):
  """Kills: rounds of who knows what counted as this run's."""
  with complains("holds lines.jsonl but no run.json that says where from", "another --out"):
    run_folder.is_begun(lines.parent, work="*.jsonl")
  assert not run_folder.is_begun(lines.parent) and not run_folder.is_begun(lines.parent, work="rounds-*.jsonl")


def test_records_are_json(tmp_path):
  """Kills: NaN in a record, which the next reader refuses; a half-written one beside the old."""
  run_folder.write_record(tmp_path, {"config": {}})
  before = files(tmp_path)
  with pytest.raises(ValueError):
    run_folder.write_record(tmp_path, {"config": {"x": float("nan")}})
  assert files(tmp_path) == before and json.loads(before["run.json"]) == {"config": {}}
