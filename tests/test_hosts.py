"""Several processes that train together on this machine: the same numbers, ends with a sentence, runs that go on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax.programs import hosts
from folders import LLAMA, MASK, TAPS, WORDS, complains, llama, slow_but, thorough_but, with_tokenizer

ROOT = Path(dspark_jax.__file__).parents[1]
DEVICES = 4  # of all processes together, so that the mesh, and with it every sum, is the same
STEPS = 8
CONFIG = """
from pathlib import Path
from dspark_jax.drafters import DSpark
from train.config import TrainConfig
config = TrainConfig(target={target!r}, out=Path({out!r}), data=(Path({data!r}),), steps={steps}, batch=4,
                     row_length=48, anchors=4, save_every=3, log_every=1, drafter=DSpark.Settings(
                         taps={taps}, mask_token_id={mask}, num_layers=1, block_size=3, markov_rank=8,
                         draft_vocab_size=64))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  rows = [{"tokens": rng.integers(5, WORDS, 40).tolist(), "loss_mask": [0] * 8 + [1] * 32} for _ in range(12)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def free_port() -> int:
  with socket.socket() as made:
    made.bind(("localhost", 0))
    return made.getsockname()[1]


def started(folder: Path, out: str, processes: int, *more, steps: int = STEPS, alone: int | None = None,
            program=("-m", "train.train")):
  """The processes of a training, or the one of them that is named."""
  config = folder / f"{out}.py"
  config.write_text(CONFIG.format(target=str(folder / "target"), out=str(folder / out), data=str(folder / "data.jsonl"),
                                  steps=steps, mask=MASK, taps=TAPS))
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes), "PYTHONPATH": str(ROOT)}
  joined = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.processes", str(processes), "--hosts.silence",
            "8"] if processes > 1 else []
  command = [sys.executable, *program, "--config", str(config), "--mesh.data", "2", "--mesh.fsdp", "-1",
             *joined, *map(str, more)]
  one = lambda i: subprocess.Popen([*command, *(["--hosts.process", str(i)] if joined else [])], cwd=ROOT, text=True,
                                   env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  return [one(i) for i in (range(processes) if alone is None else [alone])]


def ended(running, timeout: float = 240) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each."""
  until = time.monotonic() + timeout
  try:
    texts = [p.communicate(timeout=max(until - time.monotonic(), 0.1)) for p in running]
  finally:
    for p in running:
      p.kill()
  return [(p.returncode, *text) for p, text in zip(running, texts)]


def log_of(out: Path) -> list[dict]:
  file = out / "metrics.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(out: Path) -> dict[int, tuple]:
  return {r["step"]: (r["loss"], r["tau"], r["grad_norm"]) for r in log_of(out)}


def wait_for(out: Path, steps: int, running) -> None:
  until = time.monotonic() + 200
  while len(log_of(out)) < steps and time.monotonic() < until and all(p.poll() is None for p in running):
    time.sleep(0.01)


def test_flags_that_mean_nothing():
  """Kills: a process that waits for others which cannot come."""
  for flags, part in ((dict(processes=2, process=2), "process is 2, expected 0 to 1"),
                      (dict(silence=1), "silence is 1"),
                      (dict(coordinator="here"), "expected HOST:PORT")):
    with complains(part):
      hosts.HostsConfig(**flags)


@pytest.mark.parametrize("told, count", [
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-4]"}, 4), ({"SLURM_NTASKS": "1"}, 1),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, 2), ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, 3),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1), ({"JAX_COORDINATOR_ADDRESS": "a:1"}, 2), ({}, 1)])
def test_what_launchers_say(told, count, monkeypatch):
  """Kills: a program for one process that a launcher starts four times; a single process that waits for a cluster (a
  Slurm job's own shell has the number of tasks, and is none of them, though it has the number of one)."""
  for name in (*hosts.TOLD, "SLURM_PROCID", "SLURM_STEP_NODELIST"):
    monkeypatch.delenv(name, raising=False)
  for name, value in told.items():
    monkeypatch.setenv(name, value)
  if count == 1:
    hosts.refuse("infer.generate")
  else:
    with complains("infer.generate runs in one process", "start it once"):
      hosts.refuse("infer.generate")


MEMBER = """
import contextlib, sys, time
from dspark_jax.programs import hosts, shell
config = hosts.HostsConfig({at!r}, {processes}, {process}, {timeout}, 4)
class Settings:
  hosts = config
shell.tyro.cli = lambda *_, **__: Settings
def main(_):
  assert hosts.agree(lambda: [hosts.here.process, None, "a"]) == [0, None, "a"]
  assert hosts.everyone([hosts.here.process]) == [[i] for i in range({processes})]
  print("together", file=sys.stderr, flush=True)
  if {wrong} == hosts.here.process:
    raise {error}
  with contextlib.nullcontext() if {busy} == hosts.here.process else hosts.waiting():
    time.sleep({seconds})
  return {{"process": hosts.here.process}}
shell.run(main, object, mesh=False)
"""


MISTAKE = "ValueError('this file is not there: bring it')"


def members(wrong=None, seconds: float = 40, which=(0, 1), timeout: int = 60, processes: int = 2, error=MISTAKE,
            busy=None):
  """Processes that do nothing but belong together."""
  at = f"localhost:{free_port()}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
  return [subprocess.Popen([sys.executable, "-c", MEMBER.format(
      at=at, processes=processes, process=i, wrong=wrong, error=error, seconds=seconds, timeout=timeout,
      busy=busy)], text=True,
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in which]


def until_together(running):
  for p in running:
    while "together" not in (line := p.stderr.readline()):
      assert line, "it ended before"


@pytest.mark.parametrize("victim", slow_but([0], [0, 1]))
def test_a_dead_process_is_named(victim):
  """Kills: a process that waits for ever for one that is gone, or ends without saying which."""
  running = members()
  until_together(running)
  began = time.monotonic()
  running[victim].kill()
  code, _, err = ended(running, 60)[1 - victim]
  assert time.monotonic() - began < 60 and code != 0
  assert f"error: process {victim} on {socket.gethostname()} " in err and "goes on from the newest checkpoint" in err
  assert code == hosts.AGAIN or victim == 0  # JAX aborts without its process 0


@pytest.mark.slow
def test_all_say_who_is_dead():
  """Kills: a process 0 that ends, and JAX with it, before others that look later have seen why."""
  running = members(which=(0, 1, 2), processes=3)
  until_together(running)
  running[2].kill()
  for code, _, err in ended(running, 60)[:2]:
    assert code == hosts.AGAIN and f"error: process 2 on {socket.gethostname()} " in err, err


@pytest.mark.parametrize("busy", slow_but([1], [None, 0, 1]))
def test_a_slow_process_is_named(busy):
  """Kills: a host whose data are late, for which all others wait without a word; one that is named since it waits."""
  (code, _, err), (other, _, its) = ended(members(seconds=8, busy=busy), 60)
  assert code == other == 0 and "slow" not in its
  said = [line for line in err.splitlines() if "is slow" in line]
  expected = [] if busy is None else [f"process {busy} on {socket.gethostname()} is slow, and the others wait for it"]
  assert [line.partition(":")[0] for line in said] == expected, err


def test_nobody_comes():
  """Kills: an abort with pages of text, or a process that waits for ever, where process 0 was not started; a host that
  is late and counts as a mistake, which nobody tries again."""
  (code, out, err), = ended(members(which=(1,), timeout=1), 60)
  assert code == hosts.AGAIN and "process 1 found nobody at localhost:" in err and "Traceback" not in err and not out


@pytest.mark.parametrize("said, kind", [(RuntimeError("address in use\nat ..."), hosts.Apart),
                                        (ValueError("coordinator_address should be defined."), ValueError)])
def test_who_is_late_makes_no_mistake(said, kind, monkeypatch):
  """Kills: a port that is not free yet, or a name that is not known yet, taken for a mistake in the flags, or one of
  these that is tried again and again; pages of text."""
  def initialize(**_):
    raise said
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with complains(f"({str(said).splitlines()[0]})", error=kind), hosts.join(hosts.HostsConfig(processes=2)):
    pytest.fail("alone")


@pytest.mark.parametrize("more, flags, asked", [
    ({}, dict(coordinator="a:1"), ("a:1", 4, 2, [1])), ({}, dict(coordinator="a:1", processes=2, process=1),
                                                        ("a:1", 2, 1, None)),
    ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, dict(coordinator="a:1"), ("a:1", 4, 2, None)),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, {}, (None, None, None, None)), ({}, {}, None)])
def test_open_mpi(more, flags, asked, monkeypatch):
  """Kills: "coordinator_address should be defined" for Open MPI 5, of which JAX knows nothing; processes that all take
  all GPUs of the host there, or one alone where they were placed by hand; older versions, which JAX knows, that are
  told something else."""
  def initialize(**how):
    assert tuple(how[name] for name in ("coordinator_address", "num_processes", "process_id",
                                        "local_device_ids")) == asked
    raise RuntimeError("address in use")
  for name, value in ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
                      | more).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(hosts, "_reach", lambda config: None)
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  said, kind = ("address in use", hosts.Apart) if asked else ("Open MPI 5 does not say", ValueError)
  with complains(said, error=kind), hosts.join(hosts.HostsConfig(**flags)):
    pytest.fail("alone")


