"""The hidden-state store: what it gives back is what the target said, whoever wrote it, or it is refused by name."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dspark_jax
from dspark_jax.data import pipeline
from dspark_jax.data import store as subject
from dspark_jax.data.conversations import Document
from dspark_jax.data.features import Memory, Online, Stored
from dspark_jax.data.rows import held_out
from dspark_jax.data.store import NORM, Manifest, Store, decoded, encoded, fill
from dspark_jax.drafters.dspark import DSpark, DSparkConfig
from dspark_jax.training.step import init_state
from dspark_jax.types import TargetOutput
from train import cache_hidden
from train.config import TrainConfig
from train.features import Batches
from folders import complains, files, packed_rows
from test_training import CONFIG, LENGTH, SPEC, VOCABULARY, step_of, target_of

ROOT = Path(dspark_jax.__file__).parents[1]
TAPS, ROWS, BATCH, SHARD, CHUNK = (-1, 1), 7, 2, 12, 4
SCRATCH = tempfile.TemporaryDirectory()  # for as long as the tests run


@functools.cache
def models():
  """(target, drafter of one layer); weights so large that context matters."""
  config = DSparkConfig(spec=SPEC, num_layers=1, vocab_size=VOCABULARY, num_target_layers=3, taps=TAPS,
                        mask_token_id=VOCABULARY - 1, block_size=2, markov_rank=0, confidence="hidden")
  grow = lambda model: jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, model)
  return jax.jit(lambda: (grow(target_of()), grow(DSpark(config, rngs=nnx.Rngs(1)))))()


@functools.cache
def rows():
  """Seven rows, some of them full, of documents of random lengths."""
  rng = np.random.default_rng(0)
  documents = [Document(rng.integers(0, 39, n).astype(np.int32), rng.random(n) < 0.8)
               for n in rng.integers(3, 12, 14)]
  packed = packed_rows(Path(SCRATCH.name) / "rows", documents, LENGTH)
  assert len(packed) >= ROWS and 0.6 < packed.fill < 1
  return packed


@functools.cache
def say_of(dtype):
  config = TrainConfig(target="t", drafter=DSpark.Settings(taps=TAPS, mask_token_id=0), out=Path("."), batch=BATCH)
  return cache_hidden.Target(config, rows(), models()[0], manifest_of(dtype))


@functools.cache
def segments_of():
  return rows().take(np.arange(len(rows()))).segments


@functools.cache
def offsets():
  return np.concatenate([[0], np.cumsum((segments_of() > 0).sum(1))])


def manifest_of(dtype, **changes) -> Manifest:
  return Manifest(**{**dict(
      target="t", target_dtype="float32", taps=TAPS, tokenizer="a", template="b", rows=rows().digest, date="2026-07-15",
      batch=BATCH, dtype=dtype, n_rows=len(rows()), n_tokens=int(offsets()[-1]), width=16, feature_width=32, offsets=0,
      shard_tokens=SHARD, chunk_tokens=CHUNK), **changes})


def begun(place, dtype="float32", **changes) -> Store:
  return Store.begun(place, manifest_of(dtype, **changes), offsets())


def written(place, dtype="float32", shards=None) -> Store:
  store = begun(place, dtype)
  for _ in fill(store, store.missing() if shards is None else shards, BATCH, say_of(dtype)):
    pass
  return store


@functools.cache
def losses(stored=None):
  """The loss and its gradient's norm of two steps: with the target in the step, or with what these features say."""
  step, state, found = step_of(CONFIG), init_state(models()[1], CONFIG, 0, total_steps=10), []
  for index in range(2):
    numbers = pipeline.row_indices(len(rows()), index, BATCH, seed=3)
    batch = rows().take(numbers)
    encoded = (stored or Online()).at(index, numbers, batch)
    state, metrics = step(state, models()[0], jax.device_put(batch), encoded=encoded)
    found += [float(metrics[name].sum) for name in ("loss", "grad_norm")]
  return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype, off", [("float32", 0), ("bfloat16", 1e-3), ("int8", 1e-2)])
