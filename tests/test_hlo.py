"""programs/hlo.py on hand-made programs whose bytes, flops and runs can be counted on fingers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.programs import hlo

TILED = "{1,0:T(8,128)}"


def program(body: str, others: str = "") -> str:
  """A module with these computations, and a body of the entry; a line is an instruction."""
  lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
  return f"HloModule made_by_hand, is_scheduled=true\n\n{others}\nENTRY %main (p: f32[]) -> f32[] {{\n{lines}\n}}\n"


def computation(name: str, body: str) -> str:
  lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
  return f"%{name} (p: f32[]) -> f32[] {{\n{lines}\n}}\n\n"


def read(text: str) -> dict[str, hlo.Operation]:
  return {operation.name: operation for operation in hlo.Module(text).operations()}


@pytest.mark.parametrize("shape, size", [
    ("f32[8,128]{1,0:T(8,128)}", 4096), ("f32[3,130]{1,0:T(8,128)}", 8 * 256 * 4), ("f32[3,130]{1,0}", 3 * 130 * 4),
    ("bf16[5,3,16]{2,1,0:T(8,128)(2,1)}", 5 * 8 * 128 * 2), ("bf16[5,3,16]{0,1,2:T(4,128)(2,1)}", 128 * 4 * 16 * 2),
    ("s4[256]{0}", 128), ("pred[]", 1), ("(f32[4]{0}, /*index=1*/(s8[3]{0}, token[]))", 19)])
def test_arrays_are_as_large_as_they_lie(shape, size):
  """Kills: sizes without padding, or padded along the wrong axes of a layout; a tuple's first array alone."""
  assert sum(array.size for array in hlo.parse_shape(shape)) == size


def test_a_type_that_is_not_known_is_refused():
  """Kills: an array that is counted as nothing, or as four bytes an element."""
  with pytest.raises(ValueError, match="array of f5e1"):
    read(program("%p = f5e1[8]{0} parameter(0)\nROOT %a = f5e1[8]{0} add(%p, %p)"))
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.Module("module @jit_f { func.func public @main() }")


def test_memory_on_the_chip_costs_nothing_where_it_is_used():
  """Kills: S(1) counted like main memory; a copy between the two counted twice, or not at all; the end of a copy."""
  ops = read(program(f"""
    %p = f32[8,128]{TILED} parameter(0)
    %there = (f32[8,128]{{1,0:T(8,128)S(1)}}, f32[8,128]{TILED}, u32[]{{:S(2)}}) copy-start(%p)
    %fetched = f32[8,128]{{1,0:T(8,128)S(1)}} copy-done(%there)
    %sum = f32[8,128]{{1,0:T(8,128)S(1)}} add(%fetched, %p)
    %back = (f32[8,128]{TILED}, f32[8,128]{{1,0:T(8,128)S(1)}}, u32[]{{:S(2)}}) copy-start(%sum)
    ROOT %out = f32[8,128]{TILED} copy-done(%back)"""))
  assert set(ops) == {"there", "sum", "back"}
  assert [(ops[name].read, ops[name].written) for name in ("there", "sum", "back")] == [(4096, 0), (4096, 0), (0, 4096)]


def test_what_the_last_run_fetched_is_fetched_once():
  """Kills: a weight that is fetched at the end of a run, for the next one, counted in both."""
  fetch = "(f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%p)"
  first = f"%first = {fetch}, cross_program_prefetch_index=0"
  ops = read(program(f"%p = f32[256]{{0}} parameter(0)\n{first}\nROOT %last = {fetch}"))
  assert (ops["first"].bytes, ops["last"].bytes) == (0, 1024)
  assert read(program(f"%p = f32[256]{{0}} parameter(0)\nROOT {first}"))["first"].bytes == 1024


