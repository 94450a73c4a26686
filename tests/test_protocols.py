"""A target and a drafter that have nothing but the Protocols run through decoding and training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dspark_jax
from dspark_jax.metrics import mean
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.cache import insert_row, take_row
from dspark_jax.nn.layers import WordHead
from dspark_jax.sampling import draw, probabilities
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import OptimizerConfig, StepConfig, init_state, train_step
from dspark_jax.types import Drafter, DraftHead, DraftOutputs, Proposal, Target, TargetOutput
from test_targets import batch_of, random_tokens

VOCABULARY, WIDTH, BLOCK = 12, 8, 3


class Pairs(nnx.Module):
  """A language model whose hidden state is of the newest two tokens; its cache is a list of tokens."""
  vocab_size, max_positions, cache_layout, kernels = VOCABULARY, 64, "rows", Kernels()

  def __init__(self):
    table = np.random.default_rng(0).normal(size=(VOCABULARY, WIDTH))
    self.table = nnx.Param(jnp.asarray(table, jnp.float32))

  def feature_width(self, taps):
    return len(taps) * WIDTH

  def init_cache(self, batch, max_len):
    return {"tokens": jnp.zeros((batch, max_len + 1), jnp.int32), "length": jnp.zeros(batch, jnp.int32)}

  def embed(self, tokens):
    return self.table[tokens]

  def _say(self, tokens, before, taps):
    hidden = jnp.tanh(self.embed(tokens) + 0.5 * jnp.roll(self.embed(before), 1, axis=-1))
    return TargetOutput(hidden, jnp.concatenate([hidden * 0 + tap for tap in taps], -1) if taps else hidden[..., :0])

  def __call__(self, tokens, cache, taps, packing=None):
    if packing is not None:
      return self._packed(tokens, cache, taps, packing)
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    written = put(cache["tokens"], tokens, cache["length"] + 1)
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + cache["length"][:, None]
    return self._say(tokens, jnp.take_along_axis(written, steps, axis=1), taps), cache | {"tokens": written}

  def _packed(self, tokens, cache, taps, packing):
    rows, chunk = packing.split(tokens)
    out, after = self(packing.rows(rows), cache, taps)
    if packing.seat is None:
      return jax.tree.map(lambda x: packing.join(x, None), out), after
    read, one = self(chunk[None], take_row(after, packing.seat), taps)
    return jax.tree.map(lambda x, y: packing.join(x, y[0]), out, read), insert_row(after, packing.seat, one)

  def encode(self, batch, taps):
    before = jnp.pad(batch.tokens[:, :-1], ((0, 0), (1, 0)))
    return self._say(batch.tokens, jnp.where(batch.positions > 0, before, 0), taps)

  def head(self, words=None):
    return WordHead(self.table[...], softcap=3.0).at(words)

  def commit(self, cache, n):
    return cache | {"length": cache["length"] + n}

  def insert(self, cache, row, one):
    return insert_row(cache, row, one)

  def take(self, cache, row):
    return take_row(cache, row)

  def cut(self, cache, row, n):
    return cache | {"length": cache["length"].at[row].set(n)}


class NextWord(nnx.Module):
  """A drafter that knows of every token what may follow it, and counts what it has read."""
  taps, block_size, words, every_position, has_confidence = (4, 2), BLOCK, None, False, True

  def __init__(self):
    self.follow = nnx.Param(0.1 * jax.random.normal(jax.random.key(1), (VOCABULARY, WIDTH)))
    self.sure = nnx.Param(jnp.zeros(WIDTH))

  def init_state(self, target, batch, max_len):
    assert target.feature_width(self.taps) == 2 * WIDTH
    return {"read": jnp.zeros(batch, jnp.int32), "features": jnp.zeros((batch, target.feature_width(self.taps)))}

  def insert(self, state, row, one):
    return insert_row(state, row, one)

  def take(self, state, row):
    return take_row(state, row)

  def cut(self, state, row, n):
    return state | {"read": state["read"].at[row].set(n)}

  def absorb(self, target, state, committed):
    return {"read": state["read"] + committed.n, "features": committed.encoded.features[:, 0]}

  def head(self, target):
    return DraftHead(target.head(self.words), None)

  def propose(self, target, head, state, anchor, keys, sampling):
    rows, token = [], anchor
    for k in range(BLOCK):
      logits = head(self.follow[token], None)
      probs = probabilities(logits, sampling)
      token = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, k), probs)
      rows.append((token, logits, probs, jax.nn.sigmoid(self.follow[token] @ self.sure[...])))
    tokens, logits, probs, confidence = (jnp.stack(x, axis=1) for x in zip(*rows))
    return Proposal(tokens, logits, None if sampling.mode == "greedy" else probs, confidence, None)

  def train_outputs(self, target, batch, encoded, blocks):
    hidden = self.follow[blocks.previous]
    return DraftOutputs(hidden, None, hidden @ self.sure[...])


@pytest.mark.parametrize("fake, protocol", [(Pairs, Target), (NextWord, Drafter)])
def test_the_fakes_have_what_the_protocols_name_and_nothing_else(fake, protocol):
  """Kills: a Protocol that leaves out what decoding or training asks for, and a fake that has more than it says."""
  public = lambda names: {name for name in names if not name.startswith("_")}
  members = public(protocol.__annotations__) | public(vars(protocol))
  assert public(vars(fake)) == members
  assert public(vars(fake())) - members == {"table"} if fake is Pairs else {"follow", "sure"}


@pytest.mark.slow
def test_decoding_asks_for_the_protocols_alone():
  """Kills: a round that looks into a family's configuration, cache or weights."""
  target, drafter = Pairs(), NextWord()
  prompts = [random_tokens(n, seed=n).tolist() for n in (3, 1, 5)]
  plain = dspark_jax.generate(target, None, prompts, max_new_tokens=9)
  drafted = dspark_jax.generate(target, drafter, prompts, max_new_tokens=9, confidence_threshold=0.1)
  assert drafted.tokens == plain.tokens
  row = list(prompts[0])
  for token in plain.tokens[0]:
    hidden = target.encode(batch_of(np.array([row], np.int32)), ()).hidden[0, -1]
    assert token == int(np.argmax(target.head()(hidden[None])))
    row.append(token)
  sampled = dspark_jax.generate(target, drafter, prompts, max_new_tokens=9, temperature=1.0, top_k=5)
  assert all(0 <= token < VOCABULARY for row in sampled.tokens for token in row)
  assert sampled.n_verify[0][0] == BLOCK


def test_training_asks_for_the_protocols_alone():
  """Kills: a step that knows a drafter's layers, or a loss that multiplies with the target's table behind its back: the
  soft-cap would miss the draft's logits."""
  target, drafter = Pairs(), NextWord()
  config = StepConfig(num_anchors=8, compute_dtype="float32", loss=LossConfig(chunk=16),
                      optimizer=OptimizerConfig(learning_rate=0.05, warmup_ratio=0))
  step = jax.jit(functools.partial(train_step, config=config))
  state, batch, losses = init_state(drafter, config, 0, total_steps=40), batch_of(random_tokens(4, 24)), []
  for _ in range(25):
    state, metrics = step(state, target, batch)
    losses.append(float(metrics["loss"].sum))
  assert losses[-1] < 0.9 * losses[0] and float(mean(metrics["tau"])) > 1
  for name in ("follow", "sure"):
    assert np.abs(getattr(state.drafter, name)[...] - getattr(drafter, name)[...]).max() > 1e-3
  logits = state.drafter.head(target)(100 * state.drafter.follow[...], None)
  assert np.abs(logits).max() <= 3
