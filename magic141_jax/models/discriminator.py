"""The adversary of VAE training: a small patch discriminator of frames and of their change.

    frames (b, t, y, x, 3) in [-1, 1] -> [frame, frame - previous frame] -> strided 2D convolutions
    -> logits (b t, y / 8, x / 8, 1)

Each logit judges one patch of one frame; the difference channels let it see flicker (they are 0 in the first frame).
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.shapes import Frames


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Channels of the strided convolutions, each of which halves the size."""

    channels: tuple[int, ...] = (32, 64, 128)


class Discriminator(nnx.Module):
    """Patch discriminator; see the module docstring."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config = config
        sizes = (6, *config.channels)
        self.down = nnx.List(
            nnx.Conv(i, o, (4, 4), strides=2, padding="SAME", rngs=rngs) for i, o in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(nnx.GroupNorm(o, num_groups=8, rngs=rngs) for o in config.channels)
        self.logits = nnx.Conv(sizes[-1], 1, (3, 3), padding="SAME", rngs=rngs)

    def __call__(self, frames: Frames) -> Float[Array, "bt y x 1"]:
        """Frames in [-1, 1] -> one logit a patch."""
        change = jnp.pad(jnp.diff(frames, axis=1), ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([frames, change], axis=-1).reshape(-1, *frames.shape[2:4], 6)
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.logits(x)
