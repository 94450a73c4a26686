"""The server: OpenAI's own client and plain requests against an engine that says a script, then against a real one."""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import openai
import pytest
import uvicorn
from starlette.requests import ClientDisconnect

from dspark_jax.data import chat
from dspark_jax.decoding.engine import Event, Full
from dspark_jax.programs.openai_api import parse
from infer import serve, serve_app
from infer.serve import Serving
from infer.serve_app import Stream, build
from test_openai_api import HELLO, TEXT


@pytest.fixture(scope="module")
def tokenizer():
  return chat.load_tokenizer(chat.smollm2_path())


class Scripted:
  """An engine whose every answer is a text, some tokens a round, a round late, as the real one tells them."""

  def __init__(self, tokens, seats=4, queue=8, slots=10 ** 9):
    self.tokens, self.seats, self.most, self.slots = tokens, seats, queue, slots
    self.asked, self.open, self.late, self.cancelled, self.broken = {}, {}, [], [], False
    self.lock = threading.Lock()

  @property
  def idle(self):
    return not (self.open or self.late)

  def room(self, prompt):
    return self.slots - prompt

  def submit(self, request):
    if len(request.prompt) > 200:
      raise ValueError("a prompt of many tokens does not fit: shorten it")
    with self.lock:
      if len(self.open) >= self.most:
        raise Full("8 requests are waiting, the most that may: try again later")
      id = len(self.asked) + 1
      self.asked[id] = request
      self.open[id] = 0
    return id

  def cancel(self, id):
    self.cancelled.append(id)
    with self.lock:
      self.open.pop(id, None)

  def step(self):
    if self.broken:
      raise RuntimeError("the device is gone")
    said, self.late = self.late, []
    time.sleep(0.002)
    with self.lock:
      for id, at in list(self.open.items()):
        request = self.asked[id]
        part = tuple(self.tokens[at:at + (3 if at else 1)][:request.max_new_tokens - at])
        logs = tuple(-0.5 for _ in part) if request.log_probabilities else None
        over = at + len(part) >= min(len(self.tokens), request.max_new_tokens)
        self.late.append(Event(id, part, logs, 7 * bool(at), 5 * bool(at), max(len(part) - 1, 0) * bool(at),
                               "length" if over else None))
        self.open[id] = at + len(part)
        if over:
          del self.open[id]
    return said

  def metrics(self):
    return {"requests": len(self.asked), "queue": 0, "program_full": 3, "row_rounds": 1, "round_tokens": 3}


HERE = {"host": "127.0.0.1", "port": 0}


