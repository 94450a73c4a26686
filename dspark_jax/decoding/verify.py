"""Which drafts the target keeps, and the token after them: lossless speculative sampling (DSpark, 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dspark_jax.sampling import argmax, distributions, draw
from dspark_jax.types import Array, Proposal, Sampling, Verdict


@jax.named_scope("verify")
def verify(target_logits: Array, proposal: Proposal, sampling: Sampling, *, accept_keys: Array | None,
           bonus_keys: Array | None, lengths: Array | None = None) -> Verdict:
  """What the target keeps: the kept drafts, then next_token, are distributed as the target's own text.

  target_logits: f[B,G+1,V], position k comes after the anchor and k drafts. accept_keys, bonus_keys: keys
  [B], independent of each other and of what drew the drafts; unused when greedy. lengths: i32[B] in 0..G,
  drafts verified per row (None: G), which must not depend on the drafts they cut off. next_token is V where
  NaN decided.
  """
  batch, block = proposal.tokens.shape
  if lengths is None:
    lengths = jnp.full(batch, block, jnp.int32)
  if sampling.mode == "greedy":
    best = argmax(target_logits)
    n_accept = accepted_prefix(best[:, :block] == proposal.tokens, lengths)
    return Verdict(n_accept, jnp.take_along_axis(best, n_accept[:, None], axis=1)[:, 0])
  target = distributions(target_logits, sampling)
  if not block:  # plain decoding: nothing to accept
    return Verdict(lengths, draw(bonus_keys, target.at(lengths)))
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (block,)))(accept_keys)
  q = _drafted(proposal, target_logits.shape[-1])
  n_accept = accepted_prefix(uniforms * q < target.of(proposal.tokens), lengths)
  return Verdict(n_accept, draw(bonus_keys, _following(target.at(n_accept), proposal, n_accept, lengths)))


def accept_prob(p: Array, q: Array) -> Array:
  """Probability that `uniform * q < p` keeps a draft: min(1, p / q), of any shape; 0 where p is 0."""
  return jnp.minimum(p / jnp.maximum(q, jnp.finfo(jnp.float32).tiny), 1.0)


def accepted_prefix(accepted: Array, lengths: Array) -> Array:
  """Drafts before the first rejection or the cut: i32[B], from bool[B,G] and i32[B]."""
  place = jax.lax.broadcasted_iota(jnp.int32, accepted.shape, 1)
  accepted &= place < lengths[:, None]
  return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=1), axis=1)


def drafted_probs(target_probs: Array, proposal: Proposal) -> tuple[Array, Array]:
  """p(x) and q(x) of the drafted tokens: f32[B,G] each. target_probs: f32[B,G+1,V]."""
  p = jnp.take_along_axis(target_probs[:, :-1], proposal.tokens[..., None], axis=-1)[..., 0]
  return p, _drafted(proposal, target_probs.shape[-1])


def next_probs(target_probs: Array, proposal: Proposal, n_accept: Array, lengths: Array) -> Array:
  """Distribution of the token after the kept drafts: f32[B,V].

  The residual where draft n_accept was rejected; the target's own where all `lengths` drafts were kept.
  """
  return _following(_at(target_probs, n_accept), proposal, n_accept, lengths)


def residual(p: Array, q: Array) -> Array:
  """Normalised max(p - q, 0) over the full vocabulary: f32[...,V]; p itself where that has no mass."""
  excess = jnp.maximum(p - q, 0.0)
  mass = jnp.sum(excess, axis=-1, keepdims=True)
  # Turned so that a NaN mass stays NaN: rounding alone leaves about 1e-8 of mass where p equals q.
  return jnp.where(mass <= 1e-8, p, excess / mass)


def cut_at_stop(tokens: Array, n_accept: Array, stop_ids: Array) -> tuple[Array, Array]:
  """Kept drafts through the first stop token among them, and whether there is one: i32[B], bool[B].

  tokens: i32[B,G]. stop_ids: i32[B,M], as in `is_stop`. A stopped row gets no next_token.
  """
  place = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
  block = tokens.shape[1]
  first = jnp.min(jnp.where(is_stop(tokens, stop_ids) & (place < n_accept[:, None]), place, block), axis=1,
                  initial=block)
  return jnp.minimum(first + 1, n_accept), first < block


def is_stop(tokens: Array, stop_ids: Array) -> Array:
  """bool[B,T]: whether tokens i32[B,T] are among their row's stop tokens i32[B,M], where -1 is padding."""
  return jnp.any((tokens[..., None] == stop_ids[:, None]) & (stop_ids >= 0)[:, None], axis=-1)


def _drafted(proposal, vocabulary):
  """q(x) of the drafted tokens: f32[B,G]."""
  columns = proposal.tokens
  if proposal.words is not None:
    words = proposal.words
    column_of = jnp.zeros(vocabulary, jnp.int32)
    columns = column_of.at[words].set(jnp.arange(words.size, dtype=jnp.int32))[columns]
  return jnp.take_along_axis(_drawn(proposal), columns.T[..., None], axis=-1)[..., 0].T


def _drawn(proposal):
  """proposal.probs as f32[G,B,W]: position by position, as drafting left them. Gathered from [B,G,W], TPUs copy all."""
  return jnp.swapaxes(proposal.probs, 0, 1)


def _following(p, proposal, n_accept, lengths):
  """`next_probs`, of the target's f32[B,V] after the kept drafts."""
  last = jnp.minimum(n_accept, proposal.tokens.shape[1] - 1)
  q = jnp.take_along_axis(_drawn(proposal), last[None, :, None], axis=0)[0]
  if proposal.words is not None:
    q = jnp.zeros_like(p).at[:, proposal.words].set(q)
  return jnp.where((n_accept < lengths)[:, None], residual(p, q), p)


def _at(x, index):
  return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
