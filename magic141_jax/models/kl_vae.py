"""KLVAE: the image autoencoder of FLUX.1, the latent diffusion one (arXiv 2112.10752) with 16 channels.

    encode  (b, t, y, x, 3) in [-1, 1] -> mean, logvar (b, t, h, w, 16)    y = 8 h, x = 8 w
    decode  (b, t, h, w, 16) -> (b, t, y, x, 3)

It is built like HunyuanVideo's, from which it differs in its convolution alone: frames are images of their own, zeros
surround them, and a strided convolution pads below and on the right only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.models import halo
from magic141_jax.models.hunyuan_vae import LOGVAR_RANGE, Decoder, Encoder, Stride, require_groups
from magic141_jax.models.tiling import WHOLE, Tiling, tiled_decode, tiled_encode
from magic141_jax.models.vae import VideoVAE
from magic141_jax.shapes import Frames, Latents

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Three colours and few latent channels can't be split.
    (r"(decoder\.conv_out|encoder\.conv_in)\.", ()),
    (r"(conv1|conv2|conv_in|conv_out|resample)\.kernel", ("fsdp",)),
    (r"\.(shortcut|query|key|value|out)\.kernel", (None, "fsdp")),
    (r"\.(bias|scale)", ()),
)


@dataclasses.dataclass(frozen=True)
class KLVAEConfig:
    """The published sizes of FLUX.1 by default; see `HunyuanVAEConfig` for the fields.

    Every level but the last halves the image, so the number of levels decides the spatial factor.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16
    latent_mean: float = 0.1159
    latent_std: float = 1 / 0.3611
    mid_block_add_attention: bool = True
    tiling: Tiling = WHOLE

    def __post_init__(self) -> None:
        require_groups(self)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame: each frame is a latent frame."""
        return 1

    @property
    def strides(self) -> tuple[Stride, ...]:
        """The (time, y, x) step of each level."""
        return ((1, 2, 2),) * (len(self.block_out_channels) - 1) + ((1, 1, 1),)


class ImageConv(nnx.Module):
    """A 3x3 convolution with a bias over each frame."""

    def __init__(self, inputs: int, outputs: int, *, stride: Stride = (1, 1, 1), rngs: nnx.Rngs) -> None:
        self.stride = stride[1:]
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, inputs) -> (b, t, ..., outputs)."""
        border = tuple((1 if step == 1 else 0, 1) for step in self.stride)
        y = halo.convolve(self._frames, x, self.kernel[...], border=border, fill="zero", step=self.stride)
        return y + self.bias[...].reshape(1, 1, 1, 1, -1)

    def _frames(self, x: jax.Array, kernel: jax.Array, zeros: halo.Border = ((0, 0), (0, 0))) -> jax.Array:
        """Convolves each frame with so many zeros around it; by default it has its border already."""
        b, t, *image = x.shape
        y = jax.lax.conv_general_dilated(
            x.reshape(b * t, *image), kernel, self.stride, zeros, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.reshape(b, t, *y.shape[1:])


class KLVAE(VideoVAE):
    """The published image autoencoder; see the module's docstring for shapes."""

    def __init__(self, config: KLVAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, conv=ImageConv, rngs=rngs)
        self.decoder = Decoder(config, conv=ImageConv, rngs=rngs)

    def encode(self, frames: Frames) -> tuple[Latents, Latents]:
        """Frames (b, t, y, x, 3) in [-1, 1] -> mean and log-variance of the raw latents (b, t, h, w, c)."""
        moments = self.in_tiles(tiled_encode, lambda tile: _frame_by_frame(self.encoder, tile), frames)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, raw: Latents) -> Frames:
        """Raw latents (b, t, h, w, c) -> frames (b, t, y, x, 3) around [-1, 1], not clipped."""
        return self.in_tiles(tiled_decode, lambda tile: _frame_by_frame(self.decoder, tile), raw)


def _frame_by_frame(coder: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies `coder` to clips of one frame, whose norms and attention then see one image."""
    b, t, *image = x.shape
    y = coder(x.reshape(b * t, 1, *image))
    return y.reshape(b, t, *y.shape[2:])
