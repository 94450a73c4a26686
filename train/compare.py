"""Train several drafters alike, evaluate them alike, and write one report: the paper's Table 1 in miniature.

When to use it: to know which drafter suits a target and data of your own. All runs see the same data in the same order
for as many steps; every sample is decoded with every drafter. A comparison that is killed goes on where it was when the
same command is given again.

    python -m train.compare --config configs/compare.py --data runs/demo/answers.jsonl
    python -m train.compare --config configs/compare.py --data answers.jsonl --seeds 0 1 2 --out runs/compare3

The output folder holds a training run per drafter and seed (NAME-seedN; the first one's rows/ are what all learn from),
evaluation/ (infer.evaluate, of each of them), results.json (the same, with the seeds of a drafter taken together),
figures/ (infer.plots) and report.md. More seeds may be given later. The last line of stdout is a JSON object with the
keys report, results and differences.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from dspark_jax.config import from_json, to_json
from dspark_jax.decoding import acceptance
from dspark_jax.loading import load_drafter, locate_target, target_config
from dspark_jax.nn.parameters import values
from dspark_jax.programs import results, run_folder, shell
from dspark_jax.programs.results import Result
from infer import evaluate, plots
from train import prepare, train
from train.config import CompareConfig, read_config


@dataclasses.dataclass
class Settings:
  config: str
  """an experiment file that defines `config` as a train.config.CompareConfig"""
  data: tuple[Path, ...]
  """JSONL of conversations or of tokens (train.answers), or a folder of train.prepare; the same for every drafter"""
  out: Path = Path("runs/compare")
  seeds: tuple[int, ...] = (0,)
  """one training run per drafter and seed; a seed changes the start, the anchors and the order of the data"""
  steps: int | None = None
  """instead of the config's"""
  folder: Path | None = None
  """where NAME.jsonl of the config's benchmarks are"""
  hub: str | None = None
  """dataset on the hub (owner/name) with NAME.jsonl in it"""


def main(settings: Settings) -> dict:
  config = read_config(settings.config, CompareConfig)
  config.base.mesh.refuse(settings.config)
  if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
    raise ValueError(f"seeds are {settings.seeds}, expected at least one, each once")
  if settings.steps is config.base.steps is None:
    raise ValueError(f"{settings.config} sets no steps, and all drafters must have as many: give --steps")
  runs = {name: planned(settings, config, name) for name in config.drafters}
  asked = evaluate.Settings(
      targets=(config.base.target,), drafters=tuple(str(run.out) for seeds in runs.values() for run in seeds),
      datasets=config.datasets, temperatures=config.temperatures, samples=config.samples, batch=config.eval_batch,
      max_new_tokens=config.max_new_tokens, folder=settings.folder, hub=settings.hub,
      out=settings.out / "evaluation", kernels=config.base.kernels)
  evaluate.check(asked), evaluate.read_samples(asked)  # a mistake is seen now, not after hours of training
  with run_folder.owned(settings.out):
    about = target_config(locate_target(config.base.target))
    for run, *_ in runs.values():
      train.check_target(run, about)  # what does not fit the target is seen before anything is trained
    prepare.check_data(settings.data)
    return compare(settings, config, runs, asked)


def compare(settings: Settings, config: CompareConfig, runs: dict[str, list], asked: evaluate.Settings) -> dict:
  """Trains, evaluates, reports, and returns the result that the program prints. runs: the trainings by drafter."""
  # Seed by seed: killed in the middle, there are whole comparisons and not all seeds of one drafter.
  trained = train_all(settings.out, [run for runs_of_seed in zip(*runs.values()) for run in runs_of_seed])
  evaluate.main(asked)
  found = results.read(asked.out / "results.json")
  rows, gaps = pool(asked.out, found.results, {run.out.name: name for name, seeds in runs.items() for run in seeds})
  pooled = settings.out / "results.json"
  shell.write_json(pooled, to_json(dataclasses.replace(found, results=tuple(rows))))
  drawn = plots.main(plots.Settings(results=(pooled,), out=settings.out / "figures"))
  text = report(settings, config, runs, trained, found.versions, rows, gaps, drawn["figures"])
  shell.write(settings.out / "report.md", text)
  shell.say(text)
  return {"report": str(settings.out / "report.md"), "results": str(pooled), "differences": gaps}


def planned(settings: Settings, config: CompareConfig, name: str) -> list:
  """The training runs of one drafter, one per seed."""
  drafter, loss = config.drafters[name]
  steps = config.base.steps if settings.steps is None else settings.steps
  return [dataclasses.replace(config.base, drafter=drafter, loss=loss, data=settings.data, seed=seed,
                              out=settings.out / f"{name}-seed{seed}", steps=steps)
          for seed in settings.seeds]


def train_all(out: Path, runs: list) -> dict[str, dict]:
  """Trains the drafters, or finds them trained: the last numbers of each training, and the drafter's size."""
  target, tokenizer = shell.load(runs[0].target, runs[0].target_dtype, runs[0].kernels)
  # What else could differ is in the records of the trainings and of the evaluation.
  run_folder.claim(out, {"program": "train.compare", "config": {"target": runs[0].target, "steps": runs[0].steps}})
  # All see the same rows, which are prepared once.
  rows = train.read_data(runs[0], target.config.vocab_size, tokenizer)
  runs = [dataclasses.replace(run, data=(rows.folder,)) for run in runs]
  trained = {}
  for run in runs:  # also those that are done: train returns their last numbers without compiling anything
    shell.say(f"[{run.out.name}]")
    with run_folder.owned(run.out):
      result = train.train(run, target, tokenizer)
    if train.is_stopped(run, result):
      raise ValueError(f"the training of {run.out.name} was stopped after step {result['steps']}: give the same "
                       f"command to go on")
    weights = values(load_drafter(run.out, target))  # the drafter's own: no copy of the target's embedding or head
    trained[run.out.name] = {**result, "parameters": sum(int(np.prod(v.shape)) for v in weights.values())}
  return trained


