"""What the engine's choice of a program goes by."""

import types

import numpy as np
import pytest

from dspark_jax.decoding import dispatch
from dspark_jax.decoding.dispatch import Dispatcher
from infer import machines
from test_cost import table


def dispatcher(cost, policy="scheduled"):
  config = types.SimpleNamespace(policy=policy, seats=cost.seats, confidence_threshold=0.0, survival_threshold=0.0)
  return Dispatcher(config, cost, cost.block, tuple(cost.packed))


def test_packed_programs_lie_between_plain_and_full():
  """Kills: two of them for 8 seats of 7 drafts, where rows ask for 2 to 6 tokens each; one as large as the full one;
  other buckets in infer.simulate than the engine has."""
  assert dispatch.default_buckets(8, 7) == (16, 24, 32, 48) and dispatch.default_buckets(6, 7) == (12, 20, 24, 36)
  assert dispatch.default_buckets(1, 7) == (4,) and dispatch.default_buckets(8, 0) == ()
  assert tuple(machines.cost("v6e", "qwen3-8b", 12, 64).packed) == dispatch.default_buckets(12, 7)


def test_a_past_is_filled_with_what_is_typical():
  """Kills: a first bad round that counts as all of a new row's past, the oldest rounds in place of the newest."""
  found = dispatcher(table())
  found.observe(np.array([0.5, 0.5, 0.5]))
  typical = 1 + 0.02 * (np.array([0.5, 0.25, 0.125]) - 1)
  rows = [[], [np.full(3, 0.5)], [np.full(3, x) for x in (0.1, 0.2, 0.3)]]
  survival = found._survivals(rows, 2)
  assert survival.shape == (2, 3, 3)
  np.testing.assert_allclose(survival[:, 0], [typical, typical])
  np.testing.assert_allclose(survival[:, 1], [[0.5, 0.25, 0.125], typical])
  np.testing.assert_allclose(survival[:, 2], [np.cumprod(np.full(3, 0.3)), np.cumprod(np.full(3, 0.2))])


def test_one_bad_round_of_a_single_row_ends_nothing():
  """Kills: a program chosen by the newest round alone, after which a row that would have paid is decoded plainly."""
  cost = table(1.0, 0.2, 1.0, seats=1)
  usual, bad = np.full(3, 0.6), np.zeros(3)
  chosen = lambda past: dispatcher(cost).choose([past], [10], False).program
  assert chosen([usual] * 15 + [bad]) == "full" == chosen([bad]) and chosen([bad] * 16) == "plain"


@pytest.mark.parametrize("live", [1, 8, 60, 200])
def test_as_many_rounds_as_few_rows_need(live, monkeypatch):
  """Kills: rounds of hundreds of rows sorted sixteen times."""
  seen = []
  monkeypatch.setattr(dispatch, "choose", lambda cost, survival, *_, **__: seen.append(survival.shape) or
                      types.SimpleNamespace(program="full"))
  dispatcher(table(seats=200)).choose([[np.ones(3)] * 16] * live, [10] * live, False)
  assert seen == [({1: 16, 8: 16, 60: 3, 200: 1}[live], live, 3)]


def test_rounds_that_ran_correct_the_table():
  """Kills: a table that is believed however long its rounds take; one late round that ends the drafts; a program that
  was slow once and is never tried again; what plain rounds beside a prompt take, counted as what they take alone."""
  found, past = dispatcher(table(1.0, 0.2, 1.0, seats=1)), [[np.full(3, 0.6)] * 16]
  chosen = lambda: found.choose(past, [10], False).program
  assert chosen() == "full"  # 2.2 tokens in 1.2 s, by the table
  found.landed("full", 1.2, 100.0)
  assert chosen() == "full"
  for _ in range(80):
    found.landed("plain+chunk", 1.0, 4.0)
    found.landed("full", 1.2, 3.0)
  assert chosen() == "plain"
  for rounds in range(2000):
    if chosen() == "full" == chosen():  # not a single one, to see whether drafts survive again
      break
    found.landed("plain", 1.0, 1.0)
  assert 100 < rounds < 1000


def test_a_machine_that_beats_its_table_is_no_reason_to_stay():
  """Kills: a drafted program, played while drafts were good, that is kept when they are worse for nothing but that the
  machine is faster than its table, which only what was played has shown; plain rounds likewise."""
  cost = table(1.0, 0.2, 1.0, seats=1)
  for first, second in (("full", "plain"), ("plain", "full")):
    found = dispatcher(cost)
    takes = {"plain": 0.7, "full": 0.7 * 1.2}
    chosen = lambda drafts: found.choose([[np.full(3, drafts)] * 16], [10], False).program
    for _ in range(1000):
      found.landed(first, cost.seconds(first, 10), takes[first])
    drafts = {"plain": 0.1, "full": 0.3}[second]  # 1.11 tokens in the time of 1.2, or 1.42
    for rounds in range(3000):
      program = chosen(drafts)
      if program == second == chosen(drafts):
        break
      found.landed(program, cost.seconds(program, 10), takes[program])
    assert rounds < 1500, (first, rounds)


def test_rounds_that_are_read_together_are_no_faster():
  """Kills: a mean of logarithms, in which one round of nothing outweighs one of twice the time."""
  pace = dispatch.Pace()
  for _ in range(200):
    pace.landed("full", 1.0, 2.0)
    pace.landed("full", 1.0, 0.0)
  assert pace("full") == pytest.approx(1, abs=0.06) and pace("plain") == pytest.approx(1, abs=0.01)
