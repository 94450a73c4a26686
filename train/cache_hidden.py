"""Write what a target says of the training data to a hidden-state store, for train.train --features.

When to use it: the target's forward is a part of every training step; over several epochs, or for several drafters with
the same taps, it is cheaper to store what it says (30 KB a token for Qwen3-4B with five taps) and to read it again.

    python -m train.cache_hidden --config configs/qwen3_4b.py --data rows --out stores/qwen3-4b
    python -m train.cache_hidden --target smollm2 --taps 1 8 15 21 28 --data answers.jsonl --out store --dtype int8
    python -m train.cache_hidden --target Qwen/Qwen3-4B --from-deepspec CACHE --out stores/qwen3-4b

The size is said before the store is begun; data are a folder of train.prepare, or files, which are prepared in OUT.rows
before that. A run that is killed, or whose disk is full, goes on when the same command is given again: finished shards
stay. Several writers, on any machines that see the same --out, share the work: the same command with --writers 8 and
--writer 0 .. 7, also as processes of one job; the store is the same, byte for byte. OUT may be a URL
(gs://bucket/name).

dtype: float32 for the very losses of the target in the step where that is float32, too; bfloat16 (half); int8 with a
scale for every token and tap (a quarter): what that costs is measured on the first batch and said, best with a
--drafter that was trained for these taps. --from-deepspec reads a cache of the reference (taps are its own), whose
conversations it writes to OUT.jsonl, packed in OUT.rows: `train.train --data OUT.rows --features OUT`. One writer
prepares them; several may go on when OUT.rows is whole.

The last line of stdout is a JSON object with the keys rows, tokens, bytes, bytes_per_token, shards, missing (those of
other writers, not finished yet), megabytes_per_second, tokens_per_second, cost (None, or relative_error by array, and
loss and tau with and without the store's rounding) and out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

import dspark_jax
from dspark_jax import metrics as means
from dspark_jax.data import store as stores
from dspark_jax.data.deepspec_cache import Cache
from dspark_jax.data.rows import MANIFEST, Rows
from dspark_jax.drafters import DSpark
from dspark_jax.loading import locate_target, target_config
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.parameters import values
from dspark_jax.nn.sharding import MeshConfig, place_rows
from dspark_jax.programs import run_folder, shell
from dspark_jax.training import anchors
from dspark_jax.training.step import gradients
from dspark_jax.types import Batch, TargetOutput
from train import prepare, train
from train.config import Dtype, TrainConfig, read_config
from train.features import of_run

AUTO = Kernels("auto", "auto")
SAME = 0.05  # relative error up to which bfloat16 states are of the same target: rounding in other orders makes 0.01


@dataclasses.dataclass
class Settings:
  out: str
  """folder or URL of the store"""
  config: Path | None = None
  """experiment file of train.train; what is given beside it overrides it"""
  target: str | None = None
  """GGUF file, Hugging Face folder or id, or smollm2"""
  data: tuple[Path, ...] = ()
  taps: tuple[int, ...] = ()
  """target layers that feed the drafter, as in its settings"""
  from_deepspec: Path | None = None
  """a target cache of DeepSpec, in the place of data and taps"""
  dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
  batch: int | None = None
  """rows that the target runs at once; default: the experiment's, or 8"""
  row_length: int | None = None
  thinking: bool | None = None
  allow_special: bool | None = None
  target_dtype: Dtype | None = None
  shard_tokens: int = stores.SHARD
  chunk_tokens: int = stores.CHUNK
  """tokens that are read at once"""
  writer: int = 0
  writers: int = 1
  drafter: Path | None = None
  """trained drafter by which the cost of rounding is measured; default: a fresh one"""
  kernels: Kernels = AUTO
  mesh: MeshConfig = MeshConfig()
  """devices to run the target on; rows are apart over data and fsdp"""


def main(settings: Settings) -> dict:
  shell.at_least(settings, writers=1, shard_tokens=1, chunk_tokens=1, writer=0)
  if settings.writer >= settings.writers:
    raise ValueError(f"writer is {settings.writer} of {settings.writers}, expected 0 to {settings.writers - 1}")
  if settings.shard_tokens % settings.chunk_tokens:
    raise ValueError(f"shard_tokens is {settings.shard_tokens}, expected a multiple of chunk_tokens, "
                     f"{settings.chunk_tokens}")
  cache = Cache(settings.from_deepspec) if settings.from_deepspec else None
  config = resolved(settings, cache)
  train.check_rows(config)
  if not cache:
    prepare.check_data(config.data)
  train.check_target(config, target_config(locate_target(config.target)))
  stores.kvstore(settings.out)
  prepared = [path for path in config.data if path.is_dir()]
  if cache and settings.writers > 1 and not (rows_folder(settings) / MANIFEST).exists():
    raise ValueError(f"writers is {settings.writers}, expected 1 until {rows_folder(settings) / MANIFEST} is there: "
                     f"give the command without --writers first, which makes it, and then with them to share the rest")
  if not prepared and not cache and ("://" in settings.out or settings.writers > 1):
    raise ValueError("data are files, expected a folder of train.prepare where there are several writers, or the store "
                     "is no folder: prepare them once, for all writers and for train.train")
  with owned(settings):
    target, tokenizer = shell.load(config.target, config.target_dtype, config.kernels)
    target = jax.tree.map(lambda x: x.astype(config.target_dtype), target)
    return write(settings, config, cache, target, tokenizer)


