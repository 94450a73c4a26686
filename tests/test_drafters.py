"""Drafters: the contract every drafter keeps with every target, teacher-forced against sampled, goldens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dspark_jax
from dspark_jax import config
from dspark_jax.checkpoints import dialects, hf
from dspark_jax.drafters import DRAFTERS, dspark, heads
from dspark_jax.nn.parameters import parameters
from dspark_jax.sampling import make_sampling, probabilities
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import Decoder, TargetConfig
from dspark_jax.text import read_json
from dspark_jax.training.anchors import all_blocks, blocks_at
from dspark_jax.types import Committed, TargetOutput
from folders import assert_same_weights, golden_cases, golden_dtype, slow_but, thorough_but, tied
from test_targets import GOLDEN, batch_of, close, packed, random_tokens, randomised, small_target, whole_blocks

WORDS = (1, 2, 5, 7, 8, 11)
KINDS = {  # (name in DRAFTERS, what differs from a small default)
  "vanilla": ("dspark", {}),
  "gated": ("dspark", dict(markov_head="gated", confidence="hidden")),
  "rnn": ("dspark", dict(markov_head="rnn")),
  "dflash": ("dspark", dict(markov_rank=0, confidence="none")),
  "original": ("dspark", dict(markov_rank=0, confidence="none", sample_from_anchor=False)),
  "words": ("dspark", dict(draft_vocab_size=len(WORDS))),
  "lens": ("dspark", dict(lens=True)),
  "eagle3": ("eagle3", {}),
  "eagle3 words": ("eagle3", dict(draft_vocab_size=len(WORDS))),
  "mtp": ("mtp", {}),
}
KINDS |= {name: (name, {}) for name in DRAFTERS if name not in (of for of, _ in KINDS.values())}  # new ones, too
KINDS |= {name: ("dspark", dict(markov_head=name)) for name in heads.HEADS if name not in KINDS}
NAMED = {name: next(kind for kind, (of, _) in KINDS.items() if of == name) for name in DRAFTERS}  # one kind of each
KEYS = functools.partial(jax.random.split, jax.random.key(3))


def small_drafter(target, kind="vanilla", seed=1, words=WORDS, **changes):
  """A random drafter of block size 3, of two layers where it may have more than one, for a small target."""
  config, (name, differs) = target.config, KINDS[kind]
  fields = dict(spec=config.spec, num_layers=2, vocab_size=config.vocab_size, block_size=3, taps=(-1, 0),
                num_target_layers=config.num_layers, mask_token_id=config.vocab_size - 1, markov_rank=4)
  known = {field.name for field in dataclasses.fields(DRAFTERS[name].Config)}
  config = DRAFTERS[name].Config(**{k: v for k, v in (fields | changes).items() if k in known} | differs)
  drafter = randomised(nnx.eval_shape(lambda: DRAFTERS[name](config, rngs=nnx.Rngs(0))), seed)
  if config.draft_vocab_size:
    drafter.draft_words.set_value(jnp.asarray(words, jnp.int32))
  return drafter


def said(features):
  """What a target might say with these features f[B,T,32]: its last hidden states are half of them."""
  return TargetOutput(features[..., :16], features)


@jax.jit
def absorb(drafter, target, state, features, n, next_tokens=None):
  next_tokens = jnp.zeros(features.shape[:2], jnp.int32) if next_tokens is None else next_tokens
  encoded = features if isinstance(features, TargetOutput) else said(features)
  return drafter.absorb(target, state, Committed(encoded, next_tokens, n))


@jax.jit
def propose(drafter, target, state, anchor, keys, sampling):
  return drafter.propose(target, drafter.head(target), state, anchor, keys, sampling)


@pytest.fixture(scope="module")
def target():
  return small_target("qwen3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_contract(family, kind):
  """Kills: a state that changes its type in a round, so that the loop on the device cannot be built."""
  target = small_target(family)
  drafter = small_drafter(target, kind)
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
  target, drafter = jax.tree.map(half, (target, drafter))  # where a stray float32 shows

  def round_of(drafter, target, state, features, sampling):
    proposal = drafter.propose(target, drafter.head(target), state, jnp.zeros(2, jnp.int32), KEYS(2), sampling)
    n = jnp.ones(2, jnp.int32)
    return proposal, drafter.absorb(target, state, Committed(said(features), jnp.zeros((2, 4), jnp.int32), n))

  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  for sampling in (make_sampling(0.0), make_sampling(0.7, 3)):
    state = jax.eval_shape(lambda: drafter.init_state(target, 2, 16))
    features = jax.ShapeDtypeStruct((2, 4, 32), target.norm.weight.dtype)
    proposal, after = jax.eval_shape(round_of, drafter, target, state, features, sampling)
    assert jax.tree.structure(after) == jax.tree.structure(state) and types(after) == types(state)
    logits = ((2, 3, drafter.config.words), jnp.float32)
    assert types((proposal.tokens, proposal.logits, proposal.confidence, proposal.probs)) == (
        ((2, 3), jnp.int32), logits, ((2, 3), jnp.float32), None if sampling.mode == "greedy" else logits)
  assert drafter.block_size == 3 and drafter.taps == (-1, 0)


@pytest.mark.parametrize("embedding", [False, True])
def test_confidences_are_not_rounded(embedding):
  """Kills: logits of confidence in steps of a bfloat16, of which most are tied."""
  head = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dspark.ConfidenceHead(48, rngs=nnx.Rngs(0)))
  inputs = jax.random.normal(jax.random.key(1), (64, 48), jnp.bfloat16)
  found = head(*((inputs[:, :32], inputs[:, 32:]) if embedding else (inputs, None)))
  assert found.dtype == jnp.float32 and len(np.unique(found)) == 64
  wanted = np.asarray(inputs, np.float64) @ np.asarray(head.proj.weight[0], np.float64) + float(head.proj.bias[0])
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", thorough_but(["vanilla"], [], [*NAMED.values(), "lens"]))
def test_rows_absorbed_at_once_or_one_by_one(kind, target):
  """Kills: only the anchor's row reaches the draft cache; context positions that do not follow the length."""
  drafter = small_drafter(target, kind)
  features = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
  n = np.array([4, 2], np.int32)
  once = absorb(drafter, target, drafter.init_state(target, 2, 16), features, n)
  state = drafter.init_state(target, 2, 16)
  for i in range(4):
    state = absorb(drafter, target, state, np.roll(features, -i, axis=1), (i < n).astype(np.int32))
  anchor = np.array([3, 4], np.int32)
  first, second = (propose(drafter, target, s, anchor, KEYS(2), make_sampling(1.0)) for s in (once, state))
  close(first.logits, second.logits)
  close(first.confidence, second.confidence)
  nothing = propose(drafter, target, drafter.init_state(target, 2, 16), anchor, KEYS(2), make_sampling(1.0))
  assert np.abs(nothing.logits - first.logits).max() > 1e-2


