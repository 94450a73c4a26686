"""train.compare end to end on tiny models: one report for several drafters, trained alike and evaluated alike."""

import dataclasses
import json

import numpy as np
import pytest

from dspark_jax.config import from_json
from dspark_jax.decoding.acceptance import Rounds, difference, interval
from dspark_jax.programs import shell
from dspark_jax.programs.results import Result
from train import compare, train
from folders import LLAMA, WORDS, complains, with_tokenizer

CONFIG = """
from dataclasses import replace
from pathlib import Path
from train.config import CompareConfig, TrainConfig
from dspark_jax.drafters import DSpark, Eagle3
from dspark_jax.training.losses import EAGLE3
dspark = DSpark.Settings(taps=(-1, 0), num_layers=1, block_size=3, markov_rank=4)
base = TrainConfig(target={target!r}, out=Path("unused"), drafter=dspark, steps=2, batch=2, row_length=32, anchors=4,
                   log_every=1)
eagle3 = Eagle3.Settings(taps=(-1, 0), block_size=3)
config = CompareConfig(base, {{"dspark": (dspark, base.loss), "eagle3": (eagle3, EAGLE3)}},
                       temperatures=(0.0,), datasets=({dataset!r},), samples=3, max_new_tokens=8, eval_batch=3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compare")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  rows = [{"tokens": rng.integers(5, WORDS, 30).tolist(), "loss_mask": [0] * 8 + [1] * 22} for _ in range(8)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "asked.jsonl").write_text("".join(json.dumps({"turns": [f"w{i} w9"]}) + "\n" for i in (7, 20, 31)))
  (folder / "config.py").write_text(CONFIG.format(target=str(folder / "target"), dataset=str(folder / "asked.jsonl")))
  return folder


@pytest.fixture(scope="module")
def one_seed(folder):
  """(settings of a comparison of one seed, its result)"""
  settings = compare.Settings(str(folder / "config.py"), (folder / "data.jsonl",), folder / "out")
  return settings, compare.main(settings)


@pytest.mark.slow
def test_a_report_of_two_drafters(folder, one_seed, monkeypatch):
  """Kills: drafters that see other data or samples, a report without its numbers, a finished run trained again."""
  settings, result = one_seed
  text = (folder / "out" / "report.md").read_text()
  found = json.loads((folder / "out" / "results.json").read_text())["results"]
  assert [row["drafter"] for row in found] == ["dspark", "eagle3"] and {row["samples"] for row in found} == {3}
  for row in found:
    assert f"{row['accepted_length']:.2f}" in text and f"`{row['drafter']}`" in text
  runs = {name: json.loads((folder / "out" / f"{name}-seed0" / "run.json").read_text())
          for name in ("dspark", "eagle3")}
  assert runs["dspark"]["data"] == runs["eagle3"]["data"]
  assert [gap["drafter"] for gap in result["differences"]] == ["eagle3"]
  gap = result["differences"][0]
  assert gap["difference"] == pytest.approx(found[1]["accepted_length"] - found[0]["accepted_length"])
  assert gap["by_run"] == [pytest.approx(gap["difference"])]
  each = json.loads((folder / "out" / "evaluation" / "results.json").read_text())["results"]
  for row, pooled in zip(each, found):
    assert pooled["by_seed"] == [row["accepted_length"]]
    assert pooled["tokens_per_second"] == pytest.approx(row["tokens_per_second"])
    differ = {k for k in row if row[k] != pooled[k]} - {"drafter", "tokens_per_second"}
    assert differ <= {"accepted_length_interval", "reliability"}  # samples in another order
    assert not row["reliability"] or pooled["reliability"]["ece"] == pytest.approx(row["reliability"]["ece"])
  for line in text.splitlines():
    if line.startswith("!["):
      assert (folder / "out" / line.split("(")[1].rstrip(")")).exists()
  monkeypatch.setattr(train, "loop", lambda *_: pytest.fail("a finished run was trained again"))
  assert compare.main(settings)["differences"] == result["differences"]


@pytest.mark.slow
def test_seeds_are_taken_together(folder, one_seed, monkeypatch):
  """Kills: a second seed that trains the first again, a row per seed in the figures, a mean of means."""
  loop, trained = train.loop, []
  monkeypatch.setattr(train, "loop", lambda config, *rest: trained.append(config.out.name) or loop(config, *rest))
  result = compare.main(dataclasses.replace(one_seed[0], seeds=(0, 1)))
  assert trained == ["dspark-seed1", "eagle3-seed1"]
  rows = json.loads((folder / "out" / "results.json").read_text())["results"]
  each = json.loads((folder / "out" / "evaluation" / "results.json").read_text())["results"]
  assert [r["drafter"] for r in each] == ["dspark-seed0", "dspark-seed1", "eagle3-seed0", "eagle3-seed1"]
  for row, (a, b) in zip(rows, (each[:2], each[2:])):
    assert row["rounds"] == a["rounds"] + b["rounds"] and row["by_seed"] == [a["accepted_length"], b["accepted_length"]]
    assert row["reached"] == [x + y for x, y in zip(a["reached"], b["reached"])]
    assert row["accepted_length"] == pytest.approx(np.average(row["by_seed"], weights=[a["rounds"], b["rounds"]]))
    assert row["tokens_per_second"] == pytest.approx((a["tokens"] + b["tokens"]) / (
        a["tokens"] / a["tokens_per_second"] + b["tokens"] / b["tokens_per_second"]))
  assert len(result["differences"]) == 1 and "seed 1" in (folder / "out" / "report.md").read_text()


def test_a_seed_is_compared_with_its_own(tmp_path):
  """Kills: a drafter compared with the first drafter of another seed, or one seed's samples taken for all."""
  kept = {"a-seed0": 1, "a-seed1": 2, "b-seed0": 3, "b-seed1": 0}  # drafts in each of four rounds
  empty = dict.fromkeys(f.name for f in dataclasses.fields(Result)) | dict(
      target="t", kind="dspark", dataset="d", mode="greedy", threshold=0.0, block_size=3, samples=1, rounds=4,
      accepted_tokens=0, rejected_tokens=0, tokens_per_second=1.0)
  results = [from_json(Result, empty | dict(drafter=run, tokens=4 * (n + 1) + 1, accepted_length=n + 1.0), run)
             for run, n in kept.items()]
  (tmp_path / "samples").mkdir()
  for run, n in kept.items():
    record = dict(id="1", turns=1, tokens=4 * (n + 1) + 1, seconds=1, n_accept=[n] * 4, n_verify=[3] * 4,
                  n_commit=[n + 1] * 4)
    (tmp_path / "samples" / f"t--{run}--d--greedy--threshold=0.jsonl").write_text(json.dumps(record) + "\n")
  rows, (gap,) = compare.pool(tmp_path, results, {run: run[0] for run in kept})
  assert (gap["drafter"], gap["less"], gap["by_run"], gap["difference"]) == ("b", "a", [2, -2], 0)
  assert [(r.drafter, r.accepted_length, r.by_seed) for r in rows] == [("a", 2.5, (2, 3)), ("b", 2.5, (4, 1))]


