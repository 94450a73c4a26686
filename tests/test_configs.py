"""Configurations of drafters: one per kind, what is refused, what stored files and the command line hold them to."""

import dataclasses
import functools
import json
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import dspark_jax
from dspark_jax.config import from_json, to_json
from dspark_jax.drafters import DRAFTERS, MTP, DSpark, Eagle3
from dspark_jax.drafters.model import DrafterChoices, DrafterConfig, DrafterSettings
from dspark_jax.loading import drafter_id, made_for, target_config, target_id
from dspark_jax.nn.parameters import parameters
from dspark_jax.programs import run_folder
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import stack_layers
from dspark_jax.training.losses import DFLASH, EAGLE3, LossConfig
from dspark_jax.training.step import OptimizerConfig, StepConfig
from folders import assert_same_weights, complains
from train import train
from train.config import CompareConfig, TrainConfig, read_config
from test_drafters import small_drafter
from test_targets import small_target

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
DEMO = ROOT / "configs" / "demo.py"
TARGET_ID, FORMER_ID = "c891eca6b8b5025c", "b45cec58c80640a4"  # the former one of embedding and final norm alone
SPEC = dict(hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=6, rms_norm_eps=1e-06,
            rope_theta=100.0, qk_norm=True)
RECURRENT = dict(spec=SPEC, vocab_size=12, num_target_layers=2, taps=[-1, 0], block_size=3, draft_vocab_size=0)
PARALLEL = RECURRENT | dict(num_layers=2, mask_token_id=11, markov_rank=4, markov_head="vanilla", confidence="markov",
                            sample_from_anchor=True, lens=False)
SIDECARS = {  # the configurations that drafter.json held when there was one class for DSpark and one for the others
  "vanilla": PARALLEL, "words": PARALLEL | dict(draft_vocab_size=6), "eagle3": RECURRENT, "mtp": RECURRENT}


def exact(module):
  """The module with weights that every machine and every version of NumPy make alike."""
  for variable in parameters(module).values():
    size = int(np.prod(variable.shape))
    variable.set_value(jnp.asarray((np.arange(size) % 13 - 6).reshape(variable.shape) / 8, jnp.float32))
  return module


@pytest.mark.parametrize("kind, wanted", [
    ("vanilla", "eb4a7cea31330793"), ("rnn", "b8f6fac2a32f14fd"), ("original", "33e8ff6bbfbcbce5"),
    ("words", "65695eacfc1c8a85"), ("lens", "ddf82d4c1ad43976"), ("eagle3", "59f1f2eb25d8c58e"),
    ("mtp", "45ad8a0979e3365e")])
def test_ids_stay(kind, wanted):
  """Kills: a field of a configuration renamed, added or left out, a parameter under another name or in another order:
  stored drafters would not be their target's any more, nor calibrations their drafter's."""
  target = exact(small_target("qwen3"))
  assert target_id(target) == TARGET_ID
  assert drafter_id(exact(small_drafter(target, kind))) == wanted


@pytest.mark.parametrize("family", TARGETS)
def test_an_id_is_of_every_weight(family):
  """Kills: a target with an adapter merged into some matrices, or with another head, taken for the one without; an id
  that depends on how the layers lie."""
  target = small_target(family)
  ids = [target_id(target)]
  for variable in parameters(target).values():
    before = variable[...]
    variable.set_value(before + 1)
    ids.append(target_id(target))
    assert target_id(stack_layers(target)) == ids[-1]
    variable.set_value(before)
  assert len(set(ids)) == len(ids) == len(parameters(target)) + 1


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_stored_drafter_stays_readable(kind, tmp_path):
  """Kills: keys of drafter.json that change their names with the classes, or that only the newest version reads; a
  drafter that is its target's no more, because an id says more of a target than it did."""
  target = exact(small_target("qwen3"))
  drafter = small_drafter(target, kind)
  dspark_jax.save_drafter(tmp_path, drafter, target)
  file = tmp_path / "drafter.json"
  sidecar = json.loads(file.read_text())
  assert sidecar["config"] == SIDECARS[kind]
  file.write_text(json.dumps({"format": 1, "drafter": sidecar["drafter"], "config": SIDECARS[kind], "target": FORMER_ID,
                              "imported": None}))
  assert made_for(tmp_path, target) and target_id(target, FORMER_ID) == FORMER_ID != TARGET_ID == target_id(target, "x")
  again = dspark_jax.load_drafter(tmp_path, target)
  assert again.config == drafter.config
  assert_same_weights(again, drafter)


