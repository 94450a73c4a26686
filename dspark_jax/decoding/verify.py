"""Which drafts the target keeps, and the token after them: lossless speculative sampling (DSpark, 2.1).

Two rules give the same distribution of the text. Token: each draft is kept or rejected by itself, and the first
rejection ends the block. Block (Sun et al., arXiv 2403.10444): a rejection does not, and the longest prefix that one of
the tests keeps is kept, which is never shorter on average.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from dspark_jax.sampling import argmax, distributions, draw
from dspark_jax.types import Array, Proposal, Sampling, Verdict

Rule = Literal["token", "block"]


def check_rule(rule: str) -> None:
  """ValueError for a rule that there is not."""
  if rule not in get_args(Rule):
    raise ValueError(f"verification is {rule!r}, expected one of {', '.join(get_args(Rule))}")


@jax.named_scope("verify")
def verify(target_logits: Array, proposal: Proposal, sampling: Sampling, *, accept_keys: Array | None,
           bonus_keys: Array | None, lengths: Array | None = None, rule: Rule = "token") -> Verdict:
  """What the target keeps: the kept drafts, then next_token, are distributed as the target's own text.

  target_logits: f[B,G+1,V], position k comes after the anchor and k drafts. accept_keys, bonus_keys: keys
  [B], independent of each other and of what drew the drafts; unused when greedy. lengths: i32[B] in 0..G,
  drafts verified per row (None: G), which must not depend on the drafts they cut off. rule: at temperature 0 both are
  the same. next_token is V where NaN decided.
  """
  batch, block = proposal.tokens.shape
  if lengths is None:
    lengths = jnp.full(batch, block, jnp.int32)
  if sampling.mode == "greedy":
    return verify_greedy(argmax(target_logits), proposal, lengths)
  target = distributions(target_logits, sampling)
  if not block:  # plain decoding: nothing to accept
    return Verdict(lengths, draw(bonus_keys, target.at(lengths)))
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (block,)))(accept_keys)
  p, q = target.of(proposal.tokens), _drafted(proposal, target_logits.shape[-1])
  if rule == "block":
    n_accept, following = kept_block(target.whole(), proposal, p, q, uniforms, lengths)
    return Verdict(n_accept, draw(bonus_keys, following))
  n_accept = accepted_prefix(uniforms * q < p, lengths)
  return Verdict(n_accept, draw(bonus_keys, _following(target.at(n_accept), proposal, n_accept, lengths)))


def verify_greedy(best: Array, proposal: Proposal, lengths: Array) -> Verdict:
  """`verify` where every row is greedy, given the target's own tokens, best i32[B,G+1]: `argmax` of its logits."""
  n_accept = accepted_prefix(best[:, :-1] == proposal.tokens, lengths)
  return Verdict(n_accept, jnp.take_along_axis(best, n_accept[:, None], axis=1)[:, 0])


def accept_prob(p: Array, q: Array) -> Array:
  """Probability that `uniform * q < p` keeps a draft: min(1, p / q), of any shape; 0 where p is 0."""
  return jnp.minimum(p / jnp.maximum(q, jnp.finfo(jnp.float32).tiny), 1.0)


def accepted_prefix(accepted: Array, lengths: Array) -> Array:
  """Drafts before the first rejection or the cut: i32[B], from bool[B,G] and i32[B]."""
  place = jax.lax.broadcasted_iota(jnp.int32, accepted.shape, 1)
  accepted &= place < lengths[:, None]
  return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=1), axis=1)


def prefix_probs(p: Array, q: Array) -> Array:
  """log P(a block's prefix of i drafts is kept at least), i = 0..G: f32[B,G+1], whatever is cut behind it.

  p, q: f32[B,G], of the drafts, of the target and of what drew them. p_0 = 1, p_i = min(1, p_i-1 p / q), as a sum of
  logarithms less its largest so far: a product would lose what p / q > 1 makes up for.
  """
  ratio = jnp.pad(jnp.log(p) - jnp.log(q), ((0, 0), (1, 0)))
  total = jnp.cumsum(ratio, axis=1)
  return total - jax.lax.cummax(total, axis=1)


def kept_block(target_probs: Array, proposal: Proposal, p: Array, q: Array, uniforms: Array, lengths: Array
               ) -> tuple[Array, Array]:
  """(drafts kept i32[B], distribution of the token after them f32[B,V]) by the block rule (arXiv 2403.10444, Algorithm
  2), each row cut to the first lengths i32[B] drafts; p, q, uniforms: f32[B,G].
  """
  log_prefix = prefix_probs(p, q)
  prefix, drafted = jnp.exp(log_prefix), _over_vocabulary(proposal, target_probs)
  excess = jnp.maximum(prefix[:, :-1, None] * target_probs[:, :-1] - drafted, 0.0)
  mass = jnp.sum(excess, axis=-1)  # [B,G]: of the residual after i drafts
  place = jax.lax.broadcasted_iota(jnp.int32, p.shape, 1) + 1  # i: drafts of a prefix
  # h = mass / (mass + 1 - prefix) before the cut, h = prefix at it. 0 / 0 rejects, which harms nothing: a prefix of
  # probability 1 without a residual is kept with the next draft.
  later = jnp.pad(mass[:, 1:], ((0, 0), (0, 1)))
  inside = uniforms * (later - jnp.expm1(log_prefix[:, 1:])) < later
  kept = jnp.where(place == lengths[:, None], uniforms < prefix[:, 1:], inside) & (place <= lengths[:, None])
  n_accept = jnp.max(jnp.where(kept, place, 0), axis=1)
  own, rest, total = _at(target_probs, n_accept), *(_at(x, jnp.minimum(n_accept, p.shape[1] - 1))
                                                    for x in (excess, mass[..., None]))
  following = jnp.where((n_accept < lengths)[:, None] & ~(total <= 1e-8), rest / total, own)
  # Only the last draft kept is looked at above: what is not a number anywhere before the cut must show.
  seen = place <= lengths[:, None]
  broken = jnp.any(seen & (jnp.isnan(prefix[:, 1:]) | jnp.isnan(mass)), axis=1, keepdims=True)
  return n_accept, jnp.where(broken, jnp.nan, following)


def _over_vocabulary(proposal, like):
  """f32[B,G,V]: what drew the drafts, 0 for words that it does not know. like: f32[B,G+1,V]."""
  if proposal.words is None:
    return proposal.probs
  return jnp.zeros_like(like[:, :-1]).at[..., proposal.words].set(proposal.probs)


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
