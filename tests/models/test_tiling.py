"""Tiles give what diffusers' tiling gives, and what a whole call gives when the network is local."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.models import MODELS
from magic141_jax.models.network import Network
from magic141_jax.models.tiling import WHOLE, Tiling, cross_fade, in_squares, tiled_decode, tiled_encode

FACTORS = {"spatial_factor": 8, "temporal_factor": 4}
# tiling, frames, height, width: clips and pictures that end anywhere within a tile, and overlaps over half a tile
CASES = [
    (Tiling(), 17, 16, 16),
    (Tiling(), 37, 16, 24),
    (Tiling(frames=12, frame_stride=4), 29, 8, 8),
    (Tiling(size=64, stride=48), 21, 72, 136),
    (Tiling(frames=None, size=32, stride=8), 1, 40, 16),
    (Tiling(frames=8, frame_stride=8, size=32, stride=16), 21, 24, 40),
]
IDS = [f"{t.frames}-{t.frame_stride}-{t.size}-{t.stride}-{'x'.join(map(str, size))}" for t, *size in CASES]


def quick(function):
    """Compiles without LLVM's optimisations, which would be most of the time here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def local_decoder(raw):
    """A decoder without context: each position is repeated, the first frame once."""
    x = jnp.repeat(jnp.repeat(raw, 8, axis=2), 8, axis=3)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], 4, axis=1)], axis=1)


def local_encoder(frames):
    return frames[:, ::4, ::8, ::8]


def contextual(function):
    """Makes the output depend on the whole tile and on the place within it, as normalisation and borders do."""

    def call(x):
        y = function(x)
        ramp = 0.1 * sum(jax.lax.broadcasted_iota(jnp.float32, y.shape, axis) / axis for axis in (1, 2, 3))
        return y * (1 + x.mean()) + jnp.sin(ramp)

    return call


