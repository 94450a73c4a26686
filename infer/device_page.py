"""The page of infer.device_report: its records as Markdown, as JSON, and as a figure."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from dspark_jax.config import error_shown
from dspark_jax.programs import shell
from infer.plots import PALETTE, STYLE

ACCEPTED = (1, 2, 3, 4)  # tokens of a round for which tokens/s are computed
FIGURE = "the figure"


@dataclasses.dataclass
class Page:
  """What was measured so far, and where it is written."""
  device: str
  path: Path                   # the figure and the records lie beside it
  gb_per_second: float | None  # of the device, as stated by its maker or the user
  tflops: float | None
  model: str                   # the sizes that random weights have
  layers: str                  # scanned or unrolled
  block_size: int
  correctness: list[dict] = dataclasses.field(default_factory=list)
  decoding: list[dict] = dataclasses.field(default_factory=list)
  training: list[dict] = dataclasses.field(default_factory=list)
  smollm2: list[dict] = dataclasses.field(default_factory=list)
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def figure(self) -> Path:
    """Drawn once a step was measured."""
    return self.path.with_suffix(".png")

  @property
  def records(self) -> Path:
    """What `summary` says, as JSON."""
    return self.path.with_suffix(".json")

  def add(self, kind: str, found: dict | Iterable[dict]) -> None:
    """One more record, or several, of a kind: each as it comes, so that those before an error stay."""
    for record in [found] if isinstance(found, dict) else found:
      getattr(self, kind).append(record)

  @property
  def wrong(self) -> list[dict]:
    """Models that do not compute what they compute on a CPU."""
    return [record for record in self.correctness if not record["correct"]]

  def summary(self) -> dict[str, Any]:
    """For the program's last line."""
    kept = ("device", "model", "layers", "gb_per_second", "tflops", "correctness", "decoding", "training", "smollm2",
            "left_out", "failed")
    return {name: getattr(self, name) for name in kept} | {
        "correct": bool(self.correctness) and not self.wrong, "page": str(self.path), "figure": str(self.figure),
        "records": str(self.records)}

  def write(self) -> None:
    """The page, its records and its figure as far as they have come, each whole or not at all. OSError of the first
    two; a figure that cannot be drawn is left out."""
    self.left_out.pop(FIGURE, None)
    self.write_text()
    if self.decoding:
      try:
        with matplotlib.rc_context(STYLE):
          shell.write(self.figure, shell.image(drawn(self)))
      except Exception as error:  # of whatever draws: numbers are worth more than their picture
        self.left_out[FIGURE] = f"{type(error).__name__}: {error_shown(error)}"
        self.write_text()

  def write_text(self) -> None:
    """What needs no drawing."""
    shell.write(self.path, self.text())
    # A device that is wrong may give NaN, which is no number in JSON: as text.
    shell.write_json(self.records, json.loads(json.dumps(self.summary()), parse_constant=str))

  def text(self) -> str:
    """Markdown."""
    rates = [f"{value:g} {unit}" for value, unit in ((self.gb_per_second, "GB/s"), (self.tflops, "TFLOP/s in bfloat16"))
             if value]
    parts = [f"# {self.device}",
             f"By `python -m infer.device_report` on {time.strftime('%Y-%m-%d')}, jax {jax.__version__}, Python "
             f"{sys.version.split()[0]}, on the first of {len(jax.devices())}. Its speed, as stated: "
             f"{' and '.join(rates) or 'not known here, give --gb-per-second and --tflops'}. "
             f"Weights are random but for SmolLM2's; layers are {self.layers}.",
             *self.correct_part(), *self.decoding_part(), *self.training_part(), *self.smollm2_part()]
    for title, found in (("Failed", self.failed), ("Left out", self.left_out)):
      parts += [f"## {title}", "\n".join(f"- {name}: {reason}" for name, reason in found.items())] if found else []
    return "\n\n".join(parts) + "\n"

  def correct_part(self) -> list[str]:
    """Whether the device is right."""
    if not self.correctness:
      return []
    rows = [[r["model"], r["attention"], "yes" if r["correct"] else "**NO**", f"{r['logits']:.1e}",
             texts(r["same_as_cpu"], r["from_cpu"]), texts(r["same_as_plain"], r["from_plain"]),
             f"{r['bfloat16_logits']:.1e}"] for r in self.correctness]
    return ["## The same numbers as on this machine's CPU",
            "Greedy, float32 with products of full precision. Differences are in parts of the largest logit; texts "
            "that part may do so at a tie alone.",
            table(["model", "attention", "right", "logits differ by", "text as on the CPU", "speculative text as plain",
                   "logits in bfloat16 differ by"], rows)]

  def decoding_part(self) -> list[str]:
    """Steps and rounds."""
    if not self.decoding:
      return []
    share = lambda value: "" if value is None else f"{100 * value:.0f} %"
    points = sorted(self.decoding, key=lambda r: (r["context"], r["batch"]))
    said = lambda r, form: "" if r["round_seconds"] is None else form(r["round_seconds"])
    rows = [[r["context"], r["batch"], f"{1e3 * r['plain_step_seconds']:.2f}", share(r["plain_step_share"]),
             said(r, lambda s: f"{1e3 * s:.2f}"), share(r["round_share"]),
             said(r, lambda s: f"{s / r['plain_step_seconds']:.2f}")] for r in points]
    rates = [[r["context"], r["batch"], f"{r['batch'] / r['plain_step_seconds']:.0f}",
              *(said(r, lambda s: f"{n * r['batch'] / s:.0f}") for n in ACCEPTED)] for r in points]
    return [f"## Decoding at {self.model} size, bfloat16",
            f"A round drafts and verifies {self.block_size} tokens; attention over caches is by "
            f"{points[0]['attention']}. A share is of the memory's speed: bytes that cannot but be read (weights, live "
            "cache) over seconds and the stated GB/s.",
            table(["context", "batch", "plain step ms", "of the memory's speed", "round ms", "of the memory's speed",
                   "round / plain step"], rows),
            f"![Steps and rounds]({self.figure.name})",
            "Tokens/s, plain as measured. Untrained drafters are not accepted, so **what follows is computed**: the "
            "measured round, if it brought so many tokens.",
            table(["context", "batch", "plain, measured",
                   *(f"{n} a round, computed" for n in ACCEPTED)], rates)]

  def training_part(self) -> list[str]:
    """The optimizer step."""
    rows = [[r["tokens"], r["anchors"], r["attention"], f"{1e3 * r['seconds']:.1f}", f"{r['useful_tflop']:.2f}",
             "" if r["mfu"] is None else f"{100 * r['mfu']:.1f} %", f"{r['arguments_gb']:.2f}",
             f"{r['temporaries_gb']:.2f}"] for r in self.training]
    return rows and [f"## A training step at {self.model} size, bfloat16 with float32 masters, batch 1", table(
        ["tokens", "anchors", "attention", "ms", "useful TFLOP", "MFU", "arguments GB", "temporaries GB"], rows)]

  def smollm2_part(self) -> list[str]:
    """Whole generations."""
    rows = [[r["batch"], r["attention"], f"{r['plain_tokens_per_second']:.0f}", f"{1e3 * r['plain_step_seconds']:.2f}",
             f"{1e3 * r['draft_seconds']:.2f}", f"{1e3 * r['verification_seconds']:.2f}",
             f"{1e3 * r['round_seconds']:.2f}", f"{r['round_in_plain_steps']:.2f}"] for r in self.smollm2]
    return rows and ["## SmolLM2-135M, bfloat16, whole texts (infer.bench)",
                     "The drafter is untrained: 2 layers, block 4, rank 64.",
                     table(["batch", "attention", "plain tokens/s", "plain step ms", "draft ms", "verification ms",
                            "round ms", "round / plain step"], rows)]


