"""Measure plain and speculative decoding on this machine: all numbers in one run, so that their ratios mean something.

When to use it: to see whether a drafter pays here, and where a round's time goes. Prompts are questions about Python's
standard library that no demo was trained on, or yours; where a target has no tokenizer they are random tokens, and the
accepted length means nothing. --transformers adds Hugging Face's own greedy decoding of the same weights (extra
`bench`).

    python -m infer.bench --target smollm2 --drafter runs/demo
    python -m infer.bench --target smollm2 --drafter random --layers 5 --block-size 7 --markov-rank 256 --transformers

The last line of stdout is a JSON object: per batch size tokens_per_second plain and speculative, and seconds of a plain
step, a draft, a verification and a round; with --transformers also the seconds of one of its steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import dspark_jax
from dspark_jax import sampling as sp
from dspark_jax.data import chat
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding.generate import Generation, start
from dspark_jax.decoding.round import Models, Rows
from dspark_jax.decoding.session import Session
from dspark_jax.decoding.verify import verify
from dspark_jax.drafters.dspark import DSparkChoices, DSparkConfig
from dspark_jax.loading import locate_target
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import shell
from infer import generate

SHORT = 8  # new tokens of the run that a longer one is compared with


@dataclasses.dataclass
class Settings:
  target: str
  drafter: str
  """drafter folder or run, or random: untrained weights, which tell what a round costs but not what it brings"""
  batches: tuple[int, ...] = (1, 4, 16)
  prompts: Path | None = None
  """JSONL as for infer.generate, of lines without settings of their own; default: held-out questions about the standard
  library"""
  prompt_tokens: int = 48
  """longer prompts are left out"""
  new_tokens: int = 96
  repeats: int = 3
  """the fastest of so many is reported"""
  transformers: bool = False
  """time Hugging Face transformers too (extra `bench`), at batch 1"""
  layers: int = 5
  """of a random drafter"""
  block_size: int = 7
  """of a random drafter"""
  markov_rank: int = 256
  """of a random drafter"""
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  shell.at_least(settings, prompt_tokens=1, new_tokens=2, repeats=1, layers=1, block_size=1, markov_rank=0)
  if not settings.batches or min(settings.batches) < 1:
    raise ValueError(f"batches are {settings.batches}, expected one or more numbers of at least 1")
  if settings.transformers and settings.new_tokens <= SHORT:
    raise ValueError(f"new_tokens is {settings.new_tokens}, expected more than {SHORT} with --transformers: its step "
                     f"is the difference of two lengths")
  if settings.transformers and 1 not in settings.batches:
    raise ValueError(f"batches are {', '.join(map(str, settings.batches))}, expected 1 among them with --transformers, "
                     f"which is timed at batch 1")
  if settings.transformers and not importlib.util.find_spec("torch"):
    raise ValueError("--transformers needs torch, which is not installed: pip install -e '.[bench]'")
  prompts = read_prompts(settings)
  shell.check_drafter(settings.drafter, "random")
  with shell.stderr.status("loading"):
    target = shell.load_target(settings.target, settings.dtype, settings.kernels)
    if settings.drafter == "random":
      cast = lambda x: x.astype(settings.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
      drafter = jax.tree.map(cast, random_drafter(settings, target))  # which is made in float32, as training has it
    else:
      drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
  rows = []
  with shell.bar() as bar:
    task = bar.add_task("measuring", total=len(settings.batches), note="")
    for batch in settings.batches:
      rows.append(measure(settings, target, drafter, prompts_of(settings, target, prompts, batch)))
      bar.update(task, advance=1)
  result = {"block_size": drafter.block_size, "batches": rows}
  if settings.transformers:
    result["transformers_step_seconds"] = transformers_step(settings)
    result["speedup_over_transformers"] = result["transformers_step_seconds"] / next(
        row["plain_step_seconds"] for row in rows if row["batch"] == 1)
  shell.say(table(rows))
  return result


def random_drafter(settings: Settings, target):
  """An untrained drafter of the asked size over the target's whole vocabulary."""
  layers = target.config.num_layers
  # Five, evenly from layer 1 to the last but two: of 36 layers 1, 9, 17, 25, 33, as released. Few layers give fewer.
  taps = tuple(sorted({round(1 + i * (layers - 4) / 4) for i in range(5)}))
  choices = DSparkChoices(num_layers=settings.layers, taps=taps, block_size=settings.block_size,
                          markov_rank=settings.markov_rank, confidence="markov" if settings.markov_rank else "none")
  return dspark_jax.new_drafter(DSparkConfig.for_target(choices, target.config))


