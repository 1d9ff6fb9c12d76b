"""Schedules against their formula; which leaves decay; Muon on stacked matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magic141_jax.train import optim


def test_schedule_warms_up_stays_and_falls():
    config = optim.OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay="linear", decay_fraction=0.4)
    rate = optim.make_schedule(config, 100, config.learning_rate)
    np.testing.assert_allclose([rate(n) for n in (0, 4, 9, 59, 80, 100)], [0.2, 1.0, 2.0, 2.0, 1.0, 0.0], atol=1e-6)


def test_cosine_and_constant():
    config = optim.OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_fraction=1.0, final_fraction=0.2)
    rate = optim.make_schedule(config, 100, 1.0)
    np.testing.assert_allclose([rate(0), rate(50), rate(100), rate(200)], [1.0, 0.6, 0.2, 0.2], atol=1e-6)
    constant = optim.make_schedule(optim.OptimizerConfig(decay="constant", warmup_steps=0), 100, 1.0)
    assert constant(0) == constant(100) == 1


def test_only_matrices_decay():
    params = {"a": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}, "scale": jnp.ones((3, 5))}
    assert optim.is_matrix(params) == {"a": {"kernel": True, "bias": False}, "scale": False}
    make = optim.make(optim.OptimizerConfig(weight_decay=0.5, learning_rate=0.1, warmup_steps=0), 100)
    updates, _ = make.transform.update(jax.tree.map(jnp.zeros_like, params), make.transform.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05, rtol=1e-5)
    assert not updates["a"]["bias"].any() and not updates["scale"].any()


def test_clipping_bounds_the_gradient():
    params = {"kernel": jnp.zeros((4, 4))}
    make = optim.make(optim.OptimizerConfig(clip_norm=1.0), 10)
    huge = {"kernel": jnp.full((4, 4), 1e3)}
    state = make.transform.init(params)
    _, state = make.transform.update(huge, state, params)
    mean = optax.tree_utils.tree_get(state, "mu")["kernel"]
    assert float(jnp.linalg.norm(mean)) == pytest.approx(0.1, rel=1e-4)


def test_muon_orthogonalises_each_stacked_matrix():
    params = {
        "blocks": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))},
        "final": {"kernel": jnp.ones((8, 3))},
    }
    config = optim.OptimizerConfig(name="muon", muon_learning_rate=1.0, weight_decay=0, warmup_steps=0, clip_norm=0)
    make = optim.make(config, 10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = make.transform.update(grads, make.transform.init(params), params)
    singular = jnp.linalg.svd(updates["blocks"]["kernel"], compute_uv=False) / (0.2 * 8**0.5)
    assert singular.shape == (2, 8) and singular.min() > 0.5 and singular.max() < 1.5
    assert jnp.abs(updates["final"]["kernel"]).max() < 1e-3, "the network's ends follow AdamW's learning rate"


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="decay_fraction must be between"):
        optim.OptimizerConfig(decay_fraction=1.5)
