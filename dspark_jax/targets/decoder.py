"""The generic decoder over periods of layers: embed, layers, taps, norm, head. Families differ in layers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.nn.attention import Kernels, Place, following
from dspark_jax.nn.cache import Cache
from dspark_jax.nn.layers import WORDS, Block, BlockSpec, Embedding, Linear, RMSNorm, WordHead
from dspark_jax.nn.packing import Packing
from dspark_jax.types import Array, Batch, Target, TargetOutput


@dataclasses.dataclass(frozen=True)
class TargetConfig:
  """A frozen language model: `family` names a file in targets/."""
  family: str
  spec: BlockSpec  # of the layers that drafters repeat
  num_layers: int
  vocab_size: int
  tie_word_embeddings: bool
  max_positions: int

  @property
  def period(self) -> tuple[BlockSpec, ...]:
    """The kinds of layers, in the order in which they repeat until there are num_layers."""
    return (self.spec,)

  @property
  def layers(self) -> tuple[BlockSpec, ...]:
    """The kind of every layer."""
    return tuple(self.period[i % len(self.period)] for i in range(self.num_layers))

  def flops(self, seen: float) -> float:
    """Of one token's way through all layers, attending to so many keys."""
    return sum(kind.flops(seen) for kind in self.layers)

  @property
  def head_flops(self) -> float:
    """Of the logits of one token."""
    return 2 * self.spec.hidden_size * self.vocab_size


