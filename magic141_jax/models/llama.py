"""Llama 3 (arXiv 2407.21783): the language model whose inner states condition HunyuanVideo (arXiv 2412.03603).

    ids (b, s), mask (b, s)  ->  states (b, s, d)

    x = x + attention(norm(x));   x = x + down(silu(gate(norm(x))) * up(norm(x)))

RMS norms, causal attention with grouped key and value heads, rotary positions, no biases. Only states are wanted, no
next word, so the network ends after the last layer that is asked for: HunyuanVideo reads the states two layers before
the end, without the final norm, and what follows is neither built nor loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from magic141_jax.errors import UserError
from magic141_jax.models import layers as nn
from magic141_jax.models.attention import attention, causal_mask
from magic141_jax.models.network import through
from magic141_jax.shapes import TokenIds, TokenMask, Tokens


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a `Llama`; the defaults are Llama-3-8B with the token list of LLaVA, as HunyuanVideo runs it.

    Attributes:
      layers: how many are run; the published network may have more.
      key_value_heads: heads of keys and values, each shared by heads / key_value_heads query heads.
      final_norm: whether the states are normed after the last layer, as where the whole network is run.
      compute_dtype: of activations; norms and softmax are always computed in float32.
    """

    vocabulary: int = 128320
    width: int = 4096
    mlp: int = 14336
    layers: int = 30
    heads: int = 32
    key_value_heads: int = 8
    head_width: int = 128
    rope_theta: float = 500000.0
    epsilon: float = 1e-5
    final_norm: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads % self.key_value_heads or self.head_width % 2:
            raise UserError(
                f"a Llama of {self.layers} layers, {self.heads} heads of width {self.head_width} and "
                f"{self.key_value_heads} key-value heads: it needs a layer, key-value heads that divide the heads, "
                "and an even head width"
            )


# (regex on the dotted path, mesh axes of the last dimensions), see `magic141_jax.sharding`
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers\.(q|k|v|gate|up)\.kernel", ("fsdp", "tensor")),
    (r"layers\.(out|down)\.kernel", ("tensor", "fsdp")),
    (r"words\.embedding", (None, "fsdp")),
    (r"scale$", ()),
)


class LlamaLayers(nnx.Module):
    """Stacked decoder layers."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        linear = functools.partial(nn.Linear, layers=config.layers, bias=False, rngs=rngs)
        queries, shared = (n * config.head_width for n in (config.heads, config.key_value_heads))
        self.q = linear(config.width, queries)
        self.k = linear(config.width, shared)
        self.v = linear(config.width, shared)
        self.out = linear(queries, config.width)
        self.gate = linear(config.width, config.mlp)
        self.up = linear(config.width, config.mlp)
        self.down = linear(config.mlp, config.width)
        self.attention_scale = nnx.Param(jnp.ones((config.layers, config.width)))
        self.mlp_scale = nnx.Param(jnp.ones((config.layers, config.width)))

    def __call__(self, x: Tokens, rope: tuple[Array, Array], mask: Bool[Array, "b s s"]) -> Tokens:
        """One layer: x (b, s, d) with cosine and sine tables (b, s, 1, k) and who sees whom."""
        y = _norm(x, self.attention_scale, self.config)
        heads = (*x.shape[:2], -1, self.config.head_width)
        q, k, v = (project(y).reshape(heads) for project in (self.q, self.k, self.v))
        x = x + self.out(attention(nn.rotate(q, *rope), nn.rotate(k, *rope), v, mask))
        y = _norm(x, self.mlp_scale, self.config)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """The language model without its head; see the module's docstring."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.layers = LlamaLayers(config, rngs=rngs)
        self.final_scale = nnx.Param(jnp.ones(config.width)) if config.final_norm else None

    def __call__(self, ids: TokenIds, mask: TokenMask) -> Tokens:
        """Token ids and which of them count -> states (b, s, d) float32; padded rows hold anything finite."""
        return self.run(self.embed(ids), mask)

    def embed(self, ids: TokenIds) -> Tokens:
        """Token ids -> what enters the first layer, where images may take the place of words."""
        return self.words(ids).astype(self.config.compute_dtype)

    def run(self, x: Tokens, mask: TokenMask) -> Tokens:
        """Embedded tokens (b, s, d) -> states (b, s, d) float32."""
        x = through(self.layers, x, rope_tables(positions(mask), self.config), causal_mask(mask))
        if self.final_scale is not None:
            x = _norm(x, self.final_scale, self.config)
        return x.astype(jnp.float32)


def positions(mask: TokenMask) -> Int[Array, "b s"]:
    """The place of each token among those that count; padding stands at 1, as in the published pipelines."""
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, 1)


def rope_tables(places: Int[Array, "b s"], config: LlamaConfig) -> tuple[Float[Array, "b s 1 k"], ...]:
    """Cosines and signed sines, (b, s, 1, k) each: pair (p, p + k/2) turns by place * theta^(-2p / k)."""
    turns = config.rope_theta ** (-np.arange(0, config.head_width, 2) / config.head_width)
    angles = places[..., None, None].astype(jnp.float32) * turns.astype(np.float32)[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def _norm(x: Array, scale: nnx.Param, config: LlamaConfig) -> Array:
    return nn.rms_norm(x, nn.expand_like(scale[...], x), config.epsilon)
