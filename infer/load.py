"""Ask a server, or our engine under each policy, at rising rates of arrival: throughput, and what users wait for.

When to use it: to see how many users a machine carries, and which policy carries them best. Arrivals are a Poisson
process, the same for every policy: prompts of one or several questions, texts of several lengths. They wait for nothing
(open loop), so a machine that cannot keep up gets slower and slower, and is said not to. Any OpenAI-compatible server
is measured in the same way by its --url; --beside draws what was measured elsewhere into the same figures.

    python -m infer.load --target smollm2 --drafter runs/demo --cost runs/greedy.json --rates 0.25 0.5 1 --out runs/load
    python -m infer.load --url http://localhost:8000/v1 --name vllm --rates 1 2 4 --beside runs/load/load.json --out out

A rate counts as kept up with if no request failed and, of all that arrived, no more than a tenth, or three where that
is more, were added to those open between the middle and the end of the arrivals. The first rate also warms a server up:
give one twice.

The last line of stdout is a JSON object: rows, one per policy and rate, each in OUT/load.json once it is measured.
Figures 7 and 8 of the paper lie beside it: throughput against tokens/s per user, tokens verified per request and round
against concurrency.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import jax
import numpy as np
from rich.table import Table

from dspark_jax.config import Range, from_json, raise_all, to_json, wrong_choices
from dspark_jax.data import benchmarks, chat
from dspark_jax.decoding.dispatch import POLICIES
from dspark_jax.decoding.engine import EngineConfig
from dspark_jax.programs import shell
from dspark_jax.text import read_json
from infer import drive, figures, serve
from infer.drive import Answer, Arrival

Size = Annotated[float, Range(0)]
MORE, LEAST = 0.1, 3  # of the arrivals that may be open at the end beside those of the middle, and so many at any rate


@dataclasses.dataclass
class Settings:
  out: Path
  """folder for load.json and the figures"""
  url: str | None = None
  """an OpenAI-compatible server, such as http://localhost:8000/v1; else the engine in this process"""
  name: str = "server"
  """what the server is called in the figures"""
  model: str | None = None
  """the server's; default: the one it lists"""
  endpoint: Literal["chat", "completions"] = "chat"
  """of the server"""
  target: str | None = None
  """of the engine"""
  drafter: str = "none"
  """of the engine: drafter folder or run"""
  policies: tuple[Literal[POLICIES], ...] = ("plain", "fixed", "scheduled")
  """of the engine, each with an engine of its own; without a drafter there is only plain"""
  rates: tuple[float, ...] = (0.5, 1, 2, 4)
  """arrivals per second, each for so many seconds"""
  seconds: Annotated[float, Range(0.001)] = 30.0
  drain: Size = 60.0
  """seconds that answers are waited for after the last arrival; what is open then has failed"""
  prompts: Path | None = None
  """JSONL with turns, of which the first is asked; default: held-out questions about the standard library"""
  questions: tuple[int, ...] = (1, 1, 4)
  """questions in a prompt, drawn from these"""
  new_tokens: tuple[int, ...] = (32, 64, 128)
  """limits of a text, drawn from these"""
  temperature: Size = 0.0
  seed: Annotated[int, Range(0)] = 0
  seats: int = EngineConfig.seats
  capacity: int = EngineConfig.capacity
  cost: Path | None = None
  """cost table of infer.profile_sps, for early-stop and scheduled, which measure a missing one and keep it here"""
  dtype: Literal["float32", "bfloat16"] = "float32"
  beside: tuple[Path, ...] = ()
  """load.json of other runs, for the figures"""


@dataclasses.dataclass(frozen=True)
class Row:
  """One policy, or server, at one rate. Seconds; NaN is None: nothing was there to be measured."""
  panel: str
  policy: str
  rate: Size                       # arrivals per second asked for
  requests: int
  answered: int
  failures: dict[str, int]         # by kind
  kept_up: bool
  open_half: int                   # requests open in the middle of the arrivals
  open_end: int                    # and at their end
  late: Size                       # the longest that a request waited to be handed over
  tokens: int
  tokens_per_second: Size          # of all requests, until the last token or the end of the arrivals
  offered_per_second: Size         # limits of the arrivals, what a server that never stops early would have to bring
  tokens_per_second_per_user: Size | None   # median over requests, after the first token
  first_token: Size | None                  # median seconds from when it was due
  first_token_99: Size | None
  concurrency: Size                # mean number of requests that were being answered
  accepted_length: Size | None     # tokens per round and request
  budget: Size | None              # tokens verified per round and request, the anchor included


@dataclasses.dataclass(frozen=True)
class Loads:
  """What is in load.json."""
  settings: dict[str, Any]
  rows: tuple[Row, ...]


