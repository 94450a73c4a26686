"""Have a target answer questions, in batches, as training data for a drafter.

When to use it: a drafter learns best from the target's own words (DSpark, 4.1). Questions come from a JSONL file, or
from Python's own standard library, which every machine has. A run that is killed goes on where it stopped.

    python -m train.answers --target smollm2 --out runs/answers.jsonl --minutes 4
    python -m train.answers --target Qwen/Qwen3-4B --questions prompts.jsonl --out answers.jsonl --temperature 0.7

Each line of the output holds one conversation in tokens: {"id", "tokens", "loss_mask"}, answer tokens supervised. What
they depend on (target, template, questions, sampling) is in OUT.run.json: a file has the answers of one run alone.
The last line of stdout is a JSON object with the keys answers, tokens, tokens_per_second and out.
"""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from pathlib import Path
from typing import Literal

from dspark_jax.data import chat
from dspark_jax.data.benchmarks import LINE_SETTINGS
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding.session import PROMPT_BUCKET, Session
from dspark_jax.loading import target_id
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import run_folder, shell
from dspark_jax.text import read_jsonl


@dataclasses.dataclass
class Settings:
  target: str
  """GGUF file, Hugging Face folder or id, or smollm2"""
  out: Path
  """.jsonl file; lines that are there already are kept and not asked again"""
  questions: Path | None = None
  """JSONL: {"prompt": TEXT} per line; default: questions about the standard library (the training part)"""
  minutes: float | None = None
  """stop after this long, at the end of a batch (always at least one)"""
  count: int | None = None
  """stop after so many answers"""
  batch: int = 32
  max_new_tokens: int = 128
  max_prompt_tokens: int = PROMPT_BUCKET
  """longer questions are left out"""
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  shell.at_least(settings, batch=1, max_prompt_tokens=1)
  shell.check_decoding(settings)
  if settings.minutes is not None and not settings.minutes > 0 or settings.count is not None and settings.count < 1:
    raise ValueError(f"minutes is {settings.minutes} and count {settings.count}, expected numbers above 0 where given")
  if settings.out.suffix != ".jsonl":
    raise ValueError(f"out is {settings.out}, expected a name that ends in .jsonl, by which train.train knows its data")
  questions = read_questions(settings)
  with run_folder.owned(settings.out):
    return answer(settings, *shell.load(settings.target, settings.dtype), questions)


def read_questions(settings: Settings) -> list[tuple[str, str]]:
  """(id, text) per question. ValueError names the file and line that holds none."""
  if settings.questions is None:
    return [(q.id, q.question) for q in split(stdlib_questions())[0]]
  questions = []
  for number, record in read_jsonl(settings.questions):
    if wrong := sorted(set(record) & LINE_SETTINGS):
      raise ValueError(f"{settings.questions}, line {number} has {', '.join(wrong)}, but all questions are asked under "
                       f"the settings of the command: remove it")
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'{settings.questions}, line {number} is no question: expected {{"prompt": TEXT}}')
    questions.append((str(number), text))
  return questions


def describe(settings: Settings, target, tokenizer, questions: list[tuple[str, str]], date) -> dict:
  """What the answers depend on. Not the batch, nor how many are asked for: seeds are by question."""
  names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "dtype")
  digest = lambda value: run_folder.digest(json.dumps(value).encode())
  return {"program": "train.answers", "date": str(date),
          "config": {name: getattr(settings, name) for name in names} | {"target": target_id(target)},
          "template": digest(tokenizer.chat_template), "data": digest(questions)}


def answer(settings: Settings, target, tokenizer, questions: list[tuple[str, str]]) -> dict:
  """Asks what is not answered yet, a batch at a time, and appends every batch whole. The caller owns the file."""
  date = run_folder.date_of(settings.out)
  run_folder.claim(settings.out, describe(settings, target, tokenizer, questions, date))
  # The ids alone: a file of answers may be larger than the memory that is left beside the target.
  known = set(run_folder.read_lines(settings.out, lambda record: record["id"],
                                    remedy="delete the line, its question is asked again then"))
  prompts = [(name, chat.encode_prompt(tokenizer, [{"role": "user", "content": text}], date=date))
             for name, text in questions if name not in known]
  prompts = [(n, ids) for n, ids in prompts if len(ids) <= settings.max_prompt_tokens]
  prompts = prompts[:None if settings.count is None else max(settings.count - len(known), 0)]
  stops, began, tokens, done = chat.stop_ids(tokenizer), time.monotonic(), 0, 0
  session = Session(target, batch=settings.batch)
  with shell.bar() as bar:
    # The bar counts towards all questions, and time usually ends it: so the name says when.
    name = f"answers, for {settings.minutes:g} minutes" if settings.minutes else "answers"
    task = bar.add_task(name, total=len(prompts), note="the first batch, with its compilation")
    # At least one batch: a minute that went by in compilation should not leave an empty file.
    while done < len(prompts) and not (done and settings.minutes and time.monotonic() - began > settings.minutes * 60):
      part = prompts[done:done + settings.batch]
      found = dict(session.stream([ids for _, ids in part], max_new_tokens=settings.max_new_tokens,
                                  temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                                  # By question: an answer must not depend on the batch, nor on where a run stopped.
                                  seeds=[zlib.crc32(f"{settings.seed}/{name}".encode()) for name, _ in part],
                                  stop_token_ids=stops))
      replies = [found[row].tokens for row in range(len(part))]
      run_folder.append(settings.out, [
          # In tokens, not in text: encoding the text again need not give what the target wrote.
          {"id": name, "tokens": ids + reply, "loss_mask": [0] * len(ids) + [1] * len(reply)}
          for (name, ids), reply in zip(part, replies)])
      done += len(part)
      tokens += sum(map(len, replies))
      bar.update(task, completed=done, note=f"{tokens / (time.monotonic() - began):.0f} tokens/s")
  seconds = time.monotonic() - began
  return dict(answers=len(known) + done, tokens=tokens, tokens_per_second=tokens / seconds, out=str(settings.out))


if __name__ == "__main__":
  shell.run(main, Settings)
