"""FLUX.1's transformer (schnell and dev) in diffusers' layout <-> `MMDiT`: its table of names and its config.

It is HunyuanVideo's network over one latent frame, and so is its table, but for two entries: text comes in through a
plain linear map, and patches of 2 x 2 latents come ready-made. The published pipeline packs them into tokens of
64 = (c, ph, pw) channels, so that the published config says patch_size 1 and in_channels 64; ours are 16 channels in
patches (1, 2, 2), packed inside the network in the order (ph, pw, c).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from magic141_jax.convert.engine import LINEAR, Rule, Table, chain, linear
from magic141_jax.convert.hunyuan_dit import patch_values, shared
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiTConfig

CLASS_NAME = "FluxTransformer2DModel"

# their config key -> (our field) where the value is the same
CONFIG_FIELDS = {
    "num_attention_heads": "heads",
    "attention_head_dim": "head_width",
    "num_layers": "double_blocks",
    "num_single_layers": "single_blocks",
    "guidance_embeds": "guidance_embedding",
    "joint_attention_dim": "text_width",
    "pooled_projection_dim": "pooled_width",
}
# The published network has these built in.
FIXED_FIELDS = {
    "patch": (1, 2, 2),
    "refiner_blocks": 0,
    "mlp_ratio": 4.0,
    "rope_theta": 10000.0,
    "time_features": 256,
    "condition_width": 0,
    "absolute_positions": False,
    "prediction": "velocity",
    "known": "none",
}
PACKED = math.prod(FIXED_FIELDS["patch"])
DEFAULT_AXES = (16, 56, 56)  # the published files leave them out


def config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> MMDiTConfig:
    """diffusers' config.json -> `MMDiTConfig`; `run_time` sets remat, compute_dtype or attention.

    Raises:
      UserError: a key is missing, or the file asks for a variant that this network doesn't have.
    """
    missing = [key for key in (*CONFIG_FIELDS, "in_channels") if key not in theirs]
    if missing:
        raise UserError(f"the transformer's config.json lacks {', '.join(missing)}; is it a {CLASS_NAME}?")
    packed, patch = theirs["in_channels"], theirs.get("patch_size", 1)
    if patch != 1 or packed % PACKED or theirs.get("out_channels") not in (None, packed):
        raise UserError(
            f"this {CLASS_NAME} has patch_size {patch}, in_channels {packed} and out_channels "
            f"{theirs.get('out_channels')}; convert a text-to-image network (schnell or dev), which has 1, 64 and 64"
        )
    fields = {ours: theirs[key] for key, ours in CONFIG_FIELDS.items()}
    fields |= dict.fromkeys(("in_channels", "out_channels"), packed // PACKED)
    axes = tuple(theirs.get("axes_dims_rope", DEFAULT_AXES))
    width = fields["heads"] * fields["head_width"]
    return MMDiTConfig(**(FIXED_FIELDS | fields | run_time), width=width, rope_axes=axes)


def config_from_ours(config: MMDiTConfig) -> dict[str, Any]:
    """`MMDiTConfig` -> diffusers' config.json.

    Raises:
      UserError: the published layout can't express the config.
    """
    fixed = FIXED_FIELDS | {"in_channels": config.out_channels, "width": config.heads * config.head_width}
    wrong = [f"{key} {getattr(config, key)}" for key, value in fixed.items() if getattr(config, key) != value]
    if wrong:
        wanted = ", ".join(f"{key.split()[0]} {fixed[key.split()[0]]}" for key in wrong)
        raise UserError(f"FLUX's layout can't hold a network of {', '.join(wrong)}; it needs {wanted}")
    theirs = {key: getattr(config, ours) for key, ours in CONFIG_FIELDS.items()}
    theirs |= {"in_channels": PACKED * config.in_channels, "out_channels": None, "patch_size": 1}
    return {"_class_name": CLASS_NAME} | theirs | {"axes_dims_rope": list(config.rope_axes)}


def table(config: MMDiTConfig) -> Table:
    """The rules between diffusers' names and `MMDiT(config)`'s parameter paths."""
    return (
        *shared(config),
        Rule("x_embedder.weight", "patch_in.kernel", chain(LINEAR, patch_values(config))),
        Rule("x_embedder.bias", "patch_in.bias"),
        *linear("context_embedder", "text_in.project"),
    )
