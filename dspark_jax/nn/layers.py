"""The parts of a transformer layer. Modules carry the names under which checkpoints store them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import Count, Range
from dspark_jax.nn.attention import Place
from dspark_jax.nn.cache import Full, Layout
from dspark_jax.nn.packing import PackedPlace, through
from dspark_jax.nn.rope import Theta, Yarn, rope_table, rotate
from dspark_jax.nn.sharding import ROWS, constrain, local
from dspark_jax.sampling import argmax, largest
from dspark_jax.types import Array

SMALL_ROWS = 256  # up to so many, platforms take products in orders of their own
TILE = 2 ** 23       # logits of which a TPU makes an argmax at a time: 34 MB


def _few_rows_on_cpu(weight, x):
  rows, half = x.shape[0], x.dtype == jnp.bfloat16
  # XLA's CPU backend is faster with a float32 weight as the left operand, while the rows are few, and a multiple of 8:
  # a step of SmolLM2, ms of CPU, 20 rows 119 against 137 in the usual order, 32 rows 129 against 178, 64 rows 220
  # against 260; 80 rows 332 against 326.
  if rows > (16 if half else 64) or rows == 1 and not half:
    return _contract(x, weight, 1, 1)
  x = jnp.pad(x, ((0, -rows % (4 if rows <= 4 else 8)), (0, 0)))
  if half:  # the usual order (8 rows: 12 ms against 40 ms), but never one row (67 ms, 4 rows 9 ms)
    return _contract(x, weight, 1, 1)[:rows]
  # The barriers keep XLA from folding the transposes back into x @ weight.T, which is the slow order.
  x = jax.lax.optimization_barrier(x.T)
  return jax.lax.optimization_barrier(jnp.matmul(weight, x, preferred_element_type=jnp.float32)).T[:rows]


def _few_rows_on_tpu(weight, x):
  rows, width = x.shape
  if local(rows, "rows") > 1:
    return _contract(x, weight, 1, 1)
  # A matrix times a vector is left to the vector unit; a second row, which the compiler must not see through, brings it
  # back to the matrix unit (plain steps of Qwen3-8B, one row, by the compilers: v5p 37 Mcycles without it, 21 with it,
  # v6e 55 and 23). On an axis of its own, where v5p takes it for a fifth less than as another of the rows.
  x = jax.lax.optimization_barrier(jnp.pad(x[:, None], ((0, 0), (0, 1), (0, 0))).reshape(2 * rows, width))
  return _contract(x, weight, 1, 1).reshape(rows, 2, -1)[:, 0]


def _contract(a, b, a_axis, b_axis, dtype=jnp.float32):
  """Sum over one axis of each, accumulated in float32 whatever the inputs: bfloat16 in and out is slow on CPU."""
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(axes, dtype, weight, x):
  """x @ weight.T: dtype[N,out], summed in float32, from weight f[out,in] and x f[N,in]."""
  # Gathered where it is used: else a mesh would exchange the rows of all devices, and keep a weight's part each.
  weight = constrain(weight, *axes)
  if x.shape[0] <= SMALL_ROWS:
    # By the platform that is compiled for: a process on a CPU compiles for TPUs, too (infer.compile). A GPU rounds its
    # sums before they leave the product: asked to round them afterwards, it writes and reads them in float32.
    return jax.lax.platform_dependent(
        weight, x, cpu=lambda w, x: _few_rows_on_cpu(w, x).astype(dtype),
        tpu=lambda w, x: _few_rows_on_tpu(w, x).astype(dtype), cuda=lambda w, x: _contract(x, w, 1, 1, dtype),
        default=lambda w, x: _contract(x, w, 1, 1).astype(dtype))
  return _contract(x, weight, 1, 1).astype(dtype)


def _product_backward(axes, dtype, saved, cotangent):
  # Written out so that bfloat16 products stay bfloat16 products: JAX would multiply by a float32 cotangent.
  weight, x = saved
  cotangent = cotangent.astype(x.dtype)
  # Straight to where it is stored, so that the devices' sums are scattered as they are added up.
  d_weight = constrain(_contract(cotangent, x, 0, 0), *axes, stored=True).astype(weight.dtype)
  return d_weight, _contract(cotangent, constrain(weight, *axes), 1, 0).astype(x.dtype)


_product.defvjp(lambda axes, dtype, weight, x: (_product(axes, dtype, weight, x), (weight, x)), _product_backward)


def linear(weight: Array, x: Array, dtype=None, *, axes: tuple[str | None, str | None] = (None, "embed")) -> Array:
  """x @ weight.T: f[...,out], in `dtype` (default: x's). weight: f[out,in], x: f[...,in], of one dtype.

  axes: logical ones of the weight (nn/sharding.py); the first axis of x, where it has more than one, is rows.
  """
  rows = ("rows",) + (None,) * (x.ndim - 2) if x.ndim > 1 else ()
  x = constrain(x, *rows, axes[1])
  y = _product(axes, jnp.dtype(dtype or x.dtype), weight, x.reshape(-1, x.shape[-1]))
  return constrain(y.reshape(*x.shape[:-1], weight.shape[0]), *rows, axes[0])


class Linear(nnx.Module):
  """weight f[out,in] in the order of stored checkpoints; bias f[out] or None. Truncated-normal start of std 0.02.

  axes: logical ones of the weight (nn/sharding.py).
  """

  def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, bias: bool = False,
               axes: tuple[str | None, str | None] = (None, "embed")):
    self.axes = axes
    self.weight = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -3, 3, (fan_out, fan_in)), axes=axes)
    self.bias = nnx.Param(jnp.zeros(fan_out)) if bias else None

  def __call__(self, x: Array) -> Array:
    y = linear(self.weight[...], x, axes=self.axes)
    # Broadcast by hand, as everywhere: implicit ranks are refused (jax_numpy_rank_promotion=raise).
    return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


WORDS = ("vocab", "embed")  # the logical axes of a target's tables, which have a row per word


@flax.struct.dataclass
class WordHead:
  """Logits over W words, f32[...,W], from f[...,D]: the one place where hidden states meet a vocabulary."""
  weight: Array  # f[W,D], or copies of it, f[C,W,D], each for its part of the rows
  axes: tuple[str | None, str | None] = flax.struct.field(pytree_node=False, default=WORDS)  # logical, of the weight
  softcap: float | None = flax.struct.field(pytree_node=False, default=None)  # logits stay within +-softcap

  def __call__(self, hidden: Array) -> Array:
    # Not rounded to bfloat16 on the way, which would make ties of the largest.
    if self.weight.ndim == 3:
      # Of one device each, whose gradients are stored where they are: over tensor alone.
      product = jax.vmap(functools.partial(_product, ("vocab", None), jnp.float32), spmd_axis_name=ROWS)
      logits = product(self.weight, hidden.reshape(self.weight.shape[0], -1, hidden.shape[-1]))
      logits = logits.reshape(*hidden.shape[:-1], -1)
    else:
      logits = linear(self.weight, hidden, jnp.float32, axes=self.axes)
    return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

  def best(self, hidden: Array) -> Array:
    """`sampling.argmax` of the logits, i32[...]: where many rows would need much memory at once, of some words at a
    time."""
    words, rows = self.weight.shape[0], local(hidden.shape[0], "rows") * math.prod(hidden.shape[1:-1])
    tiles = -(-rows * words // TILE)
    if tiles < 2 or local(words, "vocab") < words:  # each device has words of its own
      return argmax(self(hidden))
    width = -(-words // tiles // 128) * 128  # whole lanes
    return jax.lax.platform_dependent(self, hidden, tpu=functools.partial(WordHead._best_of_tiles, width=width),
                                      default=lambda head, hidden: argmax(head(hidden)))

  def _best_of_tiles(self, hidden, width):
    words, each = self.weight.shape[0], hidden.shape[:-1]
    best, most = jnp.full(each, words, jnp.int32), jnp.full(each, -jnp.inf)
    for first in range(0, words, width):
      top, index = largest(self.replace(weight=self.weight[first:first + width])(hidden))
      best = jnp.where(top > most, first + index, best)
      # One after the other: else all logits are there at once again. A NaN stays.
      best, most, hidden = jax.lax.optimization_barrier((best, jnp.maximum(most, top), hidden))
    return jnp.where(most > -jnp.inf, best, words)

  def copies(self, count: int) -> WordHead:
    """The same head with a weight [count,W,D], of which every device that has rows of its own has one: what gradients
    are added up in without an exchange."""
    weight = jnp.broadcast_to(self.weight, (count, *self.weight.shape))
    return self.replace(weight=constrain(weight, "rows", *self.axes))

  def joined(self, gradients: WordHead) -> WordHead:
    """The gradient of this head from those of its copies: their sum, where the weight is stored."""
    weight = constrain(gradients.weight.sum(0), *self.axes, stored=True)
    return self.replace(weight=weight.astype(self.weight.dtype))

  def at(self, words: Array | None) -> WordHead:
    """The head over words i32[W] alone; itself for None, without a copy."""
    return self if words is None else self.replace(weight=jnp.take(self.weight, words, axis=0, mode="clip"))


class Embedding(nnx.Module):
  """A table f[rows,width]; called with ids it returns their rows. axes: logical ones (nn/sharding.py)."""

  def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs, axes: tuple[str | None, str | None] = WORDS):
    self.weight = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -3, 3, (rows, width)), axes=axes)

  def __call__(self, ids: Array) -> Array:
    found = jnp.take(self.weight[...], ids, axis=0, mode="clip")
    return constrain(found, *("rows",)[:ids.ndim])


class RMSNorm(nnx.Module):
  """x / rms(x) * weight over the last axis, computed in float32, returned in x's dtype."""

  def __init__(self, width: int, eps: float):
    self.weight = nnx.Param(jnp.ones(width))
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    # Hugging Face rounds to x's dtype before it multiplies with the weight; in float32 that is the same.
    weight = self.weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * weight).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """The static description of one transformer layer. A family whose layers differ in more than numbers extends it."""
  hidden_size: Count
  intermediate_size: Count
  num_heads: Count
  num_kv_heads: Count
  head_dim: Count
  rms_norm_eps: Annotated[float, Range(0, 1)]
  rope_theta: Theta
  qk_norm: bool = False
  rope_scaling: Yarn | None = None

  def build(self, *, rngs: nnx.Rngs) -> Block:
    """A layer of this kind, for targets and for the drafters that repeat it."""
    return Block(self, rngs=rngs)

  def flops(self, seen: float) -> float:
    """Of one token's way through a layer in which it attends to so many keys: two per weight that it is multiplied
    with, four per key and channel of a query."""
    heads = self.head_dim * self.num_heads
    weights = 2 * (heads + self.head_dim * self.num_kv_heads) + 3 * self.intermediate_size
    return 2 * self.hidden_size * weights + 4 * heads * seen

  def init_cache(self, batch: int, max_len: int, dtype, *, layout: Layout, stacked: int = 0) -> Full:
    """The cache of such a layer without a token; stacked: of so many layers."""
    return Full.empty(batch, self.num_kv_heads, max_len, self.head_dim, dtype, layout=layout, stacked=stacked)


