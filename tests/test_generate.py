"""Generation: goldens, greedy identities, a scripted drafter, what is refused. Sampled text: test_sampled.py."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding import session as subject
from dspark_jax.decoding.engine import Engine
from dspark_jax.decoding.policy import All, EarlyStop, Stale, Threshold
from dspark_jax.decoding.session import Session, generate
from dspark_jax.nn.parameters import parameters
from dspark_jax.text import read_json
from dspark_jax.types import Proposal
from folders import golden_cases, slow_but, thorough_but
from test_drafters import KINDS, golden_drafter, small_drafter
from test_targets import GOLDEN, batch_of, encoded, golden_target, random_tokens, small_target, stack_layers

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8, 3, 2, 7, 4, 6)]
NEW = 12
STOPS = (8, 2)  # rows stop at tokens 1, 2, 5 and 7, or not at all
GOLDENS = golden_cases("generate_", "/ar_output_ids")
SLOW = ("generate_dflash_qwen3", "generate_dflash_original", "generate_eagle3_qwen3")


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


def name_of_target(case):
  return read_json(GOLDEN / case / "meta.json")["target"].split()[0]


@functools.cache
def golden_stacked(name):
  return stack_layers(golden_target(name))


def golden_run(case):
  """(inputs, outputs, names of its prompts, new tokens) of a golden run, all as its own files have them."""
  inputs, outputs = (dict(np.load(GOLDEN / case / f"{name}.npz")) for name in ("inputs", "outputs"))
  prompts = sorted(name.removesuffix("/input_ids") for name in inputs if name.endswith("/input_ids"))
  assert prompts
  return inputs, outputs, prompts, int(inputs["max_new_tokens"])


def useful_rounds(outputs, where, text, stops):
  """(drafts kept, drafts verified or None) of the rounds that a text took, as ours counts them."""
  gained = outputs[f"{where}/acceptance_lengths"]
  # The reference runs one more round, and discards it, where exactly max_new_tokens were reached.
  useful = 1 + np.cumsum(gained) - gained < len(text)
  verified = outputs.get(f"{where}/proposal_lengths")
  verified = None if verified is None else verified[useful].tolist()
  if f"{where}/accepted_draft_lengths" in outputs:
    return outputs[f"{where}/accepted_draft_lengths"][useful].tolist(), verified
  kept = (gained[useful] - 1).tolist()
  if kept and text[-1] in stops:  # the original DFlash counts drafts past a stop token, too
    kept[-1] = min(kept[-1], len(text) - 1 - int(gained[useful][:-1].sum()))
  return kept, verified


def test_a_count_past_a_stop_token():
  """Kills: a golden count of the original DFlash that is cut at a limit, or not cut at a stop token."""
  outputs = {"p/acceptance_lengths": np.array([2, 4, 6])}
  cases = [([9] * 8, 7, [1, 3, 5]), ([9] * 8, 9, [1, 3, 1]), ([9] * 7, 9, [1, 3]), ([9] * 12, 9, [1, 3, 5]),
           ([9], 9, [])]
  assert [useful_rounds(outputs, "p", text, [stop])[0] for text, stop, _ in cases] == [kept for *_, kept in cases]


@pytest.mark.parametrize("case", slow_but([case for case in GOLDENS if case not in SLOW], GOLDENS))
def test_golden_generation(case):
  """Kills: a slot, position or context row off by one, which costs accepted length and nothing else."""
  inputs, outputs, prompts, limit = golden_run(case)
  drafter, _ = golden_drafter(case)
  for run, threshold in enumerate(inputs.get("thresholds", [0.0])):
    for name in prompts:
      prompt, stops = inputs[f"{name}/input_ids"][0].tolist(), inputs[f"{name}/stop_token_ids"].tolist()
      out = generate(golden_stacked(name_of_target(case)), drafter, [prompt], max_new_tokens=limit,
                     stop_token_ids=stops, confidence_threshold=threshold)
      where = f"t{run}/{name}" if "thresholds" in inputs else name
      assert prompt + out.tokens[0] == outputs[f"{where}/output_ids"][0].tolist()
      kept, verified = useful_rounds(outputs, where, out.tokens[0], stops)
      assert out.n_accept[0] == kept
      if verified is not None:
        assert out.n_verify[0] == verified


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(map(name_of_target, GOLDENS))))
def test_golden_plain_generation(target):
  """Kills: plain decoding that skips a position, or a prompt whose padding leaks into its neighbour."""
  asked, model = [], golden_stacked(target)
  for case in (case for case in GOLDENS if name_of_target(case) == target):
    inputs, outputs, prompts, limit = golden_run(case)
    asked += [(inputs[f"{name}/input_ids"][0].tolist(), limit, inputs[f"{name}/stop_token_ids"].tolist(),
               outputs[f"{name}/ar_output_ids"][0].tolist()) for name in prompts]
  prompts, limits, stops, wanted = map(list, zip(*asked))
  texts = generate(model, None, prompts, max_new_tokens=limits).tokens
  assert [prompt + cut(*row) for prompt, row in zip(prompts, zip(texts, stops, limits), strict=True)] == wanted
  texts = generate(model, None, prompts, max_new_tokens=limits, stop_token_ids=stops).tokens
  assert [prompt + text for prompt, text in zip(prompts, texts, strict=True)] == wanted


@pytest.mark.parametrize("kind", thorough_but(["vanilla"], ["eagle3", "mtp"], KINDS))
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


class Counts:
  """The parts of a drafter that multiplies with no head and whose state is how many tokens it has read."""

  def init_state(self, target, batch, max_len):
    return jnp.zeros(batch, jnp.int32)

  def head(self, target):
    return None

  def absorb(self, target, state, committed):
    return state + committed.n


@flax.struct.dataclass
class Script(Counts):
  """A drafter of four that knows the text: it drafts text[count:], wrong where `wrong`, sure where `sure`."""
  text: jax.Array   # i32[B,N]
  wrong: jax.Array  # bool[B,N]
  sure: jax.Array   # bool[B,N]
  taps, block_size, words, has_confidence = (), 4, None, True

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


def test_capacity_covers_every_write(monkeypatch):
  """Kills: a window that runs over the end of a cache, where it slides back over committed rows: the longest row passes
  its limit by a block, and writes one more while it waits for others."""
  monkeypatch.setattr(subject, "PROMPT_BUCKET", 1)
  monkeypatch.setattr(subject, "CACHE_BUCKET", 1)
  text = greedy_text().astype(np.int32)
  script = Script(jnp.asarray(text), jnp.zeros(text.shape, bool), jnp.ones(text.shape, bool))
  (batch,) = Session(target(), script).prepare(PROMPTS, max_new_tokens=NEW)
  count, block = np.array(subject.decode(*batch.args, **batch.static).count), script.block_size
  assert count.max() == NEW + block
  slots = batch.args[2].lengths + count - 1  # the anchor is not in the cache
  assert slots.max() + block + 1 <= batch.static["capacity"]


def test_one_new_token():
  """Kills: a round that runs although the prompt's own token was all that was asked for."""
  script = Script(*(jnp.zeros((8, 4), dtype) for dtype in (jnp.int32, bool, bool)))
  out = generate(target(), script, PROMPTS, max_new_tokens=1)
  assert out.tokens == greedy_text()[:, :1].tolist()
  assert out.n_accept == [[]] * 8 and out.rounds == 0 and np.isnan(out.accepted_length)


