"""Meshes of eight fake devices: the same numbers as on one, with every array where it belongs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.decoding.session import generate
from dspark_jax.drafters.dspark import DSparkChoices, DSparkConfig
from dspark_jax.loading import new_drafter
from dspark_jax.metrics import mean
from dspark_jax.nn.layers import BlockSpec, Linear
from dspark_jax.nn.parameters import parameters
from dspark_jax.nn.sharding import (AXES, NAMES, MeshConfig, constrain, local, made, place, place_rows, rows_here,
                                    shardings)
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import Decoder, TargetConfig, stack_layers
from dspark_jax.training import step as training
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import OptimizerConfig, StepConfig, init_state
from folders import complains
from test_drafters import KINDS, small_drafter
from test_targets import LAYOUTS, random_tokens
from test_training import QUICK, assert_same_step, batch_of

MESHES = {"data": MeshConfig(data=8), "fsdp": MeshConfig(fsdp=-1), "tensor": MeshConfig(tensor=4),
          "mixed": MeshConfig(2, 2, 2)}
SPEC = BlockSpec(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6,
                 rope_theta=1e4, qk_norm=True)
VOCABULARY = 64


@functools.cache
def target_of(tied=False):
  target = Decoder(TargetConfig("qwen3", SPEC, 4, VOCABULARY, tied, 64), rngs=nnx.Rngs(0))
  return jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, target)  # so large that context matters


@functools.cache
def drafter_of(kind):
  return small_drafter(target_of(), kind, num_layers=1)


@pytest.mark.parametrize("config, devices, sizes", [
    (MeshConfig(), 8, (1, 1, 1)), (MeshConfig(data=-1), 8, (8, 1, 1)), (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
    (MeshConfig(tensor=3), 8, (1, 1, 3))])
def test_sizes(config, devices, sizes):
  """Kills: -1 that forgets the other axes; a mesh that must use every device."""
  assert tuple(config.build(jax.devices()[:devices]).shape.values()) == sizes


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_sizes_that_mean_nothing(sizes):
  """Kills: a mesh of no devices, found when a model is loaded."""
  with pytest.raises(ValueError, match="expected numbers from 1"):
    MeshConfig(*sizes)


@pytest.mark.parametrize("config", [MeshConfig(data=16), MeshConfig(3, -1, 1), MeshConfig(9, -1, 1)])
def test_devices_that_do_not_fit(config):
  """Kills: devices that are left out without a word, and a reshape's error."""
  with pytest.raises(ValueError, match="there are 8 devices"):
    config.build()


@pytest.mark.parametrize("sizes, names", [((1,), ("x",)), ((2, 4), ("data", "model"))])
def test_meshes_of_other_axes(sizes, names):
  """Kills: KeyError 'data' from deep inside, for a mesh that a user has made."""
  uses = [lambda: place(target_of()), lambda: made(target_of.__wrapped__), lambda: local(8, "rows"),
          lambda: place_rows(np.ones(8)), lambda: generate(target_of(), None, [[1]], max_new_tokens=2),
          lambda: generate(target_of(), None, [[1]], max_new_tokens=2, budget=None)]
  with jax.set_mesh(jax.make_mesh(sizes, names)):
    for use in uses:
      with pytest.raises(ValueError, match=rf"has the axes \({names[0]!r},.*, expected data, fsdp and tensor: make it"):
        use()


class StandIn:
  """A device of another host; of one slice or several."""
  platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

  def __init__(self, number: int, process: int, slice_index: int = 0):
    self.id, self.process_index, self.slice_index = number, process, slice_index
    self.client = jax.devices()[0].client


