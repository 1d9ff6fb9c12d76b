"""An adapter that draws known frames anew before a window goes on from them.

The known frames of a window are the last ones of the window before, decoded and encoded anew; what is wrong with them
adds up. Noised to a time s and denoised from there (SDEdit, arXiv 2108.01073), what is small against the noise is lost
and what is large, where things are, stays:

    x_s = (1 - s) h + s eps      h' = Euler's steps from x_s to time 0 by the adapted network

A network that makes pictures from text alone would put things where it has learned that they begin. So a LoRA learns
frames of clips, at every place and moment, told the caption and, as every window is, the first image's tokens:

    loss = |v(x_t, t) - (x_t - z) / t|^2,   x_t = (1 - t) z + t (eps + w n),   t in U[0, s]

with z the data's own frames and w n more noise, w in U[0, wear], in the place of what has worn off. A walk of some
steps draws detail; one prediction would be an average, and blur. The frozen network is the student that makes the
windows; without its adapter it stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import flow
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation, DistillationConfig, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.models import lora
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record


@dataclasses.dataclass(frozen=True)
class RefinementConfig(DistillationConfig):
    """What the adapter learns.

    Attributes:
      walk: the steps of the frozen student.
      strength: s.
      steps: of the walk from there.
      frames: how many latent frames.
      wear: the largest share of noise that is there without being told.
    """

    roles: RolesConfig = dataclasses.field(default_factory=lambda: RolesConfig(student="adapter"))
    walk: WalkConfig = dataclasses.field(default_factory=lambda: WalkConfig(sampler="euler"))
    strength: float = 0.5
    steps: int = 6
    frames: int = 1
    wear: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roles.student != "adapter":
            raise ValueError("what draws frames anew is an adapter: roles.student is 'adapter'")
        if not 0 < self.strength < 1 or self.steps < 1:
            raise ValueError(
                f"strength is a time between 0 and 1 and steps at least 1; got {self.strength}, {self.steps}"
            )
        if self.frames < 1 or self.wear < 0:
            raise ValueError(f"frames must be at least 1 and wear not negative, got {self.frames} and {self.wear}")


class Refinement(Distillation):
    """The method: role "student" is the adapter, over the frozen "teacher" that makes the windows."""

    Config = RefinementConfig

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The adapter alone; the export's other components are those of config.components_from."""
        config = self.config
        found = lora.RefinerConfig(config.roles.rank, config.roles.paths, config.strength, config.steps)
        return {"refiner": ("refiner", found, params[STUDENT]["adapter"])}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part; of clips their first frames are taken."""
        config, conditioner = self.config, self.backbone.conditioner
        text_key, time_key, noise_key, wear_key, size_key = jax.random.split(key, 5)
        data = record["latents"][:, : config.frames].astype(jnp.float32)
        batch = data.shape[:1]
        told = {**record, "latents": data}
        known = jnp.full(batch, config.frames)
        cond = conditioner.condition(params[TEACHER].get("image_encoder"), told, text_key, known, image_tokens=True)
        cond = dataclasses.replace(cond, known=jnp.zeros_like(cond.known), mask=jnp.zeros_like(cond.mask))
        t = jax.random.uniform(time_key, batch, minval=1e-3, maxval=config.strength)
        wear = jax.random.uniform(size_key, batch, maxval=config.wear)
        noise = flow.draw_noise(noise_key, data.shape) + flow.align(wear, data) * flow.draw_noise(wear_key, data.shape)
        x = flow.interpolate(data, noise, t)
        made = self.backbone.velocity(params, STUDENT, trained=True)(x, t, cond).astype(jnp.float32)
        loss = jnp.mean((made - (x - data) / flow.align(t, data)) ** 2)
        return {STUDENT: loss}, {(STUDENT, "error"): loss}
