"""Targets: goldens, identities of the cache and of packed rows; then the parts: attention, linear, RoPE."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.checkpoints import hf
from dspark_jax.nn import attention, layers
from dspark_jax.nn.layers import BlockSpec, linear
from dspark_jax.nn.rope import rope_table
from dspark_jax.nn.parameters import parameters
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs.compilers import absent_tpu
from dspark_jax.targets import TARGETS, decoder
from dspark_jax.targets.decoder import Decoder, stack_layers
from dspark_jax.text import read_json
from dspark_jax.types import Batch
import folders
from folders import golden_cases, golden_dtype, slow_but

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {"unrolled": lambda target: target, "scanned": stack_layers}
SLOW_GOLDENS = {("target_llama", "unrolled"), ("target_qwen3", "unrolled")}
SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
             rms_norm_eps=1e-6, rope_theta=100.0, num_hidden_layers=2, vocab_size=12)
TAPS = (-1, 0)


def randomised(module, seed):
  """The module with weights of unit gain: at the usual start of std 0.02 layers hardly matter."""
  rng = np.random.default_rng(seed)
  for name, variable in sorted(parameters(module).items()):
    scale = 0.1 if len(variable.shape) == 1 else variable.shape[-1] ** -0.5
    values = rng.normal(size=variable.shape) * scale + name.endswith("norm.weight")
    variable.set_value(jnp.asarray(values, variable.dtype))
  return module


def small_target(family, seed=0, **changes):
  """A random model of a family in TARGETS."""
  family = TARGETS[family]
  config = family.config(SMALL | changes)
  return randomised(nnx.eval_shape(lambda: family.build(config, rngs=nnx.Rngs(0))), seed)


def golden_target(case):
  raw, tensors = hf.read_folder(GOLDEN / case)
  family = TARGETS[raw["model_type"]]
  config = family.config(raw)
  return hf.fill(lambda: family.build(config, rngs=nnx.Rngs(0)), tensors, case, dtype=golden_dtype(case),
                 stored=family.stored)


def packed(lengths, width):
  """(segments, positions), i32[1,width] each: documents of these lengths in one row, then padding."""
  segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
  positions = np.concatenate([np.arange(n) for n in lengths])
  pad = np.zeros(width - len(segments), int)
  return tuple(np.concatenate([x, pad])[None].astype(np.int32) for x in (segments, positions))


def batch_of(tokens, segments=None, positions=None):
  """A training batch, by default of whole rows."""
  steps = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return Batch(tokens, np.ones(tokens.shape, bool), np.ones_like(tokens) if segments is None else segments,
               steps if positions is None else positions)


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape, np.int32)


@functools.partial(jax.jit, static_argnames="taps")
def extend(target, tokens, cache, taps=TAPS):
  """(logits and features of tokens at the end of the cache, the cache with their rows not committed)"""
  out, cache = target(tokens, cache, taps)
  return jnp.concatenate([target.head()(out.hidden), out.features], -1), cache


@jax.jit
def encoded(target, batch):
  out = target.encode(batch, TAPS)
  return jnp.concatenate([target.head()(out.hidden), out.features], -1)


def commit(target, cache, n):
  return target.commit(cache, np.array(n, np.int32))


def close(actual, expected, atol=2e-5):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def compile_as(platform, monkeypatch):
  """What is traced from now on takes the branches of another platform."""
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default=None, **on: on.get(platform, default)(*args))


@pytest.fixture(scope="module", params=LAYOUTS)
def target(request):
  return LAYOUTS[request.param](small_target("qwen3"))


def whole_blocks(length):
  """The length of rows that attention takes instead of this one."""
  block = min(length, attention.QUERY_BLOCK)
  return -(-length // block) * block


# Of a case that comes anew, both layouts are for the fast suite.
@pytest.mark.parametrize("case, layout", [
    pytest.param(case, layout, marks=pytest.mark.slow if (case, layout) in SLOW_GOLDENS else ())
    for case in golden_cases("target_", "hidden_states") for layout in LAYOUTS])
def test_golden_target(case, layout):
  """Kills: any slip in norm, RoPE, head grouping, tying; taps shifted or sorted; layers out of order."""
  target = LAYOUTS[layout](golden_target(case))
  inputs, outputs = (dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))
  length = inputs["input_ids"].shape[1]
  tokens, mask = (np.pad(inputs[name], ((0, 0), (0, whole_blocks(length) - length)))
                  for name in ("input_ids", "attention_mask"))
  dtype = golden_dtype(case)
  taps = tuple(range(target.config.num_layers - 1, -2, -1))  # descending: features keep the order of taps

  @jax.jit
  def both(target):
    outs = target(tokens, target.init_cache(*tokens.shape), taps)[0], target.encode(batch_of(tokens, mask), taps)
    return [(target.head()(out.hidden), out.hidden, out.features) for out in outs]

  for logits, hidden, features in both(target):
    states = np.moveaxis(np.reshape(features, (*tokens.shape, len(taps), -1)), 2, 0)[::-1]
    for name, actual in (("logits", logits), ("last_hidden_state", hidden), ("embedding_output", states[0]),
                         ("hidden_states", states[1:])):
      actual, wanted = (np.asarray(actual, np.float32) * mask[..., None])[..., :length, :], outputs[name]
      close(actual, wanted, atol=1e-4 if dtype == np.float32 else 8 * jnp.finfo(dtype).eps * np.abs(wanted).max())


def test_golden_cases_are_found(tmp_path, monkeypatch):
  """Kills: a list of goldens that a new folder is not on, or that one of a model that we do not read fails."""
  monkeypatch.setattr(folders, "GOLDEN", tmp_path)
  for name, model_type, architecture in (
      ("target_new", "llama", "LlamaForCausalLM"), ("target_other", "gemma3_text", "Gemma3ForCausalLM"),
      ("drafter_new", "qwen3", "Qwen3DSparkModel"), ("drafter_b", "qwen3", "DFlashDraftModel"),
      ("drafter_other", "qwen3", "DFlash2DraftModel"), ("drafter_family", "gemma3_text", "Gemma3DSparkModel")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(dict(model_type=model_type, architectures=[architecture])))
    np.savez(tmp_path / name / "outputs.npz", **{"train/a": np.ones(1)})
  (tmp_path / "target_empty").mkdir()
  (tmp_path / "sampled").mkdir()
  np.savez(tmp_path / "sampled" / "outputs.npz", a=np.ones(1))
  assert golden_cases("target_", "train/a") == ["target_new"] and golden_cases("target_", "a") == []
  assert golden_cases("drafter_", "train/a") == ["drafter_b", "drafter_new"] and golden_cases("", "a") == ["sampled"]


def test_every_golden_case_is_tested():
  """Kills: a case that no test runs, for a key, a file or a family of its config.json that is spelled otherwise."""
  calls = {call for path in GOLDEN.parent.glob("test_*.py")
           for call in re.findall(r'golden_cases(\("[^"]*", "[^"]+"\))', path.read_text())}
  listed = {case for call in calls for case in golden_cases(*ast.literal_eval(call))}
  family = lambda config: read_json(config).get("model_type") if config.is_file() else None
  missing = {folder.name for folder in GOLDEN.iterdir() if folder.is_dir()} - listed
  assert {name for name in missing if family(GOLDEN / name / "config.json") not in folders.NOT_READ} == set()


def test_cache_does_not_care_how_tokens_arrive(target):
  """Kills: positions that restart per call; a block that misses the cache or its own earlier tokens."""
  tokens = random_tokens(2, 8)
  whole, _ = extend(target, tokens, target.init_cache(2, 16))
  close(whole, encoded(target, batch_of(tokens)))
  for step in (4, 1):
    cache, parts = target.init_cache(2, 16), []
    for at in range(0, 8, step):
      part, cache = extend(target, tokens[:, at:at + step], cache)
      cache = commit(target, cache, [step, step])
      parts.append(part)
    close(jnp.concatenate(parts, 1), whole)


def test_padded_rows_equal_each_row_alone(target):
  """Kills: one length for the whole batch; padding that is attended to or committed."""
  tokens, lengths = random_tokens(2, 12), [8, 3]
  prompts = np.where(np.arange(8) < np.array(lengths)[:, None], tokens[:, :8], 0)
  first, cache = extend(target, prompts, target.init_cache(2, 16))
  more = np.stack([tokens[r, n:n + 4] for r, n in enumerate(lengths)])
  second, _ = extend(target, more, commit(target, cache, lengths))
  for row, n in enumerate(lengths):
    alone, _ = extend(target, tokens[row:row + 1], target.init_cache(1, 16))
    close(first[row, :n], alone[0, :n])
    close(second[row], alone[0, n:n + 4])


def test_uncommitted_rows_are_never_read(target):
  """Kills: a rejected draft that stays visible; writes that append behind the rows of the last call."""
  tokens = random_tokens(2, 12)
  whole, _ = extend(target, tokens[:, :8], target.init_cache(2, 16))
  cache = target.init_cache(2, 16)
  garbage = lambda tree: jax.tree.map(lambda x: x + 1e3, tree)
  cache = cache.replace(layers=tuple(one.replace(k=garbage(one.k), v=garbage(one.v)) for one in cache.layers))
  _, cache = extend(target, tokens[:, 4:12], cache)
  cache = commit(target, cache, [0, 0])  # all eight rejected
  first, cache = extend(target, tokens[:, :4], cache)
  _, cache = extend(target, tokens[:, 6:10], commit(target, cache, [4, 2]))  # rejected again
  second, _ = extend(target, np.stack([tokens[0, 4:8], tokens[1, 2:6]]), cache)
  close(first, whole[:, :4])
  close(second[0], whole[0, 4:8])
  close(second[1], whole[1, 2:6])


def test_long_prompts_in_blocks(target, monkeypatch):
  """Kills: a block of the prompt that does not see the blocks before it, or sees its own twice."""
  tokens = random_tokens(1, 256)
  assert attention.QUERY_BLOCK == 128
  cached, _ = extend(target, tokens, target.init_cache(1, 256))
  monkeypatch.setattr(attention, "QUERY_BLOCK", 256)
  whole = jax.jit(lambda *args: encoded.__wrapped__(*args))(target, batch_of(tokens))  # traced anew
  close(cached, whole)


def test_length_must_fit_blocks(target):
  """Kills: a prompt whose last, partial block is dropped or misread."""
  tokens = random_tokens(1, 130)
  with pytest.raises(ValueError, match="multiple of it"):
    target(tokens, target.init_cache(1, 256), TAPS)
  with pytest.raises(ValueError, match="multiple of it"):
    target.encode(batch_of(tokens), TAPS)


def test_packed_documents_equal_separate_rows(target, monkeypatch):
  """Kills: attention or positions that cross from one document of a row into the next."""
  monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
  lengths, tokens = (5, 3, 6), random_tokens(1, 16)
  run = jax.jit(lambda *args: encoded.__wrapped__(*args))  # traced anew
  together = run(target, batch_of(tokens, *packed(lengths, 16)))
  for end, n in zip(np.cumsum(lengths), lengths):
    document = np.pad(tokens[:, end - n:end], ((0, 0), (0, 16 - n)))
    close(together[0, end - n:end], run(target, batch_of(document, *packed((n,), 16)))[0, :n])


@pytest.mark.parametrize("family", TARGETS)
def test_scanned_layers_equal_unrolled(family):
  """Kills: a family whose stacked form leaves a tensor behind; taps that depend on the layout."""
  target, tokens = small_target(family), random_tokens(2, 8)
  unrolled, _ = extend(target, tokens, target.init_cache(2, 16))
  scanned, _ = extend(stack_layers(target), tokens, stack_layers(target).init_cache(2, 16))
  close(scanned, unrolled)


@dataclasses.dataclass(frozen=True)
class TwoKinds(decoder.TargetConfig):
  """Layers of two kinds in turn, with keys of other widths and another rotation."""

  @property
  def period(self):
    return self.spec, dataclasses.replace(self.spec, rope_theta=7.0, num_kv_heads=1, head_dim=4)


@pytest.mark.slow
def test_layers_of_two_kinds():
  """Kills: a stack of layers of different kinds, repeats counted as layers, one kind's cache handed to the other."""
  plain = small_target("qwen3", num_hidden_layers=4).config
  config = TwoKinds(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
  unrolled = randomised(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), 0)
  scanned, tokens, taps = stack_layers(unrolled), random_tokens(2, 12), (2, -1, 1)
  assert len(scanned.layers) == 2 and len(unrolled.layers) == 4
  assert [one.spec.num_kv_heads for one in (layer.self_attn for layer in unrolled.layers)] == [2, 1, 2, 1]
  said = []
  for target in (unrolled, scanned):
    first, cache = extend(target, tokens[:, :8], target.init_cache(2, 16), taps)
    second, _ = extend(target, tokens[:, 8:], commit(target, cache, [8, 8]), taps)
    said.append(jnp.concatenate([first, second], 1))
  close(*said)
  whole = unrolled.encode(batch_of(tokens), taps)
  close(said[0], jnp.concatenate([unrolled.head()(whole.hidden), whole.features], -1))
  for mine, theirs in zip(scanned.last_layers(3), unrolled.last_layers(3)):
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
  with pytest.raises(ValueError, match="has 4"):
    scanned.last_layers(5)
  odd = dataclasses.replace(config, num_layers=3)
  with pytest.raises(ValueError, match="3 layers cannot be scanned in periods of 2"):
    stack_layers(nnx.eval_shape(lambda: Decoder(odd, rngs=nnx.Rngs(0))))