# What a user chooses, what follows from the target


@pytest.mark.parametrize("kind", DRAFTERS)
def test_one_list_of_fields(kind):
  """Kills: a second list of a kind's fields, which one day lacks one: a choice that reaches no drafter, or a stored
  drafter that says how its training started."""
  drafter = DRAFTERS[kind]
  fields = lambda cls: {field.name for field in dataclasses.fields(cls)}
  follows, starts = fields(DrafterConfig) - fields(DrafterChoices), fields(drafter.Settings) - fields(drafter.Config)
  assert fields(drafter.Config) - fields(drafter.Settings) == follows == {"spec", "vocab_size", "num_target_layers"}
  assert starts - {"from_bigrams"} == {"kind", "from_target"} and drafter.Settings(taps=(0,)).kind == kind
  assert issubclass(drafter.Settings, DrafterSettings) and issubclass(drafter.Config, DrafterConfig)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_choice_reaches_the_drafter(kind):
  """Kills: a configuration for a target that takes a field's default instead of what was chosen."""
  target, drafter = small_target("qwen3").config, DRAFTERS[kind]
  other = {bool: lambda x: not x, int: lambda x: x + 1, tuple: lambda x: (-1,),
           str: lambda x: "hidden" if x == "markov" else "rnn"}
  names = [f.name for f in dataclasses.fields(drafter.Config) if hasattr(drafter.Settings(taps=(0,)), f.name)]
  before = drafter.Settings(taps=(0,))
  for name in set(names) - {"lens"}:  # which goes with one convention only
    chosen = dataclasses.replace(before, **{name: other[type(getattr(before, name))](getattr(before, name))})
    config = drafter.Config.for_target(chosen, target)
    assert getattr(config, name) == getattr(chosen, name) != getattr(before, name), name
    assert (config.spec, config.vocab_size, config.num_target_layers) == (
        target.spec, target.vocab_size, target.num_layers)
    assert from_json(drafter.Config, json.loads(json.dumps(to_json(config))), "again") == config


@pytest.mark.parametrize("kind, fields", [
    (Eagle3, dict(num_layers=5)), (Eagle3, dict(markov_head="nonsense")), (Eagle3, dict(mask_token_id=3)),
    (MTP, dict(markov_rank=4)), (MTP, dict(lens=True)), (MTP, dict(from_bigrams=True)), (DSpark, dict(ttt_length=7))])
def test_what_a_kind_does_not_have(kind, fields, tmp_path):
  """Kills: kind="eagle3", num_layers=5, markov_head="nonsense", which once gave a configuration without a word."""
  (name, value), = fields.items()
  with pytest.raises(TypeError, match=f"{kind.__name__}Settings.*'{name}'"):
    kind.Settings(taps=(0,), **fields)
  file = tmp_path / "config.py"
  file.write_text(f"from dspark_jax.drafters import {kind.__name__}\n"
                  f"config = {kind.__name__}.Settings(taps=(0,), {name}={value!r})\n")
  with complains(f"config {file}", f"'{name}'"):
    read_config(str(file))
  stored = to_json(kind.Config.for_target(kind.Settings(taps=(0,)), small_target("qwen3").config)) | fields
  with complains(f"unknown key '{name}'"):
    from_json(kind.Config, stored, "drafter.json")


@pytest.mark.parametrize("make, part", [
    (lambda: DSpark.Settings(taps=(0,), markov_head="lstm"), "markov_head is 'lstm', expected vanilla, gated or rnn"),
    (lambda: DSpark.Settings(taps=(0,), markov_head="lstm", markov_rank=0, confidence="none"), "markov_head is 'lstm'"),
    (lambda: DSpark.Settings(taps=(0,), confidence="both"), "confidence is 'both', expected none, hidden or markov"),
    (lambda: DSpark.Settings(taps=()), "taps are empty"), (lambda: Eagle3.Settings(taps=()), "no taps"),
    (lambda: MTP.Settings(kind="eagle3"), "kind is 'eagle3', expected mtp"),
    (lambda: MTP.Settings(draft_vocab_size=-1), "draft_vocab_size is -1"),
    (lambda: OptimizerConfig(name="sgd"), "name is 'sgd', expected adamw or muon"),
    (lambda: LossConfig(per="tokens"), "per is 'tokens', expected slots or positions"),
    *[(functools.partial(OptimizerConfig, **{name: value}), f"{name} is {value}") for name, value in (
        ("clip", 0), ("clip", -1), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("b1", 1.5), ("b2", 1),
        ("eps", -1), ("eps", 0), ("weight_decay", float("inf")))],
    *[(functools.partial(LossConfig, **{name: value}), f"{name} is {value}") for name, value in (
        ("tv", -1), ("decay", 0), ("decay", -0.5), ("ce", float("nan")), ("chunk", -5), ("chunk", 0))],
    (lambda: LossConfig(0, 0, 0), "ce, tv, confidence and soft are all 0"),
    (lambda: StepConfig(compute_dtype="float16"), "compute_dtype is 'float16', expected float32 or bfloat16"),
    (lambda: TrainConfig("t", DSpark.Settings(taps=(0,)), Path("o"), target_dtype="int8"), "target_dtype is 'int8'")])
