"""One round of a batch: propose, choose lengths, verify, commit, absorb. Knows no family, no drafter and no log.

Plain autoregressive decoding is the same round with a block of no drafts.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax import sampling as sp
from dspark_jax.decoding.calibration import calibrate
from dspark_jax.decoding.verify import Rule, cut_at_stop, is_stop, verify, verify_greedy
from dspark_jax.nn.packing import Chosen, Packing
from dspark_jax.types import Array, Committed, Drafter, DraftHead, Head, Proposal, Sampling, Target, TargetOutput


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
  verification: Rule = flax.struct.field(pytree_node=False, default="token")  # of all rows


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
  done: Array        # bool[B]     after the round
  failed: Array      # bool[B]
  log_probs: Array | None = None  # f32[B,G+1]  of the tokens, as the target's own, at temperature 1
  features: Array | None = None   # f32[B,G,F]  of the drafts, which an `Estimator` learns from


@flax.struct.dataclass
class Chunk:
  """The next tokens of a prompt, which are read beside a round. The seat's row plays no part in that round."""
  tokens: Array     # i32[C]
  n: Array          # i32[]  how many of them there are, from 1
  seat: Array       # i32[]  whose prompt it is
  following: Array  # i32[]  the prompt's token after them; -1: there is none, and the row plays from the next round on


class Policy(Protocol):
  """Which drafts are worth verifying (`decoding.policy`); a pytree."""
  needs_confidence: bool  # of a drafter that says how likely its tokens are to survive

  def lengths(self, confidence: Array, rows: Rows) -> Array: ...  # f32[B,G], calibrated -> i32[B] in 0..G


def play(models: Models, rows: Rows, policy: Policy) -> tuple[Rows, Report]:
  """The rows after a round of all that are not done, and what it says. Rows that are done only write scratch."""
  proposal = propose(models, rows)
  confidence = calibrate(proposal.confidence, rows.settings.calibration)
  lengths = policy.lengths(confidence, rows)
  after, report = settle(models, rows, proposal, confidence, lengths)
  past = jnp.concatenate([rows.past[:, 1:], confidence[:, None]], axis=1)
  return after.replace(past=past, rounds=rows.rounds + report.live.astype(jnp.int32)), report


def propose(models: Models, rows: Rows) -> Proposal:
  """The drafter's block for every row, or one of no drafts."""
  if models.drafter:
    return models.drafter.propose(models.target, models.draft_head, rows.draft, rows.anchor, _keys(rows)[1],
                                  rows.settings.sampling)
  return nothing(models, rows)


def nothing(models: Models, rows: Rows) -> Proposal:
  """A block of no drafts: plain decoding, also for a while, in which a drafter goes on to read."""
  empty = jnp.zeros((*rows.anchor.shape, 0, models.target.vocab_size))
  return Proposal(empty[..., 0].astype(jnp.int32), empty, empty, empty[..., 0], None)


def settle(models: Models, rows: Rows, proposal: Proposal, confidence: Array, lengths: Array, *,
           bucket: int | None = None, chunk: Chunk | None = None, log_probs: bool = False) -> tuple[Rows, Report]:
  """The rows after the first lengths i32[B] drafts of a proposal, `propose(models, rows)`, were verified.

  bucket: tokens that the target runs, packed; at least those of the rows that are not done, an anchor each and their
  drafts to verify. None: all of all rows. chunk: of a prompt, read in the same pass. A row that its prompt's last chunk
  begins shows its first token as the only new one of a round in which it was not live.
  """
  keys, _, accept_keys, bonus_keys = _keys(rows)
  live, settings = ~rows.done, rows.settings
  greedy = settings.sampling.mode == "greedy"
  inputs = jnp.concatenate([rows.anchor[:, None], proposal.tokens], axis=1)
  held = jnp.where(live, lengths + 1, 0)
  out, words, rows_of, read, cache = _run(models, inputs, rows.cache, held, bucket, chunk)
  logits = None if greedy and not log_probs else models.head(words)
  best = None if not greedy else models.head.best(words) if logits is None else sp.argmax(logits)
  if greedy:  # of packed logits, none are spread over the rows
    verdict = verify_greedy(rows_of(best), proposal, lengths)
  else:
    verdict = verify(rows_of(logits), proposal, settings.sampling, accept_keys=accept_keys, bonus_keys=bonus_keys,
                     lengths=lengths, rule=settings.verification)
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
  # A row that is done keeps its key, too: what it draws when it begins does not depend on how long it waited.
  after = rows.replace(
      cache=models.target.commit(cache, n_commit), draft=draft, anchor=verdict.next_token,
      keys=jnp.where(live, keys, rows.keys), count=count, done=rows.done | failed | ended, failed=rows.failed | failed)
  report = Report(tokens, n_new, kept, jnp.where(stopped, kept, lengths), confidence, live, after.done, after.failed,
                  _log_probs(rows_of(logits), tokens) if log_probs else None)
  return (after, report) if chunk is None else _read(models, after, report, chunk, read, logits, best)


