"""Discriminators: one of frames for VAE training, and heads on a transformer's features for distillation.

`Discriminator`, a small patch discriminator of frames and of their change:

    frames (b, t, y, x, 3) in [-1, 1] -> [frame, frame - previous frame] -> strided 2D convolutions
    -> logits (b t, y / 8, x / 8, 1)

Each logit judges one patch of one frame; the difference channels let it see flicker (they are 0 in the first frame).

`FeatureHeads`, one small head for each chosen block of a frozen diffusion transformer (as in LADD, arXiv 2403.12015):

    features (k, b, l, d), t (b,), pooled (b, p)  ->  logits (k, b, l), one a token and head

    c     = silu(MLP(sinusoid(1000 t)) + MLP(pooled))                          shared by the heads
    phi   = silu(W_2 silu(W_1 norm(features) + S c))                           each head with its own maps from here
    logit = <w + V c, phi> / sqrt(hidden) + offset

with the inner product of a projection discriminator (Miyato & Koyama, arXiv 1802.05637): w judges whether a token looks
real at all, V c whether it does for this prompt and noise level. Norm comes first, because the scale of a residual
stream grows with depth. w, V and the offset start at zero, and so do the logits.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.errors import UserError
from magic141_jax.models import layers as nn
from magic141_jax.models.mmdit import TIME_SCALE, MMDiTConfig
from magic141_jax.shapes import Frames, Pooled, Times

HeadLogits = Float[Array, "k b l"]

# For `FeatureHeads`; the axes are those of the last dimensions, so that a stack of heads stays whole.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"heads\.(feature_in|condition_in|condition_out)\.kernel", ("fsdp", "tensor")),
    (r"heads\.mix\.kernel", ("tensor", "fsdp")),
    (r"heads\.", ()),
    (r"\.up\.kernel", ("fsdp", "tensor")),
    (r"\.down\.kernel", ("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Channels of the strided convolutions, each of which halves the size."""

    channels: tuple[int, ...] = (32, 64, 128)


