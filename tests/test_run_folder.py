"""The record of a run and its lines: what goes on after a kill, what is refused, and in which words; its one owner."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_jax.config import unwritten
from dspark_jax.drafters import DSpark
from dspark_jax.programs import hosts, run_folder
from infer import evaluate, generate
from train import answers, calibrate, compare, demo, train
from train.config import read_config
from folders import LLAMA, MASK, QWEN3, TAPS, called, complains, files, thorough_but, with_tokenizer

ROOT = Path(__file__).parents[1]

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
  assert not run_folder.is_begun(tmp_path)
  config = run_folder.plain(CONFIG | {"taps": (0, 1), "target": Path("x")})
  run_folder.write_record(tmp_path / "run", {"config": config, "data": "d1", "total_steps": 7})
  assert run_folder.is_begun(tmp_path / "run")
  now = {"program": "p", "config": config | {"new": None}, "data": "d1"}
  known = run_folder.resumed(tmp_path / "run", now)
  assert known["total_steps"] == 7 and known["config"]["target"] == "x" and known["program"] == "p"
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
  record = {"program": "p", "config": CONFIG, "data": "d1"}
  run_folder.write_record(tmp_path, record)
  before = files(tmp_path)
  new = record | ({"data": "d2"} if change == "data" else {"config": CONFIG | change})
  with complains(f"{tmp_path} holds a run with other settings (", *parts,
                 "give the same ones to go on with it, or another --out"):
    run_folder.claim(tmp_path, new)
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
  ('{"config": [], "data": "d1"}', "has no config, so"), ('{"config": {}, "data": 1}', "has no data, so"),
  ('{"program": "q", "config": {}, "data": "d1"}', "is of 'q', not of p: choose another --out"),
  ('{"program": "\\n", "config": {}}', "is of '\\n', not of p"),
  ('{"program": null}', "is of None, not of p")])
def test_damaged_or_foreign_records(text, part, tmp_path):
  """Kills: a traceback, or a run that takes over somebody else's folder."""
  (tmp_path / "run.json").write_text(text)
  with complains("run.json", part):
    run_folder.claim(tmp_path, {"program": "p", "config": CONFIG, "data": "d1"})
  assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize("name", ["rounds-greedy.jsonl", "samples/x.jsonl", "metrics.jsonl", "steps/3/x",
                                  "results.json", "drafter/drafter.json", "drafter.json"])
def test_work_without_a_record(name, lines):
  """Kills: rounds of who knows what counted as this run's; another program's work that is written over or mixed in."""
  assert not run_folder.is_begun(lines.parent)
  (lines.parent / name).parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(lines, lines.parent / name)
  with complains("but no run.json that says where from", "choose another --out, or move the old work away"):
    run_folder.claim(lines.parent, {"program": "p"})
  assert not (lines.parent / "run.json").exists()


def test_the_record_of_a_file(lines, tmp_path):
  """Kills: lines without a record that are adopted; two files of one folder that share a record."""
  with complains("new holds lines.jsonl but no lines.jsonl.run.json that says where from"):
    run_folder.claim(lines, {"program": "p"})
  lines.write_bytes(b"")
  run_folder.claim(lines, {"program": "p", "config": CONFIG})
  run_folder.claim(lines.with_name("other.jsonl"), {"program": "p", "config": CONFIG | {"seed": 1}})
  with complains("lines.jsonl holds a run with other settings (seed was 0, is 1)"):
    run_folder.claim(lines, {"program": "p", "config": CONFIG | {"seed": 1}})


@pytest.mark.parametrize("name, work", [
  ("a.jsonl", "a.jsonl"), ("a.jsonl", "a.failed.jsonl"), ("a[1].jsonl", "a[1].jsonl"), ("run", "run/rounds-x.jsonl"),
  ("run", "run/parts/1.npz"), ("run", None), ("a.jsonl", None), ("a.jsonl", "a.other.jsonl")])
def test_a_mistake_that_is_seen_late_leaves_no_record(name, work, tmp_path):
  """Kills: a corrected command that is refused for the settings of the one that was a mistake; work without a record,
  or the record of a run that was there before; another file of such a name taken for work."""
  out, seen = tmp_path / name, lambda: run_folder.record_path(tmp_path / name).exists()
  for known in (False, True):
    with pytest.raises(ValueError, match="too long"), run_folder.owned(out):
      run_folder.claim(out, {"program": "p", "config": {}})
      if work:
        (tmp_path / work).parent.mkdir(exist_ok=True)
        (tmp_path / work).write_text("{}\n")
      raise ValueError("too long")
    assert seen() == (known or work not in (None, "a.other.jsonl"))
    run_folder.write_record(out, {"program": "p", "config": {}})


