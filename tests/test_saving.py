"""A save that fails, or is killed, leaves what was there; nothing is half-written."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import dspark_jax
from dspark_jax.checkpoints import atomic, dialects, state
from dspark_jax.loading import save_temperatures
from folders import (DSPARK, QWEN3, assert_same_weights, complains, copied, cut, files, fresh_drafter, qwen3, spoiled,
                     words)

ROOT = Path(dspark_jax.__file__).parents[1]
OURS = state.ours(state.DRAFTER)


def leftovers(folder: Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@contextlib.contextmanager
def small_disk(size: int):
  """No file of this process may grow over `size` bytes: what a full disk does, seen from a program."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("what", ["ours", "deepspec"])
def test_full_disk(what, tmp_path):
  """Kills: writing over the only good copy; half a folder that looks whole; scratch that eats the rest of the disk."""
  drafters = [fresh_drafter(seed=seed) for seed in range(3)]
  for seed, drafter in enumerate(drafters):
    dspark_jax.save_drafter(tmp_path / f"source{seed}", drafter, qwen3())
  def write(seed):
    if what == "ours":
      dspark_jax.save_drafter(tmp_path / "d", drafters[seed], qwen3())
    else:
      dspark_jax.export_drafter(tmp_path / f"source{seed}", tmp_path / "d", qwen3())
  write(0)
  before = files(tmp_path / "d")
  with small_disk(10_000), complains("d cannot be written", "free some space", error=OSError):
    write(1)
  assert files(tmp_path / "d") == before and leftovers(tmp_path) == []
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "d", qwen3()), drafters[0])
  write(2)
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "d", qwen3()), drafters[2])
  assert leftovers(tmp_path) == []


def test_full_disk_at_the_last_file(tmp_path, monkeypatch):
  """Kills: a folder taken into place before its last file is written."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(seed=0), qwen3())
  before = files(tmp_path / "d")
  def full(path, text, **_):
    path.write_bytes(text.encode()[:10])
    raise OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(Path, "write_text", full)
  with pytest.raises(OSError, match="No space left"):
    dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(seed=1), qwen3())
  assert files(tmp_path / "d") == before and leftovers(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import dspark_jax
from folders import fresh_drafter, qwen3
def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)
Path.write_text = die  # drafter.json comes last
dspark_jax.save_drafter({folder!r}, fresh_drafter(seed=1), qwen3())
"""
KILLED_BETWEEN = """
import importlib.util, os, signal
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", {atomic!r})
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
rename = Path.rename
def once(path, to):
  rename(path, to)
  os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once  # the old folder is aside, the new one not in place
with atomic.new_folder(Path({folder!r}), lambda folder: {{"drafter.json", "weights"}}) as new:
  (new / "drafter.json").write_text("new")
"""


