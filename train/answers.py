"""Have a target answer questions, in batches, as training data for a drafter.

When to use it: a drafter learns best from the target's own words (DSpark, 4.1). Questions come from a JSONL file, or
from Python's own standard library, which every machine has. A run that is killed goes on where it stopped.

    python -m train.answers --target smollm2 --out runs/answers.jsonl --minutes 4
    python -m train.answers --target Qwen/Qwen3-4B --questions prompts.jsonl --out answers.jsonl --temperature 0.7

Each line of the output holds one conversation in tokens: {"id", "tokens", "loss_mask"}, answer tokens supervised.
The last line of stdout is a JSON object with the keys answers, tokens, tokens_per_second and out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding.session import PROMPT_BUCKET
from dspark_jax.loading import locate_target
from infer import program


@dataclasses.dataclass
class Settings:
  target: str
  """GGUF file, Hugging Face folder or id, or smollm2"""
  out: Path
  """JSONL file; lines that are there already are kept and not asked again"""
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
  dtype: str = "float32"


def main(settings: Settings) -> dict:
  with program.stderr.status("loading"):
    tokenizer = chat.load_tokenizer(locate_target(settings.target))
    target = dspark_jax.load_target(settings.target, dtype=settings.dtype)
  return answer(settings, target, tokenizer, read_questions(settings))


def read_questions(settings: Settings) -> list[tuple[str, str]]:
  """(id, text) per question. ValueError names the file and line that holds none."""
  if settings.questions is None:
    return [(q.id, q.question) for q in split(stdlib_questions())[0]]
  questions = []
  for number, line in enumerate(settings.questions.read_text().split("\n"), 1):  # not splitlines: JSON may hold U+2028
    if not line.strip():
      continue
    try:
      text = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
      text = None
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'{settings.questions}, line {number} is no question: expected {{"prompt": TEXT}}')
    questions.append((str(number), text))
  return questions


def answer(settings: Settings, target, tokenizer, questions: list[tuple[str, str]]) -> dict:
  """Asks what is not answered yet, a batch at a time, and appends every batch whole."""
  settings.out.parent.mkdir(parents=True, exist_ok=True)
  known, broken = answered(settings.out)
  if broken is not None:
    os.truncate(settings.out, broken)  # a line that a kill cut in the middle
  prompts = [(name, chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]))
             for name, text in questions if name not in known]
  prompts = [(n, ids) for n, ids in prompts if len(ids) <= settings.max_prompt_tokens]
  prompts = prompts[:None if settings.count is None else max(settings.count - len(known), 0)]
  stops, began, tokens, done = chat.stop_ids(tokenizer), time.monotonic(), 0, 0
  with program.bar() as bar, settings.out.open("a") as out:
    name = f"answers, for {settings.minutes:g} minutes" if settings.minutes else "answers"
    task = bar.add_task(name, total=len(prompts), note="the first batch, with its compilation")
    while done < len(prompts) and not (done and settings.minutes and time.monotonic() - began > settings.minutes * 60):
      part = prompts[done:done + settings.batch]
      padded = part + part[-1:] * (settings.batch - len(part))  # one compilation: the last batch is filled up
      replies = dspark_jax.generate(target, None, [ids for _, ids in padded], max_new_tokens=settings.max_new_tokens,
                                    temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                                    seed=settings.seed + done, stop_token_ids=stops).tokens
      out.write("".join(json.dumps({"id": name, "tokens": ids + reply, "loss_mask": [0] * len(ids) + [1] * len(reply)})
                        + "\n" for (name, ids), reply in zip(part, replies)))
      out.flush()
      done += len(part)
      tokens += sum(map(len, replies[:len(part)]))
      bar.update(task, completed=done, note=f"{tokens / (time.monotonic() - began):.0f} tokens/s")
  seconds = time.monotonic() - began
  return dict(answers=len(known) + done, tokens=tokens, tokens_per_second=tokens / seconds, out=str(settings.out))


def answered(path: Path) -> tuple[set[str], int | None]:
  """(ids of the whole lines of an output file, where a broken last line begins or None)."""
  if not path.exists():
    return set(), None
  known, at = set(), 0
  for line in path.read_bytes().splitlines(keepends=True):
    if not line.endswith(b"\n"):
      return known, at
    known.add(json.loads(line)["id"])
    at += len(line)
  return known, None


if __name__ == "__main__":
  program.run(main, Settings)
