"""Files as no program wrote them, for a minute: each is loaded, or refused in one short sentence that names it.

    make fuzz                                  60 seconds, another seed each time
    make fuzz FUZZ_SECONDS=600 FUZZ_SEED=7     longer; the same files as every run of seed 7
    make fuzz FUZZ_SEED=7 FUZZ_ONLY="index:12" one of them again, with its traceback
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

import dspark_jax
from dspark_jax.data import benchmarks, chat, conversations, prompts
from dspark_jax.data.conversations import Document
from dspark_jax.data.gguf_metadata import open_gguf
from dspark_jax.data.rows import Rows
from dspark_jax.loading import stored_temperatures
from dspark_jax.programs import results, run_folder
from infer import generate
from train import calibrate, train
from folders import (CHATML, DSPARK, GOLDEN, LLAMA, QWEN3, fresh_drafter, packed_rows, qwen3, sharded, target_of,
                     with_tokenizer)
from mutations import ODD, TEMPLATES, spoil_bytes, spoil_json, spoil_lines, spoil_names, spoil_safetensors
from test_gguf import model, write
from test_results import DECODED, REPORTS

SECONDS, MEGABYTES, LONGEST = 5, 500, 600  # what a file may cost; characters of a sentence
TALK = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
MASKED = {"tokens": list(range(5, 35)), "loss_mask": [0] * 10 + [1] * 20}


class TooSlow(BaseException):
  """Not an Exception, which a loader may take for a damaged file."""


@dataclasses.dataclass
class Place:
  """A file that is spoiled, among the good ones of its folder, and who reads it."""
  path: Path
  read: Callable[[Path], object]
  spoil: tuple  # each: (generator, bytes) -> (what was done, bytes)
  good: bytes = b""

  def __post_init__(self):
    self.good = self.path.read_bytes()


def lines(path: Path, *records: dict) -> Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def speak(path):
  """All that is done with a tokenizer before a model runs."""
  tokenizer = chat.load_tokenizer(path)
  chat.stop_ids(tokenizer)
  chat.encode_prompt(tokenizer, TALK[:1])
  chat.encode_conversation(tokenizer, TALK)


def models(folder: Path) -> dict[str, Place]:
  """Targets and drafters."""
  load = lambda path: dspark_jax.load_target(path.parent, scanned=False)
  draft = lambda target: lambda path: dspark_jax.load_drafter(path.parent, target)
  kinds = {"config qwen3": ("config.json", QWEN3, load), "config llama": ("config.json", LLAMA, load),
           "config dspark": ("config.json", DSPARK, draft(qwen3()))}
  kinds |= {f"config {kind}": ("config.json", GOLDEN / f"drafter_{kind}", draft(target_of(f"drafter_{kind}")))
            for kind in ("eagle3_qwen3", "dflash_original")}
  found = {}
  for name, (file, source, read) in kinds.items():
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.npz", "meta.json"))
    found[name] = Place(folder / name / file, read, (spoil_json,) * 4 + (spoil_bytes,))
  found["safetensors"] = Place(folder / "config qwen3" / "model.safetensors", load, (spoil_safetensors,) * 2 + (
    spoil_bytes,))
  found["index"] = Place(sharded(QWEN3, folder / "sharded") / "model.safetensors.index.json", load, (
    spoil_json,) * 4 + (spoil_bytes,))
  ours = folder / "ours"
  dspark_jax.save_drafter(ours, fresh_drafter(), qwen3())
  dspark_jax.loading.save_temperatures(ours, fresh_drafter(), {"greedy": [1.0] * 4})
  sidecar = json.loads((ours / "drafter.json").read_text())
  del sidecar["digest"]  # as older versions wrote it: with one, no change of the configuration is read any further
  (ours / "drafter.json").write_text(json.dumps(sidecar))

  def load_ours(path):
    stored_temperatures(path.parent, dspark_jax.load_drafter(path.parent, qwen3()))

  found["drafter.json"] = Place(ours / "drafter.json", load_ours, (spoil_json,) * 4 + (spoil_bytes,))
  return found


def tokenizers(folder: Path) -> dict[str, Place]:
  """Tokenizers and their templates, and GGUF files, which are a model and a tokenizer at once."""
  home = with_tokenizer(LLAMA, folder / "tokenizer")
  template = home / "chat_template.jinja"
  odd = lambda rng, data: spoil_json(rng, data, ODD + TEMPLATES)
  read = lambda path: speak(path.parent)
  found = {file: Place(home / file, read, (odd,) * 4 + (spoil_bytes,))
           for file in ("tokenizer.json", "tokenizer_config.json")}
  other = lambda rng, data: (text := rng.choice(TEMPLATES), text.encode())
  found["template"] = Place(template, read, (spoil_bytes, other))
  for name, path, read in (
      ("gguf", write(folder / "model.gguf", model(False)), lambda path: dspark_jax.load_target(path, scanned=False)),
      ("gguf tokenizer", gguf_words(folder / "words.gguf"), speak)):
    reader = open_gguf(path)
    names = [name.encode() for name in (*reader.fields, *(tensor.name for tensor in reader.tensors))]
    found[name] = Place(path, read, (spoil_bytes, functools.partial(spoil_names, names=names)))
  return found


def gguf_words(path: Path) -> Path:
  """A byte-level tokenizer of letters, and one merge."""
  writer = gguf.GGUFWriter(path, "llama")
  tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "us"]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(tokens)
  writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
  writer.add_token_merges(["u s"])
  writer.add_eos_token_id(1)
  writer.add_chat_template(CHATML)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def records(folder: Path) -> dict[str, Place]:
  """What users and our own programs write, a JSON object a line or a file."""
  tokenizer = chat.load_tokenizer(with_tokenizer(LLAMA, folder / "words"))
  settings = lambda **of: generate.Settings("", "none", **of)
  asked = lambda path: list(prompts.read_prompts(path))
  data = lambda path: [conversations.read_conversations(
    shard, tokenizer, max_len=64, vocab_size=len(tokenizer), encode_conversation=chat.encode_conversation,
    encode_text=chat.encode_text)
    for shard in conversations.shards(path, 100)]
  rounds = dict(id="1", n_accept=[1], n_verify=[4], confidence=[[0.5] * 4])
  shutil.copy(REPORTS / "sweep.json", folder / "results.json")
  run = {"program": train.PROGRAM, "config": {"steps": 2, "drafter": {"taps": [1]}}, "data": "abc", "total_steps": 2}
  run_folder.write_record(folder / "run", run)
  of_lines = {
    "data": (lines(folder / "data.jsonl", {"messages": TALK}, MASKED, {"messages": TALK + TALK}), data),
    "prompts": (lines(folder / "prompts.jsonl", {"prompt": "w5"}, {"messages": TALK[:1]}),
                lambda path: generate.read_prompts(settings(prompts=path), tokenizer)),
    "questions": (lines(folder / "questions.jsonl", {"prompt": "w5"}, {"messages": TALK}), asked),
    "benchmark": (lines(folder / "gsm8k.jsonl", {"turns": ["w5", "w6"]}, {"turns": ["w7"]}), benchmarks.read_samples),
    "samples": (lines(folder / "samples.jsonl", DECODED), results.read_decoded),
    "rounds": (lines(folder / "rounds.jsonl", rounds), lambda path: calibrate.read_rounds(path, 4))}
  of_files = {
    "prompt tokens": (lines(folder / "tokens.json", [[1, 2], [3]]),
                      lambda path: generate.read_prompts(settings(prompt_tokens=path), None)),
    "results": (folder / "results.json", results.read),
    "manifest": (packed_rows(folder / "rows", [Document(np.ones(9, np.int32), np.ones(9, bool))], 16).folder /
                 "manifest.json", lambda path: Rows(path.parent)),
    "run.json": (folder / "run" / "run.json", lambda path: train.begun(path.parent, run))}
  return {name: Place(path, read, (spoil,) * 4 + (spoil_bytes,)) for of, spoil in (
    (of_lines, spoil_lines), (of_files, spoil_json)) for name, (path, read) in of.items()}


@contextlib.contextmanager
def limited():
  """At most SECONDS of Python, and so much memory that a runaway ends in an error and not in the machine's death."""
  def stop(*_):
    raise TooSlow(f"more than {SECONDS} s")
  before, limit = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
  size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + 4 * 2 ** 30, limit[1]))
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limit)


