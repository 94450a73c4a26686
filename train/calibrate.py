"""Fit temperatures to a drafter's confidences, and see how far they can be trusted before and after.

When to use it: once a drafter is trained, before a survival threshold or a scheduler relies on its confidences. Prompts
that it was not trained on are decoded; half of them fit one temperature per position and mode of sampling (Sequential
Temperature Scaling; DSpark, 3.2.1), the other half measures. A run that is killed goes on where it stopped. The default
prompts are those of infer.evaluate's dataset stdlib: an ECE from there is in part of prompts that the fit has seen.

    python -m train.calibrate --target smollm2 --drafter runs/demo
    python -m train.calibrate --target smollm2 --drafter runs/demo --temperatures 0 0.7 --questions mine.jsonl

The temperatures go into the drafter's drafter.json, where infer.generate finds them; rounds-MODE.jsonl,
calibration.json and calibration.png into the output folder. The last line of stdout is a JSON object with the keys
temperatures, ece and auroc (before and after), observations (fit and report), all by mode and position, and out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from rich import box
from rich.table import Table

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding import calibration
from dspark_jax.decoding.generate import Generation
from dspark_jax.decoding.scheduler import survival
from dspark_jax.decoding.session import PROMPT_BUCKET
from dspark_jax.loading import drafter_folder, drafter_id, locate_target, save_temperatures, stored_temperatures, target_id
from dspark_jax.sampling import make_sampling
from infer import program
from train import answers, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend is chosen first

MIN_OBSERVATIONS = 50  # of a position in the half that fits; with fewer it keeps temperature 1
HALVES = {"fit": 0, "report": 1}


@dataclasses.dataclass
class Settings:
  target: str
  """GGUF file, Hugging Face folder or id, or smollm2"""
  drafter: Path
  """drafter folder or training run, of ours; the temperatures are stored there"""
  temperatures: tuple[float, ...] = (0.0, 1.0)
  """sampling temperatures, each a mode with a fit of its own; 0 is greedy"""
  questions: Path | None = None
  """JSONL: {"prompt": TEXT} per line; default: questions about the standard library (the held-out part)"""
  samples: int = 256
  """prompts to decode per mode; a later run with more goes on"""
  max_new_tokens: int = 128
  """per prompt"""
  batch: int = 16
  max_prompt_tokens: int = PROMPT_BUCKET
  """longer questions are left out"""
  out: Path | None = None
  """default: the drafter's path with -calibration after it"""
  seed: int = 0
  """prompt i is sampled with seed + i"""
  dtype: str = "float32"
  """float32 or bfloat16"""


@dataclasses.dataclass
class Rounds:
  """What N rounds said of their drafts, and what became of them. Confidences are raw."""
  confidence: np.ndarray  # f32[N,G]
  accepted: np.ndarray    # bool[N,G]  drafts 0..k were all kept
  observed: np.ndarray    # i32[N]     drafts verified: the positions that `accepted` knows

  @classmethod
  def of(cls, records: list[dict], block: int) -> Rounds:
    """All rounds of some prompts."""
    flat = lambda key, dtype, *shape: np.asarray([x for r in records for x in r[key]], dtype).reshape(-1, *shape)
    kept = flat("n_accept", np.int32)
    return cls(flat("confidence", np.float32, block), np.arange(block) < kept[:, None], flat("n_verify", np.int32))

  def counts(self) -> np.ndarray:
    """Rounds that observed each position: i64[G]."""
    return (np.arange(self.confidence.shape[1]) < self.observed[:, None]).sum(0)

  def reliability(self, temperatures=None) -> calibration.Reliability:
    """Of the survival that a round would compute under `temperatures`; None: of raw confidences."""
    confidence = jnp.asarray(self.confidence)
    if temperatures is not None:
      confidence = calibration.calibrate(confidence, jnp.asarray(temperatures, jnp.float32))
    return calibration.reliability(survival(confidence), self.accepted, self.observed)


