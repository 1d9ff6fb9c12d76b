"""Which times are trained on, and which are visited in sampling.

Both are warped by the same shift, which moves times toward noise where large latents need them:

    shift(t) = s t / (1 + (s - 1) t)

Training draws u from a density (uniform, or logit-normal: sigmoid of a normal) and shifts it. Sampling walks
linspace(1, 0, steps + 1), shifted: with 4 steps and s = 5 the grid of Magic 1-For-1's released sampler
(arXiv 2502.07701), [1, .9375, .8333, .625, 0]. A network made for images of many sizes may ask for a shift that
grows with the image: `dynamic_shift`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from magic141_jax.errors import UserError

T = TypeVar("T", float, np.ndarray, jax.Array)


def shift_times(t: T, shift: float) -> T:
    """Warps times in [0, 1], keeping 0 and 1: s t / (1 + (s - 1) t); s = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def grid(steps: int, shift: float) -> Float[Array, " steps+1"]:
    """The times of a sampler, falling from 1 (noise) to 0 (data), `steps + 1` of them.

    Raises:
      UserError: steps is below 1, or the shift is not positive.
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps; at least 1 is needed")
    if not shift > 0:
        raise UserError(f"the time shift is {shift}; it must be positive (1 shifts nothing)")
    return jnp.asarray(shift_times(np.linspace(1.0, 0.0, steps + 1), shift), jnp.float32)


def dynamic_shift(
    tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096
) -> float:
    """The shift for an image of `tokens` tokens: s = exp(mu), mu linear in the tokens (FLUX.1 dev's, by default).

    Args:
      tokens: patches of the latents; 4096 for an image of 1024 x 1024 pixels.
      base_shift: mu at `base_tokens`.
      max_shift: mu at `max_tokens`; larger images follow the same line.
      base_tokens: see `base_shift`.
      max_tokens: see `max_shift`.

    Raises:
      UserError: base_tokens equals max_tokens.
    """
    if base_tokens == max_tokens:
        raise UserError(f"base_tokens and max_tokens are both {base_tokens}; they must differ")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


@dataclasses.dataclass(frozen=True)
class TimeDensity:
    """The density of training times; `mean` and `std` are those of the normal under the sigmoid (logit_normal)."""

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _DRAWS:
            raise ValueError(f"kind is {self.kind!r}, known: {', '.join(_DRAWS)}")
        if not (self.std > 0 and self.shift > 0):
            raise ValueError(f"std and shift must be positive, got std={self.std}, shift={self.shift}")

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Draws float32 times in [0, 1] of the given shape."""
        return shift_times(_DRAWS[self.kind](self, key, shape), self.shift)


def _uniform(density: TimeDensity, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    del density
    return jax.random.uniform(key, shape)


def _logit_normal(density: TimeDensity, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.nn.sigmoid(density.mean + density.std * jax.random.normal(key, shape))


_DRAWS = {"uniform": _uniform, "logit_normal": _logit_normal}
