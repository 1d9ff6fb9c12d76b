"""The vision encoder of the multi-modal prior: a first frame -> tokens in the text width, put before the text tokens.

    images (b, y, x, 3) in [0, 1] -> patches -> linear + 2D sine position -> pre-norm transformer layers
    -> every 2 x 2 tokens merged by a linear layer -> norm -> linear -> (b, s, e),   s = y x / 16^2

arXiv 2502.07701, figure 3, feeds the I2V model the image tokens of a pretrained vision-language model. The embedded
default trains this small network along with the diffusion transformer instead: a pretrained vision encoder whose
licence allows shipping it and that would fit the 60 MB of the bundled weights was not found, the few that fit are
ImageNet classifiers, which discard the position and pose that a first frame is needed for, and clips of 64 x 64 need
far less than one. A pretrained encoder can take its place: the model sees only tokens in the text width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models import encoder
from magic141_jax.models.encoder import Encoder, EncoderConfig, affine_norm
from magic141_jax.models.layers import Linear, patchify
from magic141_jax.shapes import Images, Tokens

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    *encoder.SHARDING_RULES,
    (r"(patch|merge|project)\.kernel", (None, "fsdp")),
    (r"(patch|merge|project)\.bias", ()),
    (r"norm\.(scale|bias)", ()),
)


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the image encoder.

    `text_width` is the width of its tokens and `token_rms` their scale when freshly drawn: that of the text states.
    """

    patch: int = 8
    width: int = 192
    layers: int = 2
    heads: int = 3
    mlp: int = 768
    text_width: int = 384
    token_rms: float = 0.44
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.patch < 1 or self.width % 4:
            raise UserError(f"an image encoder of patch {self.patch}, width {self.width}: the width must divide by 4")

    def tokens(self, height: int, width: int) -> int:
        """The number of tokens for an image size; raises `UserError`, naming the nearest legal sizes."""
        cell = 2 * self.patch
        if height < cell or width < cell or height % cell or width % cell:
            near = " and ".join(
                f"{_round_size(height, cell, up)}x{_round_size(width, cell, up)}" for up in (False, True)
            )
            raise UserError(f"a {height}x{width} image: both sides must divide by {cell}; the nearest are {near}")
        return height * width // cell**2


class ImageEncoder(nnx.Module):
    """A two-layer vision transformer with token merging; see the module docstring."""

    def __init__(self, config: ImageEncoderConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.patch = Linear(3 * config.patch**2, width, rngs=rngs)
        layers = EncoderConfig(
            layers=config.layers, width=width, heads=config.heads, mlp=config.mlp, epsilon=config.epsilon
        )
        self.encoder = Encoder(layers, rngs=rngs)
        self.merge = Linear(4 * width, width, rngs=rngs)
        self.norm = affine_norm(width, config.epsilon, rngs=rngs)
        # The norm gives unit variance, so this variance of the kernel gives tokens of the wanted scale.
        scaled = jax.nn.initializers.variance_scaling(config.token_rms**2, "fan_in", "normal")
        self.project = Linear(width, config.text_width, init=scaled, rngs=rngs)

    def __call__(self, images: Images) -> Tokens:
        """Images (b, y, x, 3) in [0, 1] -> tokens (b, s, e), row by row.

        Raises:
          UserError: a side doesn't divide by twice the patch.
        """
        self.config.tokens(*images.shape[1:3])
        rows, columns = (side // self.config.patch for side in images.shape[1:3])
        x = self.patch(_cells(2 * images - 1, self.config.patch))
        x = x + jnp.asarray(sine_positions(rows, columns, self.config.width), x.dtype)[None]
        x = self.encoder(x, jnp.ones(x.shape[:2], bool))
        x = self.merge(_cells(x.reshape(len(x), rows, columns, -1), 2))
        return self.project(self.norm(x))


def sine_positions(rows: int, columns: int, width: int, *, period: float = 100.0) -> np.ndarray:
    """2D sine and cosine features (rows * columns, width): a half of the width for each of the two coordinates.

    Wavelengths grow geometrically from 2 pi to about 2 pi * `period` patches.
    """
    frequencies = period ** -np.linspace(0, 1, width // 4)

    def features(count: int) -> np.ndarray:
        angles = np.arange(count)[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    down = np.broadcast_to(features(rows)[:, None], (rows, columns, width // 2))
    across = np.broadcast_to(features(columns)[None], (rows, columns, width // 2))
    return np.concatenate([down, across], axis=-1).astype(np.float32).reshape(rows * columns, width)


def _cells(x: jax.Array, size: int) -> jax.Array:
    """(b, y, x, c) -> one vector for each cell of size * size: (b, y x / size^2, size * size * c)."""
    return patchify(x[:, None], (1, size, size))


def _round_size(value: int, cell: int, up: bool) -> int:
    return max(value // cell + (up and value % cell != 0), 1) * cell