class Discriminator(nnx.Module):
    """Patch discriminator of frames; see the module docstring."""

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config = config
        sizes = (6, *config.channels)
        self.down = nnx.List(
            nnx.Conv(i, o, (4, 4), strides=2, padding="SAME", rngs=rngs) for i, o in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(nnx.GroupNorm(o, num_groups=8, rngs=rngs) for o in config.channels)
        self.logits = nnx.Conv(sizes[-1], 1, (3, 3), padding="SAME", rngs=rngs)

    def __call__(self, frames: Frames) -> Float[Array, "bt y x 1"]:
        """Frames in [-1, 1] -> one logit a patch."""
        change = jnp.pad(jnp.diff(frames, axis=1), ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([frames, change], axis=-1).reshape(-1, *frames.shape[2:4], 6)
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return self.logits(x)


@dataclasses.dataclass(frozen=True)
class FeatureHeadsConfig:
    """What the heads read and how wide they are; the defaults fit the published 13B transformer.

    Attributes:
      width: d of the features.
      layers: the blocks that are read, one head each, numbered as in `MMDiT.__call__`.
      hidden: width inside the heads.
      pooled_width: p of the pooled text vector.
      patch: latent values that the transformer joins into a token along frames, height and width.
      time_features: sinusoids of the time.
    """

    width: int = 3072
    layers: tuple[int, ...] = (29, 44, 59)
    hidden: int = 256
    pooled_width: int = 768
    patch: tuple[int, int, int] = (1, 2, 2)
    time_features: int = 256

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise UserError(f"heads on the layers {self.layers}: name one or more different blocks, counted from 0")

    @classmethod
    def on(cls, transformer: MMDiTConfig, layers: tuple[int, ...] = (), *, hidden: int = 256) -> FeatureHeadsConfig:
        """The config of heads that fit a transformer: on the blocks `layers`, or half-way, at three quarters and last.

        Raises:
          UserError: blocks that the transformer lacks.
        """
        blocks = transformer.double_blocks + transformer.single_blocks
        layers = layers or tuple(sorted({max(blocks * quarters // 4, 1) - 1 for quarters in (2, 3, 4)}))
        if max(layers) >= blocks:
            raise UserError(f"heads on the layers {layers}: this transformer has the blocks 0 to {blocks - 1}")
        shared = ("width", "pooled_width", "patch", "time_features")
        return cls(layers=layers, hidden=hidden, **{name: getattr(transformer, name) for name in shared})


class Heads(nnx.Module):
    """The maps of all heads, stacked."""

    def __init__(self, config: FeatureHeadsConfig, *, rngs: nnx.Rngs):
        count, hidden = len(config.layers), config.hidden
        self.feature_in = nn.Linear(config.width, hidden, layers=count, rngs=rngs)
        self.condition_in = nn.Linear(hidden, hidden, layers=count, rngs=rngs, bias=False)
        self.mix = nn.Linear(hidden, hidden, layers=count, rngs=rngs)
        self.condition_out = nn.Linear(hidden, hidden, layers=count, rngs=rngs, init=nn.ZEROS)  # V, with w as its bias
        self.offset = nnx.Param(jnp.zeros((count,)))

    def __call__(self, features: Float[Array, "b l d"], condition: Float[Array, "b hidden"]) -> Float[Array, "b l"]:
        """One head: tokens after its block -> a logit each, in float32."""
        shift = self.condition_in(condition).astype(features.dtype)[:, None]
        phi = jax.nn.silu(self.mix(jax.nn.silu(self.feature_in(nn.layer_norm(features)) + shift)))
        direction = self.condition_out(condition) * condition.shape[-1] ** -0.5
        return jnp.einsum("blm,bm->bl", phi.astype(jnp.float32), direction) + self.offset[...]


class FeatureHeads(nnx.Module):
    """Heads on a transformer's features; see the module docstring."""

    def __init__(self, config: FeatureHeadsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.time_in = nn.Embedder(config.time_features, config.hidden, rngs=rngs)
        self.pooled_in = nn.Embedder(config.pooled_width, config.hidden, rngs=rngs)
        self.heads = Heads(config, rngs=rngs)

    def __call__(self, features: Float[Array, "k b l d"], t: Times, pooled: Pooled) -> HeadLogits:
        """Features of the config's layers, at times t in [0, 1] and for the prompts of `pooled` -> logits, float32.

        Raises:
          UserError: features of another number of layers or another width than the config's.
        """
        config = self.config
        if features.shape[0] != len(config.layers) or features.shape[-1] != config.width:
            raise UserError(
                f"the heads read {len(config.layers)} layers of width {config.width}, "
                f"got {features.shape[0]} of width {features.shape[-1]}"
            )
        times = nn.time_features(TIME_SCALE * t, config.time_features)
        condition = jax.nn.silu(self.time_in(times) + self.pooled_in(pooled.astype(jnp.float32)))
        graphdef, state = nnx.split(self.heads)

        # Recomputed in the backward pass: what a head holds is larger than the features that it is made from.
        @nn.REMAT["full"]
        def head(_: None, layer: tuple[nnx.State, Array]) -> tuple[None, Array]:
            weights, tokens = layer
            return None, nnx.merge(graphdef, weights)(tokens, condition)

        return jax.lax.scan(head, None, (state, features))[1]


def sample_logits(
    logits: HeadLogits, known: Float[Array, "b f h w 1"], patch: tuple[int, int, int]
) -> Float[Array, " b"]:
    """One logit a sample: the mean over heads and over the tokens that are not known.

    Known latents are the same in real and generated samples and would only dilute the judgement. A token weighs
    by its share of unknown latents; a sample without any has the logit 0.

    Args:
      known: one where latents are known (`Conditioning.mask`).
      patch: latent values in a token.
    """
    weights = 1 - nn.patchify(known, patch).astype(jnp.float32).mean(-1)
    return (logits.mean(0) * weights).sum(1) / jnp.maximum(weights.sum(1), 1e-6)
