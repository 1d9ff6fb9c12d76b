"""Frames: one logit a patch, which sees motion. Features: one a token and head, conditioned, and one a sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.models import MODELS, SHARDING_RULES, mmdit
from magic141_jax.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    FeatureHeads,
    FeatureHeadsConfig,
    sample_logits,
)
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten

HEADS = FeatureHeadsConfig(width=16, layers=(0, 1, 3), hidden=8, pooled_width=12, time_features=16)


def test_logits_judge_frames_and_their_change():
    network = Network.create(Discriminator, DiscriminatorConfig(channels=(8, 8)))
    params = network.init(jax.random.key(0))
    frames = jax.random.uniform(jax.random.key(1), (2, 3, 16, 24, 3), minval=-1)
    logits = jax.jit(network)(params, frames)
    assert logits.shape == (6, 4, 6, 1)
    logits = logits.reshape(2, 3, 4, 6)
    swapped = jax.jit(network)(params, frames[:, jnp.array([1, 0, 2])]).reshape(2, 3, 4, 6)
    assert not np.allclose(logits[:, 2], swapped[:, 2]), "the last frame is the same, the change to it is not"
    first = jax.jit(network)(params, frames[:, :1]).reshape(2, 1, 4, 6)
    np.testing.assert_allclose(logits[:, 0], first[:, 0], atol=1e-5)


@pytest.fixture(scope="module")
def network():
    return Network.create(FeatureHeads, HEADS)


@pytest.fixture(scope="module")
def params(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), network.abstract_params)


@pytest.fixture(scope="module")
def apply(network):
    return jax.jit(network.__call__)


def inputs(batch=4, tokens=6):
    keys = jax.random.split(jax.random.key(5), 2)
    features = jax.random.normal(keys[0], (3, batch, tokens, 16))
    return features, jnp.linspace(0.1, 0.9, batch), jax.random.normal(keys[1], (batch, 12))


def test_heads_are_their_formula(network, apply, params):
    features, t, pooled = (np.asarray(x, np.float64) for x in inputs())

    def silu(x):
        return x / (1 + np.exp(-x))

    def linear(x, layer, i=None):
        parts = {k: v if i is None else v[i] for k, v in layer.items()}
        return x @ parts["kernel"] + parts.get("bias", 0)

    def embed(x, layer):
        return linear(silu(linear(x, layer["up"])), layer["down"])

    angles = 1000 * t[:, None] * np.exp(-np.log(10000) * np.arange(8) / 8)
    times = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    c = silu(embed(times, params["time_in"]) + embed(pooled, params["pooled_in"]))
    heads = params["heads"]
    for i, logits in enumerate(apply(params, *inputs())):
        x = features[i] - features[i].mean(-1, keepdims=True)
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        hidden = silu(linear(x, heads["feature_in"], i) + linear(c, heads["condition_in"], i)[:, None])
        phi = silu(linear(hidden, heads["mix"], i))
        direction = linear(c, heads["condition_out"], i)
        want = (phi * direction[:, None]).sum(-1) / np.sqrt(8) + heads["offset"][i]
        np.testing.assert_allclose(logits, want, atol=1e-4)


def test_fresh_heads_are_undecided_but_learn(network):
    params = network.init(jax.random.key(0))
    assert not network(params, *inputs()).any()
    gradient = jax.grad(lambda p: network(p, *inputs())[:, :2].sum())(params)["heads"]
    assert jnp.abs(gradient["condition_out"]["kernel"]).max((1, 2)).min() > 1e-3
    assert jnp.abs(gradient["condition_out"]["bias"]).max(1).min() > 1e-3
    kernel = params["heads"]["mix"]["kernel"]
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.1, "each head has its own draw"


def test_every_head_reads_its_own_layer_at_any_scale(apply, params):
    features, t, pooled = inputs()
    logits = apply(params, features, t, pooled)
    louder = apply(params, features * jnp.array([1, 50, 1.0])[:, None, None, None], t, pooled)
    np.testing.assert_allclose(louder, logits, atol=1e-4)
    other = apply(params, features.at[1].set(features[0]), t, pooled)
    np.testing.assert_array_equal(other[::2], logits[::2])
    assert jnp.abs(other[1] - logits[1]).max() > 1e-2


def test_logits_depend_on_time_and_prompt_and_on_no_neighbour(apply, params):
    features, t, pooled = inputs()
    logits = apply(params, features, t, pooled)
    assert logits.shape == (3, 4, 6) and logits.dtype == jnp.float32
    assert jnp.abs(apply(params, features, t * 0.5, pooled) - logits).max() > 1e-2
    assert jnp.abs(apply(params, features, t, pooled * 0.5) - logits).max() > 1e-2
    alone = [apply(params, features[:, i : i + 1], t[i : i + 1], pooled[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(jnp.concatenate(alone, 1), logits, atol=1e-5)
    half = apply(params, features.astype(jnp.bfloat16), t, pooled)
    assert half.dtype == jnp.float32 and jnp.abs(half - logits).mean() < 0.05 * jnp.abs(logits).mean()


def test_numbers_do_not_depend_on_the_mesh(network, apply, params):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = SHARDING_RULES["feature_heads"]
    specs = {p.path: p.spec for p in sharding.placements(params, mesh, rules)}
    assert specs["heads.feature_in.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["heads.mix.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["time_in.up.kernel"] == PartitionSpec("fsdp", "tensor")
    features, t, pooled = inputs()
    spread = jax.device_put(params, sharding.shardings(params, mesh, rules))
    by_batch = jax.device_put(features, jax.NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES)))
    got = apply(spread, by_batch, *sharding.shard_batch((t, pooled), mesh))
    np.testing.assert_allclose(got, apply(params, features, t, pooled), atol=1e-5)


def test_config_of_a_transformer_and_of_none(network, params):
    kind, module = MODELS["feature_heads"]
    assert FeatureHeadsConfig.on(mmdit.hunyuan_13b(), (29, 44, 59)) == kind()
    assert module is FeatureHeads
    made = FeatureHeadsConfig.on(mmdit.emoji(), (5,), hidden=32)
    assert (made.width, made.patch, made.hidden) == (256, (1, 1, 1), 32)
    for layers in ((), (1, 1), (-1, 2)):
        with pytest.raises(UserError, match="one or more different blocks"):
            FeatureHeadsConfig(layers=layers)
    features, t, pooled = inputs()
    with pytest.raises(UserError, match="3 layers of width 16, got 2"):
        network(params, features[:2], t, pooled)
    with pytest.raises(UserError, match="got 3 of width 12"):
        network(params, features[..., :12], t, pooled)


def test_the_published_size_is_small_and_split():
    leaves = flatten(Network.create(FeatureHeads, FeatureHeadsConfig()).abstract_params)
    assert sum(leaf.size for leaf in leaves.values()) < 5e6
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))
    for placed in sharding.placements(leaves, mesh, SHARDING_RULES["feature_heads"]):
        assert np.prod(placed.shape) < 2**16 or "fsdp" in placed.spec, placed


def test_one_logit_a_sample_is_the_mean_over_heads_and_unknown_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 8)).astype(np.float32)  # tokens: two frames of 2 x 2 patches
    known = np.zeros((3, 2, 4, 4, 1), np.float32)
    known[1, 0] = 1
    known[2] = 1
    got = sample_logits(jnp.asarray(logits), jnp.asarray(known), (1, 2, 2))
    np.testing.assert_allclose(got, [logits[:, 0].mean(), logits[:, 1, 4:].mean(), 0], atol=1e-6)
    gradient = jax.grad(lambda x: sample_logits(x, jnp.asarray(known), (1, 2, 2)).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(gradient[:, 0], 1 / 16, atol=1e-7)
    assert not gradient[:, 1, :4].any() and not gradient[:, 2].any()
    known[0, 0, :2, :1] = 1  # half of the first token
    half = sample_logits(jnp.asarray(logits), jnp.asarray(known), (1, 2, 2))[0]
    np.testing.assert_allclose(half, np.average(logits[:, 0].mean(0), weights=[0.5, *[1] * 7]), atol=1e-6)


def test_heads_stand_where_they_are_asked_for_and_spread_over_a_transformer():
    spread = {name: FeatureHeadsConfig.on(size()).layers for name, size in mmdit.SIZES.items()}
    assert spread == {"emoji": (2, 3, 5), "hunyuan_13b": (29, 44, 59), "flux_12b": (27, 41, 56), "debug": (0, 1)}
    assert FeatureHeadsConfig.on(mmdit.debug(), (1,)).layers == (1,)
    with pytest.raises(UserError, match="blocks 0 to 1"):
        FeatureHeadsConfig.on(mmdit.debug(), (0, 2))
