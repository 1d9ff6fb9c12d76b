"""The state before the first step, the averaged parameters, and the memory that all of it takes."""

import jax
import jax.numpy as jnp
import pytest

from magic141_jax import sharding
from magic141_jax.sharding import MeshConfig, make_mesh
from magic141_jax.train import optim
from magic141_jax.train.state import TrainState, ema_decay, memory_table


def test_only_roles_that_ask_for_it_are_averaged():
    params = {"student": {"kernel": jnp.ones((2, 2))}, "fake": {"kernel": jnp.zeros((2, 2))}}
    decays = {"student": 0.9, "fake": 0.0}
    optimizers = {role: optim.make(optim.OptimizerConfig(ema_decay=decay), 10) for role, decay in decays.items()}
    state = TrainState.create(params, optimizers, seed=3)
    assert set(state.ema) == {"student"} and int(state.step) == 0
    assert state.ema["student"]["kernel"] is not params["student"]["kernel"], "both are donated"
    assert state.averaged()["fake"] is state.params["fake"] and state.averaged()["student"] is state.ema["student"]
    assert jax.random.wrap_key_data(state.key) == jax.random.key(3)


def test_the_decay_warms_up():
    assert [float(ema_decay(0.999, jnp.int32(n))) for n in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.999])


def test_the_memory_table_is_what_a_device_holds():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    trees = {"student": {"kernel": jnp.ones((512, 512))}, "fake": {"kernel": jnp.ones((512, 256))}}
    made = {
        role: optim.make(optim.OptimizerConfig(ema_decay=decay), 10)
        for role, decay in (("student", 0.9), ("fake", 0.0))
    }
    state = jax.eval_shape(lambda: TrainState.create(trees, made))
    placed = sharding.shardings(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
    teacher = {"teacher": {"kernel": jnp.ones((512, 512), jnp.bfloat16)}}  # on one device, whole
    header, *rows, last = memory_table(state, teacher).splitlines()
    mib = {row.split()[0]: [float(x) * 1024 for x in row[20:].split()] for row in rows}
    assert header.split()[-6:] == ["parameters", "gradients", "moments", "average", "in", "all"]
    assert mib["student"] == pytest.approx([0.25, 0.25, 0.5, 0.25, 1.25], rel=1e-3), "1 MiB over four devices"
    assert mib["fake"] == pytest.approx([0.125, 0.125, 0.25, 0, 0.5], rel=1e-3)
    assert mib["teacher"] == pytest.approx([0.5, 0, 0, 0, 0.5], rel=1e-3) and rows[2].startswith("teacher (frozen)")
    assert float(last.split()[0]) * 1024 == pytest.approx(2.25, rel=1e-3)
