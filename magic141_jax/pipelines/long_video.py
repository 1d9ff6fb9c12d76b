"""Videos of any length by a sliding window, streamed (Magic 1-For-1's test-time sliding window, arXiv 2502.07701).

    window 0   known: the image, 1 latent frame                     emits t frames
    window w   known: k latent frames, the last 4(k-1)+1 pixel      emits the t - (4(k-1)+1) frames that are new
               frames of window w - 1, encoded anew

(less what is dropped from the start of every window where the weights ask for it, `SamplingSettings.dropped_frames`).

The known latents of a window are encoded from pixels, not carried over: in a causal VAE the first latent frame
stands for one pixel frame and every other for four, so a latent from the middle of a clip is not a valid first one.
The first image's tokens stay before the text of every window, as an anchor against drift; a little noise on what the
network sees of the known latents (history noise) hides the model's own errors from it. All windows run the same
compiled programs, and only one window's frames are held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.pipelines.engine import Prompts
from magic141_jax.pipelines.image_to_video import FIRST_WINDOW, as_pictures, fit_images
from magic141_jax.pipelines.media import ImageLike
from magic141_jax.pipelines.options import SamplingOptions, as_prompts, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

BORDER = 8  # a frame's border is this fraction of its sides
GAIN_LIMITS = (0.8, 1.25)
SPREAD_FLOOR = 0.02  # added to a border's standard deviation: that of a flat colour is noise


@dataclasses.dataclass(frozen=True)
class VideoStream:
    """A video in the making: its first image (y, x, 3), and an iterator of frames (n, y, x, 3), window by window."""

    image: np.ndarray
    frames: Iterator[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames


def stream_video(
    pipeline: TextToVideoPipeline,
    prompt: str,
    *,
    total_frames: int,
    image: ImageLike | None = None,
    **options: Any,
) -> VideoStream:
    """Makes one video of `total_frames` frames; the image is made at once, each window when it is asked for.

    Args:
      pipeline: whose networks are used.
      prompt: one prompt.
      total_frames: at least 1; a window more or less than needed is never computed, surplus frames are cut off.
      image: the first frame (see `ImageToVideoPipeline`); made from the prompt unless given.
      **options: the fields of `SamplingOptions`; `num_frames` is the window's length.

    Raises:
      UserError: no frames, several prompts, an unreadable image, `latents` given; an unknown or illegal option.
    """
    (prompt,) = as_prompts(prompt) if isinstance(prompt, str) else as_prompts("")
    if total_frames < 1:
        raise UserError(f"{total_frames} frames; a video has at least 1")
    resolved = resolve(options, pipeline.components)
    if resolved.latents is not None:
        raise UserError("a long video draws its own noise; leave out latents")
    if pipeline.components.transformer.network.config.known == "none":
        return _from_text_alone(pipeline, prompt, resolved, total_frames, image)
    if image is None:
        encoded, images = pipeline.first_images([prompt], options, dataclasses.replace(resolved, output_type="np"))
    else:
        pictures = as_pictures(image, 1)
        images = fit_images(pictures, resolved, pipeline.components)
        encoded = pipeline.engine.encode_text([prompt], resolved, images=pictures)
    return VideoStream(images[0], _windows(pipeline, encoded, images, resolved, total_frames))


def _from_text_alone(
    pipeline: TextToVideoPipeline, prompt: str, options: SamplingOptions, total: int, image: ImageLike | None
) -> VideoStream:
    """One window of a network that knows of no earlier frames."""
    if image is not None or total > options.num_frames:
        raise UserError(
            f"these weights make clips of {options.num_frames} frames from text alone; "
            "to animate an image or for a longer video take image-to-video weights"
        )
    frames = pipeline.direct([prompt], dataclasses.replace(options, output_type="np")).frames[0, :total]
    return VideoStream(frames[0], iter([frames]))


def overlap_frames(options: SamplingOptions, factor: int) -> int:
    """The number of pixel frames that two neighbouring windows share: factor (k - 1) + 1."""
    return factor * (options.overlap_latents - 1) + 1


def count_windows(total_frames: int, window: int, overlap: int) -> int:
    """How many windows of `window` frames, `overlap` of them shared, a video of `total_frames` takes."""
    return 1 + max(0, -(-(total_frames - window) // (window - overlap)))


def match_colors(frames: np.ndarray, reference: np.ndarray, strength: float) -> np.ndarray:
    """Moves the border's mean and standard deviation per channel toward those of `reference`'s border.

    Args:
      frames, reference: (b, t, y, x, 3) in [0, 1].
      strength: 0 changes nothing, 1 matches (the gain stays within `GAIN_LIMITS`).

    Returns:
      Frames in [0, 1].
    """
    mean, spread = _border_statistics(frames)
    wanted_mean, wanted_spread = _border_statistics(reference)
    gain = jnp.clip((wanted_spread + SPREAD_FLOOR) / (spread + SPREAD_FLOOR), *GAIN_LIMITS)
    matched = (frames - mean) * gain + wanted_mean
    return jnp.clip(frames + strength * (matched - frames), 0, 1)


def _windows(
    pipeline: TextToVideoPipeline, prompts: Prompts, images: np.ndarray, options: SamplingOptions, total: int
) -> Iterator[np.ndarray]:
    """Yields new frames (n, y, x, 3), `total` in all."""
    engine = pipeline.engine
    overlap = overlap_frames(options, pipeline.components.vae.network.config.temporal_factor)
    dropped = pipeline.components.sampling.dropped_frames
    window_frames, seen_before = options.num_frames - dropped, max(overlap - dropped, 0)
    cond, negative = engine.condition(prompts, options, images=images)
    reference = None
    emitted = 0
    for window in range(count_windows(total, window_frames, seen_before)):
        history = options.history_noise if window else 0.0
        latents = engine.denoise(cond, negative, options, purpose=FIRST_WINDOW + window, history_noise=history)
        frames = engine.decode(latents)
        if options.match_colors:
            reference = frames if reference is None else reference
            frames = np.asarray(match_colors(frames, reference, options.match_colors))
        new = frames[0, seen_before if window else 0 :][: total - emitted]
        emitted += len(new)
        yield new
        if emitted < total:
            known, mask = engine.encode_known(frames[:, -overlap:], options, label="video")
            cond = dataclasses.replace(cond, known=known, mask=mask)


def _border_statistics(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over the border of all frames, (b, 1, 1, 1, 3) each."""
    height, width = frames.shape[2:4]
    rows, columns = max(height // BORDER, 1), max(width // BORDER, 1)
    inside = np.zeros((height, width), bool)
    inside[rows:-rows, columns:-columns] = True
    border = frames[:, :, ~inside]
    return tuple(f(border, axis=(1, 2))[:, None, None, None] for f in (jnp.mean, jnp.std))
