"""Many OpenAI-compatible servers of one model, asked at once: retries, servers that fail, what their replies hold.

vLLM's and SGLang's fields are used beside OpenAI's: top_k, min_p, repetition_penalty, chat_template_kwargs, and vLLM's
return_token_ids, with which a reply comes in tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2

from dspark_jax.data.conversations import calls_of
from dspark_jax.data.prompts import Conversation
from dspark_jax.programs import shell
from dspark_jax.text import parsed
from train.replies import Outcome, Reply, Unanswered, outcome

KEY = "OPENAI_API_KEY"
BACKOFF, MOST = 0.5, 30.0   # seconds before the second try, doubled with each, and the longest wait
FAULTS, ASIDE = 5, 1.0      # after so many in a row a server is left alone for so long, doubled each time
RESTS = 4                   # times that it has been, before nobody waits for a first, or second, word of it: 7 seconds
HELLO = 10.0                # seconds at most for a connection, and for the list of models
GIVE_UP = 600.0             # seconds without an answer of any server
POLL = 0.25                 # seconds between looks for a free server, where all are busy or set aside
SHOWN = 200                 # characters of what a server says
BUSY, REFUSED = 429, (400, 413, 422)


class Fault(Exception):
  """Of a server, not of the question: to be tried again, after `wait` seconds if it said so. code: of its response."""

  def __init__(self, said: str, wait: float = 0.0, code: int = 0):
    super().__init__(said)
    self.wait, self.code = wait, code


class Server:
  """One of them, and how it fares."""

  def __init__(self, url: str):
    given = url if "://" in url else f"http://{url}"
    try:
      parts = httpx2.URL(given.rstrip("/"))
    except httpx2.InvalidURL as error:
      raise ValueError(f"servers has {url.rpartition('@')[2]!r:.80}, expected a URL such as "
                       f"http://localhost:8000/v1") from error
    if parts.scheme not in ("http", "https") or not parts.host or parts.query:
      raise ValueError(f"servers has {_public(parts)!r:.80}, expected a URL such as http://localhost:8000/v1")
    self.base = str(parts) if parts.path.rstrip("/").endswith("/v1") else f"{str(parts).rstrip('/')}/v1"
    self.name = _public(httpx2.URL(self.base))
    self.in_flight = self.faults = self.rests = 0
    self.until, self.said = 0.0, ""  # on the monotonic clock: set aside until then, and for what
    self.checked = self.answered = False
    self.client: httpx2.AsyncClient | None = None


def _public(url: httpx2.URL) -> str:
  """A URL without the password that may be in it."""
  return str(url.copy_with(username=None, password=None))


class Fleet:
  """Servers of one model. `settings` are those of train.answers."""

  def __init__(self, settings: Any):
    self.settings, self.model = settings, settings.target
    self.servers = [Server(url) for url in settings.servers]
    if len({server.base for server in self.servers}) < len(self.servers):
      raise ValueError(f"servers are {', '.join(server.name for server in self.servers)}, expected each once: more "
                       f"requests at once are asked for with --concurrency")
    self.key = os.environ.get(KEY, "").strip()
    if not (self.key.isascii() and self.key.isprintable()):
      raise ValueError(f"{KEY} holds a character that no key has (place "
                       f"{next(i for i, c in enumerate(self.key, 1) if not ' ' <= c <= '~')}): copy the key once more")
    self.last = 0.0  # when one of them answered, or the first was asked

  @contextlib.asynccontextmanager
  async def connected(self) -> AsyncIterator[None]:
    """With a client for each server: a shared one would look through the connections of all for every request."""
    headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    limit = httpx2.Timeout(self.settings.timeout, connect=min(HELLO, self.settings.timeout))
    certificates = httpx2.create_ssl_context()  # once: reading them takes longer than a request
    async with contextlib.AsyncExitStack() as stack:
      for server in self.servers:
        client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=limit, verify=certificates)
        server.client = await stack.enter_async_context(client)
      yield

  def find_model(self) -> str:
    """The model to ask for; ValueError unless the servers that answer now serve it."""
    async def all_of_them():
      async with self.connected():
        return await asyncio.gather(*map(self._models, self.servers))
    found = dict(zip(self.servers, asyncio.run(all_of_them())))
    if all(isinstance(names, Fault) for names in found.values()):
      raise ValueError(f"no server answers ({self._complaints()}): start them, or check --servers")
    for server, names in found.items():
      if isinstance(names, Fault):
        shell.say(f"{server.name} does not answer ({names}): it is tried again later")
        self._set_aside(server)
    lists = {server: names for server, names in found.items() if isinstance(names, list)}
    if self.model is None:
      served = sorted({name for names in lists.values() for name in names})
      if len(served) != 1:
        raise ValueError(f"the servers serve {', '.join(served)[:SHOWN] or 'no model that they would name'}: choose "
                         f"one with --target")
      self.model = served[0]
    for server, names in lists.items():
      self._must_serve(server, names)
    return self.model

  async def answer(self, conversations: Iterator[Conversation], more: Callable[[int], bool],
                   finish: Callable[[list[Outcome]], None]) -> None:
    """Asks as many at once as the servers take, and tells `finish` of each. more(under way): whether to begin another.

    ValueError for what concerns every question: a key that is refused, a model that is not there, no server at all.
    """
    under_way = 0

    async def worker():
      nonlocal under_way
      while more(under_way) and (conversation := next(conversations, None)):
        under_way += 1
        found = await self._converse(conversation)
        under_way -= 1
        finish([found])

    try:
      async with self.connected(), asyncio.TaskGroup() as tasks:
        self.last = time.monotonic()
        for _ in range(self.settings.concurrency * len(self.servers)):
          tasks.create_task(worker())
    except BaseExceptionGroup as group:
      raise group.exceptions[0] from None

  async def _converse(self, conversation) -> Outcome:
    thinking = conversation.thinks(self.settings.thinking)
    messages, replies = [], []
    try:
      for turn, asked in enumerate(conversation.turns):
        messages += asked
        seed = zlib.crc32(seed_text(self.settings.seed, conversation.id, turn).encode())
        reply = await self._ask(self._body(messages, conversation.tools, thinking, seed), thinking)
        messages.append(reply.message)
        replies.append(reply)
        if reply.message.get("tool_calls"):
          break  # what comes next answers no call
    except Unanswered as error:
      return Outcome(conversation.id, failed=error)
    return outcome(conversation, replies, thinking)

  def _body(self, messages, tools, thinking, seed) -> dict[str, Any]:
    asked, kept = self.settings, ("role", "content", "reasoning_content")
    messages = [{key: message[key] for key in kept if key in message} for message in messages]
    # Said even where it is off: what is missing, servers take from the model's generation_config.json.
    return {"model": self.model, "messages": messages, "max_tokens": asked.max_new_tokens, "seed": seed,
            "temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k or -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "chat_template_kwargs": {"enable_thinking": thinking}, "stream": False,
            **({"tools": tools} if tools else {}), **({"return_token_ids": True} if asked.token_ids else {})}

  async def _ask(self, body, thinking) -> Reply:
    """The reply of the first server that gives one. Unanswered where none is left that may."""
    began, tried, tries = time.monotonic(), {}, 0
    while tries <= self.settings.retries:
      server = await self._take(tried)
      try:
        response = await self._send(server, "POST", "/chat/completions", self.settings.timeout, json=body)
        reply = read_reply(self._opened(server, response), thinking)
        self._well(server)
        for other in _refused(tried):  # wrongly, as it turns out
          self._fault(other, tried[other])
        return reply
      except Unanswered:
        self._well(server)  # it is the question that is wrong
        raise
      except Fault as fault:
        last = fault
      finally:
        server.in_flight -= 1
      server.answered |= last.code in (BUSY, *REFUSED)
      if last.code in REFUSED:
        tried[server] = last
        continue
      self._fault(server, last)
      if last.code == BUSY and time.monotonic() - began < GIVE_UP:
        continue  # the server is left alone meanwhile, and the question no worse for it
      tried[server], tries = last, tries + 1
      if tries <= self.settings.retries:
        await asyncio.sleep(max(last.wait, min(BACKOFF * 2 ** (tries - 1), MOST) * random.uniform(0.5, 1.5)))
    raise Unanswered("no answer", f"{tries} tries, of which the last: {last}")

  async def _take(self, tried: dict[Server, Fault]) -> Server:
    """A server with room, the one with the fewest requests; one that failed gets a single request at first.

    tried: those that gave this question no answer. Others come first; what one refuses, it is not asked again.
    """
    while True:
      now, refused = time.monotonic(), _refused(tried)
      left = [s for s in self.servers if s not in refused]
      # One server's word is enough where the others are gone, but not one whose refusals they answered.
      if not left or all(s.rests >= RESTS for s in left) and any(s.faults < FAULTS for s in refused):
        raise Unanswered("refused by the server", str(tried[refused[0]]))
      room = lambda s: 1 if s.faults >= FAULTS or not s.checked else self.settings.concurrency
      free = lambda s: s.until <= now and s.in_flight < room(s)
      others = [s for s in left if s not in tried and (s.faults < FAULTS and s.until <= now or free(s))]
      if ready := list(filter(free, others or left)):
        server = min(ready, key=lambda s: s.in_flight)
        server.in_flight += 1
        if server.checked:
          return server
        # It was away at the beginning, and SGLang answers for whatever model it is asked for.
        names = await self._models(server)
        server.in_flight -= 1
        if isinstance(names, list):
          self._must_serve(server, names)
        elif names:
          self._fault(server, names)
        continue
      if all(s.faults >= FAULTS for s in self.servers):
        given_up = now - self.last > GIVE_UP
        if not any(s.answered for s in self.servers):
          if given_up or all(s.rests >= RESTS for s in self.servers):
            raise ValueError(f"no server gives an answer ({self._complaints()}): check the servers, or --servers")
        elif given_up:
          raise ValueError(f"no server has answered for {GIVE_UP:.0f} seconds ({self._complaints()}): start them and "
                           f"give the same command again, which goes on")
      await asyncio.sleep(POLL * random.uniform(0.5, 1.5))

  async def _models(self, server) -> list[str] | Fault | None:
    """What it serves; None where it does not say."""
    for attempt in range(3):
      if attempt:
        await asyncio.sleep(BACKOFF)
      try:
        response = await self._send(server, "GET", "/models", min(HELLO, self.settings.timeout))
        if response.status_code in (404, 405):
          server.checked = True
          return None
        listed = self._opened(server, response).get("data")
        named = lambda model: isinstance(model, dict) and isinstance(model.get("id"), str)
        if not isinstance(listed, list) or not all(map(named, listed)):
          raise Fault('a list of models without "data"')
        server.checked = True
        return [model["id"] for model in listed]
      except Fault as error:
        fault, server.said = error, str(error)
    return fault

  async def _send(self, server, method, path, seconds, **what) -> httpx2.Response:
    try:
      async with asyncio.timeout(seconds):  # in all; httpx2's own is between two bytes
        return await server.client.request(method, server.base + path, **what)
    except TimeoutError as error:
      raise Fault(f"nothing within {seconds:g} seconds") from error
    except httpx2.RequestError as error:
      raise Fault(self._short(f"{type(error).__name__} {error}")) from error

  def _opened(self, server, response) -> dict[str, Any]:
    """The JSON object of a response. Fault or, for what concerns all questions, ValueError."""
    code = response.status_code
    try:
      body = parsed(response.content, "it")
    except ValueError as error:
      body = None
      if code == 200:
        raise Fault(self._short(f"200 with what is no JSON object ({response.text})")) from error
    if code == 200:
      return body
    said = self._short(f"{code}: {_message(body, response)}")
    if code in (401, 403):
      raise ValueError(f"{server.name} refuses the key of {KEY} ({said}): set another" if self.key else
                       f"{server.name} wants a key ({said}): set {KEY}")
    if "model_not_found" in said or code == 404 and not server.answered:
      raise ValueError(f"{server.name} does not know the model {self.model}, or no chat ({said}): check --target and "
                       f"--servers")
    wait = response.headers.get("retry-after", "")
    raise Fault(said, min(float(wait), 2 * MOST) if wait.isdigit() else 0.0, code)

  def _must_serve(self, server, names):
    if names and self.model not in names:
      raise ValueError(f"{server.name} serves {', '.join(names)[:SHOWN]}, not {self.model}: check --target and "
                       f"--servers")

  def _well(self, server):
    self.last = time.monotonic()
    server.faults, server.rests, server.answered = 0, 0, True

  def _fault(self, server, fault):
    server.said, now = str(fault), time.monotonic()
    if fault.code == BUSY and server.in_flight:  # with others of ours: it is full, and well
      server.until = max(server.until, now + max(fault.wait, ASIDE))
      return
    server.faults += FAULTS if fault.code == BUSY else 1
    if server.faults >= FAULTS and server.until <= now:
      self._set_aside(server, fault.wait)
      if fault.code != BUSY or server.rests > 1:  # once is no news
        shell.say(f"{server.name} is left alone for {server.until - now:.0f} seconds ({fault})")

  def _set_aside(self, server, wait=0.0):
    server.faults = max(server.faults, FAULTS)
    server.until = time.monotonic() + max(wait, min(ASIDE * 2 ** min(server.rests, 10), 2 * MOST))
    server.rests += 1

  def _complaints(self):
    return "; ".join(f"{server.name}: {server.said}" for server in self.servers)[:4 * SHOWN]

  def _short(self, text):
    """What a server says, for people: without the key, which some repeat."""
    text = text.replace(self.key, "...") if self.key else text
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SHOWN]


def seed_text(seed: int, name: str, turn: int) -> str:
  """What a turn's own seed is made of: neither batches, servers nor a place in the file."""
  return f"{seed}/{name}" if turn == 0 else f"{seed}/{name}/turn {turn}"


