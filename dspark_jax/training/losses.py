"""The training loss, chunked so that no array of [anchors, block, vocabulary] exists (DSpark, 3.3).

L = ce * CE + tv * TV + soft * H + confidence * BCE, each = sum(w * mask * term) / sum(w * mask) over the global batch,
w_k = exp(-k / decay). TV = || q - p ||_1 without the factor 1/2; q is of the draft, p of the target. H = -sum(p log q)
is Eagle3's soft cross-entropy, whose denominator in the reference is the number of positions, supervised or not.

Acceptance depends on the temperature of sampling: blocks may be trained at several (`LossConfig.temperatures`), p and q
of TV, H and the confidence's target softened alike. CE is of the text, which has a temperature already, so its q stays
as it is. At 0, p is its argmax alone. A greedy draft is accepted where q's argmax is p's, which has no gradient: TV and
H take q as it is, whose probability there they raise; the confidence's target is that 0 or 1 itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from dspark_jax.config import Count, Range, raise_all, wrong_choices
from dspark_jax.metrics import Mean, weighted
from dspark_jax.nn.sharding import local
from dspark_jax.types import Array, Blocks, Drafter, DraftHead, DraftOutputs, Head, Target

EPSILON = 1e-6  # the reference's, in the denominators: a batch without supervision has loss 0
Weight = Annotated[float, Range(0, 1e9)]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the terms."""
  ce: Weight = 0.1
  tv: Weight = 0.9
  confidence: Weight = 1.0
  soft: Weight = 0.0
  decay: Annotated[float, Range(1e-3, 1e9)] = 4.0  # the reference's, with G = 7; the paper's text says G
  # what a term is divided by: the sum of w * mask ("slots": records of runs have that word for draft positions), or
  # the blocks of the batch, dummies too ("positions", of rows)
  per: Literal["slots", "positions"] = "slots"
  chunk: Count = 512  # draft positions whose logits exist at a time on a device
  # of sampling, each for an equal share of the blocks. A confidence head does not know which: it learns their mean.
  temperatures: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    right = self.temperatures and all(t == 0 or 0.01 <= t <= 100 for t in self.temperatures)
    problems = wrong_choices(self) + ([] if right else [
        f"temperatures are {self.temperatures}, expected at least one, each 0 or 0.01 to 100"])
    if not any((self.ce, self.tv, self.confidence, self.soft)):
      problems.append("ce, tv, confidence and soft are all 0, expected one that is not: nothing would be learnt")
    raise_all("loss config", problems)


# The reference's; of Eagle3 step k weighs 0.8 ** k.
DFLASH = LossConfig(ce=1.0, tv=0.0, confidence=0.0)
EAGLE3 = LossConfig(ce=0.0, tv=0.0, confidence=0.0, soft=1.0, decay=-1 / math.log(0.8), per="positions")


def draft_loss(drafter: Drafter, target: Target, outputs: DraftOutputs, *, blocks: Blocks,
               target_hidden: Array, config: LossConfig,
               weights: dict[str, Array] | None = None) -> tuple[Array, dict[str, Mean]]:
  """(loss f32[], metrics). target_hidden: f[B,T,D] after the final norm; the target and its p are detached.

  weights: the denominators where `blocks` are a part of the batch (`term_weights` of the whole): the parts' losses
  then add up to the batch's. accept_rate and tau are plain means, the rest is weighted by w.
  """
  decay, mask = position_decay(blocks, config), blocks.supervised.astype(jnp.float32)
  weights = weights or term_weights(drafter, blocks, config)
  columns, known = draft_columns(drafter, blocks)
  scale = {name: getattr(config, name) / (weight + EPSILON) for name, weight in weights.items()}
  loss, (ce, tv, soft, *accept) = position_loss(
      drafter, target, outputs, target_hidden=jax.lax.stop_gradient(target_hidden), blocks=blocks,
      columns=columns, config=config,
      weights=(scale["ce"] * decay * known, scale["tv"] * decay, scale["soft"] * decay))
  accept = jnp.clip(accept[0] if accept else 1 - tv / 2, 0, 1)  # sums over the vocabulary may round to more than 2
  metrics = {"ce": weighted(ce, decay * known), "tv": weighted(tv, decay), "soft": weighted(soft, decay)}
  metrics |= acceptance(accept, mask)
  if outputs.confidence is not None:
    metrics["confidence"] = weighted(optax.sigmoid_binary_cross_entropy(outputs.confidence, accept), decay)
    loss += scale["confidence"] * metrics["confidence"].sum
    metrics |= confidence_errors(jax.nn.sigmoid(outputs.confidence), accept, mask, decay)
  return loss, jax.lax.stop_gradient(metrics)


