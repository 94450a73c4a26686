"""The OpenAI API's requests and answers, as far as we speak it: no network, no engine.

What would change an answer and is not understood is refused by name. Ours are the fields top_k, stop_token_ids and
dspark (true: chunks of a stream tell which tokens were drafted), and accepted_length in usage.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers.decoders import DecodeStream

from dspark_jax.config import name_shown
from dspark_jax.data import chat
from dspark_jax.decoding.engine import Event, Request

MOST = 16       # answers to one request
STOPS = 8       # stop texts of one request
SAID = {"system", "user", "assistant"}  # roles that templates write, or refuse
# Accepted where they ask for nothing.
NEUTRAL = {"frequency_penalty": (0,), "presence_penalty": (0,), "best_of": (1,), "echo": (False,), "suffix": ("",),
           "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
           "response_format": ({"type": "text"},), "top_logprobs": (0,), "parallel_tool_calls": (True, False),
           "repetition_penalty": (1,), "min_p": (0,), "modalities": (["text"],)}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "stream_options.include_obfuscation"}


class Refused(Exception):
  """A request that cannot be served: an HTTP status, a sentence, and the field that it is about."""

  def __init__(self, message: str, field: str | None = None, status: int = 400):
    super().__init__(message)
    self.field, self.status = field, status

  def body(self) -> dict:
    """As OpenAI's clients expect an error."""
    kind = "invalid_request_error" if self.status < 500 else "server_error"
    return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}}


@dataclasses.dataclass(frozen=True)
class Job:
  """What a client asks for: engine requests, one per answer, and how their texts are told."""
  requests: tuple[Request, ...]
  stops: tuple[str, ...]
  chat: bool
  stream: bool
  usage: bool    # a last chunk that says it
  details: bool  # chunks with what was drafted

  @property
  def log_probs(self) -> bool:
    return self.requests[0].log_probabilities


def parse(body: Any, tokenizer: Any, *, chat_form: bool, most: Callable[[int], int], model: str | None = None) -> Job:
  """The job of a request's JSON. most(tokens of the prompt): new tokens where it names none; model: the one that it may
  name. `Refused` says what is wrong with it.
  """
  if not isinstance(body, dict):
    raise Refused(f"the body is a {type(body).__name__}, expected a JSON object")
  fields = _Fields({name: value for name, value in body.items() if value is not None})
  if model is not None:
    check_model(fields.take("model", str, model), model)
  fields.left.pop("model", None)
  prompt = _messages(fields, tokenizer) if chat_form else _prompt(fields, tokenizer)
  limits = [fields.take(name, int, None, 1) for name in ("max_completion_tokens", "max_tokens")]
  n, seed = fields.take("n", int, 1, 1, MOST), fields.take("seed", int, None, 0, 2 ** 32 - MOST)
  ids = fields.take("stop_token_ids", list, [])
  if not all(type(token) is int for token in ids):
    raise Refused("stop_token_ids is no list of token ids", "stop_token_ids")
  stream, usage = fields.take("stream", bool, False), _usage(fields)
  logs = fields.take("logprobs", bool, False) if chat_form else _logs(fields)
  asked = dict(
      max_new_tokens=limits[0] or limits[1] or most(len(prompt)),
      temperature=fields.take("temperature", float, 1.0, 0), top_p=fields.take("top_p", float, 1.0, 0, 1),
      top_k=fields.take("top_k", int, 0, 0), stop_token_ids=tuple({*ids, *chat.stop_ids(tokenizer)}),
      log_probabilities=logs)
  stops, details = _stops(fields), fields.take("dspark", bool, False)
  fields.finish()
  seed = secrets.randbelow(2 ** 32 - MOST) if seed is None else seed
  return Job(tuple(Request(tuple(prompt), seed=seed + row, **asked) for row in range(n)), stops, chat_form, stream,
             usage, details)


def check_model(asked: str, model: str) -> None:
  """`Refused` for another model than the one that is served."""
  if asked != model:
    raise Refused(f"the model {asked!r:.80} is not served here, {model!r} is", "model", status=404)


class _Fields:
  """What is left of a request to be understood."""

  def __init__(self, body: dict):
    self.left = body

  def take(self, name, kind, default, least=None, most=None):
    """A field's value, of a type and in a range."""
    value = self.left.pop(name, default)
    if value is default:
      return value
    number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
    right = number and (kind is float or type(value) is int) or kind not in (int, float) and isinstance(value, kind)
    # NaN is in no range, and Infinity in none that ends.
    if not right or number and not (-2 ** 63 < value < 2 ** 63) or least is not None and not value >= least or (
        most is not None and not value <= most):
      span = "" if least is None else f" from {least}" + ("" if most is None else f" to {most}")
      raise Refused(f"{name} is {str(value)!r:.60}, expected {kind.__name__}{span}", name)
    return value

  def finish(self):
    """`Refused` for the first field that nobody has understood."""
    for name, value in self.left.items():
      if name in IGNORED or name in NEUTRAL and value in NEUTRAL[name]:
        continue
      name = name_shown(name)
      raise Refused(f"{name} is {str(value)!r:.60}, which is not supported here: leave it out", name)