def main(settings: Settings) -> dict:
  check(settings)
  shell.check_out(settings.out, folder=True)
  measured = [of_server(settings)] if settings.url else of_engine(settings)  # a server is asked what it serves
  texts = [sample.turns[0] for sample in benchmarks.load_samples(settings.prompts or benchmarks.STDLIB)]
  beside = [from_json(Loads, read_json(path), f"{path} is no file of infer.load") for path in settings.beside]
  asked = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
  asked |= {name: str(value) for name, value in asked.items() if isinstance(value, Path)}
  asked |= {"beside": list(map(str, settings.beside))}
  rows = []
  with shell.bar() as bar:
    task = bar.add_task("load", total=len(settings.rates) * (1 if settings.url else len(settings.policies)), note="")
    for panel, policy, ask in measured:
      for rate in settings.rates:
        coming = arrivals(settings, rate, texts)
        bar.update(task, note=f"{policy}, {rate:g}/s, {len(coming)} requests")
        rows.append(row(panel, policy, rate, settings.seconds, coming, ask(coming)))
        # A later policy may not start, and what was measured is not to be lost with it.
        shell.write_json(settings.out / "load.json", result := to_json(Loads(asked, tuple(rows))))
        bar.update(task, advance=1)
        if not rows[-1].kept_up:
          shell.say(f"{policy} does not keep up with {rate:g} requests/s: open {rows[-1].open_half} in the middle, "
                    f"{rows[-1].open_end} at the end; failed {sum(rows[-1].failures.values())} of {rows[-1].requests}")
  shell.say(table(rows))
  drawn = figures.write(settings.out, [
      figures.Point(r.panel, r.policy, r.concurrency, r.tokens_per_second, r.tokens_per_second_per_user, r.budget)
      for r in itertools.chain(*(other.rows for other in beside), rows) if r.tokens_per_second_per_user])
  return {"rows": result["rows"], "figures": drawn}


def check(settings: Settings) -> None:
  """ValueError for settings that cannot be measured."""
  if (settings.url is None) == (settings.target is None):
    raise ValueError("expected either --url of a server or --target of the engine in this process, not both")
  if settings.url is not None:
    check_url(settings.url)
  raise_all("load", wrong_choices(settings))
  for name in ("rates", "policies", "questions", "new_tokens"):
    values = getattr(settings, name)
    if not values or name != "policies" and not all(0 < value < math.inf for value in values):
      raise ValueError(f"{name} is {values}, expected one or more, above 0 and finite")
  if settings.seconds * max(settings.rates) > 1e5:
    raise ValueError(f"{settings.seconds * max(settings.rates):.0f} arrivals at a rate of {max(settings.rates):g}, "
                     f"expected at most 100000: fewer --seconds")
  if settings.target and settings.drafter == "none" and set(settings.policies) != {"plain"}:
    raise ValueError(f"policies are {', '.join(settings.policies)}, but without a drafter all of them are plain: give "
                     f"--drafter, or --policies plain")


def check_url(url: str) -> None:
  """ValueError for what is no URL of a server."""
  try:
    parts = httpx2.URL(url)
  except httpx2.InvalidURL:
    parts = httpx2.URL()
  if parts.scheme not in ("http", "https") or not parts.host or parts.query:
    raise ValueError(f"url is {url.rpartition('@')[2]}, expected one such as http://localhost:8000/v1")


def arrivals(settings: Settings, rate: float, texts: list[str]) -> list[Arrival]:
  """A Poisson process of this rate, at least one request: the same for every policy and server."""
  rng, due, coming = np.random.default_rng([settings.seed, round(rate * 1e6)]), 0.0, []
  while (due := due + rng.exponential(1 / rate)) < settings.seconds or not coming:
    count, limit = int(rng.choice(settings.questions)), int(rng.choice(settings.new_tokens))
    text = "\n\n".join(texts[i] for i in rng.integers(len(texts), size=count))
    coming.append(Arrival(min(due, settings.seconds), text, limit, int(rng.integers(2 ** 31))))
  return coming


def of_engine(settings: Settings):
  """(panel, policy, arrivals -> answers) of each policy, whose engine is there while it is asked."""
  policies = list(dict.fromkeys(settings.policies))
  for policy in policies:  # before minutes of measurements
    serve.read_cost(served(settings, policy))
  for policy in policies:
    engine, tokenizer = start_engine(settings, policy)
    encode = lambda text: chat.encode_prompt(tokenizer, [{"role": "user", "content": text}])
    stops = chat.stop_ids(tokenizer)
    panel = f"{Path(settings.target).name}, {jax.devices()[0].device_kind}"
    yield panel, policy, lambda coming: drive.into_engine(
        engine, coming, encode, settings.drain, stop_token_ids=stops, temperature=settings.temperature)


