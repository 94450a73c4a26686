"""DSpark: backbone, sequential head and confidence head. DFlash is DSpark with rank 0 and no confidence head."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import Count, Natural
from dspark_jax.drafters import heads
from dspark_jax.drafters.backbone import Backbone
from dspark_jax.drafters.model import DrafterChoices, DrafterConfig, DrafterSettings
from dspark_jax.drafters.starts import Lens, Masks
from dspark_jax.nn.cache import Cache
from dspark_jax.nn.layers import Linear, linear
from dspark_jax.types import (Array, Batch, Blocks, Committed, DraftHead, DraftOutputs, Proposal, Sampling, Target,
                              TargetOutput)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkChoices(DrafterChoices):
  """What a user chooses of a DSpark or DFlash drafter. DFlash: markov_rank 0, confidence none."""
  mask_token_id: int = 0
  """what fills the block after the anchor"""
  num_layers: Count = 5
  markov_rank: Natural = 256
  """R, of the sequential head; 0: none (DFlash)"""
  markov_head: Literal[tuple(heads.HEADS)] = "vanilla"
  confidence: Literal["none", "hidden", "markov"] = "markov"
  """what the confidence head reads: the hidden state, and the sequential head's embedding too (markov)"""
  sample_from_anchor: bool = True
  """no: the original DFlash, whose anchor predicts nothing"""
  lens: bool = False
  """the block starts from a linear prediction of its hidden states, fitted before training; not in the paper"""

  def problems(self) -> list[str]:
    problems = super().problems()
    if not self.taps:
      problems.append("taps are empty: name at least one target layer")
    if self.confidence == "markov" and not self.markov_rank:
      problems.append("confidence 'markov' reads the sequential head's embedding, but markov_rank is 0: use 'hidden' "
                      "or 'none'")
    if self.lens and not self.sample_from_anchor:
      problems.append("a lens predicts a draft at every position of its block: sample_from_anchor must be true")
    return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkConfig(DSparkChoices, DrafterConfig):
  """The configuration of a DSpark or DFlash drafter."""
  # Every stored drafter says these: where one is missing a default would be a guess.
  mask_token_id: int = dataclasses.field()
  num_layers: Count = dataclasses.field()

  @property
  def block_positions(self) -> int:
    """T: positions of a block that are run for block_size drafts."""
    return self.block_size + (0 if self.sample_from_anchor else 1)

  def context_flops(self) -> tuple[float, float]:
    """Of one token of the context: (of fc, of the keys and values of all layers)."""
    spec = self.spec
    return (2 * len(self.taps) * spec.hidden_size ** 2,
            4 * spec.hidden_size * spec.num_kv_heads * spec.head_dim * self.num_layers)

  def draft_flops(self, seen: float) -> float:
    """Of one block that attends to so many keys of the context, with its logits."""
    words = 2 * self.words * (self.spec.hidden_size + self.markov_rank)
    return self._block_flops(seen) + self.block_size * words

  def train_flops(self, length: int, blocks: int) -> float:
    fc, keys_values = self.context_flops()
    # An anchor sees half of its row, on average.
    return (length * (2 * fc + 3 * keys_values) + 3 * blocks * self._block_flops(length / 2)
            + blocks * self.block_size * 2 * self.words * (2 * self.spec.hidden_size + 3 * self.markov_rank))

  def _block_flops(self, seen):
    return self.num_layers * self.block_positions * self.spec.flops(seen + self.block_positions)

  def problems(self) -> list[str]:
    known = 0 <= self.mask_token_id < self.vocab_size
    return super().problems() + ([] if known else [
        f"mask_token_id is {self.mask_token_id}, expected 0..{self.vocab_size - 1}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSparkSettings(DSparkChoices, DrafterSettings):
  """What an experiment says of a DSpark or DFlash drafter."""
  kind: Literal["dspark"] = "dspark"
  """the word drafter:eagle3 or drafter:mtp chooses another, with flags of its own"""
  from_bigrams: bool = False
  """start a vanilla sequential head from the data's bigrams (needs draft_vocab_size)"""

  def problems(self) -> list[str]:
    problems = super().problems()
    if self.from_bigrams and not 0 < self.draft_vocab_size <= 16384:
      problems.append(f"from_bigrams factors a matrix of words x words: expected draft_vocab_size 1..16384, got "
                      f"{self.draft_vocab_size}")
    if self.from_bigrams and not (self.markov_rank and self.markov_head == "vanilla"):
      problems.append("from_bigrams starts a vanilla sequential head: set markov_head to vanilla and its rank")
    return problems


@flax.struct.dataclass
class DSparkState:
  cache: Cache        # of the context, per draft layer
  held: Array | None  # what the start of a block reads: with a lens f[B,F], the features of the newest column


class ConfidenceHead(nnx.Module):
  """Logits of P(token k survives | 1..k-1 survived) from [h_k] or [h_k ; W1[x_{k-1}]]."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.proj = Linear(width, 1, rngs=rngs, bias=True)

  def __call__(self, hidden: Array, embedding: Array | None) -> Array:
    inputs = hidden if embedding is None else jnp.concatenate([hidden, embedding], -1)
    # Not rounded to the compute dtype on the way: near a logit of 5 a bfloat16 is good to 0.03, and ties go by place.
    return linear(self.proj.weight[...], inputs, jnp.float32)[..., 0] + self.proj.bias[0].astype(jnp.float32)


class DSpark(Backbone):
  """A drafter behind the Drafter protocol (DSpark, 3.1)."""

  Config, Settings = DSparkConfig, DSparkSettings

  def __init__(self, config: DSparkConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    width, rank = config.spec.hidden_size, config.markov_rank
    self.markov_head = heads.HEADS[config.markov_head](rank, config.vocab_size, config.words, width,
                                                       rngs=rngs) if rank else None
    self.confidence_head = None if config.confidence == "none" else ConfidenceHead(
        width + (rank if config.confidence == "markov" else 0), rngs=rngs)
    self.lens = Lens(width, len(config.taps), config.block_positions, rngs=rngs) if config.lens else None

  @property
  def start(self) -> Masks | Lens:
    """What a block starts from. A lens has parameters, which are stored under that name."""
    return self.lens if self.config.lens else Masks(self.config.block_positions, self.config.mask_token_id)

  @property
  def has_confidence(self) -> bool:
    return self.confidence_head is not None

  def head(self, target: Target) -> DraftHead:
    return DraftHead(target.head(self.words), self.markov_head and self.markov_head.bias())

  def init_state(self, target: Target, batch: int, max_len: int) -> DSparkState:
    return DSparkState(self.empty_context(target, batch, max_len), self.start.init_held(batch))

  def absorb(self, target: Target, state: DSparkState, committed: Committed) -> DSparkState:
    features, n = committed.encoded.features, committed.n
    return state.replace(cache=self.absorb_context(state.cache, features, n),
                         held=self.start.absorb(state.held, features, n))

  def propose(self, target: Target, head: DraftHead, state: DSparkState, anchor: Array, keys: Array, sampling: Sampling
              ) -> Proposal:
    start = self.start(target, anchor, state.held)
    hidden = self.draft(start, state.cache, target.kernels)[:, -self.block_size:]
    return heads.propose(self.markov_head, head.bias, self._confidence, hidden, head.base(hidden), anchor, self.words,
                         keys, sampling)

  def train_outputs(self, target: Target, batch: Batch, encoded: TargetOutput, blocks: Blocks) -> DraftOutputs:
    features = encoded.features
    first = jnp.where(blocks.keep, blocks.previous[:, :, 0], self.config.mask_token_id)
    start = self.start(target, first, self.start.held_at(batch, features, blocks.anchors)).astype(features.dtype)
    hidden = self.draft_all(start, batch, features, blocks, target.kernels)[:, :, -self.block_size:]
    latent = embedding = None
    if self.markov_head is not None:
      flat = hidden.reshape(-1, *hidden.shape[2:])
      latent, embedding = (x.reshape(*hidden.shape[:3], -1) for x in heads.teacher_forced(
          self.markov_head, flat, blocks.previous.reshape(flat.shape[:2])))
    return DraftOutputs(hidden, latent, None if self.confidence_head is None else self._confidence(hidden, embedding))

  @property
  def _confidence(self):
    if self.confidence_head is None:
      return None
    return lambda hidden, embedding: self.confidence_head(
        hidden, embedding if self.config.confidence == "markov" else None)
