"""Files -> documents -> rows -> batches. Nothing is lost or mixed up; a step's number is its batch."""

import json
from collections import Counter

import numpy as np
import pytest

from dspark_jax.data import pipeline


def documents_of(sizes, seed=0, vocab_size=50):
  rng = np.random.default_rng(seed)
  return [pipeline.Document(rng.integers(1, vocab_size, size).astype(np.int32), rng.random(size) < 0.7)
          for size in sizes]


def random_documents(n=60, longest=20):
  return documents_of(np.random.default_rng(1).integers(1, longest + 1, n))


def unpack(rows):
  """(tokens, mask) of every document found in the rows, by segment number."""
  found = []
  for row in range(len(rows.tokens)):
    for segment in range(1, rows.segments[row].max() + 1):
      own = rows.segments[row] == segment
      assert np.all(np.diff(np.flatnonzero(own)) == 1), "a document lies in one piece"
      assert np.array_equal(rows.positions[row, own], np.arange(own.sum()))
      found.append((rows.tokens[row, own].tolist(), rows.loss_mask[row, own].tolist()))
  return found


def test_pack_loses_nothing():
  """Kills: a document over two rows, one overwritten by its neighbour, a mask shifted against its tokens."""
  documents = random_documents()
  packed = pipeline.pack(documents, 32)
  expected = [(document.tokens.tolist(), document.loss_mask.tolist()) for document in documents]
  assert sorted(unpack(packed.rows)) == sorted(expected)
  padding = packed.rows.segments == 0
  for field in (packed.rows.tokens, packed.rows.loss_mask, packed.rows.positions):
    assert not field[padding].any()
  assert packed.fill == 1 - padding.mean() and packed.n_cut == 0
  assert packed.fill > 0.85
  types = [str(field.dtype) for field in (packed.rows.tokens, packed.rows.loss_mask, packed.rows.segments,
                                          packed.rows.positions)]
  assert types == ["int32", "bool", "int32", "int32"]


def test_pack_is_first_fit():
  """Kills: next-fit (which only looks at the newest row), and an off-by-one that never fills a row."""
  documents = random_documents()
  rows = []
  for document in documents:
    for row in rows:
      if sum(len(tokens) for tokens, _ in row) + len(document.tokens) <= 24:
        row.append(document)
        break
    else:
      rows.append([document])
  packed = pipeline.pack(documents, 24)
  assert [document.tokens.tolist() for row in rows for document in row] == [d for d, _ in unpack(packed.rows)]
  assert len(packed.rows.tokens) == len(rows)
  assert pipeline.pack(documents_of([3, 5, 8]), 8).fill == 1


def test_pack_cuts_long_documents():
  """Kills: dropping a long document, or spilling it into the next row; and packing nothing without a word."""
  documents = documents_of([30, 4])
  packed = pipeline.pack(documents, 10)
  expected = [documents[0].tokens[:10].tolist(), documents[1].tokens.tolist()]
  assert [tokens for tokens, _ in unpack(packed.rows)] == expected
  assert packed.n_cut == 20
  with pytest.raises(ValueError, match="no documents"):
    pipeline.pack([], 10)
  with pytest.raises(ValueError, match="document 1 has no tokens"):
    pipeline.pack(documents_of([2, 0]), 10)


def first_tokens(packed, steps, batch_size, seed=7):
  """Which rows were drawn: each row of `numbered` holds its own number."""
  return [pipeline.batch_at(packed, step, batch_size, seed=seed).tokens[:, 0].tolist() for step in steps]


def numbered(n_rows):
  mask = np.ones(4, bool)
  return pipeline.pack([pipeline.Document(np.full(4, row, np.int32), mask) for row in range(n_rows)], 4)


@pytest.mark.parametrize("n_rows, batch_size", [(10, 3), (12, 4), (3, 8)])
def test_every_row_once_an_epoch(n_rows, batch_size):
  """Kills: sampling with replacement, dropping the epoch's last rows, one permutation for all epochs."""
  packed = numbered(n_rows)
  stream = sum(first_tokens(packed, range(4 * n_rows), batch_size), [])
  epochs = [stream[start:start + n_rows] for start in range(0, 4 * n_rows, n_rows)]
  assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) > 1
  assert stream != sum(first_tokens(packed, range(4 * n_rows), batch_size, seed=8), [])


