"""Our own checkpoints: Orbax for arrays, a JSON sidecar for what the arrays mean.

A drafter is a folder: `drafter.json` (format, kind, configuration, target id, and the text of the config.json that it
was imported from) and `weights/` (Orbax: parameters by stored name, plus the reduced draft vocabulary). A training run
keeps its `TrainState` per step under `steps/`, with the position in the data being the step itself.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dspark_jax.checkpoints.atomic import new_folder
from dspark_jax.config import raise_all
from dspark_jax.text import read_json

FORMAT = 1


def save_drafter(folder: Path, sidecar: dict, weights: dict[str, jax.Array]) -> None:
  """Writes a drafter folder; it appears whole or not at all."""
  with new_folder(folder, {"drafter.json", "weights"}) as new:
    # As host arrays: a stored device layout would have to exist on the machine that loads them.
    weights = jax.device_get(weights)
    try:
      ocp.save((new / "weights").absolute(), weights)
    except Exception as error:  # Orbax has no common error; what is left to fail is the disk
      raise OSError(f"{folder} cannot be written ({error}): free some space or choose another place") from error
    (new / "drafter.json").write_text(json.dumps(
        {"format": FORMAT, **sidecar, "digests": digests(weights)}, indent=2) + "\n")


def read_drafter(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
  """(sidecar, weights by stored name, on the host) of a drafter folder. ValueError when it is not whole."""
  folder = Path(folder)
  sidecar = read_json(folder / "drafter.json")
  if sidecar.get("format") != FORMAT:
    raise ValueError(f"{folder / 'drafter.json'} has format {sidecar.get('format')!r:.9}, this version reads {FORMAT}: "
                     f"convert it with the version that wrote it")
  raise_all(f"{folder / 'drafter.json'}", [f"key {k!r} is missing: restore the file from where it came" for k in (
      "drafter", "config", "target", "imported") if k not in sidecar])
  try:
    weights = ocp.load((folder / "weights").absolute())
  except Exception as error:  # Orbax has no common error; every cause has the same remedy
    raise ValueError(f"{folder / 'weights'} cannot be read ({type(error).__name__}): it is incomplete; save the "
                     f"drafter again") from error
  changed = _changed(weights, sidecar.get("digests"))
  if changed:
    raise ValueError(f"{folder / 'weights'}: {changed} is not what was saved: the disk or a copy damaged it; restore "
                     f"the folder, or save the drafter again")
  return sidecar, weights


def digests(arrays: dict[str, jax.Array]) -> dict[str, int]:
  """CRC-32 by name: Orbax's checksums are of its tables alone, and a flipped bit in its data would go unseen."""
  # Not a cryptographic hash: damage is what they tell of, at a third of the time.
  return {name: zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8)) for name, x in arrays.items()}


def _changed(arrays, stored):
  """The first array whose digest is not the stored one, or None; folders of older versions store none."""
  if stored is None:
    return None
  if not isinstance(stored, dict):
    return "the list of digests"
  return next((name for name, digest in digests(arrays).items() if stored.get(name) != digest), None)


class Checkpointer(ocp.training.Checkpointer):
  """Orbax's, with every tree stored flat, by path: it cannot read back the mixed keys of a list of modules."""

  def save_checkpointables(self, step, checkpointables, **options):
    """Whether the trees, by name, were saved at this step: Orbax's policies decide, or `force`."""
    if not (options.get("force") or self.should_save(step)):
      return False
    flat = {k: _flat(tree) for k, tree in checkpointables.items()}
    told = {k: digests(tree) for k, tree in flat.items()}
    try:
      return super().save_checkpointables(step, flat, custom_metadata=told, **options)
    except Exception as error:  # Orbax has no common error; what is left to fail is the disk
      raise OSError(f"{self.directory} cannot be written ({type(error).__name__}) at step {step}: free some space, and "
                    f"go on with the same command") from error


def checkpointer(folder: Path, every: int, keep: int = 2) -> Checkpointer:
  """Saves a training state every `every` steps and when asked (`force`), keeping the newest `keep`."""
  if every < 1:
    raise ValueError(f"save_every is {every}, expected at least 1")
  Path(folder).mkdir(parents=True, exist_ok=True)
  # Two are kept, as the newest may turn out damaged. Without policies Orbax saves at every call and keeps everything.
  return Checkpointer(
      Path(folder).absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep))


def restore(checkpoints: Checkpointer, state):
  """The newest saved state in the shape of `state` (arrays or ShapeDtypeStructs), or None when nothing is saved."""
  if checkpoints.latest is None:
    return None
  step, remedy = checkpoints.latest.step, "delete that step's folder to go on from the one before"
  try:
    leaves = checkpoints.load_checkpointables(step, {"state": _flat(state)})["state"]
    stored = (checkpoints.metadata(step).custom_metadata or {}).get("state")
  except Exception as error:  # Orbax has no common error, and its texts print the whole state
    raise ValueError(f"the state of step {step} cannot be restored ({type(error).__name__}): it is damaged or of "
                     f"another version; {remedy}") from error
  if changed := _changed(leaves, stored):
    raise ValueError(f"the state of step {step} cannot be restored, {changed} is not what was saved: {remedy}")
  return jax.tree.unflatten(jax.tree.structure(state), [leaves[path] for path in _flat(state)])


def _flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
