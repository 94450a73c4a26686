"""Generation: goldens, greedy identities, a scripted drafter, the loop's contract, its distribution."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.checkpoints import hf
from dspark_jax.decoding import generate as subject
from dspark_jax.decoding.generate import Heads, collect, decode, generate, one_round, prepare, start
from dspark_jax.sampling import make_sampling
from dspark_jax.types import Proposal
from test_drafters import KINDS, golden_drafter, small_drafter
from test_targets import GOLDEN, batch_of, encoded, golden_target, random_tokens, small_target, stack_layers

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8, 3, 2, 7, 4, 6)]
NEW = 12
STOPS = (8, 2)  # rows stop at tokens 1, 2, 5 and 7, or not at all
ROWS = 8000
ALARM = 1e-6  # a correct sampler fails one chi-square with this probability; the seeds are fixed
GOLDENS = ("generate_dspark_qwen3", "generate_dflash_qwen3", "generate_dflash_original", "generate_eagle3_qwen3")


@functools.cache
def target():
  return small_target("llama")


@functools.cache
def drafter(kind):
  return small_drafter(target(), kind, num_layers=1)


@functools.cache
def greedy_text():
  """24 new tokens of every prompt, decoded plainly; each is the maximum of what `encode` says before it."""
  text = np.array(generate(target(), None, PROMPTS, max_new_tokens=24).tokens)
  for prompt, row in zip(PROMPTS, text):
    tokens = np.array([(prompt + row.tolist() + 8 * [0])[:32]], np.int32)
    logits = encoded(target(), batch_of(tokens))[0, :, :target().config.vocab_size]
    np.testing.assert_array_equal(np.argmax(logits, -1)[len(prompt) - 1:][:24], row)
  return text


def cut(row, stops, limit=NEW):
  """A text through its first stop token, at most `limit` tokens."""
  ends = [i + 1 for i, token in enumerate(row) if token in stops]
  return list(row[:min([limit, *ends])])


@functools.cache
def golden_qwen3():
  return stack_layers(golden_target("target_qwen3"))


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_generation(case):
  """Kills: a slot, position or context row off by one, which costs accepted length and nothing else."""
  inputs, outputs = (dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))
  drafter, _ = golden_drafter(case)
  limit = int(inputs["max_new_tokens"])
  for run, threshold in enumerate(inputs.get("thresholds", [0.0])):
    for i in range(4):
      prompt, stops = inputs[f"prompt{i}/input_ids"][0].tolist(), inputs[f"prompt{i}/stop_token_ids"].tolist()
      out = generate(golden_qwen3(), drafter, [prompt], max_new_tokens=limit, stop_token_ids=stops,
                     confidence_threshold=threshold)
      where = f"t{run}/prompt{i}" if "thresholds" in inputs else f"prompt{i}"
      assert prompt + out.tokens[0] == outputs[f"{where}/output_ids"][0].tolist()
      gained = outputs[f"{where}/acceptance_lengths"]
      kept = outputs.get(f"{where}/accepted_draft_lengths", gained - 1)
      # The reference runs one more round, and discards it, where exactly max_new_tokens were reached.
      useful = 1 + np.cumsum(gained) - gained < limit
      assert out.n_accept[0] == kept[useful].tolist()
      if f"{where}/proposal_lengths" in outputs:
        assert out.n_verify[0] == outputs[f"{where}/proposal_lengths"][useful].tolist()


def test_golden_plain_generation():
  """Kills: plain decoding that skips a position, or a prompt whose padding leaks into its neighbour."""
  cases = [(case, i) for case in GOLDENS for i in range(4)]
  inputs, outputs = ({case: dict(np.load(GOLDEN / case / f"{name}.npz")) for case in GOLDENS}
                     for name in ("inputs", "outputs"))
  prompts = [inputs[case][f"prompt{i}/input_ids"][0].tolist() for case, i in cases]
  texts = generate(golden_qwen3(), None, prompts, max_new_tokens=32).tokens
  for (case, i), prompt, text in zip(cases, prompts, texts):
    stops = inputs[case][f"prompt{i}/stop_token_ids"].tolist()
    assert prompt + cut(text, stops, 32) == outputs[case][f"prompt{i}/ar_output_ids"][0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_speculative_equals_plain(kind):
  """Kills: a draft kept that the target would not say; a row that depends on its neighbours or its place."""
  text, accepted = greedy_text().tolist(), 0
  for stops in ((), STOPS):
    out = generate(target(), drafter(kind), PROMPTS, max_new_tokens=NEW, stop_token_ids=stops)
    assert out.tokens == [cut(row, stops) for row in text]
    accepted += sum(map(sum, out.n_accept))
    turned = generate(target(), drafter(kind), PROMPTS[::-1], max_new_tokens=NEW, stop_token_ids=stops)
    assert (turned.tokens, turned.n_accept) == (out.tokens[::-1], out.n_accept[::-1])
  assert accepted > 0 and {len(row) for row in out.tokens} == {1, 2, 5, 7, 12}


def test_a_row_alone():
  """Kills: a text that depends on the size of the batch: one row writes its cache by another path."""
  out = generate(target(), drafter("vanilla"), PROMPTS, max_new_tokens=NEW, stop_token_ids=STOPS)
  for row, prompt in enumerate(PROMPTS):
    alone = generate(target(), drafter("vanilla"), [prompt], max_new_tokens=NEW, stop_token_ids=STOPS)
    assert (alone.tokens[0], alone.n_accept[0]) == (out.tokens[row], out.n_accept[row])


@flax.struct.dataclass
class Script:
  """A drafter of four that knows the text: it drafts text[count:], wrong where `wrong`, sure where `sure`."""
  text: jax.Array   # i32[B,N]
  wrong: jax.Array  # bool[B,N]
  sure: jax.Array   # bool[B,N]
  taps, block_size, words, has_confidence = (), 4, None, True

  def init_state(self, target, batch, max_len):
    return jnp.zeros(batch, jnp.int32)

  def head(self, target):
    return None

  def absorb(self, target, state, committed):
    return state + committed.n

  def propose(self, target, head, state, anchor, keys, sampling):
    lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
    at = (state - lengths + 1)[:, None] + jnp.arange(4, dtype=jnp.int32)[None]
    text, wrong, sure = (jnp.take_along_axis(x, at, axis=1, mode="clip")
                         for x in (self.text, self.wrong, self.sure))
    tokens = jnp.where(wrong, (text + 1) % target.config.vocab_size, text)
    return Proposal(tokens, jnp.zeros((*at.shape, 12)), None, sure.astype(jnp.float32), None)


def played(text, wrong, sure, stops, threshold):
  """(tokens, drafts kept per round) of one row under the script, by hand."""
  count, rounds = 1, []
  while count < NEW and text[count - 1] not in stops:
    block = range(count, count + 4)
    good = [not wrong[i] and (sure[i] or not threshold) for i in block]
    kept = good.index(False) if False in good else 4
    ends = [k + 1 for k in range(kept) if text[count + k] in stops]
    rounds.append(ends[0] if ends else kept)
    count += ends[0] if ends else kept + 1
    if ends:
      break
  return cut(text, stops), rounds


def test_scripted_drafts(monkeypatch):
  """Kills: a stop token lost inside an accepted block or kept past it, rounds after the end, a cut by one;
  also (buckets are off) caches without room for the rounds in which a finished row waits for the others."""
  monkeypatch.setattr(subject, "PROMPT_BUCKET", 1)
  monkeypatch.setattr(subject, "CACHE_BUCKET", 1)
  text, rng = greedy_text(), np.random.default_rng(0)
  wrong, sure = rng.random(text.shape) < 0.3, rng.random(text.shape) < 0.8
  wrong[0], sure[0] = False, True  # row 0 accepts all
  script = Script(*map(jnp.asarray, (text.astype(np.int32), wrong, sure)))
  firsts = tuple(int(t) for t in text[:2, 0])  # stop at the first token, too
  inside = 0
  for stops in ((), STOPS, firsts, (int(text[0, 3]),), (int(text[0, 5]),)):
    for threshold in (0.0, 0.5):
      out = generate(target(), script, PROMPTS, max_new_tokens=NEW, stop_token_ids=stops,
                     confidence_threshold=threshold)
      expected = [played(*row, stops, threshold) for row in zip(text.tolist(), wrong, sure)]
      assert list(zip(out.tokens, out.n_accept)) == expected
      inside += sum(len(tokens) < 1 + sum(n + 1 for n in rounds) for tokens, rounds in expected
                    if tokens[-1] in stops)
  assert inside > 3 and out.rounds == sum(len(rounds) for _, rounds in expected)


def test_one_new_token():
  """Kills: a round that runs although the prompt's own token was all that was asked for."""
  script = Script(*(jnp.zeros((8, 4), dtype) for dtype in (jnp.int32, bool, bool)))
  out = generate(target(), script, PROMPTS, max_new_tokens=1)
  assert out.tokens == greedy_text()[:, :1].tolist()
  assert out.n_accept == [[]] * 8 and out.rounds == 0 and np.isnan(out.accepted_length)


