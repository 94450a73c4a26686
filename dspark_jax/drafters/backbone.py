"""The block-parallel pass over context features that DFlash and DSpark share (DSpark, 3.1).

A block is [anchor, mask, mask, ...]. Its queries see the projected target features strictly before the anchor and the
whole block. The layers are the target family's own blocks; only keys and values of the context are new: they come from
`ctx = RMSNorm(fc(taps))`, without the layer's input norm.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.model import DrafterConfig, DraftModel, last_of
from dspark_jax.nn import cache as kv
from dspark_jax.nn.attention import Context, attend, bidirectional, sequence
from dspark_jax.nn.layers import Block, Linear, RMSNorm, rope_table
from dspark_jax.types import Array, Batch, Blocks


class Backbone(DraftModel):
  """fc, norms and draft layers; `DSpark` adds the heads."""

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    super().__init__(config)
    spec = config.spec
    self.fc = Linear(len(config.taps) * spec.hidden_size, spec.hidden_size, rngs=rngs)
    self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.layers = nnx.List([Block(spec, rngs=rngs) for _ in range(config.num_layers)])
    self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

  def _rope(self, positions):
    return rope_table(positions, self.config.spec.head_dim, self.config.spec.rope_theta)

  def context(self, features: Array) -> Array:
    """f[B,T,D] from tapped features f[B,T,F]."""
    return self.hidden_norm(self.fc(features))

  def empty_context(self, batch: int, max_len: int) -> kv.Cache:
    """The drafter's own cache: keys and values of the context, per draft layer."""
    spec = self.config.spec
    return kv.empty(self.config.num_layers, batch, spec.num_kv_heads, max_len, spec.head_dim, self.fc.weight[...].dtype)

  def absorb_context(self, cache: kv.Cache, features: Array, n: Array) -> kv.Cache:
    """The cache with the first n: i32[B] of T newly verified rows committed. features: f[B,T,F]."""
    context = self.context(features)
    rope = self._rope(cache.length[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)[None])
    for index, block in enumerate(self.layers):
      cache = kv.write(cache, index, *block.self_attn.keys_values(context, rope))
    return kv.commit(cache, n)

  def draft(self, embeddings: Array, cache: kv.Cache) -> Array:
    """Hidden states of one block per row, at positions length..length+T-1: f[B,T,D]. embeddings: f[B,T,D]."""
    slots = embeddings.shape[1]
    positions = cache.length[:, None] + jnp.arange(slots, dtype=jnp.int32)[None]
    hi = jnp.broadcast_to(cache.length[:, None, None], (*positions.shape[:1], 1, slots))
    contexts = [Context(k, v, jnp.zeros_like(hi), hi) for k, v in zip(cache.k, cache.v)]
    return self._blocks(embeddings[:, None], self._rope(positions[:, None]), contexts)[:, 0]

  def draft_all(self, embeddings: Array, batch: Batch, features: Array, blocks: Blocks) -> Array:
    """Hidden states of all training blocks: f[B,A,T,D]. embeddings: f[B,A,T,D], features: f[B,S,F]."""
    context, slots = self.context(features), embeddings.shape[2]
    take = lambda x: jnp.take_along_axis(x, blocks.anchors, axis=1)[..., None]
    start, shape = take(batch.positions), embeddings.shape[:3]
    hi = jnp.broadcast_to(jnp.where(blocks.keep, blocks.anchors, 0)[..., None], shape)
    lo = jnp.broadcast_to(blocks.anchors[..., None] - start, shape)
    rope, contexts = self._rope(batch.positions), []
    for block in self.layers:
      contexts.append(sequence(*block.self_attn.keys_values(context, rope), lo, hi))
    own = jnp.arange(slots, dtype=jnp.int32)[None, None]
    return self._blocks(embeddings, self._rope(start + own), contexts, blocks.keep)

  def _blocks(self, x, rope, contexts, keep=None):
    mask = bidirectional(x.shape[2])
    if keep is not None:
      mask = mask & keep[..., None, None]
    for block, context in zip(self.layers, contexts):
      x = block(x, rope, lambda q, k, v, context=context: attend(q, k, v, mask, context))
    return self.norm(x)

  def start_from(self, layers: list[Block]) -> None:
    """Takes the layers. fc starts as the last tap, hidden_norm as the mean of their input norms: `ctx` goes to k_proj and
    v_proj in the place of a normed input."""
    self.layers = nnx.List(layers)
    self.hidden_norm.weight.set_value(sum(layer.input_layernorm.weight[...] for layer in layers) / len(layers))
    self.fc.weight.set_value(last_of(self.fc.weight[...]))
