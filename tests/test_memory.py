"""infer.memory with a small model and the CPU's compiler in place of Qwen3-4B and the TPU's."""

import json
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from dspark_jax.drafters.dspark import DSparkConfig
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.programs import shell
from dspark_jax.targets.decoder import TargetConfig
from infer import memory

SPEC = BlockSpec(16, 32, 2, 1, 8, 1e-6, 1e4, qk_norm=True)
DRAFTER = DSparkConfig(spec=SPEC, num_layers=2, vocab_size=200, num_target_layers=4, taps=(0, 2), mask_token_id=199,
                       block_size=3, markov_rank=4)
# q, k and v, o, the MLP, the norms of heads and rows
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32 + 2 * 8 + 2 * 16
TARGET_WEIGHTS = 4 * LAYER + 200 * 16 + 16                              # layers, tied embedding, final norm
TRAINED = 2 * LAYER + 2 * 16 * 16 + 2 * 16 + 2 * 200 * 4 + 16 + 4 + 1  # layers, fc, two norms, both factors, confidence


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(memory, "TARGET", TargetConfig("qwen3", SPEC, 4, 200, True, 4096))
  monkeypatch.setattr(memory, "DRAFTER", DRAFTER)
  monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: SimpleNamespace(devices=jax.devices()[:1]))


def test_what_is_counted(small, capsys):
  """Kills: a program of another shape than the one that runs (too few or other arguments do not compile), weights in
  another precision, frozen parameters among the gradients, a cache that is not counted, gigabytes of 2^30."""
  shell.run(memory.main, memory.Settings, args="--tokens 64 --anchors 4 --chunk 8 --rows 2 --new-tokens 100".split())
  out = json.loads(capsys.readouterr().out.splitlines()[-1])
  plain, speculative, step = out["plain_decoding"], out["speculative_decoding"], out["training_step"]
  assert step["gradients_gb"] == pytest.approx(4 * TRAINED / 1e9)
  assert plain["arguments_gb"] == pytest.approx((2 * TARGET_WEIGHTS + 2 * 128 * 4) / 1e9, rel=0.02)
  assert step["arguments_gb"] > (2 * TARGET_WEIGHTS + 3 * 4 * TRAINED) / 1e9
  slots = 256  # 128 of the prompt, 100 new ones, a round or two beyond; in buckets
  per_layer = 2 * 2 * 8 * slots  # keys and values of two rows of one head of 8
  assert plain["caches_gb"] == pytest.approx(4 * per_layer * 2 / 1e9, rel=0.05)
  assert speculative["caches_gb"] == pytest.approx((4 + 2) * per_layer * 2 / 1e9, rel=0.05)
  for row in (plain, speculative):
    assert row["temporaries_beyond_caches_gb"] == row["temporaries_gb"] - row["caches_gb"] and row["temporaries_gb"] > 0


def test_a_topology_that_is_not_there(monkeypatch, capsys):
  """Kills: a traceback where the TPU compiler is missing or knows no such topology."""
  def none(**_):
    raise RuntimeError("no such thing")
  monkeypatch.setattr(topologies, "get_topology_desc", none)
  with pytest.raises(SystemExit) as exit_:
    shell.run(memory.main, memory.Settings, args=["--topology", "v9z:1"])
  err = capsys.readouterr().err
  assert exit_.value.code == 2 and "no TPU compiler for v9z:1 (no such thing)" in err and "Traceback" not in err