def test_other_values_than_the_listed(make, part):
  """Kills: a choice that only the command line checks: one in an experiment file would go through; a run that learns
  nothing, or climbs, and ends well (a clip of 0, which others take for none)."""
  with complains(part):
    make()


# The experiments of configs/


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_experiment_fits_its_target(path):
  """Kills: taps of another size of target, a mask token that it does not have, rows that do not divide, more positions
  than it has: what would be found after its weights were fetched."""
  found = runpy.run_path(str(path))["config"]
  several = isinstance(found, CompareConfig)
  base, about = found.base if several else found, target_config(found.base.target if several else found.target)
  for drafter, _ in found.drafters.values() if several else [(found.drafter, None)]:
    config = train.drafter_config(drafter, about)
    assert config.taps == drafter.taps and config.vocab_size == about.vocab_size
  train.check_rows(base)
  assert base.row_length <= about.max_positions


@pytest.mark.parametrize("size, taps", [("4B", (1, 9, 17, 25, 33)), ("8B", (1, 9, 17, 25, 33)),
                                        ("14B", (1, 10, 19, 28, 37))])
def test_the_reference_s_recipes(size, taps):
  """Kills: a copy of the recipe that lost a setting; a DFlash with a sequential head, an Eagle3 on DSpark's loss."""
  stem = f"qwen3_{size.lower()}"
  found = {kind: read_config(str(ROOT / "configs" / f"{stem}{kind}.py")) for kind in ("", "_dflash", "_eagle3")}
  for kind, config in found.items():
    assert config.out.name == stem + kind and config.target == f"Qwen/Qwen3-{size}" and config.drafter.taps == taps
    assert (config.epochs, config.batch, config.row_length, config.anchors) == (10, 512, 4096, 512)
    assert config.optimizer == OptimizerConfig("adamw", 6e-4, 0.04, 0.0, 1.0) and config.drafter.block_size == 7
  dspark, dflash, eagle3 = found.values()
  assert (dspark.loss, dflash.loss, eagle3.loss) == (LossConfig(0.1, 0.9, 1.0, decay=4.0), DFLASH, EAGLE3)
  assert (dspark.drafter.num_layers, dspark.drafter.markov_rank, dspark.drafter.confidence) == (5, 256, "markov")
  assert dflash.drafter == dataclasses.replace(dspark.drafter, markov_rank=0, confidence="none")
  assert eagle3.drafter == Eagle3.Settings(taps=taps)


def test_how_long_a_run_is():
  """Kills: minutes that win over epochs, epochs over steps; a last epoch that is cut; no step at all of few rows; steps
  counted by the time of the first ones where later ones take another."""
  of = lambda rows=30, **how: TrainConfig("t", MTP.Settings(), Path("o"), batch=8, **how).steps_over(rows)
  assert of(minutes=3) is None and of(epochs=10, minutes=3) == 38 and of(steps=4, epochs=10, minutes=3) == 4
  assert of(epochs=0.5) == 2 and of(epochs=1, rows=1) == 1 and of(epochs=0.3, rows=80) == 3
  for name in ("epochs", "minutes"):
    for wrong in (0, -1, float("nan"), float("inf")):
      with complains(f"{name} is {wrong}, expected more than 0, and finite"):
        of(**{name: wrong})
  for how in (dict(lengths=(256,)), dict(features="memory")):
    assert of(minutes=3, epochs=1, **how) == 4
    with complains("give steps or epochs"):
      of(minutes=3, **how)
  with complains("memory_gb is nan"):
    of(memory_gb=float("nan"))
  for how in (dict(epochs=1e9, rows=1000), dict(steps=2 ** 31)):
    with complains("than an int32 counts"):
      of(**how)


# On the command line


