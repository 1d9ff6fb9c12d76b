"""HunyuanVideo's transformer in its authors' own layout <-> `MMDiT`; Magic 1-For-1's checkpoint has the same names.

The layout is diffusers' under other names, so `table` is diffusers' table recast: `MODULES` renames, and where several
of diffusers' modules bear one name here, their rows are stacked in one matrix (q, k, v; in the single blocks q, k, v
and the MLP's first layer). The final modulation alone is ordered otherwise: (shift, scale).

Such checkpoints have no config.json, hence `config_from_shapes`; in a component folder put one beside the tensors that
holds {"_class_name": "HYVideoDiffusionTransformer"}. They are published as pickles (`*.pt`), which run code
when they are read; this package refuses them and tells how to rewrite one (`tensors.HOW_TO_UNPICKLE`). The
autoencoder's own checkpoint needs no table: its names are diffusers' behind "vae.", which `without_prefix` removes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from magic141_jax.convert import hunyuan_dit
from magic141_jax.convert.engine import Arrays, Rule, Table, Transform, chain, each
from magic141_jax.errors import UserError, nearest
from magic141_jax.models.mmdit import MMDiTConfig

Tensor = TypeVar("Tensor")

CLASS_NAME = "HYVideoDiffusionTransformer"

# what training frameworks put in front of every name
PREFIXES = ("module.", "model.", "vae.")

_REFINER = ("context_embedder.token_refiner.refiner_blocks.{i}.", "txt_in.individual_token_refiner.blocks.{i}.")
_DOUBLE = ("transformer_blocks.{i}.", "double_blocks.{i}.")
_SINGLE = ("single_transformer_blocks.{i}.", "single_blocks.{i}.")

# (what both names begin with, {diffusers' module: theirs}); modules of one name are stacked in this order
_GROUPS: tuple[tuple[tuple[str, str], dict[str, str]], ...] = (
    (
        ("", ""),
        {
            "x_embedder.proj": "img_in.proj",
            "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "context_embedder.proj_in": "txt_in.input_embedder",
            "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
            "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
            "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
            "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
            "norm_out.linear": "final_layer.adaLN_modulation.1",
            "proj_out": "final_layer.linear",
        },
    ),
    (
        _REFINER,
        {
            "norm1": "norm1",
            "norm2": "norm2",
            "attn.to_q": "self_attn_qkv",
            "attn.to_k": "self_attn_qkv",
            "attn.to_v": "self_attn_qkv",
            "attn.to_out.0": "self_attn_proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
            "norm_out.linear": "adaLN_modulation.1",
        },
    ),
    (
        _DOUBLE,
        {
            "norm1.linear": "img_mod.linear",
            "attn.to_q": "img_attn_qkv",
            "attn.to_k": "img_attn_qkv",
            "attn.to_v": "img_attn_qkv",
            "attn.norm_q": "img_attn_q_norm",
            "attn.norm_k": "img_attn_k_norm",
            "attn.to_out.0": "img_attn_proj",
            "ff.net.0.proj": "img_mlp.fc1",
            "ff.net.2": "img_mlp.fc2",
            "norm1_context.linear": "txt_mod.linear",
            "attn.add_q_proj": "txt_attn_qkv",
            "attn.add_k_proj": "txt_attn_qkv",
            "attn.add_v_proj": "txt_attn_qkv",
            "attn.norm_added_q": "txt_attn_q_norm",
            "attn.norm_added_k": "txt_attn_k_norm",
            "attn.to_add_out": "txt_attn_proj",
            "ff_context.net.0.proj": "txt_mlp.fc1",
            "ff_context.net.2": "txt_mlp.fc2",
        },
    ),
    (
        _SINGLE,
        {
            "norm.linear": "modulation.linear",
            "attn.to_q": "linear1",
            "attn.to_k": "linear1",
            "attn.to_v": "linear1",
            "proj_mlp": "linear1",
            "attn.norm_q": "q_norm",
            "attn.norm_k": "k_norm",
            "proj_out": "linear2",
        },
    ),
)
MODULES = {start + theirs: own + original for (start, own), names in _GROUPS for theirs, original in names.items()}

_TO_DIFFUSERS_ORDER = each(
    "(shift, scale) to (scale, shift)", lambda a: np.roll(a, len(a) // 2, 0), lambda a: np.roll(a, len(a) // 2, 0)
)


def table(config: MMDiTConfig) -> Table:
    """The rules between the authors' names and `MMDiT(config)`'s parameter paths."""
    owners: dict[str, list[Rule]] = {}
    for rule in hunyuan_dit.table(config):
        owners.setdefault(_rename(rule.sources[0]), []).append(rule)
    return tuple(_recast(rules, config) for rules in owners.values())


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    known: str | None = None,
    rope_axes: tuple[int, int, int] | None = None,
    **run_time: Any,
) -> MMDiTConfig:
    """The config of a checkpoint, from the shapes of its tensors by name (see `without_prefix`).

    Args:
      shapes: of all tensors.
      known: how known latents enter, see `MMDiTConfig`. A network with more input than output channels has them on
        channels; between "none" and "replace" shapes can't tell, and "none" is assumed.
      rope_axes: 1/8 of the head for frames and 7/16 for rows and columns each, as published, unless given.
      run_time: further fields, as remat, compute_dtype, attention.

    Raises:
      UserError: a tensor that tells a size is missing, or sizes contradict each other.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"tensor {name} is missing; is this a HunyuanVideo transformer in its authors' layout?")
        return tuple(shapes[name])

    def depth(start: str) -> int:
        return len({name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)})

    width, in_channels, *patch = shape("img_in.proj.weight")
    head = shape("double_blocks.0.img_attn_q_norm.weight")[0]
    out_channels = shape("final_layer.linear.weight")[0] // int(np.prod(patch))
    return MMDiTConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        known=known or ("none" if in_channels == out_channels else "channels"),
        patch=tuple(patch),
        width=width,
        heads=width // head,
        head_width=head,
        double_blocks=depth("double_blocks."),
        single_blocks=depth("single_blocks."),
        refiner_blocks=depth("txt_in.individual_token_refiner.blocks."),
        mlp_ratio=shape("double_blocks.0.img_mlp.fc1.weight")[0] / width,
        rope_axes=rope_axes or (head // 8, head * 7 // 16, head * 7 // 16),
        text_width=shape("txt_in.input_embedder.weight")[1],
        pooled_width=shape("vector_in.in_layer.weight")[1],
        time_features=shape("time_in.mlp.0.weight")[1],
        guidance_embedding="guidance_in.mlp.0.weight" in shapes,
        **run_time,
    )


