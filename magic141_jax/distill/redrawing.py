"""An adapter that draws a window's frames anew, with the first picture in sight.

A window of a long video starts from the last frame of the one before, and inherits what is wrong with it; errors add
up. So its latents are noised to a time t_r and drawn from there again (`pipelines.window`), as SDEdit (arXiv
2108.01073) edits a picture: details, and what is wrong with them, come from the network, and only what noise of that
level leaves (place, size, pose) from the window. What the details are is known from the video's first picture, which
stands in front as the known first frame of a clip does:

    z_0 | x_1 x_2 x_3 x_4      x = (1 - t_r) n + t_r eps,  n the latents behind the first of a window

An image-to-video network takes a picture to be the moment before: it moves the subject back to where the picture has
it. The adapter learns that any time may lie between them, from windows anywhere in long clips:

    x_t = (1 - t) n + t eps,  t in (t_r, ..., t_r / m)      loss = |v(x_t, t | z_0, text) - (eps - n)|^2

This is flow matching (arXiv 2210.02747), and a window is drawn in m even steps of Euler's. In one step, as a student's
last one is, the mean of all that x_t may hide would be drawn, which is blurred: t_r leaves more open than a student's
last state does, whose noise it has been walked from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import flow
from magic141_jax.distill.continuation import LongVideoConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation
from magic141_jax.distill.streaming import in_windows
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record


@dataclasses.dataclass(frozen=True)
class RedrawingConfig(LongVideoConfig):
    """What the adapter learns.

    Attributes:
      windows: of the data's chains (`python -m magic141_jax.data prepare --windows`).
      refresh: t_r, the time from which a window is drawn anew.
      refresh_steps: m.
    """

    history_noise: float = 0.05
    windows: int = 4
    refresh: float = 4 / 7
    refresh_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 2:
            raise ValueError(f"frames come from chains of 2 windows or more, got {self.windows}")
        if not 0 < self.refresh < 1 or self.refresh_steps < 1:
            raise ValueError(
                "refresh is a time between 0 and 1, and from it refresh_steps, 1 or more, lead to 0; got"
                f" {self.refresh} and {self.refresh_steps}"
            )

    @property
    def times(self) -> jax.Array:
        """Those at which the adapter is called."""
        return jnp.linspace(self.refresh, 0, self.refresh_steps + 1)[:-1]


class Redrawing(Distillation):
    """The method: role "student" is the adapter, over the frozen "teacher" whose windows it draws anew."""

    Config = RedrawingConfig

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The adapter alone; the export's other components are those of config.components_from."""
        found = self.config.exported(
            overlap_latents=1, refresh=self.config.refresh, refresh_steps=self.config.refresh_steps
        )
        return {"continuation": ("continuation", found, params[STUDENT]["adapter"])}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part: of one window of each chain."""
        window_key, text_key, time_key, noise_key = jax.random.split(key, 4)
        windows = in_windows(record["latents"], self.config.windows)
        batch = len(windows)
        which = jax.random.randint(window_key, (batch,), 0, self.config.windows)
        clean = jnp.concatenate([windows[:, 0, :1], windows[jnp.arange(batch), which, 1:]], axis=1)
        told, known = {**record, "latents": clean}, jnp.ones(batch, jnp.int32)
        encoder = params[TEACHER].get("image_encoder")
        cond = self.backbone.conditioner.condition(encoder, told, text_key, known, image_tokens=True)
        t = self.config.times[jax.random.randint(time_key, (batch,), 0, len(self.config.times))]
        noise = flow.draw_noise(noise_key, clean.shape)
        velocity = self.backbone.velocity(params, STUDENT, trained=True)(flow.interpolate(clean, noise, t), t, cond)
        error = jnp.mean((velocity.astype(jnp.float32) - (noise - clean))[:, 1:] ** 2)
        return {STUDENT: error}, {(STUDENT, "error"): error}

    def sampled(self, record: Record) -> Record:
        """The chain's first window."""
        return {**record, "latents": in_windows(record["latents"], self.config.windows)[:, 0]}