def test_records_are_json(tmp_path):
  """Kills: NaN in a record, which the next reader refuses; a half-written one beside the old."""
  run_folder.write_record(tmp_path, {"config": {}})
  before = files(tmp_path)
  with pytest.raises(ValueError):
    run_folder.write_record(tmp_path, {"config": {"x": float("nan")}})
  assert files(tmp_path) == before and json.loads(before["run.json"]) == {"config": {}}


# One owner


@pytest.mark.parametrize("name", ["run", "lines.jsonl"])
def test_one_owner(name, tmp_path):
  """Kills: two runs that append to one file; a lock that stays, or a folder, when nothing was written; one that takes
  a folder along which was there."""
  out = tmp_path / "new" / name
  with pytest.raises(KeyboardInterrupt), run_folder.owned(out):
    with complains(f"{out} is in use by process ", "wait until it ends, or choose another --out"):
      with run_folder.owned(out):
        pytest.fail("two owners")
    with run_folder.owned(out.with_name("other")):
      pass
    raise KeyboardInterrupt
  assert files(tmp_path) == {} and not out.exists()
  out.parent.mkdir(exist_ok=True)
  with run_folder.owned(out):
    run_folder.write_record(out, {})
  assert list(files(out.parent)) == [str(run_folder.record_path(out).relative_to(out.parent))]


def test_a_lock_that_a_dead_host_left(monkeypatch, tmp_path):
  """Kills: a pod that is not started again, since the file server still kept the lock of the host that died."""
  monkeypatch.setattr(hosts.here, "processes", 2)
  with run_folder.owned(tmp_path), complains(f"{tmp_path} is in use by process ", error=hosts.Apart):
    with run_folder.owned(tmp_path):
      pytest.fail("two owners")


@pytest.mark.parametrize("error, code, part", [
    (OSError(errno.ESTALE, "Stale file handle", "/rows"), hosts.AGAIN, "/rows: Stale file handle: it may pass"),
    (OSError(errno.EIO, "Input/output error"), hosts.AGAIN, "a file: Input/output error: it may pass by itself"),
    (TimeoutError(errno.ETIMEDOUT, "Connection timed out", "/shared"), hosts.AGAIN, "give the same command again"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "free some space"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "check the path"), (OSError("no disk"), 2, "no disk")])
def test_what_passes_by_itself(error, code, part, capsys):
  """Kills: a file server that is restarted, taken for a mistake of the user's: a run of weeks that nobody starts again;
  a full disk that is tried again and again."""
  def main(settings):
    raise error
  main.__module__ = __name__
  _, err = called(capsys, main, generate.Settings, "--target", "t", "--drafter", "none", code=code)
  assert part in err


@pytest.mark.parametrize("said, passes", [
    (ValueError("UNAVAILABLE: Error writing \"gs://b/r/c/0\": HTTP response code: 503"), True),
    (ValueError("Error in async save: ABORTED: Error writing local file \"/r/c/0\": Stale file handle"), True),
    (ValueError("UNKNOWN: Error writing local file \"/r/c/0\": Input/output error"), True),
    (OSError(errno.ESTALE, "Stale file handle", "/r"), True),
    (ValueError("OUT_OF_RANGE: Error writing local file \"/r/c/0\": File too large"), False),
    (ValueError("RESOURCE_EXHAUSTED: Error writing local file \"/r/c/0\": No space left on device"), False),
    (OSError(errno.ENOSPC, "No space left on device", "/r"), False)])
def test_what_a_store_could_not_write(said, passes, capsys):
  """Kills: a save in a bucket's bad minute that is told to free some space; a full disk that is tried on and on."""
  def main(settings):
    raise unwritten("/r at step 7", "/r", said, "free some space")
  main.__module__ = __name__
  _, err = called(capsys, main, generate.Settings, "--target", "t", "--drafter", "none",
                  code=hosts.AGAIN if passes else 2)
  assert "/r at step 7 cannot be written" in err and ("it may pass by itself" if passes else "free some space") in err


def test_the_folder_that_one_is_in(monkeypatch, tmp_path):
  """Kills: a traceback for --out . alone."""
  monkeypatch.chdir(tmp_path)
  with run_folder.owned(Path(".")):
    run_folder.write_record(Path("."), {})
  assert list(files(tmp_path)) == ["run.json"]


