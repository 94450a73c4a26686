"""The programs that an engine runs, compiled ahead, each with donated rows: one draft, and one verification per bucket.

Apart, and chosen by the host: of branches inside one program (`lax.switch`) CPUs and GPUs copy every cache in and out.
The models go in as a tuple of arrays, and of those only what a program reads: flattening modules takes Python a
millisecond in every call, and every array some microseconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding import estimator, scheduler
from dspark_jax.decoding import policy as policies
from dspark_jax.decoding.calibration import calibrate
from dspark_jax.decoding.round import Chunk, Models, Report, Rows, Settings, nothing, propose, settle
from dspark_jax.nn.cache import insert_row, row_shardings
from dspark_jax.nn.sharding import sharding_of
from dspark_jax.sampling import make_sampling
from dspark_jax.types import Array, Proposal

STOP_IDS = 8  # of a request, at most
# Where survival comes from, and how many features are learnt from.
FEATURES = {"head": 0, "estimator": estimator.BASIS, "both": estimator.BASIS + 1}
SMALL = 2 ** 28  # bytes of temporaries that any program may have


@flax.struct.dataclass
class Knobs:
  """What the host sets anew for each draft."""
  budget: Array      # i32[]  tokens that will be verified, anchors included
  sps: Array         # f32[R*(G+1)+1]  rounds per second with so many of them; for Algorithm 1
  weights: Array     # f32[2,F]  of the estimator, for greedy rows and for sampled ones
  intercepts: Array  # f32[2,G]

  @classmethod
  def empty(cls, seats: int, block: int, survival: str) -> Knobs:
    """Knobs of the right shapes that verify everything."""
    return cls(np.int32(seats * (block + 1)), np.ones(seats * (block + 1) + 1, np.float32),
               np.zeros((2, FEATURES[survival]), np.float32), np.zeros((2, block), np.float32))


@flax.struct.dataclass
class Draft:
  """What a draft hands to the verification of the same round."""
  proposal: Proposal  # without its logits and words
  confidence: Array   # f32[R,G]
  lengths: Array      # i32[R]  drafts to verify
  features: Array     # f32[R,G,F]  what the estimator reads


def new_rows(models: Models, seats: int, capacity: int, mode: str, verification: str = "token") -> Rows:
  """Rows of seats that nobody has taken; mode: of `Sampling`, which covers every request to come."""
  block = models.drafter.block_size if models.drafter else 0
  row = lambda value, dtype: jnp.full(seats, value, dtype)
  sampling = make_sampling(0.0)
  sampling = sampling.replace(temperature=row(0, jnp.float32), top_k=row(0, jnp.int32), top_p=row(1, jnp.float32),
                              mode=mode)
  settings = Settings(sampling, jnp.full((seats, STOP_IDS), -1, jnp.int32), row(0, jnp.int32),
                      jnp.ones((seats, block)), jnp.zeros((seats, 2)), verification)
  return Rows(models.target.init_cache(seats, capacity),
              models.drafter and models.drafter.init_state(models.target, seats, capacity), row(0, jnp.int32),
              jax.vmap(jax.random.key)(row(0, jnp.uint32)), settings, jnp.zeros((seats, 2, block)),
              row(0, jnp.int32), row(0, jnp.int32), row(True, bool), row(False, bool))


def empty_rows(models: Models, *how) -> Rows:
  """`new_rows`, on the current mesh."""
  make = lambda models: new_rows(models, *how)
  places = None if jax.sharding.get_mesh().empty else row_shardings(jax.eval_shape(make, models))
  return jax.jit(make, out_shardings=places)(models)


def draft(models: Models, rows: Rows, knobs: Knobs, *, policy: str, survival: str) -> Draft:
  """A block for every row, and how much of it is worth verifying within the budget.

  survival: of FEATURES, where confidences come from. The budget is known before the draft, and a draft's place in the
  order depends on itself and on those before it: what is cut off has no say in it.
  """
  proposal, live, temperature = propose(models, rows), ~rows.done, rows.settings.sampling.temperature
  features = jnp.zeros((*proposal.tokens.shape, 0))
  if survival == "head":
    confidence = calibrate(proposal.confidence, rows.settings.calibration)
  else:
    features = estimator.basis(estimator.feature(proposal.logits, temperature))
    if survival == "both":
      features = jnp.concatenate([features, estimator.logit(proposal.confidence)[..., None]], axis=-1)
    kind = (temperature > 0).astype(jnp.int32)
    confidence = estimator.survive(features, knobs.weights[kind], knobs.intercepts[kind])
  likely = scheduler.survival(confidence)
  chosen = {"threshold": policies.Threshold, "early-stop": lambda: policies.EarlyStop(knobs.sps)}
  wanted = chosen.get(policy, policies.All)().lengths(confidence, rows)
  place = jnp.arange(likely.shape[1], dtype=jnp.int32)[None]
  likely = jnp.where(place < wanted[:, None], likely, 0)
  lengths = scheduler.top_k(likely, knobs.budget - jnp.sum(live, dtype=jnp.int32), live)
  return Draft(proposal.replace(logits=None, words=None), confidence, lengths, features)


def verify(models: Models, rows: Rows, drafted: Draft, chunk: Chunk | None, *, bucket: int | None, log_probs: bool
           ) -> tuple[Rows, Report]:
  """The rows after the chosen drafts were verified, `bucket` tokens packed, or None: all of all rows."""
  proposal = drafted.proposal.replace(words=models.drafter.words)
  rows, report = settle(models, rows, proposal, drafted.confidence, drafted.lengths, bucket=bucket, chunk=chunk,
                        log_probs=log_probs)
  return rows, report.replace(features=drafted.features)


def plain(models: Models, rows: Rows, chunk: Chunk | None, *, log_probs: bool) -> tuple[Rows, Report]:
  """The rows after a token of the target's own each; a drafter reads on, so that it may draft in the next round."""
  proposal = nothing(models, rows)
  return settle(models, rows, proposal, proposal.confidence, jnp.zeros_like(rows.anchor), chunk=chunk,
                log_probs=log_probs)


