"""The seams between the transformer and what knows nothing of it: velocities for `diffusion/`, features for a critic.

Each is a function of (x, t, conditioning), made for a network and its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.models.mmdit import Prepared
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents, Times

TIMES_AT_ONCE = 8  # of a walk, for which text is refined in one batch


def velocity_fn(network: Network, params: Params, *, guidance: Times | float | None = None) -> Callable[..., Latents]:
    """The seam to `diffusion/`: velocity(x (b, f, h, w, c), t (b,), conditioning) -> v of x's shape.

    `guidance` is the scale handed to a network with a guidance embedding, or one per sample.
    """
    call = _seam(network, params, guidance, False)
    return lambda x, t, cond: _as_velocity(network, x, t, call(x, t, cond))


def prepare_walk(
    network: Network,
    params: Params,
    told: Conditioning,
    times: Float[Array, " n"],
    *,
    guidance: Times | float | None = None,
) -> Prepared:
    """What depends on the times of a walk and on its text alone, for all of its steps: a leading axis n."""

    def prepare(t: Array) -> Prepared:
        many = jnp.broadcast_to(t, told.text.shape[:1])
        scales = _scales(guidance, many)
        return network(params, many, told.text, told.text_mask, told.pooled, guidance=scales, method="prepare")

    return jax.lax.map(prepare, times, batch_size=TIMES_AT_ONCE)


def walk_fn(network: Network, params: Params, steps: Prepared, times: Float[Array, " n"]) -> Callable[..., Latents]:
    """`velocity_fn` for one walk whose `steps` are prepared (`prepare_walk`) for its `times`.

    The velocity is to be called with all samples at one of the times, and with the text that was told; of a
    conditioning it reads the text's mask and the known latents. It needs none of the parameters that prepared.
    """

    def velocity(x: Latents, t: Times, cond: Conditioning) -> Latents:
        now = jax.tree.map(lambda values: values[jnp.argmax(times == t[0])], steps)
        inputs, known = _inputs(network, x, cond)
        out = network(params, inputs, now, cond.text_mask, known=known, method="evaluate")
        return _as_velocity(network, x, t, out)

    return velocity


def features_fn(
    network: Network, params: Params, layers: tuple[int, ...], *, guidance: Times | float | None = None
) -> Callable[..., Float[Array, "k b l d"]]:
    """The seam to a discriminator: features(x, t, conditioning) -> the video tokens after the blocks `layers`.

    It takes what a velocity takes; `MMDiT.__call__` says how blocks are numbered.
    """
    call = _seam(network, params, guidance, tuple(layers))
    return lambda x, t, cond: call(x, t, cond)[1]


def _seam(network: Network, params: Params, guidance: Any, intermediates: bool | tuple[int, ...]) -> Callable:
    """(x, t, conditioning) -> what the network returns on inputs in the form that its config asks for."""

    def call(x: Latents, t: Times, cond: Conditioning) -> Any:
        inputs, known = _inputs(network, x, cond)
        options = {"guidance": _scales(guidance, t), "known": known, "intermediates": intermediates}
        return network(params, inputs, t, cond.text, cond.text_mask, cond.pooled, **options)

    return call


def _inputs(network: Network, x: Latents, cond: Conditioning) -> tuple[Array, Array | None]:
    config = network.config
    inputs = conditioning.model_input(x, cond, known=config.known, hold=config.hold_known)
    return inputs, cond.mask if config.known == "replace" else None


def _scales(guidance: Times | float | None, t: Times) -> Times | None:
    return None if guidance is None else jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), t.shape)


def _as_velocity(network: Network, x: Latents, t: Times, out: Latents) -> Latents:
    return flow.velocity_from_sample(x, t, out) if network.config.prediction == "sample" else out
