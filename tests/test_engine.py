"""The engine: whoever comes and goes, every request gets the text that it gets alone."""

import functools
import time
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

import dspark_jax
from dspark_jax.decoding.cost import Cost, Step
from dspark_jax.decoding.engine import Engine, EngineConfig, Full, Request
from dspark_jax.nn.sharding import MeshConfig
from folders import DSPARK, QWEN3, thorough_but

CAPACITY, CHUNK, NEW = 192, 16, 20
PROMPTS = [tuple(np.random.default_rng(row).integers(0, 100, n).tolist())
           for row, n in enumerate((5, 17, 40, 3, 9, 33, 16))]
ASKED = [dict(temperature=0.7 * (row % 2), top_p=0.9, seed=row) for row in range(len(PROMPTS))]


@functools.cache
def models():
  target = dspark_jax.load_target(QWEN3, scanned=True)  # compiles one layer instead of six
  return target, dspark_jax.load_drafter(DSPARK, target)


@functools.cache
def engine(policy, priced=False, **more):
  config = dict(seats=3, capacity=CAPACITY, chunk=CHUNK, policy=policy, log_probabilities=True) | more
  return Engine(*models(), EngineConfig(**config), cost=table(models()[1], 3) if priced else None)


@functools.cache
def alone(row, drafts):
  target, drafter = models()
  return dspark_jax.generate(target, drafter if drafts else None, [PROMPTS[row]], max_new_tokens=NEW,
                             **ASKED[row])


def answers(engine, requests):
  """Texts by place among the requests, with how they ended and their events."""
  places, found = {}, [[] for _ in requests]
  for place, request in enumerate(requests):
    places[engine.submit(request)] = place
  for event in engine.run():
    assert not found[places[event.id]] or found[places[event.id]][-1].finish is None, "an event after the last"
    found[places[event.id]].append(event)
  return [(sum((event.tokens for event in events), ()), events[-1].finish, events) for events in found]


def asked(row, **more):
  return Request(PROMPTS[row], **{"max_new_tokens": NEW} | ASKED[row] | more)


@pytest.mark.parametrize("policy", [pytest.param("plain", marks=pytest.mark.slow), "fixed"])
def test_a_request_gets_the_text_that_it_gets_alone(policy):
  """Greedy and sampled, in seats that others had, prompts in chunks beside their neighbours' rounds. Kills: a draw that
  depends on the seat, on the neighbours or on how long a request waited; tokens lost between two rounds."""
  found = answers(engine(policy), [asked(row, reuse=False) for row in range(len(PROMPTS))])
  for row, (tokens, finish, events) in enumerate(found):
    want = alone(row, policy != "plain")
    assert (list(tokens), finish) == (want.tokens[0], "length")
    if policy != "plain":
      rounds = [event for event in events if event.drafted]
      assert [min(event.accepted, event.verified) for event in rounds] == want.n_accept[0]


def test_a_program_is_handed_what_it_reads():
  """Kills: every weight through every call, some microseconds of the host each; zeros for one that is read."""
  run, (target, _) = engine("fixed")._run, models()
  given = {name: sum(leaf is not None for leaf in leaves) for name, leaves in run.leaves.items()}
  assert given["own"] == given["retire"] == 0 < given["draft"]
  layers = len(jax.tree.leaves(target.layers))
  assert layers < given["full"] and given["draft"] <= len(run.leaves["draft"]) - layers


def test_arrivals_in_any_order_change_nothing():
  """Kills: rows that learn of who came before them."""
  order = [6, 2, 5, 0, 3, 1, 4]
  found = answers(engine("fixed"), [asked(row, reuse=False) for row in order])
  assert [list(tokens) for tokens, _, _ in found] == [alone(row, True).tokens[0] for row in order]


