"""train.train as a user runs it: what it leaves, runs that are killed and go on, mistakes."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import dspark_jax
from dspark_jax.data import pipeline
from dspark_jax.data.features import Heard
from dspark_jax.data.rows import Rows
from dspark_jax.drafters import MTP, DSpark
from dspark_jax.nn.parameters import values
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import hosts, run_folder, shell
from infer import generate
from train import train
from train.config import TrainConfig, read_config
from folders import LLAMA, MASK, TAPS, assert_same_weights, called, complains, copied, cut, files, llama
from test_programs import TRAINED, folder, read, spawn  # noqa: F401 (a fixture)

STEPS = 8


def experiment(folder, out, **changes) -> TrainConfig:
  return TrainConfig(**{**dict(
      target=str(folder / "target"), out=Path(out), data=(folder / "data.jsonl", folder / "data.txt"), steps=STEPS,
      batch=2,
      row_length=48, anchors=4, save_every=3, log_every=1, drafter=DSpark.Settings(
          taps=TAPS, mask_token_id=MASK, num_layers=1, block_size=3, markov_rank=8, draft_vocab_size=64)), **changes})


def log_of(out: Path) -> list[dict]:
  return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, tuple]:
  return {r["step"]: (r["loss"], r["tau"], r["grad_norm"]) for r in log_of(out)}


def test_what_precedes_the_first_step_is_named(folder, tmp_path, capsys):
  """Kills: minutes without a word in which a start from target and bigrams is made, or the step is compiled."""
  drafter = dataclasses.replace(experiment(folder, tmp_path).drafter, from_target=True, from_bigrams=True)
  train.main(experiment(folder, tmp_path / "run", drafter=drafter, steps=1))
  said = capsys.readouterr().err.splitlines()
  phases = ["counting words", "starting from the target", "counting bigrams", "compiling the training step"]
  assert [line for line in said if line in phases] == phases and said.index(phases[-1]) < said.index("training: 0 of 1")


@pytest.fixture(scope="module")
def uninterrupted(folder):
  out = folder / "uninterrupted"
  return out, train.main(experiment(folder, out))


def test_training_leaves_what_it_promises(folder, uninterrupted):
  """Kills: a run without its record, a drafter that load_drafter cannot read, a last step that is not saved."""
  out, result = uninterrupted
  assert set(result) == TRAINED
  json.dumps(result, allow_nan=False)
  assert result["steps"] == STEPS and result["checkpoint"] == str(out) and len(result["accept_rate"]) == 3
  assert [r["step"] for r in log_of(out)] == list(range(1, STEPS + 1))
  run = read(out / "run.json")
  assert run["total_steps"] == STEPS and run["config"]["drafter"]["taps"] == [*TAPS] and run["data"] and run["versions"]
  drafter = dspark_jax.load_drafter(out, llama())
  assert drafter.words.shape == (64,) and 2 in drafter.words  # the end of a reply can always be drafted
  assert len(dspark_jax.generate(llama(), drafter, [[5, 6, 7]], max_new_tokens=6).tokens[0]) == 6
  assert [p.name for p in sorted((out / "steps").iterdir())][-1] == str(STEPS)


def at_step(step: int, action, monkeypatch):
  """Runs `action` when the training loop has begun the step of that index (from 0), once."""
  real = hosts.beat
  def beat(done):
    real(done)
    if done == step + 1:
      monkeypatch.setattr(hosts, "beat", real)
      action()
  monkeypatch.setattr(hosts, "beat", beat)


def test_sigterm_saves_and_the_run_goes_on(folder, uninterrupted, monkeypatch, tmp_path):
  """Kills: work lost between two saves; a resumed run that repeats data, anchors, warm-up or moments; a second SIGTERM,
  which ends the save that the first one began."""
  at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  handler = lambda: signal.getsignal(signal.SIGTERM)
  save, before, held = dspark_jax.save_drafter, handler(), []
  monkeypatch.setattr(dspark_jax, "save_drafter", lambda *args: held.append(handler()) or save(*args))
  result = train.main(experiment(folder, tmp_path / "run"))
  assert held[0] is not before and handler() is before
  assert result["steps"] == 5 and len(log_of(tmp_path / "run")) == 5
  result = train.main(experiment(folder, tmp_path / "run"))
  assert result["steps"] == STEPS
  assert losses(tmp_path / "run") == losses(uninterrupted[0])
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "run", llama()),
                      dspark_jax.load_drafter(uninterrupted[0], llama()))
  record = run_folder.read_record(tmp_path / "run", train.PROGRAM, {"finished": bool})
  run_folder.write_record(tmp_path / "run", {k: v for k, v in record.items() if k not in ("finished", "target")})
  stored = files(tmp_path / "run" / "drafter")
  again = train.main(experiment(folder, tmp_path / "run"))  # nothing is left to do, by an older record neither
  assert files(tmp_path / "run" / "drafter") == stored
  assert again["steps"] == STEPS and again["loss"] == result["loss"] and set(again) == TRAINED


def test_microbatches_are_no_part_of_a_run(folder, uninterrupted):
  """Kills: a run that more devices cannot go on with, as their batch divides into fewer parts."""
  assert train.main(experiment(folder, uninterrupted[0], microbatches=2))["steps"] == STEPS


@pytest.mark.thorough
def test_a_run_goes_on_on_another_mesh(folder, uninterrupted, monkeypatch, capsys, tmp_path):
  """Kills: a program that leaves its mesh aside; a mesh, or the microbatches that suit it, among what tells runs apart;
  a state that only the mesh which saved it can read; text that depends on the mesh."""
  out = tmp_path / "run"
  at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  assert train.main(experiment(folder, out, microbatches=2))["steps"] == 3
  at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  with MeshConfig(1, 2, 1).use():
    assert train.main(experiment(folder, out, mesh=MeshConfig(1, 2, 1)))["steps"] == 5
  with MeshConfig(2, 1, 2).use():
    result = train.main(experiment(folder, out, mesh=MeshConfig(2, 1, 2)))
  assert result["steps"] == STEPS
  for step, numbers in losses(uninterrupted[0]).items():
    np.testing.assert_allclose(losses(out)[step], numbers, rtol=2e-5, err_msg=str(step))
  (tmp_path / "prompts.json").write_text("[[5, 6, 7], [8, 9]]")
  how = ("--target", folder / "target", "--drafter", uninterrupted[0], "--prompt-tokens", tmp_path / "prompts.json",
         "--max-new-tokens", "6")
  alone, _ = called(capsys, generate.main, generate.Settings, *how)
  spread, _ = called(capsys, generate.main, generate.Settings, *how, "--mesh.tensor", "2", "--mesh.data", "2")
  assert spread["tokens"] == alone["tokens"] and spread["n_accept"] == alone["n_accept"]
  _, err = called(capsys, generate.main, generate.Settings, *how, "--mesh.tensor", "9", code=2)
  assert "there are 8 devices" in err
  with MeshConfig(fsdp=4).use(), complains("expected a multiple of 4"):
    train.main(experiment(folder, tmp_path / "other", batch=2))


@pytest.mark.slow
def test_a_run_that_diverges(folder, tmp_path):
  """Kills: a broken state among the checkpoints; a sentence that does not say which rows to look at."""
  config = experiment(folder, tmp_path / "run", diverged_at=1.0)
  rows = pipeline.row_indices(14, 0, config.batch, seed=config.seed)
  with complains("step 1 diverged (loss 2.", f"on the rows {rows[0]} (", f", {rows[1]} (", ".jsonl:", "is whole"):
    train.main(config)
  assert not list((tmp_path / "run" / "steps").iterdir()) and (tmp_path / "run" / "diverged" / "1").exists()
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
  assert train.main(experiment(folder, tmp_path / "run"))["steps"] == STEPS


@pytest.mark.parametrize("change", [dict(microbatches=2), dict(save_every=2), dict(mesh=MeshConfig(data=2))])
def test_hosts_with_other_settings(change, folder, tmp_path, monkeypatch):
  """Kills: processes that compile other programs, or save at other steps, and wait for one another for ever, after the
  target was loaded; a process that may not have a number, or a way to process 0, of its own."""
  one = experiment(folder, tmp_path / "run", hosts=hosts.HostsConfig("host:1", 2, 1))
  zero = dataclasses.replace(one, hosts=hosts.HostsConfig("localhost:1", 2, 0))
  said = []
  monkeypatch.setattr(hosts, "agree", lambda make: said.append(make()) or said[0])  # the first asked is process 0
  monkeypatch.setattr(shell, "load", lambda *_: pytest.fail("loads"))
  train.check_same_settings(zero)
  train.check_same_settings(one)
  with complains(f"has another configuration than process 0 ({', '.join(change)}): give the same command"):
    train.main(dataclasses.replace(one, **change))


def test_a_damaged_checkpoint(folder, uninterrupted, tmp_path):
  """Kills: going on from other numbers than were saved; from an older state without being asked; a damaged one that
  stays in the way."""
  shutil.copytree(uninterrupted[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "drafter")
  newest = tmp_path / "run" / "steps" / str(STEPS)
  cut(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
  with complains(f"the state of step {STEPS} cannot be restored", "give --use-older"):
    train.main(experiment(folder, tmp_path / "run"))
  assert train.main(experiment(folder, tmp_path / "run", use_older=True))["steps"] == STEPS
  assert losses(tmp_path / "run") == losses(uninterrupted[0])
  assert train.main(experiment(folder, tmp_path / "run"))["steps"] == STEPS


@pytest.mark.slow
def test_kill_and_the_run_goes_on(folder, uninterrupted, tmp_path):
  """Kills: a run that a real SIGKILL spoils, or that goes on from another step than the newest saved one."""
  out = tmp_path / "run"
  config = tmp_path / "config.py"
  config.write_text(f"from pathlib import Path, PosixPath\nfrom dspark_jax.training.losses import LossConfig\n"
                    f"from dspark_jax.training.step import OptimizerConfig\n"
                    f"from dspark_jax.drafters.dspark import DSparkSettings\n"
                    "from dspark_jax.nn.attention import Kernels\nfrom dspark_jax.nn.sharding import MeshConfig\n"
                    "from dspark_jax.programs.hosts import HostsConfig\n"
                    f"from train.config import TrainConfig\nconfig = {experiment(folder, out)!r}\n")
  assert read_config(str(config)) == experiment(folder, out)
  run = spawn("train.train", "--config", config)
  until = time.monotonic() + 300
  while time.monotonic() < until and run.poll() is None:
    if (out / "metrics.jsonl").exists() and len(log_of(out)) >= 4:
      break
    time.sleep(0.01)
  run.kill()
  _, err = run.communicate()
  assert run.returncode == -signal.SIGKILL and len(losses(out)) >= 4, err
  result = train.main(experiment(folder, out))
  assert result["steps"] == STEPS
  assert losses(out) == losses(uninterrupted[0])
  assert_same_weights(dspark_jax.load_drafter(out, llama()), dspark_jax.load_drafter(uninterrupted[0], llama()))


def renormed(source: Path, target: Path) -> Path:
  """A copy of a target with another final norm: another target, by its name or none."""
  shutil.copytree(source, target)
  weights = load_file(target / "model.safetensors")
  save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, target / "model.safetensors")
  return target


def test_a_run_goes_by_what_its_target_is(folder, uninterrupted, monkeypatch, tmp_path):
  """Kills: a run that cannot go on since its target was moved; one whose steps have two teachers, since other weights
  were put where the target was."""
  shutil.copytree(folder / "target", tmp_path / "target")
  config = experiment(folder, tmp_path / "run", target=str(tmp_path / "target"))
  monkeypatch.setattr(hosts, "stops", lambda first: contextlib.nullcontext(lambda step: step == 5))
  train.main(config)
  monkeypatch.undo()
  shutil.rmtree(tmp_path / "target")
  other = renormed(folder / "target", tmp_path / "target")
  with complains("target has changed since"):
    train.main(config)
  shutil.rmtree(other)
  shutil.copytree(folder / "target", tmp_path / "elsewhere")
  save = dspark_jax.save_drafter
  monkeypatch.setattr(dspark_jax, "save_drafter", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
  config = dataclasses.replace(config, target=str(tmp_path / "elsewhere"))
  with pytest.raises(OSError):  # all steps are done, and the drafter in the folder is that of step 5
    train.main(config)
  monkeypatch.setattr(dspark_jax, "save_drafter", save)
  train.main(config)
  assert losses(tmp_path / "run") == losses(uninterrupted[0])
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "run", llama()),
                      dspark_jax.load_drafter(uninterrupted[0], llama()))


@pytest.mark.parametrize("change, word", [
    ({"steps": STEPS + 1}, "steps"), ({"seed": 1}, "seed"), ("data", "digest"), ("target", "target")])
def test_other_settings_in_the_same_folder(change, word, folder, uninterrupted):
  """Kills: going on with half of one experiment and half of another."""
  out = uninterrupted[0]
  before = losses(out)
  if change == "data":
    change = {"data": (folder / "data.jsonl",)}
  if change == "target":
    change = {"target": str(renormed(folder / "target", folder / "other"))}
  holds = "rows of other data" if word == "digest" else "a run with other settings"
  with pytest.raises(ValueError, match=rf"holds {holds} \(.*{word}.*\): give the same "):
    train.main(experiment(folder, out, **change))
  assert losses(out) == before


def test_refused_before_the_target_is_loaded(folder, uninterrupted, monkeypatch, tmp_path):
  """Kills: minutes of loading before a wrong path, another run's folder or rows that the target has no positions for
  are told of; a run that is to be longer, and no word of how; that word where more than the steps differs."""
  monkeypatch.setattr(shell, "load", lambda *_: pytest.fail("loaded"))
  out, more = uninterrupted[0], f"for more steps on what it has learned give --start-from {uninterrupted[0]}"
  run_folder.write_record(tmp_path / "other", {"program": "infer.evaluate"})
  positions = llama().max_positions
  for where, changes, part in (
      (tmp_path / "x", dict(data=(tmp_path / "nosuch",)), f"{tmp_path / 'nosuch'} is missing"),
      (tmp_path / "x", dict(data=(folder,)), "holds no prepared rows"),
      (tmp_path / "x", dict(row_length=positions + 1), f"expected at most the target's {positions} positions"),
      (tmp_path / "other", {}, "is of 'infer.evaluate', not of train.train"),
      (out, dict(seed=1), "seed was 0, is 1"), (out, dict(steps=99), more), (out, dict(steps=None, epochs=2.0), more)):
    with complains(part):
      train.main(experiment(folder, where, **changes))
  with pytest.raises(ValueError) as caught:
    train.main(experiment(folder, out, steps=99, seed=1))
  assert "steps was 8, is 99; seed was 0, is 1" in str(caught.value) and more not in str(caught.value)
  assert not (tmp_path / "x").exists()


def test_a_finished_run_without_its_log(folder, uninterrupted, tmp_path):
  """Kills: a traceback where the log of a run was moved away, or lacks a number."""
  shutil.copytree(uninterrupted[0], tmp_path / "run")
  log = tmp_path / "run" / "metrics.jsonl"
  for text, part in (('{"step": 8}\n', "metrics.jsonl, line 1 is damaged (KeyError 'loss')"), ("", "has no lines")):
    log.write_text(text)
    with complains(part):
      train.main(experiment(folder, tmp_path / "run"))
  log.unlink()
  with complains("metrics.jsonl has no lines, and the run is finished: restore it"):
    train.main(experiment(folder, tmp_path / "run"))


@pytest.mark.parametrize("record, part", [
    ({"program": "infer.evaluate", "settings": {}}, "run.json is of 'infer.evaluate', not of train.train"),
    ({"settings": {}, "samples": {}, "models": {}, "versions": {}}, "run.json has no config, data, so it is another"),
    ({"config": {"target": "5a", "drafter": "5b"}, "data": "5c"}, "holds a run with other settings ("),
    ("seed", "holds a run with other settings (seed was 1, is 0)"),
    (None, "holds metrics.jsonl, x.jsonl but no run.json")])
def test_a_folder_of_something_else(record, part, folder, uninterrupted, tmp_path):
  """Kills: the record of an evaluation, a calibration, or of a run without a checkpoint that training writes over."""
  if record == "seed":
    record = read(uninterrupted[0] / "run.json")
    record["config"]["seed"] = 1
  run_folder.append(tmp_path / "samples" / "x.jsonl", [{}])
  run_folder.append(tmp_path / "metrics.jsonl", [{"step": 1}] if record else [])
  if record:
    run_folder.write_record(tmp_path, record)
  before = files(tmp_path)
  with complains(part, "another --out"):
    train.main(experiment(folder, tmp_path))
  assert files(tmp_path) == before and not (tmp_path / "steps").exists()


def test_a_run_killed_before_its_first_checkpoint(folder, uninterrupted, tmp_path):
  """Kills: steps that were lost and stay in the log; a number of steps by the clock that is found again."""
  run_folder.write_record(tmp_path, read(uninterrupted[0] / "run.json"))
  run_folder.append(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 9.0}])
  train.main(experiment(folder, tmp_path))
  assert losses(tmp_path) == losses(uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2, 6])
def test_a_lens_is_fitted_once(kept, folder, monkeypatch, tmp_path):
  """What the target said for the lens is kept for no batch, for some, for all that it is fitted to. Kills: outputs kept
  for another batch; first steps by another program than the same steps after a restart; a resumed run that fits
  its lens again, or not at all."""
  drafter = dataclasses.replace(experiment(folder, tmp_path).drafter, lens=True)
  run = lambda name: train.main(experiment(folder, tmp_path / name, drafter=drafter, lens_rows=12))
  sizes, keep = [], Heard.keep
  monkeypatch.setattr(Heard, "keep", lambda self, step, said: sizes.append(
      sum(x.nbytes for x in jax.tree.leaves(said))) or keep(self, step, said))
  run("kept")
  assert len(sizes) == 6
  monkeypatch.setattr(train, "SAID_BYTES", kept * sizes[0])
  run("whole")
  assert len(sizes) == 6 + kept
  for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "kept"), strict=True):
    np.testing.assert_allclose([one["loss"], one["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-4)
  at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  assert run("stopped")["steps"] == 3 and run("stopped")["steps"] == STEPS
  assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_train_by_the_clock(folder, tmp_path, capsys):
  """Kills: --minutes that never fix the number of steps, or time them in silence, or on the state that is trained."""
  result = train.main(experiment(folder, tmp_path / "run", steps=None, minutes=1e-6))
  assert "timing a few steps" in capsys.readouterr().err
  assert result["steps"] == read(tmp_path / "run" / "run.json")["total_steps"] == len(log_of(tmp_path / "run")) == 8
  assert train.main(experiment(folder, tmp_path / "run", steps=None, minutes=2))["steps"] == 8  # it has its steps


@pytest.mark.slow
def test_train_by_epochs(folder, uninterrupted, monkeypatch, tmp_path):
  """Kills: epochs of all rows where some are held out; a run that goes on for another number of steps."""
  rows = len(Rows(uninterrupted[0] / "rows"))
  run = lambda **how: train.main(experiment(folder, tmp_path / "run", steps=None, eval_rows=2, minutes=9, **how))
  steps = round(2 * (rows - 2) / 2)
  at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  assert run(epochs=2)["steps"] == 2 and read(tmp_path / "run" / "run.json")["total_steps"] == steps > 2
  with complains("epochs was 2, is 3"):
    run(epochs=3)
  assert run(epochs=2)["steps"] == steps


@pytest.mark.slow
def test_a_run_that_begins_with_a_trained_drafter(folder, uninterrupted, monkeypatch, tmp_path):
  """Kills: a second stage that begins with fresh weights, of another vocabulary, or anew when it goes on; a lens fitted
  over the trained one; a start from another drafter than yesterday's."""
  first = uninterrupted[0]
  yarn = copied(LLAMA, tmp_path / "yarn", config=lambda c: c | {"rope_scaling": {
      "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}})
  for file in set(os.listdir(folder / "target")) - set(os.listdir(yarn)):
    shutil.copy(folder / "target" / file, yarn)
  run = lambda name, **how: train.main(experiment(folder, tmp_path / name, **{
      "start_from": str(first), "target": str(yarn), "steps": 3, "save_every": 2} | how))
  run("whole")
  target, before = dspark_jax.load_target(yarn), dspark_jax.load_drafter(first, llama())
  after = dspark_jax.load_drafter(tmp_path / "whole", target)
  assert after.config.spec == target.config.spec != before.config.spec
  np.testing.assert_array_equal(after.words, before.words)
  for name, value in values(after).items():  # as far as three updates go; fresh weights have a deviation of 0.02
    np.testing.assert_allclose(value, values(before)[name], atol=3 * 6.1e-4, err_msg=name)
  at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
  assert run("stopped")["steps"] == 2 and run("stopped")["steps"] == 3
  assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
  with complains("start_from was", "is None"):
    run("whole", start_from=None)
  with complains("start_from was"):
    run("whole", start_from=str(tmp_path / "whole"))
  drafter = experiment(folder, first).drafter
  for changes, parts in ((dict(block_size=4, taps=TAPS[:1]), [f"taps is {TAPS}, the run's {TAPS[:1]}",
                                                             "block_size is 3"]),
                         (dict(lens=True), ["lens is False, the run's True"])):
    with complains(str(first), *parts):
      run("other", drafter=dataclasses.replace(drafter, **changes))
  with complains("it is a DSparkConfig, the run's is a MTPConfig"):
    run("kind", drafter=MTP.Settings())
  with complains("/nowhere"):
    run("none", start_from="/nowhere")


@pytest.mark.parametrize("args, part", [
  (["--steps", "None"], "neither steps nor epochs"), (["--batch", "0"], "batch is 0"), (["--data"], "no data"),
  (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"), (["--data", "/nowhere.csv"], "/nowhere.csv"),
  (["--target", "/nowhere"], "/nowhere does not exist"), (["--depth", "3"], "--depth"),
  (["--drafter.taps", "5"], "taps [5] are out of range"), (["--optimizer.name", "sgd"], "('adamw', 'muon')"),
  (["--microbatches", "3"], "microbatches"), (["--row-length", "200"], "multiple"),
  (["--save-every", "0"], "save_every"),
  (["--lens-rows", "0"], "lens_rows is 0")])
def test_train_mistakes(args, part, folder, capsys, tmp_path):
  """Kills: an override that is ignored, or that fails in the middle of a run with a traceback."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as exit_:
    shell.run(train.main, TrainConfig, default=lambda: experiment(folder, tmp_path / "run"), args=args)
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and part in err and "Traceback" not in err
  assert not (tmp_path / "run" / "steps").exists() or not list((tmp_path / "run" / "steps").iterdir())
