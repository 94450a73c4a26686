"""Mistakes on command lines that are seen at once, in a sentence, and results that nobody takes."""

import subprocess
import sys
from pathlib import Path

import pytest

import dspark_jax
from dspark_jax.decoding import dispatch
from dspark_jax.decoding.engine import EngineConfig
from dspark_jax.nn.attention import Kernels
from dspark_jax.programs import shell
from folders import complains
from infer import evaluate, generate, serve
from train import answers, calibrate, prepare
from train.config import TrainConfig, read_config

PRINTS = """
import dataclasses
from dspark_jax.programs import shell
@dataclasses.dataclass
class Settings:
  pass
shell.run(lambda _: {"x": 1}, Settings, args=[])
"""


@pytest.mark.parametrize("change, part", [
  ({"seed": -1}, "seed is -1, expected 0 to 4294967295"), ({"seed": 2 ** 32}, "seed is 4294967296"),
  ({"batch": 10 ** 11}, "batch is 100000000000, expected 1 to 16,777,216"), ({"anchors": 10 ** 11}, "anchors is"),
  ({"row_length": 2 ** 31}, "row_length is"), ({"diverged_at": float("nan")}, "diverged_at is nan"),
  ({"diverged_at": 0.0}, "diverged_at is 0.0, expected more than 0")])
def test_training_settings_that_mean_nothing(change, part):
  """Kills: healthy data blamed for a limit that is no number; a mistake that shows as a traceback after loading."""
  with complains(part):
    TrainConfig("t", dspark_jax.drafters.DSpark.Settings(taps=(0,)), Path("x"), steps=1, **change)


@pytest.mark.parametrize("text, part", [("config = 1 +", "SyntaxError"), ("import nothing_of_this_name", "ModuleNot"),
                                        ("config = x", "NameError")])
def test_an_experiment_that_is_no_program(text, part, tmp_path):
  """Kills: a traceback for a slip in a file of settings."""
  (tmp_path / "c.py").write_text(text)
  with complains("c.py", part, "correct the file"):
    read_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize("kernels, part", [(Kernels("triton"), "decode is triton, which runs on a gpu"),
                                           (Kernels("pallas"), "decode is pallas, which runs on a tpu"),
                                           (Kernels("reference", "splash"), "train is splash")])
def test_kernels_of_other_machines(kernels, part):
  """Kills: a compiler's sentence, after a model was loaded, for a kernel that this machine cannot run."""
  with complains(part, "this is a cpu"):
    shell.load_target("not there", "float32", kernels)
  shell.check_kernels(Kernels(kernels.decode, kernels.train, interpret=True))


def test_drafters_that_are_not_there(tmp_path):
  """Kills: a slip in a drafter's path that is seen once a target of many gigabytes was read."""
  (tmp_path / "rows").mkdir()
  for name, part in (("nope", "nope does not exist: expected a folder with"), ("rows", "rows is no drafter")):
    path = str(tmp_path / name)
    with complains(part, "or none"):
      shell.check_drafter(path, "none")
    for program, settings in (
        (generate, generate.Settings("t", path, prompt="a")), (serve, serve.Settings(target="t", drafter=path)),
        (evaluate, evaluate.Settings(targets=("t",), drafters=(path,), out=tmp_path / "out"))):
      with complains(part):
        program.main(settings)
  shell.check_drafter("none", "none")


def test_questions_of_nothing(tmp_path):
  """Kills: a success without an answer, whose record refuses the next questions."""
  (tmp_path / "q.jsonl").write_text("\n")
  with complains("q.jsonl holds no question"):
    answers.main(answers.Settings("not there", questions=tmp_path / "q.jsonl", out=tmp_path / "a.jsonl"))
  assert not (tmp_path / "a.jsonl.run.json").exists()


def test_sizes_that_are_none(tmp_path):
  """Kills: an overflow after all data were read; hundreds of gigabytes for seats that no text could fill; a policy of
  drafts that is served without any."""
  with complains("row_length is 1099511627776, expected at most"):
    prepare.main(prepare.Settings("t", (tmp_path / "x",), tmp_path / "rows", row_length=2 ** 40))
  with complains("capacity is 1000000, expected at most 16384", "8192 positions"):
    dispatch.check(EngineConfig(capacity=10 ** 6, policy="plain"), None, None, measured=False, positions=8192)
  dispatch.check(EngineConfig(policy="plain"), None, None, measured=False, positions=512)
  with complains("seed is 4294967290, expected 0 to 4294967040 with 256 samples"):
    calibrate.check(calibrate.Settings("t", tmp_path, seed=4294967290, samples=256))
  with complains("the policy is fixed", "there is no drafter"):
    serve.main(serve.Settings(target="t", drafter="none", policy="fixed"))


@pytest.mark.parametrize("out, code, said", [("full", 2, "its result cannot be written"), ("closed", 141, "")])
def test_a_result_that_nobody_takes(out, code, said):
  """Kills: a traceback at the end of hours of work, for a full disk or a pipe into head."""
  with subprocess.Popen([sys.executable, "-c", PRINTS], stderr=subprocess.PIPE, text=True, stdout=(
      open("/dev/full", "w") if out == "full" else subprocess.PIPE), cwd=Path(dspark_jax.__file__).parents[1]) as run:
    if out == "closed":
      run.stdout.close()
    err = run.stderr.read()
  assert run.returncode == code and said in err and "Traceback" not in err, err
