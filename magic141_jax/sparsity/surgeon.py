"""Optimal brain surgery on whole units: what is left of a map is moved to do the work of what goes.

Of a map y = x W with inputs x over calibration samples, H = sum x x^T. Without the rows R of a unit, and with the other
rows moved as is best for sum |x W' - x W|^2, the sum grows by e, and the next unit sees another inverse (Hassibi and
Stork 1993; for units of transformers: ZipLM, arXiv 2302.04089):

    e(R) = tr(W_R^T (H^-1_RR)^-1 W_R)       H^-1 <- H^-1 - H^-1_:R (H^-1_RR)^-1 H^-1_R:       W likewise

The cheapest unit goes, then the next one: neurons that say the same are not both dear, nor both gone. The rows that
stay are solved for once more at the end, from H itself:

    W'_K = W_K + (H_KK)^-1 H_KR W_R
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

DAMPING = 0.01  # of the mean of H's diagonal, added to it: what few samples show of H is not all of it

Kernel = Float[Array, "layers in out"]
Gram = Float[Array, "layers in in"]


@functools.partial(jax.jit, static_argnames=("units", "keep"))
def operate(
    kernels: Sequence[Kernel], grams: Sequence[Gram], *, units: int, keep: int
) -> tuple[Bool[Array, "layers units"], list[Kernel]]:
    """Takes all but `keep` units out of every layer.

    Args:
      kernels: maps whose rows are cut into the same `units`, which share their fate, such as the heads of two streams.
      grams: sums of x x^T over what enters each of them (`calibration.grams`).
      units: how many a layer has; they divide the rows.
      keep: how many stay, at least one.

    Returns:
      Which units stay, and the kernels with zeros in the rows of the others; float32.
    """
    as_float = jax.tree.map(lambda x: x.astype(jnp.float32), (tuple(kernels), tuple(grams)))
    kept, moved = jax.lax.map(lambda layer: _one_layer(*layer, units=units, keep=keep), as_float)
    return kept, list(moved)


def _one_layer(
    kernels: tuple[jax.Array, ...], grams: tuple[jax.Array, ...], *, units: int, keep: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    hessians = [_damped(gram) for gram in grams]

    def take_one(_: int, state: tuple) -> tuple:
        alive, pairs = state
        cheapest = jnp.argmin(jnp.where(alive, sum(_costs(*pair, alive) for pair in pairs), jnp.inf))  # pyright: ignore[reportCallIssue]
        return alive.at[cheapest].set(False), tuple(_without(*pair, cheapest, units) for pair in pairs)  # pyright: ignore[reportCallIssue]

    pairs = tuple((kernel, jnp.linalg.inv(hessian)) for kernel, hessian in zip(kernels, hessians, strict=True))
    alive, _ = jax.lax.fori_loop(0, units - keep, take_one, (jnp.ones(units, bool), pairs))
    moved = (_refitted(*pair, alive) for pair in zip(kernels, hessians, strict=True))
    return alive, tuple(moved)


def _damped(gram: jax.Array) -> jax.Array:
    size = jnp.trace(gram) / len(gram)
    return gram + jnp.where(size > 0, DAMPING * size, 1.0) * jnp.eye(len(gram))


def _costs(kernel: jax.Array, inverse: jax.Array, alive: jax.Array) -> jax.Array:
    """e of each unit; of those that are gone something finite."""
    units, size = len(alive), len(kernel) // len(alive)
    each = jnp.arange(units)
    blocks = inverse.reshape(units, size, units, size)[each, :, each]
    blocks = jnp.where(alive[:, None, None], blocks, jnp.eye(size))
    rows = kernel.reshape(units, size, -1)
    return jnp.sum(rows * jnp.linalg.solve(blocks, rows), axis=(1, 2))


def _without(kernel: jax.Array, inverse: jax.Array, unit: jax.Array, units: int) -> tuple[jax.Array, jax.Array]:
    """The kernel and H^-1 after a unit is gone."""
    size = len(kernel) // units
    own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=unit * size, slice_size=size, axis=0)
    rows = own(inverse)
    share = jnp.linalg.solve(own(rows.T), rows).T
    return kernel - share @ own(kernel), inverse - share @ rows


def _refitted(kernel: jax.Array, hessian: jax.Array, alive: jax.Array) -> jax.Array:
    rows = jnp.repeat(alive, len(kernel) // len(alive))
    system = jnp.where(rows[:, None] & rows[None], hessian, jnp.eye(len(kernel)))
    lost = jnp.where(rows[:, None], hessian @ jnp.where(rows[:, None], 0, kernel), 0)
    return jnp.where(rows[:, None], kernel + jnp.linalg.solve(system, lost), 0)
