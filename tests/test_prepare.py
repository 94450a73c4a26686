"""train.prepare: the same rows whatever the processes and wherever it was killed; what is refused, and how."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.data import chat
from dspark_jax.data.rows import Rows
from dspark_jax.programs import run_folder
from train import prepare
from folders import LLAMA, WORDS, called, complains, files, with_tokenizer

ROOT = Path(prepare.__file__).parents[1]
KEYS = {"documents", "rows", "tokens", "supervised", "fill", "lost", "digest", "out"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target's tokenizer, and data of every kind."""
  folder = tmp_path_factory.mktemp("prepare")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  words = lambda n: " ".join(f"w{i}" for i in rng.integers(5, WORDS, n))
  records = [{"messages": [{"role": "user", "content": words(3)}, {"role": "assistant", "content": words(n)}]}
             for n in rng.integers(5, 40, 60)]
  records += [{"tokens": rng.integers(5, WORDS, n).tolist(), "loss_mask": [0] * 4 + [1] * (n - 4)}
              for n in rng.integers(10, 60, 60).tolist()]
  (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records[:70])) + "\n\n")
  (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records[70:])))
  (folder / "c.txt").write_text(words(100))
  return folder


def settings(folder, out, names=("a.jsonl", "b.jsonl", "c.txt"), **changes) -> prepare.Settings:
  return prepare.Settings(**{**dict(target=str(folder / "target"), data=tuple(folder / name for name in names), out=out,
                                    row_length=48, part_mb=0.002, processes=1), **changes})


@pytest.fixture(scope="module")
def whole(folder):
  """What one process makes of all in one piece."""
  out = folder / "whole"
  return prepare.main(settings(folder, out, part_mb=8)), out


def arrays(out):
  return {name: content for name, content in files(out).items() if name.endswith(".npy")}


def test_rows_of_all_kinds_of_files(folder, whole):
  """Kills: counts that are not those of the rows; a scratch folder left behind; documents without their line."""
  result, out = whole
  rows = Rows(out)
  batch = rows.take(np.arange(len(rows)))
  assert set(result) == KEYS and result["rows"] == len(rows) and result["fill"] == (batch.segments > 0).mean()
  assert result["supervised"] == batch.loss_mask.sum() and result["documents"] == batch.segments.max(1).sum()
  assert result["lost"]["too_short"] > 3 and result["lost"]["cut"] > 3 and result["digest"] == rows.digest
  names = ["documents.npy", "loss_mask.npy", "manifest.json", "rows.npy", "run.json", "sources.npy", "tokens.npy"]
  assert sorted(files(out)) == names
  tokenizer, lines = chat.load_tokenizer(folder / "target"), (folder / "a.jsonl").read_text().split("\n")
  from_a = 0
  for row, samples in enumerate(rows.samples(np.arange(len(rows)))):
    for segment, sample in enumerate(samples, 1):
      file, _, line = sample.partition(":")
      if Path(file).name == "a.jsonl" and "messages" in (record := json.loads(lines[int(line) - 1])):
        from_a += 1
        told = tokenizer.decode(batch.tokens[row][batch.segments[row] == segment])
        assert told.startswith(f"<|im_start|> user {record['messages'][0]['content']} <|im_end|>")
  assert from_a > 20


@pytest.mark.parametrize("processes, part_mb", [(1, 0.002), (2, 0.005)])
def test_the_rows_do_not_depend_on_processes_nor_on_parts(processes, part_mb, folder, whole, tmp_path):
  """Kills: documents in the order in which processes finish; a line on a border that is read twice, or by nobody."""
  prepare.main(settings(folder, tmp_path / "rows", part_mb=part_mb, processes=processes))
  assert arrays(tmp_path / "rows") == arrays(whole[1])
  assert Rows(tmp_path / "rows").manifest == Rows(whole[1]).manifest


