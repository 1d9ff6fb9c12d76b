"""Encodes and decodes a video in overlapping tiles over time and space, and cross-fades the overlaps.

The tile starts and the blend are those of diffusers' video autoencoders, so that results can be compared with it.
Lengths are in pixels and pixel frames; stride is the distance between tile starts, so tile - stride is blended:

    time   tiles of `frames` + 1, one every `frame_stride`; the extra leading frame is context, which a causal
           network treats as a clip's first frame. It is dropped again, except from the first tile.
    space  tiles of `size` x `size`, one every `stride` in y and x, once either side is longer than `size`.

Normalisation and attention see one tile at a time, so a tiled result differs from the whole one. Any causal VAE
with t = temporal_factor (f - 1) + 1 can be tiled. Tiles of equal shape go through one `lax.map`, which keeps the
compile time independent of the number of tiles, and the working memory that of a single one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from magic141_jax.errors import UserError
from magic141_jax.shapes import Frames, Latents

TIME, Y, X = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile lengths and strides in pixels and pixel frames; the default is diffusers' (in time only).

    Attributes:
      frames: longest clip that is handled whole, less its first frame; None never tiles in time.
      frame_stride: distance between tiles in time.
      size: largest height or width that is handled whole; None never tiles in space (256 is usual).
      stride: distance between tiles in space.
    """

    frames: int | None = 16
    frame_stride: int = 12
    size: int | None = None
    stride: int = 192

    def __post_init__(self) -> None:
        for tile, stride, names in (
            (self.frames, self.frame_stride, "frame_stride and frames"),
            (self.size, self.stride, "stride and size"),
        ):
            if tile is not None and not 0 < stride <= tile:
                raise UserError(f"tiling needs 0 < stride <= tile; {names} are {stride} and {tile}")


FRAME_TILES = Tiling()
WHOLE = Tiling(frames=None)


