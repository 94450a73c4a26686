"""Evaluation: metrics that are the reference's, samples that do not know their batch, runs that go on after a kill."""

import dataclasses
import functools
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax import loading
from dspark_jax.config import to_json
from dspark_jax.data import chat
from dspark_jax.data.benchmarks import Sample
from dspark_jax.nn.sharding import MeshConfig
from dspark_jax.programs import run_folder, shell
from dspark_jax.text import read_json
from infer import evaluate
from infer.evaluate import Case, Models, Settings
from folders import DSPARK, GOLDEN, LLAMA, QWEN3, complains, with_tokenizer

SCHEMA = {"target", "drafter", "kind", "block_size", "num_layers", "markov_head", "dataset", "mode", "threshold",
          "samples", "tokens", "rounds", "accepted_length", "accepted_length_interval", "acceptance", "reached",
          "survival", "verified",
          "verify_rate", "drafts_per_round", "accepted_tokens", "rejected_tokens", "tokens_per_second", "temperatures",
          "reliability", "reliability_before"}
CONFIG = read_json(DSPARK / "config.json")
BLOCK, POSITIONS = CONFIG["block_size"], read_json(QWEN3 / "config.json")["max_position_embeddings"]
SAMPLES = [["w116 w94 w16"], ["w25 w66 w108 w21 w53", "w84 w84"], ["w77"], ["w22 w83 w113 w94"], ["w9", "w10", "w11"]]


