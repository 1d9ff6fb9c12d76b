"""Published networks that judge frames and clips, read from a folder when one is given; nothing is downloaded.

    CLIP       a repository with both towers, such as openai/clip-vit-large-patch14: config.json ("model_type": "clip"),
               model.safetensors, the tokenizer's files, preprocessor_config.json
    VideoMAE   a fine-tuned one, such as MCG-NJU/videomae-base-finetuned-kinetics: config.json ("videomae"),
               model.safetensors, preprocessor_config.json

Measures of a caption's clip, 100 times a cosine, means over frames:

    clip_text         of the caption and a frame (Radford 2021, arXiv 2103.00020)
    clip_first        of the first frame and a later one: what image to video keeps
    clip_neighbours   of a frame and the next one
    clip_perceptual   to the true clip, frame by frame: LPIPS's form (Zhang 2018, arXiv 1801.03924) on the patch states
                      of CLIP's last layer, all channels alike (`features.perceptual`)

and of all clips against as many true ones, Fréchet distances as FID and FVD are (no shrinking), whose numbers are not
those of Inception or I3D: clip_frechet of the frames' CLIP embeddings (Kynkäänniemi 2022, arXiv 2203.06026),
video_frechet of the clips' VideoMAE features (Ge 2024, arXiv 2404.12391).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from magic141_jax import weights
from magic141_jax.convert import clip as convert_clip
from magic141_jax.convert import videomae as convert_videomae
from magic141_jax.convert.engine import to_ours
from magic141_jax.convert.tensors import open_tensors
from magic141_jax.errors import UserError
from magic141_jax.evaluation import features
from magic141_jax.models.clip import Clip
from magic141_jax.models.clip_inputs import END, ImageProcessor, read_clip_tokenizer, read_image_processor
from magic141_jax.models.network import Network
from magic141_jax.models.videomae import VideoMAE

BATCH = 16


@dataclasses.dataclass(frozen=True)
class ClipJudge:
    """CLIP, as frames and texts go in.

    Attributes:
      embed_texts: token ids (b, s) -> (b, p).
      embed_frames: normalised pictures (b, y, x, 3) -> (b, p) and patch states (b, l, d).
      tokenizer: pads to the tower's positions.
      processor: brings frames to the tower's size.
    """

    embed_texts: Callable[[np.ndarray], Any]
    embed_frames: Callable[[np.ndarray], Any]
    tokenizer: Tokenizer
    processor: ImageProcessor

    @classmethod
    def from_folder(cls, folder: Path) -> ClipJudge:
        """Reads a published folder; raises `UserError` where it is incomplete, damaged or of another model."""
        config = convert_clip.dual_config_to_ours(_config(folder, "clip"))
        network = Network.create(Clip, config)
        params = to_ours(open_tensors(folder), convert_clip.dual_table(config), network.abstract_params)
        tokenizer, length = read_clip_tokenizer(folder), config.text.positions
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(END), pad_token=END)
        processor = _processor(folder, config.vision.image)
        text = jax.jit(lambda params, ids: network(params, ids, method="embed_text"))
        frames = jax.jit(lambda params, images: network(params, images, method="embed_images"))
        params = jax.device_put(params)
        return cls(lambda ids: text(params, ids), lambda images: frames(params, images), tokenizer, processor)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> embeddings (n, p)."""
        ids = np.array([e.ids for e in self.tokenizer.encode_batch(list(captions))], np.int32)
        return _in_batches(self.embed_texts, ids)

    def frames(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clips (n, t, y, x, 3) in [0, 1] -> embeddings (n, t, p) and patch states (n, t, l, d)."""
        flat = clips.reshape(-1, *clips.shape[2:])
        found = _in_batches(self.embed_frames, flat, self.processor)
        return tuple(values.reshape(*clips.shape[:2], *values.shape[1:]) for values in found)

    def measure(
        self, clips: np.ndarray, captions: Sequence[str], true: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """The measures of the module docstring: by caption (n,), and of all clips together.

        Args:
          clips: (n, t, y, x, 3) in [0, 1].
          captions: n.
          true: clips to hold the perceptual distance and the Fréchet distance against, if any.
        """
        embeddings, states = self.frames(clips)
        texts = self.texts(captions)[:, None]
        each = {
            "clip_text": 100 * cosine(embeddings, texts).mean(1),
            "clip_first": 100 * cosine(embeddings[:, 1:], embeddings[:, :1]).mean(1),
            "clip_neighbours": 100 * cosine(embeddings[:, 1:], embeddings[:, :-1]).mean(1),
        }
        if true is None:
            return each, {}
        true_embeddings, true_states = self.frames(true)
        each["clip_perceptual"] = features.perceptual(states, true_states)
        width = embeddings.shape[-1]
        distance = features.frechet(embeddings.reshape(-1, width), true_embeddings.reshape(-1, width), shrink=False)
        return each, {"clip_frechet": distance}


@dataclasses.dataclass(frozen=True)
class VideoJudge:
    """VideoMAE: normalised clips (b, frames, y, x, 3) -> features (b, d); how frames are brought to its size."""

    embed: Callable[[np.ndarray], Any]
    processor: ImageProcessor
    num_frames: int

    @classmethod
    def from_folder(cls, folder: Path) -> VideoJudge:
        """Reads a published folder; raises `UserError` where it is incomplete, damaged or of another model."""
        config = convert_videomae.config_to_ours(_config(folder, "videomae"))
        network = Network.create(VideoMAE, config)
        tensors = convert_videomae.complete(open_tensors(folder), config)
        params = jax.device_put(to_ours(tensors, convert_videomae.table(config), network.abstract_params))
        processor = _processor(folder, config.image, resample=Image.Resampling.BILINEAR)
        apply = jax.jit(network.__call__)
        return cls(lambda clips: apply(params, clips), processor, config.frames)

    def clips(self, clips: np.ndarray) -> np.ndarray:
        """Clips (n, t, y, x, 3) in [0, 1] -> features (n, d); of other lengths, frames at equal distances are taken."""
        which = np.round(np.linspace(0, clips.shape[1] - 1, self.num_frames)).astype(int)

        def prepare(batch: np.ndarray) -> np.ndarray:
            flat = self.processor(list(batch.reshape(-1, *batch.shape[2:])))
            return flat.reshape(*batch.shape[:2], *flat.shape[1:])

        return _in_batches(self.embed, clips[:, which], prepare)

    def measure(self, clips: np.ndarray, true: np.ndarray) -> dict[str, float]:
        """The Fréchet distance of clips to true ones."""
        return {"video_frechet": features.frechet(self.clips(clips), self.clips(true), shrink=False)}


@dataclasses.dataclass(frozen=True)
class Networks:
    """The published networks that are given; None for those that aren't."""

    clip: ClipJudge | None = None
    video: VideoJudge | None = None

    @classmethod
    def from_folders(cls, clip: Path | None, video: Path | None) -> Networks:
        """Reads what is given; raises `UserError` as the two readers do."""
        return cls(
            None if clip is None else ClipJudge.from_folder(clip),
            None if video is None else VideoJudge.from_folder(video),
        )

    def measure(
        self, clips: np.ndarray, captions: Sequence[str], true: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """All measures: by caption, and of all clips together."""
        each, whole = ({}, {}) if self.clip is None else self.clip.measure(clips, captions, true)
        return each, whole if self.video is None else whole | self.video.measure(clips, true)


def identity(folders: Mapping[str, Path | None]) -> dict[str, str]:
    """Digests of the given folders' tensors, under their names: what a record must share to be gone on with."""
    return {name: weights.digest(folder) for name, folder in folders.items() if folder is not None}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of (..., d) and (..., d), broadcast."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def _config(folder: Path, kind: str) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give one with a published {kind} (config.json, model.safetensors)")
    config = weights.read_json(folder / "config.json")
    if config.get("model_type") != kind:
        raise UserError(f"{folder} holds a {config.get('model_type')!r}; here a {kind!r} is needed")
    return config


def _processor(folder: Path, side: int, **options: Any) -> ImageProcessor:
    """What brings pictures to the side that the network of a folder takes."""
    processor = read_image_processor(folder / "preprocessor_config.json", **options)
    if processor.crop != side:
        raise UserError(f"{folder} cuts pictures to {processor.crop}, its network takes {side}")
    return processor


def _in_batches(
    function: Callable[[np.ndarray], Any],
    items: np.ndarray,
    prepare: Callable[[Any], np.ndarray] = lambda batch: batch,
) -> Any:
    """Applies `function` to prepared batches of one size, the last filled up by repetition; joins the results."""
    size, made = min(BATCH, len(items)), []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        made.append(jax.tree.map(np.asarray, function(prepare(batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(items)], *made)