@pytest.mark.parametrize("kind, part", [("dflash", "no confidence head in the drafter"), ("mtp", "no confidence head"),
                                        (None, "no drafter")])
def test_a_threshold_for_nothing(kind, part):
  """Kills: a threshold that is obeyed by nobody, and a user who believes that it made no difference."""
  for name in ("confidence_threshold", "survival_threshold"):
    with pytest.raises(ValueError, match=f"{name} is 0.5, but there is {part}"):
      Session(target(), kind and drafter(kind)).prepare(PROMPTS, max_new_tokens=NEW, **{name: 0.5})


@pytest.mark.parametrize("wrong", [[1.0, 1.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 1.0], [None] * 7 + [[1.0, 1.0]]])
def test_temperatures_that_are_none(wrong):
  """Kills: a table of another block size that is broadcast, and temperatures that turn confidences round."""
  with pytest.raises(ValueError, match="expected 3 positive numbers"):
    Session(target(), drafter("rnn")).prepare(PROMPTS, max_new_tokens=NEW, calibration=wrong)


SHORT = np.ones(8 * 4)  # 8 rows of 3 drafts are 32 tokens, and entry 0 is not read


@pytest.mark.parametrize("kind, settings, part", [
  ("rnn", dict(policy=EarlyStop(SHORT)), "the SPS curve ends at 31 tokens, 8 rows of 3 drafts need 32"),
  ("rnn", dict(policy=Stale(SHORT)), "measure it for this batch size"),
  ("rnn", dict(policy=Stale([1.0] * 33)), "the SPS curve of the policy Stale is a list"),
  ("rnn", dict(policy=EarlyStop(np.ones((33, 1)))), "of 2 dimensions"),
  ("dflash", dict(policy=EarlyStop(np.ones(33))), "EarlyStop goes by confidences, but there is no confidence head"),
  ("mtp", dict(policy=Threshold()), "Threshold goes by confidences, but there is no confidence head"),
  (None, dict(policy=Stale(np.ones(33))), "Stale goes by confidences, but there is no drafter"),
  ("rnn", dict(policy=All(), survival_threshold=[0.0] * 7 + [0.5]), "survival_threshold is 0.5, but the policy is All"),
  ("rnn", dict(policy=EarlyStop(np.ones(33)), confidence_threshold=0.5), "leave one of the two out")])
