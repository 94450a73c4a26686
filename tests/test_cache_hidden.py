"""train.cache_hidden: a store that is made, gone on with or converted, and trainings that read it."""

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dspark_jax
from dspark_jax.checkpoints import ids
from dspark_jax.data.deepspec_cache import Cache
from dspark_jax.data.features import Memory
from dspark_jax.data.rows import Rows
from dspark_jax.data.store import Store
from dspark_jax.drafters import DSpark, Eagle3
from dspark_jax.training.losses import EAGLE3
from dspark_jax.types import Batch
from train import cache_hidden, features, prepare, train
from train.config import TrainConfig
from folders import LLAMA, LLAMA_CONFIG, MASK, TAPS, WORDS, called, complains, copied, files, slow_but, with_tokenizer
from test_store import ROOT, files_of_at_most

WIDTH = LLAMA_CONFIG["hidden_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target with a tokenizer, and data of rows that are not full."""
  folder = tmp_path_factory.mktemp("programs")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  lines = [{"tokens": rng.integers(5, WORDS, n).tolist(), "loss_mask": [0] * 4 + [1] * (n - 4)}
           for n in (40, 21, 30, 44, 20)]
  (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def experiment(folder, out, **changes) -> TrainConfig:
  return TrainConfig(**{**dict(
      target=str(folder / "target"), out=Path(out), data=(folder / "data.jsonl",), steps=3, batch=2, row_length=48,
      anchors=4, log_every=1, drafter=DSpark.Settings(taps=TAPS, mask_token_id=MASK, num_layers=1, block_size=3,
                                                      markov_rank=8)), **changes})


def cached(folder, out, capsys, *args, code=0):
  return called(capsys, cache_hidden.main, cache_hidden.Settings, "--target", folder / "target", "--data",
                folder / "data.jsonl", "--taps", *TAPS, "--row-length", 48, "--batch", 2, "--shard-tokens", 32,
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
                                          taps=TAPS, row_length=48, batch=2, shard_tokens=32, chunk_tokens=8))
  return out


@pytest.mark.slow
def test_programs_store_and_read(folder, online, capsys, tmp_path):
  """Kills: a store that no run accepts; losses that are not the target's own; runs that mix what they read."""
  result, err = cached(folder, tmp_path / "s", capsys, "--dtype", "float32")
  size = 3 * WIDTH * 4
  assert result["tokens"] == 155 and result["rows"] == 4 and result["bytes_per_token"] == size
  assert result["missing"] == 0 and result["cost"] is None and f"155 tokens of {size} bytes, 0.00 GB in 5 shards" in err
  config = experiment(folder, tmp_path / "stored", features=str(tmp_path / "s"))
  assert trained(config) == online
  with complains("features was float32, is None"):
    train.main(dataclasses.replace(config, features=None))
  (tmp_path / "s").rename(tmp_path / "t")
  assert train.main(dataclasses.replace(config, features=str(tmp_path / "t")))["steps"] == 3


@pytest.mark.slow
def test_features_in_memory(folder, online, monkeypatch, tmp_path):
  """Kills: losses that are not the target's own; a target that is asked for a row again; memory that is part of a run;
  states that fill the host, or that processes wait for each other with."""
  asked, config = [], experiment(folder, tmp_path / "run", features="memory")
  monkeypatch.setattr(features, "Memory", lambda encode: Memory(lambda batch: asked.append(1) or encode(batch)))
  assert trained(config) == online and len(asked) == 2  # four rows by two, in three steps
  shutil.rmtree(tmp_path / "run" / "drafter")
  assert train.main(config)["steps"] == 3 and train.main(dataclasses.replace(config, features=None))["steps"] == 3
  need, less = 155 * 3 * WIDTH * 4 / 1e9, 154 * 3 * WIDTH * 4 / 1e9
  with complains(f"those of 155 tokens take {need:.3g} GB, expected at most {less:g}", "--memory-gb",
                 "train.cache_hidden"):
    train.main(experiment(folder, tmp_path / "other", features="memory", memory_gb=less))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with complains("there are 2 processes, expected one", "train.cache_hidden"):
    train.main(experiment(folder, tmp_path / "other", features="memory"))


@pytest.mark.parametrize("where", slow_but((), [None, "memory"]))
def test_steps_of_shorter_rows(where, folder, online, tmp_path):
  """Kills: anchors that depend on the padding; a length that no step is compiled for; work that counts as if rows were
  whole; a run that goes on with other lengths."""
  config = experiment(folder, tmp_path / "run", features=where, lengths=(43, 42))
  found, shapes, flops = trained(config), [], []
  np.testing.assert_allclose(found, online, rtol=1e-6)
  for line in map(json.loads, open(config.out / "metrics.jsonl")):
    shapes.append(round(line["tokens_per_second_per_device"] * line["step_seconds"] / 2))
    flops.append(line["tflops_per_device"] * line["step_seconds"])
  assert set(shapes) == {42, 48} and [f < max(flops) / 1.001 for f in flops] == [s == 42 for s in shapes]
  with complains("lengths was [43, 42], is None"):
    train.main(dataclasses.replace(config, lengths=()))
  with complains("lengths are (48,), expected numbers from 1, below row_length, 48"):
    experiment(folder, tmp_path, lengths=(48,))


@pytest.mark.slow
def test_shorter_rows_of_a_recurrent_drafter(folder, tmp_path):
  """Kills: a loss over all positions of a batch that weighs a step of short rows more."""
  how = dict(drafter=Eagle3.Settings(taps=TAPS, block_size=3), loss=EAGLE3)
  whole, cut = (trained(experiment(folder, tmp_path / str(len(lengths)), lengths=lengths, **how))
                for lengths in ((), (43, 42)))
  np.testing.assert_allclose(cut, whole, rtol=1e-6)


def test_a_store_of_an_older_version(folder, once, tmp_path):
  """Kills: a store that is its target's no more, because an id says more of a target than it did; one of any target."""
  shutil.copytree(once, tmp_path / "s")
  target, rows = dspark_jax.load_target(folder / "target"), Rows(Path(f"{once}.rows"))
  manifest = tmp_path / "s" / "manifest.json"
  known = json.loads(manifest.read_text())
  manifest.write_text(json.dumps(known | {"target": ids._target_ids(target)[0]}))
  config = experiment(folder, tmp_path / "out", features=str(tmp_path / "s"))
  assert features.features_of(config, rows, target).store.manifest.target != known["target"]
  manifest.write_text(json.dumps(known | {"target": "0" * 16}))
  with complains("does not fit this run (target 0000000000000000 there"):
    features.features_of(config, rows, target)


def test_programs_refuse(folder, once, capsys, monkeypatch, tmp_path):
  """Kills: a mismatch that is seen after the model was loaded, or after the data were tokenized, or never."""
  store = dict(features=str(once))
  for changes, parts in [
      ({"drafter": dataclasses.replace(experiment(folder, "x").drafter, taps=TAPS[::-1])},
       (f"taps {[*TAPS]} there, {[*TAPS[::-1]]} here",)),
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
  monkeypatch.setattr(cache_hidden.shell, "load", lambda *_: pytest.fail("loaded"))
  for args, part in [(("--data", tmp_path / "nosuch"), "nosuch is missing"), (("--row-length", 10 ** 6), "positions"),
                     (("--taps", 0, 99), "taps [99] are out of range")]:
    _, err = cached(folder, tmp_path / "new", capsys, *args, code=2)
    assert part in err
  assert not list(tmp_path.glob("new*"))


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
      {"tokens": rng.integers(5, WORDS, 48).tolist(), "loss_mask": [1] * 48}) + "\n" for _ in range(400)))
  prepare.main(prepare.Settings(str(folder / "target"), (tmp_path / "data.jsonl",), tmp_path / "rows", row_length=48))
  command = [sys.executable, "-m", "train.cache_hidden", "--target", folder / "target", "--data", tmp_path / "rows",
             "--taps", *TAPS, "--row-length", "48", "--batch", "2", "--shard-tokens", "480", "--chunk-tokens", "32"]
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
  assert result["bytes_per_token"] == 3 * WIDTH + 3 * 4
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
  said = jax.device_get(jax.jit(lambda target, batch: target.encode(batch, TAPS))(target, batch))
  return [(line["tokens"], line["loss_mask"], said.features[i, :sizes[i]], said.hidden[i, :sizes[i]])
          for i, line in enumerate(lines)]


