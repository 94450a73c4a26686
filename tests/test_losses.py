"""The training forward, the loss, its metrics and its gradients: goldens, then identities and brute force.

The goldens run through padded chunks, so they also hold the chunking to the reference.
"""

import dataclasses
import functools
import itertools
import math
import types
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.checkpoints import dialects, hf
from dspark_jax.drafters import DRAFTERS
from dspark_jax.metrics import add, mean
from dspark_jax.nn.layers import WordHead
from dspark_jax.nn.parameters import values
from dspark_jax.text import read_json
from dspark_jax.training.anchors import all_blocks, blocks_at, candidates
from dspark_jax.training.losses import EAGLE3, LossConfig, draft_loss, term_weights
from dspark_jax.training.step import StepConfig, blocks_of, gradients
from dspark_jax.types import Batch, DraftHead, DraftOutputs, TargetOutput
from folders import complains, golden_cases, golden_dtype, slow_but
from test_drafters import head_only

GOLDEN = Path(__file__).parent / "golden"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
CASES = golden_cases("drafter_", "train/block_hidden")
EAGLE3_CASES = golden_cases("drafter_", "train/position_masks")
SLOW = {"drafter_dspark_qwen3_gated", "drafter_dspark_qwen3_rnn", "drafter_dflash_qwen3", "drafter_eagle3_qwen3"}


def assert_mean(pair, wanted):
  """The reference's mean; where nothing was observed it may say 0 or NaN."""
  ours, seen = np.asarray(mean(pair)), np.asarray(pair.weight) > 0
  assert ours.shape == np.shape(wanted)
  np.testing.assert_allclose(ours[seen], wanted[seen], rtol=1e-4, atol=1e-6)
  assert not np.any(np.nan_to_num(wanted[~seen], nan=0.0))


@functools.cache
def golden(case):
  """(expected arrays, what our code gives under the same kind of names) of a drafter case."""
  folder = GOLDEN / case
  given, expected = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs"))
  given = {name[6:]: jnp.asarray(x) for name, x in given.items() if name.startswith("train/")}
  config_json, tensors = hf.read_folder(folder)
  kind, config = dialects.drafter_config(config_json)
  drafter = hf.fill(lambda: DRAFTERS[kind](config, rngs=nnx.Rngs(0)), tensors, case, dtype=golden_dtype(case),
                    extra_ok=dialects.FROZEN)
  target = head_only(case, config, tensors)
  rows, length = given["input_ids"].shape
  if kind == "eagle3":
    of_step = config_json["step_loss_decay"]
    loss = dataclasses.replace(EAGLE3, decay=math.inf if of_step == 1 else -1 / math.log(of_step))
    columns = length
  else:
    loss = LossConfig(*(float(given[f"{name}_alpha"]) for name in ("ce_loss", "l1_loss", "confidence_head")),
                      decay=float(given["loss_decay_gamma"]))
    columns = given["anchor_positions"].shape[1]
  part = next(n for n in itertools.count(2) if columns * drafter.block_size % n)
  loss = dataclasses.replace(loss, chunk=rows * part)
  step = StepConfig(compute_dtype="float32", loss=loss)
  compiled = jax.jit(run, static_argnums=3, compiler_options=QUICK)
  return expected, jax.tree.map(np.asarray, compiled(drafter, target, given, step))