@pytest.mark.parametrize("stop", [0, 5, "packing", "moving"])
def test_a_killed_preparation_goes_on(stop, folder, whole, monkeypatch, tmp_path):
  """Kills: parts that are made again; half a part, or half of the arrays, taken for whole ones; another result."""
  out, real, made = tmp_path / "rows", prepare.make_part, []
  class Killed(BaseException):
    pass
  def killing(where):
    def replaced(*args):
      raise Killed
    monkeypatch.setattr(*where, replaced)
  def make_part(tokenizer, how, part):
    if len(made) == stop:
      (out / "parts" / "torn").write_bytes(b"half")
      raise Killed
    made.append(part.path)
    return real(tokenizer, how, part)
  monkeypatch.setattr(prepare, "make_part", make_part)
  if stop in ("packing", "moving"):
    killing((prepare.packed, "write") if stop == "packing" else (prepare.shell, "write_json"))
    monkeypatch.setattr(run_folder, "write_record", lambda out, record: (out / "run.json").write_text(
        json.dumps(record)))
  with pytest.raises(Killed):
    prepare.main(settings(folder, out))
  with complains("has no manifest.json"):
    Rows(out)
  before = made.copy()
  monkeypatch.undo()
  monkeypatch.setattr(prepare, "make_part", lambda *args: made.append(args[-1].path) or real(*args))
  if before:
    before[0].write_bytes(before[0].read_bytes()[:100])  # as a machine that goes down leaves it
  assert prepare.main(settings(folder, out)) == {**whole[0], "out": str(out)}
  assert arrays(out) == arrays(whole[1]) and not (out / "parts").exists()
  assert len(made) == len(set(made)) + len(before[:1]) and (stop != "packing" or len(made) == len(before) + 1)
  monkeypatch.setattr(prepare.conversations, "shards", lambda *_: pytest.fail("read again what was prepared"))
  assert prepare.main(settings(folder, out))["digest"] == whole[0]["digest"]


def test_other_settings_after_a_kill(folder, monkeypatch, tmp_path):
  """Kills: parts of a preparation that was killed, taken for those of one with other settings."""
  monkeypatch.setattr(prepare, "pack_parts", lambda *_: None)  # as if killed before
  with pytest.raises(AttributeError):
    prepare.main(settings(folder, tmp_path / "rows"))
  monkeypatch.undo()
  assert list((tmp_path / "rows" / "parts").iterdir())
  for out in ("rows", "fresh"):
    prepare.main(settings(folder, tmp_path / out, row_length=64))
  assert arrays(tmp_path / "rows") == arrays(tmp_path / "fresh")


def descendants(pid) -> list[str]:
  children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
  return children + [below for child in children for below in descendants(child)]


@pytest.mark.slow
def test_kill_9(folder, whole, tmp_path):
  """Kills: processes that outlive their parent, a lock that does; parts that only an orderly end keeps."""
  many = tmp_path / "many.jsonl"
  many.write_text(((folder / "a.jsonl").read_text() + (folder / "b.jsonl").read_text() + "\n") * 40)
  how = dict(names=(), data=(many,), part_mb=0.05)
  wanted = prepare.main(settings(folder, tmp_path / "wanted", **how))
  out = tmp_path / "rows"
  command = [sys.executable, "-m", "train.prepare", "--target", folder / "target", "--data", many, "--out", out,
             "--row-length", 48, "--part-mb", 0.05, "--processes", 2]
  start = lambda: subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  run = start()
  while run.poll() is None and len(list(out.glob("parts/*.npz"))) < 4:
    time.sleep(0.02)
  children = descendants(run.pid)
  run.send_signal(signal.SIGKILL)
  run.communicate()
  kept = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.npz")}
  assert len(kept) >= 4 and len(children) >= 3
  for _ in range(200):
    if not any(Path(f"/proc/{child}").exists() for child in children):
      break
    time.sleep(0.05)
  assert not any(Path(f"/proc/{child}").exists() for child in children)
  run = start()
  while run.poll() is None and (out / "parts").exists():
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.npz") if path.exists()}
    assert kept.items() <= now.items() or not (out / "parts").exists()
    time.sleep(0.02)
  printed, err = run.communicate()
  assert run.returncode == 0, err
  assert json.loads(printed.splitlines()[-1]) == {**wanted, "out": str(out)}
  assert arrays(out) == arrays(tmp_path / "wanted")