@pytest.mark.parametrize("kind", thorough_but(["vanilla"], [], [*NAMED.values(), "lens"]))
def test_rejected_rows_are_overwritten_before_they_are_read(kind, target):
  """Kills: features of rejected drafts that stay in the context, by length or by a write further back."""
  drafter = small_drafter(target, kind)
  rng = np.random.default_rng(0)
  rows, garbage = (scale * rng.normal(size=(2, 4, 32)).astype(np.float32) for scale in (1, 100))
  ints = lambda *values: np.array(values, np.int32)

  def run(dirty):
    state = drafter.init_state(target, 2, 16)
    if dirty:
      state = absorb(drafter, target, state, garbage, ints(0, 0))
    mixed = np.concatenate([rows[:, :1], garbage[:, 1:]], 1) if dirty else rows
    state = absorb(drafter, target, state, mixed, ints(1, 0))
    state = absorb(drafter, target, state, np.stack([rows[0, [1, 2, 3, 3]], rows[1]]), ints(3, 2))
    return propose(drafter, target, state, ints(3, 4), KEYS(2), make_sampling(1.0)).logits

  np.testing.assert_array_equal(run(True), run(False))


def test_block_is_bidirectional(target):
  """Kills: a causal mask inside the block, which acceptance alone hardly shows."""
  drafter = small_drafter(target)
  rng = np.random.default_rng(0)
  features, x = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 5, 32), (1, 3, 16)))
  blocks = blocks_at(batch_of(random_tokens(1, 5)), np.array([[3]], np.int32), np.array([[True]]), 3)

  @jax.jit
  def hidden(x):
    state = drafter.init_state(target, 1, 16)
    state = absorb.__wrapped__(drafter, target, state, features[:, :3], jnp.full(1, 3))
    return (drafter.draft(x, state.cache, target.kernels),
            drafter.draft_all(x[:, None], batch_of(random_tokens(1, 5)), features, blocks, target.kernels)[:, 0])

  before, after = hidden(x), hidden(x + np.array([0, 0, 1], np.float32)[None, :, None])
  for first, second in zip(before, after):
    assert np.all(np.abs(first - second).max(-1) > 1e-3)
  close(*before)


