"""Documents -> rows on disk -> batches, and what rows say of words. Nothing is lost or mixed up."""

import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from dspark_jax.data import rows
from dspark_jax.data import words as words_module
from dspark_jax.data.conversations import Document
from dspark_jax.data.rows import Rows, pack
from dspark_jax.data.words import bigram_factors, top_words
from folders import complains, packed_rows


def documents_of(sizes, seed=0, vocab_size=50):
  rng = np.random.default_rng(seed)
  return [Document(rng.integers(1, vocab_size, size).astype(np.int32), rng.random(size) < 0.7) for size in sizes]


def random_documents(n=60, longest=20):
  return documents_of(np.random.default_rng(1).integers(1, longest + 1, n))


def unpack(batch):
  """(tokens, mask) of every document found in the rows, by segment number."""
  found = []
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segments[row].max() + 1):
      own = batch.segments[row] == segment
      assert np.all(np.diff(np.flatnonzero(own)) == 1), "a document lies in one piece"
      assert np.array_equal(batch.positions[row, own], np.arange(own.sum()))
      found.append((batch.tokens[row, own].tolist(), batch.loss_mask[row, own].tolist()))
  return found


@pytest.mark.parametrize("vocab_size, dtype", [(2 ** 16, "uint16"), (2 ** 16 + 1, "int32")])
def test_rows_lose_nothing(vocab_size, dtype, monkeypatch, tmp_path):
  """Kills: a document over two rows, one overwritten by its neighbour, a mask shifted against its tokens; a field
  gathered by another index than its neighbours; tokens that a smaller type cuts."""
  monkeypatch.setattr(rows, "CHUNK", 50)
  documents = random_documents()
  documents[7].tokens[0] = vocab_size - 1
  packed = packed_rows(tmp_path / "rows", documents, 32, vocab_size)
  batch = packed.take(np.arange(len(packed)))
  expected = [(document.tokens.tolist(), document.loss_mask.tolist()) for document in documents]
  assert sorted(unpack(batch)) == sorted(expected)
  padding = batch.segments == 0
  for field in (batch.tokens, batch.loss_mask, batch.positions):
    assert not field[padding].any()
  assert packed.fill == 1 - padding.mean() and packed.fill > 0.85
  assert [str(x.dtype) for x in (batch.tokens, batch.loss_mask, batch.segments, batch.positions)] == [
      "int32", "bool", "int32", "int32"]
  assert str(np.load(packed.folder / "tokens.npy", mmap_mode="r").dtype) == dtype
  m = packed.manifest
  assert (m.documents, m.tokens, m.supervised) == (60, (~padding).sum(), batch.loss_mask.sum())
  some = np.array([3, 0, 3])
  assert np.array_equal(packed.take(some).tokens, batch.tokens[some])
  assert packed.lengths(some).tolist() == (~padding).sum(1)[some].tolist()
  # as records of runs have had it since before rows were on disk
  assert packed.digest == hashlib.sha256(batch.tokens.tobytes() + batch.loss_mask.tobytes()).hexdigest()[:16]
  for row, samples in enumerate(packed.samples(np.arange(len(packed)))):
    numbers = [int(sample.removeprefix("a.jsonl:")) - 1 for sample in samples]
    one = unpack(packed.take(np.array([row])))
    assert [documents[number].tokens.tolist() for number in numbers] == [tokens for tokens, _ in one]


def first_fit(sizes, length):
  """As printed in textbooks: each document into the first of all rows that has room."""
  used, where = [], []
  for size in sizes:
    row = next((row for row, taken in enumerate(used) if taken + size <= length), len(used))
    used += [0] * (row == len(used))
    used[row] += size
    where.append(row)
  return where


def test_pack_is_first_fit():
  """Kills: next-fit (which only looks at the newest row), an off-by-one that never fills a row, a row closed while a
  document still fits; a bound on the open rows that costs room."""
  sizes = np.random.default_rng(0).integers(2, 24, 400)
  assert pack(sizes, 24).tolist() == first_fit(sizes, 24)
  assert pack(np.array([3, 5, 8]), 8).tolist() == [0, 0, 1]
  few = pack(sizes, 24, open_rows=20)
  used = np.bincount(few, sizes)
  assert used.max() <= 24 and few.max() > max(first_fit(sizes, 24))  # another packing, and hardly a worse one
  assert used.sum() / (24 * len(used)) > 0.97 * sizes.sum() / (24 * (1 + max(first_fit(sizes, 24))))


def test_pack_refuses():
  """Kills: a document that is longer than a row, or has no tokens, packed over its neighbour; no rows, and no word."""
  with complains("no documents to pack"):
    pack(np.array([], np.int32), 10)
  for sizes, said in (([2, 0], "document 1 has 0 tokens"), ([11, 2], "document 0 has 11 tokens, expected 1 to 10")):
    with complains(said):
      pack(np.array(sizes), 10)


