"""Compile a decode step for a machine that is not there, and see what it moves, computes and needs.

When to use it: before an accelerator is booked, to see that a model, a batch and a capacity fit; and after a change, to
see what it did to the program that serves. Needs `make tpu-compiler`, or `make gpu-compiler`. Nothing is run and no
weights exist: the models are published sizes, or any config.json, with a fresh DSpark drafter, in bfloat16.

    python -m infer.compile --model qwen3-8b --topology v5p:2x2x1 --batch 8 --capacity 2048
    python -m infer.compile --model config.json --topology v6e:1x1 --batch 1 --sampling truncated --programs round
    python -m infer.compile --model qwen3-14b --topology v5e:2x4 --batch 32 --mesh.tensor 8
    python -m infer.compile --model qwen3-4b --topology h100:1 --programs plain round

Programs: `plain` is a step without a drafter, `round` a whole round in which every draft is verified; `draft` and
`verify` are the two parts that a round has. Rows are donated where they change.

The floor is what a program cannot but move: every weight that all rows share and every cache slot, read once, and the
new rows, written once (`floors`). All rows are live with all slots of `capacity`, because the reference attention reads
them all, whatever a row's length; of the kernel, pallas, the cost of full rows is told. On a mesh all numbers are those
of one device, the floor that of its shards. moved / floor near 1 means that nothing is copied, padded or read twice;
useful / compiled flops, that products run on no more rows than there are.

The last line of stdout is a JSON object with the key programs: for each of them bytes, floor_bytes, over_floor,
temporary_bytes, peak_bytes, cycles (the compiler's estimate; kernels and copies have none), compiled_flops,
useful_flops, collectives (bytes by kind) and most (the operations that move most, with file and line), of one device;
and fits, whether all of them do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.decoding import session
from dspark_jax.decoding.generate import start
from dspark_jax.decoding.policy import All
from dspark_jax.decoding.round import Models, Rows, play
from dspark_jax.drafters.dspark import DSpark, DSparkChoices, DSparkConfig
from dspark_jax.loading import target_config
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.cache import row_shardings
from dspark_jax.nn.sharding import MeshConfig, sharding_of, shardings
from dspark_jax.programs import compiled, shell
from dspark_jax.programs.compilers import absent_devices, chip_of
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import TargetConfig, scans, stack_layers
from dspark_jax.types import Committed, Proposal

# One row's settings of each kind of sampling; which numbers they are changes no program.
SAMPLING = {"greedy": {}, "full": dict(temperature=1.0), "truncated": dict(temperature=0.6, top_k=20, top_p=0.95)}
Program = Literal["plain", "draft", "verify", "round"]


@dataclasses.dataclass
class Settings:
  model: str
  """qwen3-4b, qwen3-8b, qwen3-14b, or a Hugging Face config.json"""
  topology: str = "v5p:2x2x1"
  """any that libtpu knows: v5e:4x4, v5p:2x2x4, v6e:8x8, tpu7x:2x2x1 ...; or h100:1 to h100:8"""
  batch: int = 8
  """rows, all live"""
  capacity: int = 2048
  """cache slots of a row; attention reads, and the floor counts, all of them"""
  sampling: Literal["greedy", "full", "truncated"] = "greedy"
  """full: temperature alone; truncated: top-k and top-p too"""
  block_size: int = 7
  """drafts of a round"""
  draft_layers: int = 5
  mesh: MeshConfig = MeshConfig()
  """devices of the topology that the models and their rows are spread over"""
  kernels: Kernels = Kernels(decode="auto")
  """how attention over caches is computed; reference reads all slots, pallas those that a row has"""
  programs: tuple[Program, ...] = ("plain", "draft", "verify", "round")


def main(settings: Settings) -> dict:
  # A prompt, padded as all are, or the anchor with a block that is verified.
  least = max(session.PROMPT_BUCKET, settings.block_size + 2)
  shell.at_least(settings, batch=1, block_size=1, draft_layers=1, capacity=least)
  if not settings.programs:
    raise ValueError("there are no programs to compile: name plain, draft, verify or round")
  target = target_config(settings.model)
  most = session.capacity(target.max_positions, 0, settings.block_size)
  if settings.capacity > most:
    raise ValueError(f"capacity is {settings.capacity}, expected at most {most}: {settings.model} has "
                     f"{target.max_positions} positions")
  devices = absent_devices(settings.topology)
  chip, mesh, rows = chip_of(devices[0]), settings.mesh.build(devices), {}
  with jax.set_mesh(mesh):
    served = Served.of(settings, target, devices[0].platform)
  shell.say(f"attention over caches: {served.target.kernels.decode}")
  least, work = floors(served), flops(settings, served)
  for name in settings.programs:
    with shell.stderr.status(f"compiling {name}"), jax.set_mesh(mesh):
      found = compiled.read(lower(name, served))
    rows[name] = compiled.summary(found, chip, floor_bytes=least[name], useful_flops=work[name] / mesh.size)
    shell.say(f"{name}: moves {rows[name]['over_floor']:.3f} of the floor, temporaries "
              f"{rows[name]['temporary_bytes'] / 1e9:.3f} GB")
  for table in compiled.tables(rows, chip):
    shell.say(table)
  return {**{name: getattr(settings, name) for name in ("model", "topology", "batch", "capacity", "sampling")},
          "chip": chip.name, "devices": mesh.size, "programs": rows, "fits": all(row["fits"] for row in rows.values())}


@dataclasses.dataclass(frozen=True)
class Served:
  """The models and their rows, as shapes on the current mesh."""
  target: Any
  drafter: DSpark
  plain: Rows    # without a drafter
  drafted: Rows  # with it

  @classmethod
  def of(cls, settings: Settings, config: TargetConfig, platform: str) -> Served:
    """In bfloat16, as programs run them on this platform."""
    half = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype), tree)
    choices = DSparkChoices(taps=spread_taps(config.num_layers), mask_token_id=config.vocab_size - 1,
                            block_size=settings.block_size, num_layers=settings.draft_layers)
    drafting = DSparkConfig.for_target(choices, config)
    build = lambda: TARGETS[config.family].build(config, rngs=nnx.Rngs(0))
    target = half(jax.eval_shape((lambda: stack_layers(build())) if scans(platform) else build))
    target.use(settings.kernels, platform)
    drafter = half(jax.eval_shape(lambda: DSpark(drafting, rngs=nnx.Rngs(0))))

    def rows(drafter):
      (batch,) = session.Session(target, drafter, budget=None).prepare(
          [[0]] * settings.batch, max_new_tokens=1, **SAMPLING[settings.sampling])
      begun = lambda target, drafter: start(Models.of(target, drafter), batch.args[2], settings.capacity)
      begun = jax.eval_shape(begun, target, drafter)
      return compiled.on(begun, row_shardings(begun))
    return cls(compiled.on(target, shardings(target)), compiled.on(drafter, shardings(drafter)), rows(None),
               rows(drafter))


def spread_taps(layers: int, count: int = 5) -> tuple[int, ...]:
  """Taps as the released drafters have them, 1 9 17 25 33 of 36 layers: evenly, from the second to the third last."""
  first, last = min(1, layers - 2), max(layers - 3, 0)
  return tuple(sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)}))


@flax.struct.dataclass
class Drafted:
  """A drafter that has drafted: what is left of a round is to verify its proposal."""
  drafter: DSpark
  proposal: Proposal

  @property
  def taps(self) -> tuple[int, ...]:
    return self.drafter.taps

  def head(self, target) -> None:
    return None

  def propose(self, *_) -> Proposal:
    return self.proposal

  def absorb(self, target, state: Any, committed: Committed) -> Any:
    return self.drafter.absorb(target, state, committed)


def lower(name: Program, served: Served) -> jax.stages.Lowered:
  """The program of this name. Heads are made inside, as in `decode`: as arguments, they would be weights twice."""
  def step(target, drafter, rows):
    return play(Models.of(target, drafter), rows, All())

  def draft(target, drafter, rows):
    return drafter.propose(target, drafter.head(target), rows.draft, rows.anchor, rows.keys, rows.settings.sampling)

  if name == "draft":  # nothing of the rows changes
    return jax.jit(draft).lower(served.target, served.drafter, served.drafted)
  drafter, rows = (None, served.plain) if name == "plain" else (served.drafter, served.drafted)
  if name == "verify":
    proposal = jax.eval_shape(draft, served.target, drafter, rows)
    apart = lambda x: sharding_of(x.shape, "rows", *(None, "vocab")[:x.ndim - 1])
    drafter = Drafted(drafter, compiled.on(proposal, jax.tree.map(apart, proposal)))
  # Where they came from, or they could not be written in place.
  out = jax.tree.map(lambda x: x.sharding, rows), None
  return jax.jit(step, donate_argnums=2, out_shardings=out).lower(served.target, drafter, rows)


def floors(served: Served) -> dict[str, float]:
  """Bytes that each program cannot but move, of one device.

  weights: of the target all layers, the final norm and the head, once; of an untied embedding some rows, which are
  nothing. cache: every slot once, and T of S slots written anew. draft: the drafter's layers and norms, its cache, the
  target's head for the base logits of all G positions, and the sequential head's W2 [W,R] for each of them. verify: the
  target on G + 1 tokens, and what absorbs them: fc and the layers' keys and values. A round is both, but reads the
  drafter's weights once. A chip whose fast memory holds W2 (78 MB at 151,936 words; a v6e's) reads it once, and so
  moves a little less than this.
  """
  size, target, drafter, rows = compiled.size, served.target, served.drafter, served.drafted
  head = size((target.lm_head or target.embed_tokens).weight)
  weights = size((target.layers, target.norm)) + head
  slots = target_slots(rows.cache)
  cache, context = size(rows.cache.layers), size(rows.draft.cache.layers)
  new = lambda tokens, *caches: sum(caches) * tokens / slots
  block = drafter.block_size + 1
  absorbs = size((drafter.fc, drafter.hidden_norm))
  shared = size([(layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.k_norm) for layer in drafter.layers])
  drafts = size((drafter.layers, drafter.norm, drafter.confidence_head)) + drafter.block_size * size(
      drafter.markov_head.markov_w2)
  draft = drafts + context + head
  verify = weights + cache + new(block, cache, context) + absorbs
  return {"plain": weights + cache + new(1, cache), "draft": draft, "verify": verify + shared, "round": draft + verify}


def target_slots(cache: Any) -> int:
  """S of a cache."""
  return cache.layers[0].v.shape[-2]


def flops(settings: Settings, served: Served) -> dict[str, float]:
  """Useful flops of each program: products on the rows that there are, every token attending to all slots."""
  target, drafter = served.target.config, served.drafter.config
  token = target.flops(settings.capacity) + target.head_flops
  draft, verify = drafter.draft_flops(settings.capacity), (drafter.block_size + 1) * (token + sum(
      drafter.context_flops()))
  return {name: settings.batch * count for name, count in
          {"plain": token, "draft": draft, "verify": verify, "round": draft + verify}.items()}


if __name__ == "__main__":
  shell.run(main, Settings, mesh=False)  # of devices that are not here
