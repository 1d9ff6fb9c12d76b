"""LLaVA in transformers' layout <-> `Llava`: the names of its two networks and of the projection between them.

Read are the layout of the published repositories, which is also written, the one that transformers 5 saves (the same
without `vision_model`), and that of a module's own state. See `llama` and `clip` for what is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic141_jax import settings
from magic141_jax.convert import clip, llama
from magic141_jax.convert.bert import config_fields
from magic141_jax.convert.engine import Table, linear
from magic141_jax.models.llava import LlavaConfig

LANGUAGE_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.")
VISION_PREFIXES = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")
PROJECTION_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")
HEADS = ("language_model.lm_head.weight", "lm_head.weight")

# what `Llava` computes; a model with another value is refused
SUPPORTED = {
    "model_type": "llava",
    "vision_feature_layer": -1 - clip.SKIP_LAST,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


def config_to_ours(theirs: Mapping[str, Any], *, skip_last: int = llama.SKIP_LAST, **run_time: Any) -> LlavaConfig:
    """Their config.json as the `LlavaConfig` that runs all but the last `skip_last` language layers.

    `run_time` may set `compute_dtype`.

    Raises:
      UserError: a needed key is missing, or the model computes something else than `Llava`.
    """
    theirs = {"image_token_index": theirs.get("image_token_id"), **theirs}  # an alias
    names = {key: key for key in ("text_config", "vision_config", "image_token_index")}
    parts = config_fields(theirs, names, SUPPORTED, what="LLaVA")
    fields = {
        "language": llama.config_to_ours(parts["text_config"], skip_last=skip_last),
        "vision": clip.vision_config_to_ours(parts["vision_config"]),
        "image_token": parts["image_token_index"],
    }
    return settings.build(LlavaConfig, {**fields, **run_time}, where="llava")


def table(config: LlavaConfig, *, skip_last: int = llama.SKIP_LAST) -> Table:
    """The rules between their names and the parameter paths of `Llava(config)`."""
    language = llama.table(
        config.language, prefixes=LANGUAGE_PREFIXES, heads=HEADS, ours="language.", skip_last=skip_last
    )
    ends = {"linear_1": "project_in", "linear_2": "project_out"}
    return (
        *language,
        *clip.vision_table(config.vision, prefixes=VISION_PREFIXES, ours="vision."),
        *(rule for theirs in PROJECTION_PREFIXES for end, own in ends.items() for rule in linear(theirs + end, own)),
    )
