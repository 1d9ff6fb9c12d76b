"""CLIP's names and configs: with and without the tower's prefix, what is dropped and what is fatal, the way back."""

import numpy as np
import pytest

from magic141_jax.convert import clip
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten
from tests.published_text import PUBLISHED_VISION, clip_text_sizes, clip_vision_sizes

TEXT = clip.text_config_to_ours(clip_text_sizes())
VISION = clip.vision_config_to_ours(clip_vision_sizes(image=28))
TOWERS = {
    "text": (ClipText, TEXT, clip.TEXT_TABLE, "text_model."),
    "vision": (ClipVision, VISION, clip.vision_table(VISION), "vision_model."),
}


def random_params(module, config):
    generator = np.random.default_rng(0)
    shapes = flatten(Network.create(module, config).abstract_params)
    return {path: generator.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layout", ["published", "newer"])
def test_round_trip_is_exact_in_both_layouts(tower, layout):
    module, config, table, prefix = TOWERS[tower]
    params = random_params(module, config)
    theirs = from_ours(params, table)
    assert all(name.startswith(prefix) for name in theirs)
    unused = {
        "text": {f"{prefix}embeddings.position_ids": np.arange(3), "text_projection.weight": np.ones(3)},
        "vision": {
            f"{prefix}embeddings.position_ids": np.arange(3),
            f"{prefix}encoder.layers.2.mlp.fc1.bias": np.ones(3),
            f"{prefix}post_layernorm.weight": np.ones(3),
            "visual_projection.weight": np.ones(3),
        },
    }[tower]
    read = theirs | unused
    if layout == "newer":
        read = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
    back = flatten(to_ours(read, table, Network.create(module, config).abstract_params))
    assert back.keys() == params.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(back[path], leaf)
    with pytest.raises(UserError, match=r"no rule for tensor logit_scale"):
        to_ours(read | {"logit_scale": np.ones(())}, table, back)


@pytest.mark.parametrize("tower", TOWERS)
def test_names_and_shapes_are_those_of_transformers(tower):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module, config, table, prefix = TOWERS[tower]
    with torch.device("meta"):
        if tower == "text":
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_text_sizes()))
        else:
            model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_vision_sizes(image=28)))
    state = {name.removeprefix(prefix): tuple(value.shape) for name, value in model.state_dict().items()}
    mine = {k.removeprefix(prefix): v.shape for k, v in from_ours(random_params(module, config), table).items()}
    extra = {name for name in state if name not in mine}
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in extra)
    assert (tower == "vision") == bool(extra)
    assert mine == {name: shape for name, shape in state.items() if name in mine}


def test_the_published_configs():
    text = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "eos_token_id": 2}
    assert clip.text_config_to_ours(text | {"num_attention_heads": 12, "projection_dim": 768}) == ClipTextConfig()
    assert clip.vision_config_to_ours(PUBLISHED_VISION | {"projection_dim": 768}) == ClipVisionConfig()


@pytest.mark.parametrize(
    ("convert", "change", "message"),
    [
        (clip.text_config_to_ours, {"hidden_act": "relu"}, "activation is 'relu'"),
        (clip.text_config_to_ours, {"model_type": "clip"}, "model_type"),
        (clip.text_config_to_ours, {"eos_token_id": [1, 2]}, "end_token must be int"),
        (clip.vision_config_to_ours, {"num_channels": 4}, "num_channels"),
        (clip.vision_config_to_ours, {"num_hidden_layers": 1}, "none left"),
        (clip.vision_config_to_ours, {"patch_size": 15}, "patches of 15"),
    ],
)
def test_another_kind_of_clip_is_refused(convert, change, message):
    with pytest.raises(UserError, match=message):
        convert(change)
