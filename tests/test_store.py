"""The hidden-state store: what it gives back is what the target said, whoever wrote it, or it is refused by name."""

import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dspark_jax
from dspark_jax.data import pipeline
from dspark_jax.data import store as subject
from dspark_jax.data.conversations import Document
from dspark_jax.data.deepspec_cache import Cache
from dspark_jax.data.features import Memory, Online, Stored
from dspark_jax.data.rows import Rows
from dspark_jax.data.store import NORM, Manifest, Store, decoded, encoded, fill
from dspark_jax.drafters.dspark import DSpark, DSparkConfig
from dspark_jax.training.step import init_state
from dspark_jax.types import Batch, TargetOutput
from train import cache_hidden, prepare, train
from train.config import TrainConfig
from folders import LLAMA, called, complains, copied, files, packed_rows, with_tokenizer
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


def test_memory_is_bounded():
  """Kills: outputs kept beyond the limit, or given for a step that nobody has seen."""
  one = TargetOutput(jnp.ones((2, 3)), jnp.ones((2, 1)))  # 32 bytes
  memory = Memory(70)
  for step in range(3):
    memory.keep(step, one)
  assert len(memory) == 2 and memory.at(1, None, None) is one and memory.at(2, None, None) is None


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


def test_rows_of_other_lengths(tmp_path):
  """Kills: states of one row read into another."""
  store, segments = written(tmp_path / "s"), segments_of()
  with complains("it is of other rows"):
    store.take(np.array([0]), np.ones_like(segments[:1]))


@contextmanager
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


def test_no_place():
  with complains("gx://b/s is no place for a store", "gs://bucket/name"):
    subject.kvstore("gx://b/s")