def _messages(fields, tokenizer):
  messages = fields.take("messages", list, None)
  if not messages:
    raise Refused("messages are missing, expected a list of {role, content}", "messages")
  asked = []
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise Refused("a message is no object with a role", "messages")
    content = message.get("content")
    # Clients send a reply back with all of its empty fields.
    if wrong := [name for name, value in message.items() if value and name not in ("role", "content")]:
      raise Refused(f"a message has {wrong[0]!r:.60}, which is not supported here: leave it out", "messages")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" and isinstance(
        part.get("text"), str) for part in content):
      content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
      raise Refused("a message's content is not text, and only text is read", "messages")
    asked.append({"role": message["role"], "content": content})
  if not tokenizer.chat_template:
    raise Refused("the model has no chat template, as base models have none: use /v1/completions", "messages")
  try:
    _must_be_said(tokenizer, asked)
    prompt = chat.encode_prompt(tokenizer, asked)
  except ValueError as error:
    raise Refused(str(error), "messages") from error
  return prompt


def _must_be_said(tokenizer, messages):
  """ValueError for a message of an unusual role, such as developer, that the chat template leaves out."""
  marks = {i: f"\ue000{i}\ue001" for i, message in enumerate(messages) if message["role"] not in SAID}
  if not marks:  # nearly always, and to render takes time
    return
  text = chat.render(tokenizer, [message | {"content": message["content"] + marks.get(i, "")}
                                 for i, message in enumerate(messages)])
  for i, mark in marks.items():
    if mark not in text:
      raise ValueError(f"the chat template says nothing of the role {messages[i]['role']!r:.60}: use system, user or "
                       f"assistant")


def _prompt(fields, tokenizer):
  """Tokens of a completion's prompt. Control tokens that a text spells are control tokens: no template writes any here,
  and whoever may send token ids could send them anyway."""
  prompt = fields.left.pop("prompt", None)
  if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
    prompt = prompt[0]
  if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
    return prompt
  if not isinstance(prompt, str) or not prompt:
    raise Refused("prompt is missing, expected a text or a list of token ids, one in a request", "prompt")
  try:
    return chat.encode_text(tokenizer, prompt, allow_special=True)
  except ValueError as error:
    raise Refused(str(error), "prompt") from error


def _usage(fields):
  """Whether a stream ends with its usage. What else its options ask for is left to be understood."""
  options = fields.take("stream_options", dict, {})
  fields.left |= {f"stream_options.{name}": value for name, value in options.items() if value is not None}
  return fields.take("stream_options.include_usage", bool, False)


def _logs(fields):
  """Whether a completion tells log-probabilities; how many alternatives it shall name is not."""
  alternatives = fields.take("logprobs", int, None, 0)
  if alternatives:
    raise Refused(f"logprobs is {alternatives}, but alternatives are not told here: give 0, for the chosen tokens",
                  "logprobs")
  return alternatives is not None


def _stops(fields):
  stops = fields.left.pop("stop", [])
  stops = [stops] if isinstance(stops, str) else stops
  if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(x, str) and x for x in stops):
    raise Refused(f"stop is {str(stops)!r:.60}, expected a text or a list of at most {STOPS} texts", "stop")
  return tuple(stops)


def before(stops: tuple[str, ...], text: str, begin: int = 0) -> str:
  """A text up to the stop text that ends first, the longest of several; looked for from `begin` on."""
  # Not the one that begins first: while it may still become whole, a shorter one inside it already is.
  ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop, begin)) >= 0]
  return text[:min(ends)[1]] if ends else text


