"""A pod on one machine: two processes of four devices prepare, train, lose one, go on, calibrate and evaluate.

When to use it: before a pod is booked, and after a change to what hosts do together. It runs the programs that a pod
runs, with a real model and few steps, and kills one of the processes half-way; `make pod-rehearsal` runs this.

    python -m train.rehearse
    python -m train.rehearse --out runs/rehearsal --steps 24 --processes 4 --devices 2

Each program's own output is in OUT/logs. The last line of stdout is a JSON object with the keys steps, killed_after
(the last step that was logged before), noticed_after (seconds until the others had ended), said (their sentence), loss
(first and last), accepted_length and out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from dspark_jax.programs import hosts, run_folder, shell
from train.watch import LOG

LIMIT = 1200  # seconds for a program: what takes longer hangs
MINUTE = 60   # within which who is left must have ended
PROGRAM = "train.rehearse"


@dataclasses.dataclass
class Settings:
  out: Path = Path("runs/rehearsal")
  """emptied first, where a rehearsal wrote it"""
  target: str = "smollm2"
  config: str = "configs/demo.py"
  processes: int = 2
  devices: int = 4
  """of each process"""
  steps: int = 12
  answers: int = 32


def main(settings: Settings) -> dict:
  shell.at_least(settings, processes=2, devices=1, steps=8, answers=8)
  with run_folder.owned(settings.out):
    emptied(settings.out, PROGRAM)
    return rehearsed(settings)


def rehearsed(settings: Settings) -> dict:
  """All that the pod does, and what the program prints of it."""
  out = settings.out
  run, rows, batch = out / "run", out / "rows", settings.processes * settings.devices
  one(settings, "answers", "train.answers", "--out", out / "answers.jsonl", "--count", settings.answers,
      "--max-new-tokens", 64, "--max-prompt-tokens", 128)
  one(settings, "prepare", "train.prepare", "--data", out / "answers.jsonl", "--out", rows, "--row-length", 128,
      "--processes", 2)
  train = ["train.train", "--config", settings.config, "--data", rows, "--out", run, "--steps", settings.steps,
           "--row-length", 128, "--batch", batch, "--anchors", 32, "--save-every", 4, "--log-every", 1, "--mesh.fsdp",
           -1, "--eval-rows", batch, "--eval-every", settings.steps]
  lost = lose(settings, train, run)
  shell.say("all processes again, with the same command")
  finish(settings, started(settings, "again", *train), "again")
  lines = run_folder.read_lines(run / LOG)
  if [line["step"] for line in lines] != list(range(1, settings.steps + 1)):
    raise ValueError(f"{run / LOG} has the steps {[line['step'] for line in lines]}, expected 1 to {settings.steps}, "
                     f"once each: see {out / 'logs'}")
  one(settings, "calibrate", "train.calibrate", "--drafter", run, "--samples", 8, "--max-new-tokens", 32)
  result = one(settings, "evaluate", "infer.evaluate", "--targets", settings.target, "--drafters", run, "--datasets",
               "stdlib", "--temperatures", 0, "--samples", 4, "--max-new-tokens", 32, "--out", out / "evaluation",
               target=False)
  lengths = [row["accepted_length"] for row in result["results"] if row["accepted_length"]]
  return {"steps": settings.steps, **lost, "loss": [lines[0]["loss"], lines[-1]["loss"]],
          "accepted_length": lengths[0] if lengths else None, "out": str(out)}


def emptied(out: Path, program: str) -> None:
  """Leaves nothing in a folder, which the caller owns, but logs/ and a record. ValueError when it holds what is not by
  its record this program's."""
  held = [path for path in out.iterdir() if path.suffix != ".lock"]
  if held and run_folder.recorded(out, "program") != program:
    raise ValueError(f"{out} holds something that {program} did not write: choose another --out, or delete it")
  run_folder.write_record(out, {"program": program})  # first: what a kill leaves here may be emptied again
  for path in set(held) - {run_folder.record_path(out)}:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
  (out / "logs").mkdir()


