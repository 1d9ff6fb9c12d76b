"""One window of a long video, a pure function of its prompt and of what the window before left (arXiv 2502.07701).

    conditioning   the prompt's text behind the image tokens; known latents, under history noise but in window 0
    latents        denoised
    frames         decoded; colours moved toward window 0's; what is shown cross-fades from the window before
    left           the last frames encoded anew; or the first of them alone, or none of them but the first picture's
                   latent (a sink), with the window's own latents behind it; or the first picture, moved to where the
                   first of those frames has its subject

What networks do comes in as functions (`Stages`). Pure ones make a window one program; an engine's stages make it
several, between which parameters can come and go. What sets window 0 apart is data, so one program serves all windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.diffusion import conditioning
from magic141_jax.diffusion.conditioning import Conditioning, LatentMask
from magic141_jax.models.text import TextStates
from magic141_jax.pipelines import registration
from magic141_jax.shapes import Frames, Images, Latents, TokenMask, Tokens

BORDER = 8  # a frame's border is this fraction of its sides
GAIN_LIMITS = (0.8, 1.25)
SPREAD_FLOOR = 0.02  # added to a border's standard deviation: that of a flat colour is noise


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for all windows of a video; static.

    Attributes:
      length: pixel frames of a window, less `dropped`.
      overlap: how many of its last ones the next window knows.
      dropped: decoded frames cut off at the start of a window, as the weights ask for it.
      carried: known latents that are a window's own, behind the first one, which is encoded from pixels.
      sink: whether that one is the first picture's in every window, and nothing is encoded.
      follow: whether a window knows the first picture alone, at the place and size that the shared frames begin with.
      blend: whether the shared frames fade from the window before to this one.
      anchor: whether the first image's tokens stay; else they are of each window's own first frame.
      match_colors: see `match_colors`; 0 leaves it out.
    """

    length: int
    overlap: int
    dropped: int = 0
    carried: int = 0
    blend: bool = False
    anchor: bool = True
    match_colors: float = 0.0
    sink: bool = False
    follow: bool = False

    @property
    def shared(self) -> int:
        """How many decoded frames two neighbouring windows have in common."""
        return max(self.overlap - self.dropped, 0)

    @property
    def faded(self) -> int:
        """How many of those are shown by the later window, which fades them; the others are shown by the earlier."""
        return self.shared if self.blend else 0

    def start(self, window: int) -> int:
        """The place in the video of the first frame that is new in a window."""
        return window * (self.length - self.shared) + (self.shared if window else 0)

    def shown(self, window: int, total: int) -> slice:
        """The frames of a window that go into a video of `total` frames."""
        left = total - window * (self.length - self.shared)
        end = left if left <= self.length else self.length - self.faded
        return slice(self.shared - self.faded if window else 0, end)


class Colours(NamedTuple):
    """Mean and standard deviation per channel over the borders of all frames, (b, 1, 1, 1, 3) each."""

    mean: jax.Array
    spread: jax.Array


class State(NamedTuple):
    """What a window needs besides its prompt, and leaves behind for the next one.

    Attributes:
      walk: the arguments of `Stages.denoise` (`engine._Walk`), without the text: `cond.text` is the image tokens alone.
      history_noise: the level of all windows but the first, whose level is in `walk`.
      first: whether the window is the first, ().
      tail: the shared frames as the window before made them, (b, `Plan.faded`, y, x, 3).
      before: with a sink the latent in whose place it stands, (b, 1, h, w, c): the one before the carried ones.
      picture: where it is followed the first picture, (b, 1, y, x, 3).
      colours: of the first window.
    """

    walk: Any
    history_noise: jax.Array
    first: jax.Array
    tail: Frames
    before: Latents
    picture: Frames
    colours: Colours


class Stages(NamedTuple):
    """The networks as functions.

    Attributes:
      denoise: a walk -> latents.
      decode: latents -> frames.
      encode: frames (b, 4(k-1)+1, y, x, 3) -> k known latents of a clip, and their mask.
      look: images, text, mask -> both with the images' tokens in front.
    """

    denoise: Callable[[Any], Latents]
    decode: Callable[[Latents], Frames]
    encode: Callable[[Frames], tuple[Latents, LatentMask]]
    look: Callable[[Images, Tokens, TokenMask], tuple[Tokens, TokenMask]]


def begin(walk: Any, history_noise: float, pictures: Images, *, plan: Plan) -> State:
    """The state before window 0, of the first `pictures` (b, y, x, 3), whose tokens and known latent `walk` has."""
    b, cond = len(walk.draws), walk.cond
    images = cond.image_tokens
    tokens = {"text": cond.text[:, :images], "text_mask": cond.text_mask[:, :images], "pooled": cond.pooled[:, :0]}
    return State(
        walk._replace(cond=dataclasses.replace(cond, **tokens, sink=plan.sink), negative=None),
        np.float32(history_noise),
        np.array(True),
        np.zeros((b, plan.faded, *pictures.shape[1:3], 3), np.float32),
        np.zeros_like(cond.known[:, : int(plan.sink)]),
        np.asarray(pictures, np.float32)[:, None][:, : int(plan.follow)],
        Colours(*np.zeros((2, b, 1, 1, 1, 3), np.float32)),
    )