def main(settings: Settings) -> dict:
  modes = check(settings)
  questions = read_questions(settings)
  with program.stderr.status("loading"):
    tokenizer = chat.load_tokenizer(locate_target(settings.target))
    target = dspark_jax.load_target(settings.target, dtype=settings.dtype)
    drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
  if not drafter.has_confidence:
    raise ValueError(f"{settings.drafter} has no confidence head, so there is nothing to calibrate: train a DSpark "
                     f"drafter with confidence 'markov' or 'hidden'")
  stored_temperatures(settings.drafter, drafter)  # what is damaged should not come out after an hour
  prompts = choose(settings, tokenizer, questions)
  out = settings.out or settings.drafter.resolve().with_name(settings.drafter.resolve().name + "-calibration")
  open_run(out, settings, target, drafter, questions)
  records = collect(settings, modes, target, drafter, prompts, chat.stop_ids(tokenizer), out)
  results = {mode: fit_and_report(mode, rows, drafter.block_size) for mode, rows in records.items()}
  program.write(out / "calibration.json", json.dumps(dict(target=settings.target, drafter=str(settings.drafter), modes={
      mode: {k: v.to_json() if k in ("before", "after") else v for k, v in r.items()} for mode, r in results.items()}),
      indent=1, allow_nan=False) + "\n")
  picture(out / "calibration.png", results)
  program.say(table(results))
  save_temperatures(settings.drafter, drafter, {mode: r["temperatures"] for mode, r in results.items()})
  program.say(f"temperatures stored with {settings.drafter}; picture: {out / 'calibration.png'}")
  by_position = lambda field: {mode: {when: plain(getattr(r[when], field)) for when in ("before", "after")}
                               for mode, r in results.items()}
  by_mode = lambda key: {mode: r[key] for mode, r in results.items()}
  return dict(temperatures=by_mode("temperatures"), ece=by_position("ece"), auroc=by_position("auc"),
              observations=by_mode("observations"), out=str(out))


def check(settings: Settings) -> dict[str, float]:
  """Sampling temperature by mode. ValueError for settings that cannot work, before anything is loaded."""
  for name, least in (("samples", 2), ("batch", 1), ("max_new_tokens", 2), ("max_prompt_tokens", 1)):
    if getattr(settings, name) < least:
      raise ValueError(f"{name} is {getattr(settings, name)}, expected at least {least}")
  if settings.dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype is {settings.dtype!r}, expected float32 or bfloat16")
  for temperature in settings.temperatures:
    make_sampling(temperature)
  modes = {calibration.mode_name(t): t for t in settings.temperatures}
  if not modes or len(modes) != len(settings.temperatures):
    raise ValueError(f"temperatures are {', '.join(map(str, settings.temperatures)) or 'none'}, expected one or more, "
                     f"each once")
  if not (drafter_folder(settings.drafter) / "drafter.json").exists():
    what = "has no drafter.json to store temperatures in" if settings.drafter.exists() else "does not exist"
    raise ValueError(f"{settings.drafter} {what}: expected a run of train.train, or what infer.convert makes of a "
                     f"DeepSpec drafter")
  return modes


def read_questions(settings: Settings) -> list[tuple[str, str]]:
  """(id, text) per question, each text once: the same prompt in both halves would be measured by its own fit."""
  if settings.questions is None:
    questions = [(q.id, q.question) for q in split(stdlib_questions())[1]]
  else:
    questions = answers.read_questions(settings)
  first = {}
  for name, text in questions:
    first.setdefault(text, name)
  return [(name, text) for text, name in first.items()]


def choose(settings: Settings, tokenizer, questions) -> list[tuple[str, list[int]]]:
  """(id, token ids) of the first prompts that are short enough. They fit and report in turn."""
  prompts = []
  for name, text in questions:
    ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": text}])
    if len(ids) <= settings.max_prompt_tokens:
      prompts.append((name, ids))
    if len(prompts) == settings.samples:
      break
  if len(prompts) < 2:
    raise ValueError(f"{len(prompts)} of {len(questions)} different questions have at most "
                     f"{settings.max_prompt_tokens} tokens, expected at least 2: raise max_prompt_tokens or give "
                     f"others with --questions")
  if len(prompts) < settings.samples:
    program.say(f"{len(prompts)} prompts, not {settings.samples}: there are no more of at most "
                f"{settings.max_prompt_tokens} tokens")
  return prompts


