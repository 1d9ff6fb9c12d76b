"""HunyuanVideo's prompts: a template read by Llama, or by LLaVA along with the first frame, and CLIP's pooled vector.

    text to video    rows of the prompt                             256
    image to video   every 2nd (or 4th) of 576 picture rows, then rows of the prompt      288 (144) + 252

The template asks the model to describe a video; only the states of what stands in the place of "{}" and after it are
kept. In the image-to-video template the four tokens of the assistant's header between prompt and line break are cut
out; a prompt that is too long loses its last rows to that cut, as in the published pipeline. Published facts: the
templates and where the prompt starts in them (diffusers' HunyuanVideoPipeline and HunyuanVideoImageToVideoPipeline).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tokenizers import Encoding, Tokenizer

from magic141_jax.errors import UserError
from magic141_jax.models.clip_inputs import ClipPooler, ImageProcessor, read_clip_tokenizer
from magic141_jax.models.clip_inputs import read_image_processor as _read_image_processor
from magic141_jax.models.llava import LlavaConfig
from magic141_jax.models.network import Network
from magic141_jax.models.resident import Held, require_match
from magic141_jax.models.text import TextStates, in_batches, read_tokenizer, require_prompts, warn_dropped
from magic141_jax.pytree import Params

MAX_BATCH = 8  # of prompts at once: a prompt with its picture is 934 tokens
PROMPT_TOKENS = 256
IMAGE, PAD, HEADER_END = "<image>", "<pad>", "<|end_header_id|>"
IMAGE_AT = 5  # where the template has the image token
HEADER = 4  # tokens of the assistant's header: end of turn, start of header, "assistant", end of header

_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
_USER = "<|start_header_id|>user<|end_header_id|>\n\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands before and after a prompt, and the number of tokens before it."""

    head: str
    tail: str
    start: int

    @property
    def length(self) -> int:
        """Tokens that are read at most."""
        return self.start + PROMPT_TOKENS


