"""Serve a target, with a drafter, over the OpenAI API: completions and chat, streamed or whole.

When to use it: for research, demonstrations and small jobs, with any OpenAI client; a page at / shows a conversation
with its drafted tokens coloured. Fleets belong to vLLM, SGLang and sglang-jax, which read our drafters (infer.convert).
Needs the extra `serve`. Listens on this machine alone unless --host says otherwise; there is no authentication.

    python -m infer.serve --target smollm2 --drafter runs/demo --port 8000
    python -m infer.serve --target smollm2 --drafter none --port 8000 --seats 16
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is a monad?"}], "max_tokens": 64}'

Paths: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics (Prometheus), and the page at /. Policies:
what a round verifies; `scheduled` goes by what the engine's programs cost here, which is measured at the start (--cost
keeps or reads the table, infer.profile_sps makes one). Everything is compiled before the port is opened.

SIGTERM or Ctrl-C: what was accepted is finished, new requests are refused with 503; a second one ends at once. The last
line of stdout is a JSON object: requests, tokens, rounds and accepted_length of the time that it served.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

import dspark_jax
from dspark_jax.config import Range
from dspark_jax.data import chat
from dspark_jax.decoding import cost as costs
from dspark_jax.decoding import dispatch
from dspark_jax.decoding.calibration import mode_name
from dspark_jax.decoding.cost import Cost
from dspark_jax.decoding.engine import Engine, EngineConfig, Event
from dspark_jax.loading import locate_target, stored_temperatures, target_config
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import shell
from infer import profile_sps

# Where costs are measured at the start: runs of each program, and seconds after which there are fewer.
REPEATS, WITHIN = 3, 45
LEAVE = 30  # seconds for clients to take the last of their answers, or to finish a request that will be refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(EngineConfig):
  target: str
  drafter: str
  """drafter folder or run, or none"""
  port: Annotated[int, Range(0, 65535)] = 8000
  """0: any that is free"""
  host: str = "127.0.0.1"
  """0.0.0.0 lets every machine that reaches this one ask"""
  cost: Path | None = None
  """cost table of infer.profile_sps, for early-stop and scheduled, which measure a missing one and keep it here"""
  max_tokens: Annotated[int, Range(1)] = 256
  """new tokens of a request that names none"""
  max_body: Annotated[int, Range(1)] = 2 ** 20
  """bytes of a request"""
  kernels: Kernels = Kernels("auto", "auto")
  mesh: MeshConfig = MeshConfig()
  """devices to run on: tensor shares every row's work, data divides the seats"""
  dtype: Literal["float32", "bfloat16"] = "float32"


def main(settings: Settings) -> dict:
  try:
    import prometheus_client  # noqa: F401  (before minutes of loading)
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise ValueError(f"a server needs the extra serve ({error}): pip install -e '.[serve]'") from error
  if settings.drafter == "none" and settings.policy in ("fixed", "threshold", "early-stop"):
    raise ValueError(f"the policy is {settings.policy}, which verifies drafts, and there is no drafter: give one, or "
                     f"leave the policy out")
  listener = open_port(settings)
  with contextlib.closing(listener):
    engine, tokenizer = start_engine(settings)
    return serve(settings, engine, tokenizer, listener)


def open_port(settings: Settings) -> socket.socket:
  """The socket, bound but not listening: a port that is taken is seen before anything is loaded."""
  family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  # For the connections of a server before, which linger; then off, or another could bind it until this one listens.
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((settings.host, settings.port))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
  except OSError as error:
    listener.close()
    raise ValueError(f"port {settings.port} of {settings.host} cannot be had ({error.strerror}): choose another, or 0 "
                     f"for any") from error
  return listener


def read_cost(settings: Settings) -> Cost | None:
  """The table of --cost, if it is there. ValueError for one of another engine, as far as that is known unloaded, and
  for a place where none could be kept."""
  if not (settings.cost and settings.cost.exists()):
    shell.check_out(settings.cost)
    return None
  named = ["target", "dtype"]
  if settings.drafter != "none":
    named += ["drafter"] if settings.policy == "plain" else ["drafter", "seats", "capacity", "chunk", "sampling"]
  cost = costs.read(settings.cost)
  cost.check(device=jax.devices()[0].device_kind, **{name: getattr(settings, name) for name in named})
  return cost


