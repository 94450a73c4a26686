"""infer.bench, and what every program refuses before a model is loaded."""

import contextlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import pytest

import dspark_jax
from dspark_jax.sampling import make_sampling
from folders import LLAMA, QWEN3, QWEN3_CONFIG, called, complains, with_tokenizer
from infer import bench, concurrency, evaluate, generate, head_cost
from train import answers, calibrate
from train import bench as train_bench

SMALL = ("--drafter", "random", "--layers", 1, "--block-size", 2, "--markov-rank", 2, "--batches", 1, 2,
         "--new-tokens", 4, "--repeats", 1)


@pytest.mark.slow
def test_questions_are_the_prompts(capsys, tmp_path):
  """Kills: random tokens, on which no drafter is accepted; a prompt that is longer than asked for."""
  with_tokenizer(LLAMA, tmp_path / "target")
  (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": " ".join(["w7"] * n)}) + "\n" for n in (1, 40, 2)))
  args = ("--target", tmp_path / "target", "--prompts", tmp_path / "p.jsonl")
  read = bench.read_prompts(bench.Settings(str(tmp_path / "target"), "random", prompts=tmp_path / "p.jsonl",
                                           prompt_tokens=12))
  assert [len(prompt) for prompt in read] == [6, 7]
  result, _ = called(capsys, bench.main, bench.Settings, *args, *SMALL)
  assert [row["batch"] for row in result["batches"]] == [1, 2]
  assert all(row["accepted_length"] >= 1 for row in result["batches"])


@pytest.mark.parametrize("program", [bench, concurrency])
def test_settings_of_a_line_are_refused(program, capsys, monkeypatch, tmp_path):
  """Kills: a line's own limit, temperature or seed passed over, so that something else is measured than was asked for;
  notes of a line, or settings that say nothing, taken for some."""
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **__: pytest.fail("a model was loaded"))
  target, lines = with_tokenizer(LLAMA, tmp_path / "target"), tmp_path / "p.jsonl"
  harmless = '{"prompt": "w7", "id": 1, "seed": null}\n\n'
  for own, said in (({"max_tokens": 2}, "max_tokens 2"), ({"temperature": 0.0, "seed": 0}, "temperature 0.0, seed 0")):
    lines.write_text(harmless + json.dumps({"prompt": "w7", **own}) + "\n")
    _, err = called(capsys, program.main, program.Settings, "--target", target, "--drafter", "random", "--prompts",
                    lines, code=2)
    words = " ".join(err.split())
    assert f"p.jsonl, line 3 has settings of its own, {said}, expected none" in words and err.count("error: ") == 1
  lines.write_text(harmless)
  assert len(bench.read_prompts(bench.Settings(str(target), "random", prompts=lines))) == 1


