"""Policies: what they verify, and that the text stays the target's under all of them, from end to end.

Chi-square at p < ALARM per test. Batches of two requests, blocks of two drafts, three words; the next token depends on
the one before. Confidences are adversarial: the second draft's is high or zero by what the first turned out to be.
"""

import functools
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.decoding import scheduler
from dspark_jax.decoding.generate import start
from dspark_jax.decoding.policy import All, EarlyStop, Stale, Threshold
from dspark_jax.decoding.round import Models, play
from dspark_jax.decoding.session import Session, generate, padded_length
from dspark_jax.sampling import draw, probabilities, split_keys
from dspark_jax.types import Proposal, TargetOutput
from test_generate import Counts

TEXTS, WORDS, BLOCK, NEW, ALARM = 24_000, 3, 2, 8, 1e-6
TARGET = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.4, 0.5, 0.1]], np.float32)  # [token before, token]
DRAFT = np.array([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]], np.float32)
SPS = np.array([0, 1.4, 1.0, 0.78, 0.62, 0.62, 0.62], np.float32)  # two drafts at 0.5 do not pay, two more may


@flax.struct.dataclass
class Bare:
  """A head for hidden states that are logits already."""

  def __call__(self, hidden):
    return hidden


@flax.struct.dataclass
class Chain:
  """A target whose next token depends on the one before, with nothing but the Protocol; its cache is a length."""
  vocab_size, max_positions = WORDS, 256

  def feature_width(self, taps):
    return 0

  def init_cache(self, batch, max_len):
    return jnp.zeros(batch, jnp.int32)

  def __call__(self, tokens, cache, taps):
    hidden = jnp.log(jnp.asarray(TARGET))[tokens]
    return TargetOutput(hidden, hidden[..., :0]), cache

  def head(self, words=None):
    return Bare()

  def commit(self, cache, n):
    return cache + n


@flax.struct.dataclass
class Moody(Counts):
  """A drafter whose second draft looks sure or hopeless by what the first turned out to be."""
  taps, block_size, words, has_confidence, every_position = (), BLOCK, None, True, False

  def propose(self, target, head, state, anchor, keys, sampling):
    sure_keys, *draft_keys = split_keys(keys, 1 + BLOCK)
    tokens, probs = [anchor], []
    for keys in draft_keys:
      probs.append(probabilities(jnp.log(jnp.asarray(DRAFT))[tokens[-1]], sampling))
      tokens.append(draw(keys, probs[-1]))
    sure = jnp.where(jax.vmap(jax.random.bernoulli)(sure_keys), 0.97, 0.5)  # of the first draft: before it is drawn
    confidence = jnp.stack([sure, jnp.where(tokens[1] == 0, 0.95, 0.0)], axis=1)
    probs = jnp.stack(probs, axis=1)
    return Proposal(jnp.stack(tokens[1:], axis=1), jnp.log(probs), probs, confidence, None)


@flax.struct.dataclass
class BestOfThisRound:
  """The mutant: Algorithm 1 without its stop, so that late drafts decide whether early ones are verified."""
  sps: jax.Array
  needs_confidence = True

  def lengths(self, confidence, rows):
    return scheduler.best_prefix(scheduler.survival(confidence), self.sps, ~rows.done).lengths


def decoded(policy):
  """TEXTS texts of NEW tokens under a policy, decoded two by two."""
  room = 2 * Session(Chain(), Moody()).bytes_per_row(padded_length(1), NEW)
  return generate(Chain(), Moody(), [[0]] * TEXTS, max_new_tokens=NEW, temperature=1.0, seed=1, budget=room,
                  policy=policy)


def chance(texts):
  """p-value of the last five tokens together, all texts independent: the first ones come before there is any past."""
  tokens = np.array(texts)[:, -5:]
  observed = np.zeros([WORDS] * tokens.shape[1])
  np.add.at(observed, tuple(tokens.T), 1)
  expected = TEXTS * np.linalg.matrix_power(TARGET.astype(np.float64), NEW - 4)[0]
  for _ in range(tokens.shape[1] - 1):
    expected = expected[..., None] * TARGET
  large = expected > 10
  pooled = [np.append(x[large], x[~large].sum()) for x in (observed, expected)]
  assert large.sum() > 200
  return stats.chi2.sf(np.sum((pooled[0] - pooled[1]) ** 2 / pooled[1]), large.sum())


@pytest.mark.parametrize("policy", [pytest.param(EarlyStop(SPS), id="early stop", marks=pytest.mark.thorough),
                                    pytest.param(Stale(SPS), id="stale", marks=pytest.mark.slow)])