def start_engine(settings: Settings) -> tuple[Engine, Any]:
  """(the engine, compiled and with its costs known; the tokenizer)."""
  config = EngineConfig(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(EngineConfig)})
  cost = read_cost(settings)
  shell.check_drafter(settings.drafter, "none")
  measures = cost is None and settings.drafter != "none" and config.policy in dispatch.BY_COST
  if measures:
    profile_sps.check_room(config.capacity, config.chunk, 0)
  path = locate_target(settings.target)
  dispatch.check(config, None, None, measured=True, positions=target_config(path).max_positions)
  tokenizer = chat.load_tokenizer(path)
  target = shell.load_target(settings.target, settings.dtype, settings.kernels)
  drafter = stored = None
  if settings.drafter != "none":
    drafter = dspark_jax.load_drafter(settings.drafter, target, dtype=settings.dtype)
    stored = stored_temperatures(settings.drafter, drafter)

  if measures:
    profile_sps.check_room(config.capacity, config.chunk, drafter.block_size)
  unfitted = set()

  def calibration(temperature):
    mode = mode_name(temperature)
    if stored and mode in stored.by_mode:
      return stored.for_mode(mode)
    if drafter and config.survival == "head" and mode not in unfitted:
      unfitted.add(mode)
      shell.say(f"no temperatures of the confidence head were fitted for {mode}, its confidences are used as they are: "
                f"fit some with train.calibrate")
    return None

  def measure(run, rows):
    status.stop()
    found, rows = profile_sps.measure(run, rows, REPEATS, target=settings.target, drafter=settings.drafter,
                                      dtype=settings.dtype, within=WITHIN)
    shell.say(profile_sps.table(found))
    return found, rows

  began = time.perf_counter()
  with shell.stderr.status("compiling") as status:
    engine = Engine(target, drafter, config, cost=cost, calibration=calibration, measure=measure,
                    say=lambda name: status.update(f"compiling {name}"))
  shell.say(f"{engine.config.seats} seats of {engine.config.capacity} tokens, policy {engine.config.policy}: ready "
            f"after {time.perf_counter() - began:.0f} s")
  shell.say("compiled " + ", ".join(f"{name} in {seconds:.1f} s with temporaries of {size / 1e6:.0f} MB"
                                    for name, (seconds, size) in engine.compile_costs.items()))
  if settings.cost and engine.cost and cost is None:
    shell.write_json(settings.cost, engine.cost.to_json())
  return engine, tokenizer


class Serving:
  """The one thread that runs the engine, and who waits for which of its events."""

  def __init__(self, engine: Engine):
    self.engine, self.draining, self.error = engine, False, None
    self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
    self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), False
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop = True
    self._wake.set()
    self._thread.join()

  def submit(self, request: Any, events: asyncio.Queue) -> int:
    """The engine's id of a request, whose events go to a queue of the running loop. RuntimeError: it has stopped."""
    with self._lock:  # else its first event could be there before it is waited for
      if self.error:
        raise RuntimeError(f"the engine has stopped ({self.error}): start the server again")
      id = self.engine.submit(request)
      self._waiting[id] = asyncio.get_running_loop(), events
    self._wake.set()
    return id

  def cancel(self, ids: list[int]) -> None:
    """Ends requests that nobody waits for any more."""
    with self._lock:
      ids = [id for id in ids if self._waiting.pop(id, None)]
    for id in ids:
      self.engine.cancel(id)
    self._wake.set()

  @property
  def busy(self) -> bool:
    """Whether anybody waits for an answer."""
    return bool(self._waiting)

  def _run(self):
    try:
      while not self._stop:
        if self.engine.idle:
          self._wake.wait(timeout=0.5)
          self._wake.clear()
        for event in self.engine.step():
          self._tell(event)
    except Exception as error:  # whatever it is, those who wait must hear of it
      shell.say(f"the engine stopped: {type(error).__name__}: {error}")
      with self._lock:  # from here on nobody begins to wait
        self.error = f"{type(error).__name__}: {error}"
        waiting = list(self._waiting)
      for id in waiting:
        self._tell(Event(id, (), None, 0, 0, 0, "failed"))

  def _tell(self, event):
    with self._lock:
      loop, events = self._waiting.get(event.id, (None, None))
      if event.finish:
        self._waiting.pop(event.id, None)
    if loop:
      loop.call_soon_threadsafe(events.put_nowait, event)


def serve(settings: Settings, engine: Engine, tokenizer: Any, listener: socket.socket) -> dict:
  """Serves until a signal; what it did."""
  import uvicorn

  from infer.serve_app import build

  with Serving(engine) as serving:
    class Server(uvicorn.Server):
      def handle_exit(self, sig, frame):  # without uvicorn's own end, which is by the signal once more
        self.force_exit = self.should_exit = serving.draining
        serving.draining = True

      async def on_tick(self, counter):  # the port stays open meanwhile, for whoever must hear a 503
        return await super().on_tick(counter) or serving.draining and not serving.busy

    app = build(settings, serving, tokenizer)
    # An end by force cancels what is at work, of which each would log a traceback: the lifespan, and requests.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=5, lifespan="off",
                            timeout_graceful_shutdown=LEAVE)
    host, port = listener.getsockname()[:2]
    shell.say(f"serving {settings.target} on http://{host}:{port}")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    Server(config).run(sockets=[listener])
  counts = engine.metrics()
  rounds = counts.get("row_rounds", 0)
  return {"port": port, "requests": counts.get("requests", 0), "tokens": counts.get("tokens", 0),
          "rounds": counts.get("rounds", 0), "error": serving.error,
          "accepted_length": counts["round_tokens"] / rounds if rounds else None}


if __name__ == "__main__":
  shell.run(main, Settings)
