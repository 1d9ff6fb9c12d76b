"""From cached records to what a network is conditioned on: captions, known frames, history noise, image tokens.

A video is conditioned on its first k latent frames; k is drawn per sample, and k = 0 is text to video, which sees no
image tokens either. Known frames get a little noise at random (history noise), so that a sampler may chain windows on
its own imperfect output. Captions are dropped at random for guidance; image tokens stay (Magic 1-For-1, section 3).
They come from an image encoder here, or are rows of the cached text states, where the text encoder read the picture.
Flow matching and the distillation methods condition alike, by this one class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from magic141_jax.diffusion import conditioning
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Images, Times

Record = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """How a sample of the data is conditioned.

    Attributes:
      known_frames: probabilities of 0, 1, 2, ... known leading latent frames of a video; 0 is text to video.
      history_noise_probability: how often the known frames are noised.
      history_noise_min, history_noise_max: their noise level is then drawn from U[min, max].
      caption_dropout: how often the caption is replaced by the empty one.
    """

    known_frames: tuple[float, ...] = (0.0, 0.6, 0.4)
    history_noise_probability: float = 0.5
    history_noise_min: float = 0.0
    history_noise_max: float = 0.2
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.known_frames or abs(sum(self.known_frames) - 1) > 1e-6 or min(self.known_frames) < 0:
            raise ValueError(f"known_frames are probabilities that sum to 1, got {self.known_frames}")
        for name in ("history_noise_probability", "history_noise_max", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.history_noise_min <= self.history_noise_max:
            raise ValueError(
                "history_noise_min must be between 0 and history_noise_max, got"
                f" {self.history_noise_min} and {self.history_noise_max}"
            )

    def shown(self, frames: int) -> int:
        """How many of `frames` latent frames are known where samples are looked at: the first, if any ever is."""
        return min(int(any(self.known_frames[1:])), frames - 1)


@dataclasses.dataclass(frozen=True)
class NullText:
    """The text states of the empty caption, as constants: text (s, e), text_mask (s,), pooled (p,). No image rows."""

    text: Float[Array, "s e"]
    text_mask: Bool[Array, " s"]
    pooled: Float[Array, " p"]


@dataclasses.dataclass(frozen=True, eq=False)
class Conditioner:
    """Makes the conditioning of a batch of cached records.

    Attributes:
      config: what is drawn.
      image_encoder: gives image tokens in the text width; None goes without them.
      null_text: the empty caption's states.
      image_rows: how many leading rows of the cached text states are image tokens.
    """

    config: ConditioningConfig
    image_encoder: Network | None
    null_text: NullText
    image_rows: int = 0

    def draw_known(self, key: jax.Array, shape: tuple[int, ...]) -> Int[Array, " b"]:
        """Numbers of known latent frames for latents of `shape` (b, f, ...); at least one frame stays unknown."""
        chances = jnp.asarray(self.config.known_frames)
        return jnp.minimum(jax.random.choice(key, chances.size, shape[:1], p=chances), shape[1] - 1)

    def condition(
        self,
        encoder: Params | None,
        record: Record,
        key: jax.Array | None,
        known: Int[Array, " b"],
        *,
        image_tokens: bool,
    ) -> Conditioning:
        """The conditioning of a record, captions dropped at random (without a key none is).

        Args:
          encoder: parameters of the image encoder.
          record: latents (b, f, h, w, c), text (b, s, e), text_mask (b, s), pooled (b, p), anchor (b, y, x, 3).
          key: of the captions' draws.
          known: how many leading latent frames each sample knows.
          image_tokens: whether the anchor's stand before the text; samples without known frames don't see them.
        """
        text, text_mask, pooled = (jnp.asarray(record[name]) for name in ("text", "text_mask", "pooled"))
        count = self.image_rows
        if not image_tokens:
            text, text_mask, count = text[:, count:], text_mask[:, count:], 0
        latents = record["latents"].astype(jnp.float32)
        held, mask = conditioning.known_latents(latents, known, latents.shape[1])
        if image_tokens and self.image_encoder is not None:
            tokens = self.image_encoder(encoder, as_float(record["anchor"]))
            count += tokens.shape[1]
            text, text_mask = conditioning.with_image_tokens(text, text_mask, tokens)
        if count:
            is_text = jnp.arange(text.shape[1]) >= count
            text_mask &= is_text[None, :] | (known > 0)[:, None]
        cond = Conditioning(
            text.astype(jnp.float32), text_mask, pooled.astype(jnp.float32), held, mask, image_tokens=count
        )
        return cond if key is None else self.drop_captions(cond, key)

    def clean(self, encoder: Params | None, record: Record, known: int) -> Conditioning:
        """The conditioning as in sampling: `known` leading frames without noise, every caption there."""
        counts = jnp.full(record["latents"].shape[:1], known)
        return self.condition(encoder, record, None, counts, image_tokens=known > 0)

    def drop_captions(self, cond: Conditioning, key: jax.Array) -> Conditioning:
        """The same conditioning with the empty caption at random places of the batch; image tokens stay."""
        drop = jax.random.bernoulli(key, self.config.caption_dropout, cond.text.shape[:1])
        empty = self.negative(cond)
        return dataclasses.replace(
            cond,
            text=jnp.where(drop[:, None, None], empty.text, cond.text),
            text_mask=jnp.where(drop[:, None], empty.text_mask, cond.text_mask),
            pooled=jnp.where(drop[:, None], empty.pooled, cond.pooled),
        )

    def negative(self, cond: Conditioning) -> Conditioning:
        """The same conditioning with the empty caption, the other branch of guidance; image tokens stay."""
        null = self.null_text
        return conditioning.replace_text(cond, null.text[None], null.text_mask[None], null.pooled[None])

    def noise_history(self, cond: Conditioning, key: jax.Array) -> Conditioning:
        """The conditioning with history noise on known frames, at random (`conditioning.noise_known`)."""
        chance_key, level_key, noise_key = jax.random.split(key, 3)
        batch = cond.known.shape[:1]
        noised = jax.random.bernoulli(chance_key, self.config.history_noise_probability, batch)
        limits = {"minval": self.config.history_noise_min, "maxval": self.config.history_noise_max}
        level: Times = noised * jax.random.uniform(level_key, batch, **limits)
        return conditioning.noise_known(cond, noise_key, level)


def as_float(pixels: jax.Array) -> Images:
    """uint8 pixels as floats in [0, 1]; floats pass."""
    return pixels.astype(jnp.float32) / 255 if pixels.dtype == jnp.uint8 else pixels


def weighted_mean(values: Float[Array, "b f h w c"], weights: Float[Array, "b f h w 1"]) -> Float[Array, " b"]:
    """Per sample, the mean of values over latent positions with these weights, and over channels."""
    axes = (1, 2, 3, 4)
    return jnp.sum(values * weights, axes) / (jnp.sum(weights, axes) * values.shape[-1])
