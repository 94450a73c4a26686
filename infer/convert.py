"""Convert a drafter between our folder (Orbax and a JSON sidecar) and the DeepSpec folder (safetensors).

When to use it: to run a released DSpark or DFlash drafter, or to hand a drafter trained here to another engine. The
target is needed because DeepSpec stores copies of its embedding and head: they are checked on the way in and put back
on the way out. Exporting an import gives the original bytes.

    python -m infer.convert --source dspark_qwen3_4b_block7 --destination runs/qwen3 --target Qwen/Qwen3-4B
    python -m infer.convert --source runs/demo --destination deepspec/demo --target smollm2 --to deepspec

The last line of stdout is a JSON object with the keys source, destination and format.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

import dspark_jax
from dspark_jax.programs import shell


@dataclasses.dataclass
class Settings:
  source: Path
  """drafter folder in either format"""
  destination: Path
  """folder to write; replaced only when the conversion has succeeded"""
  target: str
  """the drafter's target: GGUF file, Hugging Face folder or id, or smollm2"""
  to: Literal["orbax", "deepspec"] = "orbax"
  """format to write"""
  target_dtype: Literal["float32", "bfloat16"] = "float32"
  """dtype in which the target's embedding and head are compared"""


def main(settings: Settings) -> dict:
  jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator's memory
  with shell.stderr.status("loading the target"):
    # scanned=False: its layers are never run, and stacking them would copy every weight.
    target = dspark_jax.load_target(settings.target, dtype=settings.target_dtype, scanned=False)
  convert = dspark_jax.import_drafter if settings.to == "orbax" else dspark_jax.export_drafter
  with shell.stderr.status("converting"):
    convert(settings.source, settings.destination, target)
  return dict(source=str(settings.source), destination=str(settings.destination), format=settings.to)


if __name__ == "__main__":
  shell.run(main, Settings)