def test_a_target_without_a_tokenizer(capsys, monkeypatch):
  """Kills: a bench that needs a tokenizer, or that takes random prompts without a word."""
  monkeypatch.setattr(bench, "measure", lambda settings, target, drafter, prompts: {"prompts": prompts})
  monkeypatch.setattr(bench, "table", str)
  result, err = called(capsys, bench.main, bench.Settings, "--target", QWEN3, *SMALL, "--prompt-tokens", 5)
  assert "random tokens" in err
  assert [[len(p) for p in row["prompts"]] for row in result["batches"]] == [[5], [5, 5]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_drafter_is_of_the_asked_dtype(dtype, capsys, monkeypatch):
  """Kills: a drafter in float32 timed beside a target in bfloat16."""
  monkeypatch.setattr(bench, "measure", lambda settings, target, drafter, prompts: {
      "dtypes": sorted({str(x.dtype) for x in jax.tree.leaves((target, drafter))})})
  monkeypatch.setattr(bench, "table", str)
  result, _ = called(capsys, bench.main, bench.Settings, "--target", QWEN3, *SMALL, "--dtype", dtype)
  assert result["batches"] == [{"dtypes": [dtype]}] * 2


def test_the_same_work_is_compared(capsys, monkeypatch):
  """Kills: transformers at batch 1 over the first of --batches; its weights in float32 beside ours in bfloat16; minutes
  of our own steps before it turns out that torch is not there."""
  said = {}
  def load(path, dtype):
    said.update(path=path, dtype=dtype)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=99), generate=lambda *_, **__: 0)
    return SimpleNamespace(eval=lambda: model)
  torch = SimpleNamespace(__spec__=True, bfloat16="two bytes", randint=lambda *_: 0, ones_like=lambda x: x,
                          no_grad=contextlib.nullcontext)
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(
      LlamaConfig=None, LlamaForCausalLM=None, AutoModelForCausalLM=SimpleNamespace(from_pretrained=load)))
  bench.transformers_step(bench.Settings(str(QWEN3), "random", dtype="bfloat16"))
  assert said == {"path": QWEN3, "dtype": "two bytes"}
  monkeypatch.setattr(bench, "measure", lambda settings, target, drafter, prompts: {
      "batch": len(prompts), "plain_step_seconds": float(len(prompts))})
  monkeypatch.setattr(bench, "transformers_step", lambda settings: 3.0)
  monkeypatch.setattr(bench, "table", str)
  args = ("--target", QWEN3, "--drafter", "random", "--layers", 1, "--transformers", "--batches", 2)
  assert called(capsys, bench.main, bench.Settings, *args, 1)[0]["speedup_over_transformers"] == 3
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **__: pytest.fail("a model was loaded"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert "--transformers needs torch" in called(capsys, bench.main, bench.Settings, *args, 1, code=2)[1]
  assert "batches are 2, expected 1 among them" in called(capsys, bench.main, bench.Settings, *args, code=2)[1]


@pytest.mark.slow
def test_a_training_step(capsys):
  """Kills: a step that is compared with another one than the reference's (where PyTorch is installed); arithmetic
  that has the target in it; parts that do not belong to the step."""
  args = ("--target", LLAMA, "--layers", 2, "--block-size", 3, "--markov-rank", 4, "--row-length", 16, "--anchors", 5,
          "--repeats", 1)
  result, err = called(capsys, train_bench.main, train_bench.Settings, *args)
  target = dspark_jax.load_target(LLAMA)
  spec, taps = target.config.spec, len(bench.random_drafter(train_bench.Settings(), target).taps)
  context = 16 * (4 * taps * spec.hidden_size ** 2 + 12 * spec.hidden_size * spec.num_kv_heads * spec.head_dim * 2)
  vocabulary = 15 * 2 * target.vocab_size * (3 * spec.hidden_size + 3 * 4)  # the target's words, too
  assert result["gflop"] * 1e9 == pytest.approx(3 * 15 * 2 * spec.flops(8 + 3) + context + vocabulary)
  assert "GFLOP a step" in err and result["optimizer_seconds"] == result["step_seconds"] - result["gradients_seconds"]
  if importlib.util.find_spec("torch"):
    result, _ = called(capsys, train_bench.main, train_bench.Settings, *args, "--torch")
    assert result["torch_loss"] == pytest.approx(result["loss"], rel=1e-5)
  else:
    with complains("--torch needs torch", "pip install"):
      train_bench.main(train_bench.Settings(LLAMA, torch=True))


EARLY = [
  (train_bench, {"repeats": 0}, "repeats is 0"), (train_bench, {"anchors": 512}, "anchors are 512"),
  (bench, {"repeats": 0}, "repeats is 0"), (bench, {"new-tokens": 1}, "new_tokens is 1"),
  (bench, {"batches": 0}, "batches"),
  (bench, {"prompt-tokens": 0}, "prompt_tokens is 0"), (bench, {"block-size": 0}, "block_size is 0"),
  (generate, {"temperature": -1}, "temperature is -1"), (generate, {"temperature": "1e-39"}, "temperature is 1e-39"),
  (generate, {"temperature": "inf"}, "temperature is inf"), (generate, {"top-k": 2147483648}, "top_k is 2147483648"),
  (generate, {"top-k": -1}, "top_k is -1"), (generate, {"top-p": 0}, "top_p is 0"),
  (generate, {"top-p": "nan"}, "top_p is nan"),
  (generate, {"seed": 2 ** 70}, "seed is 1180591620717411303424"), (generate, {"seed": -1}, "seed is -1"),
  (generate, {"max-new-tokens": 0}, "max_new_tokens is 0"), (generate, {"budget-gb": 0}, "budget_gb is 0"),
  (generate, {"confidence-threshold": 2}, "confidence_threshold is 2"), (generate, {"stop": ""}, "stop is"),
  (answers, {"temperature": -1}, "temperature is -1"), (answers, {"batch": 0}, "batch is 0"),
  (answers, {"minutes": 0}, "minutes is 0"), (answers, {"top-k": 10 ** 400}, "expected numbers"),
  (evaluate, {"temperatures": "-1"}, "temperature is -1"), (evaluate, {"batch": 0}, "batch is 0"),
  (calibrate, {"temperatures": "1e39"}, "temperature is 1e+39"),
  (head_cost, {"repeats": 0}, "repeats: expected at least 1")]
NEEDED = {train_bench: {"target": QWEN3}, bench: {"target": QWEN3, "drafter": "random"},
          generate: {"target": QWEN3, "drafter": "none", "prompt": "w5"},
          answers: {"target": QWEN3, "out": "x.jsonl"}, head_cost: {"target": QWEN3, "out": "x.json"},
          evaluate: {"targets": QWEN3, "drafters": "plain", "datasets": "stdlib", "out": "x"},
          calibrate: {"target": QWEN3, "drafter": "x"}}


@pytest.mark.parametrize("program, wrong, part", EARLY)
def test_settings_are_checked_before_anything_is_loaded(program, wrong, part, capsys, monkeypatch, tmp_path):
  """Kills: a quarter of a minute of loading to learn that a number is out of range; NaN and Infinity in JSON."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(dspark_jax, "load_target", lambda *_, **__: pytest.fail("a model was loaded"))
  args = {f"--{name}": value for name, value in (NEEDED[program] | wrong).items()}
  _, err = called(capsys, program.main, program.Settings, *sum(args.items(), ()), code=2)
  assert part in err and err.count("error: ") == 1 and not list(tmp_path.iterdir())


def test_rows_of_sampling():
  """Kills: numpy's own words for lists that do not go together; rows of stop tokens that no vocabulary has."""
  with complains("of 3, 2, 1 rows"):
    make_sampling([0.0] * 3, [1, 2])
  target, size = dspark_jax.load_target(QWEN3), QWEN3_CONFIG["vocab_size"]
  for ids in ((size,), (-2,)):
    with complains("stop_token_ids has", f"the target's vocabulary is 0..{size - 1}"):
      dspark_jax.generate(target, None, [[1]], stop_token_ids=ids)