def term_weights(drafter: Drafter, blocks: Blocks, config: LossConfig, row_length: int = 0
                 ) -> dict[str, Array]:
  """The denominator of each term, f32[]; known before any model runs, so that microbatches can share it. row_length:
  of whole rows, where those of the batch may have been cut behind their last token."""
  decay, (_, known) = position_decay(blocks, config), draft_columns(drafter, blocks)
  if config.per == "positions":
    rows, count = blocks.keep.shape
    count = row_length if row_length and drafter.every_position else count
    return dict.fromkeys(("ce", "tv", "confidence", "soft"), jnp.float32(rows * count))
  return {"ce": (decay * known).sum()} | dict.fromkeys(("tv", "confidence", "soft"), decay.sum())


def position_decay(blocks: Blocks, config: LossConfig) -> Array:
  """w * mask: f32[B,A,G]."""
  offset = jnp.arange(blocks.labels.shape[-1], dtype=jnp.float32)
  return jnp.where(blocks.supervised, jnp.exp(-offset / config.decay)[None, None], 0)


def draft_columns(drafter: Drafter, blocks: Blocks) -> tuple[Array, Array]:
  """(column of each label in the draft logits i32[B,A,G], f32[B,A,G]: 1 where the label is a draft word, not -1)."""
  if drafter.words is None:
    return jnp.maximum(blocks.labels, 0), (blocks.labels >= 0).astype(jnp.float32)
  words = drafter.words
  # words.index(label); where the label is none of them, any column, and 0
  column = jnp.minimum(jnp.searchsorted(words, blocks.labels), words.shape[0] - 1).astype(jnp.int32)
  return column, (words[column] == blocks.labels).astype(jnp.float32)


def position_loss(drafter: Drafter, target: Target, outputs: DraftOutputs, *, target_hidden: Array, blocks: Blocks,
                  columns: Array, weights: tuple[Array, ...], config: LossConfig) -> tuple[Array, tuple[Array, ...]]:
  """(sum over draft positions of the weighted terms, the terms): (CE, TV, H), f32[B,A,G] each, the terms detached; and
  where blocks have temperatures the probability that the draft is accepted.

  columns: i32[B,A,G], the label's column in the draft logits. Chunks take some positions of every row, so that a batch
  sharded over devices stays where it is. With a reduced draft vocabulary p is not renormalised: TV also counts p's
  mass outside the draft words, which q misses.
  """
  # The whole target at once: with a reduced vocabulary, what p has outside the draft words would train its head.
  target = jax.lax.stop_gradient(target)
  batch, _, block = columns.shape
  offset = jnp.arange(block, dtype=jnp.int32)[None, None]
  # Not one on: what the target says at anchor + k is of token anchor + k + 1, the label.
  position = jnp.minimum(blocks.anchors[..., None] + offset, target_hidden.shape[1] - 1)
  which, chunk, words = blocks.temperature, config.chunk, drafter.words
  which = which if which is None else jnp.broadcast_to(which[..., None], columns.shape)
  head = drafter.head(target)
  base, whole = jax.lax.stop_gradient((head.base, target.head()))
  soften = Softened(config.temperatures)
  log_total = None if words is None else log_normalizer(whole, target_hidden, chunk) if which is None else soften.known(
      whole, target_hidden, chunk)

  def teacher(position, which):
    rows = jnp.take_along_axis(target_hidden, position[..., None], axis=1)
    if which is not None:
      return soften.teacher(base(rows), which, position, words, log_total)
    if log_total is None:
      return softmax(whole(rows))[0], jnp.ones(position.shape)
    total = jnp.take_along_axis(log_total, position, axis=1)[..., None]
    p = jnp.exp(base(rows) - total)
    return p, over_words(p)

  def terms(drafts, bias, fixed):
    (hidden, latent), (position, column, which) = drafts, fixed
    p, mass = teacher(position, which)
    mine = DraftHead(jax.tree.map(lambda x: x.astype(hidden.dtype), base), bias)
    # In float32, as heads give it: elsewhere, TV in bfloat16 had gradients that were 6 to 31 % off.
    logits = mine(hidden, latent)
    found = divergences(logits, None if which is None else soften.divisor(which), p, mass, column)
    return found if which is None else (*found, soften.accept(logits, p, found[1], which))

  flat = lambda x: x.reshape(batch, -1, *x.shape[3:])
  drafts = jax.tree.map(flat, (outputs.hidden, outputs.latent))
  weights, fixed = jax.tree.map(flat, (weights, (position, columns, which)))
  loss, found = _sum_of_chunks(terms, weights, drafts, head.bias, fixed, chunk)
  return loss, tuple(jax.lax.stop_gradient(x).reshape(columns.shape) for x in found)


