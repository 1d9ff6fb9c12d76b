"""Pictures and videos in and out of files: reading a user's image, streaming frames into mp4, gif, webp or png.

Frames are float arrays (t, y, x, 3) in [0, 1]. A file is written under a temporary name beside its target and renamed
when it is complete (`staged`), and encoded by a background thread behind a bounded queue (`BackgroundWriter`), so
that the next frames can be computed meanwhile and memory does not grow with an mp4's duration. Every format carries
the metadata, a JSON object: mp4 and gif in their comment, webp in its EXIF description, png in a text chunk.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError

from magic141_jax.errors import UserError, nearest

MAX_PIXELS = 100_000_000  # of an input image: a larger one is a mistake or a decompression bomb
MAX_ASPECT = 32  # longer side over shorter side of an input image
MAX_HELD_FRAMES = 2000  # gif and webp are assembled in memory
MAX_UPSCALED_SIDE = 8192
WATCHABLE_SIDE = 256
EXIF_DESCRIPTION = 0x010E
BT709 = 1  # FFmpeg's number for the matrix, the primaries and the transfer curve
ImageLike = str | Path | Image.Image | np.ndarray
Fit = Literal["cover", "stretch"]
_FITS = {"cover": ImageOps.fit, "stretch": Image.Image.resize}


class Sink(Protocol):
    """An open file that takes one frame at a time."""

    def add(self, frame: np.ndarray) -> None:
        """Appends one uint8 frame (y, x, 3)."""

    def close(self) -> None:
        """Completes the file."""


class Mp4Sink:
    """H.264 in mp4, encoded as frames arrive. Sides must be even (4:2:0 chroma)."""

    def __init__(self, path: Path, fps: float, metadata: Mapping[str, Any]) -> None:
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["title"] = str(metadata.get("prompt", ""))
        self._container.metadata["comment"] = json.dumps(metadata)
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        # By default the encoder takes as many threads as there are cores, and its frames depend on that.
        self._stream.options = {"crf": "12", "preset": "medium", "threads": "4"}
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        self._started = False

    def add(self, frame: np.ndarray) -> None:
        """Encodes one uint8 frame (y, x, 3)."""
        if not self._started:
            self._stream.height, self._stream.width = frame.shape[:2]
            self._started = True
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
        self._container.mux(self._stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))

    def close(self) -> None:
        """Flushes the encoder and writes the index."""
        try:
            if self._started:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()


class PillowSink:
    """gif, webp (looping animations, held in memory until closed) or png (the first frame only)."""

    def __init__(self, path: Path, fps: float, metadata: Mapping[str, Any]) -> None:
        self._path, self._fps, self._metadata = path, fps, metadata
        self._frames: list[Image.Image] = []

    def add(self, frame: np.ndarray) -> None:
        """Keeps one uint8 frame (y, x, 3)."""
        if self._path.suffix.lower() != ".png" or not self._frames:
            self._frames.append(Image.fromarray(frame))

    def close(self) -> None:
        """Writes the whole file."""
        if not self._frames:
            return
        first, *rest = self._frames
        animation = {"save_all": True, "append_images": rest, "duration": round(1000 / self._fps), "loop": 0}
        text = json.dumps(self._metadata)
        match self._path.suffix.lower():
            case ".gif":
                first.save(self._path, format="GIF", comment=text.encode(), **animation)
            case ".webp":
                exif = Image.Exif()
                exif[EXIF_DESCRIPTION] = text
                first.save(self._path, format="WEBP", exif=exif.tobytes(), quality=90, **animation)
            case _:
                chunks = PngImagePlugin.PngInfo()
                chunks.add_itxt("comment", text)
                first.save(self._path, format="PNG", pnginfo=chunks)


FORMATS: dict[str, type[Sink]] = {".mp4": Mp4Sink, ".gif": PillowSink, ".webp": PillowSink, ".png": PillowSink}


class BackgroundWriter:
    """A context manager that writes frames to a file in its own thread.

    `write` blocks only while the queue is full. What the thread raised (a full disk) is raised again by the next
    `write` or on leaving the context; after an exception inside the context the file is abandoned unfinished.
    """

    def __init__(self, path: Path, fps: float, metadata: Mapping[str, Any], *, upscale: int = 1) -> None:
        self._sink = FORMATS[path.suffix.lower()](path, fps, metadata)  # pyright: ignore[reportCallIssue]
        self._upscale = upscale
        self._queue: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (t, y, x, 3) in [0, 1]."""
        self._queue.put(frames)
        if self._error:
            raise self._error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is not None or self._error is not None:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._sink.close()
            if error is None and self._error is not None:
                raise self._error
            return
        self._sink.close()

    def _work(self) -> None:
        while (frames := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep draining, so that `write` can't block for ever
            try:
                for frame in frames:
                    self._sink.add(enlarge(frame, self._upscale))
            except BaseException as error:
                self._error = error


@contextlib.contextmanager
def staged(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Gives a temporary name beside each target; renames all of them at the end, or removes them on any failure."""
    temporary = tuple(t.with_name(f".{t.stem}-{secrets.token_hex(4)}{t.suffix}") for t in targets)
    try:
        yield temporary
        for source, target in zip(temporary, targets, strict=True):
            source.replace(target)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    *,
    metadata: Mapping[str, Any] | None = None,
    upscale: int = 1,
) -> Path:
    """Writes one video, whole or not at all.

    Args:
      path: mp4, gif, webp or png (the first frame alone), by extension.
      frames: (t, y, x, 3) in [0, 1], or parts of such a clip as they come, as `long_video.stream_video` gives them.
      fps: frames a second.
      metadata: a JSON-ready object to keep in the file, such as prompt and seed.
      upscale: enlarges what is written (Lanczos).

    Returns:
      The path.

    Raises:
      UserError: an unknown extension, no folder, or more frames than the format holds.
    """
    path, parts = Path(path), [frames] if isinstance(frames, np.ndarray) else frames
    check_output(path, len(frames) if isinstance(frames, np.ndarray) else 1)
    with staged(path) as (temporary,), BackgroundWriter(temporary, fps, metadata or {}, upscale=upscale) as writer:
        for part in parts:
            writer.write(part)
    return path


def write_image(path: Path, image: np.ndarray, metadata: Mapping[str, Any], *, upscale: int = 1) -> None:
    """Writes one image (y, x, 3) in [0, 1] as png, with its metadata."""
    sink = PillowSink(path, 1.0, metadata)
    sink.add(enlarge(image, upscale))
    sink.close()


def check_output(path: Path, frames: int) -> None:
    """Raises `UserError` unless `path` can be written: known extension, existing folder, a length it can hold."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"can't write {path.name!r}: unknown extension.{nearest(path.suffix, FORMATS)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file name")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"can't write into the folder {path.parent}; choose another --output")
    if path.suffix.lower() in (".gif", ".webp") and frames > MAX_HELD_FRAMES:
        raise UserError(f"{path.suffix} holds at most {MAX_HELD_FRAMES} frames here, not {frames}; write an .mp4")


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Values in [0, 1] -> bytes, rounded."""
    return np.round(np.clip(np.asarray(frames, np.float32), 0, 1) * 255).astype(np.uint8)


def to_pil(image: np.ndarray) -> Image.Image:
    """An image (y, x, 3) in [0, 1] -> PIL."""
    return Image.fromarray(to_uint8(image))


def enlarge(frame: np.ndarray, factor: int) -> np.ndarray:
    """A frame (y, x, 3) in [0, 1] -> bytes, `factor` times as large (Lanczos)."""
    if factor == 1:
        return to_uint8(frame)
    height, width = frame.shape[:2]
    return np.asarray(to_pil(frame).resize((width * factor, height * factor), Image.Resampling.LANCZOS))


def upscale_factor(upscale: int | None, height: int, width: int) -> int:
    """The factor asked for, or one that makes small frames watchable; raises `UserError` unless its size is sane."""
    most = MAX_UPSCALED_SIDE // max(height, width)
    if upscale is None:
        return max(1, WATCHABLE_SIDE // max(height, width))
    if not 1 <= upscale <= most:
        raise UserError(f"--upscale is {upscale}; for {width}x{height} it must be from 1 to {most}")
    return upscale


def read_image(image: ImageLike) -> np.ndarray:
    """A path, PIL image or array (uint8, or float in [0, 1]) of any mode -> (y, x, 3) float32 in [0, 1].

    Transparency is laid on white, EXIF rotation applied, 16-bit and gray images converted.

    Raises:
      UserError: missing or unreadable file, absurd size, an array of another shape or with values out of range.
    """
    if isinstance(image, np.ndarray):
        return _check_array(image)
    if isinstance(image, Image.Image):
        return _from_pil(image, "the image")
    path = Path(image)
    if not path.is_file():
        raise UserError(f"no image file {path}")
    try:
        with Image.open(path) as opened:
            return _from_pil(opened, str(path))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels; give a smaller image") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"can't read the image {path}: {error}; give a png, jpg or webp") from None


def fit_image(image: np.ndarray, height: int, width: int, *, fit: Fit = "cover") -> np.ndarray:
    """Resizes (y, x, 3) to height x width; an image of that size is returned as it is.

    "cover" keeps the proportions and crops the centre, "stretch" does neither.
    """
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(_FITS[fit](to_pil(image), (width, height), Image.Resampling.LANCZOS), np.float32) / 255


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `BackgroundWriter` or `write_image` put into a file; raises `UserError` where there is none."""
    try:
        if path.suffix.lower() == ".mp4":
            with av.open(str(path)) as container:
                text = container.metadata["comment"]
        else:
            with Image.open(path) as picture:
                exif = picture.getexif().get(EXIF_DESCRIPTION)
                text = exif or picture.info["comment"]
        return json.loads(text)
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} has no metadata of ours: {error}") from None


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The decoded frames, uint8 (y, x, 3), of a file of one of `FORMATS`.

    Raises:
      UserError: it can't be read to its end.
    """
    try:
        if path.suffix.lower() == ".mp4":
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
        else:
            with Image.open(path) as picture:
                for frame in ImageSequence.Iterator(picture):
                    yield np.asarray(frame.convert("RGB"))
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"can't read {path}: {error}; it is damaged, or not what its name says") from None


def _from_pil(picture: Image.Image, name: str) -> np.ndarray:
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{name} is {width}x{height}: at most {MAX_PIXELS:,} pixels and {MAX_ASPECT}:1 are accepted")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float32)
        span = 65535 if values.max() > 255 else 255
        return np.repeat(np.clip(values / span, 0, 1)[..., None], 3, axis=-1)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"), np.float32) / 255


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise UserError(f"an image array is (y, x, 3), got {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255
    if not np.issubdtype(image.dtype, np.floating) or not np.all((image >= 0) & (image <= 1)):
        raise UserError(f"an image array is uint8, or float in [0, 1]; got {image.dtype} in other units")
    return image.astype(np.float32)
