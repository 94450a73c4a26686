"""What an experiment file in configs/ is made of."""

from __future__ import annotations

import dataclasses
import math
import runpy
import sys
from pathlib import Path
from typing import Annotated, Literal, Union

import tyro

from dspark_jax.config import raise_all, wrong_choices
from dspark_jax.drafters import DRAFTERS
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import shell
from dspark_jax.programs.hosts import HostsConfig
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import OptimizerConfig

# The settings of one kind of drafter; on the command line the word drafter:KIND chooses it.
AnyDrafter = Union[tuple(Annotated[drafter.Settings, tyro.conf.subcommand(kind)] for kind, drafter in DRAFTERS.items())]
Dtype = Literal["float32", "bfloat16"]
MOST = 2 ** 24  # of whatever is counted: far beyond it numbers are no int32, and before that no memory
MEMORY = "memory"  # where features may be, beside a store


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)  # without that word the flags are those of the experiment's kind
@dataclasses.dataclass(frozen=True)
class TrainConfig:
  target: str
  drafter: AnyDrafter
  out: Path
  data: tuple[Path, ...] = ()
  """files, or one folder that train.prepare made of them"""
  features: str | None = None
  """folder or URL of a hidden-state store (train.cache_hidden) that is read in the place of running the target; or the
  word memory: what the target said of a row is kept on the host for later epochs"""
  memory_gb: float = 16
  """of host memory that features kept there may take"""
  start_from: str | None = None
  """a trained drafter, by what --drafter of other programs takes, whose weights and words a new run begins with; of its
  sizes, but perhaps for a target with longer positions. from_target, from_bigrams and the fit of a lens are left out"""
  steps: int | None = None
  """optimizer steps; they win over epochs and minutes"""
  epochs: float | None = None
  """passes over the rows that are trained on, to the nearest step; they win over minutes"""
  minutes: float | None = None
  """train for about so long: the first steps are timed and the number of steps is fixed from that"""
  batch: int = 8
  """rows per step"""
  row_length: int = 4096
  """tokens per row; several documents share one"""
  lengths: tuple[int, ...] = ()
  """shorter lengths, of which a step takes the least that its rows fit into; each is compiled once. Of use where few
  documents share a row, and batches are small"""
  anchors: int = 512
  """blocks per row"""
  lens_rows: int = 512
  """rows that a lens is fitted to, in at most half of `minutes`"""
  thinking: bool = False
  """prompts of conversations ask for thinking, and replies are learned with theirs, where the chat template can"""
  allow_special: bool = False
  """control tokens that data spells (<|im_end|>, ...) are control tokens, not text; only for data that you trust"""
  microbatches: int = 1
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to train on; the numbers are those of one device"""
  hosts: HostsConfig = HostsConfig()
  """processes that train together, one per host; the run folder is one that all of them see"""
  seed: int = 0
  compute_dtype: Dtype = "float32"
  target_dtype: Dtype = "float32"
  save_every: int = 200
  log_every: int = 10
  eval_every: int | None = None
  """steps between two measurements on held-out rows"""
  eval_rows: int = 0
  """rows that are not trained on, chosen by the seed; a multiple of batch"""
  decode_every: int | None = None
  """steps between two real speculative runs, of prompts from held-out rows"""
  decode_prompts: int = 4
  profile_steps: tuple[int, int] | None = None
  """trace from the first to the last of these steps (from 1) into the folder profile; of several processes each into
  profile/process-N"""
  diverged_at: float = 1e4
  """a loss or a gradient norm beyond this ends the run, like one that is not finite"""
  use_older: bool = False
  """go on from the checkpoint before where the newest is damaged (it is deleted, and its steps are run again)"""
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()

  def __post_init__(self):
    counts = ("batch", "row_length", "anchors", "microbatches", "lens_rows")
    problems = wrong_choices(self)
    problems += [f"{name} is {getattr(self, name)}, expected 1 to {MOST:,}" for name in counts
                 if not 1 <= getattr(self, name) <= MOST]
    problems += [f"{name} is {getattr(self, name)}, expected at least 1" for name in ("save_every", "log_every")
                 if getattr(self, name) < 1]
    if not 0 <= self.seed < 2 ** 32:
      problems.append(f"seed is {self.seed}, expected 0 to {2 ** 32 - 1}")
    if not self.diverged_at > 0:
      problems.append(f"diverged_at is {self.diverged_at}, expected more than 0")
    if self.steps and self.steps >= 2 ** 31:
      problems.append(f"steps are {self.steps}, expected fewer than an int32 counts")
    for name in ("steps", "epochs", "minutes"):
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        problems.append(f"{name} is {value}, expected more than 0, and finite")
    if not all(0 < length < self.row_length for length in self.lengths):
      problems.append(f"lengths are {self.lengths}, expected numbers from 1, below row_length, {self.row_length}")
    if not 0 < self.memory_gb < math.inf:
      problems.append(f"memory_gb is {self.memory_gb}, expected more than 0, and finite")
    if self.minutes and not (self.steps or self.epochs) and (self.lengths or self.features == MEMORY):
      problems.append("minutes are given, beside lengths or features in memory, with which the first steps say little "
                      "of how long later ones take: give steps or epochs")
    problems += self._watched()
    if type(self.drafter) not in [kind.Settings for kind in DRAFTERS.values()]:
      problems.append(f"drafter is a {type(self.drafter).__name__}, expected one of "
                      f"{', '.join(kind.Settings.__name__ for kind in DRAFTERS.values())}")
    raise_all("training config", problems)

  def steps_over(self, rows: int) -> int | None:
    """The steps of a run that trains on so many rows; None where the clock decides. ValueError: beyond an int32."""
    steps = self.steps or self.epochs and max(self.epochs * rows / self.batch, 1)
    if steps and not steps < 2 ** 31:
      raise ValueError(f"{self.steps or self.epochs} {'steps' if self.steps else f'epochs of {rows} rows'} are more "
                       f"than an int32 counts: give fewer")
    return steps and round(steps)

  def _watched(self):
    bounds = dict(eval_every=1, decode_every=1, eval_rows=0, decode_prompts=1)
    problems = [f"{name} is {value}, expected at least {least}" for name, least in bounds.items()
                for value in [getattr(self, name)] if value is not None and value < least]
    if self.eval_rows % max(self.batch, 1):
      problems.append(f"eval_rows is {self.eval_rows}, expected a multiple of batch, {self.batch}")
    if (self.eval_every or self.decode_every) and not self.eval_rows:
      problems.append("eval_rows is 0: say how many rows are held out for eval_every and decode_every")
    if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
      problems.append(f"profile_steps are {self.profile_steps}, expected two steps from 1, in order")
    return problems


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """Drafters to train on the same data, in the same order, for as many steps, and to evaluate alike."""
  base: TrainConfig
  """what all runs share"""
  drafters: dict[str, tuple[AnyDrafter, LossConfig]]
  """by name in the report: what is trained, and on which loss"""
  temperatures: tuple[float, ...] = (0.0, 1.0)
  datasets: tuple[str, ...] = ("stdlib",)
  samples: int = 48
  max_new_tokens: int = 80
  eval_batch: int = 8

  def __post_init__(self):
    if not self.drafters:
      raise ValueError("compare config: there are no drafters, expected at least one to train")


def experiment(doc: str) -> tuple[str, list[str]]:
  """(the experiment file that the command line names, its other words). Without one, ends with what to give.

  The file gives the defaults that tyro then overrides, so its two words are taken out before.
  """
  words = [w for arg in sys.argv[1:] for w in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
  if "--config" not in words[:-1]:
    more = f"{shell.command()} --config configs/demo.py --help"
    if {"-h", "--help"} & set(words):
      print(f"{doc}\nAll options: {more}")
      sys.exit()
    shell.complain(f"--config is missing: give an experiment file with it; all options: {more}")
    sys.exit(2)
  where = words.index("--config")
  return words[where + 1], words[:where] + words[where + 2:]


def read_config(path: str, kind: type = TrainConfig):
  """The `config` of an experiment file: a TrainConfig, or another `kind`."""
  if not Path(path).is_file():
    raise ValueError(f"config {path} {'is a folder' if Path(path).is_dir() else 'does not exist'}: expected a Python "
                     f"file that defines `config`")
  try:
    found = runpy.run_path(path).get("config")
  except ValueError:
    raise  # what the settings themselves say
  except Exception as error:  # it is a program, of which anything may be wrong; Python's sentence says what
    raise ValueError(f"config {path}: {type(error).__name__}: {error}: correct the file") from error
  if isinstance(found, TrainConfig | CompareConfig) and not isinstance(found, kind):
    its, ours = ("train.train", "train.compare")[::1 if isinstance(found, TrainConfig) else -1]
    raise ValueError(f"config {path} is for {its}, expected one for {ours}: a file whose `config` is a train.config."
                     f"{kind.__name__}")
  if not isinstance(found, kind):
    raise ValueError(f"config {path} does not define `config` as a train.config.{kind.__name__}")
  return found
