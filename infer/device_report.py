"""What an accelerator does with this library: is it right, how fast, how near the floor. One page, in minutes.

When to use it: on a fresh machine with a GPU or a TPU, to see before anything else that its numbers are those of a CPU,
then what a plain step, a round and a training step cost at Qwen3-4B size, and what share of the memory's and the
arithmetic's speed that is. Weights are random, so nothing is fetched; SmolLM2 is used where its package is there.
docs/devices.md says how to set a machine up.

    python -m infer.device_report --minutes 8
    python -m infer.device_report --allow-cpu --out runs/devices     # under JAX_PLATFORMS=cpu: tries the program itself

The most important comes first, and the page is written anew after every part, with the records beside it as JSON:
whatever ends the program, what was measured is there. A part that fails, or for which time or memory do not suffice, is
listed with its reason. A page that is there stays: the next one of the same device is NAME-2.md.

The last line of stdout is a JSON object: device, correct, page, figure, records (paths); correctness, decoding,
training and smollm2, a list of records each; left_out (name: reason). Where the device is wrong or a part failed there
is none, but exit code 2 and a sentence: the page has it all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dspark_jax
from dspark_jax.config import error_shown
from dspark_jax.data.chat import smollm2_path
from dspark_jax.decoding import session
from dspark_jax.decoding.generate import start
from dspark_jax.decoding.policy import All
from dspark_jax.decoding.round import Models, Rows, play
from dspark_jax.drafters.dspark import DSpark, DSparkChoices, DSparkConfig
from dspark_jax.nn.attention import Kernels
from dspark_jax.nn.layers import BlockSpec
from dspark_jax.nn.parameters import parameters
from dspark_jax.programs import shell
from dspark_jax.programs.compilers import CHIPS
from dspark_jax.targets.decoder import Decoder, TargetConfig, scans, stack_layers
from dspark_jax.targets.sizes import MODELS
from dspark_jax.training.losses import LossConfig
from dspark_jax.training.step import StepConfig, init_state, step_flops, train_step
from dspark_jax.types import Batch
from infer import bench, device_page, head_cost
from infer.compile import spread_taps

MODEL = "qwen3-4b"
# Of the model whose numbers are compared with the CPU's: the fewest heads that can be confused, since for each a TPU's
# compiler takes its time with products of full precision, and as wide as all kernels read them.
SMALL = TargetConfig("qwen3", BlockSpec(256, 768, 4, 2, 128, 1e-6, 1e6, qk_norm=True), 4, 4096, True, 8192)
TINY = TargetConfig("qwen3", BlockSpec(32, 64, 4, 2, 16, 1e-6, 1e6, qk_norm=True), 2, 256, True, 8192)
AUTO = Kernels("auto", "auto")  # on the device; on the CPU beside it everything is by reference
NEAR = 1e-3      # of the largest logit: what two right float32 computations may differ by
PER_CALL = 0.4   # seconds of rounds that one measurement lasts
GUESS = {"correctness": 75, "decoding": 30, "training": 75, "smollm2": 100}  # seconds, before one of a kind has run
TPU_GUESS = GUESS | {"correctness": 180}  # two programs of a minute of its compiler each, and their logits
FIRST = ((1, 2048), (16, 2048))  # of all batches and contexts


@dataclasses.dataclass
class Settings:
  minutes: float = 8.0
  """for everything, compilers included"""
  out: Path = Path("reports/devices")
  """folder of the page, its figure and its records, which are named after the device"""
  batches: tuple[int, ...] = (1, 4, 16, 64)
  contexts: tuple[int, ...] = (512, 2048, 8192)
  """tokens in the cache of every row"""
  gb_per_second: float | None = None
  """of the device's memory, where the page knows no better"""
  tflops: float | None = None
  """dense, bfloat16, likewise"""
  scanned: bool | None = None
  """layers stacked and scanned, or unrolled; default: as load_target has it"""
  tokens: int = 4096
  """of the training sequence"""
  anchors: int = 512
  allow_cpu: bool = False
  """try the program itself with a tiny model, where JAX sees no accelerator"""


