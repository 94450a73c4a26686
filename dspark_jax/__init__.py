"""DSpark speculative decoding in JAX: load a target and a drafter, generate the same text in fewer, larger steps."""

from dspark_jax.decoding.generate import Generation
from dspark_jax.decoding.session import Session, generate
from dspark_jax.loading import (export_drafter, import_drafter, import_target, load_drafter, load_target,
                                load_temperatures, new_drafter, save_drafter)

__all__ = ["Generation", "Session", "export_drafter", "generate", "import_drafter", "import_target", "load_drafter",
           "load_target", "load_temperatures", "new_drafter", "save_drafter"]
