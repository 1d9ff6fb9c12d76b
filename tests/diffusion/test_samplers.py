"""Samplers against closed forms.

For data N(mu, sigma^2) the path has x_t ~ N((1-t) mu, V(t)), V = (1-t)^2 sigma^2 + t^2, and the velocity is
v(x, t) = -mu + (t - (1-t) sigma^2) / V (x - (1-t) mu). Its flow maps noise z to mu + sigma z exactly.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Conditioning, known_latents
from magic141_jax.diffusion.samplers import sample
from magic141_jax.diffusion.timesteps import grid
from magic141_jax.errors import UserError

MU, SIGMA = 1.5, 0.5
SHAPE = (4, 3, 2, 2, 5)
NOISE = flow.draw_noise(jax.random.key(0), SHAPE)


def conditioning(shape=SHAPE, count=0) -> Conditioning:
    b, f = shape[:2]
    known, mask = known_latents(jnp.full(shape, 0.123, jnp.float32), count, f)
    return Conditioning(jnp.zeros((b, 1, 2)), jnp.ones((b, 1), bool), jnp.zeros((b, 2)), known, mask)


def column(t):
    return t[:, None, None, None, None]


def gaussian_velocity(x, t, cond):
    """The posterior mean of eps - x0."""
    t = column(t)
    variance = (1 - t) ** 2 * SIGMA**2 + t**2
    return -MU + (t - (1 - t) * SIGMA**2) / variance * (x - (1 - t) * MU)


def generator_velocity(x, t, cond):
    """A perfect few-step generator: its x0 is where the flow of `gaussian_velocity` ends."""
    t = column(t)
    x0 = MU + SIGMA * (x - (1 - t) * MU) / jnp.sqrt((1 - t) ** 2 * SIGMA**2 + t**2)
    return (x - x0) / t


def error(sampler, steps):
    x = jax.jit(lambda z: sample(gaussian_velocity, conditioning(), z, grid(steps, 1.0), sampler=sampler))(NOISE)
    return float(jnp.abs(x - (MU + SIGMA * NOISE)).max())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order):
    errors = [error(sampler, steps) for steps in (16, 32, 64)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.35), (errors, rates)


def test_many_euler_steps_give_the_mean_and_std_of_the_data():
    noise = flow.draw_noise(jax.random.key(1), (8, 1, 32, 32, 4))
    x = sample(gaussian_velocity, conditioning(noise.shape), noise, grid(200, 1.0))
    assert abs(float(x.mean()) - MU) < 0.02 and abs(float(x.std()) - SIGMA) < 0.02


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoise_keeps_the_marginal_of_a_perfect_generator(steps):
    noise = flow.draw_noise(jax.random.key(1), (8, 1, 32, 32, 4))
    cond = conditioning(noise.shape)
    x = sample(generator_velocity, cond, noise, grid(steps, 5.0), sampler="renoise", key=jax.random.key(2))
    assert abs(float(x.mean()) - MU) < 0.02 and abs(float(x.std()) - SIGMA) < 0.02
    if steps > 1:
        correlation = np.corrcoef(np.ravel(x), np.ravel(noise))[0, 1]
        assert correlation < 0.99, "fresh noise must have been used"


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_one_step_of_a_perfect_generator_is_exact(sampler):
    x = sample(generator_velocity, conditioning(), NOISE, grid(1, 5.0), sampler=sampler, key=jax.random.key(0))
    np.testing.assert_allclose(x, MU + SIGMA * NOISE, atol=1e-5)


def test_scan_equals_a_python_loop():
    times = grid(5, 3.0)
    x = NOISE
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * gaussian_velocity(x, jnp.full(SHAPE[:1], t), None)
    np.testing.assert_allclose(sample(gaussian_velocity, conditioning(), NOISE, times), x, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "renoise"])
def test_known_frames_come_out_as_put_in(sampler):
    cond = conditioning(count=jnp.array([0, 1, 2, 3]))
    x = sample(gaussian_velocity, cond, NOISE, grid(3, 5.0), sampler=sampler, key=jax.random.key(0))
    is_known = np.broadcast_to(cond.mask > 0, SHAPE)
    np.testing.assert_array_equal(x[is_known], cond.known[is_known])
    assert (np.abs(x[~is_known] - 0.123) > 1e-6).all()


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_a_sample_does_not_depend_on_its_batch(sampler):
    keys = jax.vmap(jax.random.key)(jnp.arange(4))

    def run(keys, cond):
        return sample(
            gaussian_velocity,
            cond,
            flow.draw_noise(keys, (len(keys), *SHAPE[1:])),
            grid(4, 5.0),
            sampler=sampler,
            key=keys,
        )

    many = run(keys, conditioning())
    alone = run(keys[2:3], conditioning((1, *SHAPE[1:])))
    np.testing.assert_allclose(many[2], alone[0], atol=1e-6)


def test_one_key_serves_the_first_samples_of_any_batch():
    def run(b):
        return sample(
            gaussian_velocity,
            conditioning((b, *SHAPE[1:])),
            NOISE[:b],
            grid(3, 5.0),
            sampler="renoise",
            key=jax.random.key(4),
        )

    np.testing.assert_allclose(run(4)[:2], run(2), atol=1e-6)


def test_heun_ends_with_an_euler_step_and_never_asks_for_time_zero():
    def velocity(x, t, cond):
        return jnp.where(column(t) > 0, gaussian_velocity(x, t, cond), jnp.nan)

    assert bool(jnp.isfinite(sample(velocity, conditioning(), NOISE, grid(3, 1.0), sampler="heun")).all())


def test_bfloat16_velocity_and_noise():
    def velocity(x, t, cond):
        return gaussian_velocity(x, t, cond).astype(jnp.bfloat16)

    assert sample(velocity, conditioning(), NOISE, grid(2, 1.0)).dtype == jnp.float32
    assert sample(velocity, conditioning(), NOISE.astype(jnp.bfloat16), grid(2, 1.0)).dtype == jnp.bfloat16


def test_callback_sees_every_step_under_jit():
    seen = {}

    def callback(step, time, latents):
        seen[int(step)] = (float(time), np.array(latents))

    times = grid(3, 5.0)
    out = jax.jit(lambda z: sample(gaussian_velocity, conditioning(), z, times, callback=callback))(NOISE)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2]
    np.testing.assert_allclose([seen[i][0] for i in range(3)], times[1:], atol=1e-6)
    np.testing.assert_array_equal(seen[2][1], out)


def test_bad_calls_are_refused():
    with pytest.raises(UserError, match="'euler'"):
        sample(gaussian_velocity, conditioning(), NOISE, grid(2, 1.0), sampler="eular")
    with pytest.raises(ValueError, match="key"):
        sample(gaussian_velocity, conditioning(), NOISE, grid(2, 1.0), sampler="renoise")
