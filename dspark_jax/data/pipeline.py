"""Files -> documents -> packed rows -> the batch of any step, in numpy.

Two kinds of files are read:
  .jsonl  one object a line, either {"messages": [{"role": ..., "content": ...}, ...]}, or already in tokens
          {"tokens": [...], "loss_mask": [...]}, as train.answers writes it: then what is learned is exactly
          what was generated. Other keys of a line are ignored.
  .txt .md .py  plain text: every token is supervised, cut into pieces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from dspark_jax.text import read_jsonl, read_text
from dspark_jax.types import Batch

MIN_SUPERVISED = 14  # documents with fewer supervised tokens are dropped, as the reference does
TEXT_SUFFIXES = (".txt", ".md", ".py")
Encoded = tuple[list[int], list[bool]]  # tokens, loss mask


class Document(NamedTuple):
  tokens: np.ndarray     # i32[T]
  loss_mask: np.ndarray  # bool[T]  supervised tokens


@dataclass(frozen=True)
class Source:
  """What was read."""
  documents: list[Document]
  n_dropped: int  # documents left out for having fewer than MIN_SUPERVISED supervised tokens


@dataclass(frozen=True)
class Packed:
  """Rows of equal length, several documents in each."""
  rows: Batch   # numpy arrays, [R,T]
  fill: float   # share of the places that hold a token, 0..1
  n_cut: int    # tokens lost because their document was longer than a row


def read_conversations(paths: Iterable[str | os.PathLike], tokenizer: Any, *, max_len: int,
                       encode_conversation: Callable) -> Source:
  """The documents of the files, in order, cut at max_len tokens (plain text goes on in the next piece).

  encode_conversation: (tokenizer, messages) -> (ids, mask): data.chat's, or a partial of it with variables of
  the template. A parameter, so that this file needs no transformers.
  Raises ValueError with the file and the line.
  """
  documents, n_dropped = [], 0
  for path in map(os.fspath, paths):
    if path.endswith(".jsonl"):
      found = _read_jsonl(path, tokenizer, encode_conversation)
    elif path.endswith(TEXT_SUFFIXES):
      found = _read_text(path, tokenizer, max_len)
    else:
      raise ValueError(f"{path} ends in none of {('.jsonl', *TEXT_SUFFIXES)}: convert or rename it")
    for tokens, loss_mask in found:
      document = Document(np.asarray(tokens[:max_len], np.int32), np.asarray(loss_mask[:max_len], bool))
      # Counted after the cut: a long prompt may leave nothing of its answer.
      if document.loss_mask.sum() < MIN_SUPERVISED:
        n_dropped += 1
      else:
        documents.append(document)
  return Source(documents, n_dropped)


def pack(documents: Sequence[Document], length: int) -> Packed:
  """Each document whole in the first row that has room for it, in order; a longer one is cut at `length`."""
  if not documents:
    raise ValueError("no documents to pack: every one was dropped, or the files are empty")
  sizes = [min(len(tokens), length) for tokens, _ in documents]
  if min(sizes) == 0:
    raise ValueError(f"document {sizes.index(0)} has no tokens: leave it out")
  used = np.zeros(len(documents), np.int64)  # one row each at worst; the empty ones never come to be
  places, n_rows = [], 0
  for size in sizes:
    # next(row for row in range(n_rows + 1) if used[row] + size <= length), for thousands of rows
    row = int(np.argmax(used[:n_rows + 1] + size <= length))
    places.append((row, int(used[row])))
    used[row] += size
    n_rows = max(n_rows, row + 1)
  shape = (n_rows, length)
  tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  loss_mask = np.zeros(shape, bool)
  for document, size, (row, start) in zip(documents, sizes, places):
    span = slice(start, start + size)
    tokens[row, span] = document.tokens[:size]
    loss_mask[row, span] = document.loss_mask[:size]
    segments[row, span] = segments[row].max() + 1
    positions[row, span] = np.arange(size)
  n_cut = sum(len(tokens) for tokens, _ in documents) - sum(sizes)
  rows = Batch(tokens=tokens, loss_mask=loss_mask, segments=segments, positions=positions)
  return Packed(rows, fill=sum(sizes) / tokens.size, n_cut=n_cut)


def batch_at(packed: Packed, step: int, batch_size: int, *, seed: int) -> Batch:
  """The batch of a step, from 0: numpy arrays [batch_size,T].

  A pure function, so that resuming at a step needs nothing but its number. Every epoch is a permutation of
  all rows, drawn from (seed, epoch); a batch that crosses the end of an epoch goes on in the next one's.
  """
  n_rows = len(packed.rows.tokens)
  index = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(index, n_rows)
  rows = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    order = np.random.default_rng((seed, int(epoch))).permutation(n_rows)
    rows[epochs == epoch] = order[offsets[epochs == epoch]]
  part = packed.rows
  return Batch(tokens=part.tokens[rows], loss_mask=part.loss_mask[rows], segments=part.segments[rows],
               positions=part.positions[rows])


def top_words(documents: Iterable[Document], k: int, vocab_size: int, always: Iterable[int] = ()
              ) -> np.ndarray:
  """The reduced draft vocabulary: the k most frequent supervised tokens, i32[k], ascending.

  always: ids that are in whatever their count (the stop ids). Ties, and the places left when fewer than k
  tokens occur, go to the smaller ids.
  """
  always = sorted(set(always))
  if not len(always) <= k <= vocab_size:
    raise ValueError(f"cannot choose {k} words out of {vocab_size} that include {len(always)} given ones: "
                     f"k must be {len(always)} to {vocab_size}")
  counts = np.zeros(vocab_size, np.int64)
  for number, document in enumerate(documents):
    ids = document.tokens[document.loss_mask]
    if ids.size and ids.max() >= vocab_size:
      raise ValueError(f"document {number} has token {ids.max()}, the vocabulary has {vocab_size}: "
                       "it was written with another tokenizer")
    np.add.at(counts, ids, 1)
  # Above every count, so that the ids are in; below, the stable sort leaves ties in the order of the ids.
  counts[always] = np.iinfo(np.int64).max
  return np.sort(np.argsort(-counts, kind="stable")[:k]).astype(np.int32)


def bigram_factors(documents: Iterable[Document], words: np.ndarray, vocab_size: int, rank: int, prior: float = 5.0
                   ) -> tuple[np.ndarray, np.ndarray]:
  """(W1 f32[V,R], W2 f32[W,R]) with W1[u] . W2[w] near log P(words[w] | u), up to a constant per u.

  A start for a vanilla sequential head, which has exactly this form (DSpark, 3.1). P counts supervised tokens after
  supervised ones, with `prior` more counts shared out by the words' own frequency; the factors are the best ones of
  rank R when every u weighs as often as it occurs. Tokens never followed get the mean row. Memory and time go with
  W x W and W cubed: 3 s for 4,096 words.
  """
  column = np.full(vocab_size, -1)
  column[words] = np.arange(len(words))
  pairs = [(d.tokens[:-1][both], column[d.tokens[1:][both]])
           for d in documents for both in [d.loss_mask[:-1] & d.loss_mask[1:]]]
  previous, following = (np.concatenate(part)[np.concatenate([f for _, f in pairs]) >= 0] for part in zip(*pairs))
  if not len(previous):
    raise ValueError("no supervised token follows another one: there are no bigrams to start from")
  seen, row = np.unique(previous, return_inverse=True)
  counts = np.zeros((len(seen), len(words)), np.float32)
  np.add.at(counts, (row, following), 1)
  total, frequency = counts.sum(1, keepdims=True), counts.sum(0) + 0.1  # no word is impossible
  log_p = np.log((counts + prior * frequency / frequency.sum()) / (total + prior))
  # A softmax does not see a constant per u, which would take up one of the R directions.
  log_p -= log_p.mean(1, keepdims=True)
  rank_here = min(rank, len(words))
  # The leading right singular vectors of sqrt(total) * log_p, from a matrix of W x W however many u occur.
  square, basis = scipy.linalg.eigh(log_p.T @ (total * log_p), subset_by_index=(len(words) - rank_here, len(words) - 1))
  # Squares that should be 0 come out small and of either sign, and the root divides.
  root = np.maximum(square, square[-1] * 1e-12) ** 0.25  # of the singular values: both factors get the same size
  seen_rows = log_p @ basis / root
  w1, w2 = np.zeros((vocab_size, rank), np.float32), np.zeros((len(words), rank), np.float32)
  w1[:, :rank_here] = (total * seen_rows).sum(0) / total.sum()
  w1[seen, :rank_here], w2[:, :rank_here] = seen_rows, basis * root
  return w1, w2


def _read_text(path: str, tokenizer: Any, max_len: int) -> Iterator[Encoded]:
  # Cut after tokenizing: in a piece of the text, the words at its ends would be other tokens.
  tokens = tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
  for start in range(0, len(tokens), max_len):
    piece = tokens[start:start + max_len]
    yield piece, [True] * len(piece)


def _read_jsonl(path: str, tokenizer: Any, encode_conversation: Callable) -> Iterator[Encoded]:
  for number, record in read_jsonl(path):
    try:
      _check(record)
      if "tokens" in record:
        yield record["tokens"], record["loss_mask"]
      else:
        yield from encode_conversation(tokenizer, record["messages"]) or [([], [])]
    except ValueError as error:
      raise ValueError(f"{path}, line {number}: {error}") from error


def _check(record: dict[str, Any]) -> None:
  """Raises ValueError unless the record is one of the two forms."""
  if ("messages" in record) == ("tokens" in record):
    raise ValueError('it must have either "messages" or "tokens" and "loss_mask"')
  if "messages" in record:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
      raise ValueError('"messages" must be a list that is not empty')
    for message in messages:
      texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
      if not all(isinstance(text, str) for text in texts):
        got = json.dumps(message)[:80]
        raise ValueError(f'a message must have the texts "role" and "content", got {got}')
    return
  tokens, mask = record["tokens"], record.get("loss_mask")
  if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
    raise ValueError('"tokens" must be a list of token ids')
  if not isinstance(mask, list) or not all(m in (0, 1) for m in mask):
    raise ValueError('"loss_mask" must be a list of true and false')
  if len(tokens) != len(mask):
    raise ValueError(f'{len(tokens)} "tokens" but {len(mask)} in "loss_mask": they go in pairs')