def test_the_references_cache(folder, reference, capsys, tmp_path):
  """Kills: fields of a record in another order, features for hidden, the states of another conversation; a cache of
  another target, or one that is damaged, converted all the same."""
  write_cache(tmp_path / "cache", reference, WIDTH, [*TAPS], lambda number: number // 3)
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
  assert "leave --data" in run(tmp_path / "x", "--target", folder / "target", "--taps", 0, code=2)[1]
  path = tmp_path / "cache" / "shard-00001.bin"
  path.write_bytes(path.read_bytes()[:-2])
  assert "the hidden of sample 5 reach beyond the end" in run(tmp_path / "y", code=2)[1]


def test_the_references_cache_by_several(folder, reference, capsys, tmp_path):
  """Kills: writers that make the same conversations at once; a store of several that is another than one writer's."""
  write_cache(tmp_path / "cache", reference, WIDTH, [*TAPS], lambda number: number // 3)
  run = lambda out, *args, code=0: called(
      capsys, cache_hidden.main, cache_hidden.Settings, "--from-deepspec", tmp_path / "cache", "--out", tmp_path / out,
      "--batch", 2, "--shard-tokens", 32, "--chunk-tokens", 8, "--target", folder / "target", *args, code=code)
  err = run("s", "--writers", 2, code=2)[1]
  assert "writers is 2, expected 1 until" in err and not list(tmp_path.glob("*s*.jsonl"))
  run("s")
  whole = files(tmp_path / "s")
  shutil.rmtree(tmp_path / "s")
  assert run("s", "--writers", 2)[0]["missing"] > 0
  assert run("s", "--writers", 2, "--writer", 1)[0]["missing"] == 0
  assert files(tmp_path / "s") == whole


def test_another_cache(folder, reference, capsys, tmp_path):
  """Kills: numpy's sentence about shapes for a target of another width, after the conversations were written; those of
  a cache that has grown since."""
  wide = WIDTH + 1
  states = [[1] * 2 * wide] * 20, [[1] * wide] * 20
  write_cache(tmp_path / "wide", [([5] * 20, [1] * 20, *states)], wide, [*TAPS], lambda _: 0)
  run = lambda cache, code: called(
      capsys, cache_hidden.main, cache_hidden.Settings, "--from-deepspec", tmp_path / cache, "--out", tmp_path / "s",
      "--target", folder / "target", code=code)[1]
  assert f"wide has hidden states {wide} wide, the target's are {WIDTH}: give the --target" in run("wide", 2)
  assert [path.name for path in tmp_path.iterdir()] == ["wide"]
  write_cache(tmp_path / "cache", reference, WIDTH, [*TAPS], lambda number: 0)
  cache_hidden.write_documents(Cache(tmp_path / "cache"), tmp_path / "s.jsonl")
  with complains("s.jsonl has 6 conversations", "wide has 1", "another --out"):
    cache_hidden.write_documents(Cache(tmp_path / "wide"), tmp_path / "s.jsonl")


def test_masked_tokens(tmp_path):
  """Kills: padding of a cache learned as if it were text."""
  write_cache(tmp_path / "cache", [([5, 6], [1, 1], [[1, 2]] * 2, [[3]] * 2)], 1, [0, 1], lambda number: 0)
  cache = Cache(tmp_path / "cache")
  assert len(list(cache.documents())) == 1
  path = tmp_path / "cache" / "shard-00000.bin"
  path.write_bytes(path.read_bytes()[:9] + b"\0" + path.read_bytes()[10:])
  with complains("sample 0 has tokens that its attention mask hides"):
    list(Cache(tmp_path / "cache").documents())


@pytest.mark.parametrize("change, part", [
    ({"version": 3}, "key 'version' is 3, expected 2"), ({"hidden_dtype": "float8_e4m3fn"}, "expected 'bfloat16'"),
    ({"num_samples": 7}, "does not hold 7 records of 56 bytes"), ({"shards": []}, "beyond its 0 shards"),
    ({"index_record_size": 48}, "expected 56")])
def test_damaged_caches(change, part, tmp_path):
  """Kills: a cache of another version, or half of one, read as if it were whole."""
  write_cache(tmp_path / "cache", [([5], [1], [[1, 2]], [[3]])], 1, [0, 1], lambda number: 0, **change)
  with complains("cache", part):
    Cache(tmp_path / "cache")


def test_writers_that_a_launcher_starts(capsys, monkeypatch):
  """Kills: eight writers of one job that are refused as one program started eight times, or wait for one another; one
  writer that is started eight times."""
  for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n1"}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("waits for the others"))
  def main(settings):
    return {"writer": settings.writer}
  main.__module__ = cache_hidden.__name__
  result, _ = called(capsys, main, cache_hidden.Settings, "--out", "s", "--writers", 8, "--writer", 3)
  assert result == {"writer": 3}
  _, err = called(capsys, main, cache_hidden.Settings, "--out", "s", code=2)
  assert "train.cache_hidden runs in one process" in err
