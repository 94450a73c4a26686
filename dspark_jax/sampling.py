"""Temperature, top-k and top-p, and drawing from what they leave: the same functions for draft and target."""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.types import Array, Sampling

# Of a row, for top-k and top-p on TPUs: the compiler has an operation for so few, and from 512 on sorts the whole row.
CANDIDATES = 256


def make_sampling(temperature, top_k=0, top_p=1.0) -> Sampling:
  """Settings as a user gives them, each a number for all rows or one per row; its arrays are numpy's.

  Rows at temperature 0 are greedy and ignore the other two. ValueError for a value that means nothing.
  """
  asked = dict(temperature=temperature, top_k=top_k, top_p=top_p)
  try:
    asked = {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in asked.items()}
  except (TypeError, ValueError, OverflowError) as error:  # text, lists in lists, integers of 400 digits
    raise ValueError(f"temperature, top_k and top_p are {temperature!r:.60}, {top_k!r:.60} and {top_p!r:.60}, expected "
                     f"numbers, or lists of numbers") from error
  if len({len(value) for value in asked.values()} - {1}) > 1:
    raise ValueError(f"temperature, top_k and top_p are of {', '.join(str(len(v)) for v in asked.values())} rows: give "
                     f"one value for all rows, or one for each")
  temperature, top_k, top_p = np.broadcast_arrays(*asked.values())
  # They are float32 on the device, where something smaller than normal numbers is 0.
  least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
  inside = lambda x: (x >= least) & (x <= most)
  for name, values, right, expected in (
      ("temperature", temperature, (temperature == 0) | inside(temperature),
       f"0 or {least:.2g} to {most:.2g}: use 0 for greedy"),
      ("top_k", top_k, (top_k >= 0) & (top_k == np.floor(top_k)) & (top_k < 2 ** 31),
       "an integer from 0 to 2147483647: use 0 to turn it off"),
      ("top_p", top_p, inside(top_p) & (top_p <= 1), "in (0, 1]: use 1 to turn it off")):
    if not right.all():
      row = int(np.argmin(right))
      where = f" in row {row}" if right.size > 1 else ""
      got = f"{values[row]:.0f}" if values[row] == np.floor(values[row]) and name == "top_k" else values[row]
      raise ValueError(f"{name} is {got}{where}, must be {expected}")
  sampled = temperature > 0
  truncates = sampled & ((top_k > 0) | (top_p < 1))
  mode = "truncated" if truncates.any() else "full" if sampled.any() else "greedy"
  return Sampling(temperature.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32), mode)


def probabilities(logits: Array, sampling: Sampling) -> Array:
  """Distribution that tokens are drawn from: f32[B,...,V], from logits f[B,...,V]; a row's settings hold for all of it.

  Temperature, then top-k, then top-p over what is left, as in Hugging Face; the token that crosses top_p is
  kept. Ties with the last token kept are all kept, so the order of the vocabulary plays no part (Hugging
  Face: same for top-k, arbitrary for top-p). Greedy: one-hot at the first maximum. Logit -inf gives exactly
  0. Rows that hold NaN, +inf or no finite logit become NaN (greedy: 0 where `argmax` finds no token);
  `draw` then returns V. A row's numbers are the same in every mode that can hold it.
  """
  if sampling.mode == "greedy":
    return _one_hot(argmax(logits), logits.shape[-1])
  return distributions(logits, sampling).whole()


