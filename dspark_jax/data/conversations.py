"""Files of conversations, or of tokens -> documents, a piece of a file at a time.

Two kinds of files are read:
  .jsonl  one object a line, either a conversation, or already in tokens {"tokens": [...], "loss_mask": [...]}, as
          train.answers writes it: then what is learned is exactly what was generated.
  .txt .md .py  plain text: every token is supervised, cut into pieces.

Control tokens that a file's contents spell are what the two encoders make of them: text, unless they are allowed.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]} or, as ShareGPT has it, {"conversations": [{"from":
..., "value": ...}, ...]}; human and gpt are other words for user and assistant. Beside it, "tools" and
"chat_template_kwargs": {"enable_thinking": ...} go to the chat template. A reply may call tools as OpenAI's API has it,
without a content, and with arguments as a text; its thinking is "reasoning_content", or "reasoning". Names and notes
are passed over; the keys in SETTINGS, which would change what is learned, are refused. The end of a reply with
"finish_reason": "length" is not learned: the limit cut it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.config import name_shown, shown
from dspark_jax.text import opened, parsed, read_jsonl, read_text

LOOKED = 32          # lines of a file whose texts are compared with their tokens
MIN_SUPERVISED = 14  # documents with fewer supervised tokens are dropped, as the reference does
TEXT_SUFFIXES = (".txt", ".md", ".py")
Encoded = tuple[list[int], list[bool]]  # tokens, loss mask
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user", "gpt": "assistant"}
SETTINGS = ("system", "system_prompt", "functions", "chat_template", "enable_thinking", "thinking", "weight")


class Document(NamedTuple):
  tokens: np.ndarray     # i32[T]
  loss_mask: np.ndarray  # bool[T]  supervised tokens
  line: int = 0          # of its file, from 1; 0 in a file of text


@dataclass
class Lost:
  """What of the files is in no document, by reason; each thing is counted once."""
  no_reply: int = 0    # conversations without a reply
  rewritten: int = 0   # replies that the chat template never writes as they would be generated, after their prompt
  too_short: int = 0   # documents with fewer than MIN_SUPERVISED supervised tokens
  cut_away: int = 0    # documents of which the cut at max_len leaves fewer than that
  cut: int = 0         # documents that are kept without their end
  cut_tokens: int = 0  # of these ends

  def __str__(self):
    words = {"no_reply": "conversations without a reply", "rewritten": "replies that the chat template rewrites, as "
             "it does with thinking in a run without", "too_short": "documents that are too short",
             "cut_away": "documents whose reply is beyond the length of a row", "cut": "documents cut to it",
             "cut_tokens": "tokens in the ends of these"}
    counts = {field.name: getattr(self, field.name) for field in fields(self)}
    return ", ".join(f"{count} {words[name]}" for name, count in counts.items() if count) or "nothing"


@dataclass(frozen=True)
class Source:
  """What was read."""
  documents: list[Document]
  lost: Lost


@dataclass(frozen=True)
class Shard:
  """A piece of a file that is read apart from the others."""
  path: str
  begin: int = 0           # bytes
  end: int | None = None   # None: that of the file
  line: int = 1            # the number of its first line
  digest: str = ""         # of its bytes and the kind of its file


def shards(path: str | os.PathLike, size: int) -> Iterator[Shard]:
  """The pieces of a file, at least `size` bytes each and cut after a line; a file of text is one.

  Where they are cut depends on nothing but the file and `size`. ValueError for a file of another kind, or none.
  """
  path = os.fspath(path)
  if not path.endswith((".jsonl", *TEXT_SUFFIXES)):
    raise ValueError(f"{path} ends in none of {('.jsonl', *TEXT_SUFFIXES)}: convert or rename it")
  is_text, begin, line = path.endswith(TEXT_SUFFIXES), 0, 1
  with opened(path) as file:
    while data := file.read(-1 if is_text else size):
      data += file.readline()
      kind = b"text" if is_text else b"lines"
      yield Shard(path, begin, begin + len(data), line, hashlib.sha256(kind + data).hexdigest()[:32])
      begin, line = begin + len(data), line + data.count(b"\n")


def read_conversations(shard: Shard, tokenizer: Any, *, max_len: int, vocab_size: int,
                       encode_conversation: Callable[..., list[Encoded]],
                       encode_text: Callable[[Any, str], list[int]]) -> Source:
  """The documents of a piece of a file, in order, cut at max_len tokens (plain text goes on in the next document).

  encode_conversation: (tokenizer, messages, tools=..., **variables of the template) -> (tokens, loss mask) of each
  document that the conversation makes. encode_text: (tokenizer, text) -> tokens of a file of text, and none besides.
  Both are data.chat's, or partials of them: parameters, so that this file needs no transformers. vocab_size: of the
  target, which knows no token beyond.
  Raises ValueError with the file and the line.
  """
  documents, lost = [], Lost()
  if shard.path.endswith(TEXT_SUFFIXES):
    found = _read_text(shard.path, tokenizer, max_len, encode_text)
  else:
    found = _read_jsonl(shard, tokenizer, encode_conversation, lost)
  for line, (tokens, loss_mask) in found:
    if max(tokens, default=0) >= vocab_size:
      where = f"{shard.path}, line {line}" if line else shard.path
      raise ValueError(f"{where}: token {max(tokens)} is beyond the target's vocabulary, which has {vocab_size}: it "
                       "was written with another tokenizer")
    document = Document(np.asarray(tokens[:max_len], np.int32), np.asarray(loss_mask[:max_len], bool), line)
    supervised = sum(loss_mask)
    if not supervised:
      lost.no_reply += 1
    elif supervised < MIN_SUPERVISED:
      lost.too_short += 1
    elif document.loss_mask.sum() < MIN_SUPERVISED:
      lost.cut_away += 1
    else:
      documents.append(document)
      lost.cut += len(tokens) > max_len
      lost.cut_tokens += max(len(tokens) - max_len, 0)
  return Source(documents, lost)


def _read_text(path: str, tokenizer: Any, max_len: int, encode_text: Callable) -> Iterator[tuple[int, Encoded]]:
  text = read_text(path)
  # Cut after tokenizing: in a piece of the text, the words at its ends would be other tokens.
  try:
    tokens = encode_text(tokenizer, text)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  for start in range(0, len(tokens), max_len):
    piece = tokens[start:start + max_len]
    yield 0, (piece, [True] * len(piece))


def _read_jsonl(shard: Shard, tokenizer: Any, encode_conversation: Callable, lost: Lost
                ) -> Iterator[tuple[int, Encoded]]:
  for number, record in read_jsonl(shard.path, begin=shard.begin, end=shard.end, first=shard.line):
    try:
      if sum(record.get(key) is not None for key in ("messages", "conversations", "tokens")) != 1:
        raise ValueError('it must have one of "messages", "conversations" and "tokens", these with "loss_mask"')
      if record.get("tokens") is not None:
        found = [_tokens(record)]
      else:
        messages = messages_of(record)
        found = encode_conversation(tokenizer, messages, **variables_of(record))
        replies = sum(message["role"] == "assistant" for message in messages[1:])  # the first answers nothing
        lost.rewritten += replies - sum(_n_runs(mask) for _, mask in found)
        found = found if replies else [([], [])]
    except ValueError as error:
      raise ValueError(f"{shard.path}, line {number}: {error}") from error
    yield from ((number, document) for document in found)


def check_texts(path: str | os.PathLike, tokenizer: Any) -> None:
  """ValueError for a file of tokens of another tokenizer, by the "text" with which replies in its first lines begin.

  Most of them decide: a server may put another text beside some tokens, as where it takes a tool's call out of it.
  """
  letters = lambda text: "".join(text.replace("\ufffd", " ").split())  # blanks and half characters are cut differently
  right = []
  for number, record in itertools.islice(read_jsonl(path), LOOKED):
    if record.get("tokens") is None or not isinstance(record.get("text"), list):
      continue
    try:
      tokens, mask = _tokens(record)
    except ValueError as error:
      raise ValueError(f"{path}, line {number}: {error}") from error
    said = letters(tokenizer.decode(list(itertools.compress(tokens, mask)), skip_special_tokens=True))
    right += [wanted in said for text in record["text"] if (wanted := letters(str(text)))]
  if 2 * sum(right) < len(right):
    raise ValueError(f"{path} was written with another tokenizer than the target's, to which the tokens of "
                     f"{right.count(False)} of its first {len(right)} replies are another text: leave it out, or have "
                     f"servers of this target answer")


def _n_runs(mask: list[bool]) -> int:
  """How many replies a mask supervises."""
  return sum(now and not before for before, now in zip([False, *mask], mask))


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
  """The messages of a conversation, with our names for keys and roles."""
  name = "messages" if record.get("messages") is not None else "conversations"
  if not isinstance(record[name], list) or not record[name]:
    raise ValueError(f'"{name}" must be a list that is not empty')
  messages = []
  for given in record[name]:
    message = dict(given) if isinstance(given, dict) else {}
    for ours, theirs in (("role", "from"), ("content", "value"), ("reasoning_content", "reasoning")):
      if (said := message.pop(theirs, None)) is not None and message.get(ours) is None:
        message[ours] = said
    _refuse(message, "a message", ("weight", "function_call"))
    if calls := message.get("tool_calls"):
      message["tool_calls"] = calls_of(calls)
      message["content"] = "" if message.get("content") is None else message["content"]
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
      raise ValueError(f'a message must have the texts "role" and "content", got {shown(given)}')
    if message["role"] not in ROLES:
      raise ValueError(f"a message has the unknown role {message['role'][:40]!r}, expected one of "
                       f"{', '.join(ROLES)}: rename it")
    messages.append(message | {"role": ROLES[message["role"]]})
  return messages


def calls_of(calls: Any) -> list[dict[str, Any]]:
  """Calls of tools as templates read them: arguments are an object; as a text, which the API has, they are quoted."""
  if not isinstance(calls, list):
    raise ValueError(f'"tool_calls" must be a list of calls, got {shown(calls)}: write them as OpenAI\'s API does')
  found = []
  for call in calls:
    function = call.get("function") or call if isinstance(call, dict) else None  # some write the function alone
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
      raise ValueError(f'a tool call must have a "function" with a "name", got {shown(call)}: correct or remove it')
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
      arguments = parsed(str(arguments or "{}").encode(), f'"arguments" of a call of {name_shown(function["name"])}')
    found.append(call | {"function": function | {"arguments": arguments}})
  return found


def variables_of(record: dict[str, Any]) -> dict[str, Any]:
  """What a line says to the chat template beside its messages."""
  _refuse(record, "it", SETTINGS)
  tools, given = record.get("tools"), record.get("chat_template_kwargs") or {}
  if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
    raise ValueError(f'"tools" must be a list of objects, got {shown(tools)}: write each as a JSON schema')
  if not isinstance(given, dict) or not all(k == "enable_thinking" and type(v) is bool for k, v in given.items()):
    raise ValueError(f'"chat_template_kwargs" must be {{"enable_thinking": true or false}}, got {shown(given)}: '
                     f'other variables of a template are not supported')
  return {"tools": tools, **given}


def _refuse(record: dict[str, Any], what: str, keys: Iterable[str]) -> None:
  # What says nothing is harmless: many data sets have every column in every line.
  said = [key for key in keys if record.get(key) not in (None, "", [], {}) and (key, record[key]) != ("weight", 1)]
  if said:
    raise ValueError(f'{what} has "{said[0]}", which would change what is learned and is not supported: write it as '
                     f'messages, "tool_calls", "tools" or "chat_template_kwargs", or remove it')


def _tokens(record: dict[str, Any]) -> Encoded:
  """The tokens and the loss mask of a line that has them."""
  tokens, mask = record["tokens"], record.get("loss_mask")
  if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
    raise ValueError('"tokens" must be a list of token ids')
  if not isinstance(mask, list) or not all(m in (0, 1) for m in mask):
    raise ValueError('"loss_mask" must be a list of true and false')
  if len(tokens) != len(mask):
    raise ValueError(f'{len(tokens)} "tokens" but {len(mask)} in "loss_mask": they go in pairs')
  return tokens, mask
