"""Our own checkpoints: Orbax for arrays, a JSON sidecar for what the arrays mean.

A drafter is a folder: `drafter.json` (format, kind, configuration, target id, and the text of the config.json that it
was imported from) and `weights/` (Orbax: parameters by stored name, plus the reduced draft vocabulary). So is a target:
`target.json` (format, family, the Hugging Face style configuration, target id), `weights/`, and beside them the files
that a tokenizer is read from. A training run keeps its `TrainState` per step under `steps/`, with the position in the
data being the step itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from dspark_jax.checkpoints.atomic import new_folder
from dspark_jax.checkpoints.tensors import Stored
from dspark_jax.config import error_shown, raise_all, unwritten
from dspark_jax.nn.sharding import on_host, shardings
from dspark_jax.text import read_json

FORMAT = 1
DRAFTER, TARGET = "drafter.json", "target.json"
# What programs read of a target's folder besides its weights: the tokenizer, its template, the ends of a reply.
CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
           "vocab.txt", "merges.txt", "tokenizer.model")
FILES = {DRAFTER: {DRAFTER, "weights"}, TARGET: {TARGET, "weights", *CARRIED}}  # and nothing else, by the sidecar
CHUNK = 2 ** 20  # bytes


def ours(name: str) -> Callable[[Path], set[str]]:
  """The names of a folder with this sidecar (`atomic.new_folder`). By itself, a tokenizer or `weights` is a user's."""
  return lambda folder: FILES[name] if (folder / name).is_file() else set()


def save_drafter(folder: Path, sidecar: dict, weights: dict[str, jax.Array]) -> None:
  """Writes a drafter folder; it appears whole or not at all. Of several processes all must call it."""
  # As host arrays: a stored device layout would have to exist on the machine that loads them.
  _save(Path(folder), DRAFTER, sidecar | {"digest": _digest(sidecar["config"])}, on_host(weights))


