"""Eagle3 and MTP: training on packed rows, starting from the target, storing. Contract and goldens are with the
others."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax.drafters import DRAFTERS
from dspark_jax.metrics import mean
from dspark_jax.nn import attention
from dspark_jax.nn.parameters import parameters, values
from dspark_jax.targets.decoder import stack_layers
from dspark_jax.training import starts
from dspark_jax.training import step as training
from dspark_jax.training.anchors import all_blocks
from dspark_jax.training.losses import EAGLE3, draft_loss
from dspark_jax.training.step import OptimizerConfig, StepConfig, init_state
from dspark_jax.types import Committed, TargetOutput
from folders import assert_same_weights, qwen3, words
from test_drafters import small_drafter
from test_targets import batch_of, packed, random_tokens, small_target

KINDS = ("eagle3", "mtp")
LOSS = dataclasses.replace(EAGLE3, chunk=16)


def test_blocks_of_every_position():
  """Kills blocks that reach into the next document or past the row, and a mask read at the label."""
  batch = batch_of(random_tokens(1, 8), *packed((3, 4), 8))
  batch = batch.replace(loss_mask=np.array([[1, 1, 1, 0, 1, 1, 1, 0]], bool))
  blocks = jax.tree.map(np.asarray, all_blocks(batch, 2))
  np.testing.assert_array_equal(blocks.anchors[0], [1, 2, 0, 4, 5, 6, 0, 0])
  np.testing.assert_array_equal(blocks.keep[0], [1, 1, 0, 1, 1, 1, 0, 0])
  np.testing.assert_array_equal(blocks.supervised[0], [[1, 1], [1, 0], [0, 0], [0, 1], [1, 1], [1, 0], [0, 0], [0, 0]])
  np.testing.assert_array_equal(blocks.previous[0, 3], batch.tokens[0, [4, 5]])


@pytest.mark.slow
def test_labels_end_with_their_document():
  """Kills cross-entropy on a token of the next document, or of none: draft position k of column i has the label
  i + k + 2, of which the reference's rule, made for a loss without labels, does not ask."""
  target, drafter = small_target("qwen3"), small_drafter(small_target("qwen3"), "eagle3")
  batch = batch_of(random_tokens(1, 8), *packed((3, 4), 8))
  blocks = all_blocks(batch, 3)
  encoded = target.encode(batch, drafter.taps)
  outputs = drafter.train_outputs(target, batch, encoded, blocks)
  config = dataclasses.replace(LOSS, ce=1.0, soft=0.0)
  loss = lambda blocks: draft_loss(drafter, target, outputs, blocks=blocks, target_hidden=encoded.hidden, config=config)
  (value, metrics), length = loss(blocks), np.array([3] * 3 + [7] * 4 + [8])[:, None]
  inside = (np.arange(8)[:, None] + np.arange(3) + 2 < length) & np.asarray(blocks.supervised[0])
  assert 0 < inside.sum() < blocks.supervised.sum()
  weight = np.where(inside, 0.8 ** np.arange(3), 0).sum()
  np.testing.assert_allclose(metrics["ce"].weight, weight, rtol=1e-5)
  np.testing.assert_allclose(value, loss(blocks.replace(supervised=inside[None]))[0], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_in_blocks(kind, monkeypatch):
  """Kills columns of a long prompt that do not see those of the blocks before theirs."""
  target, drafter = small_target("qwen3"), small_drafter(small_target("qwen3"), kind)
  said = TargetOutput(*np.random.default_rng(0).normal(size=(2, 1, 256, 16)).astype(np.float32))
  said = said.replace(features=np.concatenate([said.features] * 2, -1))
  committed = Committed(said, random_tokens(1, 256), np.array([256], np.int32))

  def hidden():  # traced anew at each call
    run = lambda committed: drafter.absorb(target, drafter.init_state(target, 1, 256), committed).hidden
    return jax.jit(run)(committed)

  assert attention.QUERY_BLOCK == 128
  blocks = hidden()
  monkeypatch.setattr(attention, "QUERY_BLOCK", 256)
  np.testing.assert_allclose(blocks, hidden(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_nothing(kind):
  """Kills context or RoPE positions that cross documents: two of them packed in a row, or apart."""
  target, drafter = small_target("qwen3"), small_drafter(small_target("qwen3"), kind)
  text = random_tokens(1, 7)

  @jax.jit
  def run(batch):
    blocks, encoded = all_blocks(batch, 3), target.encode(batch, drafter.taps)
    outputs = drafter.train_outputs(target, batch, encoded, blocks)
    loss, metrics = draft_loss(drafter, target, outputs, blocks=blocks, target_hidden=encoded.hidden, config=LOSS)
    return outputs.hidden, blocks.supervised, loss, metrics

  together = run(batch_of(np.pad(text, ((0, 0), (0, 1))), *packed((3, 4), 8)))
  rows = np.stack([np.pad(text[0, :3], (0, 5)), np.pad(text[0, 3:], (0, 4))])
  apart = run(batch_of(rows, *(np.concatenate(x) for x in zip(packed((3,), 8), packed((4,), 8)))))
  here = np.asarray(together[0][0])[np.asarray(together[1][0])]
  there = np.concatenate([np.asarray(apart[0][r])[np.asarray(apart[1][r])] for r in range(2)])
  np.testing.assert_allclose(here, there, atol=1e-5)
  np.testing.assert_allclose(together[2], 2 * apart[2], rtol=1e-5)  # half the positions
  np.testing.assert_allclose(mean(together[3]["tau"]), mean(apart[3]["tau"]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_learned(kind):
  """Kills a parameter that no gradient reaches, a step that samples anchors where all positions are due."""
  target, drafter = small_target("qwen3"), small_drafter(small_target("qwen3"), kind)
  config = StepConfig(compute_dtype="float32", loss=LOSS, optimizer=OptimizerConfig(learning_rate=0.02, warmup_ratio=0))
  step = jax.jit(functools.partial(training.train_step, config=config))
  state, batch, losses = init_state(drafter, config, 0, total_steps=40), batch_of(random_tokens(2, 16)), []
  before = values(state.drafter)
  for _ in range(30):
    state, metrics = step(state, target, batch)
    losses.append(float(metrics["loss"].sum))
  assert losses[-1] < 0.85 * losses[0]  # the target's own entropy is left
  for name, value in values(state.drafter).items():
    assert np.abs(value - before[name]).max() > 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_started_from_the_target(kind):
  """Kills a start from another layer, one that depends on stacking, and one that changes the drafter it was given."""
  target, drafter = small_target("qwen3"), small_drafter(small_target("qwen3"), kind)
  before = jax.tree.map(np.array, drafter)
  started = starts.from_target(drafter, target)
  jax.tree.map(np.testing.assert_array_equal, drafter, before)
  jax.tree.map(np.testing.assert_array_equal, started, starts.from_target(drafter, stack_layers(target)))
  assert jax.tree.structure(started) == jax.tree.structure(drafter)
  last, mine = target.layers[-1], started.layers[0]
  jax.tree.map(np.testing.assert_array_equal, mine.mlp, last.mlp)
  hidden = np.random.default_rng(0).normal(size=(1, 1, 32)).astype(np.float32)
  if kind == "eagle3":
    np.testing.assert_array_equal(mine.self_attn.k_proj.weight[:, 16:], last.self_attn.k_proj.weight[...])
    np.testing.assert_array_equal(mine.self_attn.k_proj.weight[:, :16],
                                  drafter.layers[0].self_attn.k_proj.weight[:, :16])
    np.testing.assert_allclose(started.fc(hidden), hidden[..., 16:], rtol=1e-6)
  else:
    np.testing.assert_array_equal(mine.self_attn.k_proj.weight[...], last.self_attn.k_proj.weight[...])
    only_hidden = np.concatenate([np.zeros((1, 1, 16), np.float32), hidden[..., 16:]], -1)
    np.testing.assert_allclose(started.eh_proj(only_hidden), hidden[..., 16:], rtol=1e-6)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_and_exported(kind, reduced, tmp_path):
  """Kills: a sidecar read as another drafter's; a DeepSpec folder written for what that format cannot say."""
  config = qwen3().config
  shape = DRAFTERS[kind].Config(spec=config.spec, vocab_size=config.vocab_size, num_target_layers=config.num_layers,
                                taps=tuple(range(config.num_layers - 1)), block_size=4)
  drafter = dspark_jax.new_drafter(shape, words=words() if reduced else None, seed=3)
  dspark_jax.save_drafter(tmp_path / "ours", drafter, qwen3())
  again = dspark_jax.load_drafter(tmp_path / "ours", qwen3())
  assert type(again) is type(drafter) and again.config == drafter.config
  assert_same_weights(again, drafter)
  if reduced:
    np.testing.assert_array_equal(again.words, words())
  if kind == "mtp" or reduced:
    with pytest.raises(ValueError, match="cannot be stored"):
      dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
    assert not (tmp_path / "out").exists()
  else:
    dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
    exported = dspark_jax.load_drafter(tmp_path / "out", qwen3())
    assert exported.config == drafter.config
    assert_same_weights(exported, drafter)


def test_eagle3_needs_taps():
  """Kills: an fc of no inputs, which fails far away from the mistake."""
  with pytest.raises(ValueError, match="no taps"):
    small_drafter(small_target("qwen3"), "eagle3", taps=())
  assert parameters(small_drafter(small_target("qwen3"), "mtp", taps=()))
