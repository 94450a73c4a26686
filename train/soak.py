"""A week in miniature: a training that is killed every minute ends with the numbers of one that was left alone.

When to use it: after a change to what a run saves, reads or draws, and before a machine is booked for days. It trains
twice by the same command: once undisturbed, once with `kill -9` so many seconds after each start, by the clock and so
wherever the run is: compiling, stepping, saving. Of several processes one is killed, each in turn, and the others must
end by themselves. `make soak` runs this, with one process and with two.

    python -m train.soak
    python -m train.soak --out runs/soak2 --processes 2 --steps 200 --every 90

A start and `save_every` steps must fit into --every seconds. OUT/alone and OUT/killed are the two runs, OUT/logs has
what each start printed. The last line of stdout is a JSON object with the keys steps, kills, starts (of the run that is
killed), same (whether every logged number of the training and the stored drafter are equal, bit for bit), differs_at
(the first step of which a number differs, or null), seconds and out.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import numpy as np

from dspark_jax.checkpoints import state
from dspark_jax.programs import run_folder, shell
from train import rehearse
from train.watch import LOG

# What a line of the log says of the clock and not of the training.
CLOCK = {"tokens_per_second", "step_seconds", "data_wait", "tokens_per_second_per_device", "tflops_per_device", "mfu",
         "goodput"}
PROGRAM = "train.soak"
VAIN = 3  # starts in a row without a new checkpoint, after which none is to be expected


@dataclasses.dataclass
class Settings:
  out: Path = Path("runs/soak")
  """emptied first, where a soak wrote it"""
  config: str = "configs/soak.py"
  data: tuple[Path, ...] = (Path("README.md"), Path("docs/training.md"), Path("docs/meshes.md"))
  """what is trained on; any text will do"""
  steps: int = 600
  every: int = 60
  """seconds between a start and its kill"""
  processes: int = 1
  devices: int = 1
  """of each process"""


def main(settings: Settings) -> dict:
  shell.at_least(settings, steps=2, every=1, processes=1, devices=1)
  with run_folder.owned(settings.out):
    rehearse.emptied(settings.out, PROGRAM)
    return soaked(settings)


def soaked(settings: Settings) -> dict:
  """Both trainings, and what the program prints of them."""
  began, out = time.monotonic(), settings.out
  command = ["train.train", "--config", settings.config, "--data", *settings.data, "--steps", settings.steps,
             *(["--mesh.data", -1] if settings.processes * settings.devices > 1 else []), "--out"]
  with shell.bar() as bar:
    live(settings, "alone", [*command, out / "alone"], None, bar)
    starts, kills = live(settings, "killed", [*command, out / "killed"], settings.every, bar)
  differs_at = first_difference(numbers(out / "alone"), numbers(out / "killed"))
  same = differs_at is None and stored(out / "alone") == stored(out / "killed")
  return {"steps": settings.steps, "kills": kills, "starts": starts, "same": same, "differs_at": differs_at,
          "seconds": round(time.monotonic() - began), "out": str(out)}


def live(settings: Settings, name: str, command: list, every: float | None, bar) -> tuple[int, int]:
  """(starts, kills) until a training has ended well; it is killed `every` seconds after each start, or never."""
  out, starts, kills, vain = settings.out / name, 0, 0, 0
  task = bar.add_task(name, total=settings.steps, note="")
  while True:
    saved, began = newest(out), time.monotonic()
    running = rehearse.started(settings, f"{name}-{starts}", *command)
    starts += 1
    try:
      while any(p.poll() is None for p in running) and (every is None or time.monotonic() - began < every):
        time.sleep(0.1)
        bar.update(task, completed=newest(out), note=f"{kills} kills")
      left = [p for p in running if p.poll() is None]
      if len(left) == len(running):
        # Not always the same one: the first process writes, the last does not.
        victim = kills % len(left)
        left[victim].send_signal(signal.SIGKILL)
        kills += 1
        codes = [rehearse.wait(p, rehearse.MINUTE) for p in running]
        if None in codes:
          raise ValueError(f"after kill -9 of process {victim} the processes ended with {codes} (None: not within "
                           f"{rehearse.MINUTE} seconds): see {settings.out / 'logs'}")
      else:
        rehearse.finish(settings, running, f"{name}-{starts - 1}")
        bar.update(task, completed=settings.steps)
        return starts, kills
    finally:
      rehearse.stop(running)
    vain = 0 if newest(out) > saved else vain + 1
    if vain == VAIN:
      raise ValueError(f"{VAIN} starts of {every} seconds in a row came to no new checkpoint after step {saved}: give "
                       f"a longer --every, or a config with a smaller save_every; see {settings.out / 'logs'}")


def newest(out: Path) -> int:
  """The step of the newest checkpoint; 0 before the first."""
  return max((int(path.name) for path in (out / "steps").glob("*") if path.name.isdigit()), default=0)


def numbers(out: Path) -> list[dict]:
  """What is logged of each step, without what the clock says."""
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in run_folder.read_lines(out / LOG)]


def first_difference(one: list[dict], two: list[dict]) -> int | None:
  """The first step whose lines differ, or that only one of them has."""
  steps = {line["step"]: line for line in one}, {line["step"]: line for line in two}
  differing = [step for step in steps[0] | steps[1] if steps[0].get(step) != steps[1].get(step)]
  # A step that is logged twice is a difference, too: its second line hides the first.
  twice = [line["step"] for lines in (one, two) for i, line in enumerate(lines) if line["step"] != i + 1]
  return min(differing + twice, default=None)


def stored(out: Path) -> dict:
  """The drafter: what its sidecar says, and its weights as bytes. Orbax names its files anew each time."""
  sidecar, weights = state.read_drafter(out / "drafter")
  return sidecar | {name: np.asarray(weight).tobytes() for name, weight in weights.items()}


if __name__ == "__main__":
  shell.run(main, Settings)
