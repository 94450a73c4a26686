"""infer.load: arrivals that wait for nothing, servers that fail (real ones here), engines that cannot keep up."""

import asyncio
import contextlib
import json
import time
import types

import numpy as np
import pytest

from dspark_jax.decoding.engine import Event, Full
from infer import drive, load, plots
from infer.drive import Answer, Arrival
import chat_server
from chat_server import KEY, MODEL
from folders import called, complains, files
from test_cost import table


class Handler(chat_server.Speaker):
  """Streams as vLLM does, or as server.how(number of the request) says."""

  def do_GET(self):
    self.server.keys.append(self.headers.get("Authorization"))
    super().do_GET()

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with self.server.lock:
      self.server.asked.append((time.perf_counter(), self.path, body, self.headers.get("Authorization")))
      how = self.server.how(len(self.server.asked))
    if isinstance(how, tuple):
      return self.reply(*how)
    chat, said = "messages" in body, how if isinstance(how, list) else None
    piece = lambda text, finish=None: {"choices": [{"index": 0, "finish_reason": finish, **(
        {"delta": {"content": text}} if chat else {"text": text})}]}
    usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"], "accepted_length": 2.0}}
    parts = said or [*(piece("ab") for _ in range(body["max_tokens"] // 2)), piece("", "length"), usage]
    with contextlib.suppress(OSError):
      self.send_response(200)
      self.send_header("Content-Type", "text/event-stream")
      self.send_header("Connection", "close")
      self.end_headers()
      self.wfile.write(b": a comment\r\n\r\n")
      for part in parts:
        if how == "hang":
          time.sleep(0.1)
        data = part if isinstance(part, str) else json.dumps(part)
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()
        time.sleep(0.002)
      if not said:
        self.wfile.write(b"data: [DONE]\n\n")
    self.close_connection = True


def serving(how=lambda number: None, **more):
  return chat_server.serving(how, handler=Handler, **more)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  """No proxy and no key of whoever runs the tests."""
  for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", drive.KEY):
    monkeypatch.delenv(name, raising=False)


class Engine:
  """ENGINE's interface: `speed` tokens a round for each of `seats` requests, one round every `pause` seconds."""

  def __init__(self, seats=2, speed=3, pause=0.001, queue=1000, largest=100):
    self.seats, self.speed, self.pause, self.queue, self.largest = seats, speed, pause, queue, largest
    self.left, self.cancelled, self.requests = {}, [], []

  @property
  def idle(self):
    return not self.left

  def submit(self, request):
    if request.max_new_tokens > self.largest:
      raise ValueError("does not fit a seat")
    if len(self.left) >= self.queue:
      raise Full("too many wait")
    self.requests.append(request)
    self.left[len(self.requests)] = [0, request.max_new_tokens]
    return len(self.requests)

  def cancel(self, id):
    self.cancelled.append(id)
    self.left.pop(id, None)

  def step(self):
    time.sleep(self.pause)
    events = []
    for id, state in list(self.left.items())[:self.seats]:
      n = min(self.speed if state[0] else 1, state[1] - state[0])
      state[0] += n
      done = state[0] == state[1]
      events.append(Event(id, tuple(range(n)), None, 4, 4 if state[0] > 1 else 0, n - 1, "length" if done else None))
      if done:
        del self.left[id]
    return events

  def run(self):
    while not self.idle:
      yield from self.step()


def settings(**given):
  return load.Settings(**{"out": None, "target": "t", "seconds": 0.5, "drain": 2.0, **given})


def coming(*due, tokens=7):
  return [Arrival(t, f"q{i}", tokens, i) for i, t in enumerate(due)]


def test_arrivals_are_a_poisson_process():
  """Kills: even gaps, another load for each policy, one length for all, a rate that is no rate."""
  texts = [f"question {i}" for i in range(50)]
  asked = settings(seconds=200.0, questions=(1, 4), new_tokens=(8, 64))
  found = load.arrivals(asked, 10.0, texts)
  assert found == load.arrivals(asked, 10.0, texts) != load.arrivals(settings(seconds=200.0, seed=1), 10.0, texts)
  due = np.array([a.due for a in found])
  gaps = np.diff(due)
  assert len(found) == pytest.approx(2000, abs=5 * 2000 ** 0.5) and 0 < due[0] and due[-1] < 200 and (gaps > 0).all()
  assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)  # of an exponential distribution
  assert {a.text.count("question") for a in found} == {1, 4} and {a.new_tokens for a in found} == {8, 64}
  assert len({a.seed for a in found}) > 1990
  assert len(load.arrivals(settings(seconds=0.001), 0.1, texts)) == 1


def test_an_engine_is_driven_to_the_end():
  """Kills: arrivals that wait for answers, tokens of a prompt's pass counted as a round, an anchor left out."""
  engine = Engine()
  answers = drive.into_engine(engine, coming(0.0, 0.0, 0.05), lambda text: [1, int(text[1:]) + 2], 5.0,
                              temperature=0.5, stop_token_ids=(9,))
  assert [r.prompt for r in engine.requests] == [(1, 2), (1, 3), (1, 4)]
  assert all((r.max_new_tokens, r.temperature, r.stop_token_ids) == (7, 0.5, (9,)) for r in engine.requests)
  assert [r.seed for r in engine.requests] == [0, 1, 2]
  for answer in answers:
    assert (answer.tokens, answer.rounds, answer.verified, answer.failure) == (7, 2, 10, None)
    assert answer.due <= answer.began <= answer.first < answer.last
  found = load.row("p", "x", 1.0, 1.0, coming(0.0, 0.0, 0.05), answers)
  assert (found.tokens, found.accepted_length, found.budget, found.kept_up) == (21, 3.0, 5.0, True)
  assert found.tokens_per_second == 21 and found.offered_per_second == 21 and found.answered == 3


def test_failures_of_an_engine_are_counted(capsys):
  """Kills: a request that is refused and ends the run, one that is never finished and waited for for ever."""
  engine = Engine(queue=1, largest=50, pause=0.01)
  one = coming(0.0)[0]
  answers = drive.into_engine(engine, [one, *coming(0.0), *coming(0.0, tokens=60)], lambda text: [1], 1.0)
  assert [a.failure for a in answers] == [None, "queue is full", "refused"]
  assert "does not fit a seat" in capsys.readouterr().err
  slow = Engine(pause=0.1)
  began = time.perf_counter()
  answers = drive.into_engine(slow, coming(0.0, tokens=90), lambda text: [1], 0.25)
  assert answers[0].failure == "unfinished" and answers[0].tokens > 0 and slow.cancelled == [1] and slow.idle
  assert time.perf_counter() - began < 2
  events = iter([[Event(1, (), None, 0, 0, 0, "failed")]])
  broken = types.SimpleNamespace(submit=lambda request: 1, step=lambda: next(events), idle=False)
  assert drive.into_engine(broken, coming(0.0), lambda text: [1], 1.0)[0].failure == "failed"


@pytest.mark.parametrize("pause, keeps_up", [(0.0005, True), (0.02, False)])
def test_what_cannot_be_kept_up_with_is_said(pause, keeps_up):
  """Kills: a closed loop, whose arrivals slow down with the machine; times from when a request was taken."""
  asked = settings(new_tokens=(20,), drain=30.0)
  arriving = load.arrivals(asked, 80.0, ["q"])
  answers = drive.into_engine(Engine(pause=pause), arriving, lambda text: [1], asked.drain)
  found = load.row("p", "x", 80.0, 0.5, arriving, answers)
  assert found.kept_up is keeps_up and found.failures == {} and found.requests == len(arriving)
  if not keeps_up:
    assert found.open_end > found.open_half + 3 and found.first_token_99 > 0.3
    assert found.tokens_per_second < 0.7 * found.offered_per_second
    waits = [a.first - a.due for a in answers]
    assert np.mean(waits[-5:]) > 3 * np.mean(waits[:5])


def over_http(url, bodies, drain=5.0):
  return asyncio.run(drive.over_http(f"{url}/v1/chat/completions", bodies, drain))


def bodies(*due, tokens=8):
  return [(a, {"messages": [{"content": a.text}], "max_tokens": a.new_tokens}) for a in coming(*due, tokens=tokens)]


def test_a_server_is_asked_when_requests_are_due(monkeypatch):
  """Kills: one request after the other, chunks counted as tokens, a first token that is the response's head; a list of
  models that is asked for without the key."""
  monkeypatch.setenv(drive.KEY, KEY)
  with serving() as server:
    assert load.find_model(f"{server.url}/v1") == MODEL and server.keys == [f"Bearer {KEY}"]
    began = time.perf_counter()
    answers = over_http(server.url, bodies(0.0, 0.0, 0.1, 0.2))
    times = [t - began for t, *_ in server.asked]
    assert all(key == f"Bearer {KEY}" for *_, key in server.asked)
  # No bound above, which a busy machine would break: the first two are under way at the same time instead.
  assert times[3] - times[0] > 0.18 and answers[1].began < answers[0].last
  for answer in answers:
    assert (answer.tokens, answer.failure, answer.rounds, answer.verified) == (8, None, 4, None)
    assert answer.due <= answer.began <= answer.first < answer.last


WORDS = {"choices": [{"delta": {"content": "w"}, "finish_reason": None}]}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("how, failure, tokens", [
    ((500, b"out of memory " + KEY.encode()), "HTTP 500", 0), ((429, {"error": "slow down"}), "HTTP 429", 0),
    ((200, b"<html>hello"), "no stream of completions", 0), (["<html>"], "no JSON in the stream", 0),
    (["[1, 2]"], "no completion in the stream", 0), ([{"choices": [3]}], "no completion in the stream", 0),
    ([WORDS, WORDS], "closed mid-stream", 2), ([WORDS, {"error": {"message": "died"}}], "error in the stream", 1),
    ([WORDS, END], None, 1), ([WORDS, WORDS, END, "[DONE]"], None, 2), ([END], None, 0),
    ([END, {"usage": {"completion_tokens": 5}}], None, 5), ("hang", "unfinished", None),
    ([json.dumps(WORDS | {"note": "a\u2028b\x85"}, ensure_ascii=False), END], None, 1)])
def test_servers_that_fail(how, failure, tokens, monkeypatch, capsys):
  """Kills: a failure that ends the run, is taken for an answer, or is tried again; a key that is shown; a hang;
  a speed of a text that was counted and never sent."""
  monkeypatch.setenv(drive.KEY, KEY)
  with serving(lambda number: how if number == 2 else None) as server:
    answers = over_http(server.url, bodies(0.0, 0.1, 0.2, tokens=8 if how != "hang" else 40), 0.8)
    assert len(server.asked) == 3
  assert [a.failure for a in answers] == [None, failure, None]
  assert tokens is None or answers[1].tokens == tokens
  err = capsys.readouterr().err
  assert KEY not in err and (failure in (None, "unfinished") or failure in err)
  found = load.row("p", "x", 1.0, 1.0, coming(0.0, 0.1, 0.2), answers)
  assert found.failures == ({failure: 1} if failure else {}) and found.answered == 3 - bool(failure)
  assert found.kept_up == (failure is None)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_lines_end_where_those_of_a_stream_do(size):
  """Kills: a text with a line separator of Unicode in it that counts as a failure; a character, or CR and LF, that come
  in two parts."""
  told = ['data: "a\u2028b\u2029c\x85d\x0b 😀"', "data: 2", "data: 3", "data: 4"]
  sent = "{}\r\n\r\n{}\r{}\n\n{}".format(*told).encode()

  async def parts():
    for at in range(0, len(sent), size):
      yield sent[at:at + size]

  async def read():
    return [line async for line in drive.lines(types.SimpleNamespace(aiter_bytes=parts)) if line]
  assert asyncio.run(read()) == told


def test_no_server_at_all():
  """Kills: a traceback of a port without a server."""
  with serving() as server:
    url = server.url
  assert [a.failure for a in over_http(url, bodies(0.0, 0.0))] == ["ConnectError"] * 2
  with complains("lists no models (ConnectError)"):
    load.find_model(url)


@pytest.mark.parametrize("models, part", [
    ((500, b"down"), "lists no models"), ((200, b"<html>"), "lists no models"), ((200, {"data": 3}), "lists no models"),
    ((200, {"data": [{"id": "a"}, {"id": "b"}]}), "serves a, b: choose one"), ((200, {"data": []}), "serves no model")])
def test_servers_of_no_or_several_models(models, part):
  """Kills: the first of several models, a traceback."""
  with serving(models=models) as server, complains(part):
    load.find_model(server.url)


def prompts(folder):
  (folder / "prompts.jsonl").write_text('{"turns": ["what is one?"]}\n{"turns": ["and two?", "more"]}\n')
  return folder / "prompts.jsonl"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_program_with_a_server(endpoint, capsys, tmp_path, monkeypatch):
  """Kills: bodies that the other endpoint wants, rates of one seed, a file that --beside cannot read."""
  monkeypatch.setattr(load.figures.shell, "image", lambda figure: b"drawn")
  with serving() as server:
    args = ("--url", server.url, "--prompts", prompts(tmp_path), "--rates", 20, 40, "--seconds", 0.4,
            "--endpoint", endpoint, "--new-tokens", 4, 8)
    result, err = called(capsys, load.main, load.Settings, *args, "--out", tmp_path / "a", "--name", "mine")
    assert {path for _, path, *_ in server.asked} == {
        "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"}
    body = server.asked[0][2]
    assert body["model"] == MODEL and body["stream"] and ("prompt" in body) == (endpoint == "completions")
    if endpoint == "completions":
      return
    assert [(r["policy"], r["rate"], r["failures"]) for r in result["rows"]] == [("mine", 20, {}), ("mine", 40, {})]
    assert sum(r["requests"] for r in result["rows"]) == len(server.asked)
    assert sorted(files(tmp_path / "a")) == ["figure7.png", "load.json"]  # it does not say what it verified
    assert "figure8 is left out: no server said" in err
    points = []
    monkeypatch.setattr(load.figures, "write", lambda folder, found: points.extend(found) or {})
    called(capsys, load.main, load.Settings, *args, "--out", tmp_path / "b", "--beside", tmp_path / "a" / "load.json")
    assert [p.policy for p in points] == ["mine", "mine", "server", "server"]


def test_program_with_engines(capsys, tmp_path, monkeypatch):
  """Kills: one engine for all policies, another load for each, rows without a budget."""
  made = []
  def start(settings, policy):
    made.append((policy, engine := Engine(seats=8)))
    return engine, types.SimpleNamespace()
  monkeypatch.setattr(load, "start_engine", start)
  monkeypatch.setattr(load.chat, "encode_prompt", lambda tokenizer, messages: list(range(len(messages[0]["content"]))))
  monkeypatch.setattr(load.chat, "stop_ids", lambda tokenizer: (5,))
  result, _ = called(capsys, load.main, load.Settings, "--target", "x", "--rates", 20, "--seconds", 0.4, "--out",
                     tmp_path / "o", "--prompts", prompts(tmp_path), "--drafter", "d", "--policies", "plain",
                     "scheduled")
  assert [policy for policy, _ in made] == ["plain", "scheduled"] == [r["policy"] for r in result["rows"]]
  one, two = (engine.requests for _, engine in made)
  assert one == two and one[0].stop_token_ids == (5,)
  assert all(r["budget"] == 5 and r["kept_up"] for r in result["rows"])
  assert sorted(files(tmp_path / "o")) == ["figure7.png", "figure8.png", "load.json"]


def test_what_was_measured_is_kept(capsys, tmp_path, monkeypatch):
  """Kills: a policy that cannot start and takes what was measured before it along; a cost table of another engine that
  is seen only when its policy's turn has come."""
  def start(settings, policy):
    if policy != "plain":
      raise ValueError("there is no memory for its programs")
    return Engine(seats=8), types.SimpleNamespace()

  monkeypatch.setattr(load, "start_engine", start)
  monkeypatch.setattr(load.chat, "encode_prompt", lambda tokenizer, messages: [1])
  monkeypatch.setattr(load.chat, "stop_ids", lambda tokenizer: ())
  args = ("--target", "t", "--drafter", "d", "--rates", 20, 40, "--seconds", 0.2, "--prompts", prompts(tmp_path),
          "--out", tmp_path / "o", "--policies", "plain", "fixed")
  for change in ({"seats": 9}, {"capacity": 65}, {"sampling": "full"}, {"chunk": 9}, {"drafter": "e"}):
    sizes = {"seats": 8, "capacity": load.EngineConfig.capacity, "chunk": load.EngineConfig.chunk}
    (tmp_path / "cost.json").write_text(json.dumps(table(**sizes | change).to_json()))
    _, err = called(capsys, load.main, load.Settings, *args, "--cost", tmp_path / "cost.json", code=2)
    ((name, value),) = change.items()
    assert f"the cost table is of {name} {value!r}, not " in err and not (tmp_path / "o").exists()
  _, err = called(capsys, load.main, load.Settings, *args, code=2)
  assert "no memory" in err
  kept = json.loads((tmp_path / "o" / "load.json").read_text())
  assert [(row["policy"], row["rate"]) for row in kept["rows"]] == [("plain", 20), ("plain", 40)]
  assert kept["settings"]["out"] == str(tmp_path / "o")


@pytest.mark.parametrize("args, part", [
    ((), "expected either --url"), (("--url", "u", "--target", "t"), "expected either --url"),
    (("--target", "t", "--rates", "0"), "rates is (0.0,)"), (("--target", "t", "--seconds", "0"), "seconds is 0.0"),
    (("--target", "t", "--new-tokens", "0"), "new_tokens is (0,)"),
    (("--url", "http://x:y", "--model", "m"), "url is http://x:y"),
    (("--url", "localhost:8000", "--model", "m"), "expected one such as http://localhost:8000/v1"),
    (("--target", "t"), "policies are plain, fixed, scheduled, but without a drafter"),
    (("--target", "t", "--rates", "1e6"), "expected at most 100000"),
    (("--target", "t", "--drafter", "d", "--prompts", "nowhere"), "dataset nowhere"),
    (("--target", "t", "--rates", "1", "nan"), "rates is (1.0, nan)"),
    (("--target", "t", "--rates", "inf"), "rates is (inf,)"),
    *((("--target", "t", f"--{name}", value), f"{name} is {value}") for name in ("seconds", "drain", "temperature")
      for value in ("nan", "inf"))])
def test_mistakes(args, part, capsys, tmp_path):
  """Kills: tracebacks, and folders of what did not run; one measurement under the names of three policies; settings
  that are no JSON, told once a rate was measured."""
  _, err = called(capsys, load.main, load.Settings, "--out", tmp_path / "o", *args, code=2)
  assert part in err and not (tmp_path / "o").exists()


def test_nothing_answered(capsys, tmp_path):
  """Kills: divisions by nothing, and NaN in JSON, where every request failed; a traceback after the measurement."""
  with serving(lambda number: (404, {"error": "no such model"})) as server:
    result, err = called(capsys, load.main, load.Settings, "--url", server.url, "--model", "wrong", "--rates", 20,
                         "--seconds", 0.2, "--prompts", prompts(tmp_path), "--out", tmp_path / "o")
  assert [row["answered"] for row in result["rows"]] == [0] and result["figures"] == {}
  assert "figure7 is left out: nothing was measured" in err and sorted(files(tmp_path / "o")) == ["load.json"]
  found = load.row("p", "x", 1.0, 1.0, coming(0.0), [Answer(0.0, 0.0, failure="HTTP 500")])
  assert found.tokens_per_second == 0 == found.concurrency and not found.kept_up
  assert (found.first_token, found.accepted_length, found.budget, found.tokens_per_second_per_user) == (None,) * 4
  json.dumps(load.to_json(found), allow_nan=False)
  with pytest.raises(plots.LeftOut):
    load.figures.figure8([load.figures.Point("p", "x", 1.0, 1.0, 1.0, None)])


def test_every_policy_is_drawn():
  """Kills: a policy left out of the figures without a word, past the sizes that markers have."""
  points = [load.figures.Point("p", f"x{i}", 1.0, 1.0, 1.0 + i, 2.0) for i in range(7)]
  for draw in load.figures.FIGURES.values():
    assert [line.get_label() for line in draw(points).axes[0].lines] == [p.policy for p in points]
