"""Where arrays live: a mesh from a config, and a named sharding for every leaf of a tree from a table of rules.

The mesh has four axes: "data" (batch only), "fsdp" (batch, and weights in slices that are gathered layer by layer),
"tensor" (weights within a layer, and attention heads) and "context" (the tokens of a sequence, the rows and columns of
a picture). Batches are split over data x fsdp. Of several TPU slices, which a slow network joins, each has its part of
"data". A rule is a pair

    (regex, (axis or None, ...))      such as (r"attention\\.q\\.kernel", ("fsdp", "tensor"))

The regex is searched for in the dotted path of a leaf, and the first that is found decides; so do not anchor it: the
same table places the optimizer's moments and the averaged weights, whose paths end like those of the parameters.
The axes are those of the last dimensions, so that one rule serves a layer and a stack of layers. A leaf without a
rule has its largest dimension that "fsdp" divides split over "fsdp", or is copied to all devices if it is small.
For a weight "fsdp" means fsdp x context, where both divide: devices that share a sequence need not all hold it whole.

Axes are `AxisType.Auto`: the compiler chooses the shardings in between, and numbers do not depend on the mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magic141_jax.errors import UserError, nearest

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
SPACE_AXES = ("context", "tensor", "fsdp", "data")  # who shares a picture, nearest neighbours first
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; one of them may be -1 and takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def parse_mesh(text: str) -> MeshConfig:
    """The config of "fsdp=2,context=4"; what it leaves is "data", unless another axis is -1 and takes it.

    Raises:
      UserError: an unknown axis, one that is named twice, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES:
            raise UserError(f"the mesh {text!r} names the axis {axis!r}.{nearest(axis, AXES)}")
        if axis in sizes:
            raise UserError(f"the mesh {text!r} names the axis {axis!r} twice")
        if not size.removeprefix("-").isdecimal():
            raise UserError(f"the mesh {text!r} gives {axis} the size {size!r}; write {axis}=2, say")
        sizes[axis] = int(size)
    return MeshConfig(**{"data": 1 if -1 in sizes.values() else -1, **sizes})


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one leaf goes, and why."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    reason: str


def make_mesh(config: MeshConfig | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, all of them unless said; any process may call it.

    Neighbours along the last axes are neighbours in the machine: in the torus of a TPU slice, on one host of GPUs.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or "data" doesn't to that of the slices.
    """
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = f"mesh {'x'.join(map(str, sizes))} ({' x '.join(AXES)})"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{asked}: sizes are positive, and one of them may be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    filled = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(filled) != len(devices):
        mend = f"{fixed} does not divide that" if -1 in sizes else "set one size to -1"
        raise UserError(f"{asked} does not fit {len(devices)} devices; {mend}")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if filled[0] % slices:
        raise UserError(f"{asked}: the {slices} slices each take a part of data, so it must be a multiple of {slices}")
    within = (filled[0] // slices, *filled[1:])
    if slices == 1:
        placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            within, (slices, *[1] * (len(within) - 1)), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def placements(tree: Any, mesh: Mesh, rules: Rules = (), *, small: int = 2**16) -> list[Placement]:
    """The placement of every leaf of a pytree (parameters, optimizer state...) of arrays or shape structs, in order.

    The fallback copies leaves with fewer values than `small`; `rules` are explained at the top of the module.

    Raises:
      ValueError: a rule names an unknown axis or has more axes than its leaf has dimensions.
    """
    return [
        _place(
            jax.tree_util.keystr(path, simple=True, separator="."), tuple(leaf.shape), mesh, rules=rules, small=small
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def shardings(tree: Any, mesh: Mesh, rules: Rules = (), *, small: int = 2**16) -> Any:
    """A tree like `tree` with a `NamedSharding` per leaf, for `jax.jit` and `jax.device_put`; see `placements`."""
    placed = [NamedSharding(mesh, p.spec) for p in placements(tree, mesh, rules, small=small)]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def table(tree: Any, mesh: Mesh, rules: Rules = (), *, small: int = 2**16) -> str:
    """What went where, one line a leaf (path, shape, spec, reason), and the memory per device in the last line."""
    placed = placements(tree, mesh, rules, small=small)
    rows = [(p.path, "x".join(map(str, p.shape)) or "scalar", f"({spec_text(p.spec)})", p.reason) for p in placed]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
    whole = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    local = bytes_per_device(tree, shardings(tree, mesh, rules, small=small))
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return "\n".join([*lines, f"mesh {shape}: {whole / 2**20:.1f} MiB in all, {local / 2**20:.1f} MiB on a device"])


def spec_text(spec: PartitionSpec) -> str:
    """The mesh axes of each dimension, such as "fsdp x context, -"."""
    return ", ".join("-" if axes is None else " x ".join(np.atleast_1d(axes)) for axes in spec)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """The memory that a tree of arrays or shape structs takes on each device, by a tree of shardings like it."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf, s in pairs)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, size: int | None = None) -> NamedSharding:
    """The leading axis split over data x fsdp, for arrays of any rank from 1; copied if its `size` does not divide."""
    splits = size is None or size % _shards(mesh.shape) == 0
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES)) if splits else replicated(mesh)


