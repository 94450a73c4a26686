"""Generate text with a target and, optionally, a drafter: the same distribution, fewer steps.

When to use it: to try a drafter on prompts of your own, or to script generation from token ids.

    python -m infer.generate --target smollm2 --drafter none --prompt "What is a tuple?"
    python -m infer.generate --target smollm2 --drafter runs/demo --prompts prompts.jsonl --max-new-tokens 256

The last line of stdout is a JSON object with the keys tokens, text, n_accept (drafts kept per round), accepted_length
(tokens delivered per round, bonus included), rounds, tokens_per_second and compile_seconds; with --logprobs also
logprobs, of every token.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import dspark_jax
from dspark_jax.config import Range, from_json, to_json
from dspark_jax.data import chat
from dspark_jax.decoding import acceptance, score, session
from dspark_jax.decoding.calibration import mode_name
from dspark_jax.decoding.generate import Text
from dspark_jax.decoding.session import BUDGET, Session
from dspark_jax.decoding.verify import Rule
from dspark_jax.loading import drafter_id, locate_target, stored_temperatures, target_config, target_id
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import run_folder, shell
from dspark_jax.programs.openai_api import before
from dspark_jax.text import read_json, read_jsonl


NEWER = ("date", "prompts")  # parts of a record that older ones lack
HARMLESS = ("id", "custom_id", "metadata")  # of a line: names and notes, which change nothing


@dataclasses.dataclass
class Settings:
  target: str
  """GGUF file, Hugging Face folder or id, or smollm2"""
  drafter: str
  """drafter folder or training run; none for plain decoding"""
  prompt: str | None = None
  """one user message; the model's chat template is applied"""
  prompts: Path | None = None
  """JSONL: {"prompt": TEXT} or {"messages": [...]} per line, where a last message of the assistant is continued; a line
  may have "tools", and its own max_tokens, temperature, top_k, top_p and seed"""
  prompt_tokens: Path | None = None
  """JSON: [[ids...], ...]; needs no tokenizer"""
  allow_special: bool = False
  """control tokens that prompts spell (<|im_end|>, ...) are not text but control tokens: for prompts that you trust"""
  thinking: bool = False
  """let the target think before it answers, where its chat template can; drafters are trained on answers alone"""
  max_new_tokens: int = 128
  temperature: float = 0.0
  """0 is greedy"""
  top_k: int = 0
  """0 is off"""
  top_p: float = 1.0
  """1 is off"""
  seed: int = 0
  """row r uses seed + r"""
  stop_token_ids: tuple[int, ...] | None = None
  """default: the tokenizer's end of turn and of text; none with --prompt-tokens"""
  stop: tuple[str, ...] = ()
  """texts before which a reply is cut, whichever ends first; what was decoded beyond is thrown away"""
  logprobs: bool = False
  """log-probabilities of the new tokens under the target, of its raw logits whatever the temperature"""
  confidence_threshold: float = 0.0
  """drafts from the first one less confident than this are not verified; 0 is off"""
  survival_threshold: float = 0.0
  """drafts from the first one less likely than this to be reached and kept are not verified; 0 is off"""
  verification: Rule = "token"
  """at temperatures above 0, how drafts are tested: one by one, or as a block, which keeps a few more; the distribution
  of the text is the same, its words are not"""
  calibrated: bool = True
  """use the temperatures that train.calibrate stored with the drafter for this kind of sampling, if any"""
  out: Path | None = None
  """.jsonl file: a line per prompt with its index, tokens, text and n_accept, written as batches finish; the same
  command goes on with a file that was begun"""
  budget_gb: float = BUDGET / 1e9
  """of caches: more prompts than fit are decoded in several batches"""
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data and fsdp divide the rows"""
  dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Asked:
  """Settings that a line of --prompts may have, under our names and the OpenAI API's; None: the program's own."""
  max_new_tokens: Annotated[int, Range(1)] | None = None
  max_tokens: Annotated[int, Range(1)] | None = None
  max_completion_tokens: Annotated[int, Range(1)] | None = None
  temperature: Annotated[float, Range(0)] | None = None
  top_k: Annotated[int, Range(0)] | None = None
  top_p: Annotated[float, Range(0, 1)] | None = None
  seed: int | None = None

  def over(self, settings: Settings, row: int) -> dict[str, Any]:
    """Of `Session.prepare`, for prompt `row`."""
    limits = (self.max_new_tokens, self.max_tokens, self.max_completion_tokens, settings.max_new_tokens)
    first = lambda *values: next(value for value in values if value is not None)
    return dict(max_new_tokens=first(*limits), temperature=first(self.temperature, settings.temperature),
                top_k=first(self.top_k, settings.top_k), top_p=first(self.top_p, settings.top_p),
                seeds=first(self.seed, settings.seed + row))


@dataclasses.dataclass(frozen=True)
class Prompt:
  tokens: list[int]
  asked: Asked = Asked()
  where: str = ""  # file and line of --prompts


@dataclasses.dataclass(frozen=True)
class Line:
  """What became of a prompt: a line of --out."""
  index: Annotated[int, Range(0)]  # of the prompt
  tokens: tuple[int, ...]          # new ones
  text: str | None                 # None without a tokenizer
  n_accept: tuple[int, ...]        # drafts kept, per round
  logprobs: tuple[float, ...] | None = None


def main(settings: Settings) -> dict:
  check(settings)
  shell.check_drafter(settings.drafter, "none")
  tokenizer = None if settings.prompt_tokens else chat.load_tokenizer(locate_target(settings.target))
  date = run_folder.date_of(settings.out) if settings.out else None
  prompts = read_prompts(settings, tokenizer, date)
  check_prompts(settings, prompts)
  with run_folder.owned(settings.out) if settings.out else contextlib.nullcontext():
    if settings.out and run_folder.is_begun(settings.out):
      run_folder.resumed(settings.out, described(settings, prompts), newer=NEWER)  # another's: models take minutes
    with shell.stderr.status("loading"):
      target = shell.load_target(settings.target, settings.dtype, settings.kernels)
      drafter = None if settings.drafter == "none" else dspark_jax.load_drafter(settings.drafter, target,
                                                                                dtype=settings.dtype)
    how = settings_of_rows(settings, tokenizer, drafter, prompts)
    if settings.logprobs:
      score.check(target, max(len(prompt.tokens) + new for prompt, new in zip(prompts, how["max_new_tokens"])))
    known = {}
    if settings.out:
      record = describe(settings, target, drafter, prompts, how) | {"date": str(date)}
      run_folder.claim(settings.out, record, newer=NEWER)
      read = lambda record: from_json(Line, record, "no finished prompt")
      known = {line.index: line for line in run_folder.read_lines(settings.out, read)}
    return decode(settings, tokenizer, target, drafter, prompts, how, known)


def check(settings: Settings) -> None:
  """ValueError for what can be seen to be wrong before anything is read."""
  if sum(x is not None for x in (settings.prompt, settings.prompts, settings.prompt_tokens)) != 1:
    raise ValueError("expected exactly one of --prompt, --prompts and --prompt-tokens")
  if settings.stop and (settings.prompt_tokens or "" in settings.stop):
    raise ValueError(f"stop is {settings.stop}, expected texts that are not empty, and prompts of text: stop texts are "
                     f"looked for in text; with --prompt-tokens, give --stop-token-ids")
  if settings.out and settings.out.suffix != ".jsonl":
    raise ValueError(f"out is {settings.out}, expected a name that ends in .jsonl")
  shell.check_out(settings.out)
  shell.check_decoding(settings)
  for name in ("confidence_threshold", "survival_threshold"):
    if settings.drafter == "none" and getattr(settings, name):
      raise ValueError(f"{name} is {getattr(settings, name)}, but there is no drafter: leave it at 0")


def check_prompts(settings: Settings, prompts: list[Prompt]) -> None:
  """ValueError for prompts, and settings of theirs, that decoding would refuse once the target is loaded."""
  if not prompts:
    raise ValueError("there are no prompts: expected at least one")
  rows = [prompt.asked.over(settings, row) for row, prompt in enumerate(prompts)]
  for number, (prompt, row) in enumerate(zip(prompts, rows)):
    try:
      session.check(seed=row["seeds"], **{name: value for name, value in row.items() if name != "seeds"})
    except ValueError as error:  # of one setting, of which nobody knows the line
      raise ValueError(f"{prompt.where or f'prompt {number}'}: {error}") from error
  about = target_config(locate_target(settings.target))
  session.check_prompts(about, [prompt.tokens for prompt in prompts], stop_token_ids=settings.stop_token_ids or (),
                        max_new_tokens=[row["max_new_tokens"] for row in rows])


def settings_of_rows(settings: Settings, tokenizer, drafter, prompts: list[Prompt]) -> dict[str, list]:
  """Of `Session.prepare`, one value for each prompt."""
  stops = settings.stop_token_ids  # (): none; None: the tokenizer's
  if stops is None:
    stops = chat.stop_ids(tokenizer) if tokenizer else ()
  rows = [prompt.asked.over(settings, row) for row, prompt in enumerate(prompts)]
  tables = {t: calibration(settings, drafter, t) for t in sorted({row["temperature"] for row in rows})}
  return {name: [row[name] for row in rows] for name in rows[0]} | dict(
      stop_token_ids=[tuple(stops)] * len(rows), calibration=[tables[row["temperature"]] for row in rows],
      confidence_threshold=[settings.confidence_threshold] * len(rows),
      survival_threshold=[settings.survival_threshold] * len(rows))


def describe(settings: Settings, target, drafter, prompts: list[Prompt], how: dict[str, list]) -> dict:
  """What the lines of --out depend on."""
  plain = lambda x: x if x is None or isinstance(x, (int, float)) else np.asarray(x).tolist()
  rows = [[prompt.tokens, {name: plain(values[row]) for name, values in how.items()}]
          for row, prompt in enumerate(prompts)]
  known = described(settings, prompts)
  return known | {"data": run_folder.digest(json.dumps(rows).encode()), "config": known["config"] | {
      "target": target_id(target, run_folder.recorded(settings.out, "config", "target")),
      "drafter": drafter and drafter_id(drafter)}}


def described(settings: Settings, prompts: list[Prompt]) -> dict:
  """The same, as far as it is known before models are loaded."""
  tokens = json.dumps([prompt.tokens for prompt in prompts]).encode()
  return {"program": "infer.generate", "prompts": run_folder.digest(tokens), "config": {
      "dtype": settings.dtype, "stop": list(settings.stop), "logprobs": settings.logprobs,
      # None, as in records of older versions, which knew no other.
      "verification": None if settings.verification == "token" else settings.verification}}


def decode(settings: Settings, tokenizer, target, drafter, prompts: list[Prompt], how: dict[str, list],
           known: dict[int, Line]) -> dict:
  """Decodes the prompts that are not known, tells --out of every batch that is done, and returns the result of all."""
  todo = [row for row in range(len(prompts)) if row not in known]
  batches = Session(target, drafter, budget=1e9 * settings.budget_gb).prepare(
      [prompts[row].tokens for row in todo], verification=settings.verification,
      **{name: [values[row] for row in todo] for name, values in how.items()}) if todo else []
  count, compile_seconds, seconds = 0, 0.0, 0.0
  with shell.bar() as bar:
    task = bar.add_task("compiling", total=len(prompts), completed=len(known), note="")
    for batch in batches:
      bar.update(task, description="compiling")
      began = time.perf_counter()
      batch.compile()  # apart from decoding: the first call would count the compilation as tokens that took minutes
      compiled = time.perf_counter()
      bar.update(task, description="generating")
      texts = batch.run()
      seconds += time.perf_counter() - compiled  # without what follows, which is no part of decoding
      compile_seconds += compiled - began
      count += sum(len(text.tokens) for text in texts)
      rows = [todo[i] for i in batch.indices]
      new = [finish(settings, tokenizer, target, prompts[row], row, text) for row, text in zip(rows, texts)]
      if settings.out:
        run_folder.append(settings.out, list(map(to_json, new)))
      known |= {line.index: line for line in new}
      bar.update(task, advance=len(new))
  lines = [known[row] for row in range(len(prompts))]
  column = lambda name: [getattr(line, name) for line in lines]
  commits = [n for line in lines for n in acceptance.delivered(line.n_accept, len(line.tokens))]
  return dict(tokens=list(map(list, column("tokens"))), text=column("text") if tokenizer else None,
              n_accept=list(map(list, column("n_accept"))), accepted_length=acceptance.accepted_length(commits),
              rounds=len(commits), tokens_per_second=count / seconds if seconds else None,
              compile_seconds=compile_seconds, **({"logprobs": column("logprobs")} if settings.logprobs else {}))


def finish(settings: Settings, tokenizer, target, prompt: Prompt, index: int, text: Text) -> Line:
  """A decoded text as it is handed out."""
  text = cut(settings, tokenizer, text)
  said = tokenizer and before(settings.stop, tokenizer.decode(text.tokens, skip_special_tokens=True))
  found = score.logprobs(target, [prompt.tokens], [text.tokens])[0] if settings.logprobs else None
  return Line(index, tuple(text.tokens), said, tuple(text.n_accept), found and tuple(found))


def cut(settings: Settings, tokenizer, text: Text) -> Text:
  """A text up to the token that completes the first of the stop texts: tokens may hold a part of one."""
  said = lambda count: tokenizer.decode(text.tokens[:count], skip_special_tokens=True)
  if not settings.stop or before(settings.stop, said(None)) == said(None):
    return text
  counts = range(1, len(text.tokens) + 1)
  return text.cut(counts[bisect.bisect_left(counts, True, key=lambda n: before(settings.stop, said(n)) != said(n))])


def calibration(settings: Settings, drafter, temperature: float):
  """f32[G] for the drafter's confidences, or None: those stored for this mode of sampling, if they are wanted."""
  if drafter is None or not settings.calibrated:
    return None
  # Another mode's temperatures say nothing of this one: greedy and sampled text are accepted at different rates.
  stored, mode = stored_temperatures(settings.drafter, drafter), mode_name(temperature)
  if stored and mode in stored.by_mode:
    return stored.for_mode(mode)
  if settings.survival_threshold or settings.confidence_threshold:
    shell.say(f"{settings.drafter} has no temperatures for mode {mode!r}: the threshold meets the drafter's "
              f"raw confidences; train.calibrate fits some")
  return None


