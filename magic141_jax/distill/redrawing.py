"""An adapter that draws a window's last frame anew, with the first picture's tokens in sight.

A window of a long video starts from the last frame of the one before, and inherits what is wrong with it; errors add
up. Text to image knows no such thing as an earlier frame: it draws what the prompt says. So the frame that the next
window starts from is noised to a time t_r and drawn from there by text to image (`pipelines.window`), as SDEdit
(arXiv 2108.01073) edits a picture: details, and what is wrong with them, come from the network, and only what noise of
that level leaves (place, size, pose) from the video. No error is older than a window.

A text-to-image network draws what pictures show: subjects in the middle, whole, as first frames have them, and of a
given picture it knows nothing. The adapter learns single frames from anywhere in long clips, c with the tokens of the
clip's first picture:

    x_t = (1 - t) z + t eps,  t one of the walk's times up to t_r      loss = |v(x_t, t | c) - (x_t - z) / t|^2
    z = the first latent of a window of the clip, which stands for one frame

Few steps do without a teacher, since x_t and the picture leave little open of z.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.diffusion import conditioning, flow
from magic141_jax.distill.continuation import LongVideoConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation
from magic141_jax.distill.streaming import in_windows
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record


@dataclasses.dataclass(frozen=True)
class RedrawingConfig(LongVideoConfig):
    """What the adapter learns: the last steps of the frozen student.

    Attributes:
      windows: of the data's chains (`python -m magic141_jax.data prepare --windows`).
      refresh: t_r, the time from which a frame is drawn anew.
    """

    history_noise: float = 0.05
    windows: int = 4
    refresh: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windows < 2:
            raise ValueError(f"frames come from chains of 2 windows or more, got {self.windows}")
        if not len(self.times):
            last = float(self.walk.times[-2])
            raise ValueError(f"refresh is {self.refresh}, and the walk's last step begins at {last:.3f}: raise it")

    @property
    def times(self) -> jax.Array:
        """Those of the walk at which the adapter is called: `refresh` itself and all below."""
        with jax.ensure_compile_time_eval():  # their number is a shape
            steps = self.walk.times[:-1]
            return steps[steps <= self.refresh]


class Redrawing(Distillation):
    """The method: role "student" is the adapter, over the frozen "teacher" whose windows it mends."""

    Config = RedrawingConfig

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The adapter alone; the export's other components are those of config.components_from."""
        found = self.config.exported(overlap_latents=1, refresh=self.config.refresh)
        return {"continuation": ("continuation", found, params[STUDENT]["adapter"])}

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part: of one frame of each chain."""
        window_key, text_key, time_key, noise_key = jax.random.split(key, 4)
        windows = in_windows(record["latents"], self.config.windows)
        batch = len(windows)
        which = jax.random.randint(window_key, (batch,), 0, self.config.windows)
        clean = windows[jnp.arange(batch), which, :1]
        # A record that knows its only frame has the tokens of its picture; then nothing of it is shown.
        told, known = {**record, "latents": clean}, jnp.ones(batch, jnp.int32)
        encoder = params[TEACHER].get("image_encoder")
        cond = self.backbone.conditioner.condition(encoder, told, text_key, known, image_tokens=True)
        cond = conditioning.with_known(cond, clean[:, :0])
        t = self.config.times[jax.random.randint(time_key, (batch,), 0, len(self.config.times))]
        x = flow.interpolate(clean, flow.draw_noise(noise_key, clean.shape), t)
        velocity = self.backbone.velocity(params, STUDENT, trained=True)(x, t, cond).astype(jnp.float32)
        error = jnp.mean((velocity - (x - clean) / flow.align(t, x)) ** 2)
        return {STUDENT: error}, {(STUDENT, "error"): error}

    def sampled(self, record: Record) -> Record:
        """The chain's first window."""
        return {**record, "latents": in_windows(record["latents"], self.config.windows)[:, 0]}
