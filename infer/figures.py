"""The paper's figures 7 and 8 from what infer.load measured or infer.simulate computed: policies side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dspark_jax.programs import shell
from infer import plots


@dataclasses.dataclass(frozen=True)
class Point:
  """One policy at one concurrency, or at one rate of arrivals."""
  panel: str
  policy: str
  concurrency: float
  tokens_per_second: float
  tokens_per_second_per_user: float
  budget: float | None  # tokens verified per request and round, the anchor included


def draw(points: list[Point], x: str, y: str, xlabel: str, ylabel: str, *, log_y: bool) -> Figure:
  """A panel for each title, a line for each policy through its points by concurrency; x on a logarithmic scale."""
  if not points:
    raise plots.LeftOut("nothing was measured: no text of two or more tokens came")
  panels, policies = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("panel", "policy"))
  colours = plots.looks(policies)
  figure, axes = plots.grid(len(panels), columns=4)
  for ax, panel in zip(axes, panels):
    artists = []
    # Lines lie on each other where policies do the same: what is drawn first is larger, and shows.
    for policy, size in zip(policies, itertools.chain((9, 7, 5, 4), itertools.repeat(3))):
      some = sorted((p for p in points if (p.panel, p.policy) == (panel, policy)), key=lambda p: p.concurrency)
      colour, dashes = colours[policy]
      artists += ax.plot([getattr(p, x) for p in some], [getattr(p, y) for p in some], color=colour, linestyle=dashes,
                         marker="o", markersize=size, label=policy) if some else []
    ax.set(title=panel, xlabel=xlabel, ylabel=ylabel, xscale="log")
    if log_y:
      ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis)[:1 + log_y]:
      axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axis.set_major_formatter("{x:g}")
      axis.set_minor_formatter(NullFormatter())
    plots.legend(ax, artists)
  return figure


def figure7(points: list[Point]) -> Figure:
  """Throughput against the speed that a user sees."""
  return draw(points, "tokens_per_second_per_user", "tokens_per_second", "tokens/s per user", "tokens/s", log_y=True)


def figure8(points: list[Point]) -> Figure:
  """Tokens verified per request and round against concurrency."""
  known = [p for p in points if p.budget is not None]
  if not known:
    raise plots.LeftOut("no server said how many tokens it verified")
  return draw(known, "concurrency", "budget", "concurrency (requests)", "verified tokens per request and round",
              log_y=False)


FIGURES: dict[str, Callable[[list[Point]], Figure]] = {"figure7": figure7, "figure8": figure8}


def write(folder: Path, points: Iterable[Point], suffix: str = "") -> dict[str, str]:
  """Draws both as PNG into a folder: {name: path}; says which is left out and why."""
  points, drawn = list(points), {}
  with matplotlib.rc_context(plots.STYLE):
    for name, make in FIGURES.items():
      try:
        drawn[f"{name}{suffix}"] = shell.image(make(points))
      except plots.LeftOut as reason:
        shell.say(f"{name}{suffix} is left out: {reason}")
  for name, data in drawn.items():  # nothing is written before everything is drawn
    shell.write(folder / f"{name}.png", data)
  return {name: str(folder / f"{name}.png") for name in drawn}
