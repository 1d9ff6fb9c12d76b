"""An adapter that goes on from a window's own latents, with the first picture in sight.

A window of a long video that starts from pixels encoded anew inherits what is wrong with them, and errors add up: those
of the autoencoder alone ruin a picture in thirty trips. Here nothing is encoded anew. The first latent frame of every
window is that of the first picture, true for ever (a frame sink, LongLive, arXiv 2509.22622; StreamingLLM, arXiv
2309.17453), and behind it stand the last latents of the window before:

    window 0   z_0 | n_1 n_2 n_3 n_4          window w   z_0 | h_1 ... h_{k-1} | n_k ...        h = last k - 1 latents

For an image-to-video network these are odd clips: a moment lies between z_0 and h that may be a minute. A LoRA learns
them, from clips many windows long cut at every place, and from histories as they are in sampling, the network's own:

    x_t = (1 - t) n + t eps,  t one of the walk's times      loss = |v(x_t, t | z_0, h') - (x_t - n) / t|^2
    h' = the data's own latents in the first window of a chain, then x_t - t v of the window before, noised a little

(recycled errors under a clean target: Stable Video Infinity, arXiv 2510.09212). What was lost from h' is found in z_0.
A few steps are enough without a teacher: what follows h' is nearly certain, so x_t - t v hardly depends on t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation, DistillationConfig, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.errors import UserError
from magic141_jax.models import lora
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents
from magic141_jax.train.conditioner import Record, weighted_mean


@dataclasses.dataclass(frozen=True)
class ContinuationConfig(DistillationConfig):
    """What the adapter learns.

    Attributes:
      walk: the steps of the frozen student, which makes window 0.
      frames: latent frames of a window.
      overlap: k, how many of them are known: the first picture's, and k - 1 of the window before.
      chain: how many windows follow each other.
      history_noise: the level with which the adapter is to be sampled.
    """

    roles: RolesConfig = dataclasses.field(default_factory=lambda: RolesConfig(student="adapter"))
    walk: WalkConfig = dataclasses.field(default_factory=lambda: WalkConfig(sampler="euler"))
    frames: int = 5
    overlap: int = 2
    chain: int = 2
    history_noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.roles.student != "adapter":
            raise ValueError("what goes on is an adapter: roles.student is 'adapter'")
        if not 2 <= self.overlap < self.frames or self.chain < 1:
            raise ValueError(
                "a window knows the first picture and a latent before it, and makes one at least, in chains of 1 or"
                f" more; got {self.overlap} of {self.frames} known, chains of {self.chain}"
            )
        if not 0 <= self.history_noise <= 1:
            raise ValueError(f"history_noise is a level from 0 to 1, got {self.history_noise}")

    @property
    def fresh(self) -> int:
        """How many latents a window adds."""
        return self.frames - self.overlap

    @property
    def length(self) -> int:
        """The latents of a chain: its first history and all that it adds."""
        return self.overlap - 1 + self.chain * self.fresh


class Continuation(Distillation):
    """The method: role "student" is the adapter, over the frozen "teacher" that makes window 0."""

    Config = ContinuationConfig

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The adapter alone; the export's other components are those of config.components_from."""
        config = self.config
        found = lora.ContinuationConfig(config.roles.rank, config.roles.paths, config.overlap, config.history_noise)
        return {"continuation": ("continuation", found, params[STUDENT]["adapter"])}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part: of a chain somewhere in each clip.

        Raises:
          UserError: the clips are too short for one.
        """
        config, conditioner = self.config, self.backbone.conditioner
        start_key, text_key, chain_key = jax.random.split(key, 3)
        data = record["latents"].astype(jnp.float32)
        batch, places = len(data), data.shape[1] - config.length
        if places < 1:
            raise UserError(
                f"clips of {data.shape[1]} latent frames; a chain takes {config.length} behind the first: prepare"
                " longer ones, or lower method.chain"
            )
        sink = data[:, :1]
        start = jax.random.randint(start_key, (batch, 1), 1, places + 1)
        chain = jnp.take_along_axis(data, (start + jnp.arange(config.length)[None])[:, :, None, None, None], axis=1)
        told = {**record, "latents": data[:, : config.frames]}
        known = jnp.full(batch, config.overlap)
        cond = conditioner.condition(params[TEACHER].get("image_encoder"), told, text_key, known, image_tokens=True)
        cond = dataclasses.replace(cond, sink=True)
        velocity = self.backbone.velocity(params, STUDENT, trained=True)

        def window(history: Latents, inputs: tuple[jax.Array, jax.Array]) -> tuple[Latents, Float[Array, " b"]]:
            first, key = inputs
            history_key, time_key, noise_key = jax.random.split(key, 3)
            clean = jax.lax.dynamic_slice_in_dim(chain, first, config.frames - 1, axis=1)
            clean = jnp.concatenate([sink, clean], axis=1)
            shown = jnp.concatenate([sink, history], axis=1)
            seen = conditioner.noise_history(conditioning.with_known(cond, shown), history_key)
            t = config.walk.times[jax.random.randint(time_key, (batch,), 0, config.walk.steps)]
            x = flow.interpolate(clean, flow.draw_noise(noise_key, clean.shape), t)
            made = velocity(x, t, seen).astype(jnp.float32)
            error = weighted_mean((made - (x - clean) / flow.align(t, x)) ** 2, 1 - seen.mask)
            left = flow.sample_from_velocity(x, t, made)[:, 1 - config.overlap :]
            return jax.lax.stop_gradient(left), error

        places = config.fresh * jnp.arange(config.chain)
        keys = jax.random.split(chain_key, config.chain)
        _, errors = jax.lax.scan(window, chain[:, : config.overlap - 1], (places, keys))
        losses = errors.mean(1)
        found = {"error": losses.mean(), "error_first": losses[0], "error_last": losses[-1]}
        return {STUDENT: losses.mean()}, {(STUDENT, name): value for name, value in found.items()}

    def sampled(self, record: Record) -> Record:
        """A clip's second window, or the last there is: its first latent frame, then the history and what follows."""
        config, data = self.config, record["latents"]
        start = min(config.fresh + 1, data.shape[1] - config.frames + 1)
        window = data[:, start : start + config.frames - 1]
        return {**record, "latents": jnp.concatenate([data[:, :1], window], axis=1)}

    def told(self, params: Mapping[str, Params], record: Record, known: int) -> Conditioning:
        """The sink and the history, whatever else is `known`: the adapter makes no other window."""
        return dataclasses.replace(super().told(params, record, self.config.overlap), sink=True)
