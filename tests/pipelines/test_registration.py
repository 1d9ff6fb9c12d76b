"""Where a picture's subject is in a frame: true moves and sizes are found, and made again."""

import jax
import numpy as np
import pytest
from PIL import Image

from magic141_jax.pipelines.registration import SCALES, moved, register, resized

SIDE = 32


def picture(seed=0, height=SIDE, width=SIDE):
    """A square of many colours, 12 wide, in the middle of a plain background."""
    rng = np.random.default_rng(seed)
    made = np.full((height, width, 3), rng.uniform(0.2, 0.8, 3), np.float32)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((12, 12), Image.Resampling.BILINEAR)
    top, left = height // 2 - 6, width // 2 - 6
    made[top : top + 12, left : left + 12] = np.asarray(coarse) / 255
    return made


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 49), (33, SIDE)])
def test_a_move_is_found_around_the_edges(size):
    pictures = np.stack([picture(seed, *size) for seed in range(3)])
    moves = np.array([(0, 0), (29, 5), (16, 31)])
    frames = np.stack([np.roll(p, move, axis=(0, 1)) for p, move in zip(pictures, moves, strict=True)])
    worn = frames + np.random.default_rng(0).normal(0, 0.1, frames.shape).astype(np.float32)
    scales, found = jax.jit(register)(pictures, worn)
    np.testing.assert_array_equal(scales, 1)
    np.testing.assert_array_equal(found, moves)
    np.testing.assert_allclose(jax.jit(moved)(pictures, scales, found), frames, atol=1e-5)


@pytest.mark.parametrize("scale", [SCALES.min(), 0.82, 1.19, SCALES.max()])
def test_a_size_is_found_with_the_move(scale):
    pictures = picture()[None]
    side = round(12 * scale)
    square = Image.fromarray((pictures[0, 10:22, 10:22] * 255).astype(np.uint8)).resize((side, side))
    frame = np.broadcast_to(pictures[0, 0, 0], (SIDE, SIDE, 3)).copy()
    frame[:side, :side] = np.asarray(square) / 255
    frames = np.roll(frame, (3, 20), axis=(0, 1))[None]
    found, moves = register(pictures, frames)
    assert found[0] == pytest.approx(scale, rel=0.045), "one step of the scales"
    again = np.asarray(moved(pictures, found, moves))
    assert ((again - frames) ** 2).mean() < 0.1 * ((pictures - frames) ** 2).mean()


def test_where_nothing_is_to_be_found_a_picture_stays():
    plain = np.full((1, SIDE, SIDE, 3), 0.3, np.float32)
    scales, moves = register(plain, plain)
    assert SCALES[0] == 1 and scales.tolist() == [1] and moves.tolist() == [[0, 0]]


def test_what_is_beyond_the_edges_is_as_at_them():
    pictures = picture()[None]
    np.testing.assert_allclose(resized(pictures, np.ones(1)), pictures, atol=1e-6)
    small = np.asarray(resized(pictures, np.full(1, 0.5)))[0]
    np.testing.assert_allclose(small[0], np.broadcast_to(pictures[0, 0, 0], (SIDE, 3)), atol=1e-6)
    assert np.abs(small[13:19, 13:19] - pictures[0, 0, 0]).mean() > 0.05