def in_squares(tiling: Tiling, size: int) -> Tiling:
    """`tiling` with squares of `size` x `size` pixels in space, a quarter of which is blended, as in diffusers.

    Raises:
      UserError: a size that isn't a positive multiple of 32, so that a quarter of it would be no whole latents.
    """
    if size < 32 or size % 32:
        raise UserError(f"VAE tiles of {size} pixels: take a multiple of 32; 256 is usual")
    return dataclasses.replace(tiling, size=size, stride=size * 3 // 4)


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """One axis: where tiles start and how long they are (input), and what is kept and blended of each (output)."""

    starts: tuple[int, ...]
    length: int
    keep: int
    blend: int
    total: int


def tiled_encode(
    function: Callable[[Frames], Latents], frames: Frames, tiling: Tiling, *, spatial_factor: int, temporal_factor: int
) -> Latents:
    """Encodes (b, t, y, x, c) -> (b, f, h, w, k), whole where `tiling` allows it.

    Args:
      function: encodes one tile; where it returns several quantities, they lie side by side on the channels.
      frames: the video.
      tiling: tile lengths and strides.
      spatial_factor: pixels per latent position.
      temporal_factor: frames per latent frame after the first.

    Raises:
      UserError: a tile length or stride isn't a multiple of the factor of its axis.
    """
    _require_multiples(tiling, spatial_factor, temporal_factor)
    _, t, y, x, _ = frames.shape
    size = tiling.size if tiling.size is not None and max(y, x) > tiling.size else None
    clip = tiling.frames if tiling.frames is not None and t > tiling.frames else None

    def space(n: int) -> _Cuts:
        return _cuts(n, size, tiling.stride, n // spatial_factor, out=lambda v: v // spatial_factor)

    total = (t - 1) // temporal_factor + 1
    time = _cuts(t, clip, tiling.frame_stride, total, out=lambda v: v // temporal_factor, context=1)
    return _tiled(function, frames, (time, space(y), space(x)))


def tiled_decode(
    function: Callable[[Latents], Frames], raw: Latents, tiling: Tiling, *, spatial_factor: int, temporal_factor: int
) -> Frames:
    """Decodes (b, f, h, w, c) -> (b, t, y, x, 3), whole where `tiling` allows it; arguments as in `tiled_encode`."""
    _require_multiples(tiling, spatial_factor, temporal_factor)
    _, f, h, w, _ = raw.shape
    size = tiling.size // spatial_factor if tiling.size is not None else None
    size = size if size is not None and max(h, w) > size else None
    clip = tiling.frames // temporal_factor if tiling.frames is not None else None
    clip = clip if clip is not None and f > clip else None

    def space(n: int) -> _Cuts:
        return _cuts(n, size, tiling.stride // spatial_factor, n * spatial_factor, out=lambda v: v * spatial_factor)

    total = (f - 1) * temporal_factor + 1
    stride = tiling.frame_stride // temporal_factor
    time = _cuts(f, clip, stride, total, out=lambda v: v * temporal_factor, context=1)
    return _tiled(function, raw, (time, space(h), space(w)))


def _require_multiples(tiling: Tiling, spatial_factor: int, temporal_factor: int) -> None:
    for name, factor in (
        ("frames", temporal_factor),
        ("frame_stride", temporal_factor),
        ("size", spatial_factor),
        ("stride", spatial_factor),
    ):
        value = getattr(tiling, name)
        if value is not None and value % factor:
            raise UserError(f"tiling.{name} is {value}; it must be a multiple of {factor} for this VAE")


def _cuts(n: int, tile: int | None, stride: int, total: int, *, out: Callable[[int], int], context: int = 0) -> _Cuts:
    """Cuts an axis of n input positions, or leaves it whole when `tile` is None; `out` maps a length to the output."""
    if tile is None:
        return _Cuts((0,), n, total, 0, total)
    # A tile that holds nothing beyond its context would give no output.
    starts = tuple(s for s in range(0, n, stride) if s == 0 or n - s > context)
    return _Cuts(starts, tile + context, out(stride), out(tile - stride), total)


def _tiled(function: Callable[[jax.Array], jax.Array], x: jax.Array, cuts: tuple[_Cuts, _Cuts, _Cuts]) -> jax.Array:
    """Runs `function` on every tile of x (b, time, y, x, c) and joins the results: in space within each clip first."""
    time, rows, columns = cuts
    clips = [jax.lax.slice_in_dim(x, s, min(s + time.length, x.shape[TIME]), axis=TIME) for s in time.starts]
    return _join_time(_run(lambda clip: _tiled_space(function, clip, rows, columns), clips), time)


def _tiled_space(function: Callable[[jax.Array], jax.Array], x: jax.Array, rows: _Cuts, columns: _Cuts) -> jax.Array:
    """Blends every tile with its already blended neighbours above and to the left, and joins them."""
    index = list(itertools.product(range(len(rows.starts)), range(len(columns.starts))))
    if len(index) == 1:
        return function(x)
    tiles = [
        x[:, :, rows.starts[j] : rows.starts[j] + rows.length, columns.starts[k] : columns.starts[k] + columns.length]
        for j, k in index
    ]
    blended: dict[tuple[int, int], jax.Array] = {}
    for (j, k), tile in zip(index, _run(function, tiles), strict=True):
        if j > 0:
            tile = cross_fade(blended[j - 1, k], tile, rows.blend, axis=Y)
        if k > 0:
            tile = cross_fade(blended[j, k - 1], tile, columns.blend, axis=X)
        blended[j, k] = tile
    lines = [
        jnp.concatenate([blended[j, k][:, :, : rows.keep, : columns.keep] for k in range(len(columns.starts))], axis=X)
        for j in range(len(rows.starts))
    ]
    return jnp.concatenate(lines, axis=Y)[:, :, : rows.total, : columns.total]


def _join_time(clips: list[jax.Array], time: _Cuts) -> jax.Array:
    """Drops the context frame of every clip but the first, blends each with its predecessor and joins them."""
    if len(clips) == 1:
        return clips[0]
    before = clips[0]
    parts = [before[:, : time.keep + 1]]
    for clip in clips[1:]:
        before = cross_fade(before, clip[:, 1:], time.blend, axis=TIME)
        parts.append(before[:, : time.keep])
    return jnp.concatenate(parts, axis=TIME)[:, : time.total]


def _run(function: Callable[[jax.Array], jax.Array], tiles: list[jax.Array]) -> list[jax.Array]:
    """Applies `function` to every tile, one compiled body per distinct shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, tile in enumerate(tiles):
        groups.setdefault(tile.shape, []).append(n)
    done: dict[int, jax.Array] = {}
    for members in groups.values():
        if len(members) == 1:
            done[members[0]] = function(tiles[members[0]])
        else:
            results = jax.lax.map(function, jnp.stack([tiles[n] for n in members]))
            done.update({n: results[place] for place, n in enumerate(members)})
    return [done[n] for n in range(len(tiles))]


def cross_fade(before: jax.Array, after: jax.Array, extent: int, *, axis: int) -> jax.Array:
    """Returns `after` with its first `extent` positions faded in from the last ones of `before`.

    Position p of n takes (1 - p/n) of `before` and p/n of `after`; n is cut to the length of either.
    """
    extent = min(extent, before.shape[axis], after.shape[axis])
    if extent == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=jnp.float32) / extent).astype(after.dtype).reshape(shape)
    tail = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    head = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([tail * (1 - weight) + head * weight, rest], axis=axis)
