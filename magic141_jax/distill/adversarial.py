"""Adversarial distillation: a discriminator of noised latents, its losses, and its gradient penalties.

    x_t  = (1 - t) x0 + t eps where latents are unknown, the clean known ones elsewhere
    D    = mean over heads and unknown tokens of heads(features of a transformer at x_t, which is held constant)

Real and generated latents are noised alike, with the same t and eps, so that nothing but the latents tells them apart;
with time high D judges layout and motion, with time low detail (LADD, arXiv 2403.12015).

The relativistic loss (`train/adversarial.py`) converges with zero-centred gradient penalties on real (R1) and generated
(R2) latents. Their second derivatives through a transformer are spared by a finite difference (arXiv 2501.08316, the
approximated R1; 2506.09350 uses it for both):

    R = E_n mean(((D(x + sigma n) - D(x)) / sigma)^2)  ->  mean |grad_x D|^2 for small sigma, n ~ N(0, 1)

To a method this is one more role, "discriminator", and one more term of the student's loss: `Critic`. No loss stops a
gradient for another role's sake, because the training step differentiates each by its own role's parameters alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import flow
from magic141_jax.diffusion.conditioning import Conditioning, LatentMask, keep_known
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.distill.roles import STUDENT, Backbone, FeaturesFn
from magic141_jax.models.discriminator import FeatureHeads, FeatureHeadsConfig, sample_logits
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents, Times
from magic141_jax.train.adversarial import ADVERSARIAL_LOSSES

DISCRIMINATOR = "discriminator"
Logits = Float[Array, " b"]
Judge = Callable[[Latents, Times, Conditioning], Logits]
"""D(x_t (b, f, h, w, c), t (b,), conditioning) -> one logit a sample, high where the latents look real."""


def noised_latents(x0: Latents, noise: Latents, t: Times, cond: Conditioning) -> Latents:
    """What the discriminator is shown: `x0` at time t, with the clean known latents in their places.

    Nothing of `x0` is seen where latents are known, and no gradient comes from there. A transformer whose known latents
    come on channels of their own was trained with noisy ones here as well; that they are clean now changes the error
    of the embedded default's x0 by no more than 3 % at any time, for one known frame and for two.
    """
    return keep_known(flow.interpolate(x0, noise, t), cond)


def discriminator_fn(features_fn: FeaturesFn, heads: Network, heads_params: Params) -> Judge:
    """D(x_t, t, conditioning) -> (b,): heads on the features of a transformer, one logit a sample.

    Args:
      features_fn: of `seam.features_fn`, for the layers of the heads' config. Its transformer stays as it is, unless
        the caller differentiates by its parameters.
      heads, heads_params: `FeatureHeads`.
    """

    def judge(x: Latents, t: Times, cond: Conditioning) -> Logits:
        logits = heads(heads_params, features_fn(x, t, cond), t, cond.pooled)
        return sample_logits(logits, cond.mask, heads.config.patch)

    return judge


def gradient_penalty(
    judge: Callable[[Latents], Logits],
    x: Latents,
    key: jax.Array,
    *,
    known: LatentMask,
    logits: Logits | None = None,
    weight: float = 1.0,
    sigma: float = 0.1,
) -> jax.Array:
    """weight * mean(((D(x + sigma n) - D(x)) / sigma)^2): R1 at noised real latents, R2 at noised generated ones.

    One direction n a sample is drawn, so that the mean over keys is weight * mean |grad_x D|^2 up to O(sigma^2). A
    smaller sigma is closer to it, until the difference drowns in rounding: in bfloat16 keep it near 0.1 (with 0.01 a
    tiny transformer gave twice the norm). Where others weigh (D(x + sigma n) - D(x))^2 by lambda, as arXiv 2501.08316
    does, weight = lambda * sigma^2.

    Args:
      judge: D of noised latents alone, such as `lambda x: discriminator(x, t, cond)`.
      x: noised latents (b, f, h, w, c), from `noised_latents`.
      key: one key, or one per sample (`flow.draw_noise`).
      known: one where latents are known: D is not probed there, for generated samples can't differ there.
      logits: D(x) where it is there already, which spares a pass.
    """
    step = flow.draw_noise(key, x.shape, x.dtype) * (1 - known).astype(x.dtype)
    logits = judge(x) if logits is None else logits
    return weight * jnp.mean(jnp.square((judge(x + sigma * step) - logits) / sigma))


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The adversarial term of a student's loss, and who judges.

    Attributes:
      weight: of the term in the student's loss; 0 leaves out the term and the role.
      loss: a key of `ADVERSARIAL_LOSSES`. The collapse watch can't take hinge's, which may be negative.
      trunk: whose features are judged: the teacher's, or the fake score's as it is now, which has seen the student.
      layers: the blocks that get a head, numbered as in `MMDiT.__call__`; empty is half-way, three quarters and last.
      hidden: width inside the heads.
      time: density of the noise level of what is judged.
      time_range: the noise level is kept within.
      penalty: weight of R1 and of R2; 0 switches both off. The default is lambda = 100 at sigma = .1, as arXiv
        2501.08316 has it for video.
      sigma: length of the step that they look along, in units of the latents.
    """

    weight: float = 0.0
    loss: Literal["relativistic", "non_saturating", "hinge"] = "relativistic"
    trunk: Literal["teacher", "fake"] = "teacher"
    layers: tuple[int, ...] = ()
    hidden: int = 256
    time: TimeDensity = dataclasses.field(default_factory=TimeDensity)
    time_range: tuple[float, float] = (0.05, 0.98)
    penalty: float = 1.0
    sigma: float = 0.1

    def __post_init__(self) -> None:
        low, high = self.time_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"time_range must rise within [0, 1], got {self.time_range}")
        if min(self.weight, self.penalty) < 0 or self.sigma <= 0 or self.hidden < 1:
            raise ValueError("weight and penalty must not be negative, sigma and hidden must be positive")


