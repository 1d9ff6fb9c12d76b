"""The light VAE: shapes, exact folding, causality in time, tiles, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magic141_jax.errors import UserError
from magic141_jax.models import patch_vae
from magic141_jax.models.network import Network
from magic141_jax.models.patch_vae import PatchVAE, PatchVAEConfig
from magic141_jax.models.tiling import in_squares

QUICK = {"xla_backend_optimization_level": 0}
TINY = PatchVAEConfig(latent_channels=4, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


@pytest.fixture(scope="module")
def network():
    return Network.create(PatchVAE, TINY)


@pytest.fixture(scope="module")
def params(network):
    """Random parameters, the zero-initialised outputs included."""
    drawn = network.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)


def clip(frames, size=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (2, frames, size, size, 3)), jnp.float32)


@pytest.mark.heavy
@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (17, 5)])
def test_shapes(network, params, frames, latents):
    mean, logvar = network(params, clip(frames), method="encode")
    assert mean.shape == logvar.shape == (2, latents, 2, 2, 4)
    assert network(params, mean, method="decode").shape == (2, frames, 16, 16, 3)


def test_folding_is_undone_exactly():
    x = clip(8)
    np.testing.assert_array_equal(patch_vae._unfold(patch_vae._fold(x, 4, 4), 4, 4), x)


def test_encoder_and_decoder_are_causal(network, params):
    x = clip(17)
    whole, _ = network(params, x, method="encode")
    prefix, _ = network(params, x[:, :9], method="encode")
    np.testing.assert_allclose(whole[:, :3], prefix, atol=1e-5)
    np.testing.assert_allclose(
        network(params, whole, method="decode")[:, :9], network(params, whole[:, :3], method="decode"), atol=1e-5
    )


def test_later_frames_do_depend_on_earlier_ones(network, params):
    x = clip(5)
    changed, _ = network(params, x.at[:, 0].add(0.5), method="encode")
    mean, _ = network(params, x, method="encode")
    assert jnp.abs(changed[:, 1] - mean[:, 1]).max() > 1e-4


def test_tiles_are_seen_at_their_borders_only(network, params):
    tiled = Network.create(PatchVAE, dataclasses.replace(TINY, tiling=in_squares(TINY.tiling, 128)))

    def run(network, method, x):
        program = jax.jit(lambda p, v: network(p, v, method=method), compiler_options=QUICK)
        return program(params, x)

    x = clip(1, size=192)
    whole, parts = (run(n, "encode", x)[0] for n in (network, tiled))
    frames, joined = (run(n, "decode", whole) for n in (network, tiled))
    for want, have, cell in ((whole, parts, 8), (frames, joined, 1)):
        away = np.abs(np.asarray(want - have)) / np.abs(want).max()
        # The second tile begins at 96 pixels and is blended in over 32; a border is seen three latents away.
        near = slice((96 - 24) // cell, (128 + 24) // cell)
        assert 1e-4 < away[:, :, near].max() < 0.3
        away[:, :, near] = away[:, :, :, near] = 0
        assert away.max() < 1e-5


def test_normalised_latents_round_trip():
    normed = PatchVAEConfig(**{**vars(TINY), "latent_mean": (0.5,) * 4, "latent_std": (2.0,) * 4})
    plain, scaled = Network.create(PatchVAE, TINY), Network.create(PatchVAE, normed)
    params = plain.init(jax.random.key(1))
    frames = (clip(5) + 1) / 2
    raw = plain(params, frames, method="encode_latents")
    latents = scaled(params, frames, method="encode_latents")
    np.testing.assert_allclose(latents, (raw - 0.5) / 2, atol=1e-5)
    np.testing.assert_allclose(
        scaled(params, latents, method="decode_latents"), plain(params, raw, method="decode_latents"), atol=1e-4
    )


def test_it_learns_to_reconstruct(network):
    params = network.init(jax.random.key(2))
    target = jnp.tile(jnp.linspace(-1, 1, 16)[None, None, :, None, None], (2, 5, 1, 16, 3))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(p):
            return jnp.mean((network(p, network(p, target, method="encode")[0], method="decode") - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    values = []
    for _ in range(150):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.05 * values[0]


def test_illegal_sizes_name_the_nearest_legal_ones(network, params):
    with pytest.raises(UserError, match="nearest are 5 and 9"):
        network(params, clip(7), method="encode")
    with pytest.raises(UserError, match="nearest is 16x16"):
        network(params, clip(5, size=17), method="encode")


@pytest.mark.heavy
def test_the_shortcut_is_the_best_linear_autoencoder():
    """Its error on groups of 4x8x8 pixels is the variance of the components that it leaves out."""
    config = PatchVAEConfig(latent_channels=8, widths=(8, 12), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    network = Network.create(PatchVAE, config)
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(20, 4 * 8 * 8 * 3)) * np.geomspace(0.1, 0.01, 20)[:, None]
    groups = (rng.normal(size=(2 * 16 * 4 * 4, 20)) @ basis).reshape(2, 16, 4, 4, 4, 8, 8, 3)
    video = groups.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(2, 64, 32, 32, 3)
    frames = jnp.asarray(np.concatenate([video[:, :1], video], axis=1), jnp.float32)
    params = patch_vae.fit_shortcut(network.init(jax.random.key(0)), frames)
    mean, _ = network(params, frames, method="encode")
    error = (network(params, mean, method="decode") - frames)[:, 1:]
    variances = np.linalg.eigvalsh(np.cov(groups.reshape(-1, 768), rowvar=False))[::-1]
    np.testing.assert_allclose(jnp.mean(error**2), variances[8:].sum() / 768, rtol=0.02)
    spread = np.asarray(mean[:, 1:]).reshape(-1, 8).std(0)
    np.testing.assert_allclose(spread, (variances[:8] / variances[0]) ** 0.25, rtol=0.02)
