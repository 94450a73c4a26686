"""Sampled generation: rows that mind their own settings, one program for all settings, and the text's distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.decoding import session as subject
from dspark_jax.decoding.generate import decode
from dspark_jax.decoding.session import Session, generate
from folders import thorough_but
from test_drafters import small_drafter
from test_generate import NEW, PROMPTS, STOPS, drafter, target
from test_targets import batch_of, encoded, small_target

ROWS = 8000
ALARM = 1e-6  # a correct sampler fails one chi-square with this probability; the seeds are fixed


@pytest.mark.slow
def test_sampled_rows_are_independent():
  """Kills: random numbers per slot of the batch instead of per request; one key used for two draws."""
  settings = dict(max_new_tokens=NEW, temperature=0.8, top_k=8, top_p=0.95, stop_token_ids=STOPS)
  out = generate(target(), drafter("rnn"), PROMPTS, seed=7, **settings)
  for row, prompt in enumerate(PROMPTS):
    alone = generate(target(), drafter("rnn"), [prompt], seed=7 + row, **settings)
    assert (alone.tokens[0], alone.n_accept[0]) == (out.tokens[row], out.n_accept[row])
  other = generate(target(), drafter("rnn"), PROMPTS, seed=100, **settings)
  assert out.tokens != other.tokens and sum(map(sum, out.n_accept)) > 0


MIXED = dict(
  temperature=[0.0, 0.8, 1.2, 0.0, 0.7, 1.0, 0.9, 0.8], top_k=[0, 0, 5, 3, 0, 4, 0, 8], seeds=[3, 1, 4, 1, 5, 9, 2, 6],
  top_p=[1.0, 1.0, 1.0, 0.5, 0.8, 1.0, 1.0, 0.95], max_new_tokens=[NEW, NEW, 5, NEW, 9, 1, NEW, NEW],
  stop_token_ids=[[], [8, 2], [2], [], [9], [], [1, 3, 4, 5, 6], [8]])
CUTS = dict(confidence_threshold=[0.0, 0.4, 0.0, 0.5, 0.5, 0.0, 0.0, 0.3],
            survival_threshold=[0.3, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.3],
            calibration=[[1.0 + row / 4, 2.0, 0.5 + row / 4] for row in range(8)])


MODES = {"greedy": (0, 3), "full": (1, 6), "truncated": (2, 4, 5, 7)}  # the rows of MIXED


@pytest.mark.parametrize("kind", thorough_but([], ["rnn"], [None, "rnn"]))
def test_rows_with_settings_of_their_own(kind):
  """Kills: one row's temperature, top-k, top-p, limit, stop tokens, thresholds or calibration used for a neighbour; a
  greedy row that is drawn or verified otherwise than alone; a truncation of rows that have none."""
  words = (0, 1, 3, 4, 8, 9, 11)
  chosen = kind and small_drafter(target(), kind, words=words, num_layers=1, draft_vocab_size=len(words))
  settings, expected = MIXED | (CUTS if kind else {}), {}
  some = lambda rows: ([PROMPTS[row] for row in rows], {name: [x[row] for row in rows] for name, x in settings.items()})
  for mode, rows in MODES.items():  # each in a batch of its own, and in its own mode
    prompts, own = some(rows)
    batches = Session(target(), chosen, batch=1).prepare(prompts, **own)
    assert [batch.args[2].settings.sampling.mode for batch in batches] == [mode] * len(rows)
    for batch in batches:
      (text,), (row,) = batch.run(), batch.indices
      expected[rows[row]] = (text.tokens, text.n_accept, text.n_verify)
  for rows in (range(8), (6, 3, 0, 1)):  # with rows that truncate, and without
    prompts, own = some(rows)
    out = generate(target(), chosen, prompts, **own)
    assert list(zip(out.tokens, out.n_accept, out.n_verify)) == [expected[row] for row in rows]
  assert len(expected[5][0]) == 1 and len(expected[0][0]) == NEW and len({len(text) for text,
                                                                          *_ in expected.values()}) > 3
  if kind:
    kept, verified = zip(*[(sum(kept), set(verified)) for _, kept, verified in expected.values()])
    assert sum(kept) > 3 and max(map(len, verified)) > 1


def test_one_compilation():
  """Kills: settings that are baked into the program: a second call of the same shape must not compile."""
  def call(prompt, **settings):
    generate(target(), drafter("rnn"), [prompt], max_new_tokens=NEW, **settings)

  call(PROMPTS[0], temperature=0.8, top_k=8)
  before = decode._cache_size()
  call(PROMPTS[2], temperature=1.3, top_p=0.5, seed=9, stop_token_ids=(1, 2, 3), confidence_threshold=0.4)
  call(PROMPTS[2], temperature=[0.1], top_k=3, top_p=[0.9], calibration=[2.0, 1.0, 0.5], seeds=[2 ** 32 - 1])
  assert decode._cache_size() == before


def test_no_host_in_the_loop():
  """Kills: a verification driven from the host (EAGLE-3 on TPU: 5-30 times slower than no speculation)."""
  (batch,) = Session(target(), drafter("rnn")).prepare(PROMPTS[:1], max_new_tokens=NEW, temperature=0.8, top_k=8)
  args = jax.device_put(batch.args)
  with jax.transfer_guard("disallow"):
    jax.block_until_ready(decode(*args, **batch.static))
  assert "callback" not in str(decode.trace(*batch.args, **batch.static).jaxpr)
  (text,) = batch.run()
  assert len(text.tokens) == NEW


def exact_probs(logits, temperature, top_k, top_p):
  """Temperature, top-k, top-p, the slow way, in float64."""
  p = np.exp(np.asarray(logits, np.float64) / temperature)
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0
  p /= p.sum()
  before = np.cumsum(p[order]) - p[order]  # the token that crosses top_p stays
  p[order[before >= top_p]] = 0
  return p / p.sum()


def joint_of_four(target, prompt, *settings):
  """Exact probabilities of the first four new tokens, f64[V,V,V,V]."""
  size = target.config.vocab_size
  prefixes = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1).reshape(-1, 3)
  rows = np.concatenate([np.tile(prompt, (len(prefixes), 1)), prefixes], 1).astype(np.int32)
  logits = np.asarray(encoded(target, batch_of(rows)))[:, len(prompt) - 1:, :size]
  probs = np.apply_along_axis(exact_probs, -1, logits, *settings)
  joint = probs[:, 3]
  for i in range(3):
    joint = joint * probs[np.arange(len(rows)), i, prefixes[:, i]][:, None]
  return joint.reshape([size] * 4)


@pytest.mark.parametrize("kind, top, words, rule", [
  pytest.param("vanilla", (0, 1.0), None, "token", id="full"),
  pytest.param("vanilla", (4, 0.8), (0, 1, 3, 4), "token", id="truncated", marks=pytest.mark.slow),
  pytest.param("eagle3", (0, 1.0), None, "token", id="eagle3", marks=pytest.mark.thorough),
  pytest.param("mtp", (4, 0.8), (0, 1, 3, 4), "token", id="mtp", marks=pytest.mark.thorough),
  pytest.param("vanilla", (0, 1.0), None, "block", id="block", marks=pytest.mark.thorough),
  pytest.param("vanilla", (4, 0.8), (0, 1, 3, 4), "block", id="block-truncated", marks=pytest.mark.thorough),
])
def test_text_follows_the_target(kind, top, words, rule, monkeypatch):
  """Kills: what is not lossless from end to end: drafts and q under different settings, residual at the wrong
  slot, a cut by the confidence of the drawn token itself, random numbers shared between draws."""
  for bucket in ("PROMPT_BUCKET", "CACHE_BUCKET"):
    monkeypatch.setattr(subject, bucket, 4)
  target, prompt = small_target("llama", seed=2, vocab_size=6), [3, 1, 4]
  drafter = small_drafter(target, kind, seed=6, words=words, num_layers=1, block_size=2,
                          draft_vocab_size=len(words or ()))
  if drafter.has_confidence:
    proj = drafter.confidence_head.proj.weight
    proj.set_value(jnp.where(jnp.arange(20)[None] < 16, 0, 16 * proj[...]))  # the token alone decides the cut
  for temperature, threshold in ((0.7, 0.0), (1.0, 0.5 * drafter.has_confidence)):
    out = generate(target, drafter, [prompt] * ROWS, max_new_tokens=4, temperature=temperature, top_k=top[0],
                   top_p=top[1], seed=int(10 * temperature), confidence_threshold=threshold, verification=rule)
    expected = ROWS * joint_of_four(target, prompt, temperature, *top)
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(np.array(out.tokens).T), 1)
    assert not observed[expected == 0].any()
    large = expected > 10
    pooled = [np.append(x[large], x[~large].sum()) for x in (observed, expected)]
    statistic = np.sum((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1e-9))
    assert stats.chi2.sf(statistic, large.sum()) > ALARM
    assert large.sum() > 50 and 0.15 < np.mean([n > 0 for row in out.n_accept for n in row]) < 0.8
