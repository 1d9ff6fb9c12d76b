"""Intervals against closed forms: coverage of a known difference, narrower than that of unpaired values."""

import math

import numpy as np
import pytest

from magic141_jax.evaluation.paired import interval


def test_a_constant_difference_has_no_width():
    firsts = np.arange(20.0)
    assert interval(firsts + 0.5, firsts) == pytest.approx((0.5, 0.5, 0.5, 20))


def test_the_interval_is_that_of_the_mean_of_differences():
    """For many pairs the bootstrap agrees with the normal interval, mean ± 1.96 deviation / sqrt(n)."""
    rng = np.random.default_rng(0)
    firsts = rng.normal(0, 10, 1000)  # captions differ far more than rows do
    values = firsts + rng.normal(0.3, 1, 1000)
    found, d = interval(values, firsts), values - firsts
    half = 1.96 * d.std(ddof=1) / math.sqrt(1000)
    assert found.value == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)
    shuffled = interval(rng.permutation(values), firsts)
    assert shuffled.high - shuffled.low > 8 * (found.high - found.low)


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        firsts = rng.random(48) < 0.7
        values = np.where(rng.random(48) < 0.3, rng.random(48) < 0.7, firsts)
        found = interval(values, firsts)
        covered.append(found.low <= 0 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_ratios_are_of_means():
    found = interval([1.0, 3.0, 2.0], [2.0, 2.0, 4.0], lambda a, b: 100 * a / b)
    assert found.value == pytest.approx(75) and found.low < 75 < found.high


def test_what_is_no_number_is_left_out():
    assert interval([1, math.nan, 3, 4], [0, 0, math.nan, 1]).pairs == 2
    alone = interval([1.0], [0.5])
    assert (alone.value, alone.pairs, math.isnan(alone.low)) == (0.5, 1, True)
    assert interval([], []).pairs == 0 and math.isnan(interval([], []).value)
    with pytest.raises(ValueError):
        interval([1.0, 2.0], [1.0])
