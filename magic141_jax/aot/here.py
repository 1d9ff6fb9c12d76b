"""The devices at hand: how much memory is free on each, and how fast they multiply, by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.convert.memory import memory_free

SECONDS = 0.3  # of measuring
SIDES = {"cpu": 1024}  # of the matrices that are multiplied; of other platforms OTHER_SIDE
OTHER_SIDE = 8192
LAYERS = 8  # products in a row, so that starting a program counts for little


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that are free on each of some devices; CPU devices share the host's. None where that isn't known."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    frees = [memory_free(device) for device in here]
    if None in frees or not frees:
        return None
    return min(frees) // (len(here) if here[0].platform == "cpu" else 1)


def process_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes a device that this process has taken at the most till now, its compiler's among them, where these count.

    That is on CPUs, which have no memory but the host's; and only Linux tells. Elsewhere it is 0.
    """
    if devices[0].platform != "cpu":
        return 0
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return peak // sum(device.process_index == jax.process_index() for device in devices)


def matmul_rate(devices: Sequence[jax.Device], dtype: Any) -> float:
    """Operations a second of all these devices together, multiplying matrices in `dtype`: the best of some tries.

    CPU devices are threads of one processor, so one of them counts for all.
    """
    device = next(device for device in devices if device.process_index == jax.process_index())
    side = SIDES.get(device.platform, OTHER_SIDE)
    matrix = jax.device_put(jnp.full((side, side), 1 / side, dtype), device)

    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, LAYERS, lambda _, y: y @ x, x)

    product(matrix).block_until_ready()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return LAYERS * 2 * side**3 / best * (1 if device.platform == "cpu" else len(devices))
