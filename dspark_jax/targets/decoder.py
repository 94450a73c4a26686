"""The generic decoder over block specs: embed, blocks, taps, head. Families differ only in their configuration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import TargetConfig
from dspark_jax.nn import cache as kv
from dspark_jax.nn.attention import Context, attend_causally, causal, sequence
from dspark_jax.nn.layers import Block, Embedding, Linear, RMSNorm, WordHead, rope_table
from dspark_jax.types import Array, Batch, TargetOutput

QUERY_BLOCK = 128  # a prompt or a training sequence is processed as causal blocks of this many tokens


class Decoder(nnx.Module):
  """A decoder-only language model behind the Target protocol.

  `layers` is an nnx.List of blocks (unrolled: what is fastest on CPU, where slicing a stacked weight copies it) or
  one Block with a leading layer axis (scanned: one layer to compile, for TPU and GPU); `stack_layers` converts.
  """

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    self.config = config
    spec = config.spec
    self.embed_tokens = Embedding(config.vocab_size, spec.hidden_size, rngs=rngs)
    self.layers = nnx.List([Block(spec, rngs=rngs) for _ in range(config.num_layers)])
    self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.lm_head = None if config.tie_word_embeddings else Linear(spec.hidden_size, config.vocab_size, rngs=rngs)

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  @property
  def max_positions(self) -> int:
    return self.config.max_positions

  def feature_width(self, taps: tuple[int, ...]) -> int:
    """F: every tap is the residual stream after a layer."""
    return len(taps) * self.config.spec.hidden_size

  def head(self, words: Array | None = None) -> WordHead:
    """Logits from hidden states after the final norm; the weight is the embedding table when tied."""
    return WordHead((self.lm_head or self.embed_tokens).weight[...]).at(words)

  def embed(self, tokens: Array) -> Array:
    return self.embed_tokens(tokens)

  def init_cache(self, batch: int, max_len: int) -> kv.Cache:
    spec = self.config.spec
    return kv.empty(self.config.num_layers, batch, spec.num_kv_heads, max_len, spec.head_dim, self.norm.weight.dtype,
                    stacked=isinstance(self.layers, Block))

  def commit(self, cache: kv.Cache, n: Array) -> kv.Cache:
    return kv.commit(cache, n)

  def __call__(self, tokens: Array, cache: kv.Cache, taps: tuple[int, ...]) -> tuple[TargetOutput, kv.Cache]:
    """Runs tokens i32[B,T] at the end of the cache; their rows are written but not committed.

    One path for prompts (T is a multiple of QUERY_BLOCK or less than it), plain steps and verification.
    """
    batch, length = tokens.shape
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    block = min(length, QUERY_BLOCK)
    if length % block:
      raise ValueError(f"{length} tokens at once: expected at most {QUERY_BLOCK} or a multiple of it; pad the prompt")
    hi = jnp.broadcast_to(cache.length[:, None, None] + (steps // block * block).reshape(1, -1, block),
                          (batch, length // block, block))

    def layer(x, cache, weights, index, rope):
      def attention(q, k, v):
        nonlocal cache
        cache = kv.write(cache, index, k, v)
        context = Context(cache.k[index], cache.v[index], jnp.zeros_like(hi), hi)
        return attend_causally(q, k, v, causal(block), context, block)
      return weights(x, rope, attention), cache

    return self._run(tokens, cache.length[:, None] + steps, taps, layer, cache)

  def encode(self, batch: Batch, taps: tuple[int, ...]) -> TargetOutput:
    """The whole of training sequences at once, without a cache; documents that share a row do not see each other."""
    length = batch.tokens.shape[1]
    block = min(length, QUERY_BLOCK)
    if length % block:
      raise ValueError(f"training sequences have {length} tokens: expected at most {QUERY_BLOCK} or a multiple of it")
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    lo = (steps - batch.positions).reshape(-1, length // block, block)
    hi = jnp.broadcast_to((steps // block * block).reshape(1, -1, block), lo.shape)
    segments = batch.segments.reshape(lo.shape)
    mask = causal(block) & (segments[..., :, None] == segments[..., None, :])

    def layer(x, cache, weights, index, rope):
      def attention(q, k, v):
        return attend_causally(q, k, v, mask, sequence(k, v, lo, hi), block)
      return weights(x, rope, attention), cache

    return self._run(batch.tokens, batch.positions, taps, layer, None)[0]

  def _run(self, tokens, positions, taps, layer, cache):
    x = self.embed(tokens)
    rope = rope_table(positions, self.config.spec.head_dim, self.config.spec.rope_theta)
    features = [x] * len(taps)
    keep = lambda features, index, x: [jnp.where(index == t, x, f) for t, f in zip(taps, features)]
    if isinstance(self.layers, Block):
      def body(carry, scanned):
        x, cache, features = carry
        weights, index = scanned
        x, cache = layer(x, cache, weights, index, rope)
        return (x, cache, keep(features, index, x)), None
      indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
      (x, cache, features), _ = jax.lax.scan(body, (x, cache, features), (self.layers, indices))
    else:
      for index, weights in enumerate(self.layers):
        x, cache = layer(x, cache, weights, index, rope)
        features = [x if index == t else f for t, f in zip(taps, features)]
    features = jnp.concatenate(features, -1) if taps else x[..., :0]
    return TargetOutput(self.norm(x), features), cache


def stack_layers(decoder: Decoder) -> Decoder:
  """The same model with its layers stacked along a leading axis, to be scanned."""
  graph, state = nnx.split(decoder)
  stacked = nnx.merge(graph, state)
  stacked.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *decoder.layers)
  return stacked
