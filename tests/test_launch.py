"""The recipes in train/launch: what each host would be told, and what happens when it stops. No cluster, fake tools."""

import math
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tyro
import yaml

from dspark_jax.programs import hosts, shell
from train.config import TrainConfig, read_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "train" / "launch"
WORDS = ["--config", "configs/qwen3_4b.py", "--data", "/shared/rows", "--out", "/shared/a run"]
HOST = ["bash", "train/launch/host.sh"]
DONE, MISTAKE, STOPPED = 0, 2, 143
FOREVER = "while :; do sleep 0.1; done"


def tool(folder: Path, name: str, script: str) -> None:
  """A program of this name, first on PATH, that notes its words in NAME.log, a line a call."""
  folder.mkdir(exist_ok=True)
  # In one piece: two of them may write at a time.
  noted = f'line=$(printf "%q " "$@")\necho "$line" >> "{folder}/{name}.log"'
  (folder / name).write_text(f"#!/usr/bin/env bash\n{noted}\n{script}\n")
  (folder / name).chmod(0o755)


def calls(folder: Path, name: str) -> list[list[str]]:
  log = folder / f"{name}.log"
  return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def start(tools: Path, *words, **environment) -> subprocess.Popen:
  env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tools), "TMPDIR": str(tools)} | environment
  return subprocess.Popen(["bash", *map(str, words)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True)


def run(tools: Path, *words, **environment) -> tuple[int, str]:
  """(exit code, all that was said)"""
  with start(tools, *words, **environment) as process:
    out, err = process.communicate(timeout=30)
  return process.returncode, out + err


def until(condition) -> None:
  began = time.monotonic()
  while not condition():
    assert time.monotonic() - began < 20
    time.sleep(0.02)


def is_the_command(words: list[str]) -> None:
  """The same on every host, apart from which one it is, and one that train.train would take."""
  assert words[1:3] == ["-m", "train.train"] and "python" in words[0]
  words = words[3:]
  taken = ["--config"] + [word for word in words if word.startswith("--hosts.") and not hasattr(TrainConfig, "hosts")]
  path = words[words.index("--config") + 1]
  for word in taken:
    at = words.index(word)
    words = words[:at] + words[at + 2:]
  config = tyro.cli(TrainConfig, default=read_config(ROOT / path), args=words)
  shell.check_paths(config)
  assert config.mesh.fsdp == -1 and len(config.data) == 1 and "run" in str(config.out)


@pytest.mark.parametrize("recipe, devices", [("slurm.sh", 4 * 8), ("xpk.sh", 16), ("jobset.yaml", 4 * 4),
                                             ("ssh.sh", 2 * 8)])
def test_the_rows_of_an_example_divide(recipe, devices):
  """Kills: an example that every host refuses, 512 rows being too few for 64 microbatches of so many devices."""
  words = (LAUNCH / recipe).read_text().replace("\\\n#", " ").translate(str.maketrans('[],"', "    ")).split()
  after = lambda option: words[words.index(option) + 1]
  config = read_config(ROOT / after("--config"))
  assert config.batch % (int(after("--microbatches")) * devices) == 0


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts(script):
  """Kills: a recipe that does not parse, or does not say how to use it."""
  subprocess.run(["bash", "-n", script], check=True)
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n# ") and f"train/launch/{script.name}" in text
  assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) <= 60


# host.sh


@pytest.mark.parametrize("code", [DONE, 1, MISTAKE, 134])
def test_exit_codes_are_the_programs_own(code, tmp_path):
  """Kills: a crash, or a mistake, that looks like success to a scheduler."""
  assert run(tmp_path, LAUNCH / "host.sh", "bash", "-c", f"exit {code}")[0] == code


@pytest.mark.parametrize("code, seen", [(DONE, STOPPED), (1, 1)])
def test_stopped_is_not_done(code, seen, tmp_path):
  """Kills: a preempted run (exit 0, state saved) that its scheduler takes for finished; a state that is cut off by its
  own parent; a crash while saving that is called saved."""
  saves = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit {code}' TERM; touch {tmp_path}/begun; {FOREVER}"
  process = start(tmp_path, LAUNCH / "host.sh", "bash", "-c", saves)
  until((tmp_path / "begun").exists)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)  # schedulers repeat themselves
  assert process.wait(20) == seen and (tmp_path / "saved").exists()


