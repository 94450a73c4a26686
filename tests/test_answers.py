"""train.answers: who answers, and what becomes of servers that fail, which are real ones here."""

import json
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_jax.data import chat, conversations, prompts
from dspark_jax.data.prompts import Conversation
from train import answers, replies, servers
from train.replies import Reply
from chat_server import KEY, MODEL, Handler, completion, serving
from folders import LLAMA, WORDS, called, complains, files, with_tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """No waits of seconds, no proxy and no key of whoever runs the tests."""
  for name, seconds in (("BACKOFF", 0.01), ("ASIDE", 0.05), ("POLL", 0.01), ("GIVE_UP", 0.5)):
    monkeypatch.setattr(servers, name, seconds)
  for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", servers.KEY):
    monkeypatch.delenv(name, raising=False)


def written(path: Path, *records) -> Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def questions(folder: Path, count: int = 12) -> Path:
  return written(folder / "q.jsonl", *({"prompt": f"question {i}"} for i in range(count)))


def read(path: Path) -> list:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked(out: Path, *urls, **changes) -> dict:
  """What the program returns. Sorted lines are in out, failures beside it."""
  how = dict(servers=urls, concurrency=4, retries=5, timeout=5.0, token_ids=False) | changes
  return answers.main(answers.Settings(how.pop("target", None), out, how.pop("questions", out.parent / "q.jsonl"),
                                       **how))


# Replies


def test_lines_of_tokens():
  """Kills: a turn supervised twice, prompts supervised, a second prompt glued to a first that it does not continue."""
  talk = Conversation("7", (({},), ({},)))
  lines = lambda *pairs: replies.outcome(talk, [Reply({}, "stop", *pair, 1) for pair in pairs], False).lines
  assert lines(([1, 2], [3]), ([1, 2, 3, 4], [5, 6])) == [
      {"id": "7", "tokens": [1, 2, 3, 4, 5, 6], "loss_mask": [0, 0, 1, 0, 1, 1], "finish": ["stop"] * 2}]
  assert lines(([1, 2], [3]), ([1, 2, 4], [5])) == [
      {"id": "7", "part": [1, 2], "tokens": [1, 2, 3], "loss_mask": [0, 0, 1], "finish": ["stop"]},
      {"id": "7", "part": [2, 2], "tokens": [1, 2, 4, 5], "loss_mask": [0, 0, 0, 1], "finish": ["stop"]}]


def test_half_a_conversation_is_asked_again(tmp_path):
  """Kills: a conversation taken for answered whose second line a kill cut off; its first one kept and learned twice."""
  part = lambda name, k: {"id": name, "part": [k, 3], "tokens": [k]}
  whole = written(tmp_path / "a.jsonl", {"id": "1", "tokens": []}, part("2", 1), part("2", 2), part("2", 3)).read_text()
  assert answers.answered(tmp_path / "a.jsonl") == {"1", "2"} and (tmp_path / "a.jsonl").read_text() == whole
  (tmp_path / "a.jsonl").write_text(whole + json.dumps(part("3", 1)) + "\n" + json.dumps(part("3", 2)) + '\n{"id')
  assert answers.answered(tmp_path / "a.jsonl") == {"1", "2"} and (tmp_path / "a.jsonl").read_text() == whole


def read_reply(message, finish="stop", thinking=False, **more):
  return servers.read_reply({"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish}],
                             **more}, thinking)