def start_engine(settings: Settings, policy: str):
  """(an engine of this policy, the tokenizer), as infer.serve starts them."""
  return serve.start_engine(served(settings, policy))


def served(settings: Settings, policy: str) -> serve.Settings:
  """What a server of this policy is started with."""
  shared = {field.name for field in dataclasses.fields(EngineConfig)} | {"target", "drafter", "cost", "dtype"}
  given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name in shared}
  # What a request cannot ask for costs nothing.
  sampling = "full" if settings.temperature else "greedy"
  return serve.Settings(**given, policy=policy, sampling=sampling, queue=10 ** 6)


def of_server(settings: Settings):
  """(panel, name, arrivals -> answers) of a server. ValueError where it does not say what it serves."""
  base = settings.url.rstrip("/")
  base = base if base.endswith("/v1") else f"{base}/v1"
  model = settings.model or find_model(base)
  path = {"chat": "/chat/completions", "completions": "/completions"}[settings.endpoint]

  def body(arrival):
    asked = {"messages": [{"role": "user", "content": arrival.text}]} if settings.endpoint == "chat" else {
        "prompt": arrival.text}
    return asked | {"model": model, "max_tokens": arrival.new_tokens, "temperature": settings.temperature,
                    "seed": arrival.seed, "stream": True, "stream_options": {"include_usage": True}}

  return model, settings.name, lambda coming: asyncio.run(drive.over_http(
      base + path, [(arrival, body(arrival)) for arrival in coming], settings.drain))


def find_model(base: str) -> str:
  """The one model of a server."""
  try:
    listed = httpx2.get(f"{base}/models", headers=drive.key_and_headers()[1], timeout=10)
    names = [model["id"] for model in listed.json()["data"]]
  except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{base} lists no models ({type(error).__name__}): start the server, or check --url, or name the "
                     f"--model") from error
  if len(names) != 1:
    raise ValueError(f"{base} serves {', '.join(map(str, names))[:200] or 'no model'}: choose one with --model")
  return names[0]


def row(panel: str, policy: str, rate: float, seconds: float, coming: list[Arrival], answers: list[Answer]) -> Row:
  """What the answers to one rate say."""
  span = max([seconds, *(a.last for a in answers if a.last is not None)])
  good = [a for a in answers if a.failure is None]
  heard = [a for a in answers if a.first is not None]
  failures = collections.Counter(a.failure for a in answers if a.failure)
  open_at = lambda t: sum(a.due <= t and (a.failure == "unfinished" or a.last is not None and a.last > t)
                          for a in answers)
  half, end = open_at(coming[-1].due / 2), open_at(coming[-1].due)
  speeds = [(a.tokens - 1) / (a.last - a.first) for a in heard
            if a.failure is None and a.tokens > 1 and a.last > a.first]
  waits = sorted(a.first - a.due for a in heard)
  counted = [a for a in good if a.rounds]
  rounds, told = sum(a.rounds for a in counted), [a for a in counted if a.verified is not None]
  tokens = sum(a.tokens for a in answers)
  kept_up = not failures and end - half <= max(LEAST, MORE * len(coming))
  return Row(
      panel, policy, rate, len(coming), len(good), dict(failures), kept_up, half, end,
      max((a.began - a.due for a in answers if a.began is not None), default=0.0), tokens, tokens / span,
      sum(a.new_tokens for a in coming) / seconds,
      statistics.median(speeds) if speeds else None, statistics.median(waits) if waits else None,
      waits[math.ceil(0.99 * len(waits)) - 1] if waits else None, sum(a.last - a.first for a in heard) / span,
      sum(a.tokens - 1 for a in counted) / rounds if rounds else None,
      sum(a.verified for a in told) / sum(a.rounds for a in told) if told else None)


def table(rows: list[Row]) -> Table:
  """For a terminal."""
  out = Table("policy", "requests/s", "tokens/s", "per user", "first token, 99 %", "concurrency", "accepted length",
              "budget", "failed", "keeps up")
  number = lambda x, digits=1: "" if x is None else f"{x:.{digits}f}"
  for r in rows:
    out.add_row(r.policy, f"{r.rate:g}", number(r.tokens_per_second), number(r.tokens_per_second_per_user),
                f"{number(r.first_token, 2)}, {number(r.first_token_99, 2)} s", number(r.concurrency),
                number(r.accepted_length, 2), number(r.budget, 2), str(sum(r.failures.values())),
                "yes" if r.kept_up else "NO")
  return out


if __name__ == "__main__":
  shell.run(main, Settings)