def test_what_a_lost_connection_left_is_stopped_first(tmp_path):
  """Kills: two processes of one host in one run folder."""
  log = tmp_path / "log"
  script = f"echo $1 >> {log}; trap 'echo end $1 >> {log}; exit 0' TERM; [ $1 = new ] || {FOREVER}"
  pid = {"DSPARK_PID": str(tmp_path / "pid")}
  old = start(tmp_path, LAUNCH / "host.sh", "bash", "-c", script, "x", "old", **pid)
  until(log.exists)
  assert run(tmp_path, LAUNCH / "host.sh", "bash", "-c", script, "x", "new", **pid)[0] == DONE
  assert old.wait(20) == STOPPED and log.read_text().splitlines() == ["old", "end old", "new"]
  assert not (tmp_path / "pid").exists()


# slurm.sh


@pytest.mark.parametrize("code, restarts, left, requeued", [
  (DONE, 0, DONE, False), (MISTAKE, 0, MISTAKE, False), (STOPPED, 0, DONE, True), (134, 7, DONE, True),
  (134, 100, 134, False)])
def test_slurm(code, restarts, left, requeued, tmp_path):
  """Kills: a finished or mistaken job that is queued for ever, a preempted or crashed one that is not; words that are
  lost or split on the way; processes of one core each, as srun reads no option of sbatch."""
  tool(tmp_path, "srun", f"echo $SRUN_CPUS_PER_TASK > {tmp_path}/cores; exit {code}")
  tool(tmp_path, "scontrol", "")
  got, said = run(tmp_path, LAUNCH / "slurm.sh", *WORDS, SLURM_JOB_ID="77", SLURM_JOB_NODELIST="n[1-2]",
                  SLURM_RESTART_COUNT=str(restarts), SLURM_CPUS_PER_TASK="12", PYTHON="python")
  assert got == left and (tmp_path / "cores").read_text() == "12\n", said
  assert calls(tmp_path, "scontrol") == ([["requeue", "77"]] if requeued else [])
  (words,) = calls(tmp_path, "srun")
  at = words.index("bash")
  assert words[at:at + 2] == HOST and words[at + 2:] == ["python", "-m", "train.train", "--mesh.fsdp", "-1", *WORDS]
  is_the_command(words[at + 2:])
  assert "--kill-on-bad-exit=0" in words[:at] and "restart 7" in said or restarts != 7


def test_slurm_asks_for_what_it_needs():
  """Kills: SIGTERM to the script (B:) instead of the processes; a job that is not requeued, or whose log is emptied; a
  process that sees one GPU and takes the fourth."""
  lines = (LAUNCH / "slurm.sh").read_text().splitlines()
  asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
  assert asked["signal"].startswith("TERM@") and "requeue" in asked and asked["open-mode"] == "append"
  assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked
  # Slurm reads no option after the first command.
  first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
  assert all(n < first for n, line in enumerate(lines) if line.startswith("#SBATCH"))


# ssh.sh


def ssh(tmp_path: Path, script: str) -> dict[str, str]:
  """An ssh that runs here, and a python that does `script` with HOST set; the environment that uses them."""
  tool(tmp_path, "ssh", 'export HOST="${@: -2:1}"; exec bash -c "${@: -1}"')
  tool(tmp_path, "python", script)
  return {"PYTHON": "python", "PAUSE": "0", "PORT": "8000"}


def test_ssh_starts_all_again(tmp_path):
  """Kills: hosts that are told the same number, or another coordinator; a host that goes on alone after another died;
  words that lose their quotes on the way; a compilation cache that is not passed on."""
  how = ssh(tmp_path, f'echo "$JAX_COMPILATION_CACHE_DIR" >> {tmp_path}/cache\n'
                      f'[ $HOST = h1 ] || [ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; exit 134; }}')
  code, said = run(tmp_path, LAUNCH / "ssh.sh", "h1 h2", *WORDS, JAX_COMPILATION_CACHE_DIR="/c d", **how)
  assert code == DONE and "exit 134: starting all hosts again" in said, said
  asked = calls(tmp_path, "python")
  assert len(asked) == 4
  for number in (0, 1):
    words = ["-m", "train.train", "--mesh.fsdp", "-1", "--hosts.coordinator", "h1:8000", "--hosts.processes", "2",
             "--hosts.process", str(number), *WORDS]
    assert asked.count(words) == 2
    is_the_command(["python", *words])
  assert (tmp_path / "cache").read_text() == "/c d\n" * 4