def test_who_is_cancelled_ends_and_nobody_else_notices():
  """Kills: a seat that is not given back, another's text cut, events after the last."""
  served = engine("fixed")
  ids = [served.submit(asked(row, reuse=False)) for row in range(5)]
  seen = {id: [] for id in ids}
  for step in range(1000):
    if step == 6:
      served.cancel(ids[1])
      served.cancel(ids[4])  # which still waits
    for event in served.step():
      seen[event.id].append(event)
    if served.idle:
      break
  assert [seen[id][-1].finish for id in ids] == ["length", "cancelled", "length", "length", "cancelled"]
  for row in (0, 2, 3):
    assert [token for event in seen[ids[row]] for token in event.tokens] == alone(row, True).tokens[0]
  text = alone(1, True).tokens[0]
  cut = [token for event in seen[ids[1]] for token in event.tokens]
  assert len(cut) < NEW and text[:len(cut)] == cut
  served.cancel(ids[0])  # has ended
  served.cancel(10 ** 9)
  assert served.step() == [] and served.idle


@pytest.mark.parametrize("kind", ["fixed", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_known_beginning_is_not_read_again(kind):
  """A second turn goes on from the first one's caches, the target's and the drafter's: the same text, drafts and all.
  Kills: a drafter whose context is lost with the prefix, a prefix that is one token too long."""
  served = engine(kind)
  (first, _, _), = answers(served, [asked(2, reuse=False)])
  turn = Request(PROMPTS[2] + first + (7, 9, 11), max_new_tokens=NEW, reuse=True)
  before = served.metrics()["prefix_tokens_reused"]
  (text, _, events), = answers(served, [turn])
  assert served.metrics()["prefix_tokens_reused"] - before == len(PROMPTS[2]) + NEW - 2
  target, drafter = models()
  want = dspark_jax.generate(target, drafter if kind == "fixed" else None, [turn.prompt], max_new_tokens=NEW)
  assert list(text) == want.tokens[0]
  if kind == "fixed":
    assert [event.accepted for event in events if event.drafted] == want.n_accept[0]


def test_a_stop_token_ends_a_request_wherever_it_falls():
  """As the first token, inside a block, as the target's own. Kills: stop tokens of another seat, drafts kept past one,
  an end that is called the length's."""
  text = alone(0, True).tokens[0]
  assert max(alone(0, True).n_accept[0]) > 0
  for stop in dict.fromkeys(text):
    (tokens, finish, _), (other, _, _) = answers(
        engine("fixed"), [asked(0, stop_token_ids=(stop,), reuse=False), asked(2, reuse=False)])
    assert (list(tokens), finish) == (text[:text.index(stop) + 1], "stop") and list(other) == alone(2, True).tokens[0]


def test_plain_rounds_leave_no_hole_in_what_the_drafter_has_read():
  """Kills: a plain round whose token the drafter does not absorb: the same text, and other drafts from there on."""
  served, events = engine("fixed"), []
  served.submit(asked(2, max_new_tokens=40, reuse=False))
  for step in range(200):
    served.use("plain" if 8 <= step < 14 else "fixed")
    events += served.step()
    if served.idle:
      break
  last = max(place for place, event in enumerate(events) if not event.drafted)
  said = sum((event.tokens for event in events[:last + 1]), ())
  assert 5 < last and 10 < len(said) < 35
  want = dspark_jax.generate(*models(), [PROMPTS[2] + said[:-1]], max_new_tokens=41 - len(said)).n_accept[0]
  assert [min(event.accepted, event.verified) for event in events[last + 1:]] == want


def test_a_beginning_is_taken_from_a_neighbour_at_work():
  """Kills: a copy that takes what its owner has not committed, or that disturbs it."""
  served = engine("fixed")
  first = served.submit(asked(2, temperature=0.0, max_new_tokens=40, reuse=False))
  for _ in range(6):
    served.step()
  before = served.metrics()["prefix_tokens_reused"]
  second = served.submit(Request(PROMPTS[2] + (1, 2, 3), max_new_tokens=NEW))
  texts = {first: [], second: []}
  for event in served.run():
    texts[event.id] += event.tokens
  assert served.metrics()["prefix_tokens_reused"] - before == len(PROMPTS[2]) - 1
  target, drafter = models()
  for id, prompt, new in ((second, PROMPTS[2] + (1, 2, 3), NEW), (first, PROMPTS[2], 40)):
    want = dspark_jax.generate(target, drafter, [prompt], max_new_tokens=new).tokens[0]
    assert texts[id] == want[len(want) - len(texts[id]):]


def test_nothing_compiles_while_it_serves():
  """Kills: a program that a first cancellation, copy or chunk makes, seconds into somebody's answer."""
  served, compiled = engine("fixed"), []
  monitoring.register_event_duration_secs_listener(
      lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
  try:
    ids = [served.submit(asked(row)) for row in range(7)]
    served.step()
    served.cancel(ids[2])
    list(served.run())
    during = len(compiled)
    jax.jit(lambda x: x * 3)(np.float32(1))
  finally:
    monitoring.clear_event_listeners()
  assert during == 0 and compiled, "or the listener is deaf"


@pytest.mark.slow
def test_log_probabilities_are_the_targets():
  """Kills: log-probabilities of the draft, of another position, or after temperature."""
  (tokens, _, events), (other, _, others) = answers(engine("fixed"), [
      asked(1, log_probabilities=True, reuse=False), asked(2, log_probabilities=True, reuse=False)])
  for prompt, text, own in ((PROMPTS[1], tokens, events), (PROMPTS[2], other, others)):
    got = sum((event.log_probabilities for event in own), ())
    np.testing.assert_allclose(got, reference(prompt, text), rtol=1e-3, atol=1e-4)


def reference(prompt, text):
  """Log-probabilities of a text by one pass over it."""
  target = models()[0]
  row = np.asarray([prompt + text], np.int32)
  out, _ = target(row, target.init_cache(1, 128), ())
  log_probs = np.asarray(jax.nn.log_softmax(target.head()(out.hidden)[0]))
  return [log_probs[len(prompt) + i - 1, token] for i, token in enumerate(text)]


def table(drafter, seats, **more):
  """A cost table whose curve dips and recovers: what a search past dips has to get right."""
  step = lambda seconds: Step(seconds, 0.0)
  steps = dict(plain=step(1.0), plain_chunk=step(1.5), draft=step(0.3), full=step(2.4), full_chunk=step(3.0))
  packed = {4: step(1.5), 8: step(0.9), 12: step(1.3)}
  return Cost(machine="none", device="cpu", target="t", drafter="d", dtype="float32", seats=seats,
              block=drafter.block_size, context=16, source="invented",
              **dict(capacity=CAPACITY, chunk=CHUNK, sampling="truncated", packed=packed) | steps | more)


THRESHOLDS = dict(confidence_threshold=0.3, survival_threshold=0.1)


@pytest.mark.parametrize("policy", thorough_but([], ["scheduled"], ["threshold", "early-stop", "scheduled"]))
def test_what_is_verified_changes_no_greedy_text(policy):
  """Kills: a draft that counts as verified and was not, a bucket that holds another row's tokens, a plain round after
  which the drafter has a hole in its context."""
  served = engine(policy, priced=True, **THRESHOLDS if policy == "threshold" else {})
  found = answers(served, [asked(row, temperature=0.0, reuse=False) for row in range(len(PROMPTS))])
  for row, (tokens, finish, events) in enumerate(found):
    want = dspark_jax.generate(*models(), [PROMPTS[row]], max_new_tokens=NEW)
    assert (list(tokens), finish) == (want.tokens[0], "length")
    assert all(event.accepted <= event.verified <= event.drafted for event in events)
  metrics = served.metrics()
  assert metrics["verified"] < metrics["drafted"]
  assert any(name.startswith("program_") and name[8:].isdigit() for name in metrics)


@pytest.mark.parametrize("wrong, says", [
    (dict(prompt=()), "empty"), (dict(prompt=(10 ** 6,)), "another tokenizer"), (dict(max_new_tokens=0), "at least 1"),
    (dict(max_new_tokens=500), "do not fit"), (dict(temperature=-1.0), "temperature"), (dict(seed=-1), "seed"),
    (dict(max_new_tokens=2.5), "expected one number"), (dict(temperature=[0.5, 0.7]), "expected one number"),
    (dict(stop_token_ids=tuple(range(9))), "at most 8"), (dict(stop_token_ids=(10 ** 6,)), "stop_token_ids")])
def test_what_cannot_be_served_is_refused_at_once(wrong, says):
  """Kills: a request that fails after it has taken a seat."""
  with pytest.raises(ValueError, match=says):
    engine("fixed").submit(Request(**{"prompt": (1, 2, 3)} | wrong))


def test_who_fails_spoils_nobody():
  """A token whose embedding is not a number: in a prompt, and among what is said, where it is drafted from. Kills: NaN
  left in the seat for the next one, or among neighbours; NaN in what new rows are taken to be like, or in what the
  estimator learns: nobody's drafts would be verified any more."""
  target, drafter = dspark_jax.load_target(QWEN3, scanned=True), models()[1]  # loaded with this one it would be refused
  assert target.lm_head is not None  # else every logit of that word would be spoiled
  rows, bad = (5, 2, 0, 3), 4  # short prompts last, in small chunks: NaN lies behind them
  clean, said = target.embed_tokens.weight[...], alone(bad, True).tokens[0]
  def heard(token):  # in a neighbour's prompt or text, or in a draft of it
    target.embed_tokens.weight[...] = clean.at[token].set(jnp.nan)
    try:
      return any(dspark_jax.generate(target, drafter, [PROMPTS[row]], max_new_tokens=NEW, **ASKED[row]).tokens !=
                 alone(row, True).tokens for row in rows)
    except ValueError:
      return True
  at = next(at for at in range(2, NEW) if said[at] not in (*PROMPTS[bad], *said[:at]) and not heard(said[at]))
  served = Engine(target, drafter, EngineConfig(seats=2, capacity=CAPACITY, chunk=4, policy="fixed"))
  read = Request((1, 2, said[at], 4), max_new_tokens=NEW)
  found = answers(served, [asked(rows[0]), read, asked(rows[1]), asked(bad), asked(rows[2]), asked(rows[3])])
  assert [finish for _, finish, _ in found] == ["length", "failed", "length", "failed", "length", "length"]
  assert [list(found[place][0]) for place in (0, 2, 4, 5)] == [alone(row, True).tokens[0] for row in rows]
  assert list(found[3][0][:at + 1]) == said[:at + 1]
  assert all(np.isfinite([*state.weights, *state.intercepts, *state._c]).all() for state in served.estimators)
  assert np.isfinite(served._dispatcher._typical).all()


def test_a_full_queue_and_what_an_engine_was_not_started_for():
  """Kills: a queue without an end, or one that is full while seats are free; a sampled request answered greedily."""
  target, _ = models()
  small = Engine(target, None, EngineConfig(seats=1, capacity=128, chunk=CHUNK, sampling="greedy", queue=2))
  with pytest.raises(ValueError, match="for greedy: .* or start it with --sampling full"):
    small.submit(Request((1, 2), max_new_tokens=3, temperature=1.0))
  with pytest.raises(ValueError, match="start it with --log-probabilities"):
    small.submit(Request((1, 2), max_new_tokens=3, log_probabilities=True))
  ids = [small.submit(Request((1, 2), max_new_tokens=3)) for _ in range(3)]  # one for the seat
  with pytest.raises(Full, match="3 requests"):
    small.submit(Request((1, 2), max_new_tokens=3))
  small.cancel(ids[1])
  assert sorted(event.id for event in small.run() if event.finish) == ids
  assert (small.metrics()["occupied"], small.metrics()["finished"]) == (0, 3)  # also who was cancelled while it waited


@pytest.mark.parametrize("asked, says", [
    (dict(policy="fastest"), "expected plain"), (dict(policy="scheduled"), "no cost table"),
    (dict(policy="threshold", buckets=(16, 8)), "rising"), (dict(policy="threshold", buckets=(0,)), "rising"),
    (dict(policy="threshold", buckets=(10 ** 6,)), "fewer tokens"), (dict(confidence_threshold=0.5), "no confidence_"),
    (dict(policy="fixed", chunk=192), "chunk is 192, expected at most 128 or a multiple"),
    (dict(policy="fixed", capacity=16, chunk=16), "more than chunk"),
    (dict(policy="fixed", capacity=CHUNK + 1, chunk=CHUNK), "no room for a prompt")])
def test_what_an_engine_cannot_be_is_refused(asked, says):
  """Kills: an engine that compiles for a minute before it finds out, or serves something else."""
  with pytest.raises(ValueError, match=says):
    Engine(*models(), EngineConfig(**asked))


@pytest.mark.parametrize("change, says", [
    (dict(capacity=512), "capacity 512, not 192"), (dict(chunk=64), "chunk 64, not 16"),
    (dict(sampling="greedy"), "sampling 'greedy', not 'truncated'"), (dict(seats=4), "seats 4, not 3")])
def test_costs_of_another_engine_are_refused(change, says):
  """Kills: rounds chosen by what the programs of shorter seats, other chunks or greedy requests take."""
  with pytest.raises(ValueError, match=says):
    Engine(*models(), EngineConfig(seats=3, capacity=CAPACITY, chunk=CHUNK),
           cost=table(models()[1], **{"seats": 3} | change))


def test_how_far_predictions_are_off():
  """Kills: drafts behind a rejection, or never verified, among those predicted; survivals of the whole beginning where
  a draft is only looked at when those before it were kept; one NaN for good."""
  report = np.zeros(4, [("confidence", "f4", 3), ("features", "f4", (3, 0)), ("n_verify", "i4"), ("n_accept", "i4")])
  report["confidence"] = [0.5, 0.25, 0.125]
  report["confidence"][2, 0] = np.nan
  report["n_verify"], report["n_accept"] = [3, 2, 3, 3], [1, 2, 3, 0]
  seats = [types.SimpleNamespace(index=row, past=[]) for row in range(3)]  # nobody played the last
  taught = types.SimpleNamespace(_dispatcher=types.SimpleNamespace(observe=lambda _: None), _counts=Counter())
  Engine._learn(taught, report, seats)
  assert taught._counts["predicted_accepted"] == 0.75 + 0.75 + 0.375
  played = engine("fixed")
  answers(played, [Request(PROMPTS[0], NEW)])
  assert played.metrics()["predicted_accepted"] > 0


def test_counters_add_up():
  """Prompts in chunks, seats that wait and seats that are given back. Kills: a budget that is not the tokens which the
  programs run; rounds and tokens of rows that do not play, or of the prompt's own pass; idle time that is nobody's."""
  served, requests = engine("fixed"), [asked(row, reuse=False) for row in range(len(PROMPTS))]
  before, began = Counter(served.metrics()), time.perf_counter()
  found = answers(served, requests)
  more = {name: n - before[name] for name, n in served.metrics().items()}
  rounds = [event for _, _, events in found for event in events if event.drafted]
  assert more["row_rounds"] == len(rounds) > 0 and more["tokens"] == NEW * len(PROMPTS)
  assert more["round_tokens"] == sum(len(event.tokens) for event in rounds) == more["tokens"] - len(PROMPTS)
  assert more["prompt_tokens"] == sum(map(len, PROMPTS)) and more["finished"] == more["requests"] == len(PROMPTS)
  runs = lambda name: more.get(f"program_{name}", 0) + more.get(f"program_{name}+chunk", 0)
  assert more["rounds"] == runs("plain") + runs("full")
  assert more["budget"] == 3 * (runs("plain") + runs("full") * (served.block + 1))
  served.submit(asked(5, reuse=False))
  for _ in range(4):
    served.step()
    jax.block_until_ready(served._flights[-1].report.done)
    time.sleep(0.1)
  list(served.run())
  assert 0 < served.metrics()["idle_seconds"] - before["idle_seconds"] < time.perf_counter() - began


def test_each_kind_of_sampling_learns_from_its_own():
  """Kills: drafts of sampled rows learnt from as those of greedy ones, or of rows that do not belong to the seats."""
  report = np.zeros(4, [("confidence", "f4", 1), ("features", "f4", (1, 1)), ("n_verify", "i4"), ("n_accept", "i4")])
  report["features"][:, 0, 0] = [10, 11, 12, 13]
  heard = [[], []]
  kinds = [types.SimpleNamespace(observe=lambda features, *_, to=to: to.extend(features.ravel())) for to in heard]
  seats = [types.SimpleNamespace(index=row, past=[], request=Request((1,), temperature=t))
           for row, t in ((3, 0.0), (0, 0.7), (1, 0.0))]
  taught = types.SimpleNamespace(_dispatcher=types.SimpleNamespace(observe=lambda _: None), _counts=Counter(),
                                 estimators=kinds)
  Engine._learn(taught, report, seats)
  assert heard == [[13, 11], [10]]


def test_what_compiling_took_is_kept():
  """Kills: programs whose time and memory nobody hears of."""
  took = engine("fixed").compile_costs
  assert set(took) == {"draft", "full", "full+chunk", "plain", "plain+chunk", "own", "copy", "retire"}
  assert all(seconds > 0 <= size for seconds, size in took.values()) and max(size for _, size in took.values()) > 0


def test_a_policy_that_an_engine_was_not_started_for():
  """Kills: packed programs that were never compiled; thresholds that go on under fixed."""
  served = engine("fixed", priced=True)
  served.use("plain")
  served.use("fixed")
  with pytest.raises(ValueError, match="started for fixed"):
    served.use("scheduled")
  with pytest.raises(ValueError, match="started for threshold"):
    engine("threshold", priced=True, **THRESHOLDS).use("fixed")


@pytest.mark.parametrize("tight", ["a chunk", "the text"])
def test_a_request_may_fill_its_seat_to_the_last_slot(tight):
  """Kills: windows that run over a seat's end, and slide back over its text; requests refused that fit."""
  (target, drafter), prompt = models(), PROMPTS[5]
  block, behind = drafter.block_size, 2 * (drafter.block_size + 1)
  capacity = len(prompt) + (CHUNK + block if tight == "a chunk" else 30 + behind)
  served = Engine(target, drafter, EngineConfig(seats=2, capacity=capacity, chunk=CHUNK, policy="fixed",
                                                sampling="greedy", log_probabilities=True))
  new = served.room(len(prompt))
  assert new == capacity - len(prompt) - behind > 2
  with pytest.raises(ValueError, match=f"room for {new}"):
    served.submit(Request(prompt, max_new_tokens=new + 1))
  request = Request(prompt, max_new_tokens=new, reuse=False, log_probabilities=True)
  logs = lambda events: sum((event.log_probabilities for event in events), ())
  (tokens, _, events), = answers(engine("fixed"), [request])
  for mine, _, said in answers(served, [request] * 3):
    assert mine == tokens
    np.testing.assert_allclose(logs(said), logs(events), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fixed", "scheduled"])
def test_a_mesh_changes_no_text(policy):
  """Seats over data, heads and words over tensor: the same tokens as on one device, greedy and sampled, prompts in
  chunks and known beginnings too. Kills: a chunk that is written into the row of that number on every device; packed
  tokens of another device's rows; drafts that are not where the next program wants them."""
  packs = policy == "scheduled"
  # Which drafts are verified may hang on a last bit, and with it a sampled text, unless there is one word to draw.
  sampling = dict(top_k=1) if packs else {}
  with MeshConfig(data=2, tensor=2).use():
    target = dspark_jax.load_target(QWEN3, scanned=True)
    drafter = dspark_jax.load_drafter(DSPARK, target)
    served = Engine(target, drafter, EngineConfig(seats=4, capacity=CAPACITY, chunk=CHUNK, policy=policy),
                    cost=mixed(drafter, 4) if packs else None)
    served._dispatcher.landed = unpaced
    found = answers(served, [asked(row, reuse=False, **sampling) for row in range(len(PROMPTS))])
    (again, _, _), = answers(served, [Request(PROMPTS[5] + (1, 2, 3), max_new_tokens=NEW)])
  want = [greedy(prompt) if packs else alone(row, True).tokens[0] for row, prompt in enumerate(PROMPTS)]
  assert [list(tokens) for tokens, _, _ in found] == want
  assert list(again) == greedy(PROMPTS[5] + (1, 2, 3)) and served.metrics()["prefix_tokens_reused"] > 0
  assert not packs or mixes(served)


def mixed(drafter, seats, **more):
  """A cost table by which full rounds, packed ones and full ones beside chunks are chosen in turn."""
  step = lambda seconds: Step(seconds, 0.0)
  return table(drafter, seats, packed={seats * (drafter.block_size + 1) // 2: step(2.0)}, full=step(3.6),
               full_chunk=step(2.8), **more)


def unpaced(*_):
  """In place of `Dispatcher.landed`: rounds take less here than invented ones, and what ran would seem the best."""


def mixes(served):
  """Whether all of them ran."""
  return {"full", "full+chunk", *map(str, served.cost.packed)} <= {
      name.removeprefix("program_") for name, rounds in served.metrics().items() if rounds}


def greedy(prompt):
  """The text that the target gives alone."""
  return dspark_jax.generate(models()[0], None, [prompt], max_new_tokens=NEW).tokens[0]
