"""Kernels against the reference, in Pallas' interpreter; split over a mesh; and what the TPU compiler makes of them."""

import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dspark_jax.decoding import generate, session
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.nn import pallas_decode
from dspark_jax.nn.attention import Context, Kernels, Place, at_once, attend, following
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.targets.decoder import Decoder, stack_layers
from dspark_jax.types import Committed
from test_cache import DRAFTER, SPEC, TARGET, copied
from test_drafters import small_drafter
from test_targets import close, small_target

DECODE = Kernels(decode="pallas", interpret=True)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def cached(seed, lengths, *, layers, heads, slots, width):
  """A cache's context of which only slots below a row's length are its own; the others hold what rows left there."""
  stale = np.arange(slots).reshape(-1, 1) >= np.reshape(np.asarray(lengths), (1, -1, 1, 1, 1))
  k, v = (jnp.asarray(np.where(stale, np.float32(1e4), normal(seed + i, layers, len(lengths), heads, slots, width)))
          for i in range(2))
  return Context(k, v, "rows", jnp.int32(layers - 1)) if layers > 1 else Context(k[0], v[0], "rows")


def both(q, k, v, place, context):
  """What the kernel says, and the reference."""
  return [jax.jit(attend)(q, k, v, place.replace(kernels=kernels), context) for kernels in (DECODE, Kernels())]


@pytest.mark.parametrize("lengths, steps, layers, heads, groups, slots, width", [
    ([0, 1, 40], 1, 3, 2, 2, 40, 8),     # a plain step: empty, one, full
    ([16, 7, 33], 4, 1, 1, 3, 40, 16),   # verification; the second step of 16 slots is in part past the cache
    ([0, 70], 256, 2, 1, 1, 330, 8)])    # a prompt of two blocks
def test_causal_blocks_over_a_cache(lengths, steps, layers, heads, groups, slots, width, monkeypatch):
  """Kills: a slot at the length that is seen, or one below it that is not; a neighbour's length, layer or key head; the
  last slots of a cache that is no multiple of a step; queries of a group that are mixed up."""
  monkeypatch.setattr(pallas_decode, "SLOTS", 128 if steps > 128 else 16)
  start = jnp.asarray(lengths, jnp.int32)
  place = following(start, start[:, None] + jnp.arange(steps, dtype=jnp.int32)[None], kernels=Kernels())
  rows = (len(lengths), steps)
  new = [normal(i, *rows, n, width) for i, n in enumerate((heads * groups, heads, heads))]
  seen = place.hi.max((1, 2))  # of a prompt's later blocks, whose context has its earlier ones
  got, wanted = both(*new, place, cached(3, seen, layers=layers, heads=heads, slots=slots, width=width))
  close(got, wanted, atol=1e-5)


def test_blocks_with_ranges_and_masks_of_their_own(monkeypatch):
  """Kills: a range that starts at 0 all the same, a mask of another block, NaN where a block sees nothing."""
  monkeypatch.setattr(pallas_decode, "SLOTS", 16)
  rng = np.random.default_rng(0)
  hi = rng.integers(1, 60, (2, 3, 1)) + np.zeros((2, 3, 4), int)
  lo, own = hi // 2, rng.random((2, 3, 4, 5)) < 0.5
  own[1, 1], hi[1, 1], own[0, 0] = False, lo[1, 1], False
  place = Place(None, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32), jnp.asarray(own), None)
  new = normal(0, 2, 3, 4, 4, 8), normal(1, 2, 3, 5, 2, 8), normal(2, 2, 3, 5, 2, 8)
  got, wanted = both(*new, place, Context(normal(3, 2, 2, 60, 8), normal(4, 2, 2, 60, 8), "rows"))
  assert not np.any(got[1, 1])
  close(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["vanilla", "eagle3"])