def test_batches_resume():
  """Kills: a generator with hidden state: a run resumed at step 5 must see what the whole run saw."""
  packed = pipeline.pack(random_documents(), 24)
  np.random.seed(0)
  whole = [pipeline.batch_at(packed, step, 4, seed=7) for step in range(12)]
  np.random.seed(1)
  resumed = [pipeline.batch_at(packed, step, 4, seed=7) for step in range(5, 12)]
  for one, other in zip(whole[5:], resumed, strict=True):
    for name in ("tokens", "loss_mask", "segments", "positions"):
      assert np.array_equal(getattr(one, name), getattr(other, name))


def test_batch_keeps_rows_together():
  """Kills: a field gathered by another index than its neighbours."""
  packed = pipeline.pack(random_documents(), 24)
  batch = pipeline.batch_at(packed, 0, len(packed.rows.tokens), seed=0)
  assert sorted(unpack(batch)) == sorted(unpack(packed.rows))


def test_top_words():
  """Kills: counting prompt tokens, ties to the larger id, leaving out the stop ids, an unsorted answer."""
  documents = random_documents()
  counts = Counter(token for document in documents for token in document.tokens[document.loss_mask].tolist())
  for k in (1, 7, 20):
    expected = sorted(sorted(range(60), key=lambda token: (-counts[token], token))[:k])
    words = pipeline.top_words(documents, k, 60)
    assert words.tolist() == expected and words.dtype == np.int32
  rarest = min(range(60), key=lambda token: (counts[token], -token))
  with_stop = pipeline.top_words(documents, 7, 60, always=(rarest, rarest)).tolist()
  assert with_stop == sorted([*sorted(range(60), key=lambda token: (-counts[token], token))[:6], rarest])


def test_top_words_fills_and_refuses():
  """Kills: fewer than k words when few tokens occur; silence about ids outside the vocabulary."""
  document = pipeline.Document(np.array([5, 5, 3, 9], np.int32), np.array([True, True, True, False]))
  assert pipeline.top_words([document], 5, 10, always=(8,)).tolist() == [0, 1, 3, 5, 8]
  assert pipeline.top_words([document], 2, 10, always=(8, 9)).tolist() == [8, 9]
  with pytest.raises(ValueError, match="has token 5, the vocabulary has 5"):
    pipeline.top_words([document], 2, 5)
  for k in (1, 11):
    with pytest.raises(ValueError, match="k must be 2 to 10"):
      pipeline.top_words([document], k, 10, always=(8, 9))


def test_bigram_factors():
  """Kills: pairs across the loss mask, words off by a column, an unsmoothed or unweighted fit, a transposed factor."""
  documents = random_documents(40)
  words, rank, prior = np.array([3, 4, 8, 20, 21, 33, 47]), 7, 2.0
  w1, w2 = pipeline.bigram_factors(documents, words, 50, rank, prior)
  counts = Counter((int(a), int(b)) for d in documents for a, b, m, n in
                   zip(d.tokens, d.tokens[1:], d.loss_mask, d.loss_mask[1:]) if m and n and b in words)
  often = np.array([sum(n for (_, b), n in counts.items() if b == word) for word in words]) + 0.1
  for u in range(50):
    row = np.array([counts[u, word] for word in words])
    if row.sum():
      p = (row + prior * often / often.sum()) / (row.sum() + prior)
      logits = w1[u] @ w2.T
      np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), p, rtol=1e-3)
  total = np.array([sum(counts[u, w] for w in words) for u in range(50)])
  mean = np.tile(total @ w1 / total.sum(), ((total == 0).sum(), 1))
  np.testing.assert_allclose(w1[total == 0], mean, rtol=1e-4, atol=1e-6)
  exact = total[:, None] ** 0.5 * (w1 @ w2.T)
  singular = np.linalg.svd(exact, compute_uv=False)
  for r in (2, 5):  # no matrix of rank r is nearer (Eckart-Young)
    a, b = pipeline.bigram_factors(documents, words, 50, r, prior)
    error = np.linalg.norm(exact - total[:, None] ** 0.5 * (a @ b.T))
    np.testing.assert_allclose(error, np.linalg.norm(singular[r:]), rtol=1e-3)
  wide = pipeline.bigram_factors(documents, words, 50, 9, prior)
  assert wide[0].shape == (50, 9) and not wide[0][:, 7:].any() and wide[1].shape == (7, 9)


