"""The spellings of a stored drafter: DeepSpec's (DSpark, DFlash, Eagle3) and the original DFlash's.

Both store parameters under the names that our modules carry. DeepSpec adds frozen copies of the target's embedding and
head, which are compared with the target and dropped; on export they are put back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.hf import FLOATS
from dspark_jax.checkpoints.tensors import placed
from dspark_jax.config import Count, Range, raise_all, read_known, shown
from dspark_jax.drafters.dspark import DSparkConfig
from dspark_jax.drafters.eagle3 import Eagle3Config
from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.targets import TARGETS
from dspark_jax.text import read_json
from dspark_jax.types import Target

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FROZEN = {EMBEDDING: lambda target: target.embed_tokens.weight[...], HEAD: lambda target: target.head().weight}

ORIGINAL = "DFlashDraftModel"
# (kind of drafter, reader of its layers) by architecture: DeepSpec's say which family's layers the drafter repeats, the
# original's are Qwen3's.
ARCHITECTURES = {f"{family.prefix}{name}Model": (kind, family.block) for family in TARGETS.values()
                 for name, kind in (("DSpark", "dspark"), ("Eagle3", "eagle3"))}
ARCHITECTURES[ORIGINAL] = "dspark", TARGETS["qwen3"].block


# What only other dialects write; a later sign never overrides an earlier one.
OTHERS = {
  "speculators": lambda hf, name: "speculators_model_type" in hf or "speculators_config" in hf,
  "DeepSeek-V4's embedded DSpark": lambda hf, name: "dspark_block_size" in hf,
  "DFlash 2": lambda hf, name: name == "DFlash2DraftModel" or "selector_rank" in hf,
  "SpecForge": lambda hf, name: name == "DSparkDraftModel",
  "ModelOpt": lambda hf, name: name == ORIGINAL and hf.get("projector_type") == "dspark",
  "a DFlash with an added Markov head": lambda hf, name: name == ORIGINAL and bool(hf.get("markov_rank")),
  "the original Eagle3": lambda hf, name: name == "LlamaForCausalLMEagle3"}

# Keys that change what is computed and none of the tensors: the values that change nothing. Missing and null are such.
CHANGES = {
  "is_causal": (False,), "causal": (False,), "use_swa": (False,), "attention_sink_bias": (False,),
  "input_embedding_scale": (1,), "embedding_scale": (1,), "output_multiplier": (1,), "logit_scale": (1,),
  "final_logit_softcapping": (0,), "attn_logit_softcapping": (0,), "quantization_config": ({},),
  "rope_is_neox_style": (True,), "enable_qwen35_gated_q_proj": (False,), "norm_before_residual": (False,),
  "norm_before_fc": (False,), "fc_norm": (False,), "norm_output": (True,), "pure_draft_prefix_len": (0,),
  "confidence_temperatures": ()}
# Of the block: where a head predicts from, and which heads there are.
CHANGES_OURS = CHANGES | {"sample_from_anchor": (True,), "shift_label": (True,), "dspark_bonus_anchor": (False,),
                          "projector_type": ("dspark", "dflash")}
CHANGES_ORIGINAL = CHANGES | {"sample_from_anchor": (False,), "shift_label": (False,), "dspark_bonus_anchor": (True,),
                              "projector_type": ("dflash",), "markov_rank": (0,), "enable_confidence_head": (False,)}
# Known to be of training, or of what is refused or turned off elsewhere.
HARMLESS = {"attention_mode", "confidence_head_alpha", "draft_vocab_size", "max_anchors", "num_anchors",
            "sliding_window_non_causal", "swa_window_size"}
NESTED = "dflash_config", "dspark_config"
SPELLED = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"  # other names of target_layer_ids
# Copied by DeepSpec's classes from the target's config; the block that they build rotates whole heads.
NOISE = "partial_rotary_factor", "mrope_section", "mrope_interleaved"


@dataclasses.dataclass(frozen=True)
class Eagle3Keys:
  """What is read of an Eagle3 drafter's config.json."""
  vocab_size: Count
  num_target_layers: Count
  target_layer_ids: tuple[int, ...]
  ttt_length: Count


