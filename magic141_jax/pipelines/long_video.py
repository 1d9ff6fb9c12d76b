"""Videos of any length by a sliding window, streamed (Magic 1-For-1's test-time sliding window, arXiv 2502.07701).

    window 0   known: the image, 1 latent frame                     emits t frames
    window w   known: k latent frames, the last 4(k-1)+1 pixel      emits the t - (4(k-1)+1) frames that are new
               frames of window w - 1, encoded anew

(less what is dropped from the start of every window where the weights ask for it, `SamplingSettings.dropped_frames`).

The known latents of a window are encoded from pixels, not carried over: in a causal VAE the first latent frame
stands for one pixel frame and every other for four, so a latent from the middle of a clip is not a valid first one.
The first image's tokens stay before the text of every window, as an anchor against drift; a little noise on what the
network sees of the known latents (history noise) hides the model's own errors from it. `SamplingOptions` has others:

    match_colors   the colours of every window's border are moved toward those of the first window
    blend          the shared frames fade from window w - 1 to window w, which then emits them
    carry          "latents": only the first known latent is encoded anew, the other k - 1 are the window's own;
                   "sink": the first is the first picture's in every window, and nothing is encoded anew. With weights
                   that have an adapter for it (`distill.continuation`) that is the default;
                   "picture": a window knows the first picture alone, at the place and the size at which the shared
                   frames begin with its subject (`pipelines.registration`)
    anchor         False: image tokens are those of the window's own first frame, as in image to video done repeatedly

All windows run one program (`pipelines.window`), and nothing but frames comes to the host. Window w + 1 is started
before the frames of window w are waited for, so that it is computed while they are written to a file. So two windows
are on the devices at most, and one window's frames on the host, however long the video. Where parameters come and go
(`LowMemory.offload`) a window is several programs, and none is started ahead.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.pipelines.components import Components
from magic141_jax.pipelines.engine import Engine, Prompts
from magic141_jax.pipelines.image_to_video import FIRST_WINDOW, as_pictures, fit_images
from magic141_jax.pipelines.media import ImageLike
from magic141_jax.pipelines.options import SamplingOptions, resolve
from magic141_jax.pipelines.schedule import Script, as_schedule, opening, warn_beyond
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pipelines.window import Plan


@dataclasses.dataclass(frozen=True)
class VideoStream:
    """A video in the making: its first image (y, x, 3), and an iterator of frames (n, y, x, 3), window by window."""

    image: np.ndarray
    frames: Iterator[np.ndarray]
    script: Script | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames

    def say(self, prompt: str) -> float | None:
        """Changes the prompt while the video is made, from the next window on that isn't started.

        One window is started ahead of the frames that have been handed out, so it takes one window to be seen. The
        prompt holds until the schedule's next one, if there is any. Of several processes all have to say it.

        Returns:
          The second of the video from which on it holds; None if all windows are started.

        Raises:
          UserError: the prompt is empty.
        """
        return None if self.script is None else self.script.say(prompt)


def stream_video(
    pipeline: TextToVideoPipeline,
    prompt: str | None = None,
    *,
    total_frames: int,
    image: ImageLike | None = None,
    schedule: Sequence[tuple[float, str]] = (),
    **options: Any,
) -> VideoStream:
    """Makes one video of `total_frames` frames; the image is made at once, windows when their frames are asked for.

    Args:
      pipeline: whose networks are used.
      prompt: one prompt; the first of the schedule unless given.
      total_frames: at least 1; a window more or less than needed is never computed, surplus frames are cut off.
      image: the first frame (see `ImageToVideoPipeline`); made from the prompt unless given.
      schedule: other prompts as (seconds, prompt), in order (`pipelines.schedule`).
      **options: the fields of `SamplingOptions`; `num_frames` is the window's length.

    Raises:
      UserError: no frames, several prompts, an unreadable image, a bad schedule, `latents` given; windows too short to
        go on from; an unknown or illegal option.
    """
    cues = as_schedule(schedule)
    prompt, script = opening(prompt, cues)
    if total_frames < 1:
        raise UserError(f"{total_frames} frames; a video has at least 1")
    components, engine = pipeline.components, pipeline.engine
    resolved = resolve(options, components)
    if resolved.latents is not None:
        raise UserError("a long video draws its own noise; leave out latents")
    warn_beyond(cues, total_frames / components.sampling.fps)
    if components.transformer.network.config.known == "none":
        return _from_text_alone(pipeline, prompt, resolved, total_frames, image)
    plan = make_plan(resolved, components)
    windows = count_windows(total_frames, plan.length, plan.shared)
    if image is None:
        encoded, images = pipeline.first_images([prompt], options, dataclasses.replace(resolved, output_type="np"))
        pictures = list(images)
    else:
        pictures = as_pictures(image, 1)
        images = fit_images(pictures, resolved, components)
        encoded = engine.encode_text([prompt], resolved, images=pictures)
    told = Script(
        script,
        [plan.start(window) / components.sampling.fps for window in range(windows)],
        lambda other: engine.encode_text([other], resolved, images=pictures),
        encoded={prompt: encoded},
    )

    started = _started(engine, encoded, images, resolved, plan=plan, script=told)
    ahead = _ahead(started, 2 if engine.runs_ahead else 1)

    def show(window: int, made: jax.Array) -> np.ndarray:
        return engine.fetch(made)[0, plan.shown(window, total_frames)]

    return VideoStream(images[0], map(show, range(windows), ahead), told)


def _from_text_alone(
    pipeline: TextToVideoPipeline, prompt: str, options: SamplingOptions, total: int, image: ImageLike | None
) -> VideoStream:
    """One window of a network that knows of no earlier frames."""
    if image is not None or total > options.num_frames:  # pyright: ignore[reportOperatorIssue]
        raise UserError(
            f"these weights make clips of {options.num_frames} frames from text alone; "
            "to animate an image or for a longer video take image-to-video weights"
        )
    frames = pipeline.direct([prompt], dataclasses.replace(options, output_type="np")).frames[0, :total]  # pyright: ignore[reportCallIssue]
    return VideoStream(frames[0], iter([frames]))


def overlap_frames(options: SamplingOptions, factor: int) -> int:
    """The number of pixel frames that two neighbouring windows share: factor (k - 1) + 1."""
    return factor * (options.overlap_latents - 1) + 1


def count_windows(total_frames: int, window: int, overlap: int) -> int:
    """How many windows of `window` frames, `overlap` of them shared, a video of `total_frames` takes.

    Raises:
      UserError: several, but a window has no frames that the one before has not.
    """
    if total_frames <= window:
        return 1
    if window <= overlap:
        raise UserError(f"windows of {window} frames share {overlap}, so the video can't go on; take more num_frames")
    return 1 + -(-(total_frames - window) // (window - overlap))


def make_plan(options: SamplingOptions, components: Components) -> Plan:
    """The windows of resolved options."""
    dropped = components.sampling.dropped_frames if options.num_frames > 1 else 0
    return Plan(
        length=options.num_frames - dropped,
        overlap=overlap_frames(options, components.vae.network.config.temporal_factor),
        dropped=dropped,
        carried=options.overlap_latents - 1 if options.carry in ("latents", "sink") else 0,
        blend=options.blend,
        anchor=options.anchor,
        match_colors=options.match_colors,
        sink=options.carry == "sink",
        follow=options.carry == "picture",
    )


def _started(
    engine: Engine, prompts: Prompts, images: np.ndarray, options: SamplingOptions, *, plan: Plan, script: Script
) -> Iterator[jax.Array]:
    """Starts a window whenever the next one's frames are asked for; these lie on the devices."""
    cond, _ = engine.condition(prompts, options, images=images)
    state = engine.begin(cond, images, options, purpose=FIRST_WINDOW, plan=plan)
    while script:
        made, state = engine.next_window(state, script.take(), options, plan=plan)
        yield made


def _ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items in order, each given out when `count` are there, itself among them, or none is left to come."""
    held: collections.deque[Any] = collections.deque()
    for item in items:
        held.append(item)
        del item
        if len(held) == count:
            yield held.popleft()
    while held:
        yield held.popleft()