def parsed(*args):
  return tyro.cli(TrainConfig, default=read_config(str(DEMO)), args=[*args, "--steps", "3"])


def test_one_kind_of_the_union():
  """Kills: flags that ask for a subcommand first; a kind's flags for another kind; a kind that stays the file's."""
  demo = read_config(str(DEMO))
  assert parsed("--drafter.block-size", "5", "--drafter.no-lens") == dataclasses.replace(
      demo, steps=3, drafter=dataclasses.replace(demo.drafter, block_size=5, lens=False))
  assert parsed("drafter:dspark", "--drafter.markov-head", "gated", "--drafter.no-from-bigrams").drafter == \
      dataclasses.replace(demo.drafter, markov_head="gated", from_bigrams=False)
  assert parsed("drafter:eagle3", "--drafter.taps", "1", "2") == dataclasses.replace(
      demo, steps=3, drafter=Eagle3.Settings(taps=(1, 2)))
  assert parsed("drafter:mtp", "--drafter.from-target").drafter == MTP.Settings(from_target=True)


@pytest.mark.parametrize("args, parts", [
    (["--drafter.markov-head", "nonsense"], ["'nonsense'", "vanilla", "gated", "rnn"]),
    (["--drafter.confidence", "both"], ["'both'", "hidden"]), (["--loss.per", "token"], ["'token'", "positions"]),
    (["--optimizer.name", "sgd"], ["'sgd'", "muon"]), (["--compute-dtype", "float16"], ["'float16'", "bfloat16"]),
    (["drafter:eagle3", "--drafter.taps", "1", "--drafter.num-layers", "5"], ["--drafter.num-layers"]),
    (["drafter:mtp", "--drafter.lens"], ["--drafter.lens"]), (["drafter:eagle3"], ["--drafter.taps", "required"]),
    (["--drafter.kind", "eagle3"], ["'eagle3'", "dspark"]), (["drafter:medusa"], ["drafter:medusa"])])
def test_refused_on_the_command_line(args, parts, capsys):
  """Kills: a value or a flag that the kind does not have, taken without a word."""
  with pytest.raises(SystemExit) as exit_:
    parsed(*args)
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and all(part in err for part in parts), err


def test_help_shows_the_kinds_and_their_choices(capsys):
  """Kills: a union that hides the flags of the experiment's own kind, or the values that a flag takes."""
  with pytest.raises(SystemExit):
    parsed("--help")
  out = capsys.readouterr().out
  for part in (*(f"drafter:{kind}" for kind in DRAFTERS), "--drafter.block-size", "{vanilla,gated,rnn}", "{adamw,muon}",
               "{float32,bfloat16}", "{slots,positions}", "{none,hidden,markov}"):
    assert part in out, part


# Records of runs


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_run_of_before_goes_on(kind, tmp_path):
  """Kills: a record that must have the newest keys, so that a run stopped yesterday is another's today; a record of a
  drafter that is not compared any more."""
  mine = dict(taps=(0, 1), block_size=3, draft_vocab_size=64, from_target=True)
  mine |= dict(num_layers=1, markov_rank=8) if kind == "dspark" else {}
  before = dict(taps=[0, 1], mask_token_id=0, kind=kind, num_layers=1, block_size=3, markov_head="vanilla",
                markov_rank=8 if kind == "dspark" else 0, confidence="markov", sample_from_anchor=True, lens=False,
                draft_vocab_size=64, from_target=True, from_bigrams=False)  # one form for every kind
  record = train.describe(TrainConfig("t", DRAFTERS[kind].Settings(**mine), tmp_path, steps=4)) | {"data": "abc"}
  assert "temperatures" not in record["config"]["loss"]  # which are compared one by one

  def known(drafter):
    run = record | {"config": record["config"] | {"drafter": drafter}, "total_steps": 4}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return train.begun(tmp_path, record | {"target": "t", "layout": "l"})

  assert known(before)["total_steps"] == known(record["config"]["drafter"])["total_steps"] == 4
  for change in (dict(block_size=4), dict(kind="other"), dict(from_target=False), dict(taps=[0])):
    with complains("holds a run with other settings (drafter."):
      known(before | change)
  known(before)  # where its target lies is all that it says of it
  with complains("holds a run with other settings (target was t, is other)"):
    train.begun(tmp_path, record | {"config": record["config"] | {"target": "other"}, "target": "t", "layout": "l"})
  for damaged in (None, []):
    with complains("holds a run with other settings (drafter was"):
      known(damaged)
  with complains("holds a run with other settings (drafter."):
    known({})
