"""Evaluate drafters on benchmark prompts: accepted length, acceptance by position, calibration, tokens per second.

When to use it: to compare drafters, or confidence thresholds, on the same samples. Every target x drafter x dataset x
temperature x threshold is decoded (a drafter without a confidence head at threshold 0 alone, and with the target that it
was made for); a run that is killed goes on where it stopped when the same command is given again, and may be given more
drafters, datasets, temperatures and so on.

    python -m infer.evaluate --targets smollm2 --drafters none runs/demo --out runs/evaluation
    python -m infer.evaluate --targets Qwen/Qwen3-4B --drafters dspark dflash --datasets gsm8k mt-bench --folder prompts \
        --temperatures 0 1 --thresholds 0 0.3 0.5 --turns all --out runs/paper

DIR gets results.json, results.md, run.json (settings and versions) and samples/ (one line per sample). A sample's text
depends on its own seed, not on the batch or its neighbours. Tokens per second are of full batches, without compilation.
The last line of stdout is a JSON object with the keys out and results, those of results.json with the reliability
diagrams left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

import dspark_jax
from dspark_jax import loading
from dspark_jax.checkpoints.hf import read_json
from dspark_jax.data import benchmarks, chat
from dspark_jax.data.benchmarks import Sample
from dspark_jax.decoding import acceptance
from dspark_jax.decoding.acceptance import Rounds
from dspark_jax.decoding.calibration import mode_name
from dspark_jax.decoding.session import Session
from infer import program

PLAIN = "none"
CASES = ("targets", "drafters", "datasets", "temperatures", "thresholds")  # settings that may change: a file for each
COUNTERS = ("n_accept", "n_verify", "n_commit")  # of a record: one number per round
COLUMNS = ("target", "drafter", "dataset", "mode", "threshold", "samples", "accepted length", "95 %",
           "% by position", "verify rate", "drafts/round", "tokens/s", "ECE", "AUROC", "Brier", "ECE raw")

SHOWN = ("accepted length", "% by position", "drafts/round", "tokens/s", "ECE")  # on the terminal, beside the names


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
  batch: int = 8
  max_new_tokens: int = 256
  turns: str = "first"
  """first, or all: the target's answer is fed back and the next question asked"""
  samples: int | None = None
  """per dataset; default: as many as the reference takes of a benchmark, all of a file"""
  folder: Path | None = None
  """where NAME.jsonl of the benchmarks are"""
  hub: str | None = None
  """dataset on the hub (owner/name) with NAME.jsonl in it"""
  seed: int = 0
  dtype: str = "float32"
  """float32 or bfloat16"""


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
    end = "" if self.threshold is None else f"--threshold={self.threshold:g}"
    return f"{self.target}--{self.drafter}--{self.dataset}--{self.mode}{end}"


@dataclasses.dataclass
class Models:
  """A target, maybe a drafter, and what belongs to them."""
  target: object
  drafter: object | None
  tokenizer: object
  stops: tuple[int, ...]
  temperatures: dict = dataclasses.field(default_factory=dict)  # of the confidences: f[G] by mode, where fitted

  @property
  def block_size(self) -> int:
    return self.drafter.block_size if self.drafter else 0

  @property
  def has_confidence(self) -> bool:
    return self.drafter is not None and self.drafter.has_confidence


def main(settings: Settings) -> dict:
  cases, datasets = check(settings), read_samples(settings)
  run, results = open_run(settings, datasets), []
  with program.bar() as bar:
    task = bar.add_task("samples", total=sum(len(datasets[case.dataset]) for case in cases), note="loading")
    tell = lambda done, note: bar.update(task, advance=done, note=note)
    others = [set(load(settings, name)) for name in settings.targets[1:]]  # a mistake is seen now, not after hours
    for name in settings.targets:
      loaded = load(settings, name)
      orphans = {_label(path) for path in settings.drafters}.difference(loaded, *others)
      if orphans and name == settings.targets[0]:
        raise ValueError(f"{', '.join(sorted(orphans))} was made for none of the targets {', '.join(settings.targets)}")
      remember(settings, run, _label(name), loaded)
      for case in cases:
        models, samples = loaded.get(case.drafter), datasets[case.dataset]
        if case.target == _label(name) and models and (models.has_confidence or not case.threshold):
          results.append(result(case, models, evaluate(settings, case, models, samples, tell)))
        elif case.target == _label(name):
          tell(len(samples), f"{case.key} does not exist")
  program.write(settings.out / "results.json", json.dumps(
      {"settings": run["settings"], "versions": run["versions"], "results": results}, indent=1, allow_nan=False) + "\n")
  rows = [cells(row) for row in results]
  program.write(settings.out / "results.md", markdown(COLUMNS, rows))
  # A terminal is narrow: of the five columns that name a row, those that tell rows apart.
  shown = [i for i, name in enumerate(COLUMNS) if name in SHOWN or i < 5 and len({row[i] for row in rows}) > 1]
  table = Table(*(COLUMNS[i] for i in shown))
  for row in rows:
    table.add_row(*(row[i] for i in shown))
  program.say(table)
  short = lambda row: row | {key: row[key] and row[key]["summary"] for key in row if key.startswith("reliability")}
  return {"out": str(settings.out), "results": list(map(short, results))}


