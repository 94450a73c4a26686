"""Keep a server under load for half an hour, with clients that leave and ask too much, and see that nothing is lost.

When to use it: after a change of the engine or the server. It starts `infer.serve`, asks every prompt alone, then all
of them in random order from several clients, of which some leave in the middle, and in between bodies that are no JSON,
prompts that do not fit and fields that are not understood. Every greedy answer must be the one that its prompt got
alone; every bad request a 4xx with a sentence; memory flat; nothing compiled. At the end it is told to stop under load.

    python -m infer.serve_soak --target smollm2 --drafter runs/demo --minutes 30 --requests 500
    python -m infer.serve_soak --target smollm2 --drafter none --minutes 1 --requests 30

The last line of stdout is a JSON object: requests by what became of them, wrong answers, compilations, resident memory
at a tenth of the time and at the end, and how the server ended. Anything wrong exits 1.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx2

from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.programs import shell

PROMPTS = 24
BAD = (b'{"prompt": "a"', b"[]", b'{"prompt": 3}', b'{"prompt": "a", "max_tokens": -3}', b"\xff\xfe",
       b'{"prompt": "a", "sleepy": 1}', b'{"prompt": "a", "temperature": "warm"}',
       b'{"prompt": "a", "max_tokens": 100000000}')


@dataclasses.dataclass
class Settings:
  target: str
  drafter: str = "none"
  minutes: float = 30
  requests: int = 500
  """that ask for an answer; bad ones come on top"""
  clients: int = 6
  """that ask at the same time"""
  max_tokens: int = 40
  seats: int = 4
  policy: str = "scheduled"
  seed: int = 0


def main(settings: Settings) -> dict:
  shell.at_least(settings, requests=1, clients=1, max_tokens=1, seats=1)
  command = [sys.executable, "-m", "infer.serve", "--target", settings.target, "--drafter", settings.drafter, "--port",
             "0", "--seats", str(settings.seats), "--capacity", "512", "--sampling", "full", "--policy",
             settings.policy]
  # jax names on stderr whatever it compiles.
  environment = os.environ | {"JAX_LOG_COMPILES": "1"}
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
    try:
      return soak(settings, server)
    finally:
      server.kill()


def soak(settings: Settings, server: subprocess.Popen) -> dict:
  """The server's half hour, from its first word to its end."""
  url, compiled = None, []
  for line in server.stderr:
    if "serving" in line:
      url = line.split()[-1]
      break
  if url is None:
    raise ValueError(f"the server did not start: run `python -m infer.serve --target {settings.target} --drafter "
                     f"{settings.drafter}` to see why")
  threading.Thread(target=lambda: compiled.extend(x for x in server.stderr if "Compiling" in x), daemon=True).start()
  client = Client(settings, url)
  questions = [question.question for question in split(stdlib_questions())[1]][:PROMPTS]
  alone = {text: client.ask(text) for text in questions}
  before, counts, sizes = len(compiled), collections.Counter(), []
  pause = 60 * settings.minutes / settings.requests
  began = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(settings.clients) as pool, shell.bar() as bar:
    task = bar.add_task("asking", total=settings.requests, note="")
    waiting = []
    for number in range(settings.requests):
      time.sleep(max(began + number * pause - time.monotonic(), 0))
      waiting.append(pool.submit(client.one, random.Random(settings.seed * 10 ** 6 + number), alone))
      if number % max(settings.requests // 10, 1) == 0:
        sizes.append(resident(server.pid))
      bar.update(task, advance=1, note=f"{resident(server.pid) / 1e6:.0f} MB")
    for one in waiting:
      counts.update(one.result())
    metrics = client.metrics()
    found = dict(counts) | {"compiled": len(compiled) - before, "resident": [sizes[min(1, len(sizes) - 1)],
                                                                           resident(server.pid)], "metrics": metrics}
    found |= stop_under_load(client, server, pool, alone)
  wrong = {name: found.get(name, 0) for name in ("wrong", "bad accepted", "failed", "compiled")}
  grown = found["resident"][1] / found["resident"][0]
  if any(wrong.values()) or grown > 1.1 or found["exit"] != 0 or found["lost at the end"]:
    shell.say(f"not as it should be: {json.dumps(found)}")
    sys.exit(1)
  return found


class Client:
  """What is asked of the server, and what must come back."""

  def __init__(self, settings: Settings, url: str):
    self.settings, self.url = settings, url

  def ask(self, text: str, **more) -> str:
    """A greedy answer, whole."""
    return self._post(self._body(text, **more)).raise_for_status().json()["choices"][0]["text"]

  def _body(self, text, **more):
    return json.dumps({"prompt": text, "max_tokens": self.settings.max_tokens, "temperature": 0} | more).encode()

  def _post(self, body):
    return httpx2.post(f"{self.url}/v1/completions", content=body, timeout=600)

  def one(self, draw: random.Random, alone: dict[str, str]) -> collections.Counter:
    """One client's request, and sometimes a bad one."""
    found, text = collections.Counter(), draw.choice(list(alone))
    if draw.random() < 0.3:
      body = draw.choice([*BAD, self._body("word " * 3000), b"x" * (2 ** 20 + 10)])
      answer = self._post(body)
      good = 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
      found["bad refused" if good else "bad accepted"] += 1
    kind = draw.random()
    try:
      if kind < 0.25:
        found["left"] += self._leave(text, draw.randrange(6))
      elif kind < 0.4:
        self.ask(text, temperature=1.0, seed=draw.randrange(10 ** 6))
        found["sampled"] += 1
      else:
        right = self.ask(text) == alone[text] if kind < 0.7 else self._streamed(text) == alone[text]
        found["right" if right else "wrong"] += 1
    except httpx2.HTTPError as error:
      shell.say(f"a request failed: {error}")
      found["failed"] += 1
    return found

  def _chunks(self, text):
    with httpx2.stream("POST", f"{self.url}/v1/completions", content=self._body(text, stream=True),
                       timeout=600) as answer:
      for line in answer.raise_for_status().iter_lines():
        if line.startswith("data: {"):
          yield json.loads(line[6:])["choices"][0]["text"]

  def _streamed(self, text):
    return "".join(self._chunks(text))

  def _leave(self, text, after):
    chunks = self._chunks(text)
    for _ in range(after + 1):
      if next(chunks, None) is None:
        break
    chunks.close()
    return 1

  def metrics(self) -> dict[str, float]:
    """The engine's counters."""
    lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
    pairs = (line.split() for line in lines if line.startswith("dspark_") and "{" not in line)
    return {name.removeprefix("dspark_"): float(value) for name, value in pairs}


def stop_under_load(client: Client, server: subprocess.Popen, pool, alone: dict[str, str]) -> dict:
  """SIGTERM while answers are under way: all of those come, and the process ends by itself."""
  texts = list(alone)[:client.settings.clients]
  waiting = [pool.submit(client.ask, text) for text in texts]
  time.sleep(1)
  server.send_signal(signal.SIGTERM)
  time.sleep(1)
  try:
    refused = client._post(client._body(texts[0])).status_code == 503
  except httpx2.HTTPError:
    refused = True
  lost = sum(one.exception() is not None or one.result() != alone[text] for one, text in zip(waiting, texts))
  said = server.stdout.read()
  return {"lost at the end": lost, "refused at the end": refused, "exit": server.wait(timeout=60),
          "said": json.loads(said.splitlines()[-1])}


def resident(pid: int) -> int:
  """Bytes of memory that a process holds."""
  with open(f"/proc/{pid}/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  shell.run(main, Settings)
