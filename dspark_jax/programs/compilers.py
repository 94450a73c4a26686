"""Compilers of accelerators that are not there: what they say of our programs can be had on any Linux machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

# A copy of libtpu outside the packages: installed among them, it would make every start of JAX look for a TPU, with
# warnings.
LIBRARY = Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so"


def absent_tpu(topology: str) -> jax.sharding.Sharding:
  """One device of a TPU that is not there, as what arrays are lowered for; ValueError without its compiler.

  topology: as libtpu names them (v5e:2x4, v5p:2x2x1, v6e:2x2 ...).
  """
  from jax.experimental import topologies  # the compiler is loaded here, once per process, and reads these:
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")         # no machine in a cloud is asked what it is
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests run in several processes
  # What a TPU's own machine would be told. Without them it warns at length; the topology asked for holds all the same.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  if LIBRARY.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(LIBRARY))
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  except Exception as error:  # libtpu is missing, or does not know the topology: its errors have no common base
    raise ValueError(f"no TPU compiler for {topology} ({error}): run `make tpu-compiler`, or choose another "
                     f"topology") from error
  return jax.sharding.SingleDeviceSharding(devices[0])
