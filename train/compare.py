"""Train several drafters alike, evaluate them alike, and write one report: the paper's Table 1 in miniature.

When to use it: to know which drafter suits a target and data of your own. All runs see the same data in the same order
for as many steps; every sample is decoded with every drafter. A comparison that is killed goes on where it was when the
same command is given again.

    python -m train.compare --config configs/compare.py --data runs/demo/answers.jsonl
    python -m train.compare --config configs/compare.py --data answers.jsonl --seeds 0 1 2 --out runs/compare3

The output folder holds one training run per drafter (and seed), evaluation/ (infer.evaluate), figures/ (infer.plots) and
report.md. The last line of stdout is a JSON object with the keys report, results and differences.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

import dspark_jax
from dspark_jax.checkpoints.hf import names, read_json
from dspark_jax.data import chat
from dspark_jax.decoding import acceptance
from dspark_jax.loading import load_drafter, locate_target
from infer import evaluate, plots, program
from train import train
from train.config import CompareConfig, read_config


@dataclasses.dataclass
class Settings:
  config: str
  """an experiment file that defines `config` as a train.config.CompareConfig"""
  data: tuple[Path, ...]
  """JSONL of conversations or of tokens (train.answers), the same for every drafter"""
  out: Path = Path("runs/compare")
  seeds: tuple[int, ...] = (0,)
  """one training run per drafter and seed; a seed changes the start, the anchors and the order of the data"""
  steps: int | None = None
  """instead of the config's"""


def main(settings: Settings) -> dict:
  config = read_config(settings.config, CompareConfig)
  if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
    raise ValueError(f"seeds are {settings.seeds}, expected at least one, each once")
  runs = {label: run for seed in settings.seeds for label, run in planned(settings, config, seed).items()}
  trained = {label: train_one(label, run) for label, run in runs.items()}
  evaluation = settings.out / "evaluation"
  evaluate.main(evaluate.Settings(
      targets=(config.base.target,), drafters=tuple(str(run.out) for run in runs.values()), datasets=config.datasets,
      temperatures=config.temperatures, samples=config.samples, batch=config.eval_batch,
      max_new_tokens=config.max_new_tokens, out=evaluation))
  found = read_json(evaluation / "results.json")
  drawn = plots.main(plots.Settings(results=(evaluation / "results.json",), out=settings.out / "figures"))
  gaps = differences(evaluation, found["results"])
  text = report(settings, config, runs, trained, found, gaps, drawn["figures"])
  program.write(settings.out / "report.md", text)
  program.say(text)
  return {"report": str(settings.out / "report.md"), "results": str(evaluation / "results.json"), "differences": gaps}


def planned(settings: Settings, config: CompareConfig, seed: int) -> dict:
  """The training runs of one seed, by label."""
  label = lambda name: name if len(settings.seeds) == 1 else f"{name}-seed{seed}"
  return {label(name): dataclasses.replace(config.base, drafter=drafter, loss=loss, data=settings.data, seed=seed,
                                           out=settings.out / label(name), steps=settings.steps or config.base.steps)
          for name, (drafter, loss) in config.drafters.items()}


def train_one(label: str, run) -> dict:
  """Trains one drafter, or finds it trained: the last numbers of its training, and its size."""
  program.say(f"[{label}]")
  with program.stderr.status("loading"):
    target = dspark_jax.load_target(run.target, dtype=run.target_dtype)
    tokenizer = chat.load_tokenizer(locate_target(run.target))
  result = train.train(run, target, tokenizer)
  if result["steps"] < read_json(run.out / "run.json")["total_steps"]:
    raise ValueError(f"the training of {label} was stopped after step {result['steps']}: give the same command to go on")
  weights = names(load_drafter(run.out, target))
  return {**result, "parameters": sum(int(np.prod(v.shape)) for v in weights.values())}


def differences(evaluation: Path, results: list[dict]) -> list[dict]:
  """Accepted length of every drafter less that of the first one, on the same samples, with 95 % intervals."""
  texts = {}
  for row in results:
    key = evaluate.Case(*(row[k] for k in ("target", "drafter", "dataset")), temperature_of(row["mode"]), row["threshold"]).key
    lines = [json.loads(line) for line in (evaluation / "samples" / f"{key}.jsonl").read_text().splitlines()]
    texts[row["dataset"], row["mode"], row["drafter"]] = {
        x["id"]: acceptance.Rounds.of(x["n_accept"], x["n_verify"], x["n_commit"]) for x in lines}
  base = results[0]["drafter"]
  return [dict(dataset=dataset, mode=mode, drafter=drafter, less=base,
               **acceptance.difference(mine, texts[dataset, mode, base]))
          for (dataset, mode, drafter), mine in texts.items() if drafter != base]


def temperature_of(mode: str) -> float:
  """The inverse of `calibration.mode_name`."""
  return 0.0 if mode == "greedy" else float(mode.removeprefix("T="))


def report(settings: Settings, config: CompareConfig, runs: dict, trained: dict, found: dict, gaps: list[dict],
           figures: dict[str, str]) -> str:
  """The report as Markdown."""
  base, versions = config.base, found["versions"]
  parts = [f"# Drafters for {base.target}, trained alike", "",
           f"{len(runs)} drafters, each trained for {settings.steps or base.steps} steps of {base.batch} x "
           f"{base.row_length} tokens on the "
           f"same data in the same order (seeds {', '.join(map(str, settings.seeds))}), then evaluated on "
           f"{config.samples} held-out samples of {', '.join(config.datasets)}, {config.max_new_tokens} new tokens each. "
           f"Intervals: 95 %, bootstrapped over samples. Versions: "
           + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", "",
           "## Training", ""]
  parts += table(["drafter", "parameters", "loss", "tau (training)", "tokens/s"],
                 [[label, f"{t['parameters'] / 1e6:.1f} M", f"{t['loss']:.3f}", f"{t['tau']:.2f}",
                   f"{t['tokens_per_second']:.0f}"] for label, t in trained.items()])
  parts += ["", "## Evaluation", ""] + (settings.out / "evaluation" / "results.md").read_text().splitlines()
  parts += ["", f"## Accepted length less that of {found['results'][0]['drafter']}, on the same samples", ""]
  parts += table(["drafter", "dataset", "mode", "difference", "95 % interval"],
                 [[g["drafter"], g["dataset"], g["mode"], f"{g['difference']:+.3f}",
                   "{:+.3f} to {:+.3f}".format(*g["interval"])] for g in gaps])
  if figures:
    parts += ["", "## Figures", ""]
    parts += [f"![{name}]({Path(path).relative_to(settings.out)})" for name, path in figures.items()]
  parts += ["", "## Settings", ""]
  for label, run in runs.items():
    plain = {k: v for k, v in dataclasses.asdict(run).items() if k in ("drafter", "loss", "optimizer", "anchors", "seed")}
    parts.append(f"- `{label}`: `{json.dumps(plain, default=str)}`")
  return "\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
  """Lines of a Markdown table."""
  line = lambda cells: "| " + " | ".join(cells) + " |"
  return [line(head), line(["---"] * len(head)), *map(line, rows)]


if __name__ == "__main__":
  program.run(main, Settings)