def test_what_replies_hold():
  """Kills: thinking that is thrown away, or kept under a name that templates do not read; arguments of a call left as a
  text, which templates would quote; an answer learned that a template writes in another way than it was said."""
  assert read_reply({"content": "a", "reasoning": "why"}, thinking=True).message == {
      "role": "assistant", "content": "a", "reasoning_content": "why"}
  call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
  got = read_reply({"content": None, "tool_calls": [call]}, "tool_calls")
  assert got.finish == "tool_calls" and got.message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
  broken = {"content": None, "tool_calls": [call | {"function": {"name": "f", "arguments": "{x"}}]}
  for message, how, reason in (
      ({"content": "a", "reasoning_content": "why"}, {}, "thinks, though thinking is off"),
      ({"content": ""}, {"finish": "length"}, "cut before its reply began"), ({"content": None}, {}, "an empty reply"),
      (broken, {"finish": "tool_calls"}, "a tool call that cannot be read"),
      ({"content": "a"}, {"finish": "filter"}, "in filter")):
    with pytest.raises(replies.Unanswered) as caught:
      read_reply(message, **how)
    assert reason in caught.value.reason
  for message, how in (({"content": 3}, {}), ({}, {"finish": None}), ({"content": "a"}, {"finish": "abort"})):
    with pytest.raises(servers.Fault):
      read_reply(message, **how)


# Servers


def test_every_question_gets_its_own_answer(tmp_path):
  """Kills: seeds by order, by server or without --seed; sampling that is not sent; fields left to a model's own
  generation_config.json; a line that train.train does not read; more requests at once than were asked for."""
  slow = lambda body, number: time.sleep(0.01 * (number % 3))
  with serving(slow) as one, serving(slow) as two:
    questions(tmp_path)
    (tmp_path / "second").mkdir()
    questions(tmp_path / "second")
    how = dict(temperature=0.7, top_p=0.8, top_k=20, seed=7)
    result = asked(tmp_path / "a.jsonl", one.url, f"{two.url}/v1/", concurrency=3, **how)
    assert set(result) == {"answers", "tokens", "tokens_per_second", "out", "failed"}
    assert result["answers"] == 12 and result["tokens"] == 84 and result["failed"] == {}
    assert one.asked and two.asked and one.most <= 3 and two.most <= 3
    asked(tmp_path / "second" / "a.jsonl", two.url, concurrency=1, target=MODEL, **how)
  by_id = lambda out: sorted(read(out), key=lambda line: int(line["id"]))
  lines = by_id(tmp_path / "a.jsonl")
  assert lines == by_id(tmp_path / "second" / "a.jsonl")
  assert lines[4] == {"id": "5", "messages": [{"role": "user", "content": "question 4"}, {
      "role": "assistant", "content": f"1 {zlib.crc32(b'7/5')} 0.7 question 4"}],
      "chat_template_kwargs": {"enable_thinking": False}, "finish": ["stop"]}
  body = one.asked[0]
  assert (body["model"], body["top_p"], body["top_k"], body["max_tokens"]) == (MODEL, 0.8, 20, 128)
  assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
  with_tokenizer(LLAMA, tmp_path / "target")
  (shard,) = conversations.shards(tmp_path / "a.jsonl", 2 ** 20)
  source = conversations.read_conversations(shard, chat.load_tokenizer(tmp_path / "target"), max_len=64,
                                            vocab_size=WORDS, encode_conversation=chat.encode_conversation,
                                            encode_text=chat.encode_text)
  assert source.lost.too_short == 12 and source.lost.rewritten == 0


def test_a_conversation_is_asked_turn_by_turn(tmp_path):
  """Kills: the data set's own replies sent as history; a call of a tool answered by the next question; tools or
  thinking that do not reach the server; a cut reply's own note sent along, or lost."""
  call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
  ways = {"call": lambda body: (200, completion(body, "", "tool_calls", tool_calls=[call])),
          "a": lambda body: (200, completion(body, finish="length"))}
  how = lambda body, number: ways.get(body["messages"][-1]["content"], lambda body: None)(body)
  say = lambda *texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
  written(tmp_path / "q.jsonl", {"messages": say("a", "old", "b")}, {
      "messages": say("call", "old", "never"), "tools": [{"type": "function"}],
      "chat_template_kwargs": {"enable_thinking": True}})
  with serving(how) as server:
    asked(tmp_path / "a.jsonl", server.url, concurrency=1)
  first, second, third = server.asked
  seed = zlib.crc32(b"0/1")
  assert second["messages"] == [*say("a", f"1 {seed} 0.0 a", "b")] and first["messages"] == say("a")
  assert third["tools"] == [{"type": "function"}] and third["chat_template_kwargs"] == {"enable_thinking": True}
  talk, tool = read(tmp_path / "a.jsonl")
  assert [m["content"] for m in talk["messages"]] == ["a", f"1 {seed} 0.0 a", "b",
                                                      f"3 {second['seed']} 0.0 b"]
  assert talk["finish"] == ["length", "stop"] and talk["messages"][1]["finish_reason"] == "length"
  assert first["seed"] == seed != second["seed"] and len(tool["messages"]) == 2 and tool["tools"] == third["tools"]


