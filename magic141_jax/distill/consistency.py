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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow, timesteps
from magic141_jax.diffusion.guidance import guided
from magic141_jax.distill import rollout
from magic141_jax.distill.roles import STUDENT, TEACHER, Backbone, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import ConditioningConfig, weighted_mean
from magic141_jax.train.method import Batch, Metrics, Parts


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(ConditioningConfig):
    """The teacher's fine grid, and the student's few steps.

    Attributes:
      roles: how the student is held.
      walk: the few steps that the student will be sampled with; their shift is the fine grid's.
      guidance: w of the teacher's step.
      grid_steps: N.
      huber: h, in units of the latents.
      image_weight, video_weight: of the two halves of the batch.
    """

    caption_dropout: float = 0.0
    roles: RolesConfig = dataclasses.field(default_factory=RolesConfig)
    walk: WalkConfig = dataclasses.field(default_factory=WalkConfig)
    guidance: float = 4.0
    grid_steps: int = 50
    huber: float = 0.01
    image_weight: float = 1.0
    video_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_steps < self.walk.steps:
            raise ValueError(f"grid_steps ({self.grid_steps}) must be at least walk.steps ({self.walk.steps})")


@dataclasses.dataclass(frozen=True, eq=False)
class Consistency:
    """The method: role "student" over a frozen "teacher"."""

    config: ConsistencyConfig
    backbone: Backbone
    cadence: Mapping[str, int] = dataclasses.field(default_factory=dict)

    Config = ConsistencyConfig
    roles = (STUDENT,)

    @classmethod
    def build(cls, config: ConsistencyConfig, parts: Parts) -> Consistency:
        """The method over an experiment's teacher."""
        return cls(config, Backbone.create(config.roles, parts, parts.conditioner(config)))

    @property
    def frozen(self) -> Mapping[str, Params]:
        """The teacher."""
        return {TEACHER: self.backbone.frozen}

    def init(self, key: jax.Array) -> dict[str, Params]:
        """The student starts as the teacher."""
        return {STUDENT: self.backbone.init(STUDENT, key)}

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The student's folders."""
        return self.backbone.components(params)

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that the student is trained for."""
        return self.config.walk.sampling()

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """The loss summed over the parts of the batch; metrics are the parts' own."""
        del step
        total, metrics = jnp.zeros(()), {}
        for part, record, part_key in rollout.parts(batch, key):
            loss = jnp.mean(self._part(params, part, record, part_key))
            total += getattr(self.config, f"{part}_weight") * loss
            metrics[f"{STUDENT}/{part}_consistency"] = loss
        return {STUDENT: total}, metrics

    def _part(
        self, params: Mapping[str, Params], part: str, record: Mapping[str, jax.Array], key: jax.Array
    ) -> Float[Array, " b"]:
        cond_key, time_key, noise_key = jax.random.split(key, 3)
        config, backbone = self.config, self.backbone
        data = record["latents"].astype(jnp.float32)
        cond = backbone.conditioning(params, part, record, cond_key)
        grid = timesteps.grid(config.grid_steps, config.walk.shift)
        index = jax.random.randint(time_key, data.shape[:1], 0, config.grid_steps)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(data, flow.draw_noise(noise_key, data.shape), t)
        teacher = guided(backbone.velocity(params, TEACHER), backbone.conditioner.negative(cond), config.guidance)
        ahead = x + (t_next - t)[:, None, None, None, None] * teacher(x, t, cond).astype(jnp.float32)
        target = rollout.finish(backbone.velocity(params, STUDENT), cond, data, ahead, t_next)
        made = rollout.finish(backbone.velocity(params, STUDENT, trained=True), cond, data, x, t)
        distance = jnp.sqrt((made - jax.lax.stop_gradient(target)) ** 2 + config.huber**2) - config.huber
        return weighted_mean(distance, 1 - cond.mask)