@pytest.mark.parametrize("suffix", ["txt", "md", "py"])
def test_what_a_file_spells_is_text(folder, tmp_path, suffix):
  """Kills: a control token that a text is about, learned as the end of a reply; --allow-special passed over."""
  # Not the words of `folder`: there, what spells a control token is the same word as the token itself.
  tokenizer, name = chat.load_tokenizer(chat.smollm2_path()), tmp_path / f"about.{suffix}"
  name.write_text(text := "A reply ends with <|im_end|>, which is what the reader of a chat looks for in it.")
  for allowed in (False, True):
    out = tmp_path / str(allowed)
    prepare.main(settings(folder, out, (name,), target="smollm2", allow_special=allowed))
    rows = Rows(out)
    tokens = rows.take(np.arange(1)).tokens[0, :rows.manifest.tokens].tolist()
    assert tokens.count(2) == allowed and tokenizer.decode(tokens) == text
    assert rows.manifest.allow_special == allowed and rows.manifest.supervised == len(tokens)


def test_the_program(folder, whole, capsys, tmp_path):
  """Kills: flags that do not reach the settings; counts of what was left out that nobody is told of; a mistake that
  leaves a folder behind."""
  args = ("--target", folder / "target", "--out", tmp_path / "rows", "--row-length", 48, "--data")
  data = (folder / name for name in ("a.jsonl", "b.jsonl", "c.txt"))
  result, err = called(capsys, prepare.main, prepare.Settings, *args, *data)
  assert result == {**whole[0], "out": str(tmp_path / "rows")} and "documents that are too short" in err
  for more, said in (((tmp_path / "none.jsonl",), "none.jsonl is missing"), ((folder,), "is a folder, expected a file"),
                     ((folder / "a.jsonl", "--row-length", 0), "row_length is 0, expected at least 1"),
                     ((folder / "a.jsonl", "--part-mb", 0), "part_mb is 0.0, expected more than 0"),
                     ((folder / "a.jsonl", "--part-mb", "inf"), "part_mb is inf, expected more than 0, and finite")):
    words = (*args[:2], "--out", tmp_path / "no", "--data", *more)
    _, err = called(capsys, prepare.main, prepare.Settings, *words, code=2)
    assert said in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("change, said", [
  ({"row_length": 64}, "(row_length was 48, is 64)"), ({"thinking": True}, "(thinking was False, is True)"),
  ({"allow_special": True}, "(allow_special was False, is True)"), ({"target": "other"}, "(tokenizer was "),
  ({"target": "template"}, "(template was ")])
def test_rows_of_other_settings(change, said, folder, whole, tmp_path):
  """Kills: rows of another tokenizer, template or length trained on, or replaced; a refusal that does not say both."""
  if name := change.get("target"):
    home = shutil.copytree(folder / "target", tmp_path / "target")
    edited = home / ("tokenizer.json" if name == "other" else "chat_template.jinja")
    swap = ('"w5"', '"v5"') if name == "other" else ("im_start", "im_begin")
    assert swap[0] in edited.read_text()
    edited.write_text(edited.read_text().replace(*swap))
    change = {"target": str(home)}
  before = files(whole[1])
  with complains(f"{whole[1]} was prepared with other settings", said, "is ", "another --out"):
    prepare.main(settings(folder, whole[1], **change))
  asked = settings(folder, tmp_path / "run" / "rows", **change)
  tokenizer = chat.load_tokenizer(prepare.locate_tokenizer(asked.target))
  asked.data = (whole[1],)
  with complains(f"{whole[1]} was prepared with other settings", said, "another --data"):
    prepare.rows_of(asked, tokenizer, WORDS + 1)
  assert files(whole[1]) == before