# The programs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target with a tokenizer, and data of rows that are not full."""
  folder = tmp_path_factory.mktemp("programs")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  lines = [{"tokens": rng.integers(5, 130, n).tolist(), "loss_mask": [0] * 4 + [1] * (n - 4)}
           for n in (40, 21, 30, 44, 20)]
  (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def experiment(folder, out, **changes) -> TrainConfig:
  return TrainConfig(**{**dict(
      target=str(folder / "target"), out=Path(out), data=(folder / "data.jsonl",), steps=3, batch=2, row_length=48,
      anchors=4, log_every=1, drafter=DSpark.Settings(taps=(0, 1), mask_token_id=130, num_layers=1, block_size=3,
                                                      markov_rank=8)), **changes})


def cached(folder, out, capsys, *args, code=0):
  return called(capsys, cache_hidden.main, cache_hidden.Settings, "--target", folder / "target", "--data",
                folder / "data.jsonl", "--taps", 0, 1, "--row-length", 48, "--batch", 2, "--shard-tokens", 32,
                "--chunk-tokens", 8, "--out", out, *args, code=code)


def trained(config):
  train.main(config)
  return [(line["loss"], line["grad_norm"]) for line in map(json.loads, open(config.out / "metrics.jsonl"))]


@pytest.fixture(scope="module")
def online(folder, tmp_path_factory):
  return trained(experiment(folder, tmp_path_factory.mktemp("online")))


@pytest.fixture(scope="module")
def once(folder, tmp_path_factory):
  """A bfloat16 store, whole."""
  out = tmp_path_factory.mktemp("once") / "s"
  cache_hidden.main(cache_hidden.Settings(str(out), target=str(folder / "target"), data=(folder / "data.jsonl",),
                                          taps=(0, 1), row_length=48, batch=2, shard_tokens=32, chunk_tokens=8))
  return out


@pytest.mark.slow
def test_programs_store_and_read(folder, online, capsys, tmp_path):
  """Kills: a store that no run accepts; losses that are not the target's own; runs that mix what they read."""
  result, err = cached(folder, tmp_path / "s", capsys, "--dtype", "float32")
  assert result["tokens"] == 155 and result["rows"] == 4 and result["bytes_per_token"] == 3 * 48 * 4
  assert result["missing"] == 0 and result["cost"] is None and "155 tokens of 576 bytes, 0.00 GB in 5 shards" in err
  config = experiment(folder, tmp_path / "stored", features=str(tmp_path / "s"))
  assert trained(config) == online
  with complains("features was float32, is None"):
    train.main(dataclasses.replace(config, features=None))
  (tmp_path / "s").rename(tmp_path / "t")
  assert train.main(dataclasses.replace(config, features=str(tmp_path / "t")))["steps"] == 3


def test_programs_refuse(folder, once, capsys, tmp_path):
  """Kills: a mismatch that is seen after the model was loaded, or never."""
  store = dict(features=str(once))
  for changes, parts in [
      ({"drafter": dataclasses.replace(experiment(folder, "x").drafter, taps=(1, 0))},
       ("taps [0, 1] there, [1, 0] here",)),
      ({"target_dtype": "bfloat16"}, ("target_dtype float32 there, bfloat16 here",)), ({"row_length": 50}, ("rows",)),
      ({"features": str(tmp_path)}, ("holds no hidden-state store",))]:
    with complains(*parts):
      train.main(experiment(folder, tmp_path / "run", **store | changes))
  _, err = cached(folder, once, capsys, "--dtype", "float32", code=2)
  assert "dtype bfloat16 there, float32 here" in err
  for args, part in [(("--writer", 2, "--writers", 2), "writer is 2 of 2"),
                     (("--out", "gx://b/s"), "no place for a store"),
                     (("--shard-tokens", 30), "expected a multiple of chunk_tokens, 8"), (("--batch", 0), "batch is 0"),
                     (("--data",), "no data"), (("--writers", 2), "expected a folder of train.prepare")]:
    _, err = cached(folder, tmp_path / "new", capsys, *args, code=2)
    assert part in err
  assert not (tmp_path / "new").exists()


def test_programs_full_disk(folder, capsys, tmp_path, monkeypatch):
  """Kills: hours of work for a disk that cannot hold it; a full disk after which nothing is left, or all is redone."""
  with monkeypatch.context() as patch:
    patch.setattr(cache_hidden.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    _, err = cached(folder, tmp_path / "s", capsys, code=2)
  assert "has 0.00 GB free" in err and "smaller --dtype" in err
  assert not (tmp_path / "s").exists()  # another dtype may be tried
  real = Store.write
  with monkeypatch.context() as patch:
    patch.setattr(Store, "write", lambda self, shard, arrays: real(self, shard, arrays) if shard < 2 else full(
        self, shard, arrays))
    def full(*args):
      # Waited for while the disk is full: begun there alone, a write may reach it later and find room.
      with files_of_at_most(100), pytest.raises(OSError) as caught:
        real(*args)()
      def wait():
        raise caught.value
      return wait
    _, err = cached(folder, tmp_path / "s", capsys, code=2)
  assert "shard 2 of" in err and "cannot be written" in err and err.count("error:") == 1
  assert Store(tmp_path / "s").missing() == [2, 3, 4]
  result, _ = cached(folder, tmp_path / "s", capsys)
  assert result["shards"] == 3 and result["missing"] == 0
  Store(tmp_path / "s").check_whole()


@pytest.mark.slow
def test_programs_fit_a_lens(folder, capsys, tmp_path):
  """Kills: a lens fitted to what the target says when a store was given, or a run that does not go on from one."""
  cached(folder, tmp_path / "s", capsys, "--dtype", "float32")
  drafter = dataclasses.replace(experiment(folder, tmp_path).drafter, lens=True)
  run = lambda name, **changes: trained(experiment(folder, tmp_path / name, drafter=drafter, **changes))
  online, stored = run("online"), run("stored", features=str(tmp_path / "s"))
  np.testing.assert_allclose(stored, online, rtol=1e-4)
  assert run("stored", features=str(tmp_path / "s")) == stored


@pytest.mark.slow
def test_programs_killed(folder, tmp_path):
  """Kills: what only a real kill -9 leaves: half a shard, a lock that keeps the next run away, other bytes."""
  rng = np.random.default_rng(0)
  (tmp_path / "data.jsonl").write_text("".join(json.dumps(
      {"tokens": rng.integers(5, 130, 48).tolist(), "loss_mask": [1] * 48}) + "\n" for _ in range(400)))
  prepare.main(prepare.Settings(str(folder / "target"), (tmp_path / "data.jsonl",), tmp_path / "rows", row_length=48))
  command = [sys.executable, "-m", "train.cache_hidden", "--target", folder / "target", "--data", tmp_path / "rows",
             "--taps", "0", "1", "--row-length", "48", "--batch", "2", "--shard-tokens", "480", "--chunk-tokens", "32"]
  start = lambda out, *args: subprocess.Popen([*map(str, command), "--out", tmp_path / out, *args], cwd=ROOT,
                                              env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
  writers = [start("two", "--writers", "2", "--writer", str(writer)) for writer in (0, 1)]
  while not (tmp_path / "two" / "features" / "c" / "1").exists():
    assert writers[0].poll() is None
    time.sleep(0.01)
  writers[0].kill()
  assert writers[0].wait() == -signal.SIGKILL and writers[1].wait() == 0
  missing = Store(tmp_path / "two").missing()
  assert missing and max(missing) < 20 and min(missing) > 0
  assert start("two", "--writers", "2", "--writer", "0").wait() == start("once").wait() == 0
  two = files(tmp_path / "two")
  assert two == files(tmp_path / "once") and len(two) == 2 * 40 + 4


@pytest.mark.slow
def test_programs_int8(folder, capsys, tmp_path):
  """Kills: a cost that is not measured, or measured on the exact numbers."""
  result, err = cached(folder, tmp_path / "s", capsys, "--dtype", "int8")
  cost = result["cost"]
  assert result["bytes_per_token"] == 3 * 48 + 3 * 4
  assert all(0 < error < 0.02 for error in cost["relative_error"].values())
  assert 0 < abs(cost["exact"]["loss"] - cost["stored"]["loss"]) < 0.02 and "as int8: hidden states are" in err


# The reference's cache.


def write_cache(folder: Path, samples, width, taps, shard_of, **changes):
  """As DeepSpec's LocalTargetCacheWriter does: samples are (ids, loss mask, features, hidden)."""
  folder.mkdir()
  shards, records = {}, b""
  for number, (ids, mask, features, hidden) in enumerate(samples):
    data, offsets = shards.setdefault(shard_of(number), bytearray()), []
    for array in (np.asarray(ids, "<i4"), np.ones(len(ids), "u1"), np.asarray(mask, "u1"),
                  np.asarray(features, jnp.bfloat16), np.asarray(hidden, jnp.bfloat16)):
      offsets.append(len(data))
      data += array.tobytes()
    records += struct.pack("<QIIQQQQQ", number, shard_of(number), len(ids), *offsets)
  (folder / "samples.idx").write_bytes(records)
  for number, data in shards.items():
    (folder / f"shard-{number:05d}.bin").write_bytes(data)
  manifest = {"version": 2, "num_samples": len(samples), "num_shards": len(shards), "target_layer_ids": taps,
              "hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": 56,
              "hidden_size": width, "shards": [{"shard_id": n, "file_name": f"shard-{n:05d}.bin"} for n in shards],
              "target_model_name_or_path": "x", "chat_template": "qwen", "max_length": 48, "git_sha": "0"} | changes
  (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def reference(folder):
  """(samples, what a bfloat16 target says of them) for the data of `folder` and a sample that is too short to learn."""
  lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
  lines.insert(1, {"tokens": [5] * 9, "loss_mask": [1] * 9})
  target = dspark_jax.load_target(folder / "target", dtype="bfloat16")
  sizes = [len(line["tokens"]) for line in lines]
  tokens, used = np.zeros((len(lines), 48), np.int32), np.arange(48) < np.array(sizes)[:, None]
  tokens[used] = np.concatenate([line["tokens"] for line in lines])
  batch = Batch(tokens, used, used.astype(np.int32), np.where(used, np.arange(48), 0).astype(np.int32))
  said = jax.device_get(jax.jit(lambda target, batch: target.encode(batch, (0, 1)))(target, batch))
  return [(line["tokens"], line["loss_mask"], said.features[i, :sizes[i]], said.hidden[i, :sizes[i]])
          for i, line in enumerate(lines)]


def test_the_references_cache(folder, reference, capsys, tmp_path):
  """Kills: fields of a record in another order, features for hidden, the states of another conversation; a cache of
  another target, or one that is damaged, converted all the same."""
  write_cache(tmp_path / "cache", reference, 48, [0, 1], lambda number: number // 3)
  run = lambda out, *args, code=0: called(
      capsys, cache_hidden.main, cache_hidden.Settings, "--from-deepspec", tmp_path / "cache", "--out", out, "--batch",
      2, "--shard-tokens", 32, "--chunk-tokens", 8, *(args or ("--target", folder / "target")), code=code)
  result, _ = run(tmp_path / "s")
  assert result["tokens"] == 155 and result["missing"] == 0
  store, rows = Store(tmp_path / "s"), Rows(tmp_path / "s.rows")
  assert store.manifest.rows == f"{rows.digest} {rows.layout}" and rows.manifest.documents == 5
  packed = rows.take(np.arange(len(rows)))
  taken = store.take(np.arange(len(rows)), packed.segments)
  for ids, mask, features, hidden in reference[:1] + reference[2:]:
    row, start = next((r, t) for r in range(len(rows)) for t in range(49 - len(ids))
                      if packed.tokens[r, t:t + len(ids)].tolist() == ids)
    np.testing.assert_array_equal(taken["hidden"][row, start:start + len(ids)], hidden)
    np.testing.assert_array_equal(taken["features"][row, start:start + len(ids)], features)
    np.testing.assert_array_equal(packed.loss_mask[row, start:start + len(ids)], mask)
  other = copied(folder / "target", tmp_path / "other", tensors=lambda tensors: {
      name: x[::-1] if "mlp" in name else x for name, x in tensors.items()})
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    if (folder / "target" / name).exists():
      shutil.copy(folder / "target" / name, other)
  assert "is not of this target" in run(tmp_path / "x", "--target", other, code=2)[1]
  assert not (tmp_path / "x").exists()
  assert "leave --data" in run(tmp_path / "x", "--target", folder / "target", "--taps", 1, code=2)[1]
  path = tmp_path / "cache" / "shard-00001.bin"
  path.write_bytes(path.read_bytes()[:-2])
  assert "the hidden of sample 5 reach beyond the end" in run(tmp_path / "y", code=2)[1]


@pytest.mark.parametrize("change, part", [
    ({"version": 3}, "key 'version' is 3, expected 2"), ({"hidden_dtype": "float8_e4m3fn"}, "expected 'bfloat16'"),
    ({"num_samples": 7}, "does not hold 7 records of 56 bytes"), ({"shards": []}, "beyond its 0 shards"),
    ({"index_record_size": 48}, "expected 56")])
def test_damaged_caches(change, part, tmp_path):
  """Kills: a cache of another version, or half of one, read as if it were whole."""
  write_cache(tmp_path / "cache", [([5], [1], [[1, 2]], [[3]])], 1, [0, 1], lambda number: 0, **change)
  with complains("cache", part):
    Cache(tmp_path / "cache")
