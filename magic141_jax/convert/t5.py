"""T5 v1.1 encoders in the published layout (transformers) <-> `T5`: their table of names and their config.

The word embeddings go by two names for one matrix; either may be in the files, or both. Decoders are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic141_jax import settings
from magic141_jax.convert.engine import LINEAR, Rule, Table
from magic141_jax.errors import UserError
from magic141_jax.models.t5 import T5Config

CLASS_NAME = "T5EncoderModel"

# their config key -> our field where the value is the same
CONFIG_FIELDS = {
    "vocab_size": "vocabulary",
    "d_model": "width",
    "d_kv": "head_width",
    "num_heads": "heads",
    "d_ff": "mlp",
    "num_layers": "layers",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "epsilon",
}
OPTIONAL = ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")
MLP = "gated-gelu"


def config_to_ours(theirs: Mapping[str, Any], **run_time: Any) -> T5Config:
    """Their config.json -> `T5Config`; `run_time` may set `compute_dtype`.

    Raises:
      UserError: a needed key is missing, or the model computes something else than `T5`.
    """
    for key, value in {"model_type": "t5", "feed_forward_proj": MLP, "dense_act_fn": "gelu_new"}.items():
        if theirs.get(key, value) != value:
            raise UserError(f"this T5 has {key} = {theirs[key]!r}; only {value!r} is supported (T5 v1.1)")
    missing = [key for key in (*CONFIG_FIELDS, "feed_forward_proj") if key not in theirs and key not in OPTIONAL]
    if missing:
        raise UserError(f"the config.json of this T5 lacks {', '.join(missing)}")
    fields = {ours: theirs[key] for key, ours in CONFIG_FIELDS.items() if key in theirs}
    return settings.build(T5Config, fields | run_time, where="t5")


def config_from_ours(config: T5Config) -> dict[str, Any]:
    """`T5Config` -> their config.json."""
    theirs = {key: getattr(config, ours) for key, ours in CONFIG_FIELDS.items()}
    return theirs | {"architectures": [CLASS_NAME], "model_type": "t5", "feed_forward_proj": MLP}


def table(config: T5Config | None = None) -> Table:
    """The rules between their names and `T5(config)`'s parameter paths, for any sizes."""
    del config
    layer = "encoder.block.{i}.layer"
    linears = {
        f"{layer}.0.SelfAttention.q": "q",
        f"{layer}.0.SelfAttention.k": "k",
        f"{layer}.0.SelfAttention.v": "v",
        f"{layer}.0.SelfAttention.o": "out",
        f"{layer}.1.DenseReluDense.wi_0": "gate",
        f"{layer}.1.DenseReluDense.wi_1": "up",
        f"{layer}.1.DenseReluDense.wo": "down",
    }
    return (
        Rule("shared.weight", "word.embedding"),
        Rule("encoder.embed_tokens.weight", "word.embedding", copy=True),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "distance.embedding"),
        *(Rule(f"{theirs}.weight", f"layers.{ours}.kernel", LINEAR) for theirs, ours in linears.items()),
        Rule(f"{layer}.0.layer_norm.weight", "layers.attention_norm.scale"),
        Rule(f"{layer}.1.layer_norm.weight", "layers.mlp_norm.scale"),
        Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
    )