@flax.struct.dataclass
class Distributions:
  """What `probabilities` gives, bit for bit, of which only what is asked for is made: the whole of it has V numbers for
  every position. All but the first field have one number for each position, f32[B,...,1]."""
  values: Array   # f32[B,...,V]  as they lie in memory: whatever is gathered from another form of them, is made whole
  largest: Array  # goes from the values,
  divisor: Array  # divides what is left,
  lowest: Array   # and from below this nothing is drawn
  top: Array      # of the result; it is 0, but see `distributions`
  total: Array    # of its exponentials
  best: Array     # i32[B,...,1]  the token of a greedy row
  sampled: Array  # bool  whether a row is not greedy

  def of(self, tokens: Array) -> Array:
    """Probabilities of tokens i32[B,T], one for each of the first T positions: f32[B,T]."""
    first = jax.tree.map(lambda x: x[:, :tokens.shape[1]], self)
    drawn = first.replace(values=jnp.take_along_axis(first.values, tokens[..., None], axis=-1))
    return drawn._of(tokens[..., None])[..., 0]

  def at(self, position: Array) -> Array:
    """The whole distribution at one position i32[B] of each row: f32[B,V]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, position[:, None, None], axis=1), self).whole()[:, 0]

  def whole(self) -> Array:
    """f32[B,...,V]."""
    return self._of(jax.lax.broadcasted_iota(jnp.int32, self.values.shape, self.values.ndim - 1))

  def _of(self, tokens):
    drawn = jnp.exp(self._scaled() - self.top) / self.total
    return jnp.where(self.sampled, drawn, (tokens == self.best).astype(jnp.float32))

  def _scaled(self):
    scaled = (self.values - self.largest) / self.divisor
    return jnp.where(scaled < self.lowest, -jnp.inf, scaled)  # turned so that a NaN stays in and poisons its row


def distributions(logits: Array, sampling: Sampling) -> Distributions:
  """`probabilities`, of logits f[B,...,V], for whom some of them are enough. Not for greedy settings."""
  logits = logits.astype(jnp.float32)
  each = (*logits.shape[:-1], 1)
  temperature = jnp.broadcast_to(_over(sampling.temperature, logits), each)
  # The maximum goes first: a small temperature would overflow the raw logits.
  found = Distributions(logits, jnp.max(logits, axis=-1, keepdims=True), jnp.where(temperature > 0, temperature, 1),
                        jnp.full(each, -jnp.inf), jnp.zeros(each), jnp.ones(each), argmax(logits)[..., None],
                        temperature > 0)
  if sampling.mode == "truncated":
    scaled, lowest = _cut(found._scaled(), sampling)
    found = found.replace(values=scaled, largest=jnp.zeros(each), divisor=jnp.ones(each), lowest=lowest[..., None])
  # As softmax does it: otherwise CPUs round what comes before and after in one, and a row's bits depend on the mode.
  found = found.replace(top=jnp.max(found._scaled(), axis=-1, keepdims=True))
  return found.replace(total=jnp.sum(jnp.exp(found._scaled() - found.top), axis=-1, keepdims=True))


def draw(keys: Array, probs: Array) -> Array:
  """Tokens drawn from f32[...,V], one key each: i32[...]. V where a row holds a NaN or no mass at all.

  keys: typed keys of shape [...]. A token of probability 0 is never drawn; a row's token depends on its own
  key and probabilities only. A CPU draws other tokens for a key than other platforms do.
  """
  def draw_one(key, row):
    return jax.lax.platform_dependent(key, row, cpu=_race_of_chunks, default=_race)

  for _ in range(keys.ndim):
    draw_one = jax.vmap(draw_one)
  return draw_one(keys, probs)


def argmax(logits: Array) -> Array:
  """First maximum of f[...,V]: i32[...]. V, which is no token, where a row holds a NaN or nothing above -inf.

  So a caller sees broken logits as `tokens >= V`, never as token 0.
  """
  # Of words that lie on several devices no chunks are made: they would be exchanged, padded, to be cut anew.
  if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
    return _first_max(logits)
  return jax.lax.platform_dependent(logits, cpu=_argmax_of_chunks, default=_first_max_in_one_pass)


def largest(x: Array) -> tuple[Array, Array]:
  """(maximum f[...], NaN where there is one; where it is first, i32[...]) of x f[...,V], in one pass."""
  def larger(a, b):
    (x, i), (y, j) = a, b
    before = (x > y) | (x != x) | (x == y) & (i < j)
    return jnp.where(before, x, y), jnp.where(before, i, j)

  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  return tuple(jax.lax.reduce((x, index), (jnp.array(-jnp.inf, x.dtype), jnp.int32(x.shape[-1])), larger,
                              (x.ndim - 1,)))


def split_keys(keys: Array, n: int) -> Array:
  """n independent keys for each row, to unpack by name: keys [n,B] from keys [B]."""
  return jax.vmap(lambda key: jax.random.split(key, n), out_axes=1)(keys)


def _cut(scaled, sampling):
  """scaled f32[B,...,V], maximum 0, in memory, and the smallest of it inside top-k and top-p: f32[B,...]."""
  top_k, top_p = (_over(x, scaled)[..., 0] for x in (sampling.top_k, sampling.top_p))
  # Nothing is cut at infinity. Sums in float32 reach the total before the last token, so at top_p = 1 they would cut.
  count = jnp.where((top_k > 0) & (top_k < scaled.shape[-1]), top_k.astype(jnp.float32), jnp.inf)
  share = jnp.where(top_p < 1.0, top_p, jnp.inf)
  limits = (jnp.broadcast_to(x, scaled.shape[:-1]) for x in (count, share))
  # What is compared with the lowest must be, to the last bit, what the lowest was taken from.
  scaled = jax.lax.optimization_barrier(scaled)
  # A CPU is bound by what it computes, others by what they read, a GPU with few rows by the number of passes.
  search = functools.partial(_lowest_by_search, digit=1)
  return scaled, jax.lax.platform_dependent(scaled, *limits, cpu=search, tpu=_lowest_of_candidates,
                                            default=_lowest_by_search)


def _lowest(threshold, scaled, count, share):
  """The smallest that stays of scaled f32[...,V]: f32[...]. Top-k leaves `count` f32[...], top-p this share of them.

  threshold(weight, limit) -> f32[...]: the largest t where the weight of all that is t or above reaches the limit;
  weight is a function of scaled.
  """
  first = threshold(jnp.ones_like, count)
  mass = lambda x: jnp.where(x < first[..., None], 0.0, jnp.exp(x))
  return jnp.maximum(first, threshold(mass, share * jnp.sum(mass(scaled), axis=-1)))


def _lowest_by_search(scaled, count, share, digit=4):
  return _lowest(lambda weight, limit: -_threshold(-scaled, weight(scaled), limit, digit), scaled, count, share)


def _lowest_of_candidates(scaled, count, share):
  """`_lowest_by_search`, but from the largest of a row where it lies among them: one read in place of 16."""
  rows = scaled.reshape(-1, scaled.shape[-1])  # of more axes the TPU compiler sorts all
  largest = jax.lax.top_k(rows, min(CANDIDATES, scaled.shape[-1]))[0].reshape(*scaled.shape[:-1], -1)

  def threshold(weight, limit):
    reached = ~(jnp.cumsum(weight(largest), axis=-1) < limit[..., None])  # turned for NaN
    found = jnp.max(jnp.where(reached, largest, -jnp.inf), axis=-1)
    return jnp.where(jnp.any(reached, axis=-1) | jnp.isinf(limit), found, jnp.inf)  # inf: below the candidates

  found = _lowest(threshold, scaled, count, share).reshape(-1)

  # A row at a time: one is rare, and a search of all would also round the others' sums otherwise: no row may depend on
  # whether its neighbours need it.
  def search(found):
    place = jax.lax.broadcasted_iota(jnp.int32, (len(found), 1), 0)
    mine = place == jnp.argmax(found == jnp.inf)
    # By a mask, where a slice would gather the rows of a mesh's other devices.
    row, *limits = (jnp.max(jnp.where(mine, x.reshape(len(found), -1), -jnp.inf), axis=0)
                    for x in (rows, count, share))
    return jnp.where(mine[:, 0], _lowest_by_search(row, *(limit[0] for limit in limits)), found)

  found = jax.lax.while_loop(lambda found: jnp.any(found == jnp.inf), search, found)
  return found.reshape(count.shape)


def _one_hot(token, size):
  """f32[...,V] of tokens i32[...]; zeros for one that is none."""
  place = jax.lax.broadcasted_iota(jnp.int32, (*token.shape, size), token.ndim)
  return (place == token[..., None]).astype(jnp.float32)


def _over(setting, logits):
  """A setting [B] as [B,1,...,1], to go with logits f[B,...,V]."""
  return jnp.asarray(setting).reshape(-1, *[1] * (logits.ndim - 1))


def _threshold(distance, weight, limit, digit):
  """Largest t for which the weight at distances < t is below the limit: f32[...].

  distance: f32[...,V] >= 0, inf allowed. limit: f32[...], positive. digit: bits that a pass over V finds. Replaces
  sort, cumulative sum and look-up. A search over the 31 bits of a non-negative float, which order like integers, is
  exact; on CPU both cuts take a tenth to a twentieth of the time of one sort.
  """
  bits = jax.lax.bitcast_convert_type(jnp.abs(distance), jnp.uint32)  # abs: -0.0 would be the largest of all
  passes = -(-31 // digit)

  def refine(step, found):
    shift = jnp.uint32(digit) * (passes - 1 - step).astype(jnp.uint32)
    below = 0
    for value in range(1, 1 << digit):
      candidate = found | jax.lax.shift_left(jnp.uint32(value), shift)
      nearer = jnp.sum(jnp.where(bits < candidate[..., None], weight, 0.0), axis=-1)
      below += (nearer < limit).astype(jnp.uint32)  # sums of more are no smaller: the first so many are below
    return found | jax.lax.shift_left(below, shift)

  found = jax.lax.fori_loop(0, passes, refine, jnp.zeros(limit.shape, jnp.uint32))
  # Above the bits of inf lie NaNs, which would compare false.
  found = jnp.minimum(found, jnp.uint32(0x7F800000))
  return jax.lax.bitcast_convert_type(found, jnp.float32)


def _race_of_chunks(key, probs):
  """`_race` for CPUs, 40 times faster: first a chunk of the vocabulary by its mass, then a token inside it, each by a
  Gumbel race. The same distribution for about 2 sqrt(V) random numbers."""
  chunks = _chunks(probs, 0.0)
  n, width = chunks.shape
  # Mode "low" resolves the uniforms only to 2^-23, which quantises the tail of the vocabulary.
  noise = jax.random.gumbel(key, (n + width,), jnp.float32, mode="high")
  chunk = _first_max(jnp.log(jnp.sum(chunks, axis=-1)) + noise[:n])
  return _join(chunk, _first_max(jnp.log(_pick(chunks, chunk)) + noise[n:]), chunks, probs)


def _race(key, probs):
  """The token that comes first, when each comes at a rate of its probability: i32[] from f32[V]. A vocabulary that is
  split over devices is drawn from where it lies."""
  # All 32 bits: the winner's time is about as small as its probability, and a uniform of 23 bits would be 0 too often.
  uniform = (jax.random.bits(key, probs.shape, jnp.uint32).astype(jnp.float32) + 0.5) * 2.0 ** -32
  time = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0 ** -24))  # below 1: an infinite time would lose the only token
  return _first_max(jnp.where(probs == 0, -jnp.inf, probs / time))


def _argmax_of_chunks(logits):
  """`_first_max` for CPUs, by maxima of chunks: 6 times faster than jnp.argmax, whose reduction over (value, index)
  pairs is not vectorised."""
  chunks = _chunks(logits, -jnp.inf)
  chunk = _first_max(jnp.max(chunks, axis=-1))
  return _join(chunk, _first_max(_pick(chunks, chunk)), chunks, logits)


def _first_max_in_one_pass(x):
  """`_first_max` where x need not lie in memory for it: on a TPU, logits that a product makes do not (Qwen3-8B, 32
  rows: 19 MB, written once and read twice for every draft)."""
  best, first = largest(x)
  return jnp.where(best > -jnp.inf, first, x.shape[-1])


def _first_max(x):
  """Index of the first maximum; the size where there is a NaN or nothing above -inf."""
  size = x.shape[-1]
  best = jnp.max(x, axis=-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  first = jnp.min(jnp.where(x == best, index, size), axis=-1)
  return jnp.where(best[..., 0] > -jnp.inf, first, size)


def _chunks(x, fill):
  """f[...,V] as f[...,n,width], padded with fill, width a power of two near sqrt(V)."""
  size = x.shape[-1]
  width = 1 << (size.bit_length() // 2)
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -size % width)]
  return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:-1], -1, width)


def _pick(chunks, chunk):
  return jnp.take_along_axis(chunks, chunk[..., None, None], axis=-2, mode="clip")[..., 0, :]


def _join(chunk, within, chunks, x):
  return jnp.minimum(chunk * chunks.shape[-1] + within, x.shape[-1])
