"""Parity with the published image autoencoder on tiny random weights, frames apart, and exact round trips."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from magic141_jax import pytree
from magic141_jax.convert import kl_vae
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.kl_vae import KLVAE, KLVAEConfig
from magic141_jax.models.network import Network
from magic141_jax.models.tiling import in_squares

QUICK = {"xla_backend_optimization_level": 0}
FLUX = {
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture(scope="module")
def published(randomise):
    """A tiny published autoencoder with every parameter random."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "latent_channels": 6, "layers_per_block": 1}
    return randomise(diffusers.AutoencoderKL(**FLUX | sizes), 2**0.5)


@pytest.fixture(scope="module")
def tensors(published):
    return {name: tensor.numpy() for name, tensor in published.state_dict().items()}


@pytest.fixture(scope="module")
def converted(published, tensors):
    network = Network.create(KLVAE, kl_vae.config_to_ours(dict(published.config)))
    return network, to_ours(tensors, kl_vae.table(network.config), network.abstract_params)


def run(converted, method, inputs):
    network, params = converted
    return jax.jit(lambda p, v: network(p, v, method=method), compiler_options=QUICK)(params, inputs)


def relative_error(ours, theirs, clips):
    """`theirs` is (b t, c, y, x); ours (b, t, y, x, c)."""
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert theirs.std() > 0.1
    return np.abs(np.asarray(ours) - theirs.reshape(clips, -1, *theirs.shape[1:])).max() / np.abs(theirs).max()


def images(frames):
    """Clips (b, t, y, x, c) as a torch batch (b t, c, y, x)."""
    torch = pytest.importorskip("torch")
    return torch.tensor(np.moveaxis(frames.reshape(-1, *frames.shape[2:]), -1, 1))


@pytest.mark.parametrize(("b", "t", "y", "x"), [(2, 1, 32, 48), (1, 3, 24, 16), (1, 1, 44, 38)])
def test_parity(published, converted, b, t, y, x):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    frames = random.standard_normal((b, t, y, x, 3)).astype(np.float32)
    raw = random.standard_normal((b, t, y // 8, x // 8, 6)).astype(np.float32)
    with torch.no_grad():
        posterior = published.encode(images(frames)).latent_dist
        decoded = published.decode(images(raw)).sample
    mean, logvar = run(converted, "encode", frames)
    assert relative_error(mean, posterior.mean, b) < 1e-5
    assert relative_error(logvar, posterior.logvar, b) < 1e-5
    assert relative_error(run(converted, "decode", raw), decoded, b) < 2e-5


def test_tiles_are_those_of_the_published_one(published, converted):
    torch = pytest.importorskip("torch")
    network, params = converted
    config = dataclasses.replace(network.config, tiling=in_squares(network.config.tiling, 32))
    tiled = Network.create(KLVAE, config), params
    random = np.random.default_rng(2)
    frames = random.standard_normal((1, 1, 56, 72, 3)).astype(np.float32)
    raw = random.standard_normal((1, 1, 7, 9, 6)).astype(np.float32)
    theirs = copy.deepcopy(published)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 32, 4
    with torch.no_grad():
        mean, decoded = theirs.encode(images(frames)).latent_dist.mean, theirs.decode(images(raw)).sample
    assert relative_error(run(tiled, "encode", frames)[0], mean, 1) < 1e-5
    assert relative_error(run(tiled, "decode", raw), decoded, 1) < 2e-5
    assert relative_error(run(converted, "decode", raw), decoded, 1) > 1e-2, "norms see a tile"


def test_latents_are_normalised_as_the_published_pipeline_does(published, converted):
    torch = pytest.importorskip("torch")
    frames = np.random.default_rng(1).uniform(size=(1, 1, 16, 24, 3)).astype(np.float32)
    latents = run(converted, "encode_latents", frames)
    with torch.no_grad():
        wanted = (published.encode(2 * images(frames) - 1).latent_dist.mode() - 0.1159) * 0.3611
        decoded = published.decode(wanted / 0.3611 + 0.1159).sample / 2 + 0.5
    assert relative_error(latents, wanted, 1) < 1e-5
    assert relative_error(run(converted, "decode_latents", latents), decoded.clamp(0, 1), 1) < 2e-5


def test_round_trip_is_exact(converted, tensors):
    network, params = converted
    back = from_ours(params, kl_vae.table(network.config))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_published_sizes():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**FLUX, block_out_channels=(128, 256, 512, 512))
    config = kl_vae.config_to_ours(dict(model.config))
    assert config == KLVAEConfig()
    shapes = Network.create(KLVAE, config).abstract_params
    assert pytree.count(shapes) == sum(p.numel() for p in model.parameters())
    theirs = kl_vae.config_from_ours(config)
    assert {key: theirs[key] for key in ("scaling_factor", "shift_factor")} == pytest.approx(
        {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    )
    assert kl_vae.config_to_ours(theirs) == dataclasses.replace(config, latent_std=1 / theirs["scaling_factor"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"_class_name": "AutoencoderKLHunyuanVideo"}, "HunyuanVideo"),
        ({"norm_num_groups": 7}, "groups"),
    ],
)
def test_other_variants_are_refused(published, change, message):
    with pytest.raises(UserError, match=f"VAE's config.*{message}"):
        kl_vae.config_to_ours(dict(published.config) | change)


def test_misfits_are_named(published, converted, tensors):
    with pytest.raises(UserError, match="lacks scaling_factor"):
        kl_vae.config_to_ours({k: v for k, v in published.config.items() if k != "scaling_factor"})
    with pytest.raises(UserError, match=r"no rule for tensor quant_conv\.weight"):
        to_ours(tensors | {"quant_conv.weight": np.zeros(1)}, kl_vae.table(KLVAEConfig()), converted[1])
