"""infer.compile and train.compile; and the judge: what the TPU compiler makes of decoding and training, in bytes.

Programs are compiled for TPUs that are not there, at a small size with the proportions of Qwen3-8B: two of its layers,
a drafter of one, and as many words as go with that.
"""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from configs.qwen3_4b import config as qwen3_4b
from dspark_jax.decoding import executables
from dspark_jax.loading import target_config
from dspark_jax.nn.cache import row_shardings
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import compiled, compilers, shell
from dspark_jax.programs.compilers import absent_devices
from dspark_jax.targets import sizes
from dspark_jax.targets.decoder import TargetConfig
from dspark_jax.training.losses import LossConfig
from infer import compile as decoding
from infer import profile_sps
from train import compile as training
from train.train import drafter_config

TINY = TargetConfig("qwen3", BlockSpec(16, 32, 4, 2, 8, 1e-6, 1e4, qk_norm=True), 4, 200, False, 4096)
# q and o, k and v, the MLP, the norms of heads and rows
LAYER = 2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * 32 + 2 * 8 + 2 * 16
WORDS, PLACES = 200 * 16, 4 * 2 * 2 * 8  # a head, or an embedding; keys and values of a slot in four layers
TAPS = len(decoding.spread_taps(4))
SMALL = TargetConfig("qwen3", BlockSpec(4096, 12_288, 32, 8, 128, 1e-6, 1e6, qk_norm=True), 2, 8704, False, 40_960)


@pytest.fixture
def here(monkeypatch):
  """This machine's compiler in place of a TPU's, and a tiny model among the sizes."""
  monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: SimpleNamespace(devices=jax.devices()))
  monkeypatch.setitem(compilers.CHIPS, "cpu", compilers.Chip("cpu", 1e9, 1e9, 1e12))
  monkeypatch.setitem(sizes.MODELS, "tiny", TINY)


def run(program, settings, args, capsys, **how):
  """The JSON object that a program prints last."""
  shell.run(program.main, settings, args=args.split(), **how)
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_what_a_decode_step_cannot_but_move(here, capsys):
  """Kills: a floor without the head's second pass or with an embedding's; rows of the sequential head's table counted
  as the table, its projection counted once for a block; caches of the target alone; an argument that is given twice."""
  args = "--model tiny --batch 2 --capacity 64 --block-size 3 --draft-layers 2"
  programs = run(decoding, decoding.Settings, args, capsys)["programs"]
  target, cache, context = 4 * LAYER + 16 + WORDS, 2 * 64 * PLACES, 2 * 64 * PLACES // 2
  fc, w2 = 16 * 16 * TAPS + 16, 200 * 256
  drafter = 2 * LAYER + 16 + (16 + 256 + 1)
  absorbed = 2 * (2 * 16 * 16 + 8)
  rows = lambda tokens, layers: 2 * tokens * PLACES * layers // 4
  floors = {"plain": target + cache + rows(1, 4), "draft": drafter + 3 * w2 + WORDS + context,
            "verify": target + cache + rows(4, 6) + fc + absorbed}
  floors["round"] = floors["draft"] + floors["verify"] - absorbed
  assert {name: row["floor_bytes"] for name, row in programs.items()} == {
      name: 2 * count for name, count in floors.items()}  # of bfloat16
  weights = target + WORDS
  assert programs["plain"]["argument_bytes"] == pytest.approx(2 * (weights + cache), rel=0.02)
  assert programs["round"]["argument_bytes"] == pytest.approx(
      2 * (weights + cache + context + drafter + fc + 2 * w2), rel=0.02)
  for row in programs.values():
    assert row["fits"] and row["bytes"] > 0 and row["over_floor"] == row["bytes"] / row["floor_bytes"]
    assert row["peak_bytes"] >= row["argument_bytes"] + row["temporary_bytes"] and row["unknown_loops"] == []
    assert len(row["most"]) == 5 and row["predicted_seconds"] > 0 and row["collectives"] == {}


