"""Velocities and features: both predictions, and a walk whose steps are prepared at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import conditioning, flow, guidance
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.models.seam import features_fn, prepare_walk, velocity_fn, walk_fn
from tests.models.test_mmdit import CONFIG, inputs, random_params


def test_velocity_functions_of_both_predictions_agree():
    """A network that predicts x0 gives the velocity that leads from x to its output."""
    network = Network.create(MMDiT, CONFIG)
    params = random_params(network)
    x, t, text, mask, pooled = inputs(channels=4)
    known, known_mask = conditioning.known_latents(x, 1, 2)
    cond = conditioning.Conditioning(
        text=text, text_mask=mask, pooled=pooled, known=known, mask=known_mask, image_tokens=0
    )
    out = jax.jit(velocity_fn(network, params))(x, t, cond)
    whole = jnp.concatenate([x, known, known_mask], -1)
    plain, names = jax.jit(lambda p: network(p, whole, t, text, mask, pooled, intermediates=True))(params)
    np.testing.assert_allclose(out, plain, atol=2e-5)
    sample = Network.create(MMDiT, dataclasses.replace(CONFIG, prediction="sample"))
    velocity = jax.jit(velocity_fn(sample, params))(x, t, cond)
    np.testing.assert_allclose(flow.sample_from_velocity(x, t, velocity), out, atol=1e-4)
    features = jax.jit(features_fn(network, params, (4, 0)))(x, t, cond)
    np.testing.assert_allclose(features[0], names["single_blocks"][2][:, :8], atol=1e-5)
    np.testing.assert_allclose(features[1], names["double_blocks.video"][0], atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"known": "replace", "in_channels": 4, "guidance_embedding": True}])
def test_a_walk_prepared_at_once_has_the_velocities_of_its_times(fields):
    """Over 9 times, more than are prepared in one batch, and through both branches of guidance."""
    network = Network.create(MMDiT, dataclasses.replace(CONFIG, prediction="sample", **fields))
    params, embedded = random_params(network), 3.0 if fields else None
    x, _, text, mask, pooled = inputs(channels=4)
    cond = conditioning.Conditioning(text, mask, pooled, *conditioning.known_latents(x[::-1], 1, 2))
    negative = dataclasses.replace(cond, text=-text, pooled=-pooled)
    times = jnp.linspace(1, 0.1, 9)

    def walked(params):
        steps = prepare_walk(network, params, guidance.joined(cond, negative), times, guidance=embedded)
        velocity = walk_fn(network, params, steps, times)
        velocity = guidance.guided(velocity, negative, 2.0)
        return jax.lax.map(lambda t: velocity(x, jnp.full(2, t), cond), times)

    def one_by_one(params):
        velocity = guidance.guided(velocity_fn(network, params, guidance=embedded), negative, 2.0)
        return jax.lax.map(lambda t: velocity(x, jnp.full(2, t), cond), times)

    made, wanted = jax.jit(walked)(params), jax.jit(one_by_one)(params)
    assert jnp.abs(wanted[1:] - wanted[:-1]).max() > 0.1, "times matter"
    np.testing.assert_allclose(made, wanted, atol=1e-4, rtol=1e-4)
