"""Flow matching of text to image, image to video and text to video, jointly (Magic 1-For-1, section 3).

A batch holds cached records of images, of videos, or of both. For each sample

    x_t = (1 - t) x0 + t eps        loss = mean over unknown frames of |v(x_t, t, conditioning) - (eps - x0)|^2

A video is conditioned on its first k latent frames; k is drawn per sample, and k = 0 is text to video, which sees no
image tokens either. Known frames get a little noise at random (history noise), so that a sampler may chain windows
on its own imperfect output. Captions are dropped at random for guidance; image tokens stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.models import mmdit
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Images, Latents, Pooled, Times, TokenMask, Tokens
from magic141_jax.train.method import Batch, Metrics

STUDENT = "student"
MINIMUM_TIME = 0.05  # below it a predicted sample is not turned into a velocity exactly, see diffusion/flow.py


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """What is drawn for each sample.

    Attributes:
      image_time, video_time: densities of t, each with its own shift.
      known_frames: probabilities of 0, 1, 2, ... known leading latent frames of a video; 0 is text to video.
      history_noise_probability: how often the known frames are noised.
      history_noise_max: their noise level is then drawn from U[0, this].
      caption_dropout: how often the caption is replaced by the empty one.
      known_weight: weight of the known frames in the loss against the unknown ones. In sampling they travel the
        path as well, so some weight keeps them on it; 0 leaves them out.
      image_weight, video_weight: weights of the two halves of the batch.
      init_records: captions on which the first maps of the text are fitted, see `mmdit.fit_text`; 0 draws them.
    """

    image_time: TimeDensity = dataclasses.field(default_factory=TimeDensity)
    video_time: TimeDensity = dataclasses.field(default_factory=lambda: TimeDensity(shift=3.0))
    known_frames: tuple[float, ...] = (0.0, 0.6, 0.4)
    history_noise_probability: float = 0.5
    history_noise_max: float = 0.2
    caption_dropout: float = 0.1
    known_weight: float = 0.1
    image_weight: float = 1.0
    video_weight: float = 1.0
    init_records: int = 0

    def __post_init__(self) -> None:
        if not self.known_frames or abs(sum(self.known_frames) - 1) > 1e-6 or min(self.known_frames) < 0:
            raise ValueError(f"known_frames are probabilities that sum to 1, got {self.known_frames}")
        for name in ("history_noise_probability", "history_noise_max", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class NullText:
    """The text states of the empty caption, as constants: text (s, e), text_mask (s,), pooled (p,)."""

    text: Float[Array, "s e"]
    text_mask: Bool[Array, " s"]
    pooled: Float[Array, " p"]


@dataclasses.dataclass(frozen=True, eq=False)
class FlowMatching:
    """The method: one role, "student", of the transformer and the image encoder that feeds it.

    Attributes:
      config: what is drawn.
      transformer: an MMDiT.
      image_encoder: gives image tokens in the text width; None trains without them.
      null_text: the empty caption's states.
    """

    config: FlowMatchingConfig
    transformer: Network
    image_encoder: Network | None
    null_text: NullText
    roles: tuple[str, ...] = (STUDENT,)
    cadence: Mapping[str, int] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)

    def init(self, key: jax.Array) -> dict[str, Params]:
        """Fresh parameters {"student": {"transformer": ..., "image_encoder": ...}}."""
        first, second = jax.random.split(key)
        params = {"transformer": self.transformer.init(first)}
        if self.image_encoder is not None:
            params["image_encoder"] = self.image_encoder.init(second)
        return {STUDENT: params}

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The folders "transformer" and "image_encoder"."""
        made = {"transformer": ("mmdit", self.transformer.config, params[STUDENT]["transformer"])}
        if self.image_encoder is not None:
            made["image_encoder"] = ("image_encoder", self.image_encoder.config, params[STUDENT]["image_encoder"])
        return made

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
            known = self._draw_known(count_key, batch["video"]["latents"].shape[:2])
            loss, error = self._errors(student, batch["video"], video_key, known, config.video_time, video=True)
            total += config.video_weight * jnp.mean(loss)
            metrics["i2v"] = _mean_where(error, known > 0)
            metrics["t2v"] = _mean_where(error, known == 0)
        return {STUDENT: total}, metrics

    def _draw_known(self, key: jax.Array, shape: tuple[int, int]) -> Int[Array, " b"]:
        """Numbers of known latent frames; at least one frame of a clip stays unknown."""
        batch, frames = shape
        chances = jnp.asarray(self.config.known_frames)
        return jnp.minimum(jax.random.choice(key, chances.size, (batch,), p=chances), frames - 1)

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
        cond = self.condition(student, record, text_key, known, image_tokens=video)
        cond = self._noise_history(cond, history_key)
        t = density.draw(time_key, latents.shape[:1])
        if self.transformer.config.prediction == "sample":
            t = jnp.maximum(t, MINIMUM_TIME)
        noise = flow.draw_noise(noise_key, latents.shape)
        velocity = mmdit.velocity_fn(self.transformer, student["transformer"])
        predicted = velocity(flow.interpolate(latents, noise, t), t, cond)
        squared = (predicted.astype(jnp.float32) - flow.velocity_target(latents, noise)) ** 2
        unknown = 1 - cond.mask
        return _weighted_mean(squared, unknown + self.config.known_weight * cond.mask), _weighted_mean(squared, unknown)

    def condition(
        self,
        student: Params,
        record: Mapping[str, jax.Array],
        key: jax.Array | None,
        known: Int[Array, " b"],
        *,
        image_tokens: bool,
    ) -> conditioning.Conditioning:
        """The conditioning of a batch of cached records, captions dropped at random (without a key none is).

        Image tokens come from each record's `anchor` picture; samples without known frames don't see them.
        """
        text, text_mask, pooled = (jnp.asarray(record[name]) for name in ("text", "text_mask", "pooled"))
        if key is not None:
            text, text_mask, pooled = self._drop_captions(record, key)
        latents = record["latents"].astype(jnp.float32)
        held, mask = conditioning.known_latents(latents, known, latents.shape[1])
        count = 0
        if image_tokens and self.image_encoder is not None:
            tokens = self.image_encoder(student["image_encoder"], as_float(record["anchor"]))
            count = tokens.shape[1]
            text, text_mask = conditioning.with_image_tokens(text, text_mask, tokens)
            is_text = jnp.arange(text.shape[1]) >= count
            text_mask &= is_text[None, :] | (known > 0)[:, None]
        return conditioning.Conditioning(
            text.astype(jnp.float32), text_mask, pooled.astype(jnp.float32), held, mask, image_tokens=count
        )

    def _drop_captions(self, record: Mapping[str, jax.Array], key: jax.Array) -> tuple[Tokens, TokenMask, Pooled]:
        drop = jax.random.bernoulli(key, self.config.caption_dropout, record["latents"].shape[:1])
        null = self.null_text
        text = jnp.where(drop[:, None, None], null.text[None], record["text"])
        mask = jnp.where(drop[:, None], null.text_mask[None], record["text_mask"])
        pooled = jnp.where(drop[:, None], null.pooled[None], record["pooled"])
        return text, mask, pooled

    def _noise_history(self, cond: conditioning.Conditioning, key: jax.Array) -> conditioning.Conditioning:
        chance_key, level_key, noise_key = jax.random.split(key, 3)
        batch = cond.known.shape[:1]
        noised = jax.random.bernoulli(chance_key, self.config.history_noise_probability, batch)
        level: Times = noised * jax.random.uniform(level_key, batch, maxval=self.config.history_noise_max)
        return conditioning.noise_known(cond, noise_key, level)


def as_float(pixels: jax.Array) -> Images:
    """uint8 pixels as floats in [0, 1]; floats pass."""
    return pixels.astype(jnp.float32) / 255 if pixels.dtype == jnp.uint8 else pixels


def _weighted_mean(values: Latents, weights: Float[Array, "b f h w 1"]) -> Float[Array, " b"]:
    axes = (1, 2, 3, 4)
    return jnp.sum(values * weights, axes) / (jnp.sum(weights, axes) * values.shape[-1])


def _mean_where(values: Float[Array, " b"], chosen: Bool[Array, " b"]) -> jax.Array:
    """The mean over the chosen samples; NaN if there are none."""
    return jnp.sum(values * chosen) / jnp.sum(chosen)
