"""A fine-tuned VideoMAE in transformers' layout -> `VideoMAE`: its config and its table of names.

Read are the published files (a layer's `q_bias` and `v_bias`) and those that transformers 5 writes (`query.bias`). A
key has no bias of theirs: it would add the same to all scores of a query, so that zeros stand in for it (`complete`).
The classifier is dropped; a model that was only pretrained, without `fc_norm`, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from magic141_jax import settings
from magic141_jax.convert.bert import config_fields
from magic141_jax.convert.engine import CONV, LINEAR, Rule, Table, chain, each, linear, norm
from magic141_jax.models.videomae import VideoMAEConfig

FIELDS = {
    "image_size": "image",
    "num_frames": "frames",
    "patch_size": "patch",
    "tubelet_size": "tube",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "layer_norm_eps": "epsilon",
    "hidden_act": "activation",
}
DEFAULTS = {
    "image_size": 224,
    "num_frames": 16,
    "patch_size": 16,
    "tubelet_size": 2,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
SUPPORTED = {"model_type": "videomae", "num_channels": 3, "qkv_bias": True, "use_mean_pooling": True}
LAYER = "videomae.encoder.layer.{i}"


def config_to_ours(theirs: Mapping[str, Any]) -> VideoMAEConfig:
    """Their config.json as a `VideoMAEConfig`; raises `UserError` where the model computes something else."""
    fields = config_fields(theirs, FIELDS, SUPPORTED, what="VideoMAE", defaults=DEFAULTS)
    return settings.build(VideoMAEConfig, fields, where="videomae")


def table(config: VideoMAEConfig) -> Table:
    """The rules between their names and the parameter paths of `VideoMAE(config)`."""
    tubes = each(
        "join tube values",
        lambda a: a.reshape(-1, a.shape[-1]),
        lambda a: a.reshape(config.tube, config.patch, config.patch, -1, a.shape[-1]),
    )
    ours, attention = "encoder.layers", f"{LAYER}.attention.attention"
    return (
        Rule("videomae.embeddings.patch_embeddings.projection.weight", "patch.kernel", chain(CONV, tubes)),
        Rule("videomae.embeddings.patch_embeddings.projection.bias", "patch.bias"),
        *(Rule(f"{attention}.{name}.weight", f"{ours}.{name[0]}.kernel", LINEAR) for name in ("query", "key", "value")),
        *(Rule(f"{attention}.{name}.bias", f"{ours}.{name[0]}.bias") for name in ("query", "key", "value")),
        *linear(f"{LAYER}.attention.output.dense", f"{ours}.out"),
        *linear(f"{LAYER}.intermediate.dense", f"{ours}.mlp_in"),
        *linear(f"{LAYER}.output.dense", f"{ours}.mlp_out"),
        *norm(f"{LAYER}.layernorm_before", f"{ours}.attention_norm"),
        *norm(f"{LAYER}.layernorm_after", f"{ours}.mlp_norm"),
        *norm("fc_norm", "norm"),
        Rule("classifier.{*rest}", ()),
    )


def complete(tensors: Mapping[str, Any], config: VideoMAEConfig) -> dict[str, Any]:
    """Their tensors under the newer names of the biases, and zeros for those of the keys."""
    renamed = {"attention.attention.q_bias": "attention.attention.query.bias"}
    renamed["attention.attention.v_bias"] = "attention.attention.value.bias"
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        old = next((end for end in renamed if name.endswith(end)), None)
        found[name if old is None else name.removesuffix(old) + renamed[old]] = tensor
    keys = (f"{LAYER}.attention.attention.key.bias".replace("{i}", str(i)) for i in range(config.layers))
    return {**found, **{name: np.zeros(config.width, np.float32) for name in keys}}
