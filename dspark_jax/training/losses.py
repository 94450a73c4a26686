"""The training loss, chunked so that no array of [anchors, block, vocabulary] exists (DSpark, 3.3).

L = ce * CE + tv * TV + confidence * BCE, each = sum(w * mask * term) / sum(w * mask) over the global batch,
w_k = exp(-k / decay). TV = || q - p ||_1 without the factor 1/2; q is of the draft, p of the target.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from dspark_jax.metrics import Mean, weighted
from dspark_jax.types import Array, Blocks, Drafter, DraftOutputs, Target

EPSILON = 1e-6  # the reference's, in the denominators: a batch without supervised slots has loss 0


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the terms. DFlash: ce 1, tv 0, confidence 0."""
  ce: float = 0.1
  tv: float = 0.9
  confidence: float = 1.0
  decay: float = 4.0  # the reference's, with G = 7; the paper's text says G
  chunk: int = 1024   # slots of the batch whose logits exist at a time


def draft_loss(drafter: Drafter, target: Target, outputs: DraftOutputs, *, blocks: Blocks,
               target_hidden: Array, config: LossConfig,
               weights: dict[str, Array] | None = None) -> tuple[Array, dict[str, Mean]]:
  """(loss f32[], metrics). target_hidden: f[B,T,D] after the final norm; the target and its p are detached.

  weights: the denominators where `blocks` are a part of the batch (`term_weights` of the whole): the parts' losses
  then add up to the batch's. accept_rate and tau are plain means, the rest is weighted by w.
  """
  columns, known = draft_columns(drafter, blocks)
  ce, tv = slot_terms(drafter, target, outputs, target_hidden=jax.lax.stop_gradient(target_hidden),
                      anchors=blocks.anchors, columns=columns, chunk=config.chunk)
  decay, mask = slot_decay(blocks, config), blocks.supervised.astype(jnp.float32)
  accept = jnp.clip(jax.lax.stop_gradient(1 - tv / 2), 0, 1)
  metrics = {"ce": weighted(ce, decay * known), "tv": weighted(tv, decay)}
  if outputs.confidence is not None:
    metrics["confidence"] = weighted(optax.sigmoid_binary_cross_entropy(outputs.confidence, accept), decay)
  weights = weights or {name: term.weight for name, term in metrics.items()}
  loss = sum(getattr(config, name) * term.sum / (weights[name] + EPSILON) for name, term in metrics.items())
  metrics |= acceptance(accept, mask)
  if outputs.confidence is not None:
    metrics |= confidence_errors(jax.nn.sigmoid(outputs.confidence), accept, mask, decay)
  return loss, jax.lax.stop_gradient(metrics)


def term_weights(drafter: Drafter, blocks: Blocks, config: LossConfig) -> dict[str, Array]:
  """The denominator of each term, f32[]; known before any model runs, so that microbatches can share it."""
  decay, (_, known) = slot_decay(blocks, config), draft_columns(drafter, blocks)
  return {"ce": (decay * known).sum(), "tv": decay.sum(), "confidence": decay.sum()}


def slot_decay(blocks: Blocks, config: LossConfig) -> Array:
  """w * mask: f32[B,A,G]."""
  slot = jnp.arange(blocks.labels.shape[-1], dtype=jnp.float32)
  return jnp.where(blocks.supervised, jnp.exp(-slot / config.decay)[None, None], 0)


def draft_columns(drafter: Drafter, blocks: Blocks) -> tuple[Array, Array]:
  """(column of each label in the draft logits i32[B,A,G], f32[B,A,G]: 1 where the label is a draft word)."""
  if drafter.words is None:
    return blocks.labels, jnp.ones(blocks.labels.shape, jnp.float32)
  words = drafter.words
  column = jnp.minimum(jnp.searchsorted(words, blocks.labels), words.shape[0] - 1).astype(jnp.int32)
  return column, (words[column] == blocks.labels).astype(jnp.float32)


def slot_terms(drafter: Drafter, target: Target, outputs: DraftOutputs, *, target_hidden: Array,
               anchors: Array, columns: Array, chunk: int) -> tuple[Array, Array]:
  """(CE, TV) of every slot, f32[B,A,G] each. columns: i32[B,A,G], the label's column in the draft logits.

  Chunks take some slots of every row, so that a batch sharded over devices stays where it is. With a reduced
  draft vocabulary p is not renormalised: TV also counts p's mass outside the draft words, which q misses.
  """
  batch, _, block = columns.shape
  slot = jnp.arange(block, dtype=jnp.int32)[None, None]
  position = jnp.minimum(anchors[..., None] + slot, target_hidden.shape[1] - 1)
  head = drafter.head(target)
  draft_head = head.astype(outputs.hidden.dtype)
  log_total = None if drafter.words is None else log_normalizer(target, target_hidden, chunk)

  @jax.checkpoint
  def one(part):
    hidden, latent, position, column = part
    rows = jnp.take_along_axis(target_hidden, position[..., None], axis=1)
    if log_total is None:
      p, outside = jax.nn.softmax(target.logits(rows)), 0.0
    else:
      total = jnp.take_along_axis(log_total, position, axis=1)
      p = jnp.exp(drafter.logits(head, rows, None) - total[..., None])
      outside = jnp.maximum(1 - p.sum(-1), 0)
    p, outside = jax.lax.stop_gradient((p, outside))
    log_q = jax.nn.log_softmax(drafter.logits(draft_head, hidden, latent))
    tv = jnp.abs(jnp.exp(log_q) - p).sum(-1) + outside
    return -jnp.take_along_axis(log_q, column[..., None], axis=-1)[..., 0], tv

  slots = jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[3:]),
                       (outputs.hidden, outputs.latent, position, columns))
  ce, tv = in_chunks(one, slots, chunk)
  return ce.reshape(columns.shape), tv.reshape(columns.shape)


def log_normalizer(target: Target, target_hidden: Array, chunk: int) -> Array:
  """f32[B,T]: log-sum-exp of the target's logits at every position, over the whole vocabulary."""
  return jax.lax.stop_gradient(in_chunks(lambda hidden: jax.nn.logsumexp(target.logits(hidden), axis=-1),
                                         target_hidden, chunk))


def in_chunks(function, rows, chunk: int):
  """function over arrays [B,N,...] in pieces [B,n,...] with B * n <= chunk (n at least 1), joined again."""
  batch, length = jax.tree.leaves(rows)[0].shape[:2]
  size = max(1, min(chunk // batch, length))
  pieces = math.ceil(length / size)

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(batch, pieces * size, *x.shape[3:])[:, :length]

  return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, rows)))


def acceptance(accept: Array, mask: Array) -> dict[str, Mean]:
  """accept_rate per slot, tau (expected tokens of a round, bonus included), counts. Both: f32[B,A,G]."""
  tau = 1 + jnp.cumprod(accept * mask, axis=-1).sum(-1)
  kept = mask[..., 0]
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
