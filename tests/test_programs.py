"""The programs as their users meet them: one JSON line at the end, one sentence for a mistake, runs that go on."""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from rich.status import Status

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.programs import shell
from infer import convert, generate
from train import answers, cache_hidden, prepare
from folders import DSPARK, GOLDEN, LLAMA, QWEN3, QWEN3_CONFIG, WORDS, called, copied, files, llama, with_tokenizer

POSITIONS = QWEN3_CONFIG["max_position_embeddings"]
LIMIT = int(np.load(DSPARK / "inputs.npz")["max_new_tokens"])
ROOT = Path(dspark_jax.__file__).parents[1]
GENERATED = {"tokens", "text", "n_accept", "accepted_length", "rounds", "tokens_per_second", "compile_seconds"}
TRAINED = {"steps", "loss", "tau", "accept_rate", "tokens_per_second", "checkpoint"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Golden prompts that no stop token ended, a target with a tokenizer, and data to train on."""
  folder = tmp_path_factory.mktemp("programs")
  golden, wanted = np.load(DSPARK / "inputs.npz"), np.load(DSPARK / "outputs.npz")
  names = [key.removesuffix("/input_ids") for key in golden if key.endswith("/input_ids")]
  texts = {name: (golden[f"{name}/input_ids"][0].tolist(), wanted[f"{name}/ar_output_ids"][0].tolist())
           for name in names}
  names = [name for name, (prompt, whole) in texts.items()
           if len(whole) - len(prompt) == LIMIT and whole[-1] not in golden[f"{name}/stop_token_ids"]]
  assert names
  prompts, whole = zip(*map(texts.get, names))
  gained = [wanted[f"t0/{name}/acceptance_lengths"] for name in names]
  (folder / "rounds.json").write_text(str(sum(int(np.sum(1 + np.cumsum(g) - g < LIMIT)) for g in gained)))
  (folder / "prompts.json").write_text(json.dumps(prompts))
  (folder / "wanted.json").write_text(json.dumps([w[len(p):] for w, p in zip(whole, prompts)]))
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  rows = [{"tokens": rng.integers(5, WORDS, 40).tolist(), "loss_mask": [0] * 8 + [1] * 32} for _ in range(12)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "data.txt").write_text(" ".join(f"w{i}" for i in rng.integers(5, WORDS, 100)))
  return folder


def read(path: Path):
  return json.loads(path.read_text())


def spawn(*args):
  """A program in a process of its own."""
  return subprocess.Popen([sys.executable, "-m", *map(str, args)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"})


# infer.generate


@pytest.mark.slow
def test_generate_as_a_process(folder):
  """Kills: a result mixed with progress on stdout; a missing key; other tokens than plain greedy decoding's."""
  run = spawn("infer.generate", "--target", QWEN3, "--drafter", DSPARK, "--prompt-tokens",
              folder / "prompts.json", "--max-new-tokens", LIMIT)
  out, err = run.communicate()
  assert run.returncode == 0, err
  assert len(out.splitlines()) == 1
  result = json.loads(out)
  assert set(result) == GENERATED
  assert result["tokens"] == read(folder / "wanted.json") and result["text"] is None
  assert result["rounds"] == sum(map(len, result["n_accept"]))
  assert result["accepted_length"] == pytest.approx((sum(map(len, result["tokens"])) - len(result["tokens"]))
                                                    / result["rounds"])
  assert result["rounds"] == read(folder / "rounds.json")
  assert result["tokens_per_second"] > 0 and result["compile_seconds"] > 0


@pytest.mark.slow
def test_generate_without_a_drafter(folder, capsys):
  """Kills: a plain path that needs a drafter, or that counts its rounds in another way; batches that mix up prompts."""
  common = ("--target", QWEN3, "--drafter", "none", "--prompt-tokens", folder / "prompts.json",
            "--max-new-tokens", LIMIT)
  result, _ = called(capsys, generate.main, generate.Settings, *common)
  split, _ = called(capsys, generate.main, generate.Settings, *common, "--budget-gb", 1e-9)  # a batch for each prompt
  assert split["tokens"] == result["tokens"]
  assert set(result) == GENERATED and result["tokens"] == read(folder / "wanted.json")
  # The prompt pass brings the first token.
  assert result["accepted_length"] == 1 and result["rounds"] == len(result["tokens"]) * (LIMIT - 1)


@pytest.mark.slow
def test_generate_llama_and_nothing_to_do(folder, capsys):
  """Kills: NaN in the JSON, which is no JSON, when not a single round was run."""
  prompts = [[7, 5, 9], [6]]
  (folder / "short.json").write_text(json.dumps(prompts))
  result, _ = called(capsys, generate.main, generate.Settings, "--target", LLAMA, "--drafter", "none",
                     "--prompt-tokens", folder / "short.json", "--max-new-tokens", 1)
  assert result["accepted_length"] is None and result["rounds"] == 0 and [len(t) for t in result["tokens"]] == [1, 1]


def test_generate_text(folder, capsys):
  """Kills: a template left out, text that is not what the tokens say, a stop token that is not the template's; a
  compilation that is called generating."""
  (folder / "prompts.jsonl").write_text('{"prompt": "w7 w9"}\n\n{"messages": [{"role": "user", "content": "w5"}]}\n')
  common = ("--target", folder / "target", "--drafter", "none", "--max-new-tokens", 4)
  result, err = called(capsys, generate.main, generate.Settings, *common, "--prompts", folder / "prompts.jsonl")
  assert [line.split(",")[0] for line in err.splitlines()[-3:]] == [
      "compiling: 0 of 2", "generating: 0 of 2", "generating: 2 of 2"]
  tokenizer = chat.load_tokenizer(folder / "target")
  prompts = [tokenizer(f"<|im_start|> user {t} <|im_end|> <|im_start|> assistant")["input_ids"]
             for t in ("w7 w9", "w5")]
  assert prompts[0] == [1, 3, 7, 9, 2, 1, 4]
  wanted = dspark_jax.generate(llama(), None, prompts, max_new_tokens=4, stop_token_ids=(2,)).tokens
  assert result["tokens"] == wanted
  assert result["text"] == [tokenizer.decode(t, skip_special_tokens=True) for t in wanted]


MISTAKES = [
  ("--target", "/nowhere", "target /nowhere does not exist"),
  ("--drafter", "/nowhere", "/nowhere does not exist: expected a folder with drafter.json"),
  ("--drafter", GOLDEN / "drafter_dspark_qwen3_vanilla", "this drafter was made for another target"),
  ("--prompt-tokens", "/nowhere.json", "/nowhere.json is missing"),
  ("--prompt-tokens", "[[1], []]", "prompt 1 is empty"),
  ("--prompt-tokens", "[1, 2]", "not a list of lists of token ids"),
  ("--prompt-tokens", "{}", "expected a list"),
  ("--prompt-tokens", "[[1.5]]", "not a list of lists of token ids"),
  ("--prompt-tokens", f"[[{QWEN3_CONFIG['vocab_size']}]]",
   f"the target's vocabulary is 0..{QWEN3_CONFIG['vocab_size'] - 1}"),
  ("--prompt-tokens", "[[1", "is not JSON"),
  ("--prompt", "w5", "exactly one of --prompt, --prompts and --prompt-tokens"),
  ("--max-new-tokens", str(POSITIONS), f"do not fit the target's {POSITIONS} positions"),
  ("--max-new-tokens", "many", "invalid"),
  ("--dtype", "float16", "invalid choice 'float16'"),
  ("--temperature", "-1", "temperature"),
  ("--speed", "11", "--speed")]


@pytest.mark.parametrize("flag, value, part", MISTAKES)
def test_generate_mistakes(flag, value, part, folder, capsys, tmp_path):
  """Kills: a traceback for a typo; a mistake found after minutes of loading; exit code 0 or 1 for it."""
  args = {"--target": QWEN3, "--drafter": "none", "--prompt-tokens": folder / "prompts.json"}
  if flag == "--prompt-tokens" and not str(value).startswith("/"):
    (tmp_path / "p.json").write_text(value)
    value = tmp_path / "p.json"
  _, err = called(capsys, generate.main, generate.Settings, *sum((args | {flag: value}).items(), ()), code=2)
  assert part in err
  if flag not in ("--speed", "--dtype") and value != "many":  # tyro draws a box
    assert err.strip().splitlines()[-1].startswith("error: ") and err.count("error: ") == 1


@pytest.mark.parametrize("line, part", [("{", "line 2 is not JSON"), ("[]", "line 2 holds a list, expected an object"),
                                        ('{"prompt": " "}', "line 2 has no prompt"), ('{"messages": []}', "line 2"),
                                        ('{"messages": [{"content": "w5"}]}', "line 2 has no prompt"),
                                        ('{"messages": ["w5"]}', "line 2"),
                                        ('{"messages": {"role": "user"}}', "line 2")])
def test_prompt_files(line, part, folder, capsys, tmp_path):
  """Kills: a prompt of nothing, or a role of None, quietly decoded; an error that does not say which line."""
  (tmp_path / "p.jsonl").write_text('{"prompt": "w5"}\n' + line + "\n")
  _, err = called(capsys, generate.main, generate.Settings, "--target", folder / "target", "--drafter", "none",
                  "--prompts", tmp_path / "p.jsonl", code=2)
  assert part in err


def test_no_tokenizer(capsys):
  """Kills: advice to look on the hub for a folder that merely lacks tokenizer.json."""
  _, err = called(capsys, generate.main, generate.Settings, "--target", QWEN3, "--drafter", "none", "--prompt", "hi",
                  code=2)
  assert "has no tokenizer.json: put the model's there, or give prompts as token ids" in err


def test_mistake_as_a_process():
  """Kills: an exit code or a traceback that only the real process has."""
  run = spawn("infer.generate", "--target", QWEN3, "--drafter", "none", "--prompt-tokens", "/nowhere.json")
  out, err = run.communicate()
  assert run.returncode == 2 and out == ""
  assert [line for line in err.splitlines() if line] == ["error: /nowhere.json is missing: check the path, or restore "
                                                       "the file"]


# infer.convert


def test_convert_asks_for_the_place_first(capsys, monkeypatch, tmp_path):
  """Kills: minutes of loading before a destination is refused."""
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **__: pytest.fail("loaded"))
  monkeypatch.setattr(dspark_jax, "import_target", lambda *_, **__: pytest.fail("loaded"))
  (tmp_path / "file").write_text("")
  for destination, said in ((tmp_path, "holds file, which would be lost"), (tmp_path / "file", "file is a file"),
                            (tmp_path / "file" / "d", "file is a file")):
    for source in (("--source", DSPARK), ("--source", DSPARK, "--to", "deepspec"), ()):
      _, err = called(capsys, convert.main, convert.Settings, *source, "--target", QWEN3, "--destination", destination,
                      code=2)
      assert said in err


