"""HunyuanVAE: the causal 3D autoencoder of HunyuanVideo, which Magic141 reads and writes (paper section 3.1).

    encode  (b, t, y, x, 3) in [-1, 1] -> mean, logvar (b, f, h, w, 16)    t = 4 (f - 1) + 1, y = 8 h, x = 8 w
    decode  (b, f, h, w, 16) -> (b, t, y, x, 3)

Convolutions look only at the past (the first frame is repeated in front) and repeat the border in space; the mid
block attends from each frame to itself and the frames before. The group norms, however, take their statistics over
all frames of a call, so that the published VAE is causal in its wiring only: encoding a prefix of a clip, or its
first frame alone, gives slightly other latents than encoding the whole clip.

`HunyuanVAEConfig.tiling` decides how long and large inputs are cut up; its default is diffusers' frame tiling. Over a
mesh each device works on some rows and columns of the whole picture (`sharding.split_space`): convolutions fetch their
neighbours' border, norms add up their sums, and attention gathers the keys of its level, the coarsest.
The encoder and the decoder are built of a kind of convolution, so that an image autoencoder can be built of another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.models import halo
from magic141_jax.models.tiling import FRAME_TILES, Tiling, tiled_decode, tiled_encode
from magic141_jax.models.vae import VideoVAE
from magic141_jax.shapes import Frames, Latents
from magic141_jax.sharding import keep_whole, platform, split_space

Stride = tuple[int, int, int]
ConvForm = Literal["taps", "volume"]
Conv = Callable[..., nnx.Module]  # conv(inputs, outputs, stride=(1, 1, 1), rngs=rngs), as `CausalConv3d`

EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Three colours and few latent channels can't be split.
    (r".*(decoder\.conv_out|encoder\.conv_in|quant)\..*", ()),
    (r".*(conv1|conv2|conv_in|conv_out|resample)\.kernel", ("fsdp",)),
    (r".*\.(shortcut|query|key|value|out)\.kernel", (None, "fsdp")),
    (r".*\.(bias|scale)", ()),
)


class CoderConfig(Protocol):
    """What an encoder and a decoder are built from; see `HunyuanVAEConfig` for the meaning."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    latent_channels: int
    mid_block_add_attention: bool

    @property
    def strides(self) -> tuple[Stride, ...]:
        """The (time, y, x) step of each level."""
        ...