def new(folder: Path, device: str) -> Path:
  """A page of a name that no other has: an hour on that device may never come again. The folder is made."""
  name = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
  folder.mkdir(parents=True, exist_ok=True)
  for number in itertools.count(1):
    path = folder / (f"{name}.md" if number == 1 else f"{name}-{number}.md")
    with contextlib.suppress(FileExistsError):
      path.touch(exist_ok=False)  # so that of two that begin at once each has its own
      return path


def texts(same: bool, gap: float) -> str:
  """Whether two texts are the same, or how far apart the logits are where they part."""
  return "yes" if same else f"parts where two logits differ by {gap:.1e}"


def table(head: list[str], rows: list[list]) -> str:
  """Markdown."""
  line = lambda cells: f"| {' | '.join(map(str, cells))} |"
  return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def scaled(value: float | None, factor: float = 1.0) -> float:
  """For a figure: a gap where there is none."""
  return float("nan") if value is None else factor * value


def drawn(page: Page) -> Figure:
  """Milliseconds, share of the memory's speed, and tokens/s, over the batch; a colour for each context."""
  figure = Figure((13, 4))
  time_axes, share_axes, rate_axes = figure.subplots(1, 3)
  contexts = sorted({r["context"] for r in page.decoding})
  for context, colour in zip(contexts, PALETTE * len(contexts)):
    points = sorted((r for r in page.decoding if r["context"] == context), key=lambda r: r["batch"])
    batches = [r["batch"] for r in points]
    for name, dashes, label in (("plain_step", "-", "plain step"), ("round", "--", "round")):
      line = dict(color=colour, linestyle=dashes, marker="o", label=f"{label}, context {context}")
      time_axes.plot(batches, [scaled(r[f"{name}_seconds"], 1e3) for r in points], **line)
      if page.gb_per_second:
        share_axes.plot(batches, [scaled(r[f"{name}_share"], 100) for r in points], **line)
    rate_axes.plot(batches, [r["batch"] / r["plain_step_seconds"] for r in points], color=colour, marker="o",
                   label=f"plain, context {context}")
    rate_axes.fill_between(
        batches, *([n * r["batch"] / scaled(r["round_seconds"]) for r in points] for n in (ACCEPTED[0], ACCEPTED[-1])),
        color=colour, alpha=0.15, label=None if context != contexts[0] else (
            f"shaded, computed: {ACCEPTED[0]} to {ACCEPTED[-1]} tokens a round"))
  for axes, label, scale in ((time_axes, "ms", "log"), (share_axes, "% of the memory's speed", "linear"),
                             (rate_axes, "tokens/s", "log")):
    axes.set(xlabel="batch", ylabel=label, xscale="log", yscale=scale)
    axes.set_xticks(batches := sorted({r["batch"] for r in page.decoding}), batches)
    if scale == "log":
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
  share_axes.set_ylim(bottom=0)
  share_axes.set_visible(bool(page.gb_per_second))
  time_axes.legend()
  rate_axes.legend(loc="lower right")
  figure.suptitle(f"{page.device}, {page.model} size, bfloat16")
  return figure
