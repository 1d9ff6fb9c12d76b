"""The walk of training is the walk of sampling; exits cover the grid; known frames come back clean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import samplers
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.distill import rollout
from magic141_jax.distill.rollout import WalkConfig

SHAPE = (2, 3, 2, 2, 4)


def conditioning(known=0):
    mask = (jnp.arange(3) < known).astype(jnp.float32)[None, :, None, None, None] * jnp.ones((2, 3, 2, 2, 1))
    return Conditioning(jnp.zeros((2, 1, 1)), jnp.ones((2, 1), bool), jnp.zeros((2, 1)), jnp.zeros(SHAPE), mask)


def velocity(x, t, cond):
    return jnp.sin(x) + t[:, None, None, None, None]


def test_the_grid_is_the_published_one():
    np.testing.assert_allclose(WalkConfig().times, [1, 0.9375, 0.8333333, 0.625, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        WalkConfig(steps=0)


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_every_exit_lies_on_a_walk_of_the_sampler(sampler):
    config, cond, data = WalkConfig(sampler=sampler), conditioning(), jnp.zeros(SHAPE)
    draw = jax.jit(lambda key: rollout.start(config, velocity, cond, data, key))
    exits = set()
    for seed in range(12):
        key = jax.random.key(seed)
        x, t = draw(key)
        index = int(jnp.argmin(jnp.abs(config.times - t[0])))
        exits.add(index)
        _, noise_key, step_key = jax.random.split(key, 3)
        noise = rollout.flow.draw_noise(noise_key, SHAPE)
        times = config.times[: index + 1]
        walked = samplers.sample(velocity, cond, noise, times, sampler=sampler, key=step_key) if index else noise
        np.testing.assert_allclose(x, walked, atol=1e-5)
    assert exits == {0, 1, 2, 3}


def test_without_backward_simulation_noised_data_stands_at_the_exit():
    data = jnp.full(SHAPE, 100.0)
    config = WalkConfig(backward_simulation=False, steps=2, shift=1.0)
    for seed in range(6):
        x, t = rollout.start(config, None, conditioning(), data, jax.random.key(seed))
        assert float(t[0]) in (1.0, 0.5)
        assert float(x.mean()) == pytest.approx(100 * (1 - float(t[0])), abs=1)


def test_a_sample_has_a_gradient_and_clean_known_frames():
    data, cond = jax.random.normal(jax.random.key(0), SHAPE), conditioning(known=1)
    x, t = jnp.ones(SHAPE), jnp.array([0.5, 1.0])

    def made(a):
        return rollout.finish(lambda x, t, cond: a * x, cond, data, x, t)

    got = made(0.5)
    np.testing.assert_array_equal(got[:, 0], data[:, 0])
    np.testing.assert_allclose(got[0, 1:], 0.75)
    np.testing.assert_allclose(got[1, 1:], 0.5)
    assert float(jax.grad(lambda a: made(a).sum())(0.5)) == pytest.approx(-(0.5 + 1.0) * 2 * 16)


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_the_end_of_a_walk_has_the_gradient_of_all_its_steps(sampler):
    """By a finite difference of the whole walk, which the detached walk has no part in."""
    config, cond, key = WalkConfig(steps=3, sampler=sampler, judged="end"), conditioning(known=1), jax.random.key(1)
    data = jax.random.normal(jax.random.key(0), SHAPE)

    def made(a):
        return rollout.draw(config, None, lambda x, t, cond: jnp.sin(a * x), cond, data, key=key)

    np.testing.assert_array_equal(made(0.5)[:, 0], data[:, 0])
    whole = rollout.generate(config, lambda x, t, cond: jnp.sin(0.5 * x), cond, SHAPE, key)
    np.testing.assert_allclose(made(0.5)[:, 1:], whole[:, 1:], atol=1e-6)
    numeric = (made(0.5 + 1e-2) - made(0.5 - 1e-2)).sum() / 2e-2
    assert float(jax.grad(lambda a: made(a).sum())(0.5)) == pytest.approx(float(numeric), rel=1e-2)
    with pytest.raises(ValueError, match="needs backward_simulation"):
        WalkConfig(judged="end", backward_simulation=False)


def test_a_prediction_is_drawn_at_an_exit():
    config, cond, data, key = WalkConfig(steps=2), conditioning(), jnp.zeros(SHAPE), jax.random.key(4)
    x, t = rollout.start(config, velocity, cond, data, key)
    drawn = rollout.draw(config, velocity, velocity, cond, data, key=key)
    np.testing.assert_array_equal(drawn, rollout.finish(velocity, cond, data, x, t))


def test_generation_is_the_whole_walk():
    config, cond, key = WalkConfig(steps=3, sampler="euler"), conditioning(), jax.random.key(3)
    made = rollout.generate(config, velocity, cond, SHAPE, key)
    noise = rollout.flow.draw_noise(jax.random.split(key)[0], SHAPE)
    np.testing.assert_allclose(made, samplers.sample(velocity, cond, noise, config.times), atol=1e-6)
    assert config.sampling() == {
        "num_inference_steps": 3,
        "shift": 5.0,
        "sampler": "euler",
        "guidance_scale": 1.0,
    }


def test_a_walks_own_known_frames_may_be_asked_for():
    config, cond, key = WalkConfig(steps=3, sampler="euler"), conditioning(known=1), jax.random.key(3)
    kept, own = (rollout.generate(config, velocity, cond, SHAPE, key, keep=keep) for keep in (True, False))
    assert (kept[:, 0] == 0).all() and (own[:, 0] != 0).all()
    np.testing.assert_array_equal(kept[:, 1:], own[:, 1:])
