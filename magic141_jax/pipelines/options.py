"""What a pipeline call may be told, checked before anything is computed, and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from magic141_jax import settings
from magic141_jax.diffusion.samplers import Sampler
from magic141_jax.diffusion.timesteps import dynamic_shift
from magic141_jax.errors import UserError
from magic141_jax.models.vae import latent_frames
from magic141_jax.pipelines import media
from magic141_jax.pipelines.components import Carry, Components

MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The keyword options of every pipeline call. None means what the weights were made for.

    Attributes:
      negative_prompt: one for all prompts, or one each; the empty prompt unless given. Used with guidance only.
      height, width: pixels.
      num_frames: pixel frames of a clip, or of a window of a long video: 4k + 1.
      num_inference_steps: steps of the sampler.
      guidance_scale: 1 is no guidance (and half the work).
      shift, sampler: the time grid's shift and the kind of step.
      seed: one for all prompts, or one each. Prompt i of a call draws its noise from (seed, i), or from
        (its own seed, 0), so what else is in the batch does not change a video.
      latents: the noise to start from (b, f, h, w, c), instead of drawing it.
      output_type: "np" (arrays), "pil" (lists of PIL images) or "latent" (nothing is decoded).
      callback: called on the host as callback(step, time, latents) after every step; such a program is compiled anew
        in each process.
      overlap_latents: long video: how many latent frames two windows share; see `carry` for what the next one knows.
      history_noise: long video: noise level of those frames, 0 to 1.
      match_colors: long video: how strongly (0 to 1) a window's border colours are moved toward the first window's.
      carry: long video: "pixels" encodes all frames that the next window knows anew; "latents" only the first, and
        carries the window's own latents over for the others; "sink" carries them likewise, behind the first picture's
        latent. "sink" by default where the weights have an adapter for it, which is used with it alone. "picture"
        shows the next window nothing but the first picture, moved to where these frames begin with its subject.
      blend: long video: whether the frames that two windows share fade from one to the other.
      anchor: long video: whether the first image's tokens stay; else each window has those of its own first frame.
    """

    negative_prompt: str | tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    sampler: Sampler | None = None
    seed: int | tuple[int, ...] = 0
    latents: Any = None
    output_type: Literal["np", "pil", "latent"] = "np"
    callback: Any = None
    overlap_latents: int | None = None
    history_noise: float | None = None
    match_colors: float = 0.0
    carry: Carry | None = None
    blend: bool | None = None
    anchor: bool = True


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline returns, batch first; None where a pipeline makes no such thing or was asked for latents only.

    Attributes:
      images: (b, y, x, 3) in [0, 1], or a list of PIL images: the image made, or the first frame used.
      frames: (b, t, y, x, 3) in [0, 1], or a list of lists of PIL images.
      latents: (b, f, h, w, c), normalised.
    """

    images: np.ndarray | list[Image.Image] | None = None
    frames: np.ndarray | list[list[Image.Image]] | None = None
    latents: np.ndarray | None = None


def resolve(options: Mapping[str, Any], components: Components, *, frames: int | None = None) -> SamplingOptions:
    """Checks keyword options and fills in what the weights were made for.

    Args:
      options: as the user gave them.
      components: whose settings and sizes count.
      frames: fixes `num_frames` (an image has 1).

    Raises:
      UserError: an unknown option (the nearest is named), a wrong type, a value out of range, an illegal size.
    """
    given = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
    made = settings.build(SamplingOptions, given, where="options")
    if frames is not None and made.num_frames not in (None, frames):
        raise UserError(f"num_frames is {made.num_frames}; this pipeline makes {frames}")
    fixed = {} if frames is None else {"num_frames": frames}
    defaults = {**dataclasses.asdict(components.sampling), **fixed}
    factor, continuation = components.vae.network.config.temporal_factor, components.continuation
    window = latent_frames(defaults["num_frames"] if made.num_frames is None else made.num_frames, factor)
    if continuation is not None and made.carry in (None, "sink") and window > continuation.config.overlap_latents:
        defaults |= {**dataclasses.asdict(continuation.config), "carry": "sink"}
    defaults["overlap_latents"] = min(defaults["overlap_latents"], max(window - 1, 1))  # a shorter window shares less
    names = [f.name for f in dataclasses.fields(SamplingOptions)]
    unset = {k: defaults[k] for k in names if getattr(made, k) is None and k in defaults}
    made = dataclasses.replace(made, **unset)
    dynamic = components.sampling.dynamic_shift
    if dynamic is not None and "shift" in unset:
        made = dataclasses.replace(made, shift=dynamic_shift(_image_tokens(made, components), **dynamic))
    _check_ranges(made)
    check_size(made.height, made.width, cell=size_cell(components))
    if frames is None:
        _check_windows(made, window, components)
    return made


def parse_size(text: str, flag: str) -> tuple[int, int]:
    """ "64" -> (64, 64) and "96x64" -> width 96, height 64; anything else raises `UserError`, which names the flag."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"{flag} is {text!r}; write 64, or WIDTHxHEIGHT such as 96x64")
    return int(sides[0]), int(sides[-1])