def require_split(batch_size: int, mesh: Mesh) -> None:
    """Raises `UserError` if a batch cannot be split evenly over the mesh; it names the nearest sizes that can."""
    unit = _shards(mesh.shape)
    if batch_size < 1 or batch_size % unit:
        lower = batch_size // unit * unit
        near = " or ".join(str(size) for size in (lower, lower + unit) if size > 0)
        raise UserError(f"batch size {batch_size} does not split over {unit} shards; take {near}")


def batch_rows(batch_size: int, mesh: Mesh, *, devices: Sequence[jax.Device] | None = None) -> np.ndarray:
    """The rows of a global batch that some devices of a mesh hold, this process's unless said: those that it loads.

    In order, but not always without gaps: on a torus the devices of a host are no row. Processes among which "tensor"
    or "context" is split have the same rows.
    """
    require_split(batch_size, mesh)
    held = batch_sharding(mesh).devices_indices_map((batch_size,))
    parts = [np.arange(batch_size)[held[device]] for device in (devices or mesh.local_devices)]
    return np.unique(np.concatenate(parts))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays, this process's rows of the batch, as global arrays split on the leading axis; scalars are copied."""
    held = len(batch_rows(_shards(mesh.shape), mesh))

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if not leaf.ndim:
            return place(leaf, replicated(mesh))
        size = leaf.shape[0] * _shards(mesh.shape) // held
        rows = batch_rows(size, mesh)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return leaf[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has whole as global ones, split on the leading axis if it divides, else copied."""

    def split(leaf: Any) -> NamedSharding:
        return batch_sharding(mesh, np.shape(leaf)[0]) if np.ndim(leaf) else replicated(mesh)

    return place(tree, jax.tree.map(split, tree))


def place(tree: Any, where: Any) -> Any:
    """Arrays laid by a tree of shardings like theirs: global ones, or what every process has whole.

    No device is given more than its part.
    """

    def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        everywhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if sharding.is_fully_addressable or everywhere:
            return jax.device_put(leaf, sharding)
        # `device_put` would first send the array to all processes, to see that they agree.
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree, where)


def lay(params: Any, mesh: Mesh | None, rules: Rules = ()) -> Any:
    """A tree of parameters laid over a mesh by `shardings`; as it is without one."""
    return params if mesh is None else place(params, shardings(params, mesh, rules))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on; None of those on a single device."""
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)), None)


def on_host() -> contextlib.AbstractContextManager[Any]:
    """A context in which new arrays are made in the host's memory, from where `place` takes them to their devices."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves out the CPU
        return contextlib.nullcontext()


def to_host(tree: Any, *, keep: bool = True, chunk: int = 2**28) -> Any:
    """Arrays over a mesh as whole NumPy arrays; of several processes all have to call it.

    What a process doesn't hold comes to its devices in pieces of about `chunk` bytes, cut along the leading axis. A
    process with `keep` false only takes part, and has None in place of every array that it doesn't hold.
    """

    def fetch(leaf: Any) -> np.ndarray | None:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        whole, rows = replicated(leaf.sharding.mesh), max(1, chunk * leaf.shape[0] // leaf.nbytes)  # pyright: ignore[reportAttributeAccessIssue]
        pieces = []
        for start in range(0, leaf.shape[0], rows):
            piece = jax.block_until_ready(jax.device_put(leaf[start : start + rows], whole))
            pieces += [np.asarray(piece)] * keep
        return np.concatenate(pieces) if keep else None

    return jax.tree.map(fetch, tree)


def keep_split(x: jax.Array, *, tokens: bool = False) -> jax.Array:
    """Holds an activation's leading axis, the batch, split over data x fsdp; its other axes are the compiler's choice.

    With `tokens` the second axis is held split over "context". Weights lie in slices along "fsdp" too. Left to itself
    the compiler may find it cheaper to gather a layer's batch than its weights, and then holds activations of the whole
    batch on every device. Without a mesh (see `over`), or where an axis doesn't divide, that axis is left alone.
    """
    split = tokens and ways("context") > 1 and x.shape[1] % ways("context") == 0
    held = [batch_axes(x.shape[0]), *["context"] * split]
    if not any(held):
        return x
    free = PartitionSpec.UNCONSTRAINED
    spec = [free if axes is None else axes for axes in held] + [free] * (x.ndim - len(held))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def split_space(x: jax.Array, *, rows: int = 2, columns: int = 3) -> jax.Array:
    """Holds pictures, with the axes `rows` and `columns`, split over the batch and over space; see `space_spec`.

    The compiler then adds up a norm's sums over the devices; for convolutions see `models.halo`.
    """
    spec = space_spec(x.shape, rows=rows, columns=columns)
    return jax.lax.with_sharding_constraint(x, spec) if any(spec) else x


def keep_whole(x: jax.Array) -> jax.Array:
    """Holds all of an array but the batch whole on every device, where there is a mesh (see `over`)."""
    there = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(x.shape[0]))) if there else x


def space_spec(shape: Sequence[int], *, rows: int = 2, columns: int = 3) -> PartitionSpec:
    """How pictures lie over the mesh that is traced for (see `over`): split over the batch, and over space.

    The batch takes data x fsdp if it divides by them. Each axis that it leaves goes to the columns or to the rows,
    whichever have more factors of two left, and splits them if it divides them. A picture, its latents and all levels
    between differ by factors of two in both, so that no axis ever changes sides, which would move everything.

    Args:
      shape: of the pictures, batch first.
      rows, columns: which axes of it these are.
    """
    batch = batch_axes(shape[0])
    found: dict[int, list[str]] = {columns: [], rows: []}
    left = {side: shape[side] for side in found}
    twos = {side: (size & -size).bit_length() for side, size in left.items()}
    for axis in SPACE_AXES:
        count = ways(axis)
        if count > 1 and not (batch and axis in BATCH_AXES):
            side = max(found, key=twos.__getitem__)
            twos[side] -= count.bit_length() - 1
            if left[side] % count == 0:
                found[side].append(axis)
                left[side] //= count
    # In the mesh's order, which is the one that `ppermute` counts by, whatever order it is told.
    held = {side: tuple(sorted(axes, key=AXES.index)) or None for side, axes in found.items()}
    held[0] = batch
    return PartitionSpec(*map(held.get, range(len(shape))))


def ways(axis: str) -> int:
    """The size of an axis of the mesh that is traced for (see `over`); 1 where there is none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def platform() -> str:
    """Of the mesh that is traced for (see `over`), which may be of another machine than this: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"


def local_batch(size: int) -> int:
    """How many samples of a batch lie on one device of the mesh (see `over`); all of them if they don't divide."""
    shards = _shards(jax.sharding.get_abstract_mesh().shape)
    return size if size % shards else size // shards


