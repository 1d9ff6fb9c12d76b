"""The few frame shapes (height, width, number of frames) that clips are cut to.

JAX compiles once for each shape, so a data set has a handful of them. A clip goes to the bucket whose aspect ratio
is nearest to its own on a log scale, and there to the longest one that it can fill. Legal sizes follow from the
autoencoder: height and width are multiples of `spatial`, lengths are temporal k + 1 (the first frame stands alone).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from magic141_jax.errors import UserError

MAX_SIDE = 8192
MAX_FRAMES = 4097


class Bucket(NamedTuple):
    """Height and width in pixels and the number of frames (1 for an image)."""

    height: int
    width: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"


def parse_size(text: str) -> tuple[int, int]:
    """`"96"` -> (96, 96) and `"64x96"` -> height 64, width 96; anything else raises `UserError`."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if not match:
        raise UserError(f"size {text!r} is neither a number nor HEIGHTxWIDTH; write 64 or 64x96")
    return int(match[1]), int(match[2] or match[1])


def make_buckets(
    sizes: Sequence[tuple[int, int]], lengths: Sequence[int], *, spatial: int = 8, temporal: int = 4
) -> tuple[Bucket, ...]:
    """Every (height, width) with every length, checked.

    Raises:
      UserError: a side is not a positive multiple of `spatial`, or a length is not temporal k + 1; the nearest legal
        values are named.
    """
    for height, width in sizes:
        if any(_nearest_side(side, spatial) != side for side in (height, width)):
            legal = f"{_nearest_side(height, spatial)}x{_nearest_side(width, spatial)}"
            raise UserError(
                f"size {height}x{width}: both sides must be multiples of {spatial}, from {spatial} to {MAX_SIDE};"
                f" the nearest legal size is {legal}"
            )
    for length in lengths:
        below = max(min(length, MAX_FRAMES) - 1, 0) // temporal * temporal + 1
        if below != length:
            near = f"{below}" if length > MAX_FRAMES else f"{below} and {below + temporal}"
            raise UserError(
                f"num_frames {length}: a clip has {temporal}k + 1 frames, at most {MAX_FRAMES}; the nearest legal"
                f" lengths are {near}"
            )
    return tuple(Bucket(*size, length) for size in dict.fromkeys(sizes) for length in sorted(set(lengths)))


def nearest_size(buckets: Sequence[Bucket], height: int, width: int) -> tuple[int, int]:
    """The (height, width) among the buckets with the nearest aspect ratio; of equals, the nearest area."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log(size[0] / size[1]) - math.log(height / width))
        return round(aspect, 6), abs(math.log(size[0] * size[1]) - math.log(height * width))

    return min({bucket[:2] for bucket in buckets}, key=distance)


def longest_fit(buckets: Sequence[Bucket], size: tuple[int, int], num_frames: int) -> Bucket | None:
    """The longest bucket of that size that `num_frames` frames can fill, or None."""
    fitting = [bucket for bucket in buckets if bucket[:2] == size and bucket.num_frames <= num_frames]
    return max(fitting, key=lambda bucket: bucket.num_frames, default=None)


def _nearest_side(side: int, spatial: int) -> int:
    return min(max(round(side / spatial) * spatial, spatial), MAX_SIDE // spatial * spatial)
