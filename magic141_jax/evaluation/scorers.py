"""Who is in a frame, and how it moves, read from the pixels alone.

Identity. The best placement of every subject of the pack (`templates.Search`) is ranked by the error that it leaves;
a blob has a nearest neighbour too, so the nearest one T must also be drawn well. With U the union of both
foregrounds, J the interior of T (alpha above 0.95), grad the central differences after a blur of 1 pixel:

    psnr      over U, of the frame against T on the frame's own background
    outline   1 - sum_U |grad I - grad T|^2 / sum_U |grad T|^2        a smooth blob explains little of the edges
    interior  cosine of grad I and grad T in J, blurred within J      a plain silhouette has no gradient there

A frame shows a subject if it is nearest and psnr, outline and interior reach PSNR, OUTLINE and INTERIOR. Measured over
all 100 subjects, anywhere, at sizes from 30 to 43 pixels of 64: 100 % of true frames pass, and 99 % of frames through a
VAE of 31 dB (outline at least 0.67, median 0.93; interior 0.6, 0.94). Of subjects blurred by 4 of their 36 pixels none
passes (outline at most 0.57), nor of sharp silhouettes in the mean colour (interior at most 0.38), but for one in 100
whose interior is too thin to be judged: one of under 30 pixels is not. No subjects of the pack are so alike that they
would have to be merged: every true frame is nearest to its own.

Motion. A frame's foreground has a centre on the torus (the angle of its first Fourier coefficient on each axis) and
an area. Displacement is the slope of the unwrapped centre; growth is log(area) / 2, late frames against early ones.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import ndimage

from magic141_jax.data.emoji import CANVAS, MOTIONS
from magic141_jax.evaluation import metrics
from magic141_jax.evaluation.templates import Placement, Search

PSNR, OUTLINE, INTERIOR = 17.0, 0.7, 0.5
SMALLEST_INTERIOR = 30  # pixels of a 64-pixel frame
MOVING = 0.5  # pixels (of 64) a frame; the set's motions have 1
GROWING = 0.06  # of log size, between the first and the last third of a clip


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who is in a frame: all subjects, nearest first, and how well the nearest is drawn."""

    ranking: tuple[int, ...]
    psnr: float
    outline: float
    interior: float  # nan if the interior is too small to judge
    sharpness: float  # of the foreground, relative to the template's: 1 is as sharp
    placement: Placement

    @property
    def drawn(self) -> bool:
        """Whether the nearest subject is really drawn, not just suggested."""
        return self.psnr >= PSNR and self.outline >= OUTLINE and not self.interior < INTERIOR

    def shows(self, subject: int) -> bool:
        """Top-1: the subject is the nearest, and is drawn."""
        return self.ranking[0] == subject and self.drawn

    def near(self, subject: int, count: int = 5) -> bool:
        """The subject is among the nearest `count`; says nothing about how well it is drawn."""
        return subject in self.ranking[:count]


def identify(search: Search, frame: np.ndarray) -> Identity:
    """Scores a frame (y, x, 3) in [0, 1] of the search's size; see the module docstring."""
    frame = np.asarray(frame, np.float32)
    colour = metrics.background(frame)
    placements = search(frame, colour)
    template, alpha = search.draw(placements[0], colour)
    union = metrics.foreground(frame, colour) | metrics.foreground(template, colour) | (alpha > 0.5)
    union = ndimage.binary_dilation(union)
    return Identity(
        ranking=tuple(p.subject for p in placements),
        psnr=metrics.psnr(frame, template, union),
        outline=outline_agreement(frame, template, union),
        interior=interior_agreement(frame, template, alpha),
        sharpness=metrics.sharpness(frame, union) / max(metrics.sharpness(template, union), 1e-6),
        placement=placements[0],
    )


def outline_agreement(frame: np.ndarray, template: np.ndarray, union: np.ndarray) -> float:
    """The share of the template's gradient energy in `union` that the frame explains; at most 1, can be negative."""
    ours, theirs = (metrics.gradients(_blur(f))[union] for f in (frame, template))
    return float(1 - np.sum((ours - theirs) ** 2) / max(np.sum(theirs**2), 1e-9))


def interior_agreement(frame: np.ndarray, template: np.ndarray, alpha: np.ndarray) -> float:
    """The cosine of the two gradient fields inside the template, or nan where the inside is too small.

    The blur stays within the inside, (G * fm) / (G * m), so that the outline can't leak in.
    """
    mask = (alpha > 0.95)[..., None].astype(np.float32)
    inside = ndimage.binary_erosion(mask[..., 0] > 0)
    if inside.sum() < SMALLEST_INTERIOR * alpha.size / CANVAS**2:
        return float("nan")
    weight = np.maximum(_blur(mask), 1e-3)
    ours, theirs = (metrics.gradients(_blur(f * mask) / weight)[inside] for f in (frame, template))  # pyright: ignore[reportCallIssue]
    return float(np.sum(ours * theirs) / math.sqrt(np.sum(ours**2) * np.sum(theirs**2) + 1e-9))


def read_motion(frames: np.ndarray) -> str:
    """The name of the motion (a key of `MOTIONS`) of a clip (t, y, x, 3) in [0, 1], at least 3 frames.

    A displacement of at least `MOVING` a frame is "left", "right", "up" or "down", whichever it is nearest to; else
    a change of log size of at least `GROWING` is "grows" or "shrinks"; else the subject stands still.
    """
    displacement, growth = track(frames)
    if np.linalg.norm(displacement) >= MOVING:
        directions = {k: np.array(m.velocity) for k, m in MOTIONS.items() if any(m.velocity)}
        return max(directions, key=lambda k: float(directions[k] @ displacement))
    if abs(growth) >= GROWING:
        return "grows" if growth > 0 else "shrinks"
    return "still"


def track(frames: np.ndarray) -> tuple[np.ndarray, float]:
    """The displacement (y, x) in pixels (of 64) a frame, and the change of log size, of a clip (t, y, x, 3)."""
    colour = metrics.background(frames[0])
    weight = np.abs(frames - np.asarray(colour, np.float32)).max(-1)
    weight = np.where(weight > metrics.FOREGROUND, weight, 0) + 1e-6
    slopes = []
    for axis in (1, 2):
        profile = weight.sum(3 - axis)
        angles = np.angle(profile @ np.exp(2j * np.pi * np.arange(profile.shape[1]) / profile.shape[1]))
        centre = np.unwrap(angles) * CANVAS / (2 * np.pi)
        slopes.append(np.polyfit(np.arange(len(centre)), centre, 1)[0])
    area = np.log(metrics.foreground(frames, colour).sum((1, 2)) + 1.0) / 2
    third = max(len(area) // 3, 1)
    return np.array(slopes), float(area[-third:].mean() - area[:third].mean())


def _blur(x: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(x, (1, 1, 0), mode="wrap")
