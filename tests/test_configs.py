"""Configurations of drafters: one per kind, what is refused, what stored files and the command line hold them to."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import dspark_jax
from dspark_jax.checkpoints import hf
from dspark_jax.loading import drafter_id, target_id
from folders import assert_same_weights
from test_drafters import small_drafter
from test_targets import small_target

TARGET_ID = "b45cec58c80640a4"
SPEC = dict(hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=6, rms_norm_eps=1e-06,
            rope_theta=100.0, qk_norm=True)
SIDECARS = {  # the configurations that drafter.json held when there was one class for DSpark and one for the others
  "vanilla": dict(spec=SPEC, num_layers=2, vocab_size=12, num_target_layers=2, taps=[-1, 0], mask_token_id=11, block_size=3,
                  markov_rank=4, markov_head="vanilla", confidence="markov", sample_from_anchor=True, lens=False,
                  draft_vocab_size=0),
  "words": dict(spec=SPEC, num_layers=2, vocab_size=12, num_target_layers=2, taps=[-1, 0], mask_token_id=11, block_size=3,
                markov_rank=4, markov_head="vanilla", confidence="markov", sample_from_anchor=True, lens=False,
                draft_vocab_size=6),
  "eagle3": dict(spec=SPEC, vocab_size=12, num_target_layers=2, taps=[-1, 0], block_size=3, draft_vocab_size=0),
  "mtp": dict(spec=SPEC, vocab_size=12, num_target_layers=2, taps=[-1, 0], block_size=3, draft_vocab_size=0)}


def exact(module):
  """The module with weights that every machine and every version of NumPy make alike."""
  for variable in hf.names(module).values():
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


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_stored_drafter_stays_readable(kind, tmp_path):
  """Kills: keys of drafter.json that change their names with the classes, or that only the newest version reads."""
  target = exact(small_target("qwen3"))
  drafter = small_drafter(target, kind)
  dspark_jax.save_drafter(tmp_path, drafter, target)
  file = tmp_path / "drafter.json"
  sidecar = json.loads(file.read_text())
  assert sidecar["config"] == SIDECARS[kind]
  file.write_text(json.dumps({"format": 1, "drafter": sidecar["drafter"], "config": SIDECARS[kind], "target": TARGET_ID,
                              "imported": None}))
  again = dspark_jax.load_drafter(tmp_path, target)
  assert again.config == drafter.config
  assert_same_weights(again, drafter)
