"""Weights placed as they are read, on meshes of eight fake devices; checkpoints that go from one mesh to another."""

import functools
import json
import os
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

import dspark_jax
from dspark_jax import loading
from dspark_jax.checkpoints import gguf, hf, state
from dspark_jax.checkpoints.tensors import Stored
from dspark_jax.data import chat
from dspark_jax.loading import drafter_id, target_id
from dspark_jax.nn.parameters import parameters, values
from dspark_jax.nn.sharding import MeshConfig, place, shardings
from dspark_jax.programs.shell import ONE_DEVICE
from dspark_jax.targets.decoder import stack_layers
from dspark_jax.training.step import StepConfig, init_state
from folders import DSPARK, QWEN3, assert_same_weights, called, complains, copied, files, qwen3, spoiled, with_tokenizer
from infer import convert
from test_gguf import model, write
from test_saving import flipped

MESHES = {"fsdp": MeshConfig(fsdp=8), "tensor": MeshConfig(tensor=4), "mixed": MeshConfig(2, 2, 2)}
CONFIG = dict(model_type="qwen3", hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
              num_key_value_heads=8, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, vocab_size=128,
              tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"])


def folder_of(folder: Path, dtype=np.float32, config=CONFIG) -> Path:
  """A Hugging Face folder of that configuration with numbers that tell their places in it."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  family = loading.TARGETS[config["model_type"]]
  shapes = parameters(nnx.eval_shape(lambda: family.build(family.config(config), rngs=nnx.Rngs(0))))
  number = lambda i, v: (np.arange(np.prod(v.shape), dtype="f4") % 251 / 64 + i).reshape(v.shape).astype(dtype)
  save_file({family.stored(name): number(i, v) for i, (name, v) in enumerate(shapes.items())},
            folder / "model.safetensors")
  return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return folder_of(tmp_path_factory.mktemp("sharded") / "hf")


@pytest.fixture(scope="module")
def orbax(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sharded") / "orbax"
  dspark_jax.import_target(source, folder)
  return folder


@functools.cache
def alone(source, **how):
  return dspark_jax.load_target(source, **how)


def reads(monkeypatch, kind):
  """(name, size) of every part that a mapping of this kind reads."""
  found, real = [], kind.__getitem__
  def recorded(self, name):
    tensor = real(self, name)
    def read(index):
      part = tensor.read(index)
      found.append((name, part.size))
      return part
    return Stored(tensor.shape, tensor.dtype, read)
  monkeypatch.setattr(kind, "__getitem__", recorded)
  return found


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_gets_its_part(mesh, scanned, source, monkeypatch):
  """Kills: a weight read whole, or whole on a device on its way; replicas that read it again; parts exchanged, or
  stacked in another order; a cast after placing, which has both dtypes at once."""
  found, put, real = reads(monkeypatch, hf.Tensors), [], jax.device_put
  monkeypatch.setattr(jax, "device_put", lambda x, device=None: (put.append((x.size, x.dtype)), real(x, device))[1])
  with jax.set_mesh(MESHES[mesh].build()):
    target = dspark_jax.load_target(source, dtype="bfloat16", scanned=scanned)
    where = parameters(shardings(target))
  monkeypatch.undo()
  assert {dtype for _, dtype in put} == {jnp.dtype("bfloat16")}
  stored = loading.TARGETS["qwen3"].stored
  names = loading.stored_stacked(target.config, stored) if scanned else stored
  for name, variable in parameters(target).items():
    array, parts = variable[...], np.asarray(names(name), object)
    assert array.sharding == where[name].get_raw_value() and array.dtype == jnp.bfloat16, name
    shard = int(np.prod(array.sharding.shard_shape(array.shape)))
    assert name.endswith("norm.weight") or shard < array.size, name
    for part in parts.flat:
      sizes = [size for n, size in found if n == part]
      assert set(sizes) == {shard // parts.size} and sum(sizes) == array.size // parts.size, name
  assert {size for size, _ in put} == {x[...].addressable_shards[0].data.size for x in parameters(target).values()}
  whole = alone(source, dtype="bfloat16")
  assert_same_weights(target, stack_layers(whole) if scanned else whole)


@pytest.mark.parametrize("mesh", [None, "mixed"])
def test_as_stored(mesh, tmp_path):
  """Kills: bfloat16 read as float32 or as raw bits; a stack of layers in another dtype than theirs."""
  folder = folder_of(tmp_path / "t", jnp.bfloat16)
  with MESHES.get(mesh, ONE_DEVICE).use():
    for scanned in (False, True):
      stored = dspark_jax.load_target(folder, dtype=None, scanned=scanned)
      assert {v.dtype for v in parameters(stored).values()} == {jnp.dtype("bfloat16")}
      assert_same_weights(stored, alone(folder, dtype="bfloat16", scanned=scanned))


@pytest.mark.parametrize("mesh", [None, "mixed"])
def test_quantised_tensors_are_decoded_once(mesh, tmp_path, monkeypatch):
  """Kills: a GGUF tensor dequantised for each device, or for each layer of a stack."""
  file = write(tmp_path / "m.gguf", model(True))
  wanted, decoded = dspark_jax.load_target(file, scanned=True), []
  real = gguf.gguf.dequantize
  monkeypatch.setattr(gguf.gguf, "dequantize", lambda *args: (decoded.append(1), real(*args))[1])
  with MESHES.get(mesh, ONE_DEVICE).use():
    assert_same_weights(dspark_jax.load_target(file, scanned=True), wanted)
  assert len(decoded) == len(gguf.read_gguf(file)[1])


def test_all_that_is_wrong_is_told_in_every_layout(tmp_path, monkeypatch):
  """Kills: a list that ends at a stack's first layer; gigabytes read before the first problem is told."""
  folder, told = copied(QWEN3, tmp_path / "t", tensors=spoiled("model.")), []
  def raise_all(what, problems):
    if what.startswith("target "):
      told.append(sorted(problems))
      raise ValueError(what)
  monkeypatch.setattr(hf, "raise_all", raise_all)
  found = reads(monkeypatch, hf.Tensors)
  for scanned, mesh in ((False, None), (True, None), (True, "fsdp")):
    with MESHES.get(mesh, ONE_DEVICE).use(), pytest.raises(ValueError):
      dspark_jax.load_target(folder, scanned=scanned)
  assert told[0] == told[1] == told[2] and len(told[0]) == 6 and not found


class Peak(threading.Thread):
  """The most memory of this process that no file backs, in bytes, while the block runs."""

  def __init__(self):
    super().__init__(daemon=True)
    self.done, self.first = threading.Event(), self.now()
    self.most = self.first

  @staticmethod
  def now():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

  def run(self):
    while not self.done.wait(0.002):
      self.most = max(self.most, self.now())

  def __enter__(self):
    self.start()
    return self

  def __exit__(self, *_):
    self.most = max(self.most, self.now())
    self.done.set()
    self.join()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """200 MB in bfloat16; the largest stacked parameter takes 50 of them."""
  config = CONFIG | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
                         head_dim=64, vocab_size=4096, tie_word_embeddings=True)
  return folder_of(tmp_path_factory.mktemp("large") / "hf", jnp.bfloat16, config)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("mesh", [None, "fsdp"])
