"""Temperature, top-k and top-p, and drawing from what they leave: the same functions for draft and target."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.types import Array


@flax.struct.dataclass
class Sampling:
  """How tokens are chosen. Only `mode` recompiles; within a mode the three numbers are traced."""
  temperature: Array  # f32[]
  top_k: Array        # i32[]  0 = off
  top_p: Array        # f32[]  1 = off
  mode: str = flax.struct.field(pytree_node=False)  # "greedy" | "full" | "truncated"

  @classmethod
  def of(cls, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    """Settings as a user gives them; temperature 0 is greedy and ignores the other two."""
    if not (temperature >= 0 and math.isfinite(temperature)):
      raise ValueError(f"temperature is {temperature}, must be finite and >= 0: use 0 for greedy")
    if top_k < 0 or top_k != int(top_k):
      raise ValueError(f"top_k is {top_k}, must be an integer >= 0: use 0 to turn it off")
    if not 0 < top_p <= 1:
      raise ValueError(f"top_p is {top_p}, must be in (0, 1]: use 1 to turn it off")
    mode = "greedy" if temperature == 0 else "full" if top_k == 0 and top_p == 1 else "truncated"
    return cls(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), mode)


def probabilities(logits: Array, sampling: Sampling) -> Array:
  """Distribution that tokens are drawn from: f32[...,V], from logits f[...,V].

  Temperature, then top-k, then top-p over what is left, as in Hugging Face; the token that crosses top_p is
  kept. Ties with the last token kept are all kept, so the order of the vocabulary plays no part (Hugging
  Face: same for top-k, arbitrary for top-p). Greedy: one-hot at the first maximum. Logit -inf gives exactly
  0. Rows that hold NaN, +inf or no finite logit become NaN (greedy: 0 where `argmax` finds no token);
  `draw` then returns V.
  """
  logits = logits.astype(jnp.float32)
  if sampling.mode == "greedy":
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return (tokens == argmax(logits)[..., None]).astype(jnp.float32)
  # The maximum goes first: a small temperature would overflow the raw logits.
  scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
  if sampling.mode == "truncated":
    scaled = _truncate(scaled, sampling)
  return jax.nn.softmax(scaled, axis=-1)


def draw(keys: Array, probs: Array) -> Array:
  """Tokens drawn from f32[...,V], one key each: i32[...]. V where a row holds a NaN or no mass at all.

  keys: typed keys of shape [...]. A token of probability 0 is never drawn; a row's token depends on its own
  key and probabilities only. First a chunk of the vocabulary by its mass, then a token inside it, each by a
  Gumbel race: the same distribution as one race over V, for about 2 sqrt(V) random numbers (40 times faster
  on CPU).
  """
  def draw_one(key, row):
    chunks = _chunks(row, 0.0)
    n, width = chunks.shape
    # Mode "low" resolves the uniforms only to 2^-23, which quantises the tail of the vocabulary.
    noise = jax.random.gumbel(key, (n + width,), jnp.float32, mode="high")
    chunk = _first_max(jnp.log(jnp.sum(chunks, axis=-1)) + noise[:n])
    return _join(chunk, _first_max(jnp.log(_pick(chunks, chunk)) + noise[n:]), chunks, row)

  for _ in range(keys.ndim):
    draw_one = jax.vmap(draw_one)
  return draw_one(keys, probs)


def argmax(logits: Array) -> Array:
  """First maximum of f[...,V]: i32[...]. V, which is no token, where a row holds a NaN or nothing above -inf.

  So a caller sees broken logits as `tokens >= V`, never as token 0. Chunk maxima come first: on CPU 6 times
  faster than jnp.argmax, whose reduction over (value, index) pairs is not vectorised.
  """
  chunks = _chunks(logits, -jnp.inf)
  chunk = _first_max(jnp.max(chunks, axis=-1))
  return _join(chunk, _first_max(_pick(chunks, chunk)), chunks, logits)


def split_keys(keys: Array, n: int) -> Array:
  """n independent keys for each row, to unpack by name: keys [n,B] from keys [B]."""
  return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys)


def _truncate(scaled, sampling):
  """scaled with -inf outside top-k and top-p. scaled: f32[...,V], maximum 0."""
  size = scaled.shape[-1]
  distance = -scaled
  rank_limit = jnp.where(sampling.top_k > 0, sampling.top_k, size).astype(jnp.float32)
  rank_limit = jnp.broadcast_to(rank_limit, distance.shape[:-1])
  # Comparisons are turned so that a NaN stays in and poisons its row.
  cut = distance > _threshold(distance, jnp.ones_like(distance), rank_limit)
  mass = jnp.where(cut, 0.0, jnp.exp(scaled))
  # Sums in float32 reach the total before the last token: at top_p = 1 they must cut nothing.
  top_p = jnp.where(sampling.top_p < 1.0, sampling.top_p, jnp.inf)
  cut |= distance > _threshold(distance, mass, top_p * jnp.sum(mass, axis=-1))
  return jnp.where(cut, -jnp.inf, scaled)


def _threshold(distance, weight, limit):
  """Largest t for which the weight at distances < t is below the limit: f32[...,1].

  distance: f32[...,V] >= 0, inf allowed. limit: f32[...], positive. Replaces sort, cumulative sum and
  look-up. Bisection over the 31 bits of a non-negative float, which order like integers, is exact; on CPU
  both cuts take a tenth to a twentieth of the time of one sort.
  """
  bits = jax.lax.bitcast_convert_type(jnp.abs(distance), jnp.int32)  # abs: -0.0 would be a negative integer

  def refine(step, found):
    candidate = found | jax.lax.shift_left(jnp.int32(1), jnp.int32(30) - step)
    nearer = jnp.sum(jnp.where(bits < candidate[..., None], weight, 0.0), axis=-1)
    return jnp.where(nearer < limit, candidate, found)

  found = jax.lax.fori_loop(0, 31, refine, jnp.zeros(limit.shape, jnp.int32))
  # Above the bits of inf lie NaNs, which would compare false.
  found = jnp.minimum(found, jnp.int32(0x7F800000))
  return jax.lax.bitcast_convert_type(found, jnp.float32)[..., None]


def _first_max(x):
  """Index of the first maximum; the size where there is a NaN or nothing above -inf."""
  size = x.shape[-1]
  best = jnp.max(x, axis=-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  first = jnp.min(jnp.where(x == best, index, size), axis=-1)
  return jnp.where(best[..., 0] > -jnp.inf, first, size)


def _chunks(x, fill):
  """f[...,V] as f[...,n,width], padded with fill, width a power of two near sqrt(V)."""
  size = x.shape[-1]
  width = 1 << (size.bit_length() // 2)
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % width)]
  return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:-1], -1, width)


def _pick(chunks, chunk):
  return jnp.take_along_axis(chunks, chunk[..., None, None], axis=-2, mode="clip")[..., 0, :]


def _join(chunk, within, chunks, x):
  return jnp.minimum(chunk * chunks.shape[-1] + within, x.shape[-1])