def test_paths_are_no_urls(capsys, tmp_path):
  """Kills: gs://b/d that becomes the folder gs:/b/d, missing or written."""
  for place in ("gs://b/d", "s3://b/d"):
    _, err = called(capsys, convert.main, convert.Settings, "--target", QWEN3, "--destination", place, code=2)
    assert f"destination is {place}, expected a path" in err and "train.cache_hidden" in err
    _, err = called(capsys, prepare.main, prepare.Settings, "--target", QWEN3, "--data", "x", place, "--out", tmp_path,
                    code=2)
    assert f"data is {place}, expected a path" in err
  (tmp_path / "text.jsonl").touch()
  cached = ("--target", QWEN3, "--taps", 1, "--row-length", 48, "--data", tmp_path / "text.jsonl", "--out",
            "gs://bucket/d")
  _, err = called(capsys, cache_hidden.main, cache_hidden.Settings, *cached, code=2)
  assert "data are files, expected a folder of train.prepare" in err  # but a store may be there


def test_convert(capsys, tmp_path):
  """Kills: a program that converts in one direction only, or reports another place than it wrote."""
  result, _ = called(capsys, convert.main, convert.Settings, "--source", DSPARK, "--destination", tmp_path / "ours",
                     "--target", QWEN3)
  assert result == {"source": str(DSPARK), "destination": str(tmp_path / "ours"), "format": "orbax"}
  result, _ = called(capsys, convert.main, convert.Settings, "--source", tmp_path / "ours", "--destination",
                     tmp_path / "out", "--target", QWEN3, "--to", "deepspec")
  assert set(result) == {"source", "destination", "format"} and result["format"] == "deepspec"
  golden = files(DSPARK)
  assert files(tmp_path / "out") == {name: golden[name] for name in ("config.json", "model.safetensors")}
  _, err = called(capsys, convert.main, convert.Settings, "--source", tmp_path / "nothing", "--destination",
                  tmp_path / "out", "--target", QWEN3, "--to", "deepspec", code=2)
  assert "nothing does not exist" in err and files(tmp_path / "out")
  _, err = called(capsys, convert.main, convert.Settings, "--source", DSPARK, "--destination", tmp_path,
                  "--target", QWEN3, code=2)
  assert "which would be lost" in err


