"""Slices and nodes by name, "v5p:2x2x2" or "h100:8", as devices that programs are compiled for but never run on.

TPU programs are compiled by libtpu, which needs no TPU. CUDA programs need XLA's CUDA plugin, which needs no GPU;
where it is not installed, shapes and shardings are still known, and a GPU topology is made of stand-in CPU devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from magic141_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      memory: bytes of its HBM.
      rate: of its matrix units in bfloat16, operations a second.
      dimensions: of the torus that a slice of them is; 0 for GPUs, which are counted.
      options: what the TPU compiler wants besides.
    """

    memory: int
    rate: float
    dimensions: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ONE_DEVICE = {"chip_config_name": "megacore"}  # both cores of a chip are one device

# HBM and rate of a chip: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"; the GPU's HBM is what CUDA
# reports on an H100 SXM of 80 GB (NVIDIA's data sheet), a little less than that, and its rate is without sparsity.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 3, ONE_DEVICE),
    "v5e": Chip(16 * GIB, 197e12, 2),
    "v5p": Chip(95 * GIB, 459e12, 3, ONE_DEVICE),
    "v6e": Chip(32 * GIB, 918e12, 2),
    "h100": Chip(84929347584, 989e12, 0),
}
FULL_HOST = 4  # chips of the smallest slice that the compiler takes for a whole host
# XLA's description of an H100 SXM (compute capability 9.0), as its GPU compiler wants it in place of a device
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# There is no TPU to be had for oneself, none whose name a server knows, and no GPU to time kernels on.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
NO_TUNING = "--xla_gpu_shard_autotuning=false --xla_gpu_autotune_level=0"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice or node.

    Attributes:
      name: as it was asked for.
      chip: its accelerators.
      devices: one a chip.
      compiles: whether programs can be compiled for them here.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    compiles: bool


def make(name: str) -> Topology:
    """The topology of a name such as v5p:2x2x2, v6e:4x4 or h100:8.

    Raises:
      UserError: an unknown chip, sizes that no slice of it has, or no compiler for it.
    """
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology {name}: unknown chip {kind!r}.{nearest(kind, CHIPS)}")
    chip = CHIPS[kind]
    example = "x".join(["2"] * chip.dimensions) or "8"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or size.count("x") + 1 != max(chip.dimensions, 1):
        raise UserError(f"--topology {name}: the sizes of a {kind} slice look like {kind}:{example}")
    sizes = tuple(map(int, size.split("x")))
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    if chip.dimensions:
        return Topology(name, chip, _tpu(name, chip, sizes), compiles=True)
    return _gpu(name, chip, *sizes)


def _tpu(name: str, chip: Chip, sizes: tuple[int, ...]) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install -r requirements-dev.txt")
    options = dict(chip.options)
    if math.prod(sizes) < FULL_HOST:
        options["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--topology {name}: {str(error).splitlines()[0]}") from None


def _gpu(name: str, chip: Chip, count: int) -> Topology:
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_TUNING}".strip()
        made = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x1x{count}")
        return Topology(name, chip, made.devices, compiles=True)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are there already
        if len(jax.devices("cpu")) < count:
            raise UserError(f"--topology {name} needs {count} CPU devices to stand in for GPUs") from None
    return Topology(name, chip, jax.devices("cpu")[:count], compiles=False)
