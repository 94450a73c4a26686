"""Stored drafters of other makers: computed as they were trained, or refused by the key that says otherwise."""

import pytest

import dspark_jax
from dspark_jax.text import read_json
from folders import DSPARK, GOLDEN, QWEN3, assert_same_weights, complains, copied, qwen3

ORIGINAL = GOLDEN / "generate_dflash_original"
CONFIG = read_json(DSPARK / "config.json")
VOCABULARY, LAST = CONFIG["vocab_size"], CONFIG["num_target_layers"] - 1


def load(folder):
  return dspark_jax.load_drafter(folder, qwen3())


def nested(**keys):
  return lambda config: config | {"dflash_config": config.get("dflash_config", {}) | keys}


@pytest.mark.parametrize("source", [ORIGINAL, DSPARK], ids=["original", "deepspec"])
@pytest.mark.parametrize("key, neutral, other", [
    ("causal", False, True), ("is_causal", False, True), ("use_swa", False, True), ("attention_sink_bias", False, True),
    ("final_logit_softcapping", None, 30.0), ("input_embedding_scale", 1.0, 6.9), ("output_multiplier", 1, 0.5),
    ("projector_type", "dflash", "domino"), ("draft_vocab_size", VOCABULARY, VOCABULARY // 2),
    ("quantization_config", None, {"quant_method": "fp8"}), ("rope_is_neox_style", True, False)])
def test_keys_that_change_the_numbers(source, key, neutral, other, tmp_path):
  """Kills: reading past a key that no tensor tells of, at either level; refusing a value that changes nothing."""
  load(copied(source, tmp_path / "neutral", config=nested(**{key: neutral})))
  for level, change in (("top", lambda c: c | {key: other}), ("nested", nested(**{key: other}))):
    with complains(repr(key), repr(other)[:20], "is not supported"):
      load(copied(source, tmp_path / level, config=change))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_copies(dtype, tmp_path):
  """Kills: numpy's sentence about data types, without the file or the tensor, for a frozen copy of another type."""
  quantised = lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].astype(dtype)}
  with complains(str(tmp_path / "d"), "lm_head.weight is ", "expected floating point"):
    load(copied(DSPARK, tmp_path / "d", tensors=quantised))


def test_a_tied_drafter(tmp_path):
  """Kills: a tied target's drafter refused as its file has no head; one that passes for an untied target, or for one of
  another embedding."""
  headless = lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"}
  other = lambda tensors: {name: 2 * x if "embed" in name else x for name, x in headless(tensors).items()}
  tie = lambda config: config | {"tie_word_embeddings": True}
  target = dspark_jax.load_target(copied(QWEN3, tmp_path / "t", config=tie, tensors=headless))
  drafter = copied(DSPARK, tmp_path / "d", config=tie, tensors=headless)
  assert_same_weights(dspark_jax.load_drafter(drafter, target), load(DSPARK))
  with complains("tensor lm_head.weight is missing"):
    load(drafter)
  with complains("made for another target"):
    dspark_jax.load_drafter(copied(DSPARK, tmp_path / "o", config=tie, tensors=other), target)


@pytest.mark.parametrize("key", ["sample_from_anchor", "shift_label"])
def test_what_the_anchor_predicts(key, tmp_path):
  """Kills: one convention of positions run as the other: every draft is off by one, and nothing fails."""
  for source, right in ((ORIGINAL, False), (DSPARK, True)):
    load(copied(source, tmp_path / f"right{right}", config=lambda c: c | {key: right}))
    with complains(f"{key!r} is {not right}"):
      load(copied(source, tmp_path / f"wrong{right}", config=lambda c: c | {key: not right}))


def test_all_keys_nested(tmp_path):
  """Kills: looking for block_size at the top level alone, where newer files do not have it."""
  moved = "block_size", "num_target_layers"
  config = lambda c: nested(**{k: c[k] for k in moved})({k: v for k, v in c.items() if k not in moved})
  assert load(copied(ORIGINAL, tmp_path / "d", config=config)).config == load(ORIGINAL).config


def test_one_key_with_two_values(tmp_path):
  """Kills: one of two answers taken in silence."""
  size = read_json(ORIGINAL / "config.json")["block_size"]
  with complains(f"'block_size' is {size}, and {size + 2} in dflash_config: expected one value"):
    load(copied(ORIGINAL, tmp_path / "d", config=nested(block_size=size + 2)))


