"""The curves of a training run, as a figure and a page: is it learning, will its drafter pay, where does the time go.

When to use it: while a run goes on, or after it; nothing of the run is changed, and no model is loaded.

    python -m train.report --run runs/demo
    python -m train.report --run runs/qwen3-4b --out reports/qwen3-4b

Writes training.png and training.md into the run's folder, or into --out. The last line of stdout is a JSON object with
the keys report, figure, steps, loss, tau, accepted_length (of the last real speculative run, or null) and goodput.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure  # not pyplot, which looks for a screen

from dspark_jax.config import name_shown
from dspark_jax.programs import results, run_folder, shell
from dspark_jax.text import parsed
from infer.plots import PALETTE, STYLE
from train.watch import LOG, flat

# (title, unit of y, (label, place in a line of the log) of each curve)
PANELS = (
    ("loss", "", (("training", "loss"), ("held out", "held_out/loss"))),
    ("tokens per round", "", (("tau, training", "tau"), ("tau, held out", "held_out/tau"),
                              ("accepted length, decoded", "drafted/accepted_length"))),
    ("parts of the loss", "", (("CE", "ce"), ("TV", "tv"), ("soft", "soft"), ("confidence", "confidence"))),
    ("confidence", "", (("error", "confidence_abs_error"), ("bias", "confidence_bias"),
                        ("bias of survivals", "confidence_cumprod_bias"))),
    ("gradient norm", "", (("gradient norm", "grad_norm"),)),
    ("learning rate", "", (("learning rate", "learning_rate"),)),
    ("step", "seconds", (("step", "step_seconds"),)),
    ("shares of the time", "", (("goodput", "goodput"), ("waiting for data", "data_wait"), ("MFU", "mfu"))))


@dataclasses.dataclass
class Settings:
  run: Path
  """folder of train.train"""
  out: Path | None = None
  """default: the run's folder"""


def main(settings: Settings) -> dict:
  shell.check_out(settings.out, folder=True)
  path = run_folder.record_path(settings.run)
  if not path.exists():
    raise ValueError(f"{settings.run} is no run of train.train: give its folder with --run")
  try:
    record = run_folder.read_record(settings.run, "train.train", {"config": dict, "total_steps": int})
  except ValueError as error:  # who writes a run chooses another place for it, who reads one another run
    raise ValueError(str(error).replace("choose another --out", "give another --run")) from error
  config = record["config"]
  missing = [name for name in ("target", "batch", "row_length", "drafter") if name not in config]
  if missing or not isinstance(config["drafter"], dict) or "kind" not in config["drafter"]:
    raise ValueError(f"{path} has a config without {', '.join(missing) or 'a kind of drafter'}, so it is damaged: "
                     f"restore it, or give another --run")
  lines = read(settings.run / LOG)
  if not lines:
    raise ValueError(f"{settings.run / LOG} has no lines yet: wait for the first steps, or give another --run")
  out = settings.out or settings.run
  with matplotlib.rc_context(STYLE):
    shell.write(out / "training.png", shell.image(draw(lines)))
  text = page(settings.run, record, lines)
  shell.write(out / "training.md", text)
  shell.say(text)
  last = lines[-1]
  return {"report": str(out / "training.md"), "figure": str(out / "training.png"), "steps": last["step"],
          "loss": last["loss"], "tau": last["tau"], "goodput": last.get("goodput"),
          "accepted_length": newest(lines, "drafted/accepted_length")}


def read(path: Path) -> list[dict]:
  """The whole lines of a log. ValueError for a damaged one; what a run is writing just now is left alone."""
  whole, found = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b"", []
  for number, line in enumerate(whole.splitlines(), 1):
    record = parsed(line, f"{path}, line {number} is damaged, it", remedy="delete the line")
    wrong = [name for name, value in flat(record) if not isinstance(value, int | float | None)]
    wrong += sorted({"step", "loss", "tau", "grad_norm", "learning_rate"} - set(record))
    if wrong or type(record["step"]) is not int:
      raise ValueError(f"{path}, line {number} is damaged, or of no training: it has no number as "
                       f"{', '.join(map(name_shown, wrong[:3])) or 'step'}: restore or delete the line")
    found.append(record)
  return found