def resolved(settings: Settings, cache: Cache | None) -> TrainConfig:
  """The experiment whose rows are stored. ValueError when something is missing, or does not go together."""
  given = {name: getattr(settings, name) for name in ("target", "data", "batch", "row_length", "thinking",
                                                       "allow_special", "target_dtype", "kernels")}
  given = {name: value for name, value in given.items() if value not in (None, (), AUTO)} | {"mesh": settings.mesh}
  taps = settings.taps
  if cache:
    own = cache.manifest
    if settings.data or taps or settings.config or settings.dtype != "bfloat16" or "://" in settings.out:
      raise ValueError("--from-deepspec has data, taps and dtype (bfloat16) of its own, and writes to a folder: leave "
                       "--data, --taps, --config and --dtype away")
    # Files are prepared by one process, and a folder is read by any number.
    where = documents_path(settings) if settings.writers == 1 else rows_folder(settings)
    taps, given["data"] = own.target_layer_ids, (where,)
    given = {"target_dtype": "bfloat16"} | ({"row_length": own.max_length} if own.max_length else {}) | given
  if settings.config:
    config = read_config(str(settings.config))
    drafter = dataclasses.replace(config.drafter, taps=taps) if taps else config.drafter
  else:
    if "target" not in given or not taps:
      missing = "target" if taps else "taps"
      raise ValueError(f"{missing} is not given: name it with --{missing}, or give an experiment with --config")
    drafter = DSpark.Settings(taps=taps, mask_token_id=0)
    config = TrainConfig(target=given["target"], drafter=drafter, out=Path("."), kernels=AUTO)
  given = {"batch": config.batch // config.microbatches} | given  # as many rows as a step has in memory
  config = dataclasses.replace(config, drafter=drafter, microbatches=1, **given)
  if not config.data:
    raise ValueError("no data: give one or more files with --data")
  return config


def rows_folder(settings: Settings) -> Path:
  """Where rows go that are prepared of files."""
  return Path(f"{settings.out.rstrip('/')}.rows")


def documents_path(settings: Settings) -> Path:
  """Where the conversations of a reference's cache go."""
  return Path(f"{settings.out.rstrip('/')}.jsonl")


@contextlib.contextmanager
def owned(settings: Settings):
  """Keeps a second process away that would be the same writer; in buckets nothing can."""
  if "://" in settings.out:
    yield
    return
  lock = Path(settings.out) / f".writer-{settings.writer}-of-{settings.writers}"
  try:
    with run_folder.owned(lock):
      yield
  finally:
    for folder in (lock, settings.out):  # of a writer that was killed; of a mistake seen before anything was written
      with contextlib.suppress(OSError):
        os.rmdir(folder)  # only when empty


def write(settings: Settings, config: TrainConfig, cache: Cache | None, target, tokenizer) -> dict:
  """Writes this writer's shards that are missing, and returns what the program prints."""
  if cache and cache.manifest.hidden_size != (width := target.config.spec.hidden_size):
    raise ValueError(f"{cache.folder} has hidden states {cache.manifest.hidden_size} wide, the target's are {width}: "
                     f"give the --target that it was made with")
  if cache and settings.writers == 1:
    write_documents(cache, documents_path(settings))
  begun = stores.Store(settings.out).manifest if stores.is_begun(settings.out) else None
  # With another day a template might make other tokens, and the store could not be finished.
  date = datetime.date.fromisoformat(begun.date) if begun else None
  prepared = prepare.Settings(config.target, config.data, rows_folder(settings), row_length=config.row_length,
                              thinking=config.thinking, allow_special=config.allow_special)
  rows = prepare.rows_of(prepared, tokenizer, target.config.vocab_size, date)
  planned = plan(settings, config, rows, target, begun.target if begun else "")
  manifest = planned[0]
  missing = stores.Store.begun(settings.out, *planned).missing() if begun else list(range(manifest.n_shards))
  # Before the store is begun: what is refused here may be tried again with other settings.
  check_room(settings.out, manifest, missing)
  ours = owned_shards(manifest.n_shards, settings.writer, settings.writers)
  todo = [shard for shard in missing if shard in ours]
  say, cost = Target(config, rows, target, manifest), None
  if cache:
    say = Copy(cache, rows, say)
  elif manifest.dtype == "int8" and todo:
    cost = cost_of(settings, config, rows, target, manifest)
  store = stores.Store.begun(settings.out, *planned)
  began, said, written = time.monotonic(), 0, 0
  with shell.bar() as bar:
    size = sum(manifest.file_bytes(name, shard) for name in manifest.arrays for shard in todo)
    task = bar.add_task("MB of hidden states", total=size // 10**6, note="the first batch, with its compilation")
    for said, written in stores.fill(store, todo, config.batch, say):
      seconds = time.monotonic() - began
      bar.update(task, completed=written // 10**6,
                 note=f"{written / 1e6 / seconds:.0f} MB/s  {said / seconds:.0f} tokens/s")
  seconds = max(time.monotonic() - began, 1e-9)
  return dict(rows=manifest.n_rows, tokens=manifest.n_tokens, bytes=manifest.n_tokens * manifest.bytes_per_token,
              bytes_per_token=manifest.bytes_per_token, shards=len(todo), missing=len(store.missing()),
              megabytes_per_second=written / 1e6 / seconds, tokens_per_second=said / seconds, cost=cost,
              out=settings.out)


def plan(settings: Settings, config: TrainConfig, rows: Rows, target, stored: str
         ) -> tuple[stores.Manifest, np.ndarray]:
  """(manifest, offsets) of the store that these settings make. stored: see `of_run`."""
  offsets = np.concatenate([[0], np.cumsum(rows.lengths(np.arange(len(rows))))])
  taps = config.drafter.taps
  return stores.Manifest(
      **of_run(config, rows, target, stored), date=rows.manifest.date, batch=config.batch, dtype=settings.dtype,
      n_rows=len(rows), n_tokens=int(offsets[-1]), width=target.config.spec.hidden_size,
      feature_width=target.feature_width(taps), offsets=0, shard_tokens=settings.shard_tokens,
      chunk_tokens=settings.chunk_tokens), offsets


def owned_shards(count: int, writer: int, writers: int) -> range:
  """The shards of a writer: neighbours, of which it says what crosses from one to the next once."""
  return range(count * writer // writers, count * (writer + 1) // writers)


def check_room(place: str, manifest: stores.Manifest, missing: list[int]) -> None:
  """Says how large the store is. OSError when the disk has no room for the shards that are missing."""
  gb = lambda size: f"{size / 1e9:,.2f} GB"
  size = lambda shards: sum(manifest.file_bytes(name, shard) for name in manifest.arrays for shard in shards)
  need = size(missing)
  shell.say(f"store: {manifest.n_tokens:,} tokens of {manifest.bytes_per_token:,} bytes, "
            f"{gb(size(range(manifest.n_shards)))} in {manifest.n_shards} shards; {len(missing)} of them, {gb(need)}, "
            f"are missing")
  if "://" in place:
    return
  free = shutil.disk_usage(place).free
  if need > free:
    raise OSError(f"the store needs {gb(need)} more, and the disk of {place} has {gb(free)} free: free some, "
                  f"choose another --out, or a smaller --dtype")


class Target:
  """Runs the target on rows, and says what a store of this manifest holds of them."""

  def __init__(self, config: TrainConfig, rows, target, manifest: stores.Manifest):
    self._batch, self._rows, self._target = config.batch, rows, target
    self._encode = jax.jit(lambda target, batch: stores.encoded(target.encode(batch, manifest.taps), len(manifest.taps),
                                                                manifest.dtype))

  def __call__(self, first: int, last: int) -> dict[str, np.ndarray]:
    """[n,...] by array, of all tokens of the rows first .. last - 1."""
    # The last batch is filled up with its last row: one shape is compiled, and no number depends on it.
    indices = np.minimum(np.arange(first, first + self._batch), last - 1)
    batch = self._rows.take(indices)
    used = (batch.segments > 0) & (np.arange(len(indices)) < last - first)[:, None]
    return {name: x[used] for name, x in jax.device_get(self._encode(self._target, place_rows(batch))).items()}


class Copy:
  """Says what a reference's cache holds of rows: of each of their documents, found by its tokens."""

  def __init__(self, cache: Cache, rows, target: Target):
    """ValueError when the target says something else of the first row."""
    self._cache, self._rows = cache, rows
    length = rows.take(np.arange(1)).tokens.shape[1]
    # By their tokens, however rows are packed: the same tokens again have the same states.
    self._where = {_key(tokens[:length]): sample for sample, (tokens, _) in enumerate(cache.documents())}
    errors = relative_errors(target(0, 1), self(0, 1))
    if not max(errors.values()) < SAME:  # also of NaN
      raise ValueError(f"{cache.folder} is not of this target, which says other things of the first row (relative "
                       f"errors {errors}, up to {SAME} is rounding): give the --target that it was made with")

  def __call__(self, first: int, last: int) -> dict[str, np.ndarray]:
    batch, parts = self._rows.take(np.arange(first, last)), []
    for tokens, segments in zip(batch.tokens, batch.segments):
      for document in range(1, segments.max() + 1):
        own = tokens[segments == document]
        if (sample := self._where.get(_key(own))) is None:
          raise ValueError(f"{self._cache.folder} has no sample with the tokens of a document of rows {first} to "
                           f"{last - 1}: the conversations are of another cache, delete them and start again")
        said = self._cache.said(sample)
        parts.append({name: x[:len(own)] for name, x in said.items()})  # causal: what is cut off changed nothing before
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _key(tokens):
  return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).digest()[:16]


def write_documents(cache: Cache, path: Path) -> None:
  """The conversations of a reference's cache as training data; whole or not at all."""
  if path.exists():  # of a run before this one; those of another cache are not found in this one
    with path.open("rb") as file:
      lines = sum(1 for _ in file)
    if lines != len(cache):
      raise ValueError(f"{path} has {lines} conversations, {cache.folder} has {len(cache)}: it has changed since, so "
                       f"choose another --out")
    return
  scratch = path.with_name(f".{path.name}.new")
  try:
    with scratch.open("w") as file:
      for tokens, mask in cache.documents():
        file.write(json.dumps({"tokens": tokens.tolist(), "loss_mask": mask.tolist()}) + "\n")
    os.replace(scratch, path)
  finally:
    scratch.unlink(missing_ok=True)


def relative_errors(wanted: dict, got: dict) -> dict[str, float]:
  """|| got - wanted || / || wanted || by array."""
  norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float32)))
  return {name: norm(np.asarray(got[name], np.float32) - np.asarray(wanted[name], np.float32)) / norm(wanted[name])
          for name in ("hidden", "features")}