def stand_ins(processes, sizes):
  """A mesh of devices that belong to these processes, in its order."""
  devices = np.array([StandIn(i, process) for i, process in enumerate(processes)]).reshape(sizes)
  return jax.sharding.Mesh(devices, NAMES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


V5E = [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0]  # by libtpu: make_mesh((1, 16, 1)) of a v5e:4x4


@pytest.mark.parametrize("processes, sizes", [
    ([0] * 4 + [1] * 4, (4, 1, 2)), ([0] * 4 + [1] * 4, (1, 1, 8)), ([0] * 4 + [1] * 4, (2, 1, 4)),
    ([0, 1, 0, 1], (2, 2, 1)), ([0, 1, 1, 2, 2, 0], (1, 3, 2)), (V5E, (1, 16, 1)), (V5E, (2, 4, 2))])
def test_every_order_of_hosts_makes_the_same_batch(processes, sizes, monkeypatch):
  """Kills: a pod's mesh that is refused, as a host's devices are no neighbours there; rows by the number of the
  process, which a device would take for other ones; different rows where `tensor` reaches over several hosts."""
  batch, placed = np.arange(3 * 48).reshape(48, 3), {}

  def spread(shape, sharding, part):
    assert shape == batch.shape
    where = sharding.devices_indices_map(shape)
    placed.update({d.id: (index, part(index)) for d, index in where.items() if d.process_index == jax.process_index()})
  monkeypatch.setattr(jax, "make_array_from_callback", spread)
  with jax.set_mesh(stand_ins(processes, sizes)):
    for process in set(processes):
      monkeypatch.setattr(jax, "process_index", lambda: process)
      place_rows(batch[rows_here(48)])
  assert sorted(placed) == list(range(len(processes)))
  for index, rows in placed.values():
    np.testing.assert_array_equal(rows, batch[index])
  assert {len(rows) for _, rows in placed.values()} == {48 // (sizes[0] * sizes[1])}


@pytest.mark.parametrize("slices, sizes, order", [
    ([0, 0, 1, 1], (1, 4, 1), [0, 1, 2, 3]), ([1, 1, 0, 0], (2, 2, 1), [2, 3, 0, 1]),
    ([0, 1, 2, 3], (2, 2, 1), [0, 1, 2, 3]), ([0, 1, 0, 1], (1, 2, 2), [0, 2, 1, 3]),
    ([0, 0, 0, 0, 1, 1, 1, 1], (2, 2, 2), list(range(8))), ([1, 0, 1, 0], (1, 1, 4), [1, 3, 0, 2]),
    ([0, 0, 0, 1], (1, 4, 1), [0, 1, 2, 3]), ([0, 1, 1, 2, 2, 0], (1, 3, 2), [0, 5, 1, 2, 3, 4])])
def test_meshes_over_slices(slices, sizes, order):
  """Kills: hosts with GPUs, each a slice to XLA, or TPU slices, of which no mesh can be made; `tensor`, which exchanges
  most, over the slow links between them where it need not be."""
  devices = [StandIn(i, process=one, slice_index=one) for i, one in enumerate(slices)]
  found = MeshConfig(*sizes).build(devices)
  assert tuple(found.shape.values()) == sizes and [d.id for d in found.devices.flat] == order
  assert found.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize("batch", [2, 6])
def test_rows_that_hosts_cannot_share(batch):
  """Kills: a process that gets no rows and waits for ever in the others' collectives."""
  with jax.set_mesh(stand_ins([0, 1, 2, 3], (4, 1, 1))), complains(f"batch is {batch}, expected a multiple of 4"):
    rows_here(batch)


def test_one_device_is_left_alone():
  """Kills: a constraint, and with it another program, where there is no mesh."""
  x = jnp.ones((4, 6))
  assert constrain(x, "rows", "heads") is x and local(6, "heads") == 6
  with jax.set_mesh(MeshConfig(2, 2, 2).build()):
    assert local(8, "rows") == 2 and local(6, "heads") == 3 and local(7, "rows") == 7


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_has_a_place(kind, family):
  """Kills: a weight that every device holds whole because nobody said where it is stored; an axis no table knows."""
  target = target_of()
  for model in (target, stack_layers(target), drafter_of(kind)):
    for name, variable in parameters(model).items():
      if name.endswith(("norm.weight", ".bias")):
        continue
      axes = variable.get_metadata().get("axes")
      assert axes and set(axes) <= set(AXES) and {"embed", "words"} & set(axes), name
    for _, module in nnx.iter_modules(model):
      assert not isinstance(module, Linear) or module.axes == module.weight.axes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_stores_its_part(layout):
  """Kills: weights that are placed whole, optimizer moments that are not placed like their weights."""
  target = LAYOUTS[layout](target_of())
  config = StepConfig(num_anchors=4, compute_dtype="float32")
  state = jax.eval_shape(lambda d: init_state(d, config, 0, total_steps=2), drafter_of("vanilla"))
  with jax.set_mesh(MeshConfig(1, 4, 2).build()):
    placed, of_state = place(target), shardings(state)
  for name, variable in parameters(placed).items():
    shard = variable[...].sharding.shard_shape(variable.shape)
    share = np.prod(variable.shape) / np.prod(shard)
    assert share == (1 if name.endswith("norm.weight") else 8), name
  moments = of_state.opt_state[1][0].mu
  for name, variable in parameters(of_state.drafter).items():
    assert moments[name] == variable.get_raw_value(), name
    assert name.endswith(("norm.weight", ".bias")) or moments[name].spec != jax.P(), name


@functools.cache
def trained(kind, mesh=None, **changes):
  """(state, metrics) after two steps on a batch of eight rows of two documents, on a mesh of MESHES."""
  every = kind in ("eagle3", "mtp")
  config = dataclasses.replace(StepConfig(
      num_anchors=4, compute_dtype="float32", loss=LossConfig(chunk=16, **(dict(ce=0.5, soft=0.5) if every else {})),
      optimizer=OptimizerConfig(learning_rate=0.01)), **changes)
  state, target = init_state(drafter_of(kind), config, 0, total_steps=9), stack_layers(target_of())
  batch = batch_of(0, vocabulary=VOCABULARY)
  batch.loss_mask[:2] = False  # devices count differently
  step = functools.partial(training.train_step, config=config)
  how = dict(donate_argnums=0, compiler_options=QUICK)
  if mesh is None:
    run = jax.jit(step, **how)
    return jax.device_get(run(run(state, target, batch)[0], target, batch))
  with jax.set_mesh(MESHES[mesh].build()):
    batch, state, target = place_rows(batch), place(state), place(target)
    run = jax.jit(step, out_shardings=(shardings(state), None), **how)
    return jax.device_get(run(run(state, target, batch)[0], target, batch))


@pytest.mark.slow
@pytest.mark.parametrize("kind, mesh, changes", [
    ("vanilla", "mixed", ()), *(pytest.param(*case, marks=pytest.mark.thorough) for case in (
        ("rnn", "fsdp", (("microbatches", 2),)), ("eagle3", "data", ()),
        ("dflash", "tensor", (("optimizer", OptimizerConfig("muon", 0.01)),))))])
def test_training_on_a_mesh(kind, mesh, changes):
  """Kills: devices' means averaged, a reduction left out, rows of one document on two devices, a part of a weight taken
  for the whole."""
  alone, spread = trained(kind, **dict(changes)), trained(kind, mesh, **dict(changes))
  np.testing.assert_allclose(mean(spread[1]["loss"]), mean(alone[1]["loss"]), rtol=1e-5)
  assert_same_step(spread, alone)


@functools.cache
def said(kind, mesh=None, **settings):
  """Texts of four prompts, on a mesh of MESHES, with layers scanned."""
  prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8, 3)]
  models = [stack_layers(target_of()), None if kind == "plain" else drafter_of(kind)]
  if mesh is None:
    return generate(*models, prompts, max_new_tokens=12, **settings)
  with jax.set_mesh(MESHES[mesh].build()):
    return generate(*place(models), prompts, max_new_tokens=12, **settings)