@dataclasses.dataclass
class Bench:
  """What all parts share."""
  settings: Settings
  target: TargetConfig
  drafter: DSparkConfig
  scanned: bool
  ends: float  # time.monotonic()
  gb_per_second: float | None
  tflops: float | None

  @property
  def left(self) -> float:
    """Seconds."""
    return self.ends - time.monotonic()

  @functools.cached_property
  def models(self) -> tuple[Decoder, DSpark]:
    """Random weights in bfloat16, made when first asked for, with the kernels that suit the device."""
    build = lambda: Decoder(self.target, rngs=nnx.Rngs(0))
    target = random_weights(lambda: stack_layers(build()) if self.scanned else build())
    target.use(AUTO)
    return target, random_weights(lambda: DSpark(self.drafter, rngs=nnx.Rngs(0)))


class LeftOut(Exception):
  """Why a part is not measured."""


def main(settings: Settings) -> dict:
  shell.at_least(settings, tokens=8, anchors=1)
  if not settings.minutes > 0:
    raise ValueError(f"minutes is {settings.minutes}, expected a number above 0")
  for name in ("batches", "contexts"):
    if min(getattr(settings, name), default=0) < 1:
      raise ValueError(f"{name} are {getattr(settings, name)}, expected one or more numbers of at least 1")
  shell.check_out(settings.out, folder=True)
  on_cpu = jax.default_backend() == "cpu"
  if on_cpu and not settings.allow_cpu:
    raise ValueError("JAX sees no accelerator here: install jax[cuda13] or jax[tpu] and unset JAX_PLATFORMS, or give "
                     "--allow-cpu to try this program at a tiny size")
  kind = jax.devices()[0].device_kind
  chip = CHIPS.get(kind)
  target, drafter = (TINY, tiny_drafter(TINY)) if on_cpu else (MODELS[MODEL], paper_drafter(MODELS[MODEL]))
  scanned = scans(jax.default_backend()) if settings.scanned is None else settings.scanned
  here = Bench(settings, target, drafter, scanned,
               time.monotonic() + 60 * settings.minutes, settings.gb_per_second or chip and chip.bandwidth / 1e9,
               settings.tflops or chip and chip.flops / 1e12)
  page = device_page.Page(
      kind, device_page.new(settings.out, kind), here.gb_per_second, here.tflops, "tiny" if on_cpu else MODEL,
      "scanned" if here.scanned else "unrolled", drafter.block_size)
  run(here, page)
  if page.wrong or page.failed:
    what = [f"{record['model']} is not what it is on a CPU" for record in page.wrong]
    raise ValueError("; ".join([*what, *(f"{part} failed" for part in page.failed)]) + f": see {page.path}")
  return page.summary()


def paper_drafter(target: TargetConfig) -> DSparkConfig:
  """What the paper's authors released for a Qwen3."""
  choices = DSparkChoices(taps=spread_taps(target.num_layers), mask_token_id=151_669)
  return DSparkConfig.for_target(choices, target)


def tiny_drafter(target: TargetConfig) -> DSparkConfig:
  """A small DSpark with a head of each kind, fed by all layers but the last."""
  choices = DSparkChoices(num_layers=2, taps=tuple(range(target.num_layers - 1)), markov_rank=16)
  return DSparkConfig.for_target(choices, target)


def run(here: Bench, page: device_page.Page) -> None:
  """Every part that fits the time that is left, each followed by the page as far as it has come."""
  took, todo = {kind: [] for kind in GUESS}, parts(here)
  guess = TPU_GUESS if jax.default_backend() == "tpu" else GUESS
  page.left_out.update((name, "the program was ended before or in it") for _, name, _ in todo)
  page.write()  # a folder that cannot be written is seen before anything is measured
  with shell.bar() as bar:
    task = bar.add_task("measuring", total=len(todo), note="")
    for kind, name, part in todo:
      bar.update(task, note=name)
      began = time.monotonic()
      try:
        needed = 1.2 * max(took[kind]) if took[kind] else guess[kind]
        if here.left < needed:
          raise LeftOut(f"it takes about {needed:.0f} s, and {max(here.left, 0):.0f} s were left")
        page.add(kind, part())
        page.left_out.pop(name, None)
        took[kind].append(time.monotonic() - began)
      except LeftOut as reason:
        page.left_out[name] = str(reason)
      except Exception as error:  # of a compiler, a kernel, a driver: they have no common base
        # A minute on this machine may never come again: the other parts go on, and the exit code tells.
        said = f"{type(error).__name__}: {error_shown(error)}"
        # A kernel that asks for more than a multiprocessor has says so too, and cannot run at any batch.
        short = "RESOURCE_EXHAUSTED" in said and not re.search("shared memory|vmem", said, re.IGNORECASE)
        if not short:
          page.left_out.pop(name, None)
        (page.left_out if short else page.failed)[name] = said if short else f"{said} (in {way(error)})"
      with contextlib.suppress(OSError):  # of a full disk: the rest is measured, and the last write tells
        page.write()
      bar.update(task, advance=1)
  try:
    page.write()
  except OSError:
    shell.say(page.text())
    raise


