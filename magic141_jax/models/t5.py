"""T5's encoder (arXiv 1910.10683) in its version 1.1: token ids -> token states, FLUX.1's words.

    x = x + attention(norm(x));   x = x + down(gelu(gate(norm(x))) * up(norm(x)));   last, a norm

Norms are RMS norms and no layer has a bias. Scores are q k without the usual 1 / sqrt(k), plus a learned bias per head
and distance of the two tokens, the same in all layers: short distances have a bucket each, long ones share buckets
that widen logarithmically, separately to the left and to the right. Layers are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from magic141_jax.errors import UserError
from magic141_jax.models.layers import Linear
from magic141_jax.models.network import through
from magic141_jax.shapes import TokenIds, TokenMask, Tokens

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers\.(q|k|v|gate|up)\.kernel", ("fsdp", "tensor")),
    (r"layers\.(out|down)\.kernel", ("tensor", "fsdp")),
    (r"word\.embedding", (None, "fsdp")),
    (r"distance\.embedding", (None, "tensor")),
    (r"norm\.scale", ()),
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of T5 v1.1 XXL (4.8 B parameters in its encoder), by default.

    Attributes:
      head_width: k; heads * head_width need not be the width.
      mlp: width of the gated MLP.
      buckets: of distances, half of them to the left and half to the right.
      max_distance: tokens this far apart or further share the last bucket.
      compute_dtype: dtype of activations; parameters stay as given.
    """

    vocabulary: int = 32128
    width: int = 4096
    head_width: int = 64
    heads: int = 64
    mlp: int = 10240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise UserError(
                f"{self.buckets} buckets up to a distance of {self.max_distance}: the buckets must be a multiple of 4, "
                "and a quarter of them less than the distance"
            )


class T5Layer(nnx.Module):
    """Self-attention and a gated MLP, each after an RMS norm and with a residual."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, inner = config.width, config.heads * config.head_width
        self.attention_norm = rms_norm(config, rngs=rngs)
        self.q, self.k, self.v = (Linear(width, inner, bias=False, rngs=rngs) for _ in range(3))
        self.out = Linear(inner, width, bias=False, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs=rngs)
        self.gate, self.up = (Linear(width, config.mlp, bias=False, rngs=rngs) for _ in range(2))
        self.down = Linear(config.mlp, width, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 n s s"], mask: Array | None) -> Array:
        """Tokens -> tokens; `mask` (b, 1, 1, s) hides keys."""
        y = self.attention_norm(x)
        heads = (*x.shape[:2], self.config.heads, self.config.head_width)
        q, k, v = (project(y).reshape(heads) for project in (self.q, self.k, self.v))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0).reshape(*x.shape[:2], -1))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))


class T5(nnx.Module):
    """The encoder; see the module's docstring."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> T5Layer:
            return T5Layer(config, rngs=rngs)

        self.config = config
        self.word = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.distance = nnx.Embed(config.buckets, config.heads, rngs=rngs)
        self.layers = stacked(rngs)
        self.final_norm = rms_norm(config, rngs=rngs)

    def __call__(self, ids: TokenIds, mask: TokenMask | None = None) -> Tokens:
        """Token ids (b, s) -> states (b, s, d) in the compute dtype.

        Where `mask` is False a token is seen by no other; without a mask all are seen, as FLUX does with its padding.
        """
        x = self.word(ids).astype(self.config.compute_dtype)
        places = np.arange(ids.shape[1])
        buckets = distance_buckets(places[None, :] - places[:, None], self.config)
        bias = self.distance(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]
        mask = None if mask is None else mask[:, None, None, :]
        return self.final_norm(through(self.layers, x, bias, mask))


def rms_norm(config: T5Config, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """T5's norm: no bias, statistics in float32, output in the compute dtype."""
    return nnx.RMSNorm(config.width, epsilon=config.epsilon, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)


def distance_buckets(distances: Int[np.ndarray, "..."], config: T5Config) -> Int[np.ndarray, "..."]:
    """Bucket numbers in 0..buckets - 1 of the distances (key minus query)."""
    half = config.buckets // 2
    exact = half // 2
    size = np.abs(distances)
    # in float32, as the published code, where the logarithm of a power of two may fall short of a whole number
    growth = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(config.max_distance / exact)
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int64), half - 1)
    return np.where(size < exact, size, far) + half * (distances > 0)