def test_texts_are_the_same(kind, monkeypatch):
  """Kills: a drafter that does not follow its target's kernels; a layer's cache in another's place; a prompt, a plain
  step, a verification or a draft that one of both computes otherwise."""
  monkeypatch.setattr(pallas_decode, "SLOTS", 64)
  calls, original = [], pallas_decode.cached_attention
  monkeypatch.setattr(pallas_decode, "cached_attention", lambda q, k, *rest, **how: calls.append(
      (q.shape[3] // 2, k.shape[3], rest[2].shape[0])) or original(q, k, *rest, **how))
  prompts, texts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2]], []
  for kernels in (DECODE, Kernels()):
    target = stack_layers(small_target("qwen3"))
    target.use(kernels)
    drafter = small_drafter(target, kind)
    texts.append(session.generate(target, drafter, prompts, max_new_tokens=12, temperature=[0.0, 0.8]))
  assert texts[0].tokens == texts[1].tokens and texts[0].n_accept == texts[1].n_accept
  # (tokens of a block, own rows, layers of the stack): the target's prompt and verification
  assert {(64, 64, 2), (4, 4, 2)} <= set(calls)
  # and the draft: DSpark's block of 3; a recurrent drafter's prompt, its first steps and its later ones
  own = {(3, 3, 1)} if kind == "vanilla" else {(64, 64, 1), (4, 4, 1), (1, 2, 1)}
  assert set(calls) - {(64, 64, 2), (4, 4, 2)} == own


def mesh_of(**sizes):
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize("sizes, rows, heads", [
    (dict(data=2, fsdp=2, tensor=2), ("data", "fsdp"), "tensor"), (dict(data=8), None, None)])
def test_each_device_runs_its_rows_and_heads(sizes, rows, heads):
  """Kills: a kernel that gathers the cache of a mesh, one whose device reads another's heads, and one that refuses rows
  which the mesh does not divide."""
  lengths = jnp.asarray([0, 9, 20, 5], jnp.int32)
  place = at_once(None, jnp.zeros((4, 1, 3), jnp.int32), jnp.broadcast_to(lengths[:, None, None], (4, 1, 3)),
                  kernels=DECODE)
  q, k, v = normal(0, 4, 1, 3, 4, 8), normal(1, 4, 1, 3, 2, 8), normal(2, 4, 1, 3, 2, 8)
  context = cached(3, lengths, layers=2, heads=2, slots=20, width=8)
  wanted = jax.jit(attend)(q, k, v, place.replace(kernels=Kernels()), context)
  with jax.set_mesh(mesh := mesh_of(**sizes)):
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    new = [put(x, rows, None, None, heads) for x in (q, k, v)]
    place = jax.tree.map(lambda x: put(x, rows if x.shape[0] > 1 else None), place)
    context = context.replace(**{name: put(getattr(context, name), None, rows, heads) for name in "kv"})
    compiled = jax.jit(attend).lower(*new, place, context).compile()
    close(compiled(*new, place, context), wanted, atol=1e-5)
  text = compiled.as_text()
  assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_heads_that_a_mesh_does_not_divide_are_refused():
  """Kills: a cache that every device reads whole, without a word."""
  place = at_once(None, *[jnp.zeros((1, 1, 1), jnp.int32)] * 2, kernels=DECODE)
  new = [normal(i, 1, 1, 1, 2, 8) for i in range(3)]
  with jax.set_mesh(mesh_of(tensor=4)), pytest.raises(ValueError, match="2 key heads cannot be split over 4 devices"):
    jax.jit(attend)(*new, place, Context(normal(3, 1, 2, 20, 8), normal(4, 1, 2, 20, 8), "rows"))


def test_what_does_not_suit_is_refused():
  """Kills: a kernel that another name, layout or width of heads gets in silence."""
  with pytest.raises(ValueError, match="decode is 'cudnn', expected reference or pallas"):
    Kernels(decode="cudnn")
  target = small_target("qwen3")  # heads of 6
  with pytest.raises(ValueError, match="the model's are columns"):
    target.use(DECODE)
  scanned = stack_layers(target)
  with pytest.raises(ValueError, match="the model's are 6 wide"):
    scanned.use(Kernels(decode="pallas"))
  assert scanned.kernels == Kernels()
  scanned.use(DECODE)
  assert scanned.kernels == DECODE