def at(line: dict, name: str):
  """A number of a line of the log by its place, `held_out/loss`; None where it is not."""
  for part in name.split("/"):
    line = line.get(part) if isinstance(line, dict) else None
  return line


def newest(lines: list[dict], name: str) -> float | None:
  """The last number of that name in the log."""
  return next((value for line in reversed(lines) if (value := at(line, name)) is not None), None)


def draw(lines: list[dict]) -> Figure:
  """All curves over steps, and the acceptance at each draft position at the end."""
  figure = Figure(figsize=(12, 13))
  axes = figure.subplots(3, 3).flat
  for panel, (title, unit, curves) in zip(axes, PANELS):
    for colour, (label, name) in zip(PALETTE, curves):
      points = [(line["step"], value) for line in lines if (value := at(line, name)) is not None]
      if points:
        panel.plot(*zip(*points), label=label, color=colour, marker="o" if len(points) < 30 else None, markersize=3)
    panel.set(title=title, xlabel="step", ylabel=unit)
    if panel.lines:
      panel.legend()
  last = figure.axes[-1]
  for colour, (label, name) in zip(PALETTE, (("training", "accept_rate"), ("held out", "held_out/accept_rate"))):
    if rates := newest(lines, name):
      last.plot(range(1, len(rates) + 1), [float("nan") if r is None else r for r in rates], color=colour, marker="o",
                label=label)
  last.set(title="accepted, given all before", xlabel="draft position", ylim=(0, 1),
           xticks=range(1, len(newest(lines, "accept_rate") or []) + 1))
  last.legend()
  return figure


def page(run: Path, record: dict, lines: list[dict]) -> str:
  """The report as Markdown: the newest numbers, then the figure."""
  to, last = lambda value, spec: "-" if value is None else format(value, spec), lines[-1]
  config = record["config"]
  rows = [["loss", to(last["loss"], ".4f"), to(newest(lines, "held_out/loss"), ".4f")],
          ["tau (expected tokens per round)", to(last["tau"], ".3f"), to(newest(lines, "held_out/tau"), ".3f")]]
  pairs = [newest(lines, name) or [] for name in ("accept_rate", "held_out/accept_rate")]
  for place, rate in enumerate(pairs[0]):
    rows.append([f"accepted at position {place + 1}, given all before", to(rate, ".3f"),
                 to(pairs[1][place] if place < len(pairs[1]) else None, ".3f")])
  rows += [[f"confidence, {label}", to(at(last, name), spec), to(newest(lines, f"held_out/{name}"), spec)]
           for label, name, spec in (("error", "confidence_abs_error", ".3f"), ("bias", "confidence_bias", "+.3f"))]
  speed = [["seconds per step", to(last.get("step_seconds"), ".3f")],
           ["tokens/s per device", to(last.get("tokens_per_second_per_device"), ".0f")],
           ["TFLOP/s per device", to(last.get("tflops_per_device"), ".3f")], ["MFU", to(last.get("mfu"), ".1%")],
           ["waiting for data", to(last.get("data_wait"), ".2%")], ["goodput", to(last.get("goodput"), ".1%")],
           ["gradient norm", to(last["grad_norm"], ".3f")], ["learning rate", to(last["learning_rate"], ".2e")]]
  length = newest(lines, "drafted/accepted_length")
  return "\n".join([
      f"# {run.name}: step {last['step']} of {record['total_steps']}", "",
      f"A drafter of kind {config['drafter']['kind']} for {config['target']}, {config['batch']} rows of "
      f"{config['row_length']} tokens a step. Accepted length, decoded: {to(length, '.2f')}.", "",
      results.markdown(["", "training", "held out"], rows), results.markdown(["", ""], speed),
      "![curves](training.png)", ""])


if __name__ == "__main__":
  shell.run(main, Settings)