LOOP = """
  %z = s32[] constant({first})
  %n = s32[] constant({bound})
  %x = f32[256]{{0}} parameter(0)
  %t = (s32[], f32[256]{{0}}, s32[]) tuple(%z, %x, %n)
  %loop = (s32[], f32[256]{{0}}, s32[]) while(%t), condition=%{name}_test, body=%{name}_body{known}
  ROOT %out = f32[256]{{0}} get-tuple-element(%loop), index=1"""
STATE = "%s = (s32[], f32[256]{0}, s32[]) parameter(0)"
TESTS = {
    "constant": f"{STATE}\n%i = s32[] get-tuple-element(%s), index=0\n%b = s32[] constant(5)\n"
                "ROOT %t = pred[] compare(%i, %b), direction=LT",
    "carried": f"{STATE}\n%i = s32[] get-tuple-element(%s), index=0\n%b = s32[] get-tuple-element(%s), index=2\n"
               "ROOT %t = pred[] compare(%i, %b), direction=LT",
    "fused": f"{STATE}\n%i = s32[] get-tuple-element(%s), index=0\n"
             "ROOT %t = pred[] fusion(%i), kind=kLoop, calls=%below"}
BELOW = computation("below", "%a = s32[] parameter(0)\n%b = s32[] constant(5)\n"
                             "ROOT %t = pred[] compare(%a, %b), direction=LT")


def loop_body(inside: str, step: int = 1) -> str:
  return f"""{STATE}
    %i = s32[] get-tuple-element(%s), index=0
    %x = f32[256]{{0}} get-tuple-element(%s), index=1
    %b = s32[] get-tuple-element(%s), index=2
    %one = s32[] constant({step})
    %far = s32[]{{:S(6)}} copy(%i)
    %next = s32[] add(%far, %one)
    {inside}
    ROOT %r = (s32[], f32[256]{{0}}, s32[]) tuple(%next, %y, %b)"""


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("first, step, runs", [(0, 1, 5), (1, 1, 4), (0, 2, 3)])
def test_loops_run_as_often_as_they_say(test, first, step, runs):
  """Kills: a body counted once, a loop that does not begin at 0 or counts by twos, a bound that is carried along."""
  others = BELOW + computation("l_test", TESTS[test]) + computation(
      "l_body", loop_body("%y = f32[256]{0} negate(%x)", step))
  module = hlo.Module(program(LOOP.format(first=first, bound=5, name="l", known=""), others))
  ops = {operation.name: operation for operation in module.operations()}
  assert ops["y"].times == runs and ops["y"].bytes == runs * 2048 and module.unknown_loops == []


@pytest.mark.parametrize("test", ["constant", "carried"])
def test_parts_of_tuples_that_are_named_by_their_place(test):
  """Kills: a loop of newer compilers' text (%t#0 for the first part of a tuple) that is counted once."""
  body = loop_body("%y = f32[256]{0} negate(%x)")
  others = computation("l_test", TESTS[test]) + computation("l_body", body)
  text = program(LOOP.format(first=0, bound=5, name="l", known=""), others)
  part = re.compile(r"^ *(ROOT )?%(\w+) = \S+ get-tuple-element\(%(\w+)\), index=(\d)$", re.M)
  computations = []
  for one in text.split("\n}"):
    for root, name, whole, index in part.findall(one):
      if not root:
        one = re.sub(rf"%{name}\b", f"%{whole}#{index}", re.sub(rf"(?m)^ *%{name} = .*\n", "", one))
    computations.append(one)
  ops = {operation.name: operation for operation in hlo.Module("\n}".join(computations)).operations()}
  assert "#" in "".join(computations) and ops["y"].times == 5


def test_nested_loops_multiply():
  """Kills: an inner loop counted once per run of the program; a known count that is looked for in the condition."""
  inner = LOOP.format(first=0, bound=3, name="inner", known=', backend_config={"known_trip_count":{"n":"7"}}')
  inner = inner.replace("%x = f32[256]{0} parameter(0)", "").replace("ROOT %out", "%y").replace("%z", "%zero")
  others = (computation("inner_test", TESTS["constant"]) + computation("inner_body", loop_body(
      "%y = f32[256]{0} negate(%x)")) + computation("l_test", TESTS["constant"])
      + computation("l_body", loop_body(inner)))
  ops = read(program(LOOP.format(first=0, bound=5, name="l", known=""), others))
  assert (ops["y"].times, ops["next"].times) == (35, 35)  # the inner ones


