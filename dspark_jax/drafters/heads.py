"""Sequential heads: what makes a parallel block aware of its own earlier tokens (DSpark, 3.1).

p_k(v | x_<k) = softmax(U_k + W2 . latent_k), where latent_k f[R] comes from one `step` of the head. A head is one class
(its parameters, its first state and its step) and one line of HEADS. Two scans, teacher-forced and drawing, serve all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax import sampling as sp
from dspark_jax.nn.layers import Embedding, Linear, WordHead
from dspark_jax.types import Array, Head, Proposal, Sampling


AXES = ("words", None)  # the logical axes of its tables (nn/sharding.py)


class MarkovHead(nnx.Module):
  """What all heads have: W1 f[V,R], as any word of the vocabulary may precede, and W2 f[W,R] over the draft words."""

  def __init__(self, rank: int, vocab_size: int, words: int, hidden_size: int, *, rngs: nnx.Rngs):
    self.markov_w1 = Embedding(vocab_size, rank, rngs=rngs, axes=AXES)
    self.markov_w2 = Embedding(words, rank, rngs=rngs, axes=AXES)

  def bias(self) -> WordHead:
    """What it adds to the logits, of a latent f[...,R]."""
    return WordHead(self.markov_w2.weight[...], AXES)

  def first(self, embedding: Array) -> Any:
    """The state before a block, any pytree, for the anchors' embeddings f[...,R]. None: nothing is carried."""
    return None

  def step(self, state: Any, embedding: Array, hidden: Array) -> tuple[Any, Array]:
    """(the next state, latent f[...,R]) of one draft position, from e = W1[x_{k-1}] f[...,R] and h_k f[...,D]."""
    raise NotImplementedError


class Vanilla(MarkovHead):
  """latent = e"""

  def step(self, state, embedding, hidden):
    return state, embedding


class Gated(MarkovHead):
  """latent = sigmoid(gate([h_k ; e])) * e"""

  def __init__(self, rank: int, vocab_size: int, words: int, hidden_size: int, *, rngs: nnx.Rngs):
    super().__init__(rank, vocab_size, words, hidden_size, rngs=rngs)
    self.gate_proj = Linear(hidden_size + rank, rank, rngs=rngs, bias=True)

  def step(self, state, embedding, hidden):
    return state, jax.nn.sigmoid(self.gate_proj(jnp.concatenate([hidden, embedding], -1))) * embedding


class RNN(MarkovHead):
  """(g, c, o) = linear([s ; e ; h_k]); s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c); latent = tanh(o); s_0 = 0"""

  def __init__(self, rank: int, vocab_size: int, words: int, hidden_size: int, *, rngs: nnx.Rngs):
    super().__init__(rank, vocab_size, words, hidden_size, rngs=rngs)
    self.joint_proj = Linear(2 * rank + hidden_size, 3 * rank, rngs=rngs, bias=True)

  def first(self, embedding):
    return jnp.zeros_like(embedding)

  def step(self, state, embedding, hidden):
    gate, candidate, out = jnp.split(self.joint_proj(jnp.concatenate([state, embedding, hidden], -1)), 3, -1)
    gate = jax.nn.sigmoid(gate)
    return gate * state + (1 - gate) * jnp.tanh(candidate), jnp.tanh(out)


HEADS = {"vanilla": Vanilla, "gated": Gated, "rnn": RNN}


def teacher_forced(head: MarkovHead, hidden: Array, previous: Array) -> tuple[Array, Array]:
  """(latents, embeddings), each f[N,G,R], of blocks whose previous tokens i32[N,G] are known. hidden: f[N,G,D]."""
  embeddings = head.markov_w1(previous)
  along = (jnp.swapaxes(embeddings, 0, 1), jnp.swapaxes(hidden, 0, 1))
  _, latents = jax.lax.scan(lambda state, position: head.step(state, *position), head.first(embeddings[:, 0]), along)
  return jnp.swapaxes(latents, 0, 1), embeddings


def choose(logits: Array, keys: Array, k: Array, words: Array | None, sampling: Sampling
           ) -> tuple[Array, Array | None]:
  """(tokens i32[B], the probabilities f32[B,W] that they were drawn from, None when greedy) at draft position k."""
  probs = None
  if sampling.mode == "greedy":
    column = sp.argmax(logits)
  else:
    probs = sp.probabilities(logits, sampling)
    column = sp.draw(jax.vmap(jax.random.fold_in, (0, None))(keys, k), probs)
  # a NaN gives column W, which must not become a token
  return column if words is None else words.at[column].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max), probs


def propose(head: MarkovHead | None, bias: Head | None, confidence, hidden: Array, base: Array, anchor: Array,
            words: Array | None, keys: Array, sampling: Sampling) -> Proposal:
  """Draws a block left to right. hidden f[B,G,D], base logits f32[B,G,W], anchor i32[B], keys [B].

  bias: of the `DraftHead`. confidence(hidden f[B,D], embedding f[B,R] | None) -> f32[B] logits, or None.
  """
  def step(carry, position):
    """Draft position k: (state, previous token, rest) and (k, hidden) -> the next carry and what k gives."""
    state, previous, rest = carry
    k, h = position
    logits = jax.lax.dynamic_index_in_dim(rest, k, keepdims=False).astype(jnp.float32)
    embedding = None
    if head is not None:
      embedding = head.markov_w1(previous)
      state, latent = head.step(state, embedding, h)
      logits = logits + bias(latent)
    token, probs = choose(logits, keys, k, words, sampling)
    if probs is not None:
      rest = jax.lax.dynamic_update_index_in_dim(rest, probs, k, 0)
    survive = jnp.ones(h.shape[0]) if confidence is None else jax.nn.sigmoid(confidence(h, embedding))
    return (state, token, rest), (token, logits, survive)

  if sampling.mode == "greedy" and hidden.dtype == jnp.bfloat16:
    # The largest of what a round needs beyond its caches, all of it until the last draft. A float16 is still 8 times
    # finer than the hidden states that it is made of; what is drawn from, and verified by, is not rounded.
    base = base.astype(jnp.float16)
  along = (jnp.arange(base.shape[1], dtype=jnp.int32), jnp.swapaxes(hidden, 0, 1))
  state = None if head is None else head.first(head.markov_w1(anchor))
  # Probabilities take the place of the base logits that they are made of: beside them, TPUs would hold both while the
  # target's logits are there.
  (_, _, rest), out = jax.lax.scan(step, (state, anchor, jnp.swapaxes(base, 0, 1)), along)
  tokens, logits, survive, rest = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (*out, rest))
  return Proposal(tokens, logits, None if sampling.mode == "greedy" else rest, survive, words)