def check(settings: Settings) -> list[Case]:
  """The cases. ValueError for what can be seen to be wrong before anything is read."""
  for name in CASES:
    if not getattr(settings, name):
      raise ValueError(f"{name} is empty: give at least one")
  for name in ("batch", "max_new_tokens"):
    if getattr(settings, name) < 1:
      raise ValueError(f"{name} is {getattr(settings, name)}, expected at least 1")
  for value in settings.temperatures:
    if not 0 <= value < math.inf:
      raise ValueError(f"temperature is {value}, expected 0 (greedy) or a finite number above")
  for value in settings.thresholds:
    if not 0 <= value <= 1:
      raise ValueError(f"threshold is {value}, expected 0 (verify every draft) to 1")
  for name in settings.drafters:
    if name != PLAIN and _label(name) == PLAIN:
      raise ValueError(f"the drafter {name} would be called {PLAIN}, which means plain decoding: rename its folder")
  if settings.turns not in ("first", "all"):
    raise ValueError(f"turns is {settings.turns!r}, expected first or all")
  if settings.dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype is {settings.dtype!r}, expected float32 or bfloat16")
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
  keys = [case.key for case in cases]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f"{key} would be decoded {keys.count(key)} times: give every target, drafter, dataset, "
                       f"temperature and threshold once, and folders with different names")
  return cases


def _label(name: str) -> str:
  path = Path(name)
  return path.stem if path.is_file() else path.resolve().name if path.exists() else path.name


# The folder of a run


def open_run(settings: Settings, datasets: dict[str, list[Sample]]) -> dict:
  """The record of this run, to go to run.json, or what is there already. ValueError when that is another run's."""
  plain = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
  plain.pop("out")
  digest = lambda samples: hashlib.sha256(json.dumps([[s.id, s.turns] for s in samples]).encode()).hexdigest()[:16]
  run = {"settings": plain, "samples": {name: digest(samples) for name, samples in datasets.items()}}
  path = settings.out / "run.json"
  if path.exists():
    known = read_json(path)
    for part in ("settings", "samples", "models", "versions"):
      if not isinstance(known.get(part), dict):
        raise ValueError(f"{path} has no {part}, so it is damaged or no evaluation's: choose another --out")
    was = known["settings"]
    _refuse(settings.out, [f"{k} was {was.get(k)}, is {v}" for k, v in plain.items() if k not in CASES and was.get(k) != v]
            or [f"the samples of {k} were others" for k, v in run["samples"].items() if known["samples"].get(k, v) != v])
    return known | {"settings": plain, "samples": known["samples"] | run["samples"]}
  versions = {"python": sys.version.split()[0], "jax": jax.__version__, "numpy": np.__version__,
              "device": jax.devices()[0].device_kind}
  return {**run, "models": {}, "versions": versions}


def remember(settings: Settings, run: dict, name: str, loaded: dict[str, Models]) -> None:
  """Notes in run.json what the models are. ValueError when they were others: some of the samples are the old ones'."""
  new = {name: loading.target_id(next(iter(loaded.values())).target)}
  new |= {f"{name}--{label}": [loading.drafter_id(models.drafter), models.temperatures]
          for label, models in loaded.items() if models.drafter}
  _refuse(settings.out, [f"{k} has changed since" for k, v in new.items() if run["models"].get(k, v) != v])
  run["models"] |= new
  (settings.out / "samples").mkdir(parents=True, exist_ok=True)
  program.write(settings.out / "run.json", json.dumps(run, indent=1) + "\n")


def _refuse(folder, differences):
  if differences:
    raise ValueError(f"{folder} holds an evaluation with other settings ({'; '.join(differences)}): give the same "
                     f"ones to go on with it, or another --out")


