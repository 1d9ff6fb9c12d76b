"""How a long video holds, window by window: who is in it, its colours, its motion, and its seams.

Of the frames that a window adds, by the last one:

    identity, nearest   the subject is nearest and drawn, or nearest at all (`scorers`)
    colour_error        the background's distance to the caption's colour (largest channel, in steps of 255)
    subject_psnr, sharpness    of the subject against its nearest template

and by all of them, for any video whatever it shows:

    luminance, saturation   mean of .2126 R + .7152 G + .0722 B, and of the largest channel less the smallest
    detail              mean size of the gradient
    similarity          of the colour histogram to the first frame's, its intersection: 1 is the same
    motion              pixels (of 64) a frame in the direction of the caption; nan where it names none

Over a whole video: start-end contrast is |mean of the first 15 % - mean of the last 15 %| (FramePack, arXiv
2504.12626), of luminance and saturation in hundredths of their range, over captions under which the subject keeps its
size. The seam ratio is the change between the frames on both sides of a seam over that between other neighbours, over
all videos; where windows fade into each other a seam is all of the fade. The beat is that ratio inside windows, of the
frames on both sides of where a latent frame begins: a seam is none that changes as much. And who is right in the last
window is counted once more among those who were in the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from magic141_jax.data.emoji import COLOURS, MOTIONS, EmojiPack, Scene, caption
from magic141_jax.evaluation import metrics, protocol, scorers
from magic141_jax.evaluation.templates import Search
from magic141_jax.pipelines.long_video import make_plan, stream_video
from magic141_jax.pipelines.options import resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

AT_ENDS = ("identity", "nearest", "colour_error", "subject_psnr", "sharpness")
OVER_ALL = ("luminance", "saturation", "detail", "similarity", "motion")
MEASURES = (*AT_ENDS, *OVER_ALL)
SUMMARY = {  # name -> (label, form)
    "nearest": ("subject right, last window", "{:.2f}"),
    "still_right": ("of those right in the first", "{:.2f}"),
    "identity": ("and drawn, last window", "{:.2f}"),
    "identity_first": ("and drawn, first window", "{:.2f}"),
    "luminance_contrast": ("luminance, start-end (%)", "{:.1f}"),
    "saturation_contrast": ("saturation, start-end (%)", "{:.1f}"),
    "seam_ratio": ("seam ratio", "{:.2f}"),
    "beat": ("beat", "{:.2f}"),
    "motion_kept": ("motion, last / first window", "{:.2f}"),
    "similarity": ("similarity to the first frame, last window", "{:.2f}"),
    "detail_kept": ("detail, last / first window", "{:.2f}"),
}
ENDS = 0.15  # of a video, compared in start-end contrasts
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
HISTOGRAM_BINS = 8  # a channel


@dataclasses.dataclass(frozen=True)
class Followed:
    """One video's values.

    Attributes:
      windows: {measure: (windows,)}.
      contrasts: {"luminance", "saturation"}: start-end, in hundredths; nan where the subject grows or shrinks.
      seam: mean change across seams; nan if there is none.
      interior: mean change between other neighbouring frames.
      beat: mean change of those between which a latent frame begins.
    """

    windows: dict[str, np.ndarray]
    contrasts: dict[str, float]
    seam: float
    interior: float
    beat: float


def measure_drift(
    pipeline: TextToVideoPipeline,
    pack: EmojiPack,
    search: Search,
    scenes: Sequence[Scene],
    *,
    seconds: float = 60.0,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Makes one video of `seconds` for each scene's caption and follows it.

    Returns:
      {"windows": {measure of `MEASURES`: means over videos, by window}, "summary": {name of `SUMMARY`: value}}.
    """
    total = round(seconds * pipeline.components.sampling.fps)
    given = dict(options or {})
    resolved = resolve(given, pipeline.components)
    plan, factor = make_plan(resolved, pipeline.components), pipeline.components.vae.network.config.temporal_factor
    ends = window_ends(total, plan.length, plan.shared)
    found = []
    for seed, scene in enumerate(scenes):
        stream = stream_video(pipeline, caption(pack, scene), total_frames=total, **{"seed": seed, **given})
        found.append(follow(np.concatenate(list(stream)), scene, search, ends, faded=plan.faded, factor=factor))
        progress(caption(pack, scene))
    return {"windows": _means(found), "summary": summary(found)}


def window_ends(total: int, window: int, overlap: int) -> list[int]:
    """The last frame of every whole window, of `window` frames of which `overlap` are shared; at least one frame."""
    return list(range(window - 1, total, window - overlap)) or [total - 1]