TEXT_TEMPLATE = Template(
    "<|start_header_id|>system<|end_header_id|>\n\n"
    f"Describe the video by detailing the following aspects: {_ASPECTS}{_USER}",
    "<|eot_id|>",
    start=95,
)
IMAGE_TEMPLATE = Template(
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\n"
    f"Describe the video by detailing the following aspects according to the reference image: {_ASPECTS}\n\n{_USER}",
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    start=103,
)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A batch for the language model: ids and mask (b, i), and which of its rows are the text (b, s)."""

    ids: np.ndarray
    mask: np.ndarray
    rows: np.ndarray


class HunyuanTextEncoder:
    """The `TextEncoder` of HunyuanVideo: with a `Llava` network it reads prompts and pictures, with a `Llama` prompts.

    Attributes:
      length: text rows, 256 or (with pictures) 252.
      image_tokens: picture rows put before them, 288 or 144; 0 without pictures.
      width: e, of all rows.
      pooled_width: p, of the pooled vector.
    """

    def __init__(
        self,
        language: tuple[Network, Held],
        clip: tuple[Network, Held],
        tokenizer: Tokenizer,
        clip_tokenizer: Tokenizer,
        *,
        processor: ImageProcessor | None = None,
        image_every: int = 2,
    ) -> None:
        """Takes both networks with parameters, wherever these lie, and what `read_tokenizers` gives.

        Args:
          language: a `Llava` for image to video, a `Llama` for text to video.
          clip: a `ClipText`.
          tokenizer: of the language model.
          clip_tokenizer: of CLIP.
          processor: of the pictures, if the repository's differs from the published one.
          image_every: which picture rows are kept: 2 for networks that concatenate the first frame's latents, 4 for
            those that replace tokens by them.

        Raises:
          UserError: parts that don't fit each other.
        """
        network, params = language
        require_match(params, network.abstract_params, what="the language model")
        config = network.config
        self.sees = isinstance(config, LlavaConfig)
        self.template = IMAGE_TEMPLATE if self.sees else TEXT_TEMPLATE
        self.processor = processor or ImageProcessor()
        if self.sees and self.processor.crop != config.vision.image:
            raise UserError(
                f"the image processor gives {self.processor.crop} pixels, the vision tower takes "
                f"{config.vision.image}; take both from the same repository"
            )
        self._patches = config.vision.patches if self.sees else 0
        self._image_every = image_every
        self.length = PROMPT_TOKENS - HEADER * self.sees
        self.image_tokens = len(range(0, self._patches, image_every))
        self.width = config.width
        self.pool = ClipPooler(*clip, clip_tokenizer)
        self.pooled_width = self.pool.width
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._check_tokenizer(config)
        self.params = params

        def states_at(params: Params, ids: Any, mask: Any, rows: Any, *images: Any) -> jax.Array:
            return jnp.take_along_axis(network(params, ids, mask, *images), rows[..., None], axis=1)

        self._apply = jax.jit(states_at)

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | np.ndarray] | None = None,
        *,
        image_every: int | None = None,
    ) -> TextStates:
        """Prompts, each with its picture, -> states (b, image_tokens + length, e), picture rows first, mask and pooled.

        The published pipelines encode a negative prompt with a black picture (of any size) and every 2nd row.

        Args:
          prompts: texts; a part that doesn't fit is dropped with a warning.
          images: PIL images or arrays (y, x, 3) of floats in [0, 1] or uint8, of any size, one for each prompt.
          image_every: which picture rows are kept, if others than the encoder's.

        Raises:
          UserError: pictures missing, superfluous or unfit, or a prompt that holds the image token.
        """
        require_prompts(prompts)
        pixels = self._pixels(images, len(prompts))
        tokens = self.tokenize(prompts)
        picture = IMAGE_AT + np.arange(0, self._patches, image_every or self._image_every)
        rows = np.concatenate([np.tile(picture, (len(prompts), 1)), tokens.rows], axis=1).astype(np.int32)
        states = in_batches(self._apply, self.params, (tokens.ids, tokens.mask, rows, *pixels), limit=MAX_BATCH)
        mask = jnp.asarray(np.take_along_axis(tokens.mask, rows, axis=1))
        return TextStates(jnp.where(mask[..., None], states, 0), mask, self.pool(prompts))

    def tokenize(self, prompts: Sequence[str]) -> Tokenized:
        """Prompts in their template -> tokens, the image token as often as a picture has patches."""
        template = self.template
        texts = [f"{template.head}{prompt}{template.tail}" for prompt in prompts]
        encodings = self.tokenizer.encode_batch(texts)
        ids = np.full((len(texts), template.length), self.tokenizer.token_to_id(PAD) or 0, np.int32)
        mask = np.zeros(ids.shape, bool)
        rows = np.empty((len(texts), self.length), np.int32)
        for i, (prompt, encoding) in enumerate(zip(prompts, encodings, strict=True)):
            if self.sees and IMAGE in prompt:
                raise UserError(f"the prompt holds {IMAGE}, which marks the place of the picture; leave it out")
            kept = encoding.ids[: template.length]
            ids[i, : len(kept)], mask[i, : len(kept)] = kept, True
            rows[i] = self._text_rows(prompt, encoding)
        if self.sees:
            times = np.where(np.arange(template.length) == IMAGE_AT, self._patches, 1)
            ids, mask = (np.repeat(array, times, axis=1) for array in (ids, mask))
            rows += self._patches - 1
        return Tokenized(ids, mask, rows)

    def _text_rows(self, prompt: str, encoding: Encoding) -> np.ndarray:
        """Which of the template's rows are the text; warns if these don't hold all of the prompt."""
        rows = np.arange(self.template.start, self.template.length)
        after = min(len(encoding.ids), self.template.length)
        if self.sees:
            header = len(encoding.ids) - 1 - encoding.ids[::-1].index(self.tokenizer.token_to_id(HEADER_END))
            end = min(header + 1, self.template.length)
            after = end - HEADER
            rows = rows[(rows < after) | (rows >= end)]
        read = encoding.offsets[after - 1][1] - len(self.template.head)
        if dropped := prompt[max(read, 0) :].strip():
            warn_dropped(dropped, f"{PROMPT_TOKENS} tokens")
        return rows

    def _pixels(self, images: Sequence[Image.Image | np.ndarray] | None, count: int) -> tuple[np.ndarray, ...]:
        """The pictures as the vision tower's input, in a tuple that is empty without them."""
        if not self.sees:
            if images is not None:
                raise UserError("this text encoder reads prompts only; take an image-to-video repository, or no images")
            return ()
        if images is None:
            raise UserError("this text encoder reads prompts together with pictures; give one for each prompt")
        if isinstance(images, Image.Image) or len(images) != count:
            got = "a single one" if isinstance(images, Image.Image) else len(images)
            raise UserError(f"{count} prompts need a list of {count} pictures, got {got}")
        return (self.processor(images),)

    def _check_tokenizer(self, config: Any) -> None:
        """Raises `UserError` unless the template gives the published number of tokens, the image token in its place."""
        vocabulary = (config.language if self.sees else config).vocabulary
        if self.tokenizer.get_vocab_size() > vocabulary:
            raise UserError(
                f"the tokenizer has {self.tokenizer.get_vocab_size()} tokens, the language model knows {vocabulary}; "
                "take both from the same repository"
            )
        ids = self.tokenizer.encode(self.template.head).ids
        if len(ids) != self.template.start or (self.sees and ids[IMAGE_AT] != config.image_token):
            raise UserError(
                f"the tokenizer makes {len(ids)} tokens of the prompt template, not the published "
                f"{self.template.start}{' with the image token' * self.sees}; take both from the same repository"
            )


def read_tokenizers(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of the language model and of CLIP in a published repository: tokenizer/ and tokenizer_2/.

    The language model's is read from tokenizer.json as it is: transformers 5 rebuilds it by the class that the
    repository names, with another pre-tokenizer, and gets other tokens without an error.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = Path(folder)
    return read_tokenizer(folder / "tokenizer" / "tokenizer.json"), read_clip_tokenizer(folder / "tokenizer_2")


def read_image_processor(folder: Path) -> ImageProcessor:
    """The image processor of a published repository, image_processor/preprocessor_config.json; raises `UserError`."""
    return _read_image_processor(Path(folder) / "image_processor" / "preprocessor_config.json")