@jax.custom_vjp
def divergences(logits: Array, divisor: Array | None, p: Array, mass: Array, column: Array) -> tuple[Array, ...]:
  """(CE, TV, H), f32[B,N] each, of q = softmax(logits f32[B,N,W]) and p f32[B,N,W], which sums up to mass f32[B,N].

  divisor: f32[B,N] of the logits, for TV and H; or None. column: i32[B,N] of the label. Differentiable in the logits
  alone, by hand: what JAX derives keeps eight arrays of [B,N,W], this keeps q and p.
  """
  return _divergences(logits, divisor, p, mass, column)[0]


def _divergences(logits, divisor, p, mass, column):
  plain, log_total = softmax(logits)
  ce = log_total - jnp.take_along_axis(logits, column[..., None], axis=-1)[..., 0]
  q = plain
  if divisor is not None:
    logits = logits / divisor[..., None]
    q, log_total = softmax(logits)
  tv = over_words(jnp.abs(q - p)) + jnp.maximum(1 - mass, 0)
  soft = -over_words(p * (logits - log_total[..., None]))
  return (ce, tv, soft), (plain, q, divisor, p, mass, column)


def _divergences_backward(saved, cotangents):
  plain, q, divisor, p, mass, column = saved
  d_ce, d_tv, d_soft = (x[..., None] for x in cotangents)
  # By comparison: a scatter would go into another array of logits.
  label = jax.lax.broadcasted_iota(jnp.int32, q.shape, q.ndim - 1) == column[..., None]
  away = jnp.sign(q - p)
  change = d_tv * q * (away - over_words(away * q)[..., None]) + d_soft * (mass[..., None] * q - p)
  change = change if divisor is None else change / divisor[..., None]
  return d_ce * (plain - label.astype(jnp.float32)) + change, None, None, None, None


divergences.defvjp(_divergences, _divergences_backward)


def softmax(logits: Array) -> tuple[Array, Array]:
  """(softmax f32[B,N,W], log-sum-exp f32[B,N])."""
  largest = logits.max(-1)
  weight = jnp.exp(logits - largest[..., None])
  total = over_words(weight)
  return weight * (1 / total)[..., None], largest + jnp.log(total)


def over_words(x: Array) -> Array:
  """f32[B,N]: the sums of x f32[B,N,W] over words."""
  # XLA's CPU backend makes a sum and what it is of one fusion, which one thread runs. A product it leaves alone.
  return jax.lax.platform_dependent(x, cpu=lambda x: x @ jnp.ones(x.shape[-1:]), default=lambda x: x.sum(-1))


class Softened:
  """Distributions at temperatures, of which `which` i32[B,N] names one for every draft position."""

  def __init__(self, temperatures: tuple[float, ...]):
    self.temperatures = temperatures
    self._greedy = jnp.asarray([t == 0 for t in temperatures])
    self._divisor = jnp.asarray([t or 1.0 for t in temperatures], jnp.float32)

  def divisor(self, which: Array) -> Array:
    """f32[B,N]: what logits are divided by; at 0 the 1."""
    return self._divisor[which]

  def known(self, head: Head, target_hidden: Array, chunk: int) -> tuple[Array, Array]:
    """(log-sum-exp at each temperature f32[B,T,n], the most likely token i32[B,T]) of the target at every position,
    over the whole vocabulary."""
    def one(hidden):
      logits = head(hidden)
      totals = [jax.nn.logsumexp(logits / (t or 1.0), axis=-1) for t in self.temperatures]
      return (), (jnp.stack(totals, -1), jnp.argmax(logits, -1).astype(jnp.int32))
    return in_chunks(one, target_hidden, chunk)[1]

  def teacher(self, logits: Array, which: Array, position: Array, words: Array | None, known) -> tuple[Array, Array]:
    """(p f32[B,N,W], what it sums up to f32[B,N]) of the target's logits at these words. known: None, or with a
    reduced vocabulary what `known` gave."""
    scaled = logits / self.divisor(which)[..., None]
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if known is None:
      p, best = softmax(scaled)[0], column == jnp.argmax(logits, -1).astype(jnp.int32)[..., None]
    else:
      totals, tokens = (jnp.take_along_axis(x, position.reshape(*position.shape, *(1,) * (x.ndim - 2)), axis=1)
                        for x in known)
      p = jnp.exp(scaled - jnp.take_along_axis(totals, which[..., None], axis=-1))
      best = words.reshape(1, 1, -1) == tokens[..., None]
    p = jnp.where(self._greedy[which][..., None], best.astype(jnp.float32), p)
    return p, over_words(p)

  def accept(self, logits: Array, p: Array, tv: Array, which: Array) -> Array:
    """f32[B,N]: the probability that a draft of these logits is accepted, 1 - TV / 2; at 0 whether their argmax is p's.
    """
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = jnp.where(column == jnp.argmax(logits, -1).astype(jnp.int32)[..., None], p, 0).sum(-1)
    return jnp.where(self._greedy[which], hit, 1 - tv / 2)