def open_run(out: Path, settings: Settings, target, drafter, questions) -> None:
  """Makes the folder and records what its rounds depend on. ValueError if it holds rounds of something else."""
  config = {name: getattr(settings, name) for name in ("max_new_tokens", "max_prompt_tokens", "seed", "dtype")}
  record = {"config": config | {"target": target_id(target), "drafter": drafter_id(drafter)},
            "data": hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]}
  out.mkdir(parents=True, exist_ok=True)
  if (out / "run.json").exists():
    train.known_run(out, record)
  elif held := sorted(p.name for p in out.glob("rounds-*.jsonl")):
    raise ValueError(f"{out} holds {', '.join(held)} but no run.json that says where from: choose another --out")
  else:
    program.write(out / "run.json", json.dumps(record, indent=2) + "\n")


def collect(settings: Settings, modes: dict[str, float], target, drafter, prompts, stops, out: Path) -> dict[str, list]:
  """The records of all prompts by mode, in the order of the prompts; what is missing is decoded and appended."""
  known = {mode: read_rounds(out / f"rounds-{mode}.jsonl") for mode in modes}
  missing = {mode: [(i, *prompt) for i, prompt in enumerate(prompts) if prompt[0] not in known[mode]] for mode in modes}
  batch = min(settings.batch, len(prompts))
  with program.bar() as bar:
    task = bar.add_task("decoding", total=len(modes) * len(prompts), note="")
    bar.advance(task, sum(len(prompts) - len(rows) for rows in missing.values()))
    for mode, temperature in modes.items():
      with (out / f"rounds-{mode}.jsonl").open("a") as file:
        for at in range(0, len(missing[mode]), batch):
          part = missing[mode][at:at + batch]
          padded = part + part[-1:] * (batch - len(part))  # one compilation: the last batch is filled up
          found = dspark_jax.generate(
              target, drafter, [ids for _, _, ids in padded], max_new_tokens=settings.max_new_tokens,
              temperature=temperature, seeds=[settings.seed + i for i, _, _ in padded], stop_token_ids=stops)
          new = [record(name, found, row) for row, (_, name, _) in enumerate(part)]
          file.write("".join(json.dumps(r) + "\n" for r in new))
          file.flush()
          known[mode] |= {r["id"]: r for r in new}
          bar.update(task, advance=len(part), note=f"{mode}, {found.accepted_length:.2f} tokens per round")
  return {mode: [known[mode][name] for name, _ in prompts] for mode in modes}


def record(name: str, found: Generation, row: int) -> dict:
  """The rounds of one prompt as a JSON object."""
  return {"id": name, "n_accept": found.n_accept[row], "n_verify": found.n_verify[row],
          "confidence": found.confidence[row].tolist()}


def read_rounds(path: Path) -> dict[str, dict]:
  """Records by id; a last line that a kill cut in the middle is cut off."""
  if not path.exists():
    return {}
  try:
    _, broken = answers.answered(path)
    if broken is not None:
      os.truncate(path, broken)
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is damaged ({error}): delete it, its prompts are decoded again then") from error


def fit_and_report(mode: str, records: list[dict], block: int) -> dict:
  """Temperatures from every other prompt, and the reliability before and after on the ones between."""
  halves = {half: records[first::2] for half, first in HALVES.items()}
  rounds = {half: Rounds.of(rows, block) for half, rows in halves.items()}
  for half, r in rounds.items():
    if not r.counts()[0]:
      raise ValueError(f"{mode}: none of the {len(halves[half])} prompts that {half} verified a draft, their replies "
                       f"end at once: give others with --questions, or raise --samples")
  temperatures = fit(mode, rounds["fit"])
  before, after = rounds["report"].reliability(), rounds["report"].reliability(temperatures)
  if after.summary()["ece_mean"] > before.summary()["ece_mean"]:
    program.say(f"{mode}: on the prompts that report, the calibration error rose from "
                f"{before.summary()['ece_mean']:.2%} to {after.summary()['ece_mean']:.2%}: raise --samples")
  return dict(temperatures=temperatures, before=before, after=after,
              observations={half: r.counts().tolist() for half, r in rounds.items()},
              prompts={half: [r["id"] for r in rows] for half, rows in halves.items()})


