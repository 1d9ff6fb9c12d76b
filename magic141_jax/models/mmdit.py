"""The denoising network: HunyuanVideo's multi-modal diffusion transformer (arXiv 2412.03603; Magic 1-For-1 sec. 3).

inputs (b, f, h, w, in_channels), t (b,), text (b, s, e), pooled (b, p)  ->  (b, f, h, w, out_channels)

    c     = MLP(sinusoid(1000 t)) + MLP(pooled) [+ MLP(sinusoid(1000 guidance))]
    c_0   = MLP(sinusoid(0)) + MLP(pooled)           instead of c for known tokens, where known="replace"
    text  = token refiner(text)                      image tokens first, then text tokens
            (a linear map where there are no refiner blocks)
    video = linear(patches)
    double blocks: video and text keep their own weights and meet in joint attention
    single blocks: both in one stream, attention and MLP in parallel from one norm
    out   = unpatchify(linear(modulated norm(video)))

What depends on neither x nor a block's tokens (text, and all modulations) is `MMDiT.prepare`, the rest
`MMDiT.evaluate`: a walk whose times are known prepares all of its steps at once (`seam.prepare_walk`).

Blocks of a kind are stacked on a leading layer axis and scanned, so compile time does not grow with depth. Every
modulation is (shift, scale, gate) in that order and starts at zero (gates at `gate_start`), as does the output layer:
a fresh network predicts 0.

FLUX.1's text-to-image network (Black Forest Labs, 2024) is this one without refiner blocks, over one latent frame and
with another RoPE base.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from magic141_jax.diffusion.conditioning import Known, LatentMask
from magic141_jax.errors import UserError
from magic141_jax.models import layers as nn
from magic141_jax.models import sequence
from magic141_jax.models.attention import attention, joint_attention
from magic141_jax.models.network import scan
from magic141_jax.shapes import Latents, Pooled, Times, TokenMask, Tokens
from magic141_jax.sharding import keep_split

TIME_SCALE = 1000.0
REFINER_MLP_RATIO = 4  # the published layout has no setting for it


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and run-time choices of an `MMDiT`; the defaults are the published 13B image-to-video layout.

    Attributes:
      in_channels: noisy latents, plus known latents and their mask (2c + 1) where these enter by channels.
      known: how known latents enter: not at all, on channels of their own, or in the place of the noisy ones. Tokens
        that were replaced are modulated as at time 0, for that is what they show (HunyuanVideo-I2V's token_replace).
      hold_known: whether unknown frames carry the last known one on the known channels, instead of zeros.
      patch: latent values joined into a token along frames, height and width.
      width: d; normally heads * head_width, though pruned networks may have fewer heads.
      condition_width: of the vector that modulates the blocks (`sparsity.structured.condense`); 0 is d.
      refiner_blocks: blocks of the token refiner; with 0 the text enters through a linear map alone.
      mlp_ratio: MLP width over d.
      rope_axes: head dims rotated by the frame, row and column position; they sum to head_width.
      absolute_positions: whether patches also carry sine features of their frame, row and column. RoPE alone tells
        a token where others are, not where or when it is itself, which motion depends on; learning that from
        attention to the text takes longer than a short run has.
      guidance_embedding: whether the guidance scale is an input (a guidance-distilled network).
      prediction: what the output means: the velocity, or the clean sample x0.
      gate_start: the residual gates of a fresh network. 0 is adaLN-zero, whose blocks open over some ten thousand
        steps; in a short run they would stay shut, and a fraction lets every block work from the first step.
      remat: what the backward pass recomputes in each block: nothing, all of it, or all but matrix products.
      compute_dtype: dtype of activations; parameters stay as given.
      attention: the kernel of joint attention, see `magic141_jax.models.attention`.
      ulysses: how many of the devices that split a sequence exchange heads; 0 is as many as can.
      tile, window: sliding-tile attention, see `magic141_jax.models.sequence`: the largest tile in tokens, and how many
        tiles along frames, height and width a token sees (odd numbers); null is full attention. A network has to be
        trained, or at least tuned, with the window that it is sampled with.
    """

    in_channels: int = 33
    out_channels: int = 16
    known: Known = "channels"
    hold_known: bool = False
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 3072
    heads: int = 24
    head_width: int = 128
    double_blocks: int = 20
    single_blocks: int = 40
    refiner_blocks: int = 2
    mlp_ratio: float = 4.0
    condition_width: int = 0
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    absolute_positions: bool = False
    text_width: int = 4096
    pooled_width: int = 768
    time_features: int = 256
    guidance_embedding: bool = False
    prediction: Literal["velocity", "sample"] = "velocity"
    gate_start: float = 0.0
    remat: Literal["none", "full", "dots"] = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "jax", "chunked", "cudnn", "splash"] = "auto"
    ulysses: int = 0
    tile: tuple[int, int, int] | None = None
    window: tuple[int, int, int] | None = None

    def __post_init__(self):
        if (self.tile is None) != (self.window is None):
            raise UserError(f"tile {self.tile} and window {self.window} go together: set both or neither")
        if self.window and (min(self.tile) < 1 or any(n < 1 or n % 2 == 0 for n in self.window)):
            raise UserError(f"tiles have positive sizes and windows odd ones, not {self.tile} and {self.window}")
        if sum(self.rope_axes) != self.head_width or any(a % 2 for a in self.rope_axes):
            raise UserError(f"rope_axes {self.rope_axes} must be even and sum to head_width {self.head_width}")
        channels = 2 * self.out_channels + 1 if self.known == "channels" else self.out_channels
        if self.in_channels != channels:
            raise UserError(f"with known={self.known!r} in_channels is {channels}, not {self.in_channels}")
        if self.hold_known and self.known != "channels":
            raise UserError(f"hold_known fills the known channels, which a network with known={self.known!r} lacks")

    @property
    def mlp_width(self) -> int:
        """m, the hidden width of the MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def conditions(self) -> int:
        """How many values modulate the blocks."""
        return self.condition_width or self.width


def hunyuan_13b() -> MMDiTConfig:
    """The published image-to-video network (12.8 B parameters)."""
    return MMDiTConfig(remat="full", compute_dtype="bfloat16")


def flux_12b() -> MMDiTConfig:
    """FLUX.1 schnell, a text-to-image network (11.9 B parameters); FLUX.1 dev has a guidance embedding as well."""
    return dataclasses.replace(
        hunyuan_13b(),
        in_channels=16,
        known="none",
        double_blocks=19,
        single_blocks=38,
        refiner_blocks=0,
        rope_theta=10000.0,
    )


def emoji() -> MMDiTConfig:
    """The embedded default at 64x64 pixels, over latents of 32 channels.

    A token is one latent position: of four of them the noisy and the known values would fill the width, and the network
    then hardly learns to carry the known ones along.
    """
    return MMDiTConfig(
        in_channels=65,
        out_channels=32,
        hold_known=True,
        patch=(1, 1, 1),
        width=256,
        heads=4,
        head_width=64,
        double_blocks=2,
        single_blocks=4,
        refiner_blocks=1,
        rope_axes=(16, 24, 24),
        absolute_positions=True,
        text_width=384,
        pooled_width=384,
        prediction="sample",
        gate_start=0.25,
    )


def debug() -> MMDiTConfig:
    """A few thousand parameters, for tests."""
    return MMDiTConfig(
        in_channels=9,
        out_channels=4,
        width=16,
        heads=2,
        head_width=8,
        double_blocks=1,
        single_blocks=1,
        refiner_blocks=1,
        mlp_ratio=2.0,
        rope_axes=(4, 2, 2),
        text_width=12,
        pooled_width=12,
        time_features=16,
    )


SIZES: dict[str, Callable[[], MMDiTConfig]] = {
    "emoji": emoji,
    "hunyuan_13b": hunyuan_13b,
    "flux_12b": flux_12b,
    "debug": debug,
}

# (regex on the dotted path, mesh axes of the array); a leading None is the layer axis of stacked blocks
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"blocks\..*(qkv|mlp_up|modulation|gates)\.kernel", (None, "fsdp", "tensor")),
    (r"blocks\..*(attention_out|mlp_down)\.kernel", (None, "tensor", "fsdp")),
    (r"blocks\..*(qkv|mlp_up)\.bias", (None, "tensor")),
    (r"blocks\.", ()),
    (r"\.up\.kernel", ("fsdp", "tensor")),
    (r"\.down\.kernel", ("tensor", "fsdp")),
    (r"patch_out\.kernel", ("fsdp", None)),
    (r"(patch_in|project)\.kernel", (None, "fsdp")),
    (r"modulation_out\.kernel", ("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of a forward pass sees: RoPE tables (1, j, 1, 1, k) and the key mask (b, j).

    `layout` says where the j tokens lie. With known="replace" also which of them are known (b, j).
    """

    layout: sequence.Layout
    cos: Array
    sin: Array
    mask: Array
    known: Array | None = None


