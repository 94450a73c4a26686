"""Blocks, what a block sees, and the training step: optimizer goldens, then identities on a tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from dspark_jax.drafters.dspark import DSpark, DSparkConfig
from dspark_jax.metrics import mean
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.parameters import values
from dspark_jax.targets.decoder import Decoder, TargetConfig
from dspark_jax.training import step as subject
from dspark_jax.training.anchors import blocks_at, candidates, sample_blocks
from dspark_jax.training.losses import LossConfig, draft_loss
from dspark_jax.training.step import OptimizerConfig, StepConfig, init_state, schedule, span
from dspark_jax.types import Batch
from folders import GOLDEN, golden_cases

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
SPEC = BlockSpec(hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6,
                 rope_theta=1e4, qk_norm=True)
VOCABULARY, BLOCK, ROWS, LENGTH = 40, 3, 8, 16
CONFIG = StepConfig(num_anchors=4, compute_dtype="float32", loss=LossConfig(chunk=24),
                    optimizer=OptimizerConfig(learning_rate=0.01))


def target_of(vocabulary=VOCABULARY):
  return Decoder(TargetConfig("qwen3", SPEC, 3, vocabulary, False, 64), rngs=nnx.Rngs(0))


def drafter_of(vocabulary=VOCABULARY, words=0, block=BLOCK):
  config = DSparkConfig(spec=SPEC, num_layers=2, vocab_size=vocabulary, num_target_layers=3, taps=(-1, 1),
                        mask_token_id=vocabulary - 1, block_size=block, markov_rank=4, draft_vocab_size=words)
  return DSpark(config, rngs=nnx.Rngs(1))


@functools.cache
def models():
  """(target, drafter with a reduced vocabulary); weights so large that context matters."""
  grow = lambda model: jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, model)
  return jax.jit(lambda: (grow(target_of()), grow(drafter_of(words=30))))()


def batch_of(seed, lengths=(7, 7), rows=ROWS, length=LENGTH, vocabulary=VOCABULARY):
  """Random rows that hold documents of these lengths, then padding; one token in five is not supervised."""
  rng = np.random.default_rng(seed)
  segments = np.repeat(np.arange(1, len(lengths) + 2), (*lengths, length - sum(lengths)))
  segments[sum(lengths):] = 0
  positions = np.concatenate([np.arange(n) for n in (*lengths, length - sum(lengths))])
  whole = lambda x: np.tile(x.astype(np.int32), (rows, 1))
  return Batch(rng.integers(vocabulary, size=(rows, length)).astype(np.int32),
               (rng.random((rows, length)) < 0.8) & (segments > 0), whole(segments), whole(positions))


@functools.cache
def step_of(config):
  return jax.jit(functools.partial(subject.train_step, config=config), donate_argnums=0, compiler_options=QUICK)


def fresh(seed=0, total_steps=10, config=CONFIG):
  return init_state(models()[1], config, seed, total_steps=total_steps)


def optimizer_arrays(case):
  return (dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))


@pytest.mark.parametrize("case", golden_cases("", "schedule0/lr_used"))
def test_learning_rate(case):
  """Kills a warm-up that starts at 0 or overshoots, and a cosine that cancels in float32 near its end."""
  given, expected = optimizer_arrays(case)
  for j in range(sum(key.endswith("/lr_used") for key in expected)):
    assert_learning_rate(j, given, expected)


def assert_learning_rate(j, given, expected):
  config = OptimizerConfig(learning_rate=float(given[f"schedule{j}/lr"]),
                           warmup_ratio=float(given[f"schedule{j}/warmup_ratio"]))
  rate = schedule(config, span(config, int(given[f"schedule{j}/total_steps"])))
  np.testing.assert_allclose(rate(given[f"schedule{j}/step_index"]), expected[f"schedule{j}/lr_used"], rtol=1e-6)


@pytest.mark.parametrize("steps, ratio, wanted", (
    (4, 0.0, (1, 0.853553, 0.5, 0.146447)), (4, 0.25, (1, 1, 0.75, 0.25)), (1, 0.04, (1,))))
def test_learning_rate_of_short_runs(steps, ratio, wanted):
  """Kills 0 / 0 without warm-up or with one step of it."""
  config = OptimizerConfig(learning_rate=2.0, warmup_ratio=ratio)
  rate = schedule(config, span(config, steps))(np.arange(steps))
  np.testing.assert_allclose(rate, 2 * np.array(wanted), rtol=1e-5)


def test_epsilon():
  """Kills Adam's epsilon inside the root: gradients far below its own root would hardly move anything."""
  config, gradient = OptimizerConfig(learning_rate=0.01, warmup_ratio=0), np.full(3, 1e-6, np.float32)
  transform = subject.optimizer(config, span(config, 10))
  with jax.numpy_dtype_promotion("standard"):
    update, _ = transform.update({"w": gradient}, transform.init({"w": gradient}), {"w": gradient})
  np.testing.assert_allclose(update["w"], -0.01 * 1e-6 / (1e-6 + 1e-8), rtol=1e-5)


