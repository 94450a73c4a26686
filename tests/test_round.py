"""A round: its contract, and batches of every kind played round by round, against the loop on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.generate import start
from dspark_jax.decoding.policy import All, EarlyStop, Stale, Threshold
from dspark_jax.decoding.round import Models, play
from dspark_jax.decoding.session import Session
from test_drafters import KINDS
from test_generate import NEW, PROMPTS, STOPS, drafter, greedy_text, target
from test_targets import stack_layers

SAMPLINGS = {"greedy": {}, "full": dict(temperature=0.7), "truncated": dict(temperature=0.7, top_k=3),
             "mixed": dict(temperature=[0.0, 0.7, 1.0, 0.0] * 2, top_k=[0, 0, 5, 3] * 2)}
SPS = np.float32([0, *np.linspace(20, 12, 12), *np.linspace(14, 5, 20)])  # dips, and recovers
POLICIES = [All(), Threshold(), EarlyStop(SPS), Stale(SPS)]


def begun(models, sampling, rows=8):
  """(rows after their prompts, policy-independent) of a batch."""
  settings = {name: x[:rows] if isinstance(x, list) else x for name, x in SAMPLINGS[sampling].items()}
  (batch,) = Session(*models).prepare(PROMPTS[:rows], max_new_tokens=NEW, stop_token_ids=STOPS, **settings)
  return functools.partial(start, capacity=batch.static["capacity"]), batch.args[2]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", [None, "original", "words", "rnn"])
def test_a_round_keeps_the_type_of_the_rows(kind, sampling):
  """Kills: rows that grow or change dtype per round, so that every round would be compiled."""
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
  models = jax.tree.map(half, (target(), kind and drafter(kind)))  # where a stray float32 shows
  begin, requests = begun(models, sampling)
  models = jax.eval_shape(Models.of, *models)
  rows = jax.eval_shape(begin, models, requests)
  types = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
  for policy in POLICIES if kind == "rnn" else POLICIES[:1]:
    after, report = jax.eval_shape(play, models, rows, policy)
    assert jax.tree.structure(after) == jax.tree.structure(rows)
    assert types(after) == types(rows)
    block = models.drafter.block_size if kind else 0
    wanted = [((8, block + 1), jnp.int32), *[((8,), jnp.int32)] * 3, ((8, block), jnp.float32), *[((8,), bool)] * 3]
    assert [x[:2] for x in types(report)] == wanted


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_leaf_is_per_row(kind):
  """Kills: what all rows share and a new request cannot bring along when it takes a finished one's seat."""
  shapes = []
  for count in (5, 7):
    begin, requests = begun((target(), kind and drafter(kind)), "mixed", count)
    shapes.append([x.shape for x in jax.tree.leaves(jax.eval_shape(
        lambda *models: begin(Models.of(*models), requests), target(), kind and drafter(kind)))])
  for five, seven in zip(*shapes, strict=True):
    assert [pair for pair in zip(five, seven, strict=True) if len(set(pair)) > 1] == [(5, 7)], (five, seven)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
def test_a_row_is_exchanged(stacked):
  """Kills: what is keyed by the seat and not by the request: the new row must go on as if it were alone, and its
  neighbours as if nothing had happened."""
  models = Models.of(stack_layers(target()) if stacked else target(), drafter("rnn"))
  (batch,) = Session(models.target, models.drafter).prepare(PROMPTS, max_new_tokens=NEW)
  (alone,) = Session(models.target, models.drafter).prepare(PROMPTS[:1], max_new_tokens=NEW)
  begin, step = jax.jit(start, static_argnums=2), jax.jit(play)
  rows, one = (begin(models, x.args[2], batch.static["capacity"]) for x in (batch, alone))
  texts, sure = [[int(x)] for x in rows.anchor], [[] for _ in PROMPTS]  # confidences tell the drafters' states apart
  for at in range(NEW + 3):
    if at == 3:  # seat 2 is given to the first prompt once more
      seat, texts[2], sure[2] = jnp.int32(2), [int(one.anchor[0])], []
      rest, new = (x.replace(cache=None, draft=None) for x in (rows, one))
      rows = jax.tree.map(lambda old, new: old.at[2].set(new[0]), rest, new).replace(
          cache=models.target.insert(rows.cache, seat, one.cache),
          draft=models.drafter.insert(rows.draft, seat, one.draft))
    rows, report = step(models, rows, All())
    for row in np.flatnonzero(report.live):
      texts[row] += report.tokens[row, :report.n_new[row]].tolist()
      sure[row].append(report.confidence[row])
  assert rows.done.all()
  np.testing.assert_allclose(sure[2], sure[0], rtol=1e-4)
  assert [text[:NEW] for text in texts] == [greedy_text()[row, :NEW].tolist() for row in (0, 1, 0, 3, 4, 5, 6, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("sampling, policy", [
  ("greedy", All()), pytest.param("greedy", Stale(SPS), marks=pytest.mark.thorough),
  pytest.param("truncated", EarlyStop(SPS), marks=pytest.mark.thorough), ("mixed", Threshold())],
  ids=["greedy", "greedy scheduled", "sampled scheduled", "mixed"])
def test_reports_tell_the_texts(sampling, policy):
  """Kills: a report that is not of this round, or of rows that did not play; a loop that logs something else than
  rounds; a round that compiles again; greedy text that a policy changes."""
  begin, requests = begun((target(), drafter("rnn")), sampling)
  models, step = Models.of(target(), drafter("rnn")), jax.jit(play, donate_argnums=1)  # as an engine would
  rows, compiled = jax.jit(begin)(models, requests), step._cache_size()
  texts, kept, verified = [[int(x)] for x in rows.anchor], [[] for _ in PROMPTS], [[] for _ in PROMPTS]
  while not rows.done.all():
    live = ~np.array(rows.done)
    rows, report = step(models, rows, policy)
    np.testing.assert_array_equal(report.live, live)
    assert not report.n_new[~live].any()
    for row in np.flatnonzero(live):
      texts[row] += report.tokens[row, :report.n_new[row]].tolist()
      kept[row].append(int(report.n_accept[row]))
      verified[row].append(int(report.n_verify[row]))
  assert step._cache_size() == compiled + 1
  np.testing.assert_array_equal(rows.rounds, [len(row) for row in kept])
  np.testing.assert_array_equal(rows.count, [len(row) for row in texts])
  settings = dict(max_new_tokens=NEW, stop_token_ids=STOPS, policy=policy, **SAMPLINGS[sampling])
  out = dict(Session(target(), drafter("rnn")).stream(PROMPTS, **settings))
  texts = [text[:NEW] for text in texts]
  assert [(out[row].tokens, out[row].n_accept, out[row].n_verify) for row in range(8)] == [*zip(texts, kept, verified)]
  if sampling == "greedy":
    assert texts == [full[:len(text)].tolist() for text, full in zip(texts, greedy_text())]
  assert len(set(sum(verified, []))) > 1 or not hasattr(policy, "sps")