def lose(settings: Settings, train: list, run: Path) -> dict:
  """Starts all processes, kills the last one once something is saved and half of the steps are done."""
  running, log = started(settings, "first", *train), run / LOG
  began = time.monotonic()
  done = lambda: len(log.read_bytes().splitlines()) if log.exists() else 0
  saved = lambda: any(path.name.isdigit() for path in (run / "steps").glob("*"))
  while not (saved() and done() >= settings.steps // 2):
    if any(p.poll() is not None for p in running) or time.monotonic() - began > LIMIT:
      stop(running)
      raise ValueError(f"training ended, or hung, before anything could be killed: see {settings.out / 'logs'}")
    time.sleep(0.1)
  killed_after = done()
  shell.say(f"kill -9 of process {settings.processes - 1} after step {killed_after}")
  running[-1].kill()
  began = time.monotonic()
  codes = [wait(p, MINUTE) for p in running[:-1]]
  seconds = time.monotonic() - began
  if codes != [hosts.AGAIN] * (settings.processes - 1):
    stop(running)
    raise ValueError(f"the other processes ended with {codes} (None: not within {MINUTE} seconds), expected "
                     f"{hosts.AGAIN}: see {settings.out / 'logs'}")
  said = (settings.out / "logs" / "first-0.log").read_text().splitlines()[-1]
  shell.say(f"{seconds:.0f} seconds later the others end: {said}")
  return {"killed_after": killed_after, "noticed_after": round(seconds, 1), "said": said}


def started(settings: Settings, name: str, *words) -> list[subprocess.Popen]:
  """The same command in every process of the pod."""
  if settings.processes == 1:
    return [spawn(settings, name, *words, devices=settings.devices)]
  with socket.socket() as made:
    made.bind(("localhost", 0))
    port = made.getsockname()[1]
  joined = ["--hosts.coordinator", f"localhost:{port}", "--hosts.processes", settings.processes]
  return [spawn(settings, f"{name}-{i}", *words, *joined, "--hosts.process", i, devices=settings.devices)
          for i in range(settings.processes)]


def one(settings: Settings, name: str, program: str, *words, target: bool = True) -> dict:
  """What a program of one process prints."""
  shell.say(f"{program} ...")
  finish(settings, [spawn(settings, name, program, *(("--target", settings.target) if target else ()), *words)], name)
  return json.loads((settings.out / "logs" / f"{name}.json").read_text().splitlines()[-1])


def spawn(settings: Settings, name: str, program: str, *words, devices: int = 1) -> subprocess.Popen:
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
                              "JAX_COMPILATION_CACHE_DIR": str((settings.out / "cache").absolute())}
  logs = settings.out / "logs"
  with (logs / f"{name}.json").open("wb") as result, (logs / f"{name}.log").open("wb") as log:
    return subprocess.Popen([sys.executable, "-m", program, *map(str, words)], env=environment, stdout=result,
                            stderr=log)


def finish(settings: Settings, running: list[subprocess.Popen], name: str) -> None:
  """ValueError unless all of them end well."""
  codes, logs = [wait(p, LIMIT) for p in running], settings.out / "logs"
  if any(code != 0 for code in codes):
    stop(running)
    late = f" (None: not within {LIMIT} seconds)" if None in codes else ""
    said = ""
    if 2 in codes:  # a mistake, which the program has told in a sentence
      log = logs / (f"{name}-{codes.index(2)}.log" if len(codes) > 1 else f"{name}.log")
      said = f" ({log.read_text().strip().rpartition(chr(10))[2]})"
    raise ValueError(f"{name} ended with {codes}{late}, expected 0{said}: see {logs}")


def wait(process: subprocess.Popen, seconds: float) -> int | None:
  """Its exit code; None if it does not end."""
  try:
    return process.wait(seconds)
  except subprocess.TimeoutExpired:
    return None


def stop(running: list[subprocess.Popen]) -> None:
  for process in running:
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)


if __name__ == "__main__":
  shell.run(main, Settings)
