"""Safetensors folders <-> modules. Modules carry the stored names, so a family needs no table of tensors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from dspark_jax.checkpoints.atomic import new_folder
from dspark_jax.checkpoints.tensors import Stored, placed
from dspark_jax.config import name_shown, raise_all, read_known, shown
from dspark_jax.nn.parameters import parameters
from dspark_jax.nn.sharding import shardings
from dspark_jax.text import read_json


# Files that only stand in folders of another kind, architectures that write no text, and tensors of quantised weights.
SIGNS = {"modules.json": "an embedding model (of sentence-transformers): it writes no text",
         "config_sentence_transformers.json": "an embedding model (of sentence-transformers): it writes no text",
         **dict.fromkeys(("hf_quant_config.json", "quantize_config.json", "quant_config.json"), "a quantised model")}
ADAPTER = "adapter_config.json"
ENDS = {"ForSequenceClassification": "a reward model or classifier", "RewardModel": "a reward model",
        "ForTokenClassification": "a reward model or classifier", "ForQuestionAnswering": "a classifier",
        "Model": "an embedding model, without a head over words"}
SCALES = re.compile(r"(_scale|_scale_inv|scales|qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|quant_map)$")
FLOATS = {"float16", "bfloat16", "float32", "float64"}
# Of safetensors' types, those that numpy (with JAX's bfloat16) knows.
DTYPES = {"F16": "float16", "BF16": jnp.bfloat16, "F32": "float32", "F64": "float64", "BOOL": "bool",
          **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
          **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}}


@dataclasses.dataclass(frozen=True)
class Kind:
  """What config.json says of the model as a whole."""
  model_type: str = ""
  architectures: tuple[str, ...] = ()
  quantization_config: dict[str, Any] | None = None
  compression_config: dict[str, Any] | None = None
  transformers_weights: Any = None


def read_config(folder: Path) -> tuple[dict, Kind]:
  """(config.json, the kind of model it tells of) of a folder. NotImplementedError names what else a folder holds."""
  folder = Path(folder)
  if (folder / ADAPTER).exists():  # also beside a whole model, which transformers would load the adapter into
    raise NotImplementedError(f"{folder} holds a LoRA adapter: merge it into its base model, or take {ADAPTER} away")
  config = read_json(folder / "config.json")
  kind, problems = read_known(Kind, config)
  raise_all(f"{folder / 'config.json'}", problems)
  if kind.transformers_weights is not None:
    raise NotImplementedError(f"{folder / 'config.json'} has transformers_weights {shown(kind.transformers_weights)}, "
                              f"which is not supported: store the weights as model.safetensors, and remove the key")
  found = [f"{what} ({file})" for file, what in SIGNS.items() if (folder / file).exists()]
  if found:
    raise NotImplementedError(f"{folder} holds {found[0]}: only language models as they were trained are loaded")
  return config, kind


def writes_text(folder: Path, kind: Kind) -> None:
  """NotImplementedError for what is known to be no language model, or none that is stored as it was trained."""
  name, quantised = next(iter(kind.architectures), ""), kind.quantization_config or kind.compression_config
  what = next((f"{what} ({shown(name)})" for end, what in ENDS.items() if name.endswith(end)), None)
  if quantised:
    what = f"a quantised model ({shown(quantised.get('quant_method', 'as its config.json tells'))})"
  if what:
    raise NotImplementedError(f"{folder} holds {what}, expected a causal language model as it was trained")


class Tensors(Mapping):
  """The tensors of a safetensors folder by name, read on access. ValueError names a missing or truncated file."""

  def __init__(self, folder: Path):
    index, one = folder / "model.safetensors.index.json", "model.safetensors"
    # As transformers has it: beside a whole file lies the index of what was in the folder before.
    in_shards = index.exists() and not (folder / one).is_file()
    table = read_json(index).get("weight_map") if in_shards else None
    if in_shards and not (isinstance(table, dict) and all(isinstance(f, str) for f in table.values())):
      raise ValueError(f"{index} has no weight_map from tensors to files: download it again")
    files = sorted(set(table.values())) if table else [one]
    # Of a file beside the index, that is one: a name could lead anywhere, and a device has no end.
    plain = lambda f: f not in ("", "..") and Path(f).name == f and len(f) <= 255 and f.isprintable()
    raise_all(f"{index}", [f"weight_map names {shown(f)}, expected the name of a file beside it: download it again"
                           for f in files if not plain(f)])
    missing = [f for f in files if not (folder / f).is_file()]
    if missing == [one] and (pickles := [p.name for p in sorted(folder.glob("*.bin"))]):
      raise ValueError(f"{folder} has its weights in {', '.join(pickles)} only, which loading would execute as code: "
                       f"convert them to safetensors")
    raise_all(f"{folder}", [f"weight file {f} is missing: download it again" for f in missing])
    self._files = {f: _open(folder / f) for f in files}
    self._table = table or {name: one for name in self._files[one].keys()}
    if scales := next((name for name in self._table if SCALES.search(name)), None):
      raise NotImplementedError(f"{folder} holds a quantised model (tensor {name_shown(scales)}): only language models "
                                f"as they were trained are loaded")
    # An index beside the shards of another download is found here, not as a KeyError halfway through loading.
    held = {f: set(opened.keys()) for f, opened in self._files.items()}
    raise_all(f"{folder}", [f"{name_shown(name)} is listed in the index but not in {f}: download both again"
                            for name, f in self._table.items() if name not in held[f]])

  @property
  def metadata(self) -> dict[str, str] | None:
    """The text entries of the (first) file's header. Only a single one has a fixed place in what safetensors writes."""
    return next(iter(self._files.values())).metadata()

  def __getitem__(self, name) -> Stored:
    tensor = self._files[self._table[name]].get_slice(name)
    kind = tensor.get_dtype()
    return Stored(tuple(tensor.get_shape()), np.dtype(DTYPES[kind]) if kind in DTYPES else kind, tensor.__getitem__)

  def __iter__(self):
    return iter(self._table)

  def __len__(self):
    return len(self._table)


