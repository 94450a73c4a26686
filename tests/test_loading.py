"""Models in and out: Hugging Face targets, DeepSpec and DFlash drafters, own folders. Nothing is lost on the way."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file

import dspark_jax
from dspark_jax import loading
from dspark_jax.checkpoints import dialects, hf
from dspark_jax.loading import locate_target
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.parameters import parameters
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import scans
from dspark_jax.text import read_json
from folders import (DSPARK, GOLDEN, LLAMA, LLAMA_CONFIG, QWEN3, assert_same_weights, complains, copied, files,
                     fresh_drafter, golden_cases, qwen3, sharded, target_of, tied, words)

DRAFTERS = golden_cases("drafter_", "infer/r0/sampled_tokens") + golden_cases("generate_", "/ar_output_ids")
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
THETA, HEAD = float(LLAMA_CONFIG["rope_parameters"]["rope_theta"]), LLAMA_CONFIG["head_dim"]
FREQUENCIES = THETA ** (-np.arange(0, HEAD, 2) / HEAD)
KINDS = {"vanilla": {}, "gated": {"markov_head": "gated"}, "rnn": {"markov_head": "rnn", "confidence": "hidden"},
         "dflash": {"markov_rank": 0, "confidence": "none"}}


@pytest.mark.parametrize("case, dtype", [(c, "float32") for c in DRAFTERS] + [(c, "bfloat16") for c in DRAFTERS[::3]])
def test_export_of_import_is_identity(case, dtype, tmp_path):
  """Kills: a lost or transposed tensor, weights cast on the way, a config rewritten or with other line ends."""
  target = target_of(case)
  source = copied(GOLDEN / case, tmp_path / "source", dtype=dtype)
  with_head = lambda tensors: tensors | dialects.stored_frozen(tensors, tied(read_json(source / "config.json")))
  whole = copied(source, tmp_path / "whole", tensors=with_head)  # an export has both frozen copies
  text = (source / "config.json").read_bytes()
  for folder in (source, whole):
    (folder / "config.json").write_bytes(text.replace(b"\n", b"\r\n") if dtype == "bfloat16" else text)
  dspark_jax.import_drafter(source, tmp_path / "ours", target)
  dspark_jax.import_drafter(tmp_path / "ours", tmp_path / "again", target)
  for given in ("source", "ours", "again"):
    dspark_jax.export_drafter(tmp_path / given, tmp_path / "out", target)
    assert files(tmp_path / "out") == files(whole)
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "ours", target), dspark_jax.load_drafter(source, target))


def test_golden_bytes_themselves(tmp_path):
  """Kills: a comparison of two files that are both ours; these were written by torch."""
  dspark_jax.import_drafter(DSPARK, tmp_path / "ours", qwen3())
  dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
  golden = files(DSPARK)
  assert files(tmp_path / "out") == {name: golden[name] for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize("metadata", [None, {"made by": "Jürgen"}])
def test_header_text_is_kept(metadata, tmp_path):
  """Kills: always writing {"format": "pt"} into the header: other bytes than what came in."""
  source = copied(DSPARK, tmp_path / "source", metadata=metadata)
  dspark_jax.import_drafter(source, tmp_path / "ours", qwen3())
  dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
  assert files(tmp_path / "out") == files(source)


@pytest.mark.parametrize("target", ["bfloat16", "scanned"])
def test_any_form_of_the_target_will_do(target, tmp_path):
  """Kills: a target id, or a check of the frozen copies, that depends on dtype or on the layout of the layers."""
  dspark_jax.import_drafter(DSPARK, tmp_path / "ours", qwen3())
  other = dspark_jax.load_target(QWEN3, **({"scanned": True} if target == "scanned" else {"dtype": target}))
  for source in (DSPARK, tmp_path / "ours"):
    assert_same_weights(dspark_jax.load_drafter(source, other, dtype="float32"),
                        dspark_jax.load_drafter(DSPARK, qwen3()))
    # Of two dtypes, the states of recurrent drafters and of rnn heads could not be built.
    weights = parameters(dspark_jax.load_drafter(source, other)).values()
    assert {x.dtype for x in weights} == {other.norm.weight.dtype}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_frozen_copies_of_another_half_precision(dtype, tmp_path):
  """Kills: float16 copies held against weights that were rounded to bfloat16, in the one or in the other: the right
  drafter, and refused; another one that is taken for it."""
  small = lambda tensors: {name: (x * 2.0 ** -14).astype(dtype) for name, x in tensors.items()}  # below float16's own
  half = lambda tensors: {name: x.astype("float16") for name, x in small(tensors).items()}
  target = dspark_jax.load_target(copied(QWEN3, tmp_path / "t", tensors=small), dtype="bfloat16")
  dspark_jax.load_drafter(copied(DSPARK, tmp_path / "d", tensors=half), target)
  other = lambda tensors: {name: 1.01 * x for name, x in half(tensors).items()}
  with complains("made for another target"):
    dspark_jax.load_drafter(copied(DSPARK, tmp_path / "o", tensors=other), target)


def test_heads_that_the_kernels_do_not_suit(tmp_path):
  """Kills: a drafter of other heads than its target's that is refused only while its first round is compiled."""
  narrow = fresh_drafter(spec=dataclasses.replace(qwen3().config.spec, head_dim=8))
  dspark_jax.save_drafter(tmp_path / "d", narrow, qwen3())
  target = dspark_jax.load_target(QWEN3, scanned=False, kernels=Kernels("triton"))
  with complains(f"drafter {tmp_path / 'd'}: kernels: triton reads heads of a power of two", "8 wide: decode by ref"):
    dspark_jax.load_drafter(tmp_path / "d", target)
  target.use(Kernels())
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "d", target), narrow)