def on_host(report: Report) -> np.ndarray:
  """[B] rows with the fields of a report, when its round has ended."""
  # Side by side here and not in the program: a v5p's compiler gives a head whose round packs its report worse tiles.
  fields = {name: np.asarray(x) for name, x in vars(report).items() if x is not None}
  rows = np.empty(len(report.n_new), [(name, x.dtype, x.shape[1:]) for name, x in fields.items()])
  for name, x in fields.items():
    rows[name] = x
  return rows


def admit(models: Models, rows: Rows, seat: Array, settings: Settings, seed: Array, source: Array, n: Array, *, how: str
          ) -> Rows:
  """The rows with a request in a seat, its prompt yet to be read but for the first n tokens.

  settings: of one row. Those n are in both caches: the seat's own, or (how: copy) the row `source`'s.
  """
  cache, state, (target, drafter) = rows.cache, rows.draft, (models.target, models.drafter)
  if how == "copy":  # cut before it is put there: a row is moved once
    cache = target.insert(cache, seat, target.cut(target.take(cache, source), 0, n))
    state = drafter and drafter.insert(state, seat, drafter.cut(drafter.take(state, source), 0, n))
  else:
    cache, state = target.cut(cache, seat, n), drafter and drafter.cut(state, seat, n)
  put = lambda old, new: old.at[seat].set(new)
  return rows.replace(
      cache=cache, draft=state, keys=put(rows.keys, jax.random.key(seed)),
      settings=insert_row(rows.settings, seat, settings),
      past=put(rows.past, 0), rounds=put(rows.rounds, 0), count=put(rows.count, 0), done=put(rows.done, True),
      failed=put(rows.failed, False))


def retire(models: Models, rows: Rows, seat: Array) -> Rows:
  """The rows with a seat that plays no further part."""
  del models
  return rows.replace(done=rows.done.at[seat].set(True))