@pytest.fixture(scope="module", autouse=True)
def one_layer():
  """The same few programs run again and again: they are compiled with one layer instead of six."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dspark_jax, "load_target", functools.partial(dspark_jax.load_target, scanned=True))
    yield


@functools.cache
def target():
  return loading.load_target(QWEN3, scanned=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A target with a tokenizer, and five samples for it."""
  folder = tmp_path_factory.mktemp("evaluate")
  with_tokenizer(QWEN3, folder / "target")
  (folder / "data.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in SAMPLES))
  return folder


def settings(folder, out, **changes) -> Settings:
  return Settings(**{**dict(targets=(str(folder / "target"),), out=Path(out), drafters=(str(DSPARK),),
                            datasets=(str(folder / "data.jsonl"),), temperatures=(0.0, 1.0), thresholds=(0.0, 0.5),
                            batch=3,
                            max_new_tokens=10), **changes})


@pytest.fixture(scope="module")
def whole(folder):
  """An evaluation from start to end."""
  evaluate.main(settings(folder, folder / "whole"))
  return folder / "whole"


def read(path: Path):
  return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(result: dict) -> dict:
  """What does not depend on the clock, of results.json or a record."""
  if "results" in result:
    return result | {"results": list(map(untimed, result["results"]))}
  return {k: v for k, v in result.items() if k not in ("seconds", "tokens_per_second")}


def assert_same_record(a, b):
  """The same tokens and rounds; confidences up to the rounding of another batch size."""
  assert {**untimed(a), "confidence": None} == {**untimed(b), "confidence": None}
  np.testing.assert_allclose(np.ravel(a["confidence"]), np.ravel(b["confidence"]), atol=1e-4)


def models(folder, **more) -> Models:
  tokenizer = chat.load_tokenizer(folder / "target")
  return Models(target(), dspark_jax.load_drafter(DSPARK, target()), tokenizer, chat.stop_ids(tokenizer), **more)


@pytest.mark.thorough
def test_an_evaluation_on_a_mesh(folder, whole, tmp_path):
  """Kills: a program that leaves its mesh aside, samples or drafts that depend on it."""
  with (mesh := MeshConfig(data=2, tensor=2)).use():
    evaluate.main(settings(folder, tmp_path / "spread", mesh=mesh, batch=4))
  files = sorted(path.name for path in (whole / "samples").iterdir())
  assert files and files == sorted(path.name for path in (tmp_path / "spread" / "samples").iterdir())
  for name in files:
    by_id = [{record["id"]: record for record in lines(out / "samples" / name)} for out in (whole, tmp_path / "spread")]
    assert by_id[0].keys() == by_id[1].keys()
    for key, record in by_id[0].items():
      assert_same_record(record, by_id[1][key])


def golden_run(block_size):
  """(stop tokens of a prompt that ends in one, new tokens, prompts that have no others, inputs, outputs)"""
  inputs, outputs = (dict(np.load(DSPARK / f"{name}.npz")) for name in ("inputs", "outputs"))
  stops = {name.removesuffix("/stop_token_ids"): tuple(ids.tolist()) for name, ids in inputs.items()
           if name.endswith("/stop_token_ids")}
  reached = (ids for name, ids in stops.items() if outputs[f"{name}/ar_output_ids"][0, -1] in ids)
  chosen = next(reached, ())
  # Of the last round's tokens all are known then, also those past the limit.
  limit = max(2, int(inputs["max_new_tokens"]) - block_size - 1)
  return chosen, limit, sorted(name for name in stops if set(stops[name]) <= set(chosen)), inputs, outputs


def expected_rounds(counts, size, ends):
  """Lists of what a text of `size` tokens committed, accepted and verified per round; ends: stop tokens' places + 1."""
  count, rounds = 1, []
  for committed, accepted, verified in counts:
    if count >= size:
      break
    kept = [end - count for end in ends if 0 < end - count <= accepted][:1]
    rounds.append((committed, *kept * 2) if kept else (committed, accepted, verified))
    count += committed
  return [list(column) for column in zip(*rounds)]


def test_rounds_are_the_reference_s(folder):
  """Kills: records with a round too many, drafts past a stop token, or without the stop token's own round."""
  m, prompts, texts, rounds = models(folder), [], [], []
  m.stops, limit, names, golden, wanted = golden_run(m.block_size)
  case = Case("target", "drafter", "data", 0.0, float(golden["thresholds"][0]))
  for name in names:
    prompts.append(golden[f"{name}/input_ids"][0].tolist())
    whole = wanted[f"{name}/ar_output_ids"][0].tolist()[len(prompts[-1]):]
    ends = [i + 1 for i, token in enumerate(whole) if token in m.stops]
    texts.append(whole[:min([limit, *ends])])
    counts = zip(*(wanted[f"t0/{name}/{part}"].tolist() for part in ("acceptance_lengths", "accepted_draft_lengths",
                                                                    "proposal_lengths")))
    rounds.append(expected_rounds(counts, len(texts[-1]), ends))
  chosen = settings(folder, folder, max_new_tokens=limit, batch=len(prompts))
  rows = evaluate.decode_rows(chosen, case, m, prompts, list(range(len(prompts))))
  assert [row["text"] for row in rows] == texts
  for row, (commits, accepts, verifies) in zip(rows, rounds, strict=True):
    assert (row["n_accept"], row["n_verify"]) == (accepts, verifies)
    assert row["n_commit"][:-1] == commits[:-1] and 1 + sum(row["n_commit"]) == len(row["text"])


# The program


def called(capsys, *args, code: int = 0):
  """(JSON of the last line of stdout or None, stderr) of the program called in this process."""
  capsys.readouterr()
  with pytest.raises(SystemExit) if code else pytest.MonkeyPatch.context() as exit_:
    shell.run(evaluate.main, Settings, args=[str(a) for a in args])
  out, err = capsys.readouterr()
  assert "Traceback" not in err and (not code or exit_.value.code == code), err
  return (None if code else json.loads(out.splitlines()[-1])), err


def test_results(folder, whole, capsys):
  """Kills: a missing key; a threshold that saves no drafts; NaN in JSON; a table that lacks a row; a program that
  prints something else than it wrote."""
  results = read(whole / "results.json")
  assert set(results) == {"settings", "versions", "results"} and results["settings"]["thresholds"] == [0, 0.5]
  assert results["versions"]["jax"] == jax.__version__ and results["settings"]["verification"] == "token"
  rows = results["results"]
  assert [(r["drafter"], r["mode"], r["threshold"]) for r in rows] == [
      (DSPARK.name, mode, t) for mode in ("greedy", "T=1") for t in (0, 0.5)]
  for row in rows:
    assert set(row) == SCHEMA and row["samples"] == 5 and row["tokens_per_second"] > 0 and row["tokens"] > 0
    assert [row[key] for key in ("kind", "block_size", "num_layers", "markov_head")] == ["dspark"] + [
        CONFIG[key] for key in ("block_size", "num_hidden_layers", "markov_head_type")]
    assert row["reliability"]["total_weight"] == row["verified"] and row["reliability_before"] is None
    assert row["reliability"]["target_mean"] == pytest.approx(row["survival"])
  assert rows[1]["drafts_per_round"] < rows[0]["drafts_per_round"]
  table = (whole / "results.md").read_text().splitlines()
  assert len(table) == 2 + len(rows) and table[2].startswith(f"| target | {DSPARK.name} | data | greedy | 0 | 5 |")
  json_line, err = called(capsys, *arguments(folder, whole))
  assert json_line["out"] == str(whole) and len(json_line["results"]) == len(rows)
  assert json_line["results"][0]["reliability"] == rows[0]["reliability"]["summary"]


def test_plain(folder, whole, tmp_path):
  """Kills: greedy text that depends on the drafter or the threshold; accepted lengths of plain decoding; a plain row
  for every threshold."""
  evaluate.main(settings(folder, tmp_path, drafters=("none",), temperatures=(0.0,)))
  row, = read(tmp_path / "results.json")["results"]
  assert set(row) == SCHEMA and {k for k, v in row.items() if v is not None} == {
      "target", "drafter", "dataset", "mode", "samples", "tokens", "tokens_per_second"}
  assert "| none | data | greedy |  | 5 |  |" in (tmp_path / "results.md").read_text()
  plain = lines(tmp_path / "samples" / "target--none--data--greedy.jsonl")
  count = lambda records: {r["id"]: r["tokens"] for r in records}
  assert set(count(plain)) == set("12345") and all("confidence" not in r for r in plain)
  for threshold in ("0", "0.5"):
    drafted = f"target--{DSPARK.name}--data--greedy--threshold={threshold}.jsonl"
    assert count(plain) == count(lines(whole / "samples" / drafted))


def arguments(folder, out, **changes) -> list:
  """The command line of `settings`."""
  args = {"--targets": folder / "target", "--out": out, "--drafters": DSPARK, "--datasets": folder / "data.jsonl",
          "--temperatures": [0, 1], "--thresholds": [0, 0.5], "--batch": 3, "--max-new-tokens": 10}
  args |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
  return [x for name, value in args.items() for x in (name, *(value if isinstance(value, list) else [value]))]


@pytest.mark.thorough
def test_every_target_has_its_own_drafters(folder, tmp_path, capsys):
  """Kills: a drafter that is tried with another's target, which ends the whole run; a threshold that means nothing, as
  there is no confidence, taken for another result."""
  with_tokenizer(LLAMA, folder / "llama")
  dflash = DSPARK.with_name("generate_dflash_qwen3")
  both = dict(targets=(str(folder / "llama"), str(folder / "target")), temperatures=(0.0,), max_new_tokens=2)
  evaluate.main(settings(folder, tmp_path / "out", drafters=("none", str(DSPARK), str(dflash)), **both))
  assert "greedy--threshold=0.5: no temperatures are stored for greedy" in " ".join(capsys.readouterr().err.split())
  found = [(r["target"], r["drafter"], r["threshold"]) for r in read(tmp_path / "out" / "results.json")["results"]]
  assert found == [("llama", "none", None), ("target", "none", None), ("target", DSPARK.name, 0),
                   ("target", DSPARK.name, 0.5),
                   ("target", dflash.name, 0)]
  other = GOLDEN / "drafter_dspark_qwen3_vanilla"
  with complains(f"{other.name} was made for none of the targets"):
    evaluate.main(settings(folder, tmp_path / "no", drafters=(str(other), str(DSPARK)), **both))
  with complains("has no confidence head", "add 0 to --thresholds"):
    evaluate.main(settings(folder, tmp_path / "no", drafters=(str(dflash),), thresholds=(0.5,)))
  assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("temperature, threshold", [(0.0, 0.0), (1.0, 0.5)])
def test_a_sample_does_not_know_its_batch(temperature, threshold, folder):
  """Kills: a seed from the row; rounds of a filled-up row or of a slower neighbour in a record; turns mixed up between
  rows that drop out."""
  m, case = models(folder), Case("target", "drafter", "data", temperature, threshold)
  samples = [Sample(str(i), tuple(turns)) for i, turns in enumerate(SAMPLES, 1)][:3]
  of = lambda batch, *parts: {decoded.id: to_json(decoded) for part in parts for decoded in evaluate.ask(
      settings(folder, folder, batch=batch, turns="all"), case, m, list(part))}
  together = of(3, samples)
  alone = [of(1, *([s] for s in samples))] if temperature else []
  for other in (of(3, samples[::-1]), of(3, samples[1:], samples[:1]), *alone):
    for name, record in together.items():
      assert_same_record(record, other[name])
  assert [r["turns"] for r in together.values()] == [1, 2, 1]
  if temperature:
    seeds = [evaluate.ask(settings(folder, folder, seed=seed), case, m, samples) for seed in (0, 1)]
    assert [r.n_accept for r in seeds[0]] != [r.n_accept for r in seeds[1]]


def test_seeds(folder, monkeypatch):
  """Kills: a seed without the run's part, the sample's or the turn's: two of them that draw alike."""
  given, answer = [], dict(text=[7, 8], tokens=2, seconds=0.0, n_accept=[0], n_verify=[0], n_commit=[1])
  monkeypatch.setattr(evaluate, "decode_rows", lambda *args: given.append(args[-1]) or [{**answer} for _ in args[-1]])
  m, samples = models(folder), [Sample("x", ("w5", "w6")), Sample("y", ("w7", "w8"))]
  m.drafter = None
  evaluate.ask(settings(folder, folder, turns="all", seed=5), Case("target", "none", "data", 0.0, None), m, samples)
  assert given == [[zlib.crc32(f"5/{name}/{turn}".encode()) for name in "xy"] for turn in (0, 1)]


def test_all_turns(folder):
  """Kills: a second question without the first answer; rounds of one turn only; a conversation that outgrows the target
  ending the whole run."""
  m, case = models(folder), Case("target", "none", "data", 0.0, None)
  m.drafter = None
  turns = ("w116 w94", "w16", "w7")
  record = evaluate.ask(settings(folder, folder, turns="all"), case, m, [Sample("x", turns)])[0]
  messages, rounds, tokens = [], 0, 0
  for turn in turns:
    messages.append({"role": "user", "content": turn})
    out = evaluate.decode_rows(settings(folder, folder), case, m, [chat.encode_prompt(m.tokenizer, messages)], [0])[0]
    messages.append({"role": "assistant", "content": m.tokenizer.decode(out["text"], skip_special_tokens=True)})
    rounds, tokens = rounds + len(out["n_accept"]), tokens + len(out["text"])
  assert (record.turns, record.tokens, len(record.n_accept)) == (3, tokens, rounds)
  first = evaluate.ask(settings(folder, folder), case, m, [Sample("x", turns)])[0]
  assert first.turns == 1 and first.tokens <= 10
  long = ("w5", " ".join(["w6"] * (POSITIONS - 7)), "w7")
  same = lambda turns, said: dataclasses.replace(
      evaluate.ask(settings(folder, folder, turns=turns), case, m, [Sample("x", said)])[0], seconds=0)
  assert same("all", long) == same("first", long[:1])


def test_killed_and_gone_on(folder, whole, monkeypatch, tmp_path):
  """Kills: decoding again what is there; a batch that is lost or counted twice; a line that the kill cut in the middle,
  kept or fatal."""
  real, left = run_folder.append, [3]
  def append(path, records):
    real(path, records)
    left[0] -= 1
    if not left[0]:
      raise RuntimeError("killed")
  monkeypatch.setattr(run_folder, "append", append)
  with pytest.raises(RuntimeError, match="killed"):
    evaluate.main(settings(folder, tmp_path))
  monkeypatch.setattr(run_folder, "append", real)
  assert not (tmp_path / "results.json").exists()
  cut = tmp_path / "samples" / f"target--{DSPARK.name}--data--greedy--threshold=0.5.jsonl"
  cut.write_bytes(cut.read_bytes()[:-20])  # in the middle of the third sample
  asked, ask = [], evaluate.ask
  def watched(settings, case, models, samples):
    asked.extend((case.key, s.id) for s in samples)
    return ask(settings, case, models, samples)
  monkeypatch.setattr(evaluate, "ask", watched)
  evaluate.main(settings(folder, tmp_path))
  assert len(asked) == len(set(asked)) == 20 - 5 - 2
  assert untimed(read(tmp_path / "results.json")) == untimed(read(whole / "results.json"))
  for file in (whole / "samples").iterdir():
    assert sorted(r["id"] for r in lines(tmp_path / "samples" / file.name)) == list("12345")
  asked.clear()
  evaluate.main(settings(folder, tmp_path))
  assert asked == []
  assert untimed(read(tmp_path / "results.json")) == untimed(read(whole / "results.json"))


def test_more_cases_in_the_same_folder(folder, whole, tmp_path, monkeypatch):
  """Kills: an evaluation that decodes again what is there when it is given one more threshold, or that refuses it;
  results that list the first call's cases."""
  evaluate.main(settings(folder, tmp_path, thresholds=(0.5,), temperatures=(0.0,)))
  asked, ask = [], evaluate.ask
  def watched(settings, case, models, samples):
    asked.append(case.key)
    return ask(settings, case, models, samples)
  monkeypatch.setattr(evaluate, "ask", watched)
  evaluate.main(settings(folder, tmp_path))
  assert set(asked) == {f"target--{DSPARK.name}--data--{case}" for case in ("greedy--threshold=0", "T=1--threshold=0",
                                                                            "T=1--threshold=0.5")}
  assert untimed(read(tmp_path / "results.json")) == untimed(read(whole / "results.json"))
  evaluate.main(settings(folder, tmp_path, temperatures=(1.0,)))
  assert [r["mode"] for r in read(tmp_path / "results.json")["results"]] == ["T=1", "T=1"]


def test_calibrated_confidences(folder, tmp_path):
  """Kills: temperatures of another mode; the raw confidences reported as the calibrated ones, or the other way round; a
  sidecar that is not read; a drafter changed under a run that goes on."""
  dspark_jax.import_drafter(DSPARK, tmp_path / "drafter", target())
  drafter = dspark_jax.load_drafter(tmp_path / "drafter", target())
  common = dict(drafters=(str(tmp_path / "drafter"),), thresholds=(0.0,))
  chosen = ([3.0, 2.0, 1.5, 0.7] + BLOCK * [1.0])[:BLOCK]
  evaluate.main(settings(folder, tmp_path / "raw", **common))
  loading.save_temperatures(tmp_path / "drafter", drafter, {"greedy": chosen})
  evaluate.main(settings(folder, tmp_path / "fitted", **common))
  raw, fitted = (read(tmp_path / name / "results.json")["results"] for name in ("raw", "fitted"))
  assert fitted[0]["temperatures"] == chosen and raw[0]["temperatures"] is None
  for name in ("brier", "pred_mean", "target_mean"):
    np.testing.assert_allclose(fitted[0]["reliability_before"][name], raw[0]["reliability"][name], atol=1e-4)
  assert fitted[0]["reliability"]["pred_mean"] != pytest.approx(raw[0]["reliability"]["pred_mean"], abs=1e-2)
  assert fitted[1]["reliability_before"] is fitted[1]["temperatures"] is None  # T=1 has none
  with complains("holds a run with other settings", "target--drafter has changed since", "calibrated or edited since"):
    evaluate.main(settings(folder, tmp_path / "raw", **common))


@pytest.mark.parametrize("change, part", [
    (dict(max_new_tokens=9), "max_new_tokens was 10, is 9"), (dict(seed=1), "seed was 0, is 1"),
    ("data", "samples: data has changed since")])
def test_other_settings_in_the_same_folder(change, part, folder, whole):
  """Kills: results of half of one evaluation and half of another."""
  before = (folder / "data.jsonl").read_text()
  if change == "data":
    (folder / "data.jsonl").write_text(before.replace("w77", "w78"))
  with complains("holds a run with other settings", part, "another --out"):
    evaluate.main(settings(folder, whole, **({} if change == "data" else change)))
  (folder / "data.jsonl").write_text(before)


@pytest.mark.parametrize("spoil, part", [
    (lambda r: "}{", "line 2 is damaged"), (lambda r: "[]", "line 2 is damaged"),
    (lambda r: json.dumps(r | {"id": "99"}), "'99' is not among those asked"),
    (lambda r: json.dumps({k: v for k, v in r.items() if k != "tokens"}), "key 'tokens' is missing"),
    (lambda r: json.dumps(r | {"tokens": -1}), "key 'tokens' is -1, expected an integer of at least 0"),
    (lambda r: json.dumps(r | {"seconds": "1"}), "key 'seconds' is '1', expected a number of at least 0"),
    (lambda r: json.dumps(r | {"n_verify": [BLOCK + 1] * 2}), "counts out of range"),
    (lambda r: json.dumps(r | {"n_commit": [3, 1]}), "counts out of range"),
    (lambda r: json.dumps(r | {"n_commit": [2, -1]}), "counts out of range"),
    (lambda r: json.dumps(r | {"tokens": 3}), "rounds that do not add up to its tokens"),
    (lambda r: json.dumps(r | {"confidence": [[0.5] * BLOCK, [0.5] * (BLOCK - 1)]}), "other confidences than rounds"),
    (lambda r: json.dumps({k: v for k, v in r.items() if k != "confidence"}), "other confidences than rounds"),
    (lambda r: json.dumps(r | {"n_accept": [BLOCK + 4] * len(r["n_accept"])}), "counts out of range"),
    (lambda r: json.dumps(r | {"n_verify": [1]}), "lists of different lengths"),
    (lambda r: json.dumps(r | {"confidence": [[0.5]]}), "other confidences than rounds"),
    (lambda r: json.dumps(r | {"id": "1"}), "a sample twice")])
def test_damaged_samples(spoil, part, folder, tmp_path):
  """Kills: a traceback, or a quietly wrong mean, from a file that a full disk or an editor spoiled."""
  record = dict(id="1", turns=1, tokens=4, seconds=0.1, n_accept=[1, 0], n_verify=[BLOCK] * 2, n_commit=[2, 1],
                confidence=[[0.5] * BLOCK] * 2)
  (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(record), spoil(record | {"id": "2"}), ""]))
  samples = [Sample(str(i), tuple(turns)) for i, turns in enumerate(SAMPLES, 1)]
  with complains("x.jsonl, line 2 is damaged", part, "delete the line"):
    evaluate.read_decoded(tmp_path / "x.jsonl", samples, models(folder))