@pytest.mark.slow
def test_a_mesh_divides_what_a_device_holds(here, capsys):
  """Kills: arguments, floors and work of all devices; caches that every device has whole; a mesh that moves nothing."""
  args = "--model tiny --batch 4 --capacity 64 --programs plain"
  alone = run(decoding, decoding.Settings, args, capsys)
  spread = run(decoding, decoding.Settings, args + " --mesh.data 4 --mesh.tensor 2", capsys)
  assert (alone["devices"], spread["devices"]) == (1, 8)
  one, many = alone["programs"]["plain"], spread["programs"]["plain"]
  assert many["useful_flops"] == one["useful_flops"] / 8
  # of the rows' caches an eighth, of the weights a half
  assert one["floor_bytes"] / 8 < many["floor_bytes"] < 0.51 * one["floor_bytes"]
  assert many["argument_bytes"] < 0.55 * one["argument_bytes"]
  assert many["collectives"]["all-reduce"] > 0


@pytest.mark.slow
def test_what_a_training_step_cannot_but_move(here, capsys, monkeypatch):
  """Kills: a state that is read and never written, frozen weights written, a target that is fetched from the hub; flags
  that do not reach the step; useful flops of the whole mesh."""
  monkeypatch.setitem(sizes.MODELS, "qwen3-4b", TINY)  # what Qwen/Qwen3-4B is taken for
  drafter = dataclasses.replace(qwen3_4b.drafter, taps=(0, 2), mask_token_id=199, num_layers=1, markov_rank=4)
  config = dataclasses.replace(qwen3_4b, drafter=drafter, row_length=64, batch=2, microbatches=1, anchors=4)
  default = lambda: training.CompileConfig(**{field.name: getattr(config, field.name)
                                              for field in dataclasses.fields(config)})
  told = run(training, training.CompileConfig, "--microbatches 2", capsys, default=default)
  row = told["step"]
  assert all(told[name] == row[name] > 0 for name in ("useful_flops", "compiled_flops"))
  trained = LAYER + 2 * 16 * 16 + 2 * 16 + 2 * 200 * 4 + (16 + 4 + 1)
  read = 4 * LAYER + 16 + WORDS  # the head; of the embedding rows
  assert row["floor_bytes"] == pytest.approx(2 * 2 * read + 2 * 3 * 4 * trained, rel=0.01)
  assert row["argument_bytes"] == pytest.approx(2 * (read + WORDS) + 3 * 4 * trained, rel=0.05)
  spread = run(training, training.CompileConfig, "--mesh.fsdp 2", capsys, default=default)
  assert spread["devices"] == 2 and spread["step"]["useful_flops"] == row["useful_flops"] / 2
  assert spread["step"]["floor_bytes"] < 0.55 * row["floor_bytes"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_target_of_a_training_step(tied):
  """Kills: a floor above what a step moves, with the whole of an embedding of which rows are read; one without the head
  where they are the same."""
  config, about = SHORT, dataclasses.replace(TINY, tie_word_embeddings=tied)
  with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
    state, target, _ = training.arguments(config, about, drafter_config(config.drafter, about))
  for microbatches in (1, 3):
    found = training.floor(dataclasses.replace(config, microbatches=microbatches), state, target)
    assert found == microbatches * 2 * (4 * LAYER + 16 + WORDS) + 2 * compiled.size(state)


def test_what_a_run_costs():
  """Kills: hours of one device for a mesh, of a microbatch for a step, of epochs whose rows nobody knows."""
  config = training.resolved("configs/qwen3_4b.py")
  of = lambda **how: training.costs(dataclasses.replace(config, **how), 90.0, 16, 989e12)
  assert of()["steps"] is of()["device_hours"] is None and of()["step_seconds"] == 90
  assert of()["device_hours_per_billion_tokens"] == pytest.approx(16 * 90 / 3600 * 1e9 / (512 * 4096))
  assert of()["roofline_hours"]["h100"] == pytest.approx(of()["device_hours_per_billion_tokens"] / 90)
  assert (of(rows=51_200)["steps"], of(rows=51_200)["device_hours"]) == (1000, 400)
  assert of(rows=51_200, steps=10)["device_hours"] == of(steps=10)["device_hours"] == 4


@pytest.mark.parametrize("args, sentence", [
    ("--model tiny --batch 0", "batch is 0, expected at least 1"),
    ("--model tiny --capacity 63", "capacity is 63, expected at least 64"),
    ("--model tiny --capacity 71 --block-size 70", "capacity is 71, expected at least 72"),
    ("--model tiny --capacity 4161", "capacity is 4161, expected at most 4160: tiny has 4096 positions"),
    ("--model qwen3-5b", "qwen3-5b is not here, and is no size that is known: give one of qwen3-4b, qwen3-8b"),
    ("--model tiny --mesh.tensor 16", "there are 8 devices"),
    ("--model tiny --programs", "there are no programs")])
def test_settings_are_refused_before_anything_is_compiled(args, sentence, here, capsys, monkeypatch):
  """Kills: a traceback, and a mistake that is found after minutes."""
  monkeypatch.setattr(compiled, "read", lambda lowered: pytest.fail("compiled"))
  with pytest.raises(SystemExit) as exit_:
    shell.run(decoding.main, decoding.Settings, args=args.split())
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and sentence in err.replace("\n", " ") and "Traceback" not in err


@pytest.mark.parametrize("words, said", [
    ("--batch 4 --microbatches 1 --mesh.fsdp 8", "batch is 4, expected a multiple of 8"),
    ("--row-length 50000", "row_length is 50000, expected at most the target's 40960 positions")])
def test_rows_that_devices_cannot_share_are_refused(words, said, here, capsys, monkeypatch):
  """Kills: numbers of a step whose devices all run all rows, under the name of one that divides them; or of rows that
  the target has no positions for."""
  monkeypatch.setattr(training, "arguments", lambda *_: pytest.fail("begun"))
  with pytest.raises(SystemExit) as exit_:
    shell.run(training.main, training.CompileConfig, default=lambda: training.resolved("configs/qwen3_4b.py"),
              args=words.split(), mesh=False)
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize("scanned", [False, True])
def test_layers_lie_as_training_has_them(scanned, monkeypatch):
  """Kills: layers that are stacked for a machine on which train.train leaves them unrolled."""
  monkeypatch.setattr(training, "scans", lambda platform: platform == ("cpu" if scanned else "tpu"))
  with jax.set_mesh(MeshConfig().build()):
    target = training.arguments(SHORT, TINY, drafter_config(SHORT.drafter, TINY))[1]
  assert target.scanned == scanned


@pytest.mark.parametrize("topology, sentence", [
    ("v9z:1", "no TPU compiler for v9z:1 (no such thing): run `make tpu-compiler`"),
    ("h100:2", "no GPU compiler for h100:2 (no such thing): run `make gpu-compiler`")])
def test_a_topology_that_is_not_there(topology, sentence, monkeypatch, capsys):
  """Kills: a traceback where a compiler is missing or knows no such topology."""
  def none(**_):
    raise RuntimeError("no such thing")
  monkeypatch.setattr(topologies, "get_topology_desc", none)
  with pytest.raises(SystemExit) as exit_:
    shell.run(decoding.main, decoding.Settings, args=f"--model qwen3-8b --topology {topology}".split())
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and sentence in err.replace("\n", " ") and "Traceback" not in err


def test_targets_by_their_published_sizes(tmp_path):
  """Kills: sizes with another number of weights than their names say; an id that is looked up by its owner; a
  config.json that is taken for a folder of weights."""
  # By their model cards 4.0, 8.2 and 14.8.
  billions = {"qwen3-4b": 4.02, "Qwen/Qwen3-8B": 8.19, "someone/qwen3-14b": 14.77}
  for name, wanted in billions.items():
    config = target_config(name)
    spec = config.spec
    heads = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    layer = spec.hidden_size * (heads + 3 * spec.intermediate_size)
    words = config.vocab_size * spec.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert round((config.num_layers * layer + words) / 1e9, 2) == wanted
    assert spec.flops(0) == 2 * layer and spec.flops(10) - spec.flops(0) == 4 * spec.num_heads * spec.head_dim * 10
  published = dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                   num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6,
                   rope_theta=1000000, tie_word_embeddings=False, max_position_embeddings=40960)
  (tmp_path / "config.json").write_text(json.dumps(published))
  assert target_config(tmp_path / "config.json") == target_config(tmp_path) == target_config("qwen3-8b")
  assert decoding.spread_taps(36) == (1, 9, 17, 25, 33) and decoding.spread_taps(2) == (0,)


