"""Files -> documents and questions: what is learned of a conversation, or asked, what is left out and why, which file
and line is wrong."""

import dataclasses
import datetime
import json
import sys
import types

import pytest

from dspark_jax.data import conversations, prompts
from dspark_jax.data.conversations import Lost, Source
from dspark_jax.data.prompts import Conversation
from folders import complains
from train import answers

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def letters(text, add_special_tokens):
  assert not add_special_tokens
  return {"input_ids": list(text.encode())}


def encode_text(tokenizer, text):
  if text == "unreadable":
    raise ValueError("the tokenizer cannot read this text")
  return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_conversation(tokenizer, messages, *, tools, enable_thinking=False):
  """One token a letter; replies are supervised, each in a document of its own where thinking is on."""
  texts = [tokenizer(message["content"], add_special_tokens=False)["input_ids"] for message in messages]
  replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  if any(message["content"] == "refused" for message in messages):
    raise ValueError("the template refuses these messages")
  ids = lambda last, supervised: (sum(texts[:last + 1], [ord("t")] * len(tools or ())), [False] * len(tools or ()) + [
      i in supervised for i, text in enumerate(texts[:last + 1]) for _ in text])
  if enable_thinking:
    # As templates that rewrite history: what begins with * cannot be had in the form in which it is generated.
    return [ids(reply, [reply]) for reply in replies if not messages[reply]["content"].startswith("*")]
  return [ids(len(messages), replies)] if replies else []


def read(paths, max_len=100, vocab_size=256, size=10 ** 6):
  """All documents of the files, read in pieces of `size` bytes."""
  found = [conversations.read_conversations(shard, letters, max_len=max_len, vocab_size=vocab_size,
                                            encode_conversation=encode_conversation, encode_text=encode_text)
           for path in paths for shard in conversations.shards(path, size)]
  lost = (sum(counts) for counts in zip(*(dataclasses.astuple(source.lost) for source in found)))
  return Source([document for source in found for document in source.documents], Lost(*lost))


def write_lines(path, *records):
  lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
  path.write_text("\n".join(lines) + "\n")
  return path


def chat(*contents, **more):
  roles = ("user", "assistant") * len(contents)
  return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)], **more}


def calling(calls):
  return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}]}


def test_reads_every_kind(tmp_path):
  """Kills: tokens encoded a second time, a text whose end is lost, files read in another order."""
  tokens = {"tokens": list(range(20)), "loss_mask": [i > 3 for i in range(20)], "id": "kept out"}
  lines = write_lines(tmp_path / "a.jsonl", chat("hi", "a reply of some length"), "", tokens)
  text = tmp_path / "b.txt"
  text.write_text("z" * 50)
  source = read([str(text), lines], max_len=20)
  got = [(document.tokens.tolist(), document.loss_mask.tolist()) for document in source.documents]
  assert got[:2] == [([ord("z")] * 20, [True] * 20)] * 2
  assert got[2] == (list(b"hia reply of some length"[:20]), [False] * 2 + [True] * 18)
  assert got[3] == (tokens["tokens"], tokens["loss_mask"])
  # the text's last ten tokens are too few
  assert len(got) == 4 and source.lost == Lost(too_short=1, cut=1, cut_tokens=4)


def test_short_documents_are_dropped_and_counted(tmp_path):
  """Kills: counting all tokens and not the supervised ones, 13 or 15 for 14, counting before the cut; one reason for
  what is too short and for what the cut made so."""
  chats = chat("p" * 30, "r" * 13), chat("p" * 30, "r" * 14), chat("p" * 90, "r" * 40)
  source = read([write_lines(tmp_path / "a.jsonl", *chats)])
  assert [len(document.tokens) for document in source.documents] == [44]
  assert source.lost == Lost(too_short=1, cut_away=1)


