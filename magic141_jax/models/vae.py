"""What every video autoencoder here shares: the causal frame arithmetic, value ranges and latent normalisation.

A causal video VAE encodes the first frame alone and every further group of `temporal_factor` frames into one
latent frame: t = temporal_factor (f - 1) + 1. Diffusion sees normalised latents, (raw - mean) / std per channel;
frames are in [0, 1] outside and in [-1, 1] inside the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.shapes import Frames, Latents


class VideoVAE(nnx.Module):
    """Base of the autoencoders. A subclass has `config` and implements `encode` and `decode`.

    `config` has latent_channels, spatial_factor, temporal_factor, tiling, and latent_mean and latent_std: one number
    per channel, or a single one for all.
    """

    config: Any

    def encode(self, frames: Frames) -> tuple[Latents, Latents]:
        """Frames (b, t, y, x, 3) in [-1, 1] -> mean and log-variance of the raw latents (b, f, h, w, c)."""
        raise NotImplementedError

    def decode(self, raw: Latents) -> Frames:
        """Raw latents (b, f, h, w, c) -> frames (b, t, y, x, 3) around [-1, 1], not clipped."""
        raise NotImplementedError

    def in_tiles(self, cut: Callable[..., jax.Array], function: Callable[[jax.Array], jax.Array], x: jax.Array):
        """`cut`, which is `tiled_encode` or `tiled_decode`, of `function` over x, as the config's tiling says."""
        config = self.config
        factors = {"spatial_factor": config.spatial_factor, "temporal_factor": config.temporal_factor}
        return cut(function, x, config.tiling, **factors)

    def encode_latents(self, frames: Frames) -> Latents:
        """Frames in [0, 1] -> normalised latents: the posterior's mode."""
        mean, _ = self.encode(2 * frames - 1)
        return (mean - _per_channel(self.config.latent_mean, mean)) / _per_channel(self.config.latent_std, mean)

    def decode_latents(self, latents: Latents) -> Frames:
        """Normalised latents -> frames clipped to [0, 1]."""
        raw = latents * _per_channel(self.config.latent_std, latents) + _per_channel(self.config.latent_mean, latents)
        return jnp.clip((self.decode(raw) + 1) / 2, 0, 1)


def latent_frames(frames: int, factor: int = 4) -> int:
    """The number of latent frames of a clip; raises `UserError`, naming the nearest legal lengths, if none fits."""
    if frames < 1 or (frames - 1) % factor:
        lower = max((frames - 1) // factor, 0) * factor + 1
        raise UserError(f"{frames} frames: a clip has {factor}k + 1; the nearest are {lower} and {lower + factor}")
    return (frames - 1) // factor + 1


def sample_posterior(key: jax.Array, mean: Latents, logvar: Latents) -> Latents:
    """Draws from N(mean, exp(logvar))."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


def _per_channel(values: float | tuple[float, ...], like: Latents) -> jax.Array:
    """One number, or one per channel, as (1, 1, 1, 1, c) in the dtype of `like`."""
    return jnp.asarray(values, like.dtype).reshape(1, 1, 1, 1, -1)