def read_drafter(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
  """(sidecar, weights by stored name, on the host) of a drafter folder. ValueError when it is not whole."""
  folder = Path(folder)
  sidecar = _sidecar(folder / DRAFTER, ("drafter", "config", "target", "imported"))
  if "digest" in sidecar and sidecar["digest"] != _digest(sidecar["config"]):  # older versions stored none
    raise ValueError(f"{folder / DRAFTER}: its config is not what was saved: restore the folder, or save the drafter "
                     f"again")
  try:
    weights = ocp.load((folder / "weights").absolute())
  except Exception as error:  # Orbax has no common error; every cause has the same remedy
    raise ValueError(f"{folder / 'weights'} cannot be read ({type(error).__name__}): it is incomplete; save the "
                     f"drafter again") from error
  changed = _changed(digests(weights), sidecar.get("digests"))
  if changed:
    raise ValueError(f"{folder / 'weights'}: {changed} is not what was saved: the disk or a copy damaged it; restore "
                     f"the folder, or save the drafter again")
  return sidecar, weights


def save_target(folder: Path, config: dict, identity: str, weights: dict[str, np.ndarray],
                carry: Callable[[Path], None]) -> None:
  """Writes a target folder; it appears whole or not at all. carry writes files of CARRIED into it."""
  _save(Path(folder), TARGET, {"family": config["model_type"], "config": config, "target": identity,
                               "digest": _digest(config)}, weights, carry)


def read_target(folder: Path) -> dict:
  """The configuration (Hugging Face style) of a target folder. ValueError when its sidecar is not what was saved."""
  sidecar = _sidecar(Path(folder) / TARGET, ("family", "config", "target", "digest", "digests"))
  config, family = sidecar["config"], sidecar["family"]
  # In numbers of a configuration, too, a flipped bit makes another model.
  if _digest(config) != sidecar["digest"] or not isinstance(config, dict) or config.get("model_type") != family:
    raise ValueError(f"{Path(folder) / TARGET}: its config is not what was saved: restore the folder, or convert the "
                     f"target again")
  return config


class Tensors(Mapping):
  """The weights of a target folder by stored name, read on access: by each process what its own devices hold.

  Where this process has all devices, every tensor's digest is checked as it is read. ValueError for what is damaged.
  """

  def __init__(self, folder: Path):
    self._folder = Path(folder) / "weights"
    self._digests = read_json(Path(folder) / TARGET)["digests"]
    try:
      self._known = ocp.metadata(self._folder.absolute()).metadata
      # Read below Orbax, which reads arrays as they were saved: it could not stack layers without having both.
      self._store = next(self._folder.absolute().glob("*/manifest.ocdbt")).parent
    except Exception as error:  # as above
      raise self._damaged(type(error).__name__) from error
    if not isinstance(self._digests, dict) or set(self._digests) != set(self._known):
      raise self._damaged("its list of digests is of other tensors")

  def __getitem__(self, name: str) -> Stored:
    known, whole = self._known[name], functools.cache(lambda: self._checked(name))
    alone = jax.process_count() == 1
    return Stored(tuple(known.shape), np.dtype(known.dtype),
                  lambda index: whole()[index] if alone else self._read(name, index))

  def __iter__(self):
    return iter(self._known)

  def __len__(self):
    return len(self._known)

  def _checked(self, name):
    array = self._read(name, ())
    if _changed(digests({name: array}), self._digests):
      raise self._damaged(f"{name} is not what was saved")
    return array

  def _read(self, name, index):
    base = {"driver": "file", "path": f"{self._store}/"}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    try:
      return tensorstore.open(spec, open=True, read=True).result()[index].read().result()
    except Exception as error:  # TensorStore's are those of its drivers, with pages of text
      raise self._damaged(f"{name} cannot be read, {type(error).__name__}") from error

  def _damaged(self, what):
    return ValueError(f"{self._folder} is damaged or incomplete ({what}): restore the folder, or convert the target "
                      f"again")


def _save(folder, name, sidecar, weights, carry=lambda folder: None):
  with new_folder(folder, ours(name)) as new:
    context = ocp.Context()
    # A device, or a host, that holds a part of an array reads these chunks of it: by default an array is one.
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    # Nobody changes them meanwhile, and a target's copies would not fit beside it: one array on its way at a time.
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = 1 + max(x.nbytes for x in weights.values())
    try:
      with context:
        ocp.save((new / "weights").absolute(), weights)
    except jax.errors.JaxRuntimeError:
      raise  # of an exchange with a process that is gone: no disk is at fault
    except Exception as error:  # Orbax has no common error; what is left to fail is the disk
      raise unwritten(f"{folder}", folder, error, "free some space or choose another place") from error
    if jax.process_index():
      return
    carry(new)
    (new / name).write_text(json.dumps({"format": FORMAT, **sidecar, "digests": digests(weights)}, indent=2) + "\n")


def _sidecar(file, keys):
  sidecar = read_json(file)
  if sidecar.get("format") != FORMAT:
    raise ValueError(f"{file} has format {sidecar.get('format')!r:.9}, this version reads {FORMAT}: convert it with "
                     f"the version that wrote it")
  raise_all(f"{file}", [f"key {k!r} is missing: restore the file from where it came" for k in keys if k not in sidecar])
  return sidecar


def _digest(config):
  return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def digests(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """CRC-32 by name: Orbax's checksums are of its tables alone, and a flipped bit in its data would go unseen."""
  # Not a cryptographic hash: damage is what they tell of, at a third of the time.
  return {name: zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8)) for name, x in arrays.items()}