@jax.jit
def encode(target, batch):
  return target.encode(batch, (-1, 0))


@jax.jit
def forced(drafter, target, batch, encoded, anchors):
  """What the training path says of the slots after anchors i32[2]: (logits f32[2,3,W], confidence logits f32[2,3])."""
  if drafter.every_position:
    blocks, at = all_blocks(batch, drafter.block_size), anchors - 1
  else:
    blocks, at = blocks_at(batch, anchors[:, None], jnp.ones((2, 1), bool), drafter.block_size), jnp.zeros_like(anchors)
  out = drafter.train_outputs(target, batch, encoded, blocks)
  logits = drafter.head(target)(out.hidden, out.latent)
  return jax.tree.map(lambda x: x[jnp.arange(2, dtype=jnp.int32), at], (logits, out.confidence))


@functools.cache
def sampled_and_forced(kind):
  """A proposal after five tokens of text, and the arguments that make `forced` judge the drawn tokens.

  Row 1 is row 0 with another document of four tokens packed before it. Proposals are drawn for both rows.
  """
  target = small_target("qwen3")
  drafter = small_drafter(target, kind)
  text = np.pad(np.tile(random_tokens(1, 5), (2, 1)), ((0, 0), (0, 7)))
  encoded = jax.tree.map(lambda x: x[:, :4], encode(target, batch_of(text)))
  state = drafter.init_state(target, 2, 16)
  state = absorb(drafter, target, state, encoded, np.array([4, 4], np.int32), text[:, 1:5])
  proposal = propose(drafter, target, state, text[:, 4], KEYS(2), make_sampling(1.0))
  rows = np.concatenate([text[:, :5], proposal.tokens], 1)
  tokens = np.stack([np.pad(rows[0], (0, 4)), np.concatenate([random_tokens(4, seed=5), rows[1]])])
  parts = packed((8,), 12), packed((4, 8), 12)
  batch = batch_of(tokens, *(np.concatenate(x) for x in zip(*parts)))
  return proposal, (drafter, target, batch, encode(target, batch), np.array([4, 8], np.int32))


@pytest.mark.parametrize("kind", thorough_but(["vanilla", "mtp"], [], KINDS))
def test_teacher_forced_equals_sampled(kind):
  """Kills: slots, positions or previous tokens that differ by one between training and drafting."""
  proposal, args = sampled_and_forced(kind)
  logits, confidence = forced(*args)
  close(logits, proposal.logits)
  if confidence is None:
    assert np.all(proposal.confidence == 1)
  else:
    close(jax.nn.sigmoid(confidence), proposal.confidence)


class Averaged(heads.MarkovHead):
  """A head as one might add it: latent = gain * the mean of the embeddings so far, the anchor's too."""

  def __init__(self, rank, vocab_size, words, hidden_size, *, rngs):
    super().__init__(rank, vocab_size, words, hidden_size, rngs=rngs)
    self.gain = nnx.Param(jnp.ones(rank))

  def first(self, embedding):
    return jnp.zeros_like(embedding), jnp.zeros(embedding.shape[0], jnp.int32)

  def step(self, state, embedding, hidden):
    total, count = state[0] + embedding, state[1] + 1
    return (total, count), self.gain[...][None] * total / count[:, None].astype(total.dtype)


