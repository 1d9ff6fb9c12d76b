"""How far two samplers are apart on the same captions, first frames and noise, and how sure that is.

Of every caption under every seed there are two values, the later row's and the first one's. Captions differ far more
than samplers do, so what is resampled are pairs (the bootstrap, Efron 1979): as many as there are, with replacement,
and of both means what is asked (a difference, a ratio). The interval holds the middle 95 % of the resampled values.

It covers the draw of captions, first frames and noises, and not that of a training: two students of one config and
other seeds may be further apart. Where no pair differs, the interval has no width, which is no certainty either: with
n pairs, up to some 3 / n of all captions may still differ (the rule of three).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
SEED = 141  # of the resampling: the same values have the same interval


class Interval(NamedTuple):
    """What two rows' means give, the ends of its interval (nan for fewer than two pairs), and the number of pairs."""

    value: float
    low: float
    high: float
    pairs: int


def difference(a: float, b: float) -> float:
    """Of two means: a - b."""
    return a - b


def interval(
    values: Sequence[float], firsts: Sequence[float], of: Callable[[float, float], float] = difference
) -> Interval:
    """The bootstrap interval of `of(mean of values, mean of firsts)` over pairs, in a fixed draw.

    Args:
      values: (n,) of the later row.
      firsts: (n,) of the first row, in the same order. A pair with a nan is left out.
      of: what is made of two means.

    Raises:
      ValueError: the two differ in length.
    """
    both = np.stack([np.asarray(values, np.float64), np.asarray(firsts, np.float64)])
    both = both[:, np.isfinite(both).all(0)]
    pairs = both.shape[1]
    if not pairs:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(of(*both.mean(1)))
    if pairs < 2:
        return Interval(value, math.nan, math.nan, pairs)
    counts = np.random.default_rng(SEED).multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)
    drawn = [of(a, b) for a, b in counts @ both.T / pairs]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), pairs)
