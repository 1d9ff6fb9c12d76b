"""HunyuanVideo's autoencoder in diffusers' layout <-> `HunyuanVAE`: its table of names and its config, both ways.

What differs besides names: convolution kernels have their channels last, 1x1x1 convolutions are linear layers, and
encoder and decoder levels are called alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from magic141_jax.convert.engine import CONV, IDENTITY, Rule, Table, Transform, each, linear, norm
from magic141_jax.errors import UserError
from magic141_jax.models.hunyuan_vae import HunyuanVAEConfig

CLASS_NAME = "AutoencoderKLHunyuanVideo"

# their config key -> (our field) where the value is the same
CONFIG_FIELDS = {
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_num_groups",
    "latent_channels": "latent_channels",
    "spatial_compression_ratio": "spatial_factor",
    "temporal_compression_ratio": "temporal_factor",
    "mid_block_add_attention": "mid_block_add_attention",
}
# The network has these built in.
FIXED_FIELDS = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}


def pointwise(axes: int) -> Transform:
    """A convolution of a single tap over 2 or 3 axes as a linear layer."""
    return each(
        "convolution (out, in, 1, ...) to (in, out)",
        lambda a: a.reshape(a.shape[:2]).T,
        lambda a: a.T.reshape(*a.shape[::-1], *[1] * axes),
    )


def config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> HunyuanVAEConfig:
    """diffusers' config.json -> `HunyuanVAEConfig`; `run_time` may set `tiling`. A missing key has its default.

    Raises:
      UserError: the file asks for a variant that this network doesn't have.
    """
    wrong = {key: theirs[key] for key, value in FIXED_FIELDS.items() if theirs.get(key, value) != value}
    if theirs.get("_class_name", CLASS_NAME) != CLASS_NAME or wrong:
        raise UserError(f"the VAE's config.json is no supported {CLASS_NAME}: {wrong or theirs['_class_name']}")
    fields = {ours: theirs[key] for key, ours in CONFIG_FIELDS.items() if key in theirs}
    fields["block_out_channels"] = tuple(fields.get("block_out_channels", HunyuanVAEConfig.block_out_channels))
    if "scaling_factor" in theirs:
        fields["latent_std"] = 1 / theirs["scaling_factor"]
    try:
        return HunyuanVAEConfig(**fields, **run_time)
    except ValueError as error:
        raise UserError(f"the VAE's config.json: {error}") from error


def config_from_ours(config: HunyuanVAEConfig) -> dict[str, Any]:
    """`HunyuanVAEConfig` -> diffusers' config.json.

    Raises:
      UserError: the latents are shifted or the levels aren't four, which the published layout can't express.
    """
    if config.latent_mean or len(config.block_out_channels) != 4 or config.temporal_factor != 4:
        raise UserError(
            "the published layout needs latent_mean 0, four levels and temporal_factor 4; got "
            f"{config.latent_mean}, {len(config.block_out_channels)} and {config.temporal_factor}"
        )
    theirs = {key: getattr(config, ours) for key, ours in CONFIG_FIELDS.items()}
    theirs |= {"block_out_channels": list(config.block_out_channels), "scaling_factor": 1 / config.latent_std}
    return {"_class_name": CLASS_NAME} | FIXED_FIELDS | theirs


def table(config: HunyuanVAEConfig) -> Table:
    """The rules between diffusers' names and `HunyuanVAE(config)`'s parameter paths, for any sizes."""
    return (
        *coder("encoder", "down"),
        *coder("decoder", "up"),
        *_layer("quant_conv", "quant", pointwise(3)),
        *_layer("post_quant_conv", "post_quant", pointwise(3)),
    )


def coder(name: str, direction: str, *, conv: str = ".conv", axes: int = 3) -> Table:
    """The rules of an encoder ("down") or decoder ("up") over `axes` axes; convolutions' names end in `conv`."""
    theirs, ours = f"{name}.{direction}_blocks.{{i}}", f"{name}.levels.{{i}}"
    attention = f"{name}.mid_block.attentions.0"
    block = functools.partial(_block, conv=conv, axes=axes)
    projections = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}
    return (
        *_layer(f"{name}.conv_in{conv}", f"{name}.conv_in", CONV),
        *_layer(f"{name}.conv_out{conv}", f"{name}.conv_out", CONV),
        *norm(f"{name}.conv_norm_out", f"{name}.norm_out"),
        *block(f"{theirs}.resnets.{{j}}", f"{ours}.blocks.{{j}}"),
        *_layer(f"{theirs}.{direction}samplers.0.conv{conv}", f"{ours}.resample", CONV),
        *block(f"{name}.mid_block.resnets.0", f"{name}.middle.first"),
        *block(f"{name}.mid_block.resnets.1", f"{name}.middle.second"),
        *norm(f"{attention}.group_norm", f"{name}.middle.attention.norm"),
        *(
            rule
            for projection, mine in projections.items()
            for rule in linear(f"{attention}.{projection}", f"{name}.middle.attention.{mine}")
        ),
    )


def _block(theirs: str, ours: str, *, conv: str, axes: int) -> Table:
    return (
        *norm(f"{theirs}.norm{{k}}", f"{ours}.norm{{k}}"),
        *_layer(f"{theirs}.conv{{k}}{conv}", f"{ours}.conv{{k}}", CONV),
        *_layer(f"{theirs}.conv_shortcut{conv}", f"{ours}.shortcut", pointwise(axes)),
    )


def _layer(theirs: str, ours: str, kernel: Transform) -> Table:
    return (Rule(f"{theirs}.weight", f"{ours}.kernel", kernel), Rule(f"{theirs}.bias", f"{ours}.bias", IDENTITY))