def test_a_loop_of_unknown_length_is_named():
  """Kills: a guess that nobody is told of, where data decide how often a loop runs."""
  others = computation("l_test", f"{STATE}\nROOT %t = pred[] custom-call(%s), custom_call_target=\"Ask\"") + (
      computation("l_body", loop_body("%y = f32[256]{0} negate(%x)")))
  module = hlo.Module(program(LOOP.format(first=0, bound=5, name="l", known=""), others))
  assert [op.times for op in module.operations() if op.name == "y"] == [1] and module.unknown_loops == ["loop"]


def test_fusions_read_slices_and_update_in_place():
  """Kills: a stacked weight read whole by every layer, also through a nested fusion; a cache that is rewritten for one
  row; an update found behind a bitcast but not in a tuple."""
  others = computation("take", """
    %a = bf16[36,64,128]{2,1,0} parameter(0)
    %i = s32[] parameter(1)
    %zero = s32[] constant(0)
    ROOT %s = bf16[1,64,128]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}""")
  others += computation("layer", """
    %w = bf16[36,64,128]{2,1,0} parameter(0)
    %i = s32[] parameter(1)
    %cache = bf16[4,512,128]{2,1,0} parameter(2)
    %new = bf16[1,2,128]{2,1,0} parameter(3)
    %zero = s32[] constant(0)
    %view = bf16[36,64,128]{2,1,0} bitcast(%w)
    %own = bf16[1,64,128]{2,1,0} fusion(%view, %i), kind=kLoop, calls=%take
    %flat = bf16[64,128]{1,0} bitcast(%own)
    %sum = f32[64,128]{1,0} convert(%flat)
    %put = bf16[4,512,128]{2,1,0} dynamic-update-slice(%cache, %new, %i, %zero, %zero)
    %same = bf16[2048,128]{1,0} bitcast(%put)
    ROOT %both = (f32[64,128]{1,0}, bf16[2048,128]{1,0}) tuple(%sum, %same)""")
  ops = read(program("""
    %w = bf16[36,64,128]{2,1,0} parameter(0)
    %i = s32[] parameter(1)
    %cache = bf16[4,512,128]{2,1,0} parameter(2)
    %new = bf16[1,2,128]{2,1,0} parameter(3)
    ROOT %f = (f32[64,128]{1,0}, bf16[2048,128]{1,0}) fusion(%w, %i, %cache, %new), calls=%layer""", others))
  part, row = 64 * 128 * 2, 2 * 128 * 2
  assert ops["f"].read == part + row + 4 and ops["f"].written == 2 * part + row  # the sum is float32


CACHE = """
  %cache = bf16[512,128]{1,0} parameter(0)
  %new = bf16[2,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
"""
UPDATE = "bf16[512,128]{1,0} dynamic-update-slice(%s, %%new, %%i, %%zero)"
WHOLE, PART = 512 * 128 * 2, 2 * 128 * 2


