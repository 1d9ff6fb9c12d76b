"""LLaVA's names and config: the three layouts give the same parameters, and what is not built is dropped by name."""

import numpy as np
import pytest

from magic141_jax.convert import llava
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.llava import Llava, LlavaConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten
from tests.published_text import PUBLISHED_LLAMA, PUBLISHED_VISION, llava_sizes

SIZES = llava_sizes(image=28)
CONFIG = llava.config_to_ours(SIZES)
ABSTRACT = Network.create(Llava, CONFIG).abstract_params
UNUSED = [
    "language_model.lm_head.weight",
    "language_model.model.norm.weight",
    "language_model.model.layers.3.mlp.up_proj.weight",
    "language_model.model.layers.4.mlp.up_proj.weight",
    "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
    "vision_tower.vision_model.post_layernorm.bias",
    "vision_tower.vision_model.embeddings.position_ids",
]
# from the published layout to that of transformers 5's files and to a module's own state
LAYOUTS = {
    "published": lambda name: name,
    "saved by transformers 5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "state": lambda name: (
        "lm_head.weight"
        if "lm_head" in name
        else "model." + name.replace("language_model.model.", "language_model.").replace("vision_model.", "")
    ),
}


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    return {path: generator.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(ABSTRACT).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(params, layout):
    theirs = from_ours(params, llava.table(CONFIG)) | {name: np.ones(2) for name in UNUSED}
    read = {LAYOUTS[layout](name): tensor for name, tensor in theirs.items()}
    back = flatten(to_ours(read, llava.table(CONFIG), ABSTRACT))
    assert back.keys() == params.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(back[path], leaf)


def test_names_and_shapes_are_those_of_transformers(params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        state = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**SIZES)).state_dict()
    mine = {LAYOUTS["state"](k): v.shape for k, v in from_ours(params, llava.table(CONFIG)).items()}
    assert mine.items() <= {name: tuple(value.shape) for name, value in state.items()}.items()
    extra = {name for name in state if name not in mine}
    late = ("layers.3.", "layers.4.", "language_model.norm", "lm_head", "vision_tower.encoder.layers.2.", "post_layer")
    assert extra and all(any(part in name for part in late) for name in extra)


def test_unknown_names_are_fatal(params):
    theirs = from_ours(params, llava.table(CONFIG))
    with pytest.raises(UserError, match=r"no rule for tensor image_newline"):
        to_ours(theirs | {"image_newline": np.ones(3)}, llava.table(CONFIG), ABSTRACT)


def test_the_published_config():
    """As published: only what differs from the parts' defaults is written."""
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 128257,
        "model_type": "llava",
        "pad_token_id": 128258,
        "projector_hidden_act": "gelu",
        "text_config": PUBLISHED_LLAMA,
        "vision_config": PUBLISHED_VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    assert llava.config_to_ours(published) == LlavaConfig()
    assert llava.config_to_ours(published, compute_dtype="bfloat16").compute_dtype == "bfloat16"
    alias = {("image_token_id" if key == "image_token_index" else key): value for key, value in published.items()}
    assert llava.config_to_ours(alias) == LlavaConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"text_config": None}, "no JSON object"),
        ({"image_token_index": None}, r"llava\.image_token must be int"),
    ],
)
def test_another_kind_of_llava_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        llava.config_to_ours(SIZES | change)


def test_a_config_without_its_parts_is_refused():
    with pytest.raises(UserError, match="lacks vision_config"):
        llava.config_to_ours({k: v for k, v in SIZES.items() if k != "vision_config"})
