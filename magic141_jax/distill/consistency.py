"""Consistency distillation (arXiv 2303.01469; latent form, LCM, arXiv 2310.04378): a baseline of few-step sampling.

On a fine grid 1 = t_0 > ... > t_N = 0 the teacher, guided by w, steps from noised data x_t to the next time, and the
student must say the same data at both:

    x_{t'} = x_t + (t' - t) v_teacher(x_t, t, c, w)
    loss   = mean over unknown latents of sqrt(d^2 + h^2) - h,    d = x0_student(x_t, t) - stop x0_student(x_{t'}, t')

with a pseudo-Huber width h. At t' = 0 the target is the data itself, for x0 = x - t v is x there. Student samples are
drawn by re-noising.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import flow, timesteps
from magic141_jax.diffusion.guidance import guided
from magic141_jax.distill import rollout
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record, weighted_mean


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(DistillationConfig):
    """The teacher's fine grid, and the student's few steps.

    Attributes:
      walk: the few steps that the student will be sampled with; their shift is the fine grid's.
      guidance: w of the teacher's step.
      grid_steps: N.
      huber: h, in units of the latents.
    """

    walk: WalkConfig = dataclasses.field(default_factory=WalkConfig)
    guidance: float = 4.0
    grid_steps: int = 50
    huber: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_steps < self.walk.steps:
            raise ValueError(f"grid_steps ({self.grid_steps}) must be at least walk.steps ({self.walk.steps})")


class Consistency(Distillation):
    """The method: role "student" over a frozen "teacher"."""

    Config = ConsistencyConfig

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part."""
        cond_key, time_key, noise_key = jax.random.split(key, 3)
        config, backbone = self.config, self.backbone
        data = record["latents"].astype(jnp.float32)
        cond = backbone.conditioning(params, part, record, cond_key)
        grid = timesteps.grid(config.grid_steps, config.walk.shift)
        index = jax.random.randint(time_key, data.shape[:1], 0, config.grid_steps)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(data, flow.draw_noise(noise_key, data.shape), t)
        teacher = guided(backbone.velocity(params, TEACHER), backbone.conditioner.negative(cond), config.guidance)
        ahead = x + flow.align(t_next - t, x) * teacher(x, t, cond).astype(jnp.float32)
        target = rollout.finish(backbone.velocity(params, STUDENT), cond, data, ahead, t_next)
        made = rollout.finish(backbone.velocity(params, STUDENT, trained=True), cond, data, x, t)
        distance = jnp.sqrt((made - jax.lax.stop_gradient(target)) ** 2 + config.huber**2) - config.huber
        loss = jnp.mean(weighted_mean(distance, 1 - cond.mask))
        return {STUDENT: loss}, {(STUDENT, "consistency"): loss}
