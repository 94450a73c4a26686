"""Evaluate drafters on benchmark prompts: accepted length, acceptance by position, calibration, tokens per second.

When to use it: to compare drafters, or survival thresholds, on the same samples. Every target x drafter x dataset x
temperature x threshold is decoded (a drafter without a confidence head at threshold 0 alone, and with the target that
it was made for); a run that is killed goes on where it stopped when the same command is given again, and may be given
more drafters, datasets, temperatures and so on.

    python -m infer.evaluate --targets smollm2 --drafters none runs/demo --out runs/evaluation
    python -m infer.evaluate --targets Qwen/Qwen3-4B --drafters dspark dflash --datasets gsm8k mt-bench \
        --folder prompts --temperatures 0 1 --thresholds 0 0.3 0.5 --turns all --out runs/paper

OUT gets results.json, results.md, run.json (settings and versions) and samples/ (one line per sample). A sample's text
depends on its own seed, not on the batch or its neighbours. Tokens per second are of full batches, without compilation.
The last line of stdout is a JSON object with the keys out and results, those of results.json with a summary in
place of each reliability diagram.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import sys
import time
import zlib
from pathlib import Path
from typing import Literal

import jax
import numpy as np

import dspark_jax
from dspark_jax import loading
from dspark_jax.config import from_json, raise_all, to_json, wrong_choices
from dspark_jax.data import benchmarks, chat
from dspark_jax.data.benchmarks import Sample
from dspark_jax.decoding import acceptance
from dspark_jax.decoding.calibration import mode_name
from dspark_jax.decoding.session import Session
from dspark_jax.decoding.verify import Rule
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import results, run_folder, shell
from dspark_jax.programs.results import Decoded, Result

PROGRAM = "infer.evaluate"
PLAIN = "none"
# Settings that may change when a run goes on: each value has files of its own, so nothing is mixed.
CASES = ("targets", "drafters", "datasets", "temperatures", "thresholds")


@dataclasses.dataclass
class Settings:
  targets: tuple[str, ...]
  """GGUF files, Hugging Face folders or ids, or smollm2"""
  out: Path
  """folder of the results; what is there already is not decoded again"""
  drafters: tuple[str, ...] = (PLAIN,)
  """drafter folders or training runs; none for plain decoding"""
  datasets: tuple[str, ...] = (benchmarks.STDLIB,)
  """JSONL files ({"turns": [TEXT, ...]} per line), names of benchmarks, or stdlib, which needs no file"""
  temperatures: tuple[float, ...] = (0.0,)
  """0 is greedy"""
  thresholds: tuple[float, ...] = (0.0,)
  """drafts from the first one whose survival is below are not verified; 0 verifies all"""
  verification: Rule = "token"
  """at temperatures above 0: token tests drafts one by one, block as a whole, which keeps a few more"""
  batch: int = 8
  max_new_tokens: int = 256
  turns: Literal["first", "all"] = "first"
  """first, or all: the target's answer is fed back and the next question asked"""
  samples: int | None = None
  """per dataset; default: as many as the reference takes of a benchmark, all of a file"""
  folder: Path | None = None
  """where NAME.jsonl of the benchmarks are"""
  hub: str | None = None
  """dataset on the hub (owner/name) with NAME.jsonl in it"""
  seed: int = 0
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Case:
  """One line of the results."""
  target: str
  drafter: str
  dataset: str
  temperature: float
  threshold: float | None  # None: plain decoding has no drafts to leave out

  @property
  def mode(self) -> str:
    return mode_name(self.temperature)

  @property
  def key(self) -> str:
    """The name of its file of samples."""
    return results.case_key(self.target, self.drafter, self.dataset, self.mode, self.threshold)


