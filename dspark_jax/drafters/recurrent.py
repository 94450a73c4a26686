"""What recurrent drafters share: one cell that reads a token and the hidden state before it (Eagle3, MTP).

Column i pairs what the target said of token i with token i + 1 and predicts token i + 2. The cell's output is what the
next step reads in the place of the target's: step k of column i is fed token i + 1 + k, stands at position i + k, and
attends to the first steps of earlier columns and to all its own. In training every column is unrolled so (training-time
test, as in Eagle3); in decoding the first steps are what `absorb` caches, and the later ones are scratch.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters import heads
from dspark_jax.drafters.model import DrafterConfig, DraftModel, newest
from dspark_jax.nn.attention import Place, attend, following, sequence
from dspark_jax.nn.cache import Cache, extend
from dspark_jax.nn.layers import RMSNorm
from dspark_jax.types import (Array, Batch, Blocks, Committed, DraftHead, DraftOutputs, Proposal, Sampling, Target,
                              TargetOutput)


@flax.struct.dataclass
class RecurrentState:
  cache: Cache        # of the committed columns' first steps
  hidden: Array       # f[B,D]  of the newest column, before the final norm: it predicts the first draft


def unrolled_flops(config: DrafterConfig, cell: Callable[[float], float], columns: int) -> float:
  """Of so many columns in training, each unrolled over a block. cell: flops of a step that attends to so many keys."""
  steps = columns * config.block_size
  return steps * (3 * cell((columns + config.block_size) / 2) + 2 * 2 * config.spec.hidden_size * config.words)


class Recurrent(DraftModel):
  """A drafter behind the Drafter protocol; a subclass says what the first step reads (`first`) and makes the
  cell: project, close."""

  every_position = True

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    super().__init__(config)
    self.norm = RMSNorm(config.spec.hidden_size, config.spec.rms_norm_eps)

  def first(self, encoded: TargetOutput) -> Array:
    """f[...,D]: the hidden states that the first step reads, from what the target said."""
    raise NotImplementedError

  def project(self, embedding: Array, hidden: Array, positions: Array) -> tuple[Array, Array, Array, Array]:
    """(x, q, k, v): the cell's residual stream f[...,D] and what attends, from embeddings and hidden states
    f[...,D]."""
    raise NotImplementedError

  def close(self, x: Array, out: Array) -> Array:
    """f[...,D]: the next hidden states, before the final norm."""
    return self.layers[0].close(x, out)

  def init_state(self, target: Target, batch: int, max_len: int) -> RecurrentState:
    spec, dtype = self.config.spec, self.norm.weight.dtype
    cache = Cache((spec.init_cache(batch, max_len, dtype, layout=target.cache_layout),), jnp.zeros(batch, jnp.int32))
    return RecurrentState(cache, jnp.zeros((batch, spec.hidden_size), dtype))

  def absorb(self, target: Target, state: RecurrentState, committed: Committed) -> RecurrentState:
    """Runs the first step of T new columns, commits n of them, and keeps the hidden state of the last."""
    cache, n, hidden = state.cache, committed.n, self.first(committed.encoded)
    steps = jnp.arange(committed.next_tokens.shape[1], dtype=jnp.int32)[None]
    place = following(cache.length, cache.length[:, None] + steps, kernels=target.kernels)
    x, q, k, v = self.project(target.embed(committed.next_tokens).astype(hidden.dtype), hidden, place.positions)
    layer, context = extend(cache.layers[0], k, v, place.start)
    hidden = self.close(x, attend(q, k, v, place, context))
    return state.replace(cache=Cache((layer,), cache.length).commit(n), hidden=newest(hidden, n, state.hidden))

  def propose(self, target: Target, head: DraftHead, state: RecurrentState, anchor: Array, keys: Array,
              sampling: Sampling) -> Proposal:
    """Draws a block by recurrence. The anchor itself was absorbed with the newest column."""
    spec, rows, later = self.config.spec, anchor.shape[0], self.block_size - 1
    hi, context = state.cache.length[:, None, None], state.cache.layers[0].context()
    scratch = jnp.zeros((rows, 1, max(later, 1), spec.num_kv_heads, spec.head_dim), context.v.dtype)

    def drawn(hidden, k):
      logits = head(self.norm(hidden), None)
      return *heads.choose(logits, keys, k, self.words, sampling), logits

    def step(carry, k):
      """Draft position k: (hidden state, own keys and values) -> the next carry and (token, probabilities, logits)."""
      hidden, own = carry
      token, probs, logits = drawn(hidden, k)
      embedding = target.embed(token).astype(hidden.dtype)
      x, q, *new = self.project(embedding[:, None, None], hidden[:, None, None], hi + k)
      own = tuple(jax.lax.dynamic_update_slice_in_dim(o, n, k, axis=2) for o, n in zip(own, new))
      seen = (jnp.arange(scratch.shape[2], dtype=jnp.int32) <= k).reshape(1, 1, 1, -1)
      out = attend(q, *own, Place(hi + k, jnp.zeros_like(hi), hi, seen, None, target.kernels), context)
      return (self.close(x, out)[:, 0, 0], own), (token, probs, logits)

    (hidden, _), out = jax.lax.scan(step, (state.hidden, (scratch, scratch)), jnp.arange(later, dtype=jnp.int32))
    join = lambda rest, last: jnp.swapaxes(jnp.concatenate([rest, last[None]]), 0, 1)
    tokens, probs, logits = jax.tree.map(join, out, drawn(hidden, jnp.int32(later)))
    return Proposal(tokens, logits, probs, jnp.ones(tokens.shape), self.words)

  def train_outputs(self, target: Target, batch: Batch, encoded: TargetOutput, blocks: Blocks) -> DraftOutputs:
    """Every column unrolled block_size steps on the text's own tokens. blocks: `anchors.all_blocks`."""
    column = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    hi = jnp.broadcast_to(column, batch.tokens.shape)[..., None]
    lo = (column - batch.positions)[..., None]
    hidden, context, keys, values, out = self.first(encoded)[:, :, None], None, [], [], []
    for step in range(self.block_size):
      positions = (batch.positions + step)[..., None]
      embedding = target.embed(blocks.previous[:, :, step, None]).astype(hidden.dtype)
      x, q, k, v = self.project(embedding, hidden, positions)
      context = context or sequence(k[:, :, 0], v[:, :, 0])  # the first steps of earlier columns
      keys.append(k)
      values.append(v)
      place = Place(positions, lo, hi, jnp.ones((1, 1, 1, step + 1), bool), None, target.kernels)
      hidden = self.close(x, attend(q, jnp.concatenate(keys, 2), jnp.concatenate(values, 2), place, context))
      out.append(self.norm(hidden))
    return DraftOutputs(jnp.concatenate(out, axis=2), None, None)