def test_sampled_rows_are_independent():
  """Kills: random numbers per slot of the batch instead of per request; one key used for two draws."""
  settings = dict(max_new_tokens=NEW, temperature=0.8, top_k=8, top_p=0.95, stop_token_ids=STOPS)
  out = generate(target(), drafter("rnn"), PROMPTS, seed=7, **settings)
  for row, prompt in enumerate(PROMPTS):
    alone = generate(target(), drafter("rnn"), [prompt], seed=7 + row, **settings)
    assert (alone.tokens[0], alone.n_accept[0]) == (out.tokens[row], out.n_accept[row])
  other = generate(target(), drafter("rnn"), PROMPTS, seed=100, **settings)
  assert out.tokens != other.tokens and sum(map(sum, out.n_accept)) > 0


def test_one_compilation():
  """Kills: settings that are baked into the program: a second call of the same shape must not compile."""
  def call(prompt, **settings):
    generate(target(), drafter("rnn"), [prompt], max_new_tokens=NEW, **settings)

  call(PROMPTS[0], temperature=0.8, top_k=8)
  before = decode._cache_size()
  call(PROMPTS[2], temperature=1.3, top_p=0.5, seed=9, stop_token_ids=(1, 2, 3), confidence_threshold=0.4)
  call(PROMPTS[2], temperature=0.1, top_k=3, top_p=0.9)
  assert decode._cache_size() == before