@dataclasses.dataclass
class Models:
  """A target, maybe a drafter, and what belongs to them."""
  target: object
  drafter: object | None
  tokenizer: object
  stops: tuple[int, ...]
  date: datetime.date | None = None  # that its chat template is told; None: today's
  temperatures: dict = dataclasses.field(default_factory=dict)  # of the confidences: f[G] by mode, where fitted

  @property
  def block_size(self) -> int:
    return self.drafter.block_size if self.drafter else 0

  @property
  def has_confidence(self) -> bool:
    return self.drafter is not None and self.drafter.has_confidence


def main(settings: Settings) -> dict:
  cases, datasets = check(settings), read_samples(settings)
  for name in settings.drafters:
    shell.check_drafter(name, PLAIN)
  with run_folder.owned(settings.out):
    return decode(settings, cases, datasets)


def decode(settings: Settings, cases: list[Case], datasets: dict[str, list[Sample]]) -> dict:
  """Decodes what is missing in the folder, writes the results, and returns what the program prints."""
  run, found = open_run(settings, datasets), []
  date = datetime.date.fromisoformat(run["date"])
  with shell.bar() as bar:
    task = bar.add_task("samples", total=sum(len(datasets[case.dataset]) for case in cases), note="loading")
    tell = lambda done, note: bar.update(task, advance=done, note=note)
    others = [set(load(settings, name, date)) for name in settings.targets[1:]]  # mistakes show now, not after hours
    for name in settings.targets:
      loaded = load(settings, name, date)
      orphans = {_label(path) for path in settings.drafters}.difference(loaded, *others)
      if orphans and name == settings.targets[0]:
        raise ValueError(f"{', '.join(sorted(orphans))} was made for none of the targets {', '.join(settings.targets)}")
      # Only now: a mistake in the first command must not leave a folder that refuses the corrected one.
      remember(settings, run, _label(name), loaded)
      for case in cases:
        models, samples = loaded.get(case.drafter), datasets[case.dataset]
        # Without confidences every threshold would decode the same rounds under another name.
        if case.target == _label(name) and models and (models.has_confidence or not case.threshold):
          found.append(result(case, models, evaluate(settings, case, models, samples, tell)))
        elif case.target == _label(name):
          tell(len(samples), f"{case.key} does not exist")
  told = run["settings"] | {"verification": settings.verification}  # of token the record says None
  whole = to_json(results.Results(told, run["versions"], tuple(found)))
  shell.write_json(settings.out / "results.json", whole)
  shell.write(settings.out / "results.md", results.markdown(results.COLUMNS, [row.cells() for row in found]))
  shell.say(results.table(found))
  # A diagram has hundreds of numbers per position: what is printed should fit a log.
  short = lambda row: row | {key: row[key] and row[key]["summary"] for key in row if key.startswith("reliability")}
  return {"out": str(settings.out), "results": list(map(short, whole["results"]))}


def check(settings: Settings) -> list[Case]:
  """The cases. ValueError for what can be seen to be wrong before anything is read."""
  for name in CASES:
    if not getattr(settings, name):
      raise ValueError(f"{name} is empty: give at least one")
  shell.at_least(settings, batch=1, max_new_tokens=1)
  raise_all("settings", wrong_choices(settings))
  for value in settings.temperatures:
    if not 0 <= value < math.inf:  # written so that NaN is refused, too
      raise ValueError(f"temperature is {value}, expected 0 (greedy) or a finite number above")
  for value in settings.thresholds:
    if not 0 <= value <= 1:
      raise ValueError(f"threshold is {value}, expected 0 (verify every draft) to 1")
  for name in settings.drafters:
    if name != PLAIN and _label(name) == PLAIN:
      raise ValueError(f"the drafter {name} would be called {PLAIN}, which means plain decoding: rename its folder")
  return list_cases(settings)


def read_samples(settings: Settings) -> dict[str, list[Sample]]:
  """The samples by the name of their dataset."""
  where = dict(folder=settings.folder, hub=settings.hub, count=settings.samples)
  return {_label(name): benchmarks.load_samples(name, **where) for name in settings.datasets}