@pytest.mark.parametrize("where", ["writing", "between the renames"])
def test_kill(where, tmp_path):
  """Kills: no drafter at all after a kill; scratch folders that pile up; a next save that trips over them."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(seed=0), qwen3())
  code = (KILLED if where == "writing" else KILLED_BETWEEN).format(
      root=str(ROOT), tests=str(ROOT / "tests"), atomic=atomic.__file__, folder=str(tmp_path / "d"))
  out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
  assert out.returncode == -signal.SIGKILL, out.stderr.decode()
  assert leftovers(tmp_path) != []
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "d", qwen3()), fresh_drafter(seed=0))
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(seed=2), qwen3())
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "d", qwen3()), fresh_drafter(seed=2))
  assert leftovers(tmp_path) == []


def test_kill_then_save_without_loading(tmp_path):
  """Kills: sweeping away the only copy, which a kill had left aside."""
  (tmp_path / ".d.old").mkdir()
  (tmp_path / ".d.old" / "drafter.json").write_text("old")
  with pytest.raises(KeyError), atomic.new_folder(tmp_path / "d", OURS):
    raise KeyError
  assert files(tmp_path) == {"d/drafter.json": b"old"}


def test_a_rename_that_fails(tmp_path, monkeypatch):
  """Kills: the old folder moved aside and swept away, where the new one could not take its place."""
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "drafter.json").write_text("old")
  rename = Path.rename

  def refused(path, to):
    if ".new-" in path.name:
      raise OSError(errno.EACCES, "Permission denied")
    return rename(path, to)

  monkeypatch.setattr(Path, "rename", refused)
  with pytest.raises(OSError, match="denied"), atomic.new_folder(tmp_path / "d", OURS) as new:
    (new / "drafter.json").write_text("new")
  assert files(tmp_path) == {"d/drafter.json": b"old"}


def test_nothing_of_the_users_is_replaced(tmp_path):
  """Kills: `--destination ~`: a folder with other things in it moved aside and deleted; a target, another program's
  weights or a tokenizer that are called as ours are."""
  for name in ("mine", "file"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years of work")
  (tmp_path / "file").write_text("x")
  with complains("mine holds thesis.tex, which would be lost", "choose another place"):
    dspark_jax.save_drafter(tmp_path / "mine", fresh_drafter(), qwen3())
  for names, others in (({"weights/pytorch_model.bin"}, "weights"), ({"config.json", "model.safetensors"}, "config")):
    for name in names:  # as of another program's checkpoint, or a target's
      (tmp_path / others / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / others / name).write_text("{}")
    before = files(tmp_path / others)
    with complains(f"{others} holds ", "which would be lost", "choose another place"):
      if others == "weights":
        dspark_jax.save_drafter(tmp_path / others, fresh_drafter(), qwen3())
      else:
        dspark_jax.export_drafter(DSPARK, tmp_path / others, qwen3())
    assert files(tmp_path / others) == before
  with complains("tokenizer.json, which would be lost"):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    dspark_jax.import_target(QWEN3, tmp_path / "words")
  for _ in range(2):
    dspark_jax.export_drafter(DSPARK, tmp_path / "exported", qwen3())
  with complains("file is a file, expected a folder or nothing"):
    dspark_jax.save_drafter(tmp_path / "file", fresh_drafter(), qwen3())
  source = copied(DSPARK, tmp_path / "source")
  before = files(source)
  with complains("source holds config.json, model.safetensors, which would be lost"):
    dspark_jax.import_drafter(source, source, qwen3())
  assert files(source) == before and leftovers(tmp_path) == []
  (tmp_path / "link").symlink_to(tmp_path / "real")
  (tmp_path / "real").mkdir()
  for _ in range(2):  # an empty folder, then ours; through a link
    dspark_jax.save_drafter(tmp_path / "link", fresh_drafter(), qwen3())
  assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "drafter.json").exists()


@pytest.mark.parametrize("what", ["a target", "a damaged drafter", "weights", "a tokenizer", "another kind"])
def test_names_do_not_make_a_folder_ours(what, tmp_path):
  """Kills: a target, whose files are called as a drafter's, replaced by an export; somebody's `weights`, or a folder
  with a tokenizer alone, by a conversion; our drafter by our target."""
  folder = tmp_path / "d"
  ours = dict.fromkeys(("a target", "a damaged drafter"), dialects.ours).get(what, state.ours(
    state.TARGET if what in ("a tokenizer", "another kind") else state.DRAFTER))
  if what == "another kind":
    dspark_jax.save_drafter(folder, fresh_drafter(), qwen3())
  elif what in ("weights", "a tokenizer"):
    file = folder / ("weights/pytorch_model.bin" if what == "weights" else "tokenizer.json")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
  else:
    copied(QWEN3, folder, config=(lambda config: {"architectures": {}}) if "damaged" in what else None)
  before = files(folder)
  with complains("which would be lost", "choose another place"), atomic.new_folder(folder, ours):
    pytest.fail("begun")
  assert files(folder) == before and leftovers(tmp_path) == []


def test_a_reader_between_the_renames(tmp_path, monkeypatch):
  """Kills: a new folder that is lost since somebody read the old one while it took its place; a reader that fails as
  the new one was faster."""
  folder, rename, readers = tmp_path / "d", Path.rename, iter(range(2))
  folder.mkdir()
  (folder / "drafter.json").write_text("old")

  def renamed(path, to):
    rename(path, to)
    if to.name == ".d.old" and next(readers, None) is not None:
      atomic.put_back(folder)  # as another process that is told to load the drafter

  monkeypatch.setattr(Path, "rename", renamed)
  with atomic.new_folder(folder, OURS) as new:
    (new / "drafter.json").write_text("new")
  assert next(readers, None) is None and files(tmp_path) == {"d/drafter.json": b"new"}
  shutil.copytree(folder, tmp_path / ".d.old")

  def late(path, to):
    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "new").rename(folder)  # of the writer, after the reader looked
    rename(path, to)

  folder.rename(tmp_path / "new")
  monkeypatch.setattr(Path, "rename", late)
  atomic.put_back(folder)
  assert files(folder) == {"drafter.json": b"new"}


def test_conversion_at_fault_leaves_the_destination(tmp_path):
  """Kills: emptying the destination before the source was read."""
  dspark_jax.import_drafter(DSPARK, tmp_path / "d", qwen3())
  before = files(tmp_path / "d")
  source = copied(DSPARK, tmp_path / "source", tensors=spoiled(""))
  with pytest.raises(ValueError):
    dspark_jax.import_drafter(source, tmp_path / "d", qwen3())
  assert files(tmp_path / "d") == before


# Training states


def test_training_state_comes_back(tmp_path):
  """Kills: a state that can be saved but not read, comes back in another order, or from a damaged step in silence; a
  newest one that is deleted where none before it can be restored."""
  drafter = fresh_drafter(num_layers=2, words=words())
  tree = {"drafter": drafter, "moments": ({"layers.0.a": jnp.ones(3)}, jnp.int32(7)), "none": None}
  saved = state.checkpointer(tmp_path / "steps", every=2)
  assert state.restore(saved, tree) is None
  for step in range(1, 8):
    saved.save_checkpointables(step, {"state": tree | {"moments": ({"layers.0.a": jnp.full(3, step / 8)},
                                                                   jnp.int32(step))}}, force=step == 7)
  saved.close()
  assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["6", "7"]
  saved = state.checkpointer(tmp_path / "steps", every=2)
  back = state.restore(saved, tree)
  assert_same_weights(back["drafter"], drafter)
  np.testing.assert_array_equal(back["drafter"].words, words())
  assert int(back["moments"][1]) == 7 and back["none"] is None
  np.testing.assert_array_equal(back["moments"][0]["layers.0.a"], np.full(3, 7 / 8, np.float32))
  biggest = max((p for p in (tmp_path / "steps" / "7").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  cut(biggest)
  with complains("the state of step 7 cannot be restored", "--use-older"):
    state.restore(saved, tree)
  saved.close()
  for path in (tmp_path / "steps" / "6").rglob("*"):
    if path.is_file() and path.stat().st_size > 100:
      cut(path)
  saved = state.checkpointer(tmp_path / "steps", every=2)
  with complains("the state of step 6 cannot be restored"):
    state.restore(saved, tree, use_older=True)
  # Of neither: what keeps both from coming back may be no damage, but memory or a disk that is away.
  assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["6", "7"]
  with complains("save_every is 0, expected at least 1"):
    state.checkpointer(tmp_path / "other", every=0)


GOOD = [None, None]  # two processes that could read


@pytest.mark.parametrize("told, use_older, restored", [
    ([[[2, 4], []], GOOD, GOOD], False, 4), ([[[2], [2, 4]], GOOD, GOOD], False, 2),
    ([[[2, 4], [2, 4]], GOOD, [None, "ValueError: cut"], GOOD, GOOD], True, 2),
    ([[[2, 4], [2, 4]], [None, "ValueError: cut"], GOOD, GOOD], True, 2),
    ([[[2, 4], [2, 4]], GOOD, [None, "ValueError: cut"]], False, None)])
def test_all_hosts_restore_the_same_state(told, use_older, restored, tmp_path):
  """Kills: a process that goes on from the newest state where another one cannot read its part of it, or does not see
  it yet; a state that is deleted since process 0 does not see it."""
  with contextlib.closing(state.checkpointer(tmp_path / "steps", every=2)) as saved:
    for step in (2, 4):
      saved.save_checkpointables(step, {"state": {"moments": jnp.full(3, step)}})
  with contextlib.closing(state.checkpointer(tmp_path / "steps", every=2)) as saved:
    heard, like = iter(told), {"moments": jnp.zeros(3, jnp.int32)}
    restore = lambda: state.restore(saved, like, use_older=use_older, everyone=lambda value: next(heard))
    if restored:
      np.testing.assert_array_equal(restore()["moments"], np.full(3, restored))
    else:
      with complains("the state of step 4 cannot be restored in process 1 (ValueError: cut)", "--use-older"):
        restore()
    assert next(heard, None) is None
  assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == (["2"] if use_older else ["2", "4"])


def test_a_host_that_is_gone_is_no_full_disk(tmp_path, monkeypatch):
  """Kills: an exchange that fails since another process died, taken for a full disk or a damaged state: a mistake,
  which no launcher tries again."""
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Gloo AllGather failed: Connection closed by peer")
  tree, saved = {"moments": jnp.ones(3)}, state.checkpointer(tmp_path / "steps", every=1)
  saved.save_checkpointables(1, {"state": tree})
  monkeypatch.setattr(state, "sums", fail)
  monkeypatch.setattr(state.ocp, "save", fail)
  monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", fail)
  for use in (lambda: saved.save_checkpointables(2, {"state": tree}), lambda: state.restore(saved, tree),
              lambda: state.restore(saved, tree, use_older=True),
              lambda: dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
      use()


def test_a_save_tells_jax_no_step(tmp_path, monkeypatch):
  """Kills: Orbax's own numbers among those of hosts.stops: JAX agrees on a step to stop at that never comes."""
  told = []
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: told.append(step) or False)
  with contextlib.closing(state.checkpointer(tmp_path / "steps", every=2)) as saved:
    for step in (1, 2, 3):
      saved.save_checkpointables(step, {"state": {"moments": jnp.ones(3)}}, force=step == 3)
  assert told == [] and sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["2", "3"]


