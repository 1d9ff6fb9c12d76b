"""Small programs compiled for slices and nodes, against accounts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.aot import program, topology
from magic141_jax.aot.program import Program

MIB = 2**20
LAYERS, WIDTH, ROWS = 6, 1024, 2048


def stack(made, axis="fsdp", dtype=jnp.bfloat16):
    """A stack of square layers with rows through it, both split over the devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, axis: -1}), devices=made.devices)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    kernels = shape((LAYERS, WIDTH, WIDTH), sharding=NamedSharding(mesh, P(None, axis)))
    rows = shape((ROWS, WIDTH), sharding=sharding.batch_sharding(mesh))

    def run(kernels, x):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    held = {"kernels": kernels, "rows": rows, "nothing": {}}
    return Program(jax.jit(run), (kernels, rows), held, {"what": "a stack"})


def check_account(found, chips):
    weights, rows = 2 * LAYERS * WIDTH * WIDTH, 2 * ROWS * WIDTH
    assert found["what"] == "a stack" and found["fits"] is True
    assert found["held"] == {"kernels": weights // chips, "rows": rows // chips}
    assert found["memory"]["arguments"] == (weights + rows) // chips
    assert found["flops"] == 2 * ROWS * WIDTH * WIDTH * LAYERS
    gathered = found["collectives"]["all-gather"]
    assert gathered["count"] == LAYERS and gathered["bytes"] == weights
    assert gathered["received"] == weights * (chips - 1) // chips
    assert {reason["what"] for reason in found["reasons"]} == {"kernels", "rows", "temporaries"}
    return weights, rows


def test_a_slice(slice_of_four):
    found = program.measure(stack(slice_of_four), slice_of_four)
    weights, rows = check_account(found, chips=4)
    chip, times = topology.CHIPS["v6e"], found["roofline"]
    assert times["operations"] == found["seconds_at_peak"] == found["flops"] / 4 / chip.rate
    # Each chip reads its part of the weights; what is gathered stays near its cores. On a square a chip has two links.
    assert (weights + 2 * rows) / 4 <= times["hbm"] * chip.bandwidth <= 3 * weights
    assert times["interconnect"] == weights * 3 / 4 / (chip.interconnect / 2)


def test_a_node_of_gpus(two_gpus):
    found = program.measure(stack(two_gpus), two_gpus)
    weights, _ = check_account(found, chips=2)
    assert found["roofline"]["interconnect"] == weights / 2 / topology.CHIPS["h100"].interconnect


def test_cudnn_attention_is_compiled_without_a_gpu(two_gpus):
    where = sharding.batch_sharding(sharding.make_mesh(devices=two_gpus.devices))
    q = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16, sharding=where)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    found = program.measure(Program(jax.jit(attend), (q, q, q), {"qkv": (q, q, q)}, {}), two_gpus)
    assert found["fits"] and found["flops"] == 4 * 2 * 256 * 256 * 2 * 128


def test_stand_ins_give_no_verdict(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = topology.make("h100:4")
    found = program.measure(stack(made), made)
    assert found["roofline"] == {"operations": found["seconds_at_peak"]}
    assert not {"fits", "memory", "reasons"} & found.keys()


def test_what_is_too_large(slice_of_four):
    mesh = sharding.make_mesh(devices=slice_of_four.devices)
    x = jax.ShapeDtypeStruct((4, 10 * MIB, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    large = Program(jax.jit(jnp.sin), (x,), {"x": x}, {})
    found = program.measure(large, slice_of_four)
    gib = 2**30
    assert found["fits"] is False and "Ran out of memory on HBM" in found["refused"] and "\n" not in found["refused"]
    assert found["memory"] == {"total": 40 * gib}
    parts = [{"what": "x", "bytes": 20 * gib}, {"what": "temporaries and outputs", "bytes": 20 * gib}]
    assert found["reasons"] == parts and found["roofline"] == {"operations": 0.0}
    insisted = program.measure(large, slice_of_four, insist=True)
    assert insisted["fits"] is False and insisted["memory"]["total"] == 40 * gib
    assert insisted["reasons"][1] == {"what": "sin bf16[1,10485760,1024]", "bytes": 20 * gib}
    assert insisted["roofline"]["hbm"] == 40 * gib / topology.CHIPS["v6e"].bandwidth


def test_other_errors_of_the_compiler_are_raised(slice_of_four, monkeypatch):
    monkeypatch.setattr(program, "TOO_LARGE", "nothing is too large")
    mesh = sharding.make_mesh(devices=slice_of_four.devices)
    x = jax.ShapeDtypeStruct((4, 10 * MIB, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    with pytest.raises(jax.errors.JaxRuntimeError):
        program.measure(Program(jax.jit(jnp.sin), (x,), {"x": x}, {}), slice_of_four)
