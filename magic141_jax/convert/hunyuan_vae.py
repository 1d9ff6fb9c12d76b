"""The key table of `models.hunyuan_vae` for the published layout of HunyuanVideo's autoencoder (diffusers' names)."""

from __future__ import annotations

_CONV = (("weight", "kernel", "conv3d"), ("bias", "bias", "same"))
_POINTWISE = (("weight", "kernel", "pointwise"), ("bias", "bias", "same"))
_LINEAR = (("weight", "kernel", "linear"), ("bias", "bias", "same"))
_NORM = (("weight", "scale", "same"), ("bias", "bias", "same"))

_SIDE = r"(encoder|decoder)"
_BLOCK = r"(?:down|up)_blocks\.(\d+)"

_LAYERS = (
    (rf"{_SIDE}\.conv_(in|out)\.conv", r"\1.conv_\2", _CONV),
    (rf"{_SIDE}\.conv_norm_out", r"\1.norm_out", _NORM),
    (rf"{_SIDE}\.{_BLOCK}\.resnets\.(\d+)\.(norm[12])", r"\1.levels.\2.blocks.\3.\4", _NORM),
    (rf"{_SIDE}\.{_BLOCK}\.resnets\.(\d+)\.(conv[12])\.conv", r"\1.levels.\2.blocks.\3.\4", _CONV),
    (rf"{_SIDE}\.{_BLOCK}\.resnets\.(\d+)\.conv_shortcut\.conv", r"\1.levels.\2.blocks.\3.shortcut", _POINTWISE),
    (rf"{_SIDE}\.{_BLOCK}\.(?:down|up)samplers\.0\.conv\.conv", r"\1.levels.\2.resample", _CONV),
    (rf"{_SIDE}\.mid_block\.resnets\.0\.(norm[12])", r"\1.middle.first.\2", _NORM),
    (rf"{_SIDE}\.mid_block\.resnets\.0\.(conv[12])\.conv", r"\1.middle.first.\2", _CONV),
    (rf"{_SIDE}\.mid_block\.resnets\.1\.(norm[12])", r"\1.middle.second.\2", _NORM),
    (rf"{_SIDE}\.mid_block\.resnets\.1\.(conv[12])\.conv", r"\1.middle.second.\2", _CONV),
    (rf"{_SIDE}\.mid_block\.attentions\.0\.group_norm", r"\1.middle.attention.norm", _NORM),
    (rf"{_SIDE}\.mid_block\.attentions\.0\.to_q", r"\1.middle.attention.query", _LINEAR),
    (rf"{_SIDE}\.mid_block\.attentions\.0\.to_k", r"\1.middle.attention.key", _LINEAR),
    (rf"{_SIDE}\.mid_block\.attentions\.0\.to_v", r"\1.middle.attention.value", _LINEAR),
    (rf"{_SIDE}\.mid_block\.attentions\.0\.to_out\.0", r"\1.middle.attention.out", _LINEAR),
    (r"(post_)?quant_conv", r"\1quant", _POINTWISE),
)

TABLE = tuple(
    (rf"{source}\.{theirs}", rf"{destination}.{ours}", transform)
    for source, destination, leaves in _LAYERS
    for theirs, ours, transform in leaves
)
