"""Distributions against goldens and a NumPy reference that sorts; draws against zeros and a chi-square. All of it by
what CPUs and by what TPUs are given."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax import sampling as subject
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import hlo
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.sampling import make_sampling, split_keys
from folders import GOLDEN, golden_cases
from test_targets import compile_as

ROWS, VOCABULARY = 6, 131


@functools.cache
def compiled(name, platform, candidates=subject.CANDIDATES, search=subject._lowest_by_search):
  """A function of `sampling` as a platform is given it. Op by op, a shape would compile dozens of little programs."""
  def traced(*args):
    with pytest.MonkeyPatch.context() as patch:
      compile_as(platform, patch)
      patch.setattr(subject, "CANDIDATES", candidates)
      patch.setattr(subject, "_lowest_by_search", search)
      return getattr(subject, name)(*args)
  return jax.jit(traced)


@pytest.fixture(params=["cpu", "tpu"], autouse=True)
def chip(request, monkeypatch):
  for name in ("argmax", "draw", "probabilities"):
    monkeypatch.setitem(globals(), name, compiled(name, request.param))
  return request.param


@pytest.fixture(scope="module")
def logits():
  return 3 * jax.random.normal(jax.random.key(0), (ROWS, VOCABULARY))


def hugging_face(logits, temperature, top_k, top_p):
  """Temperature, top-k, top-p as the three Hugging Face warpers do it, in float64."""
  logits = np.asarray(logits, np.float64) / temperature
  if top_k:
    logits = np.where(logits < np.sort(logits)[..., -top_k, None], -np.inf, logits)
  order = np.argsort(logits)
  ascending = np.take_along_axis(logits, order, -1)
  weights = np.exp(ascending - ascending[..., -1:])
  cut = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True) <= 1 - top_p
  weights = np.where(cut, 0, weights)
  probs = np.zeros_like(logits)
  np.put_along_axis(probs, order, weights / weights.sum(-1, keepdims=True), -1)
  return probs


@pytest.mark.parametrize("temperature, top_k, top_p", [
  (1.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 20, 0.8), (1.0, 3, 1.0), (1.3, 0, 0.9), (1.0, 0, 0.01),
  (0.5, 500, 0.999)])
def test_probabilities_follow_hugging_face(logits, temperature, top_k, top_p):
  """Kills: top-p before top-k, top-p of unrenormalised mass, the crossing token dropped, k off by one."""
  expected = hugging_face(logits, temperature, min(top_k, VOCABULARY), top_p)
  actual = np.asarray(probabilities(logits, make_sampling(temperature, top_k, top_p)))
  np.testing.assert_array_equal(actual > 0, expected > 0)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("case", golden_cases("", "temperature_probs"))
def test_golden_temperatures(case):
  """Kills: temperature 0 as a division, and a last rather than first argmax at the tie in row 1."""
  inputs, outputs = np.load(GOLDEN / case / "inputs.npz"), np.load(GOLDEN / case / "outputs.npz")
  logits = jnp.asarray(inputs["logits"])
  for temperature, expected in zip(inputs["temperatures"], outputs["temperature_probs"], strict=True):
    np.testing.assert_allclose(probabilities(logits, make_sampling(float(temperature))), expected, atol=1e-6)
  np.testing.assert_array_equal(argmax(logits), outputs["greedy_tokens"])


def test_truncated_with_nothing_cut_is_full():
  """Kills: top_p = 1 that loses the tail to rounding of the summed mass, top_k = 0 taken as "keep none"."""
  # 20000 near-equal tokens: the float32 sum reaches its total well before the last of them.
  logits = 0.01 * jax.random.normal(jax.random.key(2), (2, 20000))
  logits = logits.at[:, 0].set(12.0)
  full = make_sampling(0.7)
  truncated = full.replace(mode="truncated")
  np.testing.assert_array_equal(probabilities(logits, truncated), probabilities(logits, full))


def test_top_k_one_is_greedy(logits):
  """Kills: k off by one, and a greedy mode that is not the limit of the sampled ones."""
  greedy = probabilities(logits, make_sampling(0.0))
  np.testing.assert_array_equal(greedy, np.eye(VOCABULARY)[np.argmax(logits, -1)])
  np.testing.assert_array_equal(probabilities(logits, make_sampling(1.0, top_k=1)), greedy)
  np.testing.assert_array_equal(probabilities(logits, make_sampling(1e-20)), greedy)


def test_rows_with_settings_of_their_own(logits):
  """Kills: a row's setting used for its neighbours; a greedy row that is drawn, or that loses a tie's first token;
  settings laid along the block instead of the rows."""
  settings = [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (0.7, 0, 0.8), (1.0, 20, 0.9), (0.0, 3, 0.5)]
  tied = logits.at[:, 7].set(9.0).at[:, 90].set(9.0)
  block = jnp.stack([logits, tied, logits[::-1]], axis=1)
  mixed, rest = (make_sampling(*zip(*some)) for some in (settings, settings[:2]))
  assert (mixed.mode, rest.mode, make_sampling([0.0, 0.0], 5).mode) == ("truncated", "full", "greedy")
  together = probabilities(block, mixed)
  np.testing.assert_array_equal(probabilities(block[:2], rest), together[:2])
  for row, setting in enumerate(settings):
    alone = probabilities(block[row:row + 1], make_sampling(*setting))
    np.testing.assert_array_equal(together[row:row + 1], alone)
    assert setting[0] or (np.sort(alone)[..., -2:] == [0, 1]).all()


def test_ties_with_the_last_kept_token_are_kept():
  """Kills: a cut that depends on the order of the vocabulary, which a reduced draft vocabulary changes."""
  logits = jnp.float32([2.0, 1.0, 0.0, 1.0])
  for sampling in (make_sampling(1.0, top_k=2), make_sampling(1.0, top_p=0.7)):
    np.testing.assert_array_equal(probabilities(logits, sampling) > 0, [True, True, False, True])


@pytest.mark.parametrize("sampling", [(0.0,), (1.0,), (1.0, 50, 0.9), (1.0, 120, 1.0)])
def test_padded_vocabulary_has_no_mass(logits, sampling):
  """Kills: -inf columns that turn the row into NaN, or that count towards top-k."""
  padded = logits.at[:, 100:].set(-jnp.inf)
  probs = np.asarray(probabilities(padded, make_sampling(*sampling)))
  np.testing.assert_array_equal(probs[:, 100:], 0)
  temperature, top_k, top_p = (*sampling, 0, 1.0)[:3] if len(sampling) == 1 else sampling
  expected = hugging_face(logits[:, :100], temperature or 1e-6, min(top_k, 100), top_p)
  np.testing.assert_allclose(probs[:, :100], expected, atol=1e-6)


def no_search(scaled, *limits):
  return jnp.full(scaled.shape[:-1], -1e-3)


CASES = {  # settings, and whether the last token that stays is among 8 candidates
  "top-k": ((0.7, 5), True), "top-p": ((0.5, 0, 0.6), True), "both": ((0.5, 6, 0.9), True), "neither": ((1.0,), True),
  "wide top-k": ((0.7, 40), False), "wide top-p": ((2.0, 0, 0.95), False), "wide both": ((2.0, 300, 0.9), False),
  "top-p of a wide top-k": ((0.3, 200, 0.5), False), "all": ((1.0, 5000, 1.0), True), "greedy": ((0.0, 3), True)}


@pytest.mark.parametrize("chip", ["cpu", "tpu", "cuda"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_every_platform_cuts_alike(case, chip):
  """Kills: a cut among too few candidates, ties that are no candidates cut off, a row that is searched, or counted
  otherwise, since its neighbour needs the search; a search by digits that is off by one of them."""
  size, few = 600, compiled("probabilities", chip, 8)
  rng = np.random.default_rng(3)
  rows = 3 * rng.normal(size=(4, 2, size)).astype(np.float32)
  rows[1], rows[2, :, 100:120], rows[3, :, :590] = np.round(rows[1]), 12.0, -np.inf  # ties, of more than 8; few tokens
  setting, among = CASES[case]
  found = few(rows, make_sampling(*setting))
  wanted = np.array(compiled("probabilities", "cpu")(rows, make_sampling(*setting)))
  np.testing.assert_array_equal(found > 0, wanted > 0)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=0)
  settings = list(zip(*[(*setting, *(0, 1.0)[len(setting) - 1:]), (2.0, 0, 0.99), (0.7, 0, 0.3), (1.0, 99, 0.7)]))
  # Sums that are added up otherwise hardly ever show: a search that finds nothing but nonsense would.
  unsearched = few if chip != "tpu" or not among else compiled("probabilities", chip, 8, no_search)
  for wide in (np.zeros((3, 2, size), np.float32), np.full((3, 2, size), np.nan, np.float32), rows[1:]):
    together = unsearched(np.concatenate([rows[:1], wide]), make_sampling(*settings))
    np.testing.assert_array_equal(together[0], found[0])


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("chip", ["tpu"], indirect=True)
def test_a_split_vocabulary_stays_where_it_is():
  """Kills: logits that are gathered, padded or sorted on a TPU: shards exchange their maxima, sums and candidates."""
  absent_tpu("v5p:2x2x1")
  from jax.experimental import topologies  # after its surroundings are set
  mesh = jax.sharding.Mesh(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices, "tensor")
  place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  on = lambda x, *axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(*axes))
  rows = on(jax.ShapeDtypeStruct((2, 4, 32000), jnp.float32), None, None, "tensor")
  keys = on(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 4))))
  sampling = jax.tree.map(on, make_sampling([1.0, 0.7], 50, 0.9))

  @jax.jit
  def both(keys, rows, sampling):
    return subject.draw(keys, subject.probabilities(rows, sampling)), subject.argmax(rows)

  text = both.lower(keys, rows, sampling).compile().as_text()
  moved = re.findall(r"= \(?\w+\[([\d,]*)\].*? (?:sort|all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
  sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moved]  # a scalar has none
  assert sizes and max(sizes) <= 8 * 4 * subject.CANDIDATES
  assert "TopK" in text


def test_settings_do_not_recompile(logits):
  """Kills: temperature, top_k or top_p as static values: one compile per user setting."""
  compiled = jax.jit(lambda logits, sampling: subject.probabilities(logits, sampling))
  for setting in ((0.7, 20, 0.8), (1.0, 5, 1.0), (1.5, 0, 0.3)):
    compiled(logits, make_sampling(*setting))
  assert compiled._cache_size() == 1


@pytest.mark.parametrize("size", [1, 17, 1000])
def test_argmax_is_the_first_maximum(size):
  """Kills: chunks joined with the wrong stride, the padding winning, the last of several equal maxima."""
  logits = np.random.default_rng(0).normal(size=(40, 2, size)).astype(np.float32)
  for logits in (logits, np.round(logits), np.minimum(logits, -3)):
    np.testing.assert_array_equal(argmax(logits), np.argmax(logits, -1))


@pytest.mark.parametrize("chip", ["cpu"], indirect=True)
def test_the_first_maximum_of_a_split_vocabulary():
  """Kills: logits that a mesh of CPUs exchanges for the first maximum of each row, or another token than one has."""
  logits = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 4096)), jnp.float32)  # with ties
  with jax.set_mesh(mesh := MeshConfig(data=2, tensor=4).build()):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    split = jax.jit(lambda x: subject.argmax(x)).lower(jax.device_put(logits, where)).compile()
    np.testing.assert_array_equal(split(jax.device_put(logits, where)), np.argmax(logits, -1))
  moved = {op.collective: op.exchanged for op in hlo.Module(split.as_text()).operations() if op.collective}
  assert moved and max(moved.values()) <= 4 * 8


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
@pytest.mark.parametrize("where", [slice(None), 0, 77])
def test_broken_logits_are_no_token(logits, broken, where):
  """Kills: NaN logits read as token 0, which fakes full acceptance (pitfalls, Numerics)."""
  logits = np.array(logits)
  logits[1, where] = broken
  is_broken = np.isnan(broken) or where == slice(None)
  keys = jax.random.split(jax.random.key(0), ROWS)
  for tokens in [argmax(logits)] + [draw(keys, probabilities(logits, make_sampling(*setting)))
                                    for setting in ((0.0,), (1.0,), (1.0, 20, 0.8))]:
    np.testing.assert_array_equal(tokens == VOCABULARY, np.arange(ROWS) == (1 if is_broken else -1))


def test_draw_never_takes_a_zero_and_follows_probs(logits):
  """Kills: log(0 + eps), draws from logits instead of probs, chunk masses of the wrong chunk, times that are no
  exponential ones.

  Chi-square on 2 x 6 x 5000 draws, expected counts >= 5; fixed keys; a correct draw fails with probability 1.2e-5.
  """
  n = 5000
  probs = np.asarray(probabilities(logits, make_sampling(1.0, 40, 0.99)))
  keys = jax.random.split(jax.random.key(5), (n, ROWS))
  tokens = np.asarray(draw(keys, np.broadcast_to(probs, (n, *probs.shape))))
  for row in range(ROWS):
    expected = np.asarray(probs[row], np.float64) * n
    observed = np.bincount(tokens[:, row], minlength=VOCABULARY)
    assert not observed[expected == 0].any()
    small = expected < 5
    expected = np.append(expected[~small], max(expected[small].sum(), 1e-9))
    observed = np.append(observed[~small], observed[small].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2.sf(statistic, expected.size - 1) > 1e-6


def test_a_row_draws_alone(logits):
  """Kills: one key for the batch, so that a request's text depends on its neighbours."""
  probs = probabilities(logits, make_sampling(1.0))
  keys = jax.random.split(jax.random.key(3), ROWS)
  together = draw(keys, probs)
  np.testing.assert_array_equal(draw(keys[::-1], probs[::-1]), together[::-1])
  np.testing.assert_array_equal(draw(keys[2:4], probs[2:4]), together[2:4])


def test_split_keys_are_all_different():
  """Kills: the same noise for two purposes of a round, or for two rows."""
  first, second, third = split_keys(jax.random.split(jax.random.key(0), 5), 3)
  data = np.concatenate([jax.random.key_data(keys) for keys in (first, second, third)])
  assert first.shape == (5,) and len(np.unique(data, axis=0)) == 15


@pytest.mark.parametrize("setting, message", [
  ((-1.0,), "temperature is -1.0"), ((np.nan,), "temperature is nan"), ((np.inf,), "temperature is inf"),
  ((1.0, -1), "top_k is -1"), ((1.0, 2.5), "top_k is 2.5"), ((1.0, 0, 0.0), "top_p is 0.0"),
  ((1.0, 0, 1.5), "top_p is 1.5"), (([1.0, 0.5], 0, [1.0, -0.5]), "top_p is -0.5 in row 1, must be in")])
def test_settings_are_checked(setting, message):
  """Kills: a bad setting that samples silently from something else."""
  with pytest.raises(ValueError, match=message):
    make_sampling(*setting)
