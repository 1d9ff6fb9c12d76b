"""Numbers about pictures that need no model: PSNR, SSIM, background colour, motion amount, sharpness.

All frames are float arrays (..., y, x, 3) in [0, 1]. `foreground` and the background colour rest on the fact that a
frame of the emoji set is one subject on one plain colour.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from magic141_jax.data.emoji import COLOURS

PSNR_CEILING = 99.0  # dB, returned for equal pictures
FOREGROUND = 0.12  # a pixel is foreground where some channel differs from the background by more
SSIM_SIGMA, SSIM_C1, SSIM_C2 = 1.5, 0.01**2, 0.03**2
COLOUR_BIN = 16  # bins per channel of the histogram that finds the most frequent colour
COLOUR_RADIUS = 0.1


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """10 log10(1 / mean squared error) in dB, over the mask (..., y, x) if given; nan over an empty mask."""
    error = np.mean((np.asarray(a, np.float64) - b) ** 2, axis=-1)
    error = error if mask is None else error[np.broadcast_to(mask, error.shape)]
    if not error.size:
        return float("nan")
    return float(min(-10 * np.log10(max(error.mean(), 1e-12)), PSNR_CEILING))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity with a Gaussian window of sigma 1.5 pixels, per frame and channel (Wang 2004)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sigma = (0,) * (a.ndim - 3) + (SSIM_SIGMA, SSIM_SIGMA, 0)

    def blur(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, sigma, truncate=3.5)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    return float(np.mean(top / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2))))


def background(frame: np.ndarray) -> np.ndarray:
    """The background colour (3,) of a frame (y, x, 3): the median near the centre of the fullest histogram bin.

    The subject covers at most about half of the canvas and has many colours, so the background is the most frequent
    colour wherever the subject is, also across the border of the torus. Bins are counted on two grids, shifted by
    half a bin, so that a colour on the edge of a bin is not split.
    """
    pixels = np.asarray(frame, np.float32).reshape(-1, 3)
    best_count, centre = 0, pixels[0]
    for offset in (0.0, 0.5):
        bins = np.floor(pixels * COLOUR_BIN + offset).astype(np.int64)
        codes = bins @ np.array([1, 64, 4096])
        values, counts = np.unique(codes, return_counts=True)
        if counts.max() > best_count:
            best_count, centre = counts.max(), pixels[codes == values[counts.argmax()]].mean(0)
    return np.median(pixels[np.abs(pixels - centre).max(-1) < COLOUR_RADIUS], axis=0)


def colour_name(colour: np.ndarray) -> str:
    """The name of the nearest (Euclidean) of the set's background colours to a colour (3,) in [0, 1]."""
    distances = {name: np.linalg.norm(np.asarray(colour) * 255 - rgb) for name, rgb in COLOURS.items()}
    return min(distances, key=distances.__getitem__)


def foreground(frames: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The mask (..., y, x) of pixels that differ from the background colour (3,) by more than `FOREGROUND`."""
    return np.abs(frames - np.asarray(colour, np.float32)).max(-1) > FOREGROUND


def motion_amount(frames: np.ndarray) -> float:
    """The mean absolute difference between neighbouring frames of a clip (t, y, x, 3)."""
    return float(np.mean(np.abs(np.diff(frames, axis=0))))


def gradients(frame: np.ndarray) -> np.ndarray:
    """Central differences on the torus, per channel: (y, x, 3) -> (y, x, 3, 2)."""
    return np.stack([(np.roll(frame, -1, axis) - np.roll(frame, 1, axis)) / 2 for axis in (-3, -2)], axis=-1)


def sharpness(frame: np.ndarray, mask: np.ndarray) -> float:
    """The mean gradient magnitude inside a mask (y, x), in units of brightness a pixel; nan over an empty mask."""
    inside = np.sqrt((gradients(frame) ** 2).sum((-1, -2)))[mask]
    return float(inside.mean()) if inside.size else float("nan")
