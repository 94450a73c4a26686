"""Other people's code (templates, tokenizers) on other people's files: a sentence for its errors, limits for it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable

from dspark_jax.config import error_shown

SECONDS = 10         # a template takes milliseconds; one that loops would take for ever
BYTES = 2 * 10 ** 9  # and a few times its text; {{ 'x' * 10 ** 10 }} would take all there is
TICKS = 10           # in which SECONDS are counted


def guarded(function: Callable, what: str, remedy: str = "change the text, or download the tokenizer again"):
  """function(), which runs other people's code on other people's files; ValueError for whatever goes wrong in it."""
  try:
    return function()
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # a panic in Rust is no Exception
    said = error_shown(error)
    raise ValueError(f"{what} ({type(error).__name__}{': ' if said else ''}{said}): {remedy}") from error


class _Slow(Exception):
  pass


def limited(function: Callable):
  """function(), ended after SECONDS, in any thread: a template is a program of whoever made the model. Its memory is
  limited, too, where the system can do that."""
  call = threading.get_ident(), object()
  _WATCH.begin(call)
  try:
    with _few_bytes():
      return function()
  except _Slow as error:
    raise TimeoutError(f"it runs for more than {SECONDS} seconds") from error
  finally:
    _WATCH.end(call)


class _Watch:
  """Ends calls that take SECONDS. One thread for all that go on: to start one takes longer than most templates do."""

  def __init__(self):
    self.lock, self.thread, self.left = threading.Lock(), None, {}  # ticks that are left to each call

  def begin(self, call):
    with self.lock:
      self.left[call] = TICKS + 1  # the first one may end at once
      if self.thread is None or not self.thread.is_alive():  # as in a copy of a process, which has no other threads
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

  def end(self, call):
    with self.lock:
      self.left.pop(call, None)

  def run(self):
    while True:
      threading.Event().wait(SECONDS / TICKS)
      with self.lock:
        if not self.left:
          self.thread = None
          return
        self.left = {call: ticks - 1 for call, ticks in self.left.items()}
        for thread, _ in [call for call, ticks in self.left.items() if ticks == 0]:
          ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Slow))


_WATCH = _Watch()
_MEMORY = threading.Lock()  # the limit is the process's own: two threads would put back each other's


@contextlib.contextmanager
def _few_bytes():
  """Allocations that would take BYTES more than the process has now end in a MemoryError (Linux)."""
  try:
    import resource  # not on Windows
    with open("/proc/self/statm", "rb", buffering=0) as file:
      pages = int(file.read().split()[5])  # of data and stack, which RLIMIT_DATA counts
  except (ImportError, OSError):
    yield
    return
  with _MEMORY:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft < 0 else min(limit, soft), hard))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