def attention_case():
  """Blocks with ragged contexts; query (1, 2, 0) sees nothing, block (0, 3) only its context."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = normal(2, 6, 3, 4, 5), normal(2, 6, 3, 2, 5), normal(2, 6, 3, 2, 5)
  mask, lo = rng.random((2, 6, 3, 3)) < 0.6, rng.integers(0, 5, (2, 6, 3))
  hi = lo + rng.integers(0, 6, (2, 6, 3))
  mask[1, 2, 0], hi[1, 2, 0], mask[0, 3], hi[0, 3] = False, lo[1, 2, 0], False, 10
  return (q, k, v, normal(2, 2, 10, 5), normal(2, 2, 10, 5)), mask, (lo.astype(np.int32), hi.astype(np.int32))


def block_attention(arrays, mask, bounds):
  q, k, v, far_k, far_v = arrays
  place = attention.Place(None, *bounds, mask, None)
  return attention.attend(q / 5 ** 0.5, k, v, place, attention.Context(jnp.swapaxes(far_k, 2, 3), far_v, "columns"))


def dense_attention(arrays, mask, bounds):
  """One softmax per query over context and block side by side, under the mask that `attend` never builds."""
  q, k, v, far_k, far_v = arrays
  q = q.reshape(2, 6, 3, 2, 2, 5)  # query head 2g and 2g + 1 share key head g
  slots = jnp.arange(10)[None, None, None]
  far_seen = (slots >= bounds[0][..., None]) & (slots < bounds[1][..., None])
  seen = jnp.concatenate([far_seen, mask], -1)[:, :, :, None, None]
  per_block = lambda far: jnp.broadcast_to(jnp.moveaxis(far, 1, 2)[:, None], (2, 6, 10, 2, 5))
  keys, values = (jnp.concatenate([per_block(far), own], 2) for far, own in ((far_k, k), (far_v, v)))
  scores = jnp.where(seen, jnp.einsum("batkgh,baskh->batkgs", q, keys) / 5 ** 0.5, -jnp.inf)
  weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen.any(-1, keepdims=True), scores, 0.0)), 0.0)
  return jnp.einsum("batkgs,baskh->batkgh", weights, values).reshape(2, 6, 3, 4, 5)


def attention_gradients(attend):
  """(output, gradients of q, k, v and of the context's k and v)"""
  arrays, mask, bounds = attention_case()
  weight = np.random.default_rng(1).normal(size=(2, 6, 3, 4, 5)).astype(np.float32)

  def loss(arrays):
    out = attend(arrays, mask, bounds)
    return jnp.sum(weight * out ** 2), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return out, gradients


@pytest.fixture(scope="module")
def dense():
  return attention_gradients(dense_attention)


def test_products_that_gpus_keep_apart(dense, monkeypatch):
  """Kills: a value or a gradient that is lost where GPUs are kept from one product of both parts."""
  compile_as("cuda", monkeypatch)
  out, gradients = attention_gradients(block_attention)
  close(out, dense[0], atol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-5), gradients, dense[1])


