"""Figures of the DSpark paper from what infer.evaluate and infer.head_cost wrote; no model is loaded.

When to use it: after an evaluation, to see where drafts are accepted, what layers, longer blocks and the survival
threshold bring, and whether the confidences can be trusted. A figure whose data is not there is left out, and said so.

    python -m infer.plots --results runs/evaluation/results.json --out runs/figures
    python -m infer.plots --results runs/a/results.json head_cost.json --out figures --formats png pdf

The last line of stdout is a JSON object: figures (name: path, in the first format; the others lie beside it) and
left_out (name: reason).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure until it is closed

from dspark_jax.programs import results, shell
from dspark_jax.programs.results import Diagram, HeadCost, Result

IDENTITY = ("target", "drafter", "kind", "block_size", "num_layers", "markov_head", "dataset", "mode", "threshold")
# Okabe and Ito's palette, whose colours also the colour-blind tell apart; black is for what belongs to no drafter.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
DASHES = ("-", "--", ":", "-.")
# Of lines that belong to no drafter. 4 and 7 have no divisor in common: 28 pairs, all different.
STROKES = tuple(zip(DASHES * 7, "osD^vPX" * 4))
# The salt makes the ids in an SVG the same in every run; without it each drawing of the same data is another file.
# Names hold what their owners put in: a $ is no formula.
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
         "legend.fontsize": 9, "svg.hashsalt": "dspark_jax", "figure.constrained_layout.use": True,
         "text.parse_math": False}
PACKAGED = "matplotlib_fontja", "fonts/ipaexg.ttf"  # never imported: that would change every figure of the process
Z = statistics.NormalDist().inv_cdf(0.975)  # 2.5 % to each side


class LeftOut(Exception):
  """Why a figure is not drawn."""


@dataclasses.dataclass
class Settings:
  results: tuple[Path, ...]
  """results.json of infer.evaluate, and files of infer.head_cost; all are put together"""
  out: Path
  """folder for the figures"""
  formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png",)


@dataclasses.dataclass
class Line:
  """Points of one line, ascending in x, each with an interval; names: the drafter of each point, if they differ."""
  label: str
  x: list[float]
  y: list[float]
  low: list[float]
  high: list[float]
  names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Panel:
  """What goes into one pair of axes; bars: lower and upper share of each x of a stacked bar."""
  title: str
  lines: list[Line]
  bars: tuple[list[float], list[float]] | None = None


def main(settings: Settings) -> dict:
  if not settings.results or not settings.formats:
    raise ValueError("there is nothing to draw: give --results at least one file and --formats at least one format")
  shell.check_out(settings.out, folder=True)
  found, costs = read(settings.results)
  names = variants(found)
  colours = looks(names.values())
  figures, left_out, drawn = {}, {}, {}
  families, missing = fonts("".join({c for r in found for c in f"{r.drafter}{r.target}{r.dataset}"} | {
      c for cost in costs for c in cost.device}))
  if missing:
    shell.say(f"no font here has {missing}, which figures show as boxes: install one that does, such as Noto Sans CJK")
  with matplotlib.rc_context(STYLE | {"font.family": families}), warnings.catch_warnings():
    if missing:  # said already, once, and not for every letter in every figure
      warnings.filterwarnings("ignore", "Glyph .* missing")
    for name, (prepare, draw) in FIGURES.items():
      try:
        figure = draw(prepare(found, costs, names), colours)
      except LeftOut as reason:
        left_out[name] = str(reason)
        shell.say(f"{name} is left out: {reason}")
        continue
      for kind in settings.formats:
        drawn[settings.out / f"{name}.{kind}"] = shell.image(figure, kind)
      figures[name] = str(settings.out / f"{name}.{settings.formats[0]}")
  for path, data in drawn.items():  # nothing is written before everything is drawn: no mixture of old and new
    shell.write(path, data)
  return {"figures": figures, "left_out": left_out}


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
  """(colour, dashes) of each name, the same in all figures; past the end of the palette in other dashes."""
  return dict(zip(sorted(set(names)), itertools.cycle((c, dashes) for dashes in DASHES for c in PALETTE)))


def fonts(text: str) -> tuple[list[str], str]:
  """(families that have the letters of a text together, Matplotlib's own first; the letters that no font has).

  Few have more than one of the world's scripts, so what Matplotlib's lacks is looked up in the fonts of the machine,
  and in a Japanese one that is installed with us: in whichever has the most of it.
  """
  own, packaged = Path(font_manager.findfont("DejaVu Sans")), importlib.util.find_spec(PACKAGED[0])
  families, missing = ["DejaVu Sans"], {c for c in text if c.isprintable()} - letters(own)
  if not missing:
    return families, ""
  # Beside its own lie fonts of formulas, and one that draws every letter as a box. Resolved: an environment may be
  # reached through a link, and Matplotlib's list of fonts is one for all.
  beside = own.parent.resolve()
  others = {Path(font.fname): font.name for font in font_manager.fontManager.ttflist
            if beside not in Path(font.fname).resolve().parents}
  if packaged:
    path = Path(packaged.origin).parent / PACKAGED[1]
    font_manager.fontManager.addfont(path)
    others[path] = font_manager.get_font(path).family_name
  known = {name: letters(path) & missing for path, name in sorted(others.items())}
  while any(known.values()):
    best = max(known, key=lambda name: len(known[name]))
    families, missing = [*families, best], missing - known[best]
    known = {name: found & missing for name, found in known.items()}
  return families, "".join(sorted(missing))


def letters(path: Path) -> set[str]:
  """What a font has a glyph for; nothing where it cannot be read."""
  try:
    return set(map(chr, font_manager.get_font(path).get_charmap()))
  except (OSError, RuntimeError):
    return set()


def read(paths: Iterable[Path]) -> tuple[list[Result], list[HeadCost]]:
  """(results, head costs) of all files, without plain decoding, which has nothing to draw.

  ValueError for a damaged file, and for the same measurement in two places, of which one would hide the other.
  """
  found, costs, seen = [], [], {}
  for path in paths:
    file = results.read(path)
    for rows, identity, into in ((file.results, IDENTITY, found), (file.head_cost, ("device", "block_size"), costs)):
      for row in rows or ():
        if isinstance(row, Result) and row.is_plain:
          continue
        key = type(row), *(getattr(row, name) for name in identity)
        if key in seen:
          raise ValueError(f"{', '.join(str(k) for k in key[1:] if k is not None)} is in {seen[key]} and again in "
                           f"{path}: give only one of them")
        seen[key] = path
        into.append(row)
  return found, costs


def variants(found: list[Result]) -> dict[tuple, str]:
  """What each drafter is called: its name, and its shape too where one name stands for several."""
  shapes = {}
  for r in found:
    shapes.setdefault(r.drafter, set()).add(shape_of(r))
  return {s: name if len(all_) == 1 else f"{name} ({family(s[1], s[4])}, block {s[2]}, layers {s[3]})"
          for name, all_ in shapes.items() for s in all_}


def shape_of(result: Result) -> tuple:
  return result.drafter, result.kind, result.block_size, result.num_layers, result.markov_head


def family(kind: str | None, markov_head: str | None) -> str:
  """DFlash is DSpark without a sequential head."""
  if kind != "dspark":
    return str(kind)
  return "DFlash" if markov_head in (None, "none") else f"DSpark {markov_head}"


def panels_of(found: list[Result]) -> dict[str, list[Result]]:
  """Results by panel title, one per target x dataset x mode; the target is named when there are several."""
  several, panels = len({r.target for r in found}) > 1, {}
  for r in found:
    title = f"{r.dataset}, {r.mode}" + (f", {r.target}" if several else "")
    panels.setdefault(title, []).append(r)
  return panels


def wilson(successes: float, trials: float) -> tuple[float, float]:
  """95 % interval of a rate (Wilson's score interval, without continuity correction)."""
  rate, shrink = successes / trials, 1 + Z ** 2 / trials
  middle = (rate + Z ** 2 / (2 * trials)) / shrink
  half = Z / shrink * math.sqrt(rate * (1 - rate) / trials + Z ** 2 / (4 * trials ** 2))
  return max(middle - half, 0.0), min(middle + half, 1.0)


def acceptance_panels(found: list[Result], costs: list[HeadCost], names: dict) -> list[Panel]:
  """Acceptance by draft position, given all before, with every draft verified (threshold 0)."""
  panels = []
  # A threshold leaves out the drafts that were likely to be rejected: what it verifies is another population.
  for title, rows in panels_of([r for r in found if r.threshold == 0]).items():
    lines = []
    for r in rows:
      pairs = enumerate(zip(r.acceptance or (), r.reached or ()), 1)
      points = [(k, a, *wilson(a * n, n)) for k, (a, n) in pairs if a is not None and n > 0]
      if points:
        lines.append(Line(names[shape_of(r)], *map(list, zip(*points))))
    if lines:
      panels.append(Panel(title, sorted(lines, key=lambda line: line.label)))
  return _or_left_out(panels, "no result at threshold 0 has acceptance by position")


def length_panels(found: list[Result], names: dict, along: str, fixed: str) -> list[Panel]:
  """Accepted length along one field, in lines of one family and one value of the other field, at threshold 0."""
  panels = []
  for title, rows in panels_of([r for r in found if r.threshold == 0]).items():
    groups = {}
    for r in rows:
      # The sort below puts drafters of one shape side by side, each with its own point: an average would hide them.
      x, value = getattr(r, along), getattr(r, fixed)
      if None not in (r.accepted_length, x, value):
        point = (x, r.accepted_length, *interval(r), names[shape_of(r)])
        groups.setdefault((family(r.kind, r.markov_head), value), []).append(point)
    word = {"num_layers": "{} layers", "block_size": "block {}"}[fixed]
    lines = [Line(f"{kind}, {word.format(value)}", *map(list, zip(*sorted(points))))
             for (kind, value), points in sorted(groups.items()) if len({x for x, *_ in points}) > 1]
    if lines:
      panels.append(Panel(title, lines))
  return panels


def interval(result: Result) -> tuple[float, float]:
  """The interval of the accepted length; the value itself, drawn without a bar, where it is not known."""
  both = result.accepted_length_interval
  return (result.accepted_length,) * 2 if both is None or None in both else both


def layer_panels(found: list[Result], costs: list[HeadCost], names: dict) -> tuple[list[Panel], list[Line]]:
  """Accepted length against the number of draft layers; no costs."""
  return _or_left_out(length_panels(found, names, "num_layers", "block_size"),
                      "no two drafters of the same kind, head and block size differ in num_layers at threshold 0"), []


def block_panels(found: list[Result], costs: list[HeadCost], names: dict) -> tuple[list[Panel], list[Line]]:
  """Accepted length against proposal length, and the sequential head's percent of a round, a line per device."""
  panels, devices = length_panels(found, names, "block_size", "num_layers"), {}
  for c in costs:
    devices.setdefault(c.device, []).append((c.block_size, *[c.percent] * 3))
  lines = [Line(device, *map(list, zip(*sorted(points)))) for device, points in sorted(devices.items())]
  missing = [reason for there, reason in (
      (panels, "no two drafters of the same kind, head and num_layers differ in block_size at threshold 0"),
      (lines, "there is no head_cost: give a file of infer.head_cost")) if not there]
  if len(missing) == 1:
    shell.say(f"figure4 shows only a part: {missing[0]}")
  _or_left_out(panels + lines, "; ".join(missing))
  return panels, lines


def sweep_panels(found: list[Result], costs: list[HeadCost], names: dict) -> list[Panel]:
  """Tokens per round against the survival threshold: accepted and rejected drafts, and the accepted length."""
  groups = {}
  for title, rows in panels_of(found).items():
    for r in rows:
      if r.rounds and r.accepted_length is not None:
        drafts = (r.accepted_tokens / r.rounds, r.rejected_tokens / r.rounds)
        point = (r.threshold, r.accepted_length, *interval(r), *drafts)
        groups.setdefault((names[shape_of(r)], title), []).append(point)
  panels = []
  for (label, title), points in sorted(groups.items()):
    if len(points) > 1:  # one threshold is no sweep
      *line, accepted, rejected = map(list, zip(*sorted(points)))
      panels.append(Panel(f"{label}\n{title}", [Line(label, *line)], (accepted, rejected)))
  return _or_left_out(panels, "no drafter was evaluated at two or more thresholds")


def reliability_panels(found: list[Result], costs: list[HeadCost], names: dict) -> dict[tuple[str, str], list[Panel]]:
  """Observed against predicted survival, a row of panels (one per position) per result at threshold 0.

  The intervals hold nothing but the value. Bins that no round fell into are no points.
  """
  rows = {}
  for title, some in panels_of([r for r in found if r.threshold == 0 and r.reliability]).items():
    for r in some:
      before, after = r.reliability_before, r.reliability
      both = {"before calibration": before, "after calibration": after} if before else {"as decoded": after}
      panels = []
      for k in range(len(after.ece)):
        there = {label: x for label, x in both.items() if k < len(x.ece)}
        errors = ["-" if x.ece[k] is None else f"{100 * x.ece[k]:.1f} %" for x in there.values()]
        panels.append(Panel(f"position {k + 1}\nECE {' to '.join(errors)}", [
            diagram(label, x, k) for label, x in there.items()]))
      if any(line.x for panel in panels for line in panel.lines):
        rows[names[shape_of(r)], title] = panels
  return _or_left_out(rows, "no result at threshold 0 has a reliability diagram (a drafter with a confidence head)")


def diagram(label: str, reliability: Diagram, k: int) -> Line:
  """Mean predicted and mean observed survival of the bins of position k that hold anything."""
  bins = zip(reliability.bin_count[k], reliability.bin_pred_sum[k], reliability.bin_target_sum[k])
  points = [(pred / count, target / count) for count, pred, target in bins if count > 0]
  x, y = ([point[i] for point in points] for i in (0, 1))
  return Line(label, x, y, y, y)


def _or_left_out(there, reason: str):
  if not there:
    raise LeftOut(reason)
  return there


def grid(count: int, *, width: float = 4.6, height: float = 3.8, columns: int = 3):
  """(figure, `count` axes) in rows of at most `columns`; width and height of each in inches."""
  columns = min(count, columns)
  rows = -(-count // columns)
  figure = Figure(figsize=(width * columns, height * rows))
  axes = figure.subplots(rows, columns, squeeze=False)
  for unused in axes.flat[count:]:
    unused.remove()
  return figure, list(axes.flat[:count])


def errors(line: Line) -> np.ndarray:
  """Lengths of the interval below and above each point: f[2,N]."""
  # A bootstrap's interval need not hold the value itself, and Matplotlib refuses negative lengths.
  return np.maximum([np.subtract(line.y, line.low), np.subtract(line.high, line.y)], 0)


def legend(ax, artists: list) -> None:
  """A legend of these. One that Matplotlib gathers itself leaves out the names that begin with an underscore."""
  ax.legend(artists, [artist.get_label() for artist in artists])


def draw_acceptance(panels: list[Panel], colours: dict):
  """figure2"""
  figure, axes = grid(len(panels))
  for ax, panel in zip(axes, panels):
    artists = []
    for line in panel.lines:
      colour, dashes = colours[line.label]
      artists.append(ax.errorbar(line.x, line.y, errors(line), color=colour, linestyle=dashes, marker="o",
                                 markersize=4, capsize=2, label=line.label))
    # 1.02: a marker at 1 stays whole.
    ax.set(title=panel.title, xlabel="draft position", ylabel="accepted, given all before (share)", ylim=(0, 1.02),
           xticks=sorted({x for line in panel.lines for x in line.x}))
    legend(ax, artists)
  return figure


def draw_lengths(data: tuple[list[Panel], list[Line]], colours: dict, xlabel: str):
  """figure3 and figure4: lines by family in grey, points in the colours of their drafters, and a panel of costs."""
  panels, costs = data
  figure, axes = grid(len(panels) + bool(costs))
  for ax, panel in zip(axes, panels):
    artists = []
    for line, (dashes, marker) in zip(panel.lines, itertools.cycle(STROKES)):
      artists.append(ax.errorbar(line.x, line.y, errors(line), color="0.45", linestyle=dashes, marker=marker,
                                 label=line.label))
      for x, y, name in zip(line.x, line.y, line.names):
        point = ax.plot([x], [y], marker, color=colours[name][0], markersize=8, zorder=3, label=name)
        artists += point if name not in [artist.get_label() for artist in artists] else []
    ax.set(title=panel.title, ylabel="accepted length (tokens per round)")
    legend(ax, artists)
  if costs:
    legend(axes[-1], [axes[-1].plot(line.x, line.y, color="black", linestyle=dashes, marker=marker, label=line.label)[0]
                      for line, (dashes, marker) in zip(costs, itertools.cycle(STROKES))])
    axes[-1].axhline(0, color="0.6", linewidth=0.8)
    axes[-1].set(title="cost of the sequential head", ylabel="share of a round (%)")
  for ax, lines in zip(axes, [*(panel.lines for panel in panels), costs]):
    ax.set(xlabel=xlabel, xticks=sorted({x for line in lines for x in line.x}))
  return figure


def draw_sweeps(panels: list[Panel], colours: dict):
  """figure5"""
  figure, axes = grid(len(panels))
  for ax, panel in zip(axes, panels):
    line, (accepted, rejected) = panel.lines[0], panel.bars
    places = range(len(line.x))  # thresholds are settings, not a scale: some lie close together
    ax.bar(places, accepted, color=colours[line.label][0], label="accepted drafts")
    ax.bar(places, rejected, bottom=accepted, color="0.85", edgecolor="0.5", hatch="//", label="rejected drafts")
    ax.errorbar(places, line.y, errors(line), color="black", marker="o", capsize=3, label="accepted length")
    ax.set(title=panel.title, xlabel="survival threshold", ylabel="tokens per round", xticks=places)
    ax.set_xticklabels([f"{x:g}" for x in line.x])
    ax.legend()
  return figure


def draw_reliability(rows: dict[tuple[str, str], list[Panel]], colours: dict):
  """figure6"""
  columns = max(map(len, rows.values()))
  # A panel is a square with its labels; 5 inches hold the title over a single one.
  figure = Figure(figsize=(max(2.7 * columns, 5), 3.5 * len(rows)))
  for part, ((name, title), panels) in zip(figure.subfigures(len(rows), 1, squeeze=False).flat, rows.items()):
    part.suptitle(f"{name}, {title}")
    part.supxlabel("predicted survival (probability)")
    part.supylabel("accepted (share)")
    axes = part.subplots(1, columns, squeeze=False, sharey=True)[0]
    for unused in axes[len(panels):]:
      unused.remove()
    for ax, panel in zip(axes, panels):
      ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
      for line in panel.lines:
        early = line.label == "before calibration"
        ax.plot(line.x, line.y, linestyle=":" if early else "-", marker="o", markersize=4, label=line.label,
                color="0.45" if early else colours[name][0], markerfacecolor="white" if early else None)
      ax.set(title=panel.title, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes[0].legend(loc="upper left", fontsize=7)  # in one panel of the row, and small: curves fill the rest
  return figure


FIGURES = {
  "figure2": (acceptance_panels, draw_acceptance),
  "figure3": (layer_panels, functools.partial(draw_lengths, xlabel="draft layers")),
  "figure4": (block_panels, functools.partial(draw_lengths, xlabel="proposal length (block size, tokens)")),
  "figure5": (sweep_panels, draw_sweeps),
  "figure6": (reliability_panels, draw_reliability)}


if __name__ == "__main__":
  shell.run(main, Settings)
