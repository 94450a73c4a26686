"""infer.profile_sps by a clock of its own: what is measured, and that a start does not take as long as it likes."""

import types

import jax
import numpy as np
import pytest

from dspark_jax.nn.attention import Kernels
from folders import complains
from infer import load, profile_sps, serve

SECONDS = {"draft": 0.25, "plain": 0.5, "4": 0.75, "full": 1.0, "plain+chunk": 1.5, "full+chunk": 2.0}
SLOWER = 0.125  # at the longer of the two contexts


class Machine:
  """Executables that take so long by the clock that they are."""

  def __init__(self):
    self.now, self.context, self.rounds = 0.0, None, dict.fromkeys(SECONDS, 0)
    self.compiled, self.how = dict(SECONDS, own=0), {"chunk": 16, "survival": "estimator"}
    layer = types.SimpleNamespace(v=np.zeros((2, 1, 256, 4)))
    self.rows = types.SimpleNamespace(settings=types.SimpleNamespace(
        calibration=np.ones((2, 3)), sampling=types.SimpleNamespace(mode="full")),
                                      cache=types.SimpleNamespace(layers=[layer]))
    self.contexts = []

  def seated(self, run, rows, context, reading):
    self.contexts.append(context)
    return rows

  def __call__(self, name, rows, *_):
    self.now += SECONDS[name] + SLOWER * (self.contexts[-1] > 100)
    self.rounds[name] += 1
    return "drafted" if name == "draft" else (rows, None)


@pytest.fixture
def machine(monkeypatch):
  made = Machine()
  monkeypatch.setattr(profile_sps, "seated", made.seated)
  monkeypatch.setattr(profile_sps.time, "perf_counter", lambda: made.now)
  monkeypatch.setattr(profile_sps.jax, "block_until_ready", lambda x: x)
  return made


def are_those_of(machine, cost):
  for name, step in (("draft", cost.draft), ("plain", cost.plain), ("4", cost.packed[4]), ("full", cost.full),
                     ("plain+chunk", cost.plain_chunk), ("full+chunk", cost.full_chunk)):
    assert step.seconds == pytest.approx(SECONDS[name]), name
    assert step.slope == pytest.approx(SLOWER / (max(machine.contexts) - min(machine.contexts))), name


@pytest.mark.parametrize("within", [float("inf"), 200, 0])
def test_costs_are_those_of_the_programs(within, machine):
  """Kills: seconds of a run taken for a round's, a slope that is not of the two contexts; a start whose runs do not get
  fewer when time is short, or which leaves a program out."""
  cost, _ = profile_sps.measure(machine, machine.rows, 5, target="t", drafter="d", dtype="float32", within=within)
  are_those_of(machine, cost)
  assert (cost.capacity, cost.chunk, cost.sampling) == (256, 16, "full")
  runs = machine.rounds["full"] / profile_sps.CHAIN / 2
  assert runs == 6 if within == float("inf") else 2 <= runs < 6
  if within:
    assert machine.now < within


def test_a_busy_minute_is_no_slope(machine, monkeypatch):
  """Kills: a program at one context after another, of which those in a busy minute look dear, or steep."""
  idle = profile_sps.CHAIN * 12 * 1.2  # about as long as a turn of all
  run = Machine.__call__
  monkeypatch.setattr(Machine, "__call__", lambda self, name, rows, *more: busy(self, run(self, name, rows, *more)))

  def busy(machine, result):
    machine.now += 0.5 * (2 * idle < machine.now < 3 * idle)
    return result
  cost, _ = profile_sps.measure(machine, machine.rows, 5, target="t", drafter="d", dtype="float32")
  are_those_of(machine, cost)


def test_noise_is_no_slope(machine, monkeypatch):
  """Kills: the difference of two medians, which on a machine that others use is a slope every other time, of as much as
  0.33 ms a token where a token costs nothing. Four of five pairs of noise show one in 3 of 16 programs; more than three
  tenths of these would in 1 of 500 draws, but the draw is fixed."""
  monkeypatch.setattr("test_profile_sps.SLOWER", 0.0)
  noise, run = np.random.default_rng(0), Machine.__call__

  def noisy(self, name, rows, *more):
    self.now += SECONDS[name] * noise.exponential(0.3)
    return run(self, name, rows, *more)
  monkeypatch.setattr(Machine, "__call__", noisy)
  steps = [step for _ in range(20) for step in profile_sps.measure(
      machine, machine.rows, 5, target="t", drafter="d", dtype="float32")[0]._steps().values()]
  assert sum(step.slope > 0 for step in steps) < 0.3 * len(steps)


def test_the_documented_commands_fit_each_other():
  """Kills: a table of other seats, chunks or requests than those that infer.serve, or infer.load, has unless told."""
  measured, served = profile_sps.Settings("smollm2"), serve.Settings(target="smollm2", drafter="none")
  shared = ("seats", "capacity", "chunk", "buckets", "sampling", "kernels", "mesh", "dtype")
  assert [getattr(measured, name) for name in shared] == [getattr(served, name) for name in shared]
  loaded = load.served(load.Settings(None, target="smollm2"), "scheduled")
  assert [getattr(loaded, name) for name in shared] == [getattr(served, name) if name != "sampling" else "greedy"
                                                        for name in shared]


@pytest.mark.parametrize("given, word", [(dict(compiler="v5e:1x1", drafter="runs/demo"), "with"),
                                         (dict(compiler="v5e:1x1", dtype="bfloat16"), "with"),
                                         (dict(compiler="v5e:1x1", repeats=6), "with"),
                                         (dict(block_size=8), "without"), (dict(draft_layers=4), "without")])
def test_what_would_go_unread_is_refused(given, word):
  """Kills: a table of another drafter, or of other runs, than were asked for."""
  (*_, (name, value)) = given.items()
  with complains(f"{name} is {value}, which means nothing {word} --compiler: leave it out"):
    profile_sps.main(profile_sps.Settings("smollm2", **given))


@pytest.mark.parametrize("change, part", [
    (dict(buckets=(0, 8)), "buckets"), (dict(buckets=(16, 8)), "rising"), (dict(chunk=200), "chunk is 200"),
    (dict(buckets=(16, 32)), "fewer tokens than the 8 seats of 4")])
def test_what_no_engine_has_is_refused_before_it_is_measured(change, part, monkeypatch):
  """Kills: minutes of compiling and measuring before a table is refused."""
  monkeypatch.setattr(profile_sps.shell, "load_target", lambda *_: None)
  monkeypatch.setattr(profile_sps.shell, "check_drafter", lambda *_: None)
  monkeypatch.setattr(profile_sps.dspark_jax, "load_drafter", lambda *_, **__: types.SimpleNamespace(block_size=3))
  with complains(part):
    profile_sps.main(profile_sps.Settings("smollm2", "runs/demo", **change))


def test_kernels_are_those_that_were_asked_for(monkeypatch):
  """Kills: a compiler that is asked for other kernels than --kernels names."""
  def of(asked, *_):
    raise ValueError(f"asked for {asked.kernels.decode}, {asked.sampling}")
  monkeypatch.setattr(profile_sps, "absent_devices", lambda _: jax.devices()[:1])
  monkeypatch.setattr(profile_sps, "chip_of", lambda _: None)
  monkeypatch.setattr(profile_sps.compile_.Served, "of", of)
  with complains("asked for reference, truncated"):
    profile_sps.main(profile_sps.Settings("qwen3-4b", compiler="v5e:1x1", kernels=Kernels("reference")))
