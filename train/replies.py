"""What became of a question: replies and the lines that train.train learns from, or why there are none.

Replies whose tokens are known, also those of their prompts, make lines {"id", "tokens", "loss_mask"}: one for all turns
where each prompt begins with what was said before, else one a turn with "part": [its number, how many]. Others make one
line {"id", "messages", ...}, which is encoded by the chat template later. "finish" has for every reply in the line
"stop", "length" (the limit cut it) or "tool_calls". "text" has how replies begin whose tokens are of servers: nobody
says by which tokenizer, so train.prepare tries its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dspark_jax.data.prompts import Conversation


class Reply(NamedTuple):
  """One answer of a target."""
  message: dict[str, Any]           # as chat templates read it
  finish: str
  prompt: list[int] | None = None   # tokens before it, where they are known
  tokens: list[int] | None = None   # its own, with the one that ends it
  count: int = 0                    # how many those are, as far as anyone says
  text: str = ""                    # how it begins, where its tokens are of a tokenizer that nobody names


class Unanswered(Exception):
  """Of one question: `reason` is what such failures are counted by, `detail` a sentence."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason)
    self.reason, self.detail = reason, detail


class LeftOut(Unanswered):
  """Of a question that nobody was asked: others may well be right."""


@dataclass(frozen=True)
class Outcome:
  """Of one conversation: lines, or a failure."""
  id: str
  lines: list[dict[str, Any]] = field(default_factory=list)
  tokens: int = 0
  unasked: int = 0  # turns that were left out since the conversation had become too long
  failed: Unanswered | None = None


def outcome(conversation: Conversation, replies: list[Reply], thinking: bool, unasked: int = 0) -> Outcome:
  """Of replies to the first turns, at least one."""
  name, tokens = conversation.id, sum(reply.count for reply in replies)
  if all(reply.prompt is not None and reply.tokens is not None for reply in replies):
    parts = _documents(replies)
    several = lambda k: {"part": [k, len(parts)]} if len(parts) > 1 else {}
    return Outcome(name, [{"id": name, **several(k), **part} for k, part in enumerate(parts, 1)], tokens, unasked)
  said = itertools.chain(*((*turn, reply.message) for turn, reply in zip(conversation.turns, replies)))
  line = {"id": name, "messages": list(said), **({"tools": conversation.tools} if conversation.tools else {}),
          "chat_template_kwargs": {"enable_thinking": thinking}, "finish": [reply.finish for reply in replies]}
  return Outcome(name, [line], tokens, unasked)


def _documents(replies: list[Reply]) -> list[dict[str, Any]]:
  documents = []
  for reply in replies:
    said = documents[-1]["tokens"] if documents else []
    # Qwen3's template drops what was thought from past replies: their prompts are no beginning of the next one's.
    if not documents or reply.prompt[:len(said)] != said:
      documents.append({"tokens": [], "loss_mask": [], "finish": []})
      said = []
    between = reply.prompt[len(said):]
    documents[-1]["tokens"] += between + reply.tokens
    documents[-1]["loss_mask"] += [0] * len(between) + [1] * len(reply.tokens)
    documents[-1]["finish"].append(reply.finish)
    if reply.text:
      documents[-1].setdefault("text", []).append(reply.text)
  return documents
