"""An adapter that draws a window's frames anew, with the first picture in sight.

A window of a long video starts from the last frame of the one before, and inherits what is wrong with it; errors add
up. So its latents are noised to a time t_r and drawn from there again (`pipelines.window`), as SDEdit (arXiv
2108.01073) edits a picture: details, and what is wrong with them, come from the network, and only what noise of that
level leaves (place, size, pose) from the window. What the details are is known from the video's first picture, which
stands in front as the known first frame of a clip does:

    z_0 | x_1 x_2 x_3 x_4      x = (1 - t_r) n + t_r eps,  n the latents behind the first of a window

An image-to-video network takes a picture to be the moment before: it moves the subject back to where the picture has
it. The adapter learns that any time may lie between them, from windows anywhere in long clips:

    x_t = (1 - t) n' + t eps,  t one of the walk's times up to t_r      loss = |v(x_t, t | z_0, text) - (x_t - n) / t|^2
    n' = n, or as the student draws it from (1 - s) n + s eps' and the window's own first latent, one step from time s

(its own errors under a clean target: Stable Video Infinity, arXiv 2510.09212). Few steps do without a teacher, since
x_t and the picture leave little open of n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.distill.continuation import LongVideoConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation
from magic141_jax.distill.streaming import in_windows
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents
from magic141_jax.train.conditioner import Record


@dataclasses.dataclass(frozen=True)
class RedrawingConfig(LongVideoConfig):
    """What the adapter learns: the last steps of the frozen student.

    Attributes:
      windows: of the data's chains (`python -m magic141_jax.data prepare --windows`).
      refresh: t_r, the time from which a window is drawn anew: the walk's last one up to it.
      own_windows: how often n is noised as the student draws it.
      own_time: s, one of the walk's.
    """

    history_noise: float = 0.05
    windows: int = 4
    refresh: float = 0.6
    own_windows: float = 0.5
    own_time: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 2:
            raise ValueError(f"frames come from chains of 2 windows or more, got {self.windows}")
        if not len(self.times):
            last = float(self.walk.times[-2])
            raise ValueError(f"refresh is {self.refresh}, and the walk's last step begins at {last:.3f}: raise it")
        if not (0 <= self.own_windows <= 1 and 0 < self.own_time < 1):
            raise ValueError(
                "own_windows is a probability and own_time a time between 0 and 1, got"
                f" {self.own_windows} and {self.own_time}"
            )

    @property
    def times(self) -> jax.Array:
        """Those of the walk at which the adapter is called: `refresh` itself and all below."""
        with jax.ensure_compile_time_eval():  # their number is a shape
            steps = self.walk.times[:-1]
            return steps[steps <= self.refresh]


class Redrawing(Distillation):
    """The method: role "student" is the adapter, over the frozen "teacher" whose windows it draws anew."""

    Config = RedrawingConfig

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The adapter alone; the export's other components are those of config.components_from."""
        found = self.config.exported(overlap_latents=1, refresh=float(self.config.times[0]))
        return {"continuation": ("continuation", found, params[STUDENT]["adapter"])}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part: of one window of each chain."""
        window_key, text_key, time_key, noise_key, own_key = jax.random.split(key, 5)
        windows = in_windows(record["latents"], self.config.windows)
        batch = len(windows)
        which = jax.random.randint(window_key, (batch,), 0, self.config.windows)
        window, picture = windows[jnp.arange(batch), which], windows[:, 0, :1]
        clean = jnp.concatenate([picture, window[:, 1:]], axis=1)
        told, known = {**record, "latents": clean}, jnp.ones(batch, jnp.int32)
        encoder = params[TEACHER].get("image_encoder")
        cond = self.backbone.conditioner.condition(encoder, told, text_key, known, image_tokens=True)
        t = self.config.times[jax.random.randint(time_key, (batch,), 0, len(self.config.times))]
        made = self.own(params, window, cond, own_key)
        x = flow.interpolate(jnp.concatenate([picture, made], axis=1), flow.draw_noise(noise_key, clean.shape), t)
        velocity = self.backbone.velocity(params, STUDENT, trained=True)(x, t, cond).astype(jnp.float32)
        wrong = (velocity - (x - clean) / flow.align(t, x)) ** 2
        error = jnp.mean(wrong[:, 1:])
        return {STUDENT: error}, {(STUDENT, "error"): error}

    def own(self, params: Mapping[str, Params], window: Latents, cond: Conditioning, key: jax.Array) -> Latents:
        """n' of windows (b, f, h, w, c), (b, f - 1, h, w, c): as they are, or as the student draws them."""
        if not self.config.own_windows:
            return window[:, 1:]
        which_key, noise_key, known_key = jax.random.split(key, 3)
        t = jnp.full(len(window), self.config.own_time)
        x = flow.interpolate(window, flow.draw_noise(noise_key, window.shape), t)
        told = conditioning.with_known(cond, window[:, :1])
        seen = conditioning.noise_known(told, known_key, self.config.history_noise)
        velocity = self.backbone.velocity(params, TEACHER)(x, t, seen).astype(jnp.float32)
        drawn = jax.lax.stop_gradient(x - flow.align(t, x) * velocity)
        own = jax.random.bernoulli(which_key, self.config.own_windows, (len(window), 1, 1, 1, 1))
        return jnp.where(own, drawn, window)[:, 1:]

    def sampled(self, record: Record) -> Record:
        """The chain's first window."""
        return {**record, "latents": in_windows(record["latents"], self.config.windows)[:, 0]}
