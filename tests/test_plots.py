"""Figures from evaluation JSON: the numbers that go into the axes, what is left out and why, files that are whole."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from scipy import stats

from dspark_jax.decoding.calibration import reliability
from dspark_jax.config import from_json
from dspark_jax.programs import shell
from dspark_jax.programs.results import HeadCost, Result
from infer import plots
from folders import called

FIGURES = ["figure2", "figure3", "figure4", "figure5", "figure6"]


def result(drafter="a", **changes) -> dict:
  """A result as infer.evaluate writes it."""
  return {**dict(
      target="t", drafter=drafter, kind="dspark", block_size=3, num_layers=2, markov_head="vanilla", dataset="gsm8k",
      mode="greedy", threshold=0.0, samples=8, tokens=240, rounds=100, accepted_length=2.4,
      accepted_length_interval=[2.2, 2.6], acceptance=[0.8, 0.5, None], reached=[100, 80, 0], survival=[0.8, 0.4, 0.2],
      verified=[100, 100, 100], verify_rate=1.0, drafts_per_round=3.0, accepted_tokens=140, rejected_tokens=160,
      tokens_per_second=10.0, temperatures=None, reliability=None, reliability_before=None), **changes}


def calibrated() -> dict:
  """Both diagrams of confidences at two positions, as Reliability.to_json() gives them."""
  rng = np.random.default_rng(0)
  survival = np.cumprod(rng.uniform(0.3, 0.9, (200, 2)), 1)
  accepted = rng.uniform(size=(200, 1)) < survival
  pair = [reliability(s, accepted).to_json() for s in (survival ** 2, survival)]
  return json.loads(json.dumps(dict(zip(("reliability_before", "reliability"), pair)), allow_nan=False))


PARTS = {  # the results that bring each figure, and no other but figure 2
  "figure2": {"results": [result()]},
  "figure3": {"results": [result(), result("b", num_layers=5, acceptance=None)]},
  "figure4": {"results": [result(), result("b", block_size=8)]},
  "figure5": {"results": [result(), result(threshold=0.5, accepted_length=2.0)]},
  "figure6": {"results": [result(**calibrated())]}}


def saved(path, content):
  path.write_text(json.dumps(content))
  return path


# The program


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_when_its_data_is_there(name, capsys, tmp_path):
  """Kills: a figure drawn of nothing, or left out with its data there; a reason that only one reader gets."""
  file = saved(tmp_path / "r.json", {"settings": {}, "versions": {}} | PARTS[name])
  out, err = called(capsys, plots.main, plots.Settings, "--results", file, "--out", tmp_path / "figures")
  assert set(out) == {"figures", "left_out"} and set(out["figures"]) == {"figure2", name}
  assert set(out["left_out"]) == set(FIGURES) - {"figure2", name}
  for missing, reason in out["left_out"].items():
    assert f"{missing} is left out: {reason}" in err and len(reason) > 20
  for drawn, path in out["figures"].items():
    assert path == str(tmp_path / "figures" / f"{drawn}.png")
  assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted({"figure2.png", f"{name}.png"})


def test_files_are_merged_and_drawn_the_same_twice(capsys, tmp_path):
  """Kills: only the first file read; dates and random ids in what is written; formats dropped."""
  parts = (PARTS["figure2"], {"results": [result("b", num_layers=5)]},
           {"head_cost": [{"device": "cpu", "block_size": 4, "percent": 1.5}]})
  files = [saved(tmp_path / f"{i}.json", part) for i, part in enumerate(parts)]
  bytes_ = []
  for folder in ("one", "two"):
    out, err = called(capsys, plots.main, plots.Settings, "--results", *files, "--out", tmp_path / folder,
                      "--formats", "svg", "pdf")
    assert set(out["left_out"]) == {"figure5", "figure6"} and "figure4 shows only a part" in err
    bytes_.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
  assert bytes_[0] == bytes_[1] and len(bytes_[0]) == 3 * 2


def test_nothing_to_draw(capsys, tmp_path):
  """Kills: a crash, or an empty picture, where nothing but plain decoding was measured, and that in both files."""
  plain = {name: None for name in result()} | dict(
      target="t", drafter="none", dataset="gsm8k", mode="greedy", samples=8, tokens=240)
  files = [saved(tmp_path / name, {"results": [plain]}) for name in ("a.json", "b.json")]
  out, _ = called(capsys, plots.main, plots.Settings, "--results", *files, "--out", tmp_path / "figures")
  assert out["figures"] == {} and set(out["left_out"]) == set(FIGURES) and not (tmp_path / "figures").exists()


def spoiled(**changes):
  return json.dumps({"results": [result(), result(**{"drafter": "b"} | changes)]})


DAMAGED = [
  ("", "is not JSON"), (json.dumps(PARTS["figure2"])[:90], "is not JSON"), ("[1]", "expected an object"),
  ("{}", "is no results file"), ('{"results": {}}', "key 'results' is {}, expected [an object, ...] or null"),
  ('{"results": [3]}', "key 'results[0]' is 3, expected an object"),
  (json.dumps({"results": [{k: v for k, v in result().items() if k != "reached"}]}), "'results[0].reached' is missing"),
  (spoiled(accepted_length=float("nan")), "results[1].accepted_length' is nan, expected a number of at least 0 or"),
  (spoiled(acceptance=[1.2, 0, 0]), "expected [a number in 0..1 or null, ...] or null"),
  (spoiled(reached=[1, 2]), "results[1]: acceptance, reached, survival and verified have different lengths"),
  (spoiled(rounds=True), "'results[1].rounds' is True, expected an integer of at least 0"),
  (spoiled(rounds=None), "rounds is null, which it is of plain decoding alone"),
  (spoiled(threshold=None), "threshold is null, which it is of plain decoding alone"),
  (spoiled(depth=2), "unknown key 'results[1].depth'"),
  (spoiled(reliability={"ece": [0.1]}), "key 'results[1].reliability.auc' is missing"),
  (spoiled(reliability=calibrated()["reliability"] | {"ece": [0.1]}), "lengths, expected one row per position"),
  (spoiled(reliability=calibrated()["reliability"] | {"bin_count": [[1], [1]]}), "different lengths"),
  (spoiled(drafter="a"), "and again in"),
  ('{"head_cost": [{"device": "cpu", "block_size": 4, "percent": "1"}]}', "percent' is '1', expected a number")]


@pytest.mark.parametrize("text, part", DAMAGED)
def test_damaged_files(text, part, capsys, tmp_path):
  """Kills: a traceback, an error that names no file, half of the figures written, the old ones lost."""
  (tmp_path / "r.json").write_text(text)
  _, err = called(capsys, plots.main, plots.Settings, "--results", tmp_path / "r.json", "--out", tmp_path / "figures",
                  code=2)
  lines = [line for line in err.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith("error: ") and part in err and "r.json" in err
  assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("flag, value, part", [("--results", "/nowhere.json", "/nowhere.json is missing"),
                                               ("--formats", "gif", "gif"), ("--speed", "1", "--speed")])
def test_mistakes(flag, value, part, capsys, tmp_path):
  """Kills: a traceback for a typo; exit code 0 or 1 for it."""
  args = {"--results": saved(tmp_path / "r.json", PARTS["figure2"]), "--out": tmp_path / "figures"} | {flag: value}
  _, err = called(capsys, plots.main, plots.Settings, *sum(args.items(), ()), code=2)
  assert part in err


def test_a_full_disk_leaves_the_old_figure(monkeypatch, tmp_path):
  """Kills: writing in place; scratch files left behind."""
  path = tmp_path / "figure2.png"
  shell.write(path, b"old")

  def full(*_):
    raise OSError("No space left on device")

  monkeypatch.setattr(Path, "replace", full)
  with pytest.raises(OSError):
    shell.write(path, b"new")
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# The numbers


def records(*results: dict) -> list[Result]:
  return [from_json(Result, json.loads(json.dumps(r)), "result") for r in results]


def axes(prepare, results, costs=()):
  found = records(*results)
  return prepare(found, [from_json(HeadCost, c, "cost") for c in costs], plots.variants(found))


@pytest.mark.parametrize("successes, trials", [(0, 5), (3, 10), (80, 100), (7, 7), (1, 1000)])
def test_wilson(successes, trials):
  """Kills: the normal approximation, another level, a one-sided interval, bounds outside 0..1."""
  wanted = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
  assert plots.wilson(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_acceptance_by_position():
  """Kills: positions from 0, unobserved positions drawn as 0, intervals from rounds, panels mixed."""
  panels = axes(plots.acceptance_panels, [result(), result("b", mode="T=1"), result("c", threshold=0.5)])
  assert [(p.title, [line.label for line in p.lines]) for p in panels] == [
      ("gsm8k, greedy", ["a"]), ("gsm8k, T=1", ["b"])]
  line = panels[0].lines[0]
  assert (line.x, line.y) == ([1, 2], [0.8, 0.5])
  assert [line.low[1], line.high[1]] == pytest.approx(list(plots.wilson(40, 80)))
  with_targets = axes(plots.acceptance_panels, [result(), result(target="u")])
  assert [p.title for p in with_targets] == ["gsm8k, greedy, t", "gsm8k, greedy, u"]


def test_lengths_by_layers():
  """Kills: lines across kinds, heads or block sizes, DFlash taken for DSpark, thresholds mixed in."""
  results = [result("five", num_layers=5, accepted_length=3.0, accepted_length_interval=None), result("two"),
             result("flash2", markov_head=None), result("flash5", markov_head="none", num_layers=5),
             result("long", block_size=8, num_layers=7), result("eagle", kind="eagle3", num_layers=1),
             result("two", threshold=0.5, num_layers=2), result("none", num_layers=3, accepted_length=None)]
  (panel,), costs = axes(plots.layer_panels, results)
  assert costs == [] and [line.label for line in panel.lines] == ["DFlash, block 3", "DSpark vanilla, block 3"]
  flash, line = panel.lines
  assert (line.x, line.y, line.names) == ([2, 5], [2.4, 3.0], ["two", "five"])
  assert (line.low, line.high) == ([2.2, 3.0], [2.6, 3.0])
  assert flash.names == ["flash2", "flash5"]


def test_lengths_and_costs_by_block():
  """Kills: devices joined to one line, blocks in the file's order, drafters joined that differ in layers too."""
  cost = lambda device, block, percent: {"device": device, "block_size": block, "percent": percent}
  results = [result("b", block_size=8), result(), result("c", block_size=16, num_layers=5)]
  (panel,), lines = axes(plots.block_panels, results, [cost("tpu", 8, 2.0), cost("cpu", 4, 1.0), cost("tpu", 4, -1.5)])
  assert [(line.label, line.x) for line in panel.lines] == [("DSpark vanilla, 2 layers", [3, 8])]
  assert [(line.label, line.x, line.y) for line in lines] == [("cpu", [4], [1.0]), ("tpu", [4, 8], [-1.5, 2.0])]
  with pytest.raises(plots.LeftOut, match="block_size.*head_cost"):
    axes(plots.block_panels, [result()])


