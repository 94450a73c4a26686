"""GGUF files of the llama architecture, as a Hugging Face style config and float32 tensors."""

from __future__ import annotations

import collections.abc
import functools
import os
import sys
from typing import Any

import gguf
import numpy as np

from dspark_jax.checkpoints.tensors import Stored
from dspark_jax.config import all_shown, name_shown, raise_all, shown
from dspark_jax.data.gguf_metadata import open_gguf, read_metadata

# Hugging Face name -> GGUF name, within a layer and of the whole model.
LAYER_NAMES = {
  "input_layernorm.weight": "attn_norm.weight",
  "self_attn.q_proj.weight": "attn_q.weight",
  "self_attn.k_proj.weight": "attn_k.weight",
  "self_attn.v_proj.weight": "attn_v.weight",
  "self_attn.o_proj.weight": "attn_output.weight",
  "post_attention_layernorm.weight": "ffn_norm.weight",
  "mlp.gate_proj.weight": "ffn_gate.weight",
  "mlp.up_proj.weight": "ffn_up.weight",
  "mlp.down_proj.weight": "ffn_down.weight",
}
MODEL_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
}
CONFIG_NAMES = {
  "hidden_size": "llama.embedding_length",
  "intermediate_size": "llama.feed_forward_length",
  "num_hidden_layers": "llama.block_count",
  "num_attention_heads": "llama.attention.head_count",
  "max_position_embeddings": "llama.context_length",
  "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
  "rope_theta": "llama.rope.freq_base",
}
# Read below, or compared with what is read (llama.vocab_size: with the embedding's rows).
READ = {*CONFIG_NAMES.values(), "llama.vocab_size", "llama.attention.head_count_kv", "llama.attention.key_length",
        "llama.attention.value_length", "llama.rope.dimension_count"}
FRACTIONS = {"llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"}  # of READ; the others are counts
# (key, what it must be, in words), checked before anything is computed from it.
KINDS = [(key, lambda value: type(value) in (int, float) and value > 0, "a number above 0") if key in FRACTIONS else
         (key, lambda value: type(value) is int and value > 0, "a count") for key in sorted({*READ, "split.count"})]
# Keys that change what a llama computes and none of its tensors: the values that change nothing.
NEUTRAL = {
  "llama.rope.scale_linear": (1,), "llama.rope.scaling.type": ("none", ""), "llama.rope.scaling.factor": (0, 1),
  "llama.rope.scaling.attn_factor": (0, 1), "llama.rope.scaling.alpha": (0,),
  "llama.rope.scaling.finetuned": (False,), "llama.attention.causal": (True,), "llama.attention.clamp_kqv": (0,),
  "llama.attention.max_alibi_bias": (0,), "llama.attention.scale": (0,), "llama.attention.sliding_window": (0,),
  "llama.attn_logit_softcapping": (0,), "llama.final_logit_softcapping": (0,), "llama.logit_scale": (0, 1),
  "llama.residual_scale": (0, 1), "llama.embedding_scale": (0, 1), "llama.expert_count": (0,),
  "llama.expert_used_count": (0,), "llama.use_parallel_residual": (False,), "llama.tensor_data_layout": ("",),
  "llama.pooling_type": (0,), "llama.nextn_predict_layers": (0,),
}


