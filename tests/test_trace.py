"""Idle shares read from a profiler's trace: by hand, and by a device that waits for its host."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.programs.trace import idle, idle_share


def plane(**lines):
  return SimpleNamespace(lines=[SimpleNamespace(name=name.replace("_", " "), events=[
      SimpleNamespace(start_ns=start, end_ns=end) for start, end in events]) for name, events in lines.items()])


def test_idle_is_what_no_program_covers():
  """Kills: overlaps counted twice, programs within others, what runs on the host, steps that span their own waits."""
  planes = [plane(XLA_Modules=[(10, 20), (40, 50)], Steps=[(10, 50)], python=[(0, 100)]),
            plane(Stream_7=[(15, 30), (16, 18)])]
  assert idle(planes) == pytest.approx(10 / 40)
  with pytest.raises(RuntimeError, match="no program"):
    idle([plane(python=[(0, 100)])])


def test_a_device_that_waits_for_its_host(tmp_path):
  """By the clock. Kills: threads that help with a program, whose own pauses count; a trace of an earlier run."""
  program = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: jnp.tanh(y @ x), x))
  x = jnp.ones((400, 400))
  program(x).block_until_ready()
  clock = []

  def run():
    clock.clear()
    for _ in range(5):
      clock.append(time.perf_counter())
      program(x).block_until_ready()
      clock.append(time.perf_counter())
      time.sleep(clock[-1] - clock[-2])

  for _ in range(2):
    found, _ = idle_share(run, tmp_path)
    slept = sum(later - earlier for earlier, later in zip(clock[1:-1:2], clock[2::2]))
    assert found == pytest.approx(slept / (clock[-1] - clock[0]), abs=0.15)