@dataclasses.dataclass(frozen=True)
class DFlashKeys:
  """What is read of an original DFlash's config.json."""
  vocab_size: Count
  num_hidden_layers: Count
  num_target_layers: Count
  mask_token_id: int
  block_size: Annotated[int, Range(2, 2 ** 31 - 1)]  # the anchor's position included
  target_layer_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class DSparkKeys:
  """What is read of a DeepSpec DSpark or DFlash drafter's config.json."""
  vocab_size: Count
  num_hidden_layers: Count
  num_target_layers: Count
  mask_token_id: int
  block_size: Count
  target_layer_ids: tuple[int, ...]
  markov_rank: Annotated[int, Range(0, 2 ** 31 - 1)]
  # Keys about a head that is not there are absent, not false.
  markov_head_type: str | None = None
  enable_confidence_head: bool | None = None
  confidence_head_with_markov: bool | None = None


def drafter_config(hf: dict) -> tuple[str, DrafterConfig]:
  """(name of the drafter, configuration) in a stored config.json; ValueError: all that is missing or not understood.

  A key is looked up at the top level, then in `dflash_config` and `dspark_config`; unknown ones are an error in these.
  """
  flat, problems = _flat(hf)
  name = _architecture(hf)
  dialect = next((dialect for dialect, sign in OTHERS.items() if sign(flat, name)), None)
  if dialect or name not in ARCHITECTURES:
    of = f" (of {dialect})" if dialect else ""
    raise NotImplementedError(f"drafter architecture {shown(name)}{of} is not supported, only "
                              f"{', '.join(ARCHITECTURES)} are, as DeepSpec and the original DFlash write them")
  kind, block = ARCHITECTURES[name]
  original = name == ORIGINAL
  keys = Eagle3Keys if kind == "eagle3" else DFlashKeys if original else DSparkKeys
  read, changes = [f.name for f in dataclasses.fields(keys)], CHANGES_ORIGINAL if original else CHANGES_OURS
  problems += _changed(flat, changes) + _taps_spelled(flat)
  if original and flat.get("target_layer_ids") is None and hf.get("block_size") is None:
    problems.append("key 'target_layer_ids' is missing, which only older files leave to a default: name the taps")
  problems += [f"unknown key {shown(key)} in {part}" for part in NESTED for key in sorted(hf.get(part) or {})
               if key not in {*read, *changes, *HARMLESS, *SPELLED}]
  spec, wrong = block(flat if original else _without_noise(flat))
  stored, of_drafter = read_known(keys, flat)
  taps = stored and stored.target_layer_ids or ()
  if len(set(taps)) < len(taps):
    wrong = [*wrong, f"key 'target_layer_ids' is {shown(list(taps))}, expected each layer once"]
  raise_all("drafter config", problems + wrong + of_drafter)
  return kind, _eagle3(flat, spec, stored) if kind == "eagle3" else _dspark(spec, stored, original)


def ours(folder: Path) -> set[str]:
  """The names of a folder that an export may replace (`atomic.new_folder`): only a drafter's. A target's are the same.
  """
  file = folder / "config.json"
  drafter = file.is_file() and _architecture(read_json(file)) in ARCHITECTURES
  return {"config.json", "model.safetensors"} if drafter else set()


def _architecture(hf):
  names = hf.get("architectures")
  return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "none"


def _flat(hf):
  """(top level and what is nested in it as one, problems): of one key with two values neither can be trusted."""
  flat, problems = dict(hf), []
  for part in NESTED:
    if not isinstance(hf.get(part) or {}, dict):
      raise ValueError(f"drafter config: key {part!r} is {shown(hf[part])}, expected an object")
    for key, value in (hf.get(part) or {}).items():
      if flat.get(key) is not None and value is not None and flat[key] != value:
        problems.append(f"key {shown(key)} is {shown(flat[key])}, and {shown(value)} in {part}: expected one value")
      flat[key] = value if flat.get(key) is None else flat[key]
  return flat, problems