def save(path: Path, records: list[dict]) -> None:
  """Appends a finished batch."""
  with path.open("a") as file:
    file.write("".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path, samples: list[Sample], models: Models) -> dict[str, dict]:
  """The finished samples by id; a last line that a kill cut in the middle is cut off. ValueError for a damaged file."""
  if not path.exists():
    return {}
  ids, known, at, data = {sample.id for sample in samples}, {}, 0, path.read_bytes()
  for number, line in enumerate(data.split(b"\n")[:-1], 1):
    try:
      record = json.loads(line)
      problem = _problem(record, models)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # JSON and UTF-8 errors are ValueErrors
      record, problem = {}, f"{type(error).__name__}"
    if not problem and record["id"] not in ids:
      problem = f"sample {record['id']!r} is not among those asked"
    if problem or record["id"] in known:
      raise ValueError(f"{path}, line {number} is damaged ({problem or 'a sample twice'}): delete the line, its "
                       f"sample will be decoded again")
    known[record["id"]] = record
    at += len(line) + 1
  if at < len(data):
    os.truncate(path, at)
  return known


def _problem(record, models):
  """What is wrong with a record, or None."""
  lists = [np.asarray(record[name], np.float64) for name in COUNTERS]
  if not (isinstance(record["id"], str) and all(x.ndim == 1 and len(x) == len(lists[0]) for x in lists)):
    return "lists of different lengths"
  if not ((0 <= lists[0]) & (lists[0] <= lists[1]) & (lists[1] <= models.block_size)).all():
    return "counts out of range"
  if ((lists[2] - lists[0] < 0) | (lists[2] - lists[0] > 1)).any():
    return "counts out of range"
  if not all(isinstance(record[name], (int, float)) and record[name] >= 0 for name in ("tokens", "seconds", "turns")):
    return "tokens or seconds are no numbers"
  if models.has_confidence and np.asarray(record["confidence"], np.float64).size != len(lists[0]) * models.block_size:
    return "other confidences than rounds"
  return None


# Decoding


def load(settings: Settings, name: str) -> dict[str, Models]:
  """By drafter label, the target with each drafter: all at once, so that a mistake is seen before hours of decoding.
  With several targets, a drafter goes with the one that it was made for."""
  tokenizer = chat.load_tokenizer(loading.locate_target(name))
  target = dspark_jax.load_target(name, dtype=settings.dtype)
  loaded = {}
  for path in settings.drafters:
    if len(settings.targets) > 1 and path != PLAIN and not loading.made_for(path, target):
      continue
    drafter = None if path == PLAIN else dspark_jax.load_drafter(path, target, dtype=settings.dtype)
    models = loaded[_label(path)] = Models(target, drafter, tokenizer, chat.stop_ids(tokenizer))
    if drafter and not drafter.has_confidence and 0 not in settings.thresholds:
      raise ValueError(f"{path} has no confidence head, so no threshold but 0 means anything for it: add 0 to --thresholds")
    if models.has_confidence:
      stored = loading.stored_temperatures(path, drafter)  # not for_mode: what is not calibrated can be evaluated, too
      models.temperatures |= {mode: list(fitted) for mode, fitted in stored.by_mode.items()} if stored else {}
  return loaded


def evaluate(settings: Settings, case: Case, models: Models, samples: list[Sample], tell) -> list[dict]:
  """A record per sample, in their order: those in the file of the case, and the others decoded and appended to it.

  tell(samples done, note) is called after each batch.
  """
  path = settings.out / "samples" / f"{case.key}.jsonl"
  known = read_records(path, samples, models)
  tell(len(known), case.key)
  if case.threshold and case.mode not in models.temperatures:
    program.say(f"{case.key}: no temperatures are stored for {case.mode}, the threshold meets the drafter's raw confidences; "
                f"train.calibrate fits some")
  lengths = {s.id: len(encode(models, [s.turns[0]], [])) for s in samples if s.id not in known}
  limit = models.target.config.max_positions - settings.max_new_tokens
  long = [name for name in lengths if lengths[name] > limit]
  if long:
    raise ValueError(f"{len(long)} samples of {case.dataset} ({', '.join(long[:5])}) have up to {max(lengths.values())} "
                     f"tokens, which leave no room for {settings.max_new_tokens} new ones in the target's "
                     f"{models.target.config.max_positions} positions: leave them out or lower --max-new-tokens")
  # By length, so that a batch's prompts share a bucket; the longest first, which need the most memory.
  todo = sorted((s for s in samples if s.id in lengths), key=lambda s: (-lengths[s.id], s.id))
  for at in range(0, len(todo), settings.batch):
    records = ask(settings, case, models, todo[at:at + settings.batch])
    save(path, records)
    known |= {record["id"]: record for record in records}
    seconds, tokens = (sum(record[key] for record in records) for key in ("seconds", "tokens"))
    tell(len(records), f"{case.key} {tokens / max(seconds, 1e-9):.0f} tokens/s")
  records = [known[s.id] for s in samples]
  asked = sum(len(s.turns) for s in samples) if settings.turns == "all" else len(samples)
  if sum(record["turns"] for record in records) < asked:
    program.say(f"{case.key}: {asked - sum(record['turns'] for record in records)} of {asked} turns were not asked, their "
                f"conversations had outgrown the target's {models.target.config.max_positions} positions")
  return records


