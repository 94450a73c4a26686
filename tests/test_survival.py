"""train.survival: which predictor of survival wins, measured on rounds whose truth is planted."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from folders import DSPARK, complains
from train import calibrate, survival as subject
from train.survival import Prompt

BLOCK = 3


def planted(weights, prompts=40, rounds=60, seed=0):
  """Prompts whose drafts survive by a logistic regression of (the estimator's feature, the head's logit)."""
  rng = np.random.default_rng(seed)
  for name in range(prompts):
    f = 1.5 * rng.normal(size=(rounds, BLOCK, 2))
    kept = np.cumprod(rng.random((rounds, BLOCK)) < 1 / (1 + np.exp(-(f @ np.asarray(weights)))), axis=1).sum(1)
    yield Prompt(str(name), tuple(kept.tolist()), (BLOCK,) * rounds, tuple(f.tolist()))


@pytest.mark.parametrize("weights, best", [((0.0, 1.0), "head"), ((1.0, 0.0), "estimator"), ((0.8, 0.8), "both")])
def test_the_truth_wins(weights, best):
  """Kills: predictors that read each other's feature, prompts that fit and report at once, survivals for hazards."""
  found = subject.compare("T=1", list(planted(weights)), BLOCK, True)
  losses = {name: found[name]["log_loss_all"] for name in subject.PREDICTORS}
  assert losses[best] < min(losses.values()) + 0.01  # `both` contains the others
  assert losses[best] < losses["head" if best == "estimator" else "estimator"] - 0.03
  assert max(found[best]["ece"]) < 0.06 and min(found[best]["auc"]) > 0.65
  # Who is right errs by chance alone. Kills: chance of single drafts, not of survivals.
  ratio = lambda name: np.divide(found[name]["ece"], found[name]["ece_by_chance"])
  assert (0.5 < ratio(best)).all() and (ratio(best) < 1.6).all()
  counts = found["observations"]["report"]
  assert counts[0] == 20 * 60 and counts[0] > counts[1] > counts[2] > 0


def test_what_was_not_verified_does_not_count():
  """By hand. Kills: a label past the first rejection, a stop token's cut that counts as a rejection."""
  p = np.array([[0.5, 0.9], [0.5, 0.9], [0.25, 0.9]])
  found = subject.measure(p, np.array([0, 2, 1]), np.array([2, 2, 1]))
  np.testing.assert_allclose(found["log_loss"], [-np.log([0.5, 0.5, 0.25]).mean(), -np.log(0.9)])
  np.testing.assert_allclose(found["log_loss_all"], -np.log([0.5, 0.5, 0.25, 0.9]).mean())


def test_a_drafter_without_a_head():
  """Kills: a head's predictor made of a feature that is not there; a position that was never observed."""
  short = [Prompt(p.id, (0,) * len(p.kept), p.verified, tuple(tuple(f[:1] for f in row) for row in p.features))
           for p in planted((1.0, 0.0), prompts=6)]
  found = subject.compare("greedy", short, BLOCK, False)
  assert set(found) == {"estimator", "observations"} and found["observations"]["report"] == [180, 0, 0]
  assert found["estimator"]["log_loss"][1:] == [None, None]
  subject.table({"greedy": found})


def test_no_draft_was_verified():
  """Kills: NaN as JSON, or an IndexError, for replies that end at once."""
  some, none = Prompt("1", (0,), (3,), (((0.0, 0.0),) * BLOCK,)), Prompt("2", (), (), ())
  for prompts, half in (([none, some], "fit"), ([some, none], "report")):
    with complains(f"T=1: none of the 1 prompts that {half} verified a draft"):
      subject.compare("T=1", prompts, BLOCK, True)


def test_broken_weights_are_said(monkeypatch):
  """Kills: rounds of NaN logits kept for ever in a file, as if the text had ended."""
  ended = SimpleNamespace(done=np.ones(3, bool), failed=np.array([False, True, True]))
  monkeypatch.setattr(subject, "_start", lambda *_, **__: ended)
  with complains("NaN logits or confidences in rows [7]"):  # the third row fills the batch up
    subject.play_out(SimpleNamespace(args=(None,) * 4, static={"capacity": 8}, indices=(5, 7)))


def test_a_drafter_of_another_library():
  """Kills: a folder that is refused for having no place to store what is never stored."""
  drafter = Path(DSPARK)
  assert calibrate.check(subject.Settings("t", drafter)) == {"greedy": 0, "T=1": 1}
  with complains("nowhere does not exist"):
    calibrate.check(subject.Settings("t", drafter / "nowhere"))
