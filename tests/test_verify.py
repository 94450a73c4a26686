"""Verification: goldens, identities, then the distribution of the text, which five mutants must fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dspark_jax.decoding.verify as subject
import dspark_jax.sampling
from dspark_jax.decoding.verify import (
  accept_prob, accepted_prefix, cut_at_stop, drafted_probs, next_probs, residual)
from dspark_jax.sampling import make_sampling, split_keys
from dspark_jax.types import Proposal
from folders import GOLDEN, golden_cases, thorough_but

# Op by op, every shape would compile dozens of little programs.
draw, probabilities = jax.jit(dspark_jax.sampling.draw), jax.jit(dspark_jax.sampling.probabilities)
verify = jax.jit(subject.verify)

VERIFICATIONS = golden_cases("", "accept_prefix_mask")
VOCABULARY, BLOCK, ROWS = 13, 3, 10000
WORDS = (7, 2, 11, 0, 5, 8, 3)  # unsorted strict subset: p always has mass outside
ALARM = 1e-6  # a correct sampler fails one chi-square with this probability; the keys are fixed
MUTANTS = {None: 0, "shared noise": 1, "greedy draft": 2, "bonus from p": 3, "tempered draft": 4,
           "renormalised teacher": 5}


def proposal_of(tokens, probs, words=None):
  confidence = np.ones(tokens.shape, np.float32)
  return Proposal(tokens=tokens, logits=probs, probs=probs, confidence=confidence, words=words)


def random_proposal(words=None):
  """Target logits f32[64,G+1,V], and a proposal really drawn from its probs."""
  rng, width = np.random.default_rng(0), VOCABULARY if words is None else len(words)
  logits, draft = (2 * rng.normal(size=(64, *shape)) for shape in ((BLOCK + 1, VOCABULARY), (BLOCK, width)))
  probs = np.exp(draft) / np.exp(draft).sum(-1, keepdims=True)
  tokens = np.argmax(draft + rng.gumbel(size=draft.shape), axis=-1)
  tokens = np.int32(tokens if words is None else np.array(words)[tokens])
  words = None if words is None else np.int32(words)
  return np.float32(logits), proposal_of(tokens, np.float32(probs), words)


def temperatures_of(case):
  return sorted(set(np.load(GOLDEN / case / "inputs.npz")["temperature"].tolist()))


def golden_group(case, temperature):
  """inputs and outputs of a golden's rows at one temperature."""
  inputs, outputs = dict(np.load(GOLDEN / case / "inputs.npz")), dict(np.load(GOLDEN / case / "outputs.npz"))
  rows = inputs["temperature"] == np.float32(temperature)
  select = lambda arrays: {k: v[rows] for k, v in arrays.items() if len(v) == len(rows)}
  return select(inputs), select(outputs)


@jax.jit
def golden_pieces(inputs, target_probs, draft_probs, sampling):
  """Every piece of a verification, under the golden's names."""
  p_all, q_all = (probabilities(inputs[name], sampling) for name in ("target_logits", "draft_logits"))
  p, q = drafted_probs(p_all, proposal_of(inputs["draft_tokens"], q_all))
  lengths = jnp.full(p.shape[0], p.shape[1], jnp.int32)
  n_accept = accepted_prefix(inputs["uniforms"] * q < p, lengths)
  kept, stopped = cut_at_stop(inputs["draft_tokens"], n_accept, inputs["stop_token_ids"])
  # From the golden's own p and q: a residual of small mass magnifies the last bits of a softmax.
  following = next_probs(target_probs, proposal_of(inputs["draft_tokens"], draft_probs), kept, lengths)
  return dict(target_probs=p_all, draft_probs=q_all, accept_prob=accept_prob(p, q), n_accept=n_accept,
              accepted=kept, terminated_by_stop_token=stopped, next_token_dist=following,
              effective_proposal_length=jnp.where(stopped, kept, lengths))


