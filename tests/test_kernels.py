"""Kernels against the reference, in Pallas' interpreter; split over a mesh; and what the TPU compiler makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.decoding import session
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.nn import pallas_decode, triton_decode
from dspark_jax.nn.attention import Context, Kernels, Place, at_once, attend, following, sequence
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.targets.decoder import Decoder, stack_layers
from dspark_jax.types import Committed
from test_cache import DRAFTER, SPEC, TARGET, copied
from test_drafters import small_drafter
from test_targets import close, packed, small_target

DECODE = Kernels(decode="pallas", interpret=True)
FILES = {"pallas": pallas_decode, "triton": triton_decode}
both_decode = pytest.mark.parametrize("decode", FILES)
TRAIN = Kernels(train="splash", interpret=True)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def cached(seed, lengths, *, layers, heads, slots, width):
  """A cache's context of which only slots below a row's length are its own; the others hold what rows left there."""
  stale = np.arange(slots).reshape(-1, 1) >= np.reshape(np.asarray(lengths), (1, -1, 1, 1, 1))
  k, v = (jnp.asarray(np.where(stale, np.float32(1e4), normal(seed + i, layers, len(lengths), heads, slots, width)))
          for i in range(2))
  return Context(k, v, "rows", jnp.int32(layers - 1)) if layers > 1 else Context(k[0], v[0], "rows")


def columns(context):
  """The same context, alone, as triton reads it."""
  alone = context.alone()
  return Context(jnp.swapaxes(alone.k, 2, 3), alone.v, "columns")


def both(decode, q, k, v, place, context):
  """What the kernel says, and the reference."""
  read = columns(context) if decode == "triton" else context
  return [jax.jit(attend)(q, k, v, place.replace(kernels=Kernels(name, interpret=True)), seen)
          for name, seen in ((decode, read), ("reference", context))]


@both_decode
@pytest.mark.parametrize("lengths, steps, layers, heads, groups, slots, width", [
    ([0, 1, 40], 1, 3, 2, 2, 40, 8),     # a plain step: empty, one, full
    ([16, 7, 33], 4, 1, 1, 3, 40, 16),   # verification; the second step of 16 slots is in part past the cache
    ([0, 70], 256, 2, 1, 1, 330, 8)])    # a prompt of two blocks
def test_causal_blocks_over_a_cache(decode, lengths, steps, layers, heads, groups, slots, width, monkeypatch):
  """Kills: a slot at the length that is seen, or one below it that is not; a neighbour's length, layer or key head; the
  last slots of a cache that is no multiple of a step; queries of a group that are mixed up; a part of the slots that is
  left out, or taken twice."""
  monkeypatch.setattr(FILES[decode], "SLOTS", 128 if steps > 128 else 16)
  start = jnp.asarray(lengths, jnp.int32)
  place = following(start, start[:, None] + jnp.arange(steps, dtype=jnp.int32)[None], kernels=Kernels())
  rows = (len(lengths), steps)
  new = [normal(i, *rows, n, width) for i, n in enumerate((heads * groups, heads, heads))]
  seen = place.hi.max((1, 2))  # of a prompt's later blocks, whose context has its earlier ones
  got, wanted = both(decode, *new, place, cached(3, seen, layers=layers, heads=heads, slots=slots, width=width))
  close(got, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_shared_memory(width, dtype, monkeypatch):
  """Kills: tiles sized for heads of 128 in bfloat16 alone, which an L4 has no room for in float32, or of 256; smaller
  ones where those fit."""
  found, original = [], triton_decode.pl.pallas_call
  def spied(kernel, *, in_specs, **how):
    found.append((in_specs[2].block_shape[-2], kernel.keywords["step"]))
    return original(kernel, in_specs=in_specs, **how)
  monkeypatch.setattr(triton_decode.pl, "pallas_call", spied)
  one = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  q, bound = one(1, 1, 1, 500, width), one(1, 1, dtype="int32")
  jax.eval_shape(functools.partial(triton_decode.cached_attention, interpret=True), q, q, q,
                 one(1, 1, 500, 500, dtype="bool"), one(1, 1, width, 4096), one(1, 1, 4096, width), bound, bound)
  (rows, slots), size = found[0], jnp.dtype(dtype).itemsize
  # What Triton asked for: queries, keys, values, and the weights of a step (checked against 114,688 and 106,496).
  assert size * (rows * width + 2 * slots * width + rows * slots) <= 101_376 and min(rows, slots) >= 16
  assert width * size > 256 or (rows, slots) == (64, 64)


@both_decode
def test_blocks_with_ranges_and_masks_of_their_own(decode, monkeypatch):
  """Kills: a range that starts at 0 all the same, a mask of another block, NaN where a block sees nothing."""
  monkeypatch.setattr(FILES[decode], "SLOTS", 16)
  rng = np.random.default_rng(0)
  hi = rng.integers(1, 60, (2, 3, 1)) + np.zeros((2, 3, 4), int)
  lo, own = hi // 2, rng.random((2, 3, 4, 5)) < 0.5
  own[1, 1], hi[1, 1], own[0, 0] = False, lo[1, 1], False
  place = Place(None, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32), jnp.asarray(own), None)
  new = normal(0, 2, 3, 4, 4, 8), normal(1, 2, 3, 5, 2, 8), normal(2, 2, 3, 5, 2, 8)
  got, wanted = both(decode, *new, place, Context(normal(3, 2, 2, 60, 8), normal(4, 2, 2, 60, 8), "rows"))
  assert not np.any(got[1, 1])
  close(got, wanted, atol=1e-5)


@pytest.mark.parametrize("decode, kind", [
    pytest.param("pallas", "vanilla", marks=pytest.mark.slow),
    *(pytest.param(*case, marks=pytest.mark.thorough) for case in (("pallas", "eagle3"), ("triton", "vanilla")))])
def test_texts_are_the_same(decode, kind, monkeypatch):
  """Kills: a drafter that does not follow its target's kernels; a layer's cache in another's place; a prompt, a plain
  step, a verification or a draft that one of both computes otherwise."""
  monkeypatch.setattr(FILES[decode], "SLOTS", 64)
  calls, original, layers = [], FILES[decode].cached_attention, 2 if decode == "pallas" else 1
  monkeypatch.setattr(FILES[decode], "cached_attention", lambda q, k, *rest, **how: calls.append(
      (q.shape[3] // 2, k.shape[3], rest[2].shape[0] if layers > 1 else 1)) or original(q, k, *rest, **how))
  prompts, texts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2]], []
  for kernels in (Kernels(decode, interpret=True), Kernels()):
    target = small_target("qwen3") if decode == "triton" else stack_layers(small_target("qwen3"))
    target.use(kernels)
    drafter = small_drafter(target, kind)
    texts.append(session.generate(target, drafter, prompts, max_new_tokens=12, temperature=[0.0, 0.8]))
  assert texts[0].tokens == texts[1].tokens and texts[0].n_accept == texts[1].n_accept
  # (tokens of a block, own rows, layers of the stack): the target's prompt and verification
  assert {(64, 64, layers), (4, 4, layers)} <= set(calls)
  # and the draft: DSpark's block of 3; a recurrent drafter's prompt, its first steps and its later ones
  own = {(3, 3, 1)} if kind == "vanilla" else {(64, 64, 1), (4, 4, 1), (1, 2, 1)}
  assert set(calls) - {(64, 64, layers), (4, 4, layers)} == own


def differentiated(kernels, arrays, call):
  """(what attention says, its gradients in all arrays), the arrays being what call(kernels, *arrays) attends with."""
  weight = normal(9, *arrays[0].shape)

  def loss(arrays):
    out = call(kernels, *arrays)
    # Squared: where a block sees nothing the reference has a gradient only for a slope of 0, as every loss has there.
    return jnp.sum(weight * out ** 2) / 4, out

  (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return out, slopes


def test_sequences_by_splash():
  """Kills: a document that sees the one before it, queries that miss themselves or see what follows, tiles skipped that
  are seen, keys that are repeated or averaged over the heads of a group."""
  rows = packed([150, 133, 77], 384), packed([380], 384)
  segments, positions = (jnp.asarray(np.concatenate(parts)) for parts in zip(*rows))
  real = np.asarray(segments)[..., None, None] > 0
  # Nothing is asked of padding: the reference has it see the padding before it, splash itself alone.
  call = lambda kernels, q, k, v: jnp.where(real, attend(q, k, v, following(
      jnp.zeros(2, jnp.int32), positions, segments, kernels=kernels), sequence(k, v)), 0)
  arrays = normal(0, 2, 384, 4, 8) / 3, normal(1, 2, 384, 2, 8), normal(2, 2, 384, 2, 8)
  got, wanted = (differentiated(kernels, arrays, call) for kernels in (TRAIN, Kernels()))
  close(got[0], wanted[0], atol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-5), got[1], wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sorted", "unsorted, and dummies alone", "columns"])
def test_training_blocks_by_splash(case):
  """Kills: a merge whose second part has no gradient, or one without the gradient of the parts' log-sum-exps; a block
  that sees its anchor or another document; tiles skipped that are seen, where anchors are not sorted; NaN of blocks
  that are none; a row with the ranges of another."""
  rng, (rows, slots, blocks, steps) = np.random.default_rng(1), (2, 384, 200, 3)
  anchors, keep = rng.integers(0, slots, (rows, blocks)), np.ones((rows, blocks), bool)
  if case == "columns":  # a recurrent drafter's: every slot a block of one row, with two keys of its own
    blocks, steps = slots, 1
    anchors, keep = np.broadcast_to(np.arange(slots), (rows, slots)), np.ones((rows, slots), bool)
  elif case == "unsorted, and dummies alone":
    keep[0], keep[1, 150:] = False, False
  elif case == "sorted":
    anchors, keep = np.minimum(np.sort(anchors), 200), np.arange(blocks) < np.array([[180], [200]])
  anchors = np.where(keep, anchors, 0)
  lo = np.where(anchors > 130, 130, 0)[..., None]  # two documents
  lo, hi = (jnp.asarray(np.broadcast_to(x, (rows, blocks, steps)), jnp.int32) for x in (lo, anchors[..., None]))
  own = np.broadcast_to(keep[..., None, None], (rows, blocks, steps, max(steps, 2)))
  call = lambda kernels, q, k, v, far_k, far_v: attend(
      q, k, v, Place(None, lo, hi, jnp.asarray(own), None, kernels), sequence(far_k, far_v))
  arrays = (normal(0, rows, blocks, steps, 4, 8) / 3, *(normal(i, *own.shape[:2], own.shape[3], 2, 8) for i in (1, 2)),
            *(normal(i, rows, slots, 2, 8) for i in (3, 4)))
  got, wanted = (differentiated(kernels, arrays, call) for kernels in (TRAIN, Kernels()))
  assert not np.any(got[0][~keep]) and np.all(np.isfinite(got[0]))
  close(got[0], wanted[0], atol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-5), got[1], wanted[1])


@both_decode
@pytest.mark.parametrize("sizes, rows, heads", [
    (dict(data=2, fsdp=2, tensor=2), ("data", "fsdp"), "tensor"), (dict(data=8), None, None)])
def test_each_device_runs_its_rows_and_heads(decode, sizes, rows, heads):
  """Kills: a kernel that gathers the cache of a mesh, one whose device reads another's heads, and one that refuses rows
  which the mesh does not divide."""
  lengths = jnp.asarray([0, 9, 20, 5], jnp.int32)
  place = at_once(None, jnp.zeros((4, 1, 3), jnp.int32), jnp.broadcast_to(lengths[:, None, None], (4, 1, 3)),
                  kernels=Kernels(decode, interpret=True))
  q, k, v = normal(0, 4, 1, 3, 4, 8), normal(1, 4, 1, 3, 2, 8), normal(2, 4, 1, 3, 2, 8)
  context = cached(3, lengths, layers=2, heads=2, slots=20, width=8)
  wanted = jax.jit(attend)(q, k, v, place.replace(kernels=Kernels()), context)
  context, lead = (columns(context), ()) if decode == "triton" else (context, (None,))
  with jax.set_mesh(mesh := MeshConfig(**sizes).build()):
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    new = [put(x, rows, None, None, heads) for x in (q, k, v)]
    place = jax.tree.map(lambda x: put(x, rows if x.shape[0] > 1 else None), place)
    context = context.replace(**{name: put(getattr(context, name), *lead, rows, heads) for name in "kv"})
    compiled = jax.jit(attend).lower(*new, place, context).compile()
    close(compiled(*new, place, context), wanted, atol=1e-5)
  text = compiled.as_text()
  assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_each_device_trains_on_its_rows_and_heads():
  """Kills: gradients of keys that no device adds up over its queries, or that all devices do; a gathered sequence."""
  hi = 3 * jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32)[None, :, None], (2, 40, 2))
  place = at_once(None, jnp.zeros_like(hi), hi, kernels=TRAIN)
  arrays = (normal(0, 2, 40, 2, 4, 8) / 3, *(normal(i, 2, 40, 2, 2, 8) for i in (1, 2)),
            *(normal(i, 2, 128, 2, 8) for i in (3, 4)))
  weight = normal(9, 2, 40, 2, 4, 8)

  def loss(arrays, kernels):
    *new, far_k, far_v = arrays
    return jnp.sum(weight * attend(*new, place.replace(kernels=kernels), sequence(far_k, far_v)))

  slopes = jax.jit(jax.grad(loss), static_argnums=1)
  wanted = slopes(arrays, Kernels())
  with jax.set_mesh(mesh := MeshConfig(data=2, tensor=2).build()):
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", *[None] * (x.ndim - 3), "tensor")))
    compiled = slopes.lower(jax.tree.map(put, arrays), TRAIN).compile()
    jax.tree.map(functools.partial(close, atol=1e-5), compiled(jax.tree.map(put, arrays)), wanted)
  text = compiled.as_text()
  assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_heads_that_a_mesh_does_not_divide_are_refused():
  """Kills: a cache that every device reads whole, without a word."""
  place = at_once(None, *[jnp.zeros((1, 1, 1), jnp.int32)] * 2, kernels=DECODE)
  new = [normal(i, 1, 1, 1, 2, 8) for i in range(3)]
  with MeshConfig(tensor=4).use(), pytest.raises(ValueError, match="2 key heads cannot be split over 4 devices"):
    jax.jit(attend)(*new, place, Context(normal(3, 1, 2, 20, 8), normal(4, 1, 2, 20, 8), "rows"))


@pytest.mark.parametrize("platform, scanned, kernel, train", [
    ("tpu", True, "pallas", "splash"), ("cuda", False, "triton", "reference"), ("cpu", True, "reference", "reference")])
def test_what_suits_a_platform_and_a_mesh(platform, scanned, kernel, train):
  """Kills: a kernel that nobody named and that the mesh refuses, while a step is compiled; a name that gives way."""
  build = lambda: Decoder(TARGET, rngs=nnx.Rngs(0))
  target = jax.eval_shape(lambda: stack_layers(build()) if scanned else build())
  auto = Kernels("auto", "auto")
  for sizes, wanted in (({}, (kernel, train)), (dict(data=8), (kernel, train)), (dict(tensor=8), (kernel, train)),
                        (dict(tensor=3), ("reference", "reference"))):
    with MeshConfig(**sizes).use():
      target.use(auto, platform)
    assert (target.kernels.decode, target.kernels.train) == wanted, sizes
  if kernel != "reference":
    with MeshConfig(tensor=3).use(), pytest.raises(ValueError, match="8 key heads cannot be split over 3 devices"):
      target.use(Kernels(kernel))


def test_what_does_not_suit_is_refused():
  """Kills: a kernel that another name, layout or width of heads gets in silence."""
  with pytest.raises(ValueError, match="decode is 'cudnn', expected auto, reference, pallas or triton"):
    Kernels(decode="cudnn")
  target = small_target("qwen3")  # heads of 6
  with pytest.raises(ValueError, match="the model's are columns"):
    target.use(DECODE)
  scanned = stack_layers(target)
  for model, decode in ((scanned, "pallas"), (target, "triton")):
    with pytest.raises(ValueError, match="the model's are 6 wide"):
      model.use(Kernels(decode=decode))
  with pytest.raises(ValueError, match="triton reads caches of columns, the model's are rows"):
    scanned.use(Kernels(decode="triton", interpret=True))
  assert scanned.kernels == Kernels()
  scanned.use(DECODE)
  assert scanned.kernels == DECODE
  place = following(jnp.zeros(1, jnp.int32), jnp.arange(100, dtype=jnp.int32)[None], kernels=TRAIN)
  new = [normal(i, 1, 100, 2, 8) for i in range(3)]
  with pytest.raises(ValueError, match="a multiple of 128 tokens, at most 32768, got 100"):
    attend(*new, place, sequence(*new[1:]))


def compiled_for(topology, function, *args, **how):
  """What the TPU compiler makes of function; args: trees of shapes, of which float32 becomes bfloat16."""
  place = absent_tpu(topology)
  on = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype, sharding=place)
  return jax.jit(function, **how).lower(*jax.tree.map(on, args)).compile()


shapes = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology, rows, new, capacity", [
    ("v5p:2x2x1", 8, 8, 2112), ("v5e:2x2", 32, 1, 2048), ("v6e:2x2", 1, 256, 2240), ("v5e:2x2", 1, 256, 2048)])
def test_the_tpu_compiler_gives_the_kernel_its_cache(topology, rows, new, capacity):
  """Kills: a layer's cache that is copied for the kernel, a stack that is copied for the next layer's write, and blocks
  that do not fit the fast memory of a chip."""
  target = jax.eval_shape(lambda: stack_layers(Decoder(TARGET, rngs=nnx.Rngs(0))))
  target.use(Kernels(decode="pallas"))
  drafter = jax.eval_shape(lambda: DSpark(DRAFTER, rngs=nnx.Rngs(0)))

  def one_round(target, drafter, caches, tokens, n):
    cache, state = caches
    hidden = drafter.draft(target.embed(tokens[:, 1:]), state.cache, target.kernels) if new == 8 else None
    out, cache = target(tokens, cache, drafter.taps)
    state = drafter.absorb(target, state, Committed(out, tokens, n))
    return (target.commit(cache, n), state), target.head()(out.hidden[:, -1]).argmax(-1), hidden

  caches = jax.eval_shape(lambda t, d: (t.init_cache(rows, capacity), d.init_state(t, rows, capacity)), target, drafter)
  ints = functools.partial(shapes, dtype=jnp.int32)
  compiled = compiled_for(topology, one_round, target, drafter, caches, ints(rows, new), ints(rows), donate_argnums=2)
  layer = rows * SPEC.num_kv_heads * capacity * SPEC.head_dim
  assert "cached_attention" in compiled.as_text()
  assert max(copied(compiled.as_text()), default=0) < layer
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= sum(2 * x.size if x.dtype == jnp.float32 else 0 for x in jax.tree.leaves(caches))
  # No copy hides in a temporary either: what there is are activations, and a prompt's are larger than its cache.
  assert memory.temp_size_in_bytes < (2 * 2 * layer if new < 256 else 40e6)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
def test_the_tpu_compiler_holds_no_scores(topology):
  """Kills: scores of all blocks with a whole sequence, which are 5 GB in training, and tiles that do not fit a chip."""
  blocks, steps, slots = 512, 7, 4096

  def loss(arrays, lo, hi, keep):
    q, k, v, far_k, far_v = arrays
    place = at_once(None, lo, hi, keep, kernels=Kernels(train="splash"))
    return attend(q, k, v, place, sequence(far_k, far_v)).astype(jnp.float32).sum()

  arrays = (shapes(1, blocks, steps, 32, 128), *[shapes(1, blocks, steps, 8, 128)] * 2, *[shapes(1, slots, 8, 128)] * 2)
  bounds = [shapes(1, blocks, steps, dtype=jnp.int32)] * 2
  compiled = compiled_for(topology, jax.grad(loss), arrays, *bounds, shapes(1, blocks, dtype=jnp.bool_))
  assert compiled.memory_analysis().temp_size_in_bytes < 400e6
