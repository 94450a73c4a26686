"""Caches: windows written and rows inserted as brute force does it, and what the TPU compiler makes of both."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.drafters.dspark import DSpark, DSparkConfig
from dspark_jax.nn.cache import Full
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.sampling import make_sampling
from dspark_jax.targets.decoder import Decoder, TargetConfig, stack_layers
from dspark_jax.types import Committed
from folders import slow_but, thorough_but
from test_drafters import KINDS, small_drafter
from test_targets import LAYOUTS, close, extend, random_tokens, small_target

SPEC = BlockSpec(256, 512, 16, 8, 128, 1e-6, 1e4, qk_norm=True)  # heads of 128, as the models have that TPUs run
TARGET = TargetConfig("qwen3", SPEC, 3, 512, True, 4096)
DRAFTER = DSparkConfig(spec=SPEC, num_layers=2, vocab_size=512, num_target_layers=3, taps=(0, 1), mask_token_id=511,
                       markov_rank=8)


@pytest.mark.parametrize("stacked", [0, 3])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_are_written_where_they_belong(layout, stacked, batch):
  """Kills: a window at another row's length, in another layer, or in the next axis; keys that lie like values."""
  rng = np.random.default_rng(0)
  cache = Full.empty(batch, 2, 8, 4, jnp.float32, layout=layout, stacked=stacked)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  cache = cache.replace(k=fill(cache.k), v=fill(cache.v))
  k, v = (jnp.asarray(rng.normal(size=(batch, 3, 2, 4)), jnp.float32) for _ in range(2))
  start = jnp.asarray([5, 0, 2][:batch], jnp.int32)
  at = cache.replace(layer=jnp.int32(1)) if stacked else cache
  after = jax.jit(Full.write)(at, k, v, start)
  rows = lambda x, columns: np.array(np.swapaxes(x, -1, -2) if columns else x)
  for old, new, rows_in, columns in ((cache.k, after.k, k, layout == "columns"), (cache.v, after.v, v, False)):
    wanted = rows(old, columns)
    for row in range(batch):
      for t in range(3):
        (wanted[1] if stacked else wanted)[row, :, start[row] + t] = rows_in[row, t]
    np.testing.assert_array_equal(rows(new, columns), wanted)
  seen = after.context().alone()
  np.testing.assert_array_equal(seen.v, after.v[1] if stacked else after.v)
  np.testing.assert_array_equal(seen.k, after.k[1] if stacked else after.k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_can_be_donated(layout):
  """Kills: one array that stands for keys and values, or for two layers: a program that updates it in place refuses
  it."""
  target = LAYOUTS[layout](small_target("qwen3"))
  drafter = small_drafter(target)
  caches = target.init_cache(2, 16), drafter.init_state(target, 2, 16)
  moved = jax.jit(lambda caches: jax.tree.map(lambda x: x + 1, caches), donate_argnums=0)(caches)
  assert jax.tree.structure(moved) == jax.tree.structure(caches)
  assert all(x.is_deleted() for x in jax.tree.leaves(caches))


@pytest.mark.parametrize("layout", slow_but(["scanned"], LAYOUTS))
def test_an_inserted_row_goes_on_as_it_would_have_alone(layout):
  """Kills: a layer axis taken for rows, a length left behind, a neighbour that is touched."""
  target, tokens = LAYOUTS[layout](small_target("qwen3")), random_tokens(3, 10)
  fresh = random_tokens(1, 6, seed=9)

  def after(prompts, capacity, n):
    _, cache = extend(target, prompts, target.init_cache(len(prompts), capacity))
    return target.commit(cache, jnp.asarray(n, jnp.int32))

  cache = after(tokens[:, :6], 16, [6, 4, 3])
  one = after(fresh[:, :5], 8, [5])  # fewer slots than the seat has
  both = jax.jit(type(target).insert)(target, cache, jnp.int32(1), one)
  more = random_tokens(3, 2, seed=4)
  got, _ = extend(target, more, both)
  kept, _ = extend(target, more, cache)
  alone, _ = extend(target, more[1:2], one)
  close(got[1], alone[0])
  np.testing.assert_array_equal(got[np.array([0, 2])], kept[np.array([0, 2])])
  assert jax.tree.structure(both) == jax.tree.structure(cache)


@pytest.mark.parametrize("layout", slow_but(["scanned"], LAYOUTS))
def test_what_is_cut_off_is_gone(layout):
  """Kills: a NaN behind a row's end, which a seat's next request would read (0 * NaN); a neighbour that is touched."""
  target, tokens = LAYOUTS[layout](small_target("qwen3")), random_tokens(3, 6)
  _, cache = extend(target, tokens, target.init_cache(3, 16))
  cache = target.commit(cache, jnp.asarray([6, 6, 6], jnp.int32))
  spoiled = target.commit(jax.tree.map(lambda x: x * jnp.nan if x.ndim > 1 else x, cache), jnp.zeros(3, jnp.int32))
  spoiled = jax.jit(type(target).insert)(target, cache, jnp.int32(1), target.take(spoiled, jnp.int32(1)))
  kept = jax.jit(type(target).insert)(target, spoiled, jnp.int32(1), target.take(cache, jnp.int32(1)))
  for before, n in ((spoiled, 0), (kept, 4)):
    after = jax.jit(type(target).cut)(target, before, jnp.int32(1), jnp.int32(n))
    (out, _), (wanted, _) = (extend(target, tokens[:, n:], of) for of in (
        after, target.commit(cache, jnp.asarray([0, n - 6, 0], jnp.int32))))
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("kind", thorough_but([], ["vanilla", "mtp"], KINDS))
def test_an_inserted_draft_goes_on_as_it_would_have_alone(kind):
  """Kills: a part of a drafter's state that has no row axis, or is forgotten when a request takes a seat."""
  target = small_target("qwen3")
  drafter, tokens = small_drafter(target, kind), random_tokens(3, 5)

  @jax.jit
  def read(tokens, n):
    state = drafter.init_state(target, tokens.shape[0], 16)
    out, _ = target(tokens[:, :4], target.init_cache(tokens.shape[0], 16), drafter.taps)
    return drafter.absorb(target, state, Committed(out, tokens[:, 1:], n))

  @jax.jit
  def drafted(state, anchor):
    keys = jax.vmap(jax.random.key)(jnp.arange(anchor.shape[0]))
    return drafter.propose(target, drafter.head(target), state, anchor, keys, make_sampling(0.0)).logits

  state, one = read(tokens, jnp.asarray([4, 2, 3])), read(random_tokens(1, 5, seed=7), jnp.asarray([3]))
  anchor = jnp.asarray([1, 2, 3], jnp.int32)
  got = drafted(jax.jit(drafter.insert)(state, jnp.int32(1), one), anchor)
  close(got[1], drafted(one, anchor[1:2])[0])
  np.testing.assert_array_equal(got[np.array([0, 2])], drafted(state, anchor)[np.array([0, 2])])


def copied(text):
  """Elements of what every copy, transpose and reshape in optimized HLO moves from the chip's main memory to itself.

  Between main and fast memory, S(1), is no copy: it is how a cache is read, and how a small one is written.
  """
  array = r"\w+\[([\d,]*)\]\{([^}]*)\}"
  found = re.findall(rf"= \(?{array}(?:, {array})?.*? (?:copy|copy-start|reshape|transpose)\(", text)
  return [int(np.prod([int(n) for n in dims.split(",") if n]))
          for dims, there, _, here in found if "S(1)" not in there + here]


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
@pytest.mark.parametrize("rows, new", [(1, 8), (8, 8), (1, 1), (8, 1), (32, 1)])
@pytest.mark.parametrize("capacity", [2048, 2240])
def test_the_tpu_compiler_writes_in_place(topology, rows, new, capacity):
  """Kills: a cache that is laid out anew in every layer (keys as columns, at multiples of 128 slots) or in every plain
  step (one new token, from 16 rows on), an index per element of what is written, and donated caches that are copied at
  the end of a round."""
  place = absent_tpu(topology)
  on = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=place), tree)
  target = on(jax.eval_shape(lambda: stack_layers(Decoder(TARGET, rngs=nnx.Rngs(0)))))
  drafter = on(jax.eval_shape(lambda: DSpark(DRAFTER, rngs=nnx.Rngs(0))))

  def one_round(target, drafter, caches, tokens, n):
    cache, state = caches
    hidden = drafter.draft(target.embed(tokens[:, 1:]), state.cache, target.kernels) if new > 1 else None
    out, cache = target(tokens, cache, drafter.taps)
    state = drafter.absorb(target, state, Committed(out, tokens, n))
    return (target.commit(cache, n), state), target.head()(out.hidden).argmax(-1), hidden

  caches = on(jax.eval_shape(lambda t, d: (t.init_cache(rows, capacity), d.init_state(t, rows, capacity)),
                             target, drafter))
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
  compiled = jax.jit(one_round, donate_argnums=2).lower(target, drafter, caches, ints(rows, new), ints(rows)).compile()
  layer = rows * SPEC.num_kv_heads * capacity * SPEC.head_dim
  assert max(copied(compiled.as_text()), default=0) < layer
  # A scatter of windows becomes updates in place, one of elements stays.
  assert not re.findall(r" scatter\(", compiled.as_text())
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)]
  assert compiled.memory_analysis().alias_size_in_bytes >= sum(sizes)
