"""Timings: median, least and most over repeats, in seconds of the wall and of this process's cores.

On a machine that others use the wall's seconds say little and the process's own more; `other_cores` tells how many
cores were busy with something else meanwhile, where the system tells (Linux). What is compared is run in turns, in
changing order, so that all sides meet the same machine.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MATMUL_SIDE = {"cpu": 2048}  # of the matrices that a ceiling is measured on; LARGE_SIDE elsewhere
LARGE_SIDE = 8192
SHORTEST = 0.1  # seconds of a lap
MAX_CALLS = 100


class Lap(NamedTuple):
    """Seconds of one call: of the wall, of this process's cores, of all other work on the machine (None: unknown)."""

    wall: float
    cpu: float
    others: float | None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Several laps: seconds of the wall and of this process's cores, and how many cores others kept busy meanwhile."""

    repeats: int
    median: float
    least: float
    most: float
    cpu: float
    cpu_least: float
    cpu_most: float
    other_cores: float | None


def timing(laps: list[Lap]) -> Timing:
    """Medians and ranges of at least one lap."""
    wall, cpu = ([getattr(lap, name) for lap in laps] for name in ("wall", "cpu"))
    known = [lap.others for lap in laps if lap.others is not None]
    others = sum(known) / max(sum(wall), 1e-9) if len(known) == len(laps) else None
    return Timing(
        len(laps),
        *(reduce(wall) for reduce in (statistics.median, min, max)),
        *(reduce(cpu) for reduce in (statistics.median, min, max)),
        other_cores=others,
    )


def lap(function: Callable[[], Any], calls: int = 1) -> Lap:
    """Seconds of a call, as the mean of `calls`; waits for what JAX has still to compute of the results."""
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    others = None if busy is None else max(0.0, busy_seconds() - busy - cpu) / calls
    return Lap(wall / calls, cpu / calls, others)


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int, *, shortest: float = SHORTEST) -> dict[str, Timing]:
    """Times functions one after another, `repeats` times over, every other time in reverse; first calls are not timed.

    Args:
      sides: by name; each returns arrays, or what blocks by itself.
      repeats: at least 1.
      shortest: seconds that a lap takes at least, by as many calls as that needs: systems count the time of cores in
        steps of some milliseconds.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in sides}
    calls = {}
    for name, function in sides.items():
        lap(function)  # compiles
        calls[name] = 1 if shortest == 0 else math.ceil(shortest / max(lap(function).wall, shortest / MAX_CALLS))
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            laps[name].append(lap(sides[name], calls[name]))
    return {name: timing(each) for name, each in laps.items()}


def busy_seconds() -> float | None:
    """Seconds that all cores of the machine have worked since it started; None where the system doesn't tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, interrupt, soft, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def matmul(dtype: Any, repeats: int = 5, *, side: int | None = None) -> tuple[Timing, float]:
    """Times a square matrix product on the default device: the timing, and its operations.

    The ceiling that a network's rate is held against is what the same library does best in the same run, not what
    the maker of the chip promises.
    """
    side = side or MATMUL_SIDE.get(jax.default_backend(), LARGE_SIDE)
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.dot)
    return in_turns({"matmul": lambda: product(x, x)}, repeats)["matmul"], 2.0 * side**3


def share(operations: float, taken: Timing, ceiling: tuple[Timing, float]) -> float:
    """The share of a ceiling's rate that `operations` reached: by seconds of cores on a CPU, else by the wall's.

    Best times of both, for what disturbs a run is no property of the program.
    """
    name = "cpu_least" if jax.default_backend() == "cpu" else "least"
    best, operations_there = ceiling
    return (operations / getattr(taken, name)) / (operations_there / getattr(best, name))


def peak_memory() -> dict[str, float]:
    """Peak megabytes so far: this process's resident set on a CPU, elsewhere what the first device's allocator held."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return {"device": stats["peak_bytes_in_use"] / 1e6}
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {"resident": int(lines["VmHWM"].split()[0]) * 1024 / 1e6}
