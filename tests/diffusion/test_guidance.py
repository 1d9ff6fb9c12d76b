"""The convention of guidance on a linear toy, and what each branch sees."""

import jax.numpy as jnp
import numpy as np

from magic141_jax.diffusion.conditioning import Conditioning, known_latents
from magic141_jax.diffusion.guidance import guided

B = 2
X, T = jnp.ones((B, 1, 2, 2, 3)), jnp.array([0.2, 0.9])


def make(image: float, text: float, image_tokens: int = 1) -> Conditioning:
    tokens = jnp.concatenate([jnp.full((B, image_tokens, 4), image), jnp.full((B, 2, 4), text)], axis=1)
    mask = jnp.ones(tokens.shape[:2], bool)
    return Conditioning(tokens, mask, jnp.full((B, 4), text), *known_latents(X, 0, 1), image_tokens=image_tokens)


def velocity(x, t, cond):
    """Linear in the image token, the text and the pooled vector, with weights that tell them apart."""
    n = cond.image_tokens
    level = 100 * cond.text[:, :n].mean((1, 2)) + cond.text[:, n:].mean((1, 2)) + 10 * cond.pooled.mean(1)
    return x * (t + level)[:, None, None, None, None]


def test_scale_one_is_the_conditional_velocity():
    cond, negative = make(5, 2), make(5, 1)
    assert guided(velocity, negative, 1.0) is velocity
    traced = guided(velocity, negative, jnp.float32(1))(X, T, cond)
    np.testing.assert_allclose(traced, velocity(X, T, cond), rtol=1e-6)


def test_convention_on_a_linear_toy():
    cond, negative = make(5, 2), make(5, 1)
    for scale in (0.0, 0.5, 3.0):
        expected = T + 500 + 11 * (1 + scale * (2 - 1))
        np.testing.assert_allclose(guided(velocity, negative, scale)(X, T, cond)[:, 0, 0, 0, 0], expected, rtol=1e-6)


def test_scale_per_sample():
    cond, negative = make(5, 2), make(5, 1)
    both = guided(velocity, negative, jnp.array([2.0, 4.0]))(X, T, cond)
    for i, scale in enumerate((2.0, 4.0)):
        np.testing.assert_allclose(both[i], guided(velocity, negative, scale)(X, T, cond)[i], rtol=1e-6)


def test_negative_branch_keeps_the_image_tokens_and_known_latents_of_the_call():
    cond = make(5, 2)
    # The negative conditioning carries another image and another count of image tokens: only its text may count.
    negative = make(77, 1, image_tokens=3)
    seen = []

    def spy(x, t, cond):
        seen.append(cond)
        return velocity(x, t, cond)

    guided(spy, negative, 2.0)(X, T, cond)
    (both,) = seen
    assert both.image_tokens == 1 and both.text.shape == (2 * B, 3, 4)
    assert both.text[:, 0, 0].tolist() == [5, 5, 5, 5]
    assert both.text[:, 1, 0].tolist() == [2, 2, 1, 1]
    np.testing.assert_array_equal(both.known[:B], both.known[B:])