def list_cases(settings: Settings) -> list[Case]:
  """All that is to be decoded, in the order of the results. ValueError where two would share a file."""
  targets, drafters, datasets = (map(_label, x) for x in (settings.targets, settings.drafters, settings.datasets))
  cases = [Case(*models, dataset, temperature, threshold)
           for *models, dataset, temperature in itertools.product(targets, drafters, datasets, settings.temperatures)
           for threshold in ((None,) if models[1] == PLAIN else settings.thresholds)]
  keys = [case.key for case in cases]  # by key, not by value: folders of one name, 1 and 1.0, would share a file
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f"{key} would be decoded {keys.count(key)} times: give every target, drafter, dataset, "
                       f"temperature and threshold once, and folders with different names")
  return cases


def _label(name: str) -> str:
  path = Path(name)
  return path.stem if path.is_file() else path.resolve().name if path.exists() else path.name


def open_run(settings: Settings, datasets: dict[str, list[Sample]]) -> dict:
  """The record of this run, to go to run.json, or what is there already. ValueError when that is another run's."""
  plain = run_folder.plain(dataclasses.asdict(settings))
  plain.pop("out")   # a folder may be moved
  plain.pop("mesh")  # texts are the same on any, but for rounding
  plain.pop("kernels")
  # None, as in records of older versions, which knew no other; not left out: what is not there is not compared.
  plain["verification"] = None if settings.verification == "token" else settings.verification
  digest = lambda samples: run_folder.digest(json.dumps([[s.id, s.turns] for s in samples]).encode())
  run = {"program": PROGRAM, "settings": plain, "date": str(run_folder.date_of(settings.out)),
         "samples": {name: digest(samples) for name, samples in datasets.items()}}
  if run_folder.is_begun(settings.out):
    parts = dict.fromkeys(("settings", "samples", "models", "versions"), dict)
    known = run_folder.read_record(settings.out, PROGRAM, parts)
    return run_folder.merged(settings.out, known, run, free=CASES, growing=("samples",))
  # For the reader, not compared: a run may go on under another version.
  versions = {"python": sys.version.split()[0], "jax": jax.__version__, "numpy": np.__version__,
              "device": jax.devices()[0].device_kind}
  return {**run, "models": {}, "versions": versions}


def remember(settings: Settings, run: dict, name: str, loaded: dict[str, Models]) -> None:
  """Notes in run.json what the models are. ValueError when they were others: some of the samples are the old ones'."""
  if not loaded:  # of several targets, one that none of the drafters was made for
    return
  some = next(iter(loaded.values()))
  new = {name: loading.target_id(some.target, run["models"].get(name))}
  new |= {f"{name}/{part}": value for part, value in run_folder.encoding(some.tokenizer).items()}
  # The temperatures, too: thresholds act on calibrated confidences, and those are what the samples hold.
  new |= {f"{name}--{label}": [loading.drafter_id(models.drafter), models.temperatures]
          for label, models in loaded.items() if models.drafter}
  run |= run_folder.merged(settings.out, run, {"models": new}, growing=("models",),
                           remedy="it was trained, calibrated or edited since, choose another --out")
  run_folder.write_record(settings.out, run)


def read_decoded(path: Path, samples: list[Sample], models: Models) -> dict[str, Decoded]:
  """The finished samples by id. ValueError for a damaged file, and for samples of something else."""
  ids = {sample.id for sample in samples}

  def check(decoded):
    if max(decoded.n_verify, default=0) > models.block_size:
      raise ValueError("counts out of range")
    widths = {len(row) for row in decoded.confidence or ()} or {models.block_size}
    if (decoded.confidence is None) == models.has_confidence or widths != {models.block_size}:
      raise ValueError("other confidences than rounds")
    if decoded.id not in ids:
      raise ValueError(f"sample {decoded.id!r} is not among those asked")

  return results.read_decoded(path, check)


