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
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.guidance import guided
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.distill import rollout
from magic141_jax.distill.roles import STUDENT, TEACHER, Backbone, RolesConfig
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import ConditioningConfig, weighted_mean
from magic141_jax.train.flow_matching import MINIMUM_TIME
from magic141_jax.train.method import Batch, Metrics, Parts


@dataclasses.dataclass(frozen=True)
class GuidanceConfig(ConditioningConfig):
    """Which scales, at which times.

    Attributes:
      roles: how the student is held.
      scale: w; with a guidance embedding drawn uniformly between the two, else both must be equal.
      time: density of s.
      image_weight, video_weight: of the two halves of the batch.
    """

    caption_dropout: float = 0.0
    roles: RolesConfig = dataclasses.field(default_factory=RolesConfig)
    scale: tuple[float, float] = (4.0, 4.0)
    time: TimeDensity = dataclasses.field(default_factory=lambda: TimeDensity(shift=4.0))
    image_weight: float = 1.0
    video_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must not fall, got {self.scale}")


@dataclasses.dataclass(frozen=True, eq=False)
class GuidanceDistillation:
    """The method: role "student" over a frozen "teacher"."""

    config: GuidanceConfig
    backbone: Backbone
    cadence: Mapping[str, int] = dataclasses.field(default_factory=dict)

    Config = GuidanceConfig
    roles = (STUDENT,)

    @classmethod
    def build(cls, config: GuidanceConfig, parts: Parts) -> GuidanceDistillation:
        """The method over an experiment's teacher.

        Raises:
          ValueError: several scales for a network that isn't told which.
        """
        if config.scale[0] != config.scale[1] and not parts.network.config.guidance_embedding:
            raise ValueError("a range of scales needs config.model.guidance_embedding; else give one scale twice")
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
        return {"guidance_scale": 1.0 if self.config.scale[0] == self.config.scale[1] else sum(self.config.scale) / 2}

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """The loss summed over the parts of the batch; metrics are the parts' own."""
        del step
        total, metrics = jnp.zeros(()), {}
        for part, record, part_key in rollout.parts(batch, key):
            loss = jnp.mean(self._part(params, part, record, part_key))
            total += getattr(self.config, f"{part}_weight") * loss
            metrics[f"{STUDENT}/{part}_guided"] = loss
        return {STUDENT: total}, metrics

    def _part(
        self, params: Mapping[str, Params], part: str, record: Mapping[str, jax.Array], key: jax.Array
    ) -> Float[Array, " b"]:
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
        return weighted_mean(error, 1 - cond.mask)
