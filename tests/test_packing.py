"""Packed tokens say what rows say, and no row learns of another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dspark_jax
from dspark_jax.nn.packing import Chosen, Packing
from folders import LLAMA, QWEN3, slow_but, thorough_but

CAPACITY = 48


@functools.cache
def target_of(case, scanned):
  return dspark_jax.load_target({"qwen3": QWEN3, "llama": LLAMA}[case], scanned=scanned)


# Op by op, six layers of little programs would compile.
read = jax.jit(lambda target, tokens, cache, taps: target(tokens, cache, taps), static_argnums=3)


def prompted(target, lengths, taps, seed=0):
  """A cache of rows with so many tokens each."""
  rng = np.random.default_rng(seed)
  tokens = jnp.asarray(rng.integers(0, target.vocab_size, (len(lengths), max(lengths))), jnp.int32)
  cache = target.init_cache(len(lengths), CAPACITY)
  return target.commit(read(target, tokens, cache, taps)[1], jnp.asarray(lengths, jnp.int32))


def slots(cache, row, count):
  """Keys and values of a row's first slots, of all layers."""
  one = cache.take(jnp.int32(row))
  keys = [jnp.moveaxis(x.k, -1, -2) if x.layout == "columns" else x.k for x in one.layers]
  return np.stack([np.asarray(x[..., :count, :]) for layer, k in zip(one.layers, keys) for x in (k, layer.v)])


@pytest.mark.parametrize("scanned", thorough_but([True], [], [False, True]))
@pytest.mark.parametrize("case", slow_but(["qwen3"], ["qwen3", "llama"]))
def test_packed_says_what_rows_say(case, scanned):
  """Kills: a token at another's position, keys in another's slot, a bucket's padding that is written."""
  target, taps = target_of(case, scanned), (0,)
  lengths = np.array([3, 1, 0, 4, 2])
  cache = prompted(target, [7, 3, 9, 1, 12], taps)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, target.vocab_size, (5, 4)), jnp.int32)
  want, full = read(target, tokens, cache, taps)

  @jax.jit
  def packed(tokens, cache, lengths):
    packing = Packing(Chosen.of(lengths, 13, 4), None, 4)
    out, cache = target(packing.join(tokens, None), cache, taps, packing)
    return jax.tree.map(packing.rows, out), cache

  got, after = packed(tokens, cache, jnp.asarray(lengths, jnp.int32))
  for row, n in enumerate(lengths):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(mine[row, :n], theirs[row, :n], rtol=1e-4, atol=2e-5)
    committed = int(cache.length[row])
    np.testing.assert_allclose(slots(after, row, committed + n), slots(full, row, committed + n), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_every_packing_of_a_few_rows():
  """Kills: an order or a padding that is wrong for some lengths only. All lengths of 3 rows of 3 tokens, by hand."""
  for lengths in np.ndindex(4, 4, 4):
    total = sum(lengths)
    for size in {max(total, 1), total + 2}:
      chosen = jax.tree.map(np.asarray, Chosen.of(jnp.asarray(lengths, jnp.int32), size, 3))
      want = [(row, step) for row, n in enumerate(lengths) for step in range(n)]
      assert list(zip(chosen.row, chosen.step))[:total] == want
      for row, n in enumerate(lengths):
        assert [want[i] for i in chosen.place[row, :n]] == [(row, step) for step in range(n)]
        assert n == 0 or set(chosen.place[row, n:]) <= {chosen.place[row, n - 1]}
      assert chosen.held.tolist() == [n > 0 for n in lengths]


@pytest.mark.parametrize("packs", thorough_but([True], [], [False, True]))
@pytest.mark.parametrize("scanned", thorough_but([True], [], [False, True]))
def test_a_chunk_beside_the_rows(scanned, packs):
  """A prompt in chunks, each beside other rows' tokens, leaves what it leaves alone. Kills: scratch of the chunk's own
  row that lies on the chunk, a chunk that is written in another row, or that sees another row."""
  target, taps = target_of("qwen3", scanned), (0,)
  cache = prompted(target, [7, 3, 9], taps).cut(jnp.int32(1), jnp.int32(0))
  rng = np.random.default_rng(2)
  prompt = jnp.asarray(rng.integers(0, target.vocab_size, 11), jnp.int32)
  tokens = jnp.asarray(rng.integers(0, target.vocab_size, (3, 4)), jnp.int32)
  alone, filled = read(target, prompt[None], target.init_cache(1, CAPACITY), taps)
  beside, rows_alone = read(target, tokens, cache, taps)

  @jax.jit
  def step(cache, chunk):
    chosen = Chosen.of(jnp.asarray([2, 0, 3], jnp.int32), 6, 4) if packs else None
    packing = Packing(chosen, jnp.int32(1), 4, chunk=8)
    out, cache = target(packing.join(tokens, chunk), cache, taps, packing)
    rows, chunk = packing.split(out.hidden)
    return packing.rows(rows), chunk, cache

  for start, n in ((0, 8), (8, 3)):
    rows, hidden, cache = step(cache, jnp.pad(prompt[start:start + 8], (0, 8 - n)))
    np.testing.assert_allclose(hidden[:n], alone.hidden[0, start:start + n], rtol=1e-4, atol=2e-5)
    for row, k in ((0, 2), (2, 3)):
      np.testing.assert_allclose(rows[row, :k], beside.hidden[row, :k], rtol=1e-4, atol=2e-5)
    cache = target.commit(cache, jnp.asarray([0, n, 0], jnp.int32))
  np.testing.assert_allclose(slots(cache, 1, 11), slots(filled, 0, 11), rtol=1e-4, atol=2e-5)
  np.testing.assert_allclose(slots(cache, 0, 9), slots(rows_alone, 0, 9), rtol=1e-4, atol=2e-5)


def test_a_chunk_copies_no_cache():
  """By the compiler. Kills: a cache that the rows read between what they write and what the chunk writes (temporaries
  of 1.0 of the cache)."""
  target = target_of("qwen3", False)
  cache = jax.eval_shape(lambda: target.init_cache(4, 4096))

  def step(cache, tokens, chunk):
    packing = Packing(None, jnp.int32(1), 1, chunk=8)
    return target(packing.join(tokens, chunk), cache, (), packing)

  tokens = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 1), (8,))]
  memory = jax.jit(step, donate_argnums=0).lower(cache, *tokens).compile().memory_analysis()
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert memory.alias_size_in_bytes >= 0.99 * held and memory.temp_size_in_bytes < held / 4


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_row():
  """Kills: steps past a row's last token that are taken from the next row's: 0 * NaN is NaN in a later round."""
  target = target_of("qwen3", False)
  cache = prompted(target, [5, 6, 4], ())
  broken = cache.replace(layers=tuple(x.replace(v=x.v.at[1].set(jnp.nan)) for x in cache.layers))
  tokens = jnp.ones((3, 4), jnp.int32)
  packing = Packing(Chosen.of(jnp.asarray([2, 2, 0], jnp.int32), 5, 4), None, 4)
  run = jax.jit(lambda tokens, cache: target(packing.join(tokens, None), cache, (), packing))
  out, after = run(tokens, broken)
  assert bool(jnp.isnan(packing.rows(out.hidden)[1]).any())
  for row in (0, 2):
    assert np.isfinite(slots(after, row, CAPACITY)).all()
