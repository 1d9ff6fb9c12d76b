"""What a few-step student is trained on: its own path from noise, as sampling will walk it (DMD2, arXiv 2405.14867).

Backward simulation: with times t_0 = 1 > ... > t_n = 0 and a random exit e < n, the student walks from pure noise to
t_e without gradient, by the step that sampling will use,

    renoise   x_{i+1} = (1 - t_{i+1}) x0_i + t_{i+1} eps_i,   x0_i = x_i - t_i v(x_i, t_i)
    euler     x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i)

and its x0 at t_e, with gradient, is the sample that losses see. Without backward simulation x_{t_e} is noised data.

That takes x0 for a sample of the data, which it becomes under re-noising. The x0 of a student that has learned to
follow a path by Euler steps is an average until the last one, and would have to be unlearned. Its sample is where the
whole walk ends, x_n (judged = "end"), with the gradient through all n steps; each is computed again on the way back,
so that no more than one is held. A checkpoint records the walk that it was trained for (`SamplingSettings`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from magic141_jax.diffusion import flow, samplers, timesteps
from magic141_jax.diffusion.conditioning import Conditioning, Velocity
from magic141_jax.shapes import Latents, Times


@dataclasses.dataclass(frozen=True)
class WalkConfig:
    """The few steps of the student.

    Attributes:
      steps: how many.
      shift: of the grid of times; 5 gives Magic 1-For-1's [1, .9375, .8333, .625, 0].
      sampler: the step between them.
      backward_simulation: whether the student walks to the exit itself; else noised data stands there.
      judged: what losses see of a walk: the "prediction" x0 at a random exit, or its "end".
    """

    steps: int = 4
    shift: float = 5.0
    sampler: Literal["renoise", "euler"] = "renoise"
    backward_simulation: bool = True
    judged: Literal["prediction", "end"] = "prediction"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.shift <= 0:
            raise ValueError(f"steps and shift must be positive, got {self.steps} and {self.shift}")
        if self.judged == "end" and not self.backward_simulation:
            raise ValueError("judged='end' is the end of a walk from noise; it needs backward_simulation")

    @property
    def times(self) -> Float[Array, " steps+1"]:
        """The grid, falling from 1 to 0."""
        return timesteps.grid(self.steps, self.shift)

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that a checkpoint of this walk records: it needs no guidance."""
        return {
            "num_inference_steps": self.steps,
            "shift": self.shift,
            "sampler": self.sampler,
            "guidance_scale": 1.0,
        }


def draw(
    config: WalkConfig, walk: Velocity, student: Velocity, cond: Conditioning, data: Latents, *, key: jax.Array
) -> Latents:
    """The sample (b, f, h, w, c) that losses see, see `WalkConfig.judged`; the known frames of `data` stand in it.

    Args:
      config: the steps.
      walk: the student's velocity, its parameters constants.
      student: the same, to be differentiated.
      cond: the conditioning.
      data: latents of the same captions: shape, known frames, and what `start` takes of them.
      key: of the exit and of all noise.
    """
    if config.judged == "prediction":
        return finish(student, cond, data, *start(config, walk, cond, data, key))
    made = generate(config, jax.checkpoint(student), cond, data.shape, key, keep=False)
    return _with_known(made, cond, data)


def start(
    config: WalkConfig, walk: Velocity, cond: Conditioning, data: Latents, key: jax.Array
) -> tuple[Latents, Times]:
    """Draws an exit e for the batch and gives (x_{t_e}, t_e), without gradient.

    Args:
      config: the steps.
      walk: the student's velocity, its parameters constants.
      cond: the conditioning; its known frames are noisy along the walk, as in sampling.
      data: latents (b, f, h, w, c): their shape, and themselves where there is no backward simulation.
      key: of the exit and of all noise.
    """
    exit_key, noise_key, step_key = jax.random.split(key, 3)
    times = config.times
    index = jax.random.randint(exit_key, (), 0, config.steps)
    noise = flow.draw_noise(noise_key, data.shape)
    t = jnp.broadcast_to(times[index], data.shape[:1])
    if not config.backward_simulation:
        return flow.interpolate(data.astype(jnp.float32), noise, t), t
    return walk_to(config, walk, cond, noise, index, key=step_key), t


def walk_to(
    config: WalkConfig,
    walk: Velocity,
    cond: Conditioning,
    noise: Latents,
    index: Int[Array, "*b"],
    *,
    key: jax.Array | None = None,
) -> Latents:
    """Where a walk from `noise` is before step `index`, one for all samples or one each; `key` is for its noise."""
    step, times = samplers.stepper(config.sampler, walk, cond, key), config.times

    def body(i: jax.Array, x: Latents) -> Latents:
        moved = step(x, i, times[i], times[i + 1])
        return jnp.where(flow.align(i < index, x), moved, x)

    return jax.lax.fori_loop(0, index.max(), body, noise)


def finish(student: Velocity, cond: Conditioning, data: Latents, x: Latents, t: Times) -> Latents:
    """The student's x0 at (x, t), the known frames of `data` put back clean: the generated sample, with gradient."""
    made = flow.sample_from_velocity(x, t, student(x, t, cond).astype(jnp.float32))
    return _with_known(made, cond, data)


def generate(
    config: WalkConfig,
    velocity: Velocity,
    cond: Conditioning,
    shape: tuple[int, ...],
    key: jax.Array,
    *,
    keep: bool = True,
) -> Latents:
    """Whole samples of `shape` by a walk, as `pipelines` would make them; walks with one key start from one noise.

    `keep` is that of `samplers.sample`.
    """
    noise_key, step_key = jax.random.split(key)
    noise = flow.draw_noise(noise_key, shape)
    return samplers.sample(velocity, cond, noise, config.times, sampler=config.sampler, key=step_key, keep=keep)


def _with_known(made: Latents, cond: Conditioning, data: Latents) -> Latents:
    return jnp.where(cond.mask > 0, data.astype(jnp.float32), made)
