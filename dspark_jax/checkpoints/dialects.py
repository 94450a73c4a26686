"""The spellings of a stored drafter: DeepSpec's (DSpark, DFlash, Eagle3) and the original DFlash's.

Both store parameters under the names that our modules carry. DeepSpec adds frozen copies of the target's embedding and
head, which are compared with the target and dropped; on export they are put back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dspark_jax.config import raise_all
from dspark_jax.drafters.dspark import DSparkConfig
from dspark_jax.drafters.eagle3 import Eagle3Config
from dspark_jax.drafters.model import DrafterConfig
from dspark_jax.targets import TARGETS
from dspark_jax.types import Target

FROZEN = {"embed_tokens.weight": lambda target: target.embed_tokens.weight[...],
          "lm_head.weight": lambda target: target.head().weight}

ORIGINAL = "DFlashDraftModel"
# (kind of drafter, reader of its layers) by architecture: DeepSpec's say which family's layers the drafter repeats, the
# original's are Qwen3's.
ARCHITECTURES = {f"{family.prefix}{name}Model": (kind, family.block) for family in TARGETS.values()
                 for name, kind in (("DSpark", "dspark"), ("Eagle3", "eagle3"))}
ARCHITECTURES[ORIGINAL] = "dspark", TARGETS["qwen3"].block


def drafter_config(hf: dict) -> tuple[str, DrafterConfig]:
  """(name of the drafter, configuration) in a stored config.json; ValueError: all that is missing or not understood."""
  architecture = (hf.get("architectures") or ["none"])[0]
  if architecture not in ARCHITECTURES:
    raise NotImplementedError(f"drafter architecture {architecture!r} is not supported, only "
                              f"{', '.join(ARCHITECTURES)} are")
  kind, block = ARCHITECTURES[architecture]
  return kind, (_eagle3 if kind == "eagle3" else _dspark)(hf, *block(hf))


def _eagle3(hf, spec, problems):
  needed = ("ttt_length", "num_target_layers", "target_layer_ids")
  problems += [f"key {k!r} is missing" for k in needed if hf.get(k) is None]
  layers = hf.get("draft_num_hidden_layers", hf.get("num_hidden_layers"))
  problems += [f"an Eagle3 drafter of {layers} layers is not supported, only of one"] if layers != 1 else []
  raise_all("drafter config", problems)
  # As many drafts as it was unrolled for: the file names no other number.
  return Eagle3Config(spec=spec, vocab_size=hf["vocab_size"], num_target_layers=hf["num_target_layers"],
                      taps=tuple(hf["target_layer_ids"]), block_size=hf["ttt_length"])


def _dspark(hf, spec, problems):
  original = hf["architectures"][0] == ORIGINAL
  # Newer files of the original have these keys, block_size among them, in dflash_config alone.
  own = {**hf, **hf.get("dflash_config", {})} if original else hf
  needed = ["block_size", "num_target_layers", "mask_token_id"]
  needed += [] if original else ["target_layer_ids", "markov_rank"]
  problems += [f"key {k!r} is missing" for k in needed if own.get(k) is None]
  raise_all("drafter config", problems)
  common = dict(spec=spec, num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"],
                num_target_layers=own["num_target_layers"], mask_token_id=own["mask_token_id"])
  if original:
    # Its block_size counts the anchor's position, which predicts nothing: one draft less than positions.
    taps = own.get("target_layer_ids") or default_taps(own["num_target_layers"], hf["num_hidden_layers"])
    return DSparkConfig(**common, taps=tuple(taps), block_size=own["block_size"] - 1, markov_rank=0, confidence="none",
                        sample_from_anchor=False)
  # Keys about a head that is not there are absent, not false.
  confidence = "none" if not hf.get("enable_confidence_head") else (
      "markov" if hf.get("confidence_head_with_markov") else "hidden")
  return DSparkConfig(**common, taps=tuple(hf["target_layer_ids"]), block_size=hf["block_size"],
                      markov_rank=hf["markov_rank"], markov_head=hf.get("markov_head_type") or "vanilla",
                      confidence=confidence)


def default_taps(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
  """The original DFlash's taps where a config names none; halves round to the even integer."""
  if num_draft_layers == 1:
    return (num_target_layers // 2,)
  return tuple(round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1)) for i in range(num_draft_layers))


def stores_frozen(config: DrafterConfig) -> bool:
  """Whether a drafter's stored form holds copies of the target's embedding and head; the original DFlash's does not."""
  return getattr(config, "sample_from_anchor", True)  # recurrent drafters have no such choice


def check_frozen(tensors: Mapping, target: Target) -> list[str]:
  """Problems: frozen copies that a DeepSpec file lacks, or that are not this target's (in the coarser dtype)."""
  problems = []
  for name, own in FROZEN.items():
    if name not in tensors:
      problems.append(f"tensor {name} is missing")
      continue
    stored, mine = tensors[name], own(target)
    # Equal shapes prove nothing: another target's drafter would load, and no draft of it would be accepted.
    coarse = min(stored.dtype, mine.dtype, key=lambda d: jnp.finfo(d).bits)
    if stored.shape != mine.shape or not bool(jnp.array_equal(jnp.asarray(stored, coarse), mine.astype(coarse))):
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
      if family.block(keys | dict(num_hidden_layers=1, vocab_size=config.vocab_size)) == (config.spec, []):
        return family.prefix, keys | {"model_type": name}
  raise ValueError(f"export to DeepSpec: no family there has layers like {config.spec}")


def frozen_copies(target: Target, dtype) -> dict[str, jax.Array]:
  """The target's embedding and head under DeepSpec's names. ValueError when that would invent digits."""
  theirs = target.head().weight.dtype
  if jnp.finfo(theirs).bits < jnp.finfo(dtype).bits:
    raise ValueError(f"export to DeepSpec: the drafter is {dtype}, its copies of the target's {theirs} embedding and "
                     f"head would be rounded: load the target in {dtype}")
  return {name: own(target).astype(dtype) for name, own in FROZEN.items()}
