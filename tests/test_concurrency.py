"""infer.concurrency: what it counts of a run. The engine itself is test_engine's."""

import types

import numpy as np
import pytest

from dspark_jax.decoding.generate import Requests
from dspark_jax.decoding.round import Settings
from folders import complains
from infer import concurrency


class Clocked:
  """An engine of two seats that brings a word per second and seat."""

  def __init__(self):
    self.now, self.asked = 0.0, []

  def metrics(self):
    return {"seats": 2}

  def submit(self, request):
    self.asked.append(request)
    return len(self.asked) - 1

  def run(self):
    waiting, seats = list(enumerate(self.asked)), []
    while waiting or seats:
      while waiting and len(seats) < 2:
        id, request = waiting.pop(0)
        seats.append([id, request.max_new_tokens])
      self.now += 1
      for seat in list(seats):
        seat[1] -= 1
        yield types.SimpleNamespace(id=seat[0], tokens=(7,), finish=None if seat[1] else "length")
        if not seat[1]:
          seats.remove(seat)


def test_what_ends_alone_does_not_count(monkeypatch):
  """Kills: the end of a run, when seats have nobody to play, in the tokens per second of full seats; answers of one
  length, which end together under one policy and not under another; the same prompt asked for less each time."""
  engine = Clocked()
  monkeypatch.setattr(concurrency.time, "perf_counter", lambda: engine.now)
  monkeypatch.setattr(concurrency.time, "process_time", lambda: 100 + 1.5 * engine.now)
  found = concurrency.run_once(engine, [[1]] * 5, 8)
  lengths = [request.max_new_tokens for request in engine.asked]
  assert len(set(lengths)) > 2 and min(lengths) >= 4 and max(lengths) <= 12
  assert found["tokens_per_second"] == pytest.approx(2, rel=0.05) and sum(lengths) / engine.now < 1.9
  assert found["tokens_per_cpu_second"] == pytest.approx(found["tokens_per_second"] / 1.5)
  assert [len(text) for text in found["texts"]] == lengths


def test_each_repeat_by_itself():
  """Kills: a policy of one repeat over those of another; over the worse of the others; a table that hides how far the
  repeats are apart."""
  runs = {name: [{"tokens_per_second": x, "tokens_per_cpu_second": 1.0} for x in speeds] for name, speeds in
          {"alone": (1.0, 1.5), "plain": (4.0, 2.0), "fixed": (5.0, 1.0), "scheduled": (6.0, 3.0)}.items()}
  ratios = concurrency.over_others(runs)
  assert ratios == pytest.approx([1.2, 1.5])
  row = {name: of[0] | {"accepted_length": 2.0} for name, of in runs.items()}
  table = concurrency.table([row | {"concurrency": 3, "scheduled_over_others": ratios}])
  assert "1.20 1.50" in [cell for column in table.columns for cell in column.cells]


@pytest.mark.parametrize("longest, chunk", [(45, 48), (128, 128), (130, 256)])
def test_a_prompt_is_one_chunk(longest, chunk, monkeypatch):
  """Kills: chunks of 136 tokens, which attention over a prompt does not take, after minutes of compiling."""
  def engine(target, drafter, config, **_):
    raise ValueError(f"an engine with chunk {config.chunk} is there")
  monkeypatch.setattr(concurrency, "Engine", engine)
  settings = concurrency.Settings("t", "d", requests=2)
  with complains(f"with chunk {chunk} is"):
    concurrency.compare(settings, None, types.SimpleNamespace(block_size=7), [[1] * longest, [1] * 3])


def test_what_a_round_takes_more_than_on_the_device(monkeypatch):
  """Kills: prompts, which an engine reads in chunks, among what its rounds take; the other's time as the whole; more
  rounds, as seats that begin one after another need, taken for dearer ones."""
  clock, shapes = types.SimpleNamespace(now=0.0), []
  monkeypatch.setattr(concurrency.time, "perf_counter", lambda: clock.now)

  class Engine:
    rounds, config = 0, types.SimpleNamespace(capacity=192)

    def submit(self, request):
      self.new = request.max_new_tokens

    def run(self):
      self.rounds += 3 + (2 * self.new if self.new > 4 else 4)
      clock.now += 7 + 1.1 * (2 * self.new if self.new > 4 else 4)
      return iter(())

    def metrics(self):
      return {"rounds": self.rounds}

  def decode(target, drafter, requests, policy, **static):
    n = int(requests.settings.limit[0])
    shapes.append(static)
    clock.now += 2 + n
    return types.SimpleNamespace(rounds=np.int32(n))

  monkeypatch.setattr(concurrency, "decode", decode)
  settings = Settings(None, None, np.int32([12, 12]), None, None, "token")
  batch = types.SimpleNamespace(args=(None, None, Requests(None, None, None, settings), None),
                                static={"capacity": 128, "max_new_tokens": 12})
  prepare = lambda prompts, max_new_tokens: [batch]
  found = concurrency.overhead(Engine(), types.SimpleNamespace(prepare=prepare), [[1], [2]], 8, 2)
  assert found == pytest.approx(0.1)
  assert shapes == [{"capacity": 192, "max_new_tokens": 12}] * 6
