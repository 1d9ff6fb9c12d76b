"""The functional view of an NNX module: plain parameter dicts in, the module's numbers out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax import weights
from magic141_jax.models.network import Network, apart, scan, through
from magic141_jax.pytree import count, flatten
from magic141_jax.sharding import make_mesh, replicated


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the toy."""

    width: int = 4
    layers: int = 3


class Toy(nnx.Module):
    """A linear layer, and a scanned stack of them."""

    def __init__(self, config, *, rngs):
        self.first = nnx.Linear(2, config.width, rngs=rngs)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(config.width, config.width, rngs=rngs)

        self.layers = stack(rngs)
        self.blocks = nnx.List([nnx.Linear(config.width, 1, rngs=rngs), nnx.Linear(config.width, 1, rngs=rngs)])

    def __call__(self, x, scale=1.0):
        x = through(self.layers, self.first(x))
        return scale * (self.blocks[0](x) + self.blocks[1](x))

    def double(self, x):
        return 2 * self(x)


NETWORK = Network.create(Toy, Config())
X = jnp.ones((3, 2))


def test_parameters_are_nested_dicts_with_string_keys():
    params = NETWORK.init(jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes == {
        "blocks.0.bias": (1,),
        "blocks.0.kernel": (4, 1),
        "blocks.1.bias": (1,),
        "blocks.1.kernel": (4, 1),
        "first.bias": (4,),
        "first.kernel": (2, 4),
        "layers.bias": (3, 4),
        "layers.kernel": (3, 4, 4),
    }
    assert shapes == {path: leaf.shape for path, leaf in flatten(NETWORK.abstract_params).items()}
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(NETWORK.abstract_params))


def test_the_key_decides_the_parameters():
    a, b, c = (flatten(NETWORK.init(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a["layers.kernel"], b["layers.kernel"])
    assert not np.array_equal(a["layers.kernel"], c["layers.kernel"])
    assert not np.array_equal(a["layers.kernel"][0], a["layers.kernel"][1]), "stacked layers differ"


def test_calls_give_the_modules_numbers():
    module = Toy(Config(), rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(module))
    params["blocks"] = {str(i): block for i, block in params["blocks"].items()}
    np.testing.assert_allclose(NETWORK(params, X), module(X), rtol=1e-6)
    np.testing.assert_allclose(NETWORK(params, X, scale=3.0), 3 * module(X), rtol=1e-5)
    np.testing.assert_allclose(NETWORK(params, X, method="double"), 2 * module(X), rtol=1e-5)


def test_the_view_is_traceable_and_differentiable():
    params = NETWORK.init(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: NETWORK(p, X).sum()))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    np.testing.assert_allclose(grads["blocks"]["0"]["bias"], [3.0])
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_parameters_survive_a_weights_folder(tmp_path):
    params = NETWORK.init(jax.random.key(0))
    weights.save(tmp_path / "toy", {"model": "toy"}, params)
    _, loaded = weights.load(tmp_path / "toy")
    np.testing.assert_array_equal(NETWORK(loaded, X), NETWORK(params, X))


def test_building_allocates_nothing():
    huge = Network.create(Toy, Config(width=200_000))
    assert count(huge.abstract_params) > 10**11


def test_a_missing_parameter_is_an_error():
    params = NETWORK.init(jax.random.key(0))
    del params["first"]
    with pytest.raises(KeyError, match="first"):
        NETWORK(params, X)


def test_layers_that_lie_apart_are_views_of_their_stack_and_give_its_numbers():
    params = NETWORK.init(jax.random.key(0))
    laid = apart(params)
    flat = flatten(laid)
    assert {path for path, leaf in flat.items() if isinstance(leaf, tuple)} == {"layers.bias", "layers.kernel"}
    stack, (_, second, _) = params["layers"]["kernel"], laid["layers"]["kernel"]
    assert second.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() == stack.nbytes // 3
    np.testing.assert_array_equal(jax.jit(NETWORK.__call__)(laid, X), jax.jit(NETWORK.__call__)(params, X))


def test_a_loop_over_layers_that_lie_apart_is_the_scan_written_out():
    params = apart({"layers": {"kernel": jnp.arange(6.0).reshape(3, 2)}})
    state = nnx.State({"kernel": nnx.Param(params["layers"]["kernel"])})
    stacked = nnx.State({"kernel": nnx.Param(jnp.arange(6.0).reshape(3, 2))})

    def body(carry, inputs):
        layer, number = inputs
        carry = carry + number * layer["kernel"][...]
        return carry, {"so far": carry}

    def run(layers):
        return scan(body, jnp.ones(2), layers, others=np.array([1.0, 10.0, 100.0]))

    jax.tree.map(np.testing.assert_array_equal, run(state), run(stacked))
    assert "scan" in str(jax.make_jaxpr(lambda: run(stacked))())
    assert "scan" not in str(jax.make_jaxpr(lambda: run(state))())


def test_packed_kernels_stay_stacked():
    params = NETWORK.init(jax.random.key(0))
    packed = params | {"layers": {"kernel": {"values": jnp.ones((3, 4, 4), jnp.int8), "scale": jnp.ones((3, 1, 4))}}}
    assert apart(packed) is packed


def test_what_lies_on_several_devices_stays_stacked():
    params = NETWORK.init(jax.random.key(0))
    laid = jax.device_put(params, replicated(make_mesh()))
    assert apart(laid) is laid
