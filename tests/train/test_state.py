"""The state before the first step, and the averaged parameters."""

import jax
import jax.numpy as jnp
import pytest

from magic141_jax.train import optim
from magic141_jax.train.state import TrainState, ema_decay


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
