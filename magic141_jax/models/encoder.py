"""A stack of transformer layers, scanned: the body of the text encoders (BERT, CLIP) and of the image encoders.

    post-norm (BERT)   x = norm(x + attention(x));   x = norm(x + mlp(x))
    pre-norm           x = x + attention(norm(x));   x = x + mlp(norm(x))

All layers' parameters carry a leading layer axis, so compile time doesn't grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from magic141_jax.errors import UserError
from magic141_jax.models.attention import attention, causal_mask
from magic141_jax.models.layers import Linear
from magic141_jax.models.network import through

# For a network whose `encoder` is an `Encoder`; axes are those of the last dimensions, so layers stay whole.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"encoder\.layers\.(q|k|v|mlp_in)\.kernel", ("fsdp", "tensor")),
    (r"encoder\.layers\.(q|k|v|mlp_in)\.bias", ("tensor",)),
    (r"encoder\.layers\.(out|mlp_out)\.kernel", ("tensor", "fsdp")),
    (r"encoder\.layers\.", ()),
)


Activation = Literal["gelu", "quick_gelu"]
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """`layers` layers of width `width` with `heads` heads and an MLP of width `mlp`; `causal` ones only look back."""

    layers: int = 2
    width: int = 192
    heads: int = 3
    mlp: int = 768
    pre_norm: bool = True
    epsilon: float = 1e-6
    activation: Activation = "gelu"
    causal: bool = False

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.width % self.heads:
            raise UserError(
                f"an encoder of {self.layers} layers, width {self.width}, {self.heads} heads: "
                "it needs at least one layer and a width divisible by the heads"
            )


class EncoderLayer(nnx.Module):
    """Self-attention and an MLP, each with a residual and a layer norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.q, self.k, self.v, self.out = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.mlp_in = Linear(width, config.mlp, rngs=rngs)
        self.mlp_out = Linear(config.mlp, width, rngs=rngs)
        self.attention_norm = affine_norm(width, config.epsilon, rngs=rngs)
        self.mlp_norm = affine_norm(width, config.epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], mask: Array) -> Float[Array, "b s d"]:
        """Tokens -> tokens; `mask` says which are seen: (b, s) by all, or (b, s, s) by each."""
        if self.config.pre_norm:
            x = x + self._attention(self.attention_norm(x).astype(x.dtype), mask)
            return x + self._mlp(self.mlp_norm(x).astype(x.dtype))
        x = self.attention_norm(x + self._attention(x, mask)).astype(x.dtype)
        return self.mlp_norm(x + self._mlp(x)).astype(x.dtype)

    def _attention(self, x: Array, mask: Array) -> Array:
        heads = (*x.shape[:2], self.config.heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        return self.out(attention(q, k, v, mask))

    def _mlp(self, x: Array) -> Array:
        return self.mlp_out(ACTIVATIONS[self.config.activation](self.mlp_in(x)))


class Encoder(nnx.Module):
    """`config.layers` encoder layers, one after the other."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs=rngs)

        self.layers = stacked(rngs)

    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        """Tokens -> tokens; where `mask` is False a token is seen by no other."""
        return through(self.layers, x, causal_mask(mask) if self.config.causal else mask)


def affine_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the two-pass variance: the fast one loses digits when the mean is large."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
