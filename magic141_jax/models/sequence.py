"""How the tokens of a clip and of its text lie in one sequence, on one device or split over "context".

    one device   video, text
    w devices    video_1, text_1, ..., video_w, text_w     the w-th parts of both, so that joining moves nothing

Both lengths are filled up to multiples of w; what fills is masked. Order is of no matter to attention, only positions
are; so video tokens may also lie tile by tile, for sliding-tile attention (arXiv 2502.04507): tokens see the tiles of a
window around their own, moved inside at the borders, and all text, and text sees everything. Whole tiles are seen or
not, which is what a block-sparse kernel can skip.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from magic141_jax.sharding import ways

LANES = 128  # a TPU's vectors: blocks of its kernel, and so tiles of that many tokens or more, are multiples of it

Triple = tuple[int, int, int]


class Pattern(NamedTuple):
    """Which keys each query may see, besides the mask: told by groups of tokens, the same for all samples and heads.

    Attributes:
      group: (j,) of each token in the order of one device; text is a group of its own, the last.
      sees: (groups, groups), sees[a, b] whether a query of group a sees keys of group b.
      text: how many tokens of the sequence are text; they come last.
    """

    group: np.ndarray
    sees: np.ndarray
    text: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where tokens lie; see `make`.

    Attributes:
      order: (l,) which token of the grid, row-major, lies at each place of the video's; -1 where it is filled up.
      inverse: where each token of the grid lies.
      text: (s,) which text token lies where, likewise.
      pattern: of a window of tiles.
    """

    order: np.ndarray
    inverse: np.ndarray
    text: np.ndarray
    pattern: Pattern | None

    def video(self, x: Array) -> Array:
        """Tokens of the grid (b, l, ...) in their places; zero where it is filled up."""
        return _take(x, self.order)

    def words(self, x: Array) -> Array:
        """Text tokens (b, s, ...) in their places."""
        return _take(x, self.text)

    def grid(self, video: Array, axis: int = 1) -> Array:
        """The inverse of `video`, for tokens on any axis."""
        if np.array_equal(self.inverse, np.arange(len(self.inverse))):
            return video[(slice(None),) * axis + (slice(len(self.inverse)),)]
        return jnp.take(video, self.inverse, axis=axis)

    def join(self, video: Array, words: Array) -> Array:
        """Tokens in their places (b, l, ...) and (b, s, ...) as one sequence (b, j, ...)."""
        return join(video, words, ways("context"))

    def part(self, joint: Array) -> tuple[Array, Array]:
        """The inverse of `join`."""
        return part(joint, len(self.text), ways("context"))


def make(grid: Triple, text: int, *, tile: Triple | None = None, window: Triple | None = None) -> Layout:
    """The layout of a grid of video tokens and `text` text tokens over the mesh that is traced for.

    Args:
      grid: tokens along frames, height and width.
      text: the number of text tokens.
      tile: largest tile along each; the grid is cut into as many as that takes, of sizes as equal as can be.
      window: how many tiles along each axis a token sees, odd numbers; None is full attention.
    """
    count = ways("context")
    tokens = math.prod(grid)
    order = np.arange(tokens) if window is None else _tile_order(grid, tile)
    slots = len(order)
    order = np.pad(order, (0, -slots % count), constant_values=-1)
    words = np.pad(np.arange(text), (0, -text % count), constant_values=-1)
    places = np.argsort(order, kind="stable")[-tokens:]
    pattern = None
    if window is not None:
        sees = np.pad(_tile_window(grid, tile, window), (0, 1), constant_values=True)
        tiles = len(sees) - 1
        group = np.repeat(np.arange(tiles), slots // tiles)
        rest = len(order) + len(words) - slots
        pattern = Pattern(np.pad(group, (0, rest), constant_values=tiles), sees, len(words))
    return Layout(order, places, words, pattern)


def join(video: Array, words: Array, count: int) -> Array:
    """Video and text tokens (b, l, ...), (b, s, ...) -> (b, l + s, ...): for each of `count` devices its parts."""
    parts = [x.reshape(x.shape[0], count, -1, *x.shape[2:]) for x in (video, words)]
    return jnp.concatenate(parts, axis=2).reshape(video.shape[0], -1, *video.shape[2:])


def part(joint: Array, text: int, count: int) -> tuple[Array, Array]:
    """The inverse of `join`: video and the `text` text tokens of a sequence that lies over `count` devices."""
    parts = joint.reshape(joint.shape[0], count, -1, *joint.shape[2:])
    video, words = jnp.split(parts, [parts.shape[2] - text // count], axis=2)
    return tuple(x.reshape(joint.shape[0], -1, *joint.shape[2:]) for x in (video, words))


def fill_up(x: Array, length: int) -> Array:
    """x (b, n, ...) with zeros after it up to (b, length, ...)."""
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _take(x: Any, places: np.ndarray) -> Array:
    """x (b, n, ...) at the given places of axis 1; zeros at place -1."""
    if np.array_equal(places, np.pad(np.arange(x.shape[1]), (0, max(len(places) - x.shape[1], 0)), constant_values=-1)):
        return fill_up(x, len(places))
    taken = jnp.take(x, np.maximum(places, 0), axis=1)
    return jnp.where(jnp.asarray(places >= 0).reshape(1, -1, *[1] * (x.ndim - 2)), taken, jnp.zeros((), x.dtype))


def _tiles(grid: Triple, tile: Triple) -> list[list[np.ndarray]]:
    """The positions along each axis that its tiles hold."""
    return [np.array_split(np.arange(size), -(-size // length)) for size, length in zip(grid, tile)]


def _tile_order(grid: Triple, tile: Triple) -> np.ndarray:
    """Tokens tile by tile, each tile filled up to the size of the largest, with -1."""
    numbers = np.arange(math.prod(grid)).reshape(grid)
    cut = [numbers[np.ix_(*axes)].ravel() for axes in itertools.product(*_tiles(grid, tile))]
    slots = max(map(len, cut))
    slots += -slots % LANES if slots >= LANES else 0
    return np.concatenate([np.pad(one, (0, slots - len(one)), constant_values=-1) for one in cut])


def _tile_window(grid: Triple, tile: Triple, window: Triple) -> np.ndarray:
    """(tiles, tiles): whether the tiles of a row see those of a column."""
    axes = []
    for cut, width in zip(_tiles(grid, tile), window):
        count, half = len(cut), width // 2
        places = np.arange(count)
        # A window that would reach over the border is moved inside, so that every token sees as many tiles.
        centre = np.clip(places, half, count - 1 - half) if count > width else np.full(count, count // 2)
        reach = half if count > width else count
        axes.append(abs(centre[:, None] - places[None]) <= reach)
    f, h, w = axes
    return np.einsum("ax,by,cz->abcxyz", f, h, w).reshape(math.prod(map(len, axes)), -1)
