"""Losses by their definitions; whom they pull where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.train.adversarial import ADVERSARIAL_LOSSES

REAL, FAKE = np.array([0.3, -2.0, 4.0]), np.array([1.0, -1.5, 0.5])
EXPECTED = {
    "relativistic": (np.log1p(np.exp(FAKE - REAL)).mean(), np.log1p(np.exp(REAL - FAKE)).mean()),
    "non_saturating": (
        -np.log(1 / (1 + np.exp(-REAL))).mean() - np.log(1 - 1 / (1 + np.exp(-FAKE))).mean(),
        -np.log(1 / (1 + np.exp(-FAKE))).mean(),
    ),
    "hinge": (np.maximum(0, 1 - REAL).mean() + np.maximum(0, 1 + FAKE).mean(), -FAKE.mean()),
}


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_are_their_definitions(name):
    for loss, want in zip(ADVERSARIAL_LOSSES[name], EXPECTED[name]):
        np.testing.assert_allclose(loss(jnp.asarray(REAL), jnp.asarray(FAKE)), want, rtol=1e-6)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_losses_pull_to_their_own_sides_and_stay_finite(name):
    discriminator, generator = ADVERSARIAL_LOSSES[name]
    real, fake = jnp.array([0.1, -0.5]), jnp.array([0.2, -0.3])
    up, down = jax.grad(discriminator, argnums=(0, 1))(real, fake)
    assert (up < 0).all() and (down > 0).all()
    assert (jax.grad(generator, argnums=1)(real, fake) < 0).all()
    lost = jnp.array([-1e4]), jnp.array([1e4])
    assert all(jnp.isfinite(g).all() for loss in (discriminator, generator) for g in jax.grad(loss, (0, 1))(*lost))
    assert jnp.abs(jax.grad(generator, argnums=1)(lost[1], lost[0])) > 0.5, "found out, it still has a gradient"