def size_cell(components: Components) -> int:
    """The number of pixels by which both sides must divide: for the VAE, the patches and the image tokens."""
    patch = components.transformer.network.config.patch
    latent = components.vae.network.config.spatial_factor
    encoder = components.image_encoder
    return math.lcm(latent * patch[1], latent * patch[2], 2 * encoder.network.config.patch if encoder else 1)


def _image_tokens(options: SamplingOptions, components: Components) -> int:
    """Tokens of one latent frame."""
    _, rows, columns = components.transformer.network.config.patch
    factor = components.vae.network.config.spatial_factor
    return (options.height // (factor * rows)) * (options.width // (factor * columns))


def check_size(height: int, width: int, *, cell: int) -> None:
    """Raises `UserError`, naming the nearest legal sizes, unless both sides are multiples of `cell` in range."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise UserError(f"a size of {width}x{height}: sides must be from {cell} to {MAX_SIDE} pixels")
    if height % cell or width % cell:
        down = [max(side // cell, 1) * cell for side in (width, height)]
        up = [-(-side // cell) * cell for side in (width, height)]
        raise UserError(
            f"a size of {width}x{height}: sides must divide by {cell}; "
            f"the nearest are {down[0]}x{down[1]} and {up[0]}x{up[1]}"
        )


def as_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list; raises `UserError` when there is none or one is empty."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise UserError("the prompt is empty; say what to show")
    return prompts


def per_prompt(values: Any, count: int, what: str) -> list[Any]:
    """A single value, or a tuple of `count` values, as a list of `count`."""
    listed = list(values) if isinstance(values, tuple) else [values] * count
    if len(listed) != count:
        raise UserError(f"{len(listed)} values of {what} for {count} prompts; give one, or one each")
    return listed


def as_pil(frames: np.ndarray) -> list[Any]:
    """(..., y, x, 3) in [0, 1] -> nested lists of PIL images."""
    return media.to_pil(frames) if frames.ndim == 3 else [as_pil(f) for f in frames]


FORMATTERS: dict[str, Callable[[np.ndarray], Any]] = {"np": lambda frames: frames, "pil": as_pil}


def _check_ranges(options: SamplingOptions) -> None:
    """Numbers out of range, each with its bounds."""
    seeds = options.seed if isinstance(options.seed, tuple) else (options.seed,)
    limits = {
        "num_inference_steps": (options.num_inference_steps, 1, MAX_STEPS),
        "guidance_scale": (options.guidance_scale, 0, 100),
        "shift": (options.shift, 1e-3, 1e3),
        "history_noise": (options.history_noise, 0, 1),
        "match_colors": (options.match_colors, 0, 1),
        **{f"seed {seed}": (seed, 0, MAX_SEED) for seed in seeds},
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be from {low} to {high}")


def _check_windows(options: SamplingOptions, window: int, components: Components) -> None:
    """What can't be done with a long video's windows of so many latent frames."""
    overlap, dropped = options.overlap_latents, components.sampling.dropped_frames
    if not 1 <= overlap < max(window, 2):  # pyright: ignore[reportOperatorIssue]
        raise UserError(f"overlap_latents is {overlap}; a window has {window} latent frames")
    if options.carry in ("latents", "sink") and overlap == 1:
        raise UserError(f"carry is {options.carry!r}, but a single known latent isn't carried; raise overlap_latents")
    if options.blend and overlap == 1 and dropped:
        raise UserError("blend has nothing to fade: these weights drop the frame that is shared; raise overlap_latents")
    if not options.anchor and components.text_encoder.image_tokens:
        raise UserError("anchor can't be off: these weights read the first image together with the prompt")
