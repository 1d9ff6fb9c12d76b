"""HunyuanVideo's transformer in diffusers' layout <-> `MMDiT`: its table of names and its config, both ways.

What differs besides names: linear kernels are transposed and stacked over layers; q, k, v become one kernel with
columns (n, 3, k); RoPE pairs (2i, 2i + 1) become (i, i + k/2), so q, k and their norm scales are permuted; patch
values are ordered (pt, ph, pw, c) instead of (c, pt, ph, pw); the final modulation is (shift, scale) instead of
(scale, shift); the single blocks' output matrix is kept in its two parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from magic141_jax.convert.engine import LINEAR, Arrays, Rule, Table, Transform, chain, each, linear, norm
from magic141_jax.diffusion import conditioning
from magic141_jax.errors import UserError, nearest
from magic141_jax.models.mmdit import MMDiTConfig

CLASS_NAME = "HunyuanVideoTransformer3DModel"

# their config key -> (our field) where the value is the same
CONFIG_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
    "num_layers": "double_blocks",
    "num_single_layers": "single_blocks",
    "num_refiner_layers": "refiner_blocks",
    "mlp_ratio": "mlp_ratio",
    "guidance_embeds": "guidance_embedding",
    "text_embed_dim": "text_width",
    "pooled_projection_dim": "pooled_width",
    "rope_theta": "rope_theta",
    "rope_axes_dim": "rope_axes",
}
# their image_condition_type -> how known latents enter ours
CONDITIONS: dict[str | None, conditioning.Known] = {
    None: "none",
    "latent_concat": "channels",
    "token_replace": "replace",
}


def config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> MMDiTConfig:
    """diffusers' config.json -> `MMDiTConfig`; `run_time` sets remat, compute_dtype, attention or prediction.

    Raises:
      UserError: a key is missing, or the file asks for a variant that this network doesn't have.
    """
    missing = [key for key in (*CONFIG_FIELDS, "patch_size", "patch_size_t") if key not in theirs]
    if missing:
        raise UserError(f"the transformer's config.json lacks {', '.join(missing)}; is it a {CLASS_NAME}?")
    if theirs.get("qk_norm", "rms_norm") != "rms_norm":
        raise UserError(f"qk_norm {theirs['qk_norm']!r} is not supported, only 'rms_norm'")
    condition = theirs.get("image_condition_type")
    if condition not in CONDITIONS:
        raise UserError(f"image_condition_type is {condition!r}.{nearest(str(condition), CONDITIONS)}")
    fields = {ours: theirs[key] for key, ours in CONFIG_FIELDS.items()}
    fields["rope_axes"] = tuple(fields["rope_axes"])
    patch = (theirs["patch_size_t"], theirs["patch_size"], theirs["patch_size"])
    width = fields["heads"] * fields["head_width"]
    return MMDiTConfig(**fields, known=CONDITIONS[condition], patch=patch, width=width, **run_time)


def config_from_ours(config: MMDiTConfig) -> dict[str, Any]:
    """`MMDiTConfig` -> diffusers' config.json.

    Raises:
      UserError: the published layout can't express the config.
    """
    frames, rows, columns = config.patch
    if config.absolute_positions or config.hold_known:
        raise UserError("diffusers' layout has no absolute_positions and no hold_known; such a network stays here")
    if config.condition_width:
        raise UserError("diffusers' layout has no condition_width; such a network stays here")
    if not config.refiner_blocks:
        raise UserError("HunyuanVideo's layout has refiner blocks, this network none; it may be one like FLUX's")
    if config.width != config.heads * config.head_width or rows != columns or config.time_features != 256:
        raise UserError(
            "the published layout needs width = heads * head_width, square patches and 256 time features; "
            f"got width {config.width}, {config.heads} heads of {config.head_width}, patch {config.patch}, "
            f"{config.time_features} time features"
        )
    theirs = {key: getattr(config, ours) for key, ours in CONFIG_FIELDS.items()}
    theirs |= {"_class_name": CLASS_NAME, "rope_axes_dim": list(config.rope_axes), "qk_norm": "rms_norm"}
    condition = {ours: theirs for theirs, ours in CONDITIONS.items()}[config.known]
    return theirs | {"patch_size": rows, "patch_size_t": frames, "image_condition_type": condition}


def table(config: MMDiTConfig) -> Table:
    """The rules between diffusers' names and `MMDiT(config)`'s parameter paths."""
    refiner = "context_embedder.token_refiner.refiner_blocks.{i}"
    return (
        *shared(config),
        *linear("x_embedder.proj", "patch_in", _patch_in(config)),
        *_embedder("context_embedder.time_text_embed.timestep_embedder", "text_in.time"),
        *_embedder("context_embedder.time_text_embed.text_embedder", "text_in.pooled"),
        *linear("context_embedder.proj_in", "text_in.project"),
        *linear(f"{refiner}.norm_out.linear", "text_in.blocks.gates"),
        *norm(f"{refiner}.norm1", "text_in.blocks.norm_1"),
        *norm(f"{refiner}.norm2", "text_in.blocks.norm_2"),
        *_qkv(f"{refiner}.attn.to_%", "text_in.blocks", config, rope=False),
        *linear(f"{refiner}.attn.to_out.0", "text_in.blocks.attention_out"),
        *linear(f"{refiner}.ff.net.0.proj", "text_in.blocks.mlp_up"),
        *linear(f"{refiner}.ff.net.2", "text_in.blocks.mlp_down"),
    )


def shared(config: MMDiTConfig) -> Table:
    """The rules that FLUX's layout has as well: all but the ways in of the patches and of the text."""
    return (
        *_embedder("time_text_embed.timestep_embedder", "time_in"),
        *_embedder("time_text_embed.text_embedder", "pooled_in"),
        *_embedder("time_text_embed.guidance_embedder", "guidance_in"),
        *_stream(config, "video", norm="norm1", qkv="to_%", scale="norm_%", out="to_out.0", mlp="ff"),
        *_stream(
            config,
            "text",
            norm="norm1_context",
            qkv="add_%_proj",
            scale="norm_added_%",
            out="to_add_out",
            mlp="ff_context",
        ),
        *_single(config),
        *linear("norm_out.linear", "modulation_out", _SWAP_HALVES),
        *linear("proj_out", "patch_out", patch_values(config)),
    )