def read_prompts(settings: Settings) -> list[list[int]] | None:
  """Prompts in tokens, none longer than asked for; None without a tokenizer. ValueError for a line with settings."""
  path = locate_target(settings.target)
  if settings.prompts is None and path.is_dir() and not (path / "tokenizer.json").exists():
    shell.say(f"{settings.target} has no tokenizer: prompts are random tokens, so the accepted length means nothing")
    return None
  tokenizer = chat.load_tokenizer(path)
  if settings.prompts is None:
    asked = [{"prompt": q.question} for q in split(stdlib_questions())[1]]
    found = [generate.encode(generate.Settings(settings.target, "none"), tokenizer, line) for line in asked]
  else:
    asked = generate.Settings(settings.target, "none", prompts=settings.prompts)
    found = list(map(tokens_of, generate.read_prompts(asked, tokenizer)))
  kept = [tokens for tokens in found if len(tokens) <= settings.prompt_tokens]
  if not kept:
    raise ValueError(f"none of {len(found)} prompts has at most {settings.prompt_tokens} tokens: raise "
                     f"--prompt-tokens, or give shorter ones")
  return kept


def tokens_of(prompt: generate.Prompt) -> list[int]:
  """ValueError for a line's own settings: all prompts are decoded alike here."""
  own = {name: value for name, value in dataclasses.asdict(prompt.asked).items() if value is not None}
  if own:
    raise ValueError(f"{prompt.where} has settings of its own, {', '.join(f'{k} {v}' for k, v in own.items())}, "
                     f"expected none, as all prompts are measured alike: remove them")
  return prompt.tokens


def prompts_of(settings: Settings, target, prompts: list[list[int]] | None, batch: int) -> list[list[int]]:
  """A batch of prompts, the first ones again where there are too few."""
  if prompts is not None:
    return list(itertools.islice(itertools.cycle(prompts), batch))
  # From 10 on: the first ids of a vocabulary are its special tokens, which no text is full of.
  size = (batch, settings.prompt_tokens)
  return np.random.default_rng(0).integers(10, target.vocab_size, size).tolist()


def measure(settings: Settings, target, drafter, prompts: list[list[int]]) -> dict:
  """Throughput and the parts of a round at one batch size."""
  batch = len(prompts)
  out = {"batch": batch}
  for name, chosen in (("plain", None), ("speculative", drafter)):
    # Without stop tokens: rows that end early would make their batch look slow.
    (work,) = Session(target, chosen, budget=None).prepare(prompts, max_new_tokens=settings.new_tokens)
    work.compile()
    seconds, texts = fastest(work.run, settings.repeats)
    models, requests, slots = Models.of(target, chosen), work.args[2], work.static["capacity"]
    begin = jax.jit(start, static_argnums=2).lower(models, requests, slots).compile()
    # The prompt is timed apart: with it a step would seem dearer the fewer of them follow.
    prompt_seconds, begun = fastest(lambda: begin(models, requests), settings.repeats)
    rounds = max(len(text.n_accept) for text in texts)
    out[f"{name}_tokens_per_second"] = batch * settings.new_tokens / seconds
    out["plain_step_seconds" if chosen is None else "round_seconds"] = (seconds - prompt_seconds) / rounds
    if chosen is not None:
      out["accepted_length"] = Generation.of(texts).accepted_length
      out |= parts(settings, models, begun)
  out["round_in_plain_steps"] = out["round_seconds"] / out["plain_step_seconds"]
  return out


