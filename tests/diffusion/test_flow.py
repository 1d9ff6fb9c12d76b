"""The straight path: its ends, its inverses, its direction, and noise that knows no batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import flow

KEYS = jax.random.split(jax.random.key(0), 3)
X0 = jax.random.normal(KEYS[0], (4, 2, 3, 3, 5))
NOISE = jax.random.normal(KEYS[1], X0.shape)
TIMES = jnp.array([0.1, 0.4, 0.7, 1.0])


def test_time_zero_is_data_and_time_one_is_noise():
    np.testing.assert_array_equal(flow.interpolate(X0, NOISE, jnp.zeros(4)), X0)
    np.testing.assert_array_equal(flow.interpolate(X0, NOISE, jnp.ones(4)), NOISE)


def test_velocity_is_the_derivative_of_the_path():
    def path(t):
        return flow.interpolate(X0, NOISE, t * jnp.ones(4))

    _, derivative = jax.jvp(path, (0.3,), (1.0,))
    np.testing.assert_allclose(derivative, flow.velocity_target(X0, NOISE), atol=1e-6)


def test_velocity_gives_back_data_and_noise():
    x, v = flow.interpolate(X0, NOISE, TIMES), flow.velocity_target(X0, NOISE)
    np.testing.assert_allclose(flow.sample_from_velocity(x, TIMES, v), X0, atol=1e-6)
    np.testing.assert_allclose(flow.noise_from_velocity(x, TIMES, v), NOISE, atol=1e-6)


def test_sample_and_velocity_are_inverse_above_the_floor():
    x = flow.interpolate(X0, NOISE, TIMES)
    v = flow.velocity_from_sample(x, TIMES, X0)
    np.testing.assert_allclose(v, flow.velocity_target(X0, NOISE), atol=1e-5)
    np.testing.assert_allclose(flow.sample_from_velocity(x, TIMES, v), X0, atol=1e-6)


def test_velocity_from_sample_is_bounded_at_time_zero():
    v = flow.velocity_from_sample(X0 + 1, jnp.zeros(4), X0, minimum_time=0.1)
    np.testing.assert_allclose(v, 10 * jnp.ones_like(X0), rtol=1e-5)


def test_each_sample_has_its_own_time():
    whole = flow.interpolate(X0, NOISE, TIMES)
    for i, t in enumerate(TIMES):
        np.testing.assert_array_equal(whole[i], flow.interpolate(X0[i : i + 1], NOISE[i : i + 1], t)[0])


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_noise_does_not_depend_on_the_batch(make):
    many, one = (flow.draw_noise(make(3), (n, 2, 3)) for n in (5, 1))
    np.testing.assert_array_equal(many[:1], one)
    assert np.unique(np.asarray(many)).size == many.size

    keys = jnp.stack([make(seed) for seed in (7, 8, 9)])
    drawn = flow.draw_noise(keys, (3, 4))
    shuffled = flow.draw_noise(keys[::-1], (3, 4))
    np.testing.assert_array_equal(drawn, shuffled[::-1])


def test_noise_is_the_same_on_one_device_and_on_eight():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def draw(key):
        return flow.draw_noise(key, (8, 4, 4))

    sharded = jax.jit(draw, out_shardings=over)(jax.random.key(1))
    np.testing.assert_array_equal(sharded, draw(jax.random.key(1)))


def test_noise_is_standard_normal():
    noise = flow.draw_noise(jax.random.key(0), (50, 2000))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