def run(drafter, target, given, step):
  tokens = given["input_ids"]
  batch = Batch(tokens, given["loss_mask"] > 0, given["attention_mask"],
                jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
  blocks = (all_blocks(batch, drafter.block_size) if drafter.every_position else
            blocks_at(batch, given["anchor_positions"], given["block_keep_mask"], drafter.block_size))
  encoded = TargetOutput(given["target_last_hidden_states"], given["target_hidden_states"])
  outputs = drafter.train_outputs(target, batch, encoded, blocks)
  loss, metrics, grads = gradients(drafter, values(drafter), target, batch, encoded, blocks, step)
  return dict(outputs=outputs, logits=drafter.head(target)(outputs.hidden, outputs.latent),
              blocks=blocks, candidates=candidates(batch), loss=loss, metrics=metrics, grads=grads)


@pytest.mark.parametrize("case", slow_but({*CASES} - SLOW, CASES))
def test_blocks_are_the_reference_s(case):
  """Kills a loss mask read at anchor + k, supervision that resumes after a gap, anchors before a gap."""
  expected, ours = golden(case)
  np.testing.assert_array_equal(ours["candidates"], expected["train/anchor_candidate_mask"])
  np.testing.assert_array_equal(ours["blocks"].labels, expected["train/target_ids"])
  np.testing.assert_array_equal(ours["blocks"].supervised, expected["train/eval_mask"])


@pytest.mark.parametrize("case", slow_but({*CASES} - SLOW, CASES))
def test_training_forward(case):
  """Kills a wrong slot, RoPE position, mask, previous token or recurrence of the sequential head."""
  expected, ours = golden(case)
  np.testing.assert_allclose(ours["outputs"].hidden, expected["train/block_hidden"], atol=1e-4)
  np.testing.assert_allclose(ours["logits"], expected["train/draft_logits"], atol=1e-4)
  if "train/confidence_pred" in expected:
    np.testing.assert_allclose(ours["outputs"].confidence, expected["train/confidence_pred"], atol=1e-4)


@pytest.mark.parametrize("case", slow_but({*CASES} - SLOW, CASES))
def test_loss_and_metrics(case):
  """Kills a factor 1/2 in TV, decay from k = 1, a teacher one position off, means over all slots."""
  expected, ours = golden(case)
  np.testing.assert_allclose(ours["loss"], expected["loss/total"], rtol=1e-4)
  for name, stored in (("ce", "ce"), ("tv", "l1"), ("confidence", "confidence")):
    if f"metric/{stored}_loss" in expected:
      pair = ours["metrics"][name]
      np.testing.assert_allclose(pair.sum, expected[f"loss/{stored}_loss_num"], rtol=1e-4)
      np.testing.assert_allclose(pair.weight, expected[f"loss/{stored}_loss_den"], rtol=1e-4)
  errors = ("confidence_abs_error", "confidence_bias", "confidence_cumprod_bias")
  names = {name: name for name in ("accept_rate", *errors)} | {
      "tau": "tau_probabilistic", "supervised_slots_per_block": "block_supervised_tokens_abs"}
  for name, stored in names.items():
    if f"metric/{stored}" in expected:
      assert_mean(ours["metrics"][name], expected[f"metric/{stored}"])


@pytest.mark.parametrize("case", slow_but({*EAGLE3_CASES} - SLOW, EAGLE3_CASES))
def test_eagle3_blocks_forward_and_loss(case):
  """Kills a RoPE offset left out, keys of other columns, a normaliser of supervised positions, a shifted teacher."""
  expected, ours = golden(case)
  supervised = np.moveaxis(np.asarray(ours["blocks"].supervised), 2, 0)
  np.testing.assert_array_equal(supervised, expected["train/position_masks"] > 0)
  logits = np.moveaxis(ours["logits"], 2, 0)
  np.testing.assert_allclose(logits[supervised], expected["train/draft_logits"][supervised], atol=1e-4)
  np.testing.assert_allclose(ours["loss"], expected["loss/total"], rtol=1e-4)
  per_step = expected["loss/per_step"]
  decay = read_json(GOLDEN / case / "config.json")["step_loss_decay"]
  wanted = (per_step * decay ** np.arange(len(per_step))).sum() * supervised[0].size
  np.testing.assert_allclose(ours["metrics"]["soft"].sum, wanted, rtol=1e-4)
  for name, stored in (("accept_rate", "accept_rate"), ("tau", "tau_probabilistic")):
    assert_mean(ours["metrics"][name], expected[f"metric/{stored}"])
  np.testing.assert_array_equal(ours["metrics"]["accept_rate"].weight, expected["metric/valid_tokens"])


@pytest.mark.parametrize("case", slow_but({*CASES, *EAGLE3_CASES} - SLOW, [*CASES, *EAGLE3_CASES]))
def test_every_gradient(case):
  """Kills a teacher or a confidence target that is not detached, a parameter that the loss does not reach."""
  expected, ours = golden(case)
  assert {f"grad/{name}" for name in ours["grads"]} == {name for name in expected if name.startswith("grad/")}
  for name, grad in ours["grads"].items():
    np.testing.assert_allclose(grad, expected[f"grad/{name}"], rtol=1e-3, atol=1e-5, err_msg=name)


# The rest needs no transformer: slots with random hidden states, a linear head, a random target.
ROWS, TOKENS, ANCHORS, BLOCK, WIDTH, RANK, VOCABULARY = 2, 9, 5, 3, 6, 2, 23
WORDS = (1, 2, 4, 8, 9, 15, 16, 22)


@flax.struct.dataclass
class Teacher:
  """As much of a target as the loss needs."""
  weight: jax.Array

  def head(self, words=None):
    return WordHead(self.weight).at(words)


@flax.struct.dataclass
class Student:
  """As much of a drafter as the loss needs."""
  w2: jax.Array
  words: jax.Array | None

  def head(self, target):
    return DraftHead(target.head(self.words), WordHead(self.w2))


def example(words=None, seed=0):
  """(random arrays, blocks of which one is a dummy and some are cut)."""
  columns = VOCABULARY if words is None else len(words)
  shapes = dict(w2=(columns, RANK), hidden=(ROWS, ANCHORS, BLOCK, WIDTH), latent=(ROWS, ANCHORS, BLOCK, RANK),
                confidence=(ROWS, ANCHORS, BLOCK), target_hidden=(ROWS, TOKENS, WIDTH),
                head=(VOCABULARY, WIDTH))
  rng = np.random.default_rng(seed)
  arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  tokens = rng.integers(VOCABULARY, size=(ROWS, TOKENS)).astype(np.int32)
  mask = np.ones((ROWS, TOKENS), bool)
  mask[0, 4] = False
  batch = Batch(tokens, mask, np.ones((ROWS, TOKENS), np.int32), None)
  anchors, keep = np.array([[0, 1, 2, 5, 0], [0, 3, 4, 6, 7]], np.int32), np.ones((ROWS, ANCHORS), bool)
  keep[0, -1] = False
  return arrays, jax.tree.map(np.asarray, jax.jit(blocks_at, static_argnums=3)(batch, anchors, keep, BLOCK))


@functools.partial(jax.jit, static_argnames=("config", "words"), compiler_options=QUICK)
def loss_and_grad(arrays, blocks, config, words=None):
  """((loss, metrics), gradient with respect to every array of `example`)."""
  def loss(a):
    drafter = Student(a["w2"], None if words is None else jnp.array(words, jnp.int32))
    outputs = DraftOutputs(a["hidden"], a["latent"], a["confidence"])
    return draft_loss(drafter, Teacher(a["head"]), outputs, blocks=blocks, target_hidden=a["target_hidden"],
                      config=config)
  return jax.value_and_grad(loss, has_aux=True)(arrays)


def assert_same(a, b, **tolerance):
  tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def brute_force(arrays, blocks, config, words=None, goals=None):
  """The loss as printed, slot by slot in float64; TV as twice the mass that q and p do not share. goals: a list that
  gets the confidence's targets, or has them."""
  a = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  columns = list(range(VOCABULARY) if words is None else words)
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  sums, goals = np.zeros((4, 2)), [] if goals is None else goals
  held = iter(goals[:])
  for b, n, k in zip(*np.nonzero(np.asarray(blocks.supervised))):
    temperature = 1.0 if blocks.temperature is None else config.temperatures[int(blocks.temperature[b, n])]
    z = np.full(VOCABULARY, -np.inf)
    z[columns] = a["head"][columns] @ a["hidden"][b, n, k] + a["w2"] @ a["latent"][b, n, k]
    said = a["head"] @ a["target_hidden"][b, int(blocks.anchors[b, n]) + k]
    plain, q, p = softmax(z), softmax(z / (temperature or 1)), softmax(said / (temperature or 1))
    p = p if temperature else np.eye(VOCABULARY)[said.argmax()]
    tv, w, label = 2 * (1 - np.minimum(p, q).sum()), np.exp(-k / config.decay), int(blocks.labels[b, n, k])
    goal = 1 - tv / 2 if temperature else float(z.argmax() == said.argmax())
    c, goal = 1 / (1 + np.exp(-a["confidence"][b, n, k])), next(held, goal)
    goals.append(goal)
    bce, soft = -goal * np.log(c) - (1 - goal) * np.log(1 - c), -(p[columns] * np.log(q[columns])).sum()
    for term, value in enumerate((-np.log(plain[label]) if label in columns else None, tv, bce, soft)):
      sums[term] += (0, 0) if value is None else (w * value, w)
  return np.dot((config.ce, config.tv, config.confidence, config.soft), sums[:, 0] / (sums[:, 1] + 1e-6))


@pytest.mark.parametrize("words", (None, WORDS))
def test_loss_is_the_formula(words):
  """Kills a teacher renormalised over the draft words, CE on labels outside them, TV without p's rest."""
  arrays, blocks = example(words)
  assert not np.all(np.isin(blocks.labels, WORDS)) and np.any(np.isin(blocks.labels, WORDS))
  (loss, metrics), _ = loss_and_grad(arrays, blocks, LossConfig(chunk=7), words)
  np.testing.assert_allclose(loss, brute_force(arrays, blocks, LossConfig(), words), rtol=1e-5)
  weight = np.exp(-np.nonzero(blocks.supervised)[2] / 4).sum()
  np.testing.assert_allclose(metrics["tv"].weight, weight, rtol=1e-5)


SEVERAL = LossConfig(soft=0.3, chunk=7, temperatures=(0.0, 0.6, 1.0))


def with_temperatures(blocks):
  return blocks.replace(temperature=(np.arange(ROWS)[:, None] + np.arange(ANCHORS)[None]) % 3)


@pytest.mark.parametrize("words", (None, WORDS))
def test_loss_at_temperatures_is_the_formula(words):
  """Kills: a block at another's temperature, q or p that is not softened, CE that is, a p at 0 over the draft words
  alone, a normaliser of another temperature, a confidence at 0 that learns the mass instead of the match."""
  arrays, blocks = example(words)
  blocks, goals = with_temperatures(blocks), []
  (loss, metrics), _ = loss_and_grad(arrays, blocks, SEVERAL, words)
  np.testing.assert_allclose(loss, brute_force(arrays, blocks, SEVERAL, words, goals), rtol=1e-5)
  assert {0.0, 1.0} < set(goals) or words and 0.0 in goals
  at = np.nonzero(blocks.supervised)
  of_position = [np.mean(np.array(goals)[at[2] == k]) for k in range(BLOCK)]
  np.testing.assert_allclose(mean(metrics["accept_rate"]), of_position, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("words", (None, WORDS))
def test_gradients_at_temperatures(words):
  """Kills: a gradient without 1 / T, one of p at 0, of the confidence's target, or of another block."""
  arrays, blocks = example(words)
  blocks, goals = with_temperatures(blocks), []
  grads = loss_and_grad(arrays, blocks, SEVERAL, words)[1]
  brute_force(arrays, blocks, SEVERAL, words, goals)  # the targets, which are held
  rng, step = np.random.default_rng(1), 1e-6
  for name in ("hidden", "latent", "w2", "confidence"):
    for _ in range(3):
      way = rng.normal(size=arrays[name].shape)
      moved = [brute_force(arrays | {name: arrays[name].astype(np.float64) + sign * step * way}, blocks, SEVERAL, words,
                           list(goals)) for sign in (1, -1)]
      wanted = (moved[0] - moved[1]) / (2 * step)
      np.testing.assert_allclose((np.asarray(grads[name], np.float64) * way).sum(), wanted, rtol=1e-3, atol=1e-5)
  assert not np.any(grads["target_hidden"]) and not np.any(grads["head"])


def test_every_row_has_equal_shares():
  """Kills: temperatures that follow places, so that a token is always trained at the same one; a default that draws."""
  rows, length = 5, 12
  flat = lambda x: np.broadcast_to(x, (rows, length))
  batch = Batch(flat(np.int32(1)), flat(np.bool(True)), flat(np.int32(1)), flat(np.arange(length, dtype=np.int32)))
  drawn = jax.jit(lambda seed, every, temperatures: blocks_of(
      types.SimpleNamespace(every_position=every, block_size=2), batch, jax.random.key(seed),
      StepConfig(num_anchors=9, loss=LossConfig(temperatures=temperatures))), static_argnums=(1, 2),
                  compiler_options=QUICK)
  which = [np.asarray(drawn(seed, True, (0.0, 0.5, 1.0)).temperature) for seed in range(4)]
  assert all(abs(np.bincount(row, minlength=3) - row.size / 3).max() < 1 for x in which for row in x)
  assert (np.ptp([x[:, 0] for x in which], axis=0) > 0).any() and any(np.ptp(x[:, 0]) for x in which)
  plain, several = drawn(0, False, (1.0,)), drawn(0, False, (0.0, 1.0))
  assert plain.temperature is None and several.temperature.shape == several.anchors.shape
  np.testing.assert_array_equal(plain.anchors, several.anchors)


@pytest.mark.parametrize("temperatures", [(), (-1.0,), (1.0, 0.001), (float("nan"),)])
def test_temperatures_that_are_none(temperatures):
  """Kills: logits divided by what makes infinities of them."""
  with complains("temperatures are (", "each 0 or 0.01 to 100"):
    LossConfig(temperatures=temperatures)


@pytest.mark.parametrize("words", (None, WORDS))
def test_chunks_change_nothing(words):
  """Kills chunks that drop the last slots, count the padding, or lose gradient of the shared projection."""
  arrays, blocks = example(words)
  whole = loss_and_grad(arrays, blocks, LossConfig(), words)
  assert_same(loss_and_grad(arrays, blocks, LossConfig(chunk=7), words), whole)


def test_all_words_are_the_full_vocabulary():
  """Kills a second formula for the reduced vocabulary: the normaliser per position must be the softmax's."""
  arrays, blocks = example()
  full = loss_and_grad(arrays, blocks, LossConfig(chunk=7))
  assert_same(loss_and_grad(arrays, blocks, LossConfig(chunk=7), tuple(range(VOCABULARY))), full)


def test_dummy_and_unsupervised_slots_count_for_nothing():
  """Kills a mean over all slots and a mask that is applied to the loss but not to a metric."""
  arrays, blocks = example()
  config, off = LossConfig(chunk=7), ~blocks.supervised
  (loss, metrics), grads = loss_and_grad(arrays, blocks, config)
  noise = {name: arrays[name] + 9 * off.reshape(off.shape + (1,) * (arrays[name].ndim - 3)).astype(np.float32)
           for name in ("hidden", "latent", "confidence")}
  relabelled = blocks.replace(labels=np.where(off, 0, blocks.labels))
  assert_same(loss_and_grad(arrays | noise, relabelled, config)[0], (loss, metrics))
  for name in noise:
    assert not np.any(np.asarray(grads[name])[off]), name
    assert np.all(np.any(np.asarray(grads[name])[~off].reshape((~off).sum(), -1), axis=-1)), name
  nothing = blocks.replace(supervised=np.zeros_like(blocks.supervised))
  (loss, metrics), grads = loss_and_grad(arrays, nothing, config)
  assert loss == 0 and not any(np.any(g) for g in grads.values())
  empty = [m for name, m in metrics.items() if "slots" not in name]
  assert not any(np.any(m.weight) for m in empty) and all(np.all(np.isnan(mean(m))) for m in empty)


def test_only_the_drafter_learns():
  """Kills a teacher that is pulled to the draft, and a confidence target that the draft learns from."""
  arrays, blocks = example(WORDS)
  grads = loss_and_grad(arrays, blocks, LossConfig(chunk=7), WORDS)[1]
  assert not np.any(grads["target_hidden"])
  grads = loss_and_grad(arrays, blocks, LossConfig(0.0, 0.0, 1.0, chunk=7), WORDS)[1]
  assert not np.any(grads["hidden"]) and not np.any(grads["w2"]) and np.any(grads["confidence"])


def test_no_scatter_into_logits():
  """Kills a look-up of the label: its gradient is a scatter, into an array of logits more for every chunk."""
  arrays, blocks = example()
  assert "scatter" not in str(loss_and_grad.trace(arrays, blocks, LossConfig(chunk=7)).jaxpr)


def test_a_scaled_loss_has_scaled_gradients():
  """Kills gradients taken ahead of time that forget what is done with the loss afterwards."""
  arrays, blocks = example()

  def loss(arrays, scale):
    outputs = DraftOutputs(arrays["hidden"], arrays["latent"], None)
    return scale * draft_loss(Student(arrays["w2"], None), Teacher(arrays["head"]), outputs, blocks=blocks,
                              target_hidden=arrays["target_hidden"], config=LossConfig(chunk=7))[0]

  grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)), compiler_options=QUICK)(arrays, jnp.array([1.0, 3.0]))
  for name in ("hidden", "latent", "w2"):
    np.testing.assert_allclose(grads[name][1], 3 * grads[name][0], rtol=1e-5, atol=1e-8)
    assert np.any(grads[name][0])


