"""Structured pruning of an MMDiT: whole attention heads, MLP neurons or blocks, and the smaller network without them.

A unit is silent when the maps that lead out of it hold zeros: the rows of `attention_out` that read a head, the row of
`mlp_down` that reads a neuron, both maps of a block. The network without a silent unit computes the same function, so
pruning is two steps, silencing (a mask like any other, kept through training) and `shrink`, which changes no output:

    masks(groups, scores, keep) -> {path: mask}            shrink(config, params) -> (config', params')

Layers of a kind are stacked, and all of them have the same sizes. So a layer keeps as many heads and neurons as any
other (which ones is its own choice), and of blocks any may go. The fused maps of single-stream blocks are sliced by
their parts: the columns of `qkv` head by head, those of `mlp_up` neuron by neuron. The vector that modulates all blocks
is one for all of them, and is made shorter at once (`condense`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiTConfig
from magic141_jax.pytree import Params, flatten, unflatten
from magic141_jax.sparsity import surgeon

# Stack of blocks -> its token streams
STREAMS = {
    "double_blocks": ("double_blocks.video", "double_blocks.text"),
    "single_blocks": ("single_blocks.joint",),
    "text_in.blocks": ("text_in.blocks",),
}
KINDS = ("heads", "neurons", "blocks")
OUTER = {  # maps out of units, a regex over their paths
    "heads": r"blocks(\..*)?\.attention_out$",
    "neurons": r"^(double|single)_blocks\..*\.mlp_down$",
}
CONDITION = r"^double_blocks\.video\.modulation$"  # a map that reads the condition of every token, known ones too
READERS = r"(^|\.)modulation(_out)?\.kernel$"  # all maps that read it
WRITERS = r"^(time_in|pooled_in|guidance_in)\.down\.(kernel|bias)$"
COLUMNS, ROWS, LAYERS = -1, -2, 0


class Member(NamedTuple):
    """A parameter of which each unit has `size` neighbouring entries along `axis`."""

    path: str
    axis: int
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """The units of a stack of blocks.

    Attributes:
      layers: how many blocks it has.
      units: how many units a layer has; of kind "blocks" how many blocks there are, and the layer axis is theirs.
      inner: what belongs to the units and goes with them.
      outer: the maps out of a unit and their biases; zeros there make it silent.
    """

    layers: int
    units: int
    inner: tuple[Member, ...]
    outer: tuple[Member, ...]


class Sizes(NamedTuple):
    """What of an `MMDiTConfig` says which units there are, with the place of the network in a tree of parameters."""

    prefix: str
    heads: int
    head_width: int
    mlp_width: int
    double_blocks: int
    single_blocks: int
    refiner_blocks: int


def sizes_of(params: Mapping[str, Any]) -> Sizes:
    """The sizes that {path: array or shape struct} of an MMDiT tell, whatever stands in front of its paths.

    Raises:
      UserError: they are not of an MMDiT.
    """
    last = "single_blocks.joint.attention_out.kernel"
    prefix = next((path.removesuffix(last) for path in params if path.endswith(last)), None)
    if prefix is None:
        raise UserError("heads, neurons and blocks are pruned from the video transformer, and this network is none")
    shapes = {path.removeprefix(prefix): leaf.shape for path, leaf in params.items() if path.startswith(prefix)}
    single, width = shapes[last][0], shapes["single_blocks.joint.qk_scale"][-1]
    refiner = shapes.get("text_in.blocks.qkv.kernel", (0,))[0]
    double, neurons = shapes["double_blocks.video.qkv.kernel"][0], shapes["single_blocks.joint.mlp_down.kernel"][-2]
    return Sizes(prefix, shapes[last][-2] // width, width, neurons, double, single, refiner)


def units(
    params: Mapping[str, Any],
    scores: Mapping[str, Any],
    sparsity: Any,
    previous: Mapping[str, Any],
    *,
    kind: str,
) -> dict[str, jax.Array]:
    """The masks (see `sparsity.masks`) without round(sparsity * units) units of each layer, at most all but one."""
    found = sizes_of(params)
    made = {}
    for group in groups(found, kind):
        shapes = {path: previous[path].shape for path in members(group)}
        alive = sum(_by_unit(previous[m.path].astype(jnp.int32), group, m) for m in group.outer) > 0
        values = jnp.where(alive, unit_scores(group, scores), -1)
        dropped = jnp.minimum(jnp.round(sparsity * jnp.float32(group.units)), group.units - 1)
        made |= unit_masks(group, keep_best(values, group.units - dropped), shapes)
    return made


def members(group: Group) -> list[str]:
    """The paths of a group's parameters."""
    return [member.path for member in (*group.inner, *group.outer)]