def _embedder(theirs: str, ours: str) -> Table:
    return (*linear(f"{theirs}.linear_1", f"{ours}.up"), *linear(f"{theirs}.linear_2", f"{ours}.down"))


def _letters(template: str, letters: str) -> tuple[str, ...]:
    return tuple(template.replace("%", letter) for letter in letters)


def _qkv(theirs: str, ours: str, config: MMDiTConfig, *, rope: bool = True) -> Table:
    """q, k and v, whose names differ in the letter at "%"."""
    join = _join_qkv(config, rope)
    weights, biases = (tuple(f"{theirs.replace('%', x)}.{kind}" for x in "qkv") for kind in ("weight", "bias"))
    return (Rule(weights, f"{ours}.qkv.kernel", chain(join, LINEAR)), Rule(biases, f"{ours}.qkv.bias", join))


def _stream(config: MMDiTConfig, stream: str, *, norm: str, qkv: str, scale: str, out: str, mlp: str) -> Table:
    theirs, ours = "transformer_blocks.{i}", f"double_blocks.{stream}"
    scales = tuple(f"{theirs}.attn.{scale.replace('%', x)}.weight" for x in "qk")
    return (
        *linear(f"{theirs}.{norm}.linear", f"{ours}.modulation"),
        *_qkv(f"{theirs}.attn.{qkv}", ours, config),
        Rule(scales, f"{ours}.qk_scale", _join_scales(config)),
        *linear(f"{theirs}.attn.{out}", f"{ours}.attention_out"),
        *linear(f"{theirs}.{mlp}.net.0.proj", f"{ours}.mlp_up"),
        *linear(f"{theirs}.{mlp}.net.2", f"{ours}.mlp_down"),
    )


