"""How a server starts and ends: tables and ports that it cannot have, what it says, signals."""

import contextlib
import json
import logging.config
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2
import pytest

from dspark_jax.data import chat
from dspark_jax.programs import shell
from folders import complains
from infer import serve
from test_cost import table
from test_openai_api import TEXT
from test_serve import HERE, Scripted


@pytest.mark.parametrize("change, part", [({"dtype": "bfloat16"}, "dtype 'bfloat16', not 'float32'"),
                                          ({"target": "other"}, "target 'other', not 'smollm2'"),
                                          ({"drafter": "runs/other"}, "drafter 'runs/other', not 'runs/demo'")])
def test_costs_of_something_else_are_refused(change, part, tmp_path):
  """Before anything is loaded. Kills: rounds that are chosen by what another model's, or another dtype's, take."""
  shell.write_json(tmp_path / "cost.json", table(**{"target": "smollm2"} | change).to_json())
  with complains(part):
    serve.start_engine(serve.Settings(target="smollm2", drafter="runs/demo" if "drafter" in change else "none",
                                      cost=tmp_path / "cost.json"))


def test_a_port_is_had_once():
  """Kills: a second server that hears of the first only when all is loaded; one that does not start again at once, as
  connections of the one before linger."""
  with contextlib.closing(serve.open_port(SimpleNamespace(**HERE))) as listener:
    again = SimpleNamespace(**HERE | {"port": listener.getsockname()[1]})
    with complains(f"port {again.port} of 127.0.0.1 cannot be had", "choose another"):
      serve.open_port(again)
    with pytest.raises(ConnectionRefusedError):  # nobody waits for minutes
      socket.create_connection(listener.getsockname())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `serve` does
    listener.listen()
    with socket.create_connection(listener.getsockname()) as client:
      listener.accept()[0].close()  # who closes first is the one that lingers
      assert client.recv(1) == b""
  serve.open_port(again).close()


def test_what_starting_says(monkeypatch, capsys):
  """Kills: a confidence head that is believed as it is without a word, or with one for every request; programs whose
  time and memory nobody sees."""
  stored = SimpleNamespace(by_mode={"greedy": 1}, for_mode=lambda mode: [1.0])
  for place, name, made in ((chat, "load_tokenizer", None), (serve, "locate_target", None),
                            (serve, "target_config", SimpleNamespace(max_positions=8192)),
                            (serve.shell, "load_target", None), (serve.shell, "check_drafter", None),
                            (serve, "stored_temperatures", stored),
                            (serve.dspark_jax, "load_drafter", SimpleNamespace(block_size=7))):
    monkeypatch.setattr(place, name, lambda *_, made=made, **__: made)
  monkeypatch.setattr(serve, "Engine", lambda target, drafter, config, **more: SimpleNamespace(
      config=config, compile_costs={"draft": (3.25, 12_000_000)}, **more))
  for survival, said in (("head", 1), ("auto", 0)):
    engine, _ = serve.start_engine(serve.Settings(target="t", drafter="d", policy="fixed", survival=survival))
    assert [engine.calibration(temperature) for temperature in (0.0, 0.7, 0.7)] == [[1.0], None, None]
    err = capsys.readouterr().err
    assert err.count("were fitted for T=0.7") == said and "for greedy" not in err
    assert "compiled draft in 3.2 s with temporaries of 12 MB" in err


def test_a_second_signal_ends_at_once(monkeypatch):
  """While one is answered. Kills: an end that waits for answers all the same; tracebacks of what was cancelled."""
  said, handler = [], logging.Handler()
  handler.emit = said.append
  monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [handler])
  monkeypatch.setattr(logging.config, "dictConfig", lambda _: None)  # uvicorn's own handlers
  tokenizer = chat.load_tokenizer(chat.smollm2_path())
  engine, listener = Scripted(tokenizer.encode(TEXT) * 2000), serve.open_port(SimpleNamespace(**HERE))
  settings = SimpleNamespace(target="toy", max_tokens=10 ** 6, max_body=5000, queue=4, seats=4)

  def ask():
    with contextlib.suppress(httpx2.HTTPError), httpx2.stream("POST", url, content=json.dumps(
        {"prompt": "Once", "stream": True}), timeout=60) as stream:
      for count, _ in enumerate(stream.iter_lines()):
        if count in (1, 9):  # the handlers are there since before the port was open
          os.kill(os.getpid(), signal.SIGTERM)

  url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
  listener.listen()  # or the client could come before the server
  with contextlib.closing(listener), ThreadPoolExecutor(1) as pool:
    asking = pool.submit(ask)
    result = serve.serve(settings, engine, tokenizer, listener)
    asking.result()
  assert result["requests"] == 1 and result["error"] is None and engine.cancelled == [1] and said == []