def test_one_speaks_and_all_end():
  """Kills: two results, a process that is left behind at the end."""
  (code, out, err), (other, silent, _) = ended(members(seconds=0), 60)
  assert code == other == 0, err
  assert json.loads(out) == {"process": 0} and not silent


RESUMED = """
import os, signal, time
from dspark_jax.programs import hosts
with hosts.join(hosts.HostsConfig({at!r}, 2, {process}, 60, 8)), hosts.stops(1000) as stop:
  hosts.agree(lambda: None)
  if {process}:
    os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(3)  # what a start takes to load and compile
  hosts.agree(lambda: None)
  print([step for step in range(1001, 1004) if stop(step)])
"""


def test_sigterm_before_the_first_step_is_heard():
  """Kills: a run that goes on at step 1001 and never stops, since JAX agreed on step 1 when the signal came."""
  at, environment = f"localhost:{free_port()}", os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
  running = [subprocess.Popen([sys.executable, "-c", RESUMED.format(at=at, process=i)], env=environment, text=True,
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in (0, 1)]
  assert [(code, out) for code, out, _ in ended(running, 60)] == [(0, "[1001]\n")] * 2


# By what is raised: the exit code of all, what its process says, what the others do.
ENDS = {MISTAKE: (2, "error: this file is not there: bring it", "this file is not there"),
        "KeyError('taps')": (1, "Traceback", "KeyError: 'taps'"), "KeyboardInterrupt": (130, "", "interrupted")}


@pytest.mark.parametrize("error", slow_but([MISTAKE], ENDS))
def test_the_end_of_one_ends_all(error):
  """Kills: a mistake on one host (a file that is not there), or a fault of the program, that the others wait for; a
  fault that looks like a mistake to who would start all again."""
  left, own, told = ENDS[error]
  (code, _, err), (other, _, its) = ended(members(wrong=1, error=error), 60)
  assert code == other == left and own in its
  assert f"error: process 1 on {socket.gethostname()} ended: {told}" in err and "Traceback" not in err


# Trainings


@pytest.fixture(scope="module")
def undisturbed(folder):
  """(run folder, its losses) of two processes of two devices."""
  for code, _, err in ended(started(folder, "undisturbed", 2)):
    assert code == 0, err
  return folder / "undisturbed", losses(folder / "undisturbed")


@pytest.mark.parametrize("processes", thorough_but([], [4], [1, 4]))
def test_the_same_numbers_on_any_number_of_hosts(processes, folder, undisturbed):
  """Kills: batches that depend on the number of processes, a mean of the processes' means, a drafter of which a part is
  stored; more than one that speaks."""
  results = ended(started(folder, f"on{processes}", processes))
  assert [code for code, _, _ in results] == [0] * processes, results
  assert json.loads(results[0][1].splitlines()[-1])["steps"] == STEPS
  assert not any('"steps"' in out or "data:" in err for _, out, err in results[1:])
  for step, numbers in losses(folder / f"on{processes}").items():
    np.testing.assert_allclose(numbers, undisturbed[1][step], rtol=1e-5, err_msg=str(step))
  drafters = [dspark_jax.load_drafter(out, llama()) for out in (folder / f"on{processes}", undisturbed[0])]
  one, two = (jax.tree.leaves(drafter) for drafter in drafters)
  for a, b in zip(one, two, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("victim", thorough_but([], [0], [0, 1]))
def test_kill_one_and_the_run_goes_on(victim, folder, undisturbed):
  """Kills: a state that one process saved without the other; a batch, an anchor or a moment that a restart changes; a
  process that waits for the dead one."""
  out = folder / f"killed{victim}"
  running = started(folder, out.name, 2)
  wait_for(out, 4, running)
  began = time.monotonic()
  running[victim].kill()
  _, _, err = ended(running)[1 - victim]
  assert time.monotonic() - began < 60
  assert 4 <= len(log_of(out)) < STEPS or not (out / "drafter").exists()
  assert f"process {victim} on {socket.gethostname()}" in err, err
  for code, _, err in ended(started(folder, out.name, 2)):
    assert code == 0, err
  assert losses(out) == undisturbed[1]


@pytest.mark.parametrize("told", thorough_but([], [1], [0, 1]))
def test_sigterm_to_one_stops_all(told, folder, undisturbed):
  """Kills: processes that stop at different steps, or do not hear of it; a restart by one process of what two saved,
  unchecked or not at all."""
  out = folder / f"stopped{told}"
  running = started(folder, out.name, 2, steps=STEPS)
  wait_for(out, 2, running)
  running[told].send_signal(signal.SIGTERM)
  results = ended(running)
  assert [code for code, _, _ in results] == [0, 0], results
  stopped = json.loads(results[0][1].splitlines()[-1])["steps"]
  assert 2 <= stopped < STEPS and len(log_of(out)) == stopped
  assert sorted(int(p.name) for p in (out / "steps").iterdir())[-1] == stopped
  (code, _, err), = ended(started(folder, out.name, 1))
  assert code == 0, err
  for step, numbers in losses(out).items():
    np.testing.assert_allclose(numbers, undisturbed[1][step], rtol=1e-5, err_msg=str(step))


IN_TURN = """
import runpy
import jax
make = jax.make_mesh
def in_turn(sizes, names, **how):
  devices = make(sizes, names, **how).devices.reshape(2, -1).T
  return jax.sharding.Mesh(devices.reshape(sizes), names, axis_types=how["axis_types"])
jax.make_mesh = in_turn
runpy.run_module("train.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_hosts_that_are_no_neighbours_in_the_mesh(folder):
  """Kills: a training that a pod's mesh refuses, or that puts a host's rows where its devices would be in order: other
  batches, other held-out rows."""
  more = ["--eval-rows", "4", "--eval-every", "4", "--lengths", "41"]
  for processes in (1, 2):
    for code, _, err in ended(started(folder, f"turns{processes}", processes, *more, program=("-c", IN_TURN))):
      assert code == 0, err
  one, two = (log_of(folder / f"turns{processes}") for processes in (1, 2))
  assert [line["step"] for line in one if "held_out" in line] == [4, 8]
  for a, b in zip(one, two, strict=True):
    for name in ("loss", "tau", "grad_norm"):
      np.testing.assert_allclose(b[name], a[name], rtol=1e-5)
    np.testing.assert_allclose(b.get("held_out", {}).get("loss", 0), a.get("held_out", {}).get("loss", 0), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_that_goes_on(folder, undisturbed):
  """Kills: a training that is deaf to the signal that came while it compiled, after it was resumed."""
  out = folder / "deaf"
  shutil.copytree(undisturbed[0], out)
  shutil.rmtree(out / "drafter"), shutil.rmtree(out / "steps" / str(STEPS))
  running = started(folder, out.name, 2)
  while "resuming after step 6" not in (line := running[0].stderr.readline()):
    assert line
  running[1].send_signal(signal.SIGTERM)
  results = ended(running)
  assert [code for code, _, _ in results] == [0, 0], results
  assert json.loads(results[0][1].splitlines()[-1])["steps"] == 7 < STEPS
  assert sorted(path.name for path in (out / "steps").iterdir()) == ["6", "7"]


@pytest.mark.slow
def test_text_is_drafted_beside_training(folder):
  """Kills: a log of which each process has a part, accepted lengths that depend on the number of processes."""
  more = ["--eval-rows", "4", "--decode-every", "4", "--decode-prompts", str(DEVICES)]
  for processes in (1, 2):
    for code, _, err in ended(started(folder, f"drafted{processes}", processes, *more)):
      assert code == 0, err
  one, two = ([row["drafted"] for row in log_of(folder / f"drafted{processes}") if "drafted" in row]
              for processes in (1, 2))
  assert one == two and len(one) == STEPS // 4 and all(found["prompts"] == DEVICES for found in one)


@pytest.mark.thorough
def test_an_older_checkpoint_in_all(folder, undisturbed):
  """Kills: processes of which some go on from the damaged checkpoint; one that deletes what another still reads."""
  out = folder / "older"
  shutil.copytree(undisturbed[0], out)
  shutil.rmtree(out / "drafter")
  for file in (out / "steps" / str(STEPS)).rglob("*"):
    if file.is_file() and file.stat().st_size > 10_000:
      file.write_bytes(file.read_bytes()[::-1])
  for code, _, err in ended(started(folder, out.name, 2)):
    assert code == 2 and f"the state of step {STEPS} cannot be restored" in err and "--use-older" in err, err
  for code, _, err in ended(started(folder, out.name, 2, "--use-older")):
    assert code == 0, err
  assert losses(out) == undisturbed[1]


PARTLY = """
import runpy, sys
from orbax.checkpoint import v1 as ocp
whose, name = dict(load=(ocp, "load_checkpointables"), metadata=(ocp.training.Checkpointer, "metadata"))[{what!r}]
real = getattr(whose, name)
def partly(where, *args, **how):
  mine = sys.argv[-1] == "1" and "8" in (where.name if {what!r} == "load" else str(args[0]))
  if mine and args[0] != 8:  # a leaf that is not there: the load begins, and ends before it meets the others
    args[0]["state"]["none"] = next(iter(args[0]["state"].values()))
  found = real(where, *args, **how)
  if mine:
    raise ValueError("its part is cut")
  return found
setattr(whose, name, partly)
runpy.run_module("train.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("what", thorough_but([], ["load"], ["load", "metadata"]))
def test_an_older_checkpoint_where_one_cannot_read_the_newest(what, folder, undisturbed):
  """Kills: a process that goes on from step 6 while the other one waits for it at step 8, for minutes."""
  out, how = folder / f"partly-{what}", dict(program=("-c", PARTLY.format(what=what)))
  shutil.copytree(undisturbed[0], out)
  shutil.rmtree(out / "drafter")
  for code, _, err in ended(started(folder, out.name, 2, **how), 120):
    assert code == 2, err
    assert f"the state of step {STEPS} cannot be restored in process 1 (" in err, err
  for code, _, err in ended(started(folder, out.name, 2, "--use-older", **how), 120):
    assert code == 0, err
  assert losses(out) == undisturbed[1]
