"""The engine's texts have the target's distribution, whatever it verifies and by which rule, from end to end.

Three words, of which the next depends on the one before, so that windows of a text are independent given the word
before each: a chi-square for each setting and word before, together (Fisher) at p < ALARM per test. Confidences are
adversarial (`Moody`), the cost table makes throughput dip and recover, two seats are shared by requests of several
settings that come and go.
"""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.decoding import scheduler
from dspark_jax.decoding.cost import Cost, Step
from dspark_jax.decoding.dispatch import Dispatcher
from dspark_jax.decoding.engine import Engine, EngineConfig, Request
from dspark_jax.sampling import draw, probabilities, split_keys
from dspark_jax.types import Proposal
from test_policy import BLOCK, DRAFT, TARGET, WORDS, Chain, Moody
from test_sampled import exact_probs
from test_verify import chi_square

SEATS, WINDOW, NEW, ALARM = 2, 2, 121, 1e-6
SAMPLED = ((1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 2, 1.0), (0.9, 0, 0.85))  # temperature, top_k, top_p


@flax.struct.dataclass
class Seated(Chain):
  """The same target with what seats ask of it; its words come from the token alone, packed or not."""

  def __call__(self, tokens, cache, taps, packing=None):
    return super().__call__(tokens, cache, taps)

  def insert(self, cache, row, one):
    return cache.at[row].set(one[0])

  def take(self, cache, row):
    return cache[row][None]

  def cut(self, cache, row, n):
    return cache.at[row].set(n)


@flax.struct.dataclass
class Chosen(Moody):
  """The same drafter with what seats ask of it."""
  insert, take, cut = Seated.insert, Seated.take, Seated.cut


@flax.struct.dataclass
class Spoken(Chosen):
  """The same of two words alone, which its head knows by their columns; as unsure of every draft as of the next."""
  words = np.array([0, 2], np.int32)

  def propose(self, target, head, state, anchor, keys, sampling):
    sure_keys, *draft_keys = split_keys(keys, 1 + BLOCK)
    words, tokens, logits, probs = self.words, [anchor], [], []
    for keys in draft_keys:
      logits.append(jnp.log(jnp.asarray(DRAFT))[tokens[-1]][:, words])
      probs.append(probabilities(logits[-1], sampling))
      tokens.append(jnp.asarray(words)[draw(keys, probs[-1])])
    confidence = jax.vmap(lambda key: jax.random.uniform(key, (BLOCK,), minval=0.4))(sure_keys)
    return Proposal(jnp.stack(tokens[1:], 1), jnp.stack(logits, 1), jnp.stack(probs, 1), confidence, words)


@flax.struct.dataclass
class Unsure(Chosen):
  """First drafts never pay by themselves: what decides is how they turned out."""

  def propose(self, *args):
    proposal = super().propose(*args)
    return proposal.replace(confidence=proposal.confidence.at[:, 0].set(0.5))


@flax.struct.dataclass
class Hindsight(Chosen):
  """The mutant: a draft is cut by the very word that was drawn for it."""

  def propose(self, *args):
    proposal = super().propose(*args)
    return proposal.replace(confidence=jnp.where(proposal.tokens == 2, 0.0, 0.95))


def dips(**more):
  """A cost table in which one draft or two at 0.5 do not pay, and more of them do (`test_policy.SPS`)."""
  step = lambda seconds: Step(seconds, 0.0)
  steps = dict(plain=step(0.9), draft=step(0.01), full=step(1.6), plain_chunk=step(0.8), full_chunk=step(2.0),
               packed={2: step(1.0), 3: step(1.28), 4: step(1.6), 5: step(1.6)})
  return Cost(machine="none", device="cpu", target="t", drafter="d", dtype="float32", seats=SEATS, block=BLOCK,
              capacity=256, sampling="truncated", context=16, source="invented", chunk=4, **steps | more)


