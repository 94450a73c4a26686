"""What stored files call a model by: hashes, which tell one model from another and say nothing else."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp

from dspark_jax.config import to_json
from dspark_jax.nn.parameters import values
from dspark_jax.nn.sharding import on_host
from dspark_jax.types import Array, Drafter, Target


def target_id(target: Target, stored: str | None = None) -> str:
  """A hash of configuration and a few numbers of every weight: it tells targets apart, also where an adapter was merged
  into some matrices alone, whatever their dtype, layer layout and mesh. Of several processes all must call it.

  stored: what a file names its target by; it is given back where a former version named this target so.
  """
  ids = _target_ids(target)
  return stored if stored in ids else ids[-1]


def is_target(target: Target, stored: str) -> bool:
  """Whether what was stored for the target of this id was so for this one, also by a version whose hash had no more of
  the weights than the final norm and some of the embedding."""
  return stored in _target_ids(target)


def _target_ids(target):
  """[the id of former versions, the id]"""
  digest, ids = hashlib.sha256(json.dumps(to_json(target.config), sort_keys=True).encode()), []
  for part in on_host(_some(target)):
    digest.update(part.tobytes())
    ids.append(digest.hexdigest()[:16])
  return ids


@jax.jit
def _some(target: Target) -> tuple[Array, Array]:
  """Numbers of the target's weights, bf16[n] and bf16[m]: those of the former id, and a few of each of the rest."""
  # Rounded, as any dtype that they were loaded in must give the same; from both layouts in one order: by the kinds of
  # layers, then by name. In one program, as there may be a thousand parts, of which a transfer each would take long.
  of = lambda *parts: jnp.concatenate([x.astype(jnp.bfloat16).reshape(-1) for x in parts])
  few = lambda x, stacked=0: x[(slice(None),) * stacked + (slice(1),) * (x.ndim - stacked - 1) + (slice(64),)]
  period = len(target.config.period)
  kinds = [[values(layer).values() for layer in target.layers[i::period]] for i in range(period)]
  layers = [few(x, int(target.scanned)) for kind in kinds for column in zip(*kind) for x in column]
  return of(target.norm.weight[...], target.embed_tokens.weight[:8]), of(*layers, few(target.head().weight))


def drafter_id(drafter: Drafter) -> str:
  """What tells one drafter from another, or from itself after more training: a hash of configuration and weights."""
  digest = hashlib.sha256(json.dumps(to_json(drafter.config), sort_keys=True).encode())
  for name, value in values(drafter).items():
    digest.update(name.encode() + on_host(value).tobytes())
  # Parameters alone would not do: with other words, the same weights draft other tokens.
  digest.update(b"" if drafter.words is None else on_host(drafter.words).tobytes())
  return digest.hexdigest()[:16]
