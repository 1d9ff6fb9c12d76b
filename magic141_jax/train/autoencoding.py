"""Training of a causal video VAE: reconstruction, perceptual, KL and, if wanted, adversarial terms.

    loss = l1 |r - x| + gradient (|dx r - dx x| + |dy ..| + |dt ..|) + mse (r - x)^2 + kl KL(q || N(0, 1))
           + perceptual sum over pyramid levels |L_i(r) - L_i(x)| + adversarial G(r)

All terms are means over values, with frames in [-1, 1]. The gradient terms keep edges sharp and motion in step; the
perceptual term is an L1 between Laplacian pyramids of the frames, which weighs coarse structure as much as detail and
needs no pretrained network. The adversary is a small patch discriminator, its loss one of `train/adversarial.py`.
Clips are cut at random from the batch's frames, 4k + 1 of them, so one batch shape serves every crop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from magic141_jax.models.discriminator import Discriminator, DiscriminatorConfig
from magic141_jax.models.network import Network
from magic141_jax.models.vae import latent_frames, sample_posterior
from magic141_jax.pytree import Params
from magic141_jax.shapes import Frames
from magic141_jax.train.adversarial import ADVERSARIAL_LOSSES
from magic141_jax.train.conditioner import as_float
from magic141_jax.train.method import Batch, Metrics, Parts

VAE, DISCRIMINATOR = "vae", "discriminator"
PYRAMID_LEVELS = 3


@dataclasses.dataclass(frozen=True)
class AutoencodingConfig:
    """Weights of the terms (0 leaves a term out) and the size of the random crop.

    Attributes:
      crop_frames: frames of a crop, 4k + 1; 0 takes the whole clip.
      crop_size: height and width of a crop, a multiple of the VAE's spatial factor; 0 takes the whole frame.
      adversarial: weight of the generator's adversarial term; 0 trains no discriminator at all.
      adversarial_start: the step from which it counts (the discriminator learns from the start).
      train_encoder: False trains the decoder alone, so that latents made before stay valid. Give such a run
        `init_from`, whose latent statistics it keeps, and no weight decay.
      init_records: clips on which a start that depends on the data is fitted (a PatchVAE's principal components);
        0 starts at random.
    """

    crop_frames: int = 0
    crop_size: int = 0
    l1: float = 1.0
    gradient: float = 1.0
    mse: float = 1.0
    kl: float = 1e-4
    perceptual: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 0
    adversarial_loss: Literal["relativistic", "non_saturating", "hinge"] = "relativistic"
    train_encoder: bool = True
    init_records: int = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoding:
    """The method: role "vae" and, with an adversarial weight, role "discriminator".

    Attributes:
      config: weights and crops.
      vae: a `VideoVAE`.
      model_name: the VAE's name in a weights folder's config.json.
      discriminator: a network from frames (b, t, y, x, 3) in [-1, 1] to logits; needed if its weight is not 0.
    """

    config: AutoencodingConfig
    vae: Network
    model_name: str = "patch_vae"
    discriminator: Network | None = None
    cadence: Mapping[str, int] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        config, sizes = self.config, self.vae.config
        if config.adversarial and self.discriminator is None:
            raise ValueError("an adversarial weight needs a discriminator")
        if config.crop_size % sizes.spatial_factor:
            raise ValueError(f"crop_size {config.crop_size} is not a multiple of {sizes.spatial_factor}")
        if config.crop_frames:
            latent_frames(config.crop_frames, sizes.temporal_factor)

    Config = AutoencodingConfig

    @classmethod
    def build(cls, config: AutoencodingConfig, parts: Parts) -> Autoencoding:
        """The method over an experiment's network, with a fresh discriminator where one is wanted."""
        parts.raw_records()
        discriminator = Network.create(Discriminator, DiscriminatorConfig()) if config.adversarial else None
        return cls(config, parts.network, model_name=parts.model_name, discriminator=discriminator)

    @property
    def roles(self) -> tuple[str, ...]:
        """One role, or two with an adversary."""
        return (VAE, DISCRIMINATOR) if self.config.adversarial else (VAE,)

    def init(self, key: jax.Array) -> dict[str, Params]:
        """Fresh parameters of both roles."""
        first, second = jax.random.split(key)
        params = {VAE: self.vae.init(first)}
        if self.config.adversarial:
            params[DISCRIMINATOR] = self.discriminator.init(second)  # pyright: ignore[reportOptionalMemberAccess]
        return params

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The folder "vae"."""
        return {"vae": (self.model_name, self.vae.config, params[VAE])}

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """Losses of a batch {"image" and/or "video": {"frames": (b, t, y, x, 3)}}, uint8 or in [0, 1].

        The parts count alike. Metrics are the terms, and PSNR in dB, all named `<part>/<term>`.
        """
        totals: dict[str, jax.Array] = {}
        metrics: Metrics = {}
        for number, (part, record) in enumerate(sorted(batch.items())):
            losses, terms = self._part(params, record["frames"], jax.random.fold_in(key, number), step)
            totals = {role: totals.get(role, 0.0) + loss / len(batch) for role, loss in losses.items()}
            metrics |= {f"{part}/{name}": value for name, value in terms.items()}
        return totals, metrics

    def _part(
        self, params: Mapping[str, Params], frames: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        config = self.config
        crop_key, sample_key = jax.random.split(key)
        target = 2 * as_float(crop(frames, crop_key, config.crop_frames, config.crop_size)) - 1
        mean, logvar = self.vae(params[VAE], target, method="encode")
        if not config.train_encoder:
            mean, logvar = jax.lax.stop_gradient((mean, logvar))
        restored = self.vae(params[VAE], sample_posterior(sample_key, mean, logvar), method="decode")
        restored = restored.astype(jnp.float32)
        terms = reconstruction_terms(restored, target)
        terms["kl"] = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        if config.perceptual:
            terms["perceptual"] = pyramid_distance(restored, target)
        losses = {VAE: sum(getattr(config, name) * value for name, value in terms.items())}
        metrics = {**terms, "psnr": _psnr(restored, target), "psnr_first": _psnr(restored[:, :1], target[:, :1])}
        if config.adversarial:
            generator, losses[DISCRIMINATOR] = self._adversarial(params[DISCRIMINATOR], restored, target)
            losses[VAE] += config.adversarial * (step >= config.adversarial_start) * generator
            metrics["adversarial"] = generator
        return losses, metrics

    def _adversarial(self, params: Params, restored: Frames, target: Frames) -> tuple[jax.Array, jax.Array]:
        """The generator's and the discriminator's loss."""
        of_critic, of_generator = ADVERSARIAL_LOSSES[self.config.adversarial_loss]
        shown = (target, restored, jax.lax.stop_gradient(restored))
        real, fake, detached = (self.discriminator(params, frames) for frames in shown)
        return of_generator(real, fake), of_critic(real, detached)


def crop(frames: jax.Array, key: jax.Array, length: int, size: int) -> jax.Array:
    """Cuts from each clip (b, t, y, x, 3) its own random piece (length, size, size); 0 or too much keeps an axis."""
    b, t, y, x, c = frames.shape
    shape = (min(length or t, t), min(size or y, y), min(size or x, x))
    if shape == (t, y, x):
        return frames
    room = jnp.array([t - shape[0], y - shape[1], x - shape[2]])
    starts = jax.random.randint(key, (b, 3), 0, room[None] + 1)

    def cut(clip: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(clip, (*start, 0), (*shape, c))

    return jax.vmap(cut)(frames, starts)


def reconstruction_terms(restored: Frames, target: Frames) -> dict[str, jax.Array]:
    """The terms l1, mse and gradient (L1 of finite differences in time, y and x)."""
    error = restored - target
    differences = [jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2, 3) if error.shape[axis] > 1]
    return {"l1": jnp.mean(jnp.abs(error)), "mse": jnp.mean(error**2), "gradient": sum(differences)}


def pyramid_distance(restored: Frames, target: Frames) -> jax.Array:
    """The sum over Laplacian pyramid levels of the L1 distance, each level weighted alike.

    The pyramid is linear, so the distance is that of the error's own pyramid; a level is what 2x2 average pooling
    loses, the last one what it leaves.
    """
    rest = restored - target
    total = jnp.zeros(())
    for _ in range(PYRAMID_LEVELS):
        b, t, y, x, c = rest.shape
        if y % 2 or x % 2:
            break
        small = rest.reshape(b, t, y // 2, 2, x // 2, 2, c).mean((3, 5))
        total += jnp.mean(jnp.abs(rest - small.repeat(2, 2).repeat(2, 3)))
        rest = small
    return total + jnp.mean(jnp.abs(rest))


def _psnr(restored: Frames, target: Frames) -> jax.Array:
    """Mean over clips of the PSNR in dB, frames clipped to [-1, 1]."""
    error = jnp.mean((jnp.clip(restored, -1, 1) - target) ** 2, (1, 2, 3, 4)) / 4
    return jnp.mean(-10 * jnp.log10(jnp.maximum(error, 1e-10)))