@dataclasses.dataclass(frozen=True)
class HunyuanVAEConfig:
    """The published sizes by default.

    Attributes:
      block_out_channels: channels of each level, finest first.
      layers_per_block: residual blocks of an encoder level; a decoder level has one more.
      norm_num_groups: groups of every group norm.
      latent_channels: channels of a latent.
      latent_mean: subtracted from raw latents before diffusion sees them.
      latent_std: divides raw latents; the inverse of the published scaling factor.
      spatial_factor: pixels per latent position, a power of two.
      temporal_factor: frames per latent frame after the first, a power of two.
      mid_block_add_attention: whether the mid blocks attend over space and past frames.
      tiling: how `encode` and `decode` cut up long and large videos.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16
    latent_mean: float = 0.0
    latent_std: float = 1 / 0.476986
    spatial_factor: int = 8
    temporal_factor: int = 4
    mid_block_add_attention: bool = True
    tiling: Tiling = FRAME_TILES

    def __post_init__(self) -> None:
        require_groups(self)
        levels = len(self.block_out_channels)
        for name, most in (("spatial_factor", levels), ("temporal_factor", levels - 1)):
            factor = getattr(self, name)
            if factor not in [2**n for n in range(most + 1)]:
                raise ValueError(f"{name} is {factor}; {levels} levels allow the powers of two up to {2**most}")

    @property
    def strides(self) -> tuple[Stride, ...]:
        """The (time, y, x) step of each level; the same list counts down the encoder and up the decoder.

        Space is halved on the first levels, time on the last ones before the final level.
        """
        levels = len(self.block_out_channels)
        spatial, temporal = self.spatial_factor.bit_length() - 1, self.temporal_factor.bit_length() - 1
        steps = []
        for level in range(levels):
            space = 2 if level < spatial else 1
            time = 2 if levels - 1 - temporal <= level < levels - 1 else 1
            steps.append((time, space, space))
        return tuple(steps)


def require_groups(config: CoderConfig) -> None:
    """Raises `ValueError` when a level's channels don't divide into the groups of its norms."""
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            raise ValueError(f"block_out_channels has {channels}, not a multiple of {config.norm_num_groups} groups")


def causal_conv3d(x: jax.Array, kernel: jax.Array, *, stride: Stride = (1, 1, 1), form: ConvForm | None = None):
    """Convolves (b, t, y, x, c) with a kernel (kt, ky, kx, c, o), causally in time, borders repeated.

    The first frame is repeated kt - 1 times in front, the border ky // 2 and kx // 2 times around, so the output
    has ceil(n / stride) positions on each axis.

    Args:
      x: the input.
      kernel: an odd-sized kernel.
      stride: step in (time, y, x).
      form: "taps" sums one 2D convolution per temporal tap, "volume" is one 3D convolution. By default "taps" on
        a CPU, where XLA's 3D convolution is some ten times slower, and "volume" elsewhere. Both give equal results.
    """
    form = form or ("taps" if platform() == "cpu" else "volume")
    x = jnp.pad(x, ((0, 0), (kernel.shape[0] - 1, 0), *[(0, 0)] * 3), mode="edge")
    border = tuple((side // 2, side // 2) for side in kernel.shape[1:3])
    convolve = functools.partial(_CONV_FORMS[form], stride=stride)
    return halo.convolve(convolve, x, kernel, border=border, fill="repeat", step=stride[1:])


def _volume(x: jax.Array, kernel: jax.Array, *, stride: Stride) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, stride, "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _taps(x: jax.Array, kernel: jax.Array, *, stride: Stride) -> jax.Array:
    b, t, *space, c = x.shape
    taps = kernel.shape[0]
    frames = (t - taps) // stride[0] + 1
    total: Any = None
    for tap in range(taps):
        picked = x[:, tap : tap + (frames - 1) * stride[0] + 1 : stride[0]]
        part = jax.lax.conv_general_dilated(
            picked.reshape(b * frames, *space, c),
            kernel[tap],
            stride[1:],
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        total = part if total is None else total + part
    return total.reshape(b, frames, *total.shape[1:])


_CONV_FORMS = {"taps": _taps, "volume": _volume}


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int) -> jax.Array:
    """Normalises (b, f, h, w, c) over f, h, w and the channels of each group; float32 inside."""
    # Frames, rows and columns stay axes of their own: a merged one could not stay split over a mesh.
    inner, shape = tuple(range(1, x.ndim - 1)), (1,) * (x.ndim - 1) + (-1,)

    def mean_of(values: jax.Array) -> jax.Array:
        by_channel = values.mean(inner, keepdims=True)
        by_group = by_channel.reshape(*by_channel.shape[:-1], groups, -1).mean(-1)
        return jnp.repeat(by_group, x.shape[-1] // groups, axis=-1)

    centred = x.astype(jnp.float32)
    centred -= mean_of(centred)
    normed = centred * jax.lax.rsqrt(mean_of(jnp.square(centred)) + EPSILON)
    return (normed * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


def frame_causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of one head over (b, f, h, w, d): each frame sees itself and those before.

    Works through the query frames one by one, so the scores in memory are (b, h w, f h w), not (b, f h w, f h w).
    Over a mesh the queries stay split over space, and every device has all keys.
    """
    b, f, h, w, d = q.shape
    k, v = (keep_whole(x).reshape(b, f * h * w, d) for x in (k, v))
    key_frame = jnp.arange(f * h * w) // (h * w)

    @jax.checkpoint
    def attend(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        frame, query = inputs
        query = split_space(query, rows=1, columns=2)
        scores = jnp.einsum("bhwd,bjd->bhwj", query, k, preferred_element_type=jnp.float32) * d**-0.5
        visible = (key_frame <= frame)[None, None, None, :]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhwj,bjd->bhwd", weights.astype(v.dtype), v)

    return jnp.moveaxis(jax.lax.map(attend, (jnp.arange(f), jnp.moveaxis(q, 1, 0))), 0, 1)


def upsample(x: jax.Array, stride: Stride) -> jax.Array:
    """Repeats positions (b, t, y, x, c) by `stride`; the first frame stays a single frame."""
    if stride == (1, 1, 1):
        return x
    time, down, across = stride
    x = jnp.repeat(jnp.repeat(x, down, axis=2), across, axis=3)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], time, axis=1)], axis=1)


