"""The engine's costs: what is chosen, what Algorithm 1 reads, and which tables are refused."""

import time

import numpy as np
import pytest

from dspark_jax.config import from_json, to_json
from dspark_jax.decoding.cost import Bucket, Choice, Cost, Step, check_device, choose, probe_interval
from dspark_jax.programs import shell
from dspark_jax.text import read_json
from folders import complains


def table(plain=1.0, draft=0.2, full=1.5, packed=None, *, seats=4, block=3, chunks=(2.0, 2.5), slopes=0.0,
          **fields) -> Cost:
  """Four seats of three drafts; packed: seconds by tokens."""
  step = lambda seconds: None if seconds is None else Step(seconds, slopes * seconds)
  given = dict(machine="m", device="cpu", target="t", drafter="d", dtype="float32", seats=seats, block=block,
               capacity=64, context=10, source="made up", chunk=8) | fields
  return Cost(plain=step(plain), draft=step(draft), full=step(full), plain_chunk=step(chunks[0]),
              full_chunk=step(chunks[1]), packed=tuple(Bucket(seconds=x, slope=slopes * x, tokens=n)
                                                       for n, x in sorted((packed or {}).items())), **given)


def survivals(rng, *shape) -> np.ndarray:
  return np.cumprod(rng.uniform(0.3, 1, shape), axis=-1)


def by_force(cost, survival, context, chunk=False) -> dict:
  """Tokens per second of every number of drafts in every program, one by one: the slow lines that `choose` replaces."""
  past = survival if survival.ndim == 3 else survival[None]
  live, found = past.shape[1], {}
  for program in ("plain", "full") if chunk else cost.programs:
    for drafts in range(0, 1 if program == "plain" else cost.tokens(program) - live + 1):
      tokens = live + np.mean([sum(sorted(a.ravel(), reverse=True)[:drafts]) for a in past])
      found[program, drafts] = tokens / cost.seconds(program, context, chunk)
  return found


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed):
  """Kills: a search that stops at the first dip, a draft that is free, a bucket without room for its live rows, a past
  of several rounds of which one counts, or whose survivals are averaged before they are ordered."""
  rng = np.random.default_rng(seed)
  buckets = rng.choice(np.arange(5, 16), 3, replace=False)
  one = lambda: rng.uniform(0.5, 2)
  cost = table(one(), rng.uniform(0, 0.4), one(), {n: one() for n in buckets}, chunks=(one(), one()), slopes=0.01)
  for live, chunk in ((4, False), (2, False), (1, True), (4, True)):
    survival = survivals(rng, *((live, 3) if seed % 2 else (3, live, 3)))
    found, best = by_force(cost, survival, 40.0, chunk), choose(cost, survival, 40.0, chunk=chunk)
    assert best.tokens_per_second == pytest.approx(max(found.values()), rel=1e-12)
    program = max((p for p, _ in found), key=lambda p: max(found[k] for k in found if k[0] == p))
    assert best.program == program and best.seconds == cost.seconds(program, 40.0, chunk)
    assert best.budget == (0 if program == "plain" else cost.tokens(program) - live)
    # Never predicted below the better of plain decoding and fixed verification: both are among what it chooses from.
    fixed = (live + survival.sum() / (1 if seed % 2 else 3)) / cost.seconds("full", 40.0, chunk)
    assert best.tokens_per_second >= max(fixed, live / cost.seconds("plain", 40.0, chunk)) * (1 - 1e-12)
    drafted = choose(cost, survival, 40.0, chunk=chunk, drafts=True)
    assert drafted.tokens_per_second == pytest.approx(max(x for (p, _), x in found.items() if p != "plain"))


def test_a_curve_that_dips_and_recovers():
  """Kills: Algorithm 1's early stop in the place of the search, which stays before the dip."""
  likely = np.full((4, 3), 0.9)
  cost = table(1.0, 0.5, 2.0, {5: 0.9, 8: 2.4})
  throughput = np.arange(4, 17) * cost.sps(10.0)[4:]
  assert throughput[4] < throughput[1] < throughput[-1], "no dip, or no recovery"
  assert choose(cost, likely, 10.0).program == "full"
  assert choose(table(1.0, 0.5, 9.0, {5: 1.6, 12: 2.0}), likely, 10.0).program == 12


def test_ties_verify_fewer_tokens():
  """Kills: a choice that depends on an order, drafts made for nothing, zeros and NaN that bring something."""
  one = np.ones((4, 3))
  assert choose(table(1.0, 1.0, 3.0), one, 10.0) == Choice("plain", 0, 1.0, 4.0)
  equal = table(9.0, 1.0, 3.0, {12: 2.0, 8: 1.0})  # 8 tokens in 2 seconds, 12 in 3, 16 in 4
  assert choose(equal, one, 10.0) == Choice(8, 4, 2.0, 4.0)
  for nothing in (0 * one, np.full((4, 3), np.nan)):
    assert choose(table(1.0, 0.0, 1.0, {8: 1.0}), nothing, 10.0).program == "plain"
  half = np.where(np.arange(3) < 1, 0.5, np.nan)[None] * one
  assert choose(table(9.0, 0.0, 1.0), half, 10.0).tokens_per_second == 6.0
  assert choose(table(), one[:0], 10.0).program == "plain"  # nobody is there
  with complains("no program has room for 17 rows: the cost table is of 4 seats"):
    choose(table(), np.ones((17, 3)), 10.0)


