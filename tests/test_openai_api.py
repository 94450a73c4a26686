"""The OpenAI API without a server: what a request is read as, and how tokens become the text of an answer."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from dspark_jax.data import chat
from dspark_jax.decoding.engine import Event, Request
from dspark_jax.decoding.generate import Text
from dspark_jax.programs.openai_api import Job, Refused, Speaker, parse
from infer import generate

TEXT = "Lists hold things — naïve ones, 😀 too. They have an order. " * 4
HELLO = [{"role": "user", "content": "hello"}]
# As Qwen3's: other roles are passed over.
FOUR_ROLES = """{% for m in messages %}{% if m.role in ("system", "user", "assistant") %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == "tool" %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
  return chat.load_tokenizer(chat.smollm2_path())


def test_bytes_that_spell_no_character():
  """Of a tokenizer that falls back to bytes. Kills: a stray byte behind a character, which ends the stream, or what was
  told before told otherwise."""
  words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
  spelled = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a"))
  spelled.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  tokenizer = SimpleNamespace(backend_tokenizer=spelled, decode=lambda ids, skip_special_tokens: spelled.decode(ids))
  speaker, told, tokens = Speaker(tokenizer, ()), "", [*"\uc12c".encode(), 0xEC, 256, 256]
  for at, token in enumerate(tokens):
    told += speaker.feed(Event(1, (token,), None, 0, 0, 0, "length" if at + 1 == len(tokens) else None))[0]
  assert told.startswith("\uc12c") and told.endswith("a") and speaker.said == told


def test_words_as_they_come(tokenizer):
  """Any cut of the tokens into rounds tells the same text, whole and in pieces, up to a stop text anywhere. Kills: half
  a character, text told twice, a stop text in the pieces, or passed over as it begins right behind what was told;
  log-probabilities of tokens that are not in the text, or of half a character that turns out to begin the stop text."""
  tokens = tokenizer.encode(TEXT)
  for size, stop in [(size, TEXT[at:at + 1 + at % 7]) for size in (1, 2, 5) for at in range(len(TEXT))]:
    speaker, told, shown, words = Speaker(tokenizer, (stop, "x" * 9)), "", "", []
    for at in range(0, len(tokens), size):
      part = tuple(tokens[at:at + size])
      finish = "length" if at + size >= len(tokens) else None
      text, new = speaker.feed(Event(1, part, (-0.5,) * len(part), 0, 0, 0, finish))
      assert "\ufffd" not in text
      told += text
      shown += "".join(piece for piece, _ in speaker.pieces(new))
      words += speaker.logs(new, chat_form=False)["tokens"]
      assert told.startswith(shown) and (speaker.stopped or told.startswith("".join(words)))
      if speaker.stopped:
        break
    assert speaker.stopped and told == shown == TEXT[:TEXT.index(stop)]
    assert words == speaker.logs(speaker.kept(), chat_form=False)["tokens"]


COUNT = "one two three four five six"


@pytest.mark.parametrize("stops", [("two three four", "three"), ("three", "two three four"), ("ee f", "three four"),
                                   ("two three", "three"), ("e two three four", "hre", "re"), ("six!", "six", "ix")])
def test_of_overlapping_stop_texts_the_first_to_end(tokenizer, stops):
  """Any cut of the tokens into rounds tells the same text, that of infer.generate. Kills: the stop text that begins
  first, which is not seen as such before it ends; of two that end together, the shorter one."""
  tokens = tokenizer.encode(COUNT)
  seen = next(COUNT[:n] for n in range(len(COUNT) + 1) if any(stop in COUNT[:n] for stop in stops))
  wanted = seen[:min(seen.find(stop) for stop in stops if stop in seen)]
  for cuts in itertools.product((False, True), repeat=len(tokens) - 1):
    speaker, told, at = Speaker(tokenizer, stops), "", 0
    for end in [n for n, cut in enumerate(cuts, 1) if cut] + [len(tokens)]:
      finish = "length" if end == len(tokens) else None
      told += speaker.feed(Event(1, tuple(tokens[at:end]), None, 0, 0, 0, finish))[0]
      at = end
      if speaker.stopped:
        break
    assert told == speaker.said == wanted
  rounds = [0] * (len(tokens) - 1)
  text = Text(tokens, rounds, rounds, [1 + n for n in rounds], np.zeros((len(rounds), 3), np.float32))
  settings = SimpleNamespace(stop=stops, logprobs=False)
  assert generate.finish(settings, tokenizer, None, None, 0, text).text == wanted


def prompt_of(tokenizer, *messages):
  asked = [{"role": role, "content": content} for role, content in messages]
  return parse({"messages": asked}, tokenizer, chat_form=True, most=lambda prompt: 3).requests[0].prompt


@pytest.mark.parametrize("role, before", [("developer", ()), ("function", (("user", "hi"),)), ("User", ()),
                                          ("developer", (("system", "Be brief."), ("user", "hi")))])
def test_a_message_that_the_template_leaves_out_is_refused(tokenizer, role, before):
  """Kills: an answer to a conversation without its instructions; a role that is refused by its name alone, though the
  model's template writes it."""
  messages = [*before, (role, "Answer in French."), ("user", "hi")]
  for content in (messages[len(before)], (role, "hi"), (role, "")):  # also one that another message says
    assert role in tokenizer.decode(prompt_of(tokenizer, *before, content, ("user", "hi")))
  four = copy.deepcopy(tokenizer)
  four.chat_template = FOUR_ROLES
  assert "It rains." in tokenizer.decode(prompt_of(four, ("user", "hi"), ("tool", "It rains."), *before, ("user", "a")))
  for content in (messages[len(before)], (role, "hi"), (role, "")):
    with pytest.raises(Refused, match=f"the chat template says nothing of the role '{role}': use system") as refused:
      prompt_of(four, *before, content, ("user", "hi"))
    assert refused.value.field == "messages" and refused.value.status == 400


@pytest.mark.parametrize("asked, told", [({}, False), ({"logprobs": None}, False), ({"logprobs": 0}, True)])
def test_log_probabilities_of_chosen_tokens(tokenizer, asked, told):
  """Kills: alternatives that are promised, and none told; a 0 that is taken for no."""
  ask = lambda asked: parse({"prompt": "Once"} | asked, tokenizer, chat_form=False, most=lambda prompt: 3).log_probs
  assert ask(asked) is told
  for wrong, says in ((1, "logprobs is 1, but alternatives are not told here: give 0"), (5, "logprobs is 5"),
                      (True, "logprobs is 'True', expected int from 0"), (-1, "logprobs is '-1'")):
    with pytest.raises(Refused, match=says):
      ask({"logprobs": wrong})


@pytest.mark.parametrize("options, usage", [(None, False), ({}, False), ({"include_usage": None}, False),
                                            ({"include_usage": True, "include_obfuscation": True}, True)])
def test_options_of_a_stream(tokenizer, options, usage):
  """Kills: an option that a client sends and that is taken for an unknown one."""
  body = {"prompt": "Once", "stream": True, "stream_options": options}
  assert parse(body, tokenizer, chat_form=False, most=lambda prompt: 3).usage is usage


def test_what_is_asked_for_reaches_the_engine(tokenizer):
  """Kills: a setting that is taken for understood, and passed on as its default or as another's; a field that clients
  send along, which changes no answer, refused."""
  along = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s",
           "prompt_cache_key": "k"}
  body = {"prompt": [5, 6, 7], "max_completion_tokens": 9, "max_tokens": 11, "temperature": 0.25, "top_p": 0.5,
          "top_k": 3, "seed": 40, "n": 2, "stop_token_ids": [8], "logprobs": 0, "stop": "x", "stream": True,
          "dspark": True} | along
  ask = lambda body: parse(body, tokenizer, chat_form=False, most=lambda prompt: 33)
  job = ask(body)
  stops = job.requests[0].stop_token_ids  # in any order
  assert sorted(stops) == sorted([8, *chat.stop_ids(tokenizer)])
  assert job == Job(tuple(Request((5, 6, 7), max_new_tokens=9, temperature=0.25, top_k=3, top_p=0.5, seed=seed,
                                  stop_token_ids=stops, log_probabilities=True) for seed in (40, 41)),
                    ("x",), chat=False, stream=True, usage=False, details=True)
  assert ask({"prompt": [5], "max_tokens": 11}).requests[0].max_new_tokens == 11


def test_defaults_are_openais(tokenizer):
  job = parse({"prompt": "Once"}, tokenizer, chat_form=False, most=lambda prompt: 33)
  (request,) = job.requests
  assert (request.temperature, request.top_p, request.max_new_tokens, job.stream) == (1.0, 1.0, 33, False)
  assert set(request.stop_token_ids) == set(chat.stop_ids(tokenizer))
  with pytest.raises(Refused, match="chat template"):
    bare = SimpleNamespace(chat_template=None)
    parse({"messages": HELLO}, bare, chat_form=True, most=lambda prompt: 3)


def test_a_completion_may_spell_control_tokens(tokenizer):
  """Kills: a prompt whose control tokens, which no template writes for a completion, reach the model as letters."""
  (request,) = parse({"prompt": "Once<|im_end|>"}, tokenizer, chat_form=False, most=lambda prompt: 3).requests
  assert request.prompt[-1] == 2 and len(request.prompt) < 5