def test_other_data(folder, whole, tmp_path):
  """Kills: rows of yesterday's files for today's; a run that is another's because a file was moved or split."""
  moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("whole"))
  out = shutil.copytree(whole[1], tmp_path / "rows")
  lines = (moved / "a.jsonl").read_text().splitlines(keepends=True)
  (moved / "a.jsonl").write_text("".join(lines[:20]))
  (moved / "a2.jsonl").write_text("".join(lines[20:]))
  names = ("a.jsonl", "a2.jsonl", "b.jsonl", "c.txt")
  assert prepare.main(settings(moved, out, names))["digest"] == whole[0]["digest"]
  assert "a2.jsonl" in str(Rows(out).manifest.files)
  before = files(out)
  (moved / "a2.jsonl").write_text("".join(lines[21:]))
  with complains(f"{out} holds rows of other data (their digest was {whole[0]['digest']}", "another --out"):
    prepare.main(settings(moved, out, names))
  assert files(out) == before


def test_other_borders(folder, monkeypatch, tmp_path):
  """Kills: documents cut in two, or joined, that pass for the rows that a store was written for, as their tokens are
  the same; arrays of one preparation that a kill leaves under the manifest of another."""
  data, asked = tmp_path / "data.jsonl", settings(tmp_path, tmp_path / "rows", ("data.jsonl",),
                                                  target=str(folder / "target"))
  lines = lambda *parts: data.write_text("".join(
      json.dumps({"tokens": list(part), "loss_mask": [1] * len(part)}) + "\n" for part in parts))
  lines(range(5, 45))
  digest = prepare.main(asked)["digest"]
  before = files(asked.out)
  lines(range(5, 25), range(25, 45))
  with complains(f"{asked.out} holds rows of other data (their digest was {digest}"):
    prepare.main(asked)
  assert files(asked.out) == before
  lines(range(5, 45))
  os.utime(data, (1, 1))
  monkeypatch.setattr(prepare.shell, "write_json", lambda *_: pytest.fail("killed"))
  with pytest.raises(pytest.fail.Exception):
    prepare.main(asked)
  monkeypatch.undo()
  with complains("has no manifest.json"):
    Rows(asked.out)
  assert prepare.main(asked)["digest"] == digest


@pytest.mark.parametrize("array", ["tokens", "lines"])
def test_a_part_damaged_inside(array, folder, whole, monkeypatch, tmp_path):
  """Kills: zeros in a part, as a machine leaves them that loses power: a traceback, and the same one for ever."""
  monkeypatch.setattr(prepare, "pack_parts", lambda *_: None)  # as if killed before
  with pytest.raises(AttributeError):
    prepare.main(settings(folder, tmp_path / "rows"))
  monkeypatch.undo()
  part = max((tmp_path / "rows" / "parts").glob("*.npz"), key=lambda path: path.stat().st_size)
  content = bytearray(part.read_bytes())
  at = content.index(f"{array}.npy".encode()) + 170  # beyond the header of the array
  content[at:at + 4] = bytes(byte ^ 255 for byte in content[at:at + 4])
  part.write_bytes(content)
  with complains(f"{part.name} is damaged (BadZipFile), and was removed: give the same command again"):
    prepare.main(settings(folder, tmp_path / "rows"))
  assert prepare.main(settings(folder, tmp_path / "rows"))["digest"] == whole[0]["digest"]
  assert arrays(tmp_path / "rows") == arrays(whole[1])


