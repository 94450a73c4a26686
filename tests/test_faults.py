"""Bad input gets one sentence that says what, got, expected and remedy."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dspark_jax
from dspark_jax.checkpoints import state
from dspark_jax.checkpoints.dialects import FROZEN
from dspark_jax.config import to_json
from dspark_jax.data import chat
from dspark_jax.drafters import DSpark
from dspark_jax.drafters.dspark import DSparkChoices
from dspark_jax.loading import target_id
from dspark_jax.nn.parameters import values
from dspark_jax.targets.decoder import Decoder
from dspark_jax.text import read_json
from folders import DSPARK, LLAMA, QWEN3, complains, copied, cut, fresh_drafter, qwen3, sharded, spoiled, words
from train.config import TrainConfig

CONFIG = read_json(QWEN3 / "config.json")
WIDTH, VOCABULARY, POSITIONS = CONFIG["hidden_size"], CONFIG["vocab_size"], CONFIG["max_position_embeddings"]
LAYERS = CONFIG["num_hidden_layers"]

# Weight files

@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights(share, tmp_path):
  """Kills: zeros or garbage for the part of a download that never came; a traceback of the library below."""
  for load, source in ((dspark_jax.load_target, QWEN3), (lambda p: dspark_jax.load_drafter(p, qwen3()), DSPARK)):
    folder = copied(source, tmp_path / source.name)
    cut(folder / "model.safetensors", share)
    with complains("model.safetensors cannot be read", "download it again"):
      load(folder)


def test_missing_weights(tmp_path):
  """Kills: a model of random weights where there were none to load."""
  shutil.copy(QWEN3 / "config.json", tmp_path)
  with complains("weight file model.safetensors is missing", "download it again"):
    dspark_jax.load_target(tmp_path)
  with complains("config.json is missing"):
    dspark_jax.load_target(tmp_path.parent)


def test_shards_at_fault(tmp_path):
  """Kills: going on with the shards that are there; trusting the index over the files."""
  folder = sharded(QWEN3, tmp_path / "a")
  (folder / "model-00002-of-00003.safetensors").unlink()
  (folder / "model-00003-of-00003.safetensors").unlink()
  with complains("model-00002-of-00003.safetensors is missing", "model-00003-of-00003.safetensors is missing"):
    dspark_jax.load_target(folder)
  folder = sharded(QWEN3, tmp_path / "b")
  cut(folder / "model-00002-of-00003.safetensors")
  with complains("model-00002-of-00003.safetensors cannot be read"):
    dspark_jax.load_target(folder)
  index = sharded(QWEN3, tmp_path / "c") / "model.safetensors.index.json"
  table = json.loads(index.read_text())
  table["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
  index.write_text(json.dumps(table))
  with complains("lm_head.weight is listed in the index but not in model-00002"):
    dspark_jax.load_target(index.parent)
  for broken in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight'):
    index.write_text(broken)
    with complains("model.safetensors.index.json"):
      dspark_jax.load_target(index.parent)


def test_truncated_gguf(tmp_path):
  """Kills: reading past the end of a file, or calling a missing file damaged."""
  with open(chat.smollm2_path(), "rb") as whole:
    (tmp_path / "cut.gguf").write_bytes(whole.read(3_000_000))
  with complains("cut.gguf is a damaged GGUF file", "download it again"):
    dspark_jax.load_target(tmp_path / "cut.gguf")
  (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04 and so on")
  with complains("give the path of a .gguf file"):
    dspark_jax.load_target(tmp_path / "other.gguf")
  with complains("nothing.gguf does not exist", "expected a GGUF file"):
    dspark_jax.load_target(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("kind", ["target", "deepspec", "ours"])
def test_every_tensor_at_fault_is_listed(kind, tmp_path):
  """Kills: one error per attempt; an unknown tensor dropped; a wrong shape broadcast; int8 weights taken as numbers."""
  prefix = "model." if kind == "target" else ""
  raw = read_json(DSPARK / "config.json") if kind == "deepspec" else CONFIG
  queries, inner = raw["num_attention_heads"] * raw["head_dim"], raw["intermediate_size"]
  parts = [f"tensor {prefix}layers.0.mlp.up_proj.weight is missing", f"tensor {prefix}norm.weight is missing",
           "tensor extra.weight is not part of this model", f"{prefix}layers.0.self_attn.q_proj.bias is not part",
           f"{prefix}layers.0.self_attn.q_proj.weight is float32[{queries * WIDTH}, 1], "
           f"expected floating point [{queries}, {WIDTH}]",
           f"{prefix}layers.0.mlp.gate_proj.weight is int8[{inner}, {WIDTH}]"]
  if kind == "target":
    with complains(*parts):
      dspark_jax.load_target(copied(QWEN3, tmp_path / "t", tensors=spoiled(prefix)))
  elif kind == "deepspec":
    drop = lambda tensors: {k: v for k, v in spoiled("")(tensors).items() if k != "lm_head.weight"}
    with complains(*parts, "tensor lm_head.weight is missing"):
      dspark_jax.load_drafter(copied(DSPARK, tmp_path / "d", tensors=drop), qwen3())
  else:
    drafter = fresh_drafter()
    weights = spoiled("")(values(drafter))
    save_ours(tmp_path / "o", drafter, weights=weights)
    with complains(*parts):
      dspark_jax.load_drafter(tmp_path / "o", qwen3())


# Configurations


def test_rope_theta_has_no_default(tmp_path):
  """Kills: rope theta 10000 in silence: the model talks, and is wrong."""
  drop = lambda config: {k: v for k, v in config.items() if k != "rope_parameters"}
  with complains("no rope theta: expected rope_parameters.rope_theta or rope_theta"):
    dspark_jax.load_target(copied(QWEN3, tmp_path / "t", config=drop))
  with complains("no rope theta"):
    dspark_jax.load_drafter(copied(DSPARK, tmp_path / "d", config=drop), qwen3())


def test_all_problems_of_a_config_at_once(tmp_path):
  """Kills: fixing a config one error at a time; a config that is no object."""
  drop = ("hidden_size", "vocab_size", "rope_parameters")
  with complains("'hidden_size' is missing", "'vocab_size' is missing", "no rope theta",
                 "'attention_bias' is True, expected False"):
    dspark_jax.load_target(copied(LLAMA, tmp_path / "t", config=lambda c: {
        k: v for k, v in c.items() if k not in drop} | {"attention_bias": True}))
  folder = copied(LLAMA, tmp_path / "u")
  for text in ("[]", "{", "", '"llama"'):
    (folder / "config.json").write_text(text)
    with complains("config.json"):
      dspark_jax.load_target(folder)


def test_other_families(tmp_path):
  """Kills: running Gemma weights through Llama's block because the names agree; a KeyError for a new family."""
  with complains("family 'gemma4_text'", "supported are llama, qwen3", error=NotImplementedError):
    dspark_jax.load_target(copied(LLAMA, tmp_path / "t", config=lambda c: c | {"model_type": "gemma4_text"}))
  for name in ("Gemma4DSparkModel", "Gemma4Eagle3Model", None):
    folder = copied(DSPARK, tmp_path / f"d{name}", config=lambda c: c | {"architectures": [name] if name else None})
    with complains("is not supported", "Qwen3DSparkModel", error=NotImplementedError):
      dspark_jax.load_drafter(folder, qwen3())


