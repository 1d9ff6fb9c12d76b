"""The image convolution by hand, frames that don't see one another, shapes, and sharding rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax import pytree
from magic141_jax.models.kl_vae import KLVAE, SHARDING_RULES, ImageConv, KLVAEConfig
from magic141_jax.models.network import Network

TINY = KLVAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("step", "pad"), [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_convolution_by_hand(step, pad):
    x, conv = normal(2, 3, 5, 6, 2), ImageConv(2, 4, stride=(1, step, step), rngs=nnx.Rngs(0))
    conv.bias[...] = normal(4)
    padded = np.pad(x, ((0, 0), (0, 0), *pad, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::step, ::step]
    wanted = np.einsum("btyxcij,ijco->btyxo", windows, conv.kernel[...]) + np.asarray(conv.bias[...])
    np.testing.assert_allclose(conv(jnp.asarray(x)), wanted, atol=1e-5)


def test_frames_are_images_of_their_own():
    network = Network.create(KLVAE, TINY)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), network.abstract_params)
    frames = normal(1, 2, 8, 8, 3)
    encode = jax.jit(lambda v: network(params, v, method="encode")[0])
    both, alone = encode(frames), encode(frames[:, ::-1])
    np.testing.assert_allclose(both, alone[:, ::-1], rtol=1e-4, atol=1e-5)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3


def test_published_shapes():
    network = Network.create(KLVAE, KLVAEConfig())
    params, image = network.abstract_params, jax.ShapeDtypeStruct((2, 1, 544, 960, 3), jnp.float32)
    latents = jax.eval_shape(lambda p, v: network(p, v, method="encode_latents"), params, image)
    assert latents.shape == (2, 1, 68, 120, 16)
    decoded = jax.eval_shape(lambda p, v: network(p, v, method="decode_latents"), params, latents)
    assert decoded.shape == image.shape
    assert network.config.spatial_factor == 8 and network.config.temporal_factor == 1


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="groups"):
        KLVAEConfig(norm_num_groups=3)


def test_sharding_rules_fit_every_parameter():
    for path, leaf in pytree.flatten(Network.create(KLVAE, KLVAEConfig()).abstract_params).items():
        spec = next(spec for pattern, spec in SHARDING_RULES if re.search(pattern, path))
        assert len(spec) <= leaf.ndim, path
        last = leaf.shape[leaf.ndim - len(spec) :]
        assert all(axis is None or size % 8 == 0 for axis, size in zip(spec, last)), path
        assert spec or leaf.size < 300_000, path