def status(key: str) -> float:
  """Megabytes of this process now (VmRSS) or at most since the mark was reset (VmHWM)."""
  return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
              if line.startswith(f"{key}:")) / 1024


def tried(place: Place) -> tuple[str, str, float, float]:
  """(loaded, refused or what else came, of which kind, seconds, megabytes)."""
  Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
  before, began = status("VmRSS"), time.perf_counter()
  outcome, kind = "loaded", ""
  try:
    with limited():
      place.read(place.path)
  except (ValueError, NotImplementedError, OSError) as error:
    text = str(error)
    wrong = [what for what, is_so in (
      ("lines", len(text.splitlines()) != 1), ("length", len(text) > LONGEST), ("no file", not named(place, text)),
      ("no text", not text.isprintable())) if is_so]
    outcome, kind = ("refused", "") if not wrong else ("other", f"{', '.join(wrong)}: {text:.150}")
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # also TooSlow, and what Rust panics with
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/dspark_jax/" in f.filename]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    outcome, kind = "other", f"{type(error).__name__}{where}: {error!s:.150}"
  seconds, megabytes = time.perf_counter() - began, status("VmHWM") - before
  if outcome != "other" and (seconds > SECONDS or megabytes > MEGABYTES):
    outcome, kind = "other", f"took {seconds:.1f} s, {megabytes:.0f} MB"
  return outcome, kind, seconds, megabytes


