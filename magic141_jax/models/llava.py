"""LLaVA (arXiv 2304.08485): a language model that sees. HunyuanVideo's image-to-video prompts are read by one.

ids (b, s), mask (b, s), images (b, y, x, 3)  ->  states (b, s, d)

picture = linear(gelu(linear(CLIP patches)))      (b, l, d)
states  = Llama(words, with the picture's rows in the place of the l image tokens)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.models import clip, llama
from magic141_jax.models.clip import ClipVision, ClipVisionConfig
from magic141_jax.models.layers import Linear
from magic141_jax.models.llama import Llama, LlamaConfig
from magic141_jax.shapes import Images, TokenIds, TokenMask, Tokens

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    *clip.SHARDING_RULES,
    *llama.SHARDING_RULES,
    (r"project_(in|out)\.kernel", (None, "fsdp")),
    (r"project_(in|out)\.bias", ()),
)


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The two networks, the id of the token that a picture's rows replace, and the dtype of both networks."""

    language: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    vision: ClipVisionConfig = dataclasses.field(default_factory=ClipVisionConfig)
    image_token: int = 128257
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def width(self) -> int:
        """d, that of the states."""
        return self.language.width


class Llava(nnx.Module):
    """The vision tower, its projection and the language model; see the module's docstring."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vision, language = (
            dataclasses.replace(part, compute_dtype=config.compute_dtype) for part in (config.vision, config.language)
        )
        self.vision = ClipVision(vision, rngs=rngs)
        self.project_in = Linear(vision.width, language.width, rngs=rngs)
        self.project_out = Linear(language.width, language.width, rngs=rngs)
        self.language = Llama(language, rngs=rngs)

    def __call__(self, ids: TokenIds, mask: TokenMask, images: Images | None = None) -> Tokens:
        """Token ids, which of them count, and one picture a row -> states (b, s, d) float32.

        With `images`, normalised as CLIP's are, every row holds the image token once for each patch.
        """
        x = self.language.embed(ids)
        if images is not None:
            picture = self.project_out(jax.nn.gelu(self.project_in(self.vision(images)), approximate=False))
            here = ids == self.config.image_token
            rows = jnp.maximum(jnp.cumsum(here, axis=1) - 1, 0)
            x = jnp.where(here[..., None], jnp.take_along_axis(picture, rows[..., None], axis=1), x)
        return self.language.run(x, mask)
