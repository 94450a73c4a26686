"""The cost of the sequential head: of whole rounds that differ in nothing else, and counted in full."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax import sampling as sp
from dspark_jax.config import to_json
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.targets.decoder import Decoder, TargetConfig
from infer import head_cost, plots
from folders import QWEN3, called, qwen3

TINY = TargetConfig("qwen3", BlockSpec(16, 32, 2, 1, 8, 1e-6, 1e4, qk_norm=True), 4, 200, False, 4096)
SETTINGS = head_cost.Settings("tiny", None, layers=1, rank=4)
MEASURED = {"device", "block_size", "percent", "percent_quartiles", "round_seconds", "round_seconds_without",
            "head_seconds_alone", "percent_alone"}
COUNTED = {"device", "block_size", "percent", "round_bytes", "compiler", "percent_bytes_reported", "percent_flops",
           "round_bytes_reported", "round_flops"}


def test_percent_is_of_the_round_that_has_the_head():
  """Kills: percent of the round without it, or of the head's own time."""
  assert head_cost.percent(4.0, 3.0) == 25.0


def test_calls_take_turns():
  """Kills: all repeats of one call before the other's, where a slow minute falls on one alone; a counted warm-up."""
  order = []
  calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
  seconds = head_cost.interleaved(calls, 4)
  assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
  assert len(order) == 10 and order[2:] == ["a", "b", "b", "a"] * 2


def test_drafters_differ_in_the_head_alone():
  """Kills: a confidence head that is paid for by one of the two; other taps, layers or words."""
  one, other = (head_cost.drafter_config(head_cost.QWEN3_8B, SETTINGS, 8, rank) for rank in (256, 0))
  assert dataclasses.replace(one, markov_rank=0) == other and one.confidence == "none"
  assert one.taps == (1, 9, 17, 25, 33) and one.words == 151_936
  for layers in (head_cost.FEW, head_cost.FEW + 1):
    shallow = dataclasses.replace(head_cost.QWEN3_8B, num_layers=layers)
    assert len(set(head_cost.drafter_config(shallow, SETTINGS, 8, 0).taps)) == 5


def test_slots_draw_the_same_blocks():
  """Kills: slots that do not see the token before them, or see the wrong hidden state."""
  target = qwen3()
  drafter = DSpark(head_cost.drafter_config(target.config, SETTINGS, 4, 8), rngs=nnx.Rngs(3))
  drafter.markov_head.markov_w2.weight.set_value(500 * drafter.markov_head.markov_w2.weight[...])  # so that it decides

  def propose(drafter, anchor, keys, sampling, kind):
    return kind.propose(drafter, target, drafter.head(target), drafter.init_state(target, 2, 64), anchor, keys,
                        sampling)

  args = jnp.asarray([3, 70], jnp.int32), jax.vmap(jax.random.key)(jnp.arange(2)), sp.make_sampling(0.0)
  looped, unrolled = (jax.jit(propose, static_argnums=4)(drafter, *args, kind) for kind in (DSpark, head_cost.Unrolled))
  np.testing.assert_array_equal(looped.tokens, unrolled.tokens)
  np.testing.assert_allclose(looped.logits, unrolled.logits, rtol=1e-4, atol=1e-4)
  assert looped.confidence.shape == unrolled.confidence.shape and len(np.unique(looped.tokens)) > 2


@pytest.mark.thorough
def test_layers_are_counted_each(monkeypatch):
  """Kills: bodies of loops counted once, for layers or for slots; layers added together with the head."""
  monkeypatch.setattr(head_cost, "CONTEXT", 128)
  monkeypatch.setattr(head_cost, "FEW", 2)
  row, whole = head_cost.counted(SETTINGS, None, 2, TINY), head_cost.round_cost(SETTINGS, TINY, 2, 4, None)
  assert row.round_bytes_reported == pytest.approx(whole["bytes"], rel=0.02) and 0 < row.percent < 100
  multiply_adds = 2 * TINY.vocab_size * 4  # W2 . latent in both slots
  assert row.percent_flops * whole["flops"] / 100 >= 2 * multiply_adds
  assert row.round_flops == pytest.approx(whole["flops"], rel=0.02) and row.block_size == 2
  assert set(to_json(row)) == COUNTED


