"""A server under half an hour of clients who ask, leave, lie and err: every answer is the one of its request alone.

When to use it: after a change to the engine or the server, and before a machine serves for days. It starts infer.serve
in a process of its own, asks a few prompts alone, one after another at temperature 0, and then all the time, at random
moments: these again, whole and streamed; sampled ones; clients who leave, in a stream or before an answer; prompts that
do not fit; bodies that are no JSON; fields of no meaning. At the end SIGTERM comes while answers are under way.

    python -m infer.soak_serve --target smollm2 --drafter none
    python -m infer.soak_serve --target smollm2 --drafter runs/demo --minutes 5 --requests 80

The last line of stdout is a JSON object: ok, and what it follows from: counts (of each kind of request, and what came
of it), wrong (sentences, the first twenty), compiled (programs that were compiled while it served), megabytes (of the
server's memory: after the first third, at the end), code (its exit code) and server (its own last line). Its log is
OUT/server.log.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import httpx2

from dspark_jax.config import Range
from dspark_jax.programs import shell
from infer import drive

PROMPTS = ("Once upon a time", "The capital of France is", "def reverse(items):", "A list of primes: 2, 3, 5,",
           "My favourite fruit is the", "In the year 1900, the", "To be or not to be", "Water boils at",
           "import json\n", "Dear Sir or Madam, ", "She opened the door and", "The three laws of motion are " * 4)
# kind -> how often
KINDS = {"whole": 35, "stream": 25, "sampled": 10, "leaves": 12, "impatient": 6, "too long": 4, "no json": 4,
         "unknown field": 4}
BAD = {"too long": json.dumps({"prompt": "word " * 20000}), "no json": '{"prompt": "Once',
       "unknown field": json.dumps({"prompt": "Once", "frequency_penalty": 2})}
GROWTH = 1.1  # the server's memory between the first third and the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  target: str
  drafter: str
  minutes: Annotated[float, Range(0.1)] = 30
  requests: Annotated[int, Range(1)] = 500
  new_tokens: Annotated[int, Range(8)] = 48
  seats: Annotated[int, Range(1)] = 4
  policy: str = "scheduled"
  seed: int = 0
  out: Path = Path("runs/soak_serve")


def main(settings: Settings) -> dict:
  settings.out.mkdir(parents=True, exist_ok=True)
  log = settings.out / "server.log"
  command = [sys.executable, "-m", "infer.serve", "--target", settings.target, "--drafter", settings.drafter, "--port",
             "0", "--seats", str(settings.seats), "--capacity", "512", "--policy", settings.policy]
  with log.open("w") as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True,
                                               env=os.environ | {"JAX_LOG_COMPILES": "1"}) as server:
    try:
      url = wait_for(server, log)
      before = log.stat().st_size
      soak = Soak(settings, url, server)
      asyncio.run(soak.run())
      last = server.communicate(timeout=600)[0]
    finally:
      if server.poll() is None:
        server.kill()
  compiled = log.read_bytes()[before:].decode(errors="replace").count("Compiling ")
  wrong, (third, end) = soak.wrong, soak.megabytes
  ok = not wrong and not compiled and server.returncode == 0 and end <= GROWTH * third
  return {"ok": ok, "counts": dict(soak.counts), "wrong": wrong[:20], "compiled": compiled, "megabytes": [third, end],
          "code": server.returncode, "server": json.loads(last.splitlines()[-1]) if last else None}


def wait_for(server: subprocess.Popen, log: Path) -> str:
  """The server's address, when it takes requests."""
  while True:
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := [line.split()[-1] for line in text.splitlines() if line.startswith("serving ")]:
      return found[0]
    if server.poll() is not None:
      raise ValueError(f"the server did not start: {text.strip().splitlines()[-1]}")
    time.sleep(0.5)


