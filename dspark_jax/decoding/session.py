"""Prompts in, texts out: what every program runs its prompts through. One rule for padding, capacity and memory.

A list of prompts of any length becomes batches of few shapes, each of which fits a budget; a row's text does not depend
on the batch that it is in.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence, Set

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import shown
from dspark_jax.decoding import policy as policies
from dspark_jax.decoding.generate import Generation, Log, Requests, Text, collect, decode
from dspark_jax.decoding.round import Policy, Settings
from dspark_jax.decoding.verify import check_rule
from dspark_jax.sampling import make_sampling
from dspark_jax.types import Drafter, Target

PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, or of 128 above 128: one compilation per bucket
CACHE_BUCKET = 64
BUDGET = 4 * 10 ** 9  # bytes of a batch beyond weights: 450 rows of SmolLM2-135M with 128 new tokens each, in float32


def padded_length(tokens: int) -> int:
  """Tokens that a batch is padded to whose longest prompt has so many."""
  return _round_up(tokens, PROMPT_BUCKET if tokens <= 128 else 128)


def capacity(padded: int, max_new_tokens: int, block_size: int) -> int:
  """Cache slots of a row. One that is done still writes G + 1 scratch rows, after up to G tokens past its limit."""
  return _round_up(padded + max_new_tokens + 2 * (block_size + 1), CACHE_BUCKET)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptBatch:
  """Prompts that are decoded together. `compile` and `run` are apart for programs that time them."""
  indices: tuple[int, ...]  # of its rows among all prompts; a row that only fills it up is not among them
  args: tuple               # of `decode`: (target, drafter, requests on the host, policy)
  static: dict[str, int]    # of `decode`

  def compile(self) -> jax.stages.Compiled:
    """The program of this batch. A program is compiled once per process and shape, here or by the first `run`."""
    return decode.lower(*self.args, **self.static).compile()

  def run(self) -> list[Text]:
    """The texts of `indices`, once they are all finished. ValueError when logits were NaN."""
    return collect(decode(*self.args, **self.static), self.indices, self.args[2].settings.limit)


class Session:
  """A target, maybe a drafter, and how their prompts are batched.

  batch: rows of every batch, the last being filled up, if the budget has room for them; None: all prompts at once, or
  as few and as equal batches as the budget allows. budget: bytes that the caches, logs and logits of a batch may take
  (None: any); what a prompt's own pass needs, and the weights, come on top.
  """

  def __init__(self, target: Target, drafter: Drafter | None = None, *, batch: int | None = None,
               budget: float | None = BUDGET):
    if batch is not None and batch < 1:
      raise ValueError(f"batch is {batch}, expected at least 1 row")
    check_models(target, drafter)
    self.target, self.drafter, self.batch, self.budget = target, drafter, batch, budget

  @property
  def block_size(self) -> int:
    """G; 0 without a drafter."""
    return self.drafter.block_size if self.drafter else 0

  def prepare(self, prompts: Sequence[Sequence[int]], *, max_new_tokens=128, seed: int = 0, seeds=None,
              policy: Policy | None = None, **settings) -> list[PromptBatch]:
    """The batches that these prompts make, the longest bucket first, as it needs the most memory. Nothing has run yet.

    Settings as for `generate`. ValueError for whatever is wrong with prompts or settings.
    """
    prompts = _prompts(self.target, prompts)
    limits = _limits(self.target, prompts, max_new_tokens)
    seeds = _seeds(seed, seeds, len(prompts))
    settings = _settings(self.target, self.drafter, limits, policy, **settings)
    if policy is None:
      policy = policies.Threshold() if self.drafter and self.drafter.has_confidence else policies.All()
    new, batches = int(limits.max()), []
    plan = self._plan([len(prompt) for prompt in prompts], new)
    policies.check(policy, max(size for _, size, _ in plan), self.drafter)
    for indices, size, padded in plan:
      at = np.asarray(indices + indices[-1:] * (size - len(indices)))
      own = jax.tree.map(lambda x: x[at], settings)
      # What fills a batch up is over before it starts: its last row once more, with nothing to write.
      own = own.replace(limit=np.where(np.arange(size) < len(indices), own.limit, 0))
      tokens = np.zeros((size, padded), np.int32)
      for row, index in enumerate(at):
        tokens[row, :len(prompts[index])] = prompts[index]
      lengths = np.asarray([len(prompts[index]) for index in at], np.int32)
      requests = Requests(tokens, lengths, seeds[at], own)
      static = dict(max_new_tokens=new, capacity=capacity(padded, new, self.block_size))
      batches.append(PromptBatch(tuple(indices), (self.target, self.drafter, requests, policy), static))
    return batches

  def stream(self, prompts: Sequence[Sequence[int]], **settings) -> Iterator[tuple[int, Text]]:
    """(place among the prompts, its text), in the order in which batches finish; mistakes are raised at once."""
    batches = self.prepare(prompts, **settings)
    return (pair for batch in batches for pair in zip(batch.indices, batch.run()))

  def bytes_per_row(self, padded: int, max_new_tokens: int) -> int:
    """Bytes of the caches, the log and a round's logits of one row."""
    slots, block = capacity(padded, max_new_tokens, self.block_size), self.block_size

    def row(target, drafter):
      logits = jnp.zeros((block + 1, target.vocab_size))
      draft = drafter.init_state(target, 1, slots) if drafter else None
      return target.init_cache(1, slots), draft, logits, Log.empty(1, block, max_new_tokens)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(row, self.target, self.drafter)))

  def _plan(self, lengths, new):
    """(places of its prompts, rows, padded length) of every batch: by bucket, in the order of the prompts."""
    padded, plan, sizes = [padded_length(length) for length in lengths], [], {}
    left = sorted(range(len(lengths)), key=lambda row: -padded[row])
    while left:
      longest = padded[left[0]]
      if longest not in sizes:
        sizes[longest] = self._size(longest, new, len(left))
      part, left = left[:sizes[longest]], left[sizes[longest]:]
      plan.append((sorted(part), sizes[longest], longest))
    return plan

  def _size(self, padded, new, rows):
    """Rows of a batch of this padded length, when so many are left."""
    wanted = self.batch or rows
    if self.budget is None:
      return wanted
    most = max(int(self.budget // self.bytes_per_row(padded, new)), 1)
    return min(wanted, most) if self.batch else -(-rows // -(-rows // most))


def generate(target: Target, drafter: Drafter | None, prompts: Sequence[Sequence[int]], *,
             budget: float | None = BUDGET, **settings) -> Generation:
  """Continues every prompt (a list of token ids), with a drafter or, with None, plainly.

  Keyword settings, each one value for all prompts or a list of one per prompt: max_new_tokens (128), temperature (0 =
  greedy), top_k (0 = off), top_p (1 = off), stop_token_ids, calibration (temperatures f[G] of the confidences),
  confidence_threshold and survival_threshold (drafts from the first one below are not verified; 0 = verify every
  draft; others need a drafter with a confidence head). For all of them: verification, token or block
  (`decoding.verify`); seed (prompt r uses seed + r) or seeds (one per
  prompt); policy, of `decoding.policy`, which decides in the thresholds' stead what is verified. The text follows the
  target's own distribution in all cases; at temperature 0 it is the target's own text. It does not depend on other
  prompts, unless the policy has a curve.

  budget: see `Session`, which gives texts as they finish. Compiles once per batch size, prompt bucket, largest
  max_new_tokens, kind of sampling and kind of policy.
  """
  texts = [None] * len(prompts)
  for batch in Session(target, drafter, budget=budget).prepare(prompts, **settings):
    for row, text in zip(batch.indices, batch.run()):
      texts[row] = text
  return Generation.of(texts)


def _prompts(target, prompts):
  """Every prompt as i[N]. ValueError for one that the target cannot read."""
  if not len(prompts):
    raise ValueError("there are no prompts: expected at least one list of token ids")
  prompts = [_token_ids(f"prompt {row}", prompt) for row, prompt in enumerate(prompts)]
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f"prompt {row} is empty: expected at least one token; give it a start token or some text")
    if prompt.min() < 0 or prompt.max() >= target.vocab_size:
      raise ValueError(f"prompt {row} has token ids {prompt.min()}..{prompt.max()}, the target's vocabulary is "
                       f"0..{target.vocab_size - 1}: was it made with another tokenizer?")
  return prompts


def _limits(target, prompts, max_new_tokens):
  """New tokens per prompt, i32[B]. ValueError where a prompt leaves no room for them."""
  limits = [_integer(f"max_new_tokens of prompt {row}", limit)
            for row, limit in enumerate(_each("max_new_tokens", max_new_tokens, len(prompts)))]
  check(max_new_tokens=min(limits))
  row = max(range(len(prompts)), key=lambda row: len(prompts[row]) + limits[row])
  if len(prompts[row]) + limits[row] > target.max_positions:
    raise ValueError(f"a prompt of {len(prompts[row])} tokens and {limits[row]} new ones do not fit the target's "
                     f"{target.max_positions} positions: shorten the prompt or lower max_new_tokens")
  return np.asarray(limits, np.int32)


def _seeds(seed, seeds, rows):
  """u32[B]"""
  if seeds is None:
    first = _integer("seed", seed)  # Python's: numpy's would wrap round
    seeds = range(first, first + rows)
  elif not _is_list(seeds):
    raise ValueError(f"seeds is {shown(seeds)}, expected a list with one for each prompt: for one number, give seed")
  if len(seeds) != rows:
    raise ValueError(f"there are {len(seeds)} seeds for {rows} prompts: give one for each")
  seeds = [_integer(f"the seed of prompt {row}", value) for row, value in enumerate(seeds)]
  for value in (min(seeds), max(seeds)):
    check(seed=value)
  return np.asarray(seeds, np.uint32)


def check(*, max_new_tokens: int = 1, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
          confidence_threshold: float = 0.0, survival_threshold: float = 0.0, budget_gb: float = 1.0,
          verification: str = "token") -> None:
  """ValueError for a setting of decoding, or of JAX, that can be seen to be wrong before a model is loaded."""
  if jax.config.jax_enable_x64:
    raise ValueError("jax_enable_x64 is on, and decoding keeps its numbers in 32 bits: turn it off")
  check_rule(verification)
  make_sampling(temperature, top_k, top_p)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
  if not 0 <= seed < 2 ** 32:
    raise ValueError(f"seed is {str(seed):.60}, expected 0 to {2 ** 32 - 1}")
  for name, value in (("confidence_threshold", confidence_threshold), ("survival_threshold", survival_threshold)):
    if not 0 <= value <= 1:
      raise ValueError(f"{name} is {value}, expected 0 (verify every draft) to 1")
  if not budget_gb > 0:
    raise ValueError(f"budget_gb is {budget_gb}, expected a number above 0")


def check_models(target, drafter) -> None:
  """ValueError for a drafter that was made for another target, and for jax_enable_x64: decoding would fail inside."""
  check()
  config = getattr(drafter, "config", None)  # drafters of others may have none
  if problems := misfits(config, target.config) if config else []:
    raise ValueError("; ".join(problems))


def misfits(drafter, target) -> list[str]:
  """What keeps a drafter of one config (DrafterConfig) from drafting for a target of the other (TargetConfig)."""
  pairs = [("width", drafter.spec.hidden_size, target.spec.hidden_size),
           ("vocabulary", drafter.vocab_size, target.vocab_size),
           ("target layers", drafter.num_target_layers, target.num_layers)]
  return [f"{what} is {got}, the target's is {expected}: this drafter was made for another target"
          for what, got, expected in pairs if got != expected]


def check_prompts(target, prompts: Sequence[Sequence[int]], *, max_new_tokens=128, stop_token_ids=()) -> None:
  """ValueError for prompts, or settings of them as for `generate`, that a target cannot take. Of it a TargetConfig is
  enough, which is there before the weights are."""
  _limits(target, _prompts(target, prompts), max_new_tokens)
  _stop_ids(stop_token_ids, len(prompts), target.vocab_size)


def _settings(target, drafter, limits, policy, *, temperature=0.0, top_k=0, top_p=1.0, stop_token_ids=(),
              confidence_threshold=0.0, survival_threshold=0.0, calibration=None, verification="token") -> Settings:
  """What was asked for each prompt, on the host."""
  check(verification=verification)
  rows, block = len(limits), drafter.block_size if drafter else 0
  each = lambda name, value: _numbers(name, value, rows)
  sampling = make_sampling(each("temperature", temperature), each("top_k", top_k), each("top_p", top_p))
  stop_ids = _stop_ids(stop_token_ids, rows, target.vocab_size)
  thresholds = [_thresholds(drafter, policy, name, each(name, value)) for name, value in (
      ("confidence_threshold", confidence_threshold), ("survival_threshold", survival_threshold))]
  one = not _is_list(calibration) or not any(table is None or _is_list(table) for table in calibration)
  tables = [_table(table, block) for table in _each("calibration", [calibration] * rows if one else calibration, rows)]
  return Settings(sampling, stop_ids, limits, np.asarray(tables, np.float32).reshape(rows, block),
                  np.asarray(thresholds, np.float32).T, verification)


def _table(temperatures, block):
  """f[G]; None: all 1"""
  try:
    found = np.ones(block) if temperatures is None else np.asarray(temperatures)
  except (TypeError, ValueError):  # lists of several lengths, or of JAX's numbers
    found = np.asarray(None)
  if found.shape != (block,) or not _is_real(found) or not (found > 0).all():
    got = temperatures.tolist() if hasattr(temperatures, "tolist") else temperatures  # whose own repr has several lines
    raise ValueError(f"calibration is {shown(got)}, expected {block} positive numbers, one for each draft")
  return found


def _stop_ids(stop_token_ids, rows, vocab_size):
  """i32[B,S], filled up with -1, of one id, a list or a set of them, or None for none: for all rows, or of each."""
  apart = _is_list(stop_token_ids) and any(ids is None or isinstance(ids, Set) or _is_list(ids)
                                           for ids in stop_token_ids)
  stops = []
  for row, ids in enumerate(_each("stop_token_ids", stop_token_ids if apart else [stop_token_ids] * rows, rows)):
    ids = [] if ids is None else list(ids) if isinstance(ids, Set) else ids if _is_list(ids) else [ids]
    stops.append(np.sort(_token_ids(f"stop_token_ids of prompt {row}", ids)))
    if wrong := [token for token in stops[-1] if not 0 <= token < vocab_size]:
      raise ValueError(f"stop_token_ids has {wrong[0]}, the target's vocabulary is 0..{vocab_size - 1}: was it made "
                       f"with another tokenizer?")
  found = np.full((rows, _round_up(max(1, *map(len, stops)), 4)), -1, np.int32)
  for row, ids in enumerate(stops):
    found[row, :len(ids)] = ids
  return found


def _thresholds(drafter, policy, name, values):
  for value in values:
    check(**{name: value})
    if value and not (drafter and drafter.has_confidence):
      raise ValueError(f"{name} is {value}, but there is no "
                       f"{'confidence head in the drafter' if drafter else 'drafter'}: leave it at 0")
    if value and not isinstance(policy, policies.Threshold | None):
      raise ValueError(f"{name} is {value}, but the policy is {type(policy).__name__}: a threshold is a policy of its "
                       f"own, leave one of the two out")
  return values


def _token_ids(name, value):
  """value as i[N]"""
  try:
    ids = np.asarray(value)
  except ValueError:  # lists of several lengths
    ids = np.asarray(None)
  mixed = isinstance(value, (list, tuple)) and any(isinstance(x, (bool, np.bool_)) for x in value)  # numpy: 0 and 1
  if ids.ndim != 1 or mixed or ids.size and ids.dtype.kind not in "iu":  # rounded down they would be other tokens
    raise ValueError(f"{name} is {shown(value)}, expected a list of integers: give token ids, a list for each prompt")
  return ids


def _integer(name, value):
  try:
    return operator.index(value)
  except TypeError as error:
    raise ValueError(f"{name} is {shown(value)}, expected an integer: give Python's or numpy's") from error


def _numbers(name, value, rows):
  """One number per row, as `_each`."""
  values = _each(name, value, rows)
  for each in values:
    if _is_list(each) or not (isinstance(each, int) or _is_real(np.asarray(each))) or isinstance(each, bool):
      raise ValueError(f"{name} is {shown(each)}, expected a number: give one for all prompts, or one for each")
  return values


def _is_real(array):
  return jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)


def _each(name, value, rows):
  """One value per row: those of a list, or the only one again and again."""
  values = list(value) if _is_list(value) else [value] * rows
  if len(values) != rows:
    raise ValueError(f"{name} has {len(values)} values for {rows} prompts: give one for all, or one for each")
  return values


def _is_list(value):
  return isinstance(value, (list, tuple)) or np.ndim(value) > 0


def _round_up(n, multiple):
  return -(-n // multiple) * multiple
