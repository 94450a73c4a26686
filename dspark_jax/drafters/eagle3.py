"""Eagle3: one layer that attends with [norm(token embedding) ; norm(hidden)], fed by several taps of the target."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.model import DrafterChoices, DrafterConfig, DrafterSettings, last_of
from dspark_jax.drafters.recurrent import Recurrent, unrolled_flops
from dspark_jax.nn.layers import MLP, Attention, Block, BlockSpec, Linear, RMSNorm
from dspark_jax.types import Array, TargetOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Choices(DrafterChoices):
  """What a user chooses of an Eagle3 drafter: it has one layer, no sequential head and no confidence."""

  def problems(self) -> list[str]:
    return super().problems() + ([] if self.taps else [
        "an Eagle3 drafter has no taps: name the target layers that feed it (the reference takes five)"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Config(Eagle3Choices, DrafterConfig):
  """The configuration of an Eagle3 drafter."""

  def train_flops(self, length: int, blocks: int) -> float:
    spec = self.spec
    token = 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)  # the input's second half
    fc = 2 * len(self.taps) * spec.hidden_size ** 2
    return length * 2 * fc + unrolled_flops(self, lambda seen: spec.flops(seen) + token, blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Settings(Eagle3Choices, DrafterSettings):
  """What an experiment says of an Eagle3 drafter."""
  kind: Literal["eagle3"] = "eagle3"
  """the word drafter:dspark or drafter:mtp chooses another, with flags of its own"""


class Eagle3Block(nnx.Module):
  """The cell: the residual stream is the hidden state; the token enters through attention alone."""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
    norm = lambda: RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = norm(), norm(), norm()
    self.self_attn = Attention(spec, rngs=rngs, inputs=2 * spec.hidden_size)
    self.mlp = MLP(spec, rngs=rngs)

  def project(self, embedding: Array, hidden: Array, positions: Array) -> tuple[Array, Array, Array]:
    """(q f[...,H,h], k f[...,K,h], v f[...,K,h])"""
    both = jnp.concatenate([self.input_layernorm(embedding), self.hidden_norm(hidden)], axis=-1)
    return self.self_attn.project(both, positions)

  def close(self, hidden: Array, out: Array) -> Array:
    """f[...,D]: the next hidden state, of the one before and what attention found, f[...,H,h]."""
    x = hidden + self.self_attn.o_proj(out.reshape(*hidden.shape[:-1], -1))
    return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3(Recurrent):
  """A drafter behind the Drafter protocol, as the reference trains it."""

  Config, Settings = Eagle3Config, Eagle3Settings

  def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    width = config.spec.hidden_size
    self.fc = Linear(len(config.taps) * width, width, rngs=rngs)
    self.layers = nnx.List([Eagle3Block(config.spec, rngs=rngs)])

  def first(self, encoded: TargetOutput) -> Array:
    return self.fc(encoded.features)

  def start_from(self, layers: list[Block]) -> None:
    """Takes the layer for the half of the attention's input that is the hidden state; the token's half stays as it
    is."""
    (theirs,), mine = layers, self.layers[0]
    half = self.config.spec.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
      weight = getattr(mine.self_attn, name).weight
      weight.set_value(weight[...].at[:, half:].set(getattr(theirs.self_attn, name).weight[...]))
    for name in ("o_proj", "q_norm", "k_norm"):
      setattr(mine.self_attn, name, getattr(theirs.self_attn, name))
    mine.hidden_norm, mine.mlp = theirs.input_layernorm, theirs.mlp
    mine.post_attention_layernorm = theirs.post_attention_layernorm
    self.fc.weight.set_value(last_of(self.fc.weight[...]))

  def project(self, embedding: Array, hidden: Array, positions: Array) -> tuple[Array, Array, Array, Array]:
    return hidden, *self.layers[0].project(embedding, hidden, positions)