@pytest.mark.parametrize("case, temperature", [(case, t) for case in VERIFICATIONS for t in temperatures_of(case)])
def test_golden_verification(case, temperature):
  """Kills: ratio inverted or unclipped, residual or bonus at the wrong slot, stop token that ends nothing."""
  inputs, outputs = golden_group(case, temperature)
  outputs["n_accept"] = outputs["accept_prefix_mask"].sum(1)
  pieces = golden_pieces(inputs, outputs["target_probs"], outputs["draft_probs"], make_sampling(temperature))
  for name, actual in pieces.items():
    tolerance = 1e-6 if actual.dtype == jnp.float32 else 0
    np.testing.assert_allclose(actual, outputs[name], atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", [case for case in VERIFICATIONS if 0 in temperatures_of(case)])
def test_golden_greedy_verdict(case):
  """Kills: a greedy shortcut that disagrees with one-hot rejection sampling."""
  inputs, outputs = golden_group(case, 0.0)
  proposal = proposal_of(inputs["draft_tokens"], None)
  verdict = verify(inputs["target_logits"], proposal, make_sampling(0.0), accept_keys=None, bonus_keys=None)
  n_accept, next_token = np.asarray(verdict.n_accept), np.asarray(verdict.next_token)
  np.testing.assert_array_equal(n_accept, outputs["accept_prefix_mask"].sum(1))
  whole = n_accept == outputs["accepted"]  # not cut at a stop token
  np.testing.assert_array_equal(next_token[whole], outputs["next_token_dist"].argmax(-1)[whole])
  assert whole.any() and outputs["terminated_by_stop_token"][~whole].all()


def test_a_small_residual():
  """Kills: a target that differs little from the draft taken for the same one: a rejected token would be drawn again,
  and come more often than the target says it."""
  p = jnp.array([0.5, 0.3, 0.2])
  np.testing.assert_allclose(residual(p, p + jnp.array([1e-5, 0, -1e-5])), [0, 0, 1], atol=1e-3)


@pytest.mark.parametrize("case", golden_cases("", "residual_dist"))
def test_golden_residual(case):
  """Kills: |p - q|, an unnormalised residual, 0 / 0 where p equals q."""
  inputs, outputs = np.load(GOLDEN / case / "inputs.npz"), np.load(GOLDEN / case / "outputs.npz")
  actual = jax.jit(residual)(inputs["residual_target_probs"], inputs["residual_draft_probs"])
  np.testing.assert_allclose(actual, outputs["residual_dist"], atol=1e-6)


@pytest.mark.parametrize("words", [None, WORDS])
def test_one_slot_gives_back_the_target_exactly(words):
  """Kills: acceptance plus residual that is not p, by summing over every draft rather than by statistics."""
  logits, proposal = random_proposal(words)
  drafted = np.arange(VOCABULARY) if words is None else np.array(words)

  @jax.jit
  def pieces(logits, proposal):
    """p, p(x), q(x) with every word of the draft in turn as x, and the residual, all of slot 0."""
    p, zeros = probabilities(logits, make_sampling(1.0)), jnp.zeros(len(logits), jnp.int32)
    repeat = lambda token: proposal.replace(tokens=jnp.full_like(proposal.tokens, token))
    with_draft = lambda token: drafted_probs(p, repeat(token))
    p_x, q_x = jax.vmap(with_draft, out_axes=1)(jnp.int32(drafted))
    kept = (q_x * accept_prob(p_x, q_x))[..., 0]
    return p[:, 0], q_x[..., 0], kept, next_probs(p, proposal, zeros, zeros + BLOCK)

  p, q_x, kept, rejected = map(np.asarray, pieces(logits, proposal))
  np.testing.assert_array_equal(q_x, proposal.probs[:, 0])
  emitted = (1 - kept.sum(1, keepdims=True)) * rejected
  emitted[:, drafted] += kept
  np.testing.assert_allclose(emitted, p, atol=1e-6)


def test_greedy_follows_argmax_and_builds_no_softmax():
  """Kills: greedy that goes through probabilities over V, or that keeps drafts after the first mismatch."""
  logits, proposal = random_proposal()
  best = logits.argmax(-1)
  tokens = np.int32(best[:, :BLOCK])
  expected = np.arange(len(tokens)) % (BLOCK + 1)
  for row, n in enumerate(expected):
    tokens[row, n:n + 1] = (tokens[row, n:n + 1] + 1) % VOCABULARY
  proposal = proposal_of(tokens, None)
  run = lambda logits: verify(logits, proposal, make_sampling(0.0), accept_keys=None, bonus_keys=None)
  verdict = run(logits)
  np.testing.assert_array_equal(verdict.n_accept, expected)
  np.testing.assert_array_equal(verdict.next_token, best[np.arange(len(best)), expected])
  assert " exp " not in str(jax.make_jaxpr(run)(logits))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lengths_cut_the_prefix(temperature):
  """Kills: a cut treated as a rejection (residual instead of p), or a draft kept beyond the cut."""
  logits, proposal = random_proposal()
  if temperature == 0:
    right = np.int32(logits.argmax(-1)[:, :BLOCK])
    wrong = np.arange(64)[:, None] % 5 == np.arange(BLOCK)
    proposal = proposal_of(np.where(wrong, (right + 1) % VOCABULARY, right), None)

  @jax.jit
  def verdicts(keys):
    sampling = make_sampling(temperature)
    run = partial(verify, logits, proposal, sampling, accept_keys=keys[0], bonus_keys=keys[1])
    cuts = jax.vmap(lambda length: run(lengths=jnp.full(64, length, jnp.int32)))(jnp.arange(BLOCK + 1))
    p = jnp.swapaxes(probabilities(logits, sampling), 0, 1)
    return run(), cuts, jax.vmap(draw, (None, 0))(keys[1], p)

  whole, cuts, from_p = jax.tree.map(np.asarray, verdicts(jax.random.split(jax.random.key(9), (2, 64))))
  lengths = np.arange(BLOCK + 1)[:, None]
  np.testing.assert_array_equal(cuts.n_accept, np.minimum(whole.n_accept, lengths))
  expected = np.where(cuts.n_accept == lengths, from_p, whole.next_token)
  np.testing.assert_array_equal(cuts.next_token, expected)
  assert set(whole.n_accept) == set(range(BLOCK + 1))


@pytest.mark.parametrize("setting", [(0.0,), (1.0,)])
def test_nan_logits_are_rejected_and_show(setting):
  """Kills: NaN read as token 0, where drafts of 0 are then all accepted."""
  logits, proposal = random_proposal()
  proposal = proposal.replace(tokens=np.zeros((64, BLOCK), np.int32))
  keys = jax.random.split(jax.random.key(9), 64)
  nan = np.full(logits.shape, np.nan, np.float32)
  verdict = jax.tree.map(
    np.asarray, verify(nan, proposal, make_sampling(*setting), accept_keys=keys, bonus_keys=keys))
  assert not verdict.n_accept.any() and (verdict.next_token == VOCABULARY).all()


@pytest.mark.parametrize("setting", [(0.0,), (1.0,)])
def test_an_empty_block_is_plain_decoding(setting):
  """Kills: a round without a drafter (G = 0) that fails, or that draws from anything but p."""
  logits, _ = random_proposal()
  logits, keys = logits[:, :1], jax.random.split(jax.random.key(9), 64)
  empty = proposal_of(np.zeros((64, 0), np.int32), np.zeros((64, 0, VOCABULARY), np.float32))
  verdict = verify(logits, empty, make_sampling(*setting), accept_keys=keys, bonus_keys=keys)
  kept, stopped = jax.jit(cut_at_stop)(empty.tokens, verdict.n_accept, np.full((64, 1), 3, np.int32))
  from_p = draw(keys, probabilities(logits, make_sampling(*setting))[:, 0])
  np.testing.assert_array_equal(verdict.next_token, from_p)
  assert not np.asarray(kept).any() and not np.asarray(stopped).any()


@pytest.mark.parametrize("stop_ids, kept, stopped", [
  ([(9, 8, -1)] * 4, [2, 1, 3, 1], [True, False, False, True]), ([(-1,)] * 4, [3, 1, 3, 2], [False] * 4),
  ([()] * 4, [3, 1, 3, 2], [False] * 4),
  ([(-1, -1), (4, -1), (5, 9), (9, 1)], [3, 1, 3, 2], [False, True, True, True])])
def test_stop_tokens(stop_ids, kept, stopped):
  """Kills: a stop token among rejected drafts ending the row, -1 that matches, the last of several stops, a stop token
  of another row."""
  tokens, ids = np.int32([[4, 9, 9], [4, 9, 9], [4, -1, 5], [8, 9, 1]]), np.array(stop_ids, np.int32)
  found = jax.jit(cut_at_stop)(tokens, np.int32([3, 1, 3, 2]), ids)
  np.testing.assert_array_equal(found[0], kept)
  np.testing.assert_array_equal(found[1], stopped)


# The text's law: a random table from each token to the logits of the next; the draft's table is a noisy copy.
TABLE = 1.5 * jax.random.normal(jax.random.key(100), (VOCABULARY, VOCABULARY))
DRAFT_TABLE = TABLE + 0.8 * jax.random.normal(jax.random.key(101), (VOCABULARY, VOCABULARY))


def propose(keys, uniforms, anchor, sampling, words, mutant):
  """Drafts by the draft table. uniforms: f32[B,G] of the acceptance test, for the mutant that shares them."""
  def one_slot(previous, noise):
    slot_keys, uniform = noise
    logits = DRAFT_TABLE[previous] if words is None else DRAFT_TABLE[previous][:, words]
    q = probabilities(logits, sampling)
    tempered = jax.nn.softmax(0.6 * jnp.log(q), axis=-1)
    column = draw(slot_keys, jnp.where(mutant == MUTANTS["tempered draft"], tempered, q))
    by_uniform = jnp.sum(jnp.cumsum(q, axis=-1) < uniform[:, None], axis=-1)
    column = jnp.where(mutant == MUTANTS["shared noise"], by_uniform, column)
    column = jnp.where(mutant == MUTANTS["greedy draft"], jnp.argmax(q, axis=-1).astype(jnp.int32), column)
    token = column if words is None else words[column]
    return token, (token, q)

  # A scan, as everything here that is not a loop is compiled once per slot.
  _, (tokens, probs) = jax.lax.scan(one_slot, anchor, (split_keys(keys, BLOCK), uniforms.T))
  return proposal_of(tokens.T, jnp.swapaxes(probs, 0, 1), words)


@jax.jit
def speculate(keys, anchor, sampling, words, lengths, mutant):
  """One round per row: drafts i32[B,G], their verdict. mutant: i32[], traced: all share one compile."""
  draft_keys, accept_keys, bonus_keys = split_keys(keys, 3)
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (BLOCK,)))(accept_keys)  # what verify will use
  proposal = propose(draft_keys, uniforms, anchor, sampling, words, mutant)
  logits = TABLE[jnp.concatenate([anchor[:, None], proposal.tokens], axis=1)]
  if words is not None:
    inside = jnp.full_like(logits, -jnp.inf).at[..., words].set(logits[..., words])
    logits = jnp.where(mutant == MUTANTS["renormalised teacher"], inside, logits)
  verdict = verify(
    logits, proposal, sampling, accept_keys=accept_keys, bonus_keys=bonus_keys, lengths=lengths)
  p = probabilities(logits, sampling)[jnp.arange(ROWS), verdict.n_accept]
  from_p = jnp.where(mutant == MUTANTS["bonus from p"], draw(bonus_keys, p), verdict.next_token)
  return proposal.tokens, verdict.replace(next_token=from_p)


