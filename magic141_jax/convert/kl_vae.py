"""FLUX.1's image autoencoder in diffusers' layout <-> `KLVAE`: its table of names and its config, both ways.

Names and layouts are those of HunyuanVideo's autoencoder, with plain convolutions in place of wrapped causal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic141_jax.convert.engine import Table
from magic141_jax.convert.hunyuan_vae import coder
from magic141_jax.errors import UserError
from magic141_jax.models.kl_vae import KLVAEConfig

CLASS_NAME = "AutoencoderKL"

# their config keys that are our fields
SAME_FIELDS = ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels")
# their config key -> (what the network has built in, what an absent key stands for)
FIXED_FIELDS = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "act_fn": ("silu", "silu"),
    "use_quant_conv": (False, True),
    "use_post_quant_conv": (False, True),
    "latents_mean": (None, None),
    "latents_std": (None, None),
}
LEVEL_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def config_to_ours(theirs: Mapping[str, Any]) -> KLVAEConfig:
    """diffusers' config.json -> `KLVAEConfig`.

    Raises:
      UserError: a key is missing, or the file asks for a variant that this network doesn't have.
    """
    missing = [key for key in (*SAME_FIELDS, *LEVEL_TYPES, "scaling_factor") if key not in theirs]
    if missing:
        raise UserError(f"the VAE's config.json lacks {', '.join(missing)}; is it an {CLASS_NAME}?")
    wrong = {key: theirs.get(key, absent) for key, (value, absent) in FIXED_FIELDS.items()}
    wrong = {key: value for key, value in wrong.items() if value != FIXED_FIELDS[key][0]}
    levels = len(theirs["block_out_channels"])
    wrong |= {key: theirs[key] for key, kind in LEVEL_TYPES.items() if list(theirs[key]) != [kind] * levels}
    if theirs.get("_class_name", CLASS_NAME) != CLASS_NAME or wrong:
        raise UserError(f"the VAE's config.json is no {CLASS_NAME} like FLUX's: {wrong or theirs['_class_name']}")
    fields = {key: theirs[key] for key in SAME_FIELDS} | {"block_out_channels": tuple(theirs["block_out_channels"])}
    fields |= {"latent_mean": theirs.get("shift_factor") or 0.0, "latent_std": 1 / theirs["scaling_factor"]}
    try:
        return KLVAEConfig(**fields, mid_block_add_attention=theirs.get("mid_block_add_attention", True))
    except ValueError as error:
        raise UserError(f"the VAE's config.json: {error}") from error


def config_from_ours(config: KLVAEConfig) -> dict[str, Any]:
    """`KLVAEConfig` -> diffusers' config.json."""
    levels = len(config.block_out_channels)
    theirs = {key: getattr(config, key) for key in (*SAME_FIELDS, "mid_block_add_attention")}
    theirs |= {key: value for key, (value, _) in FIXED_FIELDS.items()}
    theirs |= {key: [kind] * levels for key, kind in LEVEL_TYPES.items()}
    theirs |= {"scaling_factor": 1 / config.latent_std, "shift_factor": config.latent_mean}
    return {"_class_name": CLASS_NAME} | theirs | {"block_out_channels": list(config.block_out_channels)}


def table(config: KLVAEConfig) -> Table:
    """The rules between diffusers' names and `KLVAE(config)`'s parameter paths, for any sizes."""
    del config
    return (*coder("encoder", "down", conv="", axes=2), *coder("decoder", "up", conv="", axes=2))