@pytest.mark.parametrize("codes, left, times", [((2, 134), MISTAKE, 1), ((134, 2), MISTAKE, 1), ((1, 1), 1, 3)])
def test_ssh_gives_up(codes, left, times, tmp_path):
  """Kills: a mistake in the input that is tried a hundred times, or that another host's crash hides; tries without
  end."""
  how = ssh(tmp_path, f"[ $HOST = h1 ] && exit {codes[0]}; exit {codes[1]}")
  assert run(tmp_path, LAUNCH / "ssh.sh", "h1 h2", *WORDS, MAX_RESTARTS="2", **how)[0] == left
  assert len(calls(tmp_path, "python")) == 2 * times


def test_ssh_passes_sigterm_on(tmp_path):
  """Kills: hosts that go on, or lose their state, when the script is stopped."""
  how = ssh(tmp_path, f"trap 'touch {tmp_path}/saved-$HOST; exit 0' TERM; touch {tmp_path}/begun-$HOST\n{FOREVER}")
  process = start(tmp_path, LAUNCH / "ssh.sh", "h1 h2", *WORDS, **how)
  until(lambda: all((tmp_path / f"begun-h{n}").exists() for n in (1, 2)))
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == STOPPED and all((tmp_path / f"saved-h{n}").exists() for n in (1, 2))
  assert len(calls(tmp_path, "python")) == 2


def test_ssh_is_stopped_between_two_starts(tmp_path):
  """Kills: hosts that are all started again after a SIGTERM that came in the pause."""
  how = ssh(tmp_path, "exit 134") | {"PAUSE": "1"}
  process = start(tmp_path, LAUNCH / "ssh.sh", "h1 h2", *WORDS, **how)
  while "starting all hosts again" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == STOPPED and len(calls(tmp_path, "python")) == 2


# TPUs


@pytest.mark.parametrize("given, cache", [({}, "/shared/xla-cache"), ({"JAX_COMPILATION_CACHE_DIR": "/c"}, "/c")])
def test_xpk(given, cache, tmp_path):
  """Kills: a workload that is not restarted, as after the death of one host, which ends the others in their own way;
  one whose command is another than on other clusters; a cache in a bucket that the image cannot read."""
  tool(tmp_path, "xpk", "")
  how = {"CLUSTER": "c", "IMAGE": "i:1"} | given
  assert run(tmp_path, LAUNCH / "xpk.sh", "name", *WORDS, **how)[0] == DONE
  (words,) = calls(tmp_path, "xpk")
  assert words[:2] == ["workload", "create"] and len(words) % 2 == 0
  flags = dict(zip(words[2::2], words[3::2]))
  assert flags["--docker-image"] == "i:1" and int(flags["--max-restarts"]) > 10
  again = set(map(int, flags["--restart-on-exit-codes"].split(",")))
  assert {1, hosts.AGAIN} <= again and MISTAKE not in again
  assert flags["--env"] == f"JAX_COMPILATION_CACHE_DIR={cache}"
  command = shlex.split(flags["--command"])
  assert command[:2] == HOST and command[-len(WORDS):] == WORDS
  is_the_command(command[2:])


def test_jobset():
  """Kills: a JobSet that restarts one host alone, tries a mistake again and again, or takes a preemption for the end;
  hosts or chips that do not make up the slice; a policy for a container that is not there; a cache that is not used."""
  found = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert found["metadata"]["annotations"] == {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  policy = found["spec"]["failurePolicy"]
  assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
  assert policy["maxRestarts"] >= 100
  (slices,) = found["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
  assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {
      "containerName": container["name"], "operator": "In", "values": [MISTAKE]}}]
  assert container["command"] == HOST and all(isinstance(word, str) for word in container["args"])
  is_the_command(container["args"])
  # JAX reads gs:// by gcsfs, which no extra of ours installs, and goes without a cache where it cannot.
  (cache,), (mount,) = container["env"], container["volumeMounts"]
  assert cache["name"] == "JAX_COMPILATION_CACHE_DIR" and cache["value"].startswith(f"{mount['mountPath']}/")
