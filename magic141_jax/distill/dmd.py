"""Distribution matching distillation for flow matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

The student's sample x (`rollout`) is noised to x_s = (1 - s) x + s eps, where two networks say what its data was: the
teacher the real score, with guidance w folded in, and the fake score, which follows the student:

    x0_real = x0_c + (w - 1) (x0_c - x0_u)        g = (x0_fake - x0_real) / mean |x - x0_real|
    L_student = 1/2 mean (x - stop(x - g))^2      L_fake = mean (v_fake(x_s, s, c) - (eps - stop x))^2

Means are over unknown latents, for each sample by itself, in float32; s is drawn with a shift and kept off the ends.
g has two parts, logged apart (Decoupled DMD, arXiv 2511.22677): matching, x0_fake - x0_c, and guidance,
(1 - w) (x0_c - x0_u), which may look at noise levels of its own. Data forcing (arXiv 2606.18478), for a later phase:
for a share of the samples the real score looks at the noised true clip instead. The student is updated at every
`ratio`-th step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.diffusion.guidance import branches
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.distill import rollout
from magic141_jax.distill.roles import FAKE, STUDENT, TEACHER, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents, Times
from magic141_jax.train.conditioner import Record, weighted_mean
from magic141_jax.train.method import Metrics

NORMALISER_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class DMDConfig(DistillationConfig):
    """The student's walk, the scores and their weights.

    Attributes:
      walk: the student's few steps.
      guidance: w of the real score; 1 is none.
      score_time: density of s, of both scores and of the fake score's training.
      score_range: s is kept within.
      own_guidance_time: whether the guidance part of g is taken at another draw of s.
      ratio: updates of the fake score to one of the student.
      data_forcing: share of the samples whose real score looks at the noised true clip.
    """

    walk: WalkConfig = dataclasses.field(default_factory=WalkConfig)
    guidance: float = 4.0
    score_time: TimeDensity = dataclasses.field(default_factory=lambda: TimeDensity(kind="uniform", shift=5.0))
    score_range: tuple[float, float] = (0.05, 0.98)
    own_guidance_time: bool = False
    ratio: int = 5
    data_forcing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.score_range
        if not 0 < low < high <= 1:
            raise ValueError(f"score_range must rise within (0, 1], got {self.score_range}")
        if self.ratio < 1 or not 0 <= self.data_forcing <= 1:
            raise ValueError("ratio must be at least 1 and data_forcing between 0 and 1")


class DMD(Distillation):
    """The method: roles "student" and "fake" over a frozen "teacher"."""

    Config = DMDConfig
    roles = (STUDENT, FAKE)

    @property
    def cadence(self) -> Mapping[str, int]:
        """The student waits for the fake score."""
        return {STUDENT: self.config.ratio}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """Both losses on one part, and the sizes of the parts of g."""
        cond_key, start_key, score_key, fake_key = jax.random.split(key, 4)
        data = record["latents"].astype(jnp.float32)
        cond = self.backbone.conditioning(params, part, record, cond_key)
        student = [self.backbone.velocity(params, STUDENT, trained=trained) for trained in (False, True)]
        x, t = rollout.start(self.config.walk, student[0], cond, data, start_key)
        x = rollout.finish(student[1], cond, data, x, t)
        g, metrics = self.score_gradient(params, jax.lax.stop_gradient(x), cond, data, score_key)
        matched = 0.5 * weighted_mean((x - jax.lax.stop_gradient(x - g)) ** 2, 1 - cond.mask)
        fake = self.fake_errors(params, jax.lax.stop_gradient(x), cond, fake_key)
        losses = {STUDENT: jnp.mean(matched), FAKE: jnp.mean(fake)}
        return losses, {(STUDENT, name): value for name, value in metrics.items()} | {(FAKE, "error"): losses[FAKE]}

    def score_gradient(
        self, params: Mapping[str, Params], x: Latents, cond: Conditioning, data: Latents, key: jax.Array
    ) -> tuple[Latents, Metrics]:
        """g at samples x (b, f, h, w, c), and the sizes of its two parts before they are normalised.

        `data` are true latents of the same captions, for data forcing.
        """
        config = self.config
        time_key, noise_key, force_key, own_time_key, own_noise_key = jax.random.split(key, 5)
        s, noise = self._score_times(time_key, x.shape[:1]), flow.draw_noise(noise_key, x.shape)
        forced = jax.random.bernoulli(force_key, config.data_forcing, x.shape[:1])
        seen = jnp.where(forced[:, None, None, None, None], data, x) if config.data_forcing else x
        fake = self._sample_of(self.backbone.velocity(params, FAKE), x, noise, s, cond)
        if config.guidance == 1 or config.own_guidance_time:
            real = self._sample_of(self.backbone.velocity(params, TEACHER), seen, noise, s, cond)
            push = jnp.zeros_like(real)
            if config.guidance != 1:
                s, noise = self._score_times(own_time_key, x.shape[:1]), flow.draw_noise(own_noise_key, x.shape)
                push = jnp.subtract(*self._both(params, seen, noise, s, cond))
        else:
            real, negative = self._both(params, seen, noise, s, cond)
            push = real - negative
        push = (config.guidance - 1) * push
        unknown = 1 - cond.mask
        scale = weighted_mean(jnp.abs(x - real - push), unknown)[:, None, None, None, None] + NORMALISER_FLOOR
        sizes = {"matching": fake - real, "guidance": push}
        metrics = {name: jnp.sqrt(jnp.mean(weighted_mean(part**2, unknown))) for name, part in sizes.items()}
        g = jnp.nan_to_num((fake - real - push) / scale)
        return unknown * g, metrics | {"normaliser": jnp.mean(scale)}

    def fake_errors(
        self, params: Mapping[str, Params], x: Latents, cond: Conditioning, key: jax.Array
    ) -> Float[Array, " b"]:
        """L_fake of each sample."""
        time_key, noise_key = jax.random.split(key)
        s, noise = self._score_times(time_key, x.shape[:1]), flow.draw_noise(noise_key, x.shape)
        velocity = self.backbone.velocity(params, FAKE, trained=True)
        predicted = velocity(flow.interpolate(x, noise, s), s, cond).astype(jnp.float32)
        return weighted_mean((predicted - flow.velocity_target(x, noise)) ** 2, 1 - cond.mask)

    def _score_times(self, key: jax.Array, shape: tuple[int, ...]) -> Times:
        return jnp.clip(self.config.score_time.draw(key, shape), *self.config.score_range)

    def _sample_of(self, velocity: Any, x: Latents, noise: Latents, s: Times, cond: Conditioning) -> Latents:
        """x0 as a network sees it at x noised to s."""
        point = flow.interpolate(x, noise, s)
        return flow.sample_from_velocity(point, s, velocity(point, s, cond).astype(jnp.float32))

    def _both(
        self, params: Mapping[str, Params], x: Latents, noise: Latents, s: Times, cond: Conditioning
    ) -> tuple[Latents, Latents]:
        """The teacher's x0 with the caption and without."""
        point = flow.interpolate(x, noise, s)
        pair = branches(self.backbone.velocity(params, TEACHER), self.backbone.conditioner.negative(cond))
        first, second = (flow.sample_from_velocity(point, s, v.astype(jnp.float32)) for v in pair(point, s, cond))
        return first, second