@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_host_memory(kind, mesh, large, tmp_path):
  """Kills: the model read into host memory and then placed; unrolled layers that are stacked when all are loaded."""
  folder = large
  if kind == "orbax":
    if mesh is None:
      pytest.skip("the same code as on the mesh")
    dspark_jax.import_target(large, folder := tmp_path / "orbax")
  with MESHES.get(mesh, ONE_DEVICE).use(), Peak() as peak:
    target = dspark_jax.load_target(folder, dtype="bfloat16", scanned=True)
  sizes = [v[...].nbytes for v in parameters(target).values()]
  assert sum(sizes) > 200e6
  assert peak.most - peak.first < sum(sizes) + 1.25 * max(sizes)


# Orbax targets


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_a_target_in_orbax(mesh, scanned, source, orbax):
  """Kills: weights lost, exchanged or cast on the way, or placed otherwise than those of other folders; another id."""
  with MESHES.get(mesh, ONE_DEVICE).use():
    ours, theirs = (dspark_jax.load_target(path, scanned=scanned) for path in (orbax, source))
    assert target_id(ours) == target_id(theirs) == target_id(alone(source))
  assert_same_weights(ours, theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert a.sharding == b.sharding


def test_orbax_itself_restores_it_on_a_mesh(source, orbax):
  """Kills: a folder that only our own reading below Orbax understands."""
  with jax.set_mesh(MESHES["mixed"].build()):
    target = dspark_jax.load_target(source)
    stored = loading.TARGETS["qwen3"].stored
    wanted = {stored(name): x for name, x in values(target).items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
    for name, x in ocp.load(orbax / "weights", shapes).items():
      assert x.sharding == wanted[name].sharding
      np.testing.assert_array_equal(x, wanted[name])


def test_a_process_of_many_reads_its_part(tmp_path, monkeypatch):
  """Kills: arrays stored in one piece, or read whole by each host; a check of digests that needs the whole."""
  weights = {"a": np.arange(2 ** 20, dtype="f4").reshape(1024, 1024), "zero": np.zeros((16, 16), "f4")}
  state.save_target(tmp_path / "t", CONFIG, "id", weights, lambda folder: None)
  chunk = ocp.metadata(tmp_path / "t" / "weights").metadata["a"].storage_metadata.chunk_shape
  assert np.prod(chunk) * 4 <= state.CHUNK
  tensors = state.Tensors(tmp_path / "t")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(tensors, "_checked", None)
  np.testing.assert_array_equal(tensors["a"][4:9, 512:], weights["a"][4:9, 512:])
  np.testing.assert_array_equal(tensors["zero"][:8], weights["zero"][:8])


def test_a_flipped_bit_in_a_target(tmp_path):
  """Kills: other weights, or another configuration, than were converted, in silence; half a folder for a target."""
  dspark_jax.import_target(QWEN3, folder := tmp_path / "t")
  data = max((p for p in (folder / "weights").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  before = data.read_bytes()
  for share in (0.2, 0.5, 0.8):
    flipped(data, int(len(before) * share))
    for scanned in (False, True):
      with jax.set_mesh(MESHES["fsdp"].build()), complains("weights is damaged or incomplete"):
        dspark_jax.load_target(folder, scanned=scanned)
    data.write_bytes(before)
  data.unlink()
  with complains("weights is damaged or incomplete"):
    dspark_jax.load_target(folder)
  data.write_bytes(before)
  assert_same_weights(dspark_jax.load_target(folder), qwen3(False))
  text = (folder / "target.json").read_text()
  (folder / "target.json").write_text(text.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
  with complains("target.json: its config is not what was saved"):
    dspark_jax.load_target(folder)
  (folder / "target.json").write_text(text.replace('"digests"', '"other"'))
  with complains("key 'digests' is missing"):
    dspark_jax.load_target(folder)


def test_convert_a_target(capsys, tmp_path):
  """Kills: a folder that programs cannot run from: without tokenizer, template or the ends of a reply; a conversion
  that fails and leaves nothing; files of others replaced."""
  source = with_tokenizer(QWEN3, tmp_path / "source")
  (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
  result, _ = called(capsys, convert.main, convert.Settings, "--target", source, "--destination", tmp_path / "ours")
  assert result == {"source": str(source), "destination": str(tmp_path / "ours"), "format": "orbax"}
  theirs, ours = (chat.load_tokenizer(path) for path in (source, tmp_path / "ours"))
  messages = [{"role": "user", "content": "w8 w9"}]
  assert chat.encode_prompt(ours, messages) == chat.encode_prompt(theirs, messages)
  assert chat.stop_ids(ours) == chat.stop_ids(theirs) and 7 in chat.stop_ids(ours)
  assert not list((tmp_path / "ours").glob("*.safetensors"))
  assert_same_weights(dspark_jax.load_target(tmp_path / "ours"), qwen3(False))
  before = files(tmp_path / "ours")
  called(capsys, convert.main, convert.Settings, "--target", tmp_path / "ours", "--destination", tmp_path / "again")
  assert_same_weights(dspark_jax.load_target(tmp_path / "again"), qwen3(False))
  copied(QWEN3, tmp_path / "bad", tensors=spoiled("model."))
  _, err = called(capsys, convert.main, convert.Settings, "--target", tmp_path / "bad", "--destination",
                  tmp_path / "ours", code=2)
  assert "is missing" in err and files(tmp_path / "ours") == before
  _, err = called(capsys, convert.main, convert.Settings, "--target", source, "--destination", source, code=2)
  assert "which would be lost" in err
  _, err = called(capsys, convert.main, convert.Settings, "--target", source, "--destination", tmp_path / "out", "--to",
                  "deepspec", code=2)
  assert "deepspec is a format of drafters" in err and not (tmp_path / "out").exists()


def test_convert_a_gguf_file(capsys, tmp_path, monkeypatch):
  """Kills: a missing tokenizer that is found out when prompts come; a head that is not the embedding, tied again."""
  file = write(tmp_path / "m.gguf", model(False))
  _, err = called(capsys, convert.main, convert.Settings, "--target", file, "--destination", tmp_path / "ours",
                  "--target-dtype", "bfloat16")
  assert "prompts for it are token ids" in err
  ours = dspark_jax.load_target(tmp_path / "ours", dtype=None)
  assert_same_weights(ours, dspark_jax.load_target(file, dtype="bfloat16"))
  assert target_id(ours) == target_id(dspark_jax.load_target(file)) and ours.lm_head is not None


def test_a_head_that_is_stored_stays_one(tmp_path):
  """Kills: a trained head dropped because the configuration that goes along says that it is tied."""
  config = lambda c: c | {"tie_word_embeddings": True}
  dspark_jax.import_target(copied(QWEN3, tmp_path / "t", config=config), tmp_path / "ours")
  assert_same_weights(dspark_jax.load_target(tmp_path / "ours"), qwen3(False))


def test_an_orbax_target_from_the_hub(orbax, monkeypatch):
  """Kills: a folder of ours fetched without its weights, which lie in folders of their own."""
  asked = []
  monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, *, allow_patterns: (
      asked.append(allow_patterns), str(orbax))[1])
  loading._fetched.cache_clear()
  assert loading.locate_target("owner/ours") == orbax
  loading._fetched.cache_clear()
  assert "target.json" in asked[0] and "weights/*" in asked[1] and "*.safetensors" not in asked[1]


# Drafters and training states


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sharded") / "drafter"
  dspark_jax.import_drafter(DSPARK, folder, qwen3())
  return folder


@pytest.mark.parametrize("mesh", ["mixed"])
def test_drafters_on_a_mesh(mesh, converted, tmp_path, monkeypatch):
  """Kills: an id, a stored drafter or an export that depends on where the weights are; one device's part for all;
  another target's frozen copies that pass where they are sharded."""
  dspark_jax.export_drafter(DSPARK, tmp_path / "alone", qwen3())
  wanted = dspark_jax.load_drafter(DSPARK, qwen3())
  with jax.set_mesh(MESHES[mesh].build()):
    target = dspark_jax.load_target(QWEN3, scanned=True)
    assert target_id(target) == target_id(qwen3())
    drafter = dspark_jax.load_drafter(DSPARK, target)
    assert any(not v[...].is_fully_replicated for v in parameters(drafter).values())
    assert drafter_id(drafter) == drafter_id(wanted)
    dspark_jax.save_drafter(tmp_path / "saved", drafter, target)
    dspark_jax.export_drafter(converted, tmp_path / "spread", target)
    other = jax.tree.map(lambda x: x + 1, target)
    monkeypatch.setattr(loading, "misfits", lambda *_: [])
    with complains("embed_tokens.weight", "is not the target's"):
      dspark_jax.load_drafter(DSPARK, other)
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "saved", qwen3()), wanted)
  assert files(tmp_path / "spread") == files(tmp_path / "alone") == {
      name: data for name, data in files(DSPARK).items() if name in ("config.json", "model.safetensors")}


def state_of(mesh=None):
  """A training state of the golden drafter, with moments that are not zero."""
  drafter = dspark_jax.load_drafter(DSPARK, qwen3())
  made = init_state(drafter, StepConfig(num_anchors=4, compute_dtype="float32"), 0, total_steps=9)
  return jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype) if x.ndim else x, made)


@pytest.mark.slow
def test_a_state_goes_to_another_mesh(tmp_path):
  """Kills: a state that needs the devices it was saved on, comes back whole on each, or unchecked."""
  alone = state_of()
  with jax.set_mesh(MeshConfig(fsdp=8).build()):
    saved = state.checkpointer(tmp_path / "steps", every=1)
    saved.save_checkpointables(1, {"state": place(alone)})
    saved.close()
  shapes = jax.eval_shape(lambda: alone)
  restored = lambda like: state.restore(state.checkpointer(tmp_path / "steps", every=1), like)
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
  for like in (alone, shapes):
    back = restored(like)
    same(back, alone)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(back)} == {1}
  with jax.set_mesh(MeshConfig(data=2, tensor=2).build()):
    where = jax.tree.leaves(shardings(alone))
    for like in (place(alone), shapes):
      back = restored(like)
      same(back, alone)
      assert [x.sharding for x in jax.tree.leaves(back)] == where
    data = max((p for p in (tmp_path / "steps").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flipped(data, data.stat().st_size // 2)
    with complains("the state of step 1 cannot be restored"):
      restored(shapes)