def cost_of(settings: Settings, config: TrainConfig, rows, target, manifest: stores.Manifest) -> dict:
  """What the rounding of a store costs, on the first batch; said, and returned for the result."""
  batch: Batch = place_rows(rows.take(np.arange(config.batch) % len(rows)))
  exact: TargetOutput = jax.jit(lambda target: target.encode(batch, manifest.taps))(target)
  rounded = jax.jit(lambda x: stores.decoded(stores.encoded(x, len(manifest.taps), manifest.dtype),
                                             config.target_dtype))(exact)
  used = np.asarray(batch.segments) > 0
  tokens = lambda output: {"hidden": np.asarray(output.hidden)[used], "features": np.asarray(output.features)[used]}
  errors = relative_errors(tokens(exact), tokens(rounded))
  drafter = (dspark_jax.load_drafter(settings.drafter, target, dtype="float32") if settings.drafter else
             dspark_jax.new_drafter(train.drafter_config(config.drafter, target.config), seed=config.seed))
  if tuple(drafter.taps) != manifest.taps:
    raise ValueError(f"{settings.drafter} has taps {list(drafter.taps)}, the store {list(manifest.taps)}: give a "
                     f"drafter with these taps, or none")
  key = jax.random.key(config.seed)
  blocks = (anchors.all_blocks(batch, drafter.block_size) if drafter.every_position else
            anchors.sample_blocks(key, batch, config.anchors, drafter.block_size))
  asked = jax.jit(lambda drafter, target, encoded: gradients(drafter, values(drafter), target, batch, encoded, blocks,
                                                             train.step_config(config))[:2])
  cost = {"relative_error": errors}
  for name, encoded in (("exact", exact), ("stored", rounded)):
    loss, metrics = asked(drafter, target, encoded)
    cost[name] = {"loss": float(loss), "tau": float(means.mean(metrics["tau"]))}
  kind = f"{settings.drafter}" if settings.drafter else "a fresh drafter"
  shell.say(f"as {manifest.dtype}: hidden states are {errors['hidden']:.2%} off, features {errors['features']:.2%}; "
            f"for {kind} on the first batch loss {cost['exact']['loss']:.4f} becomes {cost['stored']['loss']:.4f}, tau "
            f"{cost['exact']['tau']:.3f} becomes {cost['stored']['tau']:.3f}")
  return cost


if __name__ == "__main__":
  shell.run(main, Settings)