def test_export_refuses_a_rounded_target(tmp_path):
  """Kills: frozen copies taken from a target in bfloat16 and stored as float32: a few digits lost, in silence."""
  with pytest.raises(ValueError, match="load the target in float32"):
    dspark_jax.export_drafter(DSPARK, tmp_path / "out", dspark_jax.load_target(QWEN3, dtype="bfloat16"))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True])
def test_saved_here_loads_here(kind, reduced, tmp_path):
  """Kills: draft words that are not saved, or come back as 0..W-1; a head that the sidecar does not describe."""
  drafter = fresh_drafter(words=words() if reduced else None, seed=3, **KINDS[kind])
  dspark_jax.save_drafter(tmp_path / "run" / "drafter", drafter, qwen3())
  for place in (tmp_path / "run" / "drafter", tmp_path / "run"):  # a training run holds its drafter in `drafter`
    again = dspark_jax.load_drafter(place, qwen3())
    assert again.config == drafter.config
    assert_same_weights(again, drafter)
    assert (again.words is None) == (not reduced)
    if reduced:
      np.testing.assert_array_equal(again.words, words())


@pytest.mark.parametrize("kind", KINDS)
def test_trained_here_exports(kind, tmp_path):
  """Kills: a DeepSpec config that says something else than the weights; export that works for imports alone."""
  drafter = fresh_drafter(seed=5, **KINDS[kind])
  dspark_jax.save_drafter(tmp_path / "ours", drafter, qwen3())
  dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
  again = dspark_jax.load_drafter(tmp_path / "out", qwen3())
  assert again.config == drafter.config
  assert_same_weights(again, drafter)
  stored = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_array_equal(stored["lm_head.weight"], qwen3().head().weight)
  np.testing.assert_array_equal(stored["embed_tokens.weight"], qwen3().embed_tokens.weight[...])


@pytest.mark.parametrize("differs, complaint", [(dict(words=words()), "reduced draft vocabulary"),
                                                (dict(lens=True), "a lens")])
def test_what_has_no_deepspec_form(tmp_path, differs, complaint):
  """Kills: writing the W-row head as if W were the vocabulary, or no lens, for another engine to misread."""
  dspark_jax.save_drafter(tmp_path / "ours", fresh_drafter(**differs), qwen3())
  with pytest.raises(ValueError, match=f"{complaint} cannot be stored"):
    dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
  assert not (tmp_path / "out").exists()


def test_shards(tmp_path):
  """Kills: reading the first shard alone, or by the order of the files."""
  assert_same_weights(dspark_jax.load_target(sharded(QWEN3, tmp_path / "a")), qwen3(False))
  dspark_jax.import_drafter(sharded(DSPARK, tmp_path / "b"), tmp_path / "ours", qwen3())
  assert_same_weights(dspark_jax.load_drafter(tmp_path / "ours", qwen3()), dspark_jax.load_drafter(DSPARK, qwen3()))