def test_a_new_head_is_one_class_and_one_line(monkeypatch, tmp_path, request):
  """Kills: scans that know the heads they serve, or whose state must be f[N,R]; a second list of heads, in a
  configuration or a checkpoint."""
  # What a configuration may hold is worked out once per process, in which heads are usually known from the start.
  config._kinds.cache_clear()
  request.addfinalizer(config._kinds.cache_clear)
  monkeypatch.setitem(heads.HEADS, "averaged", Averaged)
  monkeypatch.setitem(KINDS, "averaged", ("dspark", dict(markov_head="averaged")))
  proposal, args = sampled_and_forced.__wrapped__("averaged")
  close(forced(*args)[0], proposal.logits)
  drafter, target = args[:2]
  assert "markov_head.gain" in parameters(drafter)
  changed = sampled_and_forced("vanilla")[0]
  assert np.abs(changed.logits - proposal.logits)[:, 1:].max() > 1e-2
  dspark_jax.save_drafter(tmp_path, drafter, target)
  assert_same_weights(dspark_jax.load_drafter(tmp_path, target), drafter)


@pytest.mark.parametrize("kind", thorough_but(["vanilla", "mtp"], [], ["vanilla", "original", "lens", "eagle3", "mtp"]))
def test_context_ends_before_the_anchor(kind):
  """Kills: the anchor's own features in the context, which at decoding time do not exist yet."""
  _, (drafter, target, batch, encoded, anchors) = sampled_and_forced(kind)
  logits = lambda change: forced(drafter, target, batch, jax.tree.map(change, encoded), anchors)[0]
  place = np.arange(batch.tokens.shape[1])[None, :, None]
  later = logits(lambda x: jnp.where(place >= anchors[:, None, None], 100.0, x))
  last = logits(lambda x: jnp.where(place == anchors[:, None, None] - 1, x + 1, x))
  np.testing.assert_array_equal(later, logits(lambda x: x))
  assert np.all(np.abs(last - logits(lambda x: x)).max((1, 2)) > 1e-3)


@pytest.mark.parametrize("kind", ["vanilla", "original", "lens"])
def test_a_start_holds_what_training_reads(kind, target):
  """Kills: a start that reads its neighbour's features where a document begins, the anchor's own, or rejected ones."""
  start = small_drafter(target, kind).start
  features = np.random.default_rng(0).normal(size=(1, 8, 32)).astype(np.float32)
  batch, text = batch_of(random_tokens(1, 8), *packed((3, 4), 8)), jnp.asarray(features[:, 3:])
  held = [start.init_held(1)]
  for n in (1, 2):  # up to the anchors at 4 and 6; of each round's two rows n stay
    rows = text[:, sum((1, 2)[:len(held) - 1]):][:, :2]
    held.append(start.absorb(held[-1], rows, np.array([n], np.int32)))
    assert jax.tree.structure(start.absorb(held[-1], rows, np.array([0], np.int32))) == jax.tree.structure(held[0])
  anchors = np.array([[3, 4, 6]], np.int32)
  read = start.held_at(batch, jnp.asarray(features), anchors)
  for index, mine in enumerate(held):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:, index]), mine, read)
  tokens = batch.tokens[:, [3, 4, 6]]
  whole = start(target, tokens, read)
  assert whole.shape == (1, 3, start.positions, 16)
  for index, mine in enumerate(held):
    close(start(target, tokens[:, index], mine), whole[:, index])


def test_anchor_slot_predicts_in_one_convention_only():
  """Kills: the two slot conventions mixed up: the original DFlash runs one slot more than it drafts."""
  kinds = {kind: small_drafter(small_target("qwen3"), kind).config.block_positions for kind in ("dflash", "original")}
  assert kinds == {"dflash": 3, "original": 4}


def test_reduced_vocabulary_proposes_its_own_words():
  """Kills: draft columns that are taken for token ids."""
  proposal, _ = sampled_and_forced("words")
  assert set(np.ravel(proposal.tokens)) <= set(WORDS) and tuple(proposal.words) == WORDS


