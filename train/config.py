"""What an experiment file in configs/ is made of."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from dspark_jax.config import raise_all
from dspark_jax.drafters import DRAFTERS
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DrafterSettings:
  taps: tuple[int, ...]
  """target layers that feed the drafter; -1 is the embedding, the last layer is not allowed; MTP needs none"""
  mask_token_id: int = 0
  """what fills the block of a dspark drafter after the anchor"""
  kind: str = "dspark"
  """dspark (DFlash too), eagle3 or mtp; the last two have one layer, no sequential head and no confidence"""
  num_layers: int = 5
  block_size: int = 7
  markov_rank: int = 256
  """0: no sequential head (DFlash)"""
  markov_head: str = "vanilla"
  confidence: str = "markov"
  sample_from_anchor: bool = True
  lens: bool = False
  """slots start from a linear prediction of their hidden states, fitted in closed form before training (dspark kinds)"""
  draft_vocab_size: int = 0
  """draft over so many most frequent tokens of the data; 0: the whole vocabulary"""
  from_target: bool = False
  """start the draft layers from the target's last ones"""
  from_bigrams: bool = False
  """start a vanilla sequential head from the data's bigrams (needs draft_vocab_size)"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  target: str
  drafter: DrafterSettings
  out: Path
  data: tuple[Path, ...] = ()
  steps: int | None = None
  """optimizer steps; they win over minutes"""
  minutes: float | None = None
  """train for about so long: the first steps are timed and the number of steps is fixed from that"""
  batch: int = 8
  """rows per step"""
  row_length: int = 4096
  """tokens per row; several documents share one"""
  anchors: int = 512
  """blocks per row"""
  lens_rows: int = 512
  """rows that a lens is fitted to, in at most half of `minutes`"""
  microbatches: int = 1
  seed: int = 0
  compute_dtype: str = "float32"
  target_dtype: str = "float32"
  save_every: int = 200
  log_every: int = 10
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()

  def __post_init__(self):
    counts = ("batch", "row_length", "anchors", "microbatches", "save_every", "log_every", "lens_rows")
    problems = [f"{name} is {getattr(self, name)}, expected at least 1" for name in counts if getattr(self, name) < 1]
    for name in ("steps", "minutes"):
      value = getattr(self, name)
      problems += [f"{name} is {value}, expected more than 0"] if value is not None and value <= 0 else []
    for name in ("compute_dtype", "target_dtype"):
      value = getattr(self, name)
      problems += [f"{name} is {value!r}, expected float32 or bfloat16"] if value not in ("float32", "bfloat16") else []
    if self.drafter.from_bigrams and not 0 < self.drafter.draft_vocab_size <= 16384:
      problems.append(f"from_bigrams factors a matrix of words x words: expected draft_vocab_size 1..16384, got "
                      f"{self.drafter.draft_vocab_size}")
    if self.drafter.kind not in DRAFTERS:
      problems.append(f"the drafter's kind is {self.drafter.kind!r}, expected one of {', '.join(sorted(DRAFTERS))}")
    if self.drafter.lens and self.drafter.kind != "dspark":
      problems.append(f"lens is for drafters of the kind dspark, not {self.drafter.kind}")
    raise_all("training config", problems)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """Drafters to train on the same data, in the same order, for as many steps, and to evaluate alike."""
  base: TrainConfig
  """what all runs share"""
  drafters: dict[str, tuple[DrafterSettings, LossConfig]]
  """by name in the report: what is trained, and on which loss"""
  temperatures: tuple[float, ...] = (0.0, 1.0)
  datasets: tuple[str, ...] = ("stdlib",)
  samples: int = 48
  max_new_tokens: int = 80
  eval_batch: int = 8

  def __post_init__(self):
    if not self.drafters:
      raise ValueError("compare config: there are no drafters, expected at least one to train")


def read_config(path: str, kind: type = TrainConfig):
  """The `config` of an experiment file: a TrainConfig, or another `kind`."""
  if not Path(path).is_file():
    raise ValueError(f"config {path} does not exist: expected a Python file that defines `config`")
  found = runpy.run_path(path).get("config")
  if not isinstance(found, kind):
    raise ValueError(f"config {path} does not define `config` as a train.config.{kind.__name__}")
  return found
