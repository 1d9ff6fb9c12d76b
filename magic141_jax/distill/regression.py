"""Flow matching at the student's own times only: true data noised to a time of the walk, and the student's velocity.

    t from the walk's grid, 0 left out        x_t = (1 - t) x0 + t eps
    loss = mean over unknown latents of (v_student(x_t, t, c) - (eps - x0))^2

The plain baseline of few steps, "walk the teacher's flow in n Euler steps", with all training spent on these n times.
Its data was noised by the book, while the walk's own points carry the errors of the steps before, and its samples know
no guidance: what distribution matching adds. As a first phase it adapts a student to new data at a tenth of the cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import flow
from magic141_jax.distill.roles import STUDENT, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record, weighted_mean


@dataclasses.dataclass(frozen=True)
class RegressionConfig(DistillationConfig):
    """The student's few steps.

    Attributes:
      walk: the times that are trained, and sampled with.
    """

    walk: WalkConfig = dataclasses.field(default_factory=lambda: WalkConfig(sampler="euler"))


class Regression(Distillation):
    """The method: role "student" that starts as the teacher."""

    Config = RegressionConfig

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part."""
        cond_key, time_key, noise_key = jax.random.split(key, 3)
        data = record["latents"].astype(jnp.float32)
        cond = self.backbone.conditioning(params, part, record, cond_key)
        t = jax.random.choice(time_key, self.config.walk.times[:-1], data.shape[:1])
        noise = flow.draw_noise(noise_key, data.shape)
        velocity = self.backbone.velocity(params, STUDENT, trained=True)
        predicted = velocity(flow.interpolate(data, noise, t), t, cond).astype(jnp.float32)
        loss = jnp.mean(weighted_mean((predicted - flow.velocity_target(data, noise)) ** 2, 1 - cond.mask))
        return {STUDENT: loss}, {(STUDENT, "error"): loss}