def encode(models: Models, questions: list[str], answers: list[str]) -> list[int]:
  """Tokens of a conversation up to where the next answer begins, in non-thinking mode where the template has one."""
  messages = [{"role": role, "content": text} for pair in itertools.zip_longest(questions, answers)
              for role, text in zip(("user", "assistant"), pair) if text is not None]
  return chat.encode_prompt(models.tokenizer, messages)


def ask(settings: Settings, case: Case, models: Models, samples: list[Sample]) -> list[dict]:
  """A record per sample of one batch: its new tokens, and all rounds of its turns one after the other."""
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
    # Not the row's place: a sample's text must not depend on the batch.
    seeds = [zlib.crc32(f"{settings.seed}/{samples[row].id}/{turn}".encode()) for row in rows]
    for row, answer in zip(rows, decode_rows(settings, case, models, [prompts[row] for row in rows], seeds)):
      tokens = answer.pop("text")
      answers[row].append(models.tokenizer.decode(tokens, skip_special_tokens=True))
      records[row]["turns"] += 1
      for name, value in answer.items():
        records[row][name] += value
  return records


def decode_rows(settings: Settings, case: Case, models: Models, prompts: list[list[int]], seeds: list[int]) -> list[dict]:
  """Per prompt its new tokens (`text`) and this turn's part of the record. One compilation per prompt bucket."""
  (batch,) = Session(models.target, models.drafter, batch=settings.batch, budget=None).prepare(
      prompts, max_new_tokens=settings.max_new_tokens, temperature=case.temperature, seeds=seeds,
      stop_token_ids=models.stops, survival_threshold=case.threshold or 0.0,
      calibration=models.temperatures.get(case.mode))
  batch.compile()
  began = time.perf_counter()
  texts = batch.run()
  seconds = (time.perf_counter() - began) / settings.batch
  rows = [dict(text=text.tokens, tokens=len(text.tokens), seconds=seconds, n_accept=text.n_accept,
               n_verify=text.n_verify, n_commit=text.n_commit) for text in texts]
  if models.has_confidence:
    rows = [row | {"confidence": [[round(float(c), 6) for c in block] for block in confidence]}
            for row, confidence in zip(rows, (text.confidence for text in texts))]
  return rows


# Results


def result(case: Case, models: Models, records: list[dict]) -> dict:
  """One entry of results.json. Plain decoding has a speed and nothing else."""
  config = models.drafter.config if models.drafter else None
  tokens, seconds = (sum(record[key] for record in records) for key in ("tokens", "seconds"))
  texts = [Rounds.of(*(record[name] for name in COUNTERS), record.get("confidence")) for record in records]
  found = acceptance.summary(texts, models.block_size)
  temperatures = models.temperatures.get(case.mode)
  curves = {"reliability": acceptance.reliability_of(texts, models.block_size),
            "reliability_before": temperatures and acceptance.reliability_of(texts, models.block_size, temperatures)}
  return dict(
      target=case.target, drafter=case.drafter, kind=loading.kind_of(models.drafter) if config else None,
      block_size=config and config.block_size, num_layers=getattr(config, "num_layers", None),
      markov_head=config.markov_head if getattr(config, "markov_rank", 0) else None, dataset=case.dataset, mode=case.mode,
      threshold=case.threshold, samples=len(records), tokens=tokens, **found if config else dict.fromkeys(found),
      tokens_per_second=tokens / seconds if seconds else None, temperatures=temperatures,
      **{name: curve and curve.to_json() for name, curve in curves.items()})


def cells(row: dict) -> list[str]:
  """An entry as text, a cell for each of COLUMNS."""
  number = lambda value, digits=2: "" if value is None else f"{value:.{digits}f}"
  after, before = ((row[key] or {}).get("summary", {}) for key in ("reliability", "reliability_before"))
  return [row["target"], row["drafter"], row["dataset"], row["mode"],
          "" if row["threshold"] is None else f"{row['threshold']:g}", str(row["samples"]),
          number(row["accepted_length"]), "-".join(map(number, row["accepted_length_interval"] or [])),
          " ".join("-" if a is None else f"{100 * a:.0f}" for a in row["acceptance"] or []),
          number(row["verify_rate"]), number(row["drafts_per_round"]), number(row["tokens_per_second"], 1),
          *(number(after.get(f"{key}_mean"), 3) for key in ("ece", "auc", "brier")), number(before.get("ece_mean"), 3)]


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
  """A Markdown table."""
  line = lambda row: "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"
  return line(head) + line(["---"] * len(head)) + "".join(map(line, rows))


if __name__ == "__main__":
  program.run(main, Settings)