class Speaker:
  """Turns an answer's tokens into text as they come: whole characters, and nothing that may begin a stop text."""

  def __init__(self, tokenizer: Any, stops: tuple[str, ...]):
    self._tokenizer, self._stops, self._stream = tokenizer, stops, DecodeStream(skip_special_tokens=True)
    self.tokens: list[int] = []
    self.texts: list[str] = []   # of each token: what it added
    self.starts: list[int] = []  # where that begins
    self.drafted: list[bool] = []
    self.log_probs: list[float] = []
    self.said = self._sent = ""
    self._before = max(map(len, stops), default=1) - 1  # characters of a stop text that may come before its last one
    self._told = 0  # tokens
    self.stopped = False
    self.rounds = self.round_tokens = 0

  def feed(self, event: Event) -> tuple[str, list[int]]:
    """(what can be told now, the tokens that are told to their end with it, by number)."""
    for place, token in enumerate(event.tokens):
      piece = self._step(token)
      self.texts.append(piece)
      self.starts.append(len(self.said))
      self.drafted.append(place < event.accepted)
      self.said += piece
      self.tokens.append(token)
    self.log_probs += event.log_probabilities or ()
    if len(self.tokens) > len(event.tokens):  # the first token is of the prompt's own pass
      self.rounds, self.round_tokens = self.rounds + 1, self.round_tokens + len(event.tokens)
    if event.finish:  # also what is no whole character
      whole = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
      self.said = whole if whole.startswith(self._sent) else self.said  # stray bytes may spell earlier ones otherwise
    begin = max(len(self._sent) - self._before, 0)  # in what was told there is none: an answer is not searched anew
    cut = before(self._stops, self.said, begin)
    self.said, self.stopped = cut, len(cut) < len(self.said)
    last = event.finish or self.stopped
    text = self.said[len(self._sent):len(self.said) - (0 if last else self._held())]
    self._sent += text
    ready = [i for i in self.kept(self._told) if last or self._is_told(i)]
    self._told += len(ready)
    return text, ready

  def _step(self, token):
    """The text that a token adds, once it is whole."""
    for _ in range(2):
      try:
        return self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
      except Exception:  # its own: a byte behind others that spells them otherwise; the stream begins anew with it
        self._stream = DecodeStream(skip_special_tokens=True)
    return ""

  def kept(self, first: int = 0) -> list[int]:
    """Tokens from `first` on, by number, without those behind a stop text, which one round may bring along."""
    return [i for i in range(first, len(self.tokens)) if self.starts[i] < len(self.said) or not self.stopped]

  def _is_told(self, i):
    """Whether a token's text has been told; of half a character, which a stop text may begin with, the rest of it."""
    return self.starts[i] + max(len(self.texts[i]), bool(self._stops)) <= len(self._sent)

  def pieces(self, tokens: list[int]) -> list[tuple[str, bool]]:
    """The text of each of these tokens, up to the end, with whether it was drafted."""
    return [(self.texts[i][:max(len(self._sent) - self.starts[i], 0)], self.drafted[i]) for i in tokens]

  def _held(self):
    """Characters at the end that a stop text may begin with."""
    return max((n for n in range(1, min(self._before, len(self.said)) + 1)
                if any(stop.startswith(self.said[-n:]) for stop in self._stops)), default=0)

  @property
  def accepted_length(self) -> float | None:
    """Tokens per round."""
    return self.round_tokens / self.rounds if self.rounds else None

  def logs(self, tokens: list[int], chat_form: bool) -> dict:
    """Log-probabilities of these tokens, in OpenAI's form."""
    words = [self.texts[i] for i in tokens]
    values = [self.log_probs[i] for i in tokens]
    if not chat_form:
      return {"tokens": words, "token_logprobs": values, "top_logprobs": None, "text_offset": [self.starts[i]
                                                                                              for i in tokens]}
    return {"content": [{"token": word, "logprob": value, "bytes": list(word.encode()), "top_logprobs": []}
                        for word, value in zip(words, values)], "refusal": None}


class Answer:
  """The bodies of a job's answer."""

  def __init__(self, job: Job, model: str):
    kind = "chatcmpl" if job.chat else "cmpl"
    self.job, self.begun = job, False
    self._base = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

  def _name(self, chunk):
    return {"object": ("chat.completion" + (".chunk" if chunk else "")) if self.job.chat else "text_completion"}

  def chunk(self, index: int, text: str, finish: str | None, logs: dict | None, details: dict | None, first: bool
            ) -> dict:
    """A piece of a stream."""
    told = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}} if self.job.chat else {"text": text}
    choice = {"index": index, **told, "logprobs": logs, "finish_reason": finish}
    return self._base | self._name(True) | {"choices": [choice]} | ({"dspark": details} if details else {})

  def whole(self, speakers: list[Speaker], finishes: list[str]) -> dict:
    """The answer of a request that does not stream."""
    def told(text):
      return {"message": {"role": "assistant", "content": text, "refusal": None}} if self.job.chat else {"text": text}
    choices = [{"index": index, **told(speaker.said), "finish_reason": finish,
                "logprobs": speaker.logs(speaker.kept(), self.job.chat) if self.job.log_probs else None}
               for index, (speaker, finish) in enumerate(zip(speakers, finishes))]
    return self._base | self._name(False) | {"choices": choices, "usage": self.usage(speakers)}

  def last(self, speakers: list[Speaker]) -> Iterator[dict]:
    """What follows the last piece of a stream."""
    if self.job.usage:
      yield self._base | self._name(True) | {"choices": [], "usage": self.usage(speakers)}

  def usage(self, speakers: list[Speaker]) -> dict:
    """Tokens, and how many of them a round brought."""
    prompt, new = len(self.job.requests[0].prompt), sum(len(speaker.kept()) for speaker in speakers)
    rounds = sum(speaker.rounds for speaker in speakers)
    length = sum(speaker.round_tokens for speaker in speakers) / rounds if rounds else None
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "accepted_length": length}
