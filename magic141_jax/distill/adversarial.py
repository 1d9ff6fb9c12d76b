"""Adversarial distillation: a discriminator of noised latents, its losses, and its gradient penalties.

    x_t  = (1 - t) x0 + t eps where latents are unknown, the clean known ones elsewhere
    D    = mean over heads and unknown tokens of heads(features of a frozen transformer at x_t)

Real and generated latents are noised alike, with the same t and eps, so that nothing but the latents tells them apart;
with time high D judges layout and motion, with time low detail (LADD, arXiv 2403.12015). Over a batch, real first:

    relativistic      D: softplus(-(D(x) - D(g)))              G: softplus(-(D(g) - D(x)))     arXiv 2501.05441, sec. 2
    non_saturating    D: softplus(-D(x)) + softplus(D(g))      G: softplus(-D(g))              arXiv 1406.2661
    hinge             D: relu(1 - D(x)) + relu(1 + D(g))       G: -D(g)                        arXiv 1705.02894

The relativistic loss compares pairs, so that no part of the data can be ceded to one side of a threshold, and converges
with zero-centred gradient penalties on real (R1) and generated (R2) latents. Their second derivatives through a
transformer are spared by a finite difference (arXiv 2501.08316, the approximated R1; 2506.09350 uses it for both):

    R = E_n mean(((D(x + sigma n) - D(x)) / sigma)^2)  ->  mean |grad_x D|^2 for small sigma, n ~ N(0, 1)

Everything here is a function of arrays and knows no role: whoever differentiates says by what.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Conditioning, LatentMask, keep_known
from magic141_jax.models.discriminator import sample_logits
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents, Times

Logits = Float[Array, " b"]
Loss = Callable[[Logits, Logits], jax.Array]
Judge = Callable[[Latents, Times, Conditioning], Logits]
"""D(x_t (b, f, h, w, c), t (b,), conditioning) -> one logit a sample, high where the latents look real."""


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


def noised_latents(x0: Latents, noise: Latents, t: Times, cond: Conditioning) -> Latents:
    """What the discriminator is shown: `x0` at time t, with the clean known latents in their places.

    Nothing of `x0` is seen where latents are known, and no gradient comes from there. A transformer whose known latents
    come on channels of their own was trained with noisy ones here as well; that they are clean now changes the error
    of the embedded default's x0 by no more than 3 % at any time, for one known frame and for two.
    """
    return keep_known(flow.interpolate(x0, noise, t), cond)


def discriminator_fn(
    features_fn: Callable[[Latents, Times, Conditioning], Float[Array, "k b l d"]], heads: Network, heads_params: Params
) -> Judge:
    """D(x_t, t, conditioning) -> (b,): heads on the features of a transformer, one logit a sample.

    Args:
      features_fn: of `mmdit.features_fn`, for the layers of the heads' config. Its transformer stays as it is, unless
        the caller differentiates by its parameters.
      heads, heads_params: `FeatureHeads`.
    """

    def judge(x: Latents, t: Times, cond: Conditioning) -> Logits:
        logits = heads(heads_params, features_fn(x, t, cond), t, cond.pooled)
        return sample_logits(logits, cond.mask, heads.config.patch)

    return judge


def discriminate(
    features_fn: Callable[[Latents, Times, Conditioning], Float[Array, "k b l d"]],
    heads: Network,
    heads_params: Params,
    *,
    x0: Latents,
    noise: Latents,
    t: Times,
    cond: Conditioning,
) -> Logits:
    """The logits (b,) of clean latents `x0`, noised to the times `t` in [0, 1]; see `discriminator_fn`.

    Real and generated latents are to be given the same `noise` and `t`.
    """
    return discriminator_fn(features_fn, heads, heads_params)(noised_latents(x0, noise, t, cond), t, cond)


def gradient_penalty(
    judge: Callable[[Latents], Logits],
    x: Latents,
    key: jax.Array,
    *,
    known: LatentMask,
    logits: Logits | None = None,
    weight: float = 1.0,
    sigma: float = 0.1,
) -> jax.Array:
    """weight * mean(((D(x + sigma n) - D(x)) / sigma)^2): R1 at noised real latents, R2 at noised generated ones.

    One direction n a sample is drawn, so that the mean over keys is weight * mean |grad_x D|^2 up to O(sigma^2). A
    smaller sigma is closer to it, until the difference drowns in rounding: in bfloat16 keep it near 0.1 (with 0.01 a
    tiny transformer gave twice the norm). Where others weigh (D(x + sigma n) - D(x))^2 by lambda, as arXiv 2501.08316
    does, weight = lambda * sigma^2.

    Args:
      judge: D of noised latents alone, such as `lambda x: discriminator(x, t, cond)`.
      x: noised latents (b, f, h, w, c), from `noised_latents`.
      key: one key, or one per sample (`flow.draw_noise`).
      known: one where latents are known: D is not probed there, for generated samples can't differ there.
      logits: D(x) where it is there already, which spares a pass.
    """
    step = flow.draw_noise(key, x.shape, x.dtype) * (1 - known).astype(x.dtype)
    logits = judge(x) if logits is None else logits
    return weight * jnp.mean(jnp.square((judge(x + sigma * step) - logits) / sigma))
