"""From noise to data along a falling grid of times: one `lax.scan`, pluggable steps.

    euler    x' = x + (t' - t) v(x, t)                                      first order, one evaluation a step
    heun     x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v(x, t), t')) / 2  second order, two evaluations; a step
             that ends at t' = 0 is an Euler step, since a velocity need not be defined there
    renoise  x' = (1 - t') x0 + t' eps, x0 = x - t v(x, t)                  fresh noise eps at every step

Euler and Heun follow the flow of any velocity. Re-noising is for few-step generators, whose x0 is a sample of the
data: it then keeps every marginal; with an undistilled network, whose x0 is an average, it loses variance. Sample
with the step that a checkpoint was trained for (Magic 1-For-1's release: Euler on 4 steps, arXiv 2502.07701).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Conditioning, Velocity, keep_known
from magic141_jax.errors import UserError, nearest
from magic141_jax.shapes import Latents

Sampler = Literal["euler", "heun", "renoise"]
StepCallback = Callable[[jax.Array, jax.Array, jax.Array], None]
_LocalVelocity = Callable[[jax.Array, jax.Array], jax.Array]


def sample(
    velocity: Velocity,
    cond: Conditioning,
    noise: Latents,
    times: Float[Array, " steps+1"],
    *,
    sampler: Sampler = "euler",
    key: jax.Array | None = None,
    callback: StepCallback | None = None,
    keep: bool = True,
) -> Latents:
    """Integrates `velocity` from `noise` at times[0] to times[-1]; the known latents are put back at the end.

    During the walk all frames are noisy, as in training: the network sees the known ones through `cond`. They must
    be clean in `cond`, for they are returned as they are; history noise is added inside `velocity`.

    Args:
      velocity: see `conditioning.Velocity`; wrap it with `guidance.guided` for guidance.
      cond: the conditioning of all steps.
      noise: (b, f, h, w, c) from `flow.draw_noise`; the walk is made in its dtype.
      times: falling, as from `timesteps.grid`.
      sampler: the kind of step.
      key: for "renoise": one key, or one per sample (`flow.draw_noise`).
      callback: called after every step on the host as `callback(step, time, latents)`: the number of the step from
        0, the time reached, the latents there. It travels as `jax.debug.callback`, which works under jit on CPU,
        GPU and TPU; calls are unordered and may lag behind (wait with `jax.effects_barrier()`), and a program that
        holds one is never written to the persistent compilation cache, so leave it out unless it is wanted.
      keep: whether the known latents are put back; without it the walk's own version of them is returned.

    Raises:
      UserError: an unknown sampler.
      ValueError: "renoise" without a key.
    """
    step = stepper(sampler, velocity, cond, key)
    times = jnp.asarray(times, jnp.float32)

    def body(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, t, t_next = inputs
        x = step(x, index, t, t_next)
        if callback is not None:
            jax.debug.callback(callback, index, t_next, x)
        return x, None

    steps = jnp.arange(times.shape[0] - 1)
    x, _ = jax.lax.scan(body, noise, (steps, times[:-1], times[1:]))
    return keep_known(x, cond) if keep else x


def stepper(
    sampler: Sampler, velocity: Velocity, cond: Conditioning, key: jax.Array | None
) -> Callable[[Latents, jax.Array, jax.Array, jax.Array], Latents]:
    """One step of a walk: (x, number of the step, t, t') -> x' in the dtype of x; arguments as in `sample`.

    Raises:
      UserError: an unknown sampler.
      ValueError: "renoise" without a key.
    """
    if sampler not in _STEPS:
        raise UserError(f"unknown sampler {sampler!r}.{nearest(sampler, _STEPS)}")
    if sampler == "renoise" and key is None:
        raise ValueError("the renoise sampler draws noise at every step: it needs a key")

    def local_velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return velocity(x, jnp.broadcast_to(t, x.shape[:1]), cond).astype(x.dtype)

    def step(x: Latents, index: jax.Array, t: jax.Array, t_next: jax.Array) -> Latents:
        # Times are float32, and would raise bfloat16 latents to float32 in the carry.
        return _STEPS[sampler](local_velocity, x, t, t_next, key=_step_key(key, index)).astype(x.dtype)

    return step


def _euler(
    velocity: _LocalVelocity, x: jax.Array, t: jax.Array, t_next: jax.Array, *, key: jax.Array | None
) -> jax.Array:
    del key
    return x + (t_next - t) * velocity(x, t)


def _heun(
    velocity: _LocalVelocity, x: jax.Array, t: jax.Array, t_next: jax.Array, *, key: jax.Array | None
) -> jax.Array:
    del key
    v = velocity(x, t)
    ahead = (x + (t_next - t) * v).astype(x.dtype)
    v = jax.lax.cond(t_next > 0, lambda: (v + velocity(ahead, t_next)) / 2, lambda: v)
    return x + (t_next - t) * v


def _renoise(
    velocity: _LocalVelocity, x: jax.Array, t: jax.Array, t_next: jax.Array, *, key: jax.Array | None
) -> jax.Array:
    x0 = flow.sample_from_velocity(x, t, velocity(x, t))
    return flow.interpolate(x0, flow.draw_noise(key, x.shape, x.dtype), t_next)


def _step_key(key: jax.Array | None, index: jax.Array) -> jax.Array | None:
    """The key, or the keys of all samples, for one step."""
    if key is None:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(jax.random.fold_in, (0, None))(key, index) if key.ndim else jax.random.fold_in(key, index)  # pyright: ignore[reportOptionalMemberAccess]


_STEPS = {"euler": _euler, "heun": _heun, "renoise": _renoise}