def test_policies_that_cannot_decide(kind, settings, part, monkeypatch):
  """Kills: a short curve that is found out by the compiler, a threshold or a schedule that nobody obeys."""
  monkeypatch.setattr(subject, "decode", None)  # before anything runs
  with pytest.raises(ValueError, match=part):
    generate(target(), kind and drafter(kind), PROMPTS, max_new_tokens=NEW, **settings)


def broken(module, name):
  """A copy whose parameter `name` holds one NaN."""
  copy = jax.tree.map(lambda x: x, module)
  value = parameters(copy)[name][...]
  parameters(copy)[name].set_value(value.at[(0,) * value.ndim].set(jnp.nan))
  return copy


@pytest.mark.parametrize("kind", thorough_but(["vanilla"], ["rnn, sampled"], [*KINDS, "rnn, sampled"]))
def test_nan_is_an_error(kind):
  """Kills: NaN logits whose argmax is token 0 on both sides: acceptance 100 %, and the text is garbage."""
  settings = dict(temperature=0.8, top_k=8) if "sampled" in kind else {}
  kind = kind.removesuffix(", sampled")
  names = {"norm.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight"}
  pairs = [(target(), broken(drafter(kind), name)) for name in names & set(parameters(drafter(kind)))]
  pairs += [(broken(target(), name), drafter(kind)) for name in ("norm.weight", "lm_head.weight")]
  for models in pairs:
    with pytest.raises(ValueError, match="NaN logits or confidences in rows"):
      generate(*models, PROMPTS, max_new_tokens=NEW, **settings)


