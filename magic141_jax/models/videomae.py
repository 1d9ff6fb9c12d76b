"""VideoMAE's encoder (Tong 2022, arXiv 2203.12602), fine-tuned to tell actions: features of a clip.

    clips (b, t, y, x, 3)  ->  (b, d): the normed mean of the states of all tubes, what its classifier reads

A tube is `tube` frames of a patch; its position is a fixed sine. Its features weigh motion more and the content of
single frames less than I3D's do (Ge 2024, arXiv 2404.12391, who build a Fréchet video distance on such).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models.encoder import Activation, Encoder, EncoderConfig, affine_norm
from magic141_jax.models.layers import Linear, patchify
from magic141_jax.shapes import Frames, Pooled

POSITION_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Sizes for clips of `frames` square frames of side `image`; VideoMAE-B by default.

    `final_epsilon` is of the norm before the classifier, whose config doesn't name it.
    """

    image: int = 224
    frames: int = 16
    patch: int = 16
    tube: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    epsilon: float = 1e-12
    final_epsilon: float = 1e-5
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if self.image % self.patch or self.frames % self.tube:
            raise UserError(
                f"clips of {self.frames} frames of side {self.image} don't divide into tubes of {self.tube} frames "
                f"and side {self.patch}"
            )


class VideoMAE(nnx.Module):
    """The encoder; see the module's docstring."""

    def __init__(self, config: VideoMAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch = Linear(3 * config.tube * config.patch**2, config.width, rngs=rngs)
        layers = EncoderConfig(
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            mlp=config.mlp,
            epsilon=config.epsilon,
            activation=config.activation,
        )
        self.encoder = Encoder(layers, rngs=rngs)
        self.norm = affine_norm(config.width, config.final_epsilon, rngs=rngs)

    def __call__(self, clips: Frames) -> Pooled:
        """Clips (b, t, y, x, 3), normalised as ImageNet's pictures are, -> features (b, d).

        Raises:
          UserError: clips of another shape.
        """
        c = self.config
        if clips.shape[1:] != (c.frames, c.image, c.image, 3):
            want = f"{c.frames}x{c.image}x{c.image}x3"
            raise UserError(f"VideoMAE takes clips of {want}, got {'x'.join(map(str, clips.shape[1:]))}")
        x = self.patch(patchify(clips, (c.tube, c.patch, c.patch)))
        x = x + jnp.asarray(positions(x.shape[1], c.width))[None]
        return self.norm(self.encoder(x, jnp.ones(x.shape[:2], bool)).mean(1))


def positions(count: int, width: int) -> np.ndarray:
    """(count, width) float32: sines at even and cosines at odd places, each pair of one wavelength."""
    angles = np.arange(count)[:, None] / POSITION_BASE ** (np.arange(width) // 2 * 2 / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