def test_unknown_keys(tmp_path):
  """Kills: passing by a key among those of the method; refusing a whole config for a key of somebody's trainer."""
  with complains("unknown key 'new_gate' in dflash_config"):
    load(copied(ORIGINAL, tmp_path / "nested", config=nested(new_gate=1)))
  load(copied(ORIGINAL, tmp_path / "top", config=lambda c: c | {"trained_by": "somebody"}))


def test_keys_copied_from_the_target(tmp_path):
  """Kills: refusing a plain block for its target's partial rotary embedding; believing it in the original DFlash."""
  theta = lambda c: c["rope_theta"] if "rope_theta" in c else c["rope_parameters"]["rope_theta"]
  noise = lambda c: c | {"partial_rotary_factor": 0.25, "attn_output_gate": True, "vision_config": {},
                         "rope_parameters": {"rope_theta": float(theta(c)), "rope_type": "default",
                                             "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}}
  assert load(copied(DSPARK, tmp_path / "d", config=noise)).config == load(DSPARK).config
  with complains("partial_rotary_factor' is 0.25"):
    load(copied(ORIGINAL, tmp_path / "o", config=noise))


@pytest.mark.parametrize("change, name", [
    ({"speculators_model_type": "dspark"}, "speculators"), ({"architectures": ["DFlash2DraftModel"]}, "DFlash 2"),
    ({"architectures": ["DSparkDraftModel"]}, "SpecForge"), ({"dspark_block_size": 6}, "DeepSeek-V4"),
    ({"dflash_config": {"projector_type": "dspark", "shift_label": True}}, "ModelOpt"),
    ({"markov_rank": 8}, "an added Markov head"), ({"architectures": ["LlamaForCausalLMEagle3"]}, "original Eagle3")])
def test_other_dialects_by_name(change, name, tmp_path):
  """Kills: another dialect's file read as the original DFlash that its class is called after."""
  with complains(name, "is not supported", error=NotImplementedError):
    load(copied(ORIGINAL, tmp_path / "d", config=lambda c: c | change))


@pytest.mark.parametrize("source", [DSPARK, ORIGINAL])
def test_taps_by_another_name(source, tmp_path):
  """Kills: taps of other dialects' spelling, one more than ours, that are passed over; ones taken as they stand."""
  taps = load(source).config.taps
  for name in ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"):
    said = {name: [x + 1 for x in taps], "target_layer_ids": None}
    found = load(copied(source, tmp_path / f"{source.name}-{name}", config=lambda c: c | said | {
        "dflash_config": {k: x for k, x in (c.get("dflash_config") or {}).items() if k != "target_layer_ids"}}))
    assert found.config.taps == taps


@pytest.mark.parametrize("source, change, part", [
    (DSPARK, {"block_size": "7"}, "'block_size' is '7', expected an integer"),
    (DSPARK, {"block_size": True}, "'block_size' is True"), (DSPARK, {"block_size": 0}, "'block_size' is 0"),
    (ORIGINAL, {"block_size": 1}, "'block_size' is 1"),
    (DSPARK, {"mask_token_id": VOCABULARY}, f"expected 0..{VOCABULARY - 1}"),
    (DSPARK, {"target_layer_ids": [0, "2"]}, "'target_layer_ids'"),
    (DSPARK, {"target_layer_ids": [0, 0]}, "expected each layer once"),
    (DSPARK, {"target_layer_ids": [0, LAST]}, f"taps [{LAST}]"),
    (ORIGINAL, {"dflash_config": {"mask_token_id": 0, "target_layer_ids": []}}, "taps are empty"),
    (ORIGINAL, {"block_size": None, "target_layer_ids": None, "dflash_config": {"block_size": 4}}, "name the taps"),
    (DSPARK, {"aux_hidden_state_layer_ids": [5, 1]}, "expected the same"),
    (ORIGINAL, {"eagle_aux_hidden_state_layer_ids": "1"}, "expected a list of layers"),
    (DSPARK, {"markov_rank": 0}, "markov_rank is 0"), (ORIGINAL, {"dflash_config": [1]}, "'dflash_config' is [1]"),
    (DSPARK, {"num_hidden_layers": 10 ** 12}, "'num_hidden_layers'"),
    (DSPARK, {"enable_confidence_head": "no"}, "'no'")])
def test_values_at_fault(source, change, part, tmp_path):
  """Kills: a traceback for a wrong type; true counted as one; a file that runs no draft at all; taps that are guessed
  though the file names them, or has to."""
  with complains(part):
    load(copied(source, tmp_path / "d", config=lambda c: c | change))
