"""Pictures of how training goes: a few clips of the data beside what the present weights make of them.

autoencoding                   [clip | reconstruction]
flow matching, distillation    [decoded latents | the method's own samples of the same captions and first frames]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Frames
from magic141_jax.train.autoencoding import VAE, Autoencoding
from magic141_jax.train.conditioner import as_float
from magic141_jax.train.method import Method

Preview = Callable[[Mapping[str, Params], Mapping[str, Any]], Float[Array, "b t y 2*x 3"]]


def reconstruction(method: Autoencoding) -> Preview:
    """A jitted function (params by role, raw record) -> clips beside their reconstructions, in [0, 1]."""

    def preview(params: Mapping[str, Params], record: Mapping[str, Any]) -> Frames:
        clips = as_float(record["frames"])
        mean, _ = method.vae(params[VAE], 2 * clips - 1, method="encode")
        restored = (method.vae(params[VAE], mean, method="decode") + 1) / 2
        return jnp.concatenate([clips, jnp.clip(restored, 0, 1)], axis=3)

    return jax.jit(preview)


def generation(method: Method, vae: Network, vae_params: Params, *, seed: int) -> Preview:
    """A jitted function (params by role, latent record) -> decoded clips beside samples, in [0, 1].

    The method must be able to `sample`, see `train/method.py`.
    """

    @jax.jit
    def preview(params: Mapping[str, Params], record: Mapping[str, Any], vae_params: Params) -> Frames:
        like = method.sampled(record) if hasattr(method, "sampled") else record  # pyright: ignore[reportAttributeAccessIssue]
        latents = like["latents"].astype(jnp.float32)
        made = method.sample(params, record, jax.random.key(seed), known=method.config.shown(latents.shape[1]))  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.concatenate([vae(vae_params, x, method="decode_latents") for x in (latents, made)], axis=3)

    return lambda params, record: preview({**method.frozen, **params}, record, vae_params)