def read_prompts(settings: Settings, tokenizer, date: datetime.date | None = None) -> list[Prompt]:
  """The prompts. date: that a chat template is told, by default today's. ValueError names the file and line of what is
  none."""
  if settings.prompt_tokens:
    ids = read_json(settings.prompt_tokens, list)
    if not all(isinstance(row, list) and all(type(i) is int for i in row) for row in ids):
      raise ValueError(f"{settings.prompt_tokens} is not a list of lists of token ids: expected [[1, 2, 3], ...]")
    return list(map(Prompt, ids))
  if not tokenizer.chat_template:
    shell.say(f"{settings.target} has no chat template, as base models have none: it continues prompts as raw text")
  if settings.prompt is not None:
    if not settings.prompt.strip():
      raise ValueError("the prompt is empty: expected some text")
    return [Prompt(encode(settings, tokenizer, {"prompt": settings.prompt}, date))]
  prompts = []
  for number, record in read_jsonl(settings.prompts):
    where = f"{settings.prompts}, line {number}"
    asked = check_line(record, where)
    try:
      prompts.append(Prompt(encode(settings, tokenizer, record, date), asked, where))
    except ValueError as error:  # of the template, which does not know where messages come from
      raise ValueError(f"{where}: {error}") from error
  return prompts


def encode(settings: Settings, tokenizer, record: dict, date: datetime.date | None = None) -> list[int]:
  """Tokens of a line that was checked."""
  text = record.get("prompt")
  if text is not None and not tokenizer.chat_template:
    if record.get("tools"):
      raise ValueError("it has tools, which only a chat template can tell a model of, and this one has none: remove "
                       "them, or use an instructed model")
    return chat.encode_text(tokenizer, text, allow_special=settings.allow_special)
  messages = record["messages"] if text is None else [{"role": "user", "content": text}]
  return chat.encode_prompt(tokenizer, messages, tools=record.get("tools"), enable_thinking=settings.thinking,
                            allow_special=settings.allow_special, date=date)


def check_line(record: dict, where: str) -> Asked:
  """The settings of a line. ValueError unless it has one prompt, and nothing that would be passed over."""
  text, messages = record.get("prompt"), record.get("messages")
  texts = [[m.get("role"), m.get("content")] if isinstance(m, dict) else [None]
           for m in (messages if isinstance(messages, list) else ())]
  if not (isinstance(text, str) and text.strip() if messages is None
          else text is None and texts and all(isinstance(text, str) for pair in texts for text in pair)):
    raise ValueError(f'{where} has no prompt: expected {{"prompt": TEXT}} or {{"messages": [{{"role": TEXT, "content": '
                     f'TEXT}}, ...]}}, with some text in it')
  tools = record.get("tools")
  if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
    raise ValueError(f"{where} has tools that are no list of objects: write each as a JSON schema")
  asked = {k: v for k, v in record.items() if k not in ("prompt", "messages", "tools", *HARMLESS)}
  return from_json(Asked, asked, where)


if __name__ == "__main__":
  shell.run(main, Settings)
