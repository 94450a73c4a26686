"""The KV cache: slot = position, one length per row.

Rows are written at the end of the committed part before anybody knows whether they will stay; a row is committed by
advancing the length, rejected by not advancing it. Slots at or past the length have weight 0 in every later call until
one has overwritten them, so nothing is cleared but where another request begins (`Full.cut`).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from dspark_jax.nn.attention import Context, sequence
from dspark_jax.nn.sharding import constrain, each_its_part, sharding_of
from dspark_jax.types import Array

# How keys lie. Along columns f[...,h,S] the CPU reads them faster for its products. Rows f[...,S,h] are what an
# accelerator writes in place: at 2,048 slots a plain step of a stack with columns copies the stack twice (Qwen3-4B,
# batch 8, by the compiler of a TPU v5p: 18.0 GB a step, with rows 10.8; at 2,112 slots both move 10.9).
Layout = Literal["rows", "columns"]


@flax.struct.dataclass
class Full:
  """Keys and values of every token of a layer, or of a stack of L layers, of which one is meant at a time."""
  k: Array             # f[B,K,S,h], columns f[B,K,h,S]; stacked f[L,...]
  v: Array             # f[B,K,S,h]; stacked f[L,...]
  layer: Array | None  # i32[]  which of a stack is meant, while its layers are scanned; else None
  layout: Layout = flax.struct.field(pytree_node=False)

  @classmethod
  def empty(cls, batch: int, num_kv_heads: int, capacity: int, head_dim: int, dtype, *, layout: Layout,
            stacked: int = 0) -> Full:
    """The cache of a layer without a token; stacked: of so many layers."""
    lead = ((stacked,) if stacked else ()) + (batch, num_kv_heads)
    # What is never read must be finite all the same: attention gives it weight 0, and 0 * NaN is NaN.
    rows, columns = (capacity, head_dim), (head_dim, capacity)
    # An array each: of one that stands for two, only one could be donated.
    axes = (None,) * bool(stacked) + ("rows", "heads")
    keys, values = (constrain(jnp.zeros((*lead, *shape), dtype), *axes)
                    for shape in (rows if layout == "rows" else columns, rows))
    return cls(keys, values, None, layout)

  @property
  def stacked(self) -> bool:
    """Whether this is of several layers."""
    return self.v.ndim == 5

  def write(self, k: Array, v: Array, start: Array, row: Array | None = None) -> Full:
    """The cache with rows k, v: f[B,T,K,h] at slots start..start+T-1 of their rows, start i32[B]. row: i32[], the
    cache's row that k and v belong to, where they are of one alone.

    The caller keeps start + T <= capacity: a window that ran over the end would slide back over committed rows.
    """
    k, v = (jnp.swapaxes(x, 1, 2).astype(self.v.dtype) for x in (k, v))
    k, axis = (jnp.swapaxes(k, 2, 3), 3) if self.layout == "columns" else (k, 2)
    layer = jnp.int32(0) if self.layer is None else self.layer
    if row is not None:
      put = lambda old, new, axis: self._put(old, new, start, layer, row, axis=axis)
      return self.replace(k=put(self.k, k, axis), v=put(self.v, v, 2))
    there, rows = (None,) * self.stacked + ("rows", "heads"), ("rows", "heads")

    def put(old, new, axis):  # Row by row on one device: left to XLA, devices that share the rows would copy the stack.
      write = functools.partial(self._put, axis=axis)
      return each_its_part(write, (there, rows, ("rows",), ()), old, new, start, layer)
    return self.replace(k=put(self.k, k, axis), v=put(self.v, v, 2))

  def _put(self, old, new, start, layer, first=0, *, axis):
    """old with a window new[b] per row first + b, its first slot (on `axis` of new f[B,K,...]) at start[b]."""
    batch, lead = new.shape[0], (layer,) if self.stacked else ()
    # Row by row, for accelerators: of a batch of scattered windows one row long (a plain step) the TPU compiler makes
    # another layout from 16 rows on, and copies the stack into it and back in every step (Qwen3-4B, v5p, 16 rows: 42.5
    # GB a step, with this loop 13.6); 64 scattered windows also take twice the cycles of 64 updates.
    if batch == 1 or self.layout == "rows":
      for row in range(batch):
        at = [jnp.int32(first + row), *[jnp.int32(0)] * 3]
        at[axis] = start[row]
        old = jax.lax.dynamic_update_slice(old, new[row:row + 1].reshape([1] * len(lead) + [1, *new.shape[1:]]),
                                           [*lead, *at])
      return old
    # On a CPU, whose layers are unrolled, hundreds of rows would make a hundred times as many operations to compile.
    # for b in range(batch): old[layer, b, :, start[b]:start[b] + T] = new[b], where axis is 2
    # One index per row of the batch, and whole windows: with an index per element (what `old.at[layer, rows, :, slots]`
    # becomes) 16 rows of 8 tokens were 131,072 updates.
    where = [jnp.arange(batch, dtype=jnp.int32), start.astype(jnp.int32)]
    if lead:
      where.insert(0, jnp.broadcast_to(layer, (batch,)))
    skip, lead = len(lead), tuple(range(len(lead)))
    # Rows are counted up, hence sorted and unique; in bounds by the promise that callers of `write` make.
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(*lead, skip),
        scatter_dims_to_operand_dims=(*lead, skip, skip + axis))
    return jax.lax.scatter(old, jnp.stack(where, axis=1), new, numbers, indices_are_sorted=True, unique_indices=True,
                           mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)

  def context(self, row: Array | None = None) -> Context:
    """All slots, to be read up to a length; of one row i32[] alone, a batch of one."""
    if row is None:
      return Context(self.k, self.v, self.layout, self.layer)
    return Context(*(self._row(x, row) for x in (self.k, self.v)), self.layout)

  def _row(self, x, row):
    """f[1,K,...]: a row of the layer that is meant, without a copy of the layer's others."""
    at = ((self.layer,) if self.stacked else ()) + (row, *[jnp.int32(0)] * 3)
    return jax.lax.dynamic_slice(x, at, (1,) * (x.ndim - 3) + x.shape[-3:]).reshape(1, *x.shape[-3:])

  def take(self, row: Array) -> Full:
    """A cache of row i32[] alone, of all layers."""
    one = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, 1 if self.stacked else 0)
    return self.replace(k=one(self.k), v=one(self.v))

  def cut(self, row: Array, n: Array) -> Full:
    """The cache with row i32[] emptied from slot n i32[] on."""
    one = self.take(row)

    def kept(x, axis):
      slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim + axis)
      return jnp.where(slot < n, x, 0)
    return self.insert(row, one.replace(k=kept(one.k, -1 if self.layout == "columns" else -2), v=kept(one.v, -2)))

  def insert(self, row: Array, one: Full) -> Full:
    """The cache with row i32[] taken from `one`, a cache of one row with as many slots or fewer."""
    # Slots past those of `one` keep what the row's last owner left: they lie past its length, where nobody reads.
    axis = 1 if self.stacked else 0
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis)
    return self.replace(k=put(self.k, one.k), v=put(self.v, one.v))


