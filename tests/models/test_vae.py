"""What the autoencoders share: frame arithmetic, value ranges, the normalisation of latents, and parts of pictures."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.models import MODELS, SHARDING_RULES
from magic141_jax.models.network import Network
from magic141_jax.models.tiling import WHOLE, Tiling
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


LEVELS = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
FACTORS = {"spatial_factor": 2, "temporal_factor": 2}
PATCHES = {"latent_channels": 4, "widths": (8, 8)}
CONTEXT, MIXED = {"context": 8}, {"tensor": 2, "context": 2}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "config", "frames", "mesh", "share"),
    [
        ("hunyuan_vae", {**LEVELS, **FACTORS, "tiling": WHOLE}, (1, 5, 16, 32, 3), CONTEXT, 8),
        ("hunyuan_vae", {**LEVELS, **FACTORS, "tiling": Tiling(4, 4)}, (2, 9, 16, 32, 3), {"fsdp": 2, **MIXED}, 8),
        ("kl_vae", LEVELS, (1, 1, 14, 24, 3), {"data": 8}, 1.5),
        ("patch_vae", PATCHES, (1, 5, 64, 64, 3), CONTEXT, 8),
        ("patch_vae", PATCHES, (3, 5, 32, 32, 3), {"fsdp": 2, **MIXED}, 8),
    ],
)
def test_devices_share_the_picture(kind, config, frames, mesh, share):
    """float32 to 2e-5 of the largest value; a device convolves an eighth, and needs less than half of the memory.

    In the third case the latents' 12 columns don't divide by 8: there all devices do the same, the rest is shared.
    """
    config_class, module = MODELS[kind]
    network = Network.create(module, config_class(**config))
    random = np.random.default_rng(0)

    def draw(leaf):
        return random.normal(0.1, (2 / max(leaf.size // leaf.shape[-1], 8)) ** 0.5, leaf.shape).astype(np.float32)

    params = jax.tree.map(draw, network.abstract_params)
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **mesh}))
    laid = sharding.lay(params, mesh, SHARDING_RULES[kind])
    x = random.uniform(size=frames).astype(np.float32)
    for method in ("encode_latents", "decode_latents"):
        call = functools.partial(Network.__call__, network, method=method)
        alone = jax.jit(call).lower(params, x).compile()
        shared = jax.jit(sharding.over(mesh, call)).lower(laid, sharding.spread(x, mesh)).compile()
        want = np.asarray(alone(params, x))
        assert want.std() > 0.01
        np.testing.assert_allclose(shared(laid, sharding.spread(x, mesh)), want, atol=2e-5 * np.abs(want).max())
        assert convolved(alone) >= share * convolved(shared)
        if kind == "hunyuan_vae":
            temporary = [program.memory_analysis().temp_size_in_bytes for program in (alone, shared)]
            assert temporary[1] < temporary[0] / 2
        x = want


def convolved(program):
    """How many values the convolutions of a program make on a device."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* convolution\(", program.as_text())
    return sum(np.prod([int(side) for side in shape.split(",")]) for shape in shapes)