def way(error: Exception) -> str:
  """The last functions on the way to an error, for who reads the page without the machine."""
  return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                   for frame in traceback.extract_tb(error.__traceback__)[-6:])


def parts(here: Bench) -> list[tuple[str, str, Callable]]:
  """(kind, name, what measures it) in the order of importance: is it right, then one number of each kind, then more."""
  s = here.settings
  grid = [(batch, context) for context in s.contexts for batch in s.batches]
  grid.sort(key=lambda at: (FIRST.index(at) if at in FIRST else len(FIRST), at[0] * at[1]))
  decoding = [("decoding", f"batch {batch}, context {context}", functools.partial(decoding_at, here, batch, context))
              for batch, context in grid]
  return [("correctness", "numbers of a small random model", functools.partial(small_model, here)),
          *decoding[:2],
          ("training", "a training step", functools.partial(training, here)),
          ("correctness", "numbers of SmolLM2", functools.partial(smollm2, here)),
          ("smollm2", "SmolLM2 from prompt to text", functools.partial(smollm2_texts, here)),
          *decoding[2:]]


def random_weights(build: Callable) -> nnx.Module:
  """The module build() in bfloat16: norms are ones, all else is drawn. Nothing is ever held in float32."""
  module = nnx.eval_shape(build)

  @functools.partial(jax.jit, static_argnums=1)
  def drawn(key, shape):
    # One matrix for all layers: random numbers for four billion weights take their time, and memory.
    one = 0.02 * jax.random.normal(key, shape[-2:], jnp.bfloat16)
    return jnp.broadcast_to(one, shape)

  for index, (name, variable) in enumerate(parameters(module).items()):
    norm = name.endswith("norm.weight")
    variable.set_value(jnp.ones(variable.shape, jnp.bfloat16) if norm else drawn(jax.random.key(index), variable.shape))
  return module


def cpu() -> jax.Device:
  """The CPU of this process, beside its accelerator."""
  try:
    return jax.devices("cpu")[0]
  except RuntimeError as error:
    raise LeftOut(f"JAX has no CPU backend here ({error}): unset JAX_PLATFORMS, or add cpu to it") from error


def small_model(here: Bench) -> dict:
  """Whether a model with random weights computes the same here as on the CPU of this process."""
  with jax.default_device(cpu()):
    config = TINY if here.target is TINY else SMALL
    target, drafter = Decoder(config, rngs=nnx.Rngs(0)), DSpark(tiny_drafter(config), rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  # Rows of different lengths in one batch, several tiles of 128 slots long: where masks and layouts go wrong.
  prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (513, 600, 640)]
  return compared(here, f"{config.num_layers} random layers of width {config.spec.hidden_size}", target, drafter,
                  prompts)


def smollm2(here: Bench) -> dict:
  """The same of SmolLM2, with an untrained drafter."""
  settings = smollm2_settings()
  prompts = bench.read_prompts(settings)[:3]
  with jax.default_device(cpu()):
    target = dspark_jax.load_target("smollm2", scanned=False, kernels=Kernels())
    drafter = bench.random_drafter(settings, target)
  return compared(here, "SmolLM2-135M", target, drafter, prompts)


def smollm2_settings() -> bench.Settings:
  """Of infer.bench. LeftOut where the package is not there."""
  try:
    smollm2_path()
  except ValueError as error:
    raise LeftOut(str(error)) from error
  return bench.Settings("smollm2", "random", dtype="bfloat16", layers=2, block_size=4, markov_rank=64)