def _keys(rows):
  """Keys of the next round, of the drafts, of acceptance, of the token after them: [B] each."""
  return sp.split_keys(rows.keys, 4)


def _run(models, inputs, cache, held, bucket, chunk):
  """(what the target says of rows [B,T,...]; the hidden states f[N,D] or f[B,T,D] whose words are asked for, with a
  chunk f[N+1,D], the last after its last token; what makes rows [B,T,...] of what is like them; what the target says of
  a chunk [1,C,...]; the cache)."""
  if bucket is None and chunk is None:
    out, cache = models.target(inputs, cache, models.taps)
    return out, out.hidden, lambda x: x, None, cache
  steps = inputs.shape[1]
  chosen = None if bucket is None else Chosen.of(held, bucket, steps)
  packing = Packing(chosen, None, steps)
  if chunk is not None:
    packing = Packing(chosen, chunk.seat, steps, chunk.tokens.shape[0])
  out, cache = models.target(packing.join(inputs, None if chunk is None else chunk.tokens), cache, models.taps, packing)
  hidden, features = packing.split(out.hidden), packing.split(out.features)
  words, n = hidden[0], hidden[0].shape[0]
  if chunk is not None:
    words = jnp.concatenate([words, hidden[1][chunk.n - 1][None]])
  return (TargetOutput(*map(packing.rows, (hidden[0], features[0]))), words, lambda x: packing.rows(x[:n]),
          TargetOutput(hidden[1][None], features[1][None]), cache)


def _read(models, rows, report, chunk, out, logits, best):
  """(rows, report) with a chunk read, and its row begun where that was the last of its prompt. logits, best: their last
  is of the token after it."""
  seat, one = chunk.seat, lambda x: x[chunk.seat][None]
  sampling, last = rows.settings.sampling, chunk.following < 0
  sampling = sampling.replace(temperature=one(sampling.temperature), top_k=one(sampling.top_k),
                              top_p=one(sampling.top_p))
  keys, first_keys = sp.split_keys(one(rows.keys), 2)
  first = choose(logits[-1:], sampling, first_keys) if best is None else best[-1:]
  cache = models.target.commit(rows.cache, jnp.zeros_like(rows.count).at[seat].set(chunk.n))
  draft = rows.draft
  if models.drafter:
    following = jnp.append(chunk.tokens[1:], 0).at[chunk.n - 1].set(jnp.where(last, first[0], chunk.following))
    state = models.drafter.absorb(models.target, models.drafter.take(draft, seat),
                                  Committed(out, following[None], chunk.n[None]))
    draft = models.drafter.insert(draft, seat, state)
  failed = last & (first[0] >= models.target.vocab_size)
  ended = is_stop(first[:, None], one(rows.settings.stop_ids))[0, 0] | (rows.settings.limit[seat] <= 1)
  put = lambda old, new: old.at[seat].set(jnp.where(last, new, old[seat]))
  rows = rows.replace(cache=cache, draft=draft, anchor=put(rows.anchor, first[0]), keys=put(rows.keys, keys[0]),
                      count=put(rows.count, 1), done=put(rows.done, failed | ended), failed=put(rows.failed, failed))
  log_probs = report.log_probs
  if log_probs is not None:
    log_probs = log_probs.at[seat, 0].set(_log_probs(logits[-1:], first[:, None])[0, 0])
  return rows, report.replace(tokens=report.tokens.at[seat, 0].set(first[0]), n_new=put(report.n_new, 1),
                              done=rows.done, failed=rows.failed, log_probs=log_probs)


def choose(logits: Array, sampling: Sampling, keys: Array) -> Array:
  """The target's next token: i32[B] from logits f32[B,V]."""
  return sp.argmax(logits) if sampling.mode == "greedy" else sp.draw(keys, sp.probabilities(logits, sampling))


def _log_probs(logits, tokens):
  """f32[B,T] of tokens i32[B,T] under logits f32[B,T,V] or f32[B,V]."""
  logits = logits.reshape(*tokens.shape, -1)
  picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)
