"""Rectified flow: the straight path between data and noise, and what a network says about it.

The direction of time is stated here, once: t = 1 is noise, t = 0 is data.

    x_t = (1 - t) x0 + t eps        v = dx_t/dt = eps - x0
    x0  = x_t - t v                 eps = x_t + (1 - t) v

Times are (b,), one per sample, or a scalar; they are broadcast over every other axis of the arrays, which may have
any rank. Networks are fed 1000 t, which is their own affair. Conversions keep the dtype that promotion gives:
feed float32, since x0 is a difference of large terms near t = 1. Magic 1-For-1 (arXiv 2502.07701) trains and
samples along this path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.shapes import Times

Samples = Float[Array, "b ..."]


def interpolate(x0: Samples, noise: Samples, t: Times) -> Samples:
    """The point x_t at time t on the way from data (t = 0) to noise (t = 1)."""
    t = align(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Samples, noise: Samples) -> Samples:
    """The velocity eps - x0, which is the same along the whole path."""
    return noise - x0


def sample_from_velocity(x: Samples, t: Times, v: Samples) -> Samples:
    """The estimate of the data x0 that a velocity at (x, t) implies."""
    return x - align(t, x) * v


def noise_from_velocity(x: Samples, t: Times, v: Samples) -> Samples:
    """The estimate of the noise eps that a velocity at (x, t) implies."""
    return x + (1 - align(t, x)) * v


def velocity_from_sample(x: Samples, t: Times, x0: Samples, *, minimum_time: float = 0.05) -> Samples:
    """The velocity that an estimate of x0 at (x, t) implies: (x - x0) / t, with t kept above `minimum_time`.

    The floor bounds the division for networks that predict x0; below it the conversion is no longer the exact
    inverse of `sample_from_velocity`.
    """
    return (x - x0) / jnp.maximum(align(t, x), minimum_time)


def draw_noise(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Samples:
    """Standard normal noise of `shape` (b, ...), where no sample depends on its neighbours.

    Args:
      key: one key per sample, shape (b,), or a single key, from which sample i takes `fold_in(key, i)`. Either way
        sample i is the same in a batch of 1 and of 100, and on 1 device and on many.
      shape: the shape of the noise, batch first.
      dtype: a floating-point dtype.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0]))
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys)


def align(t: Times, x: Samples) -> jax.Array:
    """Times, or other values one a sample, with trailing axes of size one, to broadcast over `x` without promotion."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