def test_rounds_of_few_rows_are_averaged():
  """Kills: one unlucky round of a single row that ends drafting, and one lucky one that begins it."""
  cost = table(1.0, 0.5, 1.0, seats=1)
  unlucky, usual = np.zeros((1, 3)), np.full((1, 3), 0.5)
  assert choose(cost, unlucky, 10.0).program == "plain"
  assert choose(cost, np.stack([unlucky, usual, usual]), 10.0) == Choice("full", 3, 1.5, pytest.approx(2 / 1.5))


def test_what_algorithm_1_reads():
  """Kills: a curve between the points, a draft that is free, a bucket that does not hold its tokens, one entry less."""
  seconds = 1 / table(1.0, 0.5, 2.0, {6: 1.0, 9: 1.25}, slopes=0.1).sps(20.0)
  assert seconds.dtype == np.float64 and seconds.shape == (17,)
  np.testing.assert_allclose(seconds, 2 * np.array([1.5] * 7 + [1.75] * 3 + [2.5] * 7))  # ten tokens farther


def test_seconds_follow_the_context():
  """Kills: a draft forgotten or counted for plain, a slope from zero context, programs that cost nothing."""
  cost = table(1.0, 0.5, 2.0, {8: 1.5}, chunks=(3.0, 4.0), slopes=0.01)
  assert [cost.seconds(p, 10) for p in cost.programs] == [1.0, 2.0, 2.5]
  assert [cost.seconds(p, 110) for p in cost.programs] == pytest.approx([2.0, 4.0, 5.0])
  assert cost.seconds("full", 110, True) == pytest.approx(2 * 4.5) and cost.seconds("plain", 110, True) == 6.0
  assert table(1.0, slopes=1.0).seconds("plain", 0) == pytest.approx(0.1)
  with complains("a round of 8 packed tokens has no room for a prompt's"):
    cost.seconds(8, 10, True)


@pytest.mark.parametrize("bucket", [0.9, 1.1, 7.0])
def test_probes_cost_less_than_a_hundredth(bucket):
  """Kills: an interval that forgets the draft, none at all where drafting is free, no table without a drafter."""
  cost = table(1.0, 0.2, 8.0, {8: bucket})
  every, lost = probe_interval(cost, 10.0), cost.seconds(8, 10.0) - 1.0  # if it brings nothing
  assert every >= 1 and lost / (every + 1 + lost) < 0.01
  assert every == 1 or lost / (every - 1) >= 0.01, "more seldom than need be"
  assert probe_interval(table(draft=None, full=None, block=0, chunks=(2.0, None)), 10.0) > 10 ** 6


def test_a_table_comes_back_as_it_was(tmp_path):
  """Kills: buckets that come back as text, a table of plain decoding alone that cannot be read."""
  for given in (table(packed={12: 1.25, 8: 1.1}, slopes=1e-7),
                table(draft=None, full=None, block=0, chunks=(2.0, None), drafter=None)):
    shell.write_json(tmp_path / "cost.json", to_json(given))
    assert from_json(Cost, read_json(tmp_path / "cost.json"), "cost.json") == given
  assert choose(given, np.ones((2, 0)), 10.0).program == "plain"


@pytest.mark.parametrize("change, part", [
    ({"seat": 3}, "unknown key 'seat'"), ({"seats": None}, "key 'seats' is None"),
    ({"plain": {"slope": 1.0}}, "key 'plain.seconds' is missing"), ({"block": 0}, "block is 0, expected draft"),
    ({"packed": [{"seconds": 1, "tokens": 16}]}, "packed has buckets of (16,) tokens"),
    ({"draft": None}, "expected draft"), ({"full": {"seconds": -1.0, "slope": 0}}, "full.seconds' is -1.0"),
    ({"packed": {}}, "key 'packed' is {}")])
def test_damaged_tables_are_refused(change, part):
  """Kills: an unknown key passed over, a bucket nothing fits in, negative times, half a drafter."""
  with complains("c.json", part):
    from_json(Cost, to_json(table()) | change, "c.json")
  whole = to_json(table())
  for name in ("machine", "device", "seats", "context", "plain", "plain_chunk", "source"):
    with complains(f"key '{name}' is missing"):
      from_json(Cost, {key: value for key, value in whole.items() if key != name}, "c.json")


def test_another_machine_is_refused():
  """Kills: curves of one machine that decide on another."""
  check_device(table(), "cpu")
  with complains("the cost table is of cpu (made up), this is TPU v6 lite: measure one here"):
    check_device(table(), "TPU v6 lite")


def test_a_choice_takes_microseconds():
  """Kills: a search in Python over drafts; the host makes one every round."""
  rng = np.random.default_rng(0)
  cost = table(packed={n: 1.1 + n / 1e3 for n in (384, 512, 768, 1024)}, seats=256, block=7)
  survival, best = survivals(rng, 256, 7), 1.0
  for _ in range(50):
    began = time.perf_counter()
    choose(cost, survival, 30.0)
    best = min(best, time.perf_counter() - began)
  assert best < 1e-3  # 0.05 ms on a quiet core; the bound is for a busy one
