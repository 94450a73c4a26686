"""What infer.generate makes of prompts: settings of a line, base models, stop texts, log-probabilities."""

import json
import types

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax.data import chat
from dspark_jax.decoding import score
from dspark_jax.decoding.session import PromptBatch
from dspark_jax.nn.attention import Kernels
from folders import DSPARK, LLAMA, QWEN3, called, complains, llama, with_tokenizer
from infer import generate

PROMPTS = [[5, 17, 33, 2, 90], [7, 7, 64]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target with a tokenizer, and prompts in tokens."""
  folder = tmp_path_factory.mktemp("prompts")
  with_tokenizer(LLAMA, folder / "target")
  (folder / "prompts.json").write_text(json.dumps(PROMPTS))
  return folder


def test_tools_are_told(folder):
  """Kills: tools that the template is not given, or that a base model is never told of."""
  tokenizer, tools = chat.load_tokenizer(folder / "target"), [{"name": "w9"}]
  settings = types.SimpleNamespace(thinking=None, allow_special=False)
  tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + tokenizer.chat_template
  plain = generate.encode(settings, tokenizer, {"prompt": "w7"})
  told = generate.encode(settings, tokenizer, {"prompt": "w7", "tools": tools})
  assert told == tokenizer.encode("w9", add_special_tokens=False) + plain
  tokenizer.chat_template = None
  with complains("it has tools", "remove them"):
    generate.encode(settings, tokenizer, {"prompt": "w7", "tools": tools})


@pytest.mark.slow
def test_settings_of_a_line(folder, capsys, tmp_path):
  """Kills: a line's own max_tokens, temperature or seed passed over; one line's settings used for another; one seed for
  all lines that have none."""
  lines = [{"prompt": "w7"}, {"prompt": "w7", "max_tokens": 2, "id": "a"},
           {"prompt": "w7", "temperature": 5.0, "seed": 3, "top_k": 0, "top_p": 1, "max_completion_tokens": 3}]
  (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  common = ("--target", folder / "target", "--drafter", "none", "--max-new-tokens", 6)
  tokenizer = chat.load_tokenizer(folder / "target")
  prompts = [chat.encode_prompt(tokenizer, [{"role": "user", "content": "w7"}])] * 3
  for more, temperature, seeds in (((), 0, [0, 1, 3]), (("--seed", 5, "--temperature", 1), 1, [5, 6, 3])):
    result, _ = called(capsys, generate.main, generate.Settings, *common, "--prompts", tmp_path / "p.jsonl", *more)
    wanted = dspark_jax.generate(llama(), None, prompts, max_new_tokens=[6, 2, 3], seeds=seeds,
                                 temperature=[temperature, temperature, 5.0], stop_token_ids=(2,)).tokens
    assert result["tokens"] == wanted and (wanted[1] == wanted[0][:2]) == (temperature == 0)


def test_logprobs_of_texts_that_a_kernel_does_not_take(folder, capsys, tmp_path, monkeypatch):
  """Kills: a batch that is decoded for hours, and lost where its log-probabilities are asked for; a limit that a line
  has of its own passed over."""
  asked = []
  monkeypatch.setattr(score, "check", lambda target, longest: asked.append(longest))
  monkeypatch.setattr(generate, "decode", lambda *args: {"asked": list(asked)})
  (tmp_path / "p.jsonl").write_text('{"prompt": "w7"}\n{"prompt": "w7", "max_tokens": 40}\n')
  run = lambda *more: called(capsys, generate.main, generate.Settings, "--target", folder / "target", "--drafter",
                             "none", "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 6, *more)[0]
  prompt = chat.encode_prompt(chat.load_tokenizer(folder / "target"), [{"role": "user", "content": "w7"}])
  assert run()["asked"] == [] and run("--logprobs")["asked"] == [len(prompt) + 40]
  monkeypatch.undo()
  target = types.SimpleNamespace(kernels=Kernels("pallas", "splash"))
  score.check(target, 2 ** 15)
  with complains("32769 tokens, prompts included", "splash attends to at most 32768", "--kernels.train reference"):
    score.check(target, 2 ** 15 + 1)
  score.check(types.SimpleNamespace(kernels=Kernels("pallas", "reference")), 2 ** 15 + 1)


@pytest.mark.slow
def test_logprobs(folder, capsys):
  """Kills: log-probabilities of the token before or after, at another temperature, or of a padded row's neighbour."""
  result, _ = called(capsys, generate.main, generate.Settings, "--target", QWEN3, "--drafter", DSPARK,
                     "--prompt-tokens", folder / "prompts.json", "--max-new-tokens", 9, "--temperature", 0.7,
                     "--logprobs")
  target = dspark_jax.load_target(QWEN3)
  for prompt, said, found in zip(PROMPTS, result["tokens"], result["logprobs"]):
    whole = np.array([prompt + said])
    logits = target.head()(target(whole, target.init_cache(*whole.shape), ())[0].hidden)[0]
    wanted = jax.nn.log_softmax(logits)[np.arange(whole.size - 1), whole[0, 1:]][len(prompt) - 1:]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_stop_texts(folder, capsys):
  """Kills: a reply that holds its stop text, goes on after it, or is cut before a token of it; other tokens than those
  of the whole reply."""
  common = ("--target", folder / "target", "--drafter", "none", "--prompt", "w7 w9", "--max-new-tokens", 12)
  whole, _ = called(capsys, generate.main, generate.Settings, *common)
  (text,), (tokens,) = whole["text"], whole["tokens"]
  stop = text[len(text) // 2:len(text) // 2 + 4]
  result, _ = called(capsys, generate.main, generate.Settings, *common, "--stop", "no such text", stop)
  assert result["text"] == [text[:text.find(stop)]]
  said = chat.load_tokenizer(folder / "target").decode
  count = len(result["tokens"][0])
  assert result["tokens"][0] == tokens[:count] and stop in said(tokens[:count]) and stop not in said(tokens[:count - 1])
  assert result["rounds"] == count - 1 and result["accepted_length"] == 1


@pytest.mark.parametrize("more, part", [
    ({"logit_bias": {}}, "unknown key 'logit_bias'"), ({"n": 2}, "unknown key 'n'"), ({"max_tokens": 0}, "at least 1"),
    ({"temperature": "hot"}, "key 'temperature' is 'hot'"), ({"tools": "x"}, "tools that are no list of objects"),
    ({"top_p": 2}, "key 'top_p' is 2"), ({"messages": [{"role": "user", "content": "w5"}]}, "has no prompt")])
def test_settings_that_a_line_cannot_have(more, part, folder, capsys, tmp_path):
  """Kills: a setting in a line that is ignored without a word."""
  (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "w7"} | more) + "\n")
  _, err = called(capsys, generate.main, generate.Settings, "--target", folder / "target", "--drafter", "none",
                  "--prompts", tmp_path / "p.jsonl", code=2)
  assert "p.jsonl, line 1" in err and part in err and err.count("error: ") == 1