def test_a_file_in_the_place_of_a_folder(lines):
  """Kills: "File exists", for a place that no run can have."""
  for out in (lines.rename(lines.with_name("taken")), lines.with_name("taken") / "run"):
    with complains(f"{lines.with_name('taken')} is a file, expected a folder or nothing: choose another --out"):
      with run_folder.owned(out):
        pass


def test_an_owner_that_is_killed(tmp_path):
  """Kills: a lock that knows its own process alone, or that a kill leaves locked for good."""
  code = ("import pathlib, sys, time\nfrom dspark_jax.programs import run_folder\n"
          "with run_folder.owned(pathlib.Path(sys.argv[1])):\n  print('held', flush=True)\n  time.sleep(99)")
  owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
  assert owner.stdout.readline() == b"held\n"
  with complains(f"{tmp_path} is in use by process {owner.pid} on "), run_folder.owned(tmp_path):
    pytest.fail("two owners")
  owner.kill()
  owner.communicate()
  with run_folder.owned(tmp_path):
    pass


def config(folder: Path, name: str, change: str) -> str:
  """The path of an experiment like configs/NAME.py, with a line that makes another `config` of it."""
  text = (ROOT / "configs" / f"{name}.py").read_text()
  (folder / f"{name}.py").write_text(f"{text}\nfrom dataclasses import replace\n{change}\n")
  return str(folder / f"{name}.py")


def demo_config(folder: Path, **changes) -> str:
  return config(folder, "demo", f"config = replace(config, **{changes!r})")


# Each would go on to load a target that does not exist.
PROGRAMS = {
  "train": lambda out, at: train.main(dataclasses.replace(read_config(demo_config(at, target="/nowhere")), data=(at,),
                                                         out=out)),
  "answers": lambda out, at: answers.main(answers.Settings("/nowhere", out)),
  "calibrate": lambda out, at: calibrate.main(calibrate.Settings("/nowhere", at, out=out)),
  "compare": lambda out, at: compare.main(compare.Settings(config(
      at, "compare", "config = replace(config, base=replace(config.base, target='/nowhere'))"), (at,), out)),
  "demo": lambda out, at: demo.main(demo.Settings(out=out, config=demo_config(at, target="/nowhere"))),
  "evaluate": lambda out, at: evaluate.main(evaluate.Settings(("/nowhere",), out))}


@pytest.mark.parametrize("name", thorough_but(["train"], ["answers", "demo"], PROGRAMS))
def test_every_program_owns_what_it_writes(name, tmp_path):
  """Kills: a program that does not ask whether its folder is in use, or asks after minutes of loading."""
  (tmp_path / "drafter.json").write_text("{}")
  out = tmp_path / "runs" / "out.jsonl"
  with run_folder.owned(out), complains(f"{out} is in use by process "):
    PROGRAMS[name](out, tmp_path)
  with complains("target /nowhere does not exist"):
    PROGRAMS[name](out, tmp_path)
  assert not (tmp_path / "runs").exists()


# What answers depend on


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
  """Two targets, and the first with another template."""
  folder = tmp_path_factory.mktemp("targets")
  with_tokenizer(LLAMA, folder / "llama"), with_tokenizer(QWEN3, folder / "qwen3")
  template = with_tokenizer(LLAMA, folder / "template") / "chat_template.jinja"
  template.write_text(template.read_text() + "{# other #}")
  (folder / "asked.jsonl").write_text('{"prompt": "w7"}\n{"prompt": "w8"}\n')
  (folder / "other.jsonl").write_text('{"prompt": "w7"}\n{"prompt": "w9"}\n')
  return folder


@pytest.fixture(scope="module")
def answered(targets):
  """The settings of a file that holds the first of two answers."""
  settings = answers.Settings(str(targets / "llama"), targets / "a.jsonl", questions=targets / "asked.jsonl", count=1,
                              batch=1, max_new_tokens=4)
  answers.main(settings)
  return settings


@pytest.mark.parametrize("change, part", [
  ({"temperature": 1.0}, "temperature was 0.0, is 1.0"), ({"top_k": 3}, "top_k was 0, is 3"),
  ({"seed": 1}, "seed was 0"), ({"max_new_tokens": 5}, "max_new_tokens was 4"),
  ({"dtype": "bfloat16"}, "dtype was float32"),
  ({"target": "qwen3"}, "(target was "), ({"target": "template"}, "(template has changed since)"),
  ({"questions": "other.jsonl"}, "(data has changed since)")])
