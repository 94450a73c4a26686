"""infer.simulate: the draws, the cost tables of machines that are not here, and what policies make of both."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from dspark_jax.decoding import dispatch
from dspark_jax.decoding.cost import Choice
from dspark_jax.programs import shell
from infer import figures, machines, simulate
from infer.simulate import Rounds
from folders import called, files
from test_cost import table

SMALL = ("--draws", 300, "--workloads", "chat")


@pytest.mark.parametrize("length, concentration", [(1.2, 3.0), (3.49, 3.0), (5.57, 3.0), (3.49, 1000.0)])
def test_draws_have_the_accepted_length(length, concentration):
  """Kills: a bonus token counted twice or not at all, Jensen's gap between c and its mean, survivals that are not those
  of the draws, which a scheduler would be wrong to trust."""
  drawn = Rounds.draw((length,), 5000, 8, 7, concentration, np.random.default_rng(0))
  size = drawn.accepted.size
  assert drawn.survival.shape == (5000, 8, 7) and drawn.accepted.min() >= 0 and drawn.accepted.max() == 7
  assert 1 + drawn.accepted.mean() == pytest.approx(length, abs=5 * 2.5 / math.sqrt(size))
  assert 1 + drawn.survival.sum(-1).mean() == pytest.approx(length, abs=5 * 2.5 / math.sqrt(size))
  likely = drawn.survival[..., 2] > np.median(drawn.survival[..., 2])
  for part in (likely, ~likely):
    assert (drawn.accepted[part] > 2).mean() == pytest.approx(drawn.survival[part][:, 2].mean(), abs=0.02)
  assert (drawn.auroc() > 0.75) == (concentration < 10)  # of rounds that are all alike nothing can be told


def test_requests_come_and_go():
  """Kills: mixed traffic whose rows keep their kind for good, or change it every round."""
  drawn = Rounds.draw((1.2, 7.5), 400, 4, 7, 500.0, np.random.default_rng(1))
  easy = drawn.survival[..., 0] > 0.6
  changes = (easy[1:] != easy[:-1]).sum(0)
  assert (changes > 0).all() and (changes <= 400 / simulate.STAY + 1).all() and 0.2 < easy.mean() < 0.8


@pytest.mark.parametrize("length", [1.0, 8.0, float("nan")])
def test_impossible_lengths(length, capsys, tmp_path):
  """Kills: a search that ends at its edge."""
  _, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path, "--lengths", length, code=2)
  assert "expected more than 1 and less than 8" in err and not files(tmp_path)


def test_tables_are_near_the_cycles():
  """Kills: a fit of another chip, a clock left out, a draft with the head read once, tables that grow cheaper."""
  assert all(machines.fit(chip)[1] < 0.06 for chip in ("v5e", "v5p", "v6e"))
  assert all(machines.fit_draft(d.chip, d.model)[2] < 0.08 for d in machines.known().drafts)
  for step in machines.known().steps:
    cost = machines.cost(step.chip, step.model, step.rows, step.slots, packing=1.0)
    ms = lambda cycles: cycles / machines.known().gigahertz[step.chip]
    assert 1e3 * cost.plain.seconds == pytest.approx(ms(step.plain), rel=0.06)
    assert step.full is None or 1e3 * cost.full.seconds == pytest.approx(ms(step.full), rel=0.06)
    for tokens, bucket in cost.packed.items():
      if str(tokens) in step.packed:
        assert 1e3 * bucket.seconds == pytest.approx(ms(step.packed[str(tokens)]), rel=0.06)
  for chip, model in ((c, m) for c in ("v5e", "v5p", "v6e", "h100") for m in ("qwen3-4b", "qwen3-8b")):
    for seats in (1, 8, 256):
      cost = machines.cost(chip, model, seats, 1024)
      seconds = [cost.plain.seconds, *(b.seconds for b in cost.packed.values())]
      assert seconds == sorted(seconds) and cost.full.seconds >= cost.plain.seconds and cost.draft.seconds > 0
      floor = machines.weights(model) / machines.CHIP[chip].bandwidth
      assert cost.plain.seconds > floor and (seats > 1 or cost.plain.seconds < 3 * floor)
  assert "roofline estimate" in machines.cost("h100", "qwen3-8b", 1, 1024).source


def test_memory():
  """Kills: caches or weights forgotten: an 8B model does not fit a v5e, and 4B with 32 rows of 2,048 neither."""
  assert machines.weights("qwen3-8b") == pytest.approx(15.1e9, rel=0.01)
  assert machines.slot("qwen3-4b") == 147_456 == machines.slot("qwen3-8b")
  assert machines.chips_needed("qwen3-8b", "v5e", 1, 16) > 1 == machines.chips_needed("qwen3-4b", "v5e", 32, 1024)
  assert machines.chips_needed("qwen3-4b", "v5e", 32, 2048) == 2


def test_what_is_stored_is_not_what_a_draft_reads(monkeypatch):
  """Kills: the head and W2 counted as often as a draft reads them, W1 and an untied embedding left out."""
  for model, untied in (("qwen3-4b", 0), ("qwen3-8b", 1)):
    config, hidden, words = machines.MODELS[model], machines.MODELS[model].spec.hidden_size, 151_936
    stored = config.flops(0) + (1 + untied) * 2 * hidden * words
    stored += 5 * (config.spec.flops(0) + 2 * hidden ** 2) + 2 * 2 * machines.RANK * words
    for size, chips in ((stored, 1), (stored - 1e6, 2)):
      monkeypatch.setitem(machines.CHIP, "v5e", SimpleNamespace(memory=size + 1e3))
      assert machines.chips_needed(model, "v5e", 0, 1024) == chips


def test_scheduled_is_never_below_the_better_of_both():
  """Kills: a budget that is not filled or overrun, tokens of cut drafts, drafts chosen by the past's order, probes that
  cost more than a hundredth."""
  for length, machine in ((1.3, "v5p"), (2.5, "v6e"), (4.0, "h100"), (6.0, "v5e")):
    for rows in (1, 8, 128):
      cost = machines.cost(machine, "qwen3-8b", rows, 1024)
      settings = simulate.Settings(None, draws=2000)
      found, _ = simulate.outcomes(cost, "x", (length,), rows, settings, 1)
      plain, fixed, scheduled = found
      assert [x.policy for x in found] == list(simulate.POLICIES)
      # A hundredth for the probes, and a little for choices between programs that are nearly equal.
      better = max(plain.tokens_per_second, fixed.tokens_per_second)
      assert scheduled.tokens_per_second >= 0.985 * better, (machine, rows)
      assert plain.accepted_length == 1 == plain.budget and fixed.budget == 8
      assert fixed.accepted_length == pytest.approx(length, rel=0.12)
      assert 1 <= scheduled.accepted_length <= fixed.accepted_length + 1e-9 and 1 <= scheduled.budget <= 8
      assert sum(scheduled.programs.values()) == pytest.approx(1)
      sizes = {"plain": rows, "full": 8 * rows}
      budget = sum(share * sizes.get(p, int(p) if p.isdigit() else 0) for p, share in scheduled.programs.items())
      assert scheduled.budget * rows == pytest.approx(budget)


def test_one_round_of_few_rows_is_not_enough(monkeypatch):
  """Kills: capacities from a single old round where there are few rows: a tenth below fixed decoding and more."""
  cost = machines.cost("v6e", "qwen3-8b", 1, 1024)
  speed = lambda: simulate.outcomes(cost, "x", (1.8,), 1, simulate.Settings(None), 1)[0]
  _, same, many = speed()
  monkeypatch.setattr(dispatch, "ROUNDS", 1)
  _, fixed, one = speed()
  assert fixed == same and one.tokens_per_second < 0.9 * fixed.tokens_per_second
  assert many.tokens_per_second > 0.985 * fixed.tokens_per_second


def test_the_scheduler_sees_only_the_past(monkeypatch):
  """Kills: a choice by this round's survivals, or by the last one's, which the host has not read yet."""
  drawn = Rounds.draw((2.5,), 60, 4, 3, 3.0, np.random.default_rng(0))
  seen = []
  monkeypatch.setattr(dispatch, "choose", lambda cost, survival, *_, **__: seen.append(survival) or
                      Choice("full", 12, 1.0, 1.0))
  simulate.scheduled(table(), drawn, 10.0)
  assert len(seen) == 60 and (seen[0] == 1).all() and (seen[1] == 1).all()
  for t, row in itertools.product(range(2, 60), range(4)):
    began = int(np.argmax(drawn.request[:, row] == drawn.request[t, row]))
    of_request = drawn.survival[began:t - 1, row][::-1]  # the newest first; before it, what is typical
    np.testing.assert_allclose(seen[t][:len(of_request), row], of_request[:dispatch.ROUNDS])
    assert len(of_request) >= dispatch.ROUNDS or len(np.unique(seen[t][len(of_request):, row], axis=0)) == 1
  assert (drawn.request[-1] != drawn.request[0]).any()


def test_equal_drafts_fill_a_bucket_and_no_more():
  """Kills: a budget of 4 that verifies all that are as likely as the fourth."""
  drawn = Rounds(np.full((10, 4, 3), 1e-12), np.zeros((10, 4), np.int64), np.zeros((10, 4), np.int64))
  cost = table(9.0, 0.0, 2.0, {8: 1.0})
  seconds, tokens, verified, programs = simulate.scheduled(cost, drawn, 10.0)
  assert list(programs) == ["8"] and (seconds, tokens, verified) == (8, 8 * 4, 8 * 8)


def test_the_better_of_both_is_marked_at_each_concurrency():
  """Kills: fixed named as the better one where plain is, because fixed is again with more requests."""
  rows = [simulate.Outcome("m", "t", "chat", n, policy, speed, 1.0, 1.0, 1.0, {}, 1)
          for n, speeds in ((1, (2, 1, 2)), (2, (1, 2, 2)), (4, (2, 1, 2)))
          for policy, speed in zip(simulate.POLICIES, speeds)]
  (case,) = simulate.summaries(rows)
  assert case["better"] == {"1": "plain", "2": "fixed", "4": "plain"} and case["plain_beats_fixed_from"] == 4
  cells = [next(column.cells)[0] for column in simulate.table(rows).columns[1:]]
  assert cells == ["p", "f", "p"]


def test_program(capsys, tmp_path, monkeypatch):
  """Kills: numbers that another run does not give, machines whose seed is another's, a table or a figure left out."""
  args = ("--out", tmp_path / "a", "--chips", "v6e", "h100", "--models", "qwen3-4b", "--concurrencies", 2, 64, *SMALL)
  monkeypatch.setattr(figures.shell, "image", lambda figure: figure.axes and b"drawn")  # one is, in test_load
  result, err = called(capsys, simulate.main, simulate.Settings, *args, "--lengths", 2.5)
  assert sorted(files(tmp_path / "a")) == sorted(["simulate.json", *(f"figure{n}-{m}.png" for n in (7, 8)
                                                                     for m in ("v6e", "h100"))])
  assert [(c["machine"], c["workload"]) for c in result["cases"]] == [
      (m, w) for m in ("v6e", "h100") for w in ("chat", "length 2.5")]
  assert "costs: roofline estimate for h100" in err and "accepted length 3.49" in err and "clock assumed" in err
  whole = json.loads((tmp_path / "a" / "simulate.json").read_text())
  assert len(whole["outcomes"]) == 2 * 2 * 2 * 3 and whole["cases"] == result["cases"]
  again, _ = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "b", *args[2:])
  assert again["cases"] == [c for c in result["cases"] if c["workload"] == "chat"]
  other, _ = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "b", *args[2:], "--seed", 1)
  assert other["cases"] != again["cases"]