class Tensors(collections.abc.Mapping):
  """Hugging Face name -> f32 tensor, dequantised when it is read, so that the model is never held twice."""

  def __init__(self, path: str | os.PathLike, stored: dict[str, Any], heads: dict[str, int]):
    self.path = path
    self.stored = stored  # Hugging Face name -> gguf.ReaderTensor
    self.heads = heads    # "q_proj" and "k_proj" -> number of heads

  def __getitem__(self, name: str) -> Stored:
    # Once for all parts that are read of it, as dequantising takes far longer than reading.
    whole = functools.cache(lambda: self._dequantised(name))
    # gguf's shapes start at the fastest dimension.
    return Stored(tuple(map(int, self.stored[name].shape[::-1])), np.dtype(np.float32), lambda index: whole()[index])

  def _dequantised(self, name):
    tensor = self.stored[name]
    # np.array copies: what is stored as float32 would otherwise be a view of the file.
    try:
      array = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
      raise NotImplementedError(f"{self.path} has {tensor.name} as {tensor.tensor_type.name}, which is not read: "
                                f"convert the model to another quantisation") from error
    heads = self.heads.get(name.split(".")[-2])  # "q_proj" of "model.layers.0.self_attn.q_proj.weight"
    # One that does not divide into them, or is empty, goes on as it is: its shape is compared with the others' later.
    fits = heads and array.ndim == 2 and array.size and len(array) % (2 * heads) == 0
    return unpermute(array, heads) if fits else array

  def __iter__(self):
    return iter(self.stored)

  def __len__(self):
    return len(self.stored)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows for half rotation (i turns with i + h/2), of rows for interleaved (2i with 2i + 1): f32[H*h,D].

  For each head and i < h/2: out[i] = rows[2 * i]; out[h/2 + i] = rows[2 * i + 1].
  """
  return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], Tensors]:
  """(config, tensors) of a llama GGUF file; a tensor is dequantised when asked for, by its Hugging Face name.

  q and k rows come out for half rotation. NotImplementedError: another architecture, keys that may change what it
  computes (RoPE scaling, soft-caps, experts; unknown keys of llama, too), tensors that a plain llama does not have,
  another byte order than this machine's. ValueError: damaged file, missing metadata, missing tensors, more layers than
  tensors.
  """
  reader = open_gguf(path)
  if reader.byte_order == "S":  # in which gguf reads the tables, and takes tensors for this machine's
    raise NotImplementedError(f"{path} is {reader.endianess.name.lower()}-endian, expected {sys.byteorder}-endian, as "
                              f"this machine is: convert it with gguf-convert-endian (of the package gguf)")
  metadata = read_metadata(reader)
  stored = {tensor.name: tensor for tensor in reader.tensors}
  refuse_unsupported(path, metadata, stored)
  config = read_config(path, metadata, stored)
  if config["num_hidden_layers"] > len(stored):  # before names are made up for them: a file may declare any number
    raise ValueError(f"{path} declares {config['num_hidden_layers']} layers in llama.block_count, and has "
                     f"{len(stored)} tensors: it is damaged, download it again")
  names = {hf: name for hf, name in MODEL_NAMES.items() if name in stored or hf != "lm_head.weight"}
  for layer in range(config["num_hidden_layers"]):
    names |= {f"model.layers.{layer}.{hf}": f"blk.{layer}.{name}" for hf, name in LAYER_NAMES.items()}
  if missing := sorted(set(names.values()) - set(stored)):
    raise ValueError(f"{path} lacks the tensors {all_shown(missing)}: convert the model again")
  # What would stay unread is a bias, a norm or an expert that the model was trained with.
  if unknown := sorted(set(stored) - set(names.values())):
    raise NotImplementedError(f"{path} has tensors that a plain llama does not have: "
                              f"{all_shown([*map(name_shown, unknown)])}: only dense models without biases are read")
  heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
  return config, Tensors(path, {hf: stored[name] for hf, name in names.items()}, heads)


def refuse_unsupported(path: str | os.PathLike, metadata: dict[str, Any], stored: dict[str, Any]) -> None:
  """NotImplementedError for what would load, and then compute something else."""
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise NotImplementedError(f"{path} has the architecture {shown(architecture)}, only 'llama' is read from "
                              "GGUF: load the model from its Hugging Face folder")
  raise_all(f"{path}", [
      f"{key} is {shown(metadata[key])}, expected {expected}: convert the model again" for key, right, expected in KINDS
      if key in metadata and not right(metadata[key])])
  if metadata.get("split.count", 1) > 1:
    raise NotImplementedError(f"{path} is one of {metadata['split.count']} parts: "
                              "join them with `llama-gguf-split --merge`")
  if "rope_freqs.weight" in stored:  # Llama 3's frequencies come as a tensor, other scalings as metadata
    raise NotImplementedError(f"{path} scales its RoPE frequencies (rope_freqs.weight), which is not read from GGUF: "
                              "load the model from its Hugging Face folder")
  unread = [f"{name_shown(key)} {shown(metadata[key])}" for key in sorted(metadata) if key.startswith("llama.")
            and key not in READ and not (key in NEUTRAL and metadata[key] in NEUTRAL[key])]
  if unread:
    raise NotImplementedError(f"{path} has {all_shown(unread)}, which may change what it computes and is not "
                              "read from GGUF: load the model from its Hugging Face folder")


def read_config(path: str | os.PathLike, metadata: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
  """Hugging Face style config. Some sizes may be left out and are derived; rope_theta has no default."""
  missing = [key for key in CONFIG_NAMES.values() if key not in metadata]
  missing += {"token_embd.weight"} - set(stored)
  if missing:
    raise ValueError(f"{path} lacks {', '.join(missing)}, for which there is no default: convert the model "
                     "again with a current convert_hf_to_gguf.py")
  config = {name: metadata[key] for name, key in CONFIG_NAMES.items()}
  for name in ("rms_norm_eps", "rope_theta"):
    config[name] = float(str(np.float32(config[name])))  # stored in float32: 1e-5, not 9.999999747378752e-06
  shape = stored["token_embd.weight"].shape.tolist()
  if len(shape) != 2:
    raise ValueError(f"{path} has token_embd.weight of {len(shape)} dimensions, expected a matrix: convert the model "
                     f"again")
  rows = shape[1]  # gguf's shapes start at the fastest dimension
  if metadata.get("llama.vocab_size", rows) != rows:
    raise ValueError(f"{path} has {rows} rows of token_embd.weight, llama.vocab_size is "
                     f"{metadata['llama.vocab_size']}: they must agree, convert the model again")
  heads = config["num_attention_heads"]
  # One width for all: GGUF knows others for values, and rotates a part of the head where dimension_count is smaller.
  head_dim = metadata.get("llama.attention.key_length", config["hidden_size"] // heads)
  for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
    if metadata.get(key, head_dim) != head_dim:
      raise NotImplementedError(f"{path} has head width {head_dim}, {key} {metadata[key]}: they must agree")
  return config | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
    "head_dim": head_dim,
    "vocab_size": rows,
    "tie_word_embeddings": "output.weight" not in stored,  # no key says so
    "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
  }
