"""Counts by hand, and those of the compiler where nothing loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from magic141_jax import flops, sharding
from magic141_jax.aot import topology

LAYER = 2 * 4 * 8 * 8  # 4 rows through a kernel of 8 x 8


def count(function, *args):
    return flops.count(jax.jit(function).trace(*args).jaxpr)


def stack(block):
    def loss(kernels, x):
        return jax.lax.scan(lambda x, kernel: (block(x @ kernel), None), x, kernels)[0].sum()

    return loss


KERNELS, ROWS = jnp.ones((3, 8, 8)), jnp.ones((4, 8))


def test_loops_count_in_full():
    assert count(stack(jnp.tanh), KERNELS, ROWS) == 3 * LAYER
    assert count(jax.grad(stack(jnp.tanh)), KERNELS, ROWS) == 3 * (1 + 2) * LAYER


def test_recomputation_counts():
    def loss(kernels, x):
        block = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None))
        return jax.lax.scan(block, x, kernels)[0].sum()

    assert count(jax.grad(loss), KERNELS, ROWS) == 3 * (1 + 1 + 2) * LAYER


def test_loops_of_unknown_length_count_once_and_of_branches_the_dearest():
    def walk(x, turns):
        return jax.lax.fori_loop(0, turns, lambda i, x: x @ KERNELS[0], x)

    assert count(walk, ROWS, 5) == LAYER
    branches = [lambda x: x, lambda x: x @ KERNELS[0] @ KERNELS[1], lambda x: x @ KERNELS[0]]
    assert count(lambda i, x: jax.lax.switch(i, branches, x), 0, ROWS) == 2 * LAYER


def test_devices_count_together():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4), devices=jax.devices()[:4])

    def rows(x):
        return jax.shard_map(lambda x: x @ KERNELS[0], mesh=mesh, in_specs=P("data"), out_specs=P("data"))(x)

    assert count(rows, ROWS) == count(lambda x: x @ KERNELS[0], ROWS) == LAYER

    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, tensor=2))

    def some_rows(x):  # over one axis only; the compiler splits the rest as it likes
        split = jax.shard_map(
            lambda x: x @ KERNELS[0], mesh=mesh, axis_names={"data"}, in_specs=P("data"), out_specs=P("data")
        )
        return split(x)

    assert count(some_rows, ROWS) == LAYER


HEADS, TOKENS, WIDTH = 2, 1024, 128
ATTENTION = 4 * TOKENS * TOKENS * WIDTH * HEADS  # q k and s v


def kernel(mask, **sizes):
    blocks = splash.BlockSizes(
        **dict.fromkeys(["block_q", "block_q_dkv", "block_q_dq", "block_kv_dq"], 256),
        **dict.fromkeys(["block_kv", "block_kv_dkv"], 512),
        **dict.fromkeys(["block_kv_compute", "block_kv_dkv_compute"], 256),
    )
    made = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * HEADS), block_sizes=blocks, head_shards=1, q_seq_shards=1
    )
    return lambda *qkv: made(*qkv).astype(jnp.float32).sum()


def test_a_kernel_counts_in_every_cell_of_its_grid():
    qkv = [jax.ShapeDtypeStruct((HEADS, TOKENS, WIDTH), jnp.bfloat16)] * 3
    dense = kernel(masks.FullMask((TOKENS, TOKENS)))
    assert count(dense, *qkv) == ATTENTION
    # dq takes q k, dp and dq, and the other kernel q k, dv, dp and dk
    assert count(jax.grad(dense, (0, 1, 2)), *qkv) == pytest.approx((1 + 3 / 2 + 4 / 2) * ATTENTION, rel=0.001)
    window = kernel(masks.LocalMask((TOKENS, TOKENS), (128, 128), offset=0))
    # A row of blocks needs two of the four halves at most, and the grid shrinks to that.
    assert ATTENTION / 2 <= count(window, *qkv) <= ATTENTION


def test_cudnn_attention_counts_by_its_formula():
    gpu = topology.Topology("h100:1", topology.CHIPS["h100"], jax.devices()[:1], compiles=True, interconnect=1.0)
    q, k = (jax.ShapeDtypeStruct((3, rows, HEADS, WIDTH), jnp.bfloat16) for rows in (512, 256))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    forward = 4 * 3 * 512 * 256 * WIDTH * HEADS
    with topology.as_if_there(gpu):
        assert count(attend, q, k, k) == forward
        assert count(jax.grad(attend), q, k, k) == (1 + 5 / 2) * forward


@pytest.mark.parametrize(
    ("kernel", "groups", "dims"),
    [((3, 3, 5, 7), 1, ("NHWC", "HWIO", "NHWC")), ((3, 3, 2, 12), 4, ("NHWC", "HWIO", "NHWC"))],
)
def test_the_compiler_counts_the_same(kernel, groups, dims):
    """Of a product of four axes and of convolutions without padding."""
    x = jnp.ones((2, 9, 9, kernel[2] * groups))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=dims, feature_group_count=groups)

    def attend(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    for function, args in (
        (convolve, (x, jnp.ones(kernel))),
        (attend, (jnp.ones((2, 5, 3, 4)), jnp.ones((2, 6, 3, 4)))),
    ):
        compiled = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
        assert count(function, *args) == pytest.approx(compiled, rel=0.05)
