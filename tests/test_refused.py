"""Folders and files of other kinds, damaged or of impossible sizes: each is named as what it is, soon."""

import json
import struct
import time

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import dspark_jax
from dspark_jax.data import chat
from folders import DSPARK, LLAMA, LLAMA_CONFIG, complains, copied, qwen3, sharded
from test_fuzz import gguf_words
from test_gguf import model, write

HEADS = LLAMA_CONFIG["num_attention_heads"]
TENSORS = len(safe_open(LLAMA / "model.safetensors", "numpy").keys())


@pytest.mark.parametrize("change, parts", [
    ({"num_key_value_heads": "2"}, ["'num_key_value_heads' is '2', expected an integer"]),
    ({"num_key_value_heads": HEADS + 1},
     [f"'num_key_value_heads' is {HEADS + 1}, expected a divisor of num_attention_heads {HEADS}"]),
    ({"head_dim": 8.0}, ["'head_dim' is 8.0"]), ({"head_dim": 7}, ["heads are 7 wide"]),
    ({"hidden_size": True, "vocab_size": -1}, ["'hidden_size' is True", "'vocab_size' is -1"]),
    ({"rope_parameters": "x"}, ["'rope_parameters' is 'x', expected an object", "no rope theta"]),
    ({"rope_parameters": {"rope_theta": ["x"]}}, ["'rope_parameters.rope_theta' is ['x'], expected a number"]),
    ({"rope_parameters": {"rope_theta": 10 ** 400}}, ["'rope_parameters.rope_theta' is 1000"]),
    ({"tie_word_embeddings": "no"}, ["'tie_word_embeddings' is 'no', expected true or false"]),
    ({"max_position_embeddings": 0}, ["'max_position_embeddings' is 0"]),
    ({"layer_types": 10 ** 12}, ["'layer_types' is 1000000000000"]),
    ({"num_hidden_layers": 10 ** 12}, ["'num_hidden_layers' is 1000000000000"]),
    ({"num_hidden_layers": 2 ** 31 - 1}, [f"declares 2147483647 layers, and has {TENSORS} tensors"])])
def test_targets_are_type_checked(change, parts, tmp_path):
  """Kills: a TypeError from deep inside, or hours of building, for a value of another type or a size of no file."""
  folder, began = copied(LLAMA, tmp_path / "t", config=lambda c: c | change), time.monotonic()
  with complains(str(folder), *parts):
    dspark_jax.load_target(folder)
  assert time.monotonic() - began < 2


def test_a_long_list_is_counted(tmp_path):
  """Kills: a sentence of a page where every tensor has another shape."""
  with pytest.raises(ValueError, match=r"t: tensor .* more$") as caught:
    dspark_jax.load_target(copied(LLAMA, tmp_path / "t", config=lambda c: c | {"hidden_size": 2 * c["hidden_size"]}))
  assert len(str(caught.value)) < 600


@pytest.mark.parametrize("change, file, what", [
    ({"architectures": ["LlamaModel"]}, None, "an embedding model, without a head"),
    ({"architectures": ["LlamaForSequenceClassification"]}, None, "a reward model or classifier"),
    ({"architectures": ["LlamaForRewardModel"]}, None, "a reward model"),
    ({"quantization_config": {"quant_method": "fp8"}}, None, "a quantised model ('fp8')"),
    ({}, "modules.json", "an embedding model (of sentence-transformers)"),
    ({}, "hf_quant_config.json", "a quantised model (hf_quant_config.json)")])
def test_named_as_what_they_are(change, file, what, tmp_path):
  """Kills: a list of missing tensors for a folder that is right, but of no language model."""
  folder = copied(LLAMA, tmp_path / "t", config=lambda c: c | change)
  if file:
    (folder / file).write_text("[]")
  with complains(str(folder), what, error=NotImplementedError):
    dspark_jax.load_target(folder)


def test_adapters_and_quantised_tensors(tmp_path):
  """Kills: "config.json is missing" for a LoRA adapter; scales told as tensors of no part."""
  (tmp_path / "lora").mkdir()
  (tmp_path / "lora" / "adapter_config.json").write_text("{}")
  for load in (dspark_jax.load_target, lambda folder: dspark_jax.load_drafter(folder, qwen3())):
    with complains("lora holds a LoRA adapter: merge it", error=NotImplementedError):
      load(tmp_path / "lora")
  scale = {"model.layers.0.mlp.up_proj.weight_scale": jnp.ones(1)}
  with complains("a quantised model (tensor model.layers.0.mlp.up_proj.weight_scale)", error=NotImplementedError):
    dspark_jax.load_target(copied(LLAMA, tmp_path / "t", tensors=lambda t: t | scale))


@pytest.mark.parametrize("source, load", [
    (LLAMA, dspark_jax.load_target), (DSPARK, lambda folder: dspark_jax.load_drafter(folder, qwen3()))])
def test_what_transformers_would_load_instead(source, load, tmp_path):
  """Kills: a model without the adapter that lies beside it, or with other weights than its configuration names."""
  folder = copied(source, tmp_path / "a")
  (folder / "adapter_config.json").write_text("{}")
  with complains(f"{folder} holds a LoRA adapter: merge it", error=NotImplementedError):
    load(folder)
  named = lambda name: copied(source, tmp_path / f"{name}", config=lambda c: c | {"transformers_weights": name})
  with complains("transformers_weights 'b.safetensors', which is not supported", error=NotImplementedError):
    load(named("b.safetensors"))
  load(named(None))


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/dev/zero", "", "\0", "x" * 5000, ".."])
def test_weight_files_stay_in_the_folder(name, tmp_path):
  """Kills: an index that has a file elsewhere read, or a device, which has no end."""
  folder = sharded(LLAMA, tmp_path / "t")
  copied(LLAMA, tmp_path / "other")
  index = folder / "model.safetensors.index.json"
  table = json.loads(index.read_text())
  table["weight_map"]["model.norm.weight"] = name
  index.write_text(json.dumps(table))
  with complains("index.json: weight_map names", "expected the name of a file beside it"):
    dspark_jax.load_target(folder)


