"""Make packed training rows of conversations, token lines and text files: once, on disk, for any number of trainings.

When to use it: before training on more data than one cares to tokenize again; train.train does the same to files that
it is given, in the run's folder. The rows depend neither on the number of processes nor on where a run was killed: the
same command goes on, and what was finished is not done again.

    python -m train.prepare --target smollm2 --data runs/answers.jsonl --out runs/rows --row-length 256
    python -m train.prepare --target Qwen/Qwen3-4B --data a.jsonl b.jsonl --out rows --row-length 4096 --processes 32

Data: JSONL of conversations ({"messages": [...]}, or ShareGPT's {"conversations": [...]}; with "tools") or of tokens
(train.answers), or .txt, .md and .py files. The output folder is what `train.train --data` takes;
dspark_jax/data/rows.py says what is in it. Its parts/ are gone when all is done. The last line of stdout is a JSON
object with the keys documents, rows, tokens, supervised, fill, lost, digest and out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from dspark_jax.config import all_shown
from dspark_jax.data import chat, conversations
from dspark_jax.data import rows as packed
from dspark_jax.data.conversations import Lost, Shard
from dspark_jax.data.rows import Documents, Rows
from dspark_jax.loading import locate_tokenizer
from dspark_jax.programs import run_folder, shell
from dspark_jax.text import read_json

PROGRAM = "train.prepare"
PARTS = "parts"
LONGEST = 2 ** 24  # tokens of a row, which is an int32 for some way yet
DAMAGED = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile  # a part, by a machine that went down


@dataclasses.dataclass
class Settings:
  target: str
  """GGUF file, Hugging Face folder or id, or smollm2; only its tokenizer is read"""
  data: tuple[Path, ...]
  out: Path
  row_length: int = 4096
  """tokens per row; several documents share one"""
  thinking: bool = False
  """as train.train's"""
  allow_special: bool = False
  """as train.train's"""
  processes: int = 0
  """that tokenize at once; 0: one for each core"""
  part_mb: float = 8.0
  """of a file that a process reads at a time; what a kill interrupts is so much"""


def main(settings: Settings) -> dict:
  shell.at_least(settings, row_length=1, processes=0)
  if settings.row_length > LONGEST:
    raise ValueError(f"row_length is {settings.row_length}, expected at most {LONGEST:,}")
  if not settings.data:
    raise ValueError("no data: give one or more files with --data")
  tokenizer = chat.load_tokenizer(locate_tokenizer(settings.target))
  with run_folder.owned(settings.out):
    rows = prepare(settings, tokenizer, len(tokenizer))
  m = rows.manifest
  return dict(documents=m.documents, rows=m.rows, tokens=m.tokens, supervised=m.supervised, fill=rows.fill, lost=m.lost,
              digest=m.digest, out=str(settings.out))


def rows_of(settings: Settings, tokenizer, vocab_size: int, date: datetime.date | None = None, *,
            replace: bool = False) -> Rows:
  """The rows in the prepared folder that settings.data is, or those of the files, prepared in settings.out.

  vocab_size: of the target. date, replace: see `prepare`. ValueError for a folder that does not suit the settings,
  the tokenizer and the target.
  """
  rows = check_data(settings.data)
  if rows is None:
    with run_folder.owned(settings.out):
      return prepare(settings, tokenizer, vocab_size, date, replace=replace)
  known = rows.manifest
  # Of the day it is what it is; and a model may have places for more words than its tokenizer.
  check(rows, what_counts(settings, tokenizer, min(known.vocab_size, vocab_size), known.date), "--data")
  shell.say(f"data: {describe(rows)}")
  return rows