def test_a_whole_file_beside_an_index(tmp_path):
  """Kills: shards of before loaded in the place of the model that was saved over them; asking for those when they are
  gone."""
  folder = sharded(LLAMA, tmp_path / "t")
  new = copied(LLAMA, tmp_path / "new", tensors=lambda tensors: {name: x + 1 for name, x in tensors.items()})
  shutil.copy(new / "model.safetensors", folder)
  assert_same_weights(dspark_jax.load_target(folder), dspark_jax.load_target(new))
  for shard in folder.glob("model-*"):
    shard.unlink()
  assert_same_weights(dspark_jax.load_target(folder), dspark_jax.load_target(new))


def test_tied_and_untied(tmp_path):
  """Kills: a random head where it is tied; the second copy that some exporters store, refused as unknown."""
  tied = dspark_jax.load_target(LLAMA)
  assert tied.lm_head is None
  np.testing.assert_array_equal(tied.head().weight, tied.embed_tokens.weight[...])
  twice = copied(LLAMA, tmp_path / "twice", tensors=lambda t: t | {
      "lm_head.weight": t["model.embed_tokens.weight"], INV_FREQ: jnp.asarray(FREQUENCIES, jnp.float16)})
  assert_same_weights(dspark_jax.load_target(twice), tied)
  np.testing.assert_array_equal(qwen3().head().weight, load_file(QWEN3 / "model.safetensors")["lm_head.weight"])
  assert not np.array_equal(qwen3().head().weight, qwen3().embed_tokens.weight[...])


def test_a_head_that_is_stored_is_used(tmp_path):
  """Kills: a trained head dropped because the config says that it is tied: other tokens, and no word of it."""
  head = lambda t: jnp.flip(t["model.embed_tokens.weight"], 0)
  target = dspark_jax.load_target(copied(LLAMA, tmp_path / "t", tensors=lambda t: t | {"lm_head.weight": head(t)}))
  np.testing.assert_array_equal(target.head().weight, jnp.flip(target.embed_tokens.weight[...], 0))
  assert not target.config.tie_word_embeddings