def _taps_spelled(flat):
  """Problems of taps that are named otherwise, as what a layer reads, one more than the layer; else they are put there
  under our name."""
  problems = []
  for key in SPELLED:
    found = flat.get(key)
    if found is not None:
      if not isinstance(found, list) or not all(type(x) is int for x in found):
        problems.append(f"key {key!r} is {shown(found)}, expected a list of layers")
      elif flat.get("target_layer_ids") not in (None, ids := [x - 1 for x in found]):
        problems.append(f"key {key!r} is {shown(found)}, which is one more than a tap, and 'target_layer_ids' "
                        f"{shown(flat['target_layer_ids'])}: expected the same")
      else:
        flat["target_layer_ids"] = ids
  return problems


def _changed(flat, changes):
  problems = []
  for key, neutral in changes.items():
    value = flat.get(key)
    # By type too, as True == 1.
    if value is not None and not any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral):
      only = f", only {neutral[0]!r} is" if neutral else ""
      problems.append(f"key {key!r} is {shown(value)}, which is not supported{only}")
  if flat.get("draft_vocab_size") not in (None, flat.get("vocab_size")):
    problems.append(f"key 'draft_vocab_size' is {shown(flat['draft_vocab_size'])}, but vocab_size "
                    f"{shown(flat.get('vocab_size'))}: a reduced draft vocabulary is not supported")
  return problems


def _without_noise(flat):
  rope = flat.get("rope_parameters")
  rope = {key: x for key, x in rope.items() if key not in NOISE} if isinstance(rope, dict) else rope
  return {key: x for key, x in flat.items() if key not in NOISE} | ({"rope_parameters": rope} if rope else {})


def _eagle3(flat, spec, stored):
  layers = flat.get("draft_num_hidden_layers", flat.get("num_hidden_layers"))
  if layers != 1:
    raise ValueError(f"drafter config: an Eagle3 drafter of {shown(layers)} layers is not supported, only of one")
  # As many drafts as it was unrolled for: the file names no other number.
  return Eagle3Config(spec=spec, vocab_size=stored.vocab_size, num_target_layers=stored.num_target_layers,
                      taps=stored.target_layer_ids, block_size=stored.ttt_length)


def _dspark(spec, stored, original):
  common = dict(spec=spec, num_layers=stored.num_hidden_layers, vocab_size=stored.vocab_size,
                num_target_layers=stored.num_target_layers, mask_token_id=stored.mask_token_id)
  if original:
    # Its block_size counts the anchor's position, which predicts nothing: one draft less than positions.
    taps = stored.target_layer_ids
    if taps is None:  # none at all, which is refused, is no default
      taps = default_taps(stored.num_target_layers, stored.num_hidden_layers)
    return DSparkConfig(**common, taps=taps, block_size=stored.block_size - 1, markov_rank=0, confidence="none",
                        sample_from_anchor=False)
  confidence = "none" if not stored.enable_confidence_head else (
      "markov" if stored.confidence_head_with_markov else "hidden")
  return DSparkConfig(**common, taps=stored.target_layer_ids, block_size=stored.block_size,
                      markov_rank=stored.markov_rank, markov_head=stored.markov_head_type or "vanilla",
                      confidence=confidence)


def default_taps(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
  """The original DFlash's taps where a config names none; halves round to the even integer."""
  if num_draft_layers == 1:
    return (num_target_layers // 2,)
  return tuple(round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1)) for i in range(num_draft_layers))


def stores_frozen(config: DrafterConfig) -> bool:
  """Whether a drafter's stored form holds copies of the target's embedding and head; the original DFlash's does not."""
  return getattr(config, "sample_from_anchor", True)  # recurrent drafters have no such choice


def stored_frozen(tensors: Mapping, tied: bool) -> dict:
  """The frozen copies among these tensors. A tied model's file has no head: that is the embedding."""
  found = {name: tensors[name] for name in FROZEN if name in tensors}
  return {HEAD: found[EMBEDDING]} | found if tied and EMBEDDING in found else found