def smollm2_texts(here: Bench) -> Iterator[dict]:
  """What infer.bench measures, at batch 1 and 16: whole generations with their prompts, from questions."""
  settings = smollm2_settings()
  prompts = bench.read_prompts(settings)
  target = dspark_jax.load_target("smollm2", dtype="bfloat16", scanned=here.scanned)
  drafter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bench.random_drafter(settings, target))
  measure = lambda batch: bench.measure(settings, target, drafter, bench.prompts_of(settings, target, prompts, batch))
  for batch in (1, 16):
    yield measure(batch) | {"attention": target.kernels.decode}


def compared(here: Bench, name: str, target: Decoder, drafter: DSpark, prompts: list[list[int]], new: int = 48) -> dict:
  """How a float32 model of the CPU differs on this device: logits and greedy text; and speculative from plain text."""
  on_cpu = jax.device_put((target, drafter), cpu())
  on_device = jax.device_put((stack_layers(on_cpu[0]) if here.scanned else on_cpu[0], drafter), jax.devices()[0])
  on_device[0].use(AUTO)
  # Products of float32 numbers: a TPU's default are bfloat16's, a GPU's are TF32's.
  with jax.default_matmul_precision("highest"):
    right, here_too = (logits(model, prompts[-1]) for model in (on_cpu[0], on_device[0]))
    plain, alone, speculative = (dspark_jax.generate(*models, prompts, max_new_tokens=new).tokens for models in (
        (on_cpu[0], None), (on_device[0], None), on_device))
    largest = np.abs(right).max()
    gap = lambda a, b: max((parted(on_cpu[0], *three) for three in zip(prompts, a, b)), default=0.0) / largest
    gaps = {"from_cpu": gap(plain, alone), "from_plain": gap(alone, speculative)}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), on_device[0])
  rough = np.abs(logits(half, prompts[-1]) - right).max()
  numbers = {"logits": np.abs(here_too - right).max() / largest, **gaps}
  return {"model": name, "attention": on_device[0].kernels.decode, "tokens": len(prompts) * new,
          "same_as_cpu": plain == alone, "same_as_plain": alone == speculative,
          **{key: float(value) for key, value in numbers.items()}, "bfloat16_logits": float(rough / largest),
          "correct": bool(np.isfinite(rough) and all(value < NEAR for value in numbers.values()))}


def logits(target: Decoder, prompt: list[int]) -> np.ndarray:
  """f32[T,V] of a prompt, on the host."""
  def whole(target, tokens):
    out, _ = target(tokens, target.init_cache(*tokens.shape), ())
    return target.head()(out.hidden)[0]
  tokens = np.zeros((1, session.padded_length(len(prompt))), np.int32)
  tokens[0, :len(prompt)] = prompt
  return np.asarray(jax.jit(whole)(target, tokens))[:len(prompt)]


def parted(target: Decoder, prompt: list[int], a: list[int], b: list[int]) -> float:
  """How far apart the target's logits are of the first tokens in which two texts differ: 0 for a tie, or no
  difference."""
  at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
  if at is None:
    return 0.0 if len(a) == len(b) else float("inf")
  last = logits(target, prompt + a[:at])[-1]
  return float(abs(last[a[at]] - last[b[at]]))


def decoding_at(here: Bench, batch: int, context: int) -> Iterator[dict]:
  """Seconds of a plain step and of a round at one batch and context, and the share of the memory's speed that is: one
  record, whose numbers of the round are None until there are any."""
  target, drafter = here.models
  out = {"batch": batch, "context": context, "attention": target.kernels.decode}
  kinds = {"plain_step": None, "round": drafter}
  out |= {f"{name}_{what}": None for name in kinds for what in ("seconds", "gb", "share")}
  for name, chosen in kinds.items():
    seconds = round_seconds(target, chosen, batch, context)
    read = head_cost.must_read(target, chosen, batch, context)
    out |= {f"{name}_seconds": seconds, f"{name}_gb": read / 1e9,
            f"{name}_share": here.gb_per_second and read / 1e9 / seconds / here.gb_per_second}
    if chosen is None:
      yield out  # before the round, which needs more memory: what was measured is kept where it does not fit