@pytest.mark.parametrize("left", [True, False])
def test_answers_of_one_run(change, part, left, targets, answered, tmp_path):
  """Kills: answers at two temperatures, or of two targets, in one file; another file's question 1 taken for asked; an
  identity that is checked only where there are answers."""
  for name in ("a.jsonl", "a.jsonl.run.json")[not left:]:
    shutil.copy(targets / name, tmp_path)
  before = files(tmp_path)
  change = {key: type(getattr(answered, key))(targets / value) if key in ("target", "questions") else value
            for key, value in change.items()}
  with complains("a.jsonl holds a run with other settings (", part, "another --out"):
    answers.main(dataclasses.replace(answered, out=tmp_path / "a.jsonl", count=2, **change))
  assert files(tmp_path) == before


def test_answers_without_a_record(targets, answered, tmp_path):
  """Kills: answers of who knows which target that are added to; a file that train.train does not read afterwards."""
  shutil.copy(answered.out, tmp_path)
  with complains("holds a.jsonl but no a.jsonl.run.json that says where from", "another --out"):
    answers.main(dataclasses.replace(answered, out=tmp_path / "a.jsonl"))
  with complains("expected a name that ends in .jsonl"):
    answers.main(dataclasses.replace(answered, out=tmp_path / "a.json"))
  assert list(files(tmp_path)) == ["a.jsonl"]


@pytest.mark.slow
def test_the_demo_goes_on(targets, monkeypatch, tmp_path):
  """Kills: a demo that locks itself out, asks again after a kill, or takes another program's folder."""
  small = DSpark.Settings(taps=TAPS, mask_token_id=MASK, num_layers=1, block_size=3, markov_rank=4)
  settings = demo.Settings(minutes=1e-6, out=tmp_path / "demo", held_out=2, new_tokens=8, config=config(
      tmp_path, "demo", f"from dspark_jax.drafters.dspark import DSparkSettings\nconfig = replace(config, target="
      f"{str(targets / 'llama')!r}, batch=2, row_length=64, anchors=4, drafter={small!r})"))
  questions = answers.stdlib_questions()[::40]
  for program in (answers, demo):
    monkeypatch.setattr(program, "stdlib_questions", lambda: questions)
  real = train.train
  monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    demo.main(settings)
  monkeypatch.setattr(train, "train", real)
  first = demo.main(settings)
  asked = files(tmp_path / "demo")["answers.jsonl"]
  monkeypatch.setattr(demo, "compare", lambda *_: first)
  assert first["identical"] and demo.main(settings)["training"]["steps"] == first["training"]["steps"]
  assert files(tmp_path / "demo")["answers.jsonl"] == asked
  assert not {path.name for path in (tmp_path / "demo").rglob(".*lock")}
  run_folder.write_record(tmp_path / "demo", {"program": "infer.evaluate"})
  with complains("run.json is of 'infer.evaluate', not of train.train: choose another --out"):
    demo.main(settings)


def test_acceptance_of_the_demo(monkeypatch):
  """Kills: drafts behind a stop token, which nobody verified, counted as rejected; a rate of none verified."""
  out = SimpleNamespace(tokens=[7] * 8, n_accept=[4, 2], n_verify=[4, 2], n_commit=[5, 2], confidence=None)
  batch = SimpleNamespace(run=lambda: [out])
  monkeypatch.setattr(demo, "Session", lambda *_: SimpleNamespace(prepare=lambda *_, **__: [batch]))
  monkeypatch.setattr(demo, "chat", SimpleNamespace(encode_prompt=lambda *_: [7], stop_ids=lambda _: ()))
  found = lambda size: demo.compare(demo.Settings(held_out=1), None, SimpleNamespace(block_size=size), None)
  assert found(4)["acceptance"] == [1, 1, 1, 1] and found(5)["acceptance"][4] is None and found(4)["rounds"] == 2
  json.dumps(found(5))


def test_the_demo_is_of_one_device(tmp_path):
  """Kills: devices that an experiment asks for and that stay idle, without a word."""
  several = config(tmp_path, "demo", "config = replace(config, mesh=type(config.mesh)(tensor=2))")
  with complains(f"{several}: the mesh is data 1, fsdp 1, tensor 2", "runs on one device"):
    demo.main(demo.Settings(out=tmp_path / "demo", config=several))
  assert not (tmp_path / "demo").exists()