def check_frozen(tensors: Mapping, target: Target) -> list[str]:
  """Problems: frozen copies that a DeepSpec file lacks, or that are not this target's (in the coarser dtype)."""
  problems, found = [], stored_frozen(tensors, target.config.tie_word_embeddings)
  for name, own in FROZEN.items():
    if name not in found:
      problems.append(f"tensor {name} is missing")
      continue
    stored, mine = found[name], own(target)
    if str(stored.dtype) not in FLOATS:
      problems.append(f"{name} is {stored.dtype}, expected floating point: get the drafter as it was trained")
      continue
    # Equal shapes prove nothing: another target's drafter would load, and no draft of it would be accepted.
    # As coarse as either, and of two halves each: a float16 lacks small numbers, a bfloat16 digits.
    equal = lambda dtype: bool(jnp.array_equal(
        placed(np.asarray(name, object), found, mine.shape, dtype, mine.sharding), mine.astype(dtype)))
    halves = sorted({stored.dtype, mine.dtype}, key=lambda d: jnp.finfo(d).bits)
    if stored.shape != mine.shape or not any(map(equal, halves)):
      problems.append(f"{name} {list(stored.shape)} is not the target's {list(mine.shape)}: this drafter was made for "
                      f"another target, load that one")
  return problems


def deepspec_config(kind: str, config: DrafterConfig) -> str:
  """The text of a DeepSpec config.json for a drafter trained here; ValueError where that format has no word for it."""
  raise_all("export to DeepSpec", (["a reduced draft vocabulary cannot be stored"] if config.draft_vocab_size else [])
            + (["a lens cannot be stored"] if getattr(config, "lens", False) else [])
            + ([] if stores_frozen(config) else ["the original DFlash's blocks cannot be stored"])
            + ([] if kind in ("dspark", "eagle3") else [f"a drafter of the kind {kind} cannot be stored"]))
  # Untied whatever the target is: both copies are stored.
  out = dict(num_target_layers=config.num_target_layers, target_layer_ids=list(config.taps), tie_word_embeddings=False,
             vocab_size=config.vocab_size)
  family, layers = _layers(config)
  out |= layers
  if kind == "eagle3":
    out |= dict(architectures=[f"{family}Eagle3Model"], draft_num_hidden_layers=1, num_hidden_layers=1,
                ttt_length=config.block_size, step_loss_decay=0.8)  # of the reference's training
    return json.dumps(out, indent=2, sort_keys=True) + "\n"
  out |= dict(architectures=[f"{family}DSparkModel"], block_size=config.block_size,
              enable_confidence_head=config.confidence != "none", markov_rank=config.markov_rank,
              mask_token_id=config.mask_token_id, num_hidden_layers=config.num_layers)
  if config.confidence != "none":
    out["confidence_head_with_markov"] = config.confidence == "markov"
  if config.markov_rank:
    out["markov_head_type"] = config.markov_head
  # Indented and sorted as transformers writes its configs.
  return json.dumps(out, indent=2, sort_keys=True) + "\n"


def _layers(config):
  """(prefix of the architecture, what config.json says of the layers) of the family that reads these layers back."""
  for name, family in TARGETS.items():
    if type(config.spec) is family.spec:  # not isinstance: a family's may extend another's
      keys = family.keys(config.spec)
      if family.block(keys) == (config.spec, []):
        return family.prefix, keys | {"model_type": name}
  raise ValueError(f"export to DeepSpec: no family there has layers like {config.spec}")


def frozen_copies(target: Target, dtype) -> dict[str, jax.Array]:
  """The target's embedding and head under DeepSpec's names. ValueError when that would invent digits."""
  theirs = target.head().weight.dtype
  if jnp.finfo(theirs).bits < jnp.finfo(dtype).bits:
    raise ValueError(f"export to DeepSpec: the drafter is {dtype}, its copies of the target's {theirs} embedding and "
                     f"head would be rounded: load the target in {dtype}")
  return {name: own(target).astype(dtype) for name, own in FROZEN.items()}
