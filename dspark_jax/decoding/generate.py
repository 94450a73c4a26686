"""Generation: one round, and the loop of rounds on the device. Knows no family and no drafter, only the Protocols.

A round is propose -> target over [anchor, drafts] -> verify -> commit and absorb. Plain autoregressive decoding is the
same round with a block of no drafts.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax import sampling as sp
from dspark_jax.decoding.calibration import calibrate
from dspark_jax.decoding.scheduler import survival
from dspark_jax.decoding.verify import cut_at_stop, verify
from dspark_jax.types import Array, Committed, Drafter, DraftHead, Head, Proposal, Sampling, Target

PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, or of 128 above 128: one compilation per bucket
CACHE_BUCKET = 64


@flax.struct.dataclass
class Requests:
  """A batch of prompts as the device sees it."""
  prompts: Array         # i32[B,P]  padded on the right
  prompt_lengths: Array  # i32[B]    at least 1
  seeds: Array           # u32[B]    one per row: a row's text does not depend on its neighbours
  stop_ids: Array        # i32[M]    -1 is padding
  temperatures: Array    # f32[G]    of the confidences; 1 leaves them as they are
  threshold: Array       # f32[2]    drafts from the first one whose confidence, or survival, is below are not verified
  sampling: Sampling


@flax.struct.dataclass
class LoopState:
  """Everything that moves from round to round; its tree, shapes and dtypes never change."""
  cache: Any       # the target's; None once decoded
  draft: Any       # the drafter's; None when plain, or once decoded
  anchor: Array    # i32[B]
  keys: Array      # keys [B]
  tokens: Array    # i32[B,N+2G+2]  new tokens; what lies past `count` is scratch
  count: Array     # i32[B]    new tokens so far, the stop token included; may pass max_new_tokens in the last round
  done: Array      # bool[B]
  failed: Array    # bool[B]   NaN logits, the target's or the drafter's, or NaN confidences
  n_accept: Array  # i32[B,N]  drafts kept per round, -1 where the row ran no round
  n_verify: Array  # i32[B,N]  drafts verified per round, up to an accepted stop token
  confidence: Array  # f32[B,N,G]  of the drafts of each round, calibrated
  rounds: Array    # i32[]


@flax.struct.dataclass
class Heads:
  """What the loop multiplies with, made before it: what is gathered for a reduced vocabulary is gathered once."""
  target: Head
  draft: DraftHead | None

  @classmethod
  def of(cls, target: Target, drafter: Drafter | None) -> Heads:
    return cls(target.head(), drafter.head(target) if drafter else None)


def start(target: Target, drafter: Drafter | None, requests: Requests, max_new_tokens: int, capacity: int) -> LoopState:
  """The state after the prompt: caches filled, and the first new token, which is the first anchor, drawn."""
  batch, length = requests.prompts.shape
  taps = drafter.taps if drafter else ()
  out, cache = target(requests.prompts, target.init_cache(batch, capacity), taps)
  last = jnp.take_along_axis(out.hidden, (requests.prompt_lengths - 1)[:, None, None], axis=1)
  keys, first_keys = sp.split_keys(jax.vmap(jax.random.key)(requests.seeds), 2)
  first = _choose(target.head()(last)[:, 0], requests.sampling, first_keys)
  state = None
  if drafter:
    following = jnp.concatenate([requests.prompts[:, 1:], first[:, None]], axis=1)
    following = following.at[jnp.arange(batch, dtype=jnp.int32), requests.prompt_lengths - 1].set(first)
    state = drafter.absorb(target, drafter.init_state(target, batch, capacity),
                           Committed(out, following, requests.prompt_lengths))
  block = drafter.block_size if drafter else 0
  failed = first >= target.vocab_size
  tokens = jnp.zeros((batch, max_new_tokens + 2 * block + 2), jnp.int32).at[:, 0].set(first)
  return LoopState(
      cache=target.commit(cache, requests.prompt_lengths), draft=state, anchor=first, keys=keys, tokens=tokens,
      count=jnp.ones(batch, jnp.int32), done=failed | _among(first, requests.stop_ids) | (max_new_tokens <= 1),
      failed=failed, n_accept=jnp.full((batch, max_new_tokens), -1, jnp.int32),
      n_verify=jnp.zeros((batch, max_new_tokens), jnp.int32), confidence=jnp.zeros((batch, max_new_tokens, block)),
      rounds=jnp.int32(0))


def one_round(target: Target, drafter: Drafter | None, heads: Heads, requests: Requests, state: LoopState) -> LoopState:
  """The state after one round of every row that is not done."""
  keys, draft_keys, accept_keys, bonus_keys = sp.split_keys(state.keys, 4)
  if drafter:
    proposal = drafter.propose(target, heads.draft, state.draft, state.anchor, draft_keys, requests.sampling)
  else:
    empty = jnp.zeros((*state.anchor.shape, 0, target.vocab_size))
    proposal = Proposal(empty[..., 0].astype(jnp.int32), empty, empty, empty[..., 0], None)
  inputs = jnp.concatenate([state.anchor[:, None], proposal.tokens], axis=1)
  out, cache = target(inputs, state.cache, drafter.taps if drafter else ())
  confidence = calibrate(proposal.confidence, requests.temperatures)
  lengths = proposal_lengths(confidence, requests.threshold)
  verdict = verify(heads.target(out.hidden), proposal, requests.sampling, accept_keys=accept_keys,
                   bonus_keys=bonus_keys, lengths=lengths)
  kept, stopped = cut_at_stop(proposal.tokens, verdict.n_accept, requests.stop_ids)

  live = ~state.done
  place = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
  emitted = jnp.concatenate([proposal.tokens, jnp.zeros_like(state.anchor)[:, None]], axis=1)
  emitted = jnp.where(place == kept[:, None], verdict.next_token[:, None], emitted)  # past a stop token: scratch
  n_new = jnp.where(live, kept + jnp.where(stopped, 0, 1), 0)
  vocabulary = target.vocab_size
  failed = live & (jnp.any(proposal.tokens >= vocabulary, axis=1) | (verdict.next_token >= vocabulary)
                   | jnp.any(jnp.isnan(proposal.confidence), axis=1))
  record = lambda rows, new: jax.lax.dynamic_update_slice(
      rows, new[:, None].astype(rows.dtype), (0, state.rounds, *[0] * (rows.ndim - 2)))
  put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
  count, n_commit = state.count + n_new, jnp.where(live, kept + 1, 0)
  ended = stopped | _among(verdict.next_token, requests.stop_ids) | (count >= state.n_accept.shape[1])
  draft = drafter.absorb(target, state.draft, Committed(out, emitted, n_commit)) if drafter else None
  return LoopState(
      cache=target.commit(cache, n_commit), draft=draft, anchor=verdict.next_token, keys=keys,
      tokens=put(state.tokens, emitted, state.count), count=count, done=state.done | failed | ended,
      failed=state.failed | failed,
      n_accept=record(state.n_accept, jnp.where(live, kept, -1)),
      n_verify=record(state.n_verify, jnp.where(stopped, kept, lengths)), confidence=record(state.confidence, confidence),
      rounds=state.rounds + 1)


def proposal_lengths(confidence: Array, threshold: Array) -> Array:
  """Drafts worth verifying, i32[B]: those before the first whose confidence (or survival) f32[B,G] is below threshold[0]
  (or [1]). Lossless: whether a draft is verified depends on the drafts before it alone.
  """
  enough = (confidence >= threshold[0]) & (survival(confidence) >= threshold[1])
  return jnp.sum(jnp.cumprod(enough.astype(jnp.int32), axis=1), axis=1)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "capacity"))
def decode(target: Target, drafter: Drafter | None, requests: Requests, *, max_new_tokens: int,
           capacity: int) -> LoopState:
  """The whole generation as one program: the prompt, then rounds until every row is done. No host in between.

  Returns the last state without its caches.
  """
  state, heads = start(target, drafter, requests, max_new_tokens, capacity), Heads.of(target, drafter)
  state = jax.lax.while_loop(lambda s: ~jnp.all(s.done), lambda s: one_round(target, drafter, heads, requests, s), state)
  return state.replace(cache=None, draft=None)


def _choose(logits, sampling, keys):
  return sp.argmax(logits) if sampling.mode == "greedy" else sp.draw(keys, sp.probabilities(logits, sampling))


def _among(tokens, stop_ids):
  return jnp.any((tokens[:, None] == stop_ids[None]) & (stop_ids >= 0)[None], axis=1)


@flax.struct.dataclass
class Generation:
  """New tokens on the host, per row."""
  tokens: list[list[int]]    # the stop token included
  n_accept: list[list[int]]  # drafts kept, per round
  n_verify: list[list[int]]  # drafts verified, per round; up to an accepted stop token
  confidence: list[np.ndarray]  # f32[rounds,G], of all drafts, calibrated

  @property
  def rounds(self) -> int:
    """Rounds of all rows together."""
    return sum(map(len, self.n_accept))

  @property
  def accepted_length(self) -> float:
    """Tokens per round, the bonus token included; NaN without a round."""
    return float(np.mean([n + 1 for row in self.n_accept for n in row])) if self.rounds else float("nan")


def prepare(target: Target, drafter: Drafter | None, prompts: list[list[int]], *, max_new_tokens: int,
            temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
            stop_token_ids: tuple[int, ...] = (), confidence_threshold: float = 0.0, survival_threshold: float = 0.0,
            temperatures=None, seeds: list[int] | None = None) -> tuple[tuple, dict]:
  """(args, static kwargs) of `decode`. ValueError for an empty prompt, an id outside the vocabulary or too long a text."""
  vocabulary, block = target.vocab_size, drafter.block_size if drafter else 0
  if not prompts:
    raise ValueError("there are no prompts: expected at least one list of token ids")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f"prompt {row} is empty: expected at least one token; give it a start token or some text")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
      raise ValueError(f"prompt {row} has token ids {min(prompt)}..{max(prompt)}, the target's vocabulary is "
                       f"0..{vocabulary - 1}: was it made with another tokenizer?")
  for name, value in (("confidence_threshold", confidence_threshold), ("survival_threshold", survival_threshold)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name} is {value}, expected 0 (verify every draft) to 1")
    if value and not (drafter and drafter.has_confidence):
      raise ValueError(f"{name} is {value}, but there is no {'confidence head in the drafter' if drafter else 'drafter'}: "
                       f"leave it at 0")
  if temperatures is not None and (np.shape(temperatures) != (block,) or not (np.asarray(temperatures) > 0).all()):
    raise ValueError(f"temperatures are {np.asarray(temperatures).tolist()}, expected {block} positive numbers, one for each "
                     f"draft")
  seeds = [seed + row for row in range(len(prompts))] if seeds is None else seeds
  if len(seeds) != len(prompts):
    raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts: give one for each")
  longest = max(map(len, prompts))
  if longest + max_new_tokens > target.max_positions:
    raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the target's "
                     f"{target.max_positions} positions: shorten the prompt or lower max_new_tokens")
  bucket = PROMPT_BUCKET if longest <= 128 else 128
  padded = np.zeros((len(prompts), _round_up(longest, bucket)), np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, :len(prompt)] = prompt
  stops = np.full(_round_up(max(len(stop_token_ids), 1), 4), -1, np.int32)
  stops[:len(stop_token_ids)] = stop_token_ids
  requests = Requests(
      jnp.asarray(padded), jnp.asarray([len(p) for p in prompts], jnp.int32),
      jnp.asarray([s % 2 ** 32 for s in seeds], jnp.uint32), jnp.asarray(stops),
      jnp.ones(block) if temperatures is None else jnp.asarray(temperatures, jnp.float32),
      jnp.asarray([confidence_threshold, survival_threshold], jnp.float32), jax.tree.map(jnp.asarray, sp.make_sampling(temperature, top_k, top_p)))
  # A row that is done still writes G + 1 scratch rows after up to G tokens past the limit.
  capacity = _round_up(max(padded.shape[1], longest + max_new_tokens + 2 * (block + 1)), CACHE_BUCKET)
  return (target, drafter, requests), dict(max_new_tokens=max_new_tokens, capacity=capacity)


def collect(state: LoopState, max_new_tokens: int) -> Generation:
  """The texts of a finished `decode`. ValueError when logits were NaN."""
  failed, tokens, count, n_accept, n_verify, confidence = jax.device_get(
      (state.failed, state.tokens, state.count, state.n_accept, state.n_verify, state.confidence))
  if failed.any():
    raise ValueError(f"NaN logits or confidences in rows {np.flatnonzero(failed).tolist()}: the target's or the drafter's "
                     f"weights are broken, or the dtype overflows")
  ran = n_accept >= 0
  pick = lambda rows: [row[there] for row, there in zip(rows, ran)]
  return Generation([row[:min(n, max_new_tokens)].tolist() for row, n in zip(tokens, count)],
                    [row.tolist() for row in pick(n_accept)], [row.tolist() for row in pick(n_verify)], pick(confidence))


def generate(target: Target, drafter: Drafter | None, prompts: list[list[int]], *, max_new_tokens: int = 128,
             **settings) -> Generation:
  """Continues every prompt (a list of token ids), with a drafter or, with None, plainly.

  Keyword settings: temperature (0 = greedy), top_k (0 = off), top_p (1 = off), seed (row r uses seed + r) or seeds (one
  per row), stop_token_ids; temperatures (f[G], of the drafter's confidences), confidence_threshold and
  survival_threshold: drafts from the first one below are not verified (0 = verify every draft; others need a drafter with
  a confidence head). The text follows the target's own distribution in all cases; at temperature 0 it is the target's own
  text. Compiles once per batch size, prompt bucket, max_new_tokens and kind of sampling.
  """
  args, static = prepare(target, drafter, prompts, max_new_tokens=max_new_tokens, **settings)
  return collect(decode(*args, **static), max_new_tokens)


def _round_up(n, multiple):
  return -(-n // multiple) * multiple
