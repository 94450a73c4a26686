"""The parameters of a module by dotted path, which is their stored name; constants (draft words) are not among them."""

from __future__ import annotations

from flax import nnx

from dspark_jax.types import Array


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
  """The variables themselves: setting one changes the module."""
  return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def values(module: nnx.Module) -> dict[str, Array]:
  """What they hold, a plain pytree: what is trained, stored and hashed."""
  return {name: variable[...] for name, variable in parameters(module).items()}


def with_values(module: nnx.Module, new: dict[str, Array]) -> nnx.Module:
  """A module like this one with other values; the given one keeps its own."""
  graph, state, rest = nnx.split(module, nnx.Param, ...)
  flat = [(path, v.replace(new[".".join(map(str, path))])) for path, v in nnx.to_flat_state(state)]
  return nnx.merge(graph, nnx.from_flat_state(flat), rest)