SAMPLED = (("temperature", 0.9), ("top_k", 20), ("top_p", 0.9))


@pytest.mark.slow
@pytest.mark.parametrize("kind, mesh, settings", [
    ("plain", "tensor", ()), ("vanilla", "mixed", SAMPLED), *(
        pytest.param(*case, marks=pytest.mark.thorough) for case in (
            ("eagle3", "tensor", SAMPLED), ("vanilla", "fsdp", ())))])
def test_text_on_a_mesh(kind, mesh, settings):
  """Kills: heads or words of one device only, random numbers that depend on the mesh, rows that are exchanged."""
  alone, spread = said(kind, **dict(settings)), said(kind, mesh, **dict(settings))
  assert spread.tokens == alone.tokens and spread.n_accept == alone.n_accept
  assert any(map(any, alone.n_accept)) or kind == "plain"


@pytest.mark.slow
def test_what_is_made_is_born_in_parts():
  """Kills: a drafter, or its optimizer's state, that is made whole on one device before it is divided; one whose shapes
  cannot be asked for on a mesh."""
  config = DSparkConfig.for_target(DSparkChoices(taps=(0, 1), mask_token_id=VOCABULARY - 1), target_of().config)
  begin = functools.partial(init_state, config=StepConfig(), seed=0, total_steps=2)
  with MeshConfig(fsdp=8).use():
    drafter = new_drafter(config)
    shapes, state = jax.eval_shape(lambda: new_drafter(config)), made(begin, drafter)
    where = shardings(state)
  assert jax.tree.structure(shapes) == jax.tree.structure(drafter)
  assert drafter.fc.weight[...].addressable_shards[0].data.size == drafter.fc.weight.size // 8
  assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(where)))