def test_nan_after_the_first_token():
  """Kills: NaN that is looked for in the prompt alone: here a token breaks the target, and the prompt lacks it."""
  first = int(greedy_text()[0, 0])
  row = next(row for row in range(len(PROMPTS)) if first not in PROMPTS[row] and greedy_text()[row, 0] == first)
  model = jax.tree.map(lambda x: x, target())
  model.embed_tokens.weight.set_value(model.embed_tokens.weight[...].at[first].set(jnp.nan))
  with pytest.raises(ValueError, match=r"NaN logits or confidences in rows \[0\]"):
    generate(model, None, [PROMPTS[row]], max_new_tokens=NEW)


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
  ([[1]] * 2, dict(temperature=[1.0, -0.5]), "temperature is -0.5 in row 1"),
  ([[1]] * 3, dict(top_p=[1.0, 0.5]), "top_p has 2 values for 3 prompts: give one for all, or one for each"),
  ([[1]] * 3, dict(stop_token_ids=[[1], [2]]), "stop_token_ids has 2 values for 3 prompts"),
  ([[1]] * 2, dict(seeds=[1]), "there are 1 seeds for 2 prompts"),
  ([[1], [1] * 9], dict(max_new_tokens=[15, 8]), "a prompt of 9 tokens and 8 new ones do not fit"),
  ([[1]] * 2, dict(max_new_tokens=[4, 0]), "max_new_tokens is 0, expected at least 1"),
  ([[1]] * 2, dict(max_new_tokens=[4, 8.0]), "max_new_tokens of prompt 1 is 8.0, expected an integer"),
  ([[1], [1.7, 2.2]], {}, r"prompt 1 is \[1.7, 2.2\], expected a list of integers"),
  ([[1, True]], {}, r"prompt 0 is \[1, True\], expected a list of integers"),
  ([[1]], dict(stop_token_ids=[1, True]), r"stop_token_ids of prompt 0 is \[1, True\], expected a list of integers"),
  ([[True, False]], {}, r"prompt 0 is \[True, False\], expected a list of integers"),
  ([1, 2, 3], {}, "prompt 0 is 1, expected a list of integers: give token ids, a list for each prompt"),
  ([[[1], [2, 3]]], {}, r"prompt 0 is \[\[1\], \[2, 3\]\], expected a list of integers"),
  (["12"], {}, "prompt 0 is '12', expected a list of integers"),
  ([[1, 2 ** 70]], {}, "prompt 0 is .*, expected a list of integers"),
  ([[1]], dict(seed=0.2), "seed is 0.2, expected an integer"),
  ([[1]] * 2, dict(seeds=[0, 0.9]), "the seed of prompt 1 is 0.9, expected an integer"),
  ([[1]] * 2, dict(seeds=7), "seeds is 7, expected a list with one for each prompt"),
  ([[1]] * 2, dict(seed=np.uint32(2 ** 32 - 1)), "seed is 4294967296, expected 0 to 4294967295"),
  ([[1]] * 2, dict(seeds=[-1, 2]), "seed is -1"),
  ([[1]], dict(stop_token_ids=(5.5,)), r"stop_token_ids of prompt 0 is \(5.5,\), expected a list of integers"),
  ([[1]] * 2, dict(stop_token_ids=[[5], [True]]), r"stop_token_ids of prompt 1 is \[True\]"),
  ([[1]], dict(stop_token_ids="5"), r"stop_token_ids of prompt 0 is \['5'\]"),
])
def test_mistakes_of_the_caller(prompts, settings, message):
  """Kills: an id or a position clamped, or a fraction cut off, in silence; a TypeError without a sentence."""
  short = small_target("llama", max_position_embeddings=16)
  with pytest.raises(ValueError, match=message):
    Session(short).prepare(prompts, **dict(max_new_tokens=4) | settings)


@pytest.mark.parametrize("stops, wanted", [
  (5, [[5], [5]]), (np.int64(5), [[5], [5]]), (None, [[], []]), ({7, 5}, [[5, 7], [5, 7]]), ((), [[], []]),
  (np.array([5, 7]), [[5, 7], [5, 7]]), ([None, {9, 8}], [[], [8, 9]]), ([5, (6, 7)], [[5], [6, 7]])])
def test_forms_of_stop_ids(stops, wanted):
  """Kills: a TypeError for one id, for none or for a set; the ids of one prompt that stop the others."""
  (batch,) = Session(target()).prepare([[1]] * 2, max_new_tokens=4, stop_token_ids=stops)
  assert [[token for token in row if token >= 0] for row in batch.args[2].settings.stop_ids.tolist()] == wanted


