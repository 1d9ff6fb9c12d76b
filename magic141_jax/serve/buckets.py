"""What a server makes: buckets of fixed shapes, each compiled before the first job, and the limits of a job.

A bucket is a size, a number of steps and a window. All windows of a video run one program, so a duration needs none of
its own: a video takes the shortest window that holds it, else as many of the longest as it needs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.pipelines.components import Components
from magic141_jax.pipelines.long_video import count_windows, make_plan
from magic141_jax.pipelines.options import resolve


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is refused: longer videos, further jobs, larger uploads.

    Attributes:
      seconds: of one video.
      queue: jobs that wait.
      upload_bytes, upload_pixels: of a first frame.
      keep_hours: how long a finished job and its video are kept.
    """

    seconds: float = 60.0
    queue: int = 64
    upload_bytes: int = 10 * 2**20
    upload_pixels: int = 4096 * 4096
    keep_hours: float = 24.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Shapes that programs are compiled for.

    Attributes:
      height, width: of what the networks make, in pixels.
      steps: of the sampler.
      num_frames: the pipelines' option.
      window: frames that a window shows.
      upscale: how many times larger the file is.
    """

    height: int
    width: int
    steps: int
    num_frames: int
    window: int
    upscale: int

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT of the file."""
        return f"{self.width * self.upscale}x{self.height * self.upscale}"

    @property
    def options(self) -> dict[str, Any]:
        """The pipelines' options."""
        shape = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
        return {**shape, "num_inference_steps": self.steps}


@dataclasses.dataclass(frozen=True)
class Catalog:
    """All that a server makes.

    Attributes:
      model: the name of the weights.
      fps: frames a second.
      buckets: the first has the size and the steps that a job gets unless it asks for others.
      limits: `seconds` is at most a window where the weights can't go on from one.
      from_image: "never", "may" or "must": whether a job has a first frame.
    """

    model: str
    fps: float
    buckets: tuple[Bucket, ...]
    limits: Limits
    from_image: str

    @property
    def sizes(self) -> list[str]:
        """All sizes, the default first."""
        return list(dict.fromkeys(bucket.size for bucket in self.buckets))

    @property
    def steps(self) -> list[int]:
        """All numbers of steps, the default first."""
        return list(dict.fromkeys(bucket.steps for bucket in self.buckets))

    @property
    def default_seconds(self) -> float:
        """One window of the first bucket, or less where that is too long."""
        return min(self.buckets[0].window / self.fps, self.limits.seconds)

    def frames(self, seconds: float) -> int:
        """Frames of a video of that length, at least one."""
        return max(1, round(seconds * self.fps))

    def pick(self, size: str, steps: int, seconds: float) -> Bucket | None:
        """The bucket that makes such a video; None where there is none of that size and number of steps."""
        fitting = [bucket for bucket in self.buckets if (bucket.size, bucket.steps) == (size, steps)]
        fitting.sort(key=lambda bucket: bucket.window)
        enough = (bucket for bucket in fitting if bucket.window >= self.frames(seconds))
        return next(enough, fitting[-1] if fitting else None)


def make_catalog(
    components: Components,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    steps: Sequence[int] = (),
    windows: Sequence[int] = (),
    upscale: int | None = None,
    limits: Limits,
) -> Catalog:
    """The catalog of every size (width, height) with every number of steps and every window, in frames.

    What is left empty is what the weights were made for; `upscale` as for `media.upscale_factor`.

    Raises:
      UserError: the networks can't make one of these, or two of them would be the same size in the file.
    """
    sampling = components.sampling
    known = components.transformer.network.config.known
    buckets = []
    for (width, height), count, frames in itertools.product(
        sizes or [(sampling.width, sampling.height)],
        steps or [sampling.num_inference_steps],
        windows or [sampling.num_frames],
    ):
        asked = {"width": width, "height": height, "num_inference_steps": count, "num_frames": frames}
        plan = make_plan(resolve(asked, components), components)
        factor = media.upscale_factor(upscale, height, width)
        buckets.append(Bucket(height, width, count, frames, plan.length, factor))
        if known != "none":
            count_windows(plan.length + 1, plan.length, plan.shared)
    keys = [(bucket.size, bucket.steps, bucket.window) for bucket in buckets]
    if len(set(keys)) < len(keys):
        raise UserError(f"two buckets would be alike in the file: {', '.join(sorted({key[0] for key in keys}))}")
    if known == "none":
        longest = max(bucket.window for bucket in buckets) / sampling.fps
        limits = dataclasses.replace(limits, seconds=min(limits.seconds, longest))
    from_image = "never" if known == "none" else "must" if components.text_encoder.image_tokens else "may"
    return Catalog(components.folder.name, sampling.fps, tuple(buckets), limits, from_image)
