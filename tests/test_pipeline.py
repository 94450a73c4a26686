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


def encode_conversation(tokenizer, messages, *, tools, enable_thinking=False):
  """One token a letter; replies are supervised, each in a document of its own where thinking is on."""
  texts = [tokenizer(message["content"], add_special_tokens=False)["input_ids"] for message in messages]
  replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  if any(message["content"] == "refused" for message in messages):
    raise ValueError("the template refuses these messages")
  ids = lambda last, supervised: (sum(texts[:last + 1], [ord("t")] * len(tools or ())), [False] * len(tools or ()) + [
      i in supervised for i, text in enumerate(texts[:last + 1]) for _ in text])
  if enable_thinking:
    # As templates that rewrite history: what begins with * cannot be had in the form in which it is generated.
    return [ids(reply, [reply]) for reply in replies if not messages[reply]["content"].startswith("*")]
  return [ids(len(messages), replies)] if replies else []


def read(paths, max_len=100, vocab_size=256):
  return pipeline.read_conversations(paths, letters, max_len=max_len, vocab_size=vocab_size,
                                     encode_conversation=encode_conversation)


def write_lines(path, *records):
  lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
  path.write_text("\n".join(lines) + "\n")
  return path


def chat(*contents, **more):
  roles = ("user", "assistant") * len(contents)
  return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)], **more}


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
  # the text's last ten tokens are too few
  assert len(got) == 4 and source.lost == pipeline.Lost(too_short=1, cut=1, cut_tokens=4)


def test_short_documents_are_dropped_and_counted(tmp_path):
  """Kills: counting all tokens and not the supervised ones, 13 or 15 for 14, counting before the cut; one reason for
  what is too short and for what the cut made so."""
  chats = chat("p" * 30, "r" * 13), chat("p" * 30, "r" * 14), chat("p" * 90, "r" * 40)
  source = read([write_lines(tmp_path / "a.jsonl", *chats)])
  assert [len(document.tokens) for document in source.documents] == [44]
  assert source.lost == pipeline.Lost(too_short=1, cut_away=1)


def test_what_is_left_out_is_counted_under_its_reason(tmp_path):
  """Kills: "too short" for a conversation without a reply, or for replies that the template rewrites; a document a
  conversation where it makes several; a cut that nobody is told of."""
  thinking = {"chat_template_kwargs": {"enable_thinking": True}}
  source = read([write_lines(
      tmp_path / "a.jsonl", chat("alone"), {"tokens": [1] * 20, "loss_mask": [0] * 20},
      chat("a", "r" * 20, "b", "s" * 20, **thinking), chat("a", "*" * 20, "b", "s" * 20, "c", "*" * 20, **thinking),
      chat("a", "*" * 20, **thinking), chat("a", "r" * 120), chat("a", "r" * 101))])
  assert [bytes(document.tokens.tolist()) for document in source.documents] == [
      b"a" + b"r" * 20, b"a" + b"r" * 20 + b"b" + b"s" * 20, b"a" + b"*" * 20 + b"b" + b"s" * 20,
      *[b"a" + b"r" * 99] * 2]
  assert [int(document.loss_mask.sum()) for document in source.documents] == [20, 20, 20, 99, 99]
  assert source.lost == pipeline.Lost(no_reply=2, rewritten=3, cut=2, cut_tokens=21 + 2)
  said = str(source.lost)
  assert said.startswith("2 conversations without a reply, 3 replies that") and "too short" not in said
  assert "2 documents cut" in said and "23 tokens" in said and str(pipeline.Lost()) == "nothing"


def test_sharegpt(tmp_path):
  """Kills: ShareGPT's names for keys and roles taken for unknown data, or for a conversation without a reply."""
  said = [("system", "be kind"), ("human", "hi"), ("gpt", "a reply of some length")]
  records = ({"conversations": [{"from": role, "value": text} for role, text in said], "system": "", "id": 3},
             {"conversations": [{"role": role, "content": text} for role, text in said]},
             {"messages": [{"role": role, "content": text, "weight": 1} for role, text in said]})
  source = read([write_lines(tmp_path / "a.jsonl", *records)])
  for document in source.documents:
    assert bytes(document.tokens.tolist()) == b"be kindhia reply of some length" and document.loss_mask.sum() == 22
  assert len(source.documents) == 3 and source.lost == pipeline.Lost()


def test_tools_reach_the_template(tmp_path):
  """Kills: tools of a line that are passed over."""
  lines = write_lines(tmp_path / "a.jsonl", *(chat("hi", "a reply of some length", tools=t) for t in ([{}] * 5, None)))
  assert [bytes(d.tokens.tolist()[:7]) for d in read([lines]).documents] == [b"ttttthi", b"hia rep"]


@pytest.mark.parametrize("line, message", [
    ("{broken", "Expecting property name"),
    ("[1, 2]", "holds a list, expected an object"),
    ({"prompt": "a", "answer": "b"}, "one of \"messages\", \"conversations\" and \"tokens\""),
    (chat("hi", "reply", conversations=[]), "one of \"messages\""),
    ({"messages": []}, "not empty"),
    ({"messages": [{"role": "user"}]}, "a message must have"),
    ({"conversations": [{"from": "human", "value": None}]}, "a message must have"),
    (chat("refused", "reply"), "the template refuses"),
    ({"messages": [{"role": "narrator", "content": "w"}]}, "unknown role 'narrator', expected one of system, "),
    (chat("hi", "reply", tools="[]"), "\"tools\" must be a list of objects"),
    (chat("hi", "reply", chat_template_kwargs={"enable_thinking": "yes"}), "\"chat_template_kwargs\" must be"),
    (chat("hi", "reply", chat_template_kwargs={"add_generation_prompt": True}), "\"chat_template_kwargs\" must be"),
    (chat("hi", "reply", system="be kind"), "it has \"system\", which would change what is learned"),
    (chat("hi", "reply", enable_thinking=False), "it has \"enable_thinking\""),
    ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "a message has \"weight\""),
    ({"tokens": [1, 256], "loss_mask": [True, True]}, "token 256 is beyond the target's vocabulary, which has 256"),
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
  (tmp_path / "other.txt").write_text("zzz")
  with pytest.raises(ValueError, match="other.txt: token 122 is beyond"):
    read([tmp_path / "other.txt"], vocab_size=122)
  (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
    read([tmp_path / "latin.txt"])
