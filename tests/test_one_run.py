"""What a run is of, from its first command to its last: one day, one template, one rule of verification."""

import datetime
import json
from pathlib import Path

import pytest

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.programs import run_folder
from dspark_jax.text import read_json
from infer import evaluate, generate
from train import calibrate, survival
from folders import DSPARK, QWEN3, complains, qwen3, today, with_tokenizer

ASKED = [["w9 w10 w11", "w5"], ["w77"]]
OTHERS = "holds a run with other settings "


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
  """A target whose template says the day of the month before anything else, and what it is asked."""
  template = with_tokenizer(QWEN3, tmp_path / "target") / "chat_template.jinja"
  template.write_text("w{{ strftime_now('%d') }} " + template.read_text())
  (tmp_path / "turns.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in ASKED))
  (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": turns[0]}) + "\n" for turns in ASKED))
  target = qwen3()
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **__: target)
  return tmp_path


def change_template(folder: Path) -> None:
  template = folder / "target" / "chat_template.jinja"
  template.write_text(template.read_text() + "{# other #}")


def evaluation(folder: Path, **changes) -> evaluate.Settings:
  return evaluate.Settings(**dict(targets=(str(folder / "target"),), out=folder / "out", turns="all",
                                  datasets=(str(folder / "turns.jsonl"),)) | changes)


def test_an_evaluation_is_of_one_verification(folder):
  """Kills: samples of two rules in one file where the second command leaves --verification out; a run refused that an
  older version began, which did not name the rule."""
  begin = lambda out, rule: evaluate.open_run(evaluation(folder, out=folder / out, verification=rule), {})
  for rule, other, parts in (("block", "token", "was block, is None"), ("token", "block", "was None, is block")):
    run_folder.write_record(folder / rule, begin(rule, rule))
    with complains(f"{OTHERS}(verification {parts})"):
      begin(rule, other)
    assert begin(rule, rule)["settings"]["verification"] == (None if rule == "token" else rule)
  record = read_json(folder / "token" / "run.json")
  del record["settings"]["verification"]
  run_folder.write_record(folder / "token", record)
  begin("token", "token")


def test_an_evaluation_is_of_one_day_and_template(folder, monkeypatch):
  """Kills: drafters compared on other prompts, as they were added on another day or under another template; a run
  refused that an older version began, which recorded neither."""
  asked = []
  def decode_rows(settings, case, models, prompts, seeds):
    asked.extend(prompts)
    return [dict(text=[7], tokens=1, seconds=0.0, n_accept=[], n_verify=[], n_commit=[]) for _ in prompts]
  monkeypatch.setattr(evaluate, "decode_rows", decode_rows)
  def go_on(day, *temperatures):
    today(monkeypatch, day)
    asked.clear()
    evaluate.main(evaluation(folder, temperatures=temperatures))
    return list(asked)
  first = go_on(15, 0.0)
  wanted = chat.encode_prompt(chat.load_tokenizer(folder / "target"), [{"role": "user", "content": ASKED[0][0]}],
                              date=datetime.date(2026, 7, 15))
  assert first[0] == wanted and len(first) == 3 and {prompt[0] for prompt in first} == {15}
  assert go_on(16, 0.0, 1.0) == first
  record = folder / "out" / "run.json"
  known = read_json(record)
  old = {name: part for name, part in known.items() if name != "date"}
  record.write_text(json.dumps(old | {"models": {"target": known["models"]["target"]}}))
  assert [go_on(day, day)[0][0] for day in (16, 17)] == [16, 16]  # from here on it has a day
  change_template(folder)
  with complains(f"{OTHERS}(models: target/template has changed since)"):
    go_on(16, 4.0)


@pytest.mark.parametrize("program", [calibrate, survival])
def test_rounds_are_of_one_day_and_template(program, folder, monkeypatch):
  """Kills: rounds of two days' or two templates' prompts fitted together; a run refused that an older version began,
  which recorded neither."""
  dspark_jax.import_drafter(DSPARK, folder / "drafter", qwen3())
  record, asked = folder / "out" / "run.json", []
  def collect(settings, modes, target, drafter, prompts, stops, out):
    asked.append(prompts)
    raise KeyboardInterrupt
  monkeypatch.setattr(program, "collect", collect)
  def go_on(day):
    today(monkeypatch, day)
    with pytest.raises(KeyboardInterrupt):
      program.main(program.Settings(str(folder / "target"), folder / "drafter", questions=folder / "prompts.jsonl",
                                    out=folder / "out"))
    return asked[-1]
  first = go_on(15)
  assert go_on(16) == first and {ids[0] for _, ids in first} == {15}
  known = read_json(record)
  record.write_text(json.dumps({name: part for name, part in known.items() if name not in calibrate.NEWER}))
  assert {ids[0] for day in (16, 17) for _, ids in go_on(day)} == {16}  # from here on it has a day
  record.write_text(json.dumps(known))
  change_template(folder)
  with complains(f"{OTHERS}(template has changed since)"):
    go_on(16)


def test_texts_are_of_one_day_and_verification(folder, monkeypatch):
  """Kills: a file that refuses the same command the day after; one that goes on with the other rule where the second
  command leaves --verification out; a file refused that an older version began, which recorded neither."""
  asked = []
  def decode(settings, tokenizer, target, drafter, prompts, how, known):
    asked.append(prompts[0].tokens[0])
    return {}
  monkeypatch.setattr(generate, "decode", decode)
  def go_on(name, day, rule, **prompts):
    today(monkeypatch, day)
    prompts = prompts or {"prompts": folder / "prompts.jsonl"}
    generate.main(generate.Settings(str(folder / "target"), "none", verification=rule, out=folder / f"{name}.jsonl",
                                    **prompts))
  for name, prompts in (("token", {}), ("block", {"prompt": "w7"})):
    for day in (15, 16):
      go_on(name, day, name, **prompts)
  assert asked == [15] * 4
  with complains(f"{OTHERS}(verification was block, is None)"):
    go_on("block", 16, "token", prompt="w7")
  with complains(f"{OTHERS}(verification was None, is block)"):
    go_on("token", 16, "block")
  record = folder / "token.jsonl.run.json"
  known = read_json(record)
  assert known.pop("date") == "2026-07-15" and known["config"].pop("verification") is None
  known.pop("prompts")
  record.write_text(json.dumps(known))
  with complains(f"{OTHERS}(data has changed since)"):
    go_on("token", 16, "token")
  for day in (15, 16):  # from here on it has a day
    go_on("token", day, "token")
