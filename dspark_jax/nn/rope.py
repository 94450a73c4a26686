"""Rotary embeddings: what a base and a scaling make of them, and how they turn heads."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np

from dspark_jax.config import Count, Range, raise_all, wrong_choices
from dspark_jax.types import Array

Theta = Annotated[float, Range(1, 1e30)]  # the base of a rotary embedding
Positive, NotNegative = Annotated[float, Range(1e-6, 1e6)], Annotated[float, Range(0, 1e6)]


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng et al., 2023), by the keys that a Hugging Face config.json has for it."""
  factor: Annotated[float, Range(1, 1e6)]  # how much longer texts may be
  original_max_position_embeddings: Count  # than these, which the model was trained on
  beta_fast: Positive = 32.0
  beta_slow: Positive = 1.0
  truncate: bool = True
  attention_factor: Positive | None = None
  mscale: NotNegative | None = None
  mscale_all_dim: NotNegative | None = None
  rope_type: Literal["yarn"] = "yarn"

  def __post_init__(self):
    raise_all("yarn", wrong_choices(self))

  @property
  def positions(self) -> int:
    """As many as it is made for, or as an int32 counts."""
    return min(int(self.factor * self.original_max_position_embeddings), 2 ** 31 - 1)

  @property
  def scale(self) -> float:
    """What cos and sin are multiplied by, of queries and of keys both."""
    if self.attention_factor is not None:
      return self.attention_factor
    of = lambda k: 0.1 * k * math.log(self.factor) + 1  # 1 where the factor is
    # Both or none, and 0 is none: as transformers reads them.
    return of(self.mscale) / of(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else of(1)

  def slowed(self, theta: float, width: int) -> np.ndarray:
    """f64[width/2]: 0 where a pair turns often within the original length and keeps its frequency, 1 where it is slowed
    by the whole factor."""
    # The pair, counted in half widths, that turns b times within the original length.
    pair = lambda b: width * math.log(self.original_max_position_embeddings / (2 * math.pi * b)) / max(
        2 * math.log(theta), 1e-9)
    low, high = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)


def frequencies(width: int, theta: float, scaling: Yarn | None = None) -> tuple[Array, float]:
  """(f32[width/2]: by how much the pairs of a head so wide turn a position; what cos and sin are multiplied by).

  Pinned to float32: the reference rounds them to bfloat16 in training, a phase error of 0.6 rad at distance 512.
  """
  plain = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if scaling is None:
    return plain, 1.0
  slowed = jnp.asarray(scaling.slowed(theta, width), jnp.float32)
  return plain / scaling.factor * slowed + plain * (1 - slowed), scaling.scale


def rope_table(positions: Array, width: int, theta: float, scaling: Yarn | None = None) -> tuple[Array, Array]:
  """(cos, sin), f32[...,1,width/2], for positions i32[...] of heads so wide; the size-1 axis stands for heads."""
  frequency, scale = frequencies(width, theta, scaling)
  angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape((1,) * (positions.ndim + 1) + (-1,))
  return (jnp.cos(angle), jnp.sin(angle)) if scale == 1 else (scale * jnp.cos(angle), scale * jnp.sin(angle))


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
  """Rotary embedding in half rotation (Hugging Face order). x: f[...,heads,head_dim]; rope from `rope_table`."""
  cos, sin = rope
  # In float32, rounded once at the end: Hugging Face rounds cos and sin to x's dtype before they meet x.
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
