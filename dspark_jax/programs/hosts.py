"""Several processes that run one program together, one per host: joined once, one of them decides, no one hangs.

The same command is given on every host. Process 0 reads the clock, the calendar and the run folder, and writes files;
`agree` tells the others what it found. What they exchange beside arrays goes through the key-value store that JAX keeps
in process 0. JAX has no public name for its client (`_client`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# What launchers tell every process of a job that has several; jax.distributed reads the rest of it.
TOLD = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES",
        "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
AGAIN = os.EX_TEMPFAIL  # the exit code of a process that another one has left, or not joined: the same command goes on
SLOW = 0.5  # of its time: who is busy with work of its own for so much more than the others keeps them waiting
WEEK = 7 * 24 * 3600 * 1000  # milliseconds: who waits is ended by `_watch`, not by a time-out
# Run beside each process: JAX aborts a process in the moment in which the coordinator is gone, before Python can say
# what happened. Reads ADDRESS|SENTENCE lines; the last one is said when its writer ends and nobody listens there.
WITNESS = """
import socket, sys
told = ""
for line in sys.stdin:
  told = line.strip()
address, _, sentence = told.partition("|")
if address:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), 3).close()
  except OSError:
    address = ""
if sentence and not address:
  print("error: " + sentence, file=sys.stderr, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """Which processes run together. Slurm, Open MPI, xpk and GKE say it themselves, but Open MPI 5 not the `coordinator`.
  So do TPU VMs outside GKE, but only when asked: `processes` alone is given there."""
  coordinator: str | None = None
  """HOST:PORT at which process 0 listens; the same on every host"""
  processes: int | None = None
  """how many there are"""
  process: int | None = None
  """which one this is, from 0; the only flag that differs between hosts"""
  timeout: int = 300
  """seconds to wait until all have come"""
  silence: int = 40
  """seconds without a sign of life after which a process counts as dead, and the others end"""

  def __post_init__(self):
    for name, least in (("processes", 1), ("process", 0), ("timeout", 1), ("silence", 4)):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f"hosts.{name} is {value}, expected at least {least}")
    if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
      raise ValueError(f"hosts.coordinator is {self.coordinator}, expected HOST:PORT")
    if None not in (self.process, self.processes) and self.process >= self.processes:
      raise ValueError(f"hosts.process is {self.process}, expected 0 to {self.processes - 1}")


class _Joined:
  """What this process knows of the others: `here.process` of `here.processes`; alone, 0 of 1."""

  def __init__(self):
    self.process, self.processes, self.step, self.agreed, self.silence = 0, 1, 0, 0, 40
    self.sign, self.lock, self.over = 0, threading.Lock(), threading.Event()
    self.waited, self.waits_since = 0.0, None  # seconds for devices, and so for other hosts; since when it waits now
    self.expect = lambda line: None  # what is to be said should this process be aborted


here = _Joined()


class Apart(Exception):
  """Not all processes have come together. Nobody's mistake, as far as one knows: the same command may do it later."""


@contextlib.contextmanager
def join(config: HostsConfig) -> Iterator[None]:
  """Makes this process one of several for as long as the block lasts; does nothing for one that is alone.

  Apart when not all come in time, ValueError where the flags do not say who takes part.
  """
  config, devices = _by_open_mpi(config)
  asked = {"coordinator_address": config.coordinator, "num_processes": config.processes, "process_id": config.process}
  if not any(value is not None for value in asked.values()) and _told() < 2:
    yield
    return
  _reach(config)
  here.expect = _witness()
  here.expect(f"|not all processes came within {config.timeout} seconds: start every one with the same command, and "
              f"give a longer --hosts.timeout where hosts start slowly")
  try:
    # JAX's own signs of life come second: it ends a process with pages of text.
    jax.distributed.initialize(**asked, local_device_ids=devices, initialization_timeout=config.timeout,
                               heartbeat_timeout_seconds=max(100, 2 * config.silence))
  except (RuntimeError, ValueError) as error:
    here.expect("")
    said = str(error).partition("\n")[0]
    if isinstance(error, RuntimeError):
      raise Apart(f"the processes did not come together ({said}): start every one with the same command, and give a "
                  f"longer --hosts.timeout where hosts start slowly") from error
    raise ValueError(f"the processes cannot be joined ({said}): give --hosts.coordinator, --hosts.processes and "
                     f"--hosts.process") from error
  here.process, here.processes, here.silence = jax.process_index(), jax.process_count(), config.silence
  _tell("here")
  if first():
    here.expect("")  # who ends process 0 ends what it would speak of
  else:
    leader = json.loads(_client().blocking_key_value_get("dspark/alive/0", config.timeout * 1000))["host"]
    here.expect(f"{_state().coordinator_address}|process 0 on {leader} is gone: the same command on every host goes on "
                f"from the newest checkpoint")
  watch = threading.Thread(target=_watch, daemon=True)
  watch.start()
  yield
  here.over.set()
  watch.join()
  _tell("done")
  jax.distributed.shutdown()  # waits for the others
  here.expect("")


