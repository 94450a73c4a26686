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
import datetime
import json
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which looks for a screen
from rich import box
from rich.table import Table

import dspark_jax
from dspark_jax.config import from_json, raise_all, to_json, wrong_choices
from dspark_jax.data import chat, prompts
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding import calibration
from dspark_jax.decoding.generate import Generation
from dspark_jax.decoding.scheduler import survival
from dspark_jax.decoding.session import PROMPT_BUCKET, Session
from dspark_jax.loading import drafter_folder, drafter_id, save_temperatures, stored_temperatures, target_id
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import run_folder, shell
from dspark_jax.sampling import make_sampling

MIN_OBSERVATIONS = 50  # of a position in the half that fits; with fewer it keeps temperature 1
# The first and the second of every two prompts: a user's file may be in some order, which both halves should see.
HALVES = {"fit": 0, "report": 1}
NEWER = ("date", "tokenizer", "template")  # parts of the record that older versions did not write
EXPECTED = "expected a run of train.train, or what infer.convert makes of a DeepSpec drafter"


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
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the rounds of one prompt said: a line of rounds-MODE.jsonl."""
  id: str
  n_accept: tuple[int, ...]                  # per round, drafts kept
  n_verify: tuple[int, ...]                  # and verified
  confidence: tuple[tuple[float, ...], ...]  # of each draft, raw

  def __post_init__(self):
    if not len(self.n_accept) == len(self.n_verify) == len(self.confidence):
      raise ValueError("lists of different lengths")


@dataclasses.dataclass
class Rounds:
  """What N rounds said of their drafts, and what became of them. Confidences are raw."""
  confidence: np.ndarray  # f32[N,G]
  accepted: np.ndarray    # bool[N,G]  drafts 0..k were all kept
  observed: np.ndarray    # i32[N]     drafts verified: the positions that `accepted` knows

  @classmethod
  def of(cls, prompts: list[Prompt], block: int) -> Rounds:
    """All rounds of some prompts."""
    # Shaped, since a list without rounds does not know its block.
    joined = lambda name: [x for prompt in prompts for x in getattr(prompt, name)]
    flat = lambda name, dtype, *shape: np.asarray(joined(name), dtype).reshape(-1, *shape)
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
  if not (drafter_folder(settings.drafter) / "drafter.json").exists():
    raise ValueError(f"{settings.drafter} has no drafter.json to store temperatures in: {EXPECTED}")
  questions = read_questions(settings)
  # Beside the drafter and not in it: a drafter's folder is replaced as a whole when it is saved again.
  out = settings.out or settings.drafter.resolve().with_name(settings.drafter.resolve().name + "-calibration")
  with run_folder.owned(out):
    return calibrate(settings, modes, questions, out)


def calibrate(settings: Settings, modes: dict[str, float], questions: list[tuple[str, str]], out: Path) -> dict:
  """Decodes what is missing in `out`, fits, reports, and returns the result that the program prints."""
  target, tokenizer = shell.load(settings.target, settings.dtype, settings.kernels)
  drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
  if not drafter.has_confidence:
    raise ValueError(f"{settings.drafter} has no confidence head, so there is nothing to calibrate: train a DSpark "
                     f"drafter with confidence 'markov' or 'hidden'")
  stored_temperatures(settings.drafter, drafter)  # what is damaged should not come out after an hour
  date = run_folder.date_of(out)
  prompts = choose(settings, tokenizer, questions, date)
  run_folder.claim(out, describe(settings, target, drafter, tokenizer, questions, out, date), newer=NEWER)
  decoded = collect(settings, modes, target, drafter, prompts, chat.stop_ids(tokenizer), out)
  results = {mode: fit_and_report(mode, rows, drafter.block_size) for mode, rows in decoded.items()}
  shell.write_json(out / "calibration.json", dict(target=settings.target, drafter=str(settings.drafter), modes={
      mode: {k: v.to_json() if k in ("before", "after") else v for k, v in r.items()} for mode, r in results.items()}))
  picture(out / "calibration.png", results)
  shell.say(table(results))
  save_temperatures(settings.drafter, drafter, {mode: r["temperatures"] for mode, r in results.items()})
  shell.say(f"temperatures stored with {settings.drafter}; picture: {out / 'calibration.png'}")
  # Here by position, for scripts; whole diagrams, which are long, are in calibration.json.
  by_position = lambda field: {mode: {when: plain(getattr(r[when], field)) for when in ("before", "after")}
                               for mode, r in results.items()}
  by_mode = lambda key: {mode: r[key] for mode, r in results.items()}
  return dict(temperatures=by_mode("temperatures"), ece=by_position("ece"), auroc=by_position("auc"),
              observations=by_mode("observations"), out=str(out))


def check(settings: Settings) -> dict[str, float]:
  """Sampling temperature by mode. ValueError for settings that cannot work, before anything is loaded."""
  shell.at_least(settings, samples=2, batch=1, max_new_tokens=2, max_prompt_tokens=1)
  raise_all("settings", wrong_choices(settings))
  if not 0 <= settings.seed <= 2 ** 32 - settings.samples:  # each prompt has the next one
    raise ValueError(f"seed is {settings.seed}, expected 0 to {2 ** 32 - settings.samples} with {settings.samples} "
                     f"samples")
  for temperature in settings.temperatures:
    make_sampling(temperature)  # for its ValueError
  modes = {calibration.mode_name(t): t for t in settings.temperatures}  # 1 and 1.0 are one mode, and one file
  if not modes or len(modes) != len(settings.temperatures):
    raise ValueError(f"temperatures are {', '.join(map(str, settings.temperatures)) or 'none'}, expected one or more, "
                     f"each once")
  if not drafter_folder(settings.drafter).exists():
    raise ValueError(f"{settings.drafter} does not exist: {EXPECTED}")
  return modes


def read_questions(settings: Settings) -> list[tuple[str, str]]:
  """(id, text) per question, each text once: the same prompt in both halves would be measured by its own fit."""
  questions = []
  if settings.questions is None:
    questions = [(q.id, q.question) for q in split(stdlib_questions())[1]]
  else:
    for c in prompts.read_prompts(settings.questions):
      if [len(turn) for turn in c.turns] != [1] or c.tools or c.thinking:
        raise ValueError(f'{settings.questions}, line {c.id} is no question: expected {{"prompt": TEXT}}, asked alone')
      questions.append((c.id, c.turns[0][0]["content"]))
    if not questions:
      raise ValueError(f"{settings.questions} holds no question, expected at least one")
  first = {}
  for name, text in questions:
    first.setdefault(text, name)
  return [(name, text) for text, name in first.items()]


def choose(settings: Settings, tokenizer, questions, date: datetime.date) -> list[tuple[str, list[int]]]:
  """(id, token ids) of the first prompts that are short enough. They fit and report in turn. date: that the chat
  template is told."""
  prompts = []
  for name, text in questions:
    ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": text}], date=date)
    if len(ids) <= settings.max_prompt_tokens:
      prompts.append((name, ids))
    if len(prompts) == settings.samples:
      break
  if len(prompts) < 2:
    raise ValueError(f"{len(prompts)} of {len(questions)} different questions have at most "
                     f"{settings.max_prompt_tokens} tokens, expected at least 2: raise max_prompt_tokens or give "
                     f"others with --questions")
  if len(prompts) < settings.samples:
    shell.say(f"{len(prompts)} prompts, not {settings.samples}: there are no more of at most "
              f"{settings.max_prompt_tokens} tokens")
  return prompts


def describe(settings: Settings, target, drafter, tokenizer, questions, out: Path, date: datetime.date) -> dict:
  """What the rounds depend on."""
  # Neither the batch nor the number of samples: a prompt's rounds depend on its own seed, and more may be asked for.
  config = {name: getattr(settings, name) for name in ("max_new_tokens", "max_prompt_tokens", "seed", "dtype")}
  return {"program": "train.calibrate",
          "config": config | {"target": target_id(target, run_folder.recorded(out, "config", "target")),
                              "drafter": drafter_id(drafter)},
          "data": run_folder.digest(json.dumps(questions).encode()),
          "date": str(date)} | run_folder.encoding(tokenizer)


def collect(settings: Settings, modes: dict[str, float], target, drafter, prompts, stops,
            out: Path) -> dict[str, list[Prompt]]:
  """The rounds of all prompts by mode, in the order of the prompts; what is missing is decoded and appended."""
  known = {mode: read_rounds(out / f"rounds-{mode}.jsonl", drafter.block_size) for mode in modes}
  missing = {mode: [(i, *prompt) for i, prompt in enumerate(prompts) if prompt[0] not in known[mode]] for mode in modes}
  session = Session(target, drafter, batch=min(settings.batch, len(prompts)))
  with shell.bar() as bar:
    task = bar.add_task("decoding", total=len(modes) * len(prompts), note="")
    bar.advance(task, sum(len(prompts) - len(rows) for rows in missing.values()))
    for mode, temperature in modes.items():
      places, names, asked = zip(*missing[mode]) if missing[mode] else ((), (), ())
      for batch in session.prepare(asked, max_new_tokens=settings.max_new_tokens, temperature=temperature,
                                   seeds=[settings.seed + i for i in places], stop_token_ids=stops) if asked else ():
        texts = batch.run()
        new = [Prompt(names[i], tuple(text.n_accept), tuple(text.n_verify), tuple(map(tuple, text.confidence.tolist())))
               for i, text in zip(batch.indices, texts)]
        run_folder.append(out / f"rounds-{mode}.jsonl", list(map(to_json, new)))
        known[mode] |= {prompt.id: prompt for prompt in new}
        length = Generation.of(texts).accepted_length
        bar.update(task, advance=len(new), note=f"{mode}, {length:.2f} tokens per round")
  return {mode: [known[mode][name] for name, _ in prompts] for mode in modes}


def read_rounds(path: Path, block: int) -> dict[str, Prompt]:
  """What is in a file of rounds, by id. ValueError for a damaged line, and for blocks of another length."""
  def keyed(record):
    prompt = from_json(Prompt, record, "no rounds of a prompt")
    if any(len(row) != block for row in prompt.confidence):
      raise ValueError(f"confidences of other blocks than {block} drafts")
    return prompt.id, prompt

  return dict(run_folder.read_lines(path, keyed, remedy="delete the line, its prompt is decoded again then"))


def fit_and_report(mode: str, prompts: list[Prompt], block: int) -> dict:
  """Temperatures from every other prompt, and the reliability before and after on the ones between."""
  halves = {half: prompts[first::2] for half, first in HALVES.items()}
  rounds = {half: Rounds.of(rows, block) for half, rows in halves.items()}
  for half, rows in halves.items():
    check_drafts(mode, half, [prompt.n_verify for prompt in rows])
  temperatures = fit(mode, rounds["fit"])
  before, after = rounds["report"].reliability(), rounds["report"].reliability(temperatures)
  # A fit of few rounds can be worse than none. It is stored all the same: half of the prompts cannot tell for sure.
  if after.summary()["ece_mean"] > before.summary()["ece_mean"]:
    shell.say(f"{mode}: on the prompts that report, the calibration error rose from "
              f"{before.summary()['ece_mean']:.2%} to {after.summary()['ece_mean']:.2%}: raise --samples")
  return dict(temperatures=temperatures, before=before, after=after,
              observations={half: r.counts().tolist() for half, r in rounds.items()},
              prompts={half: [prompt.id for prompt in rows] for half, rows in halves.items()})


def check_drafts(mode: str, half: str, verified: list[tuple[int, ...]]) -> None:
  """ValueError where no round of a half's prompts verified a draft. verified: by prompt and round."""
  if not any(map(any, verified)):
    raise ValueError(f"{mode}: none of the {len(verified)} prompts that {half} verified a draft, their replies end at "
                     f"once: give others with --questions, or raise --samples")


def fit(mode: str, rounds: Rounds) -> list[float]:
  """One temperature per position; 1 from the first position on that too few rounds observed."""
  counts = rounds.counts()
  # Positions are fitted left to right, each under those before it: past a gap there is nothing to stand on.
  block, enough = len(counts), int((counts >= MIN_OBSERVATIONS).sum())  # counts fall: the positions form a prefix
  for k in range(enough, block):
    shell.say(f"{mode}: position {k + 1} was observed {counts[k]} times in the prompts that fit, expected at least "
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
  out = Table("mode", "position", "kept", "T", "ECE %", "AUROC", "Brier", "fit, report rounds", box=box.SIMPLE_HEAD,
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
  figure = Figure(figsize=(2.6 * block + 1, 3 * len(results)), layout="constrained")
  axes = figure.subplots(len(results), block, squeeze=False, sharex=True, sharey=True)
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
  shell.write(path, shell.image(figure))


if __name__ == "__main__":
  shell.run(main, Settings)