def config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> MMDiTConfig:
    """The config of a component folder whose config.json was written by hand, and says no more than it has to.

    Args:
      theirs: "shapes" of all tensors, added on reading, and, where shapes don't tell, diffusers'
        "image_condition_type" (of HunyuanVideo-I2V) and "rope_axes_dim" (of heads not 128 wide).

    Raises:
      UserError: a tensor that tells a size is missing, or the condition is not known.
    """
    condition = theirs.get("image_condition_type")
    if condition not in hunyuan_dit.CONDITIONS:
        raise UserError(f"image_condition_type is {condition!r}.{nearest(str(condition), hunyuan_dit.CONDITIONS)}")
    known = hunyuan_dit.CONDITIONS[condition] if condition else None
    axes = tuple(theirs["rope_axes_dim"]) if "rope_axes_dim" in theirs else None
    return config_from_shapes(theirs["shapes"], known=known, rope_axes=axes, **run_time)


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without a prefix that all names share ("module.", "model.", "vae.", or one after another)."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_prefix({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return dict(tensors)


def _rename(source: str) -> str:
    module, kind = source.rsplit(".", 1)
    return f"{MODULES[module]}.{kind}"


def _recast(rules: list[Rule], config: MMDiTConfig) -> Rule:
    """One rule for the tensors that some of diffusers' rules share here: unstack the rows, then do as they do."""
    parts = [source for rule in rules for source in rule.sources]
    names = {name: list(group) for name, group in itertools.groupby(parts, _rename)}
    ends = [np.cumsum([_rows(part, config) for part in group])[:-1] for group in names.values()]
    counts = [len(group) for group in names.values()]

    def unstack(arrays: Arrays) -> Arrays:
        return tuple(part for array, end in zip(arrays, ends, strict=True) for part in np.split(array, end))

    def stack(arrays: Arrays) -> Arrays:
        return tuple(g[0] if len(g) == 1 else np.concatenate(g) for g in _grouped(arrays, counts))

    def to_ours(arrays: Arrays) -> Arrays:
        groups = _grouped(arrays, [len(rule.sources) for rule in rules])
        return tuple(out for rule, group in zip(rules, groups) for out in rule.transform.to_ours(group))

    def from_ours(arrays: Arrays) -> Arrays:
        groups = _grouped(arrays, [len(rule.targets) for rule in rules])
        return tuple(out for rule, group in zip(rules, groups) for out in rule.transform.from_ours(group))

    transform = Transform(rules[0].transform.name, to_ours, from_ours)
    if parts[0].startswith("norm_out."):
        transform = chain(_TO_DIFFUSERS_ORDER, transform)
    if max(counts) > 1:
        transform = chain(Transform("unstack the rows", unstack, stack), transform)
    return Rule(tuple(names), tuple(target for rule in rules for target in rule.targets), transform)


def _rows(part: str, config: MMDiTConfig) -> int:
    """The rows of a module that may be stacked with others."""
    return config.mlp_width if ".proj_mlp." in part else config.heads * config.head_width


def _grouped(arrays: Arrays, counts: list[int]) -> list[Arrays]:
    """Arrays in consecutive groups of the given sizes."""
    rest = iter(arrays)
    return [tuple(itertools.islice(rest, count)) for count in counts]
