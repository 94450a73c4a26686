"""What the server tells of an engine's events: each answer's chunks and end, usage, log-probabilities, times."""

import asyncio
import itertools
import json
import time
from types import SimpleNamespace

import pytest

from dspark_jax.data import chat
from dspark_jax.decoding.engine import Event
from dspark_jax.programs.openai_api import Answer, parse
from infer import serve_app
from infer.serve_app import App
from test_openai_api import HELLO
from test_serve import Scripted


@pytest.fixture(scope="module")
def tokenizer():
  return chat.load_tokenizer(chat.smollm2_path())


def test_an_answer_that_is_over_is_not_decoded_on(tokenizer):
  """Of two answers one meets its stop text. Kills: a seat that writes what nobody will read until its sibling ends."""
  cancelled, events = [], asyncio.Queue()
  serving = SimpleNamespace(engine=Scripted([]), draining=False, error=None, cancel=cancelled.append)
  job = parse({"prompt": "Once", "n": 2, "stop": "They", "stream": True}, tokenizer, chat_form=False,
              most=lambda prompt: 99)

  async def first():
    for id, text in ((2, "Lists"), (1, "Lists. They have")):
      events.put_nowait(Event(id, tuple(tokenizer.encode(text)), None, 0, 0, 0, None))
    told = App(SimpleNamespace(), serving, tokenizer)._tell(job, Answer(job, "toy"), [1, 2], events, 0.0)
    return [json.loads((await anext(told)).removeprefix("data: "))["choices"][0] for _ in range(2)]

  ends = [(choice["index"], choice["finish_reason"]) for choice in asyncio.run(first())]
  assert ends == [(1, None), (0, "stop")] and cancelled[0] == [1]


def told(tokenizer, monkeypatch, events, **asked):
  """(what two answers to a request tell, given these events; the App). The clock strikes when it is looked at."""
  clock, coming = itertools.count(1), asyncio.Queue()
  monkeypatch.setattr(serve_app, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=time.time))
  serving = SimpleNamespace(engine=Scripted([]), draining=False, error=None, cancel=lambda ids: None)
  app, chat_form = App(SimpleNamespace(), serving, tokenizer), "messages" in asked
  job = parse({"n": 2} | asked, tokenizer, chat_form=chat_form, most=lambda prompt: 99)

  async def all_of_it():
    for event in events:
      coming.put_nowait(event)
    return [part async for part in app._tell(job, Answer(job, "toy"), [1, 2], coming, 0)]
  return asyncio.run(all_of_it()), app


@pytest.mark.parametrize("chat_form", [False, True])
def test_every_answer_has_its_own_end(tokenizer, monkeypatch, chat_form):
  """Of two answers one meets its stop text, the other its length. Kills: the first one's end, length or time for both;
  log-probabilities without bytes, or at other offsets; usage that leaves out the prompt, or counts it by answers."""
  one, two = tokenizer.encode("Oh 😀 no. They have"), tokenizer.encode("Oh well")  # the face is of two tokens
  logs = lambda tokens: tuple(-0.5 * n for n in range(len(tokens)))
  asked = {"messages": HELLO, "logprobs": True} if chat_form else {"prompt": [5, 6, 7], "logprobs": 0}
  (found,), app = told(tokenizer, monkeypatch, [
      Event(1, tuple(one[:1]), logs(one)[:1], 0, 0, 0, None), Event(2, tuple(two[:1]), logs(two)[:1], 0, 0, 0, None),
      Event(2, tuple(two[1:]), logs(two)[1:], 7, 5, 0, "length"),
      Event(1, tuple(one[1:]), logs(one)[1:], 7, 7, 5, None)], stop="They", **asked)
  prompt = len(parse(asked, tokenizer, chat_form=chat_form, most=lambda prompt: 1).requests[0].prompt)
  assert found["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8,
                            "accepted_length": (6 + 1) / 2}
  words, choices = (["Oh", "", " 😀", " no", ".", " They"], ["Oh", " well"]), []
  for index, (text, finish) in enumerate((("Oh 😀 no. ", "stop"), ("Oh well", "length"))):
    if chat_form:
      said = {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": {
          "refusal": None, "content": [
              {"token": word, "logprob": log, "bytes": list(word.encode()), "top_logprobs": []}
              for word, log in zip(words[index], logs(one))]}}
    else:
      said = {"text": text, "logprobs": {
          "tokens": words[index], "token_logprobs": list(logs(words[index])), "top_logprobs": None,
          "text_offset": ([0, 2, 2, 4, 7, 8], [0, 2])[index]}}
    choices.append({"index": index, "finish_reason": finish} | said)
  assert found["choices"] == choices
  sums = {name: [app.registry.get_sample_value(f"dspark_{name}_{part}") for part in ("count", "sum")]
          for name in ("time_to_first_token_seconds", "tokens_per_second_per_request", "accepted_length")}
  assert list(sums.values()) == [[2, 1 + 2], [2, 6 / 3 + 1 / 1], [2, 6 + 1]]  # of 1 to 4, and of 2 to 3


def test_chunks_of_a_conversation(tokenizer, monkeypatch):
  """Kills: a role that is missing, or told again; a round's drafts told as those of another or none; a stream that
  breaks off without a word where the server has a fault, or tells what it was."""
  one = tokenizer.encode("Oh well then")
  chunks, _ = told(tokenizer, monkeypatch, [
      Event(2, tuple(one[:1]), None, 0, 0, 0, None), Event(1, tuple(one[:1]), None, 0, 0, 0, None),
      Event(2, tuple(one[1:]), None, 7, 5, 1, "length"), None], messages=HELLO, stream=True, dspark=True)
  *bodies, fault = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
  first, last = {"role": "assistant", "content": "Oh"}, {"content": " well then"}
  assert [(*body["choices"], body["dspark"]) for body in bodies] == [
      ({"index": index, "delta": delta, "logprobs": None, "finish_reason": finish},
       {"drafted": drafted, "verified": verified, "accepted": accepted, "pieces": pieces})
      for index, delta, finish, drafted, verified, accepted, pieces in (
          (1, first, None, 0, 0, 0, [["Oh", False]]), (0, first, None, 0, 0, 0, [["Oh", False]]),
          (1, last, "length", 7, 5, 1, [[" well", True], [" then", False]]))]
  assert fault == {"error": {"message": "the server has a fault, which its own log tells", "type": "server_error",
                             "param": None, "code": 500}}