@flax.struct.dataclass
class Cache:
  """The caches of some layers, and what of them is committed."""
  layers: tuple[Full, ...]  # one per layer, or stacked: one per layer of a period
  length: Array             # i32[B]  committed slots

  def commit(self, n: Array) -> Cache:
    """The cache after the first n: i32[B] of the rows just written have become final."""
    return self.replace(length=self.length + n)

  def take(self, row: Array) -> Cache:
    """A cache of row i32[] alone."""
    return Cache(tuple(layer.take(row) for layer in self.layers), jax.lax.dynamic_slice_in_dim(self.length, row, 1))

  def cut(self, row: Array, n: Array) -> Cache:
    """The cache with the first n i32[] tokens alone of row i32[]; the slots behind them are emptied: a NaN that another
    request has left there would be read all the same (0 * NaN)."""
    return Cache(tuple(layer.cut(row, n) for layer in self.layers), self.length.at[row].set(n))

  def insert(self, row: Array, one: Cache) -> Cache:
    """The cache with row i32[] taken from `one`, a cache of one row."""
    return Cache(tuple(mine.insert(row, theirs) for mine, theirs in zip(self.layers, one.layers)),
                 insert_row(self.length, row, one.length))


def row_shardings(state: Any) -> Any:
  """A NamedSharding on the current mesh for a tree of per-row arrays [B,...] and caches: rows apart, and the key heads
  of caches."""
  def place(x):
    if not isinstance(x, Full):
      return sharding_of(x.shape, "rows")
    lead = (None,) * x.stacked
    return x.replace(k=sharding_of(x.k.shape, *lead, "rows", "heads"), v=sharding_of(x.v.shape, *lead, "rows", "heads"))
  return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, Full))


def insert_row(state: Any, row: Array, one: Any) -> Any:
  """A tree of per-row arrays [B,...] and caches with row i32[] taken from `one`, the same tree of one row."""
  def put(mine, theirs):
    if isinstance(mine, Cache):
      return mine.insert(row, theirs)
    return jax.lax.dynamic_update_slice_in_dim(mine, theirs.astype(mine.dtype), row, 0)
  return jax.tree.map(put, state, one, is_leaf=lambda x: isinstance(x, Cache))


def take_row(state: Any, row: Array) -> Any:
  """Row i32[] of a tree of per-row arrays [B,...] and caches, the same tree of one row."""
  one = lambda x: x.take(row) if isinstance(x, Cache) else jax.lax.dynamic_slice_in_dim(x, row, 1)
  return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Cache))


def cut_row(state: Any, row: Array, n: Array) -> Any:
  """The tree with the first n i32[] tokens alone in the caches of row i32[]; what a row holds beside them is of its
  newest token, of no use until the next is absorbed, and emptied."""
  return jax.tree.map(lambda x: x.cut(row, n) if isinstance(x, Cache) else x.at[row].set(0), state,
                      is_leaf=lambda x: isinstance(x, Cache))


def extend(cache: Full | None, k: Array, v: Array, start: Array | None) -> tuple[Full | None, Context]:
  """(the cache with rows k, v: f[B,T,K,h] written at slots start.., what their queries may see).

  Without a cache (whole training sequences) the rows themselves are the context.
  """
  if cache is None:
    return None, sequence(k, v)
  cache = cache.write(k, v, start)
  return cache, cache.context()
