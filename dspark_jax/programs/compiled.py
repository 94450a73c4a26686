"""Compiles a program for a machine that is not there, and says what became of it: memory, traffic, work, time.

All numbers are of one device. Predicted seconds are those of operations one after another, each at the pace of the
chip's main memory or of its products, whichever is slower: nothing waits, nothing overlaps, and collectives cost what
they move through main memory. They are a yardstick for programs, not a forecast; nothing has run.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

import dspark_jax
from dspark_jax.programs import hlo
from dspark_jax.programs.compilers import Chip

TOP = 5
ROOT, OURS = Path(dspark_jax.__file__).parents[1], ("dspark_jax", "train", "infer")
# Of what the TPU compiler writes: the program as it is emitted, with cycles; where it did not come so far (the memory
# did not suffice), as it was optimized.
TEXTS = ("*after_codegen.txt", "*after_optimizations.txt")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compiler made of a program; bytes of one device."""
  arguments: float
  outputs: float        # that are not arguments, donated and written in place
  temporaries: float
  code: float
  module: hlo.Module
  operations: list[hlo.Operation]
  refused: bool = False  # for lack of memory: what was needed is then known to two decimals, which may seem to fit

  @property
  def peak(self) -> float:
    """All of them together: the program's own code lies in the same memory."""
    return self.arguments + self.outputs + self.temporaries + self.code


def read(lowered: jax.stages.Lowered) -> Compiled:
  """Compiles and reads a program. One that does not fit the chip is read as far as its compiler came.

  ValueError where it refuses the program for another reason, or leaves no text of it.
  """
  # From the compiler's own files: as_text() fails for programs that SparseCores take part in (libtpu 0.0.52: "async-
  # update instruction should have 1 operands"), training steps among them, and is not to be had where memory is short.
  with tempfile.TemporaryDirectory() as folder:
    stats, short = None, None
    try:
      stats = lowered.compile(compiler_options={"xla_dump_to": folder}).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
      short = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
      if not short:
        raise ValueError(f"the compiler refuses the program: {str(error).splitlines()[0]}") from error
    texts = [file for pattern in TEXTS for file in Path(folder).glob(pattern)]
    if not texts:
      raise ValueError("the compiler wrote no text of the program: it took it from a cache; unset "
                       "JAX_COMPILATION_CACHE_DIR")
    module = hlo.Module(texts[0].read_text())
  operations = module.operations()
  if stats:
    return Compiled(stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes,
                    stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, module, operations)
  # The compiler calls them temporaries, but arguments are among them.
  needed = float(short[1]) * 1024 ** ("KMGT".index(short[2]) + 1)
  return Compiled(module.argument_bytes, 0, max(needed - module.argument_bytes, 0), 0, module, operations,
                  refused=True)


def summary(compiled: Compiled, chip: Chip, *, floor_bytes: float, useful_flops: float) -> dict[str, Any]:
  """What there is to say of a program, for JSON, given the least that it must move and compute."""
  operations = compiled.operations
  total = lambda name: sum(getattr(operation, name) for operation in operations)
  collectives = collections.Counter()
  for operation in operations:
    if operation.collective:
      collectives[operation.collective] += operation.exchanged
  seconds = sum(max(op.bytes / chip.bandwidth, op.flops / chip.flops) for op in operations)
  most = sorted(operations, key=lambda op: -op.bytes)[:TOP]
  return dict(
      bytes=total("bytes"), floor_bytes=floor_bytes, over_floor=total("bytes") / floor_bytes,
      argument_bytes=compiled.arguments, output_bytes=compiled.outputs, temporary_bytes=compiled.temporaries,
      peak_bytes=compiled.peak, fits=not compiled.refused and compiled.peak <= chip.memory, cycles=total("cycles"),
      compiled_flops=total("flops"), useful_flops=useful_flops, useful_share=useful_flops / max(total("flops"), 1),
      collectives=dict(collectives), predicted_seconds=seconds,
      roofline_seconds=max(floor_bytes / chip.bandwidth, useful_flops / chip.flops),
      most=[dict(name=op.name, operation=op.label.rsplit("/", 1)[-1] or op.opcode, shape=op.shape, times=op.times,
                 bytes=op.bytes, cycles=op.cycles, source=place(op)) for op in most],
      unknown_loops=compiled.module.unknown_loops, unknown_kernels=compiled.module.unknown_kernels)


def place(operation: hlo.Operation) -> str:
  """Where in this repository an operation was asked for: lines of the innermost file, then of the one that called."""
  lines = collections.defaultdict(list)
  for file, line in operation.source:
    if Path(file).is_relative_to(ROOT) and Path(file).relative_to(ROOT).parts[0] in OURS:
      lines[str(Path(file).relative_to(ROOT)).removeprefix("dspark_jax/")].append(str(line))
  return " < ".join(f"{file}:{','.join(found)}" for file, found in list(lines.items())[:2])


def tables(programs: dict[str, dict], chip: Chip) -> list[Table]:
  """The summaries for people: one table of all programs, and one of the operations that move most."""
  gb = lambda name: lambda row: f"{row[name] / 1e9:.3f}"
  rows = {
      "arguments GB": gb("argument_bytes"), "results GB (not donated)": gb("output_bytes"),
      "temporaries GB": gb("temporary_bytes"), "peak GB": gb("peak_bytes"),
      f"fits {chip.memory / 1e9:.1f} GB": lambda row: "yes" if row["fits"] else "NO",
      "moved GB": gb("bytes"), "floor GB": gb("floor_bytes"), "moved / floor": lambda row: f"{row['over_floor']:.3f}",
      "million cycles": lambda row: f"{row['cycles'] / 1e6:.1f}" if row["cycles"] else "-",
      "Tflop, compiled": lambda row: f"{row['compiled_flops'] / 1e12:.3f}",
      "useful / compiled": lambda row: f"{row['useful_share']:.2f}",
      "collectives MB": lambda row: "\n".join(f"{kind} {size / 1e6:.1f}" for kind, size in row["collectives"].items())
                                    or "-",
      "predicted ms": lambda row: f"{row['predicted_seconds'] * 1e3:.2f}",
      "roofline ms": lambda row: f"{row['roofline_seconds'] * 1e3:.2f}",
      "loops of unknown length": lambda row: f"{len(row['unknown_loops'])}, counted once" if row["unknown_loops"]
                                             else "-",
      "kernels without estimate": lambda row: f"{len(row['unknown_kernels'])}, counted whole" if row["unknown_kernels"]
                                              else "-"}
  whole = Table("per device", *programs, title=f"compiled for {chip.name}")
  for name, show in rows.items():
    whole.add_row(name, *(show(row) for row in programs.values()))
  most = Table("program", "GB", "runs", "what", "where", title="what moves most")
  most.columns[-1].overflow = most.columns[-2].overflow = "fold"
  for name, row in programs.items():
    for op in row["most"]:
      most.add_row(name, f"{op['bytes'] / 1e9:.3f}", str(op["times"]), f"{op['operation']} {op['shape']}",
                   op["source"])
  return [whole, most]


def on(tree: Any, shardings: Any) -> Any:
  """The shapes of a tree, placed."""
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(place, tree, shardings)


def size(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays, or of their shapes."""
  def one(x):
    sharding = getattr(x, "sharding", None)
    shape = sharding.shard_shape(x.shape) if sharding is not None else x.shape
    return int(np.prod(shape)) * x.dtype.itemsize
  # Keys have a dtype of their own, with a size of their own; there are few of them.
  return sum(one(x) for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
