"""What a compiled program does, read from its optimized HLO: bytes of main memory, flops, cycles and collectives of
every operation, in all runs of the loops that hold it.

XLA's own cost analysis counts the body of a loop once, a buffer that is updated in place as if it were written whole,
and memory on the chip like memory beside it. Here
- an operation reads each of its operands once and writes each result once, as far as they lie in main memory: an array
  in another memory space (S(1) is on the chip) costs nothing where it is used, only where it is copied from or to;
- arrays are as large as they lie: padded to the tiles of their layout;
- of a value that is only sliced or gathered from, the slices are read, and of a sum inside a fusion that is sliced the
  terms of the slices; of one that is updated in place, the update is written: also inside fusions, at any depth;
- the body of a loop counts as often as it runs, and of a conditional the branch that moves most;
- a kernel moves what its author says (the cost estimate of a Pallas call), else its operands and results, whole.
What a fusion reads several times, because it does not fit on the chip at once, is counted once: a lower bound.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {"token": 0, "opaque": 0, "pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f8e8m0fnu": 1,
         "f4e2m1fn": 0.5, "bf16": 2, "c64": 8, "c128": 16,
         **{f"{sign}{bits}": bits / 8 for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
         **{f"f{bits}": bits / 8 for bits in (16, 32, 64)}}
ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency",
        "opt-barrier", "partition-id", "replica-id", "domain", "async-update", "async-done"}
SAME = {"bitcast", "reshape"}                       # another view of a value
ELEMENTWISE = SAME | {"convert", "copy", "transpose", "negate"}  # of which no more is made than is asked for
COPIES = {"copy", "bitcast", "copy-start", "copy-done"}
SLICES, UPDATES = {"slice", "dynamic-slice", "gather"}, {"dynamic-update-slice", "scatter"}
# Custom calls that tell the compiler something, and move nothing.
NOTES = {"AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "AllocateBuffer", "Sharding",
         "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint"}
KERNELS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape."""
  dtype: str
  dims: tuple[int, ...]
  layout: str  # as HLO writes it: minor to major, tiles T(..), memory space S(..)

  @functools.cached_property
  def size(self) -> float:
    """Bytes, with the padding of the outer tile, into which inner tiles fit."""
    if self.dtype not in BYTES:
      raise ValueError(f"HLO has an array of {self.dtype}, whose size is not known here: add it to programs/hlo.py")
    dims, order = list(self.dims), [int(n) for n in self.layout.split(":")[0].split(",") if n]
    tile = re.search(r"T\(([\d,]+)\)", self.layout)
    if tile:
      for axis, side in zip(order, reversed([int(n) for n in tile[1].split(",")])):
        dims[axis] = -(-dims[axis] // side) * side
    return math.prod(dims) * BYTES[self.dtype]

  @property
  def in_main_memory(self) -> bool:
    space = re.search(r"S\((\d+)\)", self.layout)
    return space is None or space[1] == "0"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""
  name: str
  opcode: str
  results: tuple[Array, ...]  # the leaves of its shape
  operands: tuple[str, ...]
  literal: str                # what stands between the parentheses
  attributes: str
  root: bool

  @property
  def size(self) -> float:
    """Bytes of all that it gives, wherever that lies."""
    return sum(array.size for array in self.results)

  def attribute(self, name: str) -> str | None:
    """The computation, or the plain word, that it has under this name."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
    return found and found[1]

  @property
  def called(self) -> str | None:
    """The computation that it runs once."""
    return self.attribute("calls") or (self.attribute("to_apply") if self.opcode == "call" else None)


@dataclasses.dataclass(frozen=True)
class Operation:
  """What one instruction does in a run of the whole program."""
  name: str
  opcode: str
  shape: str              # of its first result
  times: int              # that it runs
  read: float             # bytes of main memory, in all runs; so with the rest
  written: float
  flops: float            # of products; two per multiply-add; those that the compiler does elementwise (a product of
                          # one row, on a TPU) are none any more
  cycles: float           # the compiler's estimate; none of kernels and copies
  collective: str | None  # its kind
  exchanged: float        # bytes of a collective: of its operands or its results, whichever are more
  source: tuple[tuple[str, int], ...]  # (file, line) of the Python that asked for it, innermost first
  label: str              # JAX's name of it

  @property
  def bytes(self) -> float:
    return self.read + self.written


class Module:
  """A parsed program. ValueError for text that is no optimized HLO."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, self.unknown_loops, self.unknown_kernels = None, [], []
    self._tables = {name: {} for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")}
    self._parse(text)
    if self.entry is None:
      raise ValueError("the text of the compiled program has no ENTRY computation: it is not optimized HLO")
    self._users = {name: self._used(computation) for name, computation in self.computations.items()}

  def _parse(self, text):
    table = current = None
    for line in text.splitlines():
      if line in self._tables:
        table = self._tables[line]
      elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
        table[int(row[1])] = row[2]
      elif head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
        table, current = None, self.computations.setdefault(head[2], {})
        self.entry = head[2] if head[1] else self.entry
      elif current is not None and (instruction := parse_line(line)):
        for name in instruction.operands:
          if "#" in name and name not in current:  # %t#1: what older text takes out by an instruction of its own
            whole, _, index = name.rpartition("#")
            current[name] = Instruction(name, "get-tuple-element", current[whole].results[int(index):][:1], (whole,),
                                        f"%{whole}", f", index={index}", False)
        current[instruction.name] = instruction

  def _used(self, computation):
    users = collections.defaultdict(list)
    for instruction in computation.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return users

  @property
  def argument_bytes(self) -> float:
    """Bytes of what the program is given."""
    return sum(x.size for x in self.computations[self.entry].values() if x.opcode == "parameter")

  def operations(self) -> list[Operation]:
    """What every instruction that costs something does, in order. `unknown_loops` then names the loops whose number of
    runs is not to be seen in the text, which are counted once, and `unknown_kernels` the kernels without an estimate.
    """
    self.unknown_loops, self.unknown_kernels, self._channels = [], [], {}
    return list(self._run(self.entry, 1))

  def _run(self, at, times):
    for ins in self.computations[at].values():
      if ins.opcode == "while":
        yield from self._run(ins.attribute("body"), times * self._trips(at, ins))
      elif ins.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", ins.attributes)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else [
            ins.attribute("true_computation"), ins.attribute("false_computation")]
        before, found = self._channels, []
        for name in names:
          self._channels = dict(before)  # of what a branch that is left out exchanges, pieces elsewhere count
          found.append(([*self._run(name, times)], self._channels))
        operations, self._channels = max(found, key=lambda branch: sum(op.bytes for op in branch[0]))
        yield from operations
      elif ins.opcode == "call" or (ins.opcode == "async-start" and ins.called):
        yield from self._run(ins.called, times)
      elif ins.opcode not in FREE and not ins.opcode.endswith("-done"):
        yield self._operation(at, ins, times)

  def _operation(self, at, ins, times):
    read, written = self._moved(at, ins)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', ins.attributes)
    label = re.search(r'op_name="([^"]*)"', ins.attributes)
    kind, exchanged, channel = self._exchanged(at, ins)
    # One that runs beside products stands in its start and in each of the fusions that hold a piece of it.
    if channel and self._channels.setdefault(channel, (at, ins.name)) != (at, ins.name):
      kind, exchanged = None, 0.0
    first = next((array for array in ins.results if array.dims), ins.results[0])
    return Operation(ins.name, ins.opcode, f"{first.dtype}[{','.join(map(str, first.dims))}]", times, read * times,
                     written * times, self._flops(at, ins) * times, (int(cycles[1]) if cycles else 0) * times, kind,
                     exchanged * times, self._source(ins), label[1] if label else "")

  # Bytes

  def _moved(self, at, ins):
    """(read, written) bytes of main memory in one run."""
    here = self.computations[at]
    operands = [here[name] for name in ins.operands]
    near = [all(array.in_main_memory for array in operand.results) for operand in operands]
    results, opcode = ins.results, ins.opcode.removesuffix("-start")
    if opcode == "custom-call":
      target, said = (re.search(pattern, ins.attributes) for pattern in (
          r'custom_call_target="([^"]*)"', r'"bytes_accessed":\s*"?(\d+)'))
      if said or (target and target[1] in NOTES):
        return float(said[1]) if said else 0.0, 0.0
      if target and target[1] in KERNELS:
        self.unknown_kernels.append(ins.name)
    if ins.opcode == "copy-start":        # (there, here, a flag)
      results = results[:1]
      # The last run of the program fetched it already, by a copy at the end, which is the one that counts.
      if "cross_program_prefetch_index" in ins.attributes and any(
          x.opcode == ins.opcode and x is not ins for x in self._users[at][ins.operands[0]]):
        return 0.0, 0.0
    elif ins.opcode.endswith("-start"):   # (operands, results, flags), or the results alone
      results = results[len(operands):] or results
    in_main = lambda arrays: sum(array.size for array in arrays if array.in_main_memory)
    if opcode == "fusion":
      inner = self.computations[ins.called]
      read = sum(operand.size * self._read_share(ins.called, self._parameter(ins.called, i))
                 for i, operand in enumerate(operands) if near[i])
      root = self._root(ins.called)
      roots = root.operands if root.opcode == "tuple" else [root.name]
      parts = [inner[name] for name in roots for _ in inner[name].results]
      return read, sum(array.size * self._written_share(ins.called, part.name)
                       for array, part in zip(results, parts) if array.in_main_memory)
    if opcode in SLICES:
      part = sum(array.size for array in results[:1])
      return (part if near[0] else 0) + sum(in_main(x.results) for x in operands[1:]), in_main(results[:1])
    if opcode in UPDATES:
      update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
      return sum(in_main(x.results) for x in operands[1:]), min(update.size, in_main(results))
    return sum(in_main(x.results) for x in operands), in_main(results)

  def _parameter(self, computation, index):
    """The name of a parameter of a computation."""
    return next(x.name for x in self.computations[computation].values()
                if x.opcode == "parameter" and x.literal.strip() == str(index))

  def _read_share(self, at, name):
    """How much of a value the rest of its computation reads: 0 to 1."""
    value, share = self.computations[at][name], 0.0
    if value.root or not value.size:
      return 1.0
    for user in self._users[at][name]:
      first, (base, _) = user.operands[0] == name and name not in user.operands[1:], self._update(at, user)
      if user.opcode in SLICES and first:
        share += user.size / value.size
      elif base == name and not self._in_place(at, user):
        return 1.0
      elif user.opcode in UPDATES and first:
        pass  # what is not updated stays where it is
      elif user.opcode in ELEMENTWISE or user.opcode == "reduce" and first or self._is_view(user):
        share += self._read_share(at, user.name)
      elif user.opcode == "fusion":
        share += sum(self._read_share(user.called, self._parameter(user.called, i))
                     for i, operand in enumerate(user.operands) if operand == name)
      else:
        return 1.0
    return min(share, 1.0)

  def _is_view(self, fusion):
    """Whether a fusion inside another one is but a copy of its only operand, in other tiles."""
    inside = self.computations[fusion.called].values() if fusion.opcode == "fusion" else ()
    return len(fusion.operands) == 1 and all(x.opcode == "parameter" or x.opcode in ELEMENTWISE for x in inside)

  def _written_share(self, at, name):
    """How much of a result of a fusion is written anew: 0 to 1."""
    value = self._origin(at, name, SAME)
    return min(self._update(at, value)[1] / value.size, 1.0) if self._in_place(at, value) else 1.0

  def _update(self, at, value):
    """(name of what it writes into, bytes that it writes) of an update, or of a fusion that is one; else (None, 0)."""
    if value.opcode in UPDATES:
      new = value.operands[1 if value.opcode == "dynamic-update-slice" else -1]
      return value.operands[0], self.computations[at][new].size
    if value.opcode == "fusion":
      inside, root = value.called, self._origin(value.called, self._root(value.called).name, SAME)
      if self._in_place(inside, root):
        base, size = self._update(inside, root)
        return value.operands[int(self._origin(inside, base, SAME).literal)], size
    return None, 0

  def _in_place(self, at, value):
    """Whether an update inside a fusion writes into what the fusion was given, and is a result of it, no more: of any
    other a whole new value is made."""
    base, _ = self._update(at, value)
    ends = lambda x: x.root or bool(users := self._users[at][x.name]) and all(
        user.root and user.opcode == "tuple" or user.opcode in SAME and ends(user) for user in users)
    return base is not None and self._origin(at, base, SAME).opcode == "parameter" and ends(value)

  # Collectives, flops

  def _exchanged(self, at, ins):
    """(kind, bytes in one run, channel) of the collective that an instruction is, or holds where it was fused."""
    opcode = ins.opcode.removesuffix("-start")
    if opcode in COLLECTIVES:
      operands = sum(self.computations[at][name].size for name in ins.operands)
      results = ins.results[len(ins.operands):] if ins.opcode == "all-gather-start" else ins.results[:len(ins.operands)]
      channel = re.search(r"channel_id=(\d+)", ins.attributes)
      return opcode, max(operands, sum(array.size for array in results)), channel and channel[1]
    inside = (self._exchanged(ins.called, x) for x in self.computations.get(ins.called, {}).values())
    return next((found for found in inside if found[0]), (None, 0, None))

  def _flops(self, at, ins):
    """Two per multiply-add of the products that it is or holds."""
    if ins.opcode in ("dot", "convolution"):
      operands = [self.computations[at][name].results[0].dims for name in ins.operands]
      count = dot_flops if ins.opcode == "dot" else convolution_flops
      return count(ins.attributes, *operands, ins.results[0].dims)
    if ins.opcode == "custom-call":
      estimate = re.search(r'"flops":\s*"?(\d+)', ins.attributes)
      return float(estimate[1]) if estimate else 0
    return sum(self._flops(ins.called, x) for x in self.computations.get(ins.called, {}).values())

  # Loops

  def _trips(self, at, loop):
    """How often a loop runs: as the compiler knows, or as its condition says."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    trips = int(known[1]) if known else self._counted(at, loop)
    if trips is None:
      self.unknown_loops.append(loop.name)
    return 1 if trips is None else trips

  def _counted(self, at, loop):
    """Runs of a loop whose counter goes up by a constant from a constant to below a constant; None for others."""
    condition, body = loop.attribute("condition"), loop.attribute("body")
    entries, results = self._origin(at, loop.operands[0]), self._root(body)
    test, sides = self._unwrapped(condition, self._root(condition).name)
    carried = lambda x: int(x.attribute("index")) if x.opcode == "get-tuple-element" else None
    if test.attribute("direction") != "LT" or len(sides) != 2 or not entries.opcode == results.opcode == "tuple":
      return None
    counter = carried(sides[0])
    if counter is None:
      return None
    first, bound = (self._start(at, entries, x) for x in sides)
    add, parts = self._unwrapped(body, results.operands[counter])
    steps = [integer(x.literal) for x in parts if x.opcode == "constant"]
    if None in (first, bound) or add.opcode != "add" or len(steps) != 1 or counter not in map(carried, parts):
      return None
    return max(-(-(bound - first) // steps[0]), 0) if steps[0] else None

  def _start(self, at, entries, value):
    """The constant that a value of a loop's condition is, or begins as."""
    if value.opcode == "get-tuple-element":
      value = self._origin(at, entries.operands[int(value.attribute("index"))])
    return integer(value.literal) if value.opcode == "constant" else None

  def _root(self, computation):
    return next(x for x in self.computations[computation].values() if x.root)

  def _origin(self, at, name, through=COPIES):
    """The instruction that made a value, before it was copied about, or seen otherwise."""
    value = self.computations[at][name]
    while value.opcode in through:
      value = self.computations[at][value.operands[0]]
    return value

  def _unwrapped(self, at, name):
    """(an instruction or, for a fusion, its last one, what made its operands outside)."""
    value = self._origin(at, name)
    outside = [self._origin(at, operand) for operand in value.operands]
    if value.opcode != "fusion":
      return value, outside
    root = self._origin(value.called, self._root(value.called).name)
    inside = [self._origin(value.called, operand) for operand in root.operands]
    return root, [outside[int(x.literal)] if x.opcode == "parameter" else x for x in inside]

  # Where it came from

  def _source(self, ins):
    frame, lines = re.search(r"stack_frame_id=(\d+)", ins.attributes), []
    key, numbers = int(frame[1]) if frame else 0, lambda row: dict(re.findall(r"(\w+)=(\d+)", row))
    while key in self._tables["StackFrames"]:
      fields = numbers(self._tables["StackFrames"][key])
      place = numbers(self._tables["FileLocations"][int(fields["file_location_id"])])
      lines.append((self._tables["FileNames"][int(place["file_name_id"])].strip('"'), int(place["line"])))
      # The text has parents one too high: it is 1 where there is none.
      key = min(int(fields["parent_frame_id"]), key) - 1
    return tuple(dict.fromkeys(lines))


def parse_line(line: str) -> Instruction | None:
  """The instruction that a line of a computation holds."""
  head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  begin = head.end()
  end = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
  opening = line.index("(", end)
  closing = _closing(line, opening)
  literal = line[opening + 1:closing]
  return Instruction(head[2], line[end:opening].strip(), parse_shape(line[begin:end]),
                     tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", literal)), literal, line[closing + 1:], bool(head[1]))


def parse_shape(text: str) -> tuple[Array, ...]:
  """The arrays of a shape, those of tuples one after another."""
  return tuple(Array(dtype, tuple(int(n.strip("<= ")) for n in dims.split(",") if n), layout or "")
               for dtype, dims, layout in ARRAY.findall(text))


def integer(literal: str) -> int | None:
  """The integer that a constant is."""
  return int(literal) if re.fullmatch(r"-?\d+", literal.strip()) else None


def _closing(line, opening):
  """The place of the parenthesis that closes one."""
  depth = 0
  for bracket in re.compile(r"[()]").finditer(line, opening):
    depth += 1 if bracket[0] == "(" else -1
    if not depth:
      return bracket.start()
  raise ValueError(f"a line of HLO does not close its parentheses: {line[:60].strip()}")


def dot_flops(attributes: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> int:
  """Flops of a dot: two per element of the result and of the contracted axes."""
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
  return 2 * math.prod(result) * math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)


def convolution_flops(attributes: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> int:
  """Flops of a convolution, which on a TPU every product is: batch axes of a dot are dilated spatial ones there, so
  places of the window that meet padding or holes do not count."""
  lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
  window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0][8:-1]))
  groups = {name: int(found[1]) if (found := re.search(rf"{name}=(\d+)", attributes)) else 1
            for name in ("feature_group_count", "batch_group_count")}
  count = left[lhs.index("f")] // groups["feature_group_count"] * result[out.index("f")] * (
      left[lhs.index("b")] // groups["batch_group_count"])
  for which in range(len(lhs) - 2):
    at = lambda name, default: window[name].split("x")[which] if name in window else default
    stride, hole, dilation = (int(at(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(str(at("pad", "0_0")).split("_")[0])
    digit = str(which)
    begin = np.arange(result[out.index(digit)]) * stride - low
    place = begin[:, None] + np.arange(right[rhs.index(digit)]) * dilation
    inside = (place >= 0) & (place <= (left[lhs.index(digit)] - 1) * hole) & (place % hole == 0)
    count *= int(inside.sum())
  return 2 * count