def parts(settings: Settings, models: Models, rows: Rows) -> dict:
  """Seconds of one draft and of one verification, each repeated inside one program."""
  times = 8  # so that the start of a program, which a round inside the loop does not have, weighs an eighth

  def propose(models, rows, anchor):
    return models.drafter.propose(models.target, models.draft_head, rows.draft, anchor, rows.keys,
                                  rows.settings.sampling)

  def draft(models, rows):
    return jax.lax.fori_loop(0, times, lambda _, anchor: propose(models, rows, anchor).tokens[:, -1], rows.anchor)

  def check(models, rows):
    proposal = propose(models, rows, rows.anchor)
    def body(_, carry):
      anchor, cache = carry
      out, cache = models.target(jnp.concatenate([anchor[:, None], proposal.tokens], 1), cache, models.taps)
      verdict = verify(models.head(out.hidden), proposal, rows.settings.sampling, accept_keys=rows.keys,
                       bonus_keys=sp.split_keys(rows.keys, 1)[0])
      return verdict.next_token, cache
    return jax.lax.fori_loop(0, times, body, (rows.anchor, rows.cache))[0]

  seconds = {}
  for name, function in (("draft_seconds", draft), ("verification_seconds", check)):
    compiled = jax.jit(function).lower(models, rows).compile()
    seconds[name] = fastest(lambda: compiled(models, rows), settings.repeats)[0] / times
  seconds["verification_seconds"] -= seconds["draft_seconds"] / times  # its program drafts once
  return seconds


def fastest(function, repeats: int):
  """(seconds of the fastest of `repeats` calls after one to warm up, its result)"""
  # The fastest, not the mean: what other work on the machine adds is never negative.
  result, best = jax.block_until_ready(function()), float("inf")
  for _ in range(repeats):
    began = time.perf_counter()
    result = jax.block_until_ready(function())
    best = min(best, time.perf_counter() - began)
  return best, result


def transformers_step(settings: Settings) -> float:
  """Seconds of a greedy step of Hugging Face transformers with the same weights, dtype, cache and length."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  from dspark_jax.checkpoints.gguf import read_gguf
  path, dtype = locate_target(settings.target), getattr(torch, settings.dtype)
  if path.is_file():
    config, tensors = read_gguf(path)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if v is not None})).to(dtype).eval()
    model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in tensors.items()}, strict=False)
    model.tie_weights()
  else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
  prompt = torch.randint(10, model.config.vocab_size, (1, settings.prompt_tokens))
  def run(new):
    began = time.perf_counter()
    # min_new_tokens: a stop token would end it early. The pad id is never used, and silences a warning.
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                   do_sample=False, pad_token_id=0)
    return time.perf_counter() - began
  with torch.no_grad():
    run(4)  # warms up
    # The difference of two lengths: the prompt's pass and what a call costs are in both.
    long, short = (min(run(n) for _ in range(settings.repeats)) for n in (settings.new_tokens, SHORT))
  return (long - short) / (settings.new_tokens - SHORT)


def table(rows: list[dict]) -> Table:
  """The result for people."""
  out = Table("batch", "plain tok/s", "spec. tok/s", "accepted length", "plain step ms", "draft ms", "verify ms",
              "round ms", "round / plain step")
  for r in rows:
    out.add_row(str(r["batch"]), f"{r['plain_tokens_per_second']:.1f}", f"{r['speculative_tokens_per_second']:.1f}",
                f"{r['accepted_length']:.2f}", *(f"{1e3 * r[k]:.1f}" for k in (
                    "plain_step_seconds", "draft_seconds", "verification_seconds", "round_seconds")),
                f"{r['round_in_plain_steps']:.2f}")
  return out


if __name__ == "__main__":
  shell.run(main, Settings)
