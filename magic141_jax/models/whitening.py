"""A start for a transformer's text maps: outputs that are decorrelated and of unit size on captions of the data.

States of a pretrained language model share a large mean and vary in few directions; which verb of motion or colour was
used is a small part of it, that a network fed with plain states takes thousands of steps to hear. Each first map W of
the text is replaced by

    x -> (x - mean) S W,    S ~ (covariance + floor)^(-1/2)

with S scaled so that W is fed with a mean square of 1. It is a start, trained on like any other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.pytree import Params
from magic141_jax.shapes import Pooled, TokenMask, Tokens

WHITENING_FLOOR = 0.01  # of the largest variance: directions far below it carry no word, and stay quiet


def fit_text(params: Params, text: Tokens, mask: TokenMask, pooled: Pooled) -> Params:
    """Returns `params` whose first maps of the text give decorrelated features of unit size on these captions.

    Args:
      params: of a fresh `MMDiT`.
      text (n, s, e), mask (n, s), pooled (n, p): text states of captions of the data.
    """
    weights = mask.astype(jnp.float32)[..., None]
    text = text.astype(jnp.float32)
    means = (text * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
    refiner = params["text_in"] | {"project": _whitened(params["text_in"]["project"], text[mask.astype(bool)])}
    if "pooled" in refiner:
        refiner["pooled"] = refiner["pooled"] | {"up": _whitened(refiner["pooled"]["up"], means)}
    pooled_in = params["pooled_in"] | {"up": _whitened(params["pooled_in"]["up"], pooled.astype(jnp.float32))}
    return params | {"pooled_in": pooled_in, "text_in": refiner}


def _whitened(linear: Params, rows: Float[Array, "n e"]) -> Params:
    """A linear map of whitened rows: outputs of mean 0 and of variance 1 on average, before the map's own bias."""
    mean = rows.mean(0)
    variances, vectors = jnp.linalg.eigh(jnp.cov(rows, rowvar=False))
    gains = jax.lax.rsqrt(jnp.maximum(variances, 0) + WHITENING_FLOOR * variances[-1])
    gains *= jnp.sqrt(len(mean) / jnp.sum(gains**2 * jnp.maximum(variances, 0)))  # lecun kernels keep the mean square
    kernel = vectors @ (gains[:, None] * (vectors.T @ linear["kernel"]))
    return {"kernel": kernel, "bias": linear["bias"] - mean @ kernel}
