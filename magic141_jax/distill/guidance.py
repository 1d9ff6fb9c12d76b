"""Guidance distillation (arXiv 2210.03142, stage one): a network whose one pass is the teacher's two.

    loss = mean over unknown latents of |v_student(x_s, s, c[, w]) - (v_u + w (v_c - v_u))|^2

at noised data x_s. Either w is one number, folded into the weights, or it is drawn for each sample and told to the
network through its guidance embedding (config.model.guidance_embedding; the teacher may lack it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Velocity
from magic141_jax.diffusion.guidance import guided
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record, weighted_mean
from magic141_jax.train.flow_matching import MINIMUM_TIME, SAMPLING_STEPS
from magic141_jax.train.method import Parts


@dataclasses.dataclass(frozen=True)
class GuidanceConfig(DistillationConfig):
    """Which scales, at which times.

    Attributes:
      scale: w; with a guidance embedding drawn uniformly between the two, else both must be equal.
      time: density of s.
    """

    scale: tuple[float, float] = (4.0, 4.0)
    time: TimeDensity = dataclasses.field(default_factory=lambda: TimeDensity(shift=4.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must not fall, got {self.scale}")


class GuidanceDistillation(Distillation):
    """The method: role "student" over a frozen "teacher"."""

    Config = GuidanceConfig

    @classmethod
    def build(cls, config: GuidanceConfig, parts: Parts) -> GuidanceDistillation:
        """The method over an experiment's teacher.

        Raises:
          ValueError: several scales for a network that isn't told which.
        """
        if config.scale[0] != config.scale[1] and not parts.network.config.guidance_embedding:
            raise ValueError("a range of scales needs config.model.guidance_embedding; else give one scale twice")
        return super().build(config, parts)

    @property
    def walk(self) -> WalkConfig:
        """Steps to look at samples with: the student takes as many as its teacher, and Euler's."""
        return WalkConfig(SAMPLING_STEPS, self.config.time.shift, "euler")

    @property
    def guidance(self) -> float:
        """The middle of the scales."""
        return sum(self.config.scale) / 2

    def sampling(self) -> dict[str, Any]:
        """The scale to ask for: 1 where it is in the weights, the middle of the range where it is told."""
        low, high = self.config.scale
        return {"guidance_scale": 1.0 if low == high else self.guidance}

    def student(self, params: Mapping[str, Params]) -> Velocity:
        """The student's velocity at the middle of the scales, with gradient."""
        return self.backbone.velocity(params, STUDENT, trained=True, guidance=self.guidance)

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part."""
        cond_key, time_key, noise_key, scale_key = jax.random.split(key, 4)
        backbone = self.backbone
        data = record["latents"].astype(jnp.float32)
        cond = backbone.conditioning(params, part, record, cond_key)
        s = jnp.maximum(self.config.time.draw(time_key, data.shape[:1]), MINIMUM_TIME)
        x = flow.interpolate(data, flow.draw_noise(noise_key, data.shape), s)
        low, high = self.config.scale
        w = jax.random.uniform(scale_key, s.shape, minval=low, maxval=high)
        target = guided(backbone.velocity(params, TEACHER), backbone.conditioner.negative(cond), w)(x, s, cond)
        made = backbone.velocity(params, STUDENT, trained=True, guidance=w)(x, s, cond)
        error = (made.astype(jnp.float32) - jax.lax.stop_gradient(target.astype(jnp.float32))) ** 2
        loss = jnp.mean(weighted_mean(error, 1 - cond.mask))
        return {STUDENT: loss}, {(STUDENT, "guided"): loss}