def _told() -> int:
  """How many processes the launcher speaks of; 2 where it only says that there are several."""
  for name in TOLD:
    value = os.environ.get(name, "")
    if value.isdigit():
      if int(value) > 1 and (name != "SLURM_NTASKS" or "SLURM_STEP_NODELIST" in os.environ):
        return int(value)
    elif "ADDRESSES" in name or "HOSTNAMES" in name:
      if "," in value:
        return value.count(",") + 1
    elif value:
      return 2
  return 1


def _by_open_mpi(config):
  """(config, the device that is this process's): filled in where Open MPI 5 says it, which JAX does not read. None: all
  that it sees, or what JAX_LOCAL_DEVICE_IDS says."""
  size = os.environ.get("OMPI_COMM_WORLD_SIZE", "")
  if not size.isdigit() or int(size) < 2 or "OMPI_MCA_orte_hnp_uri" in os.environ:  # which older versions set
    return config, None
  if config.coordinator is None:
    raise ValueError("Open MPI 5 does not say where process 0 listens: give --hosts.coordinator HOST:PORT, with the "
                     "host of rank 0, to all processes")
  if config.process is not None or "JAX_LOCAL_DEVICE_IDS" in os.environ:  # placed by hand
    devices = None
  else:
    devices = [int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])]
  own = int(os.environ["OMPI_COMM_WORLD_RANK"]) if config.process is None else config.process
  return dataclasses.replace(config, processes=config.processes or int(size), process=own), devices


def refuse(program: str) -> None:
  """ValueError where a launcher starts a program several times that is made for one process."""
  if _told() > 1:
    raise ValueError(f"{program} runs in one process, and this is one of {_told()} or more (by the launcher's "
                     f"environment): start it once, on one host")


def _witness():
  """A function that sets what is said, by a process beside this one, should this one be aborted."""
  beside = subprocess.Popen([sys.executable, "-S", "-c", WITNESS], stdin=subprocess.PIPE, text=True,
                            start_new_session=True, stdout=subprocess.DEVNULL)

  def expect(line):
    with contextlib.suppress(BrokenPipeError):
      beside.stdin.write(line + "\n")
      beside.stdin.flush()
  return expect


def _reach(config):
  """Waits until process 0 listens. Apart after the time-out: JAX would abort."""
  if not config.process or config.coordinator is None:
    return
  host, _, port = config.coordinator.rpartition(":")
  until = time.monotonic() + config.timeout
  while True:
    try:
      return socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError as error:
      if time.monotonic() > until:
        raise Apart(f"process {config.process} found nobody at {config.coordinator} for {config.timeout} seconds "
                    f"({error}): start process 0, and check --hosts.coordinator and firewalls") from error
      time.sleep(0.2)


def first() -> bool:
  """Whether this is the process that decides and writes."""
  return here.process == 0


def agree(make: Callable[[], Any]) -> Any:
  """What make() gives in process 0 (as JSON has it), in all of them; the others do not call it.

  To be called by all, in the same order. Who waits longer than it takes process 0 to die is ended with a sentence.
  """
  if here.processes == 1:
    return make()
  here.agreed += 1
  key = f"dspark/agreed/{here.agreed}"
  if first():
    value = make()
    _client().key_value_set(key, json.dumps(value))
    return value
  return json.loads(_client().blocking_key_value_get(key, WEEK))


def everyone(value: Any) -> list:
  """The values (of JSON) of all processes, by their numbers. As `agree`, to be called by all in the same order."""
  if here.processes == 1:
    return [value]
  here.agreed += 1
  keys = [f"dspark/agreed/{here.agreed}/{process}" for process in range(here.processes)]
  _client().key_value_set(keys[here.process], json.dumps(value))
  return [json.loads(_client().blocking_key_value_get(key, WEEK)) for key in keys]


def check_same(what: str, value: Any) -> None:
  """ValueError where this process has another value (of JSON) than process 0."""
  theirs = agree(lambda: value)
  if theirs != value:
    keys = [key for key in value if value[key] != theirs.get(key)] if isinstance(value, dict) else []
    raise ValueError(f"process {here.process} on {socket.gethostname()} has another {what} than process 0 "
                     f"({', '.join(keys) or value}): give the same command and the same files on every host")


