"""Classifier-free guidance (arXiv 2207.12598) as a wrapper around a velocity function.

    v = v_u + scale (v_c - v_u)

so that scale 1 is the conditional velocity alone and 0 the negative one. (Some code counts the extra weight
instead: w = scale - 1.) Guidance is linear, hence the same in v, x0 and eps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion.conditioning import Conditioning, Velocity, replace_text
from magic141_jax.shapes import Latents, Times


def guided(velocity: Velocity, negative: Conditioning, scale: float | Float[Array, " b"]) -> Velocity:
    """Guides `velocity` away from the negative text; both branches run as one batch of 2b.

    Args:
      velocity: the velocity to wrap.
      negative: whose text part and pooled vector make the negative branch. Everything else in that branch (image
        tokens, known latents, mask) is taken from the conditioning of each call. Its text has the same length.
      scale: one number, or one per sample. The Python number 1 costs nothing: `velocity` itself is returned.
    """
    if isinstance(scale, int | float) and scale == 1:
        return velocity

    both = branches(velocity, negative)

    def guided_velocity(x: Latents, t: Times, cond: Conditioning) -> Latents:
        v_cond, v_negative = both(x, t, cond)
        w = jnp.asarray(scale, v_cond.dtype)
        return v_negative + w.reshape(w.shape + (1,) * (v_cond.ndim - w.ndim)) * (v_cond - v_negative)

    return guided_velocity


def branches(velocity: Velocity, negative: Conditioning) -> Callable[..., tuple[Latents, Latents]]:
    """(x, t, cond) -> the velocity with the text of `cond` and the one with that of `negative`, run as one batch."""

    def both_velocities(x: Latents, t: Times, cond: Conditioning) -> tuple[Latents, Latents]:
        both = joined(cond, negative)
        v_cond, v_negative = jnp.split(velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        return v_cond, v_negative

    return both_velocities


def joined(cond: Conditioning, negative: Conditioning) -> Conditioning:
    """The batch of 2b of both branches: `cond`, and behind it the same with the text of `negative`."""
    n = negative.image_tokens
    other = replace_text(cond, negative.text[:, n:], negative.text_mask[:, n:], negative.pooled)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, other)
