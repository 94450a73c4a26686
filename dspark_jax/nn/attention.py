"""Block attention: the one attention of the project.

Every use has the same form. Queries come in blocks; a block sees a range of *context* slots and, under a mask, its
*own* block. Plain decoding is one block of one token, verification one causal block of G+1, drafting one bidirectional
block of G, a prompt or a training sequence is a row of causal blocks whose context is the sequence itself, and drafter
training is A bidirectional blocks over the target's features. No mask of [queries, context + queries] is ever built:
the two parts are computed apart and merged by their common maximum.

How it is computed has names (`Kernels`); programs choose, by platform. cuDNN, for GPUs, is not among them: whether it
serves only a GPU can show.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.config import raise_all, wrong_choices
from dspark_jax.nn.sharding import AXES, each_its_part, local
from dspark_jax.types import Array

NEG = -1e30  # finite, so that a row that sees nothing gives zeros rather than NaN
SCORE_BUDGET = 2 ** 25  # attention scores held at a time by a device, in elements: 128 MB of float32
QUERY_BLOCK = 128  # a prompt or a training sequence is cut into causal blocks of this many rows


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How attention is computed, by name; a target has it, and drafters follow. A kernel that is named refuses what
  it does not accept; auto is what `chosen` names."""
  decode: Literal["auto", "reference", "pallas", "triton"] = "reference"
  """over caches; pallas, for TPUs: nn/pallas_decode.py; triton, for GPUs: nn/triton_decode.py"""
  train: Literal["auto", "reference", "splash"] = "reference"
  """over sequences; splash, for TPUs: nn/splash.py"""
  interpret: bool = False
  """kernels run in Pallas' interpreter, on any platform: for tests"""

  def __post_init__(self):
    raise_all("kernels", wrong_choices(self))

  def chosen(self, platform: str, *, kv_heads: int, head_dim: int, layout: str) -> Kernels:
    """These, with a name for what is auto, for a platform as jax calls it and the current mesh."""
    decode = {"tpu": "pallas", "gpu": "triton", "cuda": "triton"}.get(platform, "reference")
    decode = "reference" if _unsuited(decode, kv_heads, head_dim, layout) else decode
    train = "splash" if platform == "tpu" and not _undivided(kv_heads) else "reference"
    return dataclasses.replace(self, decode=decode if self.decode == "auto" else self.decode,
                               train=train if self.train == "auto" else self.train)

  def check(self, *, kv_heads: int, head_dim: int, layout: str) -> None:
    """ValueError where the names do not suit such heads, caches of this layout, or the current mesh."""
    raise_all("kernels", _unsuited(self.decode, kv_heads, head_dim, layout, self.interpret))


def _unsuited(decode, kv_heads, head_dim, layout, interpret=False):
  """Why a kernel over caches does not suit such heads, caches of this layout, or the current mesh: sentences."""
  if decode == "reference":
    return []
  # A TPU would pad narrower rows to 128, and keep a second, padded cache; Triton has arrays of powers of two alone.
  reads, unscanned, fits, widths = {
      "pallas": ("rows", "stack its layers (scanned)", head_dim % 128 == 0, "a multiple of 128"),
      "triton": ("columns", "leave its layers unrolled", head_dim >= 16 and head_dim & (head_dim - 1) == 0,
                 "a power of two from 16 on")}[decode]
  problems = _undivided(kv_heads) + ([] if layout == reads else [
      f"{decode} reads caches of {reads}, the model's are {layout}: {unscanned}, or decode by reference"])
  return problems + ([] if fits or interpret else [f"{decode} reads heads of {widths}, the model's are {head_dim} "
                                                   f"wide: decode by reference"])


@flax.struct.dataclass
class Place:
  """Where the rows of a call stand, for every layer alike: A blocks of T rows, each with N own keys.

  Row (a, t) sees the context's slots lo <= j < hi and the rows n of its own block that `own` names.
  """
  positions: Array     # i32[B,...]     of the rows, in the shape that they come in, for the rotary embedding
  lo: Array            # i32[B,A,T]
  hi: Array            # i32[B,A,T]
  own: Array           # bool[B,A,T,N]  B and A may be 1
  start: Array | None  # i32[B]         slot of the first row; None where nothing is cached
  kernels: Kernels = flax.struct.field(pytree_node=False, default=Kernels())


@flax.struct.dataclass
class Context:
  """Keys and values that all blocks of a row share: a cache's, or a sequence's own."""
  k: Array                     # f[B,K,S,h], columns f[B,K,h,S], sequence f[B,S,K,h]; of a stack f[L,...]
  v: Array                     # f[B,K,S,h], sequence f[B,S,K,h]; of a stack f[L,...]
  layout: str = flax.struct.field(pytree_node=False)  # rows | columns | sequence
  layer: Array | None = None   # i32[]  which of a stack is meant

  def alone(self) -> Context:
    """The layer that is meant, by itself, as rows or columns."""
    if self.layout == "sequence":
      # Nobody writes into it later, so keys may lie as products read them fastest on CPU (nn/cache.py).
      return Context(jnp.moveaxis(self.k, 1, 3), jnp.swapaxes(self.v, 1, 2), "columns")
    if self.layer is None:
      return self
    # XLA's own products read this slice in place on a TPU; a kernel would get a copy of it.
    k, v = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.k, self.v))
    return Context(k, v, self.layout)