def test_convert_replaces_no_source(capsys, tmp_path):
  """Kills: a target exported over by its own drafter; a folder that is converted to another dtype, or to another
  format, onto itself: the numbers before are gone."""
  dspark_jax.import_target(QWEN3, tmp_path / "target")
  for source in (QWEN3, DSPARK):
    copied(source, tmp_path / source.name)
  theirs, drafter, target = tmp_path / QWEN3.name, tmp_path / DSPARK.name, tmp_path / "target"
  for args, part in (
      (["--target", theirs, "--source", drafter, "--to", "deepspec", "--destination", theirs], "which would be lost"),
      (["--target", target, "--target-dtype", "bfloat16", "--destination", target], "holds the target itself"),
      (["--target", theirs, "--source", drafter, "--to", "deepspec", "--destination", drafter], "the source itself")):
    before = files(tmp_path)
    _, err = called(capsys, convert.main, convert.Settings, *args, code=2)
    assert part in err and files(tmp_path) == before
  for _ in range(2):  # onto what it wrote before
    called(capsys, convert.main, convert.Settings, "--target", theirs, "--source", drafter, "--to", "deepspec",
           "--destination", tmp_path / "out")


# --help


PROGRAMS = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for part in ("infer", "train")
                  for p in (ROOT / part).glob("*.py") if '"__main__"' in p.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, monkeypatch, capsys):
  """Kills: a program that cannot say what it does, e.g. for an import of something that is not installed; one that is
  called by the path of its file, which does not run so."""
  experiment = {"train.train": "TrainConfig", "train.compile": "CompileConfig"}.get(name)
  args = ["--config", str(ROOT / "configs" / "demo.py"), "--help"] if experiment else ["--help"]
  monkeypatch.setattr(sys, "argv", [name, *args])
  monkeypatch.delitem(sys.modules, name, raising=False)
  with pytest.raises(SystemExit) as exit_:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
  out = capsys.readouterr().out
  assert exit_.value.code == 0 and out.startswith(f"usage: python -m {name} ")
  settings = getattr(importlib.import_module(name), experiment or "Settings")
  for field in dataclasses.fields(settings):
    assert "--" + field.name.replace("_", "-") in out, field.name