def chance(policy, rule, drafter=Chosen(), cost=None, sampled=SAMPLED, requests=200):
  """(p-value of the windows of all sampled texts, metrics); greedy texts, in between, must be right word for word."""
  served = Engine(Seated(), drafter, EngineConfig(
      seats=SEATS, capacity=256, chunk=4, policy=policy, verification=rule, survival="head", queue=requests,
      confidence_threshold=0.6 if policy == "threshold" else 0.0), cost=cost or dips())
  served._dispatcher.landed = lambda *_: None  # rounds take less here than invented ones: what ran would seem the best
  asked, texts = {}, {}
  for number in range(requests):
    settings = (0.0, 0, 1.0) if number % 9 == 0 else sampled[number % len(sampled)]
    new = NEW - number % 7 * WINDOW  # they end apart
    id = served.submit(Request((number % WORDS,), new, *settings, seed=number, reuse=False))
    asked[id], texts[id] = settings, []
  for event in served.run():
    texts[event.id] += event.tokens
  found = []
  for settings in sampled:
    after = np.array([exact_probs(np.log(row), *settings) for row in TARGET])
    rows = [np.array(texts[id]) for id in asked if asked[id] == settings]
    windows = np.concatenate([np.stack([row[i:len(row) - WINDOW + i:WINDOW] for i in range(WINDOW + 1)], 1)
                              for row in rows])
    observed = np.zeros([WORDS] * (WINDOW + 1))
    np.add.at(observed, tuple(windows.T), 1)
    expected = observed.sum(axis=tuple(range(1, WINDOW + 1)))
    for _ in range(WINDOW):
      expected = expected[..., None] * after
    found += [chi_square(*pair) for pair in zip(observed.reshape(WORDS, -1), expected.reshape(WORDS, -1))]
  greedy = [texts[id] for id in asked if asked[id][0] == 0]
  assert all(list(np.argmax(TARGET, 1)[text[:-1]]) == text[1:] for text in greedy) and greedy
  return stats.combine_pvalues(found).pvalue, served.metrics()


@pytest.mark.parametrize("policy, rule", [
    pytest.param("scheduled", "token", marks=pytest.mark.slow),
    *(pytest.param(*both, marks=pytest.mark.thorough) for both in (("plain", "token"), ("scheduled", "block"),
      *itertools.product(("fixed", "threshold", "early-stop"), ("token", "block"))))])
def test_text_follows_the_target(policy, rule):
  """Kills: a residual where the engine cut, drafts of a round that was dispatched before, one request's settings or
  keys used for whoever had its seat, a packed token judged by another row's logits."""
  found, metrics = chance(policy, rule)
  assert found > ALARM
  if policy in ("threshold", "early-stop", "scheduled"):  # it really decided
    assert 0.1 * metrics["drafted"] < metrics["verified"] < 0.95 * metrics["drafted"]
    assert len({name for name in metrics if name.startswith("program_")}) > 2, metrics


@pytest.mark.slow
def test_text_follows_the_target_where_drafts_have_few_words():
  """By thresholds, as blocks. Kills: a residual over columns of a reduced head, or one without the words it lacks."""
  found, metrics = chance("threshold", "block", Spoken())
  assert found > ALARM and 0.1 * metrics["drafted"] < metrics["verified"] < 0.95 * metrics["drafted"]
  assert metrics["accepted"] > 0.2 * metrics["verified"]


def whole(self, past, context):
  """The mutants' `Dispatcher._wanted`: there is room for every draft, so that the device alone decides."""
  self._sps = self.cost.sps(context).astype(np.float32)
  return self.seats * self.block


@pytest.mark.thorough
def test_the_test_sees_a_search_without_a_stop(monkeypatch):
  """Kills a chi-square that cannot fail: Algorithm 1 without its stop (Appendix A)."""
  monkeypatch.setattr(Dispatcher, "_wanted", whole)
  assert chance("early-stop", "token", Unsure(), sampled=SAMPLED[:1])[0] > ALARM  # it is the stop, not the room
  monkeypatch.setattr(scheduler, "early_stop", scheduler.best_prefix)
  assert chance("early-stop", "token", Unsure(), sampled=SAMPLED[:1])[0] < ALARM


@pytest.mark.slow
def test_the_test_sees_a_capacity_of_this_round(monkeypatch):
  """Kills a chi-square that cannot fail: as many drafts as are best for the round's own survivals."""
  curve = jnp.asarray(dips().sps(16), jnp.float32)
  monkeypatch.setattr(scheduler, "top_k", lambda likely, _, live: scheduler.best_prefix(likely, curve, live).lengths)
  full = dips(packed={}, plain=Step(9.0, 0.0))
  assert chance("scheduled", "token", Unsure(), cost=full, sampled=SAMPLED[:1], requests=60)[0] < ALARM


@pytest.mark.slow
def test_the_test_sees_a_cut_by_the_word_itself():
  """Kills a chi-square that cannot fail: a draft that is verified or not by what was drawn for it."""
  assert chance("threshold", "token", Hindsight(), sampled=SAMPLED[:1], requests=60)[0] < ALARM