def test_tokens_are_taken_where_servers_give_them(tmp_path):
  """Kills: a text encoded again although its tokens are there; tokens without what tells whose they are."""
  def tokens(body, number):
    assert body["return_token_ids"] is True
    found = completion(body)
    found["choices"][0]["token_ids"] = [8, 9, 2]
    return 200, found | {"prompt_token_ids": [5, 6, 7]}
  questions(tmp_path, 1)
  with serving(tokens) as server:
    assert asked(tmp_path / "a.jsonl", server.url, token_ids=True)["tokens"] == 3
  assert read(tmp_path / "a.jsonl") == [{"id": "1", "tokens": [5, 6, 7, 8, 9, 2], "loss_mask": [0, 0, 0, 1, 1, 1],
                                         "finish": ["stop"], "text": [f"1 {zlib.crc32(b'0/1')} 0.0 question 0"]}]


def test_a_conversation_whose_servers_differ(tmp_path):
  """The first reply comes in tokens, the last without. Kills: an end that is learned although the limit cut the first;
  thinking, or a call as text, that comes beside tokens and goes to the template."""
  def mixed(body, number):
    found = completion(body, f"w{number}", "length" if number == 1 else "stop")
    if number == 1:
      found["choices"][0]["token_ids"] = [8, 9]
    return 200, found | {"prompt_token_ids": [5, 6, 7]}
  say = lambda role, text: {"role": role, "content": text}
  written(tmp_path / "q.jsonl", {"messages": [say("user", "w7"), say("user", "w8")]})
  with serving(mixed) as server:
    assert asked(tmp_path / "a.jsonl", server.url, token_ids=True)["answers"] == 1
  (line,) = read(tmp_path / "a.jsonl")
  cut = say("assistant", "w1") | {"finish_reason": "length"}
  assert line["messages"] == [say("user", "w7"), cut, say("user", "w8"), say("assistant", "w2")]
  tokenizer = chat.load_tokenizer(with_tokenizer(LLAMA, tmp_path / "target"))
  ((ids, mask),) = chat.encode_conversation(tokenizer, line["messages"])
  assert sum(learned and token in chat.stop_ids(tokenizer) for token, learned in zip(ids, mask)) == 1
  tokens = lambda message: {"choices": [{"message": message, "finish_reason": "stop", "token_ids": [8]}],
                            "prompt_token_ids": [5]}
  call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
  reply = servers.read_reply(tokens({"content": None, "tool_calls": [call]}), False)
  assert reply.tokens == [8] and reply.message["tool_calls"][0]["function"]["arguments"] == {"x": 1}
  with pytest.raises(replies.Unanswered, match="thinking is off"):
    servers.read_reply(tokens({"content": "a", "reasoning": "why"}), False)


def tries(server) -> dict[str, int]:
  """Requests by question."""
  texts = [body["messages"][-1]["content"] for body in server.asked]
  return {text: texts.count(text) for text in texts}


