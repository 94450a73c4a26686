"""Three ways to start a drafter before its first training step: from the target's layers, from the data's bigrams, and
the lens in closed form. The paper has none of them. Each returns a new drafter and leaves the given one as it was.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.drafters.dspark import DSpark
from dspark_jax.drafters.heads import Vanilla
from dspark_jax.drafters.model import DraftModel
from dspark_jax.drafters.starts import lens_inputs
from dspark_jax.types import Array, Batch, Target, TargetOutput

# Of the final norm's weight beside bigrams: what an untrained backbone says must not drown them.
BIGRAM_NORM = 0.3
# Of the bigrams' logits beside a lens, which predicts from the anchor, too, and so knows most of what bigrams say of
# the first draft: counted in full they would count twice.
BIGRAMS_BESIDE_LENS = 0.25
# The weight of the lens's prior, in observations (inputs have a mean square of 1). On SmolLM2-135M the first draft was
# right on held-out text in 30, 38, 43, 43 % after 3,000, 12,000, 45,000, 94,000 positions; 100 and 1,000 were as
# good or worse at each.
RIDGE = 300.0
# Of the final norm's weight under a lens: a norm gives what is uncertain the size of what is sure.
LENS_NORM = 0.4
# Hidden states are divided by the final norm's weight, but not by one that is nearly zero: its direction is not read.
LEAST_SCALE = 1e-6


def copied(drafter: DraftModel) -> DraftModel:
  """The drafter with variables of its own: merging a split would share them with the argument."""
  return jax.tree.map(lambda x: x, drafter)


def from_target(drafter: DraftModel, target: Target) -> DraftModel:
  """The drafter with layers and final norm started from the target's last layers.

  What projects the taps starts as the last tap alone: the residual stream that is nearest to what those layers read in
  the target. ValueError when the drafter's block is not the target's.
  """
  config, count = drafter.config, len(drafter.layers)
  if config.spec != target.config.spec or count > target.config.num_layers:
    raise ValueError(f"{count} draft layers {config.spec} cannot start from the target's "
                     f"{target.config.num_layers} layers {target.config.spec}: use the target's own block")
  dtype, new = drafter.norm.weight[...].dtype, copied(drafter)
  new.start_from([jax.tree.map(lambda x: x.astype(dtype), layer) for layer in target.last_layers(count)])
  new.norm.weight.set_value(target.norm.weight[...].astype(dtype))
  return new


def from_bigrams(drafter: DSpark, w1: Array, w2: Array) -> DSpark:
  """The drafter with its vanilla sequential head started from factors W1 f[V,R], W2 f[W,R] (`words.bigram_factors`).

  On 19,000 tokens it brought tau from 1.26 to 1.42. ValueError: the drafter has another head, or none.
  """
  new = copied(drafter)
  if type(getattr(new, "markov_head", None)) is not Vanilla:
    raise ValueError("only a vanilla sequential head can start from bigrams: set markov_head to vanilla and its rank")
  dtype, strength = new.norm.weight[...].dtype, BIGRAMS_BESIDE_LENS if new.config.lens else 1.0
  new.markov_head.markov_w1.weight.set_value(jnp.asarray(w1, dtype))
  new.markov_head.markov_w2.weight.set_value(strength * jnp.asarray(w2, dtype))
  new.norm.weight.set_value(BIGRAM_NORM * new.norm.weight[...])
  return new


# The lens: ridge regression of the target's hidden states, in one pass over the data.


@flax.struct.dataclass
class Moments:
  """Sums over observations; I inputs and a constant one, T positions of a block."""
  gram: Array   # f32[I+1,I+1]
  cross: Array  # f32[I+1,T*D]  inputs times the hidden states of the positions
  size: Array   # f32[]         rms of the last tap
  count: Array  # f32[]


def no_moments(drafter: DSpark) -> Moments:
  """Moments of nothing."""
  outputs, inputs = drafter.lens.proj.weight.shape
  return Moments(jnp.zeros((inputs + 1, inputs + 1)), jnp.zeros((inputs + 1, outputs)), jnp.zeros(()), jnp.zeros(()))


def observe(moments: Moments, drafter: DSpark, target: Target, batch: Batch, encoded: TargetOutput | None = None
            ) -> Moments:
  """The moments with those of a batch. encoded: what the target says of it, where that is stored. A block counts at
  every t where t - 1, t, ..., t + T - 1 are of one document."""
  ahead, encoded = drafter.lens.positions, target.encode(batch, drafter.taps) if encoded is None else encoded
  length = batch.tokens.shape[1] - ahead
  inside = (batch.segments[:, :length] == batch.segments[:, ahead:]) & (batch.segments[:, :length] > 0)
  features = encoded.features[:, :length]
  inputs = lens_inputs(target.embed(batch.tokens[:, 1:length + 1]), features)
  inputs = jnp.where(inside[..., None], jnp.concatenate([inputs, jnp.ones((*inputs.shape[:2], 1))], axis=-1), 0)
  hidden = jnp.concatenate([encoded.hidden[:, 1 + k:1 + k + length] for k in range(ahead)], axis=-1).astype(jnp.float32)
  product = lambda other: jnp.einsum("bti,bto->io", inputs, other, precision="highest")
  last = features[..., -encoded.hidden.shape[-1]:].astype(jnp.float32)
  size = jnp.where(inside, jnp.sqrt((last * last).mean(-1)), 0).sum()
  new = Moments(product(inputs), product(hidden), size, inside.sum().astype(jnp.float32))
  return jax.tree.map(jnp.add, moments, new)


def checked(moments: Moments) -> Moments:
  """The moments; ValueError when they are of nothing, or not finite."""
  if not float(moments.count) or not bool(jnp.isfinite(moments.cross).all()):
    raise ValueError(f"the lens cannot be fitted to {int(moments.count)} positions: expected finite hidden states and "
                     "documents longer than a block")
  return moments


def from_moments(drafter: DSpark, target: Target, moments: Moments) -> DSpark:
  """The drafter with the best linear lens; its layers add nothing yet.

  The positions get the size of the last tap, which is what the target's last layers read and what keeps a step of
  training small beside them.
  """
  penalty = RIDGE * jnp.eye(moments.gram.shape[0])
  weight = jax.scipy.linalg.solve(moments.gram + penalty, moments.cross, assume_a="pos")
  scale = target.norm.weight[...].astype(jnp.float32)
  scale = jnp.where(jnp.abs(scale) < LEAST_SCALE, 1, scale)  # hidden states are taken before the norm's weight
  weight *= moments.size / moments.count / jnp.tile(scale, drafter.lens.positions)[None]
  new = copied(drafter)
  dtype = new.norm.weight.dtype
  new.lens.proj.weight.set_value(weight[:-1].T.astype(dtype))
  new.lens.proj.bias.set_value(weight[-1].astype(dtype))
  new.norm.weight.set_value((LENS_NORM * target.norm.weight[...]).astype(dtype))
  for layer in new.layers:
    for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
      last.weight.set_value(jnp.zeros_like(last.weight[...]))
  return new