@pytest.mark.parametrize("words", [tuple(range(12)), WORDS])
def test_words_are_the_full_vocabulary_cut_down(words, target):
  """Kills: a head or W2 in another order than the words; a previous token looked up by its column."""
  full, reduced = small_drafter(target), small_drafter(target, draft_vocab_size=len(words), words=words)
  for name, variable in parameters(reduced).items():
    value = parameters(full)[name][...]
    variable.set_value(value[np.array(words)] if name == "markov_head.markov_w2.weight" else value)
  start = lambda drafter: drafter.init_state(target, 2, 16)
  anchor = np.array([3, 4], np.int32)
  first, second = (propose(drafter, target, start(drafter), anchor, KEYS(2), make_sampling(1.0))
                   for drafter in (full, reduced))
  slots = 3 if len(words) == 12 else 1  # what later slots say depends on the tokens drawn before
  close(np.asarray(first.logits)[:, :slots, words], second.logits[:, :slots])
  if slots == 3:
    np.testing.assert_array_equal(first.tokens, second.tokens)


def golden_drafter(case):
  """(drafter, all stored tensors)"""
  raw, tensors = hf.read_folder(GOLDEN / case)
  kind, config = dialects.drafter_config(raw)
  build = lambda: DRAFTERS[kind](config, rngs=nnx.Rngs(0))
  return hf.fill(build, tensors, case, dtype=golden_dtype(case), extra_ok=dialects.FROZEN), tensors


def golden_rounds(folder):
  """(inputs, their rounds, outputs, their rounds) of a case, a dictionary for each round."""
  inputs, outputs = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "outputs"))
  count = len({key.split("/")[1] for key in inputs if key.startswith("infer/r") and key.count("/") == 2})
  of = lambda arrays, r: {key.split("/")[-1]: x for key, x in arrays.items() if key.startswith(f"infer/r{r}/")}
  assert count
  return inputs, [of(inputs, r) for r in range(count)], outputs, [of(outputs, r) for r in range(count)]


def head_only(case, config, stored):
  """A target of no layers, with the embedding and the head, among these tensors, of a golden drafter."""
  raw = read_json(GOLDEN / case / "config.json")
  no_layers = TargetConfig(raw["model_type"], config.spec, 0, config.vocab_size, False, raw["max_position_embeddings"])
  frozen = dialects.stored_frozen(stored, tied(raw)) | {"norm.weight": np.ones(config.spec.hidden_size, np.float32)}
  return hf.fill(lambda: Decoder(no_layers, rngs=nnx.Rngs(0)), frozen, "embedding and head",
                 dtype=golden_dtype(case))


@pytest.mark.parametrize("case", golden_cases("drafter_", "infer/r0/block_hidden"))
def test_golden_rounds(case):
  """Kills: any slip in the backbone, the heads, the slot convention or the growth of the draft cache."""
  drafter, tensors = golden_drafter(case)
  config = drafter.config
  inputs, asked, _, answers = golden_rounds(GOLDEN / case)
  given = {name: inputs[key] for name in dialects.FROZEN if (key := name.split(".")[0]) in inputs}
  target = head_only(case, config, {**given, **tensors})

  @jax.jit
  def one_round(drafter, target, state, features, n, anchor):
    state = absorb.__wrapped__(drafter, target, state, features, n)
    hidden = drafter.draft(drafter.start(target, anchor, state.held), state.cache, target.kernels)
    return state, hidden, drafter.propose(target, drafter.head(target), state, anchor, KEYS(1), make_sampling(0.0))

  # All rounds in one shape, so the short ones carry rows of garbage that are not committed.
  lengths = [given["target_hidden_states"].shape[1] for given in asked]
  state = drafter.init_state(target, 1, sum(lengths) + max(lengths))
  for given, wanted in zip(asked, answers):
    rows = given["target_hidden_states"]
    padded = np.pad(rows, ((0, 0), (0, max(lengths) - rows.shape[1]), (0, 0)), constant_values=9.0)
    n, anchor = np.array([rows.shape[1]], np.int32), np.array([given["anchor_token"]], np.int32)
    state, hidden, proposal = one_round(drafter, target, state, padded, n, anchor)
    assert int(state.cache.length[0]) == given["start"]
    np.testing.assert_array_equal(proposal.tokens, wanted["sampled_tokens"])
    close(hidden, wanted["block_hidden"], atol=1e-4)
    close(proposal.logits, wanted.get("corrected_logits", wanted["base_logits"]), atol=1e-4)
    if "confidence_logits" in wanted:
      # Not its logit: near 1 a float32 has no digits for it.
      low, high = (1 / (1 + np.exp(-wanted["confidence_logits"].astype(np.float64) - error)) for error in (-1e-4, 1e-4))
      half = np.finfo(np.float32).eps / 2
      assert np.all((low * (1 - half) <= proposal.confidence) & (proposal.confidence <= high * (1 + half)))
      below = np.asarray(proposal.confidence) < inputs["infer/confidence_thresholds"][:, None]
      verified = np.where(below.any(1), below.argmax(1), config.block_size)
      np.testing.assert_array_equal(verified, wanted["threshold_lengths"])


