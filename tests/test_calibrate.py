"""Temperatures from rounds to the sidecar and back: train.calibrate, what stores them, and infer.generate with them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import dspark_jax
from dspark_jax.decoding.calibration import fit_temperatures, mode_name, reliability
from dspark_jax.decoding.session import PromptBatch
from dspark_jax.loading import save_temperatures
from dspark_jax.programs import run_folder, shell
from folders import DSPARK, GOLDEN, QWEN3, WORDS, complains, cut, files, fresh_drafter, qwen3, with_tokenizer
from infer import generate
from train import calibrate

ROOT = Path(dspark_jax.__file__).parents[1]
FOUR = SimpleNamespace(block_size=4)  # all that the sidecar needs to know of a drafter
GREEDY, SAMPLED = [0.5, 1.0, 2.0, 5.0], [1.5, 0.7, 0.9, 1.1]
PRINTED = {"temperatures", "ece", "auroc", "observations", "out"}


def read(path: Path):
  return json.loads(Path(path).read_text())


def called(capsys, module, *args, code: int = 0):
  """(JSON of the last line of stdout or None, stderr) of a program called in this process."""
  capsys.readouterr()
  try:
    shell.run(module.main, module.Settings, args=[str(a) for a in args])
    got = 0
  except SystemExit as exit_:
    got = exit_.code
  out, err = capsys.readouterr()
  assert got == code and "Traceback" not in err, err
  return json.loads(out.splitlines()[-1]) if got == 0 else None, err


# The sidecar


@pytest.fixture
def ours(tmp_path) -> Path:
  """A folder with nothing but a sidecar, which is all that temperatures touch."""
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "drafter.json").write_text(json.dumps({"format": 1, "imported": {"config": "é\r"}}))
  return tmp_path / "d"


def test_mode_names():
  """Kills: -0.0 or 1 and 1.0 as modes of their own, 0.1 + 0.2 with its sixteen digits."""
  assert [mode_name(t) for t in (0, -0.0, 1, 1.0, 0.1 + 0.2)] == ["greedy", "greedy", "T=1", "T=1", "T=0.3"]


def test_temperatures_come_back(ours):
  """Kills: a mode that wipes out the others, a sidecar that loses its other keys, float64 for the device."""
  before = read(ours / "drafter.json")
  assert dspark_jax.load_temperatures(ours, FOUR, "greedy") is None
  save_temperatures(ours, FOUR, {"greedy": [9.0] * 4})
  save_temperatures(ours, FOUR, {"T=1": np.asarray(SAMPLED)})
  save_temperatures(ours, FOUR, {"greedy": GREEDY})
  for mode, wanted in (("greedy", GREEDY), ("T=1", SAMPLED)):
    found = dspark_jax.load_temperatures(ours, FOUR, mode)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(wanted, np.float32))
  assert read(ours / "drafter.json") == before | {"temperatures": {"greedy": GREEDY, "T=1": SAMPLED}}
  assert sorted(p.name for p in ours.parent.rglob("*")) == ["d", "drafter.json"]


def test_temperatures_live_with_the_drafter(tmp_path):
  """Kills: a training run that is written beside its drafter; temperatures lost, or in the way, in a conversion."""
  dspark_jax.import_drafter(DSPARK, tmp_path / "run" / "drafter", qwen3())
  drafter = dspark_jax.load_drafter(tmp_path / "run", qwen3())
  table = {"greedy": [0.5 + k for k in range(drafter.block_size)]}
  save_temperatures(tmp_path / "run", drafter, table)
  assert not (tmp_path / "run" / "drafter.json").exists()
  dspark_jax.import_drafter(tmp_path / "run", tmp_path / "ours", qwen3())
  for place in ("run", "run/drafter", "ours"):
    np.testing.assert_array_equal(dspark_jax.load_temperatures(tmp_path / place, drafter, "greedy"), table["greedy"])
  dspark_jax.export_drafter(tmp_path / "ours", tmp_path / "out", qwen3())
  golden = files(DSPARK)
  assert files(tmp_path / "out") == {name: golden[name] for name in ("config.json", "model.safetensors")}
  dspark_jax.save_drafter(tmp_path / "ours", drafter, qwen3())  # other weights, as far as this knows
  assert dspark_jax.load_temperatures(tmp_path / "ours", drafter, "greedy") is None
  assert dspark_jax.load_temperatures(DSPARK, drafter, "greedy") is None
  with complains("holds no drafter.json to store temperatures in", "infer.convert"):
    save_temperatures(DSPARK, drafter, table)
  with complains("nothing does not exist"):
    dspark_jax.load_temperatures(tmp_path / "nothing", drafter, "greedy")


@pytest.mark.parametrize("table, parts", [
    ({"greedy": GREEDY[:3]}, ["'greedy' has 3, the drafter's block size is 4", "fit"]),
    ({"greedy": GREEDY, "T=1": [*SAMPLED, 1.0]}, ["'T=1' has 5"]), ({"greedy": []}, ["'greedy' has 0"]),
    ({"greedy": [1.0, 0.0, 1.0, 1.0]}, ["0.0 at position 1"]),
    ({"greedy": [1.0, 1.0, -2.0, 1.0]}, ["-2.0 at position 2"]),
    ({"greedy": [1.0, 1.0, 1.0, float("nan")]}, ["nan at position 3"]),
    ({"greedy": [float("inf")] + [1.0] * 3}, ["inf at"])])
def test_tables_at_fault(table, parts, ours):
  """Kills: the first 3 of 4 temperatures broadcast or padded; a division by 0, or by NaN, in every later round."""
  before = files(ours)
  with complains(*parts):
    save_temperatures(ours, FOUR, table)
  assert files(ours) == before
  (ours / "drafter.json").write_text(json.dumps({"temperatures": table}))
  with complains("drafter.json", "Remove the key", *parts):
    dspark_jax.load_temperatures(ours, FOUR, "greedy")


@pytest.mark.parametrize("table", [[1, 2, 3, 4], {"greedy": 1.0}, {"greedy": ["1", 1, 1, 1]}, {"greedy": [True] * 4},
                                   None, 0])
def test_no_table_at_all(table, ours):
  """Kills: a TypeError with its traceback, or nothing at all, for a sidecar edited by hand."""
  (ours / "drafter.json").write_text(json.dumps({"temperatures": table}))
  with complains("drafter.json has temperatures", "expected a list of numbers for each mode"):
    dspark_jax.load_temperatures(ours, FOUR, "greedy")


def test_another_mode(ours):
  """Kills: greedy's temperatures for sampled text; a table without modes taken for one that lacks this mode."""
  save_temperatures(ours, FOUR, {"greedy": GREEDY})
  with complains("no temperatures for mode 'T=1', there are greedy"):
    dspark_jax.load_temperatures(ours, FOUR, "T=1")
  (ours / "drafter.json").write_text('{"temperatures": {}}')
  assert dspark_jax.load_temperatures(ours, FOUR, "T=1") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from dspark_jax.loading import save_temperatures
