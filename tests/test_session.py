"""Sessions: how a list of prompts becomes batches of few shapes that fit a budget, and what a program can time."""

import jax
import jax.monitoring
import numpy as np
import pytest

import dspark_jax
from dspark_jax.decoding.generate import decode
from dspark_jax.decoding.session import PROMPT_BUCKET, Session, capacity, generate, padded_length
from test_generate import NEW, PROMPTS, STOPS, broken, cut, drafter, greedy_text, target
from test_policy import Chain, Moody


def many_prompts(n):
  """n prompts for the chain of test_policy, of 1 to 9 tokens, but for the last two, which are of another bucket."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, 3, rng.integers(1, 10) if row < n - 2 else 70).tolist() for row in range(n)]


def room_for(rows, session, longest=1, new=6):
  """A budget for so many rows of such prompts, and nearly one more."""
  return (rows + 0.9) * session.bytes_per_row(padded_length(longest), new)


@pytest.mark.slow
def test_many_prompts_under_a_small_budget():
  """Kills: one cache for 2,000 prompts; a last batch of another shape; texts in the order in which they finish, or that
  depend on their batch; seeds counted anew in every batch."""
  prompts, settings = many_prompts(2000), dict(max_new_tokens=6, temperature=1.0, seed=3)
  session = Session(Chain(), Moody())
  session.budget, before = room_for(128, session, 70), decode._cache_size()
  shapes = [batch.args[2].prompts.shape for batch in session.prepare(prompts, **settings)]
  assert shapes == [(125, 128)] + [(125, 64)] * 15
  batches = session.prepare(prompts[10:], **settings)
  assert [batch.args[2].prompts.shape for batch in batches] == shapes  # the last is filled up
  assert sorted(sum((batch.indices for batch in batches), ())) == list(range(1990))
  texts = generate(Chain(), Moody(), prompts, budget=session.budget, **settings).tokens
  finished = [index for index, _ in session.stream(prompts, **settings)]
  assert sorted(finished) == list(range(2000)) and finished[123:126] == [1998, 1999, 123]
  assert decode._cache_size() == before + 2
  some = [0, 1, 122, 123, 1000, 1997, 1998, 1999]
  alone = dict(Session(Chain(), Moody(), batch=1).stream(
      [prompts[row] for row in some], seeds=[3 + row for row in some], max_new_tokens=6, temperature=1.0))
  assert [texts[row] for row in some] == [alone[row].tokens for row in range(len(some))]
  assert texts == generate(Chain(), Moody(), prompts, **settings).tokens


def test_rows_of_similar_length_go_together():
  """Kills: short prompts padded like the longest of all; a batch of one bucket for each odd row; a budget that long
  prompts break, or that is spent on one row although it has room for more."""
  session = Session(target(), drafter("rnn"))
  lengths = [3] * 30 + [100, 200, 70, 300] + [5] * 30
  prompts = [[1] * n for n in lengths]
  session.budget = budget = room_for(4, session, 300, NEW)
  batches = session.prepare(prompts, max_new_tokens=NEW)
  for batch in batches:
    rows, padded = batch.args[2].prompts.shape
    longest = max(lengths[index] for index in batch.indices)
    assert padded == padded_length(longest) and rows * session.bytes_per_row(padded, NEW) <= budget
    np.testing.assert_array_equal(batch.args[2].lengths[:len(batch.indices)], [lengths[i] for i in batch.indices])
    limits = [NEW] * len(batch.indices)
    np.testing.assert_array_equal(batch.args[2].settings.limit, limits + [0] * (rows - len(limits)))
  assert set(batches[0].indices) >= {30, 31, 32, 33}  # the longest first
  shapes = {batch.args[2].prompts.shape for batch in batches}
  assert len(shapes) == 2 and max(rows for rows, _ in shapes) > 8
  assert [len(batch.indices) for batch in Session(target(), batch=5, budget=None).prepare(prompts)] == [5] * 12 + [4]
  assert [len(batch.args[2].prompts) for batch in Session(target(), batch=5, budget=1).prepare(prompts)] == [1] * 64


def test_bytes_of_a_row():
  """Kills: a budget that counts the target's cache alone, or another dtype's; a capacity that follows the longest
  prompt instead of its bucket, so that every length compiles anew."""
  session, plain = Session(target(), drafter("vanilla")), Session(target())
  block, vocabulary, layers = session.block_size, target().vocab_size, target().config.num_layers
  spec = target().config.spec
  for padded, new in ((64, NEW), (128, 200)):
    slots = [-(-(padded + new + 2 * (g + 1)) // 64) * 64 for g in (0, block)]
    assert [capacity(padded, new, g) for g in (0, block)] == slots
    cache = [4 * (2 * slots[at] * spec.num_kv_heads * spec.head_dim * n + 1)
             for at, n in ((0, layers), (1, layers), (1, 1))]
    log = lambda g: (4 * (new + 2 * g + 2) + 4 + 1 + 8 * new + 4 * new * g + 4)
    assert plain.bytes_per_row(padded, new) == cache[0] + log(0) + 4 * vocabulary
    assert session.bytes_per_row(padded, new) == cache[1] + cache[2] + log(block) + 4 * (block + 1) * vocabulary
  assert [padded_length(n) for n in (1, 64, 65, 128, 129, 257)] == [64, 64, 128, 128, 256, 384]


@pytest.mark.slow
def test_compiled_once():
  """Kills: a program that is compiled again when it runs, by a second session, or for other prompts of its bucket."""
  wanted, compiled = [cut(row, STOPS, 7) for row in greedy_text()[:3].tolist()], []
  session = Session(target(), drafter("rnn"))
  listen = lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  settings = dict(max_new_tokens=7, stop_token_ids=STOPS)
  (batch,) = session.prepare(PROMPTS[:3], **settings)
  batch.compile()
  assert len(compiled) == 1
  assert [text.tokens for text in batch.run()] == wanted
  assert dspark_jax.generate(target(), drafter("rnn"), PROMPTS[:3], **settings).tokens == wanted
  other = [[1] * n for n in (9, 40, PROMPT_BUCKET)]
  dspark_jax.generate(target(), drafter("rnn"), other, max_new_tokens=[7, 2, 1], seed=8, stop_token_ids=[[], [3], [4]])
  for batch in Session(target(), drafter("rnn"), batch=3).prepare(PROMPTS, **settings):
    batch.compile()
  assert len(compiled) == 1
  dspark_jax.generate(target(), drafter("rnn"), other, max_new_tokens=6)
  assert len(compiled) == 2  # it does listen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_fillers_are_over_before_they_start():
  """Kills: a batch that goes on for the sake of rows that only fill it up; their texts among the results."""
  settings = dict(max_new_tokens=[2, 12], stop_token_ids=[[], []])
  (batch,), (other,) = (Session(target(), batch=4, budget=budget).prepare(PROMPTS[:2], **settings)
                        for budget in (None, 1e9))
  assert batch.static == other.static and batch.args[2].prompts.shape == other.args[2].prompts.shape
  assert batch.indices == (0, 1) and batch.args[2].prompts.shape[0] == 4
  assert [len(text.tokens) for text in batch.run()] == [2, 12]
  log = decode(*batch.args, **batch.static)
  assert log.count.tolist() == [2, 12, 1, 1] and int(log.rounds) == 11


def test_broken_rows_are_named_by_their_prompt():
  """Kills: the number of a row within its batch for the number of the prompt."""
  session = Session(broken(target(), "lm_head.weight"), batch=2)
  with pytest.raises(ValueError, match=r"NaN logits or confidences in rows \[0, 2\]"):  # the longest comes first
    list(session.stream([[1], [2], [1] * (PROMPT_BUCKET + 1)], max_new_tokens=3))
  with pytest.raises(ValueError, match="prompt 1 is empty"):  # at once, not when the first text is asked for
    session.stream([[1], []])
  with pytest.raises(ValueError, match="batch is 0, expected at least 1"):
    Session(target(), batch=0)