def letters(text, add_special_tokens):
  assert not add_special_tokens
  return {"input_ids": list(text.encode())}


def encode_conversation(tokenizer, messages):
  """One token a letter; replies are supervised."""
  ids, mask = [], []
  for message in messages:
    piece = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
    ids, mask = ids + piece, mask + [message["role"] == "assistant"] * len(piece)
  if not any(mask):
    raise ValueError("no reply to learn")
  return [(ids, mask)]


def read(paths, max_len=100):
  return pipeline.read_conversations(paths, letters, max_len=max_len, encode_conversation=encode_conversation)


def write_lines(path, *records):
  lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
  path.write_text("\n".join(lines) + "\n")
  return path


def chat(*contents):
  roles = ("user", "assistant") * len(contents)
  return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)]}


def test_reads_every_kind(tmp_path):
  """Kills: tokens encoded a second time, a text whose end is lost, files read in another order."""
  tokens = {"tokens": list(range(20)), "loss_mask": [i > 3 for i in range(20)], "id": "kept out"}
  lines = write_lines(tmp_path / "a.jsonl", chat("hi", "a reply of some length"), "", tokens)
  text = tmp_path / "b.txt"
  text.write_text("z" * 50)
  source = read([str(text), lines], max_len=20)
  got = [(document.tokens.tolist(), document.loss_mask.tolist()) for document in source.documents]
  assert got[:2] == [([ord("z")] * 20, [True] * 20)] * 2
  assert got[2] == (list(b"hia reply of some length"[:20]), [False] * 2 + [True] * 18)
  assert got[3] == (tokens["tokens"], tokens["loss_mask"])
  assert len(got) == 4 and source.n_dropped == 1  # the text's last ten tokens are too few


def test_short_documents_are_dropped_and_counted(tmp_path):
  """Kills: counting all tokens and not the supervised ones, 13 or 15 for 14, counting before the cut."""
  chats = chat("p" * 30, "r" * 13), chat("p" * 30, "r" * 14), chat("p" * 90, "r" * 40)
  source = read([write_lines(tmp_path / "a.jsonl", *chats)])
  assert [len(document.tokens) for document in source.documents] == [44]
  assert source.n_dropped == 2


@pytest.mark.parametrize("line, message", [
    ("{broken", "Expecting property name"),
    ("[1, 2]", "holds a list, expected an object"),
    ({"prompt": "a", "answer": "b"}, "either \"messages\" or \"tokens\""),
    ({"messages": []}, "not empty"),
    ({"messages": [{"role": "user"}]}, "a message must have"),
    ({"messages": [{"role": "user", "content": "alone"}]}, "no reply to learn"),
    ({"tokens": [1, 2], "loss_mask": [True]}, "2 \"tokens\" but 1 in \"loss_mask\""),
    ({"tokens": [1, -2], "loss_mask": [True, True]}, "list of token ids"),
    ({"tokens": [1, 2]}, "list of true and false"),
])
def test_errors_name_file_and_line(tmp_path, line, message):
  """Kills: a bad line that is skipped, or whose place nobody can find (blank lines count too)."""
  path = write_lines(tmp_path / "bad.jsonl", chat("hi", "a reply of some length"), "", line)
  with pytest.raises(ValueError) as caught:
    read([path])
  assert str(caught.value).startswith(f"{path}, line 3") and message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_errors_name_the_file(tmp_path):
  """Kills: guessing what an unknown file is, and text in another encoding read as something else."""
  with pytest.raises(ValueError, match="data.csv ends in none of"):
    read([tmp_path / "data.csv"])
  (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
    read([tmp_path / "latin.txt"])
