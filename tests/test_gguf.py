"""GGUF files: written with llama.cpp's conventions, read back under Hugging Face names."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from dspark_jax import load_target
from dspark_jax.checkpoints.gguf import read_gguf
from dspark_jax.data.gguf_metadata import open_gguf, read_metadata

Kind = gguf.GGMLQuantizationType
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDE, VOCAB, LAYERS = 4, 2, 8, 32, 64, 40, 2


def permute(weight, heads):
  """convert_hf_to_gguf.py's LlamaModel.permute."""
  shape = weight.shape
  return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def model(tied):
  """Hugging Face name -> random tensor."""
  random = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
  shapes |= {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
  for i in range(LAYERS):
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
             "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, q),
             "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
             "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(path, tensors, *, architecture="llama", leave_out=(), extra=None, kind=Kind.F32, keys=None,
          layers=LAYERS, order=gguf.GGUFEndian.LITTLE):
  """A GGUF file of `tensors`; names by gguf's own table, so that ours is checked against it."""
  writer = gguf.GGUFWriter(path, architecture, endianess=order)
  fields = {
    "rope_theta": lambda: writer.add_rope_freq_base(100000.0),
    "head_count": lambda: writer.add_head_count(HEADS),
    "head_count_kv": lambda: writer.add_head_count_kv(KV_HEADS),
    "rest": lambda: (writer.add_block_count(layers), writer.add_context_length(128),
                     writer.add_embedding_length(HIDDEN), writer.add_feed_forward_length(WIDE),
                     writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(HEAD_DIM),
                     writer.add_bos_token_id(1), writer.add_eos_token_id(2)),
  }
  for name, add in fields.items():
    if name not in leave_out:
      add()
  for name, value in (keys or {}).items():
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
    add[type(value)](name, value)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
  for name, tensor in tensors.items():
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    tensor = tensor if heads is None else permute(tensor, heads)
    stored_as = kind if tensor.ndim == 2 else Kind.F32
    data = gguf.quantize(tensor, stored_as)
    writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=stored_as)
  for name, tensor in (extra or {}).items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
  """Kills: q/k left interleaved, or un-permuted by the wrong number of heads; swapped names; a lost head."""
  wanted = model(tied)
  config, tensors = read_gguf(write(tmp_path / "m.gguf", wanted))
  assert set(tensors) == set(wanted)
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
  assert json.loads(json.dumps(config)) == {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "hidden_size": HIDDEN, "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "vocab_size": VOCAB,
    "max_position_embeddings": 128, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}


def test_quantized(tmp_path):
  """Kills: reading the quantised blocks as numbers; a quantised q un-permuted before it is dequantised."""
  wanted = model(tied=True)
  _, tensors = read_gguf(write(tmp_path / "m.gguf", wanted, kind=Kind.Q8_0))
  for name, tensor in wanted.items():
    assert tensors[name].dtype == np.float32 and tensors[name].shape == tensor.shape
    np.testing.assert_allclose(tensors[name], tensor, atol=np.abs(tensor).max() / 250, err_msg=name)


def test_no_theta(tmp_path):
  """Kills: rope_theta defaulting to 10000."""
  with pytest.raises(ValueError, match="lacks llama.rope.freq_base"):
    read_gguf(write(tmp_path / "m.gguf", model(True), leave_out=["rope_theta"]))


