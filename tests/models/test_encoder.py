"""The scanned stack: it equals a loop over its layers, and what is masked is never seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.models.encoder import Encoder, EncoderConfig, EncoderLayer
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten

MASK = np.array([[True] * 5, [True, True, True, False, False]])


def tokens(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 5, 8))


def stack(pre_norm):
    config = EncoderConfig(layers=3, width=8, heads=2, mlp=16, pre_norm=pre_norm)
    network = Network.create(Encoder, config)
    return config, jax.jit(network.__call__), network.init(jax.random.key(1))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_scan_equals_a_loop_over_the_layers(pre_norm):
    config, network, params = stack(pre_norm)
    layer = jax.jit(Network.create(EncoderLayer, config).__call__)
    looped = tokens()
    for i in range(config.layers):
        looped = layer(jax.tree.map(lambda p, i=i: p[i], params["layers"]), looped, MASK)
    np.testing.assert_allclose(network(params, tokens(), MASK), looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_masked_tokens_are_never_seen(pre_norm):
    _, network, params = stack(pre_norm)
    other = jnp.where(MASK[..., None], tokens(), 100 * tokens(2))
    a, b = (np.asarray(network(params, x, MASK)) for x in (tokens(), other))
    np.testing.assert_allclose(a[MASK], b[MASK], rtol=1e-5, atol=1e-5)
    unmasked = np.asarray(network(params, tokens(), np.ones_like(MASK)))
    assert np.abs(a - unmasked)[1, :3].max() > 1e-3


def test_a_causal_stack_never_looks_ahead():
    config = EncoderConfig(layers=2, width=8, heads=2, mlp=16, activation="quick_gelu", causal=True)
    network = Network.create(Encoder, config)
    apply, params = jax.jit(network.__call__), network.init(jax.random.key(1))
    a, b = (np.asarray(apply(params, x, np.ones_like(MASK))) for x in (tokens(), tokens().at[:, 3:].set(1.0)))
    np.testing.assert_allclose(a[:, :3], b[:, :3], rtol=1e-5, atol=1e-5)
    assert np.abs(a - b)[:, 3:].max(-1).min() > 1e-3


def test_layers_are_drawn_differently():
    _, _, params = stack(True)
    kernel = flatten(params)["layers.q.kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_post_norm_output_is_normalised_whatever_the_scale_of_the_input():
    _, network, params = stack(False)
    out = network(params, 50 * tokens(), MASK)
    np.testing.assert_allclose(out.std(-1), 1, rtol=1e-3)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="divisible by the heads"):
        EncoderConfig(width=10, heads=3)
