"""What the autoencoders share: frame arithmetic, value ranges and the normalisation of latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.models.vae import VideoVAE, latent_frames, sample_posterior


@dataclasses.dataclass(frozen=True)
class Config:
    """As every autoencoder's config."""

    latent_channels: int = 3
    spatial_factor: int = 1
    temporal_factor: int = 1
    latent_mean: tuple[float, ...] | float = (0.5, -1.0, 2.0)
    latent_std: tuple[float, ...] | float = (2.0, 0.5, 4.0)


class Identity(VideoVAE):
    """Raw latents are the frames in [-1, 1]."""

    def __init__(self, config):
        self.config = config

    def encode(self, frames):
        return frames, jnp.zeros_like(frames)

    def decode(self, raw):
        return raw


@pytest.mark.parametrize(("frames", "factor", "expected"), [(1, 4, 1), (5, 4, 2), (17, 4, 5), (121, 4, 31), (9, 8, 2)])
def test_latent_frames(frames, factor, expected):
    assert latent_frames(frames, factor) == expected


@pytest.mark.parametrize(("frames", "near"), [(0, "1 and 5"), (2, "1 and 5"), (16, "13 and 17"), (-3, "1 and 5")])
def test_other_lengths_name_the_nearest(frames, near):
    with pytest.raises(UserError, match=f"nearest are {near}"):
        latent_frames(frames)


@pytest.mark.parametrize("config", [Config(), Config(latent_mean=0.25, latent_std=3.0)])
def test_latents_are_normalised_and_come_back(config):
    frames = jax.random.uniform(jax.random.key(0), (2, 1, 2, 2, 3))
    latents = Identity(config).encode_latents(frames)
    want = (2 * np.asarray(frames) - 1 - np.array(config.latent_mean)) / np.array(config.latent_std)
    np.testing.assert_allclose(latents, want, atol=1e-6)
    np.testing.assert_allclose(Identity(config).decode_latents(latents), frames, atol=1e-6)


def test_decoded_frames_stay_in_range():
    frames = Identity(Config(latent_mean=0.0, latent_std=1.0)).decode_latents(
        jnp.linspace(-3, 3, 12).reshape(1, 1, 2, 2, 3)
    )
    assert frames.min() == 0 and frames.max() == 1


def test_posterior_samples_have_its_moments():
    mean, logvar = jnp.full((1, 100, 20, 20, 1), 3.0), jnp.full((1, 100, 20, 20, 1), 2 * jnp.log(0.5))
    drawn = sample_posterior(jax.random.key(0), mean, logvar)
    assert abs(float(drawn.mean()) - 3) < 0.01 and abs(float(drawn.std()) - 0.5) < 0.01
