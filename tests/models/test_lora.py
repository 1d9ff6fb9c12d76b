"""Adapters start as nothing, equal their merge, reach every linear map by name, and are split over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.convert.lora import merge
from magic141_jax.errors import UserError
from magic141_jax.models import lora, mmdit
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten

NETWORK = Network.create(MMDiT, mmdit.debug())
ADAPTED = lora.adapted(NETWORK, 4)


def noised(tree, scale=0.2):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return structure.unflatten([x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def outputs(network, params):
    x = jax.random.normal(jax.random.key(1), (2, 2, 4, 4, 9))
    text = jax.random.normal(jax.random.key(2), (2, 3, 12))
    call = jax.jit(lambda p: network(p, x, jnp.array([0.3, 0.8]), text, jnp.ones((2, 3), bool), text[:, 0]))
    return np.asarray(call(params))


@pytest.mark.heavy
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_its_merge():
    params, fresh = noised(NETWORK.init(jax.random.key(0))), lora.fresh(ADAPTED, jax.random.key(3))
    plain = outputs(NETWORK, params)
    np.testing.assert_allclose(outputs(ADAPTED, lora.join(params, fresh)), plain, atol=1e-6)
    trained = noised(fresh)
    for scale in (1.0, 0.25):
        joined = outputs(ADAPTED, lora.join(params, trained, scale))
        np.testing.assert_allclose(joined, outputs(NETWORK, merge(params, trained, scale)), atol=2e-5)
        assert np.abs(joined - plain).max() > 1e-2


def test_every_linear_map_gets_one_and_a_pattern_chooses():
    kernels = {path.removesuffix(".kernel") for path in flatten(NETWORK.abstract_params) if path.endswith(".kernel")}
    found = flatten(lora.fresh(ADAPTED, jax.random.key(0)))
    assert {re.sub(r"\.[ab]$", "", path) for path in found} == kernels
    assert all(lora.is_adapter(path) for path in found)
    few = lora.adapted(NETWORK, 2, paths=r"double_blocks.*qkv")
    chosen = flatten(lora.fresh(few, jax.random.key(0)))
    assert set(chosen) == {f"double_blocks.{stream}.qkv.{kind}" for stream in ("text", "video") for kind in "ab"}
    assert chosen["double_blocks.video.qkv.a"].shape == (1, 16, 2)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="rank of at least 1"):
        lora.adapted(NETWORK, 0)
    with pytest.raises(UserError, match="nothing to adapt"):
        lora.adapted(NETWORK, 2, paths="quaternion")


def test_the_side_of_the_stream_is_split():
    rules = dict(lora.SHARDING_RULES)
    assert rules[r"\.a$"] == ("fsdp", None) and rules[r"\.b$"] == (None, "fsdp")
    assert not any(re.search(pattern, "double_blocks.video.qkv.bias") for pattern in rules)
