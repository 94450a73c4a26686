"""train.compare end to end on tiny models: one report for several drafters, trained alike and evaluated alike."""

import json

import numpy as np
import pytest

from dspark_jax.decoding.acceptance import Rounds, difference
from infer import program
from train import compare, train
from folders import LLAMA, complains, with_tokenizer

CONFIG = """
from dataclasses import replace
from pathlib import Path
from train.config import CompareConfig, DrafterSettings, TrainConfig
from dspark_jax.training.losses import EAGLE3
dspark = DrafterSettings(taps=(-1, 0), num_layers=1, block_size=3, markov_rank=4)
base = TrainConfig(target={target!r}, out=Path("unused"), drafter=dspark, steps=2, batch=2, row_length=32, anchors=4,
                   log_every=1)
config = CompareConfig(base, {{"dspark": (dspark, base.loss), "eagle3": (replace(dspark, kind="eagle3"), EAGLE3)}},
                       temperatures=(0.0,), datasets=({dataset!r},), samples=3, max_new_tokens=8, eval_batch=3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compare")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  rows = [{"tokens": rng.integers(5, 130, 30).tolist(), "loss_mask": [0] * 8 + [1] * 22} for _ in range(8)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "asked.jsonl").write_text("".join(json.dumps({"turns": [f"w{i} w9"]}) + "\n" for i in (7, 20, 31)))
  (folder / "config.py").write_text(CONFIG.format(target=str(folder / "target"), dataset=str(folder / "asked.jsonl")))
  return folder


def test_a_report_of_two_drafters(folder, monkeypatch, capsys):
  """Kills: drafters that see other data or samples, a report without its numbers, a finished run trained again."""
  settings = compare.Settings(str(folder / "config.py"), (folder / "data.jsonl",), folder / "out")
  result = compare.main(settings)
  text = (folder / "out" / "report.md").read_text()
  found = json.loads((folder / "out" / "evaluation" / "results.json").read_text())["results"]
  assert [row["drafter"] for row in found] == ["dspark", "eagle3"] and {row["samples"] for row in found} == {3}
  for row in found:
    assert f"{row['accepted_length']:.2f}" in text and f"`{row['drafter']}`" in text
  runs = {name: json.loads((folder / "out" / name / "run.json").read_text()) for name in ("dspark", "eagle3")}
  assert runs["dspark"]["data"] == runs["eagle3"]["data"]
  assert [gap["drafter"] for gap in result["differences"]] == ["eagle3"]
  gap = result["differences"][0]
  assert gap["difference"] == pytest.approx(found[1]["accepted_length"] - found[0]["accepted_length"])
  for line in text.splitlines():
    if line.startswith("!["):
      assert (folder / "out" / line.split("(")[1].rstrip(")")).exists()
  monkeypatch.setattr(train, "loop", lambda *_: pytest.fail("a finished run was trained again"))
  assert compare.main(settings)["differences"] == result["differences"]


def test_differences_are_paired():
  """Kills: an interval of two independent samples, which is far wider when prompts differ more than drafters do."""
  rng = np.random.default_rng(0)
  base = {str(i): rng.integers(0, 2, 50) + rng.integers(0, 4) for i in range(40)}
  rounds = lambda counts: {k: Rounds(n, np.full(50, 8), n + 1, None) for k, n in counts.items()}
  more = {k: n + (rng.random(50) < 0.2) for k, n in base.items()}
  gap = difference(rounds(more), rounds(base))
  assert gap["difference"] == pytest.approx(0.2, abs=0.03)
  assert gap["interval"][0] < gap["difference"] < gap["interval"][1] and np.diff(gap["interval"]) < 0.1
  with complains("other samples"):
    difference(rounds(more), rounds({"0": base["0"]}))


def test_mistakes(folder, capsys):
  """Kills: a traceback for a train config given by mistake, or for a seed given twice."""
  for words, parts in ((("--config", "configs/demo.py"), ("CompareConfig",)),
                       (("--config", folder / "config.py", "--seeds", 1, 1), ("each once",))):
    with pytest.raises(SystemExit) as exit_:
      program.run(compare.main, compare.Settings, args=[*map(str, words), "--data", str(folder / "data.jsonl"), "--out",
                                                        str(folder / "no")])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts) and "Traceback" not in err
    assert not (folder / "no").exists()
