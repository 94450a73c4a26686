"""What train.train makes of a data file: which replies it learns, what it tells of the others, the day of a run."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.data import chat
from dspark_jax.data.conversations import Lost
from dspark_jax.drafters import DSpark
from train import train
from train.config import TrainConfig
from folders import CHATML, LLAMA, MASK, TAPS, complains, llama, today, with_tokenizer

LONG = "a long enough answer that has more than fourteen tokens in it, surely it does by now."
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]
# As Qwen3's: the last reply with its thinking, if need be an empty one, and past ones without.
QWEN3 = """{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}\n\
{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>\n\n')[-1] }}\
{% elif m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}\
{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n\
{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"""


def experiment(data, out, **changes) -> TrainConfig:
  return TrainConfig(**{**dict(
      target="t", out=Path(out), data=(data,), steps=2, batch=2, row_length=48, anchors=4, save_every=3, log_every=1,
      drafter=DSpark.Settings(taps=TAPS, mask_token_id=MASK, num_layers=1, block_size=3, markov_rank=8)), **changes})


def lines(path, *records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def talk(*texts, roles=("user", "assistant")):
  return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


@pytest.fixture(scope="module")
def thinker():
  tokenizer = chat.load_tokenizer(chat.smollm2_path())
  tokenizer.chat_template = QWEN3
  return tokenizer


def read(tokenizer, data, **changes):
  """(tokens, loss mask) of every document, and what was lost"""
  with tempfile.TemporaryDirectory() as folder:
    config = experiment(data, folder, row_length=512, **changes)
    rows = train.read_data(config, 49152, tokenizer)
    batch = rows.take(np.arange(len(rows)))
  documents = [(batch.tokens[row][own], batch.loss_mask[row][own]) for row in range(len(rows))
               for number in range(1, batch.segments[row].max() + 1) for own in [batch.segments[row] == number]]
  return documents, Lost(**rows.manifest.lost)


def learned(tokenizer, data, **changes):
  """(the supervised text of every document, what was lost)"""
  documents, lost = read(tokenizer, data, **changes)
  return [tokenizer.decode(tokens[mask]) for tokens, mask in documents], lost


def test_replies_that_think(thinker, capsys, tmp_path):
  """Kills: replies with thinking that count as too short, that a thinking run loses, or that one without thinking
  learns after a prompt at which nobody would write them."""
  thought = f"<think>\nstep by step\n</think>\n\n{LONG}"
  data = lines(tmp_path / "thinking.jsonl", *(talk(f"q{i}", thought) for i in range(20)), talk("q", LONG))
  assert learned(thinker, data, thinking=True)[0] == [thought + "<|im_end|>"] * 20 + [
      f"<think>\n\n</think>\n\n{LONG}<|im_end|>"]
  capsys.readouterr()
  texts, lost = learned(thinker, data)
  assert texts == [LONG + "<|im_end|>"] and lost.rewritten == 20 and lost.too_short == 0
  assert "1 documents" in (said := " ".join(capsys.readouterr().err.split())) and "20 replies that the chat" in said
  lines(data, *(talk(f"q{i}", thought) for i in range(2)))
  with complains("nothing to learn", "2 replies that the chat template rewrites"):
    learned(thinker, data)


def test_every_reply_of_a_conversation_is_learned(thinker, tmp_path):
  """Kills: the last reply alone, where the template rewrites those before it."""
  data = lines(tmp_path / "a.jsonl", talk(*["q", LONG] * 4), talk(*["q", LONG] * 4, roles=("human", "gpt")))
  texts, lost = learned(thinker, data)
  assert texts == [LONG + "<|im_end|>"] * 8 and lost.rewritten == 0


def test_tools_of_a_line(thinker, tmp_path):
  """Kills: tools that reach the prompt of one rendering and not of another, or none."""
  data = lines(tmp_path / "a.jsonl", talk("weather in X?", LONG) | {"tools": TOOLS})
  ((tokens, mask),), _ = read(thinker, data)
  prompt = chat.render(thinker, talk("weather in X?")["messages"], tools=TOOLS, add_generation_prompt=True)
  assert thinker.decode(tokens).startswith(prompt + LONG) and "of a city" in prompt
  assert thinker.decode(tokens[mask]) == LONG + "<|im_end|>"


def test_ids_of_another_tokenizer(thinker, tmp_path):
  """Kills: token ids beyond the vocabulary that are trained on: the loss is not finite, the learning rate is blamed."""
  data = lines(tmp_path / "a.jsonl", talk("q", LONG), {"tokens": [5] * 19 + [49152], "loss_mask": [1] * 20})
  with complains("a.jsonl, line 2: token 49152 is beyond the target's vocabulary, which has 49152"):
    learned(thinker, data)


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
  """A tokenizer whose template tells the day."""
  tokenizer = chat.load_tokenizer(with_tokenizer(LLAMA, tmp_path_factory.mktemp("dated") / "target"))
  tokenizer.chat_template = "w{{ strftime_now('%d') }} " + CHATML
  return tokenizer


@pytest.mark.slow
def test_a_run_has_one_day(dated, monkeypatch, tmp_path):
  """Kills: a run that cannot go on the day after, as its template tells another day; counts that nobody can read
  later; runs that an older version began and this one refuses; one run of two modes of thinking."""
  say = lambda i: " ".join(f"w{20 + i + j}" for j in range(24))
  data = lines(tmp_path / "a.jsonl", *(talk("w7", say(i)) for i in range(4)), talk("w7"))
  config = experiment(data, tmp_path / "run")
  go_on = lambda **changes: train.train(experiment(data, config.out, **changes), llama(), dated)
  today(monkeypatch, 15)
  assert go_on()["steps"] == 2
  record = config.out / "run.json"
  run = json.loads(record.read_text())
  assert run["date"] == "2026-07-15" and run["lost"]["no_reply"] == 1 and set(run["lost"]) > {"cut", "cut_tokens"}
  today(monkeypatch, 16)
  assert go_on()["steps"] == 2
  for setting in ("thinking", "allow_special"):
    with complains(f"{setting} was None, is True"):
      go_on(**{setting: True})
  settings = {k: v for k, v in run["config"].items() if k not in ("thinking", "allow_special")}
  old = {k: v for k, v in run.items() if k not in ("date", "lost")} | {"config": settings}
  record.write_text(json.dumps(old))
  shutil.rmtree(config.out / "rows")  # which it had not
  with complains("data has changed"):  # as it was: of the day before, nobody knows
    go_on()
  today(monkeypatch, 15)
  with complains("rows was prepared with other settings (date was 2026-07-16, is 2026-07-15)"):
    go_on()
  shutil.rmtree(config.out / "rows")
  assert go_on()["steps"] == 2
  prepared = dataclasses.replace(config, data=(config.out / "rows",))  # the same data as its files
  assert train.train(prepared, llama(), dated)["steps"] == 2
  record.write_text(json.dumps(run | {"date": "yesterday"}))
  with complains("has the date 'yesterday', expected YYYY-MM-DD"):
    go_on()