def published_vae(tiling, decode, encode):
    """diffusers' autoencoder with its networks replaced by functions of channels-last arrays."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    class Stand(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = quick(function)

        def forward(self, x):
            y = self.function(np.moveaxis(x.numpy(), 1, -1))
            return torch.tensor(np.moveaxis(np.asarray(y), -1, 1).copy())

    vae = diffusers.AutoencoderKLHunyuanVideo(block_out_channels=(1, 1, 1, 1), norm_num_groups=1, latent_channels=1)
    vae.encoder, vae.decoder = Stand(encode), Stand(decode)
    vae.quant_conv = vae.post_quant_conv = torch.nn.Identity()
    vae.use_framewise_encoding = vae.use_framewise_decoding = tiling.frames is not None
    if tiling.frames is not None:
        vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = tiling.frames, tiling.frame_stride
    if tiling.size is not None:
        vae.enable_tiling(tiling.size, tiling.size, None, tiling.stride, tiling.stride, None)
    return vae


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_diffusers(case):
    torch = pytest.importorskip("torch")
    tiling, t, y, x = case
    decode, encode = contextual(local_decoder), contextual(local_encoder)
    vae = published_vae(tiling, decode, encode)
    random = np.random.default_rng(0)
    raw = random.standard_normal((1, (t - 1) // 4 + 1, y // 8, x // 8, 2)).astype(np.float32)
    frames = random.standard_normal((1, t, y, x, 2)).astype(np.float32)
    with torch.no_grad():
        wanted_frames = vae._decode(torch.tensor(np.moveaxis(raw, -1, 1))).sample
        wanted_latents = vae._encode(torch.tensor(np.moveaxis(frames, -1, 1)))
    for ours, wanted in (
        (quick(lambda v: tiled_decode(decode, v, tiling, **FACTORS))(raw), wanted_frames),
        (quick(lambda v: tiled_encode(encode, v, tiling, **FACTORS))(frames), wanted_latents),
    ):
        np.testing.assert_allclose(ours, np.moveaxis(wanted.numpy(), 1, -1), atol=1e-5)


@pytest.mark.parametrize("case", CASES[1::2], ids=IDS[1::2])
def test_local_networks_do_not_see_tiles(case):
    tiling, t, y, x = case
    random = np.random.default_rng(1)
    raw = random.standard_normal((2, (t - 1) // 4 + 1, y // 8, x // 8, 2)).astype(np.float32)
    frames = random.standard_normal((2, t, y, x, 3)).astype(np.float32)
    decoded = quick(lambda v: tiled_decode(local_decoder, v, tiling, **FACTORS))(raw)
    encoded = quick(lambda v: tiled_encode(local_encoder, v, tiling, **FACTORS))(frames)
    np.testing.assert_allclose(decoded, local_decoder(raw), atol=1e-6)
    np.testing.assert_allclose(encoded, local_encoder(frames), atol=1e-6)


LEVELS = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
LIGHT = {"latent_channels": 2, "widths": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)}


@pytest.mark.heavy
@pytest.mark.parametrize("kind, sizes", [("hunyuan_vae", LEVELS), ("kl_vae", LEVELS), ("patch_vae", LIGHT)])
def test_every_autoencoder_needs_less_memory_in_tiles(kind, sizes):
    config_class, module = MODELS[kind]
    whole, latents = config_class(**sizes), jax.ShapeDtypeStruct((1, 1, 32, 32, 2), jnp.float32)

    def working_bytes(tiling):
        network = Network.create(module, dataclasses.replace(whole, tiling=tiling))
        decode = quick(lambda params, x: network(params, x, method="decode_latents"))
        return decode.lower(network.abstract_params, latents).compile().memory_analysis().temp_size_in_bytes

    assert working_bytes(in_squares(whole.tiling, 64)) < 0.5 * working_bytes(whole.tiling)


def test_squares():
    assert in_squares(Tiling(), 256) == Tiling(size=256, stride=192), "time stays as it was"
    assert in_squares(WHOLE, 32) == Tiling(frames=None, size=32, stride=24)
    for size in (0, -32, 16, 100):
        with pytest.raises(UserError, match=f"tiles of {size} pixels.*multiple of 32"):
            in_squares(WHOLE, size)


def shapes_seen(latents, tiling):
    """The shapes of the latent tiles that reach the network, one per trace."""
    seen = []

    def record(x):
        seen.append(x.shape[1:4])
        return local_decoder(x)

    jax.eval_shape(lambda v: tiled_decode(record, v, tiling, **FACTORS), jnp.zeros((1, *latents, 1)))
    return seen


def test_short_and_small_inputs_stay_whole():
    assert shapes_seen((4, 32, 32), Tiling(size=256)) == [(4, 32, 32)]
    assert shapes_seen((9, 40, 40), WHOLE) == [(9, 40, 40)]


def test_equal_tiles_are_compiled_once():
    # Starts 0, 3, ..., 27 hold 5 latent frames, except the last, which holds 4; 30 would hold only its context.
    seen = shapes_seen((31, 2, 2), Tiling())
    assert set(seen) == {(5, 2, 2), (4, 2, 2)}
    assert len(seen) == 2


def test_cross_fade():
    before, after = jnp.full((1, 6), 1.0), jnp.full((1, 5), 3.0)
    np.testing.assert_allclose(cross_fade(before, after, 4, axis=1), [[1.0, 1.5, 2.0, 2.5, 3.0]])
    np.testing.assert_allclose(cross_fade(before, after[:, :2], 4, axis=1), [[1.0, 2.0]])
    np.testing.assert_array_equal(cross_fade(before, after, 0, axis=1), after)


@pytest.mark.parametrize("sizes", [{"frames": 8, "frame_stride": 9}, {"size": 64, "stride": 0}])
def test_impossible_strides_are_refused(sizes):
    with pytest.raises(UserError, match="stride <= tile"):
        Tiling(**sizes)


@pytest.mark.parametrize("name, value", [("frames", 18), ("frame_stride", 10), ("size", 260), ("stride", 100)])
def test_tiles_off_the_latent_grid_are_refused(name, value):
    tiling = Tiling(**({"size": 256} | {name: value}))
    with pytest.raises(UserError, match=f"tiling.{name} is {value}"):
        tiled_decode(local_decoder, jnp.zeros((1, 1, 1, 1, 1)), tiling, **FACTORS)
