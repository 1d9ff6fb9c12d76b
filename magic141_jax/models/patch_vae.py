"""A light causal video autoencoder for small frames: space-time patches in, no 3D convolution anywhere.

Same interface and compression as the published VAE (8x in space, 4x in time, the first frame alone), at a hundredth
of its cost, so that the embedded default decodes 17 frames of 64 x 64 in tens of milliseconds on two CPU cores:

    frames (b, t, y, x, 3) -> first frame repeated to a full group -> patches 4x4x4 -> linear -> blocks at 1/4
    -> 2x2 cells folded into channels -> blocks at 1/8 -> latents (b, f, y/8, x/8, c); the decoder mirrors it.

A linear shortcut runs beside the blocks at both ends, from a group of 4x8x8 pixels straight to its latent and back:
the network starts as a linear autoencoder and spends its blocks on what that can't do (the residual autoencoding of
DC-AE, arXiv 2410.10733). `fit_shortcut` sets it to the best one, the principal components of the data, which gradient
descent is slow to find.

A block is a per-frame 3x3 convolution plus a linear map of the previous latent frame (all that makes it causal and
temporal), then a pointwise MLP: on a CPU a matmul runs about three times faster per operation than a convolution.
The residual stream itself is never normalised, since that erases brightness.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.errors import UserError
from magic141_jax.models.kl_vae import ImageConv
from magic141_jax.models.tiling import WHOLE, Tiling, tiled_decode, tiled_encode
from magic141_jax.models.vae import VideoVAE, latent_frames
from magic141_jax.pytree import Params
from magic141_jax.shapes import Frames, Latents
from magic141_jax.sharding import split_space

PATCH = 4  # pixels and frames of one patch
LOGVAR_RANGE = (-20.0, 10.0)
FIRST_LOGVAR = -6.0  # a fresh posterior is narrow, or its noise would hide the picture
MAX_GROUPS = 1 << 17  # enough to fit principal components on
ZEROS = nnx.initializers.zeros

SHARDING_RULES = ((r".*\.(expand|embed|fold)\.kernel", (None, "tensor")), (r".*\.contract\.kernel", ("tensor", None)))


@dataclasses.dataclass(frozen=True)
class PatchVAEConfig:
    """Sizes of a `PatchVAE`; latent_mean and latent_std hold one number per channel, or one for all.

    `tiling` decides how long and large videos are cut up; by default they are not.
    """

    latent_channels: int = 32
    widths: tuple[int, int] = (96, 192)  # at 1/4 and at 1/8 of the resolution
    encoder_blocks: tuple[int, int] = (1, 2)
    decoder_blocks: tuple[int, int] = (2, 2)
    expansion: int = 2
    spatial_factor: int = 8
    temporal_factor: int = 4
    latent_mean: tuple[float, ...] = (0.0,)
    latent_std: tuple[float, ...] = (1.0,)
    tiling: Tiling = WHOLE


class Block(nnx.Module):
    """x + MLP(silu(conv3x3(norm x) + W prev(norm x))) over (b, f, h, w, c); prev is the latent frame before."""

    def __init__(self, width: int, expansion: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.conv = ImageConv(width, width, rngs=rngs)
        self.previous = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.expand = nnx.Linear(width, expansion * width, rngs=rngs)
        self.contract = nnx.Linear(expansion * width, width, kernel_init=ZEROS, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Keeps the shape; frame i depends on frames i and i - 1 only."""
        x = split_space(x)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * self.scale[...].reshape(1, 1, 1, 1, -1)
        before = jnp.pad(y[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        y = jax.nn.silu(self.conv(y) + self.previous(before))
        return x + self.contract(jax.nn.silu(self.expand(y)))


class PatchVAE(VideoVAE):
    """The autoencoder of the module docstring."""

    def __init__(self, config: PatchVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        fine, coarse = config.widths
        pixels = 3 * PATCH**3

        def blocks(count: int, width: int) -> nnx.List:
            return nnx.List([Block(width, config.expansion, rngs=rngs) for _ in range(count)])

        self.embed = nnx.Linear(pixels, fine, rngs=rngs)
        self.encoder_fine = blocks(config.encoder_blocks[0], fine)
        self.fold = nnx.Linear(4 * fine, coarse, rngs=rngs)
        self.encoder_coarse = blocks(config.encoder_blocks[1], coarse)
        self.encoder_shortcut = nnx.Linear(4 * pixels, config.latent_channels, rngs=rngs)
        self.to_latent = nnx.Linear(coarse, 2 * config.latent_channels, kernel_init=ZEROS, rngs=rngs)
        self.to_latent.bias[...] = jnp.repeat(jnp.array([0.0, FIRST_LOGVAR]), config.latent_channels)
        self.decoder_shortcut = nnx.Linear(config.latent_channels, 4 * pixels, rngs=rngs)
        self.from_latent = ImageConv(config.latent_channels, coarse, rngs=rngs)
        self.decoder_coarse = blocks(config.decoder_blocks[1], coarse)
        self.unfold = nnx.Linear(coarse, 4 * fine, rngs=rngs)
        self.decoder_fine = blocks(config.decoder_blocks[0], fine)
        self.to_pixels = nnx.Linear(fine, pixels, kernel_init=ZEROS, rngs=rngs)

    def encode(self, frames: Frames) -> tuple[Latents, Latents]:
        """See `VideoVAE.encode`.

        Raises:
          UserError: t is not 4k + 1, or height or width is no multiple of 8.
        """
        latent_frames(frames.shape[1])
        height, width = frames.shape[2:4]
        if height % 8 or width % 8:
            near = f"{max(round(height / 8), 1) * 8}x{max(round(width / 8), 1) * 8}"
            raise UserError(f"frames of {height}x{width}: both sides must be multiples of 8, the nearest is {near}")
        mean, logvar = jnp.split(self.in_tiles(tiled_encode, self._moments, frames), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, raw: Latents) -> Frames:
        """See `VideoVAE.decode`."""
        return self.in_tiles(tiled_decode, self._frames, raw)

    def _moments(self, frames: Frames) -> Latents:
        """Mean and log-variance, not clipped, side by side."""
        frames = split_space(jnp.concatenate([jnp.repeat(frames[:, :1], PATCH - 1, axis=1), frames], axis=1))
        x = self.embed(_fold(frames, PATCH, PATCH))
        for block in self.encoder_fine:
            x = block(x)
        x = self.fold(_fold(x, 1, 2))
        for block in self.encoder_coarse:
            x = block(x)
        mean, logvar = jnp.split(self.to_latent(x), 2, axis=-1)
        mean += self.encoder_shortcut(_fold(frames, PATCH, 2 * PATCH))
        return jnp.concatenate([mean, logvar], axis=-1)

    def _frames(self, raw: Latents) -> Frames:
        """Decodes one tile."""
        raw = split_space(raw)
        x = self.from_latent(raw)
        for block in self.decoder_coarse:
            x = block(x)
        x = _unfold(self.unfold(x), 1, 2)
        for block in self.decoder_fine:
            x = block(x)
        frames = _unfold(self.to_pixels(x), PATCH, PATCH) + _unfold(self.decoder_shortcut(raw), PATCH, 2 * PATCH)
        return split_space(frames[:, PATCH - 1 :])


def fit_shortcut(params: Params, frames: Frames) -> Params:
    """Returns `params` with the linear shortcuts set to the principal components of `frames` in [-1, 1].

    Component i with variance v_i gets latents of standard deviation (v_i / v_0)^(1/4): halfway between whitened
    latents, which would make fine detail as loud as the picture, and plain ones, which would drown it in noise.
    """
    groups = _fold(frames[:, 1:], PATCH, 2 * PATCH).reshape(-1, 3 * PATCH * (2 * PATCH) ** 2)
    groups = groups[:MAX_GROUPS]
    mean = groups.mean(0)
    variances, vectors = jnp.linalg.eigh(jnp.cov(groups, rowvar=False))
    count = params["encoder_shortcut"]["kernel"].shape[1]
    variances, vectors = variances[::-1][:count], vectors[:, ::-1][:, :count]
    gain = (variances * variances[0]) ** -0.25  # to latents of the stated deviation
    kernel = vectors * gain[None, :]
    return params | {
        "encoder_shortcut": {"kernel": kernel, "bias": -mean @ kernel},
        "decoder_shortcut": {"kernel": (vectors / gain[None, :]).T, "bias": mean},
    }


def _fold(x: Array, time: int, space: int) -> Array:
    """(b, t, y, x, c) -> (b, t/time, y/space, x/space, time space^2 c)."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t // time, h // space, w // space, -1)


def _unfold(x: Array, time: int, space: int) -> Array:
    """The inverse of `_fold`."""
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h, w, time, space, space, c // (time * space * space))
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, f * time, h * space, w * space, -1)
