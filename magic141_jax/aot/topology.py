"""Slices and nodes by name, "v5p:2x2x2" or "h100:8", as devices that programs are compiled for but never run on.

TPU programs are compiled by libtpu, which needs no TPU. CUDA programs need XLA's CUDA plugin, which needs no GPU;
where it is not installed, shapes and shardings are still known, and a GPU topology is made of stand-in CPU devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from magic141_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      memory: bytes of its HBM.
      rate: of its matrix units in bfloat16, operations a second.
      bandwidth: of its HBM, bytes a second.
      interconnect: of all its links to other chips together, in one direction, bytes a second.
      dimensions: of the torus that a slice of them is; 0 for GPUs, which are counted.
      ring: axes of multiples of so many chips have their ends joined, in three dimensions if all are; others are open.
      options: what the TPU compiler wants besides.
    """

    memory: int
    rate: float
    bandwidth: float
    interconnect: float
    dimensions: int
    ring: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ONE_DEVICE = {"chip_config_name": "megacore"}  # both cores of a chip are one device

# Of a TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture"; of its links half of what is published as
# bidirectional, and v4's are the six of 50 GB/s of arXiv 2304.01433. Of an H100 SXM of 80 GB: NVIDIA's data sheet, its
# rate without sparsity, NVLink likewise halved; its HBM is what CUDA reports, a little less than that.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1200e9, 300e9, dimensions=3, ring=4, options=ONE_DEVICE),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, dimensions=2, ring=16),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, dimensions=3, ring=4, options=ONE_DEVICE),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, dimensions=2, ring=16),
    "h100": Chip(84929347584, 989e12, 3350e9, 450e9, dimensions=0),
}
FULL_HOST = 4  # chips of the smallest slice that the compiler takes for a whole host
NODE = 8  # GPUs of a host
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
CUDNN_VERSION, CAPABILITY = 91200, (9, 0)  # those that H100 above tells the compiler of
NO_TUNING = {"xla_gpu_autotune_level": 0, "xla_gpu_shard_autotuning": False}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice or node.

    Attributes:
      name: as it was asked for.
      chip: its accelerators.
      devices: one a chip.
      compiles: whether programs can be compiled for them here.
      interconnect: bytes a second that a chip can receive, on average over the chips: of an open axis, the first and
        the last have one link less.
      options: for the compiler of a program.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    compiles: bool
    interconnect: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
        devices = _tpu(name, chip, sizes)
        return Topology(
            name, chip, devices, compiles=True, interconnect=chip.interconnect * share_of_links(chip, sizes)
        )
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        devices = _gpu(name, *sizes)
        return Topology(name, chip, devices, compiles=True, interconnect=chip.interconnect, options=NO_TUNING)
    return Topology(name, chip, _stand_ins(name, *sizes), compiles=False, interconnect=chip.interconnect)


def share_of_links(chip: Chip, sizes: Sequence[int]) -> float:
    """The share of the links of its TPU chips that a slice uses, on average: an open axis of n has 2 (n - 1) for n."""
    rings = [size % chip.ring == 0 for size in sizes]
    joined = rings if chip.dimensions == 2 else [all(rings)] * len(sizes)
    return sum(1 if ring else (n - 1) / n for n, ring in zip(sizes, joined)) / chip.dimensions


@contextlib.contextmanager
def as_if_there(topology: Topology) -> Iterator[None]:
    """Inside, jax takes the GPUs of a topology for there where it asks for them: for cuDNN's attention.

    While that is traced and lowered, jax asks the machine for the version of cuDNN and the capability of the GPU. The
    answers decide what it refuses, not what it compiles.
    """
    if topology.chip.dimensions or not topology.compiles:
        yield
        return
    answers = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda least: _version(least) <= CAPABILITY,
        "is_cuda_compute_capability_equal": lambda wanted: _version(wanted) == CAPABILITY,
    }
    before = {name: getattr(fused_attention_stablehlo, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused_attention_stablehlo, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention_stablehlo, name, function)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


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


def _gpu(name: str, count: int) -> Sequence[jax.Device]:
    hosts, rest = divmod(count, NODE)
    if hosts and rest:
        raise UserError(f"--topology {name}: more than {NODE} GPUs are whole nodes of {NODE}")
    shape = f"1x{hosts}x{NODE}" if hosts else f"1x1x{count}"  # slices, hosts, GPUs of a host
    try:
        return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=shape).devices
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--topology {name}: {str(error).splitlines()[0]}") from None


def _stand_ins(name: str, count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the devices are there already
        if len(jax.devices("cpu")) < count:
            raise UserError(f"--topology {name} needs {count} CPU devices to stand in for GPUs") from None
    return jax.devices("cpu")[:count]