@pytest.mark.parametrize("case", golden_cases("", "grad_norm"))
def test_clipped_adamw(case):
  """Kills clipping per tensor, clipping after the moments."""
  given, expected = optimizer_arrays(case)
  config = OptimizerConfig(learning_rate=float(given["lr"]), warmup_ratio=float(given["warmup_ratio"]),
                           weight_decay=float(given["weight_decay"]), clip=float(given["max_grad_norm"]))
  transform = subject.optimizer(config, span(config, int(given["total_steps"])))
  params = {name: given[name] for name in ("weight", "bias")}
  state = transform.init(params)
  with jax.numpy_dtype_promotion("standard"):
    update = jax.jit(transform.update)
    for i in range(len(expected["grad_norm"])):
      grads = {name: given[f"grad_{name}"][i] for name in params}
      np.testing.assert_allclose(optax.tree.norm(grads), expected["grad_norm"][i], rtol=1e-5)
      updates, state = update(grads, state, params)
      params = {name: np.asarray(params[name] + updates[name]) for name in params}
      for name in params:
        np.testing.assert_allclose(params[name], expected[name][i], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_muon_takes_the_matrices_only():
  """Kills Muon on a token table (rows that never occur would move) or on norms, and updates of another size."""
  matrices = ("fc.weight", "layers.0.self_attn.k_proj.weight", "layers.1.mlp.down_proj.weight")
  rest = ("layers.0.input_layernorm.weight", "layers.1.self_attn.q_norm.weight", "markov_head.markov_w1.weight",
          "markov_head.markov_w2.weight", "confidence_head.proj.weight", "norm.weight")
  params, rng = {name: values(models()[1])[name] for name in matrices + rest}, np.random.default_rng(0)
  grads = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
  config = OptimizerConfig(name="muon", learning_rate=0.01, warmup_ratio=0.0, clip=1e9)
  transform = subject.optimizer(config, span(config, 100))
  with jax.numpy_dtype_promotion("standard"):
    update = lambda: transform.update(grads, transform.init(params), params)[0]
    updates = jax.jit(update, compiler_options=QUICK)()
  for name, x in updates.items():
    if name in matrices:
      # five Newton-Schulz steps bring singular values to 0.7..1.2, times consistent_rms * sqrt(max(in, out))
      singular = np.linalg.svd(x, compute_uv=False) / (0.01 * 0.2 * max(x.shape) ** 0.5)
      assert 0.5 < singular.min() and singular.max() < 1.5, (name, singular)
    else:
      assert np.all(np.sign(x) == -np.sign(grads[name])) and np.ptp(np.abs(x)) < 1e-4, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay(name):
  """Kills weight decay that is accepted and dropped, for all parameters or for those that Muon leaves to Adam."""
  params = {name: jnp.full((4, 6), 2.0) for name in ("fc.weight", "markov_head.markov_w1.weight")}
  config = OptimizerConfig(name=name, learning_rate=0.01, warmup_ratio=0.0, weight_decay=0.5)
  transform = subject.optimizer(config, span(config, 100))
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
  for update in updates.values():
    np.testing.assert_allclose(update, -0.01 * 0.5 * 2.0, rtol=1e-5)


def test_sampled_anchors():
  """Kills sampling with replacement, favouring a place, across documents; one draw for all rows; unsorted anchors.

  Inclusion counts of M candidates over n draws of A are chi-square with M - 1 degrees once scaled by (M - 1) / M; a
  correct sampler fails with probability 1e-6 (one test, fixed key).
  """
  rows, chosen = 4000, 4
  one = batch_of(3, rows=1)
  one.loss_mask[:] = one.segments > 0
  batch = jax.tree.map(lambda x: np.repeat(x, rows, 0), one)
  blocks = jax.jit(sample_blocks, static_argnums=(2, 3))(jax.random.key(0), batch, chosen, BLOCK)
  allowed = np.flatnonzero(candidates(jax.tree.map(jnp.asarray, one))[0])
  assert len(allowed) > chosen and 6 not in allowed  # position 6 ends the first document
  assert np.all(blocks.keep) and np.all(np.diff(blocks.anchors, axis=1) > 0)
  counts = np.bincount(np.asarray(blocks.anchors).ravel(), minlength=LENGTH)
  assert counts.sum() == counts[allowed].sum()
  share = chosen / len(allowed)
  spread = ((counts[allowed] - rows * share) ** 2).sum() / (rows * share * (1 - share))
  assert stats.chi2.sf(spread * (len(allowed) - 1) / len(allowed), len(allowed) - 1) > 1e-6


def test_rows_with_too_few_candidates_get_dummies():
  """Kills dummies that stand at real positions, and more anchors asked for than a row has tokens."""
  batch = batch_of(3, rows=2)
  batch.loss_mask[0] = False
  blocks = jax.jit(sample_blocks, static_argnums=(2, 3))(jax.random.key(0), batch, LENGTH + 4, BLOCK)
  found = np.asarray(candidates(jax.tree.map(jnp.asarray, batch)))
  np.testing.assert_array_equal(np.asarray(blocks.keep).sum(1), found.sum(1))
  np.testing.assert_array_equal(np.asarray(blocks.anchors)[1, :found[1].sum()], np.flatnonzero(found[1]))
  assert not np.any(np.asarray(blocks.anchors)[~np.asarray(blocks.keep)])
  assert not np.any(np.asarray(blocks.supervised)[~np.asarray(blocks.keep)])


def test_anchors_of_rows_whose_padding_is_cut():
  """Kills: a batch that is learned in other blocks where it takes a shorter length."""
  batch = batch_of(3)
  draw = jax.jit(sample_blocks, static_argnums=(2, 3, 4))
  cut = draw(jax.random.key(0), jax.tree.map(lambda x: x[:, :14], batch), 4, BLOCK, LENGTH)
  whole = draw(jax.random.key(0), batch, 4, BLOCK, 0)
  for name, of in (("anchors", ...), ("keep", ...), ("supervised", ...), ("labels", whole.supervised)):
    np.testing.assert_array_equal(getattr(cut, name)[of], getattr(whole, name)[of], err_msg=name)


def test_labels_and_previous_tokens():
  """Kills a label or previous token off by one, and supervision past a gap, a document or the row."""
  batch = batch_of(0, lengths=(7, 9), rows=1)
  batch.loss_mask[:] = True
  batch.loss_mask[0, 4] = False
  blocks = blocks_at(jax.tree.map(jnp.asarray, batch), jnp.array([[1, 5, 10, 14]]), jnp.ones((1, 4), bool), 4)
  tokens = batch.tokens[0]
  np.testing.assert_array_equal(blocks.previous[0, 0], tokens[[1, 2, 3, 4]])
  np.testing.assert_array_equal(blocks.labels[0, 0], tokens[[2, 3, 4, 5]])
  np.testing.assert_array_equal(blocks.supervised[0], [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_what_a_block_sees():
  """Kills a causal or shifted mask, blocks that see each other, and context at the anchor or of another document.

  Every context position and every block slot is disturbed in turn; exactly the blocks that see it may change.
  """
  target, drafter = models()
  batch = jax.tree.map(jnp.asarray, batch_of(0, rows=1))
  anchors, keep = np.array([[1, 4, 8, 12, 0]]), np.array([[True] * 4 + [False]])
  rng = np.random.default_rng(1)
  features = rng.normal(size=(1, LENGTH, 32)).astype(np.float32)
  embeddings = rng.normal(size=(1, 5, BLOCK, 16)).astype(np.float32)

  def hidden(position, block, slot):  # an index past the end disturbs nothing
    return drafter.draft_all(jnp.asarray(embeddings).at[0, block, slot].add(3.0, mode="drop"), batch,
                             jnp.asarray(features).at[0, position].add(3.0, mode="drop"), blocks, target.kernels)[0]

  blocks = blocks_at(batch, jnp.asarray(anchors, jnp.int32), jnp.asarray(keep), BLOCK)
  slots = [(LENGTH, block, slot) for block in range(5) for slot in range(BLOCK)]
  cases = np.array([(LENGTH, 5, 0)] + [(t, 5, 0) for t in range(LENGTH)] + slots, np.int32)
  out = np.asarray(jax.jit(jax.vmap(hidden), compiler_options=QUICK)(*cases.T))
  changed = np.abs(out[1:] - out[0]).max(-1) > 1e-5
  start = np.where(anchors < 7, 0, 7)[0]
  t = np.arange(LENGTH)[:, None]
  sees = (start <= t) & (t < anchors[0]) & keep[0]
  np.testing.assert_array_equal(changed[:LENGTH], np.repeat(sees[..., None], BLOCK, -1))
  for (_, block, slot), reached in zip(slots, changed[LENGTH:]):
    wanted = np.zeros((5, BLOCK), bool)
    wanted[block, slice(None) if keep[0, block] else slot] = True
    np.testing.assert_array_equal(reached, wanted)


def test_packing_changes_nothing():
  """Kills features, context, RoPE positions, labels or a teacher that cross from one document to the next."""
  target, drafter = models()
  tokens = batch_of(5, lengths=(6, 9)).tokens[0]

  def rows(*documents):
    """Rows of (document, first token) pairs."""
    out = [np.zeros((2, LENGTH), np.int32) for _ in range(3)]
    for row, number, first, at, n in documents:
      for array, value in zip(out, (tokens[first:first + n], number, np.arange(n))):
        array[row, at:at + n] = value
    return Batch(out[0], out[1] > 0, out[1], out[2])

  packed, apart = rows((0, 1, 0, 0, 6), (0, 2, 6, 6, 9)), rows((0, 1, 0, 0, 6), (1, 1, 6, 0, 9))
  packed_at, apart_at = [[0, 3, 4, 8, 12], [0] * 5], [[0, 3, 4, 0, 0], [2, 6, 0, 0, 0]]
  packed_keep, apart_keep = [[True] * 5, [False] * 5], [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3]

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(batch, anchors, keep):
    blocks, seen = blocks_at(batch, anchors, keep, BLOCK), target.encode(batch, drafter.taps)
    outputs = drafter.train_outputs(target, batch, seen, blocks)
    loss, metrics = draft_loss(drafter, target, outputs, blocks=blocks, target_hidden=seen.hidden,
                               config=CONFIG.loss)
    return (outputs.hidden, blocks.supervised, outputs.latent, outputs.confidence, blocks.labels), loss, metrics

  one = run(packed, np.array(packed_at, np.int32), np.array(packed_keep))
  two = run(apart, np.array(apart_at, np.int32), np.array(apart_keep))
  # what is fed at slots past the document is the neighbour's token in one case and padding in the other
  supervised = np.asarray(one[0][1])[np.array(packed_keep)]
  for index, (x, y) in enumerate(zip(one[0], two[0])):
    x, y = np.asarray(x)[np.array(packed_keep)], np.asarray(y)[np.array(apart_keep)]
    np.testing.assert_allclose(*((x, y) if index < 2 else (x[supervised], y[supervised])), atol=1e-5)
  np.testing.assert_allclose(one[1], two[1], rtol=1e-5)
  for name in ("ce", "tv", "confidence", "accept_rate", "tau"):
    np.testing.assert_allclose(mean(one[2][name]), mean(two[2][name]), rtol=1e-4, err_msg=name)


def run_steps(state, first, last, config=CONFIG):
  """(state, losses) after the steps first..last-1, each on a batch of its own."""
  losses = []
  for index in range(first, last):
    state, metrics = step_of(config)(state, models()[0], batch_of(index))
    losses.append(float(mean(metrics["loss"])))
  return state, losses


def test_resuming_is_going_on():
  """Kills an anchor key, a step count, a moment or a schedule that is not in the state. Exact to the last bit."""
  whole, losses = run_steps(fresh(), 0, 5)
  half, first = run_steps(fresh(), 0, 2)
  stored = [np.asarray(x) for x in jax.tree.leaves(half)]
  other = fresh(seed=7, total_steps=99)
  resumed, second = run_steps(jax.tree.unflatten(jax.tree.structure(other), stored), 2, 5)
  assert losses == first + second and int(whole.step) == 5
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  assert run_steps(fresh(seed=7), 0, 1)[1] != losses[:1]
  # donating the state left the caller's drafter alone, and the draft words are no parameter
  np.testing.assert_array_equal(models()[1].words, whole.drafter.words)
  before = values(models()[1])
  assert all(np.any(x != before[name]) for name, x in values(whole.drafter).items())


def test_anchors_are_drawn_anew():
  """Kills the same anchors at every step: of each text, the same few positions would be learnt again and again."""
  loss = lambda step: step_of(CONFIG)(fresh().replace(step=jnp.int32(step)), models()[0], batch_of(0))[1]["loss"]
  assert len({float(mean(loss(step))) for step in (0, 1, 2)}) == 3


def test_a_batch_can_be_learned():
  """Kills an update of the wrong sign, or one that is computed and not applied."""
  state, losses = fresh(total_steps=40), []
  for _ in range(40):
    state, metrics = step_of(CONFIG)(state, models()[0], batch_of(0))
    losses.append(float(mean(metrics["loss"])))
  assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses
  assert float(mean(metrics["learning_rate"])) < 1e-4 and np.isfinite(float(mean(metrics["grad_norm"])))


def test_a_batch_without_supervision_changes_nothing():
  """Kills 0 / 0: a NaN from one empty batch would destroy the run."""
  batch = batch_of(0)
  batch.loss_mask[:] = False
  state, metrics = step_of(CONFIG)(fresh(), models()[0], batch)
  assert float(mean(metrics["loss"])) == 0 and float(mean(metrics["blocks"])) == 0
  jax.tree.map(np.testing.assert_array_equal, values(state.drafter), values(models()[1]))


def assert_same_step(a, b):
  """Compares metrics and Adam's moments (parameters follow the sign of rounding where a gradient is nearly 0)."""
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)
  jax.tree.map(close, (a[0].opt_state, a[1]), (b[0].opt_state, b[1]))


@pytest.mark.slow
def test_microbatches_and_devices_are_one_batch():
  """Kills a mean of the parts' or the devices' means (counts differ), and anchors that depend on the split."""
  batch, target, split = batch_of(0), models()[0], dataclasses.replace(CONFIG, microbatches=2)
  batch.loss_mask[:2] = False
  whole = step_of(CONFIG)(fresh(), target, batch)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda tree, *axes: jax.device_put(tree, jax.NamedSharding(mesh, jax.P(*axes)))
  assert_same_step(step_of(split)(place(fresh()), place(target), place(batch, "data")), whole)
  with pytest.raises(ValueError, match="8 rows cannot be split into 3 microbatches"):
    jax.eval_shape(step_of(dataclasses.replace(CONFIG, microbatches=3)), fresh(), target, batch)


def test_types_of_the_state_do_not_change():
  """Kills masters or moments that become bfloat16, and a second compilation at the second step."""
  config = dataclasses.replace(CONFIG, compute_dtype="bfloat16", optimizer=OptimizerConfig(name="muon"))
  target = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models()[0])
  state = fresh(config=config)
  step = functools.partial(subject.train_step, config=config)
  after, metrics = jax.eval_shape(step, state, target, batch_of(0))
  types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert types(after) == types(state) and jax.tree.structure(after) == jax.tree.structure(state)
  assert {x.dtype for x in jax.tree.leaves(metrics)} == {np.dtype("float32")}


def largest(jaxpr) -> int:
  """Elements of the largest array in a jaxpr, those of its inner jaxprs included."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [v.aval.size for v in equation.outvars]
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        sizes.append(largest(getattr(inner, "jaxpr", inner)))
  return max(sizes)


@pytest.mark.parametrize("words", (0, 900))
def test_no_array_of_all_slots_and_the_vocabulary(words):
  """Kills whole logits in the forward or backward pass: 2.2 GB a sequence in the released setting."""
  vocabulary, block, anchors, length = 1000, 4, 16, 32
  target, drafter = jax.eval_shape(lambda: (target_of(vocabulary), drafter_of(vocabulary, words, block)))
  batch = batch_of(0, lengths=(20,), rows=1, length=length, vocabulary=vocabulary)

  def elements(chunk):
    config = StepConfig(num_anchors=anchors, loss=LossConfig(chunk=chunk), compute_dtype="float32")
    state = jax.eval_shape(lambda d: init_state(d, config, 0, total_steps=9), drafter)
    step = functools.partial(subject.train_step, config=config)
    return largest(jax.make_jaxpr(step)(state, target, batch).jaxpr)

  assert elements(chunk=16) < anchors * block * (words or vocabulary) / 2
  assert elements(chunk=10 ** 6) >= anchors * block * (words or vocabulary)
