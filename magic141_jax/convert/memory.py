"""Will it fit? Bytes that parameters need on each device, and on disk, told before anything is loaded or written.

Only parameters are counted: activations come on top and depend on the size of the video.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.models.stored import cast
from magic141_jax.pytree import Params


def layout(abstract_params: Params, mesh: Mesh | None, rules: sharding.Rules = ()) -> Any:
    """The sharding of every parameter: by the mesh and its rules, or the default device where there is no mesh."""
    if mesh is not None:
        return sharding.shardings(abstract_params, mesh, rules)
    one = SingleDeviceSharding(_default_device())
    return jax.tree.map(lambda _: one, abstract_params)


def memory_needed(abstract_params: Params, dtype: Any, mesh: Mesh | None = None, *, rules: sharding.Rules = ()) -> int:
    """Bytes of the parameters on each device, floating ones in `dtype`."""
    return sharding.bytes_per_device(cast(abstract_params, dtype), layout(abstract_params, mesh, rules))


def memory_free(device: jax.Device) -> int | None:
    """Bytes that are free on an accelerator, or in the host's memory for a CPU device; None where that isn't known."""
    if device.platform == "cpu":
        return _host_memory()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def require_memory(
    abstract_params: Params, dtype: Any, mesh: Mesh | None = None, *, what: str, rules: sharding.Rules = ()
) -> int:
    """Checks that the parameters fit, and returns the bytes that each device needs.

    Raises:
      UserError: they don't; it says how much is needed, how much is free, and what would make it fit.
    """
    devices = list(mesh.local_devices) if mesh is not None else [_default_device()]
    needed = memory_needed(abstract_params, dtype, mesh, rules=rules)
    free = memory_free(devices[0])
    # All CPU devices of a process share the host's memory.
    share = None if free is None else free // (len(devices) if devices[0].platform == "cpu" else 1)
    if share is None or needed <= share:
        return needed
    raise UserError(
        f"the parameters of {what} need {gigabytes(needed)} in {jnp.dtype(dtype).name} on each of {len(devices)} "
        f"devices, which have {gigabytes(share)} free; "
        + _remedy(needed, share, devices[0].platform, abstract_params, dtype=dtype, mesh=mesh, rules=rules)
    )


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Checks that `needed` more bytes fit on the disk that holds `folder` or will.

    Raises:
      UserError: they don't.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(f"{what} takes {gigabytes(needed)}, but {place} has {gigabytes(free)} free; make room there")


def gigabytes(size: int) -> str:
    """A number of bytes for people, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _default_device() -> jax.Device:
    """Where new arrays are made: the first device, unless a context such as `sharding.on_host` says another."""
    return next(iter(jnp.zeros(()).devices()))


def _remedy(needed: int, free: int, platform: str, abstract_params: Params, **placing: Any) -> str:
    """The flags that would make the parameters fit."""
    smaller = memory_needed(abstract_params, jnp.bfloat16, placing["mesh"], rules=placing["rules"])
    ways = []
    if smaller <= free and jnp.dtype(placing["dtype"]) != jnp.bfloat16:
        ways.append(f"--dtype bfloat16 ({gigabytes(smaller)})")
    if platform != "cpu":
        fsdp = placing["mesh"].shape["fsdp"] if placing["mesh"] is not None else 1
        for name, size in (("", needed), (" with --dtype bfloat16", smaller)):
            ways.append(f"a mesh of more devices, fsdp {fsdp * math.ceil(size / max(free, 1))} or more{name}")
            if smaller == needed:
                break
    return f"it would fit with {', or '.join(ways)}" if ways else "a machine with more memory is needed"


def _host_memory() -> int | None:
    """What Linux says that programs can still take; elsewhere all of the memory there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= os.sysconf_names.keys() else None
