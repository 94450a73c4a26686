"""The scheduled engine: requests come and go over the seats of one batch (continuous batching).

Every step of the host dispatches one round, then reads what the round before it said: the host never waits for a round
that it has just begun, and the device finds its next round waiting. So a decision knows of the rounds up to two before,
which is also what makes an unconstrained choice lossless (DSpark, 5.2): how much is verified follows from old
survivals, which drafts from this round's.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import numpy as np

from dspark_jax.config import Count, Range, raise_all, shown, wrong_choices
from dspark_jax.decoding import dispatch
from dspark_jax.decoding.cost import Cost
from dspark_jax.decoding.estimator import Estimator, observed
from dspark_jax.decoding.executables import FEATURES, STOP_IDS, Executables, Knobs, empty_rows, on_host
from dspark_jax.decoding.round import Chunk, Models, Report, Settings
from dspark_jax.decoding.session import check, check_models
from dspark_jax.decoding.verify import Rule
from dspark_jax.nn.attention import QUERY_BLOCK
from dspark_jax.sampling import make_sampling
from dspark_jax.types import Drafter, Target

Share = Annotated[float, Range(0, 1)]
MODES = ("greedy", "full", "truncated")  # of `Sampling`; each holds those before it


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked of an engine. Stop token ids: STOP_IDS at most."""
  prompt: tuple[int, ...]
  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop_token_ids: tuple[int, ...] = ()
  log_probabilities: bool = False
  reuse: bool = True  # whether tokens that a seat has read already need not be read again


@dataclasses.dataclass(frozen=True)
class Event:
  """What one round says of one request; its events come in order."""
  id: int
  tokens: tuple[int, ...]
  log_probabilities: tuple[float, ...] | None
  drafted: int        # of this round; 0 where it was a plain one
  verified: int
  accepted: int
  finish: str | None  # stop | length | cancelled | failed; None: there is more to come


class Full(Exception):
  """The queue holds as many requests as it may."""


@dataclasses.dataclass(eq=False)
class _Seat:
  """A place for a request, and what its caches hold."""
  index: int
  id: int | None = None       # None: free
  request: Request | None = None
  tokens: list[int] = dataclasses.field(default_factory=list)  # of the prompt, then new ones as they are reported
  read: int = 0               # tokens of the prompt that both caches have, or will have after what is dispatched
  sent: int = 0               # new tokens in events
  past: collections.deque = dataclasses.field(default_factory=lambda: collections.deque(maxlen=dispatch.ROUNDS))
  used: int = 0               # when it was last given up

  @property
  def reads(self) -> bool:
    return self.id is not None and self.read < len(self.request.prompt)

  @property
  def plays(self) -> bool:
    return self.id is not None and not self.reads

  @property
  def context(self) -> int:
    """Committed tokens, as far as was reported."""
    return self.read + max(self.sent - 1, 0)


@dataclasses.dataclass(eq=False)
class _Flight:
  """A round that was dispatched and not yet read."""
  report: Report
  players: list[tuple[_Seat, int]]  # with the request's id
  program: str
  predicted: float                  # seconds
  began: float


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine serves."""
  seats: Count = 8
  """requests that play at a time"""
  capacity: Count = 2048
  """tokens of a seat: prompt and text, and two blocks of scratch; beside a prompt at least a chunk and a block"""
  policy: Literal[dispatch.POLICIES] = "scheduled"
  """what is verified: nothing (plain), every draft (fixed), what is above the thresholds, Algorithm 1 (early-stop), or
  the best of all programs for the survivals of two rounds before (scheduled); under the last three sampled text depends
  on the round's neighbours"""
  verification: Rule = "token"
  """at temperatures above 0: drafts tested one by one, or as a block, which keeps a few more"""
  survival: Literal["auto", "head", "estimator", "both"] = "auto"
  """what the last three policies go by: the confidence head, what is learnt while serving, or both; auto: what is
  learnt, which foretold best wherever it was measured (train.survival)"""
  sampling: Literal["greedy", "full", "truncated"] = "truncated"
  """the most that requests may ask for: temperature (full), top-k and top-p (truncated); the least is the fastest"""
  chunk: Count = 64
  """tokens of a prompt that are read beside a round"""
  queue: Count = 256
  """requests that may wait, beside those that free seats are about to take"""
  log_probabilities: bool = False
  """whether requests may ask for them, which costs every round a pass over its logits"""
  confidence_threshold: Share = 0.0
  """of the policy threshold"""
  survival_threshold: Share = 0.0
  """of the policy threshold"""
  buckets: tuple[Count, ...] = ()
  """tokens of the packed programs; none given: those of the cost table, or 2, 3, 4 and 6 a seat"""

  def __post_init__(self):
    problems, sizes = wrong_choices(self), self.buckets
    if not all(small < large for small, large in zip((0, *sizes), sizes)):
      problems.append(f"buckets are {shown(sizes)}, expected rising numbers of tokens")
    if self.policy != "threshold" and (self.confidence_threshold or self.survival_threshold):
      problems.append(f"the policy {self.policy} knows no confidence_threshold and no survival_threshold: expected "
                      f"threshold")
    if self.chunk > QUERY_BLOCK and self.chunk % QUERY_BLOCK:
      problems.append(f"chunk is {self.chunk}, expected at most {QUERY_BLOCK} or a multiple of it")
    if self.capacity <= self.chunk:
      problems.append(f"capacity is {self.capacity}, expected more than chunk, which is {self.chunk}")
    raise_all("engine", problems)


