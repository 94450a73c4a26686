"""Mistakes on command lines that are seen at once, in a sentence, and results that nobody takes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dspark_jax
from dspark_jax.decoding import dispatch
from dspark_jax.decoding.engine import EngineConfig
from dspark_jax.nn.attention import Kernels
from dspark_jax.programs import run_folder, shell
from dspark_jax.text import read_json
from folders import DSPARK, QWEN3, complains, with_tokenizer
from infer import convert, device_report, evaluate, generate, head_cost, load, plots, profile_sps, serve, simulate
from train import answers, calibrate, prepare, report
from train.config import TrainConfig, read_config

PRINTS = """
import dataclasses
from dspark_jax.programs import shell
@dataclasses.dataclass
class Settings:
  pass
shell.run(lambda _: {"x": 1}, Settings, args=[])
"""


@pytest.mark.parametrize("change, part", [
  ({"seed": -1}, "seed is -1, expected 0 to 4294967295"), ({"seed": 2 ** 32}, "seed is 4294967296"),
  ({"batch": 10 ** 11}, "batch is 100000000000, expected 1 to 16,777,216"), ({"anchors": 10 ** 11}, "anchors is"),
  ({"row_length": 2 ** 31}, "row_length is"), ({"diverged_at": float("nan")}, "diverged_at is nan"),
  ({"diverged_at": 0.0}, "diverged_at is 0.0, expected more than 0")])
def test_training_settings_that_mean_nothing(change, part):
  """Kills: healthy data blamed for a limit that is no number; a mistake that shows as a traceback after loading."""
  with complains(part):
    TrainConfig("t", dspark_jax.drafters.DSpark.Settings(taps=(0,)), Path("x"), steps=1, **change)


@pytest.mark.parametrize("text, part", [("config = 1 +", "SyntaxError"), ("import nothing_of_this_name", "ModuleNot"),
                                        ("config = x", "NameError")])
def test_an_experiment_that_is_no_program(text, part, tmp_path):
  """Kills: a traceback for a slip in a file of settings."""
  (tmp_path / "c.py").write_text(text)
  with complains("c.py", part, "correct the file"):
    read_config(str(tmp_path / "c.py"))


def test_an_experiment_for_another_program(tmp_path):
  """Kills: a sentence that does not say what the file is for; a folder that "does not exist"."""
  with complains("compare.py is for train.compare, expected one for train.train", "train.config.TrainConfig"):
    read_config("configs/compare.py")
  with complains(f"{tmp_path} is a folder"):
    read_config(str(tmp_path))


@pytest.mark.parametrize("kernels, part", [(Kernels("triton"), "decode is triton, which runs on a gpu"),
                                           (Kernels("pallas"), "decode is pallas, which runs on a tpu"),
                                           (Kernels("reference", "splash"), "train is splash")])
def test_kernels_of_other_machines(kernels, part):
  """Kills: a compiler's sentence, after a model was loaded, for a kernel that this machine cannot run."""
  with complains(part, "this is a cpu"):
    shell.load_target("not there", "float32", kernels)
  shell.check_kernels(Kernels(kernels.decode, kernels.train, interpret=True))


def test_drafters_that_are_not_there(tmp_path):
  """Kills: a slip in a drafter's path that is seen once a target of many gigabytes was read."""
  (tmp_path / "rows").mkdir()
  for name, part in (("nope", "nope does not exist: expected a folder with"), ("rows", "rows is no drafter")):
    path = str(tmp_path / name)
    with complains(part, "or none"):
      shell.check_drafter(path, "none")
    for program, settings in (
        (generate, generate.Settings("t", path, prompt="a")), (serve, serve.Settings(target="t", drafter=path)),
        (evaluate, evaluate.Settings(targets=("t",), drafters=(path,), out=tmp_path / "out"))):
      with complains(part):
        program.main(settings)
  shell.check_drafter("none", "none")


@pytest.mark.parametrize("change, part", [
    (dict(prompt="w5", survival_threshold=0.5), "survival_threshold is 0.5, but there is no drafter"),
    (dict(prompt="w5", confidence_threshold=0.5), "confidence_threshold is 0.5, but there is no drafter"),
    (dict(prompts='{"prompt": "w5"}\n{"prompt": "w6", "seed": -1}'), "p.jsonl, line 2: seed is -1, expected 0 to"),
    (dict(prompts='{"prompt": "w5", "top_p": 0}'), "p.jsonl, line 1: top_p is 0"),
    (dict(prompts='{"prompt": "w5"}\n{"prompt": "w5"}', seed=2 ** 32 - 1), "line 2: seed is 4294967296"),
    (dict(prompt_tokens="[[5], []]"), "prompt 1 is empty"), (dict(prompt_tokens="[[5], [99999]]"), "vocabulary is 0.."),
    (dict(prompt_tokens="[]"), "there are no prompts"),
    (dict(prompt="w5", stop_token_ids=(-5,)), "stop_token_ids has -5"),
    (dict(prompt="w5", max_new_tokens=10 ** 5), "do not fit the target's"),
    (dict(prompt="w5", out="folder.jsonl"), "folder.jsonl is a folder, expected a file or nothing")])
