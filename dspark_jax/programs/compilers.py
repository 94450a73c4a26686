"""Compilers of accelerators that are not there: what they say of our programs can be had on any Linux machine."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

import jax

# A copy of libtpu outside the packages: installed among them, it would make every start of JAX look for a TPU, with
# warnings.
LIBRARY = Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so"
# The same for jax-cuda13-plugin and jax-cuda13-pjrt, which must be of jax's own version.
PLUGIN = Path(sys.prefix) / "gpu-compiler"
# What XLA must know of a GPU to compile for it: its h100_sxm.txtpb, shortened.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


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
  """The first device of an accelerator that is not there, as what arrays are lowered for; see `absent_devices`."""
  return jax.sharding.SingleDeviceSharding(absent_devices(topology)[0])


def absent_devices(topology: str) -> list[jax.Device]:
  """The devices of an accelerator that is not there; ValueError without its compiler.

  topology: of TPUs as libtpu names them (v5e:2x4, v5p:2x2x1, v6e:2x2 ...), or so many GPUs of one machine (h100:8).
  """
  from jax.experimental import topologies
  kind, _, count = topology.partition(":")
  gpu = kind == "h100"
  try:
    if gpu:
      _register_gpus()
      how = dict(platform="cuda", target_config=H100, topology=f"1x1x{int(count or 1)}")
    else:
      _find_libtpu()
      how = dict(platform="tpu", topology_name=topology)
    return list(topologies.get_topology_desc(**how).devices)
  except Exception as error:  # a compiler is missing, or does not know the topology: their errors have no common base
    name, target = ("GPU", "gpu-compiler") if gpu else ("TPU", "tpu-compiler")
    raise ValueError(f"no {name} compiler for {topology} ({error}): run `make {target}`, or choose another "
                     f"topology") from error


def _find_libtpu():
  # The compiler is loaded once per process, and reads these:
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")         # no machine in a cloud is asked what it is
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests run in several processes
  # What a TPU's own machine would be told. Without them it warns at length; the topology asked for holds all the same.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  if LIBRARY.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(LIBRARY))


@functools.cache
def _register_gpus():
  jax.devices()  # first: what is registered before would be looked for as devices of this machine
  if PLUGIN.exists():
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver whose version could be checked
    sys.path.append(str(PLUGIN))
    importlib.import_module("jax_plugins.xla_cuda13").initialize()