def _open(path):
  try:
    return safe_open(path, framework="numpy")  # not flax, which would read all to the first device
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{path} cannot be read ({shown(str(error))}): it is truncated or no safetensors file; "
                     f"download it again") from error


def read_folder(folder: Path) -> tuple[dict, Tensors]:
  """(config.json, tensors by stored name) of a Hugging Face folder."""
  return read_config(folder)[0], Tensors(Path(folder))


def fill(build, tensors: Mapping, what: str, *, dtype=None, stored=lambda name: name, extra_ok=(),
         problems=()) -> nnx.Module:
  """The module build() with its parameters taken from `tensors`, in `dtype` (default: as stored).

  Each is placed as it is read: on the current mesh where `sharding` says, every device's part read alone, or on the
  default device. tensors: what has a shape, a dtype and parts by index, as `Stored` and arrays have. stored gives what
  makes a parameter, by its path: the name of one tensor, or a tuple for what is stacked along a new first axis
  (experts, scanned layers). Every missing, unknown and misshapen tensor is listed in one ValueError, after the
  `problems` found before, and nothing is read then. Stored names in extra_ok may stay unused.
  """
  # Shapes alone: random weights that are about to be replaced would take the model's memory once more.
  module = nnx.eval_shape(build)
  wanted = {name: (np.asarray(stored(name), object), v) for name, v in parameters(module).items()}
  known = {part: v.shape[names.ndim:] for names, v in wanted.values() for part in names.flat}
  problems = [*problems, *(f"tensor {n} is missing" for n in known if n not in tensors)]
  problems += [f"tensor {name_shown(n)} is not part of this model" for n in tensors
               if n not in known and n not in extra_ok]
  for name, shape in known.items():
    # Integers are quantised weights, whose scales nobody here applies.
    if name in tensors and (tuple((given := tensors[name]).shape) != shape or str(given.dtype) not in FLOATS):
      problems.append(f"tensor {name} is {given.dtype}{list(given.shape)}, expected floating point {list(shape)}")
  raise_all(what, problems)
  where = {} if jax.sharding.get_mesh().empty else parameters(shardings(module))
  for name, (names, variable) in wanted.items():
    at = where[name].get_raw_value() if where else None
    variable.set_value(placed(names, tensors, variable.shape, dtype, at))
  return module


def write_folder(folder: Path, config: str, tensors: Mapping[str, jax.Array], metadata: dict[str, str] | None,
                 ours: Callable[[Path], set[str]]) -> None:
  """Writes config.json (this very text) and model.safetensors; the folder appears whole or not at all. ours: as
  `new_folder` has it."""
  with new_folder(folder, ours) as new:
    (new / "config.json").write_bytes(config.encode())  # bytes: line ends as they came in
    try:
      save_file(dict(tensors), os.fspath(new / "model.safetensors"), metadata=metadata)
    except SafetensorError as error:
      raise OSError(f"{folder} cannot be written ({error}): free some space or choose another place") from error
