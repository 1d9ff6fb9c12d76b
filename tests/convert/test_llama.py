"""Llama's names and config: both layouts, what is dropped and what is fatal, the exact way back."""

import numpy as np
import pytest

from magic141_jax.convert import llama
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.llama import Llama, LlamaConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten
from tests.published_text import PUBLISHED_LLAMA

SIZES = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def tensors(layers=5, prefix=""):
    """Every tensor of a published network, with random values."""
    whole = llama.config_to_ours(SIZES | {"num_hidden_layers": layers}, skip_last=0)
    generator = np.random.default_rng(0)
    shapes = flatten(Network.create(Llama, whole).abstract_params)
    params = {path: generator.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    theirs = from_ours(params, llama.table(whole))
    return {prefix + name: tensor for name, tensor in theirs.items()}


def load(theirs, config):
    return to_ours(theirs, llama.table(config), Network.create(Llama, config).abstract_params)


def test_names_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        state = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {k: v.shape for k, v in tensors().items()}


@pytest.mark.parametrize("prefix", llama.PREFIXES)
def test_all_but_the_last_layers_are_read_and_written_back_exactly(prefix):
    config = llama.config_to_ours(SIZES)
    unused = {"lm_head.weight": np.ones((24, 16)), f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}
    params = load(tensors(prefix=prefix) | unused, config)
    np.testing.assert_array_equal(params["layers"]["up"]["kernel"][2], tensors()["layers.2.mlp.up_proj.weight"].T)
    back = from_ours(params, llama.table(config))
    wanted = {k: v for k, v in tensors().items() if not k.startswith(("layers.3", "layers.4", "norm"))}
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_other_names_and_other_depths_are_fatal():
    config = llama.config_to_ours(SIZES)
    with pytest.raises(UserError, match=r"no rule for tensor layers\.1\.self_attn\.q_proj\.bias"):
        load(tensors() | {"layers.1.self_attn.q_proj.bias": np.ones(16)}, config)
    with pytest.raises(UserError, match="layers"):
        load(tensors(layers=7), config)
    with pytest.raises(UserError, match="missing"):
        load({k: v for k, v in tensors().items() if "k_proj" not in k}, config)


def test_config_of_older_and_newer_versions():
    older = llama.config_to_ours(SIZES | {"rope_scaling": None, "torch_dtype": "float16"})
    assert older == LlamaConfig(24, 16, 20, layers=3, heads=4, key_value_heads=2, head_width=4)
    newer = {k: v for k, v in SIZES.items() if k != "rope_theta"} | {"head_dim": 4, "dtype": "bfloat16"}
    newer |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "num_key_value_heads": 2}
    assert llama.config_to_ours(newer) == older


def test_keys_that_are_not_written_have_the_defaults_of_transformers():
    """As in the published LLaVA, whose text_config says only what differs from Llama 2."""
    assert llama.config_to_ours(PUBLISHED_LLAMA) == LlamaConfig()
    plain = llama.config_to_ours({}, skip_last=0, compute_dtype="bfloat16")
    assert (plain.key_value_heads, plain.rope_theta, plain.final_norm, plain.layers) == (32, 10000.0, True, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
        ({"num_hidden_layers": 2}, "none left"),
        ({"hidden_size": "wide"}, r"llama\.width must be int"),
    ],
)
def test_another_kind_of_llama_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        llama.config_to_ours(SIZES | {"head_dim": 4} | change)


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(UserError, match="no JSON object"):
        llama.config_to_ours(None)