def test_a_program_that_the_compiler_refused_does_not_fit():
  """Kills: a program said to fit by what its compiler, which refused it, rounded to two decimals."""
  class Lowered:
    def compile(self, compiler_options):
      (Path(compiler_options["xla_dump_to"]) / "m_after_optimizations.txt").write_text(
          "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
          "  ROOT %n = f32[8]{0} negate(%p)\n}\n")
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: HLO temporaries (15.75G) exceeds available HBM (15.75G)")

  chip = compilers.CHIPS["TPU v5 lite"]
  assert compiled.summary(compiled.read(Lowered()), chip, floor_bytes=1, useful_flops=1)["fits"] is False


@pytest.mark.slow
@pytest.mark.skipif(not compilers.PLUGIN.exists(), reason="needs `make gpu-compiler`")
@pytest.mark.parametrize("program, most", [("plain", 1.1), ("round", 1.5)])
def test_a_gpu_reads_what_it_has_where_it_lies(program, most):
  """Kills: layers that are sliced from a stack, scores of all slots that go to the main memory and back."""
  found, floor = judged(program, 8, 2048, "greedy", "h100:1")
  assert compilers.chip_of(absent_devices("h100:1")[0]).name == "h100"
  assert floor <= moved(found) <= most * floor


@functools.cache
def judged(program, batch, capacity, sampling, topology="v5p:2x2x1", mesh=MeshConfig(), words=SMALL.vocab_size):
  """(what a compiler makes of a decode program at the small size, bytes that it cannot but move)"""
  settings = decoding.Settings("", topology, batch, capacity, sampling, draft_layers=1, mesh=mesh)
  devices = absent_devices(topology)
  with jax.set_mesh(mesh.build(devices)):
    served = decoding.Served.of(settings, dataclasses.replace(SMALL, vocab_size=words), devices[0].platform)
    return compiled.read(decoding.lower(program, served)), decoding.floors(served)[program]


