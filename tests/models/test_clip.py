"""CLIP's towers against transformers: where the text ends, which patch states are read; and on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.convert import clip as convert
from magic141_jax.convert.engine import to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.clip import SHARDING_RULES, Clip, ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import cast
from tests.published_text import CLIP_VOCABULARY, clip_text_sizes, clip_vision_sizes, draw, randomise, relative, tensors

TEXT = ClipTextConfig(vocabulary=20, positions=9, width=16, layers=2, heads=2, mlp=24)
VISION = ClipVisionConfig(image=12, patch=4, width=16, layers=2, heads=2, mlp=24)
END = CLIP_VOCABULARY - 1


def prompts():
    """Ids whose texts end, at several places and once twice, with the largest id."""
    ids = np.random.default_rng(0).integers(3, END, (3, 77))
    for row, end in zip(ids, (5, 76, 40)):
        row[end] = END
    ids[0, 30:] = END
    return ids.astype(np.int32)


def pictures(side, batch=3):
    return np.random.default_rng(1).normal(size=(batch, side, side, 3)).astype(np.float32)


def loaded(module, config, table, theirs):
    network = Network.create(module, config)
    params = cast(to_ours(tensors(theirs), table, network.abstract_params), config.compute_dtype)
    return jax.jit(network.__call__), params


@pytest.mark.parametrize("end_token", [2, END], ids=["largest id", "first end"])
def test_text_parity_with_transformers(end_token):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = clip_text_sizes() | {"eos_token_id": end_token}
    theirs = randomise(torch, transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)))
    with torch.no_grad():
        wanted = theirs(torch.tensor(prompts()).long())
    apply, params = loaded(ClipText, convert.text_config_to_ours(sizes), convert.TEXT_TABLE, theirs)
    states, pooled = map(np.asarray, apply(params, prompts()))
    assert relative(states, wanted.last_hidden_state.numpy()) < 1e-5
    assert relative(pooled, wanted.pooler_output.numpy()) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_vision_parity_with_transformers(dtype, bound):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = clip_vision_sizes(image=70)
    theirs = randomise(torch, transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)))
    with torch.no_grad():
        pixels = torch.tensor(pictures(70)).permute(0, 3, 1, 2)
        wanted = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].numpy()
    config = convert.vision_config_to_ours(sizes, compute_dtype=dtype)
    apply, params = loaded(ClipVision, config, convert.vision_table(config), theirs)
    states = apply(params, pictures(70))
    assert states.dtype == dtype and states.shape == (3, config.patches, 32)
    assert relative(np.asarray(states, np.float32), wanted) < bound


def test_both_towers_and_their_space_as_in_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": clip_text_sizes(),
        "vision_config": clip_vision_sizes(image=28),
    }
    theirs = randomise(torch, transformers.CLIPModel(transformers.CLIPConfig(**sizes)))
    with torch.no_grad():
        text = theirs.get_text_features(torch.tensor(prompts()).long())
        image = theirs.get_image_features(torch.tensor(pictures(28)).permute(0, 3, 1, 2))
    text, image = (getattr(of, "pooler_output", of).numpy() for of in (text, image))
    config = convert.dual_config_to_ours(sizes)
    network = Network.create(Clip, config)
    params = to_ours(tensors(theirs), convert.dual_table(config), network.abstract_params)
    assert relative(np.asarray(network(params, prompts(), method="embed_text")), text) < 1e-5
    ours, patches = network(params, pictures(28), method="embed_images")
    assert relative(np.asarray(ours), image) < 1e-5 and patches.shape == (3, 4, 32)


@pytest.mark.parametrize(("module", "config"), [(ClipText, TEXT), (ClipVision, VISION)])
def test_eight_devices_give_the_numbers_of_one(module, config):
    network = Network.create(module, config)
    apply, params = jax.jit(network.__call__), draw(network)
    inputs = pictures(12, 4) if module is ClipVision else prompts()[[0, 1, 2, 0], :9] % 20
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES))
    assert placed["encoder"]["layers"]["mlp_in"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert all(p.reason.startswith("rule") for p in sharding.placements(params, mesh, SHARDING_RULES))
    many, one = apply(placed, sharding.shard_batch(inputs, mesh)), apply(params, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)


def test_what_follows_the_end_of_a_text_does_not_matter():
    network = Network.create(ClipText, TEXT)
    apply, params = jax.jit(network.__call__), draw(network)
    ids = np.array([[1, 5, 6, 19, 19, 19], [1, 5, 6, 19, 2, 7]], np.int32)
    pooled = apply(params, ids)[1]
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_fit_are_refused():
    text, vision = Network.create(ClipText, TEXT), Network.create(ClipVision, VISION)
    with pytest.raises(UserError, match="9 tokens at most, got 10"):
        jax.eval_shape(text.__call__, text.abstract_params, np.zeros((1, 10), np.int32))
    with pytest.raises(UserError, match="12x12x3, got 12x8x3"):
        jax.eval_shape(vision.__call__, vision.abstract_params, np.zeros((1, 12, 8, 3), np.float32))
    with pytest.raises(UserError, match="patches of 5"):
        dataclasses.replace(VISION, patch=5)
