"""The parts of a transformer layer. Modules carry the names under which checkpoints store them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.config import Count, Range
from dspark_jax.nn.attention import Place, attend
from dspark_jax.nn.cache import Full, Layout, extend
from dspark_jax.types import Array

# Below this many rows a matrix product is bound by reading its weight, and XLA's CPU backend is fast only when a
# float32 weight is the left operand (measured at 8 rows: 25 ms a pass against 40 ms for the usual order), and when the
# rows are a power of two (7 rows: 31 ms, 8 rows: 24 ms).
SMALL_ROWS = 256


def _few_rows(weight, x):
  rows = x.shape[0]
  x = jnp.pad(x, ((0, max(1 << (rows - 1).bit_length(), 4) - rows if rows <= 64 else 0), (0, 0)))
  if x.dtype == jnp.bfloat16:  # the usual order (8 rows: 12 ms against 40 ms), but never one row (67 ms, 4 rows 9 ms)
    return _contract(x, weight, 1, 1)[:rows]
  # The barriers keep XLA from folding the transposes back into x @ weight.T, which is the slow order.
  x = jax.lax.optimization_barrier(x.T)
  return jax.lax.optimization_barrier(jnp.matmul(weight, x, preferred_element_type=jnp.float32)).T[:rows]


def _contract(a, b, a_axis, b_axis):
  """Sum over one axis of each, accumulated in float32 whatever the inputs: bfloat16 in and out is slow on CPU."""
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(weight, x):
  """x @ weight.T in float32: f32[N,out], from weight f[out,in] and x f[N,in]."""
  if x.shape[0] <= SMALL_ROWS and (x.shape[0] > 1 or x.dtype == jnp.bfloat16):
    # By the platform that is compiled for: a process on a CPU compiles for TPUs, too (infer.memory).
    return jax.lax.platform_dependent(weight, x, cpu=_few_rows, default=lambda w, x: _contract(x, w, 1, 1))
  return _contract(x, weight, 1, 1)


def _product_backward(saved, cotangent):
  # Written out so that bfloat16 products stay bfloat16 products: JAX would multiply by a float32 cotangent.
  weight, x = saved
  cotangent = cotangent.astype(x.dtype)
  return _contract(cotangent, x, 0, 0).astype(weight.dtype), _contract(cotangent, weight, 1, 0).astype(x.dtype)


_product.defvjp(lambda weight, x: (_product(weight, x), (weight, x)), _product_backward)


def linear(weight: Array, x: Array, dtype=None) -> Array:
  """x @ weight.T: f[...,out], in `dtype` (default: x's). weight: f[out,in], x: f[...,in], of one dtype."""
  y = _product(weight, x.reshape(-1, x.shape[-1])).astype(dtype or x.dtype)
  return y.reshape(*x.shape[:-1], weight.shape[0])


class Linear(nnx.Module):
  """weight f[out,in] in the order of stored checkpoints; bias f[out] or None. Truncated-normal start of std 0.02."""

  def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, bias: bool = False):
    self.weight = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -3, 3, (fan_out, fan_in)))
    self.bias = nnx.Param(jnp.zeros(fan_out)) if bias else None

  def __call__(self, x: Array) -> Array:
    y = linear(self.weight[...], x)
    # Broadcast by hand, as everywhere: implicit ranks are refused (jax_numpy_rank_promotion=raise).
    return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


@flax.struct.dataclass
class WordHead:
  """Logits over W words, f32[...,W], from f[...,D]: the one place where hidden states meet a vocabulary."""
  weight: Array  # f[W,D]
  softcap: float | None = flax.struct.field(pytree_node=False, default=None)  # logits stay within +-softcap

  def __call__(self, hidden: Array) -> Array:
    # Not rounded to bfloat16 on the way, which would make ties of the largest.
    logits = linear(self.weight, hidden, jnp.float32)
    return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

  def at(self, words: Array | None) -> WordHead:
    """The head over words i32[W] alone; itself for None, without a copy."""
    return self if words is None else self.replace(weight=jnp.take(self.weight, words, axis=0, mode="clip"))


class Embedding(nnx.Module):
  """A table f[rows,width]; called with ids it returns their rows."""

  def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
    self.weight = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -3, 3, (rows, width)))

  def __call__(self, ids: Array) -> Array:
    return jnp.take(self.weight[...], ids, axis=0, mode="clip")


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


def rope_table(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
  """(cos, sin), f32[...,1,head_dim/2], for positions i32[...]; the size-1 axis stands for heads.

  Frequencies are pinned to float32: the reference rounds them to bfloat16 in training, a phase error of 0.6 rad
  at distance 512.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape((1,) * (positions.ndim + 1) + (-1,))
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
  """Rotary embedding in half rotation (Hugging Face order). x: f[...,heads,head_dim]; rope from `rope_table`."""
  cos, sin = rope
  # In float32, rounded once at the end: Hugging Face rounds cos and sin to x's dtype before they meet x.
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


Theta = Annotated[float, Range(1, 1e30)]  # the base of a rotary embedding


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

  def build(self, *, rngs: nnx.Rngs) -> Block:
    """A layer of this kind, for targets and for the drafters that repeat it."""
    return Block(self, rngs=rngs)

  def init_cache(self, batch: int, max_len: int, dtype, *, layout: Layout, stacked: int = 0) -> Full:
    """The cache of such a layer without a token; stacked: of so many layers."""
    return Full.empty(batch, self.num_kv_heads, max_len, self.head_dim, dtype, layout=layout, stacked=stacked)


class Attention(nnx.Module):
  """The projections of an attention layer; who attends to whom is the caller's. inputs: their width, default D."""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs, inputs: int = 0):
    self.spec = spec
    inputs = inputs or spec.hidden_size
    self.q_proj = Linear(inputs, spec.num_heads * spec.head_dim, rngs=rngs)
    self.k_proj = Linear(inputs, spec.num_kv_heads * spec.head_dim, rngs=rngs)
    self.v_proj = Linear(inputs, spec.num_kv_heads * spec.head_dim, rngs=rngs)
    self.o_proj = Linear(spec.num_heads * spec.head_dim, spec.hidden_size, rngs=rngs)
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
    return rope_table(positions, self.spec.head_dim, self.spec.rope_theta)


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x))"""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
    self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
    self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
    self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  """A pre-norm transformer layer: `project`, attention, `close`. Drafters use the parts, with their own context."""

  def __init__(self, spec: BlockSpec, *, rngs: nnx.Rngs):
    self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.self_attn = Attention(spec, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.mlp = MLP(spec, rngs=rngs)

  def __call__(self, x: Array, place: Place, cache: Any) -> tuple[Array, Any]:
    """(x f[B,...,D] after the layer, the cache with its rows written); without a cache x sees itself alone."""
    q, k, v = self.project(x, place.positions)
    cache, context = extend(cache, k, v, place.start)
    return self.close(x, attend(q, k, v, place, context)), cache

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
