"""Compare what predicts the survival of drafts: the confidence head, the online estimator, and both.

When to use it: to choose the engine's `survival` for a drafter. Prompts that it was not trained on are decoded, every
draft verified; every other one fits (temperatures of the head by Sequential Temperature Scaling; the estimators by
their rounds, in order, as while serving), those between measure, all predictors alike. A run that is killed goes on
where it stopped; with more samples it goes on, too. The default prompts are train.calibrate's.

    python -m train.survival --target smollm2 --drafter runs/demo --out runs/survival
    python -m train.survival --target smollm2 --drafter runs/demo --verification block --out runs/survival-block

rounds-MODE.jsonl and survival.json go into the output folder. The last line of stdout is a JSON object: by mode and
predictor log_loss, auc and ece by position and the first two over all, and observations. Log loss and AUC are of a
draft given those before it; the calibration error is of the survival, the product that a scheduler reads. An error of
bins is never 0: ece_by_chance is what a predictor that is right would show with as many rounds.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import dspark_jax
from dspark_jax.config import from_json, to_json
from dspark_jax.data import chat
from dspark_jax.decoding import calibration, estimator
from dspark_jax.decoding.estimator import Estimator
from dspark_jax.decoding.generate import start
from dspark_jax.decoding.round import Models, propose, settle
from dspark_jax.decoding.session import Session
from dspark_jax.decoding.verify import Rule
from dspark_jax.programs import run_folder, shell
from train import calibrate

PREDICTORS = "head", "estimator", "both"
DRAWS = 20  # of what chance alone would show


@dataclasses.dataclass
class Settings(calibrate.Settings):
  drafter: Path
  """drafter folder or training run; nothing is stored there"""
  out: Path | None = None
  """default: the drafter's path with -survival after it"""
  verification: Rule = "token"
  """how sampled drafts are verified: a rule has survivals of its own"""


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the rounds of one prompt said: a line of rounds-MODE.jsonl."""
  id: str
  kept: tuple[int, ...]                                 # per round, drafts kept
  verified: tuple[int, ...]                             # up to a stop token that was kept
  features: tuple[tuple[tuple[float, ...], ...], ...]   # of each draft: the estimator's, and the head's logit

  def __post_init__(self):
    if not len(self.kept) == len(self.verified) == len(self.features):
      raise ValueError("lists of different lengths")


def main(settings: Settings) -> dict:
  modes = calibrate.check(settings)
  questions = calibrate.read_questions(settings)
  out = settings.out or settings.drafter.resolve().with_name(settings.drafter.resolve().name + "-survival")
  with run_folder.owned(out):
    target, tokenizer = shell.load(settings.target, settings.dtype, settings.kernels)
    drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
    date = run_folder.date_of(out)
    prompts = calibrate.choose(settings, tokenizer, questions, date)
    record = calibrate.describe(settings, target, drafter, tokenizer, questions, out, date)
    record["program"], record["config"]["verification"] = "train.survival", settings.verification
    run_folder.claim(out, record, newer=calibrate.NEWER)
    found = collect(settings, modes, target, drafter, prompts, chat.stop_ids(tokenizer), out)
    result = {mode: compare(mode, rows, drafter.block_size, drafter.has_confidence) for mode, rows in found.items()}
    shell.write_json(out / "survival.json", result)
  shell.say(table(result))
  return dict(modes=result, out=str(out))


def collect(settings: Settings, modes: dict[str, float], target, drafter, prompts, stops,
            out: Path) -> dict[str, list[Prompt]]:
  """The rounds of all prompts by mode, in the order of the prompts; what is missing is decoded and appended."""
  paths = {mode: out / f"rounds-{mode}.jsonl" for mode in modes}
  known = {mode: read_rounds(path, drafter.block_size, 1 + drafter.has_confidence) for mode, path in paths.items()}
  session, size = Session(target, drafter, batch=min(settings.batch, len(prompts))), settings.batch
  with shell.bar() as bar:
    task = bar.add_task("decoding", total=len(modes) * len(prompts), note="")
    # Modes in turn: a run that ends early has as much of each.
    for at in range(0, len(prompts), size):
      for mode, temperature in modes.items():
        todo = [(i, *prompts[i]) for i in range(at, min(at + size, len(prompts))) if prompts[i][0] not in known[mode]]
        bar.update(task, advance=len(prompts[at:at + size]) - len(todo))
        places, names, asked = zip(*todo) if todo else ((), (), ())
        for batch in session.prepare(asked, max_new_tokens=settings.max_new_tokens, temperature=temperature,
                                     seeds=[settings.seed + i for i in places], stop_token_ids=stops,
                                     verification=settings.verification) if todo else ():
          new = [Prompt(names[i], *rounds) for i, rounds in zip(batch.indices, play_out(batch))]
          run_folder.append(paths[mode], list(map(to_json, new)))
          known[mode] |= {prompt.id: prompt for prompt in new}
          bar.update(task, advance=len(new), note=mode)
  return {mode: [known[mode][name] for name, _ in prompts] for mode in modes}


def read_rounds(path: Path, block: int, count: int) -> dict[str, Prompt]:
  """What is in a file of rounds, by id. ValueError for a damaged line, and for other blocks or features."""
  def keyed(record):
    prompt = from_json(Prompt, record, "no rounds of a prompt")
    if any(len(row) != block or any(len(f) != count for f in row) for row in prompt.features):
      raise ValueError(f"features of other drafts than {block}, or not {count} of each")
    return prompt.id, prompt

  return dict(run_folder.read_lines(path, keyed, remedy="delete the line, its prompt is decoded again then"))


def play_out(batch) -> list[tuple]:
  """(kept, verified, features) of all rounds of each row of a prepared batch."""
  target, drafter, requests, _ = batch.args
  rows, said = _start(target, drafter, requests, capacity=batch.static["capacity"]), []
  while not np.all(rows.done):
    rows, report = _round(target, drafter, rows)
    said.append(jax.device_get(report))
  if failed := [index for index, row in zip(batch.indices, rows.failed) if row]:
    raise ValueError(f"NaN logits or confidences in rows {failed}: the target's or the drafter's weights are broken, "
                     f"or the dtype overflows")
  result = []
  for row in range(len(batch.indices)):
    own = [[x[row] for x in report] for report in said if report[0][row]]
    result.append(tuple(tuple(x[i].tolist() for x in own) for i in range(1, 4)))
  return result


@functools.partial(jax.jit, static_argnames="capacity")
def _start(target, drafter, requests, *, capacity):
  return start(Models.of(target, drafter), requests, capacity)


@functools.partial(jax.jit, donate_argnums=2)
def _round(target, drafter, rows):
  """(the rows, (live bool[B], kept i32[B], verified i32[B], features f32[B,G,F]))."""
  models = Models.of(target, drafter)
  proposal = propose(models, rows)
  features = [estimator.feature(proposal.logits, rows.settings.sampling.temperature)]
  if drafter.has_confidence:
    features.append(estimator.logit(proposal.confidence))
  whole = jnp.full_like(rows.anchor, proposal.tokens.shape[1])
  rows, report = settle(models, rows, proposal, proposal.confidence, whole)
  return rows, (report.live, report.n_accept, report.n_verify, jnp.stack(features, axis=-1))


def compare(mode: str, prompts: list[Prompt], block: int, has_head: bool) -> dict:
  """What the predictors are worth on the prompts that did not fit them, and how much each position was observed."""
  fits, reports = (prompts[first::2] for first in calibrate.HALVES.values())
  for half, rows in zip(calibrate.HALVES, (fits, reports)):
    calibrate.check_drafts(mode, half, [prompt.verified for prompt in rows])
  held = _arrays(reports, block)
  names = PREDICTORS if has_head else ("estimator",)
  predicted = {name: predict(mode, name, fits, block, held[2]) for name in names}
  return {name: measure(p, *held[:2]) for name, p in predicted.items()} | dict(
      observations={half: (np.arange(block) < _seen(*_arrays(x, block)[:2])[:, None]).sum(0).tolist()
                    for half, x in zip(calibrate.HALVES, (fits, reports))})


def predict(mode: str, name: str, fits: list[Prompt], block: int, features: np.ndarray) -> np.ndarray:
  """P(draft k is kept | those before it), f64[N,G], for features f64[N,G,F], by a predictor that `fits` fitted."""
  kept, verified, f = _arrays(fits, block)
  if name == "head":
    confidence = lambda x: np.asarray(jax.nn.sigmoid(jnp.asarray(x[..., 1], jnp.float32)))
    rounds = calibrate.Rounds(confidence(f), np.arange(block) < kept[:, None], verified)
    temperatures = jnp.asarray(calibrate.fit(mode, rounds), jnp.float32)
    return np.asarray(calibration.calibrate(jnp.asarray(confidence(features)), temperatures), np.float64)
  # What the engine learns from; of a drafter with a head the last feature is its logit.
  more = slice(1, None if name == "both" else 1)
  read = lambda x: np.concatenate([np.asarray(estimator.basis(x[..., 0])), x[..., more]], axis=-1)
  state = Estimator(block, read(f).shape[-1])
  for one, admitted, accepted in zip(read(f), verified, kept):
    state.observe(one[None], np.array([admitted]), np.array([accepted]))
  return 1 / (1 + np.exp(-(read(features) @ state.weights + state.intercepts)))


def measure(predicted: np.ndarray, kept: np.ndarray, verified: np.ndarray) -> dict:
  """Log loss, AUC and calibration error of f64[N,G]; by position, and the first two over all observations.

  ece_by_chance: the mean error where drafts are kept with just these probabilities, over DRAWS draws.
  """
  place, seen = np.arange(predicted.shape[1]), _seen(kept, verified)
  label = place < kept[:, None]
  p = np.clip(predicted, 1e-6, 1 - 1e-6)
  loss, there = -np.where(label, np.log(p), np.log1p(-p)), place < seen[:, None]
  each = calibration.reliability(p, label, seen)
  flat = calibration.reliability(p[there][:, None], label[there][:, None])
  counts = there.sum(0)
  mean = np.divide((loss * there).sum(0), counts, out=np.full(len(place), np.nan), where=counts > 0)
  error = lambda kept: calibration.reliability(np.cumprod(p, axis=1), kept, verified).ece
  rng = np.random.default_rng(0)
  chance = np.mean([error(np.cumprod(rng.random(p.shape) < p, axis=1)) for _ in range(DRAWS)], axis=0)
  return dict(log_loss=calibrate.plain(mean), auc=calibrate.plain(each.auc), ece=calibrate.plain(error(label)),
              ece_by_chance=calibrate.plain(chance),
              log_loss_all=float(loss[there].mean()), auc_all=calibrate.plain(flat.auc)[0])


def table(result: dict[str, dict]) -> Table:
  """The result for people."""
  out = Table("mode", "position", "observed (fit, report)",
              *(f"{name}: log loss, AUC, ECE (chance) %" for name in PREDICTORS), box=box.SIMPLE_HEAD, padding=0,
              title="predictors of survival on prompts that were not fitted")
  show = lambda x, form: "-" if x is None else format(x, form)
  percent = lambda x: "-" if x is None else f"{100 * x:.1f}"
  for mode, r in result.items():
    there = [r.get(name) for name in PREDICTORS]
    counts = list(zip(*r["observations"].values()))
    for k, pair in enumerate(counts):
      out.add_row(mode if not k else "", str(k + 1), ", ".join(map(str, pair)), *(
          "-" if x is None else f"{show(x['log_loss'][k], '.3f')}, {show(x['auc'][k], '.3f')}, "
                                f"{percent(x['ece'][k])} ({percent(x['ece_by_chance'][k])})" for x in there))
    out.add_row("", "all", ", ".join(map(str, np.sum(counts, axis=0))), *(
        "-" if x is None else f"{x['log_loss_all']:.3f}, {show(x['auc_all'], '.3f')}" for x in there))
  return out


def _arrays(prompts, block):
  """(kept i[N], verified i[N], features f64[N,G,F]) of all rounds."""
  joined = [np.asarray([x for prompt in prompts for x in getattr(prompt, name)]) for name in ("kept", "verified")]
  features = np.asarray([x for prompt in prompts for x in prompt.features], np.float64)
  return *(x.astype(int) for x in joined), features.reshape(len(joined[0]), block, -1 if features.size else 1)


def _seen(kept, verified):
  """i[N]: positions that say something of a draft given those before it, up to the first rejection."""
  return np.minimum(kept + 1, verified)


if __name__ == "__main__":
  shell.run(main, Settings)
