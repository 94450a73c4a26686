"""train.soak: what it compares, and what it refuses. The soak itself takes an hour: make soak."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

import dspark_jax
from dspark_jax.drafters.dspark import DSparkChoices, DSparkConfig
from dspark_jax.programs import run_folder
from folders import called, complains, llama
from train import rehearse, soak


def run_of(out, lines):
  out.mkdir()
  (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return soak.numbers(out)


ALONE = [{"step": step, "loss": 1 / step, "goodput": 0.5, "tflops_per_device": None} for step in (1, 2, 3)]


@pytest.mark.parametrize("killed, differs_at", [
  ([line | {"goodput": 0.1} for line in ALONE], None),  # the clock's
  ([*ALONE[:2], ALONE[2] | {"loss": 1 / 3 + 1e-16}], 3), (ALONE[:2], 3), ([*ALONE[:1], *ALONE[2:]], 2),
  ([*ALONE[:2], *ALONE[1:]], 2), ([*ALONE[:2], ALONE[2] | {"tau": 1.5}], 3)],
  ids=["clock", "last bit", "short", "lost", "twice", "more"])
def test_the_first_difference(killed, differs_at, tmp_path):
  """Kills: a killed run that counts as the same though a bit, a step or a number of it is another, or stands twice."""
  assert soak.first_difference(run_of(tmp_path / "alone", ALONE), run_of(tmp_path / "killed", killed)) == differs_at


def test_the_same_drafter(tmp_path):
  """Kills: drafters that differ because their files are named or dated anew; a weight whose last bit does not count."""
  target = llama()
  drafter = dspark_jax.new_drafter(DSparkConfig.for_target(DSparkChoices(taps=(0,), num_layers=1, markov_rank=2),
                                                           target.config))
  for name in ("alone", "killed", "other"):
    if name == "other":
      drafter.norm.weight.set_value(jnp.nextafter(drafter.norm.weight[...], jnp.float32(9)))
    dspark_jax.save_drafter(tmp_path / name / "drafter", drafter, target)
  assert soak.stored(tmp_path / "alone") == soak.stored(tmp_path / "killed") != soak.stored(tmp_path / "other")


def test_what_it_refuses(tmp_path, capsys, monkeypatch):
  """Kills: somebody else's folder, emptied, for it has logs or the record of a training; own folders that stay full; a
  kill while one is emptied, after which nobody may; two that empty one folder at a time."""
  mine, out = tmp_path / "mine.txt", ("--out", tmp_path)
  monkeypatch.setattr(soak, "soaked", lambda settings: {})  # an hour, where nothing is refused
  (tmp_path / "logs").mkdir()
  mine.write_text("mine")
  for program in (None, "train.train", "train.rehearse"):
    if program:
      run_folder.write_record(tmp_path, {"program": program})
    _, err = called(capsys, soak.main, soak.Settings, *out, code=2)
    assert f"{tmp_path} holds something that train.soak did not write: choose another --out" in err
    assert mine.read_text() == "mine"
  with run_folder.owned(tmp_path), complains("is in use by process"):
    rehearse.main(rehearse.Settings(tmp_path))
  rehearse.emptied(tmp_path, "train.rehearse")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "run.json"]
  mine.symlink_to(tmp_path.parent)
  rehearse.emptied(tmp_path, "train.rehearse")
  assert not mine.is_symlink() and tmp_path.parent.exists()
  _, err = called(capsys, soak.main, soak.Settings, "--every", 0, code=2)
  assert "every is 0" in err


def test_how_a_part_ended(tmp_path):
  """Kills: a mistake that the log tells and the sentence does not; a note on None where there is none."""
  (tmp_path / "logs").mkdir()
  (tmp_path / "logs" / "train-1.log").write_text("loading\nerror: no data\n")
  ended = lambda *codes: [SimpleNamespace(wait=lambda seconds, code=code: code, poll=lambda: 0) for code in codes]
  with complains(f"train ended with [1, 2], expected 0 (error: no data): see {tmp_path}"):
    rehearse.finish(soak.Settings(tmp_path), ended(1, 2), "train")
  with complains(f"train ended with [0, None] (None: not within {rehearse.LIMIT} seconds), expected 0: see"):
    rehearse.finish(soak.Settings(tmp_path), ended(0, None), "train")
  rehearse.finish(soak.Settings(tmp_path), ended(0, 0), "train")


def test_starts_in_vain_end(tmp_path, monkeypatch):
  """Kills: a soak that kills for ever a training which never comes to a checkpoint."""
  monkeypatch.setattr(rehearse, "started", lambda *args: [Sleeper()])
  settings = soak.Settings(out=tmp_path, every=0)
  with complains("3 starts of 0 seconds", "longer --every"), soak.shell.bar() as bar:
    soak.live(settings, "killed", ["train.train"], 0, bar)
  assert Sleeper.killed == soak.VAIN


class Sleeper:
  """A process that never ends by itself."""
  killed, code = 0, None

  def poll(self):
    return self.code

  def send_signal(self, number):
    Sleeper.killed += 1
    self.code = -number

  def wait(self, timeout=None):
    return self.code

  def kill(self):
    self.code = -9