def test_parts_of_a_batch_add_up():
  """Kills a mean of microbatch means: the first row has fewer supervised slots than the second."""
  arrays, blocks = example(WORDS)
  config, drafter = LossConfig(chunk=7), Student(arrays["w2"], jnp.array(WORDS, jnp.int32))
  weights = term_weights(drafter, blocks, config)
  (loss, metrics), _ = loss_and_grad(arrays, blocks, config, WORDS)
  assert_same(weights, {name: metrics[name].weight for name in weights})

  def part(row):
    outputs = DraftOutputs(*(arrays[name][row] for name in ("hidden", "latent", "confidence")))
    return draft_loss(drafter, Teacher(arrays["head"]), outputs, blocks=jax.tree.map(lambda x: x[row], blocks),
                      target_hidden=arrays["target_hidden"][row], config=config, weights=weights)

  one, two = jax.jit(lambda: (part(slice(0, 1)), part(slice(1, 2))), compiler_options=QUICK)()
  assert blocks.supervised[0].sum() < blocks.supervised[1].sum()
  assert_same(add(one, two), (loss, metrics))


def test_softmaxes_are_float32_under_bfloat16():
  """Kills softmaxes in the compute dtype: TV in bfloat16 has gradients that are 6 to 31 % off."""
  arrays, blocks = example()
  low = {name: x if name == "confidence" else x.astype(jnp.bfloat16) for name, x in arrays.items()}
  exact = {name: x.astype(np.float32) for name, x in low.items()}
  (loss, metrics), grads = loss_and_grad(low, blocks, LossConfig(chunk=7))
  (wanted, wanted_metrics), wanted_grads = loss_and_grad(exact, blocks, LossConfig(chunk=7))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((loss, metrics)))
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  assert_same(metrics, wanted_metrics, rtol=1e-4)
  for name in ("hidden", "latent", "w2"):
    wanted = wanted_grads[name]
    error = np.linalg.norm(np.asarray(grads[name]).astype(np.float32) - wanted) / np.linalg.norm(wanted)
    assert error < 0.01, (name, error)  # the gradient itself is rounded to bfloat16
