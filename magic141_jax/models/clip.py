"""CLIP's two towers (arXiv 2103.00020): pre-norm transformers over the words of a prompt and the patches of a picture.

    ids (b, s)            ->  states (b, s, d), pooled (b, d): the normed state at the end of the text; causal
    images (b, y, x, 3)   ->  patch states (b, l, d), row by row, without the class token's

The text tower gives HunyuanVideo and FLUX their pooled vector. The vision tower is the eye of LLaVA, which reads the
states one layer before the end, so that `layers` counts the layers that are run and nothing follows them. `Clip` is
both towers whole, with their projections into the common space, where evaluation compares texts and pictures.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.errors import UserError
from magic141_jax.models import encoder
from magic141_jax.models.encoder import Activation, Encoder, EncoderConfig, affine_norm
from magic141_jax.models.layers import Linear, patchify
from magic141_jax.shapes import Images, Pooled, TokenIds, Tokens

LEGACY_END = 2  # older configs name this id, which no text holds; the end of a text is then its largest id

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    *encoder.SHARDING_RULES,
    (r"(words|positions)\.embedding", (None, "fsdp")),
    (r"patch\.kernel", (None, "fsdp")),
    (r"norm\.(scale|bias)|class_token", ()),
    (r"(text|image)_projection\.kernel", ("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a `ClipText`, CLIP-L by default. `end_token` ends a text; 2 stands for "the largest id"."""

    vocabulary: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    epsilon: float = 1e-5
    activation: Activation = "quick_gelu"
    end_token: int = LEGACY_END
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a `ClipVision` for square images of side `image`; LLaVA's CLIP-L/14 at 336 pixels by default."""

    image: int = 336
    patch: int = 14
    width: int = 1024
    layers: int = 23
    heads: int = 16
    mlp: int = 4096
    epsilon: float = 1e-5
    activation: Activation = "quick_gelu"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image % self.patch:
            raise UserError(f"images of side {self.image} don't divide into patches of {self.patch}")

    @property
    def patches(self) -> int:
        """l, the number of patches of an image."""
        return (self.image // self.patch) ** 2


class ClipText(nnx.Module):
    """The text tower; see the module's docstring."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.encoder = Encoder(_layers(config, causal=True), rngs=rngs)
        self.norm = affine_norm(config.width, config.epsilon, rngs=rngs)

    def __call__(self, ids: TokenIds) -> tuple[Tokens, Pooled]:
        """Token ids -> states and pooled vectors, float32. What follows the end of a text is never seen before it.

        Raises:
          UserError: more ids than positions.
        """
        if ids.shape[1] > self.config.positions:
            raise UserError(f"CLIP reads {self.config.positions} tokens at most, got {ids.shape[1]}")
        x = self.words(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
        x = self.encoder(x.astype(self.config.compute_dtype), jnp.ones(ids.shape, bool))
        states = self.norm(x.astype(jnp.float32)).astype(jnp.float32)
        end = ids if self.config.end_token == LEGACY_END else ids == self.config.end_token
        return states, jnp.take_along_axis(states, end.argmax(1)[:, None, None], axis=1)[:, 0]


class ClipVision(nnx.Module):
    """The vision tower; see the module's docstring."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch = Linear(3 * config.patch**2, config.width, bias=False, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros(config.width))
        self.positions = nnx.Embed(1 + config.patches, config.width, rngs=rngs)
        self.norm = affine_norm(config.width, config.epsilon, rngs=rngs)
        self.encoder = Encoder(_layers(config, causal=False), rngs=rngs)

    def __call__(self, images: Images) -> Float[Array, "b l d"]:
        """Images (b, y, x, 3), normalised as CLIP's are, -> patch states in the compute dtype.

        Raises:
          UserError: images of another size.
        """
        return self.states(images)[:, 1:]

    def states(self, images: Images) -> Float[Array, "b l+1 d"]:
        """As the call, with the class token's state before those of the patches."""
        side = self.config.image
        if images.shape[1:] != (side, side, 3):
            raise UserError(f"CLIP takes images of {side}x{side}x3, got {'x'.join(map(str, images.shape[1:]))}")
        x = self.patch(patchify(images[:, None], (1, self.config.patch, self.config.patch)))
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions(jnp.arange(x.shape[1] + 1))[None]
        x = self.norm(x).astype(self.config.compute_dtype)
        return self.encoder(x, jnp.ones(x.shape[:2], bool))


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers, all of their layers, and the width of their common space; CLIP-L/14 by default."""

    text: ClipTextConfig = ClipTextConfig()
    vision: ClipVisionConfig = ClipVisionConfig(image=224, layers=24)
    projection: int = 768


class Clip(nnx.Module):
    """Texts and pictures in one space, as CLIP was trained to compare them."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.text, self.vision = ClipText(config.text, rngs=rngs), ClipVision(config.vision, rngs=rngs)
        self.vision_norm = affine_norm(config.vision.width, config.vision.epsilon, rngs=rngs)
        self.text_projection = Linear(config.text.width, config.projection, bias=False, rngs=rngs)
        self.image_projection = Linear(config.vision.width, config.projection, bias=False, rngs=rngs)

    def embed_text(self, ids: TokenIds) -> Pooled:
        """Token ids (b, s) -> (b, projection), not normalised."""
        return self.text_projection(self.text(ids)[1])

    def embed_images(self, images: Images) -> tuple[Pooled, Float[Array, "b l d"]]:
        """Images (b, y, x, 3), normalised as CLIP's are -> (b, projection), not normalised, and the patch states."""
        states = self.vision.states(images)
        return self.image_projection(self.vision_norm(states[:, 0])), states[:, 1:]


def _layers(config: ClipTextConfig | ClipVisionConfig, *, causal: bool) -> EncoderConfig:
    return EncoderConfig(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        mlp=config.mlp,
        epsilon=config.epsilon,
        activation=config.activation,
        causal=causal,
    )