class Soak:
  """The clients, and what they found."""

  def __init__(self, settings: Settings, url: str, server: subprocess.Popen):
    self.settings, self.url, self.server, self.random = settings, url, server, random.Random(settings.seed)
    self.counts, self.wrong, self.megabytes, self.alone = collections.Counter(), [], [], {}

  async def run(self) -> None:
    """Asks alone, then in a crowd, then while the server ends."""
    wait = self.settings.minutes * 60 / self.settings.requests
    # One at a time and each once: that a prompt is asked again and its prefix reused must change nothing.
    async with httpx2.AsyncClient(base_url=self.url, timeout=600) as client:
      for prompt in PROMPTS:
        self.alone[prompt] = (await self.post(client, prompt)).json()["choices"][0]["text"]
      going = []
      with shell.bar() as bar:
        task = bar.add_task("requests", total=self.settings.requests, note="")
        for number in range(self.settings.requests):
          bar.update(task, completed=number, note=f"{len(self.wrong)} wrong")
          going.append(asyncio.create_task(self.ask(client, self.random.choices(*zip(*KINDS.items()))[0])))
          await asyncio.sleep(self.random.expovariate(1 / wait))
          if number == self.settings.requests // 3:
            self.megabytes.append(self.memory())
      await asyncio.gather(*going)
      self.megabytes.append(self.memory())
      await self.end(client)

  async def end(self, client: httpx2.AsyncClient) -> None:
    """SIGTERM under load: what runs is finished, what comes is refused."""
    going = [asyncio.create_task(self.ask(client, "whole")) for _ in range(2 * self.settings.seats)]
    await asyncio.sleep(0.5)
    self.server.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    late = await self.post(client, PROMPTS[0])
    self.check(late.status_code == 503, f"after SIGTERM a request had {late.status_code}, expected 503")
    await asyncio.gather(*going)

  def check(self, right: bool, sentence: str) -> None:
    if not right:
      self.wrong.append(sentence)

  def memory(self) -> float:
    """Megabytes of the server (Linux)."""
    pages = int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, 1)

  def body(self, prompt: str, **more) -> str:
    return json.dumps({"prompt": prompt, "temperature": 0, "max_tokens": self.settings.new_tokens} | more)

  async def post(self, client, prompt, **more):
    return await client.post("/v1/completions", content=self.body(prompt, **more))

  async def ask(self, client: httpx2.AsyncClient, kind: str) -> None:
    """One request, and whether its answer is right."""
    prompt = self.random.choice(PROMPTS)
    self.counts[kind] += 1
    try:
      if kind in BAD:
        found = await client.post("/v1/completions", content=BAD[kind])
        self.check(400 <= found.status_code < 500 and found.json()["error"]["message"],
                   f"{kind}: {found.status_code} {found.text[:200]}")
      elif kind == "impatient":
        with contextlib.suppress(asyncio.TimeoutError):
          await asyncio.wait_for(self.post(client, prompt, max_tokens=200), self.random.uniform(0, 1))
      elif kind in ("stream", "leaves"):
        await self.listen(client, prompt, self.random.randrange(8) if kind == "leaves" else None)
      else:
        found = await self.post(client, prompt, **({"temperature": 1, "top_p": .9} if kind == "sampled" else {}))
        if found.status_code == 429:
          self.counts["full"] += 1
          return
        self.check(found.status_code == 200, f"{kind}: {found.status_code} {found.text[:200]}")
        if found.status_code == 200 and kind == "whole":
          self.same(prompt, found.json()["choices"][0]["text"])
    except Exception as error:  # whatever a client meets is a finding
      self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

  async def listen(self, client, prompt, chunks):
    """A stream, to its end or so many chunks."""
    text = []
    async with client.stream("POST", "/v1/completions", content=self.body(prompt, stream=True)) as response:
      if response.status_code == 429:
        self.counts["full"] += 1
        return
      async for line in drive.lines(response):
        if chunks is not None and len(text) >= chunks:
          return
        if line.startswith("data: ") and line != "data: [DONE]":
          text.append(json.loads(line[6:])["choices"][0]["text"])
    if chunks is None:
      self.same(prompt, "".join(text))

  def same(self, prompt: str, text: str) -> None:
    self.counts["compared"] += 1
    self.check(text == self.alone[prompt], f"{prompt[:30]!r} went on with {text!r:.200}, alone with "
                                           f"{self.alone[prompt]!r:.200}")


if __name__ == "__main__":
  shell.run(main, Settings)
