"""From a data config to the batches of a run: prepared sets, the emoji set composed on the fly, or random records.

A batch is {"image": {...}, "video": {...}} of stacked arrays, either part left out where its batch size is 0; which
arrays there are depends on the set's kind, see `magic141_jax.data.cache`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from magic141_jax import sharding
from magic141_jax.data import loader
from magic141_jax.data.cache import Cache
from magic141_jax.data.emoji import EmojiClips, EmojiConfig
from magic141_jax.data.sources import Source
from magic141_jax.errors import UserError
from magic141_jax.models.vae import latent_frames
from magic141_jax.train.checkpoint import Batches

EMOJI, RANDOM = "emoji", "random"
RANDOM_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how many a step takes.

    Attributes:
      path: a prepared folder (`python -m magic141_jax.data prepare`); "emoji" composes raw clips on the fly; "random"
        gives random latent records, to try a config's speed and memory without data; a folder of clips with captions,
        or a manifest, is prepared first, into the work folder.
      image_path: a prepared folder for the images; empty takes the images of `path`, or if it has none the first
        frames of its videos.
      image_batch, video_batch: samples a step over all devices; 0 leaves the part out.
      height, width, num_frames, fps: the size of clips that are composed, drawn or prepared here. Prepared ones have
        their own.
      text_length: tokens of random records.
      image_tokens: how many of these are rows of the first frame, in front. Prepared records have their own number.
      encoders: the weights folder whose VAE and text encoder prepare latents; empty prepares raw frames.
      threads: readers ahead of training; 0 reads when asked.
    """

    path: str = ""
    image_path: str = ""
    image_batch: int = 0
    video_batch: int = 16
    height: int = 64
    width: int = 64
    num_frames: int = 17
    fps: float = 8.0
    text_length: int = 16
    image_tokens: int = 0
    encoders: str = ""
    threads: int = 4

    def __post_init__(self) -> None:
        if min(self.image_batch, self.video_batch) < 0 or self.image_batch + self.video_batch == 0:
            raise ValueError("image_batch and video_batch must not be negative, and one of them positive")
        if not 0 <= self.image_tokens < self.text_length:
            raise ValueError(f"image_tokens are some of the {self.text_length} of text_length, got {self.image_tokens}")


@dataclasses.dataclass(frozen=True)
class RecordShape:
    """Sizes of random latent records that network and method decide: channels, text width, pooled width, windows."""

    channels: int = 16
    text_width: int = 384
    pooled_width: int = 384
    windows: int = 1


