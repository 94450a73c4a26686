"""YaRN: the numbers of transformers' own function, and what configs of targets and of stored drafters say of it."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers.modeling_rope_utils as hf_rope
from flax import nnx

import dspark_jax
from dspark_jax.config import from_json, to_json
from dspark_jax.loading import drafter_from, target_config, target_id
from dspark_jax.nn.layers import Attention, BlockSpec
from dspark_jax.nn.rope import Yarn, frequencies, rope_table
from dspark_jax.targets import TARGETS
from folders import DSPARK, LLAMA, QWEN3, assert_same_weights, complains, copied, files, qwen3

QWEN = Yarn(4.0, 32768)  # of Qwen3's model cards
GPT_OSS = Yarn(32.0, 4096, truncate=False)
CASES = {"qwen3": (QWEN, 1e6, 128), "gpt-oss": (GPT_OSS, 150000.0, 64), "half": (Yarn(2.0, 64), 100.0, 8),
         "deepseek": (Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.8), 1e4, 64), "told": (Yarn(
             8.0, 2048, 16.0, 2.0, attention_factor=0.9, mscale=2.0, mscale_all_dim=1.0), 1e4, 32),
         "one of two": (Yarn(8.0, 2048, mscale=0.7), 1e4, 32), "no turn": (Yarn(3.0, 2), 1e4, 16),
         "none": (Yarn(1.0, 4096), 1e4, 64)}


class Numbers(np.ndarray):
  """What transformers asks of a tensor."""

  def to(self, device=None, dtype=None):
    return self.astype(dtype) if dtype else self


def theirs(scaling, theta, width, monkeypatch):
  """(frequencies, scale) by transformers, whose function runs on NumPy in the place of torch, in float64."""
  torch = types.SimpleNamespace(float=np.float64, float32=np.float64, clamp=lambda x, low, high: np.clip(x, low, high),
                                arange=lambda *args, dtype=None: np.arange(*args).astype(np.float64).view(Numbers))
  monkeypatch.setattr(hf_rope, "torch", torch, raising=False)  # which is not installed
  config = types.SimpleNamespace(rope_parameters=to_json(scaling) | {"rope_theta": theta}, head_dim=width,
                                 hidden_size=0, num_attention_heads=1, standardize_rope_params=lambda: None)
  return hf_rope._compute_yarn_parameters(config)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name, monkeypatch):
  """Kills: a ramp over half widths that are counted as widths, floor and ceil where truncate is false, the slowed and
  the kept end swapped, a scale that takes one of two mscales."""
  scaling, theta, width = CASES[name]
  frequency, scale = frequencies(width, theta, scaling)
  wanted, wanted_scale = theirs(scaling, theta, width, monkeypatch)
  assert frequency.dtype == jnp.float32 and frequency.shape == (width // 2,)
  np.testing.assert_allclose(frequency, wanted, rtol=3e-6)
  assert scale == pytest.approx(wanted_scale, rel=1e-12)
  if name == "gpt-oss":
    assert scale == pytest.approx(1.3466, abs=5e-5)


def test_a_factor_of_one_is_no_scaling():
  """Kills: another table for YaRN than for the rest; half a position off."""
  positions = np.arange(50, dtype=np.int32)[None]
  for a, b in zip(rope_table(positions, 64, 1e4, CASES["none"][0]), rope_table(positions, 64, 1e4)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_queries_and_keys_are_scaled_both():
  """Kills: a scale on one of them, on the scores, or on the angles; layers that leave the scaling out."""
  spec = BlockSpec(16, 24, 4, 2, 8, 1e-6, 100.0, qk_norm=True, rope_scaling=CASES["half"][0])
  made = lambda spec: Attention(spec, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.tile(np.random.default_rng(0).normal(size=(1, 1, 16)), (1, 2, 1)), jnp.float32)
  at = np.array([[0, 37]], np.int32)
  frequency, scale = frequencies(8, 100.0, spec.rope_scaling)
  plain = jax.tree.map(np.asarray, made(dataclasses.replace(spec, rope_scaling=None)).project(x, 0 * at))
  scaled = made(spec).project(x, at)
  assert scale == pytest.approx(1 + 0.1 * math.log(2))
  for before, after in zip(plain[:2], scaled[:2]):
    turned = (before[..., :4] + 1j * before[..., 4:]) * np.exp(1j * at[..., None, None] * np.asarray(frequency))
    np.testing.assert_allclose(after, scale * np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
  np.testing.assert_array_equal(scaled[2], plain[2])


# In files

KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WITHOUT = lambda config: {key: value for key, value in config.items() if not key.startswith("rope_")}
SPELLINGS = {
    "new": {"rope_parameters": KEYS | {"rope_theta": 1e5}},
    "old": {"rope_theta": 1e5, "rope_scaling": {"type" if key == "rope_type" else key: x for key, x in KEYS.items()}},
    "both": {"rope_parameters": KEYS | {"rope_theta": 1e5, "beta_fast": None}, "rope_scaling": KEYS | {"beta_slow": 1}},
    "added": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_scaling": KEYS},
    "outer": {"rope_parameters": KEYS | {"rope_theta": 1e5}, "rope_scaling": {},
              "original_max_position_embeddings": 64},
    "whole": {"rope_parameters": KEYS | {"rope_theta": 1e5, "beta_fast": 32, "type": "yarn", "truncate": True}}}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_thing(spelling, tmp_path):
  """Kills: YaRN that is read from one place alone, or dropped beside a default; positions of before it was added."""
  folder = copied(LLAMA, tmp_path / "t", config=lambda c: WITHOUT(c) | SPELLINGS[spelling] | {
      "max_position_embeddings": 100})
  found = target_config(folder)
  assert found.spec.rope_scaling == Yarn(4.0, 64) and found.spec.rope_theta == 1e5 and found.max_positions == 256
  plain = target_config(LLAMA)
  assert dataclasses.replace(found.spec, rope_scaling=None) == dataclasses.replace(plain.spec, rope_theta=1e5)


@pytest.mark.parametrize("change, parts", [
    ({"factor": None}, ["rope_parameters: key 'factor' is missing"]),
    ({"factor": 0.5, "beta_slow": "1"}, ["'factor' is 0.5", "'beta_slow' is '1'"]),
    ({"original_max_position_embeddings": None}, ["key 'original_max_position_embeddings' is missing"]),
    ({"type": "default"}, ["has rope_type 'yarn' and type 'default'"]),
    ({"rope_type": "longrope"}, ["'rope_parameters.rope_type' is 'longrope', expected 'default' or 'yarn'"]),
    ({"rope_theta": None}, ["no rope theta"])])
def test_what_of_yarn_is_refused(change, parts, tmp_path):
  """Kills: a length or a factor that is guessed where a file lacks it; one of two contradictions."""
  folder = copied(LLAMA, tmp_path / "t", config=lambda c: WITHOUT(c) | {
      "rope_parameters": KEYS | {"rope_theta": 1e5} | change})
  with complains(str(folder), *parts):
    target_config(folder)


@pytest.mark.parametrize("change", [
    {"rope_scaling": KEYS | {"factor": 8.0}}, {"rope_scaling": {"rope_type": "default"}},
    {"original_max_position_embeddings": 32}])
def test_two_things_said_of_yarn(change, tmp_path):
  """Kills: the first of two scalings, without a word of the second; the inner of two lengths, where transformers takes
  the outer one."""
  folder = copied(LLAMA, tmp_path / "t", config=lambda c: WITHOUT(c) | {
      "rope_parameters": KEYS | {"rope_theta": 1e5}} | change)
  with complains("say different things of yarn"):
    target_config(folder)


@pytest.mark.parametrize("scaling", [QWEN, GPT_OSS, CASES["told"][0]])
@pytest.mark.parametrize("family", TARGETS)
def test_layers_are_read_back(family, scaling):
  """Kills: an exported config that lacks a number of its scaling; records of a drafter that lack one."""
  family = TARGETS[family]
  spec = dataclasses.replace(family.block(json.loads((QWEN3 / "config.json").read_text()))[0], rope_scaling=scaling)
  assert family.block(json.loads(json.dumps(family.keys(spec)))) == (spec, [])
  assert from_json(BlockSpec, json.loads(json.dumps(to_json(spec))), "spec") == spec


def test_drafters_of_a_yarn_target(tmp_path):
  """Kills: a drafter with another rope than its target's, one whose scaling is lost on the way to DeepSpec and back, a
  target that passes for the one without."""
  target = dspark_jax.load_target(copied(QWEN3, tmp_path / "t", config=lambda c: c | {"rope_scaling": KEYS}))
  plain = dspark_jax.load_target(QWEN3)
  assert target_id(target) != target_id(plain)
  source = copied(DSPARK, tmp_path / "source", config=lambda c: c | {"rope_scaling": KEYS})
  dspark_jax.import_drafter(source, tmp_path / "ours", target)
  dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "back", target)
  assert files(tmp_path / "back") == files(source)
  drafter = dspark_jax.load_drafter(tmp_path / "ours", target)
  assert drafter.config.spec.rope_scaling == target.config.spec.rope_scaling == Yarn(4.0, 64)
  dspark_jax.save_drafter(tmp_path / "trained", drafter, target)  # nothing imported: the config is written anew
  dspark_jax.export_drafter(tmp_path / "trained", tmp_path / "new", target)
  again = dspark_jax.load_drafter(tmp_path / "new", target)
  assert again.config == drafter.config
  assert_same_weights(again, drafter)
  with complains("it was made for target"):
    dspark_jax.load_drafter(tmp_path / "ours", plain)


def test_weights_do_not_depend_on_the_rope():
  """Kills: a second stage that DeepSpec's drafters cannot begin, or whose drafter turns as the first stage's did."""
  before = dspark_jax.load_drafter(DSPARK, qwen3())
  config = dataclasses.replace(before.config, spec=dataclasses.replace(before.config.spec, rope_scaling=QWEN))
  after = drafter_from(DSPARK, config)
  assert after.config == config
  assert_same_weights(after, before)
  with complains(str(DSPARK), "block_size is"):
    drafter_from(DSPARK, dataclasses.replace(config, block_size=9))
