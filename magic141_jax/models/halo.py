"""Convolutions over pictures of which every device has some rows and columns.

A device needs the nearest rows and columns of its neighbours, its halo; what lies beyond the picture is filled in. This
is written out per device, since the compiler has other ideas. A convolution with zeros around it may end up split over
channels, with the whole picture on every device; where parts of the kernel lay on other mesh axes the result was even
wrong (jax 0.10.2, a CPU). A border that is repeated before the convolution makes the parts unequal, and to undo that up
to half of a part is sent several times over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from magic141_jax import sharding

Y, X = 2, 3
Fill = Literal["repeat", "zero"]
Border = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    function: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    *,
    border: Border,
    fill: Fill,
    step: tuple[int, int] = (1, 1),
) -> jax.Array:
    """function(x with its border in space, kernel), each device on its own part where there is a mesh.

    Args:
      function: an unpadded convolution, (b, t, rows, columns, c) and the kernel -> (b, ..., y / sy, x / sx, o). Where
        there is no mesh it is asked for zeros itself, by a third argument, for it need not copy x to have them.
      x: pictures (b, t, y, x, c), split by `sharding.space_spec` of the coarser of input and output.
      kernel: every device has it whole.
      border: the rows above and below, the columns to the left and to the right.
      fill: what lies beyond the picture: its last row or column repeated, or zeros.
      step: (sy, sx), the stride in space.
    """
    if fill == "zero" and not jax.sharding.get_abstract_mesh().shape:
        return function(x, kernel, border)
    cells = [n // s if n % s == 0 else 1 for n, s in zip(x.shape[Y:-1], step)]
    spec = sharding.space_spec((*x.shape[:Y], *cells, x.shape[-1]))

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Columns come second and bring the corners along.
        for axis, sides in zip((Y, X), border):
            beyond = [_beyond(x, axis, sides, after=after, fill=fill, shared=spec[axis]) for after in (False, True)]
            x = jnp.concatenate([beyond[0], x, beyond[1]], axis=axis)
        return function(x, kernel)

    if not any(spec[Y:]):
        return local(x, kernel)
    return jax.shard_map(local, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, kernel)


def _beyond(
    x: jax.Array, axis: int, sides: tuple[int, int], *, after: bool, fill: Fill, shared: str | tuple[str, ...] | None
) -> jax.Array:
    """What lies before or after a part: its neighbour's rows along the mesh axes `shared`, or beyond the picture."""
    size, length = sides[after], x.shape[axis]
    rows = functools.partial(jax.lax.slice_in_dim, x, axis=axis)
    edge = rows(length - 1, length) if after else rows(0, 1)
    filled = jnp.repeat(edge if fill == "repeat" else jnp.zeros_like(edge), size, axis=axis)
    if not shared or size == 0:
        return filled
    shared = (shared,) if isinstance(shared, str) else shared
    count = math.prod(map(sharding.ways, shared))
    # Who has no neighbour there receives nothing.
    pairs = [(i + 1, i) if after else (i, i + 1) for i in range(count - 1)]
    received = jax.lax.ppermute(rows(0, size) if after else rows(length - size, length), shared, pairs)
    return jnp.where(jax.lax.axis_index(shared) == (count - 1 if after else 0), filled, received)
