"""Shifted grids against the published ones, and the moments of the training densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion.timesteps import TimeDensity, dynamic_shift, grid, shift_times
from magic141_jax.errors import UserError


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (1, [1, 0.75, 0.5, 0.25, 0]),
        (5, [1, 0.9375, 0.8333333, 0.625, 0]),
        (7, [1, 0.9545454, 0.875, 0.7, 0]),
        (17, [1, 51 / 52, 17 / 18, 17 / 20, 0]),
    ],
)
def test_four_step_grids(shift, expected):
    np.testing.assert_allclose(grid(4, shift), expected, atol=1e-6)


def test_shift_keeps_the_ends_and_the_order_and_has_an_inverse():
    t = jnp.linspace(0, 1, 33)
    for shift in (0.5, 3.0, 8.0):
        warped = shift_times(t, shift)
        assert warped[0] == 0 and warped[-1] == 1
        assert jnp.all(jnp.diff(warped) > 0)
        np.testing.assert_allclose(shift_times(warped, 1 / shift), t, atol=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(0, 5), (-1, 5), (4, 0), (4, -1), (4, float("nan"))])
def test_impossible_grids_are_refused(steps, shift):
    with pytest.raises(UserError):
        grid(steps, shift)


def test_uniform_density_after_the_shift():
    u = TimeDensity("uniform", shift=1).draw(jax.random.key(0), (40000,))
    assert abs(u.mean() - 1 / 2) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    shifted = TimeDensity("uniform", shift=5).draw(jax.random.key(0), (40000,))
    np.testing.assert_allclose(shifted, shift_times(u, 5.0), atol=1e-6)
    # The median of a monotone function of u is the function at 1/2: 5/2 over 3.
    assert abs(jnp.median(shifted) - 5 / 6) < 0.005


def test_logit_normal_moments():
    t = TimeDensity("logit_normal", mean=0.5, std=1.5).draw(jax.random.key(1), (40000,))
    logits = jnp.log(t / (1 - t))
    assert abs(logits.mean() - 0.5) < 0.03 and abs(logits.std() - 1.5) < 0.03
    assert t.min() > 0 and t.max() < 1


def test_shifting_a_logit_normal_moves_its_mean_by_the_logarithm():
    # logit(shift(t)) = logit(t) + log s, so a shift is a change of `mean`.
    a = TimeDensity("logit_normal", shift=3).draw(jax.random.key(2), (100,))
    b = TimeDensity("logit_normal", mean=float(np.log(3))).draw(jax.random.key(2), (100,))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [{"kind": "normal"}, {"std": 0.0}, {"shift": -1.0}])
def test_bad_densities_are_refused(bad):
    with pytest.raises(ValueError):
        TimeDensity(**bad)


def test_dynamic_shift_grows_with_the_image():
    assert dynamic_shift(256) == pytest.approx(np.exp(0.5)) and dynamic_shift(4096) == pytest.approx(np.exp(1.15))
    middle = dynamic_shift(30, base_shift=1.0, max_shift=3.0, base_tokens=20, max_tokens=40)
    assert middle == pytest.approx(np.exp(2.0))
    with pytest.raises(UserError, match="must differ"):
        dynamic_shift(30, base_tokens=256, max_tokens=256)