def test_servers_that_fail_at_times(tmp_path):
  """Kills: one 500, lost connection, hang, drip of bytes or page of HTML that ends the run, loses a question, or is
  taken for an answer; an answer asked for twice."""
  ways = [(500, {"error": {"message": "out of memory"}}), "die", "hang", (200, b"<html>"), (200, {"choices": []}), None,
          (429, {"error": "slow down"}), (502, b"bad gateway"), "dribble"]

  def at_times(body, number):
    text = body["messages"][-1]["content"]
    way = ways[int(text.split()[1]) % len(ways)] if tries(server)[text] <= 1 else None
    if way == "hang":
      time.sleep(5)
    return None if way == "hang" else way
  questions(tmp_path, 18)
  began = time.monotonic()
  with serving(at_times) as server, serving() as other:
    result = asked(tmp_path / "a.jsonl", server.url, concurrency=4, timeout=4.0)
    assert result["answers"] == 18 and result["failed"] == {}
    assert tries(server) == {f"question {i}": 1 if i % 9 == 5 else 2 for i in range(18)}
    assert time.monotonic() - began < 40
    (tmp_path / "b").mkdir()
    questions(tmp_path / "b", 18)
    asked(tmp_path / "b" / "a.jsonl", other.url)
  key = lambda line: line["id"]
  assert sorted(read(tmp_path / "a.jsonl"), key=key) == sorted(read(tmp_path / "b" / "a.jsonl"), key=key)
  assert not (tmp_path / "a.failed.jsonl").exists()


def test_a_server_that_dies_is_left_alone_and_tried_again(tmp_path, capsys):
  """Kills: questions that are lost with their server; a dead server asked as often as a living one; one that is never
  asked again."""
  began = time.monotonic()
  # No answer comes between the deaths, or their count would start anew: those before have come, those after take long.
  dies = lambda body, number: time.sleep(0.3 if 3 < number <= 12 else 0.005) or ("die" if 3 < number <= 9 else None)
  questions(tmp_path, 150)
  with serving(dies) as mortal, serving(lambda body, number: time.sleep(0.02)) as steady:
    result = asked(tmp_path / "a.jsonl", mortal.url, steady.url, concurrency=3)
  assert result["answers"] == 150 and len({line["id"] for line in read(tmp_path / "a.jsonl")}) == 150
  assert f"{mortal.url}/v1 is left alone for" in capsys.readouterr().err
  assert len(mortal.asked) > 9, "it was never asked again"
  assert steady.most <= 3, "it was given the other's requests on top of its own"
  assert len(mortal.asked) + len(steady.asked) == 156 and time.monotonic() - began < 20


REFUSES, SLOW_DOWN = (400, {"error": {"message": "max_model_len is 9"}}), (429, {"error": "slow down"})


@pytest.mark.parametrize("way, said", [(REFUSES, "400: max_model_len is 9"), (SLOW_DOWN, "429: slow down"),
                                       ((500, b"crash"), "500: crash")])
def test_one_server_that_is_set_up_wrong(way, said, tmp_path, capsys):
  """Kills: a server that answers nothing, at once, and so is always the one with the fewest requests: it gets most
  questions, which the other would have answered."""
  questions(tmp_path, 60)
  with serving(lambda body, number: time.sleep(0.05)) as good, serving(lambda body, number: way) as wrong:
    result = asked(tmp_path / "a.jsonl", good.url, wrong.url, retries=1)
  assert result["answers"] == 60 == len(good.asked) and result["failed"] == {} and len(wrong.asked) < 40
  assert f"{wrong.url}/v1 is left alone for" in (err := capsys.readouterr().err) and said in err


def test_what_all_servers_refuse(tmp_path, monkeypatch):
  """Kills: a question that all refuse and that is asked for ever, or of one twice; one that waits for a server that is
  gone; any question taken for refused, as the one that would answer it is gone and the other never answers."""
  refuse = lambda body, number: REFUSES if body["messages"][-1]["content"] == "question 2" else None
  questions(tmp_path)
  with serving(refuse) as one:
    with serving(refuse) as two:
      assert asked(tmp_path / "a.jsonl", one.url, two.url)["failed"] == {"refused by the server": 1}
      assert tries(one)["question 2"] == tries(two)["question 2"] == 1
    assert asked(tmp_path / "b.jsonl", one.url, two.url)["failed"] == {"refused by the server": 1}
  questions(tmp_path, 60)
  monkeypatch.setattr(servers, "GIVE_UP", 2)
  goes = lambda body, number: time.sleep(0.02) if number <= 25 else (503, b"going down")
  with serving(goes) as good, serving(lambda body, number: REFUSES) as wrong:
    with complains("no server has answered for 2 seconds", "503: going down", "400: max_model_len"):
      asked(tmp_path / "c.jsonl", good.url, wrong.url, retries=99)
  assert len(read(tmp_path / "c.jsonl")) == 25 and not read(tmp_path / "c.failed.jsonl")