@pytest.mark.parametrize("taps, word", [((0, LAYERS - 1), f"taps [{LAYERS - 1}]"),
                                        ((0, LAYERS, -2), f"taps [{LAYERS}, -2]"), ((), "taps are empty")])
def test_taps(taps, word, tmp_path):
  """Kills: a tap that is never written, and the last layer, whose stored output is normed in one dialect only."""
  with complains(word):
    fresh_drafter(taps=taps)
  with complains(word):
    dspark_jax.load_drafter(copied(DSPARK, tmp_path / "d", config=lambda c: c | {"target_layer_ids": list(taps)}),
                            qwen3())


def test_all_problems_of_a_drafter_at_once():
  """Kills: impossible settings that surface as shapes deep in a step, or not at all."""
  far, words = LAYERS + 3, 4 * VOCABULARY
  with complains(f"taps [{far}]", "markov_head is 'lstm'", "confidence is 'both'", "block_size is 0",
                 f"mask_token_id is {VOCABULARY}", f"draft_vocab_size is {words}"):
    fresh_drafter(taps=(far,), markov_head="lstm", confidence="both", block_size=0, mask_token_id=VOCABULARY,
                  draft_vocab_size=words)
  with complains("markov_rank is 0: use 'hidden' or 'none'"):
    fresh_drafter(markov_rank=0)