def batch_axes(size: int) -> tuple[str, ...] | None:
    """The mesh axes that a batch of that size is split over (see `over`); None where it isn't."""
    return BATCH_AXES if local_batch(size) < size else None


def over(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be traced by `jax.jit`, with a mesh that the functions above find; as it is without one."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return wrapped


def _shards(shape: Mapping[str, int]) -> int:
    """Into how many parts a mesh of that shape splits a batch; one where there is no mesh, which is an empty one."""
    return math.prod(shape.get(axis, 1) for axis in BATCH_AXES)


def _place(path: str, shape: tuple[int, ...], mesh: Mesh, *, rules: Rules, small: int) -> Placement:
    for pattern, axes in rules:
        if re.search(pattern, path):
            return Placement(path, shape, *_by_rule(path, shape, mesh, pattern=pattern, axes=axes))
    return Placement(path, shape, *_by_size(shape, mesh, small))


def _by_rule(
    path: str, shape: tuple[int, ...], mesh: Mesh, *, pattern: str, axes: tuple[str | None, ...]
) -> tuple[PartitionSpec, str]:
    """The rule's axes on the last dimensions, without those that do not divide theirs."""
    unknown = [axis for axis in axes if axis is not None and axis not in mesh.shape]
    if unknown:
        raise ValueError(f"sharding rule {pattern!r} names the axis {unknown[0]!r}; the mesh has {tuple(mesh.shape)}")
    if len(axes) > len(shape):
        raise ValueError(f"sharding rule {pattern!r} has {len(axes)} axes for {path} of shape {shape}")
    wanted = (None,) * (len(shape) - len(axes)) + tuple(axes)
    kept = [_dividing(axis, size, mesh) for axis, size in zip(wanted, shape)]
    dropped = [f"{axis} does not divide {size}" for axis, size, found in zip(wanted, shape, kept) if axis and not found]
    return PartitionSpec(*kept), "; ".join([f"rule {pattern}", *dropped])


def _by_size(shape: tuple[int, ...], mesh: Mesh, small: int) -> tuple[PartitionSpec, str]:
    """The fallback: the largest dimension that the fsdp axis divides, the first among equals."""
    fsdp, alone = mesh.shape["fsdp"], mesh.shape["fsdp"] * mesh.shape["context"] == 1
    if alone or math.prod(shape) < small:
        return PartitionSpec(), "copied: fsdp=1" if alone else "copied: small"
    found = [_dividing("fsdp", size, mesh) for size in shape]
    if not any(found):
        return PartitionSpec(), f"copied: no dimension divides by fsdp={fsdp}"
    split = max((i for i, axes in enumerate(found) if axes), key=lambda i: shape[i])
    return PartitionSpec(*(axes if i == split else None for i, axes in enumerate(found))), "largest dimension"


def _dividing(axis: str | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The mesh axes that a weight's dimension is split over for a rule's axis; None where they don't divide it."""
    if axis == "fsdp" and mesh.shape["context"] > 1:
        if size % (mesh.shape["fsdp"] * mesh.shape["context"]) == 0:
            return "fsdp", "context"
        if size % mesh.shape["context"] == 0:
            return "context"
    return axis if axis and size % mesh.shape[axis] == 0 else None
