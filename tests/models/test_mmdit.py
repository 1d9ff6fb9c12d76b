"""Invariants of the transformer: batch, padding, depth, recomputation, sharding rules, initial output."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import SHARDING_RULES, SIZES, MMDiT, debug, velocity_fn
from magic141_jax.models.network import Network
from magic141_jax.pytree import count, flatten

CONFIG = dataclasses.replace(debug(), double_blocks=2, single_blocks=3)


def random_params(network, seed=0):
    """Every parameter random, so that nothing hides behind the zero initialisation."""
    leaves, structure = jax.tree.flatten(network.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(structure, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def network():
    return Network.create(MMDiT, CONFIG)


@pytest.fixture(scope="module")
def params(network):
    return random_params(network)


def inputs(batch=2, channels=9):
    keys = jax.random.split(jax.random.key(7), 4)
    x = jax.random.normal(keys[0], (batch, 2, 4, 4, channels))
    t = jnp.linspace(0.2, 0.9, batch)
    text = jax.random.normal(keys[1], (batch, 6, 12))
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 0, 4])[:batch, None]
    return [x, t, text, mask, jax.random.normal(keys[2], (batch, 12))]


def test_a_fresh_network_predicts_zero(network):
    params = network.init(jax.random.key(0))
    out = network(params, *inputs())
    assert out.shape == (2, 2, 4, 4, 4) and out.dtype == jnp.float32
    assert not out.any()
    grads = jax.grad(lambda p: jnp.square(network(p, *inputs()) - 1).mean())(params)
    assert jnp.abs(grads["patch_out"]["bias"]).max() > 0


def test_batch_composition_does_not_matter(network, params):
    args = inputs(4)
    together = network(params, *args)
    alone = jnp.concatenate([network(params, *(a[i : i + 1] for a in args)) for i in range(4)])
    assert jnp.isfinite(together).all()
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_padded_text_changes_nothing(network, params):
    x, t, text, mask, pooled = inputs()
    out = network(params, x, t, text, mask, pooled)
    garbage = jnp.where(mask[:, :, None], text, 1e3)
    np.testing.assert_allclose(network(params, x, t, garbage, mask, pooled), out, atol=1e-5)
    short = network(params, *(a[1:, :3] if a.shape[:2] == (2, 6) else a[1:] for a in (x, t, text, mask, pooled)))
    np.testing.assert_allclose(short, out[1:], atol=2e-5)


@pytest.mark.parametrize("which", range(5))
def test_every_input_matters(network, params, which):
    args = inputs()
    out = network(params, *args)
    changed = args.copy()
    changed[which] = ~args[3] if which == 3 else args[which] * 0.5
    assert jnp.abs(network(params, *changed) - out).max() > 1e-3


def test_positions_matter_to_video_tokens(network, params):
    x, *rest = inputs()
    flipped = network(params, x[:, :, ::-1], *rest)[:, :, ::-1]
    assert jnp.abs(flipped - network(params, x, *rest)).max() > 1e-3


def test_scanned_blocks_equal_one_at_a_time(network, params):
    """Networks of one block of each kind, fed by hand with the layers in order, give the stacked outputs."""
    _, names = network(params, *inputs(), intermediates=True)
    assert names["double_blocks.video"].shape == (2, 2, 8, 16)
    assert names["double_blocks.text"].shape == (2, 2, 6, 16)
    assert names["single_blocks"].shape == (3, 2, 14, 16)
    for depth in (1, 2):
        shallow = Network.create(MMDiT, dataclasses.replace(CONFIG, single_blocks=depth))
        cut = params | {"single_blocks": jax.tree.map(lambda a, n=depth: a[:n], params["single_blocks"])}
        _, cut_names = shallow(cut, *inputs(), intermediates=True)
        np.testing.assert_allclose(cut_names["single_blocks"], names["single_blocks"][:depth], atol=1e-5)


def test_program_size_does_not_grow_with_depth():
    def size(depth):
        config = dataclasses.replace(debug(), double_blocks=depth, single_blocks=depth, refiner_blocks=depth)
        net = Network.create(MMDiT, config)
        return len(str(jax.make_jaxpr(lambda p: net(p, *inputs()))(net.abstract_params)).splitlines())

    assert size(8) == size(2)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_leaves_gradients_alone(network, params, remat):
    other = Network.create(MMDiT, dataclasses.replace(CONFIG, remat=remat))

    def gradients(net):
        return jax.jit(jax.grad(lambda p: jnp.square(net(p, *inputs()) - 1).mean()))(params)

    want, got = gradients(network), gradients(other)
    for path, leaf in flatten(want).items():
        np.testing.assert_allclose(flatten(got)[path], leaf, atol=1e-4 * (1e-3 + float(jnp.abs(leaf).max())))
        assert jnp.abs(leaf).max() > 0, path


def test_bfloat16_is_close_to_float32(network, params):
    half = Network.create(MMDiT, dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    want, got = network(params, *inputs()), half(params, *inputs())
    assert got.dtype == jnp.float32
    assert jnp.abs(got - want).mean() < 0.05 * jnp.abs(want).mean()


def test_wrong_inputs_are_named(network, params):
    with pytest.raises(UserError, match="9 input channels"):
        network(params, *inputs(channels=4))
    with pytest.raises(UserError, match="guidance"):
        network(params, *inputs(), guidance=jnp.ones(2))
    with pytest.raises(UserError, match="rope_axes"):
        dataclasses.replace(CONFIG, rope_axes=(2, 2, 2))


def test_guidance_is_an_input_where_the_config_has_it():
    net = Network.create(MMDiT, dataclasses.replace(CONFIG, guidance_embedding=True))
    params = random_params(net)
    low, high = (net(params, *inputs(), guidance=jnp.full(2, g)) for g in (1.0, 6.0))
    assert jnp.abs(low - high).max() > 1e-3


def test_velocity_functions_of_both_predictions_agree(network, params):
    """A network that predicts x0 gives the velocity that leads from x to its output."""
    x, t, text, mask, pooled = inputs(channels=4)
    known, known_mask = conditioning.known_latents(x, 1, 2)
    cond = conditioning.Conditioning(
        text=text, text_mask=mask, pooled=pooled, known=known, mask=known_mask, image_tokens=0
    )
    out = velocity_fn(network, params)(x, t, cond)
    np.testing.assert_allclose(
        out, network(params, jnp.concatenate([x, known, known_mask], -1), t, text, mask, pooled), atol=1e-6
    )
    sample = Network.create(MMDiT, dataclasses.replace(CONFIG, prediction="sample"))
    velocity = velocity_fn(sample, params)(x, t, cond)
    np.testing.assert_allclose(flow.sample_from_velocity(x, t, velocity), out, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_sharding_rules_fit_every_size(size):
    leaves = flatten(Network.create(MMDiT, SIZES[size]()).abstract_params)
    for path, leaf in leaves.items():
        spec = next((spec for pattern, spec in SHARDING_RULES if re.search(pattern, path)), ())
        assert len(spec) <= leaf.ndim, path
        if leaf.size > 2**20:
            assert "fsdp" in spec, path


def test_published_size_and_debug_size():
    parameters = {name: count(Network.create(MMDiT, size()).abstract_params) for name, size in SIZES.items()}
    assert parameters["debug"] < 30_000
    assert parameters["hunyuan_13b"] == pytest.approx(12.8e9, rel=0.01)
