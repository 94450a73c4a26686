"""Convert a drafter between our folder (Orbax and a JSON sidecar) and the DeepSpec folder (safetensors), or a target to
our folder.

When to use it: to run a released DSpark or DFlash drafter, or to hand a drafter trained here to another engine. The
target is needed because DeepSpec stores copies of its embedding and head: they are checked on the way in and put back
on the way out. Exporting an import gives the original bytes.

Without --source the target itself is converted: a Hugging Face folder or id, a GGUF file or smollm2 becomes a folder
that every --target reads, whose arrays are stored in small chunks, so that on a mesh of several hosts each reads its
own part. The files of its tokenizer go along. A GGUF file has none: its tokenizer is written where it is one that
infer.generate can read from the file itself, and left out otherwise, with a word of it.

    python -m infer.convert --source dspark_qwen3_4b_block7 --destination runs/qwen3 --target Qwen/Qwen3-4B
    python -m infer.convert --source runs/demo --destination deepspec/demo --target smollm2 --to deepspec
    python -m infer.convert --target Qwen/Qwen3-8B --destination targets/qwen3-8b --to orbax

The last line of stdout is a JSON object with the keys source, destination and format.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

import dspark_jax
from dspark_jax.checkpoints import atomic, dialects, state
from dspark_jax.programs import shell


@dataclasses.dataclass
class Settings:
  target: str
  """the drafter's target, or the one to convert: GGUF file, Hugging Face folder or id, folder of this program, or
  smollm2"""
  destination: Path
  """folder to write; replaced only when the conversion has succeeded"""
  source: Path | None = None
  """drafter folder in either format; without one the target itself is converted"""
  to: Literal["orbax", "deepspec"] = "orbax"
  """format to write; targets have orbax alone"""
  target_dtype: Literal["float32", "bfloat16"] | None = None
  """dtype in which the target's embedding and head are compared (default: float32), or in which a target is written
  (default: as it is stored; GGUF: float32)"""


def main(settings: Settings) -> dict:
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator's memory
  if settings.source is None and settings.to == "deepspec":
    raise ValueError("deepspec is a format of drafters: name one with --source, or convert the target to orbax")
  atomic.check_place(settings.destination, dialects.ours if settings.to == "deepspec" else
                     state.ours(state.DRAFTER if settings.source else state.TARGET))
  for what, place in (("source", settings.source), ("target", settings.target)):
    if place and Path(place).exists() and Path(place).resolve().is_relative_to(settings.destination.resolve()):
      raise ValueError(f"destination {settings.destination} holds the {what} itself, which would be lost: choose "
                       f"another place")
  if settings.source is not None:
    shell.check_drafter(settings.source)
  if settings.source is None:
    with shell.stderr.status("converting"):
      dspark_jax.import_target(settings.target, settings.destination, dtype=settings.target_dtype)
    if not (settings.destination / "tokenizer.json").exists():
      shell.say(f"{settings.target} has no tokenizer that could be written: prompts for it are token ids")
  else:
    with shell.stderr.status("loading the target"):
      # scanned=False: its layers are never run.
      target = dspark_jax.load_target(settings.target, dtype=settings.target_dtype or "float32", scanned=False)
    convert = dspark_jax.import_drafter if settings.to == "orbax" else dspark_jax.export_drafter
    with shell.stderr.status("converting"):
      convert(settings.source, settings.destination, target)
  return dict(source=str(settings.source or settings.target), destination=str(settings.destination),
              format=settings.to)


if __name__ == "__main__":
  shell.run(main, Settings)
