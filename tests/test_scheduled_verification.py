"""Text stays the target's when a scheduler or a threshold decides what is verified, whatever the confidences say.

Chi-square at p < ALARM per test. Two requests, blocks of two drafts, three words; the next token's distribution depends
on the one before. Confidences are adversarial: the second draft's is high or zero by what the first draft turned out.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.decoding.policy import Threshold
from dspark_jax.decoding.scheduler import best_prefix, early_stop, survival, top_k
from dspark_jax.decoding.verify import verify
from dspark_jax.sampling import draw, make_sampling, split_keys
from dspark_jax.types import Proposal
from folders import thorough_but

TRIALS, ROWS, BLOCK, WORDS, ALARM = 40_000, 2, 2, 3, 1e-6
TARGET = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.4, 0.5, 0.1]], np.float32)  # [token before, token]
DRAFT = np.array([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]], np.float32)
SPS = np.array([0, 1.4, 1.0, 0.78, 0.62, 0.62, 0.62], np.float32)  # two drafts at 0.5 do not pay, two more may


def stale(now, old):
  return top_k(survival(now), best_prefix(survival(old), SPS).capacity)


def above(now, *thresholds):
  settings = SimpleNamespace(thresholds=jnp.broadcast_to(jnp.asarray(thresholds), (ROWS, 2)))
  return Threshold().lengths(now, SimpleNamespace(settings=settings))


POLICIES = {  # lengths from this round's confidences and those of an earlier one
  "early stop": lambda now, old: early_stop(survival(now), SPS).lengths,
  "stale capacity": stale,
  "confidence threshold": lambda now, old: above(now, 0.4, 0.0),
  "survival threshold": lambda now, old: above(now, 0.0, 0.5),
}
BIASED = {"without the stop": lambda now, old: best_prefix(survival(now), SPS).lengths}


@functools.partial(jax.jit, static_argnums=(1, 2))
def two_tokens(seed, policy, rule):
  """(the first two new tokens i32[TRIALS,ROWS,2], lengths verified i32[TRIALS,ROWS]), every row from anchor 0."""
  def trial(key):
    keys = split_keys(jax.random.split(key, ROWS), 7)
    first_key, second_key, sure_key, old_key, accept_key, bonus_key, more_key = keys
    anchor = jnp.zeros(ROWS, jnp.int32)
    first = draw(first_key, jnp.asarray(DRAFT)[anchor])
    second = draw(second_key, jnp.asarray(DRAFT)[first])
    sure = jnp.where(jax.vmap(jax.random.bernoulli)(sure_key), 0.97, 0.5)  # of the first draft: before it is drawn
    now = jnp.stack([sure, jnp.where(first == 0, 0.95, 0.0)], axis=1)
    old = jax.vmap(lambda k: jax.random.uniform(k, (BLOCK,)))(old_key)
    drafts = jnp.stack([first, second], axis=1)
    probs = jnp.stack([jnp.asarray(DRAFT)[anchor], jnp.asarray(DRAFT)[first]], axis=1)
    before = jnp.concatenate([anchor[:, None], drafts], axis=1)
    lengths = policy(now, old)
    verdict = verify(jnp.log(jnp.asarray(TARGET)[before]), Proposal(drafts, jnp.log(probs), probs, now, None),
                     make_sampling(1.0), accept_keys=accept_key, bonus_keys=bonus_key, lengths=lengths, rule=rule)
    one = jnp.where(verdict.n_accept > 0, first, verdict.next_token)
    more = draw(more_key, jnp.asarray(TARGET)[one])  # the next round's, where this one gave a single token
    two = jnp.select([verdict.n_accept > 1, verdict.n_accept == 1], [second, verdict.next_token], more)
    return jnp.stack([one, two], axis=1), lengths

  return jax.vmap(trial)(jax.random.split(jax.random.key(seed), TRIALS))


def chance(tokens):
  """p-value of both rows' first two tokens together under the target, rows independent."""
  observed = np.zeros((WORDS,) * 4)
  np.add.at(observed, tuple(np.asarray(tokens).reshape(TRIALS, 4).T), 1)
  pair = TARGET[0][:, None] * TARGET
  expected = TRIALS * np.multiply.outer(pair, pair)
  return stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), observed.size - 1)


@pytest.mark.parametrize("rule", thorough_but(["token"], [], ["token", "block"]))
@pytest.mark.parametrize("name", thorough_but(["stale capacity"], [], POLICIES))
def test_text_follows_the_target(name, rule):
  """Kills a length that depends on the drafts it cuts off, and a bonus from the residual where the scheduler cut."""
  tokens, lengths = two_tokens(1, POLICIES[name], rule)
  assert chance(tokens) > ALARM
  used = np.bincount(np.asarray(lengths).ravel(), minlength=BLOCK + 1) / lengths.size
  assert (used > 0.02).sum() > 1, used  # it really decided


@pytest.mark.parametrize("rule", thorough_but(["token"], [], ["token", "block"]))
@pytest.mark.parametrize("name", BIASED)
def test_the_test_sees_a_biased_search(name, rule):
  """Kills a chi-square that cannot fail: Algorithm 1 without its stop must fail it (Appendix A)."""
  assert chance(two_tokens(1, BIASED[name], rule)[0]) < ALARM
