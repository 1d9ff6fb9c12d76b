"""Image tokens: count and scale, order, independence of batch mates, legal sizes, and that they can be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.models.image_encoder import SHARDING_RULES, ImageEncoder, ImageEncoderConfig, sine_positions
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten

SMALL = ImageEncoderConfig(patch=4, width=16, layers=2, heads=2, mlp=32, text_width=24)


def images(*, batch=2, height=16, width=24, seed=0):
    return jax.random.uniform(jax.random.key(seed), (batch, height, width, 3))


@pytest.fixture(scope="module")
def small():
    network = Network.create(ImageEncoder, SMALL)
    return jax.jit(network.__call__), network.init(jax.random.key(0))


def test_default_gives_16_tokens_of_the_text_width_and_scale():
    network = Network.create(ImageEncoder, ImageEncoderConfig())
    params = network.init(jax.random.key(0))
    # flat backgrounds with a block, like the clips it is made for
    x = jnp.broadcast_to(images(batch=6, height=1, width=1), (6, 64, 64, 3)).at[:, 20:44, 20:44].set(0.9)
    tokens = jax.jit(network.__call__)(params, x)
    assert tokens.shape == (6, 16, 384)
    np.testing.assert_allclose(jnp.sqrt(jnp.square(tokens).mean()), ImageEncoderConfig().token_rms, rtol=0.1)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (40, 8)])
def test_token_count_is_what_the_config_says(small, height, width):
    tokens = small[0](small[1], images(height=height, width=width))
    assert tokens.shape == (2, SMALL.tokens(height, width), 24) == (2, height * width // 64, 24)


def test_a_token_comes_from_its_own_cell_most(small):
    """A change in one 8 x 8 cell changes that cell's token more than any other, so tokens are row by row."""
    network, params = small
    x = images(batch=1)
    for row in range(2):
        for column in range(3):
            cell = (slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            y = x.at[cell].set(1 - x[cell])
            change = jnp.linalg.norm(network(params, x) - network(params, y), axis=-1)[0]
            assert change.argmax() == 3 * row + column


def test_position_matters(small):
    network, params = small
    x = jnp.full((2, 16, 16, 3), 0.5).at[0, :8, :8].set(1.0).at[1, 8:, 8:].set(1.0)
    tokens = network(params, x)
    assert np.abs(tokens[0, 0] - tokens[1, 3]).max() > 0.05  # same content, other place


def test_batch_composition_does_not_matter(small):
    network, params = small
    x = images(batch=3)
    np.testing.assert_allclose(network(params, x)[1:2], network(params, x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "near"), [((17, 24), "16x24 and 24x24"), ((16, 4), "16x8 and 16x8"), ((30, 50), "24x48 and 32x56")]
)
def test_wrong_size_names_the_nearest(small, size, near):
    with pytest.raises(UserError, match=near):
        small[0](small[1], images(height=size[0], width=size[1]))


def test_every_parameter_gets_a_gradient(small):
    network, params = small
    grads = flatten(jax.jit(jax.grad(lambda p: jnp.square(network(p, images()) - 1).mean()))(params))
    # a bias common to all keys cancels in the softmax
    silent = {path for path, grad in grads.items() if not jnp.abs(grad).max() > 1e-7}
    assert silent <= {"encoder.layers.k.bias"}


def test_positions_are_all_different():
    features = sine_positions(8, 8, 192)
    assert features.shape == (64, 192)
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1) + 100 * np.eye(64)
    assert distance.min() > 1


def test_every_parameter_has_a_sharding_rule():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = sharding.placements(Network.create(ImageEncoder, SMALL).abstract_params, mesh, SHARDING_RULES)
    for place in placed:
        assert ("fsdp" in place.spec) == place.path.endswith("kernel"), place