# Drafters of other targets


def test_other_width():
  """Kills: shape errors from inside a matrix product."""
  config = qwen3().config
  spec = dataclasses.replace(config.spec, hidden_size=WIDTH + 16)
  other = Decoder(dataclasses.replace(config, num_layers=1, vocab_size=2 * VOCABULARY, spec=spec), rngs=nnx.Rngs(0))
  with complains(f"width is {WIDTH}, the target's is {WIDTH + 16}", "made for another target",
                 f"vocabulary is {VOCABULARY}, the target's is {2 * VOCABULARY}"):
    dspark_jax.load_drafter(DSPARK, other)


def test_same_width_other_weights(tmp_path):
  """Kills: a drafter that fits by shape, and accepts nothing because it learned from another model."""
  turned = lambda tensors: tensors | {name: tensors[name][::-1] for name in FROZEN}
  size = f"[{VOCABULARY}, {WIDTH}]"
  with complains(f"embed_tokens.weight {size} is not the target's", f"lm_head.weight {size} is not the target's"):
    dspark_jax.load_drafter(copied(DSPARK, tmp_path / "turned", tensors=turned), qwen3())
  dspark_jax.save_drafter(tmp_path / "ours", fresh_drafter(), qwen3())
  double = lambda tensors: tensors | {"model.embed_tokens.weight": 2 * tensors["model.embed_tokens.weight"]}
  last = f"model.layers.{LAYERS - 1}.self_attn.v_proj.weight"
  merged = lambda tensors: tensors | {last: 1.01 * tensors[last]}  # an adapter, into one matrix
  for name, change in (("w", dict(tensors=double)), ("a", dict(tensors=merged)),
                       ("c", dict(config=lambda c: c | {"rms_norm_eps": 1e-5}))):
    other = dspark_jax.load_target(copied(QWEN3, tmp_path / name, **change))
    with complains(f"made for target {target_id(qwen3())}, this target is {target_id(other)}",
                   "load the target it was"):
      dspark_jax.load_drafter(tmp_path / "ours", other)


# Generation


@pytest.mark.parametrize("prompts, settings, parts", [
    ([[]], {}, ["prompt 0 is empty", "expected at least one token"]),
    ([], {}, ["there are no prompts"]),
    ([[1], [2, VOCABULARY]], {}, [f"prompt 1 has token ids 2..{VOCABULARY}", f"0..{VOCABULARY - 1}"]),
    ([[-1]], {}, ["token ids -1..-1"]),
    ([[1] * (POSITIONS - 12)], {}, ["shorten the prompt", f"{POSITIONS - 12} tokens and 64 new ones do not fit the "
                                    f"target's {POSITIONS} positions"]),
    ([[1]], {"max_new_tokens": 0}, ["max_new_tokens is 0"]),
    ([[1]], {"temperature": -1.0}, ["temperature"]),
    ([[1]], {"temperature": float("nan")}, ["temperature"]),
    ([[1]], {"temperature": 1.0, "top_p": 0.0}, ["top_p"]),
    ([[1]], {"temperature": 1.0, "top_k": -1}, ["top_k"])])
def test_prompts_and_settings(prompts, settings, parts):
  """Kills: a clipped token id, positions past the table, 0/0 in the sampler: text that looks fine."""
  with complains(*parts):
    dspark_jax.generate(qwen3(), None, prompts, **{"max_new_tokens": 64, **settings})


