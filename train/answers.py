"""Have a target answer questions, in batches or by servers, as training data for a drafter.

When to use it: a drafter learns best from the target's own words (DSpark, 4.1). Questions come from a JSONL file, from
a dataset on the Hugging Face hub, or from Python's own standard library, which every machine has. A line has {"prompt":
TEXT}, {"messages": [...]} or ShareGPT's {"conversations": [...]}, and maybe "tools" and "chat_template_kwargs": what a
user says in it is asked turn by turn, with the target's own replies between. A run that is killed goes on where it
stopped.

    python -m train.answers --target smollm2 --out runs/answers.jsonl --minutes 4
    python -m train.answers --target Qwen/Qwen3-4B --questions prompts.jsonl --out answers.jsonl --temperature 0.7 \
        --top-p 0.8 --top-k 20 --max-new-tokens 4096 --servers http://host1:8000/v1 http://host2:8000/v1

With --servers any number of vLLM or SGLang servers answer, many questions at once; the sampling above is the
reference's for Qwen3 without thinking. A key is read from the environment variable OPENAI_API_KEY.

Each line of the output holds one conversation in tokens: {"id", "tokens", "loss_mask", "finish"}, answer tokens
supervised (more lines with "part" where the chat template rewrites past replies), and of servers "text", how replies
begin; or, of servers that return no tokens, {"id", "messages", ...}. "finish" says of each reply whether it ended
("stop") or was cut ("length"). What has no answer is in OUT's .failed.jsonl, with the reason, and is asked again when
the command is given again. What answers depend on (target, template, questions, sampling) is in OUT.run.json: a file
has the answers of one run alone.
The last line of stdout is a JSON object with the keys answers, tokens, tokens_per_second, out and failed (how many, by
reason).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from dspark_jax.data import chat, prompts
from dspark_jax.data.prompts import Conversation
from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.decoding.session import PROMPT_BUCKET, Session
from dspark_jax.loading import target_id
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import run_folder, shell
from train.replies import LeftOut, Outcome, Reply, Unanswered, outcome
from train.servers import Fleet, seed_text

ALL_WRONG = 20  # failures before the first answer after which nobody expects one


@dataclasses.dataclass
class Settings:
  target: str | None = None
  """GGUF file, Hugging Face folder or id, or smollm2; of --servers the name that they serve it by (default: their only
  one)"""
  out: Path = Path("runs/answers.jsonl")
  """.jsonl file; lines that are there already are kept and not asked again"""
  questions: Path | None = None
  """JSONL, a prompt or conversation per line; default: questions about the standard library (the training part)"""
  dataset: str | None = None
  """instead of a file: a dataset on the Hugging Face hub (owner/name); needs the library `datasets`, and a network"""
  split: str = "train"
  """of the dataset"""
  minutes: float | None = None
  """stop after this long, at the end of a batch (always at least one); servers finish what is begun"""
  count: int | None = None
  """stop after so many answers"""
  batch: int = 32
  max_new_tokens: int = 128
  max_prompt_tokens: int = PROMPT_BUCKET
  """longer questions are left out, and conversations end there; servers have limits of their own"""
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  thinking: bool = False
  """let the target think before it answers, where its chat template can and the line does not say"""
  seed: int = 0
  servers: tuple[str, ...] = ()
  """URLs of OpenAI-compatible servers of the target, which answer in our stead"""
  concurrency: int = 64
  """requests at once to each server"""
  retries: int = 5
  """of a request, on any of the servers, ever longer after the one before"""
  timeout: float = 600.0
  """seconds for a reply"""
  token_ids: bool = True
  """ask servers for tokens (vLLM has them), which are exactly what was said; off for those that refuse the field"""
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  check(settings)
  conversations = read_questions(settings)
  if not conversations.count:
    raise ValueError(f"{settings.questions or settings.dataset} holds no question, expected at least one")
  with run_folder.owned(settings.out):
    if settings.servers:
      return answer_by_servers(settings, conversations)
    return answer(settings, *shell.load(settings.target, settings.dtype, settings.kernels), conversations)


def check(settings: Settings) -> None:
  """ValueError for what can be seen to be wrong before anything is read."""
  shell.at_least(settings, batch=1, max_prompt_tokens=1, concurrency=1, retries=0)
  shell.check_decoding(settings)
  if settings.minutes is not None and not settings.minutes > 0 or settings.count is not None and settings.count < 1:
    raise ValueError(f"minutes is {settings.minutes} and count {settings.count}, expected numbers above 0 where given")
  if not settings.timeout > 0:
    raise ValueError(f"timeout is {settings.timeout}, expected seconds above 0")
  if settings.out.suffix != ".jsonl":
    raise ValueError(f"out is {settings.out}, expected a name that ends in .jsonl, by which train.train knows its data")
  if settings.questions and settings.dataset:
    raise ValueError(f"questions is {settings.questions} and dataset {settings.dataset}, expected one of the two")
  if not settings.target and not settings.servers:
    raise ValueError("there is nobody to answer: give --target, or --servers that serve it")


class Questions:
  """Conversations that are read again each time they are asked for: there may be more than the memory holds."""

  def __init__(self, read: Callable[[], Iterable[Conversation]]):
    self.read, self.count, self.digest = read, 0, ""
    for conversation in read():
      self.count += 1
      self.digest = run_folder.digest(self.digest.encode(), conversation.told().encode())

  def __iter__(self) -> Iterator[Conversation]:
    return iter(self.read())


def read_questions(settings: Settings) -> Questions:
  """All that is asked. ValueError names the file and line that holds none."""
  if settings.questions:
    return Questions(lambda: prompts.read_prompts(settings.questions))
  if settings.dataset:
    return Questions(lambda: prompts.read_dataset(settings.dataset, settings.split))
  found = prompts.of_questions(split(stdlib_questions())[0])
  return Questions(lambda: found)


def describe(settings: Settings, target: str, questions: Questions, **more: Any) -> dict:
  """What the answers depend on. Not the batch, the servers, nor how many are asked for: seeds are by question."""
  names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
  config = {name: getattr(settings, name) for name in names} | {"target": target}
  # None, as in records of before it could be set.
  config |= {"thinking": settings.thinking or None, "by": "servers" if settings.servers else None}
  return {"program": "train.answers", "config": config, "data": questions.digest} | more


def answer(settings: Settings, target, tokenizer, questions: Questions) -> dict:
  """Asks what is not answered yet, a batch at a time, and appends every batch whole. The caller owns the file."""
  date = run_folder.date_of(settings.out)
  named = target_id(target, run_folder.recorded(settings.out, "config", "target"))
  record = describe(settings, named, questions, date=str(date), **run_folder.encoding(tokenizer))
  record["config"]["dtype"] = settings.dtype
  run_folder.claim(settings.out, record)
  with Progress(settings, questions) as progress:
    session, todo = Session(target, batch=settings.batch), progress.todo()
    while not progress.over() and (part := progress.next_batch(todo)):
      progress.finish(ask(settings, session, tokenizer, part, date))
  return progress.result()


def answer_by_servers(settings: Settings, questions: Questions) -> dict:
  """Asks servers what is not answered yet, and appends every answer as it comes. The caller owns the file."""
  fleet = Fleet(settings)
  run_folder.claim(settings.out, describe(settings, fleet.find_model(), questions))
  with Progress(settings, questions) as progress:
    more = lambda under_way: not progress.over() and progress.room(under_way)
    asyncio.run(fleet.answer(progress.todo(), more, progress.finish))
  return progress.result()


def ask(settings: Settings, session: Session, tokenizer, part: list[Conversation], date) -> list[Outcome]:
  """Of one batch, in its order: turn by turn, a conversation that has outgrown the prompts' length being left out."""
  said, replies, failed = {c.id: [] for c in part}, {c.id: [] for c in part}, {}
  stops, most = chat.stop_ids(tokenizer), settings.max_prompt_tokens
  for turn in range(max(len(c.turns) for c in part)):
    asked = {}
    for c in (c for c in part if turn < len(c.turns) and len(replies[c.id]) == turn and c.id not in failed):
      said[c.id] += c.turns[turn]
      try:
        ids = chat.encode_prompt(tokenizer, said[c.id], tools=c.tools, date=date,
                                 enable_thinking=c.thinks(settings.thinking))
      except ValueError as error:
        failed[c.id] = Unanswered("refused by the chat template or the tokenizer", str(error))
        continue
      if len(ids) <= most:
        asked[c.id] = ids
      elif turn == 0:
        failed[c.id] = LeftOut("a prompt longer than max_prompt_tokens", f"it has {len(ids)} tokens, not {most}")
    if not asked:
      break
    # By question: an answer must not depend on the batch, nor on where a run stopped.
    seeds = [zlib.crc32(seed_text(settings.seed, name, turn).encode()) for name in asked]
    found = dict(session.stream(list(asked.values()), max_new_tokens=settings.max_new_tokens, seeds=seeds,
                                temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                                stop_token_ids=stops))
    for row, (name, ids) in enumerate(asked.items()):
      new = list(found[row].tokens)
      # In tokens, not in text: encoding the text again need not give what the target wrote.
      message = {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True), "tokens": new}
      said[name].append(message)
      replies[name].append(Reply(message, "stop" if new and new[-1] in stops else "length", ids, new, len(new)))
  return [Outcome(c.id, failed=failed[c.id]) if c.id in failed else
          outcome(c, replies[c.id], c.thinks(settings.thinking), len(c.turns) - len(replies[c.id])) for c in part]