def _single(config: MMDiTConfig) -> Table:
    theirs, ours = "single_transformer_blocks.{i}", "single_blocks.joint"
    scales = _letters(f"{theirs}.attn.norm_%.weight", "qk")
    kernels = (f"{ours}.attention_out.kernel", f"{ours}.mlp_down.kernel")
    return (
        *linear(f"{theirs}.norm.linear", f"{ours}.modulation"),
        *_qkv(f"{theirs}.attn.to_%", ours, config),
        Rule(scales, f"{ours}.qk_scale", _join_scales(config)),
        *linear(f"{theirs}.proj_mlp", f"{ours}.mlp_up"),
        Rule(f"{theirs}.proj_out.weight", kernels, _split_inputs(config.heads * config.head_width)),
        Rule(f"{theirs}.proj_out.bias", f"{ours}.mlp_down.bias"),
    )


_SWAP_HALVES = each(
    "(scale, shift) to (shift, scale)",
    lambda a: np.concatenate(np.split(a, 2)[::-1]),
    lambda a: np.concatenate(np.split(a, 2)[::-1]),
)


def _half_split(width: int) -> np.ndarray:
    """Where the dims of a head come from: the first of every pair, then the second of every pair."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def _join_qkv(config: MMDiTConfig, rope: bool) -> Transform:
    """q, k, v with rows (n, k) -> one array with rows (n, 3, k), q and k permuted where they are rotated."""
    n, k = config.heads, config.head_width
    order = _half_split(k) if rope else np.arange(k)
    inverse = np.argsort(order)

    def join(arrays: Arrays) -> Arrays:
        q, key, v = (a.reshape(n, k, *a.shape[1:]) for a in arrays)
        joined = np.stack([q[:, order], key[:, order], v], axis=1)
        return (joined.reshape(n * 3 * k, *joined.shape[3:]),)

    def split(arrays: Arrays) -> Arrays:
        parts = arrays[0].reshape(n, 3, k, *arrays[0].shape[1:])
        q, key, v = parts[:, 0, inverse], parts[:, 1, inverse], parts[:, 2]
        return tuple(a.reshape(n * k, *a.shape[2:]) for a in (q, key, v))

    return Transform("join q, k, v", join, split)


def _join_scales(config: MMDiTConfig) -> Transform:
    """The norm scales (k,) of q and k -> (2, k), permuted like q and k."""
    order = _half_split(config.head_width)
    inverse = np.argsort(order)
    return Transform(
        "join q and k norm scales",
        lambda arrays: (np.stack(arrays)[:, order],),
        lambda arrays: tuple(arrays[0][:, inverse]),
    )


def _split_inputs(first: int) -> Transform:
    """A weight (out, first + rest) -> kernels (first, out) and (rest, out)."""
    return Transform(
        "split the inputs",
        lambda arrays: (arrays[0][:, :first].T, arrays[0][:, first:].T),
        lambda arrays: (np.concatenate([arrays[0].T, arrays[1].T], axis=1),),
    )


def _patch_in(config: MMDiTConfig) -> Transform:
    """A patch convolution (d, c, pt, ph, pw) -> a linear weight (d, pt * ph * pw * c); a bias stays."""
    shape = (*config.patch, config.in_channels)
    return each(
        "patch convolution to linear",
        lambda a: a if a.ndim == 1 else np.moveaxis(a, 1, -1).reshape(a.shape[0], -1),
        lambda a: a if a.ndim == 1 else np.moveaxis(a.reshape(a.shape[0], *shape), -1, 1),
    )


def patch_values(config: MMDiTConfig) -> Transform:
    """Rows (c, patch values) -> (patch values, c), of a weight and of a bias, for the output's channels."""
    values, channels = math.prod(config.patch), config.out_channels

    def turn(rows: int, columns: int) -> Any:
        return lambda a: a.reshape(rows, columns, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)

    return each("order of patch values", turn(channels, values), turn(values, channels))
