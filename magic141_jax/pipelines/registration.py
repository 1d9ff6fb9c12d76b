"""Where a frame has a picture's subject: the place and the size at which the picture, moved there, is most like it.

    S_s p (x) = p(c + (x - c) / s), p beyond its edges as at them                         resized about the centre c
    (s, d)    = argmin  sum_x |S_s p(x - d) - f(x)|^2,  x - d around the edges            moved, on a torus

All d are tried at once, since the sum is |S_s p|^2 + |f|^2 - 2 (S_s p * f)(d), whose cross-correlation is a product of
Fourier transforms; s goes through `SCALES`. So a subject is found before a background whose edges meet, as a plain one.

Transforms are products with the matrices of the discrete Fourier transform, which can be split over any mesh like all
else; XLA's own can't on every platform. Of a real picture's columns half are enough: the others are their conjugates.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.shapes import Images

# Steps of 4 %; the picture's own size comes first, and wins where all are alike. What grew or shrank without end would
# leave the frame, or nothing to draw it by, so it goes on from the last of these.
SCALES = np.array(sorted(np.geomspace(3 / 4, 4 / 3, 15).tolist(), key=lambda scale: abs(np.log(scale))), np.float32)


def followed(pictures: Images, frames: Images) -> Images:
    """Pictures (b, y, x, 3) at the size and the place that make them most like frames of the same shape."""
    return moved(pictures, *register(pictures, frames))


def register(pictures: Images, frames: Images) -> tuple[jax.Array, jax.Array]:
    """The scales (b,), from `SCALES`, and moves (b, 2), (down, right) in pixels, that make pictures most like frames.

    Args:
      pictures, frames: (b, y, x, 3) each.
    """
    height, width = pictures.shape[1:3]
    rows, columns = np.fft.fft(np.eye(height)).astype(np.complex64), np.fft.rfft(np.eye(width)).T.astype(np.complex64)
    alone = np.isin(np.arange(len(columns)), (0, width / 2))[:, None]  # columns that are their own conjugates
    back = columns.conj() * np.where(alone, 1, 2)
    spectrum = functools.partial(jnp.einsum, "ky,lx,byxc->bklc", rows, columns, precision="highest")
    centre = pictures.mean((1, 2), keepdims=True)  # without which the squares would be large, and float32 coarse
    wanted = spectrum(frames - centre) / (height * width)

    def best(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The least error at a scale, less |f|^2, and its place in the flattened frame, (b,) each."""
        found = resized(pictures, jnp.broadcast_to(scale, len(pictures))) - centre
        common = (jnp.conj(spectrum(found)) * wanted).sum(-1)
        match = jnp.einsum("ky,lx,bkl->byx", rows.conj(), back, common, precision="highest").real
        match = match.reshape(len(found), -1)
        return (found**2).sum((1, 2, 3)) - 2 * match.max(1), match.argmax(1)

    errors, places = jax.lax.map(best, jnp.asarray(SCALES))  # (scales, b)
    which = errors.argmin(0)
    place = jnp.take_along_axis(places, which[None], axis=0)[0]
    return jnp.asarray(SCALES)[which], jnp.stack(jnp.divmod(place, width), axis=1)


def moved(pictures: Images, scales: jax.Array, moves: jax.Array) -> Images:
    """Pictures (b, y, x, 3) at scales (b,), about their centres, then moved by (b, 2) whole pixels around the edges."""
    return jax.vmap(lambda picture, move: jnp.roll(picture, move, axis=(0, 1)))(resized(pictures, scales), moves)


def resized(pictures: Images, scales: jax.Array) -> Images:
    """Pictures (b, y, x, 3) at scales (b,) from 1/2 on, about their centres, in their own frame."""
    size = np.array(pictures.shape[1:3])
    margin = -(-size // 2)  # of what half the size shows beyond the edges
    wide = jnp.pad(pictures, ((0, 0), *((m, m) for m in margin), (0, 0)), mode="edge")

    def at(picture: jax.Array, scale: jax.Array) -> jax.Array:
        offset = size / 2 - scale * (size / 2 + margin)
        return jax.image.scale_and_translate(
            picture, (*size, picture.shape[-1]), (0, 1), jnp.broadcast_to(scale, 2), offset, "linear"
        )

    return jax.vmap(at)(wide, scales)
