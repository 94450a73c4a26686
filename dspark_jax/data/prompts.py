"""Prompts of any source as conversations: what a user says in turn, and where a model's own replies go.

A line of a JSONL file, or a row of a dataset on the Hugging Face hub, has one of
  {"prompt": TEXT}
  {"messages": [{"role": ..., "content": ...}, ...]}
  {"conversations": [{"from": ..., "value": ...}, ...]}   as ShareGPT has it
and may have "tools" and "chat_template_kwargs": {"enable_thinking": ...}; messages win over a prompt beside them.
Replies in it are dropped, since the target gives its own: after every message of the user, as the reference does. At
the first result of a tool a conversation ends: it answers a call that the target may not make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dspark_jax.data.benchmarks import EMPTY, LINE_SETTINGS
from dspark_jax.data.conversations import SETTINGS, messages_of, variables_of
from dspark_jax.data.questions import Question
from dspark_jax.text import read_jsonl

KINDS = ("prompt", "messages", "conversations")
# All prompts are asked under the settings of the command, but for what `variables_of` reads or refuses itself.
REFUSED = LINE_SETTINGS - {"messages", "tools", "chat_template_kwargs", *SETTINGS}
NO_USER, BEGINS = "no message of a user", "begins with a reply"


@dataclass(frozen=True)
class Conversation:
  """What is asked, in turns."""
  id: str                                        # the line in its file, or the row of its dataset, from 1
  turns: tuple[tuple[dict[str, Any], ...], ...]  # messages before each reply, the last one a user's
  tools: list[dict[str, Any]] | None = None      # as JSON schemas
  thinking: bool | None = None                   # None: as the command says
  problem: str | None = None                     # why it cannot be asked; then turns is empty

  def thinks(self, otherwise: bool) -> bool:
    """Whether the target is to think before it answers."""
    return otherwise if self.thinking is None else self.thinking

  def told(self) -> str:
    """All that answers depend on, as JSON."""
    return json.dumps([self.id, self.turns, self.tools, self.thinking, self.problem])


def of_questions(questions: Iterable[Question]) -> list[Conversation]:
  """One turn each."""
  return [Conversation(q.id, (({"role": "user", "content": q.question},),)) for q in questions]


def read_prompts(path: str | os.PathLike) -> Iterator[Conversation]:
  """The conversations of a JSONL file, as they are asked for. ValueError names the file and line of what is none."""
  return (_conversation(record, str(number), f"{path}, line {number}") for number, record in read_jsonl(path))


def read_dataset(name: str, split: str) -> Iterator[Conversation]:
  """The conversations of a dataset on the hub. ValueError without the library `datasets`, or the network."""
  try:
    import datasets  # optional, and slow to import
  except ImportError as error:
    raise ValueError(f"the dataset {name} needs the library `datasets`, which is not installed: run pip install "
                     f"'dspark-jax[hub]', or give a JSONL file with --questions") from error
  try:
    rows = datasets.load_dataset(name, split=split)
  except Exception as error:  # the hub's errors have no common base; the remedy is the same
    raise ValueError(f"the split {split!r} of the dataset {name} could not be fetched ({type(error).__name__}): check "
                     f"the names and the network, or give a JSONL file with --questions") from error
  return (_conversation(dict(row), str(number), f"{name}, row {number}") for number, row in enumerate(rows, 1))


def _conversation(record: dict[str, Any], name: str, where: str) -> Conversation:
  given = [kind for kind in KINDS if record.get(kind) is not None]
  given = given[1:] if len(given) > 1 and given[0] == "prompt" else given  # as training lines are read
  if wrong := sorted(key for key in REFUSED if record.get(key) not in EMPTY):
    raise ValueError(f"{where} has {', '.join(wrong)}, but all questions are asked under the settings of the command: "
                     f"remove it")
  if len(given) != 1:
    raise ValueError(f'{where} is no question: expected one of {{"prompt": TEXT}}, {{"messages": [...]}} '
                     f'and {{"conversations": [...]}}')
  if given == ["prompt"] and not (isinstance(record["prompt"], str) and record["prompt"].strip()):
    raise ValueError(f'{where} is no question: "prompt" must be some text')
  try:
    variables = variables_of(record)
    json.dumps(variables["tools"], allow_nan=False)  # for its errors: NaN, or a row's date, can be sent nowhere
    messages = ([{"role": "user", "content": record["prompt"]}] if given == ["prompt"] else
                messages_of({given[0]: _without_calls(record[given[0]])}))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where}: {error}") from error
  turns, problem = _turns(messages)
  return Conversation(name, turns, variables["tools"], variables.get("enable_thinking"), problem)


def _without_calls(messages: Any) -> Any:
  """Messages without the tools that they call: of replies nothing is asked, whatever is in them."""
  if not isinstance(messages, list):
    return messages
  dropped = ("tool_calls", "function_call")
  said = lambda m: {"content": "", **{key: x for key, x in m.items() if key not in dropped and x is not None}}
  calls = lambda m: (isinstance(m, dict) and m.get("role", m.get("from")) in ("assistant", "gpt")
                     and any(map(m.get, dropped)))
  return [said(m) if calls(m) else m for m in messages]


def _turns(messages: list[dict[str, Any]]) -> tuple[tuple, str | None]:
  roles = [message["role"] for message in messages]
  messages = messages[:roles.index("tool")] if "tool" in roles else messages
  if next((role for role in roles if role not in ("system", "developer")), None) == "assistant":
    return (), BEGINS
  turns, part = [], []
  for message in messages:
    if message["role"] != "assistant":
      # Names and scores beside them are the data set's own business.
      part.append({key: message[key] for key in ("role", "content")})
    if message["role"] == "user":
      turns.append(tuple(part))
      part = []
  return tuple(turns), None if turns else NO_USER