def test_a_report_says_what_was_evaluated(folder):
  """Kills: a report of the samples that were asked for, where a file has fewer; a user's file called held-out."""
  settings = compare.Settings(str(folder / "config.py"), (folder / "data.jsonl",), folder / "out")
  config = compare.read_config(settings.config, compare.CompareConfig)
  runs = {name: compare.planned(settings, config, name) for name in config.drafters}
  rows = [from_json(Result, dict.fromkeys(f.name for f in dataclasses.fields(Result)) | dict(
      target="t", kind="dspark", drafter="a", dataset=name, mode="greedy", threshold=0.0, samples=n, tokens=9, rounds=4,
      accepted_tokens=0, rejected_tokens=0, by_seed=[1.0]), name) for name, n in (("mine", 2), ("stdlib", 3))]
  text = compare.report(settings, config, runs, {}, {}, rows, [], {})
  assert "trained for 2 steps" in text and "evaluated on 2 samples of mine, 3 samples of stdlib, 8 new" in text


def test_differences_are_paired():
  """Kills: an interval of two independent samples, which is far wider when prompts differ more than drafters do."""
  rng = np.random.default_rng(0)
  base = {str(i): rng.integers(0, 2, 50) + rng.integers(0, 4) for i in range(40)}
  rounds = lambda counts: {k: Rounds(n, np.full(50, 8), n + 1, None) for k, n in counts.items()}
  more = {k: n + (rng.random(50) < 0.2) for k, n in base.items()}
  gap = difference([rounds(more)], [rounds(base)])
  assert gap["difference"] == pytest.approx(0.2, abs=0.03)
  assert gap["interval"][0] < gap["difference"] < gap["interval"][1] and np.diff(gap["interval"]) < 0.1
  with complains("other samples"):
    difference([rounds(more)], [rounds({"0": base["0"]})])
  with complains("2 and 1 runs"):
    difference([rounds(more)] * 2, [rounds(base)])