def load(settings: Settings, name: str, date: datetime.date) -> dict[str, Models]:
  """By drafter label, the target with each drafter: all at once, so that a mistake is seen before hours of decoding.
  With several targets, a drafter goes with the one that it was made for."""
  tokenizer = chat.load_tokenizer(loading.locate_target(name))
  target = shell.load_target(name, settings.dtype, settings.kernels)
  loaded = {}
  for path in settings.drafters:
    if len(settings.targets) > 1 and path != PLAIN and not loading.made_for(path, target):
      continue
    drafter = None if path == PLAIN else dspark_jax.load_drafter(path, target, dtype=settings.dtype)
    models = loaded[_label(path)] = Models(target, drafter, tokenizer, chat.stop_ids(tokenizer), date)
    if drafter and not drafter.has_confidence and 0 not in settings.thresholds:
      raise ValueError(f"{path} has no confidence head, so no threshold but 0 means anything for it: add 0 to "
                       f"--thresholds")
    if models.has_confidence:
      stored = loading.stored_temperatures(path, drafter)  # not for_mode: what is not calibrated can be evaluated, too
      models.temperatures |= {mode: list(fitted) for mode, fitted in stored.by_mode.items()} if stored else {}
  return loaded


def evaluate(settings: Settings, case: Case, models: Models, samples: list[Sample], tell) -> list[Decoded]:
  """All samples decoded, in their order: those in the file of the case, and the others, which are appended to it.

  tell(samples done, note) is called after each batch.
  """
  path = settings.out / "samples" / f"{case.key}.jsonl"
  known = read_decoded(path, samples, models)
  tell(len(known), case.key)
  if case.threshold and case.mode not in models.temperatures:
    shell.say(f"{case.key}: no temperatures are stored for {case.mode}, the threshold meets the drafter's raw "
              f"confidences; train.calibrate fits some")
  lengths = {s.id: len(encode(models, [s.turns[0]], [])) for s in samples if s.id not in known}
  limit = models.target.config.max_positions - settings.max_new_tokens
  long = [name for name in lengths if lengths[name] > limit]
  if long:
    raise ValueError(f"{len(long)} samples of {case.dataset} ({', '.join(long[:5])}) have up to "
                     f"{max(lengths.values())} tokens, which leave no room for {settings.max_new_tokens} new ones in "
                     f"the target's {models.target.config.max_positions} positions: leave them out or lower "
                     f"--max-new-tokens")
  # By length, so that a batch's prompts share a bucket; the longest first, which need the most memory.
  todo = sorted((s for s in samples if s.id in lengths), key=lambda s: (-lengths[s.id], s.id))
  for at in range(0, len(todo), settings.batch):
    new = ask(settings, case, models, todo[at:at + settings.batch])
    run_folder.append(path, list(map(to_json, new)))
    known |= {decoded.id: decoded for decoded in new}
    seconds = max(sum(decoded.seconds for decoded in new), 1e-9)  # coarse clocks say 0 of a tiny batch
    tell(len(new), f"{case.key} {sum(decoded.tokens for decoded in new) / seconds:.0f} tokens/s")
  everything = [known[s.id] for s in samples]
  asked = sum(len(s.turns) for s in samples) if settings.turns == "all" else len(samples)
  if left := asked - sum(decoded.turns for decoded in everything):
    shell.say(f"{case.key}: {left} of {asked} turns were not asked, their conversations had outgrown the target's "
              f"{models.target.config.max_positions} positions")
  return everything


def encode(models: Models, questions: list[str], answers: list[list[int]]) -> list[int]:
  """Tokens of a conversation up to where the next answer begins, in non-thinking mode where the template has one.

  answers: tokens, as generated; decoded and encoded again, one in twelve would be others.
  """
  messages = []
  for question, answer in itertools.zip_longest(questions, answers):
    messages.append({"role": "user", "content": question})
    if answer is not None:
      text = models.tokenizer.decode(answer, skip_special_tokens=True)
      messages.append({"role": "assistant", "content": text, "tokens": answer})
  return chat.encode_prompt(models.tokenizer, messages, date=models.date)