def test_bytes_that_must_be_read():
  """Kills: an embedding table read whole, a projection read once per block, a head read once, float32 weights."""
  target = dataclasses.replace(head_cost.QWEN3_8B, num_layers=2)
  model = jax.eval_shape(lambda: Decoder(target, rngs=nnx.Rngs(0)))
  drafter = lambda block, rank: jax.eval_shape(
      lambda: DSpark(head_cost.drafter_config(target, SETTINGS, block, rank), rngs=nnx.Rngs(0)))
  without, eight, nine = (head_cost.must_read(model, drafter(block, rank), 1, head_cost.CONTEXT)
                          for block, rank in ((8, 0), (8, 256), (9, 256)))
  assert nine - eight == 2 * 151_936 * 256 and eight - without == 8 * (nine - eight)
  layer = 4096 * (3 * 12_288 + 2 * 4096 + 2 * 1024) + 2 * 4096 + 2 * 128
  caches = 3 * 2 * head_cost.CONTEXT * 1024  # two layers and one draft layer
  assert without == 2 * (3 * layer + 2 * 151_936 * 4096 + 5 * 4096 ** 2 + 3 * 4096 + caches)
  # A plain step has one head to read, and the caches of all its rows.
  plain, rows = (head_cost.must_read(model, None, n, head_cost.CONTEXT) for n in (1, 3))
  assert plain == 2 * (2 * layer + 151_936 * 4096 + 4096 + caches * 2 // 3) and rows - plain == 2 * caches * 4 // 3


@pytest.mark.thorough
def test_program(capsys, tmp_path):
  """Kills: a file that infer.plots cannot draw, a block measured twice, a percentage of something else than rounds."""
  out = tmp_path / "new" / "head_cost.json"
  result, _ = called(capsys, head_cost.main, head_cost.Settings, "--target", QWEN3, "--out", out, "--blocks", 2, 2,
                     "--layers", 1, "--rank", 4,
                     "--repeats", 2, "--rounds", 2)
  assert json.loads(out.read_text()) == result and [p.name for p in out.parent.iterdir()] == [out.name]
  rows = result["head_cost"]
  assert [r["block_size"] for r in rows] == [2]
  for r in rows:
    assert r["percent"] == pytest.approx(head_cost.percent(r["round_seconds"], r["round_seconds_without"]))
    assert r["percent_quartiles"][0] <= r["percent_quartiles"][1] and str(QWEN3.parent) not in r["device"]
  assert [set(r) for r in rows] == [MEASURED]
  results, costs = plots.read([out])
  assert results == [] and [to_json(cost) for cost in costs] == rows


@pytest.mark.parametrize("flag, value, part", [
    ("--target", "/nowhere", "target /nowhere does not exist"), ("--repeats", "0", "repeats: expected at least 1"),
    ("--blocks", "0", "blocks: expected at least 1"), ("--compiler", "v9", "v9")])
def test_mistakes(flag, value, part, capsys, tmp_path):
  """Kills: a traceback for a typo; a file left behind by a run that failed."""
  args = {"--target": QWEN3, "--out": tmp_path / "cost.json"} | {flag: value}
  _, err = called(capsys, head_cost.main, head_cost.Settings, *sum(args.items(), ()), code=2)
  assert part in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_no_compiler(capsys, monkeypatch, tmp_path):
  """Kills: minutes of measuring before the missing compiler is found out; advice that does not name the remedy."""
  monkeypatch.setitem(head_cost.TOPOLOGIES, "v5e", "no such topology")
  _, err = called(capsys, head_cost.main, head_cost.Settings, "--target", QWEN3, "--out", tmp_path / "cost.json",
                  "--compiler", "v5e", code=2)
  assert "no TPU compiler for no such topology" in err and "make tpu-compiler" in err
