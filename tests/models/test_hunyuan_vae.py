"""The causal convolution in both forms, causality part by part, and the shapes and limits of the autoencoder."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax import pytree
from magic141_jax.models import hunyuan_vae
from magic141_jax.models.hunyuan_vae import (
    SHARDING_RULES,
    HunyuanVAE,
    HunyuanVAEConfig,
    causal_conv3d,
    frame_causal_attention,
    group_norm,
    upsample,
)
from magic141_jax.models.network import Network
from magic141_jax.models.tiling import WHOLE

QUICK = {"xla_backend_optimization_level": 0}
TINY = HunyuanVAEConfig(
    block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2, tiling=WHOLE
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(network):
    """Drawn with numpy, because compiling the initialiser of many layers takes longer than the tests."""
    random = np.random.default_rng(0)

    def draw(leaf):
        scale = (2 * leaf.shape[-1] / leaf.size) ** 0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(random.standard_normal(leaf.shape) * scale + (leaf.ndim == 1), jnp.float32)

    return jax.tree.map(draw, network.abstract_params)


@pytest.fixture(scope="module")
def tiny():
    network = Network.create(HunyuanVAE, TINY)
    return network, random_params(network)


@pytest.mark.parametrize("frames, stride", [(5, (1, 1, 1)), (5, (2, 2, 2)), (1, (2, 2, 2)), (2, (1, 2, 2))])
def test_both_convolution_forms_are_equal(frames, stride):
    x, kernel = normal(2, frames, 5, 6, 3), normal(3, 3, 3, 3, 4, seed=1)

    def call(form):
        def loss(x, kernel):
            y = causal_conv3d(x, kernel, stride=stride, form=form)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)(x, kernel)

    for taps, volume in zip(jax.tree.leaves(call("taps")), jax.tree.leaves(call("volume")), strict=True):
        np.testing.assert_allclose(taps, volume, rtol=1e-4, atol=1e-4)


def test_no_3d_convolution_on_cpu():
    jaxpr = str(jax.make_jaxpr(causal_conv3d)(normal(1, 3, 4, 4, 2), normal(3, 3, 3, 2, 2)))
    assert jax.default_backend() == "cpu"
    assert jaxpr.count("conv_general_dilated[") == 3
    assert "window_strides=(1, 1, 1)" not in jaxpr


def test_convolution_by_hand():
    """A kernel that picks the value two frames ago, one up and one left, with borders repeated."""
    x = normal(1, 4, 3, 3, 1)
    kernel = np.zeros((3, 3, 3, 1, 1), np.float32)
    kernel[0, 0, 0] = 1
    before = np.array([0, 0, 0, 1])
    shifted = np.array([0, 0, 1])
    wanted = x[:, before][:, :, shifted][:, :, :, shifted]
    np.testing.assert_allclose(causal_conv3d(x, kernel), wanted, rtol=1e-6)


def test_group_norm_is_flax_group_norm():
    x, scale, bias = normal(2, 3, 4, 5, 8), normal(8, seed=1), normal(8, seed=2)
    reference = nnx.GroupNorm(8, 4, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    reference.scale[...], reference.bias[...] = scale, bias
    np.testing.assert_allclose(group_norm(x, scale, bias, 4), reference(jnp.asarray(x)), atol=1e-5)


def test_attention_is_masked_attention():
    q, k, v = (normal(2, 3, 2, 4, 5, seed=n) for n in range(3))
    flat = [a.reshape(2, 24, 1, 5) for a in (q, k, v)]
    frame = np.arange(24) // 8
    mask = (frame[:, None] >= frame[None, :])[None, None]
    wanted = jax.nn.dot_product_attention(*flat, mask=mask).reshape(q.shape)
    np.testing.assert_allclose(frame_causal_attention(q, k, v), wanted, atol=1e-5)


def test_upsample_keeps_one_first_frame():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    np.testing.assert_array_equal(upsample(x, (2, 2, 1))[0, :, 1, 0, 0], [0, 1, 1, 2, 2])
    assert upsample(x, (1, 2, 2)).shape == (1, 3, 2, 2, 1)


@pytest.mark.parametrize(
    "norm, method, causal",
    [("per frame", "encode", True), ("per frame", "decode", True), ("published", "encode", False)],
)
def test_causal_but_for_the_group_norms(tiny, monkeypatch, norm, method, causal):
    """With statistics taken per frame, later frames don't touch earlier ones; with the published norms they do."""
    network, params = tiny
    if norm == "per frame":
        monkeypatch.setattr(hunyuan_vae, "group_norm", jax.vmap(group_norm, (1, None, None, None), 1))
    inputs, seen, made = {"encode": (normal(1, 9, 16, 16, 3), 5, 2), "decode": (normal(1, 3, 2, 2, 2), 2, 5)}[method]
    changed = inputs.copy()
    changed[:, seen:] += 1
    call = jax.jit(lambda p, v: network(p, v, method=method), compiler_options=QUICK)
    before, after = (np.asarray(jax.tree.leaves(call(params, x))[0]) for x in (inputs, changed))
    gap = np.abs(before - after).max((0, 2, 3, 4)) / np.abs(before).max()
    assert np.all(gap[made:] > 1e-3)
    assert np.all(gap[:made] < 1e-5) if causal else np.all(gap[:made] > 1e-5)


def test_bfloat16_stays_bfloat16():
    network = Network.create(HunyuanVAE, TINY)
    params, frames, raw = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)
        for tree in (network.abstract_params, jnp.zeros((1, 5, 16, 16, 3)), jnp.zeros((1, 2, 2, 2, 2)))
    )
    for method, inputs in (("encode", frames), ("decode", raw), ("encode_latents", frames), ("decode_latents", raw)):
        outputs = jax.eval_shape(lambda p, v, method=method: network(p, v, method=method), params, inputs)
        assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}, method


@pytest.mark.parametrize("frames, latents", [(1, 1), (81, 21)])
def test_published_shapes(frames, latents):
    """The published size at 544x960, traced without memory."""
    network = Network.create(HunyuanVAE, HunyuanVAEConfig())
    video = jax.ShapeDtypeStruct((1, frames, 544, 960, 3), jnp.float32)
    mean, logvar = jax.eval_shape(lambda p, v: network(p, v, method="encode"), network.abstract_params, video)
    assert mean.shape == logvar.shape == (1, latents, 68, 120, 16)
    decoded = jax.eval_shape(lambda p, v: network(p, v, method="decode_latents"), network.abstract_params, mean)
    assert decoded.shape == video.shape


def test_strides_of_the_levels():
    assert HunyuanVAEConfig().strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    total = np.prod(dataclasses.replace(TINY, spatial_factor=16, temporal_factor=2).strides, axis=0)
    assert tuple(total) == (2, 16, 16)


@pytest.mark.parametrize("change", [{"norm_num_groups": 3}, {"spatial_factor": 12}, {"temporal_factor": 16}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match=r"groups|levels"):
        dataclasses.replace(TINY, **change)


def test_sharding_rules_fit_every_parameter():
    params = pytree.flatten(Network.create(HunyuanVAE, HunyuanVAEConfig()).abstract_params)
    for path, leaf in params.items():
        spec = next(spec for pattern, spec in SHARDING_RULES if re.fullmatch(pattern, path))
        assert len(spec) <= leaf.ndim, path
        last = leaf.shape[leaf.ndim - len(spec) :]
        assert all(axis is None or size % 8 == 0 for axis, size in zip(spec, last)), path
        assert spec or leaf.size < 300_000, path
