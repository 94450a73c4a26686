"""What every program shares: one error sentence and exit code 2, progress on stderr, one JSON line on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import inspect
import io
import json
import os
import secrets
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status

import dspark_jax
from dspark_jax.config import PASSING
from dspark_jax.data import chat
from dspark_jax.decoding import session
from dspark_jax.loading import drafter_folder, locate_target
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import hosts
from dspark_jax.types import Target

ONE_DEVICE = MeshConfig()
LINES = 30  # seconds between two lines of a bar where no terminal shows it
URLS = "gs:", "s3:", "http:", "https:", "file:"


class Stderr(Console):
  """For people: a terminal shows bars and spinners; a file, a pipe or a launcher's log gets lines in their place."""

  def status(self, status, **how):
    return super().status(status, **how) if self.is_interactive else StatusLine(status, console=self)


class StatusLine(Status):
  """A line at the start, and at each update."""

  def start(self):
    say(self.status)

  def stop(self):
    pass  # there is no spinner

  def update(self, status=None, **_):
    say(status)


class BarLines(Progress):
  """Of each task a line when it begins, at the first news, then at most one in LINES seconds, and at the end."""

  def __init__(self, *columns, **how):
    super().__init__(*columns, disable=True, **how)
    self.told = {}  # by task: the last news, and when there may be a line again
    self.ended = threading.Event()

  def start(self):
    threading.Thread(target=self._late, daemon=True).start()

  def _late(self):
    """Tells what came too soon after a line: a part that takes minutes is named at its start alone."""
    while not self.ended.wait(LINES):
      for task_id in self.task_ids:
        self._tell(task_id)

  def stop(self):
    self.ended.set()
    for task_id in self.task_ids:
      self._tell(task_id, last=True)

  def add_task(self, *args, **how):
    task_id = super().add_task(*args, **how)
    self._tell(task_id, first=True)
    return task_id

  def update(self, task_id, **changes):
    super().update(task_id, **changes)
    self._tell(task_id)

  def advance(self, task_id, advance=1):
    self.update(task_id, advance=advance)

  def _tell(self, task_id, first=False, last=False):
    """Says how far a task is, unless that was said, or something a moment ago."""
    with self._lock:
      task, now, span = self._tasks[task_id], self.get_time(), lambda s: datetime.timedelta(seconds=round(s))
      count, note = f"{task.description}: {task.completed:.0f} of {task.total:.0f}", task.fields["note"]
      told, due = self.told.get(task_id, (None, now))
      if (count, note) == told or now < due and not (last or task.finished):
        return
      self.told[task_id] = (count, note), now if first else now + LINES
      spent = f"{span(task.elapsed)} so far" if task.elapsed >= 1 else ""
      left = f"{span(task.time_remaining)} left" if task.time_remaining else ""
      say(", ".join(filter(None, (count, note, spent, left))))


stderr = Stderr(stderr=True)


def run(main, settings: type, *, default=None, args=None, mesh: bool = True) -> None:
  """Parses the command line into `settings` (a dataclass), calls main(settings) -> dict, prints it as the last line.

  default: makes the settings that the command line overrides. mesh: whether a `mesh` of theirs is the current one
  meanwhile. With `hosts` among them the program runs in several processes, of which the first alone speaks. The user's
  mistakes (ValueError, NotImplementedError, a missing file, a full disk) exit 2 with a sentence; hosts.AGAIN is for
  what may pass by itself: processes that do not come together, files that a server does not give (PASSING). Whatever
  ends one of several ends all, with the same code.
  """
  try:
    more = {"default": default()} if default else {}
    asked = tyro.cli(settings, prog=command(main.__module__), args=args,
                     description=sys.modules[main.__module__].__doc__, **more)
    check_paths(asked)
    apart = not hasattr(asked, "hosts")
    if apart and getattr(asked, "writers", 1) == 1:  # several know their shares without a word to one another
      hosts.refuse(main.__module__)
    with contextlib.nullcontext() if apart else hosts.join(asked.hosts):
      stderr.quiet = not hosts.first()
      with joint_mesh(getattr(asked, "mesh", ONE_DEVICE)) if mesh else contextlib.nullcontext():
        result = main(asked)
  except (ValueError, NotImplementedError, OSError, hosts.Apart) as error:
    passes = isinstance(error, hosts.Apart) or isinstance(error, OSError) and error.errno in PASSING
    code, sentence = hosts.AGAIN if passes else 2, _sentence(error)
    stderr.quiet = False
    complain(sentence)
    hosts.leave(sentence, code)
    sys.exit(code)
  except KeyboardInterrupt:
    hosts.leave("interrupted", 130)
    sys.exit(130)  # 128 + SIGINT, as a shell has it
  except Exception as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      hosts.blame()  # an exchange with one that is gone; or our own device, and then nobody is
    if hosts.here.processes > 1:
      traceback.print_exc()
      hosts.leave(f"{type(error).__name__}: {error}".partition("\n")[0], 1)
    raise
  if hosts.first():
    _print(json.dumps(result, allow_nan=False))  # NaN and Infinity are no JSON: a program that gives them is wrong