def test_stored_equals_online(dtype, off, tmp_path):
  """Kills: a token's states at another token, hidden for features, taps in another order, a scale of another tap."""
  store = written(tmp_path / "s", dtype)
  store.check_whole()
  stored, online = losses(Stored(store, "float32")), losses()
  assert off or stored == online
  # Of the losses alone: Adam's first step takes the sign of a gradient for its size, and so of its rounding.
  np.testing.assert_allclose(stored[::2], online[::2], rtol=off, atol=0)


def test_memory_of_rows():
  """Kills: a row's states at another row, or at another token; a target that is asked again for what it has said; what
  it says of padding kept."""
  asked = []

  def encode(batch):
    asked.append(1)
    said = batch.tokens.astype(jnp.float32)[..., None] + 1
    return TargetOutput(said, jnp.concatenate([said, -said], -1))
  memory = Memory(encode)
  for step, numbers in enumerate([[0, 3], [2, 1], [1, 0], [3, 3], [2, 4], [4, 0]]):
    batch = rows().take(np.array(numbers))
    got, wanted = memory.at(step, np.array(numbers), batch), (batch.tokens + 1.0) * (batch.segments > 0)
    np.testing.assert_array_equal(got.hidden[..., 0], wanted)
    np.testing.assert_array_equal(got.features, np.stack([wanted, -wanted], -1))
    assert (len(asked), memory.until) == ((1, 1), (2, 2), (2, 2), (2, 2), (3, 3), (3, 3))[step]


def test_padding_is_not_stored(tmp_path):
  """Kills: padding that takes up room; offsets that count it; chunks without a checksum."""
  store = written(tmp_path / "s")
  manifest = store.manifest
  assert manifest.n_tokens == (segments_of() > 0).sum() < segments_of().size
  for name in manifest.arrays:
    sizes = [(tmp_path / "s" / name / "c" / str(i) / "0").stat().st_size for i in range(manifest.n_shards)]
    assert sizes == [manifest.file_bytes(name, i) for i in range(manifest.n_shards)]
    assert sum(sizes) < 1.3 * manifest.n_tokens * manifest.arrays[name][0] * 4  # the last chunk, checksums, tables


def test_zeros_are_stored(tmp_path):
  """Kills: a shard of zeros that is never finished, since zarr leaves out what is the value of missing ones."""
  store, said = begun(tmp_path / "s"), say_of("float32")
  for _ in fill(store, store.missing(), BATCH, lambda *rows: jax.tree.map(np.zeros_like, said(*rows))):
    pass
  store.check_whole()
  assert not store.take(np.arange(2), segments_of()[:2])["hidden"].any()


def test_any_order_of_rows(tmp_path):
  """Kills: reads that depend on their neighbours, or on a batch; padding that is not zero."""
  store, segments = written(tmp_path / "s"), segments_of()
  n = len(rows())
  whole = store.take(np.arange(n), segments)
  said = say_of("float32")
  for name, x in whole.items():
    wanted = np.concatenate([said(first, min(first + BATCH, n))[name] for first in range(0, n, BATCH)])
    np.testing.assert_array_equal(x[segments > 0], wanted)
    assert not x[segments == 0].any()
  for order in (np.random.default_rng(0).permutation(n), np.array([3, 3, 0])):
    for name, x in store.take(order, segments[order]).items():
      np.testing.assert_array_equal(x, whole[name][order])


def test_prefetched_batches(tmp_path):
  """Kills: the batch of another step, handed out because it was asked for early."""
  stored, plain = (Stored(Store(written(tmp_path / "s").place), "float32") for _ in range(2))
  ask = lambda step: (step, np.array([step, 0]), rows().take(np.array([step, 0])))
  for step in (2, 0, 1):
    stored.ask(*ask(step))
  for step in (0, 1, 2, 1):
    np.testing.assert_array_equal(stored.at(*ask(step)).hidden, plain.at(*ask(step)).hidden)


