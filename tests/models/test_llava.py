"""LLaVA against transformers: pictures in the place of their tokens, prompts of unequal lengths, and eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from magic141_jax import settings, sharding
from magic141_jax.convert import llava as convert
from magic141_jax.convert.engine import to_ours
from magic141_jax.models.clip import ClipVisionConfig
from magic141_jax.models.llama import LlamaConfig
from magic141_jax.models.llava import SHARDING_RULES, Llava, LlavaConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import cast
from tests.published_text import draw, llava_sizes, randomise, relative, tensors

SIDE, PATCHES = 42, 9
SMALL = LlavaConfig(
    LlamaConfig(vocabulary=32, width=16, mlp=24, layers=2, heads=4, key_value_heads=2, head_width=4),
    ClipVisionConfig(image=SIDE, patch=14, width=8, layers=1, heads=2, mlp=16),
    image_token=30,
)


def inputs(image_token, batch=4, vocabulary=30):
    """Ids with the picture's tokens at different places, masks of different lengths, pictures."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, (batch, 24)).astype(np.int32)
    for row, at in zip(ids, (3, 5, 1, 3)):
        row[at : at + PATCHES] = image_token
    mask = np.arange(24)[None] < np.array([[24], [19], [14], [20]])
    return ids, mask, generator.normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def published():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = llava_sizes(image=SIDE)
    model = randomise(torch, transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**sizes)))

    def states(ids, mask, images=None):
        pixels = None if images is None else torch.tensor(images).permute(0, 3, 1, 2)
        places = np.where(mask, mask.cumsum(1) - 1, 1)
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(ids).long(),
                attention_mask=torch.tensor(mask).long(),
                position_ids=torch.tensor(places),
                pixel_values=pixels,
                output_hidden_states=True,
            )
        return out.hidden_states[-3].numpy()

    return sizes, tensors(model), states


def ours(published, **run_time):
    sizes, theirs, _ = published
    config = convert.config_to_ours(sizes, **run_time)
    network = Network.create(Llava, config)
    params = cast(to_ours(theirs, convert.table(config), network.abstract_params), config.compute_dtype)
    return jax.jit(network.__call__), params, config


def test_parity_with_transformers(published):
    apply, params, config = ours(published)
    ids, mask, images = inputs(config.image_token)
    wanted = published[2](ids, mask, images)
    assert relative(np.asarray(apply(params, ids, mask, images))[mask], wanted[mask]) < 1e-5


def test_parity_without_pictures(published):
    apply, params, _ = ours(published)
    ids, mask, _ = inputs(image_token=7)
    assert relative(np.asarray(apply(params, ids, mask))[mask], published[2](ids, mask)[mask]) < 1e-5


def test_bfloat16_is_near(published):
    apply, params, config = ours(published, compute_dtype="bfloat16")
    ids, mask, images = inputs(config.image_token)
    difference, wanted = np.asarray(apply(params, ids, mask, images)), published[2](ids, mask, images)[mask]
    assert 1e-5 < np.sqrt(np.mean((difference[mask] - wanted) ** 2) / np.mean(wanted**2)) < 0.03


@pytest.fixture(scope="module")
def small():
    network = Network.create(Llava, SMALL)
    return jax.jit(network.__call__), draw(network)


def test_eight_devices_give_the_numbers_of_one(small):
    apply, params = small
    batch = inputs(SMALL.image_token)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES))
    for placement in sharding.placements(params, mesh, SHARDING_RULES):
        assert placement.reason.startswith("rule"), placement
        assert ("fsdp" in placement.spec) == placement.path.endswith(("kernel", "embedding")), placement
    many = apply(placed, *sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(many, apply(params, *batch), rtol=1e-4, atol=1e-5)


def test_each_row_sees_its_own_picture(small):
    apply, params = small
    ids, mask, images = inputs(SMALL.image_token)
    changed = np.asarray(apply(params, ids, mask, images[[0, 1, 3, 3]])) - np.asarray(apply(params, ids, mask, images))
    moved = np.abs(changed).max(-1) > 1e-4
    assert not moved[[0, 1, 3]].any()
    assert moved[2, 1:14].all() and not moved[2, 0], "from the picture's first row on"


def test_the_config_survives_json():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    assert settings.build(LlavaConfig, settings.to_dict(config)) == config