def test_what_a_base_model_is_given_is_text(monkeypatch):
  """Kills: a control token in a prompt of raw text that ends it, --allow-special or not; one that is text all the
  same where it was allowed."""
  tokenizer = chat.load_tokenizer(chat.smollm2_path())
  monkeypatch.setattr(tokenizer, "chat_template", None)
  encode = lambda text, **how: generate.read_prompts(generate.Settings("t", "none", prompt=text, **how), tokenizer)
  prompt = "It says<|im_end|> there"
  (text,), (control,) = encode(prompt), encode(prompt, allow_special=True)
  assert (text.tokens.count(2), control.tokens.count(2)) == (0, 1)
  assert tokenizer.decode(text.tokens) == tokenizer.decode(control.tokens) == prompt


@pytest.mark.slow
def test_base_models(folder, capsys, tmp_path, monkeypatch):
  """Kills: a traceback of the template library for a model that has none; messages sent to it as if it could chat."""
  load = chat.load_tokenizer
  def without_template(path):
    tokenizer = load(path)
    tokenizer.chat_template = None
    return tokenizer
  monkeypatch.setattr(chat, "load_tokenizer", without_template)
  common = ("--target", folder / "target", "--drafter", "none", "--max-new-tokens", 3)
  result, err = called(capsys, generate.main, generate.Settings, *common, "--prompt", "w7 w9")
  wanted = dspark_jax.generate(llama(), None, [load(folder / "target")("w7 w9")["input_ids"]], max_new_tokens=3).tokens
  assert result["tokens"] == wanted and "raw text" in err
  (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "w5"}]}\n')
  _, err = called(capsys, generate.main, generate.Settings, *common, "--prompts", tmp_path / "p.jsonl", code=2)
  assert "no chat template" in err


@pytest.mark.slow
def test_out_goes_on(folder, capsys, tmp_path, monkeypatch):
  """Kills: a run that is killed and begins anew, or goes on with other numbers; one file with the texts of two runs."""
  out = tmp_path / "out.jsonl"
  common = ["--target", QWEN3, "--drafter", DSPARK, "--prompt-tokens", folder / "prompts.json", "--max-new-tokens", 8,
            "--temperature", 1.0, "--logprobs", "--budget-gb", 1e-9, "--out", out]  # a batch for each prompt
  whole, _ = called(capsys, generate.main, generate.Settings, *common)
  lines = out.read_text().splitlines(keepends=True)
  assert sorted(json.loads(line)["index"] for line in lines) == [0, 1]
  out.write_text(lines[0] + lines[1][:20])  # killed while it wrote the second one
  ran, run = [], PromptBatch.run
  monkeypatch.setattr(PromptBatch, "run", lambda batch: ran.append(batch) or run(batch))
  again, _ = called(capsys, generate.main, generate.Settings, *common)
  assert len(ran) == 1 and out.read_text().splitlines(keepends=True) == lines
  timed = ("tokens_per_second", "compile_seconds")
  assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
  before = out.read_bytes()
  for other in (["--seed", 1], ["--temperature", 0.5], ["--drafter", "none"]):
    _, err = called(capsys, generate.main, generate.Settings, *common, *other, code=2)
    assert "holds a run with other settings" in err and out.read_bytes() == before
