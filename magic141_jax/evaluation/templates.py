"""Every subject of the pack at any size and moment, and where in a frame it fits best, on the torus.

A template is colour premultiplied by alpha, P (3 channels), and alpha a. On a background g it deviates from g by
d = P - a g, and a frame I by D = I - g. Moved by s, the template leaves the squared error

    E(s) = sum D^2 + sum d^2 - 2 c(s),     c(s) = sum_x D(x) d(x - s) = corr(D, P)(s) - corr(D . g, a)(s)

over all pixels and channels; c is a cyclic correlation for all s at once, so four real FFTs of a template serve
every background. `search` goes from coarse to fine: a bank of all subjects on a canvas of half the size, then all
moments of the best of them, then single steps of moment and size at full size.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import scipy.fft

from magic141_jax.data.emoji import CANVAS, SIZES, EmojiPack

PHASES = 24
SOURCE = 96  # side of the pack's pictures
COARSE_PHASES = tuple(range(0, PHASES, 6))
COARSE_SIZES = tuple(range(round(SIZES[0]) + 1, round(SIZES[1]) + 1, 4))
MIDDLE_SUBJECTS, MIDDLE_PHASES = 6, tuple(range(0, PHASES, 2))
MIDDLE_SIZES = tuple(range(round(SIZES[0]), round(SIZES[1]) + 1, 2))
FINE_SUBJECTS, FINE_STARTS, FINE_ROUNDS = 5, 6, 2
FINE_STEPS = ((-1, 0), (0, -1), (0, 0), (0, 1), (1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))  # of moment and size


@dataclasses.dataclass(frozen=True)
class Placement:
    """A template in a frame: which, where (its top left corner, to half a pixel), and the error E that it leaves."""

    subject: int
    phase: int
    size: int  # pixels of a 64-pixel frame
    shift: tuple[float, float]
    error: float


class Bank:
    """Templates on a square canvas of `canvas` pixels with their spectra.

    Attributes:
      keys: (n, 3) int: subject, phase, size.
      spectra: (n, 4, canvas, canvas / 2 + 1) complex: conjugate transforms of P and a.
      energy (n,), cross (n, 3), alpha_energy (n,): sums over the canvas of P^2, P a and a^2, for sum d^2.
    """

    def __init__(self, pack: EmojiPack, keys: np.ndarray, canvas: int) -> None:
        self.keys, self.canvas = keys, canvas
        pictures = draw_all(pack, keys, canvas)
        colour, alpha = pictures[:, :3], pictures[:, 3:]
        self.spectra = np.conj(scipy.fft.rfft2(pictures, workers=-1))  # pyright: ignore[reportCallIssue]
        self.energy = np.einsum("ncyx,ncyx->n", colour, colour)
        self.cross = np.einsum("ncyx,nyx->nc", colour, alpha[:, 0])
        self.alpha_energy = np.einsum("nyx,nyx->n", alpha[:, 0], alpha[:, 0])

    def place(self, frame: np.ndarray, colour: np.ndarray) -> list[Placement]:
        """The best placement of each template in a frame (canvas, canvas, 3) on the background `colour`."""
        deviation = frame - colour
        weighted = np.concatenate([deviation, -(deviation @ colour)[..., None]], axis=-1).transpose(2, 0, 1)
        spectrum = scipy.fft.rfft2(weighted.astype(np.float32), workers=-1)
        product = np.einsum("nckl,ckl->nkl", self.spectra, spectrum)  # pyright: ignore[reportCallIssue]
        surface = scipy.fft.irfft2(product, (self.canvas, self.canvas), workers=-1)
        own = self.energy - 2 * self.cross @ colour + self.alpha_energy * (colour @ colour)
        shifts, peaks = _peaks(surface)
        errors = (deviation**2).sum() + own - 2 * peaks
        return [
            Placement(*map(int, key), tuple(map(float, shift)), float(error))  # pyright: ignore[reportCallIssue]
            for key, shift, error in zip(self.keys, shifts, errors, strict=True)
        ]


class Search:
    """Finds the subjects of a pack in frames of `side` x `side` pixels (an even number)."""

    def __init__(self, pack: EmojiPack, side: int = CANVAS) -> None:
        self.pack, self.side = pack, side
        grid = [(s, p, z) for s in range(len(pack.subjects)) for p in COARSE_PHASES for z in COARSE_SIZES]
        self._coarse = Bank(pack, np.array(grid), side // 2)

    def __call__(self, frame: np.ndarray, colour: np.ndarray) -> list[Placement]:
        """The best placement of each subject in a frame (side, side, 3), the nearest subject first.

        All subjects are ranked, by the finest stage that each of them reached.
        """
        colour = np.asarray(colour, np.float32)
        half = frame.reshape(self.side // 2, 2, self.side // 2, 2, 3).mean((1, 3))
        coarse = best_of_each(self._coarse.place(half, colour))
        grid = [(m.subject, p, z) for m in coarse[:MIDDLE_SUBJECTS] for p in MIDDLE_PHASES for z in MIDDLE_SIZES]
        found = sorted(Bank(self.pack, np.array(grid), self.side // 2).place(half, colour), key=lambda m: m.error)
        middle = best_of_each(found)
        fine = middle[:FINE_SUBJECTS] + found[:FINE_STARTS]  # the second: not to be caught in a wrong moment or size
        for _ in range(FINE_ROUNDS):
            grid = [(m.subject, (m.phase + p) % PHASES, m.size + z) for m in fine for p, z in FINE_STEPS]
            fine = best_of_each(Bank(self.pack, _legal(grid), self.side).place(frame, colour))
        seen = {m.subject for m in fine}
        middle = [m for m in middle if m.subject not in seen]
        seen |= {m.subject for m in middle}
        return fine + middle + [m for m in coarse if m.subject not in seen]

    def draw(self, placement: Placement, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A placed template on a plain background: the frame (side, side, 3), and its alpha (side, side)."""
        key = np.array([[placement.subject, placement.phase, placement.size]])
        (picture,) = draw_all(self.pack, key, self.side)
        whole = np.floor(placement.shift).astype(int)
        picture = np.roll(picture, tuple(whole), axis=(1, 2)).transpose(1, 2, 0)
        for axis in np.flatnonzero(placement.shift - whole):
            picture = (picture + np.roll(picture, 1, axis)) / 2
        alpha = picture[..., 3:]
        return np.clip(picture[..., :3] + (1 - alpha) * np.asarray(colour, np.float32), 0, 1), alpha[..., 0]


