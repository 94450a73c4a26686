"""Records that one program writes and another reads: what was published stays readable, what is damaged is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.config import from_json, to_json
from dspark_jax.decoding.acceptance import reliability_of
from dspark_jax.programs import results, run_folder
from dspark_jax.programs.results import Decoded, Diagram, Result
from folders import complains
from infer import plots

REPORTS = Path(__file__).parents[1] / "reports" / "smollm2"
DECODED = dict(id="1", turns=1, tokens=4, seconds=0.1, n_accept=[1, 0], n_verify=[5, 5], n_commit=[2, 1],
               confidence=[[0.5] * 5, [0.25] * 5])


@pytest.mark.parametrize("name, entries", [("results.json", 16), ("sweep.json", 5), ("head_cost.json", 8)])
def test_what_was_published_stays_readable(name, entries):
  """Kills: a key renamed, dropped or turned, a number that is rounded on the way, an optional key that is wanted."""
  text = (REPORTS / name).read_text()
  found = results.read(REPORTS / name)
  assert len(found.results or found.head_cost) == entries
  assert json.dumps(to_json(found), indent=1) + "\n" == text


def test_published_figures_have_their_data():
  """Kills: a reader of the published files that leaves entries out, or takes one kind of cost for the other."""
  found, costs = plots.read([REPORTS / "results.json", REPORTS / "head_cost.json"])
  assert len(found) == 16 and {r.mode for r in found} == {"greedy", "T=1"} and all(len(r.by_seed) == 3 for r in found)
  assert {c.device: c.block_size for c in costs} == {
      "smollm2, float32, this cpu": 16, "Qwen3-8B, bfloat16, bytes that must be read": 16}
  assert [(c.round_seconds is None, c.round_bytes is None) for c in costs] == [(False, True)] * 4 + [(True, False)] * 4


def test_a_table_of_what_was_published():
  """Kills: cells under another column's name, other digits than in the published report."""
  found = results.read(REPORTS / "results.json").results
  published = (REPORTS / "report.md").read_text()
  assert results.markdown(results.COLUMNS, [row.cells() for row in found]) in published
  assert all(len(row.cells()) == len(results.COLUMNS) for row in found)
  names = [column.header for column in results.table(found).columns]
  assert names == ["drafter", "mode", *results.SHOWN]  # target, dataset and threshold are the same in all rows


def test_samples_come_back(tmp_path):
  """Kills: rounds of one sample in another, a confidence that is null where there is none, lists of the wrong shape."""
  plain = {k: v for k, v in DECODED.items() if k != "confidence"} | {"id": "2"}
  run_folder.append(tmp_path / "x.jsonl", [DECODED, plain])
  found = results.read_decoded(tmp_path / "x.jsonl")
  assert list(found) == ["1", "2"] and [to_json(decoded) for decoded in found.values()] == [DECODED, plain]
  rounds = found["1"].rounds
  assert rounds.n_commit.tolist() == [2, 1] and rounds.confidence.shape == (2, 5)
  assert found["2"].rounds.confidence is None
  assert results.read_decoded(tmp_path / "none.jsonl") == {}
  nothing = from_json(Decoded, DECODED | dict(tokens=1, n_accept=[], n_verify=[], n_commit=[], confidence=[]), "sample")
  assert reliability_of([nothing.rounds, rounds], 5).ece.shape == (5,)  # a text that its prompt's own token ended


@pytest.mark.parametrize("change, problem", [
  ({"id": 1}, "key 'id' is 1, expected text"), ({"n_accept": [1]}, "lists of different lengths"),
  ({"n_accept": [6, 0]}, "counts out of range"), ({"n_accept": [-1, 0]}, "counts out of range"),
  ({"n_commit": [3, 1]}, "counts out of range"), ({"n_commit": [0, 1]}, "counts out of range"),
  ({"n_accept": [1.0, 0]}, "expected [an integer, ...]"),
  ({"confidence": [[0.5] * 5]}, "other confidences than rounds"),
  ({"confidence": [0.5, 0.5]}, "expected [[a number, ...], ...] or null"), ({"text": "a"}, "unknown key 'text'"),
  ({"id": "0"}, "a sample twice")])
def test_damaged_samples(change, problem, tmp_path):
  """Kills: a quietly wrong mean of a file that an editor or a full disk spoiled."""
  run_folder.append(tmp_path / "x.jsonl", [DECODED | {"id": "0"}, DECODED | change])
  with complains("x.jsonl, line 2 is damaged (", problem, "delete the line, its sample will be decoded again"):
    results.read_decoded(tmp_path / "x.jsonl")


def test_diagrams_are_those_of_the_rounds():
  """Kills: a diagram that says NaN in JSON, or lacks a position that no round reached."""
  rounds = from_json(Decoded, DECODED | {"n_verify": [2, 1]}, "sample").rounds
  curve = reliability_of([rounds], 5)
  diagram = from_json(Diagram, curve.to_json(), "curve")
  assert diagram.total_weight == (2, 1, 0, 0, 0) and diagram.ece[2:] == (None,) * 3
  np.testing.assert_array_equal(np.array(diagram.bin_count), curve.bin_count)
  json.dumps(to_json(diagram), allow_nan=False)


def test_an_entry_knows_its_samples():
  """Kills: -0 or 0.50 as thresholds of their own, plain decoding with one, or taken for a drafter."""
  entry = json.loads((REPORTS / "sweep.json").read_text())["results"][-1]
  assert from_json(Result, entry, "entry").key == "smollm2--dspark-vanilla--stdlib--greedy--threshold=0.5"
  plain = from_json(Result, dict.fromkeys(entry) | dict(target="t", drafter="none", dataset="d", mode="T=1", samples=1,
                                                        tokens=2), "entry")
  assert plain.key == "t--none--d--T=1" and plain.is_plain and not from_json(Result, entry, "entry").is_plain
