"""Evaluation prompts: the paper's nine benchmarks, any JSONL file, and questions that every machine has.

A file holds one JSON object per line with `turns`, the user's messages in order: {"turns": ["What is 1 + 1?"]}. Other
keys are not read, but those that would be settings are refused; blank lines are skipped.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.data.questions import split, stdlib_questions
from dspark_jax.text import read_jsonl

COUNTS = {"gsm8k": 500, "math500": 500, "aime25": 30, "humaneval": 164, "mbpp": 256, "livecodebench": 500,
          "mt-bench": 80, "alpaca": 500, "arena-hard-v2": 500}  # how many samples the reference takes of each
STDLIB, STDLIB_COUNT = "stdlib", 64
# What a line might ask for itself, as requests to a server do; where all lines are asked alike, it is refused.
LINE_SETTINGS = {
    "temperature", "top_k", "top_p", "min_p", "seed", "n", "best_of", "max_tokens", "max_completion_tokens",
    "max_new_tokens", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "logit_bias", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "response_format", "messages", "system", "system_prompt", "tools",
    "tool_choice", "functions", "chat_template", "chat_template_kwargs", "enable_thinking", "reasoning_effort"}
EMPTY = (None, "", [], {})  # of a column that every line of a data set has
SEED = 980406  # the reference's: of the same file it takes the same samples


@dataclass(frozen=True)
class Sample:
  id: str                 # the line in its file, from 1; of `stdlib` the question's own
  turns: tuple[str, ...]  # what the user says, in order; at least one


def load_samples(name: str | os.PathLike, *, folder: str | os.PathLike | None = None, hub: str | None = None,
                 count: int | None = None) -> list[Sample]:
  """Samples of a benchmark, of `stdlib` or of a JSONL file, chosen as the reference does: shuffled, then the first.

  A benchmark is `<folder>/<name>.jsonl`, else that file of the dataset `hub` (owner/name) on the Hugging Face hub;
  `stdlib` is the part of questions.py that no drafter is trained on. count: default COUNTS, of a file all; where there
  are fewer, all. ValueError for a name that is nothing, and for a line without turns.
  """
  name = str(name)
  if count is not None and count < 1:
    raise ValueError(f"the number of samples is {count}, expected at least 1")
  if name == STDLIB:
    samples = [Sample(q.id, (q.question,)) for q in split(stdlib_questions())[1]]
    count = count or STDLIB_COUNT
  elif name in COUNTS:
    samples = read_samples(_locate(name, folder, hub))
    count = count or COUNTS[name]
  elif Path(name).is_file():
    samples = read_samples(Path(name))
  else:
    raise ValueError(f"dataset {name} is neither known nor a file: expected a JSONL file, {STDLIB} or one of "
                     f"{', '.join(COUNTS)}")
  # All of the file before the cut: fewer samples are the first ones of more.
  random.Random(SEED).shuffle(samples)
  return samples[:count]


def read_samples(path: Path) -> list[Sample]:
  """The samples of a JSONL file in its order. ValueError names the file and line of what is none."""
  samples = [Sample(str(number), _turns(record, f"{path}, line {number}")) for number, record in read_jsonl(path)]
  if not samples:
    raise ValueError(f'{path} is empty: expected one {{"turns": [TEXT, ...]}} per line')
  return samples


def _turns(record, where):
  if wrong := sorted(key for key in LINE_SETTINGS if record.get(key) not in EMPTY):
    raise ValueError(f"{where} has {', '.join(wrong)}, but all samples are asked under the settings of the command: "
                     f"remove it")
  turns = record.get("turns")
  if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
    raise ValueError(f'{where} has no turns: expected {{"turns": [TEXT, ...]}}, at least one, with some text in each')
  return tuple(turns)


def _locate(name, folder, hub):
  file = f"{name}.jsonl"
  if folder is not None:
    path = Path(folder) / file
    if not path.is_file():
      raise ValueError(f"{path} is missing: expected the benchmark {name} there, one {{\"turns\": [TEXT, ...]}} per "
                       f"line")
    return path
  if hub is None:
    raise ValueError(f"nothing says where the benchmark {name} is: give a folder that holds {file}, or a dataset on "
                     f"the hub (owner/name) that does; {STDLIB} needs neither")
  from huggingface_hub import hf_hub_download  # slow to import, and rarely needed
  try:
    return Path(hf_hub_download(hub, file, repo_type="dataset"))
  except Exception as error:  # the hub's errors have no common base; the remedy is the same
    raise ValueError(f"{file} could not be fetched from the dataset {hub} on the hub ({type(error).__name__}): check "
                     f"the name and the network, or download it to a folder") from error
