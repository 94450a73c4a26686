"""Compilers of accelerators that are not there: what they say of our programs can be had on any Linux machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import jax

# A copy of libtpu outside the packages: installed among them, it would make every start of JAX look for a TPU, with
# warnings.
LIBRARY = Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so"


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a device can do, as published. On TPU7x a device is half a chip; elsewhere it is one."""
  name: str
  memory: float     # bytes that programs may have, which is what their compiler names when they do not fit
  bandwidth: float  # of its main memory, bytes per second
  flops: float      # per second, of bfloat16 products


GIB = 2 ** 30
# By device_kind. TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x. GPUs: their data sheets.
CHIPS = {"TPU v5 lite": Chip("v5e", 15.75 * GIB, 819e9, 197e12), "TPU v5": Chip("v5p", 95.73 * GIB, 2765e9, 459e12),
         "TPU v6 lite": Chip("v6e", 31.24 * GIB, 1638e9, 918e12),
         "TPU7x": Chip("tpu7x", 94.74 * GIB, 7380e9 / 2, 2307e12 / 2),
         "NVIDIA H100 80GB HBM3": Chip("h100", 80e9, 3350e9, 989e12),
         "NVIDIA H100 PCIe": Chip("h100-pcie", 80e9, 2000e9, 756e12),
         "NVIDIA H200": Chip("h200", 141e9, 4800e9, 989e12),
         "NVIDIA A100-SXM4-80GB": Chip("a100", 80e9, 2039e9, 312e12),
         "NVIDIA L4": Chip("l4", 24e9, 300e9, 121e12)}


def chip_of(device: jax.Device) -> Chip:
  """What is published of a device; ValueError for one that is not in the table."""
  if device.device_kind not in CHIPS:
    raise ValueError(f"nothing is known here of a {device.device_kind}: choose one of "
                     f"{', '.join(chip.name for chip in CHIPS.values())}, or add it to programs/compilers.py")
  return CHIPS[device.device_kind]


def absent_tpu(topology: str) -> jax.sharding.Sharding:
  """The first device of a TPU that is not there, as what arrays are lowered for; see `absent_devices`."""
  return jax.sharding.SingleDeviceSharding(absent_devices(topology)[0])


def absent_devices(topology: str) -> list[jax.Device]:
  """The devices of a TPU that is not there; ValueError without its compiler.

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
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except Exception as error:  # libtpu is missing, or does not know the topology: its errors have no common base
    raise ValueError(f"no TPU compiler for {topology} ({error}): run `make tpu-compiler`, or choose another "
                     f"topology") from error
