"""One round of a batch: propose, choose lengths, verify, commit, absorb. Knows no family, no drafter and no log.

Plain autoregressive decoding is the same round with a block of no drafts.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp

from dspark_jax import sampling as sp
from dspark_jax.decoding.calibration import calibrate
from dspark_jax.decoding.verify import cut_at_stop, is_stop, verify
from dspark_jax.types import Array, Committed, Drafter, DraftHead, Head, Proposal, Sampling, Target


@flax.struct.dataclass
class Models:
  """Who plays, with their heads, which are made before the loop: what a head gathers is gathered once."""
  target: Target
  drafter: Drafter | None  # None: plain decoding
  head: Head
  draft_head: DraftHead | None

  @classmethod
  def of(cls, target: Target, drafter: Drafter | None) -> Models:
    """The models of a loop."""
    return cls(target, drafter, target.head(), drafter.head(target) if drafter else None)

  @property
  def taps(self) -> tuple[int, ...]:
    return self.drafter.taps if self.drafter else ()


@flax.struct.dataclass
class Settings:
  """What was asked for each row; no round changes it."""
  sampling: Sampling
  stop_ids: Array     # i32[B,M]  -1 is padding
  limit: Array        # i32[B]    new tokens; the last round may pass it
  calibration: Array  # f32[B,G]  temperatures of the confidences; 1 leaves them as they are
  thresholds: Array   # f32[B,2]  of confidence and of survival, which the policy Threshold obeys; 0 cuts nothing


@flax.struct.dataclass
class Rows:
  """Everything that moves from round to round; its tree, shapes and dtypes never change. Every leaf is per row, so that
  a row can be exchanged for another request's: nothing is keyed by where it sits."""
  cache: Any     # the target's
  draft: Any     # the drafter's; None when plain
  anchor: Array  # i32[B]
  keys: Array    # keys [B]
  settings: Settings
  past: Array    # f32[B,2,G]  confidences of the two rounds before, calibrated, the older first
  rounds: Array  # i32[B]      rounds that the row has played: so much of its past is real
  count: Array   # i32[B]      new tokens so far, the stop token included; may pass the limit in the last round
  done: Array    # bool[B]
  failed: Array  # bool[B]     NaN logits, the target's or the drafter's, or NaN confidences


@flax.struct.dataclass
class Report:
  """What one round says of every row."""
  tokens: Array      # i32[B,G+1]  new tokens; what lies past n_new is scratch
  n_new: Array       # i32[B]      0 in rows that were done
  n_accept: Array    # i32[B]      drafts kept, up to a stop token among them
  n_verify: Array    # i32[B]      drafts verified, up to a stop token that was kept
  confidence: Array  # f32[B,G]    of the drafts, calibrated
  live: Array        # bool[B]     whether the row played at all


class Policy(Protocol):
  """Which drafts are worth verifying (`decoding.policy`); a pytree."""
  needs_confidence: bool  # of a drafter that says how likely its tokens are to survive

  def lengths(self, confidence: Array, rows: Rows) -> Array: ...  # f32[B,G], calibrated -> i32[B] in 0..G


def play(models: Models, rows: Rows, policy: Policy) -> tuple[Rows, Report]:
  """The rows after a round of all that are not done, and what it says. Rows that are done only write scratch."""
  keys, draft_keys, accept_keys, bonus_keys = sp.split_keys(rows.keys, 4)
  live, settings = ~rows.done, rows.settings
  proposal = _propose(models, rows, draft_keys)
  confidence = calibrate(proposal.confidence, settings.calibration)
  lengths = policy.lengths(confidence, rows)
  inputs = jnp.concatenate([rows.anchor[:, None], proposal.tokens], axis=1)
  out, cache = models.target(inputs, rows.cache, models.taps)
  verdict = verify(models.head(out.hidden), proposal, settings.sampling, accept_keys=accept_keys,
                   bonus_keys=bonus_keys, lengths=lengths)
  kept, stopped = cut_at_stop(proposal.tokens, verdict.n_accept, settings.stop_ids)

  tokens = jnp.concatenate([proposal.tokens, jnp.zeros_like(rows.anchor)[:, None]], axis=1)
  place = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
  tokens = jnp.where(place == kept[:, None], verdict.next_token[:, None], tokens)  # past a stop token: scratch
  n_commit = jnp.where(live, kept + 1, 0)
  n_new = n_commit - (live & stopped).astype(jnp.int32)
  count = rows.count + n_new
  vocabulary = models.target.vocab_size
  failed = live & (jnp.any(proposal.tokens >= vocabulary, axis=1) | (verdict.next_token >= vocabulary)
                   | jnp.any(jnp.isnan(proposal.confidence), axis=1))
  ended = stopped | is_stop(verdict.next_token[:, None], settings.stop_ids)[:, 0] | (count >= settings.limit)
  draft = None
  if models.drafter:
    draft = models.drafter.absorb(models.target, rows.draft, Committed(out, tokens, n_commit))
  after = rows.replace(
      cache=models.target.commit(cache, n_commit), draft=draft, anchor=verdict.next_token, keys=keys,
      past=jnp.concatenate([rows.past[:, 1:], confidence[:, None]], axis=1),
      rounds=rows.rounds + live.astype(jnp.int32), count=count, done=rows.done | failed | ended,
      failed=rows.failed | failed)
  return after, Report(tokens, n_new, kept, jnp.where(stopped, kept, lengths), confidence, live)


def _propose(models, rows, keys):
  """The drafter's block, or one of no drafts."""
  if models.drafter:
    return models.drafter.propose(models.target, models.draft_head, rows.draft, rows.anchor, keys,
                                  rows.settings.sampling)
  empty = jnp.zeros((*rows.anchor.shape, 0, models.target.vocab_size))
  return Proposal(empty[..., 0].astype(jnp.int32), empty, empty, empty[..., 0], None)