def test_a_text_without_rounds_is_not_compared():
  """Kills: 0 / 0 where one drafter's text ended at its first token, and the other's, sampled, did not."""
  some, none = Rounds.of([1, 2], [3, 3], [2, 3]), Rounds.of([], [], [])
  with np.errstate(all="raise"):
    gap = difference([{"a": some, "b": none}], [{"a": some, "b": some}])
  assert gap == {"difference": 0, "interval": [0, 0], "by_run": [0]}


def test_differences_between_seeds_count():
  """Kills: intervals over samples alone, which take a lucky training for a better drafter; seeds resampled unpaired,
  where both drafters have the seed's luck in common."""
  rng = np.random.default_rng(0)
  rounds = lambda chance: {str(i): Rounds(n := (rng.random(400) < chance) + 0, np.full(400, 4), n + 1, None)
                           for i in range(20)}
  lucky = [rounds(0.5 + luck) for luck in (-0.1, 0, 0.1)]
  base = [rounds(0.4)] * 3
  shared = [rounds(0.4 + luck) for luck in (-0.1, 0, 0.1)]
  width = lambda gap: gap["interval"][1] - gap["interval"][0]
  apart, alike = difference(lucky, base), difference(lucky, shared)
  assert apart["by_run"] == pytest.approx([0, 0.1, 0.2], abs=0.02)
  assert alike["by_run"] == pytest.approx([0.1] * 3, abs=0.02)
  assert width(apart) > 0.15 > 0.05 > width(alike)
  wide, = np.diff(interval([list(run.values()) for run in lucky]))
  assert wide > 0.15 > 0.05 > np.diff(interval([[text for run in lucky for text in run.values()]]))


@pytest.mark.parametrize("old, new, part", [
    ('datasets=(', 'datasets=("gsm8k",', "nothing says where the benchmark gsm8k is"),
    ("temperatures=(0.0,)", "temperatures=(-1.0,)", "temperature is -1.0"), ("steps=2, ", "", "give --steps"),
    ("Eagle3.Settings(taps=(-1, 0)", "Eagle3.Settings(taps=(9,)", "taps [9] are out of range"),
    ("log_every=1)", "log_every=1, mesh=type(TrainConfig.mesh)(2))", "wrong.py: the mesh is data 2, fsdp 1, tensor 1"),
    ("Eagle3.Settings(", "Eagle3.Settings(num_layers=5, ", "unexpected keyword argument 'num_layers'")])
def test_seen_before_anything_is_trained(old, new, part, folder, monkeypatch):
  """Kills: a target loaded, or hours of training, then the sentence that says what was wrong from the start."""
  text = (folder / "config.py").read_text()
  (folder / "wrong.py").write_text(text.replace(old, new))
  monkeypatch.setattr(shell, "load", lambda *_: pytest.fail("loaded"))
  assert text.count(old) == 1
  with complains("nosuch.jsonl is missing"):
    compare.main(compare.Settings(str(folder / "config.py"), (folder / "nosuch.jsonl",), folder / "no"))
  assert not (folder / "no").exists()
  with complains(part):
    compare.main(compare.Settings(str(folder / "wrong.py"), (folder / "data.jsonl",), folder / "no"))
  assert not (folder / "no").exists()


def test_mistakes(folder, capsys):
  """Kills: a traceback for a train config given by mistake, or for a seed given twice; the config's steps for
  --steps 0."""
  for words, parts in ((("--config", "configs/demo.py"), ("is for train.train", "train.compare", "CompareConfig")),
                       (("--config", folder / "config.py", "--seeds", 1, 1), ("each once",)),
                       (("--config", folder / "config.py", "--steps", 0), ("steps is 0, expected more than 0",))):
    with pytest.raises(SystemExit) as exit_:
      shell.run(compare.main, compare.Settings, args=[*map(str, words), "--data", str(folder / "data.jsonl"), "--out",
                                                      str(folder / "no")])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts) and "Traceback" not in err
    assert not (folder / "no").exists()