def test_sweep():
  """Kills: totals in place of tokens per round, thresholds in the file's order, one threshold taken for a sweep."""
  results = [result(threshold=0.5, accepted_tokens=90, rejected_tokens=30, rounds=60, accepted_length=2.5), result(),
             result("b"), result(threshold=0.9, rounds=0, accepted_length=None)]
  panel, = axes(plots.sweep_panels, results)
  assert panel.title == "a\ngsm8k, greedy" and panel.bars == ([1.4, 1.5], [1.6, 0.5])
  line, = panel.lines
  assert (line.x, line.y, line.low) == ([0.0, 0.5], [2.4, 2.5], [2.2, 2.2])


def test_reliability_diagrams():
  """Kills: bin edges for bin means, empty bins drawn at 0, before and after swapped, the error of another position."""
  both = calibrated()
  (key, panels), = axes(plots.reliability_panels, [result(**both), result("b", threshold=0.5, **both)]).items()
  assert key == ("a", "gsm8k, greedy") and len(panels) == 2
  for k, panel in enumerate(panels):
    early, late = (both[name]["ece"][k] for name in ("reliability_before", "reliability"))
    assert panel.title == f"position {k + 1}\nECE {100 * early:.1f} % to {100 * late:.1f} %" and early > late
    for line, name in zip(panel.lines, ("reliability_before", "reliability")):
      count, pred, target = (np.array(both[name][f"bin_{part}"][k]) for part in ("count", "pred_sum", "target_sum"))
      assert len(line.x) == (count > 0).sum() < len(count)
      np.testing.assert_allclose(line.x, (pred / np.maximum(count, 1))[count > 0])
      np.testing.assert_allclose(line.y, (target / np.maximum(count, 1))[count > 0])
  alone = axes(plots.reliability_panels, [result(reliability=both["reliability"])])
  assert [line.label for panel in alone["a", "gsm8k, greedy"] for line in panel.lines] == ["as decoded"] * 2


