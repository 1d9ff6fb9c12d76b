"""CLIP's towers in transformers' layout <-> `ClipText` and `ClipVision`: their tables of names and their configs.

Linear kernels are transposed and stacked over layers; the patch convolution is a linear map of patch values. Names
are read with and without the tower's prefix (newer versions of transformers leave it out) and written with it. What
is never used is dropped by name: the projections, position numbers, the vision tower's last layer and last norm.
`dual_table` is of the repositories that hold both towers and keep all of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from magic141_jax import settings
from magic141_jax.convert.bert import config_fields
from magic141_jax.convert.engine import CONV, LINEAR, Rule, Table, Transform, chain, each, linear, norm
from magic141_jax.errors import UserError
from magic141_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig

TEXT_PREFIXES = ("text_model.", "")
VISION_PREFIXES = ("vision_model.", "")
SKIP_LAST = 1  # vision layers after the states that LLaVA reads

_LAYER_FIELDS = {
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
}
_LAYER_DEFAULTS = {"num_hidden_layers": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
TEXT_FIELDS = _LAYER_FIELDS | {
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "eos_token_id": "end_token",
}
TEXT_DEFAULTS = _LAYER_DEFAULTS | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VISION_FIELDS = _LAYER_FIELDS | {"image_size": "image", "patch_size": "patch"}
VISION_DEFAULTS = _LAYER_DEFAULTS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
SUPPORTED_TEXT = {"model_type": "clip_text_model"}
SUPPORTED_VISION = {"model_type": "clip_vision_model", "num_channels": 3}


def text_config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> ClipTextConfig:
    """Their config.json as a `ClipTextConfig`; `run_time` may set `compute_dtype`.

    Raises:
      UserError: the model computes something else than `ClipText`.
    """
    fields = config_fields(theirs, TEXT_FIELDS, SUPPORTED_TEXT, what="CLIP text tower", defaults=TEXT_DEFAULTS)
    return settings.build(ClipTextConfig, {**fields, **run_time}, where="clip_text")


def vision_config_to_ours(
    theirs: Mapping[str, Any], *, skip_last: int = SKIP_LAST, **run_time: Any
) -> ClipVisionConfig:
    """Their config.json as the `ClipVisionConfig` that runs all but the last `skip_last` layers.

    Raises:
      UserError: the model computes something else than `ClipVision`, or has too few layers.
    """
    what = "CLIP vision tower"
    fields = config_fields(theirs, VISION_FIELDS, SUPPORTED_VISION, what=what, defaults=VISION_DEFAULTS)
    if fields["layers"] <= skip_last:
        raise UserError(f"this {what} has {fields['layers']} layers; without the last {skip_last} there is none left")
    fields["layers"] -= skip_last
    return settings.build(ClipVisionConfig, {**fields, **run_time}, where="clip_vision")


def dual_config_to_ours(theirs: Mapping[str, Any]) -> ClipConfig:
    """The config.json of a repository with both towers ("model_type": "clip") as a `ClipConfig`.

    Raises:
      UserError: the model computes something else than `Clip`.
    """
    names = {"text_config": "text", "vision_config": "vision", "projection_dim": "projection"}
    fields = config_fields(theirs, names, {"model_type": "clip"}, what="CLIP", defaults={"projection_dim": 512})
    text, vision = text_config_to_ours(fields["text"]), vision_config_to_ours(fields["vision"], skip_last=0)
    return settings.build(ClipConfig, {**fields, "text": text, "vision": vision}, where="clip")


def dual_table(config: ClipConfig) -> Table:
    """The rules between the names of a repository with both towers and the paths of `Clip(config)`."""
    text = _text_layout("text_model.")
    return (
        *(dataclasses.replace(rule, ours=f"text.{rule.ours}") if rule.targets else rule for rule in text),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *_vision_layout("vision_model.", "vision.", config.vision),
        Rule("text_projection.weight", "text_projection.kernel", LINEAR),
        Rule("visual_projection.weight", "image_projection.kernel", LINEAR),
        Rule("logit_scale", ()),
    )


def vision_table(
    config: ClipVisionConfig,
    *,
    prefixes: tuple[str, ...] = VISION_PREFIXES,
    ours: str = "",
    skip_last: int = SKIP_LAST,
) -> Table:
    """The rules between their names, after one of `prefixes`, and the paths of `ClipVision(config)`, after `ours`.

    They may have `skip_last` layers more than `config`; these are dropped.
    """
    late = range(config.layers, config.layers + skip_last)
    return (
        Rule("visual_projection.weight", ()),
        *(Rule(f"{theirs}encoder.layers.{i}.{{*rest}}", ()) for theirs in prefixes for i in late),
        *(rule for theirs in prefixes for rule in _vision_layout(theirs, ours, config)),
    )


def _vision_layout(theirs: str, ours: str, config: ClipVisionConfig) -> Table:
    return (
        Rule(f"{theirs}embeddings.class_embedding", f"{ours}class_token"),
        Rule(f"{theirs}embeddings.patch_embedding.weight", f"{ours}patch.kernel", _patches(config.patch)),
        Rule(f"{theirs}embeddings.position_embedding.weight", f"{ours}positions.embedding"),
        Rule(f"{theirs}embeddings.position_ids", ()),
        *norm(f"{theirs}pre_layrnorm", f"{ours}norm"),  # their spelling
        *_layers(f"{theirs}encoder.layers.{{i}}", f"{ours}encoder.layers"),
        Rule(f"{theirs}post_layernorm.{{*rest}}", ()),
    )


def _layers(theirs: str, ours: str) -> Table:
    return (
        *linear(f"{theirs}.self_attn.q_proj", f"{ours}.q"),
        *linear(f"{theirs}.self_attn.k_proj", f"{ours}.k"),
        *linear(f"{theirs}.self_attn.v_proj", f"{ours}.v"),
        *linear(f"{theirs}.self_attn.out_proj", f"{ours}.out"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp_in"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp_out"),
        *norm(f"{theirs}.layer_norm1", f"{ours}.attention_norm"),
        *norm(f"{theirs}.layer_norm2", f"{ours}.mlp_norm"),
    )


def _patches(side: int) -> Transform:
    """A patch convolution (d, c, y, x) -> a linear kernel (y x c, d)."""
    join = each(
        "join patch values",
        lambda a: a.reshape(-1, a.shape[-1]),
        lambda a: a.reshape(side, side, -1, a.shape[-1]),
    )
    return chain(CONV, join)


def _text_layout(theirs: str) -> Table:
    return (
        Rule(f"{theirs}embeddings.token_embedding.weight", "words.embedding"),
        Rule(f"{theirs}embeddings.position_embedding.weight", "positions.embedding"),
        Rule(f"{theirs}embeddings.position_ids", ()),
        *_layers(f"{theirs}encoder.layers.{{i}}", "encoder.layers"),
        *norm(f"{theirs}final_layer_norm", "norm"),
    )


TEXT_TABLE: Table = (
    Rule("text_projection.weight", ()),
    *(rule for theirs in TEXT_PREFIXES for rule in _text_layout(theirs)),
)