def following(start: Array, positions: Array, segments: Array | None = None, *, kernels: Kernels) -> Place:
  """The place of rows that follow one another from slot start i32[B], causally: prompts, plain steps, verification,
  training sequences.

  positions: i32[B,T], of the rows in their document: nothing before its position 0 is seen. segments: i32[B,T], where
  several documents share a row. ValueError unless T is at most QUERY_BLOCK or a multiple of it.
  """
  batch, length = positions.shape
  block = min(length, QUERY_BLOCK)
  if length % block:
    raise ValueError(f"{length} tokens in a row: expected at most {QUERY_BLOCK} or a multiple of it; pad the prompt, "
                     f"or choose another row length")
  cut = lambda x: x.reshape(-1, length // block, block)
  steps = jnp.arange(length, dtype=jnp.int32)[None]
  own = jnp.tril(jnp.ones((block, block), bool))[None, None]
  if segments is not None:
    segments = cut(segments)
    own = own & (segments[..., :, None] == segments[..., None, :])
  # Of row t: lo is the slot of its document's position 0, hi that of the first row of its own block.
  lo, hi = start[:, None] + steps - positions, start[:, None] + steps // block * block
  return Place(positions, cut(lo), cut(hi), own, start, kernels)


def at_once(positions: Array, lo: Array, hi: Array, keep: Array | None = None, *, kernels: Kernels) -> Place:
  """The place of blocks whose rows see all of their own block: positions, lo and hi i32[B,A,T].

  keep: bool[B,A], False for blocks that are no blocks and see nothing.
  """
  own = jnp.ones((1, 1, hi.shape[2], hi.shape[2]), bool)
  return Place(positions, lo, hi, own if keep is None else own & keep[..., None, None], None, kernels)


def sequence(k: Array, v: Array) -> Context:
  """The context that keys and values f[B,S,K,h] of a whole sequence make: slot = place in the row."""
  return Context(k, v, "sequence")


def attend(q: Array, k: Array, v: Array, place: Place, context: Context) -> Array:
  """Attention of query blocks over their context and their own block, in the shape of q. Rows that see nothing give 0.

  q: f[B,...,H,h], scaled already; k and v: f[B,...,K,h]; rows as place's A blocks of T and N. Computed as place.kernels
  says; a kernel over caches takes a block's lo and hi from its first row.
  """
  kernels = place.kernels
  if context.layout == "sequence" and kernels.train == "splash":
    return _by_splash(q, k, v, place, context)
  if context.layout != "sequence" and kernels.decode != "reference":
    return _by_kernel(q, k, v, place, context)
  return _by_reference(q, k, v, place, context.alone())


def _by_reference(q, k, v, place, context):
  """In chunks of blocks, each recomputed in the backward pass, so that a device holds SCORE_BUDGET scores."""
  shape, (batch, blocks, length) = q.shape, place.hi.shape
  cut = lambda x: x.reshape(batch, blocks, -1, *x.shape[-2:])
  q, k, v = cut(q), cut(k), cut(v)
  per_block = local(batch, "rows") * length * local(q.shape[3], "heads") * context.v.shape[2]
  # A divisor, so that chunks have one shape without padding: dummy blocks would cost what real ones do.
  chunk = max(c for c in range(1, blocks + 1) if blocks % c == 0 and (c == 1 or c * per_block <= SCORE_BUDGET))
  if chunk < blocks:
    split = lambda x: jnp.moveaxis(x.reshape(batch, blocks // chunk, chunk, *x.shape[2:]), 1, 0)
    # A mask that all blocks share has A = 1, of which there are no parts.
    own = jnp.broadcast_to(place.own, (batch, blocks, *place.own.shape[2:]))
    parts = jax.tree.map(split, (q, k, v, Place(None, place.lo, place.hi, own, None)))
    out = jax.lax.map(jax.checkpoint(lambda part: _by_reference(*part, context)), parts)
    return jnp.moveaxis(out, 0, 1).reshape(shape)
  heads, width, groups = *q.shape[3:], context.v.shape[1]
  q = q.reshape(batch, blocks, length, groups, heads // groups, width)
  slots = jnp.arange(context.v.shape[2], dtype=jnp.int32).reshape(1, 1, 1, -1)
  visible = (slots >= place.lo[..., None]) & (slots < place.hi[..., None])
  # [B,K,A,T,g,S] and [B,K,A,T,g,N]: the products run per row and key head over all A*T*g queries at once
  visible, own = visible[:, None, :, :, None, :], place.own[:, None, :, :, None, :]
  keys = {"rows": "bksh", "columns": "bkhs"}[context.layout]
  far = jnp.einsum(f"batkgh,{keys}->bkatgs", q, context.k, preferred_element_type=jnp.float32)
  # For GPUs XLA would make one product of both, of a copy of all keys (Qwen3-4B, 8 rows, a round: 22.9 GB, so 20.2).
  apart = jax.lax.platform_dependent(q, cuda=jax.lax.optimization_barrier, default=lambda q: q)
  near = jnp.einsum("batkgh,baskh->bkatgs", apart, k, preferred_element_type=jnp.float32)
  far, near = jnp.where(visible, far, NEG), jnp.where(own, near, NEG)
  # A softmax is the same whatever is subtracted: no gradient through the maximum.
  top = jax.lax.stop_gradient(jnp.maximum(far.max(-1, keepdims=True), near.max(-1, keepdims=True)))
  # Masked again: where a row sees nothing, top is NEG too and exp(NEG - NEG) is 1.
  far, near = jnp.where(visible, jnp.exp(far - top), 0), jnp.where(own, jnp.exp(near - top), 0)
  total = far.sum(-1) + near.sum(-1)
  out = (jnp.einsum("bkatgs,bksh->bkatgh", far.astype(v.dtype), context.v, preferred_element_type=jnp.float32)
         + jnp.einsum("bkatgs,baskh->bkatgh", near.astype(v.dtype), v, preferred_element_type=jnp.float32))
  # Divided last, h times a query instead of S + N times; tiny, so that nothing seen is 0 / tiny and not 0 / 0.
  out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
  return jnp.moveaxis(out, 1, 3).reshape(shape).astype(v.dtype)


def _by_kernel(q, k, v, place, context):
  """nn/pallas_decode.py, nn/triton_decode.py. There is no gradient: caches are read in decoding alone."""
  name = place.kernels.decode
  if context.layout != (reads := {"pallas": "rows", "triton": "columns"}[name]):
    raise ValueError(f"{name} reads caches of {reads}, got {context.layout}")
  (batch, blocks, length), (heads, width) = place.hi.shape, context.v.shape[-3::2]
  # [B,K,A,T*g,h] and [B,K,A,N,h]: a program of the kernel multiplies all queries of a key head at once
  queries = jnp.moveaxis(q.reshape(batch, blocks, length, heads, -1, width), 3, 1)
  groups = queries.shape[4]
  k, v = (jnp.moveaxis(x.reshape(batch, blocks, -1, heads, width), 3, 1) for x in (k, v))
  rows, mine = ("rows",), ("rows", "heads")
  # Here, as whoever names no kernel needs no Pallas.
  if name == "triton":
    from dspark_jax.nn.triton_decode import cached_attention
    cached, there = (context.k, context.v), (mine, mine)
  else:
    from dspark_jax.nn.pallas_decode import cached_attention
    stack = (None, *mine)
    cached, there = (context.k, context.v, context.layer), (stack, stack, ())
    if context.layer is None:
      cached = *(x[None] for x in cached[:2]), jnp.int32(0)
  raise_all("kernels", _undivided(heads))
  kernel = functools.partial(cached_attention, interpret=place.kernels.interpret)
  out = each_its_part(kernel, (mine, mine, mine, rows, *there, rows, rows),
                      queries.reshape(batch, heads, blocks, length * groups, width), k, v,
                      jnp.repeat(place.own, groups, axis=2), *cached, place.lo[:, :, 0], place.hi[:, :, 0])
  return jnp.moveaxis(out.reshape(queries.shape), 1, 3).reshape(q.shape)


def _by_splash(q, k, v, place, context):
  """nn/splash.py."""
  from dspark_jax.nn.splash import ranged_attention
  batch, blocks, length = place.hi.shape
  hi, own = place.hi, ()
  cut = lambda x: x.reshape(batch, blocks, -1, *x.shape[-2:])
  if place.start is None:
    own = cut(k), cut(v), jnp.broadcast_to(place.own, (batch, blocks, *place.own.shape[2:]))
  else:  # Rows that follow one another see up to themselves: their own blocks are part of the sequence.
    hi = jnp.broadcast_to(1 + jnp.arange(blocks * length, dtype=jnp.int32).reshape(1, blocks, length), hi.shape)
  raise_all("kernels", _undivided(context.k.shape[2]))
  rows, along, mine = ("rows",), ("rows", None, "heads"), ("rows", None, None, "heads")
  kernel = functools.partial(ranged_attention, interpret=place.kernels.interpret)
  out = each_its_part(kernel, (mine, along, along, rows, rows, mine, mine, rows)[:5 + len(own)],
                      cut(q), context.k, context.v, place.lo, hi, *own)
  return out.reshape(q.shape)


def _undivided(heads):
  """Why key heads do not suit kernels on the current mesh, if so: every device would read all of the keys."""
  mesh = jax.sharding.get_abstract_mesh()
  devices = 1 if mesh.empty else mesh.shape[AXES["heads"]]
  return [f"{heads} key heads cannot be split over {devices} devices of the mesh's axis {AXES['heads']}: choose a "
          f"divisor, or attention by reference"] if heads % devices else []