def test_what_is_not_asked_for_is_forgotten(tmp_path):
  """Kills: a batch that is read ahead of a step that does not come, as where a run goes on, and held for good."""
  stored = Stored(Store(written(tmp_path / "s").place), "float32")
  config = TrainConfig(target="t", drafter=DSpark.Settings(taps=TAPS, mask_token_id=0), out=Path("."), batch=BATCH)
  with contextlib.closing(Batches(config, held_out(rows(), 0, seed=0)[0], stored)) as batches:
    for step in (0, 5):
      batches(step)
  assert list(stored._asked) == [6]


def test_int8_numbers():
  """Kills: one scale for all taps (a small one would vanish), zeros that become NaN, errors beyond half a step."""
  rng = np.random.default_rng(0)
  features = np.concatenate([1000 * rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))], -1).astype("f4")
  features[0, 0] = 0
  output = TargetOutput(jnp.asarray(rng.normal(size=(3, 5, 4)).astype("f4")), jnp.asarray(features))
  arrays = encoded(output, 2, "int8")
  assert arrays["features"].dtype == jnp.int8 and arrays["features_scales"].shape == (3, 5, 2)
  got = decoded(arrays, "float32")
  parts = features.reshape(3, 5, 2, 4)
  step = np.abs(parts).max(-1, keepdims=True) / 127
  assert (np.abs(np.asarray(got.features).reshape(parts.shape) - parts) <= 0.51 * step).all()
  assert Manifest(**dataclasses.asdict(manifest_of("int8"))).bytes_per_token == 48 + 4 * 3


def test_two_writers_one_killed(tmp_path):
  """Kills: shards that depend on who wrote them or on what was there before; work that is redone; half a shard."""
  once = written(tmp_path / "once", "bfloat16")
  n = once.manifest.n_shards
  halves = [list(cache_hidden.owned_shards(n, writer, 2)) for writer in (0, 1)]
  assert halves[0] + halves[1] == list(range(n)) and len(halves[0]) > 2
  store, said = begun(tmp_path / "two", "bfloat16"), say_of("bfloat16")
  calls = []
  for _ in fill(store, halves[1], BATCH, lambda *rows: calls.append(rows[0]) or said(*rows)):
    pass
  # Rows of a batch may differ in their last bits in another batch: all writers must make the same ones.
  assert calls == sorted(set(calls)) and not any(first % BATCH for first in calls)
  calls.clear()

  def killed(first, last):
    calls.append(first)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return said(first, last)

  with pytest.raises(KeyboardInterrupt):
    for _ in fill(store, halves[0], BATCH, killed):
      pass
  left = begun(tmp_path / "two", "bfloat16").missing()
  assert left and set(left) < set(halves[0])
  times = {name: os.stat(tmp_path / "two" / name).st_mtime_ns for name in files(tmp_path / "two")}
  written(tmp_path / "two", "bfloat16")
  assert files(tmp_path / "two") == files(tmp_path / "once")
  assert all(os.stat(tmp_path / "two" / name).st_mtime_ns == time for name, time in times.items())


SHARED = {"target": "t", "target_dtype": "float32", "taps": TAPS, "tokenizer": "a", "template": "b"}


@pytest.mark.parametrize("name, value, part", [
    ("target", "u", "target t there, u here"), ("taps", (1, -1), "taps [-1, 1] there, [1, -1] here"),
    ("rows", "x", "there, x here"), ("tokenizer", "x", "tokenizer a there, x here"),
    ("template", "x", "chat template b there, x here"),
    ("target_dtype", "bfloat16", "target_dtype float32 there, bfloat16 here")])
def test_stores_of_something_else(name, value, part, tmp_path):
  """Kills: features of another target, of other taps, or of other tokens, trained on."""
  store = begun(tmp_path / "s")
  wanted = SHARED | {"rows": rows().digest}
  store.check(wanted)
  with complains("does not fit this run", part, "train.cache_hidden"):
    store.check(wanted | {name: value})
  with complains("was begun with other settings", part):
    begun(tmp_path / "s", **{name: value})