def command(module: str = "__main__") -> str:
  """How a program is started. Its file, by which argparse would call it, does not run by itself."""
  return f"python -m {getattr(sys.modules[module].__spec__, 'name', module)}"


def complain(sentence: str) -> None:
  """Says what is wrong, last of all."""
  stderr.print(f"error: {sentence}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _print(result):
  try:
    print(result, flush=True)
  except BrokenPipeError:
    _leave_stdout(141)  # 128 + SIGPIPE, as a shell has it
  except OSError as error:
    complain(f"the work is done, but its result cannot be written to stdout ({error.strerror}): give the same command "
             f"again")
    _leave_stdout(2)


def _leave_stdout(code):
  """Ends the program; Python would try once more to write what is left."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(code)


def _sentence(error: Exception) -> str:
  """What a mistake is told by: its own words, or the system's with the file and what to do."""
  if not isinstance(error, OSError) or error.strerror is None:
    return str(error)
  full, closed = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)
  if error.filename is None and error.errno not in full + PASSING:  # no file's
    return str(error)
  remedy = ("free some space, then give the same command again" if error.errno in full else
            "give another path, or the right to it" if error.errno in closed else
            "it may pass by itself, give the same command again" if error.errno in PASSING else "check the path")
  return f"{error.filename or 'a file'}: {error.strerror}: {remedy}"


def joint_mesh(mesh: MeshConfig) -> contextlib.AbstractContextManager:
  """What makes the mesh the current one. ValueError where there are several processes and it leaves devices out."""
  if hosts.here.processes > 1 and mesh.build().size != jax.device_count():
    raise ValueError(f"{mesh}, and the {hosts.here.processes} processes have {jax.device_count()} devices: expected "
                     f"all of them, e.g. --mesh.data -1 or --mesh.fsdp -1")
  return mesh.use()


def say(text: Any) -> None:
  """A line, or a table, for people, on stderr."""
  # No markup: paths may hold [brackets]. No wrapping: a sentence stays one line for who reads a log.
  stderr.print(text, markup=False, highlight=False, soft_wrap=True) if isinstance(text, str) else stderr.print(text)


def check_paths(settings: Any) -> None:
  """ValueError for the first of these settings that is a path and was given as a URL, which would become a folder gs:
  here; those that may be URLs are text."""
  for name, value in vars(settings).items():
    for path in value if isinstance(value, tuple) else (value,):
      if isinstance(path, Path) and path.parts and path.parts[0] in URLS:
        raise ValueError(f"{name} is {path.parts[0]}//{'/'.join(path.parts[1:])}, expected a path: programs lock files "
                         f"and append to them, so give a file system that all hosts see (NFS, Filestore, Lustre); only "
                         f"a hidden-state store (--features, --out of train.cache_hidden) may be at a URL")


def check_out(path: Path | None, *, folder: bool = False) -> None:
  """ValueError for a path at which no file, or folder, can be written, which the end of the work would find out; None
  is no path. Nothing is made."""
  if path is None:
    return
  there = next(place for place in (path, *path.parents) if place.exists())
  right = there.is_dir() == folder if there == path else there.is_dir()
  if not right:
    is_, wanted = ("a folder", "a file") if there.is_dir() else ("a file", "a folder")
    raise ValueError(f"{there} is {is_}, expected {wanted} or nothing: choose another path than {path}")
  if not os.access(there if there.is_dir() else there.parent, os.W_OK | os.X_OK):
    raise ValueError(f"{there} cannot be written: choose another path than {path}, or take the right to it")