class Attention(nnx.Module):
  """The projections of an attention layer; who attends to whom is the caller's. inputs: their width, default D."""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs, inputs: int = 0):
    self.spec = spec
    inputs = inputs or spec.hidden_size
    heads = functools.partial(Linear, inputs, rngs=rngs, axes=("heads", "embed"))
    self.q_proj = heads(spec.num_heads * spec.head_dim)
    self.k_proj = heads(spec.num_kv_heads * spec.head_dim)
    self.v_proj = heads(spec.num_kv_heads * spec.head_dim)
    self.o_proj = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, rngs=rngs, axes=("embed", "heads"))
    self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
    self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None

  def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """(q f[...,H,h], scaled by h^-1/2, k f[...,K,h], v f[...,K,h]) of rows x f[...,D] at positions i32[...]."""
    q = self.q_proj(x).reshape(*x.shape[:-1], self.spec.num_heads, self.spec.head_dim)
    # The norm goes before the rotation: its weights differ within a pair that is rotated.
    q = rotate(q if self.q_norm is None else self.q_norm(q), self._rope(positions))
    # Scaled here and not in `attend`: other families scale by other numbers, kernels by their own or (splash) by none.
    return q * jnp.asarray(self.spec.head_dim ** -0.5, q.dtype), *self.keys_values(x, positions)

  def keys_values(self, x: Array, positions: Array) -> tuple[Array, Array]:
    """(k, v), each f[...,K,h], of rows that others attend to."""
    shape = (*x.shape[:-1], self.spec.num_kv_heads, self.spec.head_dim)
    k, v = self.k_proj(x).reshape(shape), self.v_proj(x).reshape(shape)
    return rotate(k if self.k_norm is None else self.k_norm(k), self._rope(positions)), v

  def _rope(self, positions):
    # Made anew by every layer, so that a layer needs no more than a place: the compiler makes it once for all of them.
    return rope_table(positions, self.spec.head_dim, self.spec.rope_theta, self.spec.rope_scaling)


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x))"""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
    self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs, axes=("mlp", "embed"))
    self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs, axes=("mlp", "embed"))
    self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, rngs=rngs, axes=("embed", "mlp"))

  def __call__(self, x: Array) -> Array:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """A pre-norm transformer layer: `project`, attention, `close`. Drafters use the parts, with their own context."""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
    self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.self_attn = Attention(spec, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.mlp = MLP(spec, rngs=rngs)

  def __call__(self, x: Array, place: Place | PackedPlace, cache: Any) -> tuple[Array, Any]:
    """(x f[B,...,D], or packed f[N,D], after the layer, the cache with its rows written); without a cache x sees itself
    alone."""
    cache, out = through(cache, *self.project(x, place.positions), place)
    return self.close(x, out), cache

  def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """(q f[...,H,h], k f[...,K,h], v f[...,K,h]) of the residual stream x f[...,D] at positions i32[...]."""
    return self.self_attn.project(self.input_layernorm(x), positions)

  def keys_values(self, context: Array, positions: Array) -> tuple[Array, Array]:
    """(k, v), each f[...,K,h], of a drafter's context rows, which are normed already."""
    return self.self_attn.keys_values(context, positions)

  def close(self, x: Array, out: Array) -> Array:
    """The residual stream f[...,D] with what attention found, f[...,H,h], and with the MLP's share."""
    x = x + self.self_attn.o_proj(out.reshape(*x.shape[:-1], -1))
    return x + self.mlp(self.post_attention_layernorm(x))