@pytest.mark.parametrize("base, end, moved", [
    ("%base = bf16[512,128]{1,0} bitcast(%cache)", "ROOT %r = bf16[128,512]{0,1} bitcast(%put)", (0, PART)),
    ("%base = bf16[512,128]{1,0} copy(%cache)", "ROOT %r = bf16[512,128]{1,0} bitcast(%put)", (WHOLE, WHOLE)),
    ("%base = bf16[512,128]{1,0} broadcast(%zero)", "ROOT %r = bf16[512,128]{1,0} bitcast(%put)", (0, WHOLE)),
    ("%base = bf16[512,128]{1,0} bitcast(%cache)", "ROOT %r = f32[512,128]{1,0} convert(%put)", (WHOLE, 2 * WHOLE)),
    ("%base = bf16[512,128]{1,0} bitcast(%cache)",
     "%sum = f32[128]{0} reduce(%put, %zero), dimensions={0}, to_apply=%add\n"
     "ROOT %r = (bf16[512,128]{1,0}, f32[128]{0}) tuple(%put, %sum)", (WHOLE, WHOLE + 512))])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_not_updated_in_place_is_made_whole(base, end, moved, nested):
  """Kills: a cache that is copied or converted on its way into an update, or out of it, and an update of nothing that
  is there, counted as the update alone; also where the update is a fusion inside the fusion."""
  others = computation("put_in", CACHE + "ROOT %p = " + UPDATE % "%cache")
  put = "bf16[512,128]{1,0} fusion(%base, %new, %i), kind=kLoop, calls=%put_in" if nested else UPDATE % "%base"
  others += computation("update", f"{CACHE}{base}\n%put = {put}\n{end}")
  shape = re.search(r"ROOT %r = (\(.*?\)|\S+) ", end)[1]
  ops = read(program(f"{CACHE}ROOT %f = {shape} fusion(%cache, %new, %i), kind=kLoop, calls=%update", others))
  assert (ops["f"].read, ops["f"].written) == (moved[0] + PART + 4, moved[1])


def test_a_copy_inside_a_fusion_is_no_copy():
  """Kills: a stack of weights that a TPU7x sees in other tiles, read whole by every layer."""
  others = computation("view", """
    %a = bf16[36,64,128]{2,1,0} parameter(0)
    ROOT %c = bf16[36,64,128]{2,1,0} copy(%a)""")
  others += computation("layer", """
    %w = bf16[36,64,128]{2,1,0} parameter(0)
    %i = s32[] parameter(1)
    %zero = s32[] constant(0)
    %tiles = bf16[36,64,128]{2,1,0} fusion(%w), kind=kLoop, calls=%view
    ROOT %s = bf16[1,64,128]{2,1,0:S(1)} dynamic-slice(%tiles, %i, %zero, %zero), dynamic_slice_sizes={1,64,128}""")
  ops = read(program("""
    %w = bf16[36,64,128]{2,1,0} parameter(0)
    %i = s32[] parameter(1)
    ROOT %f = bf16[1,64,128]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%layer""", others))
  assert ops["f"].read == 2 * 64 * 128 + 4


@pytest.mark.parametrize("last, read_terms", [
    ("%view = bf16[8,4,384]{2,1,0} bitcast(%half)\n"
     "ROOT %r = bf16[8,4,128]{2,1,0} slice(%view), slice={[0:8], [0:4], [256:384]}", 2 * 32 * 128),
    ("ROOT %r = bf16[384,32]{1,0} transpose(%half), dimensions={1,0}", 2 * 32 * 384)])
def test_of_a_sum_that_is_sliced_its_terms_are_read(last, read_terms):
  """Kills: the halves of a product of [q, k, v], which GPUs add up in each of what q, k and v go into, read whole by
  each; and halves of which a part is counted where all of the sum is asked for."""
  others = computation("slices", f"""
    %halves = f32[2,32,384]{{2,1,0}} parameter(0)
    %zero = f32[] constant(0)
    %sum = f32[32,384]{{1,0}} reduce(%halves, %zero), dimensions={{0}}, to_apply=%add
    %half = bf16[32,384]{{1,0}} convert(%sum)
    {last}""")
  shape = re.search(r"ROOT %r = (\S+) ", last)[1]
  ops = read(program(f"""
    %halves = f32[2,32,384]{{2,1,0}} parameter(0)
    ROOT %f = {shape} fusion(%halves), kind=kLoop, calls=%slices""", others))
  assert ops["f"].read == 4 * read_terms