def test_servers_that_are_busy(tmp_path, monkeypatch):
  """Kills: a question that is lost where more are asked at once than a server takes; a Retry-After that holds back one
  question and no other; an end that comes in seconds, where a server is busy at first, or after hours, where it is so
  for ever."""
  begun = []

  def full(body, number):
    begun.append(time.monotonic())
    if number == 12:
      return *SLOW_DOWN, [("Retry-After", "1")]
    return SLOW_DOWN if number <= 8 or server.now > 2 else time.sleep(0.01)
  questions(tmp_path, 30)
  monkeypatch.setattr(servers, "GIVE_UP", 60)
  with serving(full) as server:
    assert asked(tmp_path / "a.jsonl", server.url, retries=0)["answers"] == 30
  assert max(after - before for before, after in zip(begun, begun[1:])) > 0.9
  monkeypatch.setattr(servers, "GIVE_UP", 0.5)
  with serving(lambda body, number: SLOW_DOWN if number > 3 else None) as server:
    with complains("no server has answered for", "429: slow down"):
      asked(tmp_path / "b.jsonl", server.url)
  assert len(server.asked) < 30 and not (tmp_path / "b.failed.jsonl").exists()


def test_a_server_that_needs_a_moment(tmp_path, monkeypatch):
  """Kills: a run that a healthy server ends with its first few answers, of all that are asked at once."""
  monkeypatch.setattr(servers, "ASIDE", 0.5)  # longer than eight answers at once take
  monkeypatch.setattr(servers, "GIVE_UP", 60)
  questions(tmp_path)
  with serving(lambda body, number: (503, b"loading") if number <= 9 else None) as server:
    result = asked(tmp_path / "a.jsonl", server.url, concurrency=8)
  assert result["answers"] == 12 and result["failed"] == {}


def test_a_server_that_accepts_and_never_answers(tmp_path, monkeypatch, capsys):
  """Kills: a start that waits for a list of models as long as for a reply, three times and without a word."""
  monkeypatch.setattr(servers, "HELLO", 0.2)
  over, began = threading.Event(), time.monotonic()
  questions(tmp_path, 2)
  with serving() as one, serving(handler=type("Mute", (Handler,), {"do_GET": lambda self: over.wait(9)})) as mute:
    assert asked(tmp_path / "a.jsonl", mute.url, one.url)["answers"] == 2
    over.set()
  assert f"{mute.url}/v1 does not answer (nothing within 0.2 seconds)" in capsys.readouterr().err
  assert time.monotonic() - began < 9


