"""MTP-1 for dense targets: one of the target's own layers, fed by [norm(token embedding) ; norm(target hidden)].

The multi-token prediction module of DeepSeek-V3 (2.2) at depth 1, which drafts further tokens by reading its own
output.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.model import DrafterChoices, DrafterConfig, DrafterSettings, last_of
from dspark_jax.drafters.recurrent import Recurrent, unrolled_flops
from dspark_jax.nn.layers import Block, Linear, RMSNorm
from dspark_jax.types import Array, TargetOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPChoices(DrafterChoices):
  """What a user chooses of an MTP drafter: it has one layer, no sequential head and no confidence."""
  taps: tuple[int, ...] = ()
  """not needed: the target's last hidden states are read"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig(MTPChoices, DrafterConfig):
  """The configuration of an MTP drafter."""

  def train_flops(self, length: int, blocks: int) -> float:
    project = 4 * self.spec.hidden_size ** 2
    return unrolled_flops(self, lambda seen: self.spec.flops(seen) + project, blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPSettings(MTPChoices, DrafterSettings):
  """What an experiment says of an MTP drafter."""
  kind: Literal["mtp"] = "mtp"
  """the word drafter:dspark or drafter:eagle3 chooses another, with flags of its own"""


class MTP(Recurrent):
  """A drafter behind the Drafter protocol. It reads the target's last hidden states; taps may be empty."""

  Config, Settings = MTPConfig, MTPSettings

  def __init__(self, config: MTPConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    spec = config.spec
    self.enorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.hnorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.eh_proj = Linear(2 * spec.hidden_size, spec.hidden_size, rngs=rngs)
    self.layers = nnx.List([spec.build(rngs=rngs)])

  def first(self, encoded: TargetOutput) -> Array:
    return encoded.hidden

  def start_from(self, layers: list[Block]) -> None:
    """Takes the layer; of [token ; hidden] the hidden state passes as it is, the token through a random start."""
    self.layers = nnx.List(layers)
    weight, half = self.eh_proj.weight, self.config.spec.hidden_size
    weight.set_value(last_of(weight[...]).at[:, :half].set(weight[:, :half]))

  def project(self, embedding: Array, hidden: Array, positions: Array) -> tuple[Array, Array, Array, Array]:
    x = self.eh_proj(jnp.concatenate([self.enorm(embedding), self.hnorm(hidden)], axis=-1))
    return x, *self.layers[0].project(x, positions)