SHORT = dataclasses.replace(qwen3_4b, batch=1, microbatches=1, drafter=dataclasses.replace(
    qwen3_4b.drafter, taps=(0,), mask_token_id=0, num_layers=1))


def step(config, heads, words):
  """(what a v5p's compiler makes of a training step for a target of two narrow layers, the drafter's weights)"""
  spec = dataclasses.replace(SMALL.spec, hidden_size=1024, intermediate_size=2048, num_heads=heads)
  target = dataclasses.replace(SMALL, spec=spec, vocab_size=words)
  with jax.set_mesh(MeshConfig().build(absent_devices("v5p:2x2x1"))):
    args = training.arguments(config, target, drafter_config(config.drafter, target))
    return compiled.read(training.lower(config, *args)), args[0].drafter


def moved(found):
  return sum(operation.bytes for operation in found.operations)


def cache_copies(found, batch, capacity, devices=1):
  """The operations that move a layer's keys of all rows, or more, from the main memory to itself."""
  layer = 2 * batch * SMALL.spec.num_kv_heads * capacity * SMALL.spec.head_dim / devices
  return [op for op in found.operations if op.opcode in ("copy", "copy-start", "reshape", "transpose", "while")
          and min(op.read, op.written) >= layer * op.times]


def scatters(found):
  return [x for computation in found.module.computations.values() for x in computation.values()
          if x.opcode == "scatter"]