@pytest.mark.parametrize("name", ["train.train", "train.compile"])
def test_help_without_a_config(name, monkeypatch, capsys):
  """Kills: `--help` that asks for a config first, is told on stderr, or does not say where the options are; a start
  without a config that does not say what is missing."""
  more = f"python -m {name} --config configs/demo.py --help\n"
  for args, code in ((["--help"], 0), ([], 2), (["--config"], 2)):
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as exit_:
      runpy.run_module(name, run_name="__main__", alter_sys=True)
    out, err = capsys.readouterr()
    assert (exit_.value.code or 0) == code
    if code:
      assert out == "" and err.startswith("error: --config is missing: ") and err.endswith(more)
    else:
      assert err == "" and out.endswith(f"All options: {more}") and f"python -m {name} --config configs/qwen3" in out


def test_a_flag_that_is_not_there(capsys):
  """Kills: help that is looked for in a file's path, which does not run so."""
  _, err = called(capsys, generate.main, generate.Settings, "--target", QWEN3, "--drafter", "none", "--prmpt", "a",
                  code=2)
  assert "python -m infer.generate --help" in err


# Progress


def test_bars_where_no_terminal_shows_them(capsys):
  """Kills: a log that is silent until the end; a line for each of many updates; no line at the start, for the first
  news or at the end; the steps of an earlier start counted as this one's speed; the same line twice."""
  bar, clock = shell.bar(), 0.0
  bar.get_time = lambda: clock
  with bar:
    task = bar.add_task("training", total=1000, completed=500, note="")
    for step in range(501, 701):
      clock += 1
      bar.update(task, completed=step, note=f"loss {step}")
  assert capsys.readouterr().err.splitlines() == [
      "training: 500 of 1000", "training: 501 of 1000, loss 501, 0:00:01 so far",
      *(f"training: {500 + s} of 1000, loss {500 + s}, 0:0{s // 60}:{s % 60:02} so far, 0:0{(500 - s) // 60}:"
        f"{(500 - s) % 60:02} left" for s in (31, 61, 91, 121, 151, 181, 200))]
  with shell.bar() as bar:
    one, two = (bar.add_task(name, total=2, note="") for name in ("a", "b"))
    bar.advance(one), bar.advance(one), bar.advance(two)
  assert capsys.readouterr().err.splitlines() == ["a: 0 of 2", "b: 0 of 2", "a: 1 of 2", "a: 2 of 2", "b: 1 of 2"]


