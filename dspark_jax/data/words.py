"""What the supervised tokens of packed rows say of words: the draft vocabulary, and which word follows which."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dspark_jax.data.rows import Rows, Some


def top_words(rows: Rows | Some, k: int, vocab_size: int, always: Iterable[int] = ()) -> np.ndarray:
  """The reduced draft vocabulary: the k most frequent supervised tokens, i32[k], ascending.

  always: ids that are in whatever their count (the stop ids). Ties, and the places left when fewer than k
  tokens occur, go to the smaller ids.
  """
  always = sorted(set(always))
  if not len(always) <= k <= vocab_size:
    raise ValueError(f"cannot choose {k} words out of {vocab_size} that include {len(always)} given ones: "
                     f"k must be {len(always)} to {vocab_size}")
  counts = np.zeros(vocab_size, np.int64)
  for tokens, loss_mask, _ in rows.chunks():
    ids = tokens[loss_mask]
    if ids.size and ids.max() >= vocab_size:
      raise ValueError(f"a document has token {ids.max()}, the vocabulary has {vocab_size}: it was written with "
                       f"another tokenizer")
    counts += np.bincount(ids, minlength=vocab_size)
  # Above every count, so that the ids are in; below, the stable sort leaves ties in the order of the ids.
  counts[always] = np.iinfo(np.int64).max
  return np.sort(np.argsort(-counts, kind="stable")[:k]).astype(np.int32)


def bigram_factors(rows: Rows | Some, words: np.ndarray, vocab_size: int, rank: int, prior: float = 5.0
                   ) -> tuple[np.ndarray, np.ndarray]:
  """(W1 f32[V,R], W2 f32[W,R]) with W1[u] . W2[w] near log P(words[w] | u), up to a constant per u.

  A start for a vanilla sequential head, which has exactly this form (DSpark, 3.1). P counts supervised tokens after
  supervised ones, with `prior` more counts shared out by the words' own frequency; the factors are the best ones of
  rank R when every u weighs as often as it occurs. Tokens never followed get the mean row. Of the U tokens
  that are followed, memory goes with U x W (8 bytes each: 5 GB for 152k before 4,096 words), and time with U x W x W
  and W cubed: 3 s for 4,096 words.
  """
  column = np.full(vocab_size, -1)
  column[words] = np.arange(len(words))
  is_seen = np.zeros(vocab_size, bool)
  for previous, _ in _pairs(rows, column):
    is_seen[previous] = True
  seen = np.flatnonzero(is_seen)
  if not len(seen):
    raise ValueError("no supervised token follows another one: there are no bigrams to start from")
  row, counts = np.cumsum(is_seen) - 1, np.zeros((len(seen), len(words)), np.uint32)
  for previous, following in _pairs(rows, column):
    # counts[row[previous], following] += 1, also where pairs repeat; flat, and with a 1 of its type, nine times as fast
    np.add.at(counts.reshape(-1), row[previous] * len(words) + following, np.uint32(1))
  total = counts.sum(1, keepdims=True, dtype=np.float64).astype(np.float32)
  frequency = counts.sum(0, dtype=np.float64) + 0.1  # no word is impossible
  log_p = counts.astype(np.float32)
  del counts  # both are large: from here on in place
  log_p += (prior * frequency / frequency.sum()).astype(np.float32)
  log_p /= total + np.float32(prior)
  np.log(log_p, out=log_p)
  # A softmax does not see a constant per u, which would take up one of the R directions.
  log_p -= log_p.mean(1, keepdims=True)
  import scipy.linalg  # half a second, which whoever only reads tokens should not wait for
  rank_here = min(rank, len(words))
  # The leading right singular vectors of sqrt(total) * log_p, from a matrix of W x W however many u occur.
  root_total = np.sqrt(total)
  log_p *= root_total
  square, basis = scipy.linalg.eigh(log_p.T @ log_p, subset_by_index=(len(words) - rank_here, len(words) - 1))
  # Squares that should be 0 come out small and of either sign, and the root divides.
  root = np.maximum(square, square[-1] * 1e-12) ** 0.25  # of the singular values: both factors get the same size
  seen_rows = log_p @ basis / root / root_total
  w1, w2 = np.zeros((vocab_size, rank), np.float32), np.zeros((len(words), rank), np.float32)
  w1[:, :rank_here] = (total * seen_rows).sum(0) / total.sum()
  w1[seen, :rank_here], w2[:, :rank_here] = seen_rows, basis * root
  return w1, w2


def _pairs(rows, column):
  """(previous tokens, columns of the words that follow them), some millions of tokens at a time."""
  for tokens, loss_mask, is_first in rows.chunks():
    both = loss_mask[:-1] & loss_mask[1:] & ~is_first[1:]
    previous, following = tokens[:-1][both], column[tokens[1:][both]]
    yield previous[following >= 0], following[following >= 0]
