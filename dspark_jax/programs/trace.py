"""How long a device stood idle, read from a profiler's trace: what an engine's own clock can only estimate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

# What is at work for as long as a program runs: a TPU's programs, a GPU's streams. A CPU has no plane of its own: the
# threads that hand out its programs, each until its program has ended.
LINES = re.compile(r"XLA Modules|Stream.*|tf_XLA(PjRtCpuClient|Execute)/.*")


def idle_share(run: Callable[[], Any], folder: Path) -> tuple[float, Any]:
  """(what share of run() the device did nothing, from the beginning of its first program to the end of its last one;
  what run() gave).

  The trace stays in the folder, for TensorBoard's profiler or Perfetto. A profiler slows a CPU down, and what it takes
  of memory grows with every operation that runs: seconds, not minutes. RuntimeError where it saw no program.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # the host's calls would be most of the trace
  with jax.profiler.trace(str(folder), profiler_options=options):
    given = run()
  found = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  return idle(jax.profiler.ProfileData.from_file(str(found)).planes), given


def idle(planes: Iterable[Any]) -> float:
  """The share in which no program runs, of a trace's planes (jax.profiler.ProfileData)."""
  spans = sorted((event.start_ns, event.end_ns) for plane in planes for line in plane.lines
                 if LINES.fullmatch(line.name) for event in line.events)
  if not spans:
    raise RuntimeError("the profiler saw no program run: is this another kind of device?")
  busy, at = 0.0, spans[0][0]
  for start, end in spans:
    busy += max(end - max(start, at), 0)
    at = max(at, end)
  return 1 - busy / (at - spans[0][0])