def ask(settings: Settings, case: Case, models: Models, samples: list[Sample]) -> list[Decoded]:
  """The samples of one batch, decoded."""
  records = [dict(id=s.id, turns=0, tokens=0, seconds=0.0, n_accept=[], n_verify=[], n_commit=[])
             | ({"confidence": []} if models.has_confidence else {}) for s in samples]
  answers = [[] for _ in samples]
  for turn in range(max(len(s.turns) for s in samples) if settings.turns == "all" else 1):
    # Rows whose conversation is over, or has outgrown the target, drop out.
    rows = [row for row, s in enumerate(samples) if turn < len(s.turns) and len(answers[row]) == turn]
    prompts = {row: encode(models, samples[row].turns[:turn + 1], answers[row]) for row in rows}
    limit = models.target.config.max_positions - settings.max_new_tokens
    rows = [row for row in rows if len(prompts[row]) <= limit]
    if not rows:
      break
    # Not the row's place: a sample's text must not depend on the batch. Not hash(), which differs between processes.
    seeds = [zlib.crc32(f"{settings.seed}/{samples[row].id}/{turn}".encode()) for row in rows]
    for row, answer in zip(rows, decode_rows(settings, case, models, [prompts[row] for row in rows], seeds)):
      answers[row].append(answer.pop("text"))
      records[row]["turns"] += 1
      for name, value in answer.items():
        records[row][name] += value
  return [from_json(Decoded, record, "decoded sample") for record in records]


def decode_rows(settings: Settings, case: Case, models: Models, prompts: list[list[int]],
                seeds: list[int]) -> list[dict]:
  """Per prompt its new tokens (`text`) and this turn's part of the record. One compilation per prompt bucket."""
  (batch,) = Session(models.target, models.drafter, batch=settings.batch, budget=None).prepare(
      prompts, max_new_tokens=settings.max_new_tokens, temperature=case.temperature, seeds=seeds,
      stop_token_ids=models.stops, survival_threshold=case.threshold or 0.0, verification=settings.verification,
      calibration=models.temperatures.get(case.mode))
  batch.compile()
  began = time.perf_counter()
  texts = batch.run()
  seconds = (time.perf_counter() - began) / settings.batch
  rows = [dict(text=text.tokens, tokens=len(text.tokens), seconds=seconds, n_accept=text.n_accept,
               n_verify=text.n_verify, n_commit=text.n_commit) for text in texts]
  if models.has_confidence:
    # Six digits: a thousandth of the finest bin they are counted in, and a third of what float64 prints.
    rows = [row | {"confidence": [[round(float(c), 6) for c in block] for block in confidence]}
            for row, confidence in zip(rows, (text.confidence for text in texts))]
  return rows


def result(case: Case, models: Models, samples: list[Decoded]) -> Result:
  """The entry of results.json for a case. Plain decoding has a speed and nothing else."""
  config = models.drafter.config if models.drafter else None
  tokens, seconds = sum(decoded.tokens for decoded in samples), sum(decoded.seconds for decoded in samples)
  texts = [decoded.rounds for decoded in samples]
  found = acceptance.summary(texts, models.block_size)
  temperatures = models.temperatures.get(case.mode)
  curves = {"reliability": acceptance.reliability_of(texts, models.block_size),
            "reliability_before": temperatures and acceptance.reliability_of(texts, models.block_size, temperatures)}
  return from_json(Result, dict(
      target=case.target, drafter=case.drafter, kind=loading.kind_of(models.drafter) if config else None,
      # Recurrent drafters have neither setting; a head of rank 0 does not exist, whatever its name.
      block_size=config and config.block_size, num_layers=getattr(config, "num_layers", None),
      markov_head=config.markov_head if getattr(config, "markov_rank", 0) else None, dataset=case.dataset,
      mode=case.mode, threshold=case.threshold, samples=len(samples), tokens=tokens,
      **found if config else dict.fromkeys(found), tokens_per_second=tokens / seconds if seconds else None,
      temperatures=temperatures, **{name: curve and curve.to_json() for name, curve in curves.items()}), case.key)


if __name__ == "__main__":
  shell.run(main, Settings)