def test_prompts_that_a_target_cannot_take(change, part, tmp_path, monkeypatch):
  """Kills: a mistake of prompts or their settings that is told once weights of many gigabytes are loaded, or, of --out,
  once all is decoded."""
  monkeypatch.setattr(shell, "load_target", lambda *_: pytest.fail("the target was loaded"))
  (tmp_path / "folder.jsonl").mkdir()
  for name, file in (("prompts", "p.jsonl"), ("prompt_tokens", "p.json")):
    if name in change:
      (tmp_path / file).write_text(change[name])
      change = change | {name: tmp_path / file}
  if "out" in change:
    change = change | {"out": tmp_path / change["out"]}
  with complains(part):
    generate.main(generate.Settings(str(with_tokenizer(QWEN3, tmp_path / "t")), "none", **change))


def test_texts_of_other_prompts(tmp_path, monkeypatch):
  """Kills: minutes of loading before it is said that --out holds the texts of other prompts, or of other settings; an
  older record that cannot go on."""
  settings = generate.Settings(str(QWEN3), "none", prompt_tokens=tmp_path / "p.json", max_new_tokens=2,
                               out=tmp_path / "o.jsonl")
  settings.prompt_tokens.write_text("[[5, 6]]")
  first, record = generate.main(settings), run_folder.record_path(settings.out)
  older = {name: part for name, part in read_json(record).items() if name != "prompts"}
  record.write_text(json.dumps(older))
  assert generate.main(settings)["tokens"] == first["tokens"] and "prompts" in read_json(record)
  monkeypatch.setattr(shell, "load_target", lambda *_: pytest.fail("the target was loaded"))
  with complains("logprobs was False, is True"):
    generate.main(dataclasses.replace(settings, logprobs=True))
  settings.prompt_tokens.write_text("[[5, 7]]")
  with complains("prompts has changed since"):
    generate.main(settings)


def test_converting_what_is_not_there(tmp_path, monkeypatch):
  """Kills: a slip in --source that is seen once the target was read."""
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **how: pytest.fail("the target was loaded"))
  with complains("nope does not exist: expected a folder with"):
    convert.main(convert.Settings("t", tmp_path / "out", tmp_path / "nope"))


def test_results_that_could_not_be_written(tmp_path, monkeypatch):
  """Kills: hours of measuring before it is seen that their result has no place; a table of costs in a folder of others,
  which is only read, refused."""
  for module, name in ((shell, "load_target"), (simulate, "outcomes"), (load, "of_engine"), (plots, "read"),
                       (report.run_folder, "read_record"), (serve.chat, "load_tokenizer"), (device_report, "run")):
    monkeypatch.setattr(module, name, lambda *_, **how: pytest.fail("it was begun"))
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").touch()
  below = tmp_path / "file" / "deep" / "x"
  for place, is_ in ((tmp_path / "folder", "folder is a folder, expected a file or nothing"),
                     (below, "file is a file, expected a folder or nothing")):
    for main, settings in (
        (head_cost.main, head_cost.Settings("t", place)), (profile_sps.main, profile_sps.Settings("t", out=place)),
        (serve.start_engine, serve.Settings(target="t", drafter="none", cost=place) if place is below else None)):
      if settings:
        with complains(is_):
          main(settings)
  for place in (tmp_path / "file", below):
    for main, settings in (
        (simulate.main, simulate.Settings(out=place)), (load.main, load.Settings(place, url="http://localhost:1/v1")),
        (report.main, report.Settings(tmp_path, place)), (plots.main, plots.Settings((tmp_path / "r",), place)),
        (device_report.main, device_report.Settings(out=place, allow_cpu=True))):
      with complains("file is a file, expected a folder or nothing", f"than {place}"):
        main(settings)
  monkeypatch.setattr(shell.os, "access", lambda *_: False)
  with complains("folder cannot be written: choose another path than"):
    shell.check_out(tmp_path / "folder" / "new" / "x.json")
  assert serve.read_cost(serve.Settings(target="t", drafter="none")) is None
  monkeypatch.undo()
  shell.check_out(tmp_path / "folder" / "new" / "x.json")
  shell.check_out(tmp_path / "folder", folder=True)
  shell.check_out(None)
  assert [path.name for path in tmp_path.iterdir() if path.name != "file"] == ["folder"]