@pytest.mark.parametrize("blocks_at_a_time", [6, 2, 1])
def test_block_attention_is_dense_attention(blocks_at_a_time, dense, monkeypatch):
  """Kills: parts merged with two maxima; a chunk with its neighbour's mask; NaN where nothing is seen."""
  monkeypatch.setattr(attention, "SCORE_BUDGET", blocks_at_a_time * 2 * 3 * 4 * 10)
  scans = []
  original = jax.lax.map
  monkeypatch.setattr(jax.lax, "map", lambda f, xs: scans.append(len(xs[0])) or original(f, xs))
  out, gradients = attention_gradients(block_attention)
  assert scans == ([] if blocks_at_a_time == 6 else [6 // blocks_at_a_time])
  assert not np.any(out[1, 2, 0]) and not np.any(gradients[0][1, 2, 0])
  close(out, dense[0], atol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-5), gradients, dense[1])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 9, 65, layers.SMALL_ROWS, layers.SMALL_ROWS + 1])
def test_linear_small_rows(rows, dtype, platform, monkeypatch):
  """Kills: the weight-first product for few rows, or the padded one for a single row, with another value, dtype or
  gradient than x @ weight.T."""
  compile_as(platform, monkeypatch)
  rng = np.random.default_rng(rows)
  weight, x = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((7, 5), (rows, 5)))
  slope = jnp.asarray(rng.normal(size=(rows, 7)), jnp.float32)

  def both(weight, x):
    """(value, gradients) for both output dtypes, of linear and of the plain product"""
    for product in (linear, lambda w, x, dtype: jnp.matmul(x, w.T, preferred_element_type=dtype)):
      ys = [product(weight, x, out) for out in (None, jnp.float32)]
      summed = lambda w, x: product(w, x, None).astype(jnp.float32) + product(w, x, jnp.float32)
      loss = lambda w, x: jnp.sum(slope * summed(w, x))  # linear: rounding of y must not be magnified
      yield *ys, *jax.grad(loss, (0, 1))(weight, x)

  actual, expected = jax.jit(lambda *args: list(both(*args)))(weight, x)
  assert [y.dtype for y in actual] == [y.dtype for y in expected] == [dtype, jnp.float32, dtype, dtype]
  step = 2 ** -7 if dtype == jnp.bfloat16 else 1e-5  # gradients add up to 257 terms that were rounded to this
  for y, wanted in zip(actual, expected):
    y, wanted = np.asarray(y, np.float64), np.asarray(wanted, np.float64)
    close(y, wanted, atol=2 * step * np.abs(wanted).max())