def test_rows_go_to_other_processes(tmp_path):
  """Kills: all tokens copied to every process that reads some."""
  packed = packed_rows(tmp_path / "rows", random_documents(500), 32)
  packed.take(np.arange(3))
  data = pickle.dumps(packed)
  assert len(data) < 500
  assert np.array_equal(pickle.loads(data).take(np.arange(9)).tokens, packed.take(np.arange(9)).tokens)


def test_a_damaged_folder_is_refused(tmp_path):
  """Kills: rows of a preparation that was killed, or of which a part is lost, read as if they were whole."""
  packed = packed_rows(tmp_path / "rows", random_documents(), 32)
  with pytest.raises(IndexError):
    packed.take(np.array([len(packed)]))
  manifest, tokens = packed.folder / "manifest.json", packed.folder / "tokens.npy"
  text, array = manifest.read_text(), tokens.read_bytes()
  for change, said in (({"format": "x"}, "has the format 'x', expected"), ({"tokens": "many"}, "'tokens' is 'many'"),
                       ({"rows": 3}, "rows.npy has the shape"), ({"supervised": 0}, "no supervised tokens")):
    manifest.write_text(json.dumps(json.loads(text) | change))
    with complains(said):
      Rows(packed.folder)
  manifest.write_text(text)
  tokens.write_bytes(array[:-2])
  with complains("tokens.npy cannot be read", "delete its manifest.json and run train.prepare again"):
    Rows(packed.folder)
  np.save(tokens, np.zeros(packed.manifest.tokens))
  with complains("tokens.npy holds float64, expected uint16 or int32"):
    Rows(packed.folder)
  manifest.unlink()
  with complains("has no manifest.json", "run train.prepare"):
    Rows(packed.folder)


def test_top_words(tmp_path):
  """Kills: counting prompt tokens, ties to the larger id, leaving out the stop ids, an unsorted answer."""
  documents = random_documents()
  packed = packed_rows(tmp_path / "rows", documents, 24)
  counts = Counter(token for document in documents for token in document.tokens[document.loss_mask].tolist())
  for k in (1, 7, 20):
    expected = sorted(sorted(range(60), key=lambda token: (-counts[token], token))[:k])
    words = top_words(packed, k, 60)
    assert words.tolist() == expected and words.dtype == np.int32
  rarest = min(range(60), key=lambda token: (counts[token], -token))
  with_stop = top_words(packed, 7, 60, always=(rarest, rarest)).tolist()
  assert with_stop == sorted([*sorted(range(60), key=lambda token: (-counts[token], token))[:6], rarest])


def test_top_words_fills_and_refuses(tmp_path):
  """Kills: fewer than k words when few tokens occur; silence about ids outside the vocabulary."""
  document = Document(np.array([5, 5, 3, 9], np.int32), np.array([True, True, True, False]))
  packed = packed_rows(tmp_path / "rows", [document], 8)
  assert top_words(packed, 5, 10, always=(8,)).tolist() == [0, 1, 3, 5, 8]
  assert top_words(packed, 2, 10, always=(8, 9)).tolist() == [8, 9]
  with pytest.raises(ValueError, match="has token 5, the vocabulary has 5"):
    top_words(packed, 2, 5)
  for k in (1, 11):
    with pytest.raises(ValueError, match="k must be 2 to 10"):
      top_words(packed, k, 10, always=(8, 9))


def test_many_bigrams(monkeypatch):
  """Kills: counts in float32, which one more does not change from 2 ** 24 on."""
  million = np.zeros(2 ** 20, np.int64)
  # 17 million pairs of tokens 0 and 3, one of 0 and 4.
  monkeypatch.setattr(words_module, "_pairs", lambda *_: ((million, million + (n == 17)) for n in range(18)))
  w1, w2 = bigram_factors(None, np.array([3, 4]), 5, 1)
  log_p = w1[0] @ w2.T
  np.testing.assert_allclose(np.exp(log_p[0] - log_p[1]), 17, rtol=1e-2)


def test_bigram_factors(tmp_path, monkeypatch):
  """Kills: pairs across the loss mask or two documents, words off by a column, an unsmoothed or unweighted fit, a
  transposed factor."""
  documents = random_documents(40)
  monkeypatch.setattr(rows, "CHUNK", 50)  # several of them
  packed = packed_rows(tmp_path / "rows", documents, 24)
  words, rank, prior = np.array([3, 4, 8, 20, 21, 33, 47]), 7, 2.0
  w1, w2 = bigram_factors(packed, words, 50, rank, prior)
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
    a, b = bigram_factors(packed, words, 50, r, prior)
    error = np.linalg.norm(exact - total[:, None] ** 0.5 * (a @ b.T))
    np.testing.assert_allclose(error, np.linalg.norm(singular[r:]), rtol=1e-3)
  wide = bigram_factors(packed, words, 50, 9, prior)
  assert wide[0].shape == (50, 9) and not wide[0][:, 7:].any() and wide[1].shape == (7, 9)