def prepare(settings: Settings, tokenizer, vocab_size: int, date: datetime.date | None = None, *,
            replace: bool = False) -> Rows:
  """The rows of these data in settings.out, made or found there. The caller owns the folder.

  vocab_size: no token may be beyond. date: what chat templates are told, by default the day on which this began.
  ValueError when the folder has rows of other settings or data, unless they may be replaced.
  """
  if not 0 < settings.part_mb * 1e6 < math.inf:
    raise ValueError(f"part_mb is {settings.part_mb}, expected more than 0, and finite")
  how = what_counts(settings, tokenizer, vocab_size, str(date or run_folder.date_of(settings.out)))
  files, before, manifest = files_of(settings.data), None, settings.out / packed.MANIFEST
  check_records(settings.data, how)
  for path in settings.data:
    if path.suffix == ".jsonl":
      conversations.check_texts(path, tokenizer)
  if manifest.exists():
    before = Rows(settings.out)
    if before.manifest.files == files and not differences(before, how):
      shell.say(f"data: {describe(before)}; prepared before")
      return before
    if replace:
      manifest.unlink()
      before = None
    else:
      check(before, how, "--out")
    shell.say("other files than those that were prepared, or changed ones: they are read again")
  if run_folder.is_begun(settings.out):
    run_folder.read_record(settings.out, PROGRAM, {})
  else:
    run_folder.write_record(settings.out, {"program": PROGRAM, "date": how["date"]})
  parts = make_parts(settings, tokenizer, how)
  rows = pack_parts(settings.out, parts, how | {"files": files}, before)
  shell.say(f"data: {describe(rows)}")
  return rows


def what_counts(settings: Settings, tokenizer, vocab_size: int, date: str) -> dict:
  """What the rows depend on beside the data, as their manifest has it."""
  return dict(**run_folder.encoding(tokenizer), vocab_size=vocab_size, date=date, row_length=settings.row_length,
              thinking=settings.thinking, allow_special=settings.allow_special)


def differences(rows: Rows, how: dict) -> list[str]:
  """In what the rows were made otherwise."""
  known = dataclasses.asdict(rows.manifest)
  return [f"{name} was {known[name]}, is {value}" for name, value in how.items() if known[name] != value]


def check(rows: Rows, how: dict, option: str) -> None:
  """ValueError unless the rows were made like this. option: which one names their folder."""
  if differ := differences(rows, how):
    raise ValueError(f"{rows.folder} was prepared with other settings ({'; '.join(differ)}): give the same ones, or "
                     f"another {option}")


def check_records(paths, how: dict) -> None:
  """ValueError for a file of tokens whose record says that another tokenizer made them."""
  for path in paths:
    record = run_folder.record_path(path)
    if path.suffix == ".jsonl" and record.exists():
      made = read_json(record).get("tokenizer", how["tokenizer"])
      if made != how["tokenizer"]:
        raise ValueError(f"{path} was written with tokenizer {str(made)[:40]}, the target has {how['tokenizer']}: "
                         f"tokens of two tokenizers do not mix, so leave it out or have this target answer")


def check_data(paths) -> Rows | None:
  """The rows in a prepared folder; None for files. ValueError for data that are not there, or do not go together."""
  if not any(path.is_dir() for path in paths):
    files_of(paths)
    return None
  if len(paths) > 1:
    raise ValueError(f"data are {', '.join(map(str, paths))}, expected one prepared folder, or files alone: prepare "
                     f"all files together")
  return Rows(paths[0])


def files_of(paths) -> tuple[tuple[str, int, int], ...]:
  """What tells whether files are still those that were read, without reading them."""
  for path in paths:
    if not path.is_file():
      raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'missing'}, expected a file of data: check the "
                       f"path")
    if sum(path.resolve() == other.resolve() for other in paths) > 1:
      raise ValueError(f"{path} is given twice, so its documents could be trained on and held out: give it once")
  return tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def describe(rows: Rows) -> str:
  """For people: what the rows hold."""
  m = rows.manifest
  return f"{m.documents} documents, {m.rows} rows of {m.row_length}, {rows.fill:.0%} full; left out: {Lost(**m.lost)}"