def test_questions_that_cannot_be_answered(tmp_path, capsys):
  """Kills: one bad question that ends the run; failures that are lost, or counted as answers; ones that are never asked
  again, or forgotten where the count is reached before; more or fewer tries than were asked for."""
  way = {"question 2": (400, {"error": {"message": "too long"}}), "question 3": (500, b"crash")}
  questions(tmp_path, 5)
  with serving(lambda body, number: way.get(body["messages"][-1]["content"])) as server:
    result = asked(tmp_path / "a.jsonl", server.url, retries=3, concurrency=1)
    assert result["answers"] == 3 and result["failed"] == {"refused by the server": 1, "no answer": 1}
    assert tries(server) == {f"question {i}": 4 if i == 3 else 1 for i in range(5)}
    assert "2 questions have no answer" in capsys.readouterr().err
    failed = {line["id"]: line for line in read(tmp_path / "a.failed.jsonl")}
    assert failed["3"] == {"id": "3", "reason": "refused by the server", "detail": "400: too long"}
    assert "4 tries" in failed["4"]["detail"] and "500: crash" in failed["4"]["detail"]
    left = lambda: [line["id"] for line in read(tmp_path / "a.failed.jsonl")]
    way.clear(), server.asked.clear()
    assert asked(tmp_path / "a.jsonl", server.url, count=3)["answers"] == 3 and left() == ["3", "4"]
    assert asked(tmp_path / "a.jsonl", server.url, count=4, concurrency=1)["answers"] == 4 and left() == ["4"]
    assert asked(tmp_path / "a.jsonl", server.url)["answers"] == 5 and len(server.asked) == 2
  assert sorted(line["id"] for line in read(tmp_path / "a.jsonl")) == list("12345")
  assert not (tmp_path / "a.failed.jsonl").exists()


