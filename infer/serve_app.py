"""The web application of `infer.serve`: routes, limits, streams, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import functools
import hashlib
import json
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dspark_jax.decoding.engine import Full
from dspark_jax.programs.openai_api import Answer, Job, Refused, Speaker, check_model, parse

PAGE = Path(__file__).with_name("serve_page.html")
GAUGES = {"seats", "occupied", "queue", "device_idle_share"}
FAULT = Refused("the server has a fault, which its own log tells", status=500)


def build(settings: Any, serving: Any, tokenizer: Any) -> Starlette:
  """The application. settings: `infer.serve.Settings`, serving: `infer.serve.Serving`."""
  served = App(settings, serving, tokenizer)
  post = lambda path, chat_form: Route(path, functools.partial(served.complete, chat_form=chat_form), methods=["POST"])
  routes = [post("/v1/completions", False), post("/v1/chat/completions", True), Route("/v1/models", served.models),
            Route("/v1/models/{id:path}", served.model), Route("/health", served.health),
            Route("/metrics", served.metrics), Route("/", served.page)]
  handlers = {Refused: lambda _, error: JSONResponse(error.body(), error.status),
              404: lambda request, _: refusal(f"there is no {request.url.path}", 404),
              405: lambda request, _: refusal(f"{request.url.path} takes no {request.method}", 405),
              500: lambda *_: JSONResponse(FAULT.body(), FAULT.status)}
  return Starlette(routes=routes, exception_handlers=handlers)


def refusal(sentence: str, status: int) -> JSONResponse:
  """An error as OpenAI's clients expect it."""
  return JSONResponse(Refused(sentence, status=status).body(), status)