@dataclasses.dataclass(frozen=True, eq=False)
class Critic:
    """The role "discriminator": heads on a role's features, their loss, and what they say to the student.

    What each plays for, penalties apart, is the metric "adversarial" of both roles; a collapse watch takes, say,
    "student/video_adversarial" as its generator and "discriminator/video_adversarial" as its critic.

    Attributes:
      config: the term.
      backbone: of the trunk.
      heads: `FeatureHeads`, whose parameters are the role's.
    """

    config: AdversarialConfig
    backbone: Backbone
    heads: Network

    @classmethod
    def create(cls, config: AdversarialConfig, backbone: Backbone) -> Critic:
        """The critic on a backbone; raises `UserError` where config.layers names blocks that it lacks."""
        sizes = FeatureHeadsConfig.on(backbone.frozen_network.config, config.layers, hidden=config.hidden)
        return cls(config, backbone, Network.create(FeatureHeads, sizes))

    def losses(
        self, params: Mapping[str, Params], real: Latents, made: Latents, cond: Conditioning, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The unweighted losses of "student" and "discriminator", and metrics {(role, name): scalar}.

        Real and generated latents pass through the trunk one after the other: the same work as side by side, but that
        the student's gradient goes back through its own half alone.

        Args:
          params: of all roles, the frozen "teacher" among them.
          real, made: clean latents (b, f, h, w, c) of the data and of the student for the same captions.
          cond: their conditioning; known frames have no say.
          key: of the noise and of the penalties.
        """
        config = self.config
        time_key, noise_key, *probe_keys = jax.random.split(key, 4)
        t = jnp.clip(config.time.draw(time_key, real.shape[:1]), *config.time_range)
        noise = flow.draw_noise(noise_key, real.shape)
        features = self.backbone.features(params, config.trunk, self.heads.config.layers)
        judge: Any = functools.partial(discriminator_fn(features, self.heads, params[DISCRIMINATOR]), t=t, cond=cond)  # pyright: ignore[reportCallIssue]
        points = [noised_latents(x, noise, t, cond) for x in (real, made)]
        logits = [judge(x) for x in points]
        of_critic, of_student = ADVERSARIAL_LOSSES[config.loss]
        told, led = of_critic(*logits), of_student(*logits)
        metrics = {(DISCRIMINATOR, "real"): jnp.mean(logits[0]), (DISCRIMINATOR, "generated"): jnp.mean(logits[1])}
        metrics |= {(DISCRIMINATOR, "adversarial"): told, (STUDENT, "adversarial"): led}
        if not config.penalty:
            return {STUDENT: led, DISCRIMINATOR: told}, metrics
        probe = functools.partial(gradient_penalty, judge, known=cond.mask, weight=config.penalty, sigma=config.sigma)
        # The student has no part in them, so nothing is traced for a gradient to its latents.
        constants = [jax.lax.stop_gradient(x) for x in points]
        r1, r2 = (probe(x, k, logits=d) for x, k, d in zip(constants, probe_keys, logits, strict=True))
        metrics |= {(DISCRIMINATOR, "r1"): r1, (DISCRIMINATOR, "r2"): r2}
        return {STUDENT: led, DISCRIMINATOR: told + r1 + r2}, metrics
