"""Flow matching of text to image, image to video and text to video, jointly (Magic 1-For-1, section 3).

A batch holds cached records of images, of videos, or of both. For each sample

    x_t = (1 - t) x0 + t eps        loss = mean over unknown frames of |v(x_t, t, conditioning) - (eps - x0)|^2

Records are conditioned as `train/conditioner.py` says: on no frame, on the first, or on some; a share without caption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from magic141_jax.diffusion import flow, samplers, timesteps
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.models import seam
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, Record, weighted_mean
from magic141_jax.train.method import Batch, Metrics, Parts

STUDENT = "student"
MINIMUM_TIME = 0.05  # below it a predicted sample is not turned into a velocity exactly, see diffusion/flow.py
SAMPLING_STEPS = 12  # of the samples that are looked at while training goes on


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig(ConditioningConfig):
    """What is drawn for each sample, besides its conditioning.

    Attributes:
      image_time, video_time: densities of t, each with its own shift.
      known_weight: weight of the known frames in the loss against the unknown ones. In sampling they travel the
        path as well, so some weight keeps them on it; 0 leaves them out.
      image_weight, video_weight: weights of the two halves of the batch.
      init_records: captions on which the first maps of the text are fitted, see `whitening.fit_text`; 0 draws them.
    """

    image_time: TimeDensity = dataclasses.field(default_factory=TimeDensity)
    video_time: TimeDensity = dataclasses.field(default_factory=lambda: TimeDensity(shift=3.0))
    known_weight: float = 0.1
    image_weight: float = 1.0
    video_weight: float = 1.0
    init_records: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class FlowMatching:
    """The method: one role, "student", of the transformer and the image encoder that feeds it.

    Attributes:
      config: what is drawn.
      transformer: an MMDiT.
      conditioner: of records; its image encoder is trained along.
    """

    config: FlowMatchingConfig
    transformer: Network
    conditioner: Conditioner
    roles: tuple[str, ...] = (STUDENT,)
    cadence: Mapping[str, int] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)

    Config = FlowMatchingConfig

    @classmethod
    def build(cls, config: FlowMatchingConfig, parts: Parts) -> FlowMatching:
        """The method over an experiment's networks."""
        return cls(config, parts.network, parts.conditioner(config))

    def init(self, key: jax.Array) -> dict[str, Params]:
        """Fresh parameters {"student": {"transformer": ..., "image_encoder": ...}}."""
        first, second = jax.random.split(key)
        params = {"transformer": self.transformer.init(first)}
        if self.conditioner.image_encoder is not None:
            params["image_encoder"] = self.conditioner.image_encoder.init(second)
        return {STUDENT: params}

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The folders "transformer" and "image_encoder"."""
        student, encoder = params[STUDENT], self.conditioner.image_encoder
        made = {"transformer": ("mmdit", self.transformer.config, student["transformer"])}
        if encoder is not None:
            made["image_encoder"] = ("image_encoder", encoder.config, student["image_encoder"])
        return made

    def sample(
        self, params: Mapping[str, Params], record: Record, key: jax.Array, *, known: int, keep: bool = True
    ) -> Latents:
        """Samples like the record's latents by an Euler walk without guidance, from their first `known` frames.

        `keep` is that of `samplers.sample`.
        """
        student, shape = params[STUDENT], record["latents"].shape
        cond = self.conditioner.clean(student.get("image_encoder"), record, known)
        times = timesteps.grid(SAMPLING_STEPS, self.config.video_time.shift)
        velocity = seam.velocity_fn(self.transformer, student["transformer"])
        return samplers.sample(velocity, cond, flow.draw_noise(key, shape), times, keep=keep)

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """The weighted sum over the batch's halves; metrics `t2i`, `i2v`, `t2v` are the plain errors of each task."""
        del step
        config, student = self.config, params[STUDENT]
        total = jnp.zeros(())
        metrics: Metrics = {}
        image_key, video_key = jax.random.split(key)
        if "image" in batch:
            known = jnp.zeros(batch["image"]["latents"].shape[0], jnp.int32)
            loss, error = self._errors(student, batch["image"], image_key, known, config.image_time)
            total += config.image_weight * jnp.mean(loss)
            metrics["t2i"] = jnp.mean(error)
        if "video" in batch:
            count_key, video_key = jax.random.split(video_key)
            known = self.conditioner.draw_known(count_key, batch["video"]["latents"].shape)
            loss, error = self._errors(student, batch["video"], video_key, known, config.video_time, video=True)
            total += config.video_weight * jnp.mean(loss)
            metrics["i2v"] = _mean_where(error, known > 0)
            metrics["t2v"] = _mean_where(error, known == 0)
        return {STUDENT: total}, metrics

    def _errors(
        self,
        student: Params,
        record: Mapping[str, jax.Array],
        key: jax.Array,
        known: Int[Array, " b"],
        density: TimeDensity,
        *,
        video: bool = False,
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Per sample: the loss (known frames weighted in) and the mean squared error over the unknown frames."""
        time_key, noise_key, history_key, text_key = jax.random.split(key, 4)
        latents = record["latents"].astype(jnp.float32)
        cond = self.conditioner.condition(student.get("image_encoder"), record, text_key, known, image_tokens=video)
        cond = self.conditioner.noise_history(cond, history_key)
        t = density.draw(time_key, latents.shape[:1])
        if self.transformer.config.prediction == "sample":
            t = jnp.maximum(t, MINIMUM_TIME)
        noise = flow.draw_noise(noise_key, latents.shape)
        velocity = seam.velocity_fn(self.transformer, student["transformer"])
        predicted = velocity(flow.interpolate(latents, noise, t), t, cond)
        squared = (predicted.astype(jnp.float32) - flow.velocity_target(latents, noise)) ** 2
        unknown = 1 - cond.mask
        return weighted_mean(squared, unknown + self.config.known_weight * cond.mask), weighted_mean(squared, unknown)


def _mean_where(values: Float[Array, " b"], chosen: Bool[Array, " b"]) -> jax.Array:
    """The mean over the chosen samples; NaN if there are none."""
    return jnp.sum(values * chosen) / jnp.sum(chosen)
