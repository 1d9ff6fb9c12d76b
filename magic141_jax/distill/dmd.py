"""Distribution matching distillation for flow matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867), and LADD.

The student's sample x (`rollout`) is noised to x_s = (1 - s) x + s eps, where two networks say what its data was: the
teacher the real score, with guidance w folded in, and the fake score, which follows the student:

    x0_real = x0_c + (w - 1) (x0_c - x0_u)        g = (x0_fake - x0_real) / mean |x - x0_real|
    L_student = m / 2 mean (x - stop(x - g))^2 + a L_G(x)
    L_fake    = mean (v_fake(x_s, s, c) - (eps - stop x))^2

Means are over unknown latents, for each sample by itself, in float32; s is drawn with a shift and kept off the ends.
g has two parts, logged apart (Decoupled DMD, arXiv 2511.22677): matching, x0_fake - x0_c, and guidance,
(1 - w) (x0_c - x0_u), which may look at noise levels of its own. Data forcing (arXiv 2606.18478), for a later phase:
for a share of the samples the real score looks at the noised true clip instead. The student is updated at every
`ratio`-th step.

L_G comes from a discriminator of x against true latents (`adversarial`). Without matching it is all that the student
has: latent adversarial distillation, the LADD kind (arXiv 2403.12015), here along the student's own walk and against
true data. With the weights m = config.matching and a = config.adversarial.weight these roles are trained:

    m > 0, a = 0    DMD                    student, fake
    m > 0, a > 0    DMD2                   student, fake, discriminator
    m = 0, a > 0    adversarial alone      student, discriminator (and fake, where its features are judged)
"""

from __future__ import annotations

import dataclasses
import functools
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
from magic141_jax.distill.adversarial import DISCRIMINATOR, AdversarialConfig, Critic
from magic141_jax.distill.roles import FAKE, STUDENT, TEACHER, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents, Times
from magic141_jax.train.conditioner import Record, weighted_mean
from magic141_jax.train.method import Metrics

NORMALISER_FLOOR = 1e-6


@dataclasses.dataclass(frozen=True)
class DMDConfig(DistillationConfig):
    """The student's walk, the terms of its loss, and the scores.

    Attributes:
      walk: the student's few steps.
      matching: weight of the matching loss; 0 leaves it out.
      adversarial: the adversarial term and its weight; 0 leaves it out.
      guidance: w of the real score; 1 is none.
      score_time: density of s, of both scores and of the fake score's training.
      score_range: s is kept within.
      own_guidance_time: whether the guidance part of g is taken at another draw of s.
      ratio: updates of the fake score and of the discriminator to one of the student.
      data_forcing: share of the samples whose real score looks at the noised true clip.
    """

    walk: WalkConfig = dataclasses.field(default_factory=WalkConfig)
    matching: float = 1.0
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
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
        if self.matching < 0 or not (self.matching or self.adversarial.weight):
            raise ValueError("matching must not be negative, and it and adversarial.weight must not both be 0")
        if self.roles.weak and not self.needs_fake:
            raise ValueError("roles.weak is a share of the fake score's adapter, which matching=0 leaves out")

    @property
    def needs_fake(self) -> bool:
        """Whether anything looks at the fake score: the matching loss or the discriminator."""
        return self.matching > 0 or self.adversarial.trunk == FAKE


class DMD(Distillation):
    """The method: roles "student", "fake" and "discriminator" over a frozen "teacher", those that are needed."""

    Config = DMDConfig

    @property
    def roles(self) -> tuple[str, ...]:
        """The student and whoever it learns from."""
        needed = {FAKE: self.config.needs_fake, DISCRIMINATOR: self.config.adversarial.weight > 0}
        return (STUDENT, *(role for role, is_needed in needed.items() if is_needed))

    @property
    def cadence(self) -> Mapping[str, int]:
        """The student waits for the others."""
        return {STUDENT: self.config.ratio}

    @functools.cached_property
    def critic(self) -> Critic:
        """The discriminator, where there is one."""
        return Critic.create(self.config.adversarial, self.backbone)

    def init_role(self, role: str, key: jax.Array) -> Params:
        """A role at its start: the teacher itself, or a discriminator that finds all latents alike."""
        return self.critic.heads.init(key) if role == DISCRIMINATOR else super().init_role(role, key)

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The losses on one part, and the sizes of the parts of g."""
        cond_key, start_key, score_key, fake_key, critic_key = jax.random.split(key, 5)
        config = self.config
        data = record["latents"].astype(jnp.float32)
        cond = self.backbone.conditioning(params, part, record, cond_key)
        fixed, trained = (self.backbone.velocity(params, STUDENT, trained=learns) for learns in (False, True))
        x = rollout.draw(config.walk, fixed, trained, cond, data, key=start_key)
        losses, metrics = {STUDENT: jnp.zeros(())}, {}
        if config.matching:
            g, sizes = self.score_gradient(params, jax.lax.stop_gradient(x), cond, data, score_key)
            matched = 0.5 * weighted_mean((x - jax.lax.stop_gradient(x - g)) ** 2, 1 - cond.mask)
            losses[STUDENT] += config.matching * jnp.mean(matched)
            metrics |= {(STUDENT, name): value for name, value in sizes.items()}
        if FAKE in self.roles:
            losses[FAKE] = jnp.mean(self.fake_errors(params, jax.lax.stop_gradient(x), cond, fake_key))
            metrics |= {(FAKE, "error"): losses[FAKE]}
        if DISCRIMINATOR in self.roles:
            judged, found = self.critic.losses(params, data, x, cond, critic_key)
            losses[STUDENT] += config.adversarial.weight * judged[STUDENT]
            losses[DISCRIMINATOR] = judged[DISCRIMINATOR]
            metrics |= found
        return losses, metrics

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
        seen = jnp.where(flow.align(forced, x), data, x) if config.data_forcing else x
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
        scale = flow.align(weighted_mean(jnp.abs(x - real - push), unknown), x) + NORMALISER_FLOOR
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
