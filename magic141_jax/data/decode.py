"""Files to uint8 frames: PyAV for video, Pillow for pictures and for animated GIF and WebP.

A clip is sampled at a steady rate: frame k is the one on screen at start + k / fps. Frames are cut to the nearest
bucket's aspect ratio around the centre and shrunk with an antialiasing filter. Transparency becomes white.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from magic141_jax.data.buckets import Bucket, longest_fit, nearest_size
from magic141_jax.errors import UserError

Clip = UInt8[np.ndarray, "t y x 3"]
Shown = tuple[float, float, Callable[[], Image.Image]]  # on screen from, to (seconds), and the picture

MIN_SIDE = 8
MAX_PIXELS = 1 << 26
MAX_ASPECT = 16
ANIMATED = (".gif", ".webp")
EPSILON = 1e-3


class BadClip(UserError):
    """A file that can't be used. `reason` is the same words for the same kind of fault, so that it can be counted."""

    def __init__(self, path: Path | str, reason: str, detail: str = ""):
        self.reason, self.detail = reason, " ".join(str(detail).split())
        super().__init__(f"{path}: {reason}" + (f" ({self.detail})" if self.detail else ""))


def open_image(path: Path) -> Image.Image:
    """Reads a picture of any mode as RGB, turned upright by its EXIF tag, transparency on white.

    Raises:
      BadClip: missing, unreadable, or of an absurd size.
    """
    try:
        with Image.open(path) as image:
            _check_size(path, image.height, image.width)
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise BadClip(path, "no such file") from None
    except BadClip:
        raise
    except UnidentifiedImageError:
        raise BadClip(path, "not a picture") from None
    except Image.DecompressionBombError:
        raise BadClip(path, "absurd size", f"more than {MAX_PIXELS} pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadClip(path, "unreadable picture", error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency is laid on white, 16-bit grey keeps its upper byte."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "y x 3"]:
    """Cuts the largest centred part of the wanted aspect ratio and resizes it (Lanczos, antialiased)."""
    scale = min(image.width / width, image.height / height)
    cut_x, cut_y = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (cut_x, cut_y, image.width - cut_x, image.height - cut_y)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


def read_image(path: Path, buckets: Sequence[Bucket]) -> Clip:
    """A picture file as a clip of one frame, cut to the nearest bucket's height and width. Raises `BadClip`."""
    image = open_image(path)
    return fit(image, *nearest_size(buckets, image.height, image.width))[None]


def read_video(path: Path, buckets: Sequence[Bucket], *, fps: float | None = None, start: float = 0.0) -> Clip:
    """A video file as a clip of the nearest bucket's shape.

    Args:
      path: mp4, mov, mkv, webm, avi, ... whatever FFmpeg reads; animated GIF and WebP.
      buckets: legal shapes; the nearest aspect ratio, then the longest length that the file can fill.
      fps: frames a second to sample at; None takes the file's own frames one by one.
      start: seconds from the beginning.

    Raises:
      BadClip: missing, unreadable or damaged, no frames, absurd size, or shorter than the shortest bucket.
    """
    path = Path(path)
    if not path.is_file():
        raise BadClip(path, "no such file")
    if path.stat().st_size == 0:
        raise BadClip(path, "empty file")
    stream = _animation(path) if path.suffix.lower() in ANIMATED else _video(path, start)
    size, frames = None, []
    for picture in _sampled(stream, fps, start, limit=max(bucket.num_frames for bucket in buckets)):
        size = size or nearest_size(buckets, picture.height, picture.width)
        frames.append(fit(picture, *size))
    if not frames:
        raise BadClip(path, "no video frames", f"after {start:g} s" if start else "")
    bucket = longest_fit(buckets, size, len(frames))
    if bucket is None:
        shortest = min(b.num_frames for b in buckets)
        rate = f" at {fps:g} frames a second" if fps else ""
        raise BadClip(path, "too short", f"{len(frames)} frames{rate}, {shortest} needed")
    return np.stack(frames[: bucket.num_frames])


def _check_size(path: Path, height: int, width: int) -> None:
    low, high = sorted((height, width))
    if low < MIN_SIDE or low * high > MAX_PIXELS or high > MAX_ASPECT * low:
        legal = f"sides from {MIN_SIDE}, {MAX_PIXELS >> 20} million pixels, aspect ratio {MAX_ASPECT}"
        raise BadClip(path, "absurd size", f"{width}x{height}; the limits are {legal}")


def _sampled(stream: Iterator[Shown], fps: float | None, start: float, *, limit: int) -> Iterator[Image.Image]:
    """The pictures on screen at start, start + 1/fps, ...: at most `limit`, fewer where the stream ends."""
    count, held, end = 0, None, 0.0
    for begin, until, render in stream:
        if fps is None:
            if begin >= start - EPSILON and count < limit:
                yield render()
                count += 1
        else:
            while held and count < limit and start + count / fps < begin - EPSILON:
                yield held()
                count += 1
        if count == limit:
            return
        held, end = render, until
    # The last frame stays until its end, and a sample that falls right on the end still gets it.
    while fps and held and count < limit and start + count / fps <= end + EPSILON:
        yield held()
        count += 1


def _animation(path: Path) -> Iterator[Shown]:
    """The frames of an animated GIF or WebP; a still one has a single frame."""
    try:
        with Image.open(path) as image:
            _check_size(path, image.height, image.width)
            begin = 0.0
            for frame in ImageSequence.Iterator(image):
                picture = to_rgb(frame.copy())
                until = begin + (frame.info.get("duration") or 100) / 1000
                yield begin, until, lambda picture=picture: picture
                begin = until
    except BadClip:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadClip(path, "unreadable video", error) from None


def _video(path: Path, start: float) -> Iterator[Shown]:
    """The frames of a video file in the order they are shown, decoded from the key frame before `start`."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadClip(path, "no video frames", "no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            _check_size(path, stream.height, stream.width)
            zero = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
            period = 1 / float(stream.average_rate or stream.guessed_rate or 25)
            if start > 1:
                container.seek(int((zero + start) * av.time_base))
            begin = -period
            for frame in container.decode(stream):
                begin = begin + period if frame.time is None else frame.time - zero
                yield begin, begin + period, lambda frame=frame: _upright(frame)
    except BadClip:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise BadClip(path, "unreadable video", getattr(error, "strerror", None) or error) from None


def _upright(frame: av.VideoFrame) -> Image.Image:
    """The frame as RGB, turned as the camera's display matrix says."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation % 360 else picture
