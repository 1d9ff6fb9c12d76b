"""Llama in transformers' layout <-> `Llama`: its table of names and its config.

Linear kernels are transposed and stacked over layers; rotary pairs are (i, i + k/2) on both sides. Two name layouts
are read: that of a bare LlamaModel, which is also written, and that of a LlamaForCausalLM. What HunyuanVideo never
uses is dropped by name: the head, the final norm and the last layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic141_jax import settings
from magic141_jax.convert.bert import config_fields
from magic141_jax.convert.engine import LINEAR, Rule, Table
from magic141_jax.errors import UserError
from magic141_jax.models.llama import LlamaConfig

SKIP_LAST = 2  # layers after the states that HunyuanVideo reads
PREFIXES = ("", "model.")
HEADS = ("lm_head.weight",)

CONFIG_FIELDS = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "rms_norm_eps": "epsilon",
}
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# what `Llama` computes; a model with another value is refused
SUPPORTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

# the linear maps of a layer: their name -> ours
LINEARS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def config_to_ours(theirs: Mapping[str, Any], *, skip_last: int = SKIP_LAST, **run_time: Any) -> LlamaConfig:
    """Their config.json as the `LlamaConfig` that runs all but the last `skip_last` layers.

    The final norm is only run after the last layer, so with `skip_last` 0. `run_time` may set `compute_dtype`.

    Raises:
      UserError: the model computes something else than `Llama`, or has too few layers.
    """
    fields = config_fields(theirs, CONFIG_FIELDS, SUPPORTED, what="Llama", defaults=DEFAULTS)
    if fields["layers"] <= skip_last:
        raise UserError(f"this Llama has {fields['layers']} layers; without the last {skip_last} there is none left")
    fields["layers"] -= skip_last
    fields["key_value_heads"] = theirs.get("num_key_value_heads") or fields["heads"]
    fields["head_width"] = theirs.get("head_dim") or fields["width"] // fields["heads"]
    run_time |= {"rope_theta": _rope_theta(theirs), "final_norm": skip_last == 0}
    return settings.build(LlamaConfig, {**fields, **run_time}, where="llama")


def table(
    config: LlamaConfig,
    *,
    prefixes: tuple[str, ...] = PREFIXES,
    heads: tuple[str, ...] = HEADS,
    ours: str = "",
    skip_last: int = SKIP_LAST,
) -> Table:
    """The rules between their names and the parameter paths of `Llama(config)`.

    Args:
      config: of the network that is built.
      prefixes: what their names may begin with; the first is written.
      heads: their names of what makes words of states, which is dropped.
      ours: what our paths begin with.
      skip_last: how many layers they may have more than `config`; these are dropped.
    """
    late = range(config.layers, config.layers + skip_last)
    return (
        *(Rule(name, ()) for name in heads),
        *(Rule(f"{theirs}layers.{i}.{{*rest}}", ()) for theirs in prefixes for i in late),
        *(rule for theirs in prefixes for rule in _layout(theirs, ours, config)),
    )


def _layout(theirs: str, ours: str, config: LlamaConfig) -> Table:
    layer = f"{theirs}layers.{{i}}"
    return (
        Rule(f"{theirs}embed_tokens.weight", f"{ours}words.embedding"),
        Rule(f"{layer}.input_layernorm.weight", f"{ours}layers.attention_scale"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{ours}layers.mlp_scale"),
        *(Rule(f"{layer}.{name}.weight", f"{ours}layers.{own}.kernel", LINEAR) for name, own in LINEARS.items()),
        Rule(f"{theirs}norm.weight", f"{ours}final_scale" if config.final_norm else ()),
        Rule(f"{layer}.self_attn.rotary_emb.inv_freq", ()),  # a buffer that old versions stored
    )


def _rope_theta(theirs: Mapping[str, Any]) -> float:
    """The rotary base, from `rope_parameters` as newer versions write it or from `rope_theta`."""
    new, old = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    kinds = {group.get("rope_type", group.get("type", "default")) for group in (new, old)}
    if kinds != {"default"}:
        raise UserError(f"this Llama scales its rotary positions ({', '.join(sorted(kinds))}), which is not supported")
    return {**DEFAULTS, **theirs, **new}["rope_theta"]
