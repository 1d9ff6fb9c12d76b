"""Distance buckets against the published function, padding, depth, sharding."""

import dataclasses

import jax
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.t5 import SHARDING_RULES, T5, T5Config, distance_buckets
from magic141_jax.pytree import flatten

TINY = T5Config(vocabulary=16, width=8, head_width=4, heads=4, mlp=16, layers=2)


def random_params(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), network.abstract_params)


def test_buckets_by_hand():
    """Eight near distances have a bucket each, then buckets widen; the right follows the left."""
    buckets = distance_buckets(np.array([0, -1, -7, -8, -11, -12, -127, -128, -500, 1, 7, 500]), TINY)
    assert buckets.tolist() == [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 23, 31]


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (16, 20), (4, 1000)])
def test_buckets_equal_the_published_ones(buckets, most):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-3000, 3000)
    wanted = t5.T5Attention._relative_position_bucket(torch.tensor(distances), True, buckets, most)
    config = dataclasses.replace(TINY, buckets=buckets, max_distance=most)
    np.testing.assert_array_equal(distance_buckets(distances, config), wanted.numpy())


def test_masked_tokens_are_not_seen_and_others_are():
    network = Network.create(T5, TINY)
    params = random_params(network)
    apply = jax.jit(network.__call__)
    ids = np.random.default_rng(1).integers(0, 16, (2, 8))
    mask = np.arange(8)[None] < np.array([[8], [5]])
    other = np.where(mask, ids, (ids + 3) % 16)
    out = apply(params, ids, mask)
    np.testing.assert_allclose(apply(params, other, mask)[mask], out[mask], rtol=1e-6, atol=1e-6)
    assert np.abs(apply(params, other)[1, :5] - apply(params, ids)[1, :5]).max() > 1e-3


def test_order_matters_through_distances_alone():
    network = Network.create(T5, TINY)
    params = random_params(network)
    ids = np.arange(6)[None]
    apply = jax.jit(network.__call__)
    assert np.abs(apply(params, ids[:, ::-1])[:, ::-1] - apply(params, ids)).max() > 1e-2
    flat = params | {"distance": {"embedding": np.zeros_like(params["distance"]["embedding"])}}
    np.testing.assert_allclose(apply(flat, ids[:, ::-1])[:, ::-1], apply(flat, ids), rtol=1e-4, atol=1e-5)


def test_program_size_does_not_grow_with_depth():
    def size(depth):
        network = Network.create(T5, dataclasses.replace(TINY, layers=depth))
        return len(str(jax.make_jaxpr(network.__call__)(network.abstract_params, np.zeros((1, 4), int))).splitlines())

    assert size(6) == size(2)


def test_every_parameter_has_a_sharding_rule_and_sharding_changes_nothing():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    network = Network.create(T5, TINY)
    specs = {p.path: p.spec for p in sharding.placements(network.abstract_params, mesh, SHARDING_RULES)}
    assert specs.keys() == flatten(network.abstract_params).keys()
    for path, spec in specs.items():
        assert ("fsdp" in spec) == path.endswith(("kernel", "word.embedding")), path
    params = random_params(network)
    spread = jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES))
    ids = np.arange(12).reshape(2, 6)
    apply = jax.jit(network.__call__)
    np.testing.assert_allclose(apply(spread, ids), apply(params, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"buckets": 30}, {"buckets": 0}, {"max_distance": 8}])
def test_impossible_buckets_are_refused(change):
    with pytest.raises(UserError, match="buckets"):
        dataclasses.replace(TINY, **change)