def test_damaged_run(folder, tmp_path):
  """Kills: a half-written or foreign run.json that is overwritten, or that ends in a traceback."""
  (tmp_path / "run.json").write_text('{"settings": {')
  with complains("run.json is not JSON"):
    evaluate.main(settings(folder, tmp_path))
  (tmp_path / "run.json").write_text('{"config": {}}')
  with complains("run.json has no settings", "another --out"):
    evaluate.main(settings(folder, tmp_path))


MISTAKES = [
    ("thresholds", "1.5", "threshold is 1.5, expected 0 (verify every draft) to 1"),
    ("thresholds", "nan", "threshold is nan"),
    ("thresholds", [0.5, 0.5], "would be decoded 2 times"), ("temperatures", "-1", "temperature is -1"),
    ("temperatures", "inf", "temperature is inf"), ("batch", "0", "batch is 0"),
    ("max_new_tokens", "0", "max_new_tokens is 0"),
    ("turns", "two", "invalid choice 'two'"), ("dtype", "float16", "invalid choice 'float16'"),
    ("datasets", "gsm9k", "dataset gsm9k is neither known nor a file"),
    ("datasets", "gsm8k", "where the benchmark gsm8k is"),
    ("samples", "0", "the number of samples is 0"), ("targets", "/nowhere", "target /nowhere does not exist"),
    ("targets", QWEN3, "has no tokenizer.json"), ("drafters", "/nowhere", "/nowhere does not exist: expected a folder"),
    ("drafters", "/nowhere/none", "which means plain decoding"), ("drafters", [], "drafters is empty"),
    ("drafters", GOLDEN / "drafter_dspark_qwen3_vanilla", "this drafter was made for another target"),
    ("max_new_tokens", f"{POSITIONS - 6}",
     f"which leave no room for {POSITIONS - 6} new ones in the target's {POSITIONS} positions"),
    ("speed", "11", "--speed")]


@pytest.mark.parametrize("name, value, part", MISTAKES)
def test_mistakes(name, value, part, folder, capsys, tmp_path):
  """Kills: a traceback for a typo, exit code 0 or 1 for it, or a folder that then refuses the right command."""
  _, err = called(capsys, *arguments(folder, tmp_path / "out", **{name: value}), code=2)
  assert part in err
  if name not in ("speed", "turns", "dtype"):  # tyro draws a box
    assert err.strip().splitlines()[-1].startswith("error: ") and err.count("error: ") == 1
    assert name == "max_new_tokens" or not (tmp_path / "out").exists()
