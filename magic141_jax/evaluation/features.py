"""A fixed feature space for clips, a Fréchet distance in it, and the diversity of samples.

The features are first-order scattering (Bruna and Mallat, arXiv 1203.1513) over space and time: filter, rectify,
average in cells. Learned features (I3D) would be a download, and reward static clips; these are nine numbers a cell,
each with a meaning, so that a distance can be traced to what is wrong:

    colour   3   the frame without detail, per channel                   wrong colours, place of the subject
    detail   3   |G_{k-1} - G_k|, mean over channels, at three octaves    blur (too little), noise (too much, fine)
    change   3   |G_k(t + 1) - G_k(t)|, mean over channels, ditto         frozen, jumping or flickering clips

G_k is a Gaussian of 1, 2 and 4 pixels (of 64), G_0 none, on the torus that the emoji set lives on. Two uses:

- `FeatureSpace.statistics`: mean and deviation of the nine over all cells and frames, 18 numbers a clip. They do not
  say where a subject is, so few clips tell their distribution: `frechet`.
- `FeatureSpace.maps`: the nine in 8 x 8 cells of every frame. They say where a subject is and how it looks, and less
  of pixel noise than pixels do: `diversity`, `perceptual`.

Both are in units of their deviation over a fixed set of true clips.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from magic141_jax.data.emoji import CANVAS

CELLS = 8
BLURS = (1.0, 2.0, 4.0)  # pixels of a 64-pixel frame
LEAST = 1e-4  # of a scale: a feature that never varies in true clips must not outweigh all others


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """The units (9,) of the features.

    Attributes:
      scale: a cell's deviations over the cells, frames and clips of a set of true clips. (A clip mean's own deviation
        would be too fine a unit: true clips have no noise at all, and the autoencoder's would outweigh all else.)
    """

    scale: np.ndarray

    @classmethod
    def of(cls, clips: np.ndarray) -> FeatureSpace:
        """The space in whose units clips (n, t, y, x, 3) in [0, 1] have deviation 1."""
        cells = np.stack([scatter(clip) for clip in clips])
        return cls(np.maximum(cells.std((0, 1, 2, 3)), LEAST))

    def maps(self, clips: np.ndarray) -> np.ndarray:
        """Clips (n, t, y, x, 3) -> (n, t, cells, cells, 9)."""
        return np.stack([scatter(clip) for clip in clips]) / self.scale

    def statistics(self, clips: np.ndarray) -> np.ndarray:
        """Clips (n, t, y, x, 3) -> (n, 18): mean and deviation of the nine over cells and frames."""
        cells = self.maps(clips).astype(np.float64).reshape(len(clips), -1, len(self.scale))
        return np.concatenate([cells.mean(1), cells.std(1)], axis=-1)


def scatter(clip: np.ndarray) -> np.ndarray:
    """A clip (t, y, x, 3) in [0, 1] -> (t, cells, cells, 9); see the module docstring. The last change is 0."""
    clip = np.asarray(clip, np.float32)
    unit = clip.shape[1] / CANVAS
    levels = [clip, *(ndimage.gaussian_filter(clip, (0, s * unit, s * unit, 0), mode="wrap") for s in BLURS)]
    detail = [np.abs(fine - coarse).mean(-1) for fine, coarse in itertools.pairwise(levels)]
    change = [np.abs(np.diff(level, axis=0, append=level[-1:])).mean(-1) for level in levels[1:]]
    return _average_cells(np.concatenate([levels[-1], np.stack([*detail, *change], -1)], -1))


def frechet(a: np.ndarray, b: np.ndarray, *, shrink: bool = True) -> float:
    """The Fréchet distance of the Gaussians of two samples (n, d) and (m, d), both of at least two rows:

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))                         (Heusel 2017, arXiv 1706.08500)

    in float64. S_a S_b has the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: its trace of the root is
    real and stable for covariances of any rank, where a general matrix square root is not.

    With fewer samples than dimensions a covariance has empty directions, in which any two samples seem to differ.
    So, unless `shrink` is False (as FID and FVD are published), correlations are shrunk, S = (1 - w) C + w diag(C) with
    w = d / (d + min(n, m)), the same w for both: equal samples keep distance 0, variances stay, and w vanishes as
    samples grow.

    Bias: two independent samples of one distribution do not have distance 0, but some tr(S) (1/n + 1/m) from the
    means and as much again from the covariances; it falls as 1/n. Compare values of equal n and m only. Shrunk
    correlations also hide a part of what differs in correlations alone.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    fewest, d = min(len(a), len(b)), a.shape[1]
    if fewest < 2:
        raise ValueError("a covariance takes at least two samples")
    weight = d / (d + fewest) if shrink else 0.0
    first, second = (_shrink(np.atleast_2d(np.cov(x, rowvar=False)), weight) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first) + np.trace(second) - 2 * cross
    return float(max(distance, 0.0))


def perceptual(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A distance of two sets of clips' feature maps, in the form of LPIPS (Zhang 2018, arXiv 1801.03924).

    Each place's features are scaled to length 1, and the squared difference is averaged over places and frames. All
    channels count alike: LPIPS weighs those of its own networks by human judgements, of which there are none here.

    Args:
      a, b: (n, t, ..., channels).

    Returns:
      (n,), from 0 (the same) to 4.
    """

    def directions(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-10)

    pairs = zip(a, b, strict=True)  # one clip at a time: a network's maps are large
    return np.array([((directions(x) - directions(y)) ** 2).sum(-1).mean() for x, y in pairs])


def diversity(draws: Sequence[np.ndarray]) -> float:
    """How far samples of one caption are apart under several noises.

    Args:
      draws: at least two arrays (n, ...) of maps, one for each noise, row i for caption i.

    Returns:
      the root mean square difference of two draws, mean over pairs of draws and captions.
    """
    return float(np.mean(diversity_of_each(draws)))


def diversity_of_each(draws: Sequence[np.ndarray]) -> np.ndarray:
    """`diversity` caption by caption: (n,)."""
    pairs = list(itertools.combinations([np.asarray(d, np.float64).reshape(len(d), -1) for d in draws], 2))
    if not pairs:
        raise ValueError("diversity takes at least two draws")
    return np.mean([np.sqrt(np.mean((a - b) ** 2, axis=1)) for a, b in pairs], axis=0)


def _average_cells(values: np.ndarray) -> np.ndarray:
    """(t, y, x, c) -> (t, cells, cells, c), for any y = x of at least as many pixels."""
    for axis in (1, 2):
        edges = np.arange(CELLS + 1) * values.shape[axis] // CELLS
        counts = np.diff(edges).reshape([-1 if i == axis else 1 for i in range(4)])
        values = np.add.reduceat(values, edges[:-1], axis=axis) / counts.astype(np.float32)
    return values


def _shrink(covariance: np.ndarray, weight: float) -> np.ndarray:
    return (1 - weight) * covariance + weight * np.diag(np.diag(covariance))
