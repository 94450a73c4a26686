"""The whole main job on one machine: a real model gets a drafter, and writes the same text in fewer, larger steps.

SmolLM2-135M-Instruct answers questions about Python's standard library, a DSpark drafter is trained on the answers, and
on questions about modules it has never seen both ways of decoding are timed side by side. `make demo` runs this.

    python -m train.demo --minutes 8
    python -m train.demo --minutes 1 --out runs/quick

A demo that is killed goes on where it was. It leaves answers.jsonl, the training run and demo.png in the output folder.
The last line of stdout is a JSON object with the table's numbers.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which looks for a screen
from rich.table import Table

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding import acceptance
from dspark_jax.decoding.generate import Generation
from dspark_jax.decoding.session import PROMPT_BUCKET, Session
from dspark_jax.loading import locate_target, target_config
from dspark_jax.programs import run_folder, shell
from train import answers, train
from train.config import TrainConfig, read_config


@dataclasses.dataclass
class Settings:
  minutes: float = 8
  """of training; answering the questions takes as long again, once"""
  out: Path = Path("runs/demo")
  config: str = "configs/demo.py"
  held_out: int = 12
  """questions to evaluate on, about modules that are not in the training data"""
  new_tokens: int = 128
  """per evaluated question"""


def main(settings: Settings) -> dict:
  config = dataclasses.replace(read_config(settings.config), minutes=settings.minutes, out=settings.out,
                               data=(settings.out / "answers.jsonl",))
  config.mesh.refuse(settings.config)
  with run_folder.owned(settings.out):
    train.check_target(config, target_config(locate_target(config.target)))
    return demonstrate(settings, config)


def demonstrate(settings: Settings, config: TrainConfig) -> dict:
  """Answers, training and comparison, of which what is done stays done; returns what the program prints."""
  # In float32 greedy text is the same token for token, whatever wrote it; for training it is cast as the config says.
  target, tokenizer = shell.load(config.target, "float32", config.kernels)
  # 192: with the longest question (64 tokens) an answer fills a training row. 64 rows read each weight once for all.
  ask = answers.Settings(config.target, config.data[0], minutes=settings.minutes, batch=64, max_new_tokens=192)
  if run_folder.is_begun(settings.out):  # a run that began keeps its data
    run_folder.read_record(settings.out, train.PROGRAM, {"total_steps": int})
  else:
    shell.say("the target answers questions about Python's standard library")
    with run_folder.owned(ask.out):
      answers.answer(ask, target, tokenizer, answers.read_questions(ask))
  shell.say("a drafter learns from the answers")
  trained = train.train(config, target, tokenizer)
  if train.is_stopped(config, trained):
    return {"training": trained}  # the same command goes on
  drafter = dspark_jax.load_drafter(settings.out, target)
  shell.say("both ways of decoding, on questions about modules that were not in the training data")
  result = compare(settings, target, drafter, tokenizer)
  picture(settings.out, result)
  shell.say(table(result))
  shell.say(f"picture: {settings.out / 'demo.png'}")
  return {"training": trained, **result}


def compare(settings: Settings, target, drafter, tokenizer) -> dict:
  """Plain and speculative greedy decoding of held-out questions at batch 1, timed in turn."""
  questions = [chat.encode_prompt(tokenizer, [{"role": "user", "content": q.question}])
               for q in split(stdlib_questions())[1]]
  questions = [ids for ids in questions if len(ids) <= PROMPT_BUCKET]
  questions = questions[::max(len(questions) // settings.held_out, 1)][:settings.held_out]
  sessions = {"plain": Session(target), "speculative": Session(target, drafter)}
  how = dict(max_new_tokens=settings.new_tokens, stop_token_ids=chat.stop_ids(tokenizer))
  text, seconds = {"plain": [], "speculative": []}, {"plain": 0.0, "speculative": 0.0}
  with shell.bar() as bar:
    task = bar.add_task("decoding", total=len(questions), note="compiling")
    for prompt in questions:
      # In turn, question by question: what else the machine does falls on both.
      for name, session in sessions.items():
        (batch,) = session.prepare([prompt], **how)
        if not text[name]:  # one bucket, so one program, compiled and warm before the clock starts
          batch.run()
        began = time.perf_counter()
        (out,) = batch.run()
        seconds[name] += time.perf_counter() - began
        text[name].append(out)
      bar.update(task, advance=1, note="")
  plain, fast = Generation.of(text["plain"]), Generation.of(text["speculative"])
  count = sum(map(len, plain.tokens))
  kept, reached, _ = acceptance.positions(*map(np.concatenate, (fast.n_accept, fast.n_verify)), drafter.block_size)
  return dict(identical=plain.tokens == fast.tokens, tokens=count, rounds=fast.rounds,
              plain_tokens_per_second=count / seconds["plain"],
              speculative_tokens_per_second=count / seconds["speculative"],
              speedup=seconds["plain"] / seconds["speculative"], accepted_length=fast.accepted_length,
              acceptance=[float(k / n) if n else None for k, n in zip(kept, reached)])


def table(result: dict) -> Table:
  """The result for people."""
  out = Table("held-out questions, temperature 0, batch 1", "plain", "speculative")
  out.add_row("tokens/s", f"{result['plain_tokens_per_second']:.1f}",
              f"{result['speculative_tokens_per_second']:.1f}  ({result['speedup']:.2f}x)")
  out.add_row("accepted length (tokens per step)", "1.00", f"{result['accepted_length']:.2f}")
  for position, rate in enumerate(result["acceptance"], 1):
    out.add_row(f"acceptance at position {position}, given all before", "", "-" if rate is None else f"{rate:.0%}")
  out.add_row("identical text", "", "yes" if result["identical"] else "NO")
  return out


def picture(folder: Path, result: dict) -> None:
  """demo.png: the training curve, and acceptance by position."""
  log = run_folder.read_lines(folder / train.LOG)
  figure = Figure(figsize=(10, 3.6), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.plot([r["step"] for r in log], [r["tau"] for r in log], color="tab:blue")
  left.set(xlabel="optimizer step", ylabel="tau (expected accepted length)", title="training")
  loss = left.twinx()
  loss.plot([r["step"] for r in log], [r["loss"] for r in log], color="tab:orange", alpha=0.7)
  loss.set_ylabel("loss", color="tab:orange")
  rates = [0.0 if a is None else a for a in result["acceptance"]]
  right.bar(range(1, len(rates) + 1), rates, color="tab:blue")
  right.set(xlabel="draft position", ylabel="accepted, given all before", ylim=(0, 1), xticks=range(1, len(rates) + 1),
            title=f"held-out: {result['accepted_length']:.2f} tokens per step, {result['speedup']:.2f}x plain")
  shell.write(folder / "demo.png", shell.image(figure))


if __name__ == "__main__":
  shell.run(main, Settings)