# Parts: what came of a piece of a file, by the hash of its bytes and of all settings


@dataclasses.dataclass(frozen=True)
class Part:
  path: Path
  file: int     # number of the file of data
  shard: Shard


def make_parts(settings: Settings, tokenizer, how: dict) -> list[Part]:
  """The parts of all data in order, made unless they are there."""
  folder, size = settings.out / PARTS, max(int(settings.part_mb * 1e6), 1)
  folder.mkdir(exist_ok=True)
  key = json.dumps(how, sort_keys=True)
  # Text files were once read otherwise: control tokens that they spelled were control tokens.
  again = lambda shard: [b"2"] if shard.path.endswith(conversations.TEXT_SUFFIXES) else []
  name = lambda shard: f"{run_folder.digest(key.encode(), shard.digest.encode(), *again(shard))}.npz"
  found = (Part(folder / name(shard), number, shard)
           for number, path in enumerate(settings.data) for shard in conversations.shards(path, size))
  total = sum(path.stat().st_size for path in settings.data)
  processes = min(settings.processes or cores(), math.ceil(total / size))
  parts, documents, done, began = [], 0, 0, time.monotonic()
  with workers(processes, functools.partial(make_part, tokenizer, how)) as submit, shell.bar() as bar:
    task = bar.add_task("reading data (MB)", total=math.ceil(total / 1e6), note="")
    # As many wait as keep all processes at work: what is read ahead is bounded.
    for part, made in in_order(submit, found, 2 * processes if processes > 1 else 0):
      parts.append(part)
      documents, done = documents + made.result(), done + part.shard.end - part.shard.begin
      bar.update(task, completed=done // 10 ** 6, note=f"{documents / (time.monotonic() - began):.0f} documents/s")
    bar.update(task, completed=math.ceil(total / 1e6))
  return parts


def in_order(submit: Callable, parts: Iterable[Part], ahead: int) -> Iterator[tuple[Part, Future]]:
  """Submits those parts that are not there, `ahead` of them before the result of the first is asked for."""
  waiting = collections.deque()
  for part in parts:
    count = count_of(part.path)
    waiting.append((part, submit(part) if count is None else finished(count)))
    if len(waiting) > ahead:
      yield waiting.popleft()
  yield from waiting


def finished(value) -> Future:
  """A result that is there."""
  future = Future()
  future.set_result(value)
  return future


def cores() -> int:
  """That this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextlib.contextmanager
def workers(processes: int, job: Callable[[Part], int]) -> Iterator[Callable[[Part], Future]]:
  """Gives what starts the job in one of so many processes; in this one, at once, if they are fewer than two."""
  if processes < 2:
    yield lambda part: finished(job(part))
    return
  # Not copies of this process: JAX may have threads here, which a copy would lack.
  ways = multiprocessing.get_all_start_methods()
  context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")  # all but Windows
  # Imported once for all; not this file, which runpy would find there and warn of.
  context.set_forkserver_preload([shell.__name__, chat.__name__, chat.fast_tokenizer().__module__])
  pool = ProcessPoolExecutor(processes, context, begin, (job,))
  try:
    yield functools.partial(pool.submit, work)
  except BrokenProcessPool as error:
    raise ValueError("a process that reads data has died, perhaps for lack of memory: give the same command to go on, "
                     "with fewer --processes") from error
  finally:
    pool.shutdown(cancel_futures=True)


JOB = []  # of this process, if it is one of the pool: a tokenizer takes long to send with every part


def begin(job: Callable[[Part], int]) -> None:
  """The first thing that a process of the pool does."""
  JOB.append(job)
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
  # Killed by -9, the parent cannot end its pool, which would wait for work for ever.
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def work(part: Part) -> int:
  return JOB[0](part)


def make_part(tokenizer, how: dict, part: Part) -> int:
  """Writes what comes of a piece of a file, whole or not at all; returns the number of documents."""
  encode = functools.partial(chat.encode_conversation, enable_thinking=how["thinking"],
                             date=datetime.date.fromisoformat(how["date"]), allow_special=how["allow_special"])
  encode_text = functools.partial(chat.encode_text, begins=False, allow_special=how["allow_special"])
  source = conversations.read_conversations(part.shard, tokenizer, max_len=how["row_length"], encode_text=encode_text,
                                            vocab_size=how["vocab_size"], encode_conversation=encode)
  documents = source.documents or [conversations.Document(np.zeros(0, np.int32), np.zeros(0, bool))]
  content = io.BytesIO()
  np.savez(content, tokens=np.concatenate([d.tokens for d in documents]),
           loss_mask=np.concatenate([d.loss_mask for d in documents]),
           sizes=np.array([len(d.tokens) for d in source.documents], np.int32),
           # From the first line of the piece, as the same one may stand elsewhere in another file.
           lines=np.array([d.line - part.shard.line for d in source.documents], np.int32),
           lost=np.array(dataclasses.astuple(source.lost), np.int64))
  shell.write(part.path, content.getvalue())
  return len(source.documents)


def count_of(path: Path) -> int | None:
  """The number of documents in a part, None if there is no whole one."""
  try:
    with np.load(path) as part:
      return len(part["sizes"])
  except DAMAGED:
    return None


def read(part: Part, *names: str) -> list[np.ndarray]:
  """These arrays of a part. ValueError for one that is damaged inside, which `count_of` cannot see: it is removed."""
  try:
    with np.load(part.path) as found:
      return [found[name] for name in names]
  except DAMAGED as error:
    part.path.unlink(missing_ok=True)
    raise ValueError(f"{part.path} is damaged ({type(error).__name__}), and was removed: give the same command again, "
                     f"which makes it anew") from error


def pack_parts(out: Path, parts: list[Part], about: dict, before: Rows | None) -> Rows:
  """Packs the parts and removes them. before: the rows that are there, which these must equal."""
  sizes, sources, lost = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], Lost()
  for part in parts:
    size, lines, left_out = read(part, "sizes", "lines", "lost")
    sizes.append(size)
    lines = lines + part.shard.line
    sources.append(np.stack([np.full_like(lines, part.file), lines], 1))
    lost = Lost(*(a + b for a, b in zip(dataclasses.astuple(lost), left_out.tolist())))
  files = [path for path, *_ in about["files"]]
  sizes, sources, scratch = np.concatenate(sizes), np.concatenate(sources), out / PARTS / "rows"
  if not len(sizes):
    shutil.rmtree(out / PARTS)
    raise ValueError(f"the data hold nothing to learn (left out: {lost}) in {all_shown(files)}: give other data, or "
                     f"other settings")
  scratch.mkdir(exist_ok=True)
  with shell.stderr.status(f"packing {len(sizes)} documents"):
    manifest = packed.write(scratch, read_parts(parts), sizes, sources, about | {"lost": dataclasses.asdict(lost)})
  if before and (was := f"{before.digest} {before.layout}") != (now := f"{manifest.digest} {packed.layout(scratch)}"):
    shutil.rmtree(out / PARTS)
    raise ValueError(f"{out} holds rows of other data (their digest was {was}, is {now}): give the same files, or "
                     f"another --out")
  (out / packed.MANIFEST).unlink(missing_ok=True)  # of a kill in between nothing is left that looks whole
  for name in packed.ARRAYS:
    (scratch / f"{name}.npy").replace(out / f"{name}.npy")
  shell.write_json(out / packed.MANIFEST, packed.to_json(manifest))
  shutil.rmtree(out / PARTS)
  return Rows(out)


def read_parts(parts: list[Part]) -> Iterator[Documents]:
  for part in parts:
    yield Documents(*read(part, "tokens", "loss_mask", "sizes"))


if __name__ == "__main__":
  shell.run(main, Settings)
