"""Generation on the device: the prompt, then a loop of rounds that are logged; and the texts of a finished log."""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax import sampling as sp
from dspark_jax.decoding import acceptance
from dspark_jax.decoding.round import Models, Policy, Report, Rows, Settings, choose, play
from dspark_jax.decoding.verify import is_stop
from dspark_jax.nn.sharding import constrain
from dspark_jax.types import Array, Committed, Drafter, Target


@flax.struct.dataclass
class Requests:
  """A batch of prompts as the device sees it. Every leaf is per row."""
  prompts: Array   # i32[B,P]  padded on the right
  lengths: Array   # i32[B]    of the prompts, at least 1
  seeds: Array     # u32[B]    one per row: a row's text does not depend on its neighbours
  settings: Settings


@flax.struct.dataclass
class Log:
  """What the rounds of a batch have said so far; N is the largest limit of its rows."""
  tokens: Array      # i32[B,N+2G+2]  new tokens; what lies past `count` is scratch
  count: Array       # i32[B]    see `Rows.count`
  failed: Array      # bool[B]   see `Rows.failed`
  n_accept: Array    # i32[B,N]  drafts kept per round, -1 where the row ran no round
  n_verify: Array    # i32[B,N]  drafts verified per round, up to an accepted stop token
  confidence: Array  # f32[B,N,G]  of the drafts of each round, calibrated
  rounds: Array      # i32[]

  @classmethod
  def empty(cls, batch: int, block: int, max_new_tokens: int) -> Log:
    """The log of rows that have said nothing."""
    shape = batch, max_new_tokens
    return cls(jnp.zeros((batch, max_new_tokens + 2 * block + 2), jnp.int32), jnp.zeros(batch, jnp.int32),
               jnp.zeros(batch, bool), jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32),
               jnp.zeros((*shape, block)), jnp.int32(0))


def start(models: Models, requests: Requests, capacity: int) -> Rows:
  """The rows after their prompts: caches filled, and the first new token, which is the first anchor, drawn."""
  target, drafter, settings = models.target, models.drafter, requests.settings
  batch, block = settings.calibration.shape
  out, cache = target(requests.prompts, target.init_cache(batch, capacity), models.taps)
  last = jnp.take_along_axis(out.hidden, (requests.lengths - 1)[:, None, None], axis=1)
  keys, first_keys = sp.split_keys(jax.vmap(jax.random.key)(requests.seeds), 2)
  first = choose(models.head(last)[:, 0], settings.sampling, first_keys)
  state = None
  if drafter:
    following = jnp.concatenate([requests.prompts[:, 1:], first[:, None]], axis=1)
    following = following.at[jnp.arange(batch, dtype=jnp.int32), requests.lengths - 1].set(first)
    state = drafter.absorb(target, drafter.init_state(target, batch, capacity),
                           Committed(out, following, requests.lengths))
  failed = first >= target.vocab_size
  return Rows(
      cache=target.commit(cache, requests.lengths), draft=state, anchor=first, keys=keys, settings=settings,
      past=jnp.zeros((batch, 2, block)), rounds=jnp.zeros(batch, jnp.int32), count=jnp.ones(batch, jnp.int32),
      done=failed | is_stop(first[:, None], settings.stop_ids)[:, 0] | (settings.limit <= 1), failed=failed)


def record(log: Log, rows: Rows, report: Report) -> Log:
  """The log with one more round, after which the batch stands at `rows`."""
  add = lambda old, new: jax.lax.dynamic_update_slice(
      old, new[:, None].astype(old.dtype), (0, log.rounds, *[0] * (old.ndim - 2)))
  put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
  return Log(
      tokens=put(log.tokens, report.tokens, log.count), count=rows.count, failed=rows.failed,
      n_accept=add(log.n_accept, jnp.where(report.live, report.n_accept, -1)),
      n_verify=add(log.n_verify, report.n_verify), confidence=add(log.confidence, report.confidence),
      rounds=log.rounds + 1)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "capacity"))
def decode(target: Target, drafter: Drafter | None, requests: Requests, policy: Policy, *, max_new_tokens: int,
           capacity: int) -> Log:
  """The whole generation as one program: the prompt, then rounds until every row is done. No host in between.

  max_new_tokens: no row's limit is above. Nothing is donated: no argument is of the size of the caches, which are born
  and end inside. A caller's second program of the same shapes is the first one, compiled ahead (`lower`) or not.
  """
  models, requests = Models.of(target, drafter), jax.tree.map(lambda x: constrain(x, "rows"), requests)

  def body(carry):
    rows, log = carry
    rows, report = play(models, rows, policy)
    return rows, record(log, rows, report)

  rows = start(models, requests, capacity)
  log = Log.empty(*rows.settings.calibration.shape, max_new_tokens)
  log = log.replace(tokens=log.tokens.at[:, 0].set(rows.anchor), count=rows.count, failed=rows.failed)
  log = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), body, (rows, log))[1]
  return jax.tree.map(constrain, log)  # whole everywhere: each of several processes reads all of it


@dataclasses.dataclass(frozen=True)
class Text:
  """What became of one prompt, on the host."""
  tokens: list[int]       # new ones, the stop token included
  n_accept: list[int]     # drafts kept, per round
  n_verify: list[int]     # drafts verified, per round; up to an accepted stop token
  n_commit: list[int]     # tokens that each round delivered (`acceptance.Rounds`)
  confidence: np.ndarray  # f32[rounds,G]  of all drafts, calibrated

  def cut(self, count: int) -> Text:
    """The text as if it had been delivered up to its first `count` tokens, at least 1: later rounds are not of it."""
    n_commit = [n for n in acceptance.delivered(self.n_accept, count) if n > 0]
    return Text(self.tokens[:count], self.n_accept[:len(n_commit)], self.n_verify[:len(n_commit)], n_commit,
                self.confidence[:len(n_commit)])


@dataclasses.dataclass(frozen=True)
class Generation:
  """New tokens on the host, per prompt; a `Text` each."""
  tokens: list[list[int]]
  n_accept: list[list[int]]
  n_verify: list[list[int]]
  n_commit: list[list[int]]
  confidence: list[np.ndarray]

  @classmethod
  def of(cls, texts: list[Text]) -> Generation:
    return cls(*([getattr(text, field.name) for text in texts] for field in dataclasses.fields(cls)))

  @property
  def rounds(self) -> int:
    """Rounds of all rows together."""
    return sum(map(len, self.n_accept))

  @property
  def accepted_length(self) -> float:
    """Tokens delivered per round (`acceptance.accepted_length`); NaN without a round."""
    length = acceptance.accepted_length(n for row in self.n_commit for n in row)
    return float("nan") if length is None else length


def collect(log: Log, indices: tuple[int, ...], limits: np.ndarray) -> list[Text]:
  """The texts of the first rows of a finished `decode`, which answer the prompts `indices`.

  limits: i[B], tokens that a text is cut to. ValueError, by those indices, when logits were NaN.
  """
  log = jax.device_get(log)
  if failed := [index for index, row in zip(indices, log.failed) if row]:
    raise ValueError(f"NaN logits or confidences in rows {failed}: the target's or the drafter's weights are broken, "
                     f"or the dtype overflows")
  texts = []
  for row in range(len(indices)):
    ran, count = log.n_accept[row] >= 0, int(log.count[row])
    n_accept, tokens = log.n_accept[row, ran].tolist(), log.tokens[row, :min(count, limits[row])].tolist()
    texts.append(Text(tokens, n_accept, log.n_verify[row, ran].tolist(),
                      acceptance.delivered(n_accept, len(tokens)), log.confidence[row, ran]))
  return texts