def test_training_settings_at_fault():
  """Kills: settings that surface after the target was loaded, or in the middle of a run; one complaint at a time."""
  with complains("drafter is a DSparkChoices, expected one of DSparkSettings, Eagle3Settings, MTPSettings",
                 "batch is 0, expected 1 to", "minutes is -1, expected more than 0",
                 "'float16', expected float32"):
    TrainConfig(target="t", out=Path("o"), drafter=DSparkChoices(taps=(1,)), batch=0, minutes=-1,
                compute_dtype="float16")
  with complains("kind is 'eagle', expected dspark", "expected draft_vocab_size 1..16384, got 0",
                 "set markov_head to vanilla"):
    DSpark.Settings(taps=(1,), from_bigrams=True, kind="eagle", markov_head="rnn")
  with complains("a lens predicts a draft at every position of its block: sample_from_anchor must be true"):
    fresh_drafter(lens=True, sample_from_anchor=False)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["target", "drafter"])
def test_nan_logits(whose):
  """Kills: argmax of NaN, which is token 0 every time: drafts all accepted, and nonsense out."""
  config = dataclasses.replace(qwen3().config, num_layers=2)
  target = Decoder(config, rngs=nnx.Rngs(0))
  drafter = fresh_drafter(num_target_layers=2, taps=(0,), block_size=2)
  broken = target if whose == "target" else drafter
  broken.norm.weight.set_value(broken.norm.weight[...].at[3].set(jnp.nan))
  with complains("NaN logits or confidences in rows [0, 1]", "weights are broken, or the dtype overflows"):
    dspark_jax.generate(target, drafter, [[1, 2], [3]], max_new_tokens=8)


# Our own folder


def save_ours(folder, drafter, *, sidecar=None, weights=None) -> None:
  """A drafter folder written whole, with a sidecar and weights of the test's choice."""
  whole = {"drafter": "dspark", "config": to_json(drafter.config), "target": target_id(qwen3()), "imported": None}
  stored = values(drafter)
  stored |= {} if drafter.words is None else {"draft_words": drafter.words}
  state.save_drafter(Path(folder), sidecar(whole) if sidecar else whole, weights or stored)


@pytest.mark.parametrize("change, parts", [
    (lambda s: s | {"format": 2}, ["has format 2, this version reads 1"]),
    (lambda s: s | {"drafter": "medusa"}, ["names the drafter 'medusa', known are dspark"]),
    (lambda s: s | {"drafter": ["dspark"]}, ["names the drafter ['dspark']"]),
    (lambda s: {k: v for k, v in s.items() if k != "target"}, ["key 'target' is missing"]),
    (lambda s: s | {"config": [1]}, ["expected an object"]),
    (lambda s: s | {"config": s["config"] | {"depth": 3, "taps": None, "block_size": "7"}}, ["unknown key 'depth'"]),
    (lambda s: s | {"config": {k: v for k, v in s["config"].items() if k != "taps"}}, ["key 'taps' is missing"]),
    (lambda s: s | {"config": s["config"] | {"taps": None, "block_size": "7"}},
     ["'taps' is None", "'block_size' is '7'"]),
    (lambda s: s | {"config": s["config"] | {"spec": {"hidden_size": 48}}}, ["key 'spec.num_heads' is missing"]),
    (lambda s: s | {"config": s["config"] | {"markov_rank": -10 ** 30, "num_layers": 0}},
     ["'markov_rank' is -1000", "expected an integer in 0..2147483647", "'num_layers' is 0"]),
    (lambda s: s | {"config": s["config"] | {"spec": s["config"]["spec"] | {"rope_theta": -1.0, "num_heads": -2}}},
     ["'spec.rope_theta' is -1.0", "'spec.num_heads' is -2"]),
    (lambda s: s | {"config": s["config"] | {"taps": [0, LAYERS - 1]}}, [f"taps [{LAYERS - 1}] are out of range"])])