def test_names_and_colours():
  """Kills: two drafters under one name or in one colour; a colour that depends on the order of the files."""
  same = [result("a"), result("a", block_size=8), result("b")]
  assert sorted(plots.variants(records(*same)).values()) == [
      "a (DSpark vanilla, block 3, layers 2)", "a (DSpark vanilla, block 8, layers 2)", "b"]
  names = [f"drafter {i}" for i in range(20)]
  assert plots.looks(names) == plots.looks(names[::-1]) and len(set(plots.looks(names).values())) == 20


def shown(name: str, path: Path) -> list:
  """The texts of one of the figures of a results file, as they are drawn."""
  found, costs = plots.read([path])
  names = plots.variants(found)
  prepare, draw = plots.FIGURES[name]
  with plots.matplotlib.rc_context(plots.STYLE):
    figure = draw(prepare(found, costs, names), plots.looks(names.values()))
    shell.image(figure)
  return [text for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", ["v$1$_$2$", "_mine"])
def test_names_are_drawn_as_they_are(name, tmp_path):
  """Kills: a $ in a name taken for a formula; a name that begins with _ left out of the legend, or shown twice."""
  rows = [result(name, **calibrated()), result("b", num_layers=5), result(name, threshold=0.5, **calibrated())]
  costs = [{"device": name, "block_size": 4, "percent": 1.5}]
  file = saved(tmp_path / "r.json", {"results": rows, "head_cost": costs})
  for figure in FIGURES:
    texts = [text for text in shown(figure, file) if name in text.get_text()]
    assert len(texts) == 1 and not texts[0].get_parse_math(), figure


def test_letters_of_other_scripts(capsys, tmp_path):
  """Kills: boxes in the place of letters, in silence, where Matplotlib's own font has none."""
  assert plots.fonts("DSpark, naïve Ωмир مرحبا 😀") == (["DejaVu Sans"], "")
  families, missing = plots.fonts("草稿モデル")
  assert len(families) > 1 and missing == ""
  for drafter, dataset in (("草稿モデル", "d"), ("b\U0001bc00\n", "d"), ("a", "\U0001bc00")):  # a shorthand of 1860
    file = saved(tmp_path / "r.json", {"results": [result(drafter, dataset=dataset)]})
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # Matplotlib's, of a letter that the fonts it was told of lack
      _, err = called(capsys, plots.main, plots.Settings, "--results", file, "--out", tmp_path)
    assert ("no font here has \U0001bc00, which" in err) == ("\U0001bc00" in drafter + dataset) and "Glyph" not in err


def test_what_is_drawn_is_the_data():
  """Kills: a figure that draws lows for values, or in a colour that is not the drafter's."""
  results = [result(), result("b", acceptance=[0.6, 0.4, 0.2], reached=[100, 60, 24]), result(threshold=0.5)]
  untouched, colours = copy.deepcopy(results), plots.looks(["a", "b"])
  ax, = plots.draw_acceptance(axes(plots.acceptance_panels, results), colours).axes
  for line, name, wanted in zip(ax.containers, "ab", ([0.8, 0.5], [0.6, 0.4, 0.2])):
    assert line.get_label() == name and line[0].get_color() == colours[name][0]
    assert list(line[0].get_ydata()) == wanted
  ax, = plots.draw_sweeps(axes(plots.sweep_panels, results), colours).axes
  np.testing.assert_allclose([(bar.get_y(), bar.get_height()) for bar in ax.patches], [(0, 1.4)] * 2 + [(1.4, 1.6)] * 2)
  assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.5"] and results == untouched