class Engine:
  """A target, maybe a drafter, and seats for requests.

  cost: what early-stop and scheduled go by; without one, measure(executables, rows) -> (cost, empty rows) is asked.
  calibration: a temperature of sampling -> temperatures f[G] of the head's confidences, or None. say: is told what is
  compiled next; `compile_costs`: seconds and bytes of temporaries of each. ValueError for what does not fit
  together. `submit`, `cancel` and `metrics` may be called from any thread, `step` from one.
  """

  def __init__(self, target: Target, drafter: Drafter | None = None, config: EngineConfig = EngineConfig(), *,
               cost: Cost | None = None, calibration: Callable[[float], Any] = lambda temperature: None,
               measure: Callable[..., Any] | None = None, say: Callable[[str], None] = lambda text: None):
    if config.policy == "plain" or drafter is None:
      drafter, config = None, dataclasses.replace(config, policy="plain")
    if config.survival == "auto":
      config = dataclasses.replace(config, survival="estimator")
    check_models(target, drafter)
    self.target, self.drafter, self.config = target, drafter, config
    dispatch.check(config, drafter, cost, measured=measure is not None, positions=target.max_positions)
    buckets = () if config.policy in ("plain", "fixed") else config.buckets or (
        tuple(cost.packed) if cost else dispatch.default_buckets(config.seats, self.block))
    if self.room(1) < 1:
      raise ValueError(f"a seat of {config.capacity} tokens has no room for a prompt beside its chunk of "
                       f"{config.chunk} and blocks of {self.block} drafts: give a larger capacity, or smaller chunks")
    models = Models.of(target, drafter)
    self._rows = empty_rows(models, config.seats, config.capacity, config.sampling, config.verification)
    self._run = Executables(models, self._rows, say, policy=config.policy, survival=config.survival, buckets=buckets,
                            chunk=config.chunk, log_probs=config.log_probabilities)
    if cost is None and measure and config.policy in dispatch.BY_COST:
      cost, self._rows = measure(self._run, self._rows)
    self.cost, self.compile_costs = cost, self._run.compile_costs
    self._calibration = calibration if drafter else lambda temperature: None
    self._dispatcher = dispatch.Dispatcher(config, cost, self.block, buckets)
    # Of greedy rows and of sampled ones, which survive otherwise.
    self.estimators = [Estimator(self.block, max(FEATURES[config.survival], 1)) for _ in range(2)]
    self._knobs = Knobs.empty(config.seats, self.block, config.survival)
    self._seats = [_Seat(index) for index in range(config.seats)]
    self._queue: collections.deque[tuple[int, Request]] = collections.deque()
    self._lock, self._next, self._dropped = threading.Lock(), 0, set()
    self._flights: collections.deque[_Flight] = collections.deque()
    self._counts, self._events = collections.Counter(), []
    self._free_at = 0.0  # when the newest round that was read had ended
    # Seconds of each program's newest rounds: their median, as of two that are read at once the second takes none.
    self._took = collections.defaultdict(lambda: collections.deque(maxlen=dispatch.ROUNDS))

  @property
  def block(self) -> int:
    """G; 0 without a drafter."""
    return self.drafter.block_size if self.drafter else 0

  @property
  def idle(self) -> bool:
    """Whether there is nothing queued, nothing seated and nothing unread."""
    return not (self._queue or self._flights or self._events or any(seat.id is not None for seat in self._seats))

  def submit(self, request: Request) -> int:
    """The id of a request that now waits for a seat. ValueError for one that cannot be served; `Full`."""
    self._validate(request)
    with self._lock:
      if len(self._queue) >= self.config.queue + sum(seat.id is None for seat in self._seats):
        raise Full(f"{len(self._queue)} requests are waiting, the most that may: try again later")
      self._next += 1
      self._queue.append((self._next, request))
      self._counts["requests"] += 1
      return self._next

  def cancel(self, id: int) -> None:
    """Ends a request wherever it is; nothing for one that has ended."""
    with self._lock:
      self._dropped.add(id)

  def run(self) -> Iterator[Event]:
    """The events of all that is queued and seated, until nothing is."""
    while not self.idle:
      yield from self.step()

  def step(self) -> list[Event]:
    """Dispatches a round, if a request is there to play, and says what the one before it brought."""
    self._drop()
    self._seat_the_next()
    reads = min((seat for seat in self._seats if seat.reads), key=lambda seat: seat.id, default=None)  # as they came
    plays = [seat for seat in self._seats if seat.plays]
    if reads or plays:
      self._dispatch(plays, reads)
    while len(self._flights) > (1 if reads or plays else 0):
      self._land(self._flights.popleft())
    events, self._events = self._events, []
    return events

  def use(self, policy: str) -> None:
    """Plays by another of the policies plain, fixed and scheduled from now on, with the same programs: to compare them.

    ValueError for one that has programs of its own, or where this engine's are not all that it needs.
    """
    started = self.config.policy
    if started not in ("fixed", "scheduled") or policy not in ("plain", "fixed", started):
      raise ValueError(f"the policy {policy} cannot be taken on by an engine that was started for "
                       f"{started}: start one for it")
    self._dispatcher.policy = policy

  def metrics(self) -> dict[str, float]:
    """Counters since the start, and gauges; times in seconds, by the host's clock."""
    counts = dict(self._counts)
    playing = sum(seat.id is not None for seat in self._seats)
    return counts | {"seats": len(self._seats), "occupied": playing, "queue": len(self._queue),
                     "device_idle_share": counts.get("idle_seconds", 0) / max(counts.get("round_seconds", 0), 1e-9)}

  def room(self, prompt: int) -> int:
    """The most new tokens of a request whose prompt has so many; below 1: it does not fit."""
    slots, block = self.config.capacity, self.block
    # A prompt's last chunk is written whole, and behind it what its row would write if it played.
    if prompt + self.config.chunk + block > slots:
      return 0
    return min(slots - 2 * (block + 1), self.target.max_positions) - prompt

  def _validate(self, request):
    for name in ("max_new_tokens", "top_k", "seed", "temperature", "top_p"):
      value, wanted = getattr(request, name), "__float__" if name in ("temperature", "top_p") else "__index__"
      if isinstance(value, bool) or not hasattr(value, wanted):
        raise ValueError(f"{name} is {shown(value)}, expected one number")
    check(max_new_tokens=request.max_new_tokens, seed=request.seed)
    self._temperatures(request)
    mode = make_sampling(request.temperature, request.top_k, request.top_p).mode
    if MODES.index(mode) > MODES.index(self.config.sampling):
      raise ValueError(f"the request asks for {mode} sampling, the engine was started for "
                       f"{self.config.sampling}: change its temperature, top_k and top_p, or start it with --sampling "
                       f"{mode}")
    if not request.prompt:
      raise ValueError("the prompt is empty: expected at least one token")
    for name, ids in (("prompt", request.prompt), ("stop_token_ids", request.stop_token_ids)):
      if ids and not 0 <= min(ids) <= max(ids) < self.target.vocab_size:
        raise ValueError(f"{name} has token ids {min(ids)}..{max(ids)}, the target's vocabulary is "
                         f"0..{self.target.vocab_size - 1}: was it made with another tokenizer?")
    if len(request.stop_token_ids) > STOP_IDS:
      raise ValueError(f"there are {len(request.stop_token_ids)} stop token ids, expected at most {STOP_IDS}")
    if request.max_new_tokens > (room := self.room(len(request.prompt))):
      raise ValueError(f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit a "
                       f"seat of {min(self.config.capacity, self.target.max_positions)}, which has room for "
                       f"{max(room, 0)} after this prompt: shorten it, or ask for fewer")
    if request.log_probabilities and not self.config.log_probabilities:
      raise ValueError("log-probabilities are asked for, of an engine without: start it with --log-probabilities")

  def _temperatures(self, request):
    """f32[1,G] of the head's confidences."""
    table = self._calibration(request.temperature)
    if table is not None and np.shape(table) != (self.block,):
      raise ValueError(f"the calibration has {np.size(table)} temperatures, expected {self.block}, one for each draft: "
                       f"fit it for this drafter (python -m train.calibrate)")
    return np.asarray(np.ones(self.block) if table is None else table, np.float32)[None]

  def _drop(self):
    """Ends what was cancelled."""
    with self._lock:
      dropped, self._dropped = self._dropped, set()
      queued = [id for id, _ in self._queue if id in dropped]
      self._counts["finished"] += len(queued)
      self._queue = collections.deque(pair for pair in self._queue if pair[0] not in dropped)
    for seat in self._seats:
      if seat.id in dropped:
        self._rows = self._run("retire", self._rows, np.int32(seat.index))
        queued.append(seat.id)
        self._free(seat)
    self._events += [Event(id, (), None, 0, 0, 0, "cancelled") for id in queued]

  def _seat_the_next(self):
    """Gives free seats to those who wait, in their order."""
    while self._queue and any(seat.id is None for seat in self._seats):
      with self._lock:
        id, request = self._queue.popleft()
      seat, source, n = self._place(request)
      how = "copy" if n and source is not seat else "own"
      sampling = make_sampling(request.temperature, request.top_k, request.top_p).replace(mode=self.config.sampling)
      stops = np.full((1, STOP_IDS), -1, np.int32)
      stops[0, :len(request.stop_token_ids)] = request.stop_token_ids
      thresholds = np.float32([[self.config.confidence_threshold, self.config.survival_threshold]])
      one = Settings(sampling, stops, np.asarray([request.max_new_tokens], np.int32), self._temperatures(request),
                     thresholds, self.config.verification)
      self._rows = self._run(how, self._rows, np.int32(seat.index), one, np.uint32(request.seed),
                             np.int32(source.index), np.int32(n))
      seat.id, seat.request, seat.tokens, seat.read, seat.sent = id, request, list(request.prompt), n, 0
      seat.past.clear()
      self._counts["prefix_tokens_reused"] += n
      self._counts["prompt_tokens"] += len(request.prompt)

  def _place(self, request):
    """(a free seat, the seat that has the longest beginning of the prompt, its tokens)."""
    free = [seat for seat in self._seats if seat.id is None]
    # The last token of a common beginning is read again: a recurrent drafter pairs it with the one after it.
    known = {seat: _common(seat.tokens[:seat.context], request.prompt) - 1 if request.reuse else 0
             for seat in self._seats}
    source = max(self._seats, key=lambda seat: (known[seat], seat.id is None))
    if known[source] < 1:
      return min(free, key=lambda seat: (len(seat.tokens) > 0, seat.used)), source, 0
    if source.id is None:
      return source, source, known[source]
    return min(free, key=lambda seat: (known[seat], seat.used)), source, known[source]

  def _dispatch(self, plays, reads):
    """One round: of those who play, and a chunk of a prompt beside."""
    choice = self._dispatcher.choose([seat.past for seat in plays], [seat.context for seat in plays], bool(reads))
    began = time.perf_counter()
    newest = self._flights[-1] if self._flights else None
    # Else the device is still at work, or nobody knows how long this program takes.
    if newest and newest.report.done.is_ready() and (took := self._took[newest.program]):
      ended = max(self._free_at, newest.began) + statistics.median(took)
      self._counts["idle_seconds"] += max(began - ended, 0.0)
    chunk = self._next_chunk(reads) if reads else None
    name = dispatch.named(choice.program, bool(reads))
    if choice.program == "plain":
      self._rows, report = self._run(name, self._rows, chunk)
    else:
      drafted = self._run("draft", self._rows, self._set_knobs(choice))
      self._rows, report = self._run(name, self._rows, drafted, chunk)
    if jax.default_backend() != "cpu":  # where what a program gives is on the host already
      jax.tree.map(lambda x: x.copy_to_host_async(), report)
    players = [(seat, seat.id) for seat in plays]
    if reads and not reads.reads:
      players.append((reads, reads.id))
    self._flights.append(_Flight(report, players, name, choice.seconds, began))
    self._counts["rounds"] += 1
    self._counts["program_" + name] += 1
    self._counts["budget"] += choice.tokens
    self._counts["host_seconds"] += time.perf_counter() - began

  def _set_knobs(self, choice):
    knobs = self._knobs.replace(budget=np.int32(choice.tokens), sps=self._dispatcher.sps)
    if count := knobs.weights.shape[1]:
      knobs = knobs.replace(weights=np.float32([state.weights[:count] for state in self.estimators]),
                            intercepts=np.float32([state.intercepts for state in self.estimators]))
    return knobs

  def _next_chunk(self, seat):
    prompt = seat.request.prompt
    part = prompt[seat.read:seat.read + self.config.chunk]
    seat.read += len(part)
    tokens = np.zeros(self.config.chunk, np.int32)
    tokens[:len(part)] = part
    return Chunk(tokens, np.int32(len(part)), np.int32(seat.index), np.int32((*prompt, -1)[seat.read]))

  def _land(self, flight):
    """Reads a round's report, and turns it into events."""
    report = on_host(flight.report)
    now = time.perf_counter()
    seconds = now - max(flight.began, self._free_at)
    self._took[flight.program].append(seconds)
    self._counts["round_seconds"] += seconds
    self._counts["predicted_seconds"] += flight.predicted
    self._dispatcher.landed(flight.program, flight.predicted, seconds)
    self._free_at = now
    drafted = not flight.program.startswith("plain")
    players = [(seat, report[seat.index]) for seat, id in flight.players if seat.id == id]  # not cancelled since
    if drafted:
      # Of a failed row nothing: one NaN, once learnt, would stay for ever.
      self._learn(report, [seat for seat, row in players if row["live"] and not row["failed"]])
    for seat, row in players:
      left, live = seat.request.max_new_tokens - seat.sent, bool(row["live"])
      tokens = tuple(row["tokens"][:min(row["n_new"], left)].tolist())
      finish = self._finish(seat, tokens, row) if row["done"] else None
      numbers = (self.block, int(row["n_verify"]), int(row["n_accept"])) if drafted and live else (0, 0, 0)
      log_probs = tuple(row["log_probs"][:len(tokens)].tolist()) if seat.request.log_probabilities else None
      self._events.append(Event(seat.id, tokens, log_probs, *numbers, finish))
      seat.sent += len(tokens)
      seat.tokens += tokens
      for name, number in zip(("tokens", "drafted", "verified", "accepted", "row_rounds", "round_tokens"),
                              (len(tokens), *numbers, live, live * len(tokens))):
        self._counts[name] += number
      if finish:
        if finish == "failed":
          seat.tokens = []  # nobody may begin with what it has read
        self._free(seat)

  def _learn(self, report, seats):
    """What a round's drafts of these seats say of the next ones."""
    mine = report[[seat.index for seat in seats]]
    for seat, confidence in zip(seats, mine["confidence"]):
      seat.past.append(confidence)
      self._dispatcher.observe(confidence)
    seen = observed(mine["n_verify"], mine["n_accept"], mine["confidence"].shape[1])
    # Of drafts whose fate is known: less what was accepted, the calibration error. One NaN would stay.
    self._counts["predicted_accepted"] += float(np.nansum(mine["confidence"][seen]))
    if not mine["features"].shape[2]:
      return
    sampled = np.asarray([seat.request.temperature > 0 for seat in seats], bool)
    for kind, state in enumerate(self.estimators):
      if (sampled == kind).any():
        state.observe(*(mine[name][sampled == kind] for name in ("features", "n_verify", "n_accept")))

  def _finish(self, seat, tokens, row):
    if row["failed"]:
      return "failed"
    return "stop" if tokens and tokens[-1] in seat.request.stop_token_ids else "length"

  def _free(self, seat):
    """What the seat has read stays, for whoever asks for a text that begins so."""
    self._counts["finished"] += 1
    seat.id, seat.used = None, self._counts["finished"]


def _common(a, b):
  """Tokens that two texts begin with alike, but for the last of b, which is always read."""
  return next((n for n, (x, y) in enumerate(zip(a, b[:-1])) if x != y), min(len(a), len(b) - 1))
