"""Requests that arrive when they arrive, whether the last ones are answered or not: over HTTP, or into an engine.

Open loop: nothing waits for an answer and nothing is tried again, which would change the load that is measured. Times
are from when a request was due, so that a machine that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx2

from dspark_jax.decoding.engine import Engine, Full, Request
from dspark_jax.programs import shell

KEY = "OPENAI_API_KEY"
SHOWN = 200   # characters of what a server says
NAP = 0.005   # seconds between looks for the next arrival, where an engine has nothing to do


@dataclasses.dataclass(frozen=True)
class Arrival:
  """A request to come."""
  due: float       # seconds from the start
  text: str
  new_tokens: int
  seed: int


@dataclasses.dataclass
class Answer:
  """What became of a request; times in seconds from the start."""
  due: float
  began: float | None = None   # when it was handed over
  first: float | None = None   # its first token was there
  last: float | None = None
  tokens: int = 0
  rounds: int | None = None    # after the first token
  verified: int | None = None  # tokens in those rounds, anchors included; None: not known
  failure: str | None = None

  def said(self, now: float, tokens: int) -> None:
    """Tokens have come."""
    self.first = now if self.first is None else self.first
    self.last, self.tokens = now, self.tokens + tokens


class Failed(Exception):
  """A request has: (kind, detail)."""


def into_engine(engine: Engine, arrivals: Iterable[Arrival], encode: Callable[[str], list[int]], drain: float, *,
                temperature: float = 0.0, stop_token_ids: tuple[int, ...] = ()) -> list[Answer]:
  """What an engine makes of these, stepped in this thread. drain: seconds that are waited after the last has come."""
  # Encoded beforehand: a tokenizer's time is none of the engine's.
  coming = collections.deque((a, Request(tuple(encode(a.text)), a.new_tokens, temperature, seed=a.seed,
                                         stop_token_ids=stop_token_ids)) for a in arrivals)
  answers, playing = [], {}
  end, began = (coming[-1][0].due if coming else 0.0) + drain, time.perf_counter()
  while coming or playing:
    now = time.perf_counter() - began
    while coming and coming[0][0].due <= now:
      arrival, request = coming.popleft()
      answers.append(answer := Answer(arrival.due, now, rounds=0, verified=0))
      try:
        playing[engine.submit(request)] = answer
      except Full as error:
        answer.failure = _noted("queue is full", error)
      except ValueError as error:
        answer.failure = _noted("refused", error)
    if now > end:
      for id, answer in playing.items():
        engine.cancel(id)
        answer.failure = "unfinished"
      collections.deque(engine.run(), maxlen=0)
      break
    if engine.idle:
      time.sleep(min(max(coming[0][0].due - now, 0.0), NAP) if coming else NAP)
      continue
    events = engine.step()
    now = time.perf_counter() - began
    for event in events:
      if event.id in playing:
        _take(playing[event.id], event, now)
        if event.finish:
          del playing[event.id]
  return answers


def _take(answer, event, now):
  if event.tokens:
    if answer.tokens:  # the first comes of the prompt's pass
      answer.rounds += 1
      answer.verified += event.verified + 1
    answer.said(now, len(event.tokens))
  if event.finish in ("failed", "cancelled"):
    answer.failure = event.finish


def _noted(kind: str, detail: Any) -> str:
  """A kind of failure; what was said of it is shown."""
  shell.say(f"{kind}: {str(detail)[:SHOWN]}")
  return kind


def key_and_headers() -> tuple[str, dict[str, str]]:
  """The key of the environment and the headers that tell a server of it, both empty without one."""
  key = os.environ.get(KEY, "").strip()
  return key, {"Authorization": f"Bearer {key}"} if key else {}


async def over_http(url: str, bodies: list[tuple[Arrival, dict]], drain: float) -> list[Answer]:
  """What a server makes of these. url: of the completions, which are streamed."""
  key, headers = key_and_headers()
  end, told = (bodies[-1][0].due if bodies else 0.0) + drain, set()
  limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)

  async def ask(client, clock, answer, body):
    answer.began = clock()
    try:
      async with asyncio.timeout(max(end - answer.began, 0)):
        await _stream(client, url, body, answer, clock)
    except Failed as error:
      answer.failure, detail = error.args
      if answer.failure not in told:  # once a kind: there may be thousands
        told.add(_noted(answer.failure, detail.replace(key, "...") if key else detail))
    except TimeoutError:
      answer.failure = "unfinished"
    except httpx2.HTTPError as error:
      answer.failure = "closed mid-stream" if answer.first is not None else type(error).__name__

  answers = [Answer(arrival.due) for arrival, _ in bodies]
  async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=None) as client, asyncio.TaskGroup() as tasks:
    began = time.perf_counter()  # only now: a client reads certificates for longer than a request takes
    clock = lambda: time.perf_counter() - began
    for answer, (arrival, body) in zip(answers, bodies):
      await asyncio.sleep(max(arrival.due - clock(), 0))
      tasks.create_task(ask(client, clock, answer, body))
  return answers


async def lines(response: httpx2.Response) -> AsyncIterator[str]:
  """Lines of server-sent events, which end at CR, LF or both; of both, an empty line follows. httpx's end at U+2028,
  U+2029 and U+0085 too, which JSON may hold as they are."""
  rest = b""
  async for part in response.aiter_bytes():
    *whole, rest = (rest + part).replace(b"\r", b"\n").split(b"\n")
    for line in whole:
      yield line.decode(errors="replace")
  yield rest.decode(errors="replace")


async def _stream(client, url, body, answer, now):
  """Reads a stream of server-sent events into an answer. Failed for what is none, and for one without an end."""
  finish = usage = None
  async with client.stream("POST", url, json=body) as response:
    if response.status_code != 200:
      said = await response.aread()
      raise Failed(f"HTTP {response.status_code}", " ".join(said.decode(errors="replace").split())[:SHOWN])
    async for line in lines(response):
      if not line.startswith("data:"):
        continue  # blank lines, comments and names of events
      data = line.removeprefix("data:").strip()
      if data == "[DONE]":
        break
      part = _parsed(data)
      if "error" in part:
        raise Failed("error in the stream", json.dumps(part["error"])[:SHOWN])
      usage = part.get("usage") or usage
      for choice in part.get("choices") or ():
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta") or choice
        if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("text"):
          answer.said(now(), 1)
  if answer.first is None and finish is None:
    raise Failed("no stream of completions", "200 without a choice that has a text or a finish_reason")
  if finish is None:
    raise Failed("closed mid-stream", "no finish_reason")
  _count(answer, usage or {})


def _parsed(data: str) -> dict[str, Any]:
  try:
    part = json.loads(data)
  except ValueError as error:
    raise Failed("no JSON in the stream", data[:SHOWN]) from error
  choices = part.get("choices") if isinstance(part, dict) else ()
  if not (isinstance(part, dict) and isinstance(choices, list | None) and all(
      isinstance(choice, dict) for choice in choices or ())):
    raise Failed("no completion in the stream", data[:SHOWN])
  return part


def _count(answer, usage):
  """Tokens by the server's own count: a chunk may hold several, or a part of one. Without it, chunks are counted."""
  count, length = usage.get("completion_tokens"), usage.get("accepted_length")
  if type(count) is int and count >= 0:
    answer.tokens = count
  if type(length) in (int, float) and length > 0 and answer.tokens > 1:  # ours says it
    answer.rounds = max(round((answer.tokens - 1) / length), 1)
