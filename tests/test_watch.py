"""What a training run tells of itself: held-out rows, real rounds, times, and the page that shows it."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax import metrics as means
from dspark_jax.data import chat, rows
from dspark_jax.data.conversations import Document
from dspark_jax.data.rows import held_out
from dspark_jax.data.words import top_words
from dspark_jax.programs import hosts, run_folder
from dspark_jax.training.step import step_flops
from train import features, loop, report, train, watch
from folders import called, complains, llama, packed_rows
from test_programs import folder  # noqa: F401 (a fixture)
from test_train import STEPS, experiment, log_of


@pytest.fixture(scope="module")
def watched(folder):  # noqa: F811
  """A run in which all is measured."""
  config = experiment(folder, folder / "watched", eval_every=4, eval_rows=4, decode_every=8, decode_prompts=2,
                      profile_steps=(2, 3), log_every=2)
  train.main(config)
  return config


def test_held_out_rows_are_held_out(tmp_path):
  """Kills: rows that are measured and trained on; others after a restart; a row that is in neither part."""
  packed = packed_rows(tmp_path / "rows", [Document(np.full(8, i), np.ones(8, bool)) for i in range(20)], 8)
  kept, apart = held_out(packed, 6, seed=3)
  assert sorted([*kept.kept, *apart.kept]) == list(range(20)) and len(apart) == 6
  assert set(kept.take(np.arange(14)).tokens[:, 0]).isdisjoint(apart.take(np.arange(6)).tokens[:, 0])
  assert list(held_out(packed, 6, seed=3)[1].kept) == list(apart.kept) != list(
      held_out(packed, 6, seed=4)[1].kept)
  with complains("20 of 20 rows are held out", "--eval-rows"):
    held_out(packed, 20, seed=0)


@pytest.mark.slow
def test_words_of_held_out_documents_do_not_count(folder, tmp_path, monkeypatch):  # noqa: F811
  """Kills: a draft vocabulary, or bigrams, of documents that are held out; ones that a chunk's end cuts off; a start
  that counts again what its checkpoint holds."""
  rng = np.random.default_rng(0)
  documents = [Document(rng.integers(0, 50, n), np.arange(n) > 0) for n in rng.integers(2, 9, 30)]
  packed = packed_rows(tmp_path / "rows", documents, 16)
  kept, apart = held_out(packed, 4, seed=3)
  monkeypatch.setattr(rows, "CHUNK", 20)  # several of them
  counted = [np.concatenate(parts) for parts in zip(*kept.chunks())]
  batch = kept.take(np.arange(len(kept)))
  inside = batch.segments > 0
  for found, expected in zip(counted, (batch.tokens, batch.loss_mask, batch.positions == 0), strict=True):
    np.testing.assert_array_equal(found, expected[inside])
  whole = [np.concatenate(parts) for parts in zip(*held_out(packed, 0, seed=3)[0].chunks())]
  for found, expected in zip(whole, zip(*packed.chunks()), strict=True):
    np.testing.assert_array_equal(found, np.concatenate(expected))
  seen = []
  monkeypatch.setattr(train, "top_words", lambda *args: seen.append(args[0]) or top_words(*args))
  for start in (1, 2):
    train.main(experiment(folder, tmp_path / "run", eval_rows=4, steps=2))
    (tmp_path / "run" / "drafter").rename(tmp_path / f"drafter{start}")
  assert len(seen) == 1 and len(seen[0]) == len(seen[0].rows) - 4
  first, again = (dspark_jax.load_drafter(tmp_path / f"drafter{start}", llama()) for start in (1, 2))
  np.testing.assert_array_equal(first.words, again.words)
  np.testing.assert_array_equal(first.words, top_words(seen[0], 64, 151, chat.stop_ids(
      chat.load_tokenizer(folder / "target"))))


@pytest.mark.slow
def test_what_a_log_says(watched):
  """Kills: numbers of the wrong steps; flops or times that do not belong together; time lost that counts as good."""
  lines = log_of(watched.out)
  assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]  # every 2, and at saves: a run goes on from there
  assert [line["step"] for line in lines if "held_out" in line] == [4, 8]
  assert [line["step"] for line in lines if "drafted" in line] == [8]
  config = train.drafter_config(watched.drafter, llama().config)
  config = dataclasses.replace(config, draft_vocab_size=64)
  flops = step_flops(llama().config, config, rows=2, length=48, blocks=4)
  for line in lines:
    assert line["tflops_per_device"] * line["step_seconds"] == pytest.approx(flops / 1e12)
    assert line["tokens_per_second_per_device"] * line["step_seconds"] == pytest.approx(2 * 48)
    assert line["mfu"] is None and 0 <= line["data_wait"] < 1 and 0 < line["goodput"] < 1
    assert len(line["accept_rate"]) == 3 and line["learning_rate"] > 0 and "confidence_bias" in line
  held, drafted = lines[-1]["held_out"], lines[-1]["drafted"]
  assert 1 <= drafted["accepted_length"] <= 4 and drafted["prompts"] == 2
  assert 2 < held["loss"] < 4 and held["loss"] != lines[2]["held_out"]["loss"] and 1 <= held["tau"] <= 4
  assert list((watched.out / "profile").rglob("*.xplane.pb")) and list((watched.out / "tensorboard").iterdir())


def test_goodput_counts_steps_alone(monkeypatch):
  """Kills: the time before the first step, for data or for evaluations that counts as good, or as a step's; flops of
  all devices as one's; an mfu that grows with the peak."""
  now = [10.0]
  monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
  pace = watch.Pace(SimpleNamespace(batch=2, row_length=8), flops=lambda length: length * 1e12 / 8, began=0.0)
  pace.devices, pace.peak = 4, 2e12
  now[0] = 40.0
  pace.begin(waited=3.0)
  for end, good in ((60.0, 14.0), (80.0, 28.0)):
    with pace.aside():
      now[0] += 4.0
    now[0] = end
    told = pace.lap([4, 12] * 4, waited=3.0 + 2 * (end - 40) / 20)
    assert (told["goodput"], told["step_seconds"], told["data_wait"]) == pytest.approx((good / end, 2.0, 2 / 16))
    assert told["tflops_per_device"] == 0.125 and told["tokens_per_second_per_device"] == 2
    assert told["mfu"] == 0.0625