def test_sidecar_at_fault(change, parts, tmp_path):
  """Kills: a newer format read as if it were ours; a misspelt key ignored; a KeyError for a damaged file."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())
  file = tmp_path / "d" / "drafter.json"
  known = json.loads(file.read_text())
  del known["digest"]  # as older versions wrote it: it would tell of every change alike
  file.write_text(json.dumps(change(known)))
  with complains("drafter" if "taps [" in parts[0] else "drafter.json", *parts):
    dspark_jax.load_drafter(tmp_path / "d", qwen3())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1'])
def test_sidecar_is_not_json(text, tmp_path):
  """Kills: a traceback of the JSON parser for a file that was cut."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())
  (tmp_path / "d" / "drafter.json").write_bytes(text)
  with complains("drafter.json"):
    dspark_jax.load_drafter(tmp_path / "d", qwen3())


def test_weights_at_fault(tmp_path):
  """Kills: Orbax's page of context for a folder that was half copied; zeros for chunks that are not there."""
  dspark_jax.save_drafter(tmp_path / "d", fresh_drafter(), qwen3())
  biggest = max((p for p in (tmp_path / "d" / "weights").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  shutil.copytree(tmp_path / "d", tmp_path / "cut")
  cut(tmp_path / "cut" / biggest.relative_to(tmp_path / "d"))
  shutil.copytree(tmp_path / "d", tmp_path / "lost")
  (tmp_path / "lost" / biggest.relative_to(tmp_path / "d")).unlink()
  shutil.copytree(tmp_path / "d", tmp_path / "none")
  shutil.rmtree(tmp_path / "none" / "weights")
  for name in ("cut", "lost", "none"):
    with complains("weights cannot be read", "save the drafter again"):
      dspark_jax.load_drafter(tmp_path / name, qwen3())
  with complains("nothing does not exist: expected a folder with drafter.json"):
    dspark_jax.load_drafter(tmp_path / "nothing", qwen3())
  with complains("is no drafter: expected a folder with drafter.json"):
    dspark_jax.load_drafter(tmp_path, qwen3())


@pytest.mark.parametrize("change, part", [
    (lambda w: None, "draft_words is missing"), (lambda w: w[:-1], "draft_words is [4], expected [5]"),
    (lambda w: w[::-1], "must be ascending"), (lambda w: w.at[1].set(0), "must be ascending"),
    (lambda w: w - 1, f"must be ascending token ids below {VOCABULARY}"),
    (lambda w: w + 3, f"below {VOCABULARY}")])
def test_draft_words_at_fault(change, part, tmp_path):
  """Kills: drafts mapped to other tokens: nothing is accepted, or a token twice as likely as the sampler thinks."""
  drafter = fresh_drafter(words=words())
  new = change(words())
  weights = values(drafter) | ({} if new is None else {"draft_words": new})
  save_ours(tmp_path / "d", drafter, weights=weights)
  with complains(part):
    dspark_jax.load_drafter(tmp_path / "d", qwen3())


@pytest.mark.parametrize("wrong", [[5, 3, 9], [3, 3, 9], np.uint8([5, 3, 9]), [-1, 5], [3, VOCABULARY], [3.5, 5.0], [],
                                   [[3, 5]], 3, [False, True]], ids=str)
def test_words_that_are_none(wrong):
  """Kills: words that are trained with and saved, and refused when they are loaded; one that is drawn twice as often;
  a fraction that is cut off."""
  with complains("words is ", f"expected token ids of 0..{VOCABULARY - 1}, ascending"):
    fresh_drafter(words=wrong)
  assert fresh_drafter(words=(0, VOCABULARY - 1)).words.tolist() == [0, VOCABULARY - 1]


def test_words_are_checked_as_they_are_saved(tmp_path):
  """Kills: a drafter whose words were replaced after it was made, saved so that nothing can load it."""
  drafter = fresh_drafter(words=words())
  drafter.draft_words.set_value(words()[::-1])
  with complains(f"drafter {tmp_path / 'd'}: draft_words must be ascending"):
    dspark_jax.save_drafter(tmp_path / "d", drafter, qwen3())
  assert not (tmp_path / "d").exists()
