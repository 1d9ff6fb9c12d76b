"""Parity with the published autoencoder on tiny random weights, whole and tiled, and exact round trips."""

import dataclasses

import jax
import numpy as np
import pytest

from magic141_jax import pytree
from magic141_jax.convert import hunyuan_vae
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from magic141_jax.models.network import Network
from magic141_jax.models.tiling import WHOLE, Tiling

# Compilation is most of the time here; the maths doesn't depend on LLVM's optimisations.
QUICK = {"xla_backend_optimization_level": 0}
SPACE = Tiling(frames=None, size=32, stride=16)
# tiling, batch, frames, height, width
CASES = {
    "whole": (WHOLE, 2, 9, 32, 48),
    "one frame of an odd size": (WHOLE, 1, 1, 36, 44),
    "frame tiles": (Tiling(), 1, 21, 16, 24),
    "space tiles": (SPACE, 1, 5, 16, 48),
}


@pytest.fixture(scope="module")
def published(randomise):
    """A tiny published autoencoder with every parameter random."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8, latent_channels=6, layers_per_block=1
    )
    return randomise(model, 2**0.5)


@pytest.fixture(scope="module")
def tensors(published):
    return {name: tensor.numpy() for name, tensor in published.state_dict().items()}


def network_of(published, tiling=WHOLE):
    return Network.create(HunyuanVAE, hunyuan_vae.config_to_ours(dict(published.config), tiling=tiling))


def params_of(published, tensors):
    network = network_of(published)
    return to_ours(tensors, hunyuan_vae.table(network.config), network.abstract_params)


def use_tiling(model, tiling):
    model.use_framewise_encoding = model.use_framewise_decoding = tiling.frames is not None
    model.use_tiling = tiling.size is not None
    if tiling.size is not None:
        model.tile_sample_min_height = model.tile_sample_min_width = tiling.size
        model.tile_sample_stride_height = model.tile_sample_stride_width = tiling.stride


def relative_error(ours, theirs):
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_parity(published, tensors, case):
    torch = pytest.importorskip("torch")
    tiling, b, t, y, x = CASES[case]
    use_tiling(published, tiling)
    network, params = network_of(published, tiling), params_of(published, tensors)
    random = np.random.default_rng(0)
    frames = random.standard_normal((b, t, y, x, 3)).astype(np.float32)
    raw = random.standard_normal((b, (t - 1) // 4 + 1, y // 8, x // 8, 6)).astype(np.float32)
    with torch.no_grad():
        posterior = published.encode(torch.tensor(np.moveaxis(frames, -1, 1))).latent_dist
        decoded = published.decode(torch.tensor(np.moveaxis(raw, -1, 1))).sample
    for method, inputs, theirs in (
        ("encode", frames, (posterior.mean, posterior.logvar)),
        ("decode", raw, (decoded,)),
    ):
        call = jax.jit(lambda p, v, method=method: network(p, v, method=method), compiler_options=QUICK)
        for ours, wanted in zip(jax.tree.leaves(call(params, inputs)), theirs, strict=True):
            assert relative_error(ours, wanted) < 1e-4, method


def test_round_trip_is_exact(published, tensors):
    params = params_of(published, tensors)
    back = from_ours(params, hunyuan_vae.table(network_of(published).config))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_every_misfit_is_named(published, tensors):
    network = network_of(published)
    wrong = dict(tensors) | {"decoder.surprise": np.zeros(1)}
    del wrong["encoder.mid_block.attentions.0.to_k.weight"]
    with pytest.raises(UserError, match=r"decoder\.surprise") as caught:
        to_ours(wrong, hunyuan_vae.table(network.config), network.abstract_params)
    assert "encoder.middle.attention.key.kernel" in str(caught.value)


def test_published_sizes():
    """The default config is the published one: the same keys and shapes, without allocating either."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLHunyuanVideo()
    config = hunyuan_vae.config_to_ours(dict(model.config))
    assert config == HunyuanVAEConfig()
    network = Network.create(HunyuanVAE, config)
    assert pytree.count(network.abstract_params) == sum(p.numel() for p in model.parameters())
    rules = hunyuan_vae.table(config)
    tiny = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), network.abstract_params)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in from_ours(tiny, rules).items()} == names


def test_config_round_trip(published):
    config = dataclasses.replace(hunyuan_vae.config_to_ours(dict(published.config)), layers_per_block=3)
    theirs = hunyuan_vae.config_from_ours(config)
    assert theirs["scaling_factor"] == pytest.approx(0.476986)
    again = hunyuan_vae.config_to_ours(theirs)
    assert again == dataclasses.replace(config, latent_std=again.latent_std)


@pytest.mark.parametrize("change", [{"act_fn": "gelu"}, {"_class_name": "AutoencoderKL"}, {"norm_num_groups": 7}])
def test_other_variants_are_refused(published, change):
    with pytest.raises(UserError, match="VAE's config"):
        hunyuan_vae.config_to_ours(dict(published.config) | change)


def test_shifted_latents_cannot_be_exported():
    with pytest.raises(UserError, match="latent_mean"):
        hunyuan_vae.config_from_ours(HunyuanVAEConfig(latent_mean=0.1))