def alarm_level(sampling, words, per_row, mutant=None):
  """p-value of the chi-square of the first two emitted tokens of ROWS texts against the target's law."""
  words = None if words is None else np.int32(words)
  rows = np.arange(ROWS, dtype=np.int32)
  lengths = rows % (BLOCK + 1) if per_row else np.full_like(rows, BLOCK)
  first_keys, second_keys = jax.random.split(jax.random.key(7), (2, ROWS))
  run = lambda keys, anchor: jax.tree.map(
    np.asarray, speculate(keys, anchor, sampling, words, lengths, np.int32(MUTANTS[mutant])))
  drafts, verdict = run(first_keys, np.zeros_like(rows))
  first = np.where(verdict.n_accept > 0, drafts[:, 0], verdict.next_token)
  # A row that kept nothing has one token so far: its second comes from the next round.
  later, later_verdict = run(second_keys, first)
  second = np.where(later_verdict.n_accept > 0, later[:, 0], later_verdict.next_token)
  second = np.where(verdict.n_accept > 0, verdict.next_token, second)
  second = np.where(verdict.n_accept > 1, drafts[:, 1], second)

  law = np.asarray(probabilities(TABLE, sampling), np.float64)
  expected = (law[0][:, None] * law).ravel() * ROWS
  observed = np.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
  return chi_square(observed, expected)