def test_slow_steps_have_a_time_left(capsys):
  """Kills: time left by the newest seconds alone, in which no step of minutes ended."""
  bar, clock = shell.bar(), 0.0
  bar.get_time = lambda: clock
  with bar:
    task = bar.add_task("training", total=10, note="")
    for step in (1, 2, 3):
      clock += 600
      bar.update(task, completed=step)
  assert capsys.readouterr().err.splitlines()[-1] == "training: 3 of 10, 0:30:00 so far, 1:10:00 left"


def test_a_long_part_is_named_while_it_runs(capsys, monkeypatch):
  """Kills: news that came soon after a line, and minutes before the next; a bar's thread that outlives it."""
  monkeypatch.setattr(shell, "LINES", 0.2)
  others, said, until = set(threading.enumerate()), "", time.monotonic() + 30
  with shell.bar() as bar:
    (thread,) = set(threading.enumerate()) - others
    task = bar.add_task("measuring", total=9, note="")
    bar.update(task, note="short")
    bar.update(task, advance=1, note="long")
    while "long" not in said and time.monotonic() < until:
      time.sleep(0.01)
      said += capsys.readouterr().err
  thread.join(30)
  assert said.splitlines() == ["measuring: 0 of 9", "measuring: 0 of 9, short", "measuring: 1 of 9, long"]
  assert thread.daemon and not thread.is_alive()


def test_what_a_program_is_at_where_no_terminal_shows_it(capsys, monkeypatch):
  """Kills: minutes of loading or compiling without a word, or with one at their end; lines in a terminal."""
  with shell.stderr.status("loading [a]") as status:
    assert capsys.readouterr().err == "loading [a]\n"
    status.update("compiling")
    assert capsys.readouterr().err == "compiling\n"
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(shell.stderr, "is_interactive", True)
  assert type(shell.bar()) is Progress and type(shell.stderr.status("loading")) is Status


# train.answers


def test_answers_go_on(folder, capsys, tmp_path):
  """Kills: asking again what is answered; a line that a kill cut in the middle, kept or fatal; an unsupervised end."""
  (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(7, 12)))
  args = ("--target", folder / "target", "--out", tmp_path / "a.jsonl", "--questions", tmp_path / "q.jsonl", "--batch",
          2, "--max-new-tokens", 4)
  first, _ = called(capsys, answers.main, answers.Settings, *args, "--count", 2)
  assert set(first) == {"answers", "tokens", "tokens_per_second", "out", "failed"} and first["answers"] == 2
  whole = (tmp_path / "a.jsonl").read_text()
  (tmp_path / "a.jsonl").write_text(whole + '{"id": "3", "tok')
  second, _ = called(capsys, answers.main, answers.Settings, *args)
  text = (tmp_path / "a.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert second["answers"] == 5 and text.startswith(whole) and [r["id"] for r in rows] == list("12345")
  tokenizer = chat.load_tokenizer(folder / "target")
  for number, row in enumerate(rows):
    prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": f"w{7 + number}"}])
    assert row["tokens"][:len(prompt)] == prompt
    assert row["loss_mask"] == [0] * len(prompt) + [1] * (len(row["tokens"]) - len(prompt))


@pytest.mark.slow
def test_an_answer_does_not_depend_on_where_a_run_stopped(folder, capsys, tmp_path):
  """Kills: seeds by place, with which a resumed run, or one with another batch, draws other tokens."""
  asked = tmp_path / "asked.jsonl"
  asked.write_text("".join(json.dumps({"prompt": f"w1{i} w20"}) + "\n" for i in range(5)))
  drawn = {}
  for name, batch, counts in (("whole.jsonl", 2, [5]), ("resumed.jsonl", 2, [1, 5]), ("batches.jsonl", 3, [5])):
    for count in counts:
      called(capsys, answers.main, answers.Settings, "--target", folder / "target", "--out", tmp_path / name,
             "--questions", asked, "--batch", batch, "--max-new-tokens", 8, "--temperature", 1, "--count", count)
    drawn[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
  assert drawn["whole.jsonl"] == drawn["resumed.jsonl"] == drawn["batches.jsonl"]