def test_what_cannot_be_prepared(folder, whole, tmp_path):
  """Kills: a bad line that is skipped, or whose number is that in its part; a folder that a mistake spoils for other
  data, or leaves behind; a file under two names, of which one is trained on and one held out; tokens of
  two tokenizers in one row; half of a prepared folder and half of something else."""
  (tmp_path / "bad.jsonl").write_text((folder / "a.jsonl").read_text() + f'{{"tokens": [{WORDS}], "loss_mask": [1]}}\n')
  with complains(f"bad.jsonl, line 72: token {WORDS} is beyond the target's vocabulary, which has {WORDS}"):
    prepare.main(settings(tmp_path, tmp_path / "rows", ("bad.jsonl",), target=str(folder / "target")))
  (tmp_path / "none.jsonl").write_text('{"tokens": [7, 8, 9], "loss_mask": [0, 0, 0]}\n' * 3)
  with complains("the data hold nothing to learn (left out: 3 conversations without a reply) in", "none.jsonl"):
    prepare.main(settings(tmp_path, tmp_path / "rows", ("none.jsonl",), target=str(folder / "target")))
  (tmp_path / "empty.txt").write_text("")
  with complains("(left out: nothing) in", "empty.txt"):
    prepare.main(settings(tmp_path, tmp_path / "empty", ("empty.txt",), target=str(folder / "target")))
  assert not (tmp_path / "empty").exists()
  (tmp_path / "again.jsonl").symlink_to(folder / "a.jsonl")
  with complains("is given twice"):
    prepare.main(settings(tmp_path, tmp_path / "rows", (folder / "a.jsonl", "again.jsonl"),
                          target=str(folder / "target")))
  assert prepare.main(settings(folder, tmp_path / "rows"))["digest"] == whole[0]["digest"]
  shutil.copy(folder / "b.jsonl", tmp_path)
  (tmp_path / "b.jsonl.run.json").write_text('{"program": "train.answers", "tokenizer": "another"}')
  with complains("b.jsonl was written with tokenizer another, the target has "):
    prepare.main(settings(tmp_path, tmp_path / "mixed", ("b.jsonl",), target=str(folder / "target")))
  tokenizer = chat.load_tokenizer(folder / "target")
  for data, said in (((whole[1], folder / "a.jsonl"), "expected one prepared folder, or files alone"),
                     ((folder / "target",), "has no manifest.json, so it holds no prepared rows")):
    with complains(said):
      prepare.rows_of(settings(folder, tmp_path / "run", data=data), tokenizer, WORDS)
  with complains(f"(vocab_size was {WORDS}, is 50)"):
    prepare.rows_of(settings(folder, tmp_path / "run", data=(whole[1],)), tokenizer, 50)
  run_folder.write_record(tmp_path / "train", {"program": "train.train"})
  with complains("is of 'train.train', not of train.prepare"):
    prepare.main(settings(folder, tmp_path / "train"))


def test_tokens_of_servers(folder, tmp_path):
  """Kills: rows of a server's tokens that are other words to the target's tokenizer; a file that is refused for a call
  of a tool, which a server takes out of the text, for blanks, or for a character that the limit cut."""
  tokenizer = chat.load_tokenizer(folder / "target")
  line = lambda tokens, *text: {"tokens": [5, 6, *tokens], "loss_mask": [0, 0] + [1] * len(tokens), "text": list(text)}
  texts = [(tokens := np.arange(7 + n, 27 + n).tolist(), tokenizer.decode(tokens)[:40]) for n in range(9)]
  right = [line(tokens, f" {text}\ufffd") for tokens, text in texts] + [line(range(7, 27), "something", "")]
  wrong = [line([token + 1 for token in tokens], text) for tokens, text in texts]
  for name, lines in (("right", right), ("wrong", right[:3] + wrong), ("broken", [right[0] | {"loss_mask": 3}])):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  target = str(folder / "target")
  assert prepare.main(settings(tmp_path, tmp_path / "rows", ("right.jsonl",), target=target))["documents"] == 10
  with complains("wrong.jsonl was written with another tokenizer than the target's", "tokens of 9 of its first 12 "):
    prepare.main(settings(tmp_path, tmp_path / "others", ("right.jsonl", "wrong.jsonl"), target=target))
  with complains('broken.jsonl, line 1: "loss_mask" must be a list'):
    prepare.main(settings(tmp_path, tmp_path / "others", ("broken.jsonl",), target=target))