def follow(
    frames: np.ndarray, scene: Scene, search: Search, ends: Sequence[int], *, faded: int = 0, factor: int = 4
) -> Followed:
    """The values of one video (t, y, x, 3) in [0, 1].

    Args:
      frames, scene: the video, and what its caption was made of.
      search: who may be in it.
      ends: the last frames of its windows.
      faded: how many frames up to each of these fade into the next window.
      factor: frames of a latent frame, the first of a window aside.
    """
    parts = [frames[start : end + 1] for start, end in zip([0, *(e + 1 for e in ends)], ends)]
    # motion needs more than one frame: a window's starts at the last frame of the one before
    moving = [frames[max(start - 1, 0) : end + 1] for start, end in zip([0, *(e + 1 for e in ends)], ends)]
    at_ends = np.array([_at_end(frames[end], scene, search) for end in ends], np.float64)
    first = histogram(frames[0])
    over_all = [
        (
            luminance(part).mean(),
            saturation(part).mean(),
            np.sqrt((metrics.gradients(part) ** 2).sum((-1, -2))).mean(),
            np.mean([np.minimum(histogram(frame), first).sum() for frame in part]),
            advance(clip, scene.motion),
        )
        for part, clip in zip(parts, moving, strict=True)
    ]
    values = np.concatenate([at_ends, np.array(over_all, np.float64)], axis=1)
    changes = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    numbers = np.arange(len(changes))  # change i is that from frame i to i + 1
    at_seam = np.isin(numbers, [end - back for end in ends for back in range(faded + 1)])
    begins = (numbers % factor == ends[0] % factor) & ~at_seam
    resizes = bool(MOTIONS[scene.motion].growth)
    contrasts = {
        name: float("nan") if resizes else start_end(of(frames)) * 100
        for name, of in (("luminance", luminance), ("saturation", saturation))
    }
    mean_changes = [_mean(changes[which]) for which in (at_seam, ~at_seam, begins)]
    return Followed(dict(zip(MEASURES, values.T, strict=True)), contrasts, *mean_changes)


def summary(found: Sequence[Followed]) -> dict[str, float]:
    """The values of `SUMMARY`, means over videos; a ratio is one of means, or of sums."""
    means = {name: np.array(values) for name, values in _means(found).items()}
    kept = {name: float(means[name][-1] / means[name][0]) if means[name][0] else float("nan") for name in OVER_ALL}
    seams = [(f.seam, f.interior, f.beat) for f in found if np.isfinite(f.seam)]
    across, inside, beat = np.sum(seams, axis=0) if seams else (float("nan"), 1.0, float("nan"))
    right = np.array([f.windows["nearest"] for f in found], bool)
    return {
        "nearest": float(means["nearest"][-1]),
        "still_right": _mean(right[right[:, 0], -1]),
        "identity": float(means["identity"][-1]),
        "identity_first": float(means["identity"][0]),
        "luminance_contrast": _mean([f.contrasts["luminance"] for f in found]),
        "saturation_contrast": _mean([f.contrasts["saturation"] for f in found]),
        "seam_ratio": float(across / inside) if inside else float("nan"),
        "beat": float(beat / inside) if inside else float("nan"),
        "motion_kept": kept["motion"],
        "similarity": float(means["similarity"][-1]),
        "detail_kept": kept["detail"],
    }


def vae_drift(pipeline: TextToVideoPipeline, images: np.ndarray, trips: int) -> list[float]:
    """PSNR (dB) of pictures (b, y, x, 3) after 1, 2, ... `trips` times through the autoencoder: its drift alone."""
    run, now, found = protocol.round_trip(pipeline), images[:, None], []
    for _ in range(trips):
        now = run(now)
        found.append(protocol.mean(metrics.psnr(a, b) for a, b in zip(now[:, 0], images, strict=True)))
    return found


def luminance(frames: np.ndarray) -> np.ndarray:
    """Mean luminance of each frame (..., y, x, 3)."""
    return (frames @ LUMINANCE).mean((-1, -2))


def saturation(frames: np.ndarray) -> np.ndarray:
    """Mean difference of the largest and the smallest channel of each frame (..., y, x, 3)."""
    return (frames.max(-1) - frames.min(-1)).mean((-1, -2))


def histogram(frame: np.ndarray) -> np.ndarray:
    """Shares of the colours of a frame (y, x, 3), `HISTOGRAM_BINS` a channel; they sum to 1."""
    bins = np.minimum((frame * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1) @ [1, HISTOGRAM_BINS, HISTOGRAM_BINS**2]
    return np.bincount(bins.ravel(), minlength=HISTOGRAM_BINS**3) / bins.size


def advance(frames: np.ndarray, motion: str) -> float:
    """Pixels (of 64) a frame in the direction that a motion of `MOTIONS` names; nan if it names none."""
    direction = np.array(MOTIONS[motion].velocity)
    if not direction.any() or len(frames) < 2:
        return float("nan")
    return float(scorers.track(frames)[0] @ direction / np.linalg.norm(direction))


def start_end(values: np.ndarray) -> float:
    """|mean of the first 15 % - mean of the last 15 %| of values in order."""
    count = max(round(ENDS * len(values)), 1)
    return float(abs(values[:count].mean() - values[-count:].mean()))


def _at_end(frame: np.ndarray, scene: Scene, search: Search) -> tuple[float, ...]:
    found = scorers.identify(search, frame)
    wanted = np.array(COLOURS[scene.colour]) / 255
    error = 255 * np.abs(metrics.background(frame) - wanted).max()
    return found.shows(scene.subject), found.near(scene.subject, 1), error, found.psnr, found.sharpness


def _means(found: Sequence[Followed]) -> dict[str, list[float]]:
    return {name: [_mean(values) for values in np.stack([f.windows[name] for f in found], axis=1)] for name in MEASURES}


def _mean(values: Sequence[float]) -> float:
    """The mean of what is a number; nan if nothing is."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
