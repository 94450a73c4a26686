"""The block-parallel pass over context features that DFlash and DSpark share (DSpark, 3.1).

A block is [anchor, mask, mask, ...]. Its queries see the projected target features strictly before the anchor and the
whole block. The layers are the target family's own blocks; only keys and values of the context are new: they come from
`ctx = RMSNorm(fc(taps))`, without the layer's input norm.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.model import DrafterConfig, DraftModel, last_of
from dspark_jax.nn.attention import Kernels, at_once, attend, sequence
from dspark_jax.nn.cache import Cache
from dspark_jax.nn.layers import Block, Linear, RMSNorm
from dspark_jax.types import Array, Batch, Blocks, Target


class Backbone(DraftModel):
  """fc, norms and draft layers; `DSpark` adds the heads."""

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    super().__init__(config)
    spec = config.spec
    self.fc = Linear(len(config.taps) * spec.hidden_size, spec.hidden_size, rngs=rngs)
    self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.layers = nnx.List([spec.build(rngs=rngs) for _ in range(config.num_layers)])
    self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

  def context(self, features: Array) -> Array:
    """f[B,T,D] from tapped features f[B,T,F]."""
    return self.hidden_norm(self.fc(features))

  def empty_context(self, target: Target, batch: int, max_len: int) -> Cache:
    """The drafter's own cache: keys and values of the context, per draft layer."""
    empty = lambda: self.config.spec.init_cache(batch, max_len, self.fc.weight.dtype, layout=target.cache_layout)
    return Cache(tuple(empty() for _ in self.layers), jnp.zeros(batch, jnp.int32))

  def absorb_context(self, cache: Cache, features: Array, n: Array) -> Cache:
    """The cache with the first n: i32[B] of T newly verified rows committed. features: f[B,T,F]."""
    context = self.context(features)
    positions = cache.length[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)[None]
    layers = (one.write(*layer.keys_values(context, positions), cache.length)
              for layer, one in zip(self.layers, cache.layers))
    return cache.replace(layers=tuple(layers)).commit(n)

  def draft(self, embeddings: Array, cache: Cache, kernels: Kernels) -> Array:
    """Hidden states of one block per row, at positions length..length+T-1: f[B,T,D]. embeddings: f[B,T,D]."""
    positions = cache.length[:, None] + jnp.arange(embeddings.shape[1], dtype=jnp.int32)[None]
    hi = jnp.broadcast_to(cache.length[:, None], positions.shape)[:, None]
    place = at_once(positions, jnp.zeros_like(hi), hi, kernels=kernels)
    return self._blocks(embeddings, place, [layer.context() for layer in cache.layers])

  def draft_all(self, embeddings: Array, batch: Batch, features: Array, blocks: Blocks, kernels: Kernels) -> Array:
    """Hidden states of all training blocks: f[B,A,T,D]. embeddings: f[B,A,T,D], features: f[B,S,F]."""
    context, shape = self.context(features), embeddings.shape[:3]
    start = jnp.take_along_axis(batch.positions, blocks.anchors, axis=1)[..., None]
    positions = start + jnp.arange(shape[2], dtype=jnp.int32)[None, None]
    hi = jnp.broadcast_to(jnp.where(blocks.keep, blocks.anchors, 0)[..., None], shape)
    lo = jnp.broadcast_to(blocks.anchors[..., None] - start, shape)
    contexts = [sequence(*layer.keys_values(context, batch.positions)) for layer in self.layers]
    return self._blocks(embeddings, at_once(positions, lo, hi, blocks.keep, kernels=kernels), contexts)

  def _blocks(self, x, place, contexts):
    for layer, context in zip(self.layers, contexts):
      x = layer.close(x, attend(*layer.project(x, place.positions), place, context))
    return self.norm(x)

  def start_from(self, layers: list[Block]) -> None:
    """Takes the layers. fc starts as the last tap, hidden_norm as the mean of their input norms: `ctx` goes to k_proj
    and v_proj in the place of a normed input."""
    self.layers = nnx.List(layers)
    self.hidden_norm.weight.set_value(sum(layer.input_layernorm.weight[...] for layer in layers) / len(layers))
    self.fc.weight.set_value(last_of(self.fc.weight[...]))
