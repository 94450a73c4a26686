"""What recurrent drafters share: one cell that reads a token and the hidden state before it (Eagle3, MTP).

Column i pairs what the target said of token i with token i + 1 and predicts token i + 2. The cell's output is what the
next step reads in the place of the target's: step k of column i is fed token i + 1 + k, stands at position i + k, and
attends to the first steps of earlier columns and to all its own. In training every column is unrolled so (training-time
test, as in Eagle3); in decoding the first steps are what `absorb` caches, and the later ones are scratch.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import RecurrentConfig
from dspark_jax.drafters import heads
from dspark_jax.drafters.model import DraftModel, newest
from dspark_jax.nn import cache as kv
from dspark_jax.nn.attention import Context, attend, attend_causally, causal, sequence
from dspark_jax.nn.layers import RMSNorm, rope_table
from dspark_jax.types import (Array, Batch, Blocks, Committed, DraftHead, DraftOutputs, Proposal, Sampling, Target,
                              TargetOutput)

QUERY_BLOCK = 128  # rows of a prompt that are absorbed as one causal block


@flax.struct.dataclass
class RecurrentState:
  cache: kv.Cache     # of the committed columns' first steps
  hidden: Array       # f[B,D]  of the newest column, before the final norm: it predicts the first draft


class Recurrent(DraftModel):
  """A drafter behind the Drafter protocol; a subclass says what the first step reads (`first`) and makes the `cell`."""

  Config = RecurrentConfig
  every_position = True

  def __init__(self, config: RecurrentConfig, *, rngs: nnx.Rngs):
    super().__init__(config)
    self.norm = RMSNorm(config.spec.hidden_size, config.spec.rms_norm_eps)

  def first(self, encoded: TargetOutput) -> Array:
    """f[...,D]: the hidden states that the first step reads, from what the target said."""
    raise NotImplementedError

  def cell(self, embedding: Array, hidden: Array, rope, attend) -> Array:
    """f[...,D]: the next hidden states, before the final norm, from embeddings and hidden states f[...,D]."""
    raise NotImplementedError

  def _rope(self, positions):
    return rope_table(positions, self.config.spec.head_dim, self.config.spec.rope_theta)

  def init_state(self, target: Target, batch: int, max_len: int) -> RecurrentState:
    spec, dtype = self.config.spec, self.norm.weight[...].dtype
    cache = kv.empty(1, batch, spec.num_kv_heads, max_len, spec.head_dim, dtype)
    return RecurrentState(cache, jnp.zeros((batch, spec.hidden_size), dtype))

  def absorb(self, target: Target, state: RecurrentState, committed: Committed) -> RecurrentState:
    """Runs the first step of T new columns, commits n of them, and keeps the hidden state of the last."""
    cache, n = state.cache, committed.n
    length = committed.next_tokens.shape[1]
    block, steps = min(length, QUERY_BLOCK), jnp.arange(length, dtype=jnp.int32)[None]
    hi = cache.length[:, None, None] + (steps // block * block).reshape(1, -1, block)

    def attention(q, k, v):
      nonlocal cache
      cache = kv.write(cache, 0, k, v)
      return attend_causally(q, k, v, causal(block), Context(cache.k[0], cache.v[0], jnp.zeros_like(hi), hi), block)

    hidden = self.first(committed.encoded)
    embeddings = target.embed(committed.next_tokens).astype(hidden.dtype)
    hidden = self.cell(embeddings, hidden, self._rope(cache.length[:, None] + steps), attention)
    return state.replace(cache=kv.commit(cache, n), hidden=newest(hidden, n, state.hidden))

  def propose(self, target: Target, head: DraftHead, state: RecurrentState, anchor: Array, keys: Array,
              sampling: Sampling) -> Proposal:
    """Draws a block by recurrence. The anchor itself was absorbed with the newest column."""
    spec, rows, later = self.config.spec, anchor.shape[0], self.block_size - 1
    cache = state.cache
    hi = cache.length[:, None, None]
    context = Context(cache.k[0], cache.v[0], jnp.zeros_like(hi), hi)
    scratch = jnp.zeros((rows, 1, max(later, 1), spec.num_kv_heads, spec.head_dim), cache.v[0].dtype)

    def drawn(hidden, k):
      logits = head(self.norm(hidden), None)
      return *heads.choose(logits, keys, k, self.words, sampling), logits

    def step(carry, k):
      """Slot k: (hidden state, own keys and values) -> the next carry and (token, probabilities, logits)."""
      hidden, own = carry
      token, probs, logits = drawn(hidden, k)

      def attention(q, *new):
        nonlocal own
        own = tuple(jax.lax.dynamic_update_slice_in_dim(o, x, k, axis=2) for o, x in zip(own, new))
        seen = (jnp.arange(scratch.shape[2], dtype=jnp.int32) <= k).reshape(1, 1, 1, -1)
        return attend(q, *own, seen, context)

      embedding = target.embed(token).astype(hidden.dtype)
      hidden = self.cell(embedding[:, None, None], hidden[:, None, None], self._rope(hi + k), attention)[:, 0, 0]
      return (hidden, own), (token, probs, logits)

    (hidden, _), out = jax.lax.scan(step, (state.hidden, (scratch, scratch)), jnp.arange(later, dtype=jnp.int32))
    join = lambda rest, last: jnp.swapaxes(jnp.concatenate([rest, last[None]]), 0, 1)
    tokens, probs, logits = jax.tree.map(join, out, drawn(hidden, jnp.int32(later)))
    return Proposal(tokens, logits, probs, jnp.ones(tokens.shape), self.words)

  def train_outputs(self, target: Target, batch: Batch, encoded: TargetOutput, blocks: Blocks) -> DraftOutputs:
    """Every column unrolled block_size steps on the text's own tokens. blocks: `anchors.all_blocks`."""
    length = batch.tokens.shape[1]
    column = jnp.arange(length, dtype=jnp.int32)[None]
    hi = jnp.broadcast_to(column, batch.tokens.shape)[..., None]
    lo = (column - batch.positions)[..., None]
    hidden, context, own, out = self.first(encoded)[:, :, None], None, [], []
    for step in range(self.block_size):
      def attention(q, k, v):
        nonlocal context
        context = context or sequence(k[:, :, 0], v[:, :, 0], lo, hi)  # the first steps of earlier columns
        own.append((k, v))
        everything = (jnp.concatenate(x, axis=2) for x in zip(*own))
        return attend(q, *everything, jnp.ones((1, 1, 1, len(own)), bool), context)
      embedding = target.embed(blocks.previous[:, :, step, None]).astype(hidden.dtype)
      hidden = self.cell(embedding, hidden, self._rope((batch.positions + step)[..., None]), attention)
      out.append(self.norm(hidden))
    return DraftOutputs(jnp.concatenate(out, axis=2), None, None)