def test_text_follows_the_target(policy):
  """Kills: a length that depends on drafts it cuts off; a capacity of this round; a residual where the policy cut."""
  out = decoded(policy)
  assert chance(out.tokens) > ALARM
  used = np.bincount(np.concatenate(out.n_verify), minlength=BLOCK + 1) / out.rounds
  assert (used > 0.05).all(), used  # it really decided


@pytest.mark.slow
def test_the_test_sees_a_biased_search():
  """Kills a chi-square that cannot fail: Algorithm 1 without its stop must fail it (Appendix A)."""
  assert chance(decoded(BestOfThisRound(SPS)).tokens) < ALARM


ROWS = 4
CURVE = np.array([0, 1.4, 1.3, 1.2, 1.1, 0.9, 0.85, 0.9, 0.6, 0.58, 0.8, 0.5, 0.45], np.float32)  # jagged


@functools.partial(jax.jit, static_argnums=1)
def rounds_of(rows, n, policy):
  """(rows, reports) of n rounds, each field of a report f[n,...]."""
  return jax.lax.scan(lambda rows, _: play(Models.of(Chain(), Moody()), rows, policy), rows, None, length=n)


@functools.cache
def started(seed):
  """Rows after their prompts, with the limit far away."""
  (batch,) = Session(Chain(), Moody()).prepare([[0]] * ROWS, max_new_tokens=50, temperature=1.0, seed=seed)
  target, drafter, requests, _ = batch.args
  return jax.jit(start, static_argnums=2)(Models.of(target, drafter), requests, batch.static["capacity"])


def whole_or_best(reports, ages, curve):
  """Lengths of the last of some rounds by the rule itself: capacity of two rounds before, whole blocks without that."""
  now, before = (np.array(scheduler.survival(reports.confidence[at])) for at in (-1, -3))
  new = np.array(ages) < 2
  now[new], before[new] = 1, 1
  capacity = scheduler.best_prefix(jnp.asarray(before), curve).capacity
  return np.where(new, BLOCK, scheduler.top_k(jnp.asarray(now), capacity))


@pytest.mark.slow
def test_stale_capacities():
  """Kills: a capacity of one round or three rounds before; a past that stays with its place when another request takes
  it, so that a new request does not start whole; a new request whose drafts crowd out nobody."""
  _, begun = started(0), started(100)
  rows, first = rounds_of(started(0), 6, Stale(CURVE))
  for at in range(6):
    part = jax.tree.map(lambda x: x[max(at - 2, 0):at + 1], first)
    part = part if at > 1 else jax.tree.map(lambda x: jnp.concatenate([x[:1]] * (2 - at) + [x]), part)
    np.testing.assert_array_equal(first.n_verify[at], whole_or_best(part, [at] * ROWS, CURVE))
  rows = jax.tree.map(lambda old, new: old.at[1].set(new[1]), rows, begun)  # a new request takes seat 1
  _, then = rounds_of(rows, 4, Stale(CURVE))
  both = jax.tree.map(lambda *x: jnp.concatenate(x), first, then)
  for at in range(6, 10):
    part = jax.tree.map(lambda x: x[:at + 1], both)
    np.testing.assert_array_equal(both.n_verify[at], whole_or_best(part, [at, at - 6, at, at], CURVE))
  lengths = np.array(both.n_verify)
  assert (lengths[[0, 1]] == BLOCK).all() and (lengths[[6, 7], 1] == BLOCK).all() and (lengths[2:] < BLOCK).any(0).all()


def test_lengths_of_the_others():
  """Kills: a threshold of a neighbour, on the wrong quantity, or one draft late; a done row that takes part."""
  rng = np.random.default_rng(0)
  confidence = rng.random((ROWS, 3)).astype(np.float32)
  thresholds = np.float32([[0, 0], [0.5, 0], [0, 0.3], [0.4, 0.2]])
  rows = SimpleNamespace(settings=SimpleNamespace(thresholds=jnp.asarray(thresholds)), done=jnp.arange(ROWS) == 2)
  np.testing.assert_array_equal(All().lengths(jnp.asarray(confidence), rows), 3)
  expected = []
  for own, (one, prefix) in zip(confidence, thresholds):
    bad = [c < one or np.prod(own[:k + 1]) < prefix for k, c in enumerate(own)]
    expected.append(bad.index(True) if True in bad else 3)
  np.testing.assert_array_equal(Threshold().lengths(jnp.asarray(confidence), rows), expected)
  assert len(set(expected)) > 2
  sps = np.linspace(2, 1, 20, dtype=np.float32)
  lengths = EarlyStop(sps).lengths(jnp.asarray(confidence), rows)
  np.testing.assert_array_equal(lengths, scheduler.early_stop(scheduler.survival(confidence), sps, ~rows.done).lengths)
  assert lengths[2] == 0 and lengths.sum() > 0
