"""Files -> documents -> packed rows -> the batch of any step, in numpy.

Two kinds of files are read:
  .jsonl  one object a line, either a conversation, or already in tokens {"tokens": [...], "loss_mask": [...]}, as
          train.answers writes it: then what is learned is exactly what was generated.
  .txt .md .py  plain text: every token is supervised, cut into pieces.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]} or, as ShareGPT has it, {"conversations": [{"from":
..., "value": ...}, ...]}; human and gpt are other words for user and assistant. Beside it, "tools" and
"chat_template_kwargs": {"enable_thinking": ...} go to the chat template. Names and notes are passed over; the keys in
SETTINGS, which would change what is learned, are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.text import read_jsonl, read_text
from dspark_jax.types import Batch

MIN_SUPERVISED = 14  # documents with fewer supervised tokens are dropped, as the reference does
TEXT_SUFFIXES = (".txt", ".md", ".py")
Encoded = tuple[list[int], list[bool]]  # tokens, loss mask
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant"}
SETTINGS = ("system", "system_prompt", "functions", "chat_template", "enable_thinking", "thinking", "weight")


class Document(NamedTuple):
  tokens: np.ndarray     # i32[T]
  loss_mask: np.ndarray  # bool[T]  supervised tokens


@dataclass
class Lost:
  """What of the files is in no document, by reason; each thing is counted once."""
  no_reply: int = 0    # conversations without a reply
  rewritten: int = 0   # replies that the chat template never writes as they would be generated, after their prompt
  too_short: int = 0   # documents with fewer than MIN_SUPERVISED supervised tokens
  cut_away: int = 0    # documents of which the cut at max_len leaves fewer than that
  cut: int = 0         # documents that are kept without their end
  cut_tokens: int = 0  # of these ends

  def __str__(self):
    words = {"no_reply": "conversations without a reply", "rewritten": "replies that the chat template rewrites, as "
             "it does with thinking in a run without", "too_short": "documents that are too short",
             "cut_away": "documents whose reply is beyond the length of a row", "cut": "documents cut to it",
             "cut_tokens": "tokens in the ends of these"}
    counts = {field.name: getattr(self, field.name) for field in fields(self)}
    return ", ".join(f"{count} {words[name]}" for name, count in counts.items() if count) or "nothing"


@dataclass(frozen=True)
class Source:
  """What was read."""
  documents: list[Document]
  lost: Lost


@dataclass(frozen=True)
class Packed:
  """Rows of equal length, several documents in each."""
  rows: Batch   # numpy arrays, [R,T]
  fill: float   # share of the places that hold a token, 0..1
  n_cut: int    # tokens lost because their document was longer than a row

  def __len__(self) -> int:
    return len(self.rows.tokens)

  def take(self, indices: np.ndarray) -> Batch:
    """The rows i64[B], in this order."""
    rows = self.rows
    return Batch(rows.tokens[indices], rows.loss_mask[indices], rows.segments[indices], rows.positions[indices])


def read_conversations(paths: Iterable[str | os.PathLike], tokenizer: Any, *, max_len: int, vocab_size: int,
                       encode_conversation: Callable[..., list[Encoded]]) -> Source:
  """The documents of the files, in order, cut at max_len tokens (plain text goes on in the next piece).

  encode_conversation: (tokenizer, messages, tools=..., **variables of the template) -> (tokens, loss mask) of each
  document that the conversation makes: data.chat's, or a partial of it. A parameter, so that this file needs no
  transformers. vocab_size: of the target, which knows no token beyond.
  Raises ValueError with the file and the line.
  """
  documents, lost = [], Lost()
  for path in map(os.fspath, paths):
    if path.endswith(".jsonl"):
      found = _read_jsonl(path, tokenizer, encode_conversation, lost)
    elif path.endswith(TEXT_SUFFIXES):
      found = _read_text(path, tokenizer, max_len)
    else:
      raise ValueError(f"{path} ends in none of {('.jsonl', *TEXT_SUFFIXES)}: convert or rename it")
    for where, (tokens, loss_mask) in found:
      if max(tokens, default=0) >= vocab_size:
        raise ValueError(f"{where}: token {max(tokens)} is beyond the target's vocabulary, which has {vocab_size}: it "
                         "was written with another tokenizer")
      document = Document(np.asarray(tokens[:max_len], np.int32), np.asarray(loss_mask[:max_len], bool))
      if not any(loss_mask):
        lost.no_reply += 1
      elif sum(loss_mask) < MIN_SUPERVISED:
        lost.too_short += 1
      elif document.loss_mask.sum() < MIN_SUPERVISED:
        lost.cut_away += 1
      else:
        documents.append(document)
        lost.cut += len(tokens) > max_len
        lost.cut_tokens += max(len(tokens) - max_len, 0)
  return Source(documents, lost)


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


@dataclass(frozen=True)
class Some:
  """Some of the rows of a data set, as one of their own."""
  rows: Packed
  kept: np.ndarray  # i64[R]  their places in it

  def __len__(self) -> int:
    return len(self.kept)

  def take(self, indices: np.ndarray) -> Batch:
    """The rows i64[B] of these, in this order."""
    return self.rows.take(self.kept[indices])


def held_out(rows: Packed, count: int, *, seed: int) -> tuple[Some, Some]:
  """(rows to train on, `count` others), drawn by the seed, each in the order of the data. ValueError: none are left."""
  if count >= len(rows):
    raise ValueError(f"{count} of {len(rows)} rows are held out, expected fewer: give more data, or smaller "
                     f"--eval-rows")
  order = np.random.default_rng((seed, len(rows), count)).permutation(len(rows))
  return Some(rows, np.sort(order[count:])), Some(rows, np.sort(order[:count]))


def batch_at(packed: Packed, step: int, batch_size: int, *, seed: int) -> Batch:
  """The batch of a step, from 0: numpy arrays [batch_size,T]."""
  return packed.take(row_indices(len(packed), step, batch_size, seed=seed))


def row_indices(n_rows: int, step: int, batch_size: int, *, seed: int) -> np.ndarray:
  """Which rows make the batch of a step, from 0: i64[batch_size].

  A pure function, so that resuming at a step needs nothing but its number. Every epoch is a permutation of
  all rows, drawn from (seed, epoch); a batch that crosses the end of an epoch goes on in the next one's.
  """
  index = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(index, n_rows)
  rows = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    order = np.random.default_rng((seed, int(epoch))).permutation(n_rows)
    rows[epochs == epoch] = order[offsets[epochs == epoch]]
  return rows


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
  import scipy.linalg  # half a second, which whoever only reads tokens should not wait for
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


def _read_text(path: str, tokenizer: Any, max_len: int) -> Iterator[tuple[str, Encoded]]:
  # Cut after tokenizing: in a piece of the text, the words at its ends would be other tokens.
  tokens = tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
  for start in range(0, len(tokens), max_len):
    piece = tokens[start:start + max_len]
    yield path, (piece, [True] * len(piece))


def _read_jsonl(path: str, tokenizer: Any, encode_conversation: Callable, lost: Lost
                ) -> Iterator[tuple[str, Encoded]]:
  for number, record in read_jsonl(path):
    where = f"{path}, line {number}"
    try:
      if sum(key in record for key in ("messages", "conversations", "tokens")) != 1:
        raise ValueError('it must have one of "messages", "conversations" and "tokens", these with "loss_mask"')
      if "tokens" in record:
        found = [_tokens(record)]
      else:
        messages = _messages(record)
        found = encode_conversation(tokenizer, messages, **_variables(record))
        replies = sum(message["role"] == "assistant" for message in messages[1:])  # the first answers nothing
        lost.rewritten += replies - sum(_n_runs(mask) for _, mask in found)
        found = found if replies else [([], [])]
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
    yield from ((where, document) for document in found)


def _n_runs(mask: list[bool]) -> int:
  """How many replies a mask supervises."""
  return sum(now and not before for before, now in zip([False, *mask], mask))


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
  """The messages of a conversation, with our names for keys and roles."""
  name = "messages" if "messages" in record else "conversations"
  if not isinstance(record[name], list) or not record[name]:
    raise ValueError(f'"{name}" must be a list that is not empty')
  messages = []
  for given in record[name]:
    message = dict(given) if isinstance(given, dict) else {}
    for ours, theirs in (("role", "from"), ("content", "value")):
      if theirs in message:
        message.setdefault(ours, message.pop(theirs))
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
      raise ValueError(f'a message must have the texts "role" and "content", got {json.dumps(given)[:80]}')
    if message["role"] not in ROLES:
      raise ValueError(f"a message has the unknown role {message['role'][:40]!r}, expected one of "
                       f"{', '.join(ROLES)}: rename it")
    _refuse(message, "a message", ("weight",))
    messages.append(message | {"role": ROLES[message["role"]]})
  return messages


def _variables(record: dict[str, Any]) -> dict[str, Any]:
  """What a line says to the chat template beside its messages."""
  _refuse(record, "it", SETTINGS)
  tools, given = record.get("tools"), record.get("chat_template_kwargs") or {}
  if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
    raise ValueError(f'"tools" must be a list of objects, got {json.dumps(tools)[:80]}: write each as a JSON schema')
  if not isinstance(given, dict) or not all(k == "enable_thinking" and type(v) is bool for k, v in given.items()):
    raise ValueError(f'"chat_template_kwargs" must be {{"enable_thinking": true or false}}, got '
                     f'{json.dumps(given)[:80]}: other variables of a template are not supported')
  return {"tools": tools, **given}


def _refuse(record: dict[str, Any], what: str, keys: Iterable[str]) -> None:
  # What says nothing is harmless: many data sets have every column in every line.
  said = [key for key in keys if record.get(key) not in (None, "", [], {}) and (key, record[key]) != ("weight", 1)]
  if said:
    raise ValueError(f'{what} has "{said[0]}", which would change what is learned and is not supported: write it as '
                     f'messages, "tools" or "chat_template_kwargs", or remove it')


def _tokens(record: dict[str, Any]) -> Encoded:
  """The tokens and the loss mask of a line that has them."""
  tokens, mask = record["tokens"], record.get("loss_mask")
  if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
    raise ValueError('"tokens" must be a list of token ids')
  if not isinstance(mask, list) or not all(m in (0, 1) for m in mask):
    raise ValueError('"loss_mask" must be a list of true and false')
  if len(tokens) != len(mask):
    raise ValueError(f'{len(tokens)} "tokens" but {len(mask)} in "loss_mask": they go in pairs')
  return tokens, mask