def test_what_is_left_out_is_counted_under_its_reason(tmp_path):
  """Kills: "too short" for a conversation without a reply, or for replies that the template rewrites; a document a
  conversation where it makes several; a cut that nobody is told of."""
  thinking = {"chat_template_kwargs": {"enable_thinking": True}}
  source = read([write_lines(
      tmp_path / "a.jsonl", chat("alone"), {"tokens": [1] * 20, "loss_mask": [0] * 20},
      chat("a", "r" * 20, "b", "s" * 20, **thinking), chat("a", "*" * 20, "b", "s" * 20, "c", "*" * 20, **thinking),
      chat("a", "*" * 20, **thinking), chat("a", "r" * 120), chat("a", "r" * 101))])
  assert [bytes(document.tokens.tolist()) for document in source.documents] == [
      b"a" + b"r" * 20, b"a" + b"r" * 20 + b"b" + b"s" * 20, b"a" + b"*" * 20 + b"b" + b"s" * 20,
      *[b"a" + b"r" * 99] * 2]
  assert [int(document.loss_mask.sum()) for document in source.documents] == [20, 20, 20, 99, 99]
  assert source.lost == Lost(no_reply=2, rewritten=3, cut=2, cut_tokens=21 + 2)
  said = str(source.lost)
  assert said.startswith("2 conversations without a reply, 3 replies that") and "too short" not in said
  assert "2 documents cut" in said and "23 tokens" in said and str(Lost()) == "nothing"


def test_sharegpt(tmp_path):
  """Kills: ShareGPT's names for keys and roles taken for unknown data, or for a conversation without a reply."""
  said = [("system", "be kind"), ("human", "hi"), ("gpt", "a reply of some length")]
  records = ({"conversations": [{"from": role, "value": text} for role, text in said], "system": "", "id": 3},
             {"conversations": [{"role": role, "content": text} for role, text in said]},
             {"messages": [{"role": role, "content": text, "weight": 1} for role, text in said]})
  source = read([write_lines(tmp_path / "a.jsonl", *records)])
  for document in source.documents:
    assert bytes(document.tokens.tolist()) == b"be kindhia reply of some length" and document.loss_mask.sum() == 22
  assert len(source.documents) == 3 and source.lost == Lost()


def test_tools_reach_the_template(tmp_path):
  """Kills: tools of a line that are passed over."""
  lines = write_lines(tmp_path / "a.jsonl", *(chat("hi", "a reply of some length", tools=t) for t in ([{}] * 5, None)))
  assert [bytes(d.tokens.tolist()[:7]) for d in read([lines]).documents] == [b"ttttthi", b"hia rep"]


def test_columns_that_say_nothing(tmp_path):
  """Kills: a data set refused for a column of another form that is null in this line; thinking that is dropped where it
  has vLLM's name, or that a null beside it hides."""
  others = dict(tokens=None, conversations=None)
  lines = write_lines(tmp_path / "a.jsonl", chat("hi", "a reply of some length", **others),
                      {"messages": None, "conversations": chat("hi", "a reply of some length")["messages"]})
  assert [bytes(d.tokens.tolist()) for d in read([lines]).documents] == [b"hia reply of some length"] * 2
  conversations.check_texts(lines, letters)
  for more in ({}, {"reasoning_content": None}):
    (message,) = conversations.messages_of({"messages": [
        {"role": "assistant", "content": "a", "reasoning": "because", **more}]})
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "because"}


