"""What infer.evaluate and infer.head_cost measured: records that they write, and infer.plots and train.compare read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from dspark_jax.config import Range, from_json
from dspark_jax.decoding.acceptance import Rounds
from dspark_jax.programs import run_folder
from dspark_jax.text import read_json

Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Size = Annotated[float, Range(0)]  # a number that cannot be negative

COLUMNS = ("target", "drafter", "dataset", "mode", "threshold", "samples", "accepted length", "95 %",
           "% by position", "verify rate", "drafts/round", "tokens/s", "ECE", "AUROC", "Brier", "ECE raw")
NAMES = 5  # of COLUMNS that say what a row is of
SHOWN = ("accepted length", "% by position", "drafts/round", "tokens/s", "ECE")  # on a terminal, beside the names


@dataclasses.dataclass(frozen=True)
class Decoded:
  """What decoding one sample gave, the rounds of all its turns one after the other: a line of samples/CASE.jsonl."""
  id: str
  turns: Count                # asked
  tokens: Count               # new ones
  seconds: Size               # an equal share of its batches'
  n_accept: tuple[int, ...]   # per round, as in acceptance.Rounds
  n_verify: tuple[int, ...]
  n_commit: tuple[int, ...]
  confidence: tuple[tuple[float, ...], ...] | None = None  # per round and draft position, where the drafter has one

  def __post_init__(self):
    if not len(self.n_accept) == len(self.n_verify) == len(self.n_commit):
      raise ValueError("lists of different lengths")
    # A round ends with a token of the target's own, unless the text ended among its drafts.
    if not all(0 <= kept <= there and 1 <= said <= kept + 1
               for kept, there, said in zip(self.n_accept, self.n_verify, self.n_commit)):
      raise ValueError("counts out of range")
    # Every turn begins with a token of its prompt's pass. Older versions counted what the limit had cut off.
    if self.turns + sum(self.n_commit) != self.tokens:
      raise ValueError("rounds that do not add up to its tokens")
    if self.confidence is not None and len(self.confidence) != len(self.n_accept):
      raise ValueError("other confidences than rounds")

  @property
  def rounds(self) -> Rounds:
    """The same as arrays."""
    return Rounds.of(self.n_accept, self.n_verify, self.n_commit, self.confidence)


@dataclasses.dataclass(frozen=True)
class Diagram:
  """A calibration.Reliability as JSON has it: by position, by position and bin, and None where nothing was observed."""
  ece: tuple[float | None, ...]
  auc: tuple[float | None, ...]
  brier: tuple[float | None, ...]
  pred_mean: tuple[float | None, ...]
  target_mean: tuple[float | None, ...]
  total_weight: tuple[Size, ...]
  bin_count: tuple[tuple[Size, ...], ...]
  bin_pred_sum: tuple[tuple[Size, ...], ...]
  bin_target_sum: tuple[tuple[Size, ...], ...]
  summary: dict[str, float | None]

  def __post_init__(self):
    shapes = {tuple(map(len, table)) for table in (self.bin_count, self.bin_pred_sum, self.bin_target_sum)}
    lengths = {len(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "summary"}
    if len(shapes) > 1 or len(lengths) > 1:
      raise ValueError("the tables of a reliability diagram have different lengths, expected one row per position")


@dataclasses.dataclass(frozen=True)
class Result:
  """An entry of results.json: a drafter (plain decoding: none) on a dataset, at a temperature and a threshold.

  From `rounds` to `rejected_tokens` they are those of acceptance.summary, all None of plain decoding.
  """
  target: str
  drafter: str
  kind: str | None
  block_size: Count | None
  num_layers: Count | None
  markov_head: str | None
  dataset: str
  mode: str                  # calibration.mode_name
  threshold: Share | None    # of survival; 0 verifies every draft
  samples: Count
  tokens: Count
  rounds: Count | None
  accepted_length: Size | None
  accepted_length_interval: tuple[float | None, float | None] | None
  acceptance: tuple[Share | None, ...] | None
  reached: tuple[Count, ...] | None
  survival: tuple[Share | None, ...] | None
  verified: tuple[Count, ...] | None
  verify_rate: Size | None
  drafts_per_round: Size | None
  accepted_tokens: Count | None
  rejected_tokens: Count | None
  tokens_per_second: Size | None
  temperatures: tuple[Size, ...] | None  # of the confidences, where fitted
  reliability: Diagram | None            # of the confidences as decoded
  reliability_before: Diagram | None     # of what they were before those temperatures
  by_seed: tuple[Size | None, ...] | None = None  # accepted lengths, where train.compare took several runs together

  def __post_init__(self):
    if not self.is_plain:
      for name in ("threshold", "rounds", "accepted_tokens", "rejected_tokens"):
        if getattr(self, name) is None:
          raise ValueError(f"{name} is null, which it is of plain decoding alone (kind and threshold null)")
    by_position = {len(x) for x in (self.acceptance, self.reached, self.survival, self.verified) if x is not None}
    if len(by_position) > 1:
      raise ValueError("acceptance, reached, survival and verified have different lengths, expected one per position")

  @property
  def is_plain(self) -> bool:
    """Whether it has a speed and nothing else."""
    return self.kind is None and self.threshold is None

  @property
  def key(self) -> str:
    """The name of its file of samples."""
    return case_key(self.target, self.drafter, self.dataset, self.mode, self.threshold)

  def cells(self) -> list[str]:
    """As text, a cell for each of COLUMNS."""
    number = lambda value, digits=2: "" if value is None else f"{value:.{digits}f}"
    after, before = (diagram.summary if diagram else {} for diagram in (self.reliability, self.reliability_before))
    return [self.target, self.drafter, self.dataset, self.mode,
            "" if self.threshold is None else f"{self.threshold:g}", str(self.samples),
            number(self.accepted_length), "-".join(map(number, self.accepted_length_interval or [])),
            " ".join("-" if a is None else f"{100 * a:.0f}" for a in self.acceptance or []),
            number(self.verify_rate), number(self.drafts_per_round), number(self.tokens_per_second, 1),
            *(number(after.get(f"{key}_mean"), 3) for key in ("ece", "auc", "brier")),
            number(before.get("ece_mean"), 3)]


@dataclasses.dataclass(frozen=True)
class HeadCost:
  """What the sequential head costs of a round at one block size, measured here or counted by a compiler."""
  device: str
  block_size: Count
  percent: float
  percent_quartiles: tuple[float, float] | None = None  # measured: from here
  round_seconds: float | None = None
  round_seconds_without: float | None = None
  head_seconds_alone: float | None = None
  percent_alone: float | None = None
  round_bytes: Count | None = None                      # counted: from here
  compiler: str | None = None
  percent_bytes_reported: float | None = None
  percent_flops: float | None = None
  round_bytes_reported: float | None = None
  round_flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Results:
  """A results.json, or the file of infer.head_cost."""
  settings: dict[str, Any] | None = None
  versions: dict[str, Any] | None = None
  results: tuple[Result, ...] | None = None
  head_cost: tuple[HeadCost, ...] | None = None


def read(path: Path) -> Results:
  """What is in such a file. ValueError for another file, and for everything in it that is damaged."""
  content = read_json(path)
  if not {"results", "head_cost"} & set(content):
    raise ValueError(f"{path} is no results file, expected an object with results or head_cost: give a file that "
                     f"infer.evaluate or infer.head_cost wrote")
  return from_json(Results, content, f"{path} is damaged, write it again")


def read_decoded(path: Path, check: Callable[[Decoded], None] = lambda decoded: None) -> dict[str, Decoded]:
  """The samples in a file by id. ValueError for a damaged line; check raises one for what does not belong there."""
  known = {}

  def add(record):
    decoded = from_json(Decoded, record, "no decoded sample")
    check(decoded)
    if decoded.id in known:
      raise ValueError("a sample twice")
    known[decoded.id] = decoded

  run_folder.read_lines(path, add, remedy="delete the line, its sample will be decoded again")
  return known


def case_key(target: str, drafter: str, dataset: str, mode: str, threshold: float | None) -> str:
  """The name of the file with the samples of one entry."""
  end = "" if threshold is None else f"--threshold={threshold:g}"
  return f"{target}--{drafter}--{dataset}--{mode}{end}"


def table(results: list[Result]) -> Table:
  """For a terminal, which is narrow: of the columns that name a row, those that tell rows apart."""
  rows = [result.cells() for result in results]
  shown = [i for i, name in enumerate(COLUMNS) if name in SHOWN or i < NAMES and len({row[i] for row in rows}) > 1]
  out = Table(*(COLUMNS[i] for i in shown))
  for row in rows:
    out.add_row(*(row[i] for i in shown))
  return out


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
  """A Markdown table."""
  line = lambda row: "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"
  return line(head) + line(["---"] * len(head)) + "".join(map(line, rows))