def test_refusals(tmp_path):
  """Kills: another architecture, a bias or scaled RoPE read as a plain llama; a missing tensor found late."""
  path, tensors = tmp_path / "m.gguf", model(True)
  with pytest.raises(NotImplementedError, match="'qwen3'"):
    read_gguf(write(path, tensors, architecture="qwen3"))
  with pytest.raises(NotImplementedError, match="blk.0.attn_q.bias"):
    read_gguf(write(path, tensors, extra={"blk.0.attn_q.bias": np.zeros(HIDDEN, np.float32)}))
  with pytest.raises(NotImplementedError, match="scales its RoPE"):
    read_gguf(write(path, tensors, extra={"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}))
  del tensors["model.layers.1.mlp.up_proj.weight"]
  with pytest.raises(ValueError, match="lacks the tensors .*blk.1.ffn_up.weight"):
    read_gguf(write(path, tensors))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0])
def test_another_byte_order(kind, tmp_path):
  """Kills: tensors whose bytes are read the wrong way round."""
  with pytest.raises(NotImplementedError, match="m.gguf is big-endian, expected little-endian, as this machine is"):
    read_gguf(write(tmp_path / "m.gguf", model(True), kind=kind, order=gguf.GGUFEndian.BIG))


@pytest.mark.parametrize("key, neutral, other", [
    ("rope.scale_linear", 1.0, 4.0), ("rope.scaling.factor", 1.0, 8.0), ("rope.scaling.type", "none", "linear"),
    ("logit_scale", 0.0, 0.5), ("residual_scale", 1.0, 0.25), ("embedding_scale", 0.0, 12.0),
    ("final_logit_softcapping", 0.0, 30.0), ("attention.scale", 0.0, 0.125), ("attention.sliding_window", 0, 64),
    ("attention.causal", True, False), ("attention.clamp_kqv", 0.0, 8.0), ("expert_count", 0, 8)])
def test_keys_that_change_the_numbers(key, neutral, other, tmp_path):
  """Kills: reading past a scale, a cap, a window or experts, of which no tensor tells; refusing neutral ones."""
  key = f"llama.{key}"
  assert read_gguf(write(tmp_path / "a.gguf", model(True), keys={key: neutral}))[0]["model_type"] == "llama"
  with pytest.raises(NotImplementedError, match=f"{key} {other!r}, which may change what it computes"):
    read_gguf(write(tmp_path / "b.gguf", model(True), keys={key: other}))


def test_a_file_of_another_writer_with_a_linear_scale():
  """Kills: a RoPE factor in the older spelling read as 1."""
  with pytest.raises(NotImplementedError, match="llama.rope.scale_linear 4.0"):
    read_gguf(Path(__file__).parent / "scale_linear.gguf")


def test_unknown_keys(tmp_path):
  """Kills: taking a key of llama that nobody here has heard of for harmless."""
  with pytest.raises(NotImplementedError, match="llama.new_gate 1.0"):
    read_gguf(write(tmp_path / "m.gguf", model(True), keys={"llama.new_gate": 1.0}))


def test_rows_that_do_not_divide_into_heads(tmp_path):
  """Kills: numpy's reshape error for a q of another height than the heads say."""
  wanted = model(True)
  del wanted["model.layers.0.self_attn.q_proj.weight"]
  path = write(tmp_path / "m.gguf", wanted, extra={"blk.0.attn_q.weight": np.ones((6, HIDDEN), np.float32)})
  with pytest.raises(ValueError, match=r"m.gguf: tensor model.layers.0.self_attn.q_proj.weight is float32\[6, 32\]"):
    load_target(path)


def test_more_layers_than_the_file_has(tmp_path):
  """Kills: making up the names of four thousand million layers before looking for one of them."""
  path = write(tmp_path / "m.gguf", model(True), layers=2 ** 32 - 1)
  with pytest.raises(ValueError, match="declares 4294967295 layers in llama.block_count, and has 20 tensors"):
    read_gguf(path)


def test_no_kv_heads_means_as_many_as_heads(tmp_path):
  """Kills: requiring head_count_kv, which files without grouped queries leave out."""
  config, _ = read_gguf(write(tmp_path / "m.gguf", model(True), leave_out=["head_count_kv"]))
  assert config["num_key_value_heads"] == HEADS


@pytest.mark.parametrize("order", gguf.GGUFEndian)
def test_texts(order, tmp_path):
  """Kills: lists of texts that differ from what gguf reads, empty ones and big-endian files among them; a text that
  ends behind the file."""
  texts = {"some": ["", "a", "日本", "x" * 300], "none": [""], "more": ["b"] * 3}
  writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama", endianess=order)
  for name, value in texts.items():
    writer.add_array(name, value)
    writer.add_uint32(f"{name}.count", len(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  reader, own = gguf.GGUFReader(tmp_path / "t.gguf"), open_gguf(tmp_path / "t.gguf")
  assert read_metadata(own) == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
  assert {k: read_metadata(own)[k] for k in texts} == texts
  assert [field.types for field in own.fields.values()] == [field.types for field in reader.fields.values()]
  data = bytearray((tmp_path / "t.gguf").read_bytes())
  at = data.index(b"x" * 300)
  data[at - 8:at] = (2 ** 40).to_bytes(8, "little" if order == gguf.GGUFEndian.LITTLE else "big")
  (tmp_path / "t.gguf").write_bytes(data)
  with pytest.raises(ValueError, match="damaged GGUF file.*a string of 1099511627776"):
    open_gguf(tmp_path / "t.gguf")


def test_damaged(tmp_path):
  """Kills: a download cut anywhere surfacing as numpy's IndexError, or not at all."""
  whole = write(tmp_path / "m.gguf", model(True)).read_bytes()
  cut = tmp_path / "cut.gguf"
  for size in [4, 7, 23, 24, 60, 300, 700, 1500, len(whole) // 2, len(whole) - 1]:
    cut.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="damaged GGUF file.*download it again"):
      read_gguf(cut)
  cut.write_bytes(b"PK\x03\x04" + whole[4:])
  with pytest.raises(ValueError, match="starts with b'PK"):
    read_gguf(cut)
