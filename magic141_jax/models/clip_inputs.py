"""What CLIP's towers are fed: the tokens of a prompt, and a picture cut and normalised; and a prompt's pooled vector.

Published repositories hold the tokenizer as vocab.json + merges.txt or as tokenizer.json, and say in
preprocessor_config.json how a picture is brought to the tower's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.resident import Held, require_match
from magic141_jax.models.text import in_batches, read_tokenizer, require_prompts, warn_if_truncated
from magic141_jax.shapes import Pooled

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: the marks, contractions, runs of letters, single digits, runs of anything else
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipPooler:
    """Prompts -> pooled vectors (b, p) of a `ClipText` network, from the raw prompts."""

    def __init__(self, network: Network, params: Held, tokenizer: Tokenizer) -> None:
        require_match(params, network.abstract_params, what="the CLIP text encoder")
        if tokenizer.get_vocab_size() > network.config.vocabulary or tokenizer.token_to_id(END) is None:
            raise UserError(
                f"the CLIP tokenizer has {tokenizer.get_vocab_size()} tokens and "
                f"{'no' if tokenizer.token_to_id(END) is None else 'an'} {END}, the text encoder knows "
                f"{network.config.vocabulary}; take both from the same repository"
            )
        self.length, self.width = network.config.positions, network.config.width
        tokenizer.enable_truncation(self.length)
        # what is after the end of the text is never seen, so that any token may fill it
        tokenizer.enable_padding(length=self.length, pad_id=tokenizer.token_to_id(END), pad_token=END)
        self.tokenizer = tokenizer
        self.params = params
        self._apply = jax.jit(lambda params, ids: network(params, ids)[1])

    def __call__(self, prompts: Sequence[str]) -> Pooled:
        """Encodes each prompt; warns when one is longer than CLIP reads."""
        require_prompts(prompts)
        encodings = self.tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            warn_if_truncated(prompt, encoding, f"CLIP's {self.length} tokens (which give the pooled vector)")
        return in_batches(self._apply, self.params, (np.array([e.ids for e in encodings], np.int32),))


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How a picture becomes the input of a CLIP vision tower: shorter side, square crop, mean and deviation of colours.

    The picture is resized (by the filter `resample`, in 8 bits) until its shorter side is `size`, its centre of
    `crop` x `crop` is kept, and (value / 255 - mean) / std is taken channel by channel.
    """

    size: int = 336
    crop: int = 336
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.size:
            raise UserError(f"a crop of {self.crop} from images of {self.size}: the crop must lie in 1..{self.size}")

    def __call__(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Pictures of any size, PIL images or arrays (y, x, 3) of uint8 or floats in [0, 1] -> (b, crop, crop, 3).

        Raises:
          UserError: an array of another shape or with values out of range.
        """
        cropped = np.stack([self._crop(_to_rgb(image)) for image in images]).astype(np.float32)
        return (cropped / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def _crop(self, picture: Image.Image) -> np.ndarray:
        short = min(picture.size)
        sides = tuple(int(self.size * side / short) for side in picture.size)
        left, top = ((side - self.crop) // 2 for side in sides)
        resized = np.asarray(picture.resize(sides, self.resample))
        return resized[top : top + self.crop, left : left + self.crop]


def read_clip_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a CLIP text tower, from tokenizer.json or from vocab.json + merges.txt.

    Raises:
      UserError: the files are missing or damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder / "tokenizer.json")
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} holds neither tokenizer.json nor {' and '.join(missing)}; copy the folder whole")
    try:
        vocabulary, merges = models.BPE.read_file(*map(str, files))
        model = models.BPE(vocabulary, merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>")
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"can't read {files[0]} and {files[1].name}: {error}; copy them again") from None
    absent = [token for token in (START, END) if token not in vocabulary]
    if absent:
        raise UserError(f"{files[0]} has no {' and no '.join(absent)}; a CLIP vocabulary is needed")
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return tokenizer


def read_image_processor(file: Path, *, resample: int = Image.Resampling.BICUBIC) -> ImageProcessor:
    """Reads preprocessor_config.json of a network whose pictures are resized by the filter `resample`.

    Raises:
      UserError: the file is missing or damaged, or asks for something else than `ImageProcessor` does.
    """
    theirs = weights.read_json(Path(file))
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    wrong = [f"{step} = {theirs[step]!r}" for step in steps if not theirs.get(step, True)]
    if theirs.get("resample", resample) != resample:
        wrong.append(f"resample = {theirs['resample']!r}")
    if abs(theirs.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        wrong.append(f"rescale_factor = {theirs['rescale_factor']!r}")
    size, crop = theirs.get("size", 224), theirs.get("crop_size", 224)
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    square = set(crop.values()) if isinstance(crop, dict) else {crop}
    if not isinstance(side, int):
        wrong.append(f"size = {size!r}")
    if len(square) != 1 or not all(isinstance(value, int) for value in square):
        wrong.append(f"crop_size = {crop!r}")
    if wrong:
        raise UserError(f"{file} asks for {', '.join(wrong)}; a CLIP image processor is needed")
    colours = {ours: _triple(file, key, theirs[key]) for ours, key in _COLOURS.items() if key in theirs}
    return ImageProcessor(side, square.pop(), **colours, resample=resample)


_COLOURS = {"mean": "image_mean", "std": "image_std"}


def _triple(file: Path, key: str, value: Any) -> tuple[float, ...]:
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
        raise UserError(f"{file} has {key} = {value!r}; three numbers are needed")
    return tuple(value)


def _to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image or array as an RGB image, transparency laid on white."""
    if isinstance(image, Image.Image):
        if "A" not in image.getbands() and "transparency" not in image.info:
            return image.convert("RGB")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(f"an image of shape {array.shape}: a PIL image or an array (y, x, 3) is needed")
    if array.dtype != np.uint8:
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(f"an image with values from {array.min()} to {array.max()}: floats must lie in [0, 1]")
        array = np.round(255 * array).astype(np.uint8)
    return Image.fromarray(array)