def groups(config: MMDiTConfig | Sizes, kind: str) -> list[Group]:
    """The groups of a kind. The streams of a double block share their heads, since these meet in one attention.

    Raises:
      UserError: the kind is none of heads, neurons and blocks.
    """
    prefix = getattr(config, "prefix", "")
    streams = {stack: tuple(prefix + stream for stream in of) for stack, of in STREAMS.items()}
    layers = {"double_blocks": config.double_blocks, "single_blocks": config.single_blocks}
    if kind == "heads":
        refined = {**layers, "text_in.blocks": config.refiner_blocks}
        return [_heads(config, streams[stack], count) for stack, count in refined.items() if count]
    if kind == "neurons":
        return [_neurons(config, stream, count) for stack, count in layers.items() for stream in streams[stack]]
    if kind == "blocks":
        return [_blocks(streams[stack], count) for stack, count in layers.items()]
    raise UserError(f"structured pruning takes heads, neurons or blocks, not {kind!r}")


def _heads(config: MMDiTConfig | Sizes, streams: tuple[str, ...], layers: int) -> Group:
    k = config.head_width
    inner = [Member(f"{s}.qkv.{leaf}", COLUMNS, 3 * k) for s in streams for leaf in ("kernel", "bias")]
    outer = [Member(f"{s}.attention_out.kernel", ROWS, k) for s in streams]
    return Group(layers, config.heads, tuple(inner), tuple(outer))


def _neurons(config: MMDiTConfig | Sizes, stream: str, layers: int) -> Group:
    inner = [Member(f"{stream}.mlp_up.{leaf}", COLUMNS) for leaf in ("kernel", "bias")]
    return Group(layers, config.mlp_width, tuple(inner), (Member(f"{stream}.mlp_down.kernel", ROWS),))


def _blocks(streams: tuple[str, ...], layers: int) -> Group:
    single = len(streams) == 1  # whose one bias is that of mlp_down
    leaves = ["attention_out.kernel", "mlp_down.kernel", "mlp_down.bias", *["attention_out.bias"] * (not single)]
    return Group(layers, layers, (), tuple(Member(f"{s}.{leaf}", LAYERS) for s in streams for leaf in leaves))


def unit_scores(group: Group, scores: Mapping[str, jax.Array]) -> jax.Array:
    """What each unit adds to the stream: the sum of squared scores over its outer kernels.

    Args:
      group: of `groups`.
      scores: {path: one for each weight} of the outer kernels (`sparsity.scores`).

    Returns:
      (layers, units), or (units,) of blocks.
    """
    total = 0.0
    for member in group.outer:
        if member.path.endswith("kernel"):
            total += _by_unit(jnp.square(scores[member.path]), group, member)
    return total