def test_measured_tables(capsys, tmp_path, monkeypatch):
  """Kills: a table of infer.profile_sps that cannot be used, or that is used for more rows than it has seats."""
  monkeypatch.setattr(figures, "write", lambda *_: {})
  shell.write_json(tmp_path / "cost.json", table(packed={8: 1.1}, machine="mine").to_json())
  result, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "o",
                     "--costs", tmp_path / "cost.json", "--concurrencies", 2, 4, 8, *SMALL, "--lengths", 2.0)
  assert "every row live with 10 tokens" in err  # the table's own
  chat, two = result["cases"]
  assert chat["machine"] == "mine" and list(chat["gain_percent"]) == ["2", "4"] and two["workload"] == "length 2"
  shell.write_json(tmp_path / "plain.json", table(draft=None, full=None, block=0, chunks=(2.0, None)).to_json())
  for file, part in (("plain.json", "is of a target without a drafter"), ("o/simulate.json", "is no cost table")):
    _, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "p", "--costs", tmp_path / file,
                    code=2)
    assert part in err and not (tmp_path / "p").exists()
  _, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "p", "--costs", tmp_path / "cost.json",
                  "--concurrencies", 2, code=2)
  assert "5.12" in err and "less than 4, for blocks of 3" in err  # the paper's code column
  shell.write_json(tmp_path / "again.json", table(packed={8: 2.2}, machine="mine").to_json())
  for more, part in (([tmp_path / "again.json"], "are both of t on mine"), (["--context", 65], "at most 64")):
    _, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path / "p", *SMALL,
                    "--costs", tmp_path / "cost.json", *more, code=2)
    assert part in err and not (tmp_path / "p").exists()


@pytest.mark.parametrize("flag, value, part", [
    ("--concurrencies", "0", "concurrencies are (0,)"), ("--packing", "1.5", "packing is 1.5"),
    ("--concentration", "0", "concentration is 0.0"), ("--concentration", "inf", "concentration is inf"),
    ("--concentration", "1e300", "concentration is 1e+300"), ("--packing", "nan", "packing is nan"),
    ("--draws", "0", "draws is 0"), ("--chips", "v9", "v9")])
def test_mistakes(flag, value, part, capsys, tmp_path):
  """Kills: tracebacks, and minutes before a mistake is seen; survivals that are no numbers, and a gain made of them."""
  _, err = called(capsys, simulate.main, simulate.Settings, "--out", tmp_path, flag, value, code=2)
  assert part in err and not files(tmp_path)
