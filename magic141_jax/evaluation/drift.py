"""How a long video holds: its frames at the end of every window, against what its caption promised.

Per window, at its last frame: identity (nearest and drawn), the subject being nearest at all, the background's
distance to the caption's colour (largest channel, in steps of 255), PSNR of the subject against its nearest
template, and sharpness relative to that template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from magic141_jax.data.emoji import COLOURS, EmojiPack, Scene, caption
from magic141_jax.evaluation import metrics, scorers
from magic141_jax.evaluation.templates import Search
from magic141_jax.pipelines.long_video import overlap_frames, stream_video
from magic141_jax.pipelines.options import resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

MEASURES = ("identity", "nearest", "colour_error", "subject_psnr", "sharpness")


def measure_drift(
    pipeline: TextToVideoPipeline,
    pack: EmojiPack,
    search: Search,
    scenes: tuple[Scene, ...],
    *,
    seconds: float = 60.0,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Makes one video of `seconds` for each scene's caption; returns each of `MEASURES` by window, mean over videos."""
    total = round(seconds * pipeline.components.sampling.fps)
    resolved = resolve(options or {}, pipeline.components)
    overlap = overlap_frames(resolved, pipeline.components.vae.network.config.temporal_factor)
    ends = range(resolved.num_frames - 1, total, resolved.num_frames - overlap)
    rows = []
    for seed, scene in enumerate(scenes):
        stream = stream_video(pipeline, caption(pack, scene), total_frames=total, **{"seed": seed, **(options or {})})
        frames = np.concatenate(list(stream))
        rows.append([_values(frames[end], scene, search) for end in ends])
        progress(caption(pack, scene))
    means = np.mean(np.array(rows, np.float64), axis=0)
    return {name: means[:, i].tolist() for i, name in enumerate(MEASURES)}


def _values(frame: np.ndarray, scene: Scene, search: Search) -> tuple[float, ...]:
    found = scorers.identify(search, frame)
    wanted = np.array(COLOURS[scene.colour]) / 255
    error = 255 * np.abs(metrics.background(frame) - wanted).max()
    return found.shows(scene.subject), found.near(scene.subject, 1), error, found.psnr, found.sharpness
