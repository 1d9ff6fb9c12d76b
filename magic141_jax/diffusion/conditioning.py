"""The one difference between text to image, text to video, image to video and continuation.

All four are the same network with other conditioning. Its input has, on the channels, the noisy latents, the
known latents and a mask that is one where they are known:

    channels    input (b, f, h, w, 2c + 1) = [x_t, known, mask]
    replace     input (b, f, h, w, c)      = mask known + (1 - mask) x_t    (HunyuanVideo-I2V's token_replace)

with k leading latent frames known: k = 0 for text alone (an image is then one latent frame), 1 for image to video,
more for continuing a video. Image tokens of the first frame stand before the text tokens, and stay in the negative
branch of guidance, where only the text part is replaced (Magic 1-For-1, arXiv 2502.07701, figure 3).

History noise: the known latents of a window that continues a video are the model's own and imperfect, so training
shows it slightly noised ones. `noise_known` is applied between the sampler and the network, as in

    velocity = lambda x, t, cond: network_velocity(x, t, noise_known(cond, key, level))

and never to what the sampler is given, which it returns as the known frames of its result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from magic141_jax.diffusion import flow
from magic141_jax.shapes import Latents, Pooled, Times, TokenMask, Tokens

LatentMask = Float[Array, "b f h w 1"]
Known = Literal["none", "channels", "replace"]
"""How known latents enter a network: not at all, on channels of their own, or in the place of the noisy ones."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("text", "text_mask", "pooled", "known", "mask"),
    meta_fields=("image_tokens", "sink"),
)
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Everything that a velocity depends on besides (x, t). A pytree; `image_tokens` and `sink` are static.

    text (b, s, e): image tokens first, then text tokens; text_mask (b, s): true where a token counts;
    pooled (b, p); known (b, f, h, w, c): zero where unknown; mask (b, f, h, w, 1): one where known;
    image_tokens: how many of the s tokens are image tokens;
    sink: whether the first known latent frame is a given picture's, from long before those that follow it.
    """

    text: jax.Array
    text_mask: jax.Array
    pooled: jax.Array
    known: jax.Array
    mask: jax.Array
    image_tokens: int = 0
    sink: bool = False


Velocity = Callable[[Latents, Times, Conditioning], Latents]
"""The seam between theory and networks: velocity(x (b, f, h, w, c), t (b,), conditioning) -> v like x."""


def known_latents(latents: Latents, count: int | Int[Array, " b"], frames: int) -> tuple[Latents, LatentMask]:
    """The first `count` of the given latent frames as (known, mask) of a clip of `frames` latent frames.

    Args:
      latents: (b, f0, h, w, c); f0 may be smaller or larger than `frames`.
      count: how many leading frames are known, for all or one number per sample; may be traced. Counts above
        min(f0, frames) mean all of them.
      frames: static length f of the clip.

    Returns:
      known (b, f, h, w, c), zero past the known frames, and mask (b, f, h, w, 1) in the same dtype.
    """
    b, given, h, w, _ = latents.shape
    count = jnp.broadcast_to(jnp.minimum(jnp.asarray(count), given), (b,))
    is_known = jnp.arange(frames)[None, :] < count[:, None]
    mask = jnp.broadcast_to(is_known[:, :, None, None, None], (b, frames, h, w, 1))
    padded = jnp.pad(latents[:, :frames], ((0, 0), (0, max(frames - given, 0)), (0, 0), (0, 0), (0, 0)))
    return jnp.where(mask, padded, 0), mask.astype(latents.dtype)


def with_known(cond: Conditioning, latents: Latents) -> Conditioning:
    """The same conditioning with the k leading latent frames (b, k, h, w, c) known, and no others."""
    known, mask = known_latents(latents, latents.shape[1], cond.known.shape[1])
    return dataclasses.replace(cond, known=known, mask=mask)


def model_input(
    x: Latents, cond: Conditioning, *, known: Known = "channels", hold: bool = False
) -> Float[Array, "b f h w channels"]:
    """The network's input, by how known latents enter it: on the channels, with their mask, in place of x, or not.

    Known latents in the place of x are clean at every time of a walk, whatever the walk did to x there.

    With `hold` the unknown frames carry the last known one where the published layout has zeros, as Stable Video
    Diffusion (arXiv 2311.15127) repeats its image: what stays where it is needs no attention to be copied. Behind a
    sink they carry the sink: how things look is to be taken from it, and from the others only where they are.
    """
    if known != "channels":
        return keep_known(x, cond) if known == "replace" else x
    held = cond.known
    if hold:
        count = (cond.mask[:, :, :1, :1] > 0).sum(axis=1, keepdims=True)
        last = jnp.take_along_axis(held, jnp.maximum(count - 1, 0), axis=1)
        held = jnp.where(cond.mask > 0, held, held[:, :1] if cond.sink else last)
    return jnp.concatenate([x, held.astype(x.dtype), cond.mask.astype(x.dtype)], axis=-1)


def with_image_tokens(text: Tokens, text_mask: TokenMask, tokens: Tokens) -> tuple[Tokens, TokenMask]:
    """Puts image tokens (b, s_img, e), all of which count, before the text; set `image_tokens` to s_img with it."""
    shown = jnp.ones(tokens.shape[:2], text_mask.dtype)
    return jnp.concatenate([tokens.astype(text.dtype), text], axis=1), jnp.concatenate([shown, text_mask], axis=1)


def replace_text(cond: Conditioning, text: Tokens, text_mask: TokenMask, pooled: Pooled) -> Conditioning:
    """The same conditioning with another text part: image tokens, known latents and mask stay.

    The new text (b, s_text, e), without image tokens, may have a batch of 1 for all samples.
    """
    b, n = cond.text.shape[0], cond.image_tokens
    text, text_mask, pooled = (jnp.broadcast_to(a, (b, *a.shape[1:])) for a in (text, text_mask, pooled))
    return dataclasses.replace(
        cond,
        text=jnp.concatenate([cond.text[:, :n], text.astype(cond.text.dtype)], axis=1),
        text_mask=jnp.concatenate([cond.text_mask[:, :n], text_mask], axis=1),
        pooled=pooled.astype(cond.pooled.dtype),
    )


def keep_known(x: Latents, cond: Conditioning) -> Latents:
    """Puts the known latents into `x` where the mask is one, bit for bit."""
    return jnp.where(cond.mask > 0, cond.known.astype(x.dtype), x)


def noise_known(cond: Conditioning, key: jax.Array, level: float | Float[Array, " b"]) -> Conditioning:
    """History noise: known' = (1 - level) known + level eps where the mask is one; the rest stays zero.

    `level` in [0, 1] is one number or one per sample; `key` is one key or one per sample (`flow.draw_noise`). A
    sink stays clean: it is a given picture's, and no history.
    """
    eps = flow.draw_noise(key, cond.known.shape, cond.known.dtype)
    level = jnp.asarray(level, cond.known.dtype)
    noised = jnp.where(cond.mask > 0, flow.interpolate(cond.known, eps, level), 0)
    if cond.sink:
        noised = jnp.concatenate([cond.known[:, :1], noised[:, 1:]], axis=1)
    return dataclasses.replace(cond, known=noised)
