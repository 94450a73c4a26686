"""Block verification (arXiv 2403.10444): exactly the target's law, by enumeration; never shorter than the token rule's.

Toy models: three words, blocks of three drafts, next-token tables that depend on the whole text before. `odds` is the
paper's recursion in float64, and all laws are enumerated from it; the code is held to it number by number.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.verify import kept_block, prefix_probs, verify
from dspark_jax.sampling import make_sampling
from dspark_jax.types import Proposal

WORDS, BLOCK = 3, 3
DRAFTS = list(itertools.product(range(WORDS), repeat=BLOCK))


def toy(seed, sharp=1.5):
  """(target, draft): tables of the next word by the words before it, up to BLOCK of them."""
  rng = np.random.default_rng(seed)
  table = lambda: {before: rng.dirichlet(np.ones(WORDS) / sharp)
                   for n in range(BLOCK + 1) for before in itertools.product(range(WORDS), repeat=n)}
  return table(), table()


def odds(target, draft, x, length):
  """(h_i of i = 1..length, residuals S_i and p_i of i = 0..length) of drafts x, by the paper's recursion."""
  p, residual = [1.0], []
  for i in range(length):
    b, q = target[x[:i]], draft[x[:i]]
    residual.append(np.maximum(p[i] * b - q, 0))
    p.append(min(1.0, p[i] * b[x[i]] / q[x[i]]))
  h = []
  for i in range(1, length + 1):
    s = residual[i].sum() if i < length else 0
    h.append(p[i] if i == length else 0.0 if s + 1 - p[i] <= 0 else s / (s + 1 - p[i]))
  return h, residual, p


def outcomes(target, draft, x, length, block=True):
  """(drafts kept, law of the token after them, probability) of each outcome for drafts x."""
  if block:
    h, residual, _ = odds(target, draft, x, length)
    for kept in range(length + 1):
      chance = (h[kept - 1] if kept else 1.0) * np.prod([1 - later for later in h[kept:]])
      if chance > 0:
        yield kept, target[x[:kept]] if kept == length else residual[kept] / residual[kept].sum(), chance
    return
  chance = 1.0
  for i in range(length):
    b, q = target[x[:i]], draft[x[:i]]
    keep = min(1.0, b[x[i]] / q[x[i]])
    if keep < 1:
      rest = np.maximum(b - q, 0)
      yield i, rest / rest.sum(), chance * (1 - keep)
    chance *= keep
  yield length, target[x[:length]], chance


def law(target, draft, cut, block=True):
  """(the joint law of BLOCK + 1 tokens [WORDS,...], drafts kept on average). cut: drafts -> how many are verified."""
  joint, mean = np.zeros((WORDS,) * (BLOCK + 1)), 0.0
  for x in DRAFTS:
    weight = np.prod([draft[x[:i]][x[i]] for i in range(BLOCK)])
    for kept, following, chance in outcomes(target, draft, x, cut(x), block):
      mean += weight * chance * kept
      for word in range(WORDS):
        begun = x[:kept] + (word,)
        for rest in itertools.product(range(WORDS), repeat=BLOCK - kept):
          text = begun + rest
          more = np.prod([target[text[:i]][text[i]] for i in range(kept + 1, BLOCK + 1)])
          joint[text] += weight * chance * following[word] * more
  return joint, mean


def joint_of(target):
  joint = np.zeros((WORDS,) * (BLOCK + 1))
  for text in np.ndindex(*joint.shape):
    joint[text] = np.prod([target[text[:i]][text[i]] for i in range(BLOCK + 1)])
  return joint


CUTS = {"whole": lambda x: BLOCK, "two": lambda x: 2, "none": lambda x: 0,
        "by the drafts before": lambda x: 1 if x[0] == 0 else 2 if x[1] == 1 else 3}


@pytest.mark.parametrize("name", CUTS)
def test_the_recursion_is_lossless(name):
  """By enumeration, 20 random models. Kills: the token rule's residual after a block's acceptance, a cut that h does
  not know of."""
  for seed in range(20):
    target, draft = toy(seed)
    joint, _ = law(target, draft, CUTS[name])
    assert abs(joint - joint_of(target)).sum() / 2 < 1e-12


def test_a_cut_that_looks_at_what_it_cuts_is_not():
  """Kills: an enumeration that cannot fail."""
  target, draft = toy(1)
  joint, _ = law(target, draft, lambda x: 1 if x[1] == 0 else 3)
  assert abs(joint - joint_of(target)).sum() / 2 > 1e-3


def test_never_shorter_than_the_token_rule():
  """And the paper's example: two words, blocks of two, 10/9 -> 11/9. Kills: rules whose names are exchanged."""
  longer = []
  for seed in range(20):
    target, draft = toy(seed)
    (_, block), (_, token) = (law(target, draft, CUTS["whole"], kind) for kind in (True, False))
    assert block >= token - 1e-12
    longer.append(block - token)
  assert max(longer) > 0.05
  b, q = np.array([1 / 3, 2 / 3]), np.array([2 / 3, 1 / 3])
  tables = [{before: one for n in range(3) for before in itertools.product(range(2), repeat=n)} for one in (b, q)]
  means = []
  for block in (False, True):
    means.append(sum(np.prod([q[word] for word in x]) * chance * kept for x in itertools.product(range(2), repeat=2)
                     for kept, _, chance in outcomes(*tables, x, 2, block)))
  np.testing.assert_allclose(means, [10 / 9, 11 / 9])


