"""Several processes that train together on this machine: the same numbers, ends with a sentence, runs that go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import dspark_jax
from dspark_jax.drafters import DSpark
from dspark_jax.nn.sharding import MeshConfig, rows_share
from dspark_jax.programs import hosts
from folders import LLAMA, complains, llama, with_tokenizer

ROOT = Path(dspark_jax.__file__).parents[1]
DEVICES = 4  # of all processes together, so that the mesh, and with it every sum, is the same
STEPS = 8
CONFIG = """
from pathlib import Path
from dspark_jax.drafters import DSpark
from train.config import TrainConfig
config = TrainConfig(target={target!r}, out=Path({out!r}), data=(Path({data!r}),), steps={steps}, batch=4, row_length=48,
                     anchors=4, save_every=3, log_every=1, drafter=DSpark.Settings(
                         taps=(0, 1), mask_token_id=130, num_layers=1, block_size=3, markov_rank=8, draft_vocab_size=64))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  with_tokenizer(LLAMA, folder / "target")
  rng = np.random.default_rng(0)
  rows = [{"tokens": rng.integers(5, 130, 40).tolist(), "loss_mask": [0] * 8 + [1] * 32} for _ in range(12)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def free_port() -> int:
  with socket.socket() as made:
    made.bind(("localhost", 0))
    return made.getsockname()[1]


def started(folder: Path, out: str, processes: int, *more, steps: int = STEPS, alone: int | None = None):
  """The processes of a training, or the one of them that is named."""
  config = folder / f"{out}.py"
  config.write_text(CONFIG.format(target=str(folder / "target"), out=str(folder / out), data=str(folder / "data.jsonl"),
                                  steps=steps))
  environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes), "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
  joined = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.processes", str(processes), "--hosts.silence",
            "8"] if processes > 1 else []
  command = [sys.executable, "-m", "train.train", "--config", str(config), "--mesh.data", "2", "--mesh.fsdp", "-1",
             *joined, *map(str, more)]
  one = lambda i: subprocess.Popen([*command, *(["--hosts.process", str(i)] if joined else [])], cwd=ROOT, text=True,
                                   env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  return [one(i) for i in (range(processes) if alone is None else [alone])]


def ended(running, timeout: float = 240) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each."""
  until = time.monotonic() + timeout
  try:
    texts = [p.communicate(timeout=max(until - time.monotonic(), 0.1)) for p in running]
  finally:
    for p in running:
      p.kill()
  return [(p.returncode, *text) for p, text in zip(running, texts)]


def log_of(out: Path) -> list[dict]:
  file = out / "metrics.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def losses(out: Path) -> dict[int, tuple]:
  return {r["step"]: (r["loss"], r["tau"], r["grad_norm"]) for r in log_of(out)}


def wait_for(out: Path, steps: int, running) -> None:
  until = time.monotonic() + 200
  while len(log_of(out)) < steps and time.monotonic() < until and all(p.poll() is None for p in running):
    time.sleep(0.01)