def test_slices_and_updates_outside_fusions():
  """Kills: a slice or a gathered row that costs the whole array; one on its way to the chip; a scatter of elements."""
  ops = read(program("""
    %a = f32[1024,128]{1,0} parameter(0)
    %i = s32[2]{0} parameter(1)
    %u = f32[2,128]{1,0} parameter(2)
    %part = f32[4,128]{1,0} slice(%a), slice={[0:4], [0:128]}
    %begin = ((f32[1024,128]{1,0}), f32[4,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:128]}
    %end = f32[4,128]{1,0:S(1)} slice-done(%begin)
    %rows = f32[2,128]{1,0} gather(%a, %i), slice_sizes={1,128}
    ROOT %put = f32[1024,128]{1,0} scatter(%a, %i, %u), to_apply=%add"""))
  assert {name: (op.read, op.written) for name, op in ops.items()} == {
      "part": (2048, 2048), "begin": (2048, 0), "rows": (1024 + 8, 1024), "put": (1024 + 8, 1024)}


def test_of_a_conditional_the_larger_branch_counts():
  """Kills: both branches added up, none of them, or the first."""
  others = computation("few", "ROOT %a = f32[8]{0} parameter(0)") + computation(
      "many", "%p = f32[8]{0} parameter(0)\nROOT %b = f32[8]{0} negate(%p)")
  for named in ("branch_computations={%few, %many}", "true_computation=%few, false_computation=%many"):
    ops = read(program(f"%i = s32[] parameter(0)\n%x = f32[8]{{0}} parameter(1)\n"
                       f"ROOT %c = f32[8]{{0}} conditional(%i, %x, %x), {named}", others))
    assert list(ops) == ["b"] and ops["b"].bytes == 64


def test_a_collective_counts_as_often_as_it_runs():
  """Kills: one in a function that is called twice counted once; one that a branch, which is left out, takes from the
  operation that does run."""
  given = "%q = f32[256]{0} parameter(0)\n"
  others = computation("one", f"{given}ROOT %h = f32[1024]{{0}} all-gather(%q), channel_id=4, dimensions={{0}}")
  others += computation("more", f"{given}%n = f32[4096]{{0}} broadcast(%q)\nROOT %s = f32[1024]{{0}} slice(%n)")
  args = "%i = s32[] parameter(0)\n%x = f32[256]{0} parameter(1)\n"
  twice = "\n".join(f"{name} = f32[1024]{{0}} call(%x), to_apply=%one" for name in ("%a", "ROOT %b"))
  assert [op.exchanged for op in hlo.Module(program(args + twice, others)).operations()] == [4096, 4096]
  ops = read(program(f"{args}%c = f32[1024]{{0}} conditional(%i, %x, %x), branch_computations={{%one, %more}}\n"
                     "ROOT %f = f32[1024]{0} fusion(%x), kind=kCustom, calls=%one", others))
  assert {name: op.exchanged for name, op in ops.items() if op.collective} == {"f": 4096}


def test_kernels_move_what_their_author_says():
  """Kills: a kernel that is handed a stack of caches and is counted as if it read all of it; notes to the compiler that
  are counted as work; a kernel without an estimate that costs nothing."""
  call = '%{} = f32[256]{{0}} custom-call(%a), custom_call_target="{}", backend_config={{{}}}'
  estimate = '"custom_call_config": {"body": "", "cost_estimate": {"flops": 77, "bytes_accessed": 123}}'
  module = hlo.Module(program("\n".join([
      "%a = f32[1024]{0} parameter(0)", call.format("said", "tpu_custom_call", estimate),
      call.format("silent", "tpu_custom_call", ""), "ROOT " + call.format("note", "AllocateBuffer", "")])))
  ops = {operation.name: operation for operation in module.operations()}
  assert [(ops[name].bytes, ops[name].flops) for name in ("said", "silent", "note")] == [(123, 77), (5120, 0), (0, 0)]
  assert module.unknown_kernels == ["silent"]