@contextlib.contextmanager
def stops(first: int) -> Iterator[Callable[[int], bool]]:
  """Gives stop(step): whether to save and end after this step, since SIGTERM came; the same in all processes.

  To be called after every step. It costs no exchange before a signal comes: JAX then agrees on a step that none has
  reached yet. first: how many steps earlier starts have made.
  """
  if here.processes > 1:  # JAX has its own handler, which tells the others
    # Where none was told yet, as in a start that loads and compiles, it agrees on step 1.
    yield lambda step: multihost_utils.reached_preemption_sync_point(step - first)
    return
  noted = []  # a handler may run in the middle of a step: it leaves a note
  previous = signal.signal(signal.SIGTERM, lambda *_: noted.append(True))
  try:
    yield lambda step: bool(noted)
  finally:
    signal.signal(signal.SIGTERM, previous)  # train.demo and train.compare go on after this


def beat(step: int) -> None:
  """Notes how far this process is, for the others to see."""
  here.step = step


@contextlib.contextmanager
def waiting() -> Iterator[None]:
  """For calls that wait for the devices, and so for every host: what is not spent in them is this host's own work."""
  here.waits_since = time.monotonic()
  try:
    yield
  finally:
    with here.lock:
      here.waited, here.waits_since = here.waited + time.monotonic() - here.waits_since, None


def leave(sentence: str, code: int) -> None:
  """Ends this process after a failure, and the others with its sentence and code; returns where there are no others."""
  if here.processes == 1:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _tell("failed", sentence, code)
  _end(code)


def blame() -> None:
  """Waits for the process whose end made an exchange fail to be found out, which ends this one; then returns."""
  if here.processes > 1:
    time.sleep(here.silence + 2 * _period())


def _watch():
  """Tells that this process lives, sees that the others do, and ends this one when one of them does not."""
  seen, pasts, slow = {}, {}, set()  # by process: (its sign, since when by our own clock); its clock and its waits
  while not here.over.wait(_period()):
    try:
      _tell("here")
      signs = {int(key.rpartition("/")[2]): json.loads(text)
               for key, text in _client().key_value_dir_get("dspark/alive")}
    except jax.errors.JaxRuntimeError:
      continue  # process 0 is gone: JAX ends this one, and the witness says why
    now = time.monotonic()
    for process, sign in signs.items():
      who, old = f"process {process} on {sign['host']}", seen.get(process)
      since = now if old is None or old[0] != sign["sign"] else old[1]
      seen[process] = (sign["sign"], since)
      if process == here.process or sign["state"] == "done":
        continue
      if sign["state"] == "failed":
        _say(f"error: {who} ended: {sign['sentence']}")
        _end(sign["code"])
      if now - since > here.silence:
        _say(f"error: {who} has given no sign of life for {now - since:.0f} seconds, since step {sign['step']}: look "
             f"there; the same command on every host goes on from the newest checkpoint")
        _end(AGAIN)
    if first():
      slow = _name_slow(signs, pasts, slow)


def _name_slow(signs, pasts, known):
  """Says which processes have kept the others waiting since `silence` seconds ago, but for the known; gives them all.

  By what each does itself: their steps are the same, since every step has them all.
  """
  for process, sign in signs.items():
    past = pasts.setdefault(process, [])
    past.append((sign["clock"], sign["waited"]))
    while sign["clock"] - past[min(1, len(past) - 1)][0] >= here.silence:
      del past[0]
  busy = {process: 1 - (past[-1][1] - past[0][1]) / (past[-1][0] - past[0][0]) for process, past in pasts.items()
          if past[-1][0] - past[0][0] >= here.silence and signs[process]["state"] == "here"}
  slow = set()
  for process, share in busy.items():
    others = statistics.median([busy[other] for other in busy if other != process] or [1.0])
    if share - others > SLOW:
      slow.add(process)
      if process not in known:
        _say(f"process {process} on {signs[process]['host']} is slow, and the others wait for it: of {here.silence} "
             f"seconds it was busy with work of its own (data, files) for {share:.0%}, they for {others:.0%}; it is at "
             f"step {signs[process]['step']}")
  return slow


def _tell(state, sentence="", code=0):
  with here.lock:
    here.sign += 1
    now = time.monotonic()
    _client().key_value_set(f"dspark/alive/{here.process}", json.dumps(dict(
        host=socket.gethostname(), state=state, sentence=sentence, code=code, step=here.step, sign=here.sign,
        clock=now, waited=here.waited + (now - here.waits_since if here.waits_since else 0))), allow_overwrite=True)


def _period():
  return max(here.silence / 8, 0.5)


def _say(text):
  print(text, file=sys.stderr, flush=True)


def _end(code):
  here.expect("")
  if first():
    time.sleep(2 * _period() + 1)  # the others must see why, too, before the store goes
  sys.stdout.flush(), sys.stderr.flush()
  # Not sys.exit: threads that wait for the dead, and JAX's own end, which waits for all, would hang.
  os._exit(code)


def _state():
  from jax._src import distributed
  return distributed.global_state


def _client():
  return _state().client