def named(place: Place, text: str) -> bool:
  return place.path.name in text or str(place.path.parent) in text


@pytest.mark.fuzz
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_spoiled_files(tmp_path, capsys):
  """Kills: tracebacks, hangs, memory without bound and silence about the file, where a file is damaged or hostile."""
  seed = int(os.environ.get("FUZZ_SEED") or time.time())
  only = os.environ.get("FUZZ_ONLY")
  found = {**models(tmp_path), **tokenizers(tmp_path), **records(tmp_path)}
  for place in found.values():  # as they are, all load; what is loaded once (libraries, compilers) is no file's cost
    place.read(place.path)
  counts, worst, slowest, largest = collections.Counter(), {}, (0.0, ""), (0.0, "")
  until = time.monotonic() + float(os.environ.get("FUZZ_SECONDS") or 60)
  recipes = [tuple(only.rsplit(":", 1))] if only else (
    (name, number) for number in range(10 ** 9) for name in found)
  for name, number in recipes:
    if not only and time.monotonic() > until:
      break
    place, rng = found[name], random.Random(f"{seed} {name}:{number}")
    what, data = rng.choice(place.spoil)(rng, place.good)
    recipe = f'FUZZ_SEED={seed} FUZZ_ONLY="{name}:{number}" ({what:.150})'
    (tmp_path / "recipe").write_text(recipe)  # to be found there when it kills the process
    place.path.write_bytes(data)
    if only:
      print(recipe), place.read(place.path)
    outcome, kind, seconds, megabytes = tried(place)
    place.path.write_bytes(place.good)
    counts[outcome] += 1
    slowest, largest = max(slowest, (seconds, recipe)), max(largest, (megabytes, recipe))
    if outcome == "other":
      worst.setdefault(kind.split(": ")[0], []).append((kind, recipe))
  with capsys.disabled():
    print(f"\nfuzz: seed {seed}, {counts.total()} tried, {counts['loaded']} loaded, {counts['refused']} refused, "
          f"{counts['other']} other\n  slowest {slowest[0]:.2f} s: {slowest[1]}\n"
          f"  largest {largest[0]:.0f} MB: {largest[1]}")
  told = [f"{len(cases)} x {cases[0][0]}\n    {cases[0][1]}" for cases in sorted(worst.values(), key=len, reverse=True)]
  assert not worst, f"{counts['other']} files of {len(worst)} kinds:\n" + "\n".join(told).replace(str(tmp_path), "")