def test_links_to_weights(tmp_path):
  """Kills: refusing the hub's folders, of links into a store; reading a link to a device."""
  store = sharded(LLAMA, tmp_path / "store")
  (tmp_path / "t").mkdir()
  for file in store.iterdir():
    (tmp_path / "t" / file.name).symlink_to(file)
  dspark_jax.load_target(tmp_path / "t")
  shard = tmp_path / "t" / "model-00001-of-00003.safetensors"
  shard.unlink()
  shard.symlink_to("/dev/zero")
  with complains("weight file model-00001-of-00003.safetensors is missing"):
    dspark_jax.load_target(tmp_path / "t")


@pytest.mark.parametrize("count", [2 ** 40, 2 ** 63])
@pytest.mark.parametrize("place", ["array", "tensors", "keys"])
def test_gguf_counts(place, count, tmp_path):
  """Kills: counting to 2^40 behind the end of a file."""
  path = gguf_words(tmp_path / "w.gguf")
  data = bytearray(path.read_bytes())
  name = b"tokenizer.ggml.token_type"
  at = {"tensors": 8, "keys": 16, "array": data.index(name) + len(name) + 8}[place]
  data[at:at + 8] = struct.pack("<Q", count)
  path.write_bytes(data)
  began = time.monotonic()
  with complains("w.gguf is a damaged GGUF file"):
    chat.load_tokenizer(path)
  assert time.monotonic() - began < 2


@pytest.mark.parametrize("key, value, what", [
    ("tokens", None, "tokens is missing"), ("merges", None, "merges is missing"),
    ("merges", ["a b c"], "merges is ['a b c']"), ("token_type", [1], "token_type is [1]"),
    ("eos_token_id", 999, "eos_token is number 999 of 3 tokens")])
def test_gguf_tokenizers(key, value, what, tmp_path):
  """Kills: a KeyError or IndexError for a file without one of a tokenizer's parts."""
  parts = {"tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1], "eos_token_id": 2} | {key: value}
  writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  for name, part in parts.items():
    if part is not None:
      (writer.add_array if isinstance(part, list) else writer.add_uint32)(f"tokenizer.ggml.{name}", part)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with complains("w.gguf", what):
    chat.load_tokenizer(tmp_path / "w.gguf")


@pytest.mark.parametrize("key, value, part", [
    ("block_count", 9, "lacks the tensors blk.2.attn_k.weight; "), ("block_count", 2.0, "is 2.0, expected a count"),
    ("attention.head_count", 0, "is 0, expected a count"), ("attention.head_count", True, "is True, expected a count"),
    ("attention.head_count_kv", [2, 2], "is [2, 2], expected a count"),
    ("rope.freq_base", "x", "is 'x', expected a number above 0"),
    ("attention.layer_norm_rms_epsilon", [1e-5], "expected a number above 0")])
def test_gguf_numbers(key, value, part, tmp_path):
  """Kills: a TypeError, a division by zero, or numpy's own words, for a value of another type; a page of tensors."""
  path = write(tmp_path / "m.gguf", model(False), keys={f"llama.{key}": value})
  with complains("m.gguf", part):
    dspark_jax.load_target(path)


def test_gguf_tensors(tmp_path):
  """Kills: numpy's words for a tensor without rows; an IndexError for an embedding that is no matrix; a list of names
  that fills a page, or holds control characters."""
  tensors = model(False)
  for name, part in (("attn_q", "q_proj.weight is float32[0, 32]"), ("attn_k", "k_proj.weight is float32[0, 32]")):
    less = {n: x for n, x in tensors.items() if n != f"model.layers.0.self_attn.{name[5:]}_proj.weight"}
    empty = {f"blk.0.{name}.weight": np.ones((0, 32), np.float32)}
    with complains("m.gguf", part):
      dspark_jax.load_target(write(tmp_path / "m.gguf", less, extra=empty))
  less = {name: x for name, x in tensors.items() if name != "model.embed_tokens.weight"}
  with complains("m.gguf has token_embd.weight of 1 dimensions, expected a matrix"):
    dspark_jax.load_target(write(tmp_path / "m.gguf", less, extra={"token_embd.weight": np.ones(4, np.float32)}))
  more = {f"x\n{i}{'y' * 50}": np.ones(1, np.float32) for i in range(50)}
  with pytest.raises(NotImplementedError, match="a plain llama does not have: .* more: only dense") as caught:
    dspark_jax.load_target(write(tmp_path / "m.gguf", tensors, extra=more))
  assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_gguf_words_that_do_not_go_together(tmp_path):
  """Kills: an exception of the tokenizer's own library for a merge into a word that is none."""
  path = gguf_words(tmp_path / "w.gguf")
  path.write_bytes(path.read_bytes().replace(b"us", b"ut", 1))
  with complains("w.gguf has no tokenizer that can be read", "out of vocabulary"):
    chat.load_tokenizer(path)


def test_gguf_vocabulary(tmp_path):
  """Kills: a vocabulary size that is declared and never compared."""
  with complains("has 40 rows of token_embd.weight, llama.vocab_size is 41"):
    dspark_jax.load_target(write(tmp_path / "m.gguf", model(True), keys={"llama.vocab_size": 41}))