def lowered(models: Models, rows: Rows, *, policy: str, survival: str, buckets: tuple[int, ...], chunk: int,
            log_probs: bool) -> Iterator[tuple[str, jax.stages.Lowered]]:
  """All programs of an engine by name, each of (leaves of the models, rows, more), on the current mesh: "draft",
  "plain", "full", a bucket's "128", "plain+chunk", "full+chunk", "own", "copy" (`admit`), "retire".

  models and rows may be shapes. None stands for leaves that a program does not read, and for the target's cache in a
  draft's rows. Rows are donated to all but the draft, and come back where they were.
  """
  leaves, tree = jax.tree.flatten(models)
  seats, block = rows.settings.calibration.shape
  places = jax.tree.map(lambda x: x.sharding, rows)
  # Those of a draft that verification reads: left to the compiler, they would not be where the next program wants them.
  apart = lambda x: sharding_of(x.shape, "rows", *(None, "vocab")[:x.ndim - 1])
  named = lambda function, **fixed: functools.partial(function, **fixed)

  def lower(function, rows, *args):
    """(function on the leaves that it reads, lowered; shapes of what it gives; where that lies, None: anywhere)."""
    def run(given, rows, *args):  # what is not given is traced as zeros that nothing depends on
      whole = [jnp.zeros(leaf.shape, leaf.dtype) if x is None else x for leaf, x in zip(leaves, given)]
      return function(jax.tree.unflatten(tree, whole), rows, *args)

    traced, out = jax.make_jaxpr(run, return_shape=True)(tuple(leaves), rows, *args)
    users = [x for eqn in traced.eqns for x in eqn.invars] + traced.jaxpr.outvars
    read = {x for x in users if isinstance(x, jex.core.Var)}
    given = tuple(leaf if x in read else None for leaf, x in zip(leaves, traced.jaxpr.invars))
    moves = isinstance(out, (tuple, Rows))
    if moves:
      where = (places, None) if isinstance(out, tuple) else places
    else:
      where = None if jax.sharding.get_mesh().empty else jax.tree.map(apart, out)
    program = jax.jit(run, donate_argnums=(1,) if moves else (), out_shardings=where)
    return program.lower(given, rows, *args), out, where

  part = Chunk(np.zeros(chunk, np.int32), np.int32(1), np.int32(0), np.int32(-1))
  if models.drafter:
    program, drafted, where = lower(named(draft, policy=policy, survival=survival), rows.replace(cache=None),
                                    Knobs.empty(seats, block, survival))
    yield "draft", program
    if where is not None:
      drafted = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), drafted, where)
    for size in (*buckets, None):
      yield str(size or "full"), lower(named(verify, bucket=size, log_probs=log_probs), rows, drafted, None)[0]
    yield "full+chunk", lower(named(verify, bucket=None, log_probs=log_probs), rows, drafted, part)[0]
  for name, piece in (("plain", None), ("plain+chunk", part)):
    yield name, lower(named(plain, log_probs=log_probs), rows, piece)[0]
  one = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), rows.settings)
  for how in ("own", "copy"):
    yield how, lower(named(admit, how=how), rows, np.int32(0), one, np.uint32(0), np.int32(0), np.int32(0))[0]
  yield "retire", lower(retire, rows, np.int32(0))[0]


class Executables:
  """The programs of `lowered`, compiled. Nothing else is ever compiled for an engine.

  say: is told what is compiled next; `compile_costs`: the seconds and the bytes of temporaries of each. RuntimeError
  where a program would copy a cache: the text would be the same, the time not.
  """

  def __init__(self, models: Models, rows: Rows, say: Callable[[str], None] = lambda text: None, **how):
    self.how, leaves = how, jax.tree.leaves(models)
    self.leaves: dict[str, tuple] = {}  # of each program; None: not read
    self.compiled: dict[str, jax.stages.Compiled] = {}
    self.compile_costs: dict[str, tuple[float, int]] = {}
    devices = 1 if jax.sharding.get_mesh().empty else jax.sharding.get_mesh().size
    held = sum(x.nbytes for x in jax.tree.leaves((rows.cache, rows.draft))) // devices
    seats, block = rows.settings.calibration.shape
    # A quarter: who lays out the keys anew, or the values, needs half of the caches. Logits are there several times.
    most = max(SMALL, 32 * seats * (block + 1) * models.target.vocab_size) + held // 4
    for name, program in lowered(models, rows, **how):
      say(name)
      began = time.perf_counter()
      self.compiled[name] = program.compile()
      self.leaves[name] = tuple(leaf if info else None for leaf, info in zip(leaves, program.args_info[0][0]))
      memory = self.compiled[name].memory_analysis()
      self.compile_costs[name] = time.perf_counter() - began, memory.temp_size_in_bytes
      if name != "draft" and (memory.alias_size_in_bytes < held or memory.temp_size_in_bytes > most):
        raise RuntimeError(f"the program {name} updates {memory.alias_size_in_bytes} bytes in place and takes "
                           f"{memory.temp_size_in_bytes} for a while, expected the {held} of the caches in place and "
                           f"at most {most} for a while: the compiler copies a cache")

  def __call__(self, name: str, rows: Rows, *args: Any) -> Any:
    """What a program makes of rows, which are gone afterwards, but for "draft"."""
    return self.compiled[name](self.leaves[name], rows.replace(cache=None) if name == "draft" else rows, *args)