@pytest.mark.parametrize("change, part", [
    ({"norm": "hidden before the final norm"}, f"norm convention hidden before the final norm there, {NORM} here"),
    ({"format": "2"}, "has the format '2'"), ({"taps": "all"}, "key 'taps' is 'all'"),
    ({"width": 0}, "key 'width' is 0"), ({"offsets": 1}, "offsets is not what was written"),
    ({"dtype": "float16"}, "'float16'"), ({"shard_tokens": 5}, "no whole chunks of 4")])
def test_manifests_of_something_else(change, part, tmp_path):
  """Kills: a store whose hidden states mean something else, or whose manifest is damaged, read as ours."""
  path = tmp_path / "s" / "manifest.json"
  begun(path.parent)
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with complains(part):
    Store(path.parent).check(SHARED)


def test_no_store(tmp_path):
  """Kills: a store made in somebody's folder; a traceback for a folder without one."""
  with complains("holds no hidden-state store"):
    Store(tmp_path / "s")
  (tmp_path / "run.json").write_text("{}")
  with complains("holds run.json but no manifest.json"):
    begun(tmp_path)
  assert files(tmp_path) == {"run.json": b"{}"}


def test_writers_that_begin_at_once(monkeypatch, tmp_path):
  """Kills: a writer that takes what another one has just begun, and even filled, for somebody's folder."""
  before = files(Path(written(tmp_path / "s").place))
  seen = iter([False])  # as of a moment ago
  monkeypatch.setattr(subject, "is_begun", lambda place: next(seen, True))
  begun(tmp_path / "s").check_whole()
  assert files(tmp_path / "s") == before


def flip(path: Path):
  data = bytearray(path.read_bytes())
  data[40] ^= 16
  path.write_bytes(data)


@pytest.mark.parametrize("name, dtype", [("hidden", "float32"), ("features", "int8"), ("features_scales", "int8")])
def test_unreadable_shards(name, dtype, tmp_path):
  """Kills: a flipped bit that is trained on, a missing shard read as zeros, a truncated one found after days."""
  store = written(tmp_path / "s", dtype)
  path, take = tmp_path / "s" / name / "c" / "2" / "0", lambda: Store(store.place).take(
      np.arange(len(rows())), segments_of())
  whole, before = path.read_bytes(), take()
  flip(path)
  Store(store.place).check_whole()  # of the right size: to see more, all of it would have to be read
  with complains(f"shard 2 of {name} cannot be read", "Digest mismatch", f"delete {name}/c/2", "cache_hidden"):
    take()
  path.write_bytes(whole[:-5])
  with complains(f"shard 2 of {name} cannot be read", f"{len(whole) - 5} bytes, {len(whole)} were written"):
    Store(store.place).check_whole()
  path.unlink()
  with complains(f"lacks 1 of {store.manifest.n_shards} shards, the first is 2"):
    Store(store.place).check_whole()
  with complains(f"shard 2 of {name} cannot be read", "gone, or holds NaN"):  # deleted while somebody trains
    take()
  written(tmp_path / "s", dtype)
  assert path.read_bytes() == whole
  np.testing.assert_array_equal(take()[name], before[name])


class Failing:
  """Reads into an array that fail so many times with these words, then go well."""

  def __init__(self, row, left: list, says: str, real):
    self.real, self.left, self.says = real(row), left, says

  def write(self, stored):
    if not self.left:
      return self.real.write(stored)
    self.left.pop()
    return SimpleNamespace(result=lambda: (_ for _ in ()).throw(ValueError(self.says)))


@pytest.mark.parametrize("says, times, error, part", [
    ("ABORTED: All 32 retry attempts failed: Service Unavailable [HTTP code 503]", 2, None, ""),
    ("ABORTED: All 32 retry attempts failed: Service Unavailable [HTTP code 503]", 99, OSError, "HTTP code 503"),
    ("UNKNOWN: Error reading /s/hidden/c/0/0 [OS error 116: Stale file handle]", 99, OSError, "shard 0 of hidden"),
    ("PERMISSION_DENIED: Forbidden [HTTP code 403]", 1, ValueError, "get the right to it"),
    ("DATA_LOSS: Digest mismatch", 1, ValueError, "delete hidden/c/")])