class CausalConv3d(nnx.Module):
    """`causal_conv3d` of 3x3x3 with a bias."""

    def __init__(self, inputs: int, outputs: int, *, stride: Stride = (1, 1, 1), rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (3, 3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, inputs) -> (b, ..., outputs)."""
        kernel, bias = self.kernel[...], self.bias[...]
        return causal_conv3d(x, kernel, stride=self.stride) + bias.reshape(1, 1, 1, 1, -1)


class GroupNorm(nnx.Module):
    """`group_norm` with learned scale and bias."""

    def __init__(self, channels: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, ..., channels) -> the same shape."""
        return group_norm(x, self.scale[...], self.bias[...], self.groups)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, conv: Conv, rngs: nnx.Rngs) -> None:
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = conv(outputs, outputs, rngs=rngs)
        self.shortcut = nnx.Linear(inputs, outputs, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, f, h, w, inputs) -> (b, f, h, w, outputs)."""
        x = split_space(x)
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Adds single-head `frame_causal_attention` over all positions."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.norm = GroupNorm(channels, groups)
        self.query = nnx.Linear(channels, channels, rngs=rngs)
        self.key = nnx.Linear(channels, channels, rngs=rngs)
        self.value = nnx.Linear(channels, channels, rngs=rngs)
        self.out = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, f, h, w, channels) -> the same shape."""
        y = self.norm(x)
        return x + self.out(frame_causal_attention(self.query(y), self.key(y), self.value(y)))


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, config: CoderConfig, *, conv: Conv, rngs: nnx.Rngs) -> None:
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.first = ResidualBlock(channels, channels, groups, conv=conv, rngs=rngs)
        self.attention = FrameAttention(channels, groups, rngs=rngs) if config.mid_block_add_attention else None
        self.second = ResidualBlock(channels, channels, groups, conv=conv, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, f, h, w, channels) -> the same shape."""
        x = self.first(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.second(x)


class Level(nnx.Module):
    """Residual blocks of one width, then a strided convolution (encoder) or upsampling and one (decoder).

    A level whose stride is 1 everywhere has no resampling convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        stride: Stride,
        up: bool,
        groups: int,
        conv: Conv,
        rngs: nnx.Rngs,
    ) -> None:
        self.up_stride = stride if up else (1, 1, 1)
        widths = [inputs, *[outputs] * blocks]
        self.blocks = nnx.List(
            [ResidualBlock(before, outputs, groups, conv=conv, rngs=rngs) for before in widths[:blocks]]
        )
        down = (1, 1, 1) if up else stride
        resampled = stride != (1, 1, 1)
        self.resample = conv(outputs, outputs, stride=down, rngs=rngs) if resampled else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, inputs) -> (b, ..., outputs), resampled by the stride."""
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(upsample(x, self.up_stride))


class Encoder(nnx.Module):
    """(b, t, y, x, 3) -> (b, f, h, w, 2 latent_channels)."""

    def __init__(self, config: CoderConfig, *, conv: Conv = CausalConv3d, rngs: nnx.Rngs) -> None:
        widths, groups = config.block_out_channels, config.norm_num_groups
        level = functools.partial(Level, blocks=config.layers_per_block, up=False, groups=groups, conv=conv, rngs=rngs)
        self.conv_in = conv(3, widths[0], rngs=rngs)
        self.levels = nnx.List(
            [
                level(before, width, stride=stride)
                for before, width, stride in zip((widths[0], *widths), widths, config.strides)
            ]
        )
        self.middle = MiddleBlock(config, conv=conv, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, t, y, x, 3) -> moments (b, f, h, w, 2 latent_channels)."""
        x = self.conv_in(split_space(x))
        for level in self.levels:
            x = level(x)
        return split_space(self.conv_out(nnx.silu(self.norm_out(self.middle(x)))))


class Decoder(nnx.Module):
    """(b, f, h, w, latent_channels) -> (b, t, y, x, 3)."""

    def __init__(self, config: CoderConfig, *, conv: Conv = CausalConv3d, rngs: nnx.Rngs) -> None:
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        blocks = config.layers_per_block + 1
        level = functools.partial(Level, blocks=blocks, up=True, groups=groups, conv=conv, rngs=rngs)
        self.conv_in = conv(config.latent_channels, widths[0], rngs=rngs)
        self.middle = MiddleBlock(config, conv=conv, rngs=rngs)
        self.levels = nnx.List(
            [
                level(before, width, stride=stride)
                for before, width, stride in zip((widths[0], *widths), widths, config.strides)
            ]
        )
        self.norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = conv(widths[-1], 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Raw latents (b, f, h, w, latent_channels) -> frames (b, t, y, x, 3)."""
        x = self.middle(self.conv_in(split_space(x)))
        for level in self.levels:
            x = level(x)
        return split_space(self.conv_out(nnx.silu(self.norm_out(x))))


class HunyuanVAE(VideoVAE):
    """The published video autoencoder; see the module's docstring for shapes."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = nnx.Linear(2 * channels, 2 * channels, rngs=rngs)
        self.post_quant = nnx.Linear(channels, channels, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, frames: Frames) -> tuple[Latents, Latents]:
        """Frames (b, t, y, x, 3) in [-1, 1] -> mean and log-variance of the raw latents (b, f, h, w, c)."""
        moments = self.in_tiles(tiled_encode, lambda tile: self.quant(self.encoder(tile)), frames)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, raw: Latents) -> Frames:
        """Raw latents (b, f, h, w, c) -> frames (b, t, y, x, 3) around [-1, 1], not clipped."""
        return self.in_tiles(tiled_decode, lambda tile: self.decoder(self.post_quant(tile)), raw)