def round_seconds(target: Decoder, drafter: DSpark | None, batch: int, context: int) -> float:
  """Seconds of a round (without a drafter: of a plain step) of rows that stand at `context`, from one program."""
  slots = session.capacity(context, 0, drafter.block_size if drafter else 0)
  make = functools.partial(standing, target, drafter, batch, context, slots)
  needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((jax.eval_shape(make), target, drafter)))
  room(needed)

  def rounds(target, drafter, rows, count):
    models = Models.of(target, drafter)
    # Back after every round, so that the last one costs what the first did, whatever was accepted.
    return jax.lax.fori_loop(0, count, lambda _, rows: placed(play(models, rows, All())[0], context), rows)

  compiled = jax.jit(rounds, donate_argnums=2).lower(target, drafter, jax.eval_shape(make), jnp.int32(1)).compile()
  room(needed + compiled.memory_analysis().temp_size_in_bytes)
  rows = jax.jit(make)()

  def call(count):
    nonlocal rows
    rows = compiled(target, drafter, rows, jnp.int32(count))
    return rows.anchor

  one = bench.fastest(lambda: call(2), 1)[0] / 2
  count = int(min(max(PER_CALL / one, 2), 200))
  return bench.fastest(lambda: call(count), 3)[0] / count


def standing(target: Decoder, drafter: DSpark | None, batch: int, context: int, slots: int) -> Rows:
  """Rows in the middle of long texts, without the hours that writing them would take: caches are drawn."""
  (one,) = session.Session(target, drafter, budget=None).prepare([[0]] * batch, max_new_tokens=2)
  requests = jax.tree.map(jnp.asarray, one.args[2])
  shapes = jax.eval_shape(lambda *models: start(Models.of(*models), requests, slots), target, drafter)
  settings = requests.settings.replace(limit=jnp.full(batch, 2 ** 30, jnp.int32))

  def drawn(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros(x.shape, x.dtype)
    # Not zeros, which cost a GPU less power; the same for all layers, and rows: it is never whole in float32.
    return jnp.broadcast_to(jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype), x.shape)

  rows = jax.tree.map(drawn, shapes).replace(keys=jax.vmap(jax.random.key)(requests.seeds), settings=settings)
  return placed(rows, context)


def placed(rows: Rows, context: int) -> Rows:
  """The rows with so many tokens in their caches and nothing done."""
  at = jnp.full(rows.anchor.shape, context, jnp.int32)
  draft = rows.draft and rows.draft.replace(cache=rows.draft.cache.replace(length=at))
  return rows.replace(cache=rows.cache.replace(length=at), draft=draft, count=jnp.ones_like(at),
                      done=jnp.zeros_like(rows.done), failed=jnp.zeros_like(rows.failed))


def room(needed: int) -> None:
  """LeftOut where the device has less memory than so many bytes."""
  most = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  if most and needed > most:
    raise LeftOut(f"it needs {needed / 1e9:.1f} GB, the device has {most / 1e9:.1f}")


def training(here: Bench) -> dict:
  """Seconds of one optimizer step of the drafter at batch 1, and useful arithmetic over what the chip can."""
  (target, drafter), s = here.models, here.settings
  tokens, anchors = (128, 8) if here.target is TINY else (s.tokens, s.anchors)
  config = StepConfig(num_anchors=anchors, compute_dtype="bfloat16", loss=LossConfig())
  state = init_state(drafter, config, 0, total_steps=1000)
  whole = np.random.default_rng(0).integers(0, here.target.vocab_size, (1, tokens)).astype(np.int32)
  batch = jax.device_put(Batch(whole, np.ones(whole.shape, bool), np.ones_like(whole),
                               np.arange(tokens, dtype=np.int32)[None]))
  step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0).lower(state, target, batch).compile()
  stats = step.memory_analysis()

  def call():
    nonlocal state
    state, metrics = step(state, target, batch)
    return metrics["loss"]

  seconds, loss = bench.fastest(call, 3)
  if not np.isfinite(loss.sum):
    raise FloatingPointError(f"the loss is {float(loss.sum)} after a few steps")
  useful = step_flops(here.target, here.drafter, rows=1, length=tokens, blocks=anchors)
  return {"tokens": tokens, "anchors": anchors, "attention": target.kernels.train, "seconds": seconds,
          "useful_tflop": useful / 1e12, "mfu": here.tflops and useful / 1e12 / seconds / here.tflops,
          "arguments_gb": stats.argument_size_in_bytes / 1e9, "temporaries_gb": stats.temp_size_in_bytes / 1e9}


if __name__ == "__main__":
  shell.run(main, Settings)