@pytest.mark.parametrize("stored", [FREQUENCIES * 2, FREQUENCIES[:-1], np.ones(HEAD // 2, np.int8)])
def test_frequencies_that_do_not_follow_from_theta(stored, tmp_path):
  """Kills: dropping the rotary frequencies of a model that was trained with others."""
  folder = copied(LLAMA, tmp_path / "t", tensors=lambda t: t | {
      INV_FREQ: jnp.asarray(stored, jnp.int8 if stored.dtype == np.int8 else jnp.float32)})
  with complains(str(folder), f"inv_freq holds other frequencies than rope_theta {THETA} gives"):
    dspark_jax.load_target(folder)


@pytest.mark.parametrize("source", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_both_spellings_of_the_rope(source, tmp_path):
  """Kills: reading one schema only, or falling back to theta 10000 in silence."""
  def older(config):
    theta = config.pop("rope_parameters")["rope_theta"]
    return config | {"rope_theta": theta, "rope_scaling": None}
  new, old = dspark_jax.load_target(source), dspark_jax.load_target(copied(source, tmp_path / "old", config=older))
  assert old.config == new.config
  assert new.config.spec.rope_theta == json.loads((source / "config.json").read_text())["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type' is 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type' is 'llama3'"),
    ({"rope_parameters": {"rope_theta": THETA, "rope_type": "longrope"}}, "rope_parameters.rope_type' is 'longrope'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor' is 0.5"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has a factor and no rope_type"),
    ({"rope_scaling": {"rope_theta": 2 * THETA}}, f"rope_theta is .* and {2 * THETA} in different places"),
    ({"is_causal": False}, "is_causal' is False"),
    ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ({"sliding_window": 64}, "sliding_window' is 64"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types' is .*expected .'full_attention'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": "48"}, "hidden_size' is '48'")])
def test_what_would_compute_something_else_is_refused(change, word, tmp_path):
  """Kills: loading a model whose trained RoPE scaling, window, biases or activation we would leave out."""
  with pytest.raises(ValueError, match=word):
    dspark_jax.load_target(copied(LLAMA, tmp_path / "t", config=lambda c: c | change))


def test_dtypes(tmp_path):
  """Kills: bfloat16 read as raw bits, a norm left in float32, a cast through another dtype."""
  low = dspark_jax.load_target(QWEN3, dtype="bfloat16")
  for name, variable in parameters(low).items():
    assert variable.dtype == jnp.bfloat16, name
    np.testing.assert_array_equal(variable[...], parameters(qwen3(False))[name][...].astype(jnp.bfloat16))
  back = dspark_jax.load_target(copied(QWEN3, tmp_path / "bf16", dtype="bfloat16"))
  for name, variable in parameters(back).items():
    assert variable.dtype == jnp.float32, name
    np.testing.assert_array_equal(variable[...], parameters(low)[name][...].astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["int8", "bool", "float64", "complex64", "float8_e4m3fn", ">f4", "fp32", "", 7])
def test_dtypes_that_are_none(dtype, tmp_path):
  """Kills: a drafter of zeros, which accepts nothing and says nothing; numpy's TypeError; the default for an empty
  name."""
  load = lambda **how: dspark_jax.load_drafter(DSPARK, qwen3(), **how)
  convert = lambda **how: dspark_jax.import_target(QWEN3, tmp_path / "t", **how)
  for load in (functools.partial(dspark_jax.load_target, QWEN3), load, convert):
    with complains(f"dtype is {dtype!r}, expected one that models can be used in: give float32, bfloat16, float16"):
      load(dtype=dtype)
  assert not (tmp_path / "t").exists()


def test_scanned_is_stacked():
  """Kills: layers stacked in another order (10 before 2), or unrolled where one layer was to be compiled."""
  (layer,) = dspark_jax.load_target(QWEN3, scanned=True).layers  # a period of one
  stacked = parameters(layer)
  assert isinstance(dspark_jax.load_target(QWEN3).layers, type(qwen3(False).layers))  # the default on a CPU
  assert [scans(platform) for platform in ("cpu", "gpu", "cuda", "tpu")] == [False, False, False, True]
  for name, variable in stacked.items():
    for index, layer in enumerate(qwen3(False).layers):
      np.testing.assert_array_equal(variable[index], parameters(layer)[name][...])


@pytest.mark.parametrize("family", TARGETS)
def test_a_family_reads_back_the_layers_it_writes(family):
  """Kills: an exported drafter whose config says something else of its layers, or names another family's."""
  family = TARGETS[family]
  spec, problems = family.block(json.loads((QWEN3 / "config.json").read_text()))
  assert not problems
  again = family.block(family.keys(spec))
  assert again == (spec, []) and type(spec) is family.spec


class Experts(nnx.Module):
  """A parameter that is stored in parts."""

  def __init__(self):
    self.up, self.gate = nnx.Param(jnp.zeros((3, 2, 4))), nnx.Param(jnp.zeros(2))


def test_parameters_stored_in_parts():
  """Kills: experts stacked in another order, or a missing or misshapen one that is not named."""
  stored = lambda name: tuple(f"experts.{e}.up" for e in range(3)) if name == "up" else f"model.{name}"
  parts = {f"experts.{e}.up": np.full((2, 4), e, np.float32) for e in range(3)} | {"model.gate": np.ones(2, np.float32)}
  filled = hf.fill(Experts, parts, "experts", stored=stored)
  np.testing.assert_array_equal(filled.up[:, 0, 0], [0, 1, 2])
  np.testing.assert_array_equal(filled.gate[...], [1, 1])
  spoiled_parts = parts | {"experts.2.up": np.ones((4, 2), np.float32)}
  del spoiled_parts["experts.1.up"]
  with complains("experts.1.up is missing", "experts.2.up is float32[4, 2], expected floating point [2, 4]"):
    hf.fill(Experts, spoiled_parts, "experts", stored=stored)


@pytest.fixture(autouse=True)
def nothing_fetched():
  loading._fetched.cache_clear()


def hub(monkeypatch, folder):
  """A hub of one model; gives the list of what is asked of it."""
  asked = []
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, *, allow_patterns: (
      asked.append(allow_patterns), str(folder))[1])
  return asked


def test_the_family_is_checked_before_weights_are_fetched(monkeypatch, tmp_path):
  """Kills: gigabytes fetched of a model that is then refused."""
  asked = hub(monkeypatch, copied(QWEN3, tmp_path / "q", config=lambda c: c | {"model_type": "gemma3"}))
  with complains("family 'gemma3'", error=NotImplementedError):
    locate_target("google/gemma")
  with complains("drafter architecture 'Qwen3ForCausalLM'", error=NotImplementedError):
    dspark_jax.load_drafter("google/gemma", qwen3())
  assert not [p for patterns in asked for p in patterns if "*" in p]


@pytest.mark.parametrize("ours", [False, True])
def test_a_drafter_from_the_hub(ours, monkeypatch, tmp_path):
  """Kills: drafters by path alone; a folder of ours without its weights, which lie in folders of their own."""
  if ours:
    dspark_jax.import_drafter(DSPARK, tmp_path / "ours", qwen3())
  asked = hub(monkeypatch, tmp_path / "ours" if ours else DSPARK)
  assert_same_weights(dspark_jax.load_drafter("owner/drafter", qwen3()), dspark_jax.load_drafter(DSPARK, qwen3()))
  assert loading.made_for("owner/drafter", qwen3())
  assert loading.stored_temperatures("owner/drafter", dspark_jax.load_drafter(DSPARK, qwen3())) is None
  dspark_jax.export_drafter("owner/drafter", tmp_path / "out", qwen3())
  assert files(tmp_path / "out")["config.json"] == files(DSPARK)["config.json"]
  assert len(asked) == 2 and ("weights/*" in asked[1]) == ours  # once for all of these


def test_hub_id(monkeypatch):
  """Kills: fetching pickles and code along with the weights; a local folder looked up on the hub."""
  asked = []
  def snapshot_download(name, *, allow_patterns):
    asked.append((name, allow_patterns))
    return str(QWEN3)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert locate_target("Qwen/Qwen3-4B") == QWEN3
  assert_same_weights(dspark_jax.load_target("Qwen/Qwen3-4B"), qwen3(False))
  (name, first), (_, second) = asked  # what it is, then its weights; each once
  assert name == "Qwen/Qwen3-4B" and "config.json" in first and not [p for p in first if "*" in p]
  assert {"*.json", "*.safetensors"} <= set(second)
  assert not [p for p in second if p.endswith((".bin", ".py", ".pt", "*"))]
  assert locate_target(QWEN3) == QWEN3 and len(asked) == 2


def test_hub_without_network(monkeypatch):
  """Kills: a page of traceback for a typo in a path."""
  def snapshot_download(name, **_):
    raise ConnectionError("no route to host")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  with pytest.raises(ValueError, match="no local path and could not be fetched from the hub"):
    dspark_jax.load_target("runs/nothing")
  with pytest.raises(ValueError, match="does not exist: expected a GGUF file"):
    dspark_jax.load_target("/nowhere/model")


def test_no_pickle(tmp_path):
  """Kills: weights that run code when they are loaded."""
  shutil.copy(QWEN3 / "config.json", tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match="pytorch_model.bin only, which loading would execute as code: convert them"):
    dspark_jax.load_target(tmp_path)
  root = Path(dspark_jax.__file__).parents[1]
  for file in [p for part in ("dspark_jax", "infer", "train") for p in (root / part).rglob("*.py")]:
    found = re.search(r"import pickle|pickle\.load|torch\.load|allow_pickle|trust_remote_code|\beval\(|\bexec\(",
                      file.read_text().replace(".eval()", ""))
    assert found is None, (file, found)


def test_importing_the_library_is_cheap():
  """Kills: paying a second for transformers, or for the hub, in programs that never touch them."""
  code = "import sys, dspark_jax; print([m for m in ('transformers', 'huggingface_hub', 'torch') if m in sys.modules])"
  root = Path(dspark_jax.__file__).parents[1]
  out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"


def test_configuration_alone_allocates_nothing():
  """Kills: initialising random weights just to overwrite them: twice the memory, and minutes for a large model."""
  built = []
  real = jax.random.truncated_normal
  def counted(key, *args, **kwargs):
    built.append(isinstance(key, jax.core.Tracer))
    return real(key, *args, **kwargs)
  jax.random.truncated_normal = counted
  try:
    dspark_jax.load_target(QWEN3)
  finally:
    jax.random.truncated_normal = real
  assert built and all(built)
