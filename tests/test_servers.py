"""train.servers: how long it waits before it asks again, and what no server is sent."""

import asyncio
from types import SimpleNamespace

import httpx2
import pytest

from dspark_jax.data.prompts import Conversation
from train import servers
from folders import complains


def fleet(**changes) -> servers.Fleet:
  return servers.Fleet(SimpleNamespace(**{**dict(
      target="m", servers=("http://one/v1",), retries=4, timeout=1.0, concurrency=1, thinking=False, seed=0,
      max_new_tokens=8, temperature=0.0, top_p=1.0, top_k=0, token_ids=False), **changes}))


@pytest.mark.parametrize("said, wait", [("7", 7.0), ("86400", 2 * servers.MOST), ("soon", 0.0), (None, 0.0)])
def test_a_server_that_names_a_wait(said, wait):
  """Kills: a day of nothing, for a server that says so; a wait that is passed over; a date read as seconds."""
  one = fleet()
  response = httpx2.Response(503, content=b"{}", headers={} if said is None else {"Retry-After": said})
  with pytest.raises(servers.Fault) as caught:
    one._opened(one.servers[0], response)
  assert caught.value.wait == wait


def test_pauses_grow(monkeypatch):
  """Kills: a server in trouble asked again and again after the same half second; pauses that grow without end."""
  slept, one = [], fleet(retries=9)
  one.servers[0].checked = True

  async def sleep(seconds):
    slept.append(seconds)

  async def fails(*_, **__):
    one.servers[0].faults = 0  # or it would be set aside, which has a clock of its own
    raise servers.Fault("500")
  monkeypatch.setattr(servers, "asyncio", SimpleNamespace(sleep=sleep))
  monkeypatch.setattr(servers.random, "uniform", lambda low, high: 1.0)
  monkeypatch.setattr(one, "_send", fails)
  found = asyncio.run(one._converse(Conversation("1", (({"role": "user", "content": "a"},),))))
  assert str(found.failed) == "no answer"
  assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_key_that_no_header_takes(monkeypatch):
  """Kills: a codec's sentence for a key with a letter of another alphabet, or a line's end inside."""
  for key, place in (("sk-\N{CYRILLIC SMALL LETTER A}bc", 4), ("s\nk", 2)):
    monkeypatch.setenv(servers.KEY, key)
    with complains(f"{servers.KEY} holds a character that no key has (place {place}): copy the key once more"):
      fleet()
