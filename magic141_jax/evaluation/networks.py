"""Published networks that judge frames and clips, read from a folder when one is given; nothing is downloaded.

    CLIP       a repository with both towers, such as openai/clip-vit-large-patch14: config.json ("model_type": "clip"),
               model.safetensors, the tokenizer's files, preprocessor_config.json
    VideoMAE   a fine-tuned one, such as MCG-NJU/videomae-base-finetuned-kinetics: config.json ("videomae"),
               model.safetensors, preprocessor_config.json
    I3D        over RGB in pytorch-i3d's names: its rgb_imagenet.pt, written anew as safetensors

Measures of a caption's clip, 100 times a cosine, means over frames:

    clip_text         of the caption and a frame (Radford 2021, arXiv 2103.00020)
    clip_first        of the first frame and a later one: what image to video keeps
    clip_neighbours   of a frame and the next one
    clip_perceptual   to the true clip, frame by frame: LPIPS's form (Zhang 2018, arXiv 1801.03924) on the patch states
                      of CLIP's last layer, all channels alike (`features.perceptual`)

and of all clips against as many true ones, Fréchet distances as FID and FVD are (no shrinking): clip_frechet of the
frames' CLIP embeddings (Kynkäänniemi 2022, arXiv 2203.06026), video_frechet of the clips' VideoMAE features (Ge 2024,
arXiv 2404.12391), i3d_frechet of I3D's logits of clips of 224 x 224, which is FVD (Unterthiner 2018, arXiv 1812.01717).
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
from magic141_jax.convert import i3d as convert_i3d
from magic141_jax.convert import videomae as convert_videomae
from magic141_jax.convert.engine import to_ours
from magic141_jax.convert.tensors import open_tensors
from magic141_jax.errors import UserError
from magic141_jax.evaluation import features
from magic141_jax.models.clip import Clip
from magic141_jax.models.clip_inputs import END, ImageProcessor, read_clip_tokenizer, read_image_processor
from magic141_jax.models.i3d import I3D
from magic141_jax.models.network import Network
from magic141_jax.models.videomae import VideoMAE
from magic141_jax.pytree import Params

BATCH = 16
NAMES = ("clip", "videomae", "i3d")
I3D_SIDE, I3D_BATCH = 224, 4


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
    """A network that sees clips.

    Attributes:
      name: of its Fréchet distance.
      clips: clips (n, t, y, x, 3) in [0, 1] -> features (n, d).
    """

    name: str
    clips: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def videomae(cls, folder: Path) -> VideoJudge:
        """Reads a published VideoMAE; raises `UserError` where it is incomplete, damaged or of another model.

        Of clips of other lengths than its own, frames at equal distances are taken.
        """
        config = convert_videomae.config_to_ours(_config(folder, "videomae"))
        network = Network.create(VideoMAE, config)
        tensors = convert_videomae.complete(open_tensors(folder), config)
        params = jax.device_put(to_ours(tensors, convert_videomae.table(config), network.abstract_params))
        processor = _processor(folder, config.image, resample=Image.Resampling.BILINEAR)
        apply = jax.jit(network.__call__)

        def prepare(batch: np.ndarray) -> np.ndarray:
            flat = processor(list(batch.reshape(-1, *batch.shape[2:])))
            return flat.reshape(*batch.shape[:2], *flat.shape[1:])

        def clips(clips: np.ndarray) -> np.ndarray:
            which = np.round(np.linspace(0, clips.shape[1] - 1, config.frames)).astype(int)
            return _in_batches(lambda batch: apply(params, batch), clips[:, which], prepare)

        return cls("video_frechet", clips)

    @classmethod
    def i3d(cls, path: Path) -> VideoJudge:
        """Reads an I3D's safetensors, a file or the folder of one; raises `UserError` where it isn't one."""
        tensors = open_tensors(path)
        network = Network.create(I3D, convert_i3d.config_of(tensors))
        params = jax.device_put(to_ours(tensors, convert_i3d.TABLE, network.abstract_params))

        @jax.jit
        def apply(params: Params, clips: jax.Array) -> jax.Array:
            shape = (*clips.shape[:2], I3D_SIDE, I3D_SIDE, 3)
            return network(params, 2 * jax.image.resize(clips, shape, "linear", antialias=False) - 1)

        def clips(clips: np.ndarray) -> np.ndarray:
            return _in_batches(lambda batch: apply(params, batch), clips.astype(np.float32), size=I3D_BATCH)

        return cls("i3d_frechet", clips)

    def measure(self, clips: np.ndarray, true: np.ndarray) -> dict[str, float]:
        """The Fréchet distance of clips to true ones."""
        return {self.name: features.frechet(self.clips(clips), self.clips(true), shrink=False)}


@dataclasses.dataclass(frozen=True)
class Networks:
    """The published networks that are given: one that sees frames, if any, and those that see clips."""

    clip: ClipJudge | None = None
    videos: tuple[VideoJudge, ...] = ()

    @classmethod
    def from_paths(cls, paths: Mapping[str, Path | None]) -> Networks:
        """Reads what is given under a name of `NAMES`; raises `UserError` as the readers do."""
        clip = paths.get("clip")
        readers = {"videomae": VideoJudge.videomae, "i3d": VideoJudge.i3d}
        videos = tuple(read(path) for name, read in readers.items() if (path := paths.get(name)) is not None)
        return cls(None if clip is None else ClipJudge.from_folder(clip), videos)

    def measure(
        self, clips: np.ndarray, captions: Sequence[str], true: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """All measures: by caption, and of all clips together."""
        each, whole = ({}, {}) if self.clip is None else self.clip.measure(clips, captions, true)
        for judge in self.videos:
            whole |= judge.measure(clips, true)
        return each, whole


def identity(paths: Mapping[str, Path | None]) -> dict[str, str]:
    """Digests of the given networks' tensors, under their names: what a record must share to be gone on with."""
    return {name: weights.digest(path) for name, path in paths.items() if path is not None}


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
    *,
    size: int = BATCH,
) -> Any:
    """Applies `function` to prepared batches of one size, the last filled up by repetition; joins the results."""
    size, made = min(size, len(items)), []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        made.append(jax.tree.map(np.asarray, function(prepare(batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(items)], *made)
