"""DSpark: backbone, sequential head and confidence head. DFlash is DSpark with rank 0 and no confidence head."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import DrafterConfig
from dspark_jax.drafters import heads
from dspark_jax.drafters.backbone import Backbone
from dspark_jax.drafters.lens import Lens
from dspark_jax.drafters.model import newest
from dspark_jax.nn import cache as kv
from dspark_jax.nn.layers import Linear, WordHead
from dspark_jax.types import (Array, Batch, Blocks, Committed, DraftHead, DraftOutputs, Proposal, Sampling, Target,
                              TargetOutput)


@flax.struct.dataclass
class DSparkState:
  cache: kv.Cache         # of the context, per draft layer
  features: Array | None  # f[B,F]  of the newest column, which a lens reads


class ConfidenceHead(nnx.Module):
  """Logits of P(token k survives | 1..k-1 survived) from [h_k] or [h_k ; W1[x_{k-1}]]."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.proj = Linear(width, 1, rngs=rngs, bias=True)

  def __call__(self, hidden: Array, embedding: Array | None) -> Array:
    inputs = hidden if embedding is None else jnp.concatenate([hidden, embedding], -1)
    return self.proj(inputs)[..., 0].astype(jnp.float32)


class DSpark(Backbone):
  """A drafter behind the Drafter protocol (DSpark, 3.1)."""

  Config = DrafterConfig

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    width, rank = config.spec.hidden_size, config.markov_rank
    self.markov_head = heads.MarkovHead(config.markov_head, rank, config.vocab_size, config.words, width,
                                        rngs=rngs) if rank else None
    self.confidence_head = None if config.confidence == "none" else ConfidenceHead(
        width + (rank if config.confidence == "markov" else 0), rngs=rngs)
    self.lens = Lens(width, len(config.taps), config.slots, rngs=rngs) if config.lens else None

  @property
  def has_confidence(self) -> bool:
    return self.confidence_head is not None

  def head(self, target: Target) -> DraftHead:
    return DraftHead(target.head(self.words),
                     None if self.markov_head is None else WordHead(self.markov_head.markov_w2.weight[...]))

  def init_state(self, target: Target, batch: int, max_len: int) -> DSparkState:
    features = None if self.lens is None else jnp.zeros((batch, self.fc.weight.shape[1]), self.fc.weight.dtype)
    return DSparkState(self.empty_context(batch, max_len), features)

  def absorb(self, target: Target, state: DSparkState, committed: Committed) -> DSparkState:
    features, n = committed.encoded.features, committed.n
    return state.replace(cache=self.absorb_context(state.cache, features, n),
                         features=None if self.lens is None else newest(features, n, state.features))

  def slots(self, target: Target, anchor: Array, features: Array | None) -> Array:
    """f[...,T,D]: what the layers start from; anchor: i32[...], features: f[...,F] of the column before it (for a lens)."""
    if self.lens is not None:
      return self.lens(target.embed(anchor), features)
    tokens = jnp.full((*anchor.shape, self.config.slots), self.config.mask_token_id, jnp.int32)
    return target.embed(tokens.at[..., 0].set(anchor))

  def propose(self, target: Target, head: DraftHead, state: DSparkState, anchor: Array, keys: Array, sampling: Sampling
              ) -> Proposal:
    hidden = self.draft(self.slots(target, anchor, state.features), state.cache)[:, -self.block_size:]
    return heads.propose(self.markov_head, head.bias, self._confidence, hidden, head.base(hidden), anchor, self.words, keys,
                         sampling)

  def train_outputs(self, target: Target, batch: Batch, encoded: TargetOutput, blocks: Blocks) -> DraftOutputs:
    features = encoded.features
    first = jnp.where(blocks.keep, blocks.previous[:, :, 0], self.config.mask_token_id)
    slots = self.slots(target, first, None if self.lens is None else before(batch, features, blocks.anchors))
    hidden = self.draft_all(slots.astype(features.dtype), batch, features, blocks)[:, :, -self.block_size:]
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


def before(batch: Batch, features: Array, anchors: Array) -> Array:
  """f[B,A,F]: features f[B,T,F] of the position before each anchor; zeros where a document begins."""
  start = jnp.take_along_axis(batch.positions, anchors, axis=1)[..., None]
  return jnp.where(start > 0, jnp.take_along_axis(features, jnp.maximum(anchors - 1, 0)[..., None], axis=1), 0)


def init_from_bigrams(drafter: DSpark, w1: Array, w2: Array, *, strength: float = 1.0) -> DSpark:
  """The drafter with its vanilla sequential head started from factors W1 f[V,R], W2 f[W,R] (`pipeline.bigram_factors`).

  strength: what the bigrams' logits are multiplied with, where something else predicts too.
  The final norm is scaled to 0.3, so that what an untrained backbone says does not drown the bigrams. A start for
  training that the paper does not have: on 19,000 tokens it brought tau from 1.26 to 1.42.
  """
  new = jax.tree.map(lambda x: x, drafter)  # merging a split would share the variables with the argument
  if getattr(getattr(new, "markov_head", None), "kind", None) != "vanilla":
    raise ValueError("only a vanilla sequential head can start from bigrams: set markov_head to vanilla and its rank")
  new.markov_head.markov_w1.weight.set_value(jnp.asarray(w1, new.norm.weight[...].dtype))
  new.markov_head.markov_w2.weight.set_value(strength * jnp.asarray(w2, new.norm.weight[...].dtype))
  new.norm.weight.set_value(0.3 * new.norm.weight[...])
  return new