def test_a_run_goes_on_where_it_stopped(tmp_path):
  """Kills: questions asked again by a second command, or of a second fleet; another model's answers in one file; a
  count that is passed."""
  questions(tmp_path, 9)
  with serving() as one, serving() as two, serving(models=(200, {"data": [{"id": "other"}]})) as other:
    assert asked(tmp_path / "a.jsonl", one.url, count=4)["answers"] == 4 == len(read(tmp_path / "a.jsonl"))
    whole = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(whole + '{"id": "9')
    assert asked(tmp_path / "a.jsonl", two.url, target=MODEL)["answers"] == 9
    assert len(one.asked) == 4 and len(two.asked) == 5 and (tmp_path / "a.jsonl").read_text().startswith(whole)
    before = files(tmp_path)
    with complains("(target was tiny/model, is other)"):
      asked(tmp_path / "a.jsonl", other.url)
    with complains("(thinking was None, is True)"):
      asked(tmp_path / "a.jsonl", one.url, thinking=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("how, models, parts", [
  ((401, {"error": {"message": f"bad key {KEY}"}}), None, ["refuses the key of OPENAI_API_KEY (401: bad key ...)"]),
  ((404, {"error": {"message": "Not there."}}), None, ["does not know the model tiny/model", "--target"]),
  ((500, b"boom"), None, ["no server gives an answer", "500: boom"]),
  ((200, b"<html>hello"), None, ["no server gives an answer", "200 with what is no JSON object (<html>hello"]),
  ((200, {"choices": [{}]}), None, ["no server gives an answer", "without a choice"]),
  ((400, {"error": {"message": "unknown field"}}), None, ["none of 20 questions was answered", "400: unknown field"]),
  (None, (500, b"down"), ["no server answers", "500: down"]),
  (None, (200, b"<html>"), ["no server answers", "no JSON object"]),
  (None, (200, {"data": [{"id": "a"}, {"id": "b"}]}), ["the servers serve a, b: choose one with --target"]),
  (None, (403, b""), ["refuses the key"])])
def test_what_concerns_every_question_ends_the_run(how, models, parts, tmp_path, monkeypatch):
  """Kills: an hour of retries against a wrong key, model or address; a key in a message or a file."""
  monkeypatch.setenv(servers.KEY, KEY)
  questions(tmp_path, 40)
  with serving(lambda body, number: how, models or (200, {"data": [{"id": MODEL}]})) as server:
    with complains(*parts):
      asked(tmp_path / "a.jsonl", server.url)
    assert set(server.keys) <= {f"Bearer {KEY}"} and len(server.asked) <= 40
  assert not any(KEY.encode() in data for data in files(tmp_path).values()) and not (tmp_path / "a.jsonl").exists()


def test_servers_of_other_models_and_none_at_all(tmp_path, capsys):
  """Kills: SGLang, which answers for whatever model it is asked for, taken for the target; a port without a server
  that ends in a traceback; a password that is shown; a server that is not there at first, and then serves another
  model."""
  questions(tmp_path, 60)
  with serving(models=(200, {"data": [{"id": "other"}]})) as server:
    with complains("serves other, not tiny/model"):
      asked(tmp_path / "a.jsonl", server.url, target=MODEL)
  settings = ("--out", tmp_path / "a.jsonl", "--questions", tmp_path / "q.jsonl", "--servers")
  _, err = called(capsys, answers.main, answers.Settings, *settings, server.url.replace("//", "//me:pass@"), code=2)
  assert "no server answers" in err and "ConnectError" in err and "pass" not in err and "Traceback" not in err
  with serving() as one:
    assert asked(tmp_path / "b.jsonl", server.url, one.url)["answers"] == 60  # the first is not there any more
  assert f"{server.url}/v1 does not answer (ConnectError" in capsys.readouterr().err
  late = iter([(503, b"loading")] * 3)
  with serving() as one, serving(models=None) as two:
    two.RequestHandlerClass = type("Late", (Handler,), {"do_GET": lambda self: self.reply(
        *next(late, (200, {"data": [{"id": "other"}]})))})
    one.how = lambda body, number: time.sleep(0.02)
    with complains("serves other, not tiny/model"):
      asked(tmp_path / "a.jsonl", one.url, two.url, concurrency=1)
    assert not two.asked
  for url in ("ftp://x", "http://", "http://x:y:z"):
    with complains("servers has", "expected a URL"):
      asked(tmp_path / "a.jsonl", url)
  with complains("expected each once"):
    asked(tmp_path / "a.jsonl", "h:1", "http://h:1/v1")


# Our own sessions


def test_turns_by_our_own_sessions(tmp_path, capsys):
  """Kills: a first answer that the second turn does not see, or whose text is encoded again; a turn that depends on the
  batch; a conversation that outgrows the limit and takes its first turns with it; a failure that ends the run."""
  target = with_tokenizer(LLAMA, tmp_path / "target")
  talk = lambda *texts: {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]}
  written(tmp_path / "q.jsonl", talk("w7", "w99", "w8"), talk("w9"), talk("w7 " * 70), talk("w7", "w99", "w8 " * 60),
          {"conversations": [{"from": "gpt", "value": "w5"}]}, {"prompt": "w5", "tools": [{"type": "function"}]})
  result, err = called(capsys, answers.main, answers.Settings, "--target", target, "--out", tmp_path / "a.jsonl",
                       "--questions", tmp_path / "q.jsonl", "--batch", 2, "--max-new-tokens", 6)
  lines = read(tmp_path / "a.jsonl")
  assert [line["id"] for line in lines] == ["1", "2", "4"] and result["answers"] == 3
  assert result["failed"] == {"a prompt longer than max_prompt_tokens": 1, prompts.BEGINS: 1,
                              "refused by the chat template or the tokenizer": 1}  # it does not know tools
  assert "1 turns were not asked" in err
  tokenizer, (talked, _, alone) = chat.load_tokenizer(target), lines
  first = chat.encode_prompt(tokenizer, [{"role": "user", "content": "w7"}])
  reply = alone["tokens"][len(first):]
  assert alone["tokens"][:len(first)] == first and alone["loss_mask"] == [0] * len(first) + [1] * len(reply)
  second = chat.encode_prompt(tokenizer, [
      {"role": "user", "content": "w7"}, {"role": "assistant", "content": tokenizer.decode(reply), "tokens": reply},
      {"role": "user", "content": "w8"}])
  assert talked["tokens"][:len(second)] == second and len(talked["finish"]) == 2
  new = len(talked["tokens"]) - len(second)
  assert 0 < new <= 6 and talked["loss_mask"] == alone["loss_mask"] + [0] * (
      len(second) - len(alone["tokens"])) + [1] * new


def test_a_server_that_is_long_dead():
  """Kills: a pause that doubles for days, until it is no number."""
  servers.Fleet._set_aside(None, dead := SimpleNamespace(faults=0, rests=2000, until=0.0))
  assert 0 < dead.until - time.monotonic() <= 60