def read_reply(body: dict[str, Any], thinking: bool) -> Reply:
  """The reply in a response. Fault for what is none, Unanswered for one that cannot be learned as it was said."""
  choice = _first(body.get("choices"))
  message, finish = choice.get("message"), choice.get("finish_reason")
  if not isinstance(message, dict) or not isinstance(finish, str):
    raise Fault(f"200 without a choice that has a message and a finish_reason ({json.dumps(body)[:SHOWN]})")
  content, calls = message.get("content"), message.get("tool_calls") or None
  reasoning = message.get("reasoning_content") or message.get("reasoning")
  if any(not isinstance(x, str | None) for x in (content, reasoning)) or not isinstance(calls, list | None):
    raise Fault(f"200 with a message of other types ({json.dumps(message)[:SHOWN]})")
  if finish not in ("stop", "length", "tool_calls"):
    if finish in ("abort", "error"):
      raise Fault(f"a reply that ended in {finish}")
    raise Unanswered(f"ended in {finish:.40}")
  said = {"role": "assistant", "content": content or ""} | ({"reasoning_content": reasoning} if reasoning else {})
  # Also with tokens: of a conversation in which another server gives none, the chat template writes what was said.
  if reasoning and not thinking:
    raise Unanswered("thinks, though thinking is off", "give --thinking, or a server whose template can turn it off")
  if finish == "length":
    said["finish_reason"] = finish  # for chat.encode_conversation: the template will write an end that was not said
  if calls:
    try:
      said["tool_calls"], finish = calls_of(calls), "tool_calls"
    except ValueError as error:
      raise Unanswered("a tool call that cannot be read", str(error)) from error
  prompt, tokens = body.get("prompt_token_ids"), choice.get("token_ids")
  if _ids(prompt) and _ids(tokens):
    return Reply(said, finish, prompt, tokens, len(tokens), said["content"][:SHOWN])
  if not content and not calls:
    raise Unanswered("an empty reply" if finish == "stop" else "cut before its reply began, raise --max-new-tokens")
  usage = body.get("usage")
  count = usage.get("completion_tokens") if isinstance(usage, dict) else 0
  return Reply(said, finish, count=count if type(count) is int else 0)


def _first(choices):
  return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _ids(value):
  return isinstance(value, list) and value and all(type(token) is int and 0 <= token < 2 ** 31 for token in value)


def _refused(tried: dict[Server, Fault]) -> list[Server]:
  """The servers that refused the question."""
  return [server for server, fault in tried.items() if fault.code in REFUSED]


def _message(body, response) -> str:
  """What an error response says."""
  error = (body or {}).get("error", body)
  said = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
  code = f" ({error['code']})" if isinstance(error, dict) and isinstance(error.get("code"), str) else ""
  return f"{said if isinstance(said, str) else json.dumps(said)}{code}" if body else response.text