def flipped(path: Path, byte: int) -> None:
  data = bytearray(path.read_bytes())
  data[byte] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("what", ["drafter", "state"])
def test_a_flipped_bit(what, tmp_path):
  """Kills: other numbers than were saved, in silence: Orbax's checksums do not cover its data."""
  if what == "drafter":
    dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())
    load = lambda: dspark_jax.load_drafter(tmp_path / "d", qwen3())
  else:
    tree = {"drafter": fresh_drafter(), "step": jnp.int32(3)}
    with contextlib.closing(state.checkpointer(tmp_path / "d", every=1)) as saved:
      saved.save_checkpointables(1, {"state": tree})
    load = lambda: state.restore(state.checkpointer(tmp_path / "d", every=1), tree)
  load()
  data = max((p for p in (tmp_path / "d").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  before = data.read_bytes()
  for share in (0.2, 0.4, 0.6, 0.8):
    flipped(data, int(len(before) * share))
    with complains("is not what was saved" if what == "drafter" else "the state of step 1 cannot be restored"):
      load()
    data.write_bytes(before)
  load()


def test_a_flipped_bit_in_a_configuration(tmp_path):
  """Kills: a drafter with another rope than was saved, in silence; one refused because temperatures were fitted after
  it was saved, or because an older version stored no digest."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())
  save_temperatures(tmp_path / "d", fresh_drafter(), {"greedy": [1.0] * 4})
  file, load = tmp_path / "d" / "drafter.json", lambda: dspark_jax.load_drafter(tmp_path / "d", qwen3())
  load()
  before = file.read_text()
  file.write_text(before.replace('"rope_theta": 1', '"rope_theta": 3'))
  with complains("drafter.json: its config is not what was saved: restore the folder"):
    load()
  file.write_text(json.dumps({key: x for key, x in json.loads(before).items() if key != "digest"}))
  load()