@pytest.mark.parametrize("rows, padded", [(1, True), (8, True), (16, False)])
def test_one_row_of_each_device(rows, padded):
  """Kills: a row that each device of a mesh has alone left to the vector units, as all of them together are several."""
  weight, x = jnp.ones((7, 5)), jnp.arange(5. * rows).reshape(rows, 5)
  with MeshConfig(data=8).use():
    text = str(jax.make_jaxpr(layers._few_rows_on_tpu)(weight, x))
    close(jax.jit(layers._few_rows_on_tpu)(weight, x), x @ weight.T, atol=1e-4)
  assert ("optimization_barrier" in text) == padded


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_one_row_costs_a_tpu_what_eight_cost(topology):
  """Kills: a plain step of one row that the vector unit multiplies, at 1.3 to 3 times the cycles of eight rows."""
  place = absent_tpu(topology)
  shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

  def cycles(rows):
    text = jax.jit(linear).lower(shape(12288, 4096), shape(rows, 1, 4096)).compile().as_text()
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))

  assert cycles(1) < 1.1 * cycles(8)


def test_rope_is_float32_in_bfloat16_models():
  """Kills: frequencies cast to bfloat16 with the module, as in the reference: 0.6 rad at distance 512."""
  spec = BlockSpec(16, 24, 4, 2, 8, 1e-6, 1e4, qk_norm=True)
  module = randomised(nnx.eval_shape(lambda: layers.Attention(spec, rngs=nnx.Rngs(0))), 0)
  module = jax.tree.map(lambda x: x.astype(jnp.bfloat16), module)
  x = jnp.asarray(np.tile(np.random.default_rng(0).normal(size=(1, 1, 16)), (1, 2, 1)), jnp.bfloat16)
  queries = jax.jit(lambda module, x, positions: module.project(x, positions)[0])
  start, far = np.asarray(queries(module, x, np.array([[0, 3001]], np.int32))[0], np.float64)
  angle = 3001 * 1e4 ** (-np.arange(0, 8, 2) / 8)
  turned = (start[:, :4] + 1j * start[:, 4:]) * np.exp(1j * angle)
  assert rope_table(np.zeros((1, 1), np.int32), 8, 1e4)[0].dtype == jnp.float32
  close(far, np.concatenate([turned.real, turned.imag], -1), atol=0.03)


def test_best_words_of_tiles(monkeypatch):
  """Kills: ties of two tiles that go to the later one, places counted within a tile, a NaN that other tiles hide; all
  logits at once where they were to be made a tile at a time."""
  compile_as("tpu", monkeypatch)
  monkeypatch.setattr(layers, "TILE", 1024)  # of 8 rows: 128 words
  logits = np.random.default_rng(0).integers(0, 4, (8, 300)).astype(np.float32)
  logits[np.arange(4), [127, 128, 256, 299]] = 5  # the other rows have ties in all tiles
  head, rows = layers.WordHead(jnp.asarray(logits.T)), jnp.eye(8)
  np.testing.assert_array_equal(head.best(rows), logits.argmax(-1))
  np.testing.assert_array_equal(head.best(jnp.full((1, 8, 8), jnp.nan)), np.full((1, 8), 300))
  broken = head.replace(weight=head.weight.at[140].set(jnp.nan))  # in the second of three
  np.testing.assert_array_equal(broken.best(rows), np.full(8, 300))
  assert "f32[8,300]" not in str(jax.make_jaxpr(head.best)(rows))
  assert "f32[8,300]" in str(jax.make_jaxpr(head)(rows))
