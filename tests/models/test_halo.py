"""A convolution whose parts lie on eight devices is the one of the whole picture, and no device has that."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from magic141_jax.models import halo
from magic141_jax.sharding import MeshConfig, make_mesh, over, space_spec, spread


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolution(fill, step):
    """Of frames, with the border of a stride: below and on the right only, where pictures are halved."""
    sides = (1 if step == 1 else 0, 1)

    def frames(x, kernel, zeros="VALID"):
        y = jax.lax.conv_general_dilated(
            x[:, 0], kernel, (step, step), zeros, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y[:, None]

    return lambda x, kernel: halo.convolve(frames, x, kernel, border=(sides, sides), fill=fill, step=(step, step))


@pytest.mark.parametrize("fill", ["repeat", "zero"])
def test_one_device_pads_the_picture(fill):
    x, kernel = normal(2, 1, 5, 6, 2), normal(3, 3, 2, 4, seed=1)
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1), (0, 0)), mode={"repeat": "edge", "zero": "constant"}[fill])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    wanted = np.einsum("byxcij,ijco->byxo", windows, kernel)
    np.testing.assert_allclose(convolution(fill, 1)(x, kernel)[:, 0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "shape", "fill", "step", "part"),
    [
        ({"context": 8}, (1, 1, 6, 16, 2), "repeat", 1, (1, 6, 2)),
        ({"context": 2, "tensor": 2, "fsdp": 2}, (1, 1, 8, 8, 2), "zero", 1, (1, 4, 2)),
        ({"context": 2, "tensor": 2, "data": 2}, (2, 1, 8, 6, 2), "repeat", 1, (1, 2, 6)),
        ({"context": 4, "tensor": 2}, (1, 1, 8, 16, 2), "zero", 2, (1, 2, 2)),
        ({"context": 8}, (1, 1, 6, 8, 2), "repeat", 2, (1, 3, 4)),
    ],
)
def test_eight_devices_give_the_numbers_and_gradients_of_one(mesh, shape, fill, step, part):
    """`part` is the (samples, rows, columns) that a device makes: where halving leaves no whole parts, all of them."""
    x, kernel, convolve = normal(*shape), normal(3, 3, 2, 4, seed=1), convolution(fill, step)
    mesh = make_mesh(MeshConfig(**{"data": 1, **mesh}))

    def loss(x, kernel):
        y = convolve(x, kernel)
        return jnp.sum(jnp.sin(y)), y

    def grads(x, kernel):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    wanted = jax.jit(grads)(x, kernel)
    forward = jax.jit(over(mesh, convolve)).lower(*spread((x, kernel), mesh)).compile()
    made = {tuple(map(int, m.split(","))) for m in re.findall(r"= f32\[([\d,]+)\]\S* convolution\(", forward.as_text())}
    assert made == {(*part, 4)}
    for got, want in zip(
        jax.tree.leaves(jax.jit(over(mesh, grads))(*spread((x, kernel), mesh))), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_lies_in_slices_is_whole_where_it_is_needed():
    """Left to the compiler this one came out wrong."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    x, kernel = normal(1, 1, 8, 8, 8), normal(3, 3, 8, 8, seed=1)
    where = jax.NamedSharding(mesh, P(None, None, ("fsdp", "context")))
    assert space_spec((1, 1, 8, 8, 8)) == P(None, None, None, None, None)
    got = jax.jit(over(mesh, convolution("zero", 1)))(spread(x, mesh), jax.device_put(kernel, where))
    np.testing.assert_allclose(got, convolution("zero", 1)(x, kernel), atol=1e-5)