def test_a_bucket_that_does_not_answer(says, times, error, part, tmp_path, monkeypatch):
  """Kills: a whole shard that the user is told to delete since a server was busy; a run that one such answer ends for
  good; damage, or a lack of rights, that is tried again and again."""
  store, left = written(tmp_path / "s"), [None] * times
  take = lambda: store.take(np.arange(ROWS), segments_of())
  expected = take()
  monkeypatch.setattr(subject.ts, "array", lambda row, real=subject.ts.array: Failing(row, left, says, real))
  if error is None:
    np.testing.assert_array_equal(take()["hidden"], expected["hidden"])
    return
  with pytest.raises(error, match=re.escape(part)) as caught:
    take()
  assert "hidden store" in str(caught.value) and ("delete" in str(caught.value)) == ("DATA_LOSS" in says)
  assert error is ValueError or caught.value.errno == errno.EIO


def test_rows_of_other_lengths(tmp_path):
  """Kills: states of one row read into another."""
  store, segments = written(tmp_path / "s"), segments_of()
  with complains("it is of other rows"):
    store.take(np.array([0]), np.ones_like(segments[:1]))


@contextlib.contextmanager
def files_of_at_most(size: int):
  """As a full disk has it: writes beyond fail. Of this process."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path):
  """Kills: a traceback, a shard that is half there, finished ones that are lost."""
  store = begun(tmp_path / "s")
  for _ in fill(store, [0, 1], BATCH, say_of("float32")):
    pass
  before = files(tmp_path / "s")
  with files_of_at_most(100), complains("shard 2 of", "cannot be written", "free some space", "kept", error=OSError):
    written(tmp_path / "s")
  assert {name: data for name, data in files(tmp_path / "s").items() if "__lock" not in name} == before
  written(tmp_path / "s").check_whole()
  assert files(tmp_path / "s") == files(Path(written(tmp_path / "once").place))


@pytest.mark.parametrize("place, spec", [
    ("gs://bucket/a/s", {"driver": "gcs", "bucket": "bucket", "path": "a/s/"}),
    ("file:///tmp/a%20b", {"driver": "file", "path": "/tmp/a b/"}),
    ("/tmp/a b", {"driver": "file", "path": "/tmp/a b/"}),
    (Path("/tmp/s"), {"driver": "file", "path": "/tmp/s/"})])
def test_places(place, spec):
  """Kills: gs://bucket/a that becomes the local folder gs:/bucket/a."""
  assert subject.kvstore(place) == spec


def test_a_store_at_a_url(tmp_path):
  """Kills: parts of a store that go to a folder of the URL's name, or are looked for there; arrays apart from the
  manifest."""
  url = f"file://{tmp_path}/a%20b/s"
  assert not subject.is_begun(url)
  store = written(url, shards=[1])
  assert subject.is_begun(url) and store.missing() == Store(tmp_path / "a b" / "s").missing() != []
  written(url).check_whole()
  assert files(tmp_path / "a b" / "s") == files(Path(written(tmp_path / "once").place))
  assert {path.name for path in tmp_path.iterdir()} == {"a b", "once"}


@pytest.mark.parametrize("change, part", [
    ({"shard_tokens": 2 ** 31}, "shard_tokens is 2147483648"), ({"dtype": "int4"}, "dtype is 'int4'"),
    ({"chunk_tokens": 0}, "chunk_tokens is 0")])
def test_a_manifest_that_could_not_be_read(change, part):
  """Kills: a store that is begun with what its own manifest refuses, and says for ever that it is damaged."""
  with complains(part, "expected"):
    manifest_of(**{"dtype": "float32"} | change)


def test_no_place():
  with complains("gx://b/s is no place for a store", "gs://bucket/name"):
    subject.kvstore("gx://b/s")