def test_calls_as_the_api_has_them():
  """Kills: arguments of a call left as a text, which templates quote; a reply refused that calls and says no more;
  calls changed that templates can read."""
  read_as = {"name": "f", "arguments": {"x": 1}}
  for reply in ({"role": "assistant", "tool_calls": [CALL]},
                {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": read_as}]},
                {"from": "gpt", "value": None, "tool_calls": [CALL["function"]]}):
    (message,) = conversations.messages_of({"messages": [reply]})
    assert message["tool_calls"][0]["function"] == read_as and message["content"] == ""
  silent = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
  (message,) = conversations.messages_of({"messages": [silent]})
  assert message["tool_calls"] == [{"function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize("line, message", [
    ("{broken", "Expecting property name"),
    ("[1, 2]", "holds a list, expected an object"),
    ({"prompt": "a", "answer": "b"}, "one of \"messages\", \"conversations\" and \"tokens\""),
    (chat("hi", "reply", conversations=[]), "one of \"messages\""),
    ({"messages": []}, "not empty"),
    (chat("hi", "reply", tokens=None, conversations=None) | {"messages": None}, "one of \"messages\""),
    ({"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
     "a message has \"function_call\", which would change what is learned"),
    ({"messages": [{"role": "user"}]}, "a message must have"),
    ({"conversations": [{"from": "human", "value": None}]}, "a message must have"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "a message must have"),
    (calling("f()"), "\"tool_calls\" must be a list of calls, got 'f()'"),
    (calling([{"function": {"arguments": "{}"}}]), "a \"function\" with a \"name\", got {'function'"),
    (calling([{"name": "f", "arguments": "{x"}]), "\"arguments\" of a call of f is not JSON"),
    (calling([{"name": "f", "arguments": "[1]"}]), "\"arguments\" of a call of f holds a list, expected an object"),
    (chat("refused", "reply"), "the template refuses"),
    ({"messages": [{"role": "narrator", "content": "w"}]}, "unknown role 'narrator', expected one of system, "),
    (chat("hi", "reply", tools="[]"), "\"tools\" must be a list of objects"),
    (chat("hi", "reply", chat_template_kwargs={"enable_thinking": "yes"}), "\"chat_template_kwargs\" must be"),
    (chat("hi", "reply", chat_template_kwargs={"add_generation_prompt": True}), "\"chat_template_kwargs\" must be"),
    (chat("hi", "reply", system="be kind"), "it has \"system\", which would change what is learned"),
    (chat("hi", "reply", enable_thinking=False), "it has \"enable_thinking\""),
    ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "a message has \"weight\""),
    ({"tokens": [1, 256], "loss_mask": [True, True]}, "token 256 is beyond the target's vocabulary, which has 256"),
    ({"tokens": [1, 2], "loss_mask": [True]}, "2 \"tokens\" but 1 in \"loss_mask\""),
    ({"tokens": [1, -2], "loss_mask": [True, True]}, "list of token ids"),
    ({"tokens": [1, 2]}, "list of true and false"),
])
def test_errors_name_file_and_line(tmp_path, line, message):
  """Kills: a bad line that is skipped, or whose place nobody can find (blank lines count too)."""
  path = write_lines(tmp_path / "bad.jsonl", chat("hi", "a reply of some length"), "", line)
  with pytest.raises(ValueError) as caught:
    read([path])
  assert str(caught.value).startswith(f"{path}, line 3") and message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_rows_that_are_no_json():
  """Kills: a traceback for a date or bytes in a dataset of the hub, of which a sentence was to be made."""
  for read_row, row, part in (
      (conversations.messages_of, {"messages": [{"role": "user", "content": b"hi"}]}, "'content': b'hi'}"),
      (conversations.variables_of, {"tools": [b"x"]}, "got [b'x']"),
      (conversations.variables_of, {"chat_template_kwargs": {"enable_thinking": b"x"}}, ": b'x'}: other")):
    with pytest.raises(ValueError) as caught:
      read_row(row)
    assert part in str(caught.value)


def test_errors_name_the_file(tmp_path):
  """Kills: guessing what an unknown file is, text in another encoding read as something else, a tokenizer's complaint
  of a file that nobody can find."""
  with pytest.raises(ValueError, match="data.csv ends in none of"):
    read([tmp_path / "data.csv"])
  (tmp_path / "other.txt").write_text("zzz")
  with pytest.raises(ValueError, match="other.txt: token 122 is beyond"):
    read([tmp_path / "other.txt"], vocab_size=122)
  (tmp_path / "odd.md").write_text("unreadable")
  with pytest.raises(ValueError, match="odd.md: the tokenizer cannot read"):
    read([tmp_path / "odd.md"])
  (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
    read([tmp_path / "latin.txt"])


# What is asked


def test_replies_are_replaced():
  """Kills: answers of another model that are learned, or fed back; a system message that is lost; a result of a tool
  that answers a call which was never made; ShareGPT's words taken for roles; a question refused for the form of a
  call that is dropped, for a column that says nothing, or for a prompt beside its messages."""
  say = lambda role, text: {"role": role, "content": text}
  talk = [say("system", "s"), say("user", "a"), say("assistant", "old") | {"weight": 1}, say("user", "b")]
  got = prompts._conversation({"messages": talk, "id": "x"}, "1", "f")
  assert got.turns == ((say("system", "s"), say("user", "a")), (say("user", "b"),)) and got.id == "1"
  shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "old"}, {"from": "human", "value": "b"}]
  assert prompts._conversation({"conversations": shared}, "1", "f").turns == ((say("user", "a"),), (say("user", "b"),))
  assert prompts._conversation({"prompt": "a", "system": "", "tools": None, "response_format": {}}, "1", "f").turns
  assert prompts._conversation({"prompt": "x", "messages": talk}, "1", "f").turns[0] == (talk[0], talk[1])
  old = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
  assert prompts._conversation({"messages": [talk[1], old, talk[3]]}, "1", "f").turns == ((talk[1],), (talk[3],))
  tool = [say("user", "a"), {"role": "assistant", "content": None, "tool_calls": "f(2)"}, say("tool", "3"),
          say("user", "b")]
  schema = [{"type": "function"}]
  got = prompts._conversation({"messages": tool, "tools": schema, "chat_template_kwargs": {"enable_thinking": True}},
                              "1", "f")
  assert got == Conversation("1", ((say("user", "a"),),), schema, True)
  assert prompts._conversation({"conversations": shared[1:]}, "1", "f").problem == prompts.BEGINS
  assert prompts._conversation({"messages": talk[:1]}, "1", "f").problem == prompts.NO_USER