def test_integers_of_all_kinds():
  """Kills: prompts or seeds that are taken as lists of Python's integers alone; seeds that wrap at a small dtype."""
  prompts, seeds = [[1, 2], [3]], [255, 256]
  forms = [(prompts, dict(seed=255)), (prompts, dict(seed=np.uint8(255))), (prompts, dict(seeds=np.uint16(seeds))),
           ([np.uint8(prompt) for prompt in prompts], dict(seed=jnp.uint32(255))),
           ([(1, 2), range(3, 4)], dict(seeds=seeds))]
  for given, settings in forms:
    (batch,) = Session(target()).prepare(given, max_new_tokens=np.int16(4), **settings)
    requests = batch.args[2]
    assert requests.prompts[:, :2].tolist() == [[1, 2], [3, 0]] and requests.lengths.tolist() == [2, 1]
    assert requests.seeds.tolist() == seeds and requests.prompts.dtype == np.int32


def test_64_bits_are_refused():
  """Kills: a TypeError of a loop's carry from deep inside, where JAX was told to compute in 64 bits."""
  for call in (lambda: generate(target(), None, [[1]], max_new_tokens=2), lambda: Engine(target())):
    with jax.enable_x64(True), pytest.raises(ValueError, match="jax_enable_x64 is on, .*: turn it off"):
      call()


@pytest.mark.parametrize("settings, part", [
  (dict(calibration=0.5), r"calibration is 0.5, expected 3 positive numbers"),
  (dict(calibration=["a", "b", "c"]), r"calibration is \['a', 'b', 'c'\], expected 3 positive numbers"),
  (dict(calibration=[[1.0, [2.0], 3.0]] * 8), "expected 3 positive numbers"),
  (dict(calibration={"greedy": [1.0] * 3}), "calibration is {'greedy'"),
  (dict(calibration=jnp.zeros(3)), r"calibration is \[0.0, 0.0, 0.0\], expected 3"),
  (dict(survival_threshold="0.5"), "survival_threshold is '0.5', expected a number"),
  (dict(confidence_threshold=[0.5] * 7 + [None]), "confidence_threshold is None, expected a number"),
  (dict(survival_threshold=[[0.5]] * 8), r"survival_threshold is \[0.5\], expected a number"),
  (dict(temperature="1"), "temperature is '1', expected a number"), (dict(temperature={}), "temperature is {}"),
  (dict(temperature=True), "temperature is True, expected a number"), (dict(top_k=[None] * 8), "top_k is None")])
def test_settings_of_another_kind(settings, part):
  """Kills: a TypeError without a sentence, or a text that is read as a number, for a value of another kind."""
  with pytest.raises(ValueError, match=part) as caught:
    Session(target(), drafter("rnn")).prepare(PROMPTS, **dict(max_new_tokens=NEW) | settings)
  assert str(caught.value).isprintable()


def test_numbers_of_all_kinds():
  """Kills: numpy's or JAX's numbers refused where Python's are taken."""
  for number in (1, np.float16(1), jnp.bfloat16(1), jnp.float32(1)):
    (batch,) = Session(target(), drafter("rnn")).prepare([[1]], temperature=number, survival_threshold=number,
                                                         calibration=jnp.full(3, number))
    settings = batch.args[2].settings
    assert settings.sampling.temperature.tolist() == [1] and settings.calibration.tolist() == [[1, 1, 1]]
    assert settings.thresholds.tolist() == [[0, 1]]


def test_a_drafter_of_another_target():
  """Kills: a TypeError of a product of two widths, or drafts of other words, for a drafter that fits no such target."""
  other = small_drafter(small_target("llama", vocab_size=16), "rnn", num_layers=1)
  for call in (lambda: generate(target(), other, [[1]]), lambda: Engine(target(), other)):
    with pytest.raises(ValueError, match="vocabulary is 16, the target's is 12: this drafter was made for another"):
      call()