class Fed(features.Batches):
  """Batches of nothing that the host takes so many seconds for."""

  def __init__(self, seconds: float):
    super().__init__(None, [None], SimpleNamespace(at=lambda *_: time.sleep(seconds), ask=lambda *_: None))

  def _begin(self, step):
    self._ahead = (step, None, None)

  def _next(self):
    return (self._ahead[0] + 1, None, None)

  def width(self, step):
    return 48


def looped(monkeypatch, tmp_path, host: float, device: float, stop=lambda step: False, steps: int = 20):
  """(steps that a loop made, what it logged) with so many seconds of the host and of a device for each."""
  ends, count = [0.0], itertools.count(1)

  def advance(state, index):
    batches(index)
    ends.append(max(ends[-1], time.monotonic()) + device)  # it does one after the other, and nobody waits here
    return SimpleNamespace(step=index + 1), dict.fromkeys(("loss", "grad_norm", "tau", "accept_rate"), means.once(1.0))

  def when_ready(_):
    time.sleep(max((end := ends[next(count)]) - time.monotonic(), 0))
    return end
  monkeypatch.setattr(loop, "when_ready", when_ready)
  config = SimpleNamespace(out=tmp_path, batch=2, log_every=20, save_every=100, diverged_at=1e6, profile_steps=None)
  batches, saved = Fed(host), SimpleNamespace(save_checkpointables_async=lambda *_, **__: None)
  pace = watch.Pace(config, lambda width: 1e9, time.monotonic())
  state, _ = loop.loop(config, advance, SimpleNamespace(step=0), saved, steps, batches, pace, {}, stop)
  return state.step, log_of(tmp_path)[-1]


def test_a_signal_is_heard_within_two_steps(monkeypatch, tmp_path):
  """Kills: a host that queues all steps up to the next line of the log, and hears of SIGTERM after they ran."""
  began = time.monotonic()
  made, _ = looped(monkeypatch, tmp_path, 0.0, 0.1, stop=lambda step: time.monotonic() > began + 0.3)
  assert made < 10


@pytest.mark.parametrize("host, device, least, most", [(0.06, 0.1, 0.0, 0.3), (0.1, 0.02, 0.5, 0.95)])
def test_a_wait_for_data_is_the_devices(host, device, least, most, monkeypatch, tmp_path):
  """Kills: data that are read while the device is at work, counted as a wait; a wait that is counted as work."""
  _, line = looped(monkeypatch, tmp_path, host, device)
  assert least <= line["data_wait"] < most, line


def test_useful_flops_are_of_what_runs(folder, tmp_path):  # noqa: F811
  """Kills: a target's forward that counts in a step which reads what it says from a store."""
  config = experiment(folder, tmp_path / "run")
  drafter = SimpleNamespace(config=train.drafter_config(config.drafter, llama().config), every_position=False)
  runs, reads = (watch.useful_flops(dataclasses.replace(config, features=store), llama(), drafter, 48)
                 for store in (None, "a store"))
  assert runs - reads == pytest.approx(2 * 48 * llama().config.flops(24)) and reads > 0


@pytest.mark.parametrize("processes, folders", [(1, ["profile"]), (2, ["profile/process-0", "profile/process-1"])])
def test_each_process_has_a_profile(processes, folders, monkeypatch, tmp_path):
  """Kills: processes of one host that write their traces over one another's, in a file named by the host."""
  traced = []
  monkeypatch.setattr(watch.jax.profiler, "start_trace", lambda folder: traced.append(folder))
  monkeypatch.setattr(hosts.here, "processes", processes)
  for process in range(processes):
    monkeypatch.setattr(hosts.here, "process", process)
    watch.Profile(SimpleNamespace(out=tmp_path, profile_steps=(2, 3))).before(2)
  assert traced == [str(tmp_path / folder) for folder in folders]


