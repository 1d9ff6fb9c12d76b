"""A student that goes on from its own windows: what it made wrong in one, it learns to mend in the next.

A long video is made window by window; the known frames of one are the last of the window before, made by the student,
decoded and encoded anew. Their errors are in no data, and add up. So a chain of windows is walked here as sampling
does it, from noise or from data noised to a time t_s of the walk, which leaves things where the data has them:

    h_0 = first latents of the data      h_{w+1} = encode(last frames of decode(walk from x_{t_s}, known h_w))

without gradient (training on own rollouts: Self Forcing, arXiv 2506.08009; recycled errors under a clean target: Stable
Video Infinity, arXiv 2510.09212). In each window the student, told h_w, then learns what the teacher does when it is
told the data's own first latents, with y the teacher's steps of `trajectory`:

    loss = mean over unknown latents of (v_student(x_t, t_i, h_w) - (y - x_t) / (t_{i+1} - t_i))^2

With the student that one starts from as the teacher (guidance 1, one substep), mending is all there is to learn. What
is lost from h_w stands in the first image still, whose tokens every window has before its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.diffusion import conditioning, flow, samplers
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.distill.roles import STUDENT, TEACHER, Backbone
from magic141_jax.distill.trajectory import Trajectory, TrajectoryConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents
from magic141_jax.train.conditioner import Record
from magic141_jax.train.method import Parts


@dataclasses.dataclass(frozen=True)
class StreamingConfig(TrajectoryConfig):
    """The chain.

    Attributes:
      windows: N, of the data's chains (`python -m magic141_jax.data prepare --windows`).
      overlap: how many latent frames the next window knows.
      resume: s; 0 walks from pure noise, and things may come to stand where the data's next window has them not.
      restart: how often a window is walked from the data's own first latents: errors of one window are learned to be
        mended before those of several, and more often.
    """

    guidance: float = 1.0
    substeps: int = 1
    windows: int = 4
    overlap: int = 1
    resume: int = 1
    restart: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 2 or self.overlap < 1:
            raise ValueError(f"a chain has 2 windows or more that share a latent, got {self.windows}, {self.overlap}")
        if not 0 <= self.resume < self.walk.steps:
            raise ValueError(f"resume is one of the {self.walk.steps} steps of the walk, from 0; got {self.resume}")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"restart is a probability, got {self.restart}")


@dataclasses.dataclass(frozen=True, eq=False)
class Streaming(Trajectory):
    """The method: role "student" over a frozen "teacher", clips by chains, images as in `Trajectory`.

    Attributes:
      vae: decodes and encodes what the student made; its parameters lie among the frozen ones.
    """

    vae: Network

    Config = StreamingConfig

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Any:
        """The method over an experiment's teacher and VAE."""
        backbone = Backbone.create(config.roles, parts, parts.conditioner(config))
        vae, params = parts.vae()
        return cls(config, dataclasses.replace(backbone, frozen={**backbone.frozen, "vae": params}), vae)

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part."""
        if part == "image":
            return super().part(params, part, record, key)
        text_key, chain_key, noise_key, key = jax.random.split(key, 4)
        count, windows = self.config.overlap, self._windows(record)
        conditioner, batch = self.backbone.conditioner, windows.shape[0]
        first, known = self.sampled(record), jnp.full(batch, count)
        encoder = params[TEACHER].get("image_encoder")
        cond = conditioner.condition(encoder, first, text_key, known, image_tokens=True)
        histories = self.histories(params, windows, cond, chain_key)
        data = _flat(windows)
        told = jax.tree.map(lambda x: jnp.repeat(x, self.config.windows, axis=0), cond)
        shown = conditioning.with_known(told, data[:, :count])
        seen = conditioner.noise_history(conditioning.with_known(told, _flat(histories)), noise_key)
        losses = self.errors(params, data, shown, seen, key).reshape(batch, -1).mean(0)
        wrong = jnp.mean((histories - windows[:, :, :count]) ** 2, axis=(0, 2, 3, 4, 5))
        found = {"error": losses.mean(), "error_first": losses[0], "error_last": losses[-1], "history": wrong[-1]}
        return {STUDENT: losses.mean()}, {(STUDENT, name): value for name, value in found.items()}

    def histories(
        self, params: Mapping[str, Params], windows: Float[Array, "b n f h w c"], cond: Conditioning, key: jax.Array
    ) -> Float[Array, "b n k h w c"]:
        """The known latents h_w of each window, by the student's own walks; no gradient flows into them."""
        config = self.config
        student, times = self.backbone.velocity(params, STUDENT), config.walk.times[config.resume :]
        overlap = self.vae.config.temporal_factor * (config.overlap - 1) + 1

        def window(history: Latents, inputs: tuple[Latents, jax.Array]) -> tuple[Latents, Latents]:
            data, key = inputs
            start_key, known_key, restart_key = jax.random.split(key, 3)
            anew = jax.random.bernoulli(restart_key, config.restart, (len(data), 1, 1, 1, 1))
            known = conditioning.with_known(cond, jnp.where(anew, data[:, : config.overlap], history))
            seen = self.backbone.conditioner.noise_history(known, known_key)
            x = flow.interpolate(data, flow.draw_noise(start_key, data.shape), times[0])
            made = samplers.sample(lambda x, t, _: student(x, t, seen), known, x, times)
            frames = self.vae(params[TEACHER]["vae"], made, method="decode_latents")
            return self.vae(params[TEACHER]["vae"], frames[:, -overlap:], method="encode_latents"), history

        chain = jnp.moveaxis(windows, 1, 0)
        keys = jax.random.split(key, len(chain))
        last, before = jax.lax.scan(window, windows[:, 0, : config.overlap], (chain[:-1], keys[:-1]))
        return jax.lax.stop_gradient(jnp.moveaxis(jnp.concatenate([before, last[None]]), 0, 1))

    def _windows(self, record: Record) -> Float[Array, "b n f h w c"]:
        latents = record["latents"].astype(jnp.float32)
        return latents.reshape(len(latents), self.config.windows, -1, *latents.shape[2:])

    def sampled(self, record: Record) -> Record:
        """The chain's first window."""
        return {**record, "latents": self._windows(record)[:, 0]}


def _flat(windows: Array) -> Array:
    """(b, n, ...) -> (b n, ...), the windows of a sample in a row."""
    return windows.reshape(-1, *windows.shape[2:])
