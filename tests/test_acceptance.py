"""The numbers of an evaluation: accepted lengths, acceptance and survival by position."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import dspark_jax
from dspark_jax.decoding import acceptance
from dspark_jax.decoding.acceptance import Rounds
from dspark_jax.decoding.calibration import calibrate
from folders import DSPARK, GOLDEN, golden_cases
from test_evaluate import one_layer, target  # noqa: F401 (a fixture)


def golden_texts(case: str, run: str) -> tuple[list[Rounds], dict]:
  golden = np.load(GOLDEN / case / "outputs.npz")
  count = sum(name.startswith(f"{run}/prompt") and name.endswith("/acceptance_lengths") for name in golden)
  rounds = [Rounds.of(*(golden[f"{run}/prompt{i}/{name}"] for name in (
      "accepted_draft_lengths", "proposal_lengths", "acceptance_lengths"))) for i in range(count)]
  return rounds, {name.rpartition("/")[2]: golden[name] for name in golden if name.startswith(f"{run}/metrics/")}


# The original DFlash's files hold no accepted drafts.
MEASURED = [(case, key.partition("/")[0]) for case in golden_cases("generate_", "t0/prompt0/accepted_draft_lengths")
            for key in np.load(GOLDEN / case / "outputs.npz") if key.endswith("/metrics/acceptance_length")]


@pytest.mark.parametrize("case, run", MEASURED)
def test_metrics_are_the_reference_s(case, run):
  """Kills: means of means over samples; a verify rate without the bonus slots; a stop token counted twice; acceptance
  by position of drafts that were never verified."""
  rounds, wanted = golden_texts(case, run)
  got = acceptance.summary(rounds, len(wanted["accept_rates_by_position"]))
  assert got["accepted_length"] == pytest.approx(float(wanted["acceptance_length"]), rel=1e-6)
  assert got["drafts_per_round"] == pytest.approx(float(wanted["draft_tokens_per_proposal"]), rel=1e-6)
  assert got["verify_rate"] == pytest.approx(float(wanted["verify_rate"]), rel=1e-6)
  # The reference's rates are of all verified drafts, whether or not those before were kept: survival, not acceptance.
  survival = [-1 if value is None else value for value in got["survival"]]  # of positions that no round verified
  assert survival == pytest.approx(wanted["accept_rates_by_position"].tolist(), rel=1e-6)
  low, high = got["accepted_length_interval"]
  assert low <= got["accepted_length"] <= high
  assert (low < high) == (len({float(np.mean(text.n_commit)) for text in rounds}) > 1)


def test_metrics_by_hand():
  """Kills: acceptance that is not conditional on the drafts before, or counts drafts past the threshold; survival taken
  for it; a rejected token counted past the verified ones."""
  text = Rounds.of([2, 0, 1, 3, 0], [3, 3, 1, 3, 0], [3, 1, 2, 3, 1])  # the fourth round ended at a stop token
  got = acceptance.summary([text], 4)
  assert got["reached"] == [4, 2, 2, 0] and got["acceptance"] == [3 / 4, 2 / 2, 1 / 2, None]
  assert got["verified"] == [4, 3, 3, 0] and got["survival"] == [3 / 4, 2 / 3, 1 / 3, None]
  assert got["rounds"] == 5 and got["accepted_length"] == 10 / 5 and got["verify_rate"] == 10 / 15
  assert got["accepted_tokens"] == 6 and got["rejected_tokens"] == 4 and got["drafts_per_round"] == 2
  assert got["accepted_length_interval"] == [2, 2]  # one text has no spread
  nothing = acceptance.summary([Rounds.of([], [], [], [])], 2)
  assert nothing["accepted_length"] is None and nothing["acceptance"] == [None, None] and nothing["rounds"] == 0
  json.dumps(nothing, allow_nan=False)
  assert acceptance.reliability_of([Rounds.of([], [], [], []), Rounds.of([1], [2], [2], [[0.5, 0.5]])],
                                   2).ece.shape == (2,)


def test_interval():
  """Kills: a bootstrap over rounds, which takes the rounds of one text for independent; another interval at each
  start."""
  even = [Rounds.of([n] * 50, [4] * 50, [n + 1] * 50) for n in (0, 4)]
  low, high = acceptance.interval([even])
  assert (low, high) == (1, 5)  # one draw in four takes the same text twice
  many = [Rounds.of([n], [4], [n + 1]) for n in [0, 4] * 200]
  low, high = acceptance.interval([many])
  assert 3 - 1.96 * 2 / 20 == pytest.approx(low, abs=0.05) and 3 + 1.96 * 2 / 20 == pytest.approx(high, abs=0.05)
  assert acceptance.interval([many]) == [low, high]


def test_uncalibrate():
  """Kills: dividing by the temperature twice; a confidence of exactly 0 or 1 that becomes NaN."""
  raw, temperatures = np.array([[0.2, 0.9, 0.5], [0.0, 1.0, 0.999]]), np.array([2.0, 0.5, 1.3])
  calibrated = calibrate(jnp.asarray(raw, jnp.float32), jnp.asarray(temperatures, jnp.float32))
  np.testing.assert_allclose(acceptance.uncalibrate(np.asarray(calibrated, np.float64), temperatures), raw, atol=1e-5)


def test_delivered():
  """Kills: tokens past a stop token or past the limit, counted although nobody got them: accepted lengths of 5 in texts
  of two tokens."""
  assert acceptance.delivered([1, 0, 4], 9) == [2, 1, 5]
  assert acceptance.delivered([1, 0, 4], 8) == [2, 1, 4]
  assert acceptance.delivered([1, 0, 4], 5) == [2, 1, 1]
  assert acceptance.delivered([], 1) == [] and acceptance.accepted_length([]) is None
  assert acceptance.accepted_length([2, 1, 1]) == 4 / 3


@pytest.mark.slow
def test_one_accepted_length():
  """Kills: programs that count a cut round in ways of their own. Every count is of the tokens that were delivered."""
  drafter = dspark_jax.load_drafter(DSPARK, target())
  out = dspark_jax.generate(target(), drafter, [[1, 2, 3], [4, 5]], max_new_tokens=6, stop_token_ids=(119,))
  texts = [acceptance.Rounds.of(*row) for row in zip(out.n_accept, out.n_verify, out.n_commit)]
  wanted = sum(len(tokens) - 1 for tokens in out.tokens) / out.rounds
  assert out.accepted_length == acceptance.summary(texts, drafter.block_size)["accepted_length"] == wanted
  assert wanted < np.mean([n + 1 for row in out.n_accept for n in row])  # the limit did cut
