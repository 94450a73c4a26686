"""The engine with the drafter that the demo trains, few words and a lens on what the target says, and with others."""

import dataclasses
import functools
from collections import Counter

import jax.numpy as jnp
import pytest

import dspark_jax
from dspark_jax.decoding.engine import Engine, EngineConfig, Request
from dspark_jax.nn.parameters import parameters
from folders import GOLDEN, complains, slow_but
from test_engine import CAPACITY, CHUNK, NEW, PROMPTS, answers, asked, greedy, mixed, mixes, models, unpaced


@functools.cache
def reduced():
  """The golden drafter cut down to half of the words that texts use, with a lens that hardly changes its drafts."""
  target, drafter = models()
  used = Counter(token for prompt in PROMPTS for token in greedy(prompt))
  words = jnp.asarray(sorted(word for word, _ in used.most_common(len(used) // 2)), jnp.int32)
  config = dataclasses.replace(drafter.config, draft_vocab_size=len(words), lens=True)
  new, old = dspark_jax.new_drafter(config, words=words), parameters(drafter)
  for name, variable in parameters(new).items():
    if name in old:
      value = old[name][...]
      variable.set_value(value if value.shape == variable.shape else value[words])
    else:
      variable.set_value(variable[...] * 0.1)
  return new


@functools.cache
def serving(policy):
  served = Engine(models()[0], reduced(), EngineConfig(seats=2, capacity=CAPACITY, chunk=CHUNK, policy=policy),
                  cost=mixed(reduced(), 2) if policy == "scheduled" else None)
  served._dispatcher.landed = unpaced
  return served


def alone(request):
  return dspark_jax.generate(models()[0], reduced(), [request.prompt], max_new_tokens=request.max_new_tokens,
                             temperature=request.temperature, top_p=request.top_p, seed=request.seed)


@pytest.mark.parametrize("policy", slow_but(["fixed"], ["fixed", "scheduled"]))
def test_few_words_and_a_lens_serve(policy):
  """Greedy and sampled, prompts in chunks, then the beginning of a seat's own text. Kills: columns of the reduced head
  taken for words, a residual over columns, a lens that starts a block from what another row, a rejected column or the
  row before a copied beginning said."""
  served = serving(policy)
  requests = [asked(row, reuse=False) for row in range(len(PROMPTS))]
  found = answers(served, requests)
  requests += [Request(PROMPTS[6] + found[6][0] + (7, 9, 11), NEW)]
  found += answers(served, requests[-1:])
  assert served.metrics()["prefix_tokens_reused"] == len(PROMPTS[6]) + NEW - 2
  for request, (tokens, finish, events) in zip(requests, found):
    if policy == "fixed":  # else what is drawn depends on how many drafts were verified
      want = alone(request)
      assert (list(tokens), finish) == (want.tokens[0], "length")
      assert [min(event.accepted, event.verified) for event in events if event.drafted] == want.n_accept[0]
    elif request.temperature == 0:
      assert list(tokens) == greedy(request.prompt)
  assert sum(event.accepted for _, _, events in found for event in events) > 10
  assert policy == "fixed" or mixes(served)


def test_a_calibration_of_other_drafts_is_refused(monkeypatch):
  """Kills: temperatures of another block size that are broadcast over the drafts, or found out by a shape in XLA."""
  served = serving("fixed")
  monkeypatch.setattr(served, "_calibration", lambda temperature: [2.0])
  with complains(f"calibration has 1 temperatures, expected {served.block}"):
    served.submit(asked(0))


def test_a_calibrated_drafter_that_is_not_asked_is_no_matter():
  """Kills: a plain engine that refuses every request, as the drafter that it does not use has temperatures."""
  served = Engine(*models(), EngineConfig(seats=1, capacity=CAPACITY, chunk=CHUNK, policy="plain", sampling="greedy"),
                  calibration=lambda temperature: [2.0] * 5)
  (tokens, finish, _), = answers(served, [Request(PROMPTS[0], 3)])
  assert list(tokens) == greedy(PROMPTS[0])[:3] and finish == "length"


def test_a_seat_forgets_how_the_request_before_survived(monkeypatch):
  """Kills: a program chosen for a new request by the drafts of the one that had its seat."""
  served, seen = serving("fixed"), []
  choose = served._dispatcher.choose
  monkeypatch.setattr(served._dispatcher, "choose", lambda past, *more: seen.append(list(map(len, past))) or
                      choose(past, *more))
  for row in (0, 1):
    seen.clear()
    answers(served, [asked(row, reuse=False)])
    known = [rounds for rounds, in filter(None, seen)]
    assert known[0] == 0 < known[-1]


@pytest.mark.slow
def test_a_drafter_without_confidence_serves():
  """Eagle3, by what the estimator learns: prompts in chunks, then the beginning of a seat's own and of a neighbour's.
  Kills: a copied beginning that the drafter does not get, or that is another row's; a draft that starts from a
  rejected column; a schedule that asks for a confidence head."""
  target = models()[0]
  drafter = dspark_jax.load_drafter(GOLDEN / "generate_eagle3_qwen3", target)
  served = Engine(target, drafter, EngineConfig(seats=2, capacity=CAPACITY, chunk=CHUNK, sampling="greedy"),
                  cost=mixed(drafter, 2, sampling="greedy"))
  served._dispatcher.landed = unpaced
  for policy in ("fixed", "scheduled"):  # by the same programs
    served.use(policy)
    began = [PROMPTS[row] for row in (5, 4, 2)]  # the last keeps its seat
    found = answers(served, [Request(prompt, NEW, reuse=False) for prompt in began])
    before = served.metrics()["prefix_tokens_reused"]
    later = [PROMPTS[2] + found[2][0] + (7, 9, 11), PROMPTS[2] + (1, 2, 3)]
    found += answers(served, [Request(prompt, NEW) for prompt in later])
    assert served.metrics()["prefix_tokens_reused"] - before == len(PROMPTS[2]) + NEW - 2 + len(PROMPTS[2]) - 1
    for prompt, (tokens, _, events) in zip(began + later, found):
      assert list(tokens) == greedy(prompt)
      if policy == "fixed":
        want = dspark_jax.generate(target, drafter, [prompt], max_new_tokens=NEW)
        assert [event.accepted for event in events if event.drafted] == want.n_accept[0] and sum(want.n_accept[0])
  assert mixes(served)
