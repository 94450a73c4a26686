"""The records that cross files, and the Protocols. No maths.

Dimensions: B rows (requests), T tokens of a row, S cache slots, G draft length (block_size), A anchors or query
blocks, N flattened tokens, D model width, H / K query / key-value heads, h head width, V vocabulary, W draft words
(W = V unless the draft vocabulary is reduced), R Markov rank, F width of the tapped features.

A slot is a place in the cache; the G places of a block are draft positions.
anchor: the newest committed token; the target has not processed it yet, and it is a round's first input.
tap: a target layer whose raw output feeds the drafter (-1 is the embedding output).
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class TargetOutput:
  hidden: Array    # f[B,T,D]  after the final norm
  features: Array  # f[B,T,F]  outputs of the tapped layers, concatenated in the order of `taps`


@flax.struct.dataclass
class Committed:
  """What became final in a round (or in the prompt): the drafter learns it through `absorb`."""
  encoded: TargetOutput  # [B,T,...]  what the target said of the rows that were run
  next_tokens: Array     # i32[B,T]   the token after each row
  n: Array               # i32[B]     only the first n rows of T are real


@flax.struct.dataclass
class Sampling:
  """How each row's tokens are chosen; made, and checked, by `sampling.make_sampling`. Only `mode` recompiles."""
  temperature: Array  # f32[B]  0 = greedy; [1] stands for all rows
  top_k: Array        # i32[B]  0 = off
  top_p: Array        # f32[B]  1 = off
  mode: str = flax.struct.field(pytree_node=False)  # "greedy": all rows are; "full": no row truncates; "truncated"


@flax.struct.dataclass
class Proposal:
  """One block of drafts per row. Column w of `logits` stands for token `words[w]` (for token w when words is None)."""
  tokens: Array        # i32[B,G]    in the target's vocabulary
  logits: Array        # f32[B,G,W]  before temperature, top-k and top-p
  probs: Array | None  # f32[B,G,W]  exactly what the tokens were drawn from; None when greedy
  confidence: Array    # f32[B,G]    P(token k survives | 1..k-1 survived), in 0..1; ones without a confidence head
  words: Array | None  # i32[W]      the reduced draft vocabulary


@flax.struct.dataclass
class Verdict:
  """What the target says of one proposal."""
  n_accept: Array    # i32[B]  draft tokens kept, 0..G
  next_token: Array  # i32[B]  drawn from the residual at the first rejection, else from the target


@flax.struct.dataclass
class Batch:
  """Training sequences. Several documents may share a row; nothing crosses from one to the next."""
  tokens: Array      # i32[B,T]
  loss_mask: Array   # bool[B,T]  supervised tokens (the assistant's)
  segments: Array    # i32[B,T]   document number within the row from 1; 0 is padding
  positions: Array   # i32[B,T]   position within the document, from 0


@flax.struct.dataclass
class Blocks:
  """Training blocks: draft position k stands at anchor + k, is fed the anchor or the mask, predicts anchor + k + 1."""
  anchors: Array     # i32[B,A]      index into T, ascending; 0 for dummy blocks
  keep: Array        # bool[B,A]     False for dummy blocks
  previous: Array    # i32[B,A,G]    teacher-forced previous token of each position: that at anchor + k
  labels: Array      # i32[B,A,G]
  supervised: Array  # bool[B,A,G]   contiguous from the first position (sampled anchors)
  temperature: Array | None = None  # i32[B,A]  which of the loss's temperatures each is trained at; None: at 1


class Head(Protocol):
  """A projection to words, as a pytree: made once before a loop, so that what it gathers is gathered once."""

  def __call__(self, hidden: Array) -> Array: ...  # f[...,D] -> f32[...,W]
  def best(self, hidden: Array) -> Array: ...  # f[...,D] -> i32[...]  `sampling.argmax` of that