def step(
    stages: Stages, state: State, positive: TextStates, negative: TextStates | None, *, plan: Plan
) -> tuple[Frames, State]:
    """One window with the text of its prompt: its frames (b, `Plan.length`, y, x, 3), and the state for the next."""
    walk = state.walk
    cond = conditioning.replace_text(walk.cond, *positive)
    latents = stages.denoise(walk._replace(cond=cond, negative=negative))
    frames = stages.decode(_in_order(latents, state, plan=plan))[:, plan.dropped :]
    colours = state.colours
    if plan.match_colors:
        pairs = zip(border_colours(frames), colours, strict=True)
        colours = Colours(*(jnp.where(state.first, own, reference) for own, reference in pairs))
        frames = match_colors(frames, colours, plan.match_colors)
    walk = walk._replace(
        cond=_next_conditioning(stages, walk.cond, frames, latents, state.picture, plan=plan),
        draws=walk.draws + np.array([[0, 0, 1]], np.uint32),  # (seed, index, purpose): window w has purpose w + 1
        history_noise=jnp.asarray(state.history_noise),
        adapter=jnp.ones_like(walk.adapter),  # made for what follows a window
    )
    tail = frames[:, frames.shape[1] - plan.faded :]
    before = latents[:, -1 - plan.carried :][:, : int(plan.sink)]
    left = State(walk, state.history_noise, jnp.zeros_like(state.first), tail, before, state.picture, colours)
    return cross_fade(state.tail, frames, state.first), left


def cross_fade(tail: Frames, frames: Frames, first: jax.Array | bool) -> Frames:
    """Fades from the n frames of `tail` into `frames` on a ramp (1, ..., n) / (n + 1); changes nothing if `first`."""
    n = tail.shape[1]
    if not n:
        return frames
    share = jnp.where(first, 1.0, (jnp.arange(n, dtype=frames.dtype) + 1) / (n + 1))[None, :, None, None, None]
    return jnp.concatenate([(1 - share) * tail + share * frames[:, :n], frames[:, n:]], axis=1)


def match_colors(frames: Frames, reference: Colours, strength: float) -> Frames:
    """Moves the border's mean and standard deviation per channel toward those of a reference.

    Args:
      frames: (b, t, y, x, 3) in [0, 1].
      reference: from `border_colours`.
      strength: 0 changes nothing, 1 matches (the gain stays within `GAIN_LIMITS`).

    Returns:
      Frames in [0, 1].
    """
    own = border_colours(frames)
    gain = jnp.clip((reference.spread + SPREAD_FLOOR) / (own.spread + SPREAD_FLOOR), *GAIN_LIMITS)
    matched = (frames - own.mean) * gain + reference.mean
    return jnp.clip(frames + strength * (matched - frames), 0, 1)


def border_colours(frames: Frames) -> Colours:
    """The colours of the borders of frames (b, t, y, x, 3), all t together."""
    t, height, width = frames.shape[1:4]
    rows, columns = max(height // BORDER, 1), max(width // BORDER, 1)
    border = np.ones((1, 1, height, width, 1), np.float32)
    border[:, :, rows:-rows, columns:-columns] = 0

    def mean(x: Frames) -> jax.Array:
        return (x * border).sum(axis=(1, 2, 3), keepdims=True) / (t * border.sum())

    centre = mean(frames)
    return Colours(centre, jnp.sqrt(mean((frames - centre) ** 2)))


def _in_order(latents: Latents, state: State, *, plan: Plan) -> Latents:
    """A window's latents as they follow each other in the video: no sink, but what it stands in the place of."""
    if not plan.sink:
        return latents
    # What is new is decoded behind its own past; of the latent that is first here no frame is new.
    first = jnp.where(state.first, latents[:, :1], state.before)
    return jnp.concatenate([first, latents[:, 1:]], axis=1)


def _next_conditioning(
    stages: Stages, cond: Conditioning, frames: Frames, latents: Latents, picture: Frames, *, plan: Plan
) -> Conditioning:
    """What the next window knows of this one's frames and latents, its image tokens without text."""
    recent, carried = frames[:, -plan.overlap :], latents[:, latents.shape[1] - plan.carried :]
    if plan.sink:
        cond = conditioning.with_known(cond, jnp.concatenate([cond.known[:, :1], carried], axis=1))
    else:
        # In a causal VAE the first latent stands for one pixel frame, every other for four: a latent from the middle of
        # a clip is no first one. So that is encoded from the pixel frame at its place; those behind it may be carried.
        shown = recent[:, :1] if plan.carried else recent
        if plan.follow:
            # No error outlives its window: of its frames only where they have the subject is known to the next one.
            shown = registration.followed(picture[:, 0], recent[:, 0])[:, None]
        known, mask = stages.encode(shown)
        cond = dataclasses.replace(cond, known=known, mask=mask)
        if plan.carried:
            cond = conditioning.with_known(cond, jnp.concatenate([known[:, :1], carried], axis=1))
    if not plan.anchor:
        text, text_mask = stages.look(recent[:, 0], cond.text[:, :0], cond.text_mask[:, :0])
        cond = dataclasses.replace(cond, text=text, text_mask=text_mask)
    return cond
