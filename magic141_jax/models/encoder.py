"""A stack of bidirectional transformer layers, scanned: the body of the text encoder and of the image encoder.

    post-norm (BERT)   x = norm(x + attention(x));   x = norm(x + mlp(x))
    pre-norm           x = x + attention(norm(x));   x = x + mlp(norm(x))

All layers' parameters carry a leading layer axis, so compile time doesn't grow with depth.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from magic141_jax.errors import UserError

# For the parameters of an `Encoder`; the leading axis is the layer.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers\.(q|k|v|mlp_in)\.kernel$", (None, "fsdp", "tensor")),
    (r"layers\.(q|k|v|mlp_in)\.bias$", (None, "tensor")),
    (r"layers\.(out|mlp_out)\.kernel$", (None, "tensor", "fsdp")),
    (r"layers\.(out|mlp_out)\.bias$", (None, None)),
    (r"layers\.(attention|mlp)_norm\.(scale|bias)$", (None, None)),
)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """`layers` layers of width `width` with `heads` heads and an MLP of width `mlp`."""

    layers: int = 2
    width: int = 192
    heads: int = 3
    mlp: int = 768
    pre_norm: bool = True
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.width % self.heads:
            raise UserError(
                f"an encoder of {self.layers} layers, width {self.width}, {self.heads} heads: "
                "it needs at least one layer and a width divisible by the heads"
            )


class EncoderLayer(nnx.Module):
    """Self-attention and an MLP with exact GELU, each with a residual and a layer norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.mlp_in = nnx.Linear(width, config.mlp, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp, width, rngs=rngs)
        self.attention_norm = layer_norm(width, config.epsilon, rngs=rngs)
        self.mlp_norm = layer_norm(width, config.epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None = None) -> Float[Array, "b s d"]:
        """Tokens -> tokens; where `mask` is False a token is seen by no other."""
        if self.config.pre_norm:
            x = x + self._attention(self.attention_norm(x), mask)
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self._attention(x, mask))
        return self.mlp_norm(x + self._mlp(x))

    def _attention(self, x: Array, mask: Array | None) -> Array:
        heads = (*x.shape[:2], self.config.heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        keys = None if mask is None else mask[:, None, None, :]
        return self.out(jax.nn.dot_product_attention(q, k, v, mask=keys).reshape(x.shape))

    def _mlp(self, x: Array) -> Array:
        return self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=False))


class Encoder(nnx.Module):
    """`config.layers` encoder layers, one after the other."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> EncoderLayer:
            return EncoderLayer(config, rngs=rngs)

        self.layers = stacked(rngs)

    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None = None) -> Float[Array, "b s d"]:
        """Tokens -> tokens; where `mask` is False a token is seen by no other."""
        graphdef, stacked = nnx.split(self.layers)

        def step(x: Array, layer: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graphdef, layer)(x, mask), None

        return jax.lax.scan(step, x, stacked)[0]


def layer_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the two-pass variance: the fast one loses digits when the mean is large."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
