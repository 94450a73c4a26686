"""Servers that answer as vLLM does, on ports of their own, or fail as they are told."""

import contextlib
import http.server
import json
import threading
import time

MODEL = "tiny/model"
KEY = "sk-very-secret"


class Speaker(http.server.BaseHTTPRequestHandler):
  """Says which models there are."""
  protocol_version = "HTTP/1.1"

  def do_GET(self):
    self.reply(*self.server.models)

  def reply(self, code, value, headers=()):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    self.send_response(code)
    for name, text in headers:
      self.send_header(name, text)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    with contextlib.suppress(OSError):  # who asked may have hung up
      self.wfile.write(data)

  def log_message(self, *_):
    pass


class Handler(Speaker):
  """Answers as vLLM does, after what `server.how(body, number of the request)` wants to happen instead."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with self.server.lock:
      self.server.asked.append(body)
      self.server.keys.append(self.headers.get("Authorization"))
      number = len(self.server.asked)
      self.server.now += 1
      self.server.most = max(self.server.most, self.server.now)
    instead = self.server.how(body, number)
    with self.server.lock:
      self.server.now -= 1
    if instead == "die":
      self.close_connection = True
      self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
    elif instead == "dribble":  # never silent for long, never done
      self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
      with contextlib.suppress(OSError):
        for _ in range(200):
          self.wfile.write(b" ")
          time.sleep(0.1)
    else:
      self.reply(*(instead or (200, completion(body))))


def completion(body, content=None, finish="stop", **message):
  """A response whose text is a function of what was asked, of its seed and of the sampling."""
  said = f"{len(body['messages'])} {body['seed']} {body['temperature']} {body['messages'][-1]['content']}"
  return {"object": "chat.completion", "choices": [{"index": 0, "finish_reason": finish, "message": {
      "role": "assistant", "content": said if content is None else content, **message}}],
      "usage": {"completion_tokens": 7}}


@contextlib.contextmanager
def serving(how=lambda body, number: None, models=(200, {"data": [{"id": MODEL}]}), handler=Handler):
  """A server on a port of its own; gives it, with its url."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  server.daemon_threads, server.lock = True, threading.Lock()
  server.how, server.models, server.asked, server.keys, server.now, server.most = how, models, [], [], 0, 0
  server.url = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