def fit(mode: str, rounds: Rounds) -> list[float]:
  """One temperature per position; 1 from the first position on that too few rounds observed."""
  counts = rounds.counts()
  block, enough = len(counts), int((counts >= MIN_OBSERVATIONS).sum())  # counts fall: the positions form a prefix
  for k in range(enough, block):
    program.say(f"{mode}: position {k + 1} was observed {counts[k]} times in the prompts that fit, expected at least "
                f"{MIN_OBSERVATIONS}: it keeps temperature 1; raise --samples or --max-new-tokens")
  if not enough:
    return [1.0] * block
  confidence = rounds.confidence[:, :enough].astype(np.float64)
  with np.errstate(divide="ignore"):  # 0 and 1 have infinite logits, which fit_temperatures takes
    logits = np.log(confidence) - np.log1p(-confidence)
  found, _ = calibration.fit_temperatures(logits, rounds.accepted[:, :enough],
                                          effective_length=np.minimum(rounds.observed, enough))
  return found.tolist() + [1.0] * (block - enough)


def plain(values: np.ndarray) -> list[float | None]:
  """Without NaN, which JSON lacks."""
  return [None if np.isnan(x) else float(x) for x in values]


def table(results: dict[str, dict]) -> Table:
  """The result for people."""
  out = Table("mode", "slot", "kept", "T", "ECE %", "AUROC", "Brier", "fit, report rounds", box=box.SIMPLE_HEAD,
              padding=0, title="predicted survival on prompts that were not fitted, before -> after")
  for mode, r in results.items():
    change = lambda values, form: " -> ".join("-" if np.isnan(x) else format(x, form) for x in values)
    for k, temperature in enumerate(r["temperatures"]):
      pair = lambda field: [getattr(r[when], field)[k] for when in ("before", "after")]
      out.add_row(mode if k == 0 else "", str(k + 1), f"{r['before'].target_mean[k]:.0%}", f"{temperature:.1f}",
                  change([100 * x for x in pair("ece")], ".1f"), change(pair("auc"), ".3f"),
                  change(pair("brier"), ".3f"), ", ".join(str(r["observations"][half][k]) for half in HALVES))
  return out


def picture(path: Path, results: dict[str, dict]) -> None:
  """Reliability diagrams: a row per mode, a panel per position."""
  block = len(next(iter(results.values()))["temperatures"])
  figure, axes = plt.subplots(len(results), block, figsize=(2.6 * block + 1, 3 * len(results)), layout="constrained",
                              squeeze=False, sharex=True, sharey=True)
  for row, (mode, r) in zip(axes, results.items()):
    for k, panel in enumerate(row):
      panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
      for when, color in (("before", "tab:orange"), ("after", "tab:blue")):
        count, predicted, target = (getattr(r[when], f)[k] for f in ("bin_count", "bin_pred_sum", "bin_target_sum"))
        there = count > 0
        x, y = predicted[there] / count[there], target[there] / count[there]
        panel.plot(x, y, color=color, linewidth=1)
        panel.scatter(x, y, s=4 + 200 * count[there] / count.sum(), color=color, label=when)  # area: rounds in the bin
      panel.set_title(f"{mode}, position {k + 1}\nECE {r['before'].ece[k]:.1%} -> {r['after'].ece[k]:.1%}", fontsize=9)
  axes[0, 0].legend()
  figure.supxlabel("predicted survival")
  figure.supylabel("accepted")
  scratch = path.with_name(path.name + ".new")
  figure.savefig(scratch, format="png", dpi=120)
  scratch.replace(path)
  plt.close(figure)


if __name__ == "__main__":
  program.run(main, Settings)