def test_a_collective_beside_products_is_one():
  """Kills: a gather that is counted in each fusion that holds a piece of it, also inside a loop that it spans."""
  piece = "%q = f32[256]{0} parameter(0)\nROOT %h = f32[1024]{0} all-gather(%q), channel_id=4, dimensions={0}"
  others = "".join(computation(name, piece) for name in ("begin", "go_on", "end"))
  others += computation("l_test", TESTS["constant"]) + computation("l_body", loop_body(
      "%y = f32[256]{0} fusion(%x), kind=kCustom, calls=%go_on"))
  loop = LOOP.format(first=0, bound=5, name="l", known="").replace("ROOT ", "").replace(
      "%loop", "%s = f32[1024]{0} fusion(%x), kind=kCustom, calls=%begin\n  %loop", 1)
  ops = read(program(f"{loop}\n  ROOT %f = f32[1024]{{0}} fusion(%out), kind=kCustom, calls=%end", others))
  assert {name: (op.collective, op.exchanged) for name, op in ops.items() if op.collective} == {
      "s": ("all-gather", 4096)}


def test_collectives_have_kinds_and_bytes():
  """Kills: the end of a collective counted again, a gather counted by its small side, one that is hidden in a fusion,
  one in a loop counted once."""
  others = computation("l_test", TESTS["constant"]) + computation("l_body", loop_body(
      "%y = f32[256]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"))
  others += computation("hidden", "%q = f32[256]{0} parameter(0)\n"
                                  "ROOT %h = f32[64]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add")
  ops = read(program(LOOP.format(first=0, bound=5, name="l", known="").replace("ROOT ", "") + """
    %g = (f32[256]{0}, f32[1024]{0}) all-gather-start(%out), dimensions={0}
    %gd = f32[1024]{0} all-gather-done(%g)
    %p = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%out), source_target_pairs={{0,1}}
    %pd = f32[256]{0} collective-permute-done(%p)
    ROOT %f = f32[64]{0} fusion(%out), kind=kCustom, calls=%hidden""", others))
  assert {name: (op.collective, op.exchanged) for name, op in ops.items() if op.collective} == {
      "y": ("all-reduce", 5 * 1024), "g": ("all-gather", 4096), "p": ("collective-permute", 1024),
      "f": ("reduce-scatter", 1024)}


@pytest.mark.parametrize("attributes, left, right, result, flops", [
    ("dim_labels=bf_oi->bf", (56, 4096), (1024, 4096), (56, 1024), 2 * 56 * 4096 * 1024),
    # a TPU's dot with batch axes 8 and 8: queries [8,8,7,4,128] and keys [8,8,2048,128]
    ("window={size=8x8x1 stride=7x7x1 lhs_dilate=8x8x1}, dim_labels=0b12f_01oi2->01b2f", (8, 7, 8, 4, 128),
     (8, 8, 2048, 128, 1), (8, 8, 7, 4, 2048), 2 * 64 * 28 * 2048 * 128),
    # an image of 4 x 1 under a window of 3 with padding: 2 + 3 + 3 + 2 places meet it
    ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (1, 4, 1), (3, 1, 1), (1, 4, 1), 2 * 10)])
def test_flops_of_convolutions(attributes, left, right, result, flops):
  """Kills: flops of holes and padding (64 times too many in attention), output features taken for input features."""
  assert hlo.convolution_flops(attributes, left, right, result) == flops


def test_against_the_compiler_of_this_machine():
  """Kills: a format of XLA's text that is not the one that is read: products inside loops of a real program."""
  def f(w, x):
    return jax.lax.fori_loop(0, 6, lambda _, x: jnp.tanh(jnp.einsum("bij,bjk->bik", x, w)), x)
  args = jnp.zeros((3, 64, 64)), jnp.zeros((3, 32, 64))
  module = hlo.Module(jax.jit(f).lower(*args).compile().as_text())
  operations = module.operations()
  assert sum(op.flops for op in operations) == 6 * 2 * 3 * 32 * 64 * 64 and module.unknown_loops == []
  file, line = next(op.source[0] for op in operations if op.flops)
  assert file == __file__ and "jnp.einsum" in Path(file).read_text().splitlines()[line - 1]