@flax.struct.dataclass
class DraftHead:
  """What turns a drafter's hidden states and latents into logits over the draft words."""
  base: Head         # f[...,D] -> f32[...,W]  the target's head at the draft words; frozen
  bias: Head | None  # f[...,R] -> f32[...,W]  the sequential head's projection of its latent; trained

  def __call__(self, hidden: Array, latent: Array | None) -> Array:
    """f32[...,W] from hidden f[...,D] and, with a sequential head, its latent f[...,R].

    The bias is added to what `base` gives: after a soft-cap, which is the target's own.
    """
    base = self.base(hidden)
    return base if latent is None else base + self.bias(latent)


@flax.struct.dataclass
class DraftOutputs:
  """What the drafter says of every draft position, stopping before the vocabulary so that the loss can be chunked."""
  hidden: Array             # f[B,A,G,D]
  latent: Array | None      # f[B,A,G,R]  sequential head, before its projection to the vocabulary
  confidence: Array | None  # f32[B,A,G]  logits


class Target(Protocol):
  """A frozen language model (an nnx.Module used as a pytree). A cache is a pytree that only its target looks into."""
  vocab_size: int     # V
  max_positions: int  # tokens that a row may have
  cache_layout: str   # rows | columns: how keys lie in caches where this target runs; drafters follow (nn/cache.py)
  kernels: Any        # how attention is computed where this target runs; drafters follow (nn/attention.py)

  def feature_width(self, taps: tuple[int, ...]) -> int: ...  # F
  def init_cache(self, batch: int, max_len: int) -> Any: ...  # of B rows without a token, with room for max_len
  def embed(self, tokens: Array) -> Array: ...                # i32[...] -> f[...,D]
  def __call__(self, tokens: Array, cache: Any, taps: tuple[int, ...], packing: Any = None
               ) -> tuple[TargetOutput, Any]: ...             # i32[B,T], or i32[N+C] packed (nn/packing.py)
  def encode(self, batch: Batch, taps: tuple[int, ...]) -> TargetOutput: ...  # whole sequences, no cache
  def head(self, words: Array | None = None) -> Head: ...     # over all V words, or over words i32[W]
  def commit(self, cache: Any, n: Array) -> Any: ...          # the first n i32[B] of the rows just run are final
  def insert(self, cache: Any, row: Array, one: Any) -> Any: ...  # row i32[] becomes that of `one`, a cache of one row
  def take(self, cache: Any, row: Array) -> Any: ...          # a cache of row i32[] alone
  def cut(self, cache: Any, row: Array, n: Array) -> Any: ...  # of row i32[] the first n i32[] tokens alone are left


class Drafter(Protocol):
  """Proposes blocks of tokens (an nnx.Module used as a pytree). Holds no copy of the target's embedding or head."""
  taps: tuple[int, ...]  # of the target; their outputs are the features f[...,F]
  block_size: int        # G
  words: Array | None   # i32[W]  the reduced draft vocabulary, ascending; None: the target's
  every_position: bool  # trained at all positions of a row (recurrent drafters), not at sampled anchors
  has_confidence: bool  # whether proposals say how likely their tokens are to survive

  def init_state(self, target: Target, batch: int, max_len: int) -> Any: ...          # a pytree, every leaf per row
  def insert(self, state: Any, row: Array, one: Any) -> Any: ...                      # row i32[] becomes that of `one`
  def take(self, state: Any, row: Array) -> Any: ...                                  # a state of row i32[] alone
  def cut(self, state: Any, row: Array, n: Array) -> Any: ...  # row i32[] has read n i32[] tokens, before it reads more
  def absorb(self, target: Target, state: Any, committed: Committed) -> Any: ...      # every verified row, prompts too
  def propose(self, target: Target, head: DraftHead, state: Any, anchor: Array, keys: Array,
              sampling: Sampling) -> Proposal: ...                                    # anchor i32[B], keys [B]
  def train_outputs(self, target: Target, batch: Batch, encoded: TargetOutput, blocks: Blocks) -> DraftOutputs: ...
  def head(self, target: Target) -> DraftHead: ...