class RandomRecords:
    """A source of random latent records with the shapes of prepared ones; item i is a function of i."""

    def __init__(self, config: DataConfig, shape: RecordShape, *, frames: int):
        self._config, self._shape, self._frames = config, shape, shape.windows * latent_frames(frames)

    def __len__(self) -> int:
        return RANDOM_LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        config, shape = self._config, self._shape
        own = config.text_length - config.image_tokens
        size = (self._frames, config.height // 8, config.width // 8, shape.channels)
        return {
            "latents": rng.standard_normal(size, np.float32).astype(np.float16),
            "text": rng.standard_normal((config.text_length, shape.text_width), np.float32).astype(np.float16),
            "text_mask": np.arange(config.text_length) < config.image_tokens + rng.integers(1, own + 1),
            "pooled": rng.standard_normal(shape.pooled_width, np.float32).astype(np.float16),
            "anchor": rng.integers(0, 256, (config.height, config.width, 3), np.uint8),
        }


def make_batches(
    config: DataConfig, *, seed: int, shape: RecordShape | None = None, mesh: jax.sharding.Mesh | None = None
) -> Batches:
    """The endless batches of a run.

    Args:
      config: where from and how many.
      seed: decides the order.
      shape: of random records.
      mesh: only the rows that this process's devices hold are read; all rows without one.

    Raises:
      UserError: no data there, or not of the wanted kind.
    """
    streams = {}
    if config.image_batch:
        sources, transform = image_sources(config, shape)
        streams["image"] = loader.Stream(sources, config.image_batch, transform)
    if config.video_batch:
        streams["video"] = loader.Stream(video_sources(config, shape), config.video_batch)
    rows = {name: sharding.batch_rows(stream.batch_size, mesh) for name, stream in streams.items()} if mesh else None
    return loader.batches(streams, seed=seed, rows=rows, threads=config.threads)


def image_tokens(config: DataConfig) -> int:
    """How many leading text states of a latent record are rows of its first frame.

    Raises:
      UserError: images are to be trained on where there are such rows: their captions have read the picture.
    """
    count = _image_tokens(config, config.path)
    if config.image_batch and (count or _image_tokens(config, config.image_path or config.path)):
        raise UserError(
            "the text states were read with a picture, and images are made from text alone: "
            "set config.data.image_batch to 0"
        )
    return count


def require_windows(config: DataConfig, windows: int) -> None:
    """Raises `UserError` unless the clips of a prepared folder are chains of just so many windows."""
    held = windows if config.path == RANDOM else open_cache(config.path, "latent").metadata.get("windows", 1)
    if held != windows:
        raise UserError(
            f"{config.path} holds clips of {held} window{'s' * (held > 1)} and this method takes {windows}: "
            f"prepare it with --windows {windows}"
        )


def null_text(config: DataConfig, shape: RecordShape) -> dict[str, np.ndarray]:
    """The text states of the empty caption without rows of a picture: text (s, e), text_mask (s,), pooled (p,)."""
    if config.path == RANDOM:
        length = config.text_length - config.image_tokens
        states = np.zeros((length, shape.text_width), np.float32)
        return {"text": states, "text_mask": np.arange(length) < 1, "pooled": np.zeros(shape.pooled_width, np.float32)}
    cache = open_cache(config.path, "latent")
    null, count = cache.null_text(), cache.image_tokens
    return {**null, "text": null["text"][count:], "text_mask": null["text_mask"][count:]}


def open_cache(path: str, kind: str | None = None) -> Cache:
    """A prepared folder; `UserError` unless it is there and of the given kind ("raw" or "latent")."""
    if not path:
        raise UserError("no data: set --config.data.path to a prepared folder or to a folder of clips with captions")
    cache = Cache(path)
    if kind is not None and cache.kind != kind:
        fitting = "prepare it with --weights" if kind == "latent" else "prepare it without --weights"
        raise UserError(f"{path} holds {cache.kind} records and this method needs {kind} ones; {fitting}")
    return cache


def arrays(batch: Any) -> Any:
    """The array parts of a host batch: captions and tags can't go to a device."""
    return {
        part: {name: value for name, value in record.items() if isinstance(value, np.ndarray)}
        for part, record in batch.items()
    }


def _image_tokens(config: DataConfig, path: str) -> int:
    return config.image_tokens if path == RANDOM else open_cache(path, "latent").image_tokens


def video_sources(config: DataConfig, shape: RecordShape | None) -> tuple[Source, ...]:
    """The sources of videos, one a bucket."""
    if config.path == RANDOM:
        return (RandomRecords(config, shape or RecordShape(), frames=config.num_frames),)
    if config.path == EMOJI:
        return (_emoji(config, "video"),)
    return open_cache(config.path).sources("videos")


def image_sources(config: DataConfig, shape: RecordShape | None) -> tuple[tuple[Source, ...], Any]:
    """The sources of images, and the transform that makes an image of each sample."""
    path = config.image_path or config.path
    if path == RANDOM:
        return (RandomRecords(config, dataclasses.replace(shape or RecordShape(), windows=1), frames=1),), None
    if path == EMOJI:
        return (_emoji(config, "image"),), None
    cache = open_cache(path)
    if "images" in cache.groups:
        return cache.sources("images"), None
    return cache.sources("videos"), loader.first_frame


def _emoji(config: DataConfig, kind: Any) -> EmojiClips:
    if config.height != config.width:
        raise UserError(f"emoji clips are square, not {config.height}x{config.width}")
    return EmojiClips(EmojiConfig(kind=kind, size=config.height, num_frames=config.num_frames, length=1 << 20))