class Decoder(nnx.Module):
  """A decoder-only language model behind the Target protocol.

  `layers` holds every layer (unrolled, with caches of columns) or, when `scanned`, one for each of a period, stacked
  over the repeats, with caches of rows: one period to compile (`scans`). `kernels` say how attention is computed, here
  and in the drafters that follow: `use`.
  """

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.scanned = False
    self.kernels = Kernels()
    spec = config.spec
    self.embed_tokens = Embedding(config.vocab_size, spec.hidden_size, rngs=rngs)
    self.layers = nnx.List([kind.build(rngs=rngs) for kind in config.layers])
    self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
    self.lm_head = None if config.tie_word_embeddings else Linear(spec.hidden_size, config.vocab_size, rngs=rngs,
                                                                         axes=WORDS)

  @property
  def vocab_size(self) -> int:
    return self.config.vocab_size

  @property
  def max_positions(self) -> int:
    return self.config.max_positions

  @property
  def cache_layout(self) -> str:
    """Columns where layers are unrolled, which is for CPUs and GPUs."""
    return "rows" if self.scanned else "columns"

  def use(self, kernels: Kernels, platform: str | None = None) -> None:
    """Computes attention so from now on, what is auto as suits the platform (default: jax's) and the current mesh;
    ValueError where the names do not suit the model."""
    platform = platform or jax.default_backend()
    for spec in self.config.period:
      how = dict(kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, layout=self.cache_layout)
      kernels = kernels.chosen(platform, **how)
      kernels.check(**how)
    self.kernels = kernels

  def feature_width(self, taps: tuple[int, ...]) -> int:
    """F: every tap is the residual stream after a layer."""
    return len(taps) * self.config.spec.hidden_size

  def head(self, words: Array | None = None) -> WordHead:
    """Logits from hidden states after the final norm; the weight is the embedding table when tied."""
    return WordHead((self.lm_head or self.embed_tokens).weight[...]).at(words)

  def embed(self, tokens: Array) -> Array:
    return self.embed_tokens(tokens)

  def init_cache(self, batch: int, max_len: int) -> Cache:
    config = self.config
    kinds, repeats = (config.period, config.num_layers // len(config.period)) if self.scanned else (config.layers, 0)
    how = dict(layout=self.cache_layout, stacked=repeats)
    layers = (kind.init_cache(batch, max_len, self.norm.weight.dtype, **how) for kind in kinds)
    return Cache(tuple(layers), jnp.zeros(batch, jnp.int32))

  def commit(self, cache: Cache, n: Array) -> Cache:
    return cache.commit(n)

  def insert(self, cache: Cache, row: Array, one: Cache) -> Cache:
    return cache.insert(row, one)

  def take(self, cache: Cache, row: Array) -> Cache:
    return cache.take(row)

  def cut(self, cache: Cache, row: Array, n: Array) -> Cache:
    return cache.cut(row, n)

  def __call__(self, tokens: Array, cache: Cache | None, taps: tuple[int, ...], packing: Packing | None = None,
               place: Place | None = None) -> tuple[TargetOutput, Cache | None]:
    """Runs tokens i32[B,T], or packed i32[N+C], at the end of the cache; their rows are written but not committed.

    One path for prompts, plain steps, verification and (with a `place` and no cache) training sequences.
    """
    if packing is not None:
      place = packing.place(cache.length, self.kernels)
    elif place is None:
      steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      place = following(cache.length, cache.length[:, None] + steps, kernels=self.kernels)
    x = self.embed(tokens)
    # A tap holds the embedding until its layer comes, which for tap -1 is never.
    caches, features = [None] * len(self.layers) if cache is None else list(cache.layers), [x] * len(taps)
    if self.scanned:
      x, caches, features = self._scan(x, place, caches, taps, features)
    else:
      for index, layer in enumerate(self.layers):
        x, caches[index] = layer(x, place, caches[index])
        # Raw: Hugging Face's hidden_states are counted from the embedding (one more), and the last of them is normed.
        features = [x if index == tap else f for tap, f in zip(taps, features)]
    features = jnp.concatenate(features, -1) if taps else x[..., :0]
    return TargetOutput(self.norm(x), features), cache and cache.replace(layers=tuple(caches))

  def _scan(self, x, place, caches, taps, features):
    def period(carry, scanned):
      (x, caches, features), (layers, repeat) = carry, scanned
      for which, layer in enumerate(layers):
        cache = caches[which] and caches[which].replace(layer=repeat)
        x, cache = layer(x, place, cache)
        caches[which] = cache and cache.replace(layer=None)
        # A select for each tap: as outputs of the scan, x of every layer would be kept for the few that are tapped.
        features = [jnp.where(repeat * len(layers) + which == tap, x, f) for tap, f in zip(taps, features)]
      return (x, caches, features), None

    # Caches go in the carry and are written in place: as inputs and outputs of the scan they are copied (1.4 to 2.4 GB
    # for 1.2 GB of cache at Qwen3-4B size, by the compilers).
    repeats = jnp.arange(self.config.num_layers // len(self.layers), dtype=jnp.int32)
    return jax.lax.scan(period, (x, caches, features), (self.layers, repeats))[0]

  def encode(self, batch: Batch, taps: tuple[int, ...]) -> TargetOutput:
    """The whole of training sequences at once, without a cache; documents that share a row do not see each other."""
    start = jnp.zeros(batch.tokens.shape[0], jnp.int32)
    place = following(start, batch.positions, batch.segments, kernels=self.kernels)
    return self(batch.tokens, None, taps, place=place)[0]

  def last_layers(self, count: int) -> list[Block]:
    """The last layers, each on its own in either layout; ValueError when there are not so many."""
    if not 0 <= count <= self.config.num_layers:
      raise ValueError(f"the last {count} layers are asked for, the target has {self.config.num_layers}")
    period = len(self.layers) if self.scanned else self.config.num_layers
    one = lambda i: jax.tree.map(lambda x: x[i // period], self.layers[i % period]) if self.scanned else self.layers[i]
    return [one(i) for i in range(self.config.num_layers - count, self.config.num_layers)]


def scans(platform: str) -> bool:
  """Whether layers are best stacked and scanned on a platform, rather than unrolled."""
  # CPUs and GPUs copy what they slice from a stack, weights and caches (Qwen3-4B, 8 rows, by the compiler for an H100:
  # a plain step moves 30.7 GB, unrolled 11.1; of rows instead of columns 11.3, and a round 22.2 instead of 20.2).
  return platform == "tpu"


def stack_layers(decoder: Decoder) -> Decoder:
  """The same model with its layers stacked along a leading axis, one stack for each of a period, to be scanned."""
  if decoder.config.num_layers % len(decoder.config.period):
    raise ValueError(f"{decoder.config.num_layers} layers cannot be scanned in periods of "
                     f"{len(decoder.config.period)}: leave them unrolled (scanned=False)")
  graph, state = nnx.split(decoder)  # merged again below: another module, so that the one given keeps its layers
  stacked, period = nnx.merge(graph, state), len(decoder.config.period)
  stacked.layers = nnx.List([jax.tree.map(lambda *leaves: jnp.stack(leaves), *decoder.layers[i::period])
                             for i in range(period)])
  stacked.scanned = True
  return stacked


def stored_stacked(config: TargetConfig, stored: Callable[[str], Any]) -> Callable[[str], Any]:
  """`Family.stored` for the same decoder with stacked layers: what makes a stack are the layers, in their order."""
  def names(name):
    head, _, rest = name.partition("layers.")
    if head or not rest:
      return stored(name)
    which, _, rest = rest.partition(".")
    return tuple(stored(f"layers.{i}.{rest}") for i in range(int(which), config.num_layers, len(config.period)))
  return names


def one_to_one(name: str) -> str:
  """The stored name of a parameter of Llama-like families."""
  return name if name.startswith("lm_head") else f"model.{name}"


@dataclasses.dataclass(frozen=True)
class Family:
  """What loading must know of a family."""
  config: Callable[[dict], TargetConfig]  # of a Hugging Face config.json; ValueError lists all that is wrong
  block: Callable[[dict], tuple[BlockSpec | None, list[str]]]  # (layers, problems), also of stored drafters
  keys: Callable[[BlockSpec], dict]       # and back: what a config.json says of such layers
  prefix: str                             # of the architectures of its stored drafters: Qwen3 of Qwen3DSparkModel
  spec: type[BlockSpec] = BlockSpec       # what describes its layers
  build: Callable[..., Target] = Decoder  # (config, *, rngs)
  stored: Callable[[str], Any] = one_to_one  # the tensor that makes a parameter; a tuple is stacked (`hf.fill`)
