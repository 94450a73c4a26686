"""Evaluation prompts: which files and names are read, which samples are taken, and what is said of the others."""

import json
import random

import huggingface_hub
import pytest

from dspark_jax.data import benchmarks
from dspark_jax.data.benchmarks import COUNTS, Sample, load_samples
from dspark_jax.data.questions import split, stdlib_questions
from folders import complains


def written(path, count, **extra):
  path.write_text("".join(json.dumps({"turns": [f"question {i}"], **extra}) + "\n" for i in range(1, count + 1)))
  return path


def test_a_file(tmp_path):
  """Kills: lines cut at U+2028, which JSON allows in a string; a count of lines that skips blank ones; text in another
  encoding than UTF-8; a second turn that is lost."""
  file = tmp_path / "mine.jsonl"
  file.write_text('{"turns": ["a\u2028b\x85", "then\\nc"], "category": 1}\n\n{"turns": ["\u4f60\u597d"]}\n',
                  encoding="utf-8")
  assert benchmarks.read_samples(file) == [Sample("1", ("a\u2028b\x85", "then\nc")), Sample("3", ("\u4f60\u597d",))]
  assert {s.id for s in load_samples(file)} == {"1", "3"}


def test_the_reference_s_choice(tmp_path):
  """Kills: the first lines of a file instead of its shuffled ones; another seed; a shuffle after the cut."""
  file = written(tmp_path / "gsm8k.jsonl", 700)
  order = [f"question {i}" for i in range(1, 701)]
  random.Random(980406).shuffle(order)
  taken = load_samples("gsm8k", folder=tmp_path)
  assert [s.turns for s in taken] == [(text,) for text in order[:500]]
  assert [s.id for s in taken[:9]] == [text.split()[1] for text in order[:9]]
  assert load_samples("gsm8k", folder=tmp_path, count=3) == taken[:3]
  assert len(load_samples(file)) == 700 and load_samples(file, count=600)[:500] == taken  # a file: all of it
  written(tmp_path / "aime25.jsonl", 7)
  assert len(load_samples("aime25", folder=tmp_path)) == 7


def test_counts_are_the_paper_s():
  """Kills: a benchmark left out, or measured on another number of samples than the reference's."""
  assert COUNTS == {"gsm8k": 500, "math500": 500, "aime25": 30, "humaneval": 164, "mbpp": 256, "livecodebench": 500,
                    "mt-bench": 80, "alpaca": 500, "arena-hard-v2": 500}


@pytest.mark.slow
def test_stdlib():
  """Kills: evaluating on the questions that drafters are trained on; another choice at every start."""
  train, held_out = ({q.id: q.question for q in side} for side in split(stdlib_questions()))
  samples = load_samples("stdlib", count=10 ** 6)
  assert {s.id: s.turns for s in samples} == {name: (text,) for name, text in held_out.items()}
  assert not {s.id for s in samples} & set(train)
  assert load_samples("stdlib") == samples[:64]


def test_the_hub(tmp_path, monkeypatch):
  """Kills: a model repository asked for a dataset; another file name; the hub asked although a folder is given; a
  traceback of the network's."""
  asked = []
  def download(repo, file, **more):
    asked.append((repo, file, more))
    if repo == "owner/nothing":
      raise ConnectionError("no route")
    return str(written(tmp_path / "fetched.jsonl", 4))
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  assert len(load_samples("mt-bench", hub="owner/name")) == 4
  assert asked == [("owner/name", "mt-bench.jsonl", {"repo_type": "dataset"})]
  with complains("mt-bench.jsonl could not be fetched from the dataset owner/nothing", "ConnectionError",
                 "download it"):
    load_samples("mt-bench", hub="owner/nothing")
  written(tmp_path / "mbpp.jsonl", 2)
  assert len(load_samples("mbpp", hub="owner/name", folder=tmp_path)) == 2 and len(asked) == 2


@pytest.mark.parametrize("line, part", [
    ("{", "line 2 is not JSON"), ("[]", "line 2 holds a list"), ("{}", "line 2 has no turns"),
    ('{"turns": ["a"], "temperature": 1}', "line 2 has temperature"),
    ('{"turns": ["a"], "repetition_penalty": 1.2, "system": "be brief"}', "has repetition_penalty, system"),
    ('{"turns": []}', "line 2"), ('{"turns": "text"}', "line 2"), ('{"turns": ["a", 1]}', "line 2"),
    ('{"turns": ["a", " "]}', "line 2"), ('{"prompt": "a"}', 'expected {"turns": [TEXT, ...]}')])
def test_bad_lines(line, part, tmp_path):
  """Kills: a sample of nothing, or one made of another format's fields; an error that does not say which line."""
  (tmp_path / "x.jsonl").write_text('{"turns": ["a"]}\n' + line + "\n")
  with complains(part, str(tmp_path / "x.jsonl")):
    load_samples(tmp_path / "x.jsonl")


def test_bad_names(tmp_path):
  """Kills: a misspelt name that is an empty evaluation; a benchmark without a place, and no word on how to give one."""
  with complains("dataset gsm9k is neither known nor a file", *COUNTS, "stdlib"):
    load_samples("gsm9k")
  with complains("neither known nor a file"):
    load_samples(tmp_path)
  with complains("where the benchmark gsm8k is", "gsm8k.jsonl", "stdlib needs neither"):
    load_samples("gsm8k")
  with complains(f"{tmp_path / 'gsm8k.jsonl'} is missing"):
    load_samples("gsm8k", folder=tmp_path)
  (tmp_path / "empty.jsonl").write_text("\n")
  with complains("empty.jsonl is empty"):
    load_samples(tmp_path / "empty.jsonl")
  (tmp_path / "latin.jsonl").write_bytes(b'{"turns": ["\xe9"]}\n')
  with complains("latin.jsonl, line 1 is not UTF-8"):
    load_samples(tmp_path / "latin.jsonl")
  with complains("the number of samples is 0"):
    load_samples("stdlib", count=0)