class TestJudge:
  """What a change may not make of the programs that serve and train."""
  pytestmark = pytest.mark.tpu_compiler

  @pytest.mark.parametrize("batch, sampling", [(1, "greedy"), (8, "greedy"), (1, "full"), (8, "truncated")])
  @pytest.mark.parametrize("capacity", [2048, 2240])
  def test_a_round_moves_little_more_than_it_must(self, batch, capacity, sampling):
    """Kills: caches that are copied, laid out anew or written element by element in a round (2,240 slots are no
    multiple of a tile, where layouts change), weights read twice, scores or logits that go to the main memory and back
    many times."""
    found, floor = judged("round", batch, capacity, sampling)
    assert 0.97 * floor <= moved(found) <= 1.2 * floor  # less: the sequential head's table may stay on the chip
    assert cache_copies(found, batch, capacity) == [] and scatters(found) == []
    # Of unknown length are the searches for cuts that lie below the candidates: one of the draft, one of verification.
    assert len(found.module.unknown_loops) == (2 if sampling == "truncated" else 0)

  @pytest.mark.parametrize("batch, capacity, topology", [
    (1, 2048, "v5p:2x2x1"), (8, 2240, "v5p:2x2x1"), (32, 2048, "v5p:2x2x1"), (8, 2048, "v5e:2x2")])
  def test_a_plain_step_moves_little_more_than_it_must(self, batch, capacity, topology):
    """Kills: what one new row per request is written by: scattered windows one slot long copy the stack."""
    found, floor = judged("plain", batch, capacity, "greedy", topology)
    assert floor <= moved(found) <= 1.2 * floor
    assert cache_copies(found, batch, capacity) == [] and scatters(found) == []

  @pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:1x1"])
  def test_top_k_and_top_p_cost_little(self, topology):
    """Kills: two bisections over the whole vocabulary for every draft position and every verified one."""
    # A round of Qwen3-8B takes 29 (v6e) and 33 (v5p) million cycles at temperature 1.
    truncated, full = (sum(op.cycles for op in judged("round", 8, 2048, how, topology, words=151_936)[0].operations)
                       for how in ("truncated", "full"))
    assert full < truncated < full + 0.3 * 29e6

  def test_devices_that_share_rows_and_heads_write_in_place(self):
    """Kills: rows of a batch written one after another through a cache that devices share, and what they exchange."""
    found, floor = judged("plain", 8, 2048, "greedy", mesh=MeshConfig(2, 1, 2))
    assert floor <= moved(found) <= 1.2 * floor and cache_copies(found, 8, 2048, devices=4) == []
    assert {op.collective for op in found.operations if op.collective} == {"all-reduce"}

  def test_an_engine_keeps_its_caches_where_they_are(self):
    """In all its programs, packed rounds, chunks of prompts and copied beginnings among them. Kills: rows that are not
    donated; new rows as a scatter of windows, for which a plain step lays the keys out anew, beside a chunk or not."""
    seats, capacity, topology = 8, 2048, "v5e:2x2"
    # Narrow layers with the key heads of wide ones: caches are large beside all else.
    spec = dataclasses.replace(SMALL.spec, hidden_size=1024, intermediate_size=3072, num_heads=16)
    settings = decoding.Settings("", topology, seats, capacity, draft_layers=1)
    devices = absent_devices(topology)
    with jax.set_mesh(MeshConfig().build(devices)):
      models = profile_sps.heads_of(decoding.Served.of(settings, dataclasses.replace(SMALL, spec=spec),
                                                       devices[0].platform))
      rows = jax.eval_shape(lambda models: executables.new_rows(models, seats, capacity, "greedy"), models)
      rows = compiled.on(rows, row_shardings(rows))
      programs = dict(executables.lowered(models, rows, policy="scheduled", survival="estimator", buckets=(24,),
                                          chunk=64, log_probs=False))
      assert {"24", "plain+chunk", "full+chunk", "copy"} <= programs.keys()
      del programs["draft"]  # gives no cache back
      for name, program in programs.items():
        memory = program.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= compiled.size((rows.cache, rows.draft)), name
        # Half of a copy of the target's keys, a third of the caches; it is 1 % of them.
        assert memory.temp_size_in_bytes < compiled.size(rows.cache.layers[0].k) / 2, name

  def test_words_stay_where_they_are(self):
    """Kills: logits of all words on every device of a tensor mesh, or of another row's."""
    # As many words as the models have: of a few thousand the compiler would rather exchange rows for words.
    batch, words = 8, 151_936
    found, _ = judged("round", batch, 2048, "truncated", mesh=MeshConfig(tensor=4), words=words)
    exchanged = [op for op in found.operations if op.collective]
    logits = 4 * batch * words / 4  # of one position of a device's own words
    assert exchanged and not [op for op in exchanged
                              if op.collective != "all-reduce" and op.exchanged / op.times >= logits]
    assert not [op for op in exchanged if str(words) in op.shape or str(words // 4) in op.shape]
    assert cache_copies(found, batch, 2048, devices=4) == []

  def test_a_training_step_needs_no_more_than_a_few_chunks(self):
    """Kills: logits of all draft positions at a time."""
    config, words = dataclasses.replace(SHORT, row_length=1024, anchors=128, loss=LossConfig(chunk=256)), 32_768
    found, trained = step(config, heads=8, words=words)
    logits = 4 * config.loss.chunk * words
    # A chunk's logits of draft and target, and their gradients. With the logits of all 896 positions it takes 9 more.
    assert config.anchors * config.drafter.block_size > 3 * config.loss.chunk
    assert found.temporaries <= compiled.size(trained) + 5 * logits

  def test_a_step_of_many_heads_compiles(self):
    """Kills: splash without its barriers: where a step fuses its own operations with those of blocks' own tokens, the
    compiler of a v5p ends with "split of a padded window dim is not supported", not at every size."""
    config = dataclasses.replace(SHORT, row_length=4096, anchors=512, loss=LossConfig(chunk=512))
    found, _ = step(config, heads=32, words=8192)
    assert [op for op in found.operations if op.opcode == "custom-call"]  # by splash at all