def _peaks(surfaces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where cyclic surfaces (n, y, x) peak, (n, 2) to half a pixel, and the height (n,) of the parabolas there.

    A parabola through the peak and its neighbours, c- c0 c+, tops at (c+ - c-) / (2 k), k = 2 c0 - c+ - c-, and is
    (c+ - c-)^2 / (8 k) higher than c0. Without it a subject at an odd pixel would fit badly on the half canvas.
    """
    count, canvas = surfaces.shape[:2]
    rows = np.arange(count)
    where = np.stack(np.divmod(surfaces.reshape(count, -1).argmax(1), canvas), axis=-1)
    heights = top = surfaces[rows, where[:, 0], where[:, 1]]
    shifts = where.astype(np.float64)
    for axis in (0, 1):
        step = np.eye(2, dtype=int)[axis]
        before, after = (surfaces[(rows, *((where + sign * step) % canvas).T)] for sign in (-1, 1))
        bend = np.maximum(2 * top - before - after, 1e-6)
        heights = heights + (after - before) ** 2 / (8 * bend)
        shifts[:, axis] += np.round((after - before) / bend) / 2
    return shifts, heights


def best_of_each(placements: list[Placement]) -> list[Placement]:
    """The placement of least error of each subject, in order of that error."""
    best: dict[int, Placement] = {}
    for placement in sorted(placements, key=lambda m: m.error):
        best.setdefault(placement.subject, placement)
    return list(best.values())


def _legal(grid: list[tuple[int, int, int]]) -> np.ndarray:
    low, high = (round(s) for s in SIZES)
    return np.array(sorted({(s, p, min(max(z, low), high)) for s, p, z in grid}))


def draw_all(pack: EmojiPack, keys: np.ndarray, canvas: int) -> np.ndarray:
    """Templates (n, 3) at the top left of their canvas, float32 (n, 4, canvas, canvas), premultiplied, in [0, 1].

    Resizing is two matrix products, done for all templates of a size at once.
    """
    shrink = 2 if canvas <= SOURCE // 3 else 1  # a canvas so small needs no more than half the detail
    out = np.zeros((len(keys), 4, canvas, canvas), np.float32)
    for size in np.unique(keys[:, 2]):
        (rows,) = np.nonzero(keys[:, 2] == size)
        matrix = _resize_matrix(SOURCE // shrink, float(size) * canvas / CANVAS)
        side = min(len(matrix), canvas)
        pictures = np.stack([_picture(pack, int(s), int(p), shrink) for s, p, _ in keys[rows]]).astype(np.float32)
        drawn = matrix[:side] @ (pictures @ matrix[:side].T)
        out[rows, :, :side, :side] = np.clip(drawn, 0, 255) / 255
    return out


@functools.lru_cache(maxsize=4096)
def _picture(pack: EmojiPack, subject: int, phase: int, shrink: int) -> np.ndarray:
    """One moment of a subject, uint8 (4, y, x); shrunk by averaging."""
    picture = pack.frames(subject)[phase].transpose(2, 0, 1)
    if shrink == 1:
        return picture
    sums = picture.astype(np.uint16)
    sums = sums[:, ::2] + sums[:, 1::2]
    return ((sums[..., ::2] + sums[..., 1::2] + 2) // 4).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _resize_matrix(source: int, side: float) -> np.ndarray:
    """The triangle filter, from `source` pixels to `side`, of which the last may be partly covered."""
    scale = source / side
    count = int(np.ceil(side))
    distance = (np.arange(source) + 0.5 - (np.arange(count)[:, None] + 0.5) * scale) / max(scale, 1)
    weights = np.maximum(1 - np.abs(distance), 0)
    covered = np.clip(side - np.arange(count), 0, 1)[:, None]
    return (weights / weights.sum(1, keepdims=True) * covered).astype(np.float32)