def unit_masks(group: Group, kept: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The masks of a group's parameters, true where they stay, from which units are kept, as `unit_scores` orders them.

    Of kind "blocks" only the outer parameters are masked: the others then don't count.
    """
    made = {}
    for member in (*group.inner, *group.outer):
        shape = shapes[member.path]
        along = kept if member.axis == LAYERS else jnp.repeat(kept, member.size, axis=-1)
        axes = [1] * len(shape)
        axes[0], axes[member.axis] = shape[0], shape[member.axis]
        made[member.path] = jnp.broadcast_to(along.reshape(axes), shape)
    return made


def keep_best(scores: jax.Array, count: Any) -> jax.Array:
    """Which of the last axis are among its `count` best, exactly as many also where scores are equal."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < count


def silence(
    config: MMDiTConfig, params: Params, kind: str, scores: Mapping[str, jax.Array], keep: int | Mapping[str, int]
) -> Params:
    """Parameters with all but the best `keep` units of each layer set to zero.

    Args:
      config, params: the network.
      kind: heads, neurons or blocks.
      scores: {path: a score for each weight} of the maps out of the units; of kind "blocks", {stack: one a block}.
      keep: heads or neurons a layer; of blocks {"double_blocks": ..., "single_blocks": ...}.

    Raises:
      UserError: fewer than one unit would stay, or more than there are; `keep` names an unknown stack.
    """
    flat = flatten(params)
    for group, count in _kept(config, kind, keep):
        values = scores[_stack(group)] if kind == "blocks" else unit_scores(group, scores)
        _mask(flat, group, keep_best(jnp.asarray(values), count))
    return unflatten(flat)


def operate(
    config: MMDiTConfig, params: Params, kind: str, grams: Mapping[str, jax.Array], keep: int | Mapping[str, int]
) -> Params:
    """As `silence` for heads or neurons, which ones and what becomes of the others by `sparsity.surgeon`.

    Args:
      config, params, kind, keep: as for `silence`.
      grams: {path: sums of x x^T} of the maps out of the units (`OUTER`).

    Raises:
      UserError: as `silence`.
    """
    flat = flatten(params)
    for group, count in _kept(config, kind, keep):
        paths = [member.path for member in group.outer]
        kept, moved = surgeon.operate(
            [flat[path] for path in paths], [grams[path] for path in paths], units=group.units, keep=count
        )
        flat |= {path: kernel.astype(flat[path].dtype) for path, kernel in zip(paths, moved, strict=True)}
        _mask(flat, group, kept)
    return unflatten(flat)


def condense(config: MMDiTConfig, params: Params, gram: jax.Array, keep: int) -> tuple[MMDiTConfig, Params]:
    """The network with only `keep` values of the vector that modulates its blocks, by `sparsity.surgeon`.

    A few-step student is modulated by few times, and by prompts that vary in few directions, while the maps that read
    them are a quarter of its parameters. All of these read the same vector, so they are operated on as one.

    Args:
      config, params: the network.
      gram: (d, d), the sum of x x^T over what enters these maps.
      keep: values that stay.

    Returns:
      The smaller network's config and parameters.

    Raises:
      UserError: fewer than one value would stay, or more than there are.
    """
    if not 1 <= keep <= config.conditions:
        raise UserError(f"{config.conditions} values modulate the blocks, of which 1 to all can be kept, not {keep}")
    flat = flatten(params)
    readers = {path: jnp.moveaxis(leaf, -2, 0) for path, leaf in flat.items() if re.search(READERS, path)}
    rows = {path: leaf.reshape(config.conditions, -1) for path, leaf in readers.items()}
    together = jnp.concatenate(list(rows.values()), axis=1)
    kept, (moved,) = surgeon.operate([together[None]], [gram[None]], units=config.conditions, keep=keep)
    chosen = np.flatnonzero(kept[0])
    ends = np.cumsum([part.shape[1] for part in rows.values()])[:-1]
    for (path, leaf), part in zip(readers.items(), jnp.split(moved[0], ends, axis=1)):
        own = part[chosen].reshape(keep, *leaf.shape[1:])
        flat[path] = jnp.moveaxis(own, 0, -2).astype(leaf.dtype)
    flat |= {path: leaf[..., chosen] for path, leaf in flat.items() if re.search(WRITERS, path)}
    return dataclasses.replace(config, condition_width=keep), unflatten(flat)


def _kept(config: MMDiTConfig, kind: str, keep: int | Mapping[str, int]) -> list[tuple[Group, int]]:
    """Each group with how many of its units stay."""
    unknown = sorted(set(keep) - {"double_blocks", "single_blocks"}) if isinstance(keep, Mapping) else []
    if unknown:
        raise UserError(f"no stack of blocks is named {unknown[0]!r}; there are double_blocks and single_blocks")
    found = []
    for group in groups(config, kind):
        stack = _stack(group)
        count = keep.get(stack, group.units) if isinstance(keep, Mapping) else keep
        if not 1 <= count <= group.units:
            raise UserError(f"{stack} has {group.units} {kind}, of which 1 to all can be kept, not {count}")
        found.append((group, count))
    return found


def _stack(group: Group) -> str:
    return group.outer[0].path.rsplit(".", 3)[0]


def _mask(flat: dict[str, jax.Array], group: Group, kept: jax.Array) -> None:
    """Sets the parameters of the other units to zero."""
    shapes = {path: flat[path].shape for path in members(group)}
    for path, mask in unit_masks(group, kept, shapes).items():
        flat[path] = jnp.where(mask, flat[path], 0)


def shrink(config: MMDiTConfig, params: Params) -> tuple[MMDiTConfig, Params]:
    """The network without its silent units: the same function, in less memory and time.

    Heads and neurons go in every layer as often as in the layer that has the fewest silent ones; a whole stack of
    blocks never goes. Rounded sums may differ, since fewer terms are added.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    sizes = {}
    for kind in ("blocks", "heads", "neurons"):
        found = groups(config, kind)
        loud = [_loud(group, flat) for group in found]
        if kind == "blocks":
            for stack, alive in zip(("double_blocks", "single_blocks"), loud):
                kept = np.flatnonzero(alive) if alive.any() else np.array([0])
                sizes[stack] = len(kept)
                flat |= {path: leaf[kept] for path, leaf in flat.items() if path.startswith(f"{stack}.")}
            config = dataclasses.replace(config, **sizes)
            continue
        count = max(1, *(int(alive.sum(-1).max()) for alive in loud))
        for group, alive in zip(found, loud):
            chosen = np.sort(np.argsort(~alive, axis=-1, kind="stable")[:, :count], axis=-1)
            for member in (*group.inner, *group.outer):
                flat[member.path] = _take(flat[member.path], chosen, member)
        if kind == "heads":
            config = dataclasses.replace(config, heads=count)
        elif count < config.mlp_width:  # else the ratio stays as it was given
            config = dataclasses.replace(config, mlp_ratio=mlp_ratio(config.width, count))
    return config, unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def mlp_ratio(width: int, neurons: int) -> float:
    """The config's ratio for an MLP of just `neurons` neurons, whatever the division rounds to."""
    ratio = neurons / width
    return ratio if int(width * ratio) == neurons else math.nextafter(ratio, math.inf)


def _loud(group: Group, flat: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which units have an outer value that isn't zero: (layers, units), or (units,) of blocks."""
    return sum(_by_unit(flat[m.path] != 0, group, m) for m in group.outer) > 0


def _by_unit(values: Any, group: Group, member: Member) -> Any:
    """Sums of a parameter's values (layers, ...) over what each unit has of it."""
    if member.axis == LAYERS:
        return values.reshape(group.layers, -1).sum(-1)
    if member.axis == ROWS:
        return values.reshape(group.layers, group.units, -1).sum(-1)
    return values.reshape(group.layers, -1, group.units, member.size).sum((1, 3))


def _take(leaf: np.ndarray, chosen: np.ndarray, member: Member) -> np.ndarray:
    """What the chosen units (layers, count) have of a parameter."""
    index = (chosen[:, :, None] * member.size + np.arange(member.size)).reshape(len(chosen), -1)
    if leaf.ndim == 3:
        index = index[:, :, None] if member.axis == ROWS else index[:, None]
    return np.take_along_axis(leaf, index, axis=member.axis)