EAGLE3_CASES = golden_cases("drafter_", "infer/final_draft_hidden")


@pytest.mark.parametrize("case", slow_but({*EAGLE3_CASES} - {"drafter_eagle3_qwen3"}, EAGLE3_CASES))
def test_golden_rounds_of_eagle3(case):
  """Kills: an embedding paired with its own feature, a recurrence on normed states, scratch steps left in the cache."""
  drafter, tensors = golden_drafter(case)
  inputs, asked, outputs, answers = golden_rounds(GOLDEN / case)
  target = head_only(case, drafter.config, tensors)

  def extend(state, features, following):
    features = TargetOutput(features[..., :drafter.config.spec.hidden_size], features)  # hidden: not read
    n = following.shape[1]
    features, following = jax.tree.map(
        lambda x: np.pad(x, ((0, 0), (0, whole_blocks(n) - n)) + ((0, 0),) * (x.ndim - 2)), (features, following))
    return absorb(drafter, target, state, features, np.array([n], np.int32), following)

  prompt = inputs["infer/prompt_ids"]
  slots = sum(whole_blocks(x.shape[1]) for x in (prompt, *(given["committed_tokens"] for given in asked)))
  state = extend(drafter.init_state(target, 1, slots), inputs["infer/prompt_target_hidden_states"], prompt[:, 1:])
  anchor = prompt[:, -1]
  for given, wanted in zip(asked, answers):
    proposal = propose(drafter, target, state, anchor, KEYS(1), make_sampling(0.0))
    assert int(state.cache.length[0]) == given["start"]
    close(state.hidden, wanted["draft_hidden"][:, 0], atol=1e-4)
    np.testing.assert_array_equal(proposal.tokens, wanted["sampled_tokens"])
    close(proposal.logits, wanted["draft_logits"], atol=1e-4)
    following = given["committed_tokens"]
    state = extend(state, given["verified_target_hidden_states"][:, :following.shape[1]], following)
    anchor = following[:, -1]
  close(state.hidden, outputs["infer/final_draft_hidden"][:, 0], atol=1e-4)


@pytest.mark.parametrize("case", golden_cases("", "default_ids/target_layer_ids"))
def test_golden_default_taps(case):
  """Kills: halves rounded up, or counting layers from the embedding."""
  inputs, outputs = (np.load(GOLDEN / case / f"{name}.npz") for name in ("inputs", "outputs"))
  for i, expected in enumerate(outputs["default_ids/target_layer_ids"]):
    layers, n = (int(inputs[f"default_ids/{key}"][i]) for key in ("num_target_layers", "num_draft_layers"))
    assert dialects.default_taps(layers, n) == tuple(expected[:n])


def test_greedy_drafts_of_bfloat16_keep_half_precision():
  """Kills: base logits as coarse as the hidden states, 0.125 at 20, by which greedy drafts would be taken among ties; a
  rounding of what is drawn from, which then is not what the target verifies by."""
  base = jnp.zeros((1, 1, 8)).at[0, 0, 2].set(20.0).at[0, 0, 5].set(20.03)
  propose_from = lambda temperature: heads.propose(
      None, None, None, jnp.zeros((1, 1, 4), jnp.bfloat16), base, jnp.zeros(1, jnp.int32), None, KEYS(1),
      make_sampling(temperature))
  greedy = propose_from(0.0)
  assert greedy.tokens.tolist() == [[5]] and greedy.logits.dtype == jnp.float32
  np.testing.assert_array_equal(propose_from(1.0).probs[0, 0], probabilities(base[:, 0], make_sampling(1.0))[0])