def _sum_of_chunks(terms, weights, drafts, bias, fixed, chunk):
  """(sum of the weighted terms, f32[]; the terms themselves, f32[B,N] each) of drafts [B,N,...], chunk by chunk.

  terms(drafts, bias, fixed) is of a chunk. Differentiable in drafts and bias. The weights of the terms are known before
  any model runs, so a chunk's gradient is taken while its logits exist: three products with the vocabulary per draft
  instead of five when they are recomputed.
  """
  weighted_sum = lambda weights, found: sum((w * term).sum() for w, term in zip(weights, found))

  @jax.custom_vjp
  def total(drafts, bias):
    found = in_chunks(lambda part: ((), terms(part[0], bias, part[1])), (drafts, fixed), chunk)[1]
    return weighted_sum(weights, found), found

  def forward(drafts, bias):
    """`total`, and its gradients, which are all that `backward` needs."""
    # Devices that have rows of their own add up gradients of their own: a sum in every chunk would be an exchange in
    # each.
    batch = weights[0].shape[0]
    apart = batch // local(batch, "rows") if bias is not None else 1
    spread = bias.copies(apart) if apart > 1 else bias

    def one(part):
      drafts, weights, fixed = part

      def loss(drafts, bias):
        found = terms(drafts, bias, fixed)
        return weighted_sum(weights, found), found
      # Of a chunk's loss the gradient alone, for the same reason.
      (_, found), (d_drafts, d_bias) = jax.value_and_grad(loss, (0, 1), has_aux=True)(drafts, spread)
      # Added up over chunks in float32: bfloat16 keeps 8 bits of a sum.
      return jax.tree.map(lambda x: x.astype(jnp.float32), d_bias), (found, d_drafts)
    d_bias, (found, d_drafts) = in_chunks(one, (drafts, weights, fixed), chunk)
    d_bias = bias.joined(d_bias) if apart > 1 else jax.tree.map(lambda d, x: d.astype(x.dtype), d_bias, bias)
    return (weighted_sum(weights, found), found), (d_drafts, d_bias)

  def backward(grads, cotangent):
    # cotangent[1] is of the terms themselves, which the caller detaches.
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * cotangent[0]).astype(g.dtype), grads)

  total.defvjp(forward, backward)
  return total(drafts, bias)


def log_normalizer(head: Head, target_hidden: Array, chunk: int) -> Array:
  """f32[B,T]: log-sum-exp of the target's logits at every position, over the whole vocabulary."""
  return in_chunks(lambda hidden: ((), jax.nn.logsumexp(head(hidden), axis=-1)), target_hidden, chunk)[1]


def in_chunks(function, rows, chunk: int):
  """(sums, joined) of a function of arrays [B,N,...] that is run on pieces [B,n,...], n at least 1, of which a device
  has at most `chunk` positions.

  It returns (arrays to add up over the pieces, arrays [B,n,...] to join along N); the last piece is padded with zeros.
  """
  batch, length = jax.tree.leaves(rows)[0].shape[:2]
  size = max(1, min(chunk // local(batch, "rows"), length))
  pieces = math.ceil(length / size)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(batch, pieces * size, *x.shape[3:])[:, :length]

  def step(sums, part):
    more, out = function(part)
    return jax.tree.map(jnp.add, sums, more), out

  # Weights are padded with 0 like all the rest, so that padding adds nothing to the sums.
  parts = jax.tree.map(split, rows)
  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))[0]
  sums, out = jax.lax.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)
  return sums, jax.tree.map(join, out)


def acceptance(accept: Array, mask: Array) -> dict[str, Mean]:
  """accept_rate per draft position, tau (expected tokens of a round, bonus included), counts. Both: f32[B,A,G]."""
  tau = 1 + jnp.cumprod(accept * mask, axis=-1).sum(-1)
  kept = mask[..., 0]
  # Of each row first, then over rows: the reference's mean.
  per_block = mask.sum((1, 2)) / jnp.maximum(kept.sum(1), 1)
  rows = jnp.ones(mask.shape[0])
  return {"accept_rate": weighted(accept, mask, (0, 1)), "tau": weighted(tau, kept),
          "supervised_slots": weighted(mask.sum((1, 2)), rows),
          "supervised_slots_per_block": weighted(per_block, rows)}


def confidence_errors(confidence: Array, accept: Array, mask: Array, decay: Array) -> dict[str, Mean]:
  """Errors of the predicted acceptance, weighted like the loss; cumprod_bias is that of the survivals."""
  survival = jnp.cumprod(confidence * mask, axis=-1) - jnp.cumprod(accept * mask, axis=-1)
  return {"confidence_abs_error": weighted(jnp.abs(confidence - accept), decay),
          "confidence_bias": weighted(confidence - accept, decay),
          "confidence_cumprod_bias": weighted(survival, decay)}