@pytest.mark.parametrize("kind, part", [("dflash", "no confidence head in the drafter"), ("mtp", "no confidence head"),
                                        (None, "no drafter")])
def test_a_threshold_for_nothing(kind, part):
  """Kills: a threshold that is obeyed by nobody, and a user who believes that it made no difference."""
  for name in ("confidence_threshold", "survival_threshold"):
    with pytest.raises(ValueError, match=f"{name} is 0.5, but there is {part}"):
      prepare(target(), kind and drafter(kind), PROMPTS, max_new_tokens=NEW, **{name: 0.5})


@pytest.mark.parametrize("wrong", [[1.0, 1.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 1.0]])
def test_temperatures_that_are_none(wrong):
  """Kills: a table of another block size that is broadcast, and temperatures that turn confidences round."""
  with pytest.raises(ValueError, match="expected 3 positive numbers"):
    prepare(target(), drafter("rnn"), PROMPTS, max_new_tokens=NEW, temperatures=wrong)


def test_no_host_in_the_loop():
  """Kills: a verification driven from the host (EAGLE-3 on TPU: 5-30 times slower than no speculation)."""
  args, static = prepare(target(), drafter("rnn"), PROMPTS[:1], max_new_tokens=NEW, temperature=0.8, top_k=8)
  with jax.transfer_guard("disallow"):
    state = jax.block_until_ready(decode(*args, **static))
  assert "callback" not in str(decode.trace(*args, **static).jaxpr)
  assert len(collect(state, NEW).tokens[0]) == NEW


@pytest.mark.parametrize("sampling", [(0.0,), (0.7,), (0.7, 3)], ids=["greedy", "full", "truncated"])
@pytest.mark.parametrize("kind", [None, "original", "words"])
def test_a_round_keeps_the_type_of_the_state(kind, sampling):
  """Kills: a state that grows or changes dtype per round, so that every round would be compiled."""
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
  models = jax.tree.map(half, (target(), kind and drafter(kind)))  # where a stray float32 shows
  (*_, requests), _ = prepare(*models, PROMPTS, max_new_tokens=NEW)
  requests = requests.replace(sampling=make_sampling(*sampling))
  state = jax.eval_shape(functools.partial(start, max_new_tokens=NEW, capacity=64), *models, requests)
  after = jax.eval_shape(one_round, *models, jax.eval_shape(Heads.of, *models), requests, state)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  types = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
  assert types(after) == types(state)


def broken(module, name):
  """A copy whose parameter `name` holds one NaN."""
  copy = jax.tree.map(lambda x: x, module)
  value = hf.names(copy)[name][...]
  hf.names(copy)[name].set_value(value.at[(0,) * value.ndim].set(jnp.nan))
  return copy


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.8, top_k=8)], ids=["greedy", "sampled"])
def test_nan_is_an_error(settings):
  """Kills: NaN logits whose argmax is token 0 on both sides: acceptance 100 %, and the text is garbage."""
  kinds = ("rnn",) if settings else KINDS
  names = {kind: {"norm.weight", "markov_head.markov_w2.weight"} & set(hf.names(drafter(kind))) for kind in kinds}
  pairs = [(target(), broken(drafter(kind), name)) for kind in kinds for name in names[kind]]
  pairs += [(broken(target(), "norm.weight"), drafter(kind)) for kind in kinds]
  pairs += [] if settings else [(broken(target(), "lm_head.weight"), drafter("vanilla")),
                                (target(), broken(drafter("vanilla"), "confidence_head.proj.weight"))]
  for models in pairs:
    with pytest.raises(ValueError, match="NaN logits or confidences in rows"):
      generate(*models, PROMPTS, max_new_tokens=NEW, **settings)