@jax.jit
def sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What tells arrays from others with the same names, u32[] by name, on whatever mesh they are, over whatever
  processes: computed where they live, since a training state may be whole nowhere.

  Each element is mixed with its place by a bijection of 32 bits, so that any change of one element is seen.
  """
  return {name: _sum(x) for name, x in arrays.items()}


def _sum(x):
  u32, place, stride = jnp.uint32, jnp.zeros(x.shape, jnp.uint32), 1
  bits = x if x.dtype == jnp.bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
  for axis in reversed(range(x.ndim)):
    place += jax.lax.broadcasted_iota(u32, x.shape, axis) * u32(stride % 2 ** 32)
    stride *= x.shape[axis]
  mixed = bits.astype(u32) ^ place * u32(0x9e3779b1)
  for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b)):  # github.com/skeeto/hash-prospector: lowbias32
    mixed = (mixed ^ mixed >> u32(shift)) * u32(factor)
  return (mixed ^ mixed >> u32(16)).sum(dtype=u32)


def _changed(arrays, stored):
  """The first array whose digest is not the stored one, or None; folders of older versions store none."""
  if stored is None:
    return None
  if not isinstance(stored, dict):
    return "the list of digests"
  return next((name for name, digest in arrays.items() if stored.get(name, "missing") not in (int(digest), None)), None)


class Checkpointer(ocp.training.Checkpointer):
  """Orbax's, with every tree stored flat, by path (it cannot read back the mixed keys of a list of modules), with sums
  of what was saved. An error of a save that went on in the background comes with the next save, or with `close`."""

  def __init__(self, *places, **options):
    super().__init__(*places, **options)
    # Its manager would tell JAX a number for each step that it saves, and JAX expects those of hosts.stops alone.
    self._manager.reached_preemption = lambda step: False

  def save_checkpointables_async(self, step, checkpointables, **options):
    """Begins to save the trees, by name: arrays may be donated after it. None where Orbax's policies (or `force`) have
    nothing saved at this step."""
    if not (options.get("force") or self.should_save(step)):
      return None
    flat = {k: _flat(tree) for k, tree in checkpointables.items()}
    with self._saving(f"at step {step}"):
      told = {f"sums of {k}": jax.tree.map(int, jax.device_get(sums(tree))) for k, tree in flat.items()}
      return super().save_checkpointables_async(step, flat, **options | {"custom_metadata": told})

  def close(self):
    """Waits until all is written."""
    with self._saving("at the end"):
      super().close()

  @contextlib.contextmanager
  def _saving(self, when):
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise  # as above
    except Exception as error:  # Orbax has no common error; what is left to fail is the disk
      raise unwritten(f"{self.directory} {when}", self.directory, error,
                      "free some space, and go on with the same command") from error


def checkpointer(folder: Path, every: int, keep: int = 2) -> Checkpointer:
  """Saves a training state every `every` steps and when asked (`force`), keeping the newest `keep`."""
  if every < 1:
    raise ValueError(f"save_every is {every}, expected at least 1")
  Path(folder).mkdir(parents=True, exist_ok=True)
  # Two are kept, as the newest may turn out damaged. Without policies Orbax saves at every call and keeps everything.
  return Checkpointer(
      Path(folder).absolute(), cleanup_tmp_directories=True,  # of saves that a kill cut
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))


def restore(checkpoints: Checkpointer, state, *, use_older: bool = False,
            everyone: Callable[[Any], list] = lambda value: [value]):
  """The newest saved state in the shape of `state` (arrays or ShapeDtypeStructs), or None when nothing is saved.

  It comes back where `state` lives, whatever mesh, and however many processes, it was saved on; where that has no
  place, on the current mesh. ValueError when it is damaged. use_older: then the one before, after which the
  damaged one is deleted. everyone: gives a value (of JSON) of each process, of several that restore one state; then
  the first says which states there are, and what one of them cannot read is damaged for all.
  """
  steps, damaged = everyone([saved.step for saved in checkpoints.checkpoints])[0], []
  if not set(steps) <= {saved.step for saved in checkpoints.checkpoints}:
    checkpoints.reload()  # a shared disk shows others late what the first has written
  for step in reversed(steps):
    try:
      found = _restored(checkpoints, step, state, everyone)
    except ValueError:
      if not use_older or step == steps[0]:
        raise
      damaged.append(step)
    else:
      # Not before: where memory or a disk is at fault, the one before cannot be restored either.
      for step in damaged:
        checkpoints.delete(step)
      return found
  return None


def _restored(checkpoints, step, state, everyone):
  def load():
    # Each alone: who cannot read its part would leave the others in a barrier.
    alone, own = ocp.Context(), jax.process_index()
    alone.multiprocessing.primary_host, alone.multiprocessing.active_processes = own, {own}
    with alone:
      like = {"state": _flat(_with_places(state))}
      return ocp.load_checkpointables(checkpoints.directory / str(step), like)["state"]

  remedy = "give --use-older to go on from the one before"
  # First: a load that ends before it began has no number among Orbax's operations, whose barriers have those.
  about = _by_all(lambda: checkpoints.metadata(step).custom_metadata or {}, step, everyone, remedy)
  leaves = _by_all(load, step, everyone, remedy)
  if changed := _changed(jax.device_get(sums(leaves)), about.get("sums of state")):
    raise ValueError(f"the state of step {step} cannot be restored, {changed} is not what was saved: {remedy}")
  return jax.tree.unflatten(jax.tree.structure(state), [leaves[path] for path in _flat(state)])


def _by_all(read, step, everyone, remedy):
  """read() of a part of a state; ValueError in all processes where one cannot read its own."""
  found = wrong = cause = None
  try:
    found = read()
  except Exception as error:  # Orbax has no common error, and its texts print the whole state
    wrong, cause = f"{type(error).__name__}: {error_shown(error)}", error
  for process, text in enumerate(said := everyone(wrong)):
    if text is not None:
      where = f" in process {process}" if len(said) > 1 else ""
      raise ValueError(f"the state of step {step} cannot be restored{where} ({text}): where neither memory nor the "
                       f"disk is at fault, it is damaged or of another version; {remedy}") from cause
  return found


def _with_places(tree):
  """Shapes, each with its sharding: without one Orbax asks for the devices of the process that saved."""
  here = shardings(tree) or jax.tree.map(lambda _: jax.device_put(0).sharding, tree)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)
                                                            or place), tree, here)


def _flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