class Progress:
  """What is answered, in the file, on the bar and in numbers."""

  def __init__(self, settings: Settings, questions: Questions):
    self.settings, self.questions = settings, questions
    self.known = answered(settings.out)
    self.failed_out = settings.out.with_name(f"{settings.out.stem}.failed.jsonl")
    # By question. They are asked again, but the time or the count may be over before: what they were told stays.
    lines = run_folder.read_lines(self.failed_out, lambda line: (line["id"], line)) if self.known else []
    self.unanswered = {name: line for name, line in lines if name not in self.known}
    self.failed, self.wrong, self.new, self.tokens, self.unasked = collections.Counter(), 0, 0, 0, 0
    self.began = time.monotonic()
    self.seconds, self.bar = 0.0, shell.bar()

  def __enter__(self) -> Progress:
    self.bar.start()
    left = self.questions.count - len(self.known)
    if self.settings.count:
      left = min(left, max(self.settings.count - len(self.known), 0))
    # The bar counts towards all questions, and time usually ends it: so the name says when.
    name = f"answers, for {self.settings.minutes:g} minutes" if self.settings.minutes else "answers"
    note = "" if self.settings.servers else "the first batch, with its compilation"
    self.task = self.bar.add_task(name, total=left, note=note)
    return self

  def __exit__(self, *_) -> None:
    self.seconds = time.monotonic() - self.began
    self.bar.stop()
    if self.unanswered:
      shell.write(self.failed_out, "".join(json.dumps(line) + "\n" for line in self.unanswered.values()))
    else:
      self.failed_out.unlink(missing_ok=True)

  def todo(self) -> Iterator[Conversation]:
    """What is to be asked; what cannot be asked at all is told apart on the way."""
    for conversation in self.questions:
      if conversation.id not in self.known:
        if conversation.problem:
          self.finish([Outcome(conversation.id, failed=LeftOut(conversation.problem))])
        else:
          yield conversation

  def next_batch(self, todo: Iterator[Conversation]) -> list[Conversation]:
    """As many as the batch takes, and as are still wanted."""
    room = self.settings.batch
    if self.settings.count:
      room = min(room, self.settings.count - len(self.known) - self.new)
    return list(itertools.islice(todo, max(room, 0)))

  def room(self, under_way: int) -> bool:
    """Whether one more is wanted, if all that are under way are answered."""
    return not self.settings.count or len(self.known) + self.new + under_way < self.settings.count

  def over(self) -> bool:
    """Whether the time is."""
    # At least one batch: a minute that went by in compilation should not leave an empty file.
    begun = self.new or self.failed
    return bool(begun and self.settings.minutes and time.monotonic() - self.began > self.settings.minutes * 60)

  def finish(self, outcomes: list[Outcome]) -> None:
    """Keeps what became of some questions. ValueError when all of the first ones failed."""
    good, bad = [o for o in outcomes if not o.failed], [o for o in outcomes if o.failed]
    if good:
      run_folder.append(self.settings.out, [line for o in good for line in o.lines])
    for o in good:
      self.unanswered.pop(o.id, None)
    if bad:
      lines = {o.id: {"id": o.id, "reason": o.failed.reason, "detail": o.failed.detail} for o in bad}
      run_folder.append(self.failed_out, list(lines.values()))
      self.unanswered |= lines
    self.new += len(good)
    self.tokens += sum(o.tokens for o in good)
    self.unasked += sum(o.unasked for o in good)
    self.failed.update(o.failed.reason for o in bad)
    self.wrong += sum(not isinstance(o.failed, LeftOut) for o in bad)
    seconds = max(time.monotonic() - self.began, 1e-9)
    failed = f", {self.failed.total()} failed" if self.failed else ""
    self.bar.update(self.task, advance=len(outcomes),
                    note=f"{self.new / seconds:.1f} answers/s, {self.tokens / seconds:.0f} tokens/s{failed}")
    if bad and self.wrong >= ALL_WRONG:
      self.check_some(bad[-1].failed.detail)

  def check_some(self, detail: str = "") -> None:
    """ValueError when there are failures and no answer."""
    if self.failed and not self.known and not self.new:
      reasons = ", ".join(f"{count} {reason}" for reason, count in self.failed.most_common())
      raise ValueError(f"none of {self.failed.total()} questions was answered ({reasons}"
                       f"{f'; {detail}' if detail else ''}): {self.failed_out} has them all")

  def result(self) -> dict:
    """What the program prints, once all is asked. ValueError when nothing was answered."""
    self.check_some()
    if self.unasked:
      shell.say(f"{self.unasked} turns were not asked, their conversations had more than max_prompt_tokens "
                f"({self.settings.max_prompt_tokens}) tokens")
    if self.failed:
      reasons = ", ".join(f"{count} {reason}" for reason, count in self.failed.most_common())
      shell.say(f"{self.failed.total()} questions have no answer ({reasons}): {self.failed_out} has them")
    return dict(answers=len(self.known) + self.new, tokens=self.tokens, out=str(self.settings.out),
                tokens_per_second=self.tokens / self.seconds, failed=dict(self.failed))


def answered(out: Path) -> set[str]:
  """The questions whose answers are in the file whole; what a kill left of another's lines is cut off."""
  # The ids alone: a file of answers may be larger than the memory that is left beside the target.
  parse = lambda record: (record["id"], *record.get("part", (1, 1)))
  lines = run_folder.read_lines(out, parse, remedy="delete the line, its question is asked again then")
  if lines and lines[-1][1] < lines[-1][2]:
    whole = len(lines) - lines[-1][1]
    with out.open("rb") as file:
      os.truncate(out, sum(map(len, itertools.islice(file, whole))))
    lines = lines[:whole]
  return {name for name, *_ in lines}


if __name__ == "__main__":
  shell.run(main, Settings)