@pytest.mark.parametrize("prompts, settings, message", [
  ([], {}, "no prompts"),
  ([[1], []], {}, "prompt 1 is empty"),
  ([[1, 12]], {}, "token ids 1..12"),
  ([[-1, 2]], {}, "token ids -1..2"),
  ([[1]], dict(max_new_tokens=0), "expected at least 1"),
  ([[1] * 9], dict(max_new_tokens=8), "do not fit"),
  ([[1]], dict(temperature=-1.0), "temperature"),
  ([[1]], dict(temperature=1.0, top_p=0.0), "top_p"),
  ([[1]], dict(temperature=1.0, top_k=-2), "top_k"),
])
def test_mistakes_of_the_caller(prompts, settings, message):
  """Kills: an id or a position clamped in silence."""
  short = small_target("llama", max_position_embeddings=16)
  with pytest.raises(ValueError, match=message):
    prepare(short, None, prompts, **dict(max_new_tokens=4) | settings)


def exact_probs(logits, temperature, top_k, top_p):
  """Temperature, top-k, top-p, the slow way, in float64."""
  p = np.exp(np.asarray(logits, np.float64) / temperature)
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0
  p /= p.sum()
  before = np.cumsum(p[order]) - p[order]  # the token that crosses top_p stays
  p[order[before >= top_p]] = 0
  return p / p.sum()


def joint_of_four(target, prompt, *settings):
  """Exact probabilities of the first four new tokens, f64[V,V,V,V]."""
  size = target.config.vocab_size
  prefixes = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1).reshape(-1, 3)
  rows = np.concatenate([np.tile(prompt, (len(prefixes), 1)), prefixes], 1).astype(np.int32)
  logits = np.asarray(encoded(target, batch_of(rows)))[:, len(prompt) - 1:, :size]
  probs = np.apply_along_axis(exact_probs, -1, logits, *settings)
  joint = probs[:, 3]
  for i in range(3):
    joint = joint * probs[np.arange(len(rows)), i, prefixes[:, i]][:, None]
  return joint.reshape([size] * 4)


@pytest.mark.parametrize("kind, top, words", [
  pytest.param("vanilla", (0, 1.0), None, id="full"),
  pytest.param("vanilla", (4, 0.8), (0, 1, 3, 4), id="truncated"),
  pytest.param("eagle3", (0, 1.0), None, id="eagle3"),
  pytest.param("mtp", (4, 0.8), (0, 1, 3, 4), id="mtp"),
])
def test_text_follows_the_target(kind, top, words, monkeypatch):
  """Kills: what is not lossless from end to end: drafts and q under different settings, residual at the wrong
  slot, a cut by the confidence of the drawn token itself, random numbers shared between draws."""
  for bucket in ("PROMPT_BUCKET", "CACHE_BUCKET"):
    monkeypatch.setattr(subject, bucket, 4)
  target, prompt = small_target("llama", seed=2, vocab_size=6), [3, 1, 4]
  drafter = small_drafter(target, kind, seed=6, words=words, num_layers=1, block_size=2,
                          draft_vocab_size=len(words or ()))
  if drafter.has_confidence:
    proj = drafter.confidence_head.proj.weight
    proj.set_value(jnp.where(jnp.arange(20)[None] < 16, 0, 16 * proj[...]))  # the token alone decides the cut
  for temperature, threshold in ((0.7, 0.0), (1.0, 0.5 * drafter.has_confidence)):
    out = generate(target, drafter, [prompt] * ROWS, max_new_tokens=4, temperature=temperature, top_k=top[0],
                   top_p=top[1], seed=int(10 * temperature), confidence_threshold=threshold)
    expected = ROWS * joint_of_four(target, prompt, temperature, *top)
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(np.array(out.tokens).T), 1)
    assert not observed[expected == 0].any()
    large = expected > 10
    pooled = [np.append(x[large], x[~large].sum()) for x in (observed, expected)]
    statistic = np.sum((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1e-9))
    assert stats.chi2.sf(statistic, large.sum()) > ALARM
    assert large.sum() > 50 and 0.15 < np.mean([n > 0 for row in out.n_accept for n in row]) < 0.8