@pytest.mark.parametrize("line, part", [
  ({"prompt": " "}, "is no question"), ({"text": "a"}, "is no question"), ({"prompt": "a", "top_k": 3}, "has top_k"),
  ({"messages": [{}], "conversations": [{}]}, "expected one of {"), ({"prompt": "a", "messages": []}, "is not empty"),
  ({"messages": []}, "must be a list that is not empty"),
  ({"messages": [{"role": "king", "content": "a"}]}, "unknown role 'king'"), ({"prompt": "a", "tools": "x"}, "tools"),
  ({"prompt": "a", "tools": [{"x": float("nan")}]}, "JSON compliant"),
  ({"prompt": "a", "system": "be kind"}, '"system"')])
def test_bad_lines(line, part, tmp_path):
  """Kills: half a file asked before its mistake is seen; a setting of a line that is passed over."""
  with complains("q.jsonl, line 2", part):
    answers.read_questions(answers.Settings("x", questions=write_lines(tmp_path / "q.jsonl", {"prompt": "a"}, line)))


def test_datasets_of_the_hub(monkeypatch):
  """Kills: an ImportError for who has no `datasets`; the network's own error; a split that is not the one asked for."""
  settings = answers.Settings("x", dataset="owner/name", split="s")
  monkeypatch.setitem(sys.modules, "datasets", None)
  with complains("owner/name needs the library `datasets`", "--questions"):
    answers.read_questions(settings)
  rows = [{"conversations": [{"from": "human", "value": "a"}], "prompt": None}, {"prompt": "b", "conversations": None}]
  load = lambda name, split: {("owner/name", "s"): rows}[name, split]
  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
  found = answers.read_questions(settings)
  assert [(c.id, c.turns[0][0]["content"]) for c in found] == [("1", "a"), ("2", "b")] and found.count == 2
  with complains("the split 'x' of the dataset owner/name could not be fetched (KeyError)", "the network"):
    answers.read_questions(answers.Settings("x", dataset="owner/name", split="x"))
  rows.append({"prompt": "c", "tools": [{"since": datetime.date(2026, 1, 1)}]})  # rows need not be JSON
  with complains("owner/name, row 3", "date is not JSON"):
    answers.read_questions(settings)