def at_least(settings: Any, **bounds: int) -> None:
  """ValueError for the first of these settings that is below its bound."""
  for name, bound in bounds.items():
    if getattr(settings, name) < bound:
      raise ValueError(f"{name} is {getattr(settings, name)}, expected at least {bound}")


def check_decoding(settings: Any) -> None:
  """ValueError for those of these settings that decoding would refuse, which takes a loaded model to find out."""
  known = inspect.signature(session.check).parameters
  session.check(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)
                   if field.name in known})


def check_kernels(kernels: Kernels) -> None:
  """ValueError for a kernel by name that this machine's devices do not run, which a compiler would find out late."""
  here = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
  for setting, name in (("decode", kernels.decode), ("train", kernels.train)):
    where = {"pallas": "tpu", "splash": "tpu", "triton": "gpu"}.get(name, here)
    if where != here and not kernels.interpret:
      raise ValueError(f"kernels.{setting} is {name}, which runs on a {where}, and this is a {here}: give auto or "
                       f"reference")


def check_drafter(drafter: str | Path, *words: str) -> None:
  """ValueError for a drafter that is not there, which loading it would find out after the target, in minutes.

  words: what may be said in place of one.
  """
  if str(drafter) in words:
    return
  folder = drafter_folder(drafter)
  if not any((folder / name).exists() for name in ("drafter.json", "config.json", "adapter_config.json")):
    raise ValueError(f"{drafter} {'is no drafter' if folder.exists() else 'does not exist'}: expected a folder with "
                     f"drafter.json (ours) or config.json (DeepSpec, DFlash) in it, or a training run"
                     f"{''.join(f', or {word}' for word in words)}")


def load(target: str, dtype: str, kernels: Kernels = Kernels("auto", "auto")) -> tuple[Target, Any]:
  """(a target, its tokenizer). The tokenizer is loaded first: its absence is seen at once, weights take minutes."""
  with stderr.status(f"loading {target}"):
    tokenizer = chat.load_tokenizer(locate_target(target))
    return load_target(target, dtype, kernels), tokenizer


def load_target(name: str, dtype: str, kernels: Kernels = Kernels("auto", "auto")) -> Target:
  """A target; says how it will be run."""
  check_kernels(kernels)
  target = dspark_jax.load_target(name, dtype=dtype, kernels=kernels)
  mesh = jax.sharding.get_mesh()
  where = f"one of {len(jax.devices())} devices" if mesh.empty else ", ".join(f"{k} {n}" for k, n in mesh.shape.items())
  say(f"{name} on {jax.devices()[0].device_kind} ({where}): keys as {target.cache_layout}, attention by "
      f"{target.kernels.decode} over caches, by {target.kernels.train} over sequences")
  return target


def write(path: Path, content: str | bytes) -> None:
  """Writes a file that appears whole or not at all; its folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside it, since a rename between file systems is a copy; with a random name, since two may write at once.
  scratch = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
  try:
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
    scratch.replace(path)
  finally:
    scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes a value as JSON, whole or not at all. ValueError for NaN, which JSON lacks and other readers refuse."""
  write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def image(figure: Any, kind: str = "png") -> bytes:
  """A Matplotlib figure as a png, pdf or svg file: the same bytes for the same figure, so without a date."""
  undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
  figure.savefig(buffer := io.BytesIO(), format=kind, dpi=120, metadata=undated)  # 120: what fits a page on a screen
  return buffer.getvalue()


def bar() -> Progress:
  """Progress on stderr, with time left and one free text field `note`: a bar, or lines where no terminal shows one."""
  # The time left is of an hour's steps: one may take minutes, and of the last seconds alone there would be none.
  return (Progress if stderr.is_interactive else BarLines)(
      TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
      TextColumn("{task.fields[note]}"), console=stderr, speed_estimate_period=3600)


def memory_report(compiled: jax.stages.Compiled) -> str:
  """What the compiler says a program needs, in GB."""
  stats = compiled.memory_analysis()
  gb = lambda n: f"{n / 1e9:.2f} GB"
  return f"arguments {gb(stats.argument_size_in_bytes)}, temporaries {gb(stats.temp_size_in_bytes)}"