class Stream(StreamingResponse):
  """Server-sent events; `leave` is called at their end, also where the client has left before the first."""

  def __init__(self, told: AsyncIterator[str], leave: Callable[[], None]):
    super().__init__(told, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    self._leave = leave

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:  # a generator that was never begun has no end of its own
      self._leave()


class App:
  """The routes."""

  def __init__(self, settings: Any, serving: Any, tokenizer: Any):
    self.settings, self.serving, self.tokenizer, self.began = settings, serving, tokenizer, int(time.time())
    # Prompts are tokenized beside the streams, one at a time, by a tokenizer of their own: it keeps settings of a call
    # in itself, and may not be changed while another thread reads it.
    self.reader, self.reading = copy.deepcopy(tokenizer), asyncio.Lock()
    self.registry = prometheus_client.CollectorRegistry()
    self.registry.register(EngineMetrics(serving))
    spread = lambda name, text, buckets: prometheus_client.Histogram(name, text, buckets=buckets,
                                                                     registry=self.registry)
    self.first = spread("dspark_time_to_first_token_seconds", "from a request's arrival to its first text",
                        (.02, .05, .1, .2, .5, 1, 2, 5, 10, 30))
    self.speed = spread("dspark_tokens_per_second_per_request", "of one answer, after its first token",
                        (1, 2, 5, 10, 20, 50, 100, 200, 500))
    self.length = spread("dspark_accepted_length", "tokens per round of one answer", (1, 1.5, 2, 3, 4, 5, 6, 8))

  async def complete(self, request: Request, chat_form: bool) -> Response:
    """A completion, of a text or of a conversation."""
    arrived = time.perf_counter()
    self._must_be_open()
    body, room = await self._json(request), self.serving.engine.room
    async with self.reading:
      job = await asyncio.to_thread(
          parse, body, self.reader, chat_form=chat_form, model=self.settings.target,
          most=lambda prompt: max(min(self.settings.max_tokens, room(prompt)), 1))
    most = self.settings.queue + self.settings.seats
    if len(job.requests) > most:  # by the queue it would be told to try again later, for ever
      raise Refused(f"n is {len(job.requests)}, but only {most} requests may be here at a time: ask for fewer answers, "
                    f"or start the server with a longer --queue", "n")
    self._must_be_open()  # it may have taken long
    answer, events, ids = Answer(job, self.settings.target), asyncio.Queue(), []
    try:
      for one in job.requests:
        ids.append(self.serving.submit(one, events))
    except (ValueError, Full, RuntimeError) as error:
      self.serving.cancel(ids)
      status = 400 if isinstance(error, ValueError) else 429 if isinstance(error, Full) else 500
      raise Refused(str(error), status=status) from error
    told = self._tell(job, answer, ids, events, arrived)
    if job.stream:
      return Stream(told, functools.partial(self.serving.cancel, ids))
    return await self._whole(request, told, ids)

  def _must_be_open(self):
    if self.serving.draining:
      raise Refused("the server is shutting down: ask another", status=503)

  async def _whole(self, request, told, ids):
    """The last of what is told, unless the client leaves before."""
    async def last():
      found = None
      async for found in told:
        pass
      return found

    working = asyncio.ensure_future(last())
    try:
      while not (done := (await asyncio.wait([working], timeout=0.5))[0]):
        if await request.is_disconnected():
          working.cancel()
          self.serving.cancel(ids)
          return Response(status_code=499)
      return JSONResponse(done.pop().result())
    finally:
      self.serving.cancel(ids)

  async def _tell(self, job: Job, answer: Answer, ids: list[int], events: asyncio.Queue, arrived: float
                  ) -> AsyncIterator[Any]:
    """A stream's chunks as they come; or, of an answer that is not streamed, its body alone."""
    speakers = {id: Speaker(self.tokenizer, job.stops) for id in ids}
    finishes, begun, greeted = {}, {}, set()
    try:
      while len(finishes) < len(ids):
        event = await events.get()
        if event.id in finishes:
          continue
        speaker = speakers[event.id]
        if event.finish == "failed":
          raise Refused("the model's logits are not numbers, or the engine has stopped", status=500)
        text, told = speaker.feed(event)
        if event.tokens and event.id not in begun:
          begun[event.id] = time.perf_counter()
          self.first.observe(begun[event.id] - arrived)
        finish = "stop" if speaker.stopped else event.finish
        if finish:
          finishes[event.id] = finish
          self.serving.cancel([event.id])  # of several answers one may end at a stop text long before the others
          self._measure(speaker, begun.get(event.id))
        if job.stream and (text or finish or job.details or job.log_probs and told):
          logs = speaker.logs(told, job.chat) if job.log_probs else None
          details = None
          if job.details:
            details = {"drafted": event.drafted, "verified": event.verified, "accepted": event.accepted,
                       "pieces": speaker.pieces(told)}
          yield sse(answer.chunk(ids.index(event.id), text, finish, logs, details, event.id not in greeted))
          greeted.add(event.id)
      spoken = [speakers[id] for id in ids]
      if not job.stream:
        yield answer.whole(spoken, [finishes[id] for id in ids])
        return
      for chunk in answer.last(spoken):
        yield sse(chunk)
      yield "data: [DONE]\n\n"
    except Refused as error:
      if not job.stream:
        raise
      yield sse(error.body())  # the status has gone out already
    except Exception:
      if not job.stream:
        raise
      traceback.print_exc()
      yield sse(FAULT.body())
    finally:
      self.serving.cancel(ids)  # who left, or was cut at a stop text, is not decoded to the end

  def _measure(self, speaker, began):
    if speaker.rounds:
      self.length.observe(speaker.accepted_length)
      self.speed.observe(speaker.round_tokens / max(time.perf_counter() - began, 1e-9))

  async def _json(self, request):
    """A request's body. `Refused` before more than the limit is held."""
    body = bytearray()
    with contextlib.suppress(ClientDisconnect):
      async for part in request.stream():
        body += part
        if len(body) > self.settings.max_body:
          raise Refused(f"the body has more than {self.settings.max_body} bytes: send less, or start the server with "
                        f"a larger --max-body", status=413)
    try:
      return json.loads(body)
    except (ValueError, RecursionError) as error:
      raise Refused(f"the body is no JSON ({str(error):.80})") from error

  async def models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._served()]})

  async def model(self, request: Request) -> Response:
    check_model(request.path_params["id"], self.settings.target)
    return JSONResponse(self._served())

  def _served(self):
    return {"id": self.settings.target, "object": "model", "created": self.began, "owned_by": "local"}

  async def health(self, request: Request) -> Response:
    """200 while requests are taken."""
    state = "failed" if self.serving.error else "draining" if self.serving.draining else "ok"
    return JSONResponse({"status": state, "error": self.serving.error}, 200 if state == "ok" else 503)

  async def metrics(self, request: Request) -> Response:
    return Response(prometheus_client.generate_latest(self.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

  async def page(self, request: Request) -> Response:
    """The page, which may run its own script and style and ask this server, and nothing else."""
    html = PAGE.read_text(encoding="utf-8")
    hashes = {kind: base64.b64encode(hashlib.sha256(re.search(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)[1].encode()
                                                    ).digest()).decode() for kind in ("script", "style")}
    policy = (f"default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
              f"script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'")
    return HTMLResponse(html, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})


def sse(value: Any) -> str:
  """A server-sent event."""
  return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class EngineMetrics:
  """The engine's counters and gauges, in Prometheus' form, as they are when asked."""

  def __init__(self, serving: Any):
    self.serving = serving

  def collect(self):
    found, hits = self.serving.engine.metrics(), []
    for name, value in sorted(found.items()):
      if name.startswith("program_"):
        hits.append((name.removeprefix("program_"), value))
        continue
      kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
      yield kind(f"dspark_{name}", f"engine: {name.replace('_', ' ')}", value=value)
    family = CounterMetricFamily("dspark_program_rounds", "rounds of each program", labels=["program"])
    for name, value in hits:
      family.add_metric([name], value)
    yield family