def test_held_out_numbers_are_of_all_rows(folder, tmp_path):  # noqa: F811
  """Kills: a loss that goes by the rows of a batch, or is none of its own terms; rows behind the first batch that do
  not count; anchors by the very key of training."""
  rng = np.random.default_rng(0)
  # Some are supervised throughout; of few words, others: their terms and their denominators differ.
  documents = [Document(rng.integers(5, 130, 48), np.ones(48, bool)) for _ in range(2)]
  documents += [Document(np.full(48, 7), np.arange(48) >= 34 + i) for i in range(2)]
  packed = packed_rows(tmp_path / "rows", documents, 48)
  config = experiment(folder, tmp_path, eval_rows=4, eval_every=1, anchors=48)  # all that may be
  drafter = dspark_jax.new_drafter(train.drafter_config(dataclasses.replace(config.drafter, draft_vocab_size=0),
                                                        llama().config))
  found = []
  for batch in (1, 2, 4):
    changed = dataclasses.replace(config, batch=batch)
    held = watch.HeldOut(changed, train.step_config(changed), llama(), packed)
    np.testing.assert_array_equal(held.step.__wrapped__.keywords["key"], jax.random.key_data(jax.random.key(1)))
    found.append(held(SimpleNamespace(drafter=drafter)))
  for numbers in found:
    assert numbers["loss"] == pytest.approx(0.1 * numbers["ce"] + 0.9 * numbers["tv"] + numbers["confidence"], rel=1e-5)
    assert numbers["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_held_out_rows_in_microbatches(folder, tmp_path):  # noqa: F811
  """Kills: anchors of held-out rows, or means over them, that depend on how many are measured at once."""
  configs = [experiment(folder, tmp_path, batch=4, eval_rows=4, eval_every=1, microbatches=n) for n in (1, 4)]
  documents = [Document(np.arange(n, dtype=np.int32), np.arange(n) > 4) for n in (30, 20, 41, 47)]
  packed = packed_rows(tmp_path / "rows", documents, 48)
  drafter = dspark_jax.new_drafter(train.drafter_config(dataclasses.replace(
      configs[0].drafter, draft_vocab_size=0), llama().config))
  one, other = (watch.HeldOut(config, train.step_config(config), llama(), packed)(SimpleNamespace(drafter=drafter))
                for config in configs)
  assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["tau"] == pytest.approx(other["tau"], rel=1e-5)


@pytest.mark.slow
def test_measuring_changes_nothing(watched, folder, tmp_path):  # noqa: F811
  """Kills: an evaluation that draws from the keys of training, or takes part in it."""
  quiet = experiment(folder, tmp_path / "quiet", eval_rows=4, log_every=2)
  train.main(quiet)
  for line, other in zip(log_of(watched.out), log_of(quiet.out), strict=True):
    assert (line["loss"], line["grad_norm"], line["tau"]) == (other["loss"], other["grad_norm"], other["tau"])
    assert "held_out" not in other


@pytest.mark.slow
def test_report(watched, capsys, tmp_path):
  """Kills: a page of other numbers than the log's; one that needs a whole line at the end, or changes the run."""
  before = (watched.out / "metrics.jsonl").read_bytes()
  with (watched.out / "metrics.jsonl").open("a") as file:
    file.write('{"step": 9, "lo')
  result, err = called(capsys, report.main, report.Settings, "--run", watched.out, "--out", tmp_path)
  last = log_of_whole(watched)[-1]
  assert result["steps"] == STEPS and result["loss"] == last["loss"]
  assert result["accepted_length"] == last["drafted"]["accepted_length"] and result["goodput"] == last["goodput"]
  text = (tmp_path / "training.md").read_text()
  assert f"| loss | {last['loss']:.4f} | {last['held_out']['loss']:.4f} |" in text and "| MFU | - |" in text
  assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
  assert (watched.out / "metrics.jsonl").read_bytes() == before + b'{"step": 9, "lo'
  (watched.out / "metrics.jsonl").write_bytes(before)
  run_folder.write_record(tmp_path / "empty", json.loads((watched.out / "run.json").read_text()))
  _, err = called(capsys, report.main, report.Settings, "--run", tmp_path / "empty", code=2)
  assert "has no lines yet" in err


def log_of_whole(config):
  whole = (config.out / "metrics.jsonl").read_text().rpartition("\n")[0]
  return [json.loads(line) for line in whole.splitlines()]


@pytest.mark.parametrize("change, part", [
    (dict(eval_every=2), "eval_rows is 0"), (dict(eval_rows=3), "eval_rows is 3, expected a multiple of batch"),
    (dict(profile_steps=(3, 2)), "profile_steps are (3, 2)"), (dict(decode_every=0), "decode_every is 0")])
def test_settings_that_mean_nothing(change, part, folder, tmp_path):  # noqa: F811
  """Kills: a run of a week that measures nothing of what was asked for."""
  with complains(part):
    experiment(folder, tmp_path, **change)
  with complains("rows are held out"):
    train.main(experiment(folder, tmp_path / "run", eval_rows=14))
