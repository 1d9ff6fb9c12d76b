"""What a discriminator D and a generator G play for, by the logits of real samples x and generated ones g beside them.

    relativistic      D: softplus(-(D(x) - D(g)))              G: softplus(-(D(g) - D(x)))     arXiv 2501.05441, sec. 2
    non_saturating    D: softplus(-D(x)) + softplus(D(g))      G: softplus(-D(g))              arXiv 1406.2661
    hinge             D: relu(1 - D(x)) + relu(1 + D(g))       G: -D(g)                        arXiv 1705.02894

The relativistic loss compares pairs, so that no part of the data can be ceded to one side of a threshold. Logits have
any shape, the same for both sides; losses are means.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Logits = Float[Array, "..."]
Loss = Callable[[Logits, Logits], jax.Array]


def relativistic_discriminator(real: Logits, fake: Logits) -> jax.Array:
    """Each real sample is to be told from the generated one beside it, best of the same prompt."""
    return jnp.mean(jax.nn.softplus(fake - real))


def relativistic_generator(real: Logits, fake: Logits) -> jax.Array:
    """The discriminator's loss with the sides exchanged."""
    return relativistic_discriminator(fake, real)


def non_saturating_discriminator(real: Logits, fake: Logits) -> jax.Array:
    """The cross entropy of real against generated."""
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def non_saturating_generator(real: Logits, fake: Logits) -> jax.Array:
    """-log of the probability that generated samples are real; its gradient stays where they are found out."""
    del real
    return jnp.mean(jax.nn.softplus(-fake))


def hinge_discriminator(real: Logits, fake: Logits) -> jax.Array:
    """Samples on the right side of a margin of 1 count no more."""
    return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))


def hinge_generator(real: Logits, fake: Logits) -> jax.Array:
    """The logit itself."""
    del real
    return -jnp.mean(fake)


# Name -> (the discriminator's loss, the generator's loss), both of the logits of (real, generated) samples
ADVERSARIAL_LOSSES: dict[str, tuple[Loss, Loss]] = {
    "relativistic": (relativistic_discriminator, relativistic_generator),
    "non_saturating": (non_saturating_discriminator, non_saturating_generator),
    "hinge": (hinge_discriminator, hinge_generator),
}