def pool(evaluation: Path, found: tuple[Result, ...], names: dict[str, str]) -> tuple[list[Result], list[dict]]:
  """The results with the seeds of each drafter taken together, and how much the accepted lengths differ from those of
  the first drafter on the same samples. names: the drafter of each run."""
  rows, runs = {}, {}  # by drafter, dataset and mode: an entry per seed
  for row in found:
    key = names[row.drafter], row.dataset, row.mode
    rows.setdefault(key, []).append(row)
    runs.setdefault(key, []).append(texts(evaluation, row))
  # Differences are paired sample by sample and seed by seed: what makes a text easy for all drafters drops out.
  first = next(iter(names.values()))
  gaps = [dict(dataset=dataset, mode=mode, drafter=name, less=first,
               **acceptance.difference(mine, runs[first, dataset, mode]))
          for (name, dataset, mode), mine in runs.items() if name != first]
  return [together(name, rows[name, *rest], runs[name, *rest]) for name, *rest in rows], gaps


def texts(evaluation: Path, row: Result) -> dict[str, acceptance.Rounds]:
  """The rounds of every sample of an entry of the results, by id."""
  samples = results.read_decoded(evaluation / "samples" / f"{row.key}.jsonl")
  # A file has them in the order in which they were decoded; intervals pair the samples of several runs by place.
  return {name: decoded.rounds for name, decoded in sorted(samples.items())}


def together(name: str, rows: list[Result], runs: list[dict[str, acceptance.Rounds]]) -> Result:
  """One entry for several seeds: all their rounds, with the interval over samples and seeds."""
  block, tokens = rows[0].block_size, sum(row.tokens for row in rows)
  rounds = [text for run in runs for text in run.values()]
  curve = acceptance.reliability_of(rounds, block)
  # From the rounds themselves, speed too: a mean of the seeds' rates would weigh short texts like long ones.
  return from_json(Result, to_json(rows[0]) | acceptance.summary(rounds, block) | dict(
      drafter=name, tokens=tokens, tokens_per_second=tokens / sum(row.tokens / row.tokens_per_second for row in rows),
      accepted_length_interval=acceptance.interval([list(run.values()) for run in runs]),
      by_seed=[row.accepted_length for row in rows], reliability=curve and curve.to_json(),
      temperatures=None, reliability_before=None), name)  # each seed has its own temperatures, or none


def report(settings: Settings, config: CompareConfig, runs: dict, trained: dict, versions: dict, rows: list[Result],
           gaps: list[dict], figures: dict[str, str]) -> str:
  """The report as Markdown."""
  table = lambda head, rows: results.markdown(head, rows).splitlines()
  base, steps = config.base, next(iter(runs.values()))[0].steps
  samples = [f"{n} samples of {name}" for name, n in {row.dataset: row.samples for row in rows}.items()]
  to = lambda x, spec: "" if x is None else format(x, spec)
  seeds = [f"seed {seed}" for seed in settings.seeds]
  parts = [f"# Drafters for {base.target}, trained alike", "",
           f"{len(runs)} drafters, each trained for {steps} steps of {base.batch} x "
           f"{base.row_length} tokens on the same data in the same order (seeds "
           f"{', '.join(map(str, settings.seeds))}), then evaluated on {', '.join(samples)}, "
           f"{config.max_new_tokens} new tokens each. Intervals: 95 %, bootstrapped over "
           f"samples, and over seeds where there are several. Versions: "
           + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", "", "## Training", ""]
  parts += table(["run", "parameters", "loss", "tau (training)", "tokens/s"],
                 [[label, f"{t['parameters'] / 1e6:.1f} M", f"{t['loss']:.3f}", to(t["tau"], ".2f"),
                   f"{t['tokens_per_second']:.0f}"] for label, t in trained.items()])
  parts += ["", "## Evaluation", ""] + table(results.COLUMNS, [row.cells() for row in rows])
  parts += ["", "## Accepted length by seed", ""]
  parts += table(["drafter", "dataset", "mode", *seeds],
                 [[row.drafter, row.dataset, row.mode, *(to(x, ".3f") for x in row.by_seed)] for row in rows])
  parts += ["", f"## Accepted length less that of {rows[0].drafter}, on the same samples", ""]
  parts += table(["drafter", "dataset", "mode", "difference", "95 % interval", *seeds],
                 [[g["drafter"], g["dataset"], g["mode"], to(g["difference"], "+.3f"),
                   "{:+.3f} to {:+.3f}".format(*g["interval"]) if g["interval"] else "",
                   *(to(x, "+.3f") for x in g["by_run"])] for g in gaps])
  if figures:
    parts += ["", "## Figures", ""]
    parts += [f"![{name}]({Path(path).relative_to(settings.out)})" for name, path in figures.items()]
  parts += ["", "## Settings", ""]
  for name, seeds in runs.items():
    plain = {k: v for k, v in dataclasses.asdict(seeds[0]).items() if k in ("drafter", "loss", "optimizer", "anchors")}
    parts.append(f"- `{name}`: `{json.dumps(plain, default=str)}`")
  return "\n".join(parts) + "\n"


if __name__ == "__main__":
  shell.run(main, Settings)
