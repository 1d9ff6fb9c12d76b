"""Sums of squares of what enters linear maps: against sums over inputs that were recomputed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax import sharding
from magic141_jax.models import layers as nn
from magic141_jax.models import mmdit, probes
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten
from magic141_jax.sharding import MeshConfig, make_mesh

CONFIG = dataclasses.replace(mmdit.debug(), double_blocks=1, single_blocks=2)
NETWORK = Network.create(MMDiT, CONFIG)


class Single(nnx.Module):
    """One map, used twice, and one that nothing reads."""

    def __init__(self, config, *, rngs):
        self.map, self.idle = (nn.Linear(config, config, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        self.idle(x)
        return jnp.tanh(self.map(self.map(x)))


def random_params(network):
    """Every parameter random and away from zero."""
    rng = np.random.default_rng(0)
    flat = flatten(network.abstract_params)
    return unflatten({path: np.float32(rng.normal(0, 0.3, leaf.shape)) for path, leaf in flat.items()})


def inputs():
    keys = jax.random.split(jax.random.key(7), 3)
    x, text = jax.random.normal(keys[0], (2, 2, 4, 4, 9)), jax.random.normal(keys[1], (2, 6, 12))
    mask = jnp.arange(6)[None] < jnp.array([[6], [3]])
    return x, jnp.array([0.2, 0.9]), text, mask, jax.random.normal(keys[2], (2, 12))


def square_sums(network, params, *args, mesh=None):
    def run(params, args):
        return probes.square_sums(network, params, lambda network, own: network(own, *args))

    return jax.jit(run if mesh is None else sharding.over(mesh, run))(params, args)


def total(x):
    """Sums of squares over all but the last axis, in float64."""
    return np.square(np.asarray(x, np.float64)).reshape(-1, x.shape[-1]).sum(0)


@pytest.fixture(scope="module")
def sums():
    return square_sums(NETWORK, random_params(NETWORK), *inputs())


def test_a_single_map():
    network = Network.create(Single, 4)
    params = random_params(network)
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    y = x @ params["map"]["kernel"] + params["map"]["bias"]
    found = square_sums(network, params, x)
    assert set(found) == {"map.kernel", "idle.kernel"}
    np.testing.assert_allclose(found["map.kernel"], total(x) + total(y), rtol=1e-5)
    np.testing.assert_array_equal(found["idle.kernel"], 0, err_msg="nothing depends on it")


def test_every_map_of_the_transformer_is_told(sums):
    kernels = {k: leaf for k, leaf in flatten(NETWORK.abstract_params).items() if k.endswith("kernel")}
    assert {k: v.shape for k, v in sums.items()} == {k: leaf.shape[:-1] for k, leaf in kernels.items()}
    assert all(v.dtype == jnp.float32 and (v >= 0).all() and v.max() > 0 for v in sums.values())


def test_what_enters_the_transformers_maps(sums):
    """Layer by layer, by the equations of the blocks, from the outputs of the blocks before."""
    params = random_params(NETWORK)
    x, _, text, _, pooled = inputs()
    _, names = jax.jit(lambda p: NETWORK(p, *inputs(), intermediates=True))(params)
    np.testing.assert_allclose(sums["patch_in.kernel"], total(nn.patchify(x, CONFIG.patch)), rtol=1e-5)
    np.testing.assert_allclose(sums["pooled_in.up.kernel"], total(pooled), rtol=1e-5)
    np.testing.assert_allclose(sums["text_in.project.kernel"], total(text), rtol=1e-5)
    vector = np.asarray(jax.nn.silu(names["condition"]))
    np.testing.assert_allclose(sums["modulation_out.kernel"], total(vector), rtol=1e-5)
    joint = params["single_blocks"]["joint"]
    before = [
        np.concatenate([names["double_blocks.video"][-1], names["double_blocks.text"][-1]], axis=1),
        *names["single_blocks"][:-1],
    ]
    for layer, tokens in enumerate(before):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], joint)
        modulation = vector @ own["modulation"]["kernel"] + own["modulation"]["bias"]
        shift, scale, _ = jnp.split(modulation[:, None], 3, axis=-1)
        y = nn.modulate(nn.layer_norm(jnp.asarray(tokens)), shift, scale)
        hidden = jax.nn.gelu(y @ own["mlp_up"]["kernel"] + own["mlp_up"]["bias"].reshape(1, 1, -1), approximate=True)
        for name, entering in (("modulation", vector), ("qkv", y), ("mlp_up", y), ("mlp_down", hidden)):
            have = sums[f"single_blocks.joint.{name}.kernel"][layer]
            np.testing.assert_allclose(have, total(entering), rtol=2e-4, err_msg=f"{name} {layer}")


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots", "compute_dtype": "bfloat16"}])
def test_recomputed_and_in_bfloat16(sums, change):
    network = Network.create(MMDiT, dataclasses.replace(CONFIG, **change))
    found = square_sums(network, random_params(NETWORK), *inputs())
    bound = 0.05 if "compute_dtype" in change else 1e-4
    for path, want in sums.items():
        assert found[path].dtype == jnp.float32
        np.testing.assert_allclose(found[path], want, atol=bound * want.max(), err_msg=path)


def test_over_a_mesh(sums):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    laid = sharding.lay(random_params(NETWORK), mesh, mmdit.SHARDING_RULES)
    found = square_sums(NETWORK, laid, *sharding.spread(list(inputs()), mesh), mesh=mesh)
    for path, want in sums.items():
        np.testing.assert_allclose(found[path], want, atol=1e-4 * want.max(), err_msg=path)


def test_products_of_chosen_maps():
    """Their diagonals are the sums of squares; the whole is x^T x of what enters."""
    network = Network.create(Single, 4)
    params = random_params(network)
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    y = x @ params["map"]["kernel"] + params["map"]["bias"]
    found = probes.square_sums(network, params, lambda network, own: network(own, x), products="^map$")
    rows = np.concatenate([x.reshape(-1, 4), y.reshape(-1, 4)])
    assert set(found) == {"map.kernel"}
    np.testing.assert_allclose(found["map.kernel"], rows.T @ rows, rtol=1e-5)


def test_products_in_scanned_layers(sums):
    params = random_params(NETWORK)
    found = jax.jit(
        lambda own: probes.square_sums(
            NETWORK, own, lambda network, own: network(own, *inputs()), products=r"^(double|single)_blocks\..*mlp_down"
        )
    )(params)
    assert set(found) == {path for path in sums if "blocks" in path and "mlp_down" in path and "text_in" not in path}
    for path, value in found.items():
        np.testing.assert_allclose(value, np.swapaxes(value, -1, -2), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.diagonal(value, axis1=-2, axis2=-1), sums[path], rtol=1e-4)


def test_probes_change_no_output_and_stop_other_gradients():
    observed = probes.probed(NETWORK)
    added = set(flatten(observed.abstract_params)) - set(flatten(NETWORK.abstract_params))
    assert added == {f"{k.removesuffix('.kernel')}.probe" for k in flatten(NETWORK.abstract_params) if "kernel" in k}
    x, probe = jnp.arange(6.0).reshape(2, 3), jnp.zeros(3)
    value, pull = jax.vjp(nn.observe, x, probe)
    np.testing.assert_array_equal(value, x)
    back = pull(jnp.full((2, 3), 7.0))
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_array_equal(back[1], [9, 17, 29])
