"""Tests run on eight fake CPU devices, with strict dtype and rank promotion."""

import gc
import os
import platform
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all of the suite's time is compilation, of programs that then run for milliseconds. So it is quick, and what
# takes more than a second is compiled once for all processes and runs. (Smaller ones, too, would save little, and
# jaxlib 0.12 once crashed as it wrote a program down.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
                                   "--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
import jax
import pytest

# Traces and caches are millions of objects that stay: looking through them for cycles, at Python's own rate, takes 5 %.
# (Much more seldom would leave behind what tests of memory count.)
gc.set_threshold(10_000, 20, 20)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
  """libtpu has wheels for one kind of machine."""
  if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    for item in items:
      if item.get_closest_marker("tpu_compiler"):
        item.add_marker(pytest.mark.skip(reason="libtpu has no wheel here"))
