"""The order of rows and what a Feed makes of it: a step's number is its batch, on however many processes."""

import pickle
import threading

import numpy as np
import pytest

from dspark_jax.data import pipeline
from dspark_jax.data.conversations import Document
from dspark_jax.data.rows import row_indices
from folders import complains, packed_rows
from train.features import Batches

FIELDS = ("tokens", "loss_mask", "segments", "positions")


@pytest.mark.parametrize("n_rows, batch_size", [(10, 3), (12, 4), (3, 8)])
def test_every_row_once_an_epoch(n_rows, batch_size):
  """Kills: sampling with replacement, dropping the epoch's last rows, one permutation for all epochs."""
  stream_of = lambda seed: np.concatenate([row_indices(n_rows, step, batch_size, seed=seed)
                                           for step in range(4 * n_rows)]).tolist()
  stream = stream_of(7)
  epochs = [stream[start:start + n_rows] for start in range(0, 4 * n_rows, n_rows)]
  assert all(sorted(epoch) == list(range(n_rows)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) > 1
  assert stream != stream_of(8)


def test_the_order_stays():
  """Kills: another order of rows, with which runs that began before would go on with other data."""
  assert [row_indices(10, step, 3, seed=7).tolist() for step in (0, 3, 1000)] == [[8, 0, 7], [9, 9, 0], [7, 4, 3]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  rng = np.random.default_rng(0)
  documents = [Document(rng.integers(1, 50, size).astype(np.int32), rng.random(size) < 0.7)
               for size in rng.integers(1, 21, 60)]
  return packed_rows(tmp_path_factory.mktemp("pipeline") / "rows", documents, 24)


def steps_of(rows, n, **how):
  feed = pipeline.Feed(rows, 8, seed=7, **how)
  found = [item for _, item in zip(range(n), feed)]
  feed.close()
  return found


def assert_same(one, other):
  for name in FIELDS:
    assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("start", [0, 5])
def test_batches_resume(start, rows):
  """Kills: a generator with hidden state: a run resumed at step 5 must see what the whole run saw; steps that threads
  finish in another order than they began."""
  for step, (number, indices, batch) in enumerate(steps_of(rows, 12, start=start), start):
    assert number == step and np.array_equal(indices, row_indices(len(rows), step, 8, seed=7))
    assert_same(batch, pipeline.batch_at(rows, step, 8, seed=7))


@pytest.mark.parametrize("owners", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 1, 0, 2, 2, 0, 1]])
def test_hosts_share_the_global_batch(owners, rows):
  """Kills: processes that read the same rows, other rows than one process would, or in another order (a run goes on
  with another number of hosts, or another mesh)."""
  whole, owners = steps_of(rows, 6, start=2), np.array(owners)
  shares = [np.flatnonzero(owners == p) for p in range(owners.max() + 1)]
  parts = [steps_of(rows, 6, start=2, mine=mine) for mine in shares]
  for (step, indices, batch), *of_hosts in zip(whole, *parts, strict=True):
    for mine, (number, part, some) in zip(shares, of_hosts, strict=True):
      assert number == step and np.array_equal(part, indices[mine])
      for name in FIELDS:
        assert np.array_equal(getattr(some, name), getattr(batch, name)[mine]), name


def test_lengths(tmp_path):
  """Kills: rows cut at a shorter length, a length that depends on the part of one process, one that never saves."""
  sizes = np.random.default_rng(0).choice([13, 15, 18, 22], 60, p=[0.7, 0.2, 0.07, 0.03])  # one document a row
  rows = packed_rows(tmp_path / "rows", [Document(np.full(n, n, np.int32), np.ones(n, bool)) for n in sizes], 24)
  parts = [steps_of(rows, 20, mine=np.array([2 * p, 2 * p + 1]), lengths=(19, 16)) for p in range(4)]
  widths = []
  for step, *of_hosts in zip(range(20), *parts):
    whole = pipeline.batch_at(rows, step, 8, seed=7)
    (width,) = {batch.tokens.shape[1] for _, _, batch in of_hosts}
    widths.append(width)
    assert width == {13: 16, 15: 16, 18: 19, 22: 24}[(whole.segments > 0).sum(1).max()]
    for name in FIELDS:
      parts_of = np.concatenate([getattr(batch, name) for _, _, batch in of_hosts])
      assert np.array_equal(parts_of, getattr(whole, name)[:, :width]) and not getattr(whole, name)[:, width:].any()
  assert len(set(widths)) == 3
  with complains("lengths are (25,), expected numbers up to 24"):
    pipeline.Feed(rows, 8, seed=7, lengths=(25,))


def test_a_feed_reads_ahead_and_says_how_long_it_waited(rows, monkeypatch):
  """Kills: a batch that is read when it is asked for; a wait that is not counted; threads that outlive their feed."""
  gate, asked = threading.Event(), []
  class Slow(pipeline.Parts):
    def __getitem__(self, step):
      asked.append(step)
      assert gate.wait(10)
      return super().__getitem__(step)
  monkeypatch.setattr(pipeline, "Parts", Slow)
  feed = pipeline.Feed(rows, 8, seed=7)
  opener = threading.Timer(0.2, gate.set)
  opener.start()
  assert next(feed)[0] == 0 and 0.1 < feed.waited < 10
  opener.join()
  waited = feed.waited
  for _ in range(500):
    if len(asked) > 3:
      break
    threading.Event().wait(0.01)
  assert len(asked) > 3
  assert [next(feed)[0] for _ in range(3)] == [1, 2, 3] and feed.waited >= waited
  feed.close()


def test_a_source_can_be_pickled(rows):
  """Kills: a source that Grain's own worker processes could not be given."""
  source = pipeline.Parts(rows, 8, 7, np.array([4, 1, 7]), (24,))
  step, indices, batch = pickle.loads(pickle.dumps(source))[3]
  assert step == 3
  assert_same(batch, source[3][2])
  assert np.array_equal(indices, row_indices(len(rows), 3, 8, seed=7)[[4, 1, 7]])


def test_more_hosts_than_rows(rows, monkeypatch):
  """Kills: hosts that all read the same few rows, several times in a step, without a word."""
  monkeypatch.setattr("jax.process_count", lambda: len(rows) + 1)
  with complains(f"there are {len(rows) + 1} processes for {len(rows)} rows, expected at least a row for each"):
    Batches(None, rows, None)
  monkeypatch.setattr("jax.process_count", lambda: len(rows))
  Batches(None, rows, None)