@contextlib.contextmanager
def served(tokenizer, engine, **limits):
  """A server of this engine in this process: its address."""
  settings = SimpleNamespace(**{"target": "toy", "max_tokens": 40, "max_body": 5000, "queue": 4, "seats": 4} | HERE |
                             limits)
  with Serving(engine) as serving, contextlib.closing(serve.open_port(settings)) as listener:
    server = uvicorn.Server(uvicorn.Config(build(settings, serving, tokenizer), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
      yield f"http://127.0.0.1:{listener.getsockname()[1]}", serving
    finally:
      server.should_exit = True
      thread.join()


@pytest.fixture(scope="module")
def toy(tokenizer):
  engine = Scripted(tokenizer.encode(TEXT))
  with served(tokenizer, engine) as (url, serving):
    yield SimpleNamespace(url=url, engine=engine, serving=serving,
                          client=openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))


def test_a_conversation_whole_and_streamed(toy):
  """Kills: characters that are cut between two rounds, a chunk that is lost, usage of another answer."""
  whole = toy.client.chat.completions.create(model="toy", messages=HELLO, max_tokens=30, seed=4)
  stream = toy.client.chat.completions.create(model="toy", messages=HELLO, max_tokens=30, stream=True,
                                              stream_options={"include_usage": True, "include_obfuscation": False})
  chunks = list(stream)
  text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
  assert text == whole.choices[0].message.content and TEXT.startswith(text.rstrip("\ufffd"))
  assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
  assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 30
  assert whole.usage.accepted_length == pytest.approx(29 / 10)


def test_several_answers_and_log_probabilities(toy):
  """Kills: answers in each other's place, one seed for all of them."""
  before = len(toy.engine.asked)
  found = toy.client.completions.create(model="toy", prompt="Once", n=3, max_tokens=5, seed=7, logprobs=0)
  assert [choice.index for choice in found.choices] == [0, 1, 2]
  assert [toy.engine.asked[before + i].seed for i in (1, 2, 3)] == [7, 8, 9]
  assert found.choices[2].logprobs.token_logprobs == [-0.5] * 5
  assert "".join(found.choices[2].logprobs.tokens) == found.choices[2].text  # not as the vocabulary spells them
  spoken = toy.client.chat.completions.create(model="toy", messages=HELLO, max_tokens=4, logprobs=True)
  assert len(spoken.choices[0].logprobs.content) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_across_tokens(toy, tokenizer, stream):
  """Kills: a stop text that is seen only inside one token, a part of it that was told already, tokens behind it that
  count as said, or whose log-probabilities are told."""
  found = toy.client.completions.create(model="toy", prompt="Once", max_tokens=40, stop=["ones, 😀 t", "zzz"],
                                        stream=stream, logprobs=0)
  if stream:
    found = list(found)
    words = [word for chunk in found for word in chunk.choices[0].logprobs.tokens]
    text, last = "".join(chunk.choices[0].text for chunk in found), found[-1].choices[0].finish_reason
  else:
    text, last, words = found.choices[0].text, found.choices[0].finish_reason, found.choices[0].logprobs.tokens
    count = found.usage.completion_tokens  # a round brings more along
    less, said = (tokenizer.decode(toy.engine.tokens[:n]) for n in (count - 1, count))
    assert len(less) < len(text) <= len(said)
  assert (text, last) == (TEXT[:TEXT.index("ones,")], "stop")
  assert "".join(words) == text + "ones"  # one token with the space before it


@pytest.mark.parametrize("change, says", [
    (dict(messages=[]), "messages"), (dict(messages=[{"role": "user"}]), "only text"),
    (dict(messages=[{"role": "user", "content": "a", "tokens": [1]}]), "'tokens'"),
    (dict(messages=[{"role": "user", "content": "\ud800"}]), "cannot read"), (dict(max_tokens=0), "max_tokens"),
    (dict(temperature=-1), "temperature"), (dict(temperature="hot"), "temperature"), (dict(top_p=2), "top_p"),
    (dict(n=1000), "n is"), (dict(seed=2 ** 40), "seed"), (dict(stop=[""]), "stop"), (dict(stop=3), "stop"),
    (dict(frequency_penalty=1), "frequency_penalty"), (dict(tools=[{"type": "function"}]), "tools"),
    (dict(logit_bias={"1": 3}), "logit_bias"), (dict(top_logprobs=4), "top_logprobs"), (dict(sleepy=True), "sleepy"),
    (dict(stream="yes"), "stream"), (dict(response_format={"type": "json_object"}), "response_format"),
    (dict(temperature=float("nan")), "temperature"), (dict(max_tokens=True), "max_tokens"),
    (dict(stream_options={"include_usage": "yes"}), "stream_options.include_usage is 'yes', expected bool"),
    (dict(stream_options={"chunk_size": 3}), "stream_options.chunk_size is '3', which is not supported"),
    ({"\ud800": 1}, "ud800' is '1'"), ({"x" * 3000: 1}, "xx... is '1'")])
def test_what_is_not_understood_is_refused_by_name(toy, change, says):
  """Kills: a field that would change the answer and is passed over; 500 for a client's mistake."""
  body = json.dumps({"model": "toy", "messages": HELLO} | change)
  found = httpx2.post(f"{toy.url}/v1/chat/completions", content=body)
  assert found.status_code == 400 and says in found.json()["error"]["message"]


def test_bodies_paths_and_limits(toy, tokenizer):
  """Kills: a server that holds what it will not read, and tracebacks where a sentence is due."""
  post = lambda path, body: httpx2.post(f"{toy.url}{path}", content=body)
  assert post("/v1/completions", b'{"prompt": "a"').status_code == 400
  assert post("/v1/completions", b"[" * 4000).status_code == 400
  assert post("/v1/completions", b"[]").status_code == 400
  assert post("/v1/completions", b"x" * 6000).status_code == 413
  assert post("/v1/completions", json.dumps({"prompt": [1] * 300}).encode()).status_code == 400
  assert post("/v1/completions", b'{"prompt": "\\ud800"}').status_code == 400
  assert post("/v1/completions", b'{"prompt": "a", "model": "other"}').status_code == 404
  assert post("/v1/chat", b"{}").status_code == 404
  assert httpx2.get(f"{toy.url}/v1/completions").status_code == 405
  assert httpx2.get(f"{toy.url}/health").json()["status"] == "ok"
  assert [model.to_dict() for model in toy.client.models.list()] == [toy.client.models.retrieve("toy").to_dict()]
  with pytest.raises(openai.NotFoundError, match="'some/other' is not served here, 'toy' is"):
    toy.client.models.retrieve("some/other")
  metrics = httpx2.get(f"{toy.url}/metrics").text
  assert 'dspark_program_rounds_total{program="full"} 3.0' in metrics and "dspark_accepted_length_count" in metrics
  page = httpx2.get(f"{toy.url}/")
  assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.text.split("<body")[-1]


def test_curl(toy):
  said = subprocess.run(["curl", "-sN", f"{toy.url}/v1/completions", "-d",
                         '{"prompt": "Once", "max_tokens": 6, "stream": true, "dspark": true}'],
                        capture_output=True, text=True, timeout=20).stdout
  events = [line[6:] for line in said.split("\n\n") if line]
  assert events[-1] == "[DONE]"
  details = [json.loads(event)["dspark"] for event in events[:-1]]
  assert [len(d["pieces"]) for d in details] == [1, 3, 2] and details[1]["verified"] == 5
  assert [kept for _, kept in details[1]["pieces"]] == [True, True, False]


def test_a_full_queue_is_429_and_who_leaves_is_cancelled(tokenizer):
  """Kills: a queue that grows without end; seats that decode for nobody."""
  engine = Scripted(tokenizer.encode(TEXT) * 200)
  with served(tokenizer, engine, max_tokens=10 ** 6) as (url, _):
    with httpx2.Client() as client:
      streams = [contextlib.ExitStack() for _ in range(8)]
      for stream in streams:
        stream.enter_context(client.stream("POST", f"{url}/v1/completions", content=json.dumps(
            {"prompt": "Once", "stream": True})))
      assert httpx2.post(f"{url}/v1/completions", content='{"prompt": "Once"}').status_code == 429
      for stream in streams:
        stream.close()
    for _ in range(200):
      if not engine.open:
        break
      time.sleep(0.05)
    assert sorted(engine.cancelled) == list(range(1, 9))


def test_more_answers_than_may_ever_be_here(toy):
  """Kills: 429 for what an idle server refuses for ever, while clients try again and again."""
  before = len(toy.engine.asked)
  with pytest.raises(openai.BadRequestError, match="n is 9, but only 8 requests may be here at a time") as refused:
    toy.client.completions.create(model="toy", prompt="Once", n=9, max_tokens=2)
  assert refused.value.body["param"] == "n" and len(toy.engine.asked) == before
  assert len(toy.client.completions.create(model="toy", prompt="Once", n=8, max_tokens=2).choices) == 8


def test_an_engine_that_fails_is_told(tokenizer):
  """Kills: clients that wait for ever, health that is ok while nothing works."""
  engine = Scripted(tokenizer.encode(TEXT))
  with served(tokenizer, engine) as (url, _):
    engine.broken = True
    assert httpx2.post(f"{url}/v1/completions", content='{"prompt": "Once"}').status_code == 500
    assert httpx2.get(f"{url}/health").status_code == 503
    assert "start the server again" in httpx2.post(f"{url}/v1/completions", content='{"prompt": "a"}').text


def test_who_leaves_before_the_first_word(tokenizer):
  """Kills: a generator that was never begun, whose end cancels nothing."""
  left = []

  async def told():
    yield "data: never\n\n"

  async def gone(*_):
    raise OSError("the client has left")

  gone_at_once = Stream(told(), lambda: left.append(True))
  with pytest.raises(ClientDisconnect):
    asyncio.run(gone_at_once({"type": "http", "asgi": {"spec_version": "2.4"}}, gone, gone))
  assert left == [True]


def test_while_it_drains_new_requests_are_refused(tokenizer):
  with served(tokenizer, Scripted(tokenizer.encode(TEXT))) as (url, serving):
    serving.draining = True
    assert httpx2.post(f"{url}/v1/completions", content='{"prompt": "Once"}').status_code == 503


def test_a_long_prompt_holds_up_nobody(tokenizer, monkeypatch):
  """Kills: prompts that are tokenized on the thread that everybody's streams go through; one that is read while the
  server begins to shut down, and is served all the same."""
  reading, go = threading.Event(), threading.Event()

  def slow(*args, **how):
    reading.set()
    assert go.wait(30)
    return parse(*args, **how)

  monkeypatch.setattr(serve_app, "parse", slow)
  with served(tokenizer, Scripted(tokenizer.encode(TEXT))) as (url, serving), ThreadPoolExecutor(1) as pool:
    late = pool.submit(httpx2.post, f"{url}/v1/completions", content='{"prompt": "Once"}', timeout=60)
    try:
      assert reading.wait(30) and httpx2.get(f"{url}/health", timeout=10).status_code == 200
      serving.draining = True
    finally:
      go.set()
    assert late.result().status_code == 503


def test_who_names_no_limit_gets_what_there_is_room_for(tokenizer):
  """Kills: a default that refuses prompts which fit."""
  engine = Scripted(tokenizer.encode(TEXT), slots=200)
  with served(tokenizer, engine, max_tokens=1000) as (url, _):
    assert httpx2.post(f"{url}/v1/completions", content=json.dumps({"prompt": [5] * 190})).status_code == 200
  assert engine.asked[1].max_new_tokens == 10


def test_the_first_text_is_waited_for_from_the_arrival_on(tokenizer, monkeypatch):
  """Kills: a time to first token without what a request waits for, and takes, to be tokenized."""
  monkeypatch.setattr(serve_app, "parse", lambda *args, **how: time.sleep(0.5) or parse(*args, **how))
  with served(tokenizer, Scripted(tokenizer.encode(TEXT))) as (url, _):
    assert httpx2.post(f"{url}/v1/completions", content='{"prompt": "Once", "max_tokens": 2}').status_code == 200
    metrics = httpx2.get(f"{url}/metrics").text
  (took,) = [line.split()[1] for line in metrics.splitlines() if "first_token_seconds_sum" in line]
  assert float(took) > 0.5


@pytest.mark.slow
def test_the_real_thing_answers_and_ends_in_order():
  """SmolLM2 in a process of its own: the text of infer.generate; SIGTERM finishes what runs, refuses the rest, exits 0
  with what it did. Kills: a server that works with a script alone, requests that are lost at the end."""
  command = [sys.executable, "-m", "infer.serve", "--target", "smollm2", "--drafter", "none", "--port", "0", "--seats",
             "2", "--capacity", "256", "--sampling", "greedy"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    url = next(line.split()[-1] for line in process.stderr if "serving" in line)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    ask = lambda new: httpx2.post(f"{url}/v1/completions", timeout=300, content=json.dumps(
        {"prompt": "Once upon a time", "max_tokens": new, "temperature": 0}))
    first, answers = ask(12).json(), []
    workers = [threading.Thread(target=lambda: answers.append(ask(100).json())) for _ in range(3)]
    [worker.start() for worker in workers]
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert httpx2.get(f"{url}/health").status_code == 503
    late = ask(3)
    assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
    [worker.join() for worker in workers]
    said, code = process.stdout.read(), process.wait()
  assert code == 0 and json.loads(said.splitlines()[-1])["requests"] == 4
  texts = {answer["choices"][0]["text"] for answer in answers}
  assert len(answers) == 3 and len(texts) == 1 and texts.pop().startswith(first["choices"][0]["text"])


@pytest.mark.slow
def test_the_page_shows_where_tokens_come_from(toy):
  """In Chromium, under the page's own policy: drafted and own tokens in their colours, the counts of all rounds, the
  talk going on. Kills: a policy that forbids the page its own script, a page that shows text and no provenance."""
  sync_api = pytest.importorskip("playwright.sync_api")
  found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
  if not found:
    pytest.skip("no chromium on the path")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
    page, faults = browser.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(toy.url)
    page.fill("#text", "hello")
    page.fill("#most", "31")
    page.click("#send")
    page.wait_for_selector("#send:enabled", timeout=20000)
    assert page.text_content("#talk .answer") == TEXT[:len(page.text_content("#talk .answer"))]
    kinds = page.eval_on_selector_all("#talk .answer span", "spans => spans.map(span => span.className)")
    assert kinds == ["own"] + ["kept", "kept", "own"] * 10
    assert [page.text_content(f"#{name}") for name in ("length", "budget", "rounds")] == ["3.00", "50 of 70", "10"]
    page.fill("#text", "<b>again</b>")
    page.click("#send")
    page.wait_for_selector("#send:enabled", timeout=20000)
    assert len(page.query_selector_all("#talk .answer")) == 2 and not page.query_selector_all("#talk b")
    page.fill("#most", "0")
    page.fill("#text", "refused")
    page.eval_on_selector("#form", "form => form.noValidate = true")
    page.click("#send")
    page.wait_for_selector("#talk .error", timeout=20000)
    assert "max_tokens" in page.text_content("#talk .error")
    browser.close()
  assert [fault for fault in faults if "400" not in fault] == []
