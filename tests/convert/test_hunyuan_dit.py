"""Parity with the published network on tiny random weights, and exact round trips."""

import numpy as np
import pytest

from magic141_jax.convert import hunyuan_dit
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiT, debug
from magic141_jax.models.network import Network

VARIANTS = {
    "text-to-video": {"in_channels": 16, "guidance_embeds": True, "image_condition_type": None},
    "latent_concat": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
}
TEXT_LENGTHS = (7, 4)


@pytest.fixture(scope="module", params=VARIANTS)
def published(request):
    """A tiny published network with every parameter random, its inputs and its output."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        **VARIANTS[request.param],
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    mask = np.arange(7)[None] < np.array(TEXT_LENGTHS)[:, None]
    inputs = {
        "hidden_states": torch.randn(2, model.config.in_channels, 3, 4, 6),
        "timestep": torch.tensor([250.0, 875.0]),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "encoder_attention_mask": torch.tensor(mask),
        "pooled_projections": torch.randn(2, 12),
        "guidance": torch.tensor([6000.0, 1000.0]) if model.config.guidance_embeds else None,
    }
    with torch.no_grad():
        output = model(**inputs).sample
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {name: None if value is None else value.numpy() for name, value in inputs.items()}
    return dict(model.config), tensors, arrays, output.numpy()


def converted(published, **run_time):
    config = hunyuan_dit.config_to_ours(published[0], **run_time)
    network = Network.create(MMDiT, config)
    return network, to_ours(published[1], hunyuan_dit.table(config), network.abstract_params)


@pytest.mark.parametrize("attention", ["xla", "jax"])
def test_output_equals_the_published_network(published, attention):
    network, params = converted(published, attention=attention)
    inputs, want = published[2], published[3]
    guidance = inputs["guidance"]
    got = network(
        params,
        inputs["hidden_states"].transpose(0, 2, 3, 4, 1),
        inputs["timestep"] / 1000,
        inputs["encoder_hidden_states"],
        inputs["encoder_attention_mask"],
        inputs["pooled_projections"],
        guidance=None if guidance is None else guidance / 1000,
    )
    got = np.asarray(got).transpose(0, 4, 1, 2, 3)
    assert np.abs(want).std() > 0.1
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-5


def test_round_trip_is_exact(published):
    network, params = converted(published)
    back = from_ours(params, hunyuan_dit.table(network.config))
    assert back.keys() == published[1].keys()
    assert all(np.array_equal(back[name], published[1][name]) for name in back)


def test_config_round_trip(published):
    config = hunyuan_dit.config_to_ours(published[0])
    theirs = hunyuan_dit.config_from_ours(config)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if not k.startswith("_")} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in published[0].items() if not k.startswith("_")
    }


def test_unknown_and_missing_tensors_are_all_named(published):
    tensors = dict(published[1])
    tensors["transformer_blocks.0.extra.weight"] = tensors["proj_out.weight"]
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    del tensors["norm_out.linear.bias"]
    config = hunyuan_dit.config_to_ours(published[0])
    abstract = Network.create(MMDiT, config).abstract_params
    with pytest.raises(UserError) as error:
        to_ours(tensors, hunyuan_dit.table(config), abstract)
    for name in ("transformer_blocks.0.extra.weight", "transformer_blocks.1.attn.to_k.weight", "modulation_out.bias"):
        assert name in str(error.value)


def test_variants_without_a_network_are_refused():
    theirs = hunyuan_dit.config_from_ours(hunyuan_dit.MMDiTConfig())
    with pytest.raises(UserError, match="token_replace"):
        hunyuan_dit.config_to_ours(theirs | {"image_condition_type": "token_replace"})
    with pytest.raises(UserError, match="num_layers"):
        hunyuan_dit.config_to_ours({k: v for k, v in theirs.items() if k != "num_layers"})
    with pytest.raises(UserError, match="time features"):
        hunyuan_dit.config_from_ours(debug())
