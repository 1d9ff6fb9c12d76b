"""I3D, an Inception network inflated to video (Carreira and Zisserman 2017, arXiv 1705.07750): what FVD is measured by.

    clips (b, t, y, x, 3) in [-1, 1]  ->  (b, classes): its logits, the mean over time

A unit is convolution, batch norm with the statistics of its training, ReLU; all are padded as TensorFlow's "SAME". A
mixed block joins four branches. The Fréchet video distance (Unterthiner 2018, arXiv 1812.01717) takes the logits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.shapes import Frames, Pooled

EPSILON = 1e-3  # of the batch norms
LEAST_FRAMES = 9  # the logits are of two neighbouring steps of eight frames
MIXED = {  # outputs of the branches: 1; 1 and 3; 1 and 3; pooled and 1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}


@dataclasses.dataclass(frozen=True)
class I3DConfig:
    """How many classes the logits are of; those of Kinetics by default."""

    classes: int = 400


class Unit(nnx.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int, *, stride: int = 1, rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (side, side, side, inputs, outputs)))
        self.scale, self.bias = nnx.Param(jnp.ones(outputs)), nnx.Param(jnp.zeros(outputs))
        self.mean, self.variance = nnx.Param(jnp.zeros(outputs)), nnx.Param(jnp.ones(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, inputs) -> (b, ..., outputs)."""
        gain = self.scale[...] / jnp.sqrt(self.variance[...] + EPSILON)
        shift = self.bias[...] - self.mean[...] * gain
        form = ("NTHWC", "THWIO", "NTHWC")
        kernel = self.kernel[...] * gain.reshape(1, 1, 1, 1, -1)
        y = jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 3, "SAME", dimension_numbers=form)
        return jax.nn.relu(y + shift.reshape(1, 1, 1, 1, -1))


class Mixed(nnx.Module):
    """An Inception block over `inputs` channels."""

    def __init__(self, inputs: int, widths: tuple[int, ...], *, rngs: nnx.Rngs) -> None:
        one, two, wide_two, three, wide_three, four = widths
        self.b0 = Unit(inputs, one, 1, rngs=rngs)
        self.b1a, self.b1b = Unit(inputs, two, 1, rngs=rngs), Unit(two, wide_two, 3, rngs=rngs)
        self.b2a, self.b2b = Unit(inputs, three, 1, rngs=rngs), Unit(three, wide_three, 3, rngs=rngs)
        self.b3b = Unit(inputs, four, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, inputs) -> (b, t, y, x, outputs of all branches)."""
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled))
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """The network over RGB; see the module's docstring. Its parts have their published names."""

    def __init__(self, config: I3DConfig, *, rngs: nnx.Rngs) -> None:
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2, rngs=rngs)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1, rngs=rngs)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3, rngs=rngs)
        width = 192
        for name, widths in MIXED.items():
            setattr(self, name, Mixed(width, widths, rngs=rngs))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nnx.Linear(width, config.classes, rngs=rngs)

    def __call__(self, clips: Frames) -> Pooled:
        """Clips (b, t, y, x, 3) in [-1, 1] -> logits (b, classes).

        Raises:
          UserError: clips of fewer than `LEAST_FRAMES` frames.
        """
        if clips.shape[1] < LEAST_FRAMES:
            raise UserError(f"I3D takes clips of {LEAST_FRAMES} frames or more, got {clips.shape[1]}")
        x = max_pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            x = getattr(self, name)(max_pool(x, *POOLED[name]) if name in POOLED else x)
        steps = x.mean((2, 3))
        return self.logits((steps[:, :-1] + steps[:, 1:]) / 2).mean(1)


def max_pool(x: jax.Array, window: tuple[int, int, int], stride: tuple[int, int, int]) -> jax.Array:
    """The largest of (t, y, x) windows of (b, t, y, x, c)."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
