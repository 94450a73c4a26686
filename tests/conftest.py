"""Tests run on eight fake CPU devices, with strict dtype and rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all of the suite's time is compilation, of programs that then run for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
