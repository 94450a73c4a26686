"""What a drafter starts from: its target's layers, bigrams, a lens fitted in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.drafters.dspark import DSpark
from dspark_jax.targets.decoder import Decoder, stack_layers
from dspark_jax.training import starts
from dspark_jax.types import Committed, TargetOutput
from test_training import BLOCK, LENGTH, ROWS, SPEC, VOCABULARY, batch_of, drafter_of, models


def test_a_drafter_started_from_its_target():
  """Kills a start from the first layers, one that depends on whether the target's layers are stacked, and one that
  changes the drafter it was given."""
  target, drafter = models()
  before = jax.tree.map(np.array, drafter)
  starts.from_target(drafter, target)
  jax.tree.map(np.testing.assert_array_equal, drafter, before)
  start = lambda t, d: (starts.from_target(d, t), starts.from_target(d, stack_layers(t)))
  one, stacked = jax.jit(start)(target, drafter)
  jax.tree.map(np.testing.assert_array_equal, one, stacked)
  assert jax.tree.structure(one) == jax.tree.structure(drafter)
  for mine, theirs in zip(one.layers, target.layers[1:]):
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
  taps = np.random.default_rng(0).normal(size=(1, 2, 32)).astype(np.float32)
  np.testing.assert_allclose(one.fc(taps), taps[..., 16:], rtol=1e-6)
  other = dataclasses.replace(target.config, spec=dataclasses.replace(SPEC, num_heads=4))
  with pytest.raises(ValueError, match="use the target's own block"):
    starts.from_target(drafter, Decoder(other, rngs=nnx.Rngs(0)))


def test_a_drafter_started_from_bigrams():
  """Kills factors in each other's place, a backbone whose untrained logits drown the bigrams, bigrams beside a lens
  that count the first draft twice."""
  target, drafter = models()
  rng = np.random.default_rng(0)
  w1, w2 = rng.normal(size=(VOCABULARY, 4)), rng.normal(size=(30, 4))
  started = starts.from_bigrams(drafter, w1, w2)
  assert jax.tree.structure(started) == jax.tree.structure(drafter)
  hidden, previous = rng.normal(size=(3, 16)).astype(np.float32), jnp.array([5, 0, 39])
  state, latent = started.markov_head.step(None, started.markov_head.markov_w1(previous), hidden)
  with_bias = started.head(target)(hidden, latent)
  np.testing.assert_allclose(with_bias - started.head(target)(hidden, None), w1[previous] @ w2.T,
                             rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(started.norm(hidden), 0.3 * drafter.norm(hidden), rtol=1e-6)
  beside = starts.from_bigrams(DSpark(dataclasses.replace(drafter.config, lens=True), rngs=nnx.Rngs(0)), w1, w2)
  np.testing.assert_allclose(beside.markov_head.markov_w2.weight[...], 0.25 * w2, rtol=1e-6)
  gated = DSpark(dataclasses.replace(drafter.config, markov_head="gated"), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="only a vanilla sequential head"):
    starts.from_bigrams(gated, w1, w2)


@pytest.mark.slow
def test_a_lens_fitted_in_closed_form():
  """Against ridge regression written as a loop. Kills a slot off by one, a document that reads its neighbour, padding
  that counts, sums that forget a batch, and layers that speak before they have learnt."""
  target = models()[0]
  drafter = DSpark(dataclasses.replace(drafter_of().config, lens=True), rngs=nnx.Rngs(1))
  batches = [batch_of(seed, lengths) for seed, lengths in ((0, (7, 7)), (1, (7, 4)))]  # more padding than a block
  moments = starts.no_moments(drafter)
  for batch in batches:
    moments = jax.jit(starts.observe)(moments, drafter, target, batch)
  fitted = jax.jit(starts.from_moments)(drafter, target, moments)

  unit = lambda x: x / np.sqrt((x * x).mean())
  inputs, hidden, sizes = [], [], []
  encode = jax.jit(Decoder.encode, static_argnums=2)
  table, norm = np.asarray(target.embed_tokens.weight[...]), np.asarray(target.norm.weight[...])
  for batch in batches:
    encoded = jax.tree.map(np.asarray, encode(target, batch, drafter.taps))
    for row, t in np.ndindex(ROWS, LENGTH - 1):
      taps = encoded.features[row, t].reshape(2, 16)
      own = batch.segments[row, t]
      if own and (batch.segments[row, t:t + BLOCK + 1] == own).sum() == BLOCK + 1:
        inputs.append(np.concatenate([unit(table[batch.tokens[row, t + 1]]), unit(taps[0]), unit(taps[1]), [1]]))
        hidden.append(np.concatenate([encoded.hidden[row, t + 1 + k] / norm for k in range(BLOCK)]))
        sizes.append(np.sqrt((taps[1] ** 2).mean()))
  x, y = np.stack(inputs), np.stack(hidden)
  assert len(x) == moments.count == 8 * (4 + 4 + 4 + 1)
  best = np.linalg.solve(x.T @ x + starts.RIDGE * np.eye(x.shape[1]), x.T @ y) * np.mean(sizes)
  np.testing.assert_allclose(fitted.lens.proj.weight[...].T, best[:-1], rtol=1e-3, atol=1e-4 * np.abs(best).max())
  np.testing.assert_allclose(fitted.lens.proj.bias[...], best[-1], rtol=1e-3, atol=1e-4 * np.abs(best).max())

  features = encoded.features[:1, 2]
  state = fitted.init_state(target, 1, 16)
  newest = TargetOutput(encoded.hidden[:1, :3], encoded.features[:1, :3])
  state = fitted.absorb(target, state, Committed(newest, None, jnp.full(1, 3)))
  np.testing.assert_array_equal(state.held, features)
  start = fitted.start(target, jnp.array([5]), features)
  np.testing.assert_array_equal(fitted.draft(start, state.cache, target.kernels), fitted.norm(start))
