"""How likely a target finds a finished text: log-probabilities of its tokens, as serving engines report them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.nn.attention import QUERY_BLOCK
from dspark_jax.types import Array, Batch, Target

# Positions of a row whose logits exist at a time, and what rows are padded to: one compilation per multiple.
CHUNK = QUERY_BLOCK


def check(target: Target, longest: int) -> None:
  """ValueError where the target's kernels do not take texts of so many tokens, those of their prompts included."""
  if target.kernels.train == "splash":
    from dspark_jax.nn.splash import LONGEST  # as in nn/attention.py
    if longest > LONGEST:
      raise ValueError(f"log-probabilities are asked for texts of up to {longest} tokens, prompts included, and splash "
                       f"attends to at most {LONGEST}: lower max_new_tokens, or read them by --kernels.train reference")


@jax.jit
def token_logprobs(target: Target, tokens: Array) -> Array:
  """log P(tokens[t] | tokens[:t]) under the target: f32[B,T] of tokens i32[B,T], T a multiple of CHUNK; 0 at t = 0.

  Of the raw logits, whatever temperature the text was drawn at. Padding goes on the right, where no token sees it.
  """
  whole = jnp.ones(tokens.shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  hidden = target.encode(Batch(tokens, whole.astype(bool), whole, positions), ()).hidden
  head = target.head()

  def part(rows):
    hidden, following = rows
    logits = head(hidden)
    picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  # In chunks: the logits of a whole text would be its length times the vocabulary.
  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)
  said = jax.lax.map(part, (split(hidden), split(jnp.roll(tokens, -1, axis=1))))
  said = jnp.moveaxis(said, 0, 1).reshape(tokens.shape)
  return jnp.pad(said[:, :-1], ((0, 0), (1, 0)))


def logprobs(target: Target, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[list[float]]:
  """Of every token of the texts, each of which followed its prompt (at least one token): `token_logprobs`."""
  rows = [[*prompt, *text] for prompt, text in zip(prompts, texts)]
  tokens = np.zeros((len(rows), -(-max(map(len, rows)) // CHUNK) * CHUNK), np.int32)
  for row, ids in enumerate(rows):
    tokens[row, :len(ids)] = ids
  found = np.asarray(token_logprobs(target, tokens))
  return [found[row, len(prompt):len(ids)].tolist() for row, (prompt, ids) in enumerate(zip(prompts, rows))]