write = Path.write_text
def half(path, text):
  write(path, text[:len(text) // 2])
  os.kill(os.getpid(), signal.SIGKILL)
Path.write_text = half
save_temperatures(sys.argv[1], SimpleNamespace(block_size=4), {"greedy": [2.0] * 4})
"""


@pytest.mark.slow
def test_killed_save(tmp_path):
  """Kills: half a sidecar over the only good one; what a kill leaves, in the way of the next save of either sort."""
  folder = tmp_path / "d"
  dspark_jax.save_drafter(folder, fresh_drafter(), qwen3())
  save_temperatures(folder, FOUR, {"greedy": GREEDY})
  before = files(folder)
  out = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
                       capture_output=True)
  assert out.returncode == -signal.SIGKILL, out.stderr.decode()
  assert files(folder) == before and len(list(tmp_path.iterdir())) == 2
  save_temperatures(folder, FOUR, {"T=1": SAMPLED})
  assert set(read(folder / "drafter.json")["temperatures"]) == {"greedy", "T=1"}
  dspark_jax.save_drafter(folder, fresh_drafter(), qwen3())
  assert [p.name for p in tmp_path.iterdir()] == ["d"]


# train.calibrate

PROMPTS, NEW, BLOCK = 20, 32, 5


@pytest.fixture(scope="module", autouse=True)
def one_target():
  """Loaded once. All programs decode in the same shapes, so that JAX compiles once, too, for each kind of sampling."""
  real = dspark_jax.load_target
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dspark_jax, "load_target", lambda path, **settings: qwen3() if Path(path).name == "target" else real(
        path, **settings))
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A golden target with a tokenizer, a golden drafter of ours, and questions, the first of them twice."""
  folder = tmp_path_factory.mktemp("calibrate")
  with_tokenizer(QWEN3, folder / "target")
  dspark_jax.import_drafter(DSPARK, folder / "drafter", qwen3())
  rng = np.random.default_rng(0)
  texts = [" ".join(f"w{i}" for i in rng.integers(5, WORDS, rng.integers(2, 9))) for _ in range(PROMPTS)]
  (folder / "q.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in [texts[0], *texts]))
  return folder


def arguments(folder, drafter, out, **changes):
  settings = {"target": folder / "target", "drafter": drafter, "questions": folder / "q.jsonl", "batch": 8,
              "max_new_tokens": NEW, "samples": PROMPTS, "out": out, **changes}
  return sum((["--" + k.replace("_", "-"), *(v if isinstance(v, list) else [v])] for k, v in settings.items()), [])


@pytest.fixture(scope="module")
def calibrated(folder):
  """(output folder, settings, what main returned) of an uninterrupted run."""
  out = folder / "out"
  settings = calibrate.Settings(str(folder / "target"), folder / "drafter", questions=folder / "q.jsonl", batch=8,
                                max_new_tokens=NEW, samples=PROMPTS, out=out)
  return out, settings, calibrate.main(settings)


def half(out, mode, first):
  """(confidences, drafts kept, drafts verified) of every second prompt."""
  rows = [json.loads(line) for line in (out / f"rounds-{mode}.jsonl").read_text().splitlines()][first::2]
  flat = lambda key: np.asarray([x for row in rows for x in row[key]])
  return flat("confidence"), flat("n_accept"), flat("n_verify")


def test_what_it_leaves(folder, calibrated):
  """Kills: a result that is no JSON, a picture or a table left out, temperatures that do not reach the sidecar."""
  out, _, result = calibrated
  assert set(result) == PRINTED and result["out"] == str(out)
  json.dumps(result, allow_nan=False)
  assert sorted(p.name for p in out.iterdir()) == ["calibration.json", "calibration.png", "rounds-T=1.jsonl",
                                                   "rounds-greedy.jsonl", "run.json"]
  assert (out / "calibration.png").read_bytes()[:4] == b"\x89PNG"
  assert read(folder / "drafter" / "drafter.json")["temperatures"] == result["temperatures"]
  drafter = dspark_jax.load_drafter(folder / "drafter", qwen3())
  assert dspark_jax.load_temperatures(folder / "drafter", drafter, "T=1").shape == (drafter.block_size,)


@pytest.mark.parametrize("mode", ["greedy", "T=1"])
def test_fits_on_one_half_and_reports_on_the_other(mode, calibrated):
  """Kills: measuring on the prompts that were fitted, a duplicate question in both halves, conditional acceptance for
  that of prefixes."""
  out, _, result = calibrated
  stored = read(out / "calibration.json")["modes"][mode]
  fit, report = (stored["prompts"][name] for name in ("fit", "report"))
  assert not set(fit) & set(report) and len(fit) == len(report) == PROMPTS // 2
  texts = [json.loads(line)["prompt"] for line in calibrated[1].questions.read_text().splitlines()]
  assert not {texts[int(i) - 1] for i in fit} & {texts[int(i) - 1] for i in report}
  c, kept, there = half(out, mode, 0)
  seen = (np.arange(BLOCK) < there[:, None]).sum(0)
  assert result["observations"][mode]["fit"] == seen.tolist() and (seen >= calibrate.MIN_OBSERVATIONS).all()
  wanted, _ = fit_temperatures(special.logit(c), np.arange(BLOCK) < kept[:, None], effective_length=there)
  assert result["temperatures"][mode] == wanted.tolist() != [1.0] * BLOCK
  c, kept, there = half(out, mode, 1)
  for when, t in (("before", np.ones(BLOCK)), ("after", wanted)):
    survive = np.cumprod(special.expit(special.logit(c) / t), axis=1)
    by_hand = reliability(survive, np.arange(BLOCK) < kept[:, None], there)
    for key, field in (("ece", "ece"), ("auroc", "auc")):
      np.testing.assert_allclose(result[key][mode][when], getattr(by_hand, field), atol=2e-3)  # a bin's edge in float32
    np.testing.assert_allclose(stored[when]["brier"], by_hand.brier, rtol=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, calibrated, monkeypatch, capsys, tmp_path):
  """Kills: prompts decoded twice, a line cut in the middle that is fatal or kept, seeds that depend on the batch, a
  rerun that decodes anything at all."""
  out, _, result = calibrated
  real, calls = PromptBatch.run, []
  def dies(batch):
    calls.append(len(batch.args[2].prompts))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(batch)
  monkeypatch.setattr(PromptBatch, "run", dies)
  monkeypatch.setattr(calibrate, "picture", lambda path, results: None)
  args = arguments(folder, folder / "drafter", tmp_path / "out")
  called(capsys, calibrate, *args, code=130)
  assert len((tmp_path / "out" / "rounds-greedy.jsonl").read_text().splitlines()) == 16
  cut(tmp_path / "out" / "rounds-greedy.jsonl", 0.97)
  again, _ = called(capsys, calibrate, *args)
  assert calls == [8] * (3 + 1 + 3)  # the cut prompt and the last four are one batch; then three of the other mode
  for mode in ("greedy", "T=1"):
    a, b = ({r["id"]: r for r in map(json.loads, (o / f"rounds-{mode}.jsonl").read_text().splitlines())}
            for o in (out, tmp_path / "out"))
    assert a.keys() == b.keys() and all(a[i]["n_accept"] == b[i]["n_accept"] for i in a)
    assert again["temperatures"][mode] == result["temperatures"][mode]
  rounds = files(tmp_path / "out")
  once_more, _ = called(capsys, calibrate, *args)
  assert len(calls) == 7 and once_more == again and files(tmp_path / "out") == rounds


@pytest.mark.parametrize("changes, parts", [
    ({"seed": 1}, ["holds a run with other settings (seed was 0, is 1)", "another --out"]),
    ({"questions": "one.jsonl"}, ["0 of 1 different questions", "at least 2"]),
    ({"questions": "other.jsonl"}, ["(data has changed since)"]),
    ({"questions": "list.jsonl"}, ["list.jsonl, line 3 is no question"]),
    ({"out": "strange"}, ["run.json has no config, data, so it is another program's, or damaged"]),
    ({"questions": "/nowhere.jsonl"}, ["/nowhere.jsonl"]),
    ({"drafter": "trained"}, ["(drafter was "]),
    ({"drafter": "dflash"}, ["has no confidence head", "'markov' or 'hidden'"]),
    ({"drafter": DSPARK}, ["has no drafter.json to store temperatures in", "infer.convert"]),
    ({"drafter": "/nowhere"}, ["/nowhere does not exist"]),
    ({"drafter": "damaged"}, ["has 1, the drafter's block size is 5"]),
    ({"target": "/nowhere"}, ["/nowhere does not exist"]), ({"samples": 1}, ["samples is 1, expected at least 2"]),
    ({"batch": 0}, ["batch is 0"]), ({"max_new_tokens": 1}, ["max_new_tokens is 1"]),
    ({"dtype": "float16"}, ["invalid choice 'float16'"]),
    ({"temperatures": [-1]}, ["temperature is -1"]), ({"temperatures": [1, 1.0]}, ["each once"]),
    ({"max_prompt_tokens": 4}, ["0 of 20 different questions"]),
    ({"out": "lost"}, ["lost holds rounds-greedy.jsonl but no"]),
    ({"out": "hurt"}, ["rounds-greedy.jsonl, line 1 is damaged", "delete the line"])])
def test_mistakes(changes, parts, folder, calibrated, capsys, monkeypatch, tmp_path):
  """Kills: rounds of two drafters fitted together; an hour of decoding before a mistake is seen; a traceback."""
  monkeypatch.setattr(PromptBatch, "run", None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": " ".join(["w5"] * 80)}) + "\n")
  (tmp_path / "other.jsonl").write_text('{"prompt": "w5"}\n{"prompt": "w6"}\n')
  (tmp_path / "list.jsonl").write_text('{"prompt": "w5 \u2028 w6"}\n\n{"prompt": ["w6"]}\n')
  if changes.get("drafter") in ("trained", "damaged"):
    trained = dspark_jax.load_drafter(DSPARK, qwen3())
    trained.norm.weight.set_value(trained.norm.weight[...] * (2 if changes["drafter"] == "trained" else 1))
    dspark_jax.save_drafter(tmp_path / changes["drafter"], trained, qwen3())
  if changes.get("drafter") == "damaged":
    sidecar = read(tmp_path / "damaged" / "drafter.json") | {"temperatures": {"T=2": [1.0]}}
    (tmp_path / "damaged" / "drafter.json").write_text(json.dumps(sidecar))
  if changes.get("drafter") == "dflash":
    dspark_jax.import_drafter(GOLDEN / "generate_dflash_qwen3", tmp_path / "dflash", qwen3())
  if "out" in changes:
    (tmp_path / changes["out"]).mkdir()
    (tmp_path / changes["out"] / "rounds-greedy.jsonl").write_text("[]\n")
  if changes.get("out") == "strange":
    (tmp_path / "strange" / "run.json").write_text('{"settings": {}}')
  if changes.get("out") == "hurt":
    (tmp_path / "hurt" / "run.json").write_bytes((calibrated[0] / "run.json").read_bytes())
  before = files(folder)
  given = {"drafter": folder / "drafter", "out": calibrated[0]} | changes
  _, err = called(capsys, calibrate, *arguments(folder, **given), code=2)
  assert all(part in err for part in parts), err
  # tyro draws a box around what it refuses itself
  assert err.count("error: ") == ("dtype" not in changes) and files(folder) == before


@pytest.mark.parametrize("change, part", [
  ({"n_accept": [1]}, "lists of different lengths"), ({"n_verify": [1, 1.5]}, "key 'n_verify' is [1, 1.5]"),
  ({"confidence": [[0.5] * 3] * 2}, "confidences of other blocks than 4 drafts"),
  ({"tokens": 3}, "unknown key 'tokens'"), ({"confidence": None}, "key 'confidence' is None"),
  (None, "key 'n_accept' is missing")])
def test_damaged_rounds(change, part, tmp_path):
  """Kills: confidences of one round counted for another after a line that an editor spoiled; a traceback for it."""
  whole = {"id": "1", "n_accept": [1, 0], "n_verify": [4, 4], "confidence": [[0.5] * 4] * 2}
  run_folder.append(tmp_path / "r.jsonl", [whole, {"id": "2"} if change is None else whole | change])
  with complains("r.jsonl, line 2 is damaged", part, "delete the line, its prompt is decoded again then"):
    calibrate.read_rounds(tmp_path / "r.jsonl", 4)


def test_too_few_observations(capsys):
  """Kills: a temperature from three rounds; none at all because the last position was never reached; drafts past a stop
  token counted as rejected."""
  rng = np.random.default_rng(0)
  observed = np.repeat([4, 3, 2, 0], [0, 49, 51, 10]).astype(np.int32)
  confidence = rng.uniform(0.5, 1, (110, 4)).astype(np.float32)
  accepted = np.cumprod(rng.random((110, 4)) < 0.5, axis=1).astype(bool)
  found = calibrate.fit("greedy", calibrate.Rounds(confidence, accepted, observed))
  wanted, _ = fit_temperatures(special.logit(confidence[:100, :2]), accepted[:100, :2])
  assert found == [*wanted, 1.0, 1.0] and found[0] != 1
  err = capsys.readouterr().err
  assert "position 3 was observed 49 times" in err and "position 4 was observed 0 times" in err
  assert "position 2" not in err
  row = lambda *observed: calibrate.Prompt("1", (0,) * len(observed), observed, ((0.5,) * 4,) * len(observed))
  little = calibrate.fit_and_report("T=1", [row(3), row(2)], 4)
  assert little["temperatures"] == [1.0] * 4
  assert calibrate.plain(little["after"].ece) == [0.5, 0.25, None, None]
  assert calibrate.table({"T=1": little}).row_count == 4
  with complains("T=1: none of the 1 prompts that report verified a draft"):
    calibrate.fit_and_report("T=1", [row(3), row()], 4)


# infer.generate


@pytest.mark.thorough
def test_a_threshold_changes_no_text(folder, calibrated, capsys, tmp_path):
  """Kills: lengths that depend on later drafts; temperatures that are stored and never used, or for another mode."""
  drafter = tmp_path / "drafter"
  dspark_jax.import_drafter(folder / "drafter", drafter, qwen3())
  (tmp_path / "p.jsonl").write_text("".join((folder / "q.jsonl").read_text().splitlines(keepends=True)[:8]))
  common = ("--target", folder / "target", "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", NEW)
  plain, _ = called(capsys, generate, *common, "--drafter", "none")
  speculative = lambda *args: called(capsys, generate, *common, "--drafter", drafter, *args)
  found = [speculative("--survival-threshold", share)[0] for share in (0, 0.5)]
  assert [r["tokens"] for r in found] == [plain["tokens"]] * 2
  assert found[0]["rounds"] < found[1]["rounds"] < plain["rounds"]  # fewer drafts verified, but some
  flat = {"greedy": [1e9] * BLOCK}  # every confidence becomes 1/2
  save_temperatures(drafter, SimpleNamespace(block_size=BLOCK), flat)
  flat, err = speculative("--survival-threshold", 0.6)
  assert flat["rounds"] == plain["rounds"] and flat["tokens"] == plain["tokens"] and "no temperatures" not in err
  raw, _ = speculative("--survival-threshold", 0.6, "--no-calibrated")
  assert raw["rounds"] < plain["rounds"] and raw["tokens"] == plain["tokens"]
  other, err = speculative("--survival-threshold", 0.5, "--temperature", 0.7)
  assert "has no temperatures for mode 'T=0.7'" in err and other["rounds"] > 0


@pytest.mark.parametrize("flag", ["--survival-threshold", "--confidence-threshold"])
@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan"])
def test_thresholds_at_fault(flag, value, capsys):
  """Kills: a percentage taken for a share; minutes of loading before the complaint."""
  _, err = called(capsys, generate, "--target", "/nowhere", "--drafter", "none", "--prompt", "hi", flag, value, code=2)
  assert f"{flag.strip('-').replace('-', '_')} is {value}, expected 0 (verify every draft) to 1" in err