def test_a_prefix_survives_as_often_whatever_the_cut():
  """P(kept >= i | x_1..x_i) = p_i, over the drafts behind: what a scheduler estimates does not depend on what it
  decides. Kills: an h that counts the cut into the survival of the drafts before it."""
  for seed in range(5):
    target, draft = toy(seed)
    for length in range(1, BLOCK + 1):
      survives = {}
      for x in DRAFTS:
        for n, _, chance in outcomes(target, draft, x, length):
          for i in range(1, n + 1):
            behind = np.prod([draft[x[:j]][x[j]] for j in range(i, BLOCK)])
            survives[x[:i]] = survives.get(x[:i], 0) + behind * chance
      for prefix, got in survives.items():
        *_, p = odds(target, draft, prefix + (0,) * (BLOCK - len(prefix)), len(prefix))
        np.testing.assert_allclose(got, p[-1], atol=1e-12)


def batch(target, draft, words=None):
  """(target_probs f32[B,G+1,V], a proposal) of all blocks of drafts."""
  b = np.array([[target[x[:i]] for i in range(BLOCK + 1)] for x in DRAFTS], np.float32)
  q = np.array([[draft[x[:i]] for i in range(BLOCK)] for x in DRAFTS], np.float32)
  tokens = jnp.asarray(DRAFTS, jnp.int32)
  return jnp.asarray(b), Proposal(tokens, jnp.log(q), jnp.asarray(q), jnp.ones(tokens.shape), words)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_the_code_is_the_recursion(length):
  """Decisions on both sides of every h, and the law of the next token for each number of drafts kept. Kills: h of
  another place, a residual after another prefix, a first rejection that ends the block."""
  for seed in range(3):
    target, draft = toy(seed)
    probs, proposal = batch(target, draft)
    p, q = (np.take_along_axis(np.asarray(x)[:, :BLOCK], np.asarray(proposal.tokens)[..., None], 2)[..., 0]
            for x in (probs, proposal.probs))
    lengths = jnp.full(len(DRAFTS), length, jnp.int32)
    run = lambda uniforms: kept_block(probs, proposal, p, q, jnp.asarray(uniforms, jnp.float32), lengths)
    wanted = [odds(target, draft, x, length) for x in DRAFTS]
    np.testing.assert_allclose(np.exp(prefix_probs(p, q))[:, :length + 1], [p for _, _, p in wanted], rtol=1e-5)
    for i in range(1, length + 1):
      for side in (1 - 1e-3, 1 + 1e-3):
        u = np.full((len(DRAFTS), BLOCK), 2.0)  # nothing else is kept
        u[:, i - 1] = [side * h[i - 1] for h, _, _ in wanted]
        kept, following = run(u)
        for row, (x, (h, residual, _)) in enumerate(zip(DRAFTS, wanted)):
          clear = 1e-4 < h[i - 1] and not (side > 1 and h[i - 1] == 1)
          assert not clear or kept[row] == (i if side < 1 else 0)
          n = int(kept[row])
          if n < length and residual[n].sum() > 1e-4:
            np.testing.assert_allclose(following[row], residual[n] / residual[n].sum(), rtol=2e-3, atol=1e-4)
          elif n == length:
            np.testing.assert_allclose(following[row], target[x[:n]], rtol=1e-5)


def test_a_reduced_vocabulary_counts_the_words_that_it_lacks():
  """Kills: a residual over the draft's words alone."""
  target, draft = toy(3)
  words = jnp.asarray([0, 2], jnp.int32)
  small = {x: np.array([q[0], 0, q[2]]) / (q[0] + q[2]) for x, q in draft.items()}
  probs, proposal = batch(target, small)
  some = np.flatnonzero([1 not in x for x in DRAFTS])
  whole = proposal.replace(tokens=proposal.tokens[some], probs=proposal.probs[some])
  short = whole.replace(probs=whole.probs[..., np.array([0, 2])], words=words)
  p = jnp.take_along_axis(probs[some, :BLOCK], whole.tokens[..., None], 2)[..., 0]
  q = jnp.take_along_axis(whole.probs, whole.tokens[..., None], 2)[..., 0]
  uniforms = jnp.asarray(np.random.default_rng(0).random((len(some), BLOCK)), jnp.float32)
  lengths = jnp.full(len(some), BLOCK, jnp.int32)
  for a, b in zip(kept_block(probs[some], whole, p, q, uniforms, lengths),
                  kept_block(probs[some], short, p, q, uniforms, lengths)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_greedy_rows_and_what_is_not_a_number():
  """At temperature 0 the block rule is the prefix rule, row by row. Kills: NaN that is kept as a token."""
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(400, BLOCK + 1, 5)), jnp.float32)
  tokens = jnp.where(rng.random((400, BLOCK)) < 0.7, jnp.argmax(logits[:, :BLOCK], -1), 0).astype(jnp.int32)
  draft = jax.nn.one_hot(tokens, 5)
  sampling = make_sampling([0.0] * 399 + [1.0])
  keys = jax.random.split(jax.random.key(0), 400)
  judged = jax.jit(verify, static_argnames="rule")
  verdicts = [judged(logits, Proposal(tokens, draft, draft, jnp.ones(tokens.shape), None), sampling, accept_keys=keys,
                     bonus_keys=keys, rule=rule)
              for rule in ("token", "block")]
  np.testing.assert_array_equal(verdicts[0].n_accept[:399], verdicts[1].n_accept[:399])
  np.testing.assert_array_equal(verdicts[0].next_token[:399], verdicts[1].next_token[:399])
  broken = judged(logits.at[:, 1].set(jnp.nan), Proposal(tokens, draft, draft * 0 + 0.2, jnp.ones(tokens.shape), None),
                  make_sampling(1.0), accept_keys=keys, bonus_keys=keys, rule="block")
  assert (broken.next_token == 5).all()