def chi_square(observed, expected):
  if observed[expected == 0].any():
    return 0.0
  order = np.argsort(expected)
  # The rarest cells are pooled until they expect 5 together and every other cell does alone.
  pooled = max(np.sum(expected < 5), np.searchsorted(np.cumsum(expected[order]), 5) + 1)
  groups = [order[:pooled], *order[pooled:, None]]
  observed = np.array([observed[group].sum() for group in groups])
  expected = np.array([expected[group].sum() for group in groups])
  return stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(groups) - 1)


@pytest.mark.parametrize("per_row", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("words", [None, WORDS], ids=["all", "reduced"])
@pytest.mark.parametrize("setting", thorough_but([(0.7, 8, 0.95)], [], [(0.7,), (1.0,), (0.7, 8, 0.95), (1.0, 6, 0.9)]))
def test_emitted_text_follows_the_target(setting, words, per_row):
  """Kills: the mutants below, columns taken for tokens, and a residual over the draft's words only.

  16 chi-squares at 1e-6 each: a correct sampler fails any of them with probability 2e-5.
  """
  assert alarm_level(make_sampling(*setting), words, per_row) > ALARM


@pytest.mark.parametrize("mutant, words", [
  ("shared noise", None), ("greedy draft", None), ("bonus from p", None), ("tempered draft", None),
  ("renormalised teacher", WORDS)])
def test_mutants_fail_the_same_test(mutant, words):
  """Kills: a chi-square too weak to see the mistakes that engines really shipped (pitfalls, Sampling)."""
  assert alarm_level(make_sampling(1.0), words, per_row=False, mutant=mutant) < ALARM


@pytest.mark.parametrize("words", [None, WORDS], ids=["all", "reduced"])
def test_first_draft_is_kept_as_often_as_the_overlap(words):
  """Kills: a verify that is lossless since it rejects too much. Six standard deviations: false alarm 2e-9."""
  drafted = slice(None) if words is None else np.array(words)
  words = None if words is None else np.int32(words)
  anchor, keys = np.zeros(ROWS, np.int32), jax.random.split(jax.random.key(7), (2, ROWS))[0]
  _, verdict = speculate(keys, anchor, make_sampling(1.0), words, anchor + BLOCK, np.int32(0))
  p, q = (np.exp(np.asarray(table[0], np.float64)) for table in (TABLE, DRAFT_TABLE))
  overlap = np.minimum((p / p.sum())[drafted], q[drafted] / q[drafted].sum()).sum()
  kept = np.mean(np.asarray(verdict.n_accept) > 0)
  assert abs(kept - overlap) < 6 * np.sqrt(overlap * (1 - overlap) / ROWS)