class Prepared(NamedTuple):
    """What an evaluation needs of the time and the prompt (`MMDiT.prepare`).

    Attributes:
      condition: c, (b, e) float32.
      words: the text as it enters the blocks, (b, s, d).
      double, single: shifts, scales and gates of the streams of the blocks, (layers, b, k, m d) each; k is 1, or with
        known="replace" 2: behind those of noisy tokens stand those of known ones.
      last: shift and scale before the output layer, (b, 1, 2 d).
    """

    condition: Array
    words: Array
    double: tuple[Array, Array]
    single: tuple[Array]
    last: Array


class Stream(nnx.Module):
    """The weights of one token stream in a stack of blocks: modulation, attention and MLP."""

    def __init__(self, config: MMDiTConfig, layers: int, modulations: int, *, rngs: nnx.Rngs, bias: bool = True):
        self.config = config
        inner = config.heads * config.head_width
        linear = functools.partial(nn.Linear, layers=layers, rngs=rngs)
        self.modulation = linear(config.conditions, modulations * config.width, init=nn.ZEROS)
        parts = jnp.arange(modulations) % 3 == 2  # (shift, scale, gate), once or twice
        self.modulation.bias[...] += config.gate_start * jnp.repeat(parts, config.width)[None]
        self.qkv = linear(config.width, 3 * inner)
        self.qk_scale = nnx.Param(jnp.ones((layers, 2, config.head_width)))
        self.attention_out = linear(inner, config.width, bias=bias)
        self.mlp_up = linear(config.width, config.mlp_width)
        self.mlp_down = linear(config.mlp_width, config.width)

    def modulations(self, vectors: Array) -> Array:
        """silu(c), and of known tokens silu(c_0), (b, k, e) -> what modulates each layer, (layers, b, k, m d)."""
        graphdef, layers = nnx.split(self.modulation)
        return scan(lambda carry, layer: (carry, nnx.merge(graphdef, layer[0])(vectors)), None, layers)[1]

    def parts(self, modulations: Array, known: Array | None = None) -> list[Array]:
        """The shifts, scales and gates of one layer (b, k, m d): (b, 1, d) each, or (b, j, d) with `known` (b, j)."""
        parts = jnp.split(modulations, modulations.shape[-1] // self.config.width, -1)
        if known is None:
            return [part[:, :1] for part in parts]
        return [jnp.where(known[:, :, None], part[:, 1:], part[:, :1]) for part in parts]

    def project(self, x: Array) -> tuple[Array, Array]:
        """x (b, j, d) -> normed q and k (b, j, n, 2, k), and v (b, j, n, k)."""
        qkv = self.qkv(x).reshape(*x.shape[:2], self.config.heads, 3, self.config.head_width)
        return nn.rms_norm(qkv[..., :2, :], self.qk_scale[...][None, None, None]), qkv[..., 2, :]

    def mlp(self, x: Array) -> Array:
        """x (b, j, d) -> (b, j, d)."""
        return self.mlp_down(nn.gelu(self.mlp_up(x)))

    def attend(self, qk: Array, v: Array, context: Context) -> Array:
        """Joint attention over j tokens: q and k (b, j, n, 2, k), v (b, j, n, k) -> (b, j, n * k)."""
        qk, config = nn.rotate(qk, context.cos, context.sin), self.config
        options = {"backend": config.attention, "ulysses": config.ulysses, "pattern": context.layout.pattern}
        return joint_attention(qk[..., 0, :], qk[..., 1, :], v, context.mask, **options)


class DoubleBlocks(nnx.Module):
    """Stacked double-stream blocks: separate weights for video and text, joint attention."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.video = Stream(config, config.double_blocks, 6, rngs=rngs)
        self.text = Stream(config, config.double_blocks, 6, rngs=rngs)

    def __call__(self, tokens: tuple[Array, Array], video: Array, text: Array, context: Context) -> tuple[Array, Array]:
        """One block: (video (b, l, d), text (b, s, d)) -> the same, with the modulations of both."""
        streams, layout = (self.video, self.text), context.layout
        known = None if context.known is None else layout.part(context.known)[0]
        parts = [self.video.parts(video, known), self.text.parts(text)]
        projected = [
            stream.project(nn.modulate(nn.layer_norm(x), p[0], p[1])) for stream, x, p in zip(streams, tokens, parts)
        ]
        qk, v = (layout.join(*pair) for pair in zip(*projected))
        attended = layout.part(self.video.attend(qk, v, context))
        out = []
        for stream, x, a, p in zip(streams, tokens, attended, parts):
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = p
            x = x + gate * stream.attention_out(a)
            out.append(x + mlp_gate * stream.mlp(nn.modulate(nn.layer_norm(x), mlp_shift, mlp_scale)))
        return out[0], out[1]


class SingleBlocks(nnx.Module):
    """Stacked single-stream blocks: attention and MLP in parallel from one norm.

    The published output matrix over concat[attention, mlp] is kept as its two parts, which saves the concatenation;
    their one bias is that of `mlp_down`.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.joint = Stream(config, config.single_blocks, 3, rngs=rngs, bias=False)

    def __call__(self, x: Array, modulations: Array, context: Context) -> Array:
        """One block: video then text tokens (b, j, d) -> the same."""
        shift, scale, gate = self.joint.parts(modulations, context.known)
        y = nn.modulate(nn.layer_norm(x), shift, scale)
        attended = self.joint.attend(*self.joint.project(y), context)
        return x + gate * (self.joint.attention_out(attended) + self.joint.mlp(y))


class RefinerBlocks(nnx.Module):
    """Stacked token-refiner blocks: plain self-attention without RoPE, only the gates depend on the condition."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, inner = config.width, config.heads * config.head_width
        linear = functools.partial(nn.Linear, layers=config.refiner_blocks, rngs=rngs)
        self.gates = linear(d, 2 * d, init=nn.ZEROS)
        self.gates.bias[...] += config.gate_start
        self.norm_1 = nn.AffineNorm(d, layers=config.refiner_blocks)
        self.qkv = linear(d, 3 * inner)
        self.attention_out = linear(inner, d)
        self.norm_2 = nn.AffineNorm(d, layers=config.refiner_blocks)
        self.mlp_up = linear(d, REFINER_MLP_RATIO * d)
        self.mlp_down = linear(REFINER_MLP_RATIO * d, d)

    def __call__(self, x: Array, vector: Array, mask: Array) -> Array:
        """One block: x (b, s, d) with silu of its condition (b, d) and key mask (b, s)."""
        gate, mlp_gate = jnp.split(self.gates(vector)[:, None], 2, axis=-1)
        qkv = self.qkv(self.norm_1(x)).reshape(*x.shape[:2], self.config.heads, 3, self.config.head_width)
        q, k, v = (qkv[..., i, :] for i in range(3))
        x = x + gate * self.attention_out(attention(q, k, v, mask, backend="chunked"))
        return x + mlp_gate * self.mlp_down(jax.nn.silu(self.mlp_up(self.norm_2(x))))


class TokenRefiner(nnx.Module):
    """Text tokens of the encoder -> text tokens of the transformer, aware of the time and of the whole prompt.

    Without blocks it is the linear map alone.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        refined = config.refiner_blocks > 0
        self.time = nn.Embedder(config.time_features, config.width, rngs=rngs) if refined else None
        self.pooled = nn.Embedder(config.text_width, config.width, rngs=rngs) if refined else None
        self.project = nn.Linear(config.text_width, config.width, rngs=rngs)
        self.blocks = RefinerBlocks(config, rngs=rngs) if refined else None

    def __call__(self, text: Tokens, mask: TokenMask, features: Array) -> Float[Array, "b s d"]:
        """`features` (b, time_features) are the sinusoids of the time; padded rows come out as garbage."""
        if self.blocks is None:
            return self.project(text)
        weights = mask.astype(text.dtype)[:, :, None]
        mean = (text * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        vector = jax.nn.silu(self.time(features) + self.pooled(mean))
        run = functools.partial(_block, vector=vector, mask=mask)
        tokens, _ = _scan(self.blocks, self.project(text), run, self.config.remat)
        return tokens


@dataclasses.dataclass(frozen=True)
class Kept:
    """Features (k, b, l, d) of chosen blocks, where each block's output goes in them, and what of it does."""

    features: Array
    slots: np.ndarray
    video: Callable[[Any], Array]


def _block(block: Callable, x: Any, *modulations: Array, **context: Any) -> Any:
    return block(x, *modulations, **context)


def _scan(
    blocks: nnx.Module,
    carry: Any,
    run: Callable,
    remat: str,
    *,
    modulations: tuple[Array, ...] = (),
    collect: bool = False,
    kept: Kept | None = None,
    tokens: bool = False,
) -> tuple[Any, Any]:
    """Runs `carry = run(block, carry, *its modulations)` over stacked blocks -> (the last carry, outputs or features).

    With `kept` the video tokens of a block's output are written at its slot; slot k means nowhere. Recomputation does
    not reach over the writing, for it would save all features with every block; a write needs no more than its slot to
    be differentiated. `tokens` holds the tokens between blocks split over "context".
    """
    graphdef, state = nnx.split(blocks)
    hold = functools.partial(keep_split, tokens=tokens)

    def one(carry: Any, weights: nnx.State, modulations: tuple[Array, ...]) -> Any:
        return run(nnx.merge(graphdef, weights), jax.tree.map(hold, carry), *modulations)

    block = nn.REMAT[remat](one)
    features, slots = (None, None) if kept is None else (kept.features, kept.slots)

    def body(carry: tuple[Any, Any], layer: tuple[Any, Any]) -> tuple[tuple[Any, Any], Any]:
        (x, features), (weights, (slot, modulations)) = carry, layer
        x = block(x, weights, modulations)
        if kept is not None:
            features = features.at[slot].set(kept.video(x), mode="drop", unique_indices=True)
        return (x, features), x if collect else None

    (carry, features), outputs = scan(body, (carry, features), state, others=(slots, modulations))
    return carry, outputs if collect else features


class MMDiT(nnx.Module):
    """The multi-modal diffusion transformer; see the module's docstring."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, patch_values = config.width, config.patch[0] * config.patch[1] * config.patch[2]
        self.patch_in = nn.Linear(patch_values * config.in_channels, d, rngs=rngs)
        embedder = functools.partial(nn.Embedder, width=d, outputs=config.conditions, rngs=rngs)
        self.time_in = embedder(config.time_features)
        self.pooled_in = embedder(config.pooled_width)
        self.guidance_in = embedder(config.time_features) if config.guidance_embedding else None
        self.text_in = TokenRefiner(config, rngs=rngs)
        self.double_blocks = DoubleBlocks(config, rngs=rngs)
        self.single_blocks = SingleBlocks(config, rngs=rngs)
        self.modulation_out = nn.Linear(config.conditions, 2 * d, rngs=rngs, init=nn.ZEROS)
        self.patch_out = nn.Linear(d, patch_values * config.out_channels, rngs=rngs, init=nn.ZEROS)

    def __call__(
        self,
        inputs: Latents,
        t: Times,
        text: Tokens,
        text_mask: TokenMask,
        pooled: Pooled,
        *,
        guidance: Times | None = None,
        known: LatentMask | None = None,
        intermediates: bool | tuple[int, ...] = False,
    ) -> Latents | tuple[Latents, dict[str, Array]] | tuple[Latents, Float[Array, "k b l d"]]:
        """The network's prediction at times t in [0, 1] (1 = noise), float32.

        Args:
          inputs: noisy latents, with known latents and mask on the channel axis where the config has them.
          t: (b,) times; scaled by 1000 here.
          text: image tokens first, then text tokens.
          text_mask: true where a row of `text` counts; padded rows may hold anything finite.
          pooled: one vector for the prompt.
          guidance: (b,) guidance scales, exactly where the config has `guidance_embedding`.
          known: one where `inputs` hold known latents, exactly where the config has known="replace". A token counts as
            known when all of its latents are.
          intermediates: True also returns every block's output, stacked over layers, by name. Numbers of k blocks,
            counted through the double and then the single ones from 0, also return the video tokens after these
            blocks alone, in the order given: features for a discriminator, in the memory of k outputs.

        Raises:
          UserError: sides not divisible by the patch, wrong channel count, guidance or `known` missing or superfluous,
            blocks that the network lacks.
        """
        prepared = self.prepare(t, text, text_mask, pooled, guidance=guidance)
        return self.evaluate(inputs, prepared, text_mask, known=known, intermediates=intermediates)

    def prepare(
        self, t: Times, text: Tokens, text_mask: TokenMask, pooled: Pooled, *, guidance: Times | None = None
    ) -> Prepared:
        """What `evaluate` needs of everything but the latents; arguments and errors as of a call."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        _check("guidance", guidance, config.guidance_embedding)
        features = nn.time_features(TIME_SCALE * t, config.time_features)
        condition = self._condition(features, pooled, guidance)
        words = self.text_in(text.astype(dtype), _never_empty(text_mask), features.astype(dtype))
        conditions = [condition]
        if config.known == "replace":  # what known tokens show is of time 0, and guidance says nothing of it
            zero = nn.time_features(jnp.zeros_like(t), config.time_features)
            conditions.append(self._condition(zero, pooled))
        vectors = jax.nn.silu(jnp.stack(conditions, 1)).astype(dtype)
        double = self.double_blocks.video.modulations(vectors), self.double_blocks.text.modulations(vectors[:, :1])
        single = (self.single_blocks.joint.modulations(vectors),)
        return Prepared(condition, words, double, single, self.modulation_out(vectors[:, :1]))

    def evaluate(
        self,
        inputs: Latents,
        prepared: Prepared,
        text_mask: TokenMask,
        *,
        known: LatentMask | None = None,
        intermediates: bool | tuple[int, ...] = False,
    ) -> Latents | tuple[Latents, dict[str, Array]] | tuple[Latents, Float[Array, "k b l d"]]:
        """The rest of a call."""
        config = self.config
        if inputs.shape[-1] != config.in_channels:
            raise UserError(f"the network takes {config.in_channels} input channels, got {inputs.shape[-1]}")
        _check("known", known, config.known == "replace")
        dtype = jnp.dtype(config.compute_dtype)
        grid = tuple(side // p for side, p in zip(inputs.shape[1:4], config.patch))
        layout = sequence.make(grid, text_mask.shape[1], tile=config.tile, window=config.window)
        video = self.patch_in(layout.video(nn.patchify(inputs.astype(dtype), config.patch)))
        if config.absolute_positions:
            positions = nn.sine_positions(grid, config.width, config.rope_theta)
            video += layout.video(positions.astype(dtype)[None])
        context = self._context(layout, grid, text_mask, known)
        joint, outputs = self._blocks((video, layout.words(prepared.words)), prepared, context, intermediates)

        shift, scale = jnp.split(prepared.last, 2, axis=-1)
        last = self.patch_out(nn.modulate(nn.layer_norm(layout.part(joint)[0]), shift, scale))
        out = nn.unpatchify(layout.grid(last).astype(jnp.float32), grid, config.patch)
        if intermediates is True:
            return out, {"condition": prepared.condition, "patch_in": video, "text_in": prepared.words} | outputs
        return out if intermediates is False else (out, layout.grid(outputs, axis=2))

    def _context(
        self, layout: sequence.Layout, grid: tuple[int, int, int], text_mask: Array, known: Array | None
    ) -> Context:
        """What all blocks see: positions turn the video's tokens, and text is masked as its mask says."""
        tables = nn.rope_tables(grid, self.config.rope_axes, self.config.rope_theta, text=len(layout.text))
        l = len(layout.inverse)
        cos, sin = (layout.join(layout.video(x[None, :l]), x[None, l:])[:, :, None, None] for x in tables)
        valid = jnp.broadcast_to(jnp.asarray(layout.order >= 0)[None], (text_mask.shape[0], len(layout.order)))
        context = Context(layout, cos, sin, layout.join(valid, layout.words(text_mask.astype(bool))))
        if known is None:
            return context
        tokens = layout.video(nn.patchify(known, self.config.patch).all(-1))
        words = jnp.zeros((tokens.shape[0], len(layout.text)), bool)
        return dataclasses.replace(context, known=layout.join(tokens, words))

    def _blocks(
        self, tokens: tuple[Array, Array], prepared: Prepared, context: Context, intermediates: Any
    ) -> tuple[Array, Any]:
        """(video, text) -> all tokens (b, j, d) after the last block, and the intermediates that were asked for."""
        config, layout, collect = self.config, context.layout, intermediates is True
        chosen = not isinstance(intermediates, bool)
        run = functools.partial(_block, context=context)
        through = functools.partial(_scan, run=run, remat=config.remat, collect=collect, tokens=True)
        kept = None
        if chosen:
            features = jnp.zeros((len(intermediates), *tokens[0].shape), tokens[0].dtype)
            slots = _slots(config, intermediates)
            kept = Kept(features, slots[0], lambda x: x[0])
        tokens, first = through(self.double_blocks, tokens, modulations=prepared.double, kept=kept)
        kept = Kept(first, slots[1], lambda x: layout.part(x)[0]) if chosen else None
        joint, last = through(self.single_blocks, layout.join(*tokens), modulations=prepared.single, kept=kept)
        if not collect:
            return joint, last
        return joint, {"double_blocks.video": first[0], "double_blocks.text": first[1], "single_blocks": last}

    def _condition(self, features: Array, pooled: Array, guidance: Array | None = None) -> Float[Array, "b e"]:
        """The vector that modulates every block, in float32: it is cheap and everything hangs on it."""
        condition = self.time_in(features) + self.pooled_in(pooled.astype(jnp.float32))
        if guidance is not None:
            condition += self.guidance_in(nn.time_features(TIME_SCALE * guidance, self.config.time_features))
        return condition


def _check(name: str, value: Array | None, wanted: bool) -> None:
    if (value is not None) != wanted:
        raise UserError(f"by its config this network {'needs' if wanted else 'takes no'} {name}")


def _slots(config: MMDiTConfig, chosen: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where each double and each single block stands among the chosen ones; their number for the others."""
    blocks = config.double_blocks + config.single_blocks
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= number < blocks for number in chosen):
        raise UserError(f"features of blocks {tuple(chosen)}: choose one or more different ones from 0 to {blocks - 1}")
    slots = np.full(blocks, len(chosen))
    slots[list(chosen)] = np.arange(len(chosen))
    return slots[: config.double_blocks], slots[config.double_blocks :]


def _never_empty(mask: Array) -> Array:
    """The mask (b, s) with column 0 opened in rows that have no token at all, so that softmax has a key."""
    first = jnp.arange(mask.shape[1])[None, :] == 0
    return mask.astype(bool) | (first & ~mask.any(axis=1, keepdims=True))