def test_seats_that_no_drafter_fits(monkeypatch):
  """Kills: a capacity that leaves no room to measure in, whatever the drafter, or for a prompt, or that no text could
  fill, told once the target is loaded."""
  monkeypatch.setattr(shell, "load_target", lambda *_: pytest.fail("the target was loaded"))
  with complains("capacity is 64, expected at least 86"):
    profile_sps.main(profile_sps.Settings("t", capacity=64, chunk=64))
  for drafter, capacity, part in (("none", 10, "expected more than chunk, which is 64"), (DSPARK, 85, "at least 86"),
                                  ("none", 10 ** 6, "expected at most ")):
    with complains(f"capacity is {capacity}", part):
      serve.start_engine(serve.Settings(target=str(QWEN3), drafter=str(drafter), capacity=capacity))


def test_questions_of_nothing(tmp_path):
  """Kills: a success without an answer, whose record refuses the next questions."""
  (tmp_path / "q.jsonl").write_text("\n")
  with complains("q.jsonl holds no question"):
    answers.main(answers.Settings("not there", questions=tmp_path / "q.jsonl", out=tmp_path / "a.jsonl"))
  with complains("q.jsonl holds no question, expected at least one"):
    calibrate.read_questions(calibrate.Settings("not there", tmp_path, questions=tmp_path / "q.jsonl"))
  assert not (tmp_path / "a.jsonl.run.json").exists()


def test_a_report_of_another_run(tmp_path):
  """Kills: a remedy that names --out where the mistake is in --run."""
  run_folder.write_record(tmp_path, {"program": "infer.evaluate"})
  with complains("not of train.train: give another --run"):
    report.main(report.Settings(tmp_path))
  with complains(f"{tmp_path / 'nosuch'} is no run of train.train: give its folder"):
    report.main(report.Settings(tmp_path / "nosuch"))


LINE = {"step": 1, "loss": 2.0, "tau": None, "grad_norm": 1.0, "learning_rate": 0.1, "accept_rate": [0.5, None]}


@pytest.mark.parametrize("change, part", [
  ({"loss": "a"}, "line 2 is damaged, or of no training: it has no number as loss"), ({"step": "x"}, "as step:"),
  ({"step": None}, "as step"), ({"accept_rate": [0.5, "b"]}, "as accept_rate/2"), ("grad_norm", "as grad_norm"),
  ("config", "has a config without target, batch, row_length, drafter, so it is damaged: restore it"),
  ("kind", "has a config without a kind of drafter")])
def test_a_report_of_a_damaged_run(change, part, tmp_path):
  """Kills: a traceback, or a page of nonsense, for a line or a record that lost a part."""
  config = {"target": "t", "batch": 2, "row_length": 8, "drafter": {"kind": "dspark"}}
  config = {"config": {}, "kind": config | {"drafter": {}}}.get(change if isinstance(change, str) else "", config)
  run_folder.write_record(tmp_path, {"program": "train.train", "config": config, "total_steps": 3})
  line = {k: v for k, v in LINE.items() if k != change} | (change if isinstance(change, dict) else {})
  run_folder.append(tmp_path / "metrics.jsonl", [LINE, line])
  with complains(str(tmp_path), part):
    report.main(report.Settings(tmp_path))
  (tmp_path / "metrics.jsonl").unlink()
  if change not in ("config", "kind"):
    run_folder.append(tmp_path / "metrics.jsonl", [LINE])
    assert report.main(report.Settings(tmp_path))["steps"] == 1


def test_sizes_that_are_none(tmp_path):
  """Kills: an overflow after all data were read; hundreds of gigabytes for seats that no text could fill; a policy of
  drafts that is served without any."""
  with complains("row_length is 1099511627776, expected at most"):
    prepare.main(prepare.Settings("t", (tmp_path / "x",), tmp_path / "rows", row_length=2 ** 40))
  with complains("capacity is 1000000, expected at most 16384", "8192 positions"):
    dispatch.check(EngineConfig(capacity=10 ** 6, policy="plain"), None, None, measured=False, positions=8192)
  dispatch.check(EngineConfig(policy="plain"), None, None, measured=False, positions=512)
  with complains("seed is 4294967290, expected 0 to 4294967040 with 256 samples"):
    calibrate.check(calibrate.Settings("t", tmp_path, seed=4294967290, samples=256))
  with complains("the policy is fixed", "there is no drafter"):
    serve.main(serve.Settings(target="t", drafter="none", policy="fixed"))


@pytest.mark.parametrize("out, code, said", [("full", 2, "its result cannot be written"), ("closed", 141, "")])
def test_a_result_that_nobody_takes(out, code, said):
  """Kills: a traceback at the end of hours of work, for a full disk or a pipe into head."""
  with subprocess.Popen([sys.executable, "-c", PRINTS], stderr=subprocess.PIPE, text=True, stdout=(
      open("/dev/full", "w") if out == "full" else subprocess.PIPE), cwd=Path(dspark_jax.__file__).parents[1]) as run:
    if out == "closed":
      run.stdout.close()
    err = run.stderr.read()
  assert run.returncode == code and said in err and "Traceback" not in err, err
