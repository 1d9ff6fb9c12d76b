"""One step: accumulation is the big batch, cadence, the guard, EMA; roles see only their own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.train import optim
from magic141_jax.train.state import TrainState, ema_decay
from magic141_jax.train.step import make_step


def setup(method, **changes):
    config = optim.OptimizerConfig(**{"learning_rate": 0.1, "warmup_steps": 0, "ema_decay": 0.5, **changes})
    optimizers = {role: optim.make(config, 100) for role in method.roles}
    return optimizers, TrainState.create(method.init(jax.random.key(0)), optimizers, seed=1)


def test_a_line_is_fitted(toys):
    method, points = toys.Line(), toys.Points(64)
    optimizers, state = setup(method)
    step = make_step(method, optimizers)
    for number in range(100):
        state, metrics = step(state, next(points), number)
    assert int(state.step) == 100 and metrics["loss/student"] < 1e-2
    np.testing.assert_allclose(state.params["student"]["kernel"], [[2.0]], atol=0.05)
    np.testing.assert_allclose(state.params["student"]["bias"], [[-1.0]], atol=0.05)


def test_accumulation_is_the_big_batch(toys):
    method, batch = toys.Line(), next(toys.Points(12))
    states = []
    for accumulate in (1, 4):
        optimizers, state = setup(method)
        state, metrics = make_step(method, optimizers, accumulate=accumulate)(state, batch, 0)
        states.append((jax.device_get(state.params), float(metrics["loss/student"]), state.opt_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *states)
    with pytest.raises(UserError, match="12 can't be split into 5"):
        make_step(method, optimizers, accumulate=5)(setup(method)[1], batch, 0)


def test_cadence_and_separate_roles(toys):
    method = toys.Line(roles=("student", "fake"), cadence={"student": 3})
    optimizers, state = setup(method)
    step, points, kernels = make_step(method, optimizers), toys.Points(), []
    for number in range(4):
        state, metrics = step(state, next(points), number)
        kernels.append({role: float(p["kernel"][0, 0]) for role, p in state.params.items()})
        assert ("grad_norm/student" in metrics) == (number % 3 == 0)
    assert kernels[0]["student"] == kernels[2]["student"] != kernels[3]["student"]
    assert len({k["fake"] for k in kernels}) == 4


def test_a_role_gets_no_gradient_of_anothers_loss(toys):
    class Adversary(toys.Line):
        def losses(self, params, batch, key, step):
            a, b = params["student"]["kernel"][0, 0], params["fake"]["kernel"][0, 0]
            return {"student": a * 3 + b, "fake": -5 * b + a}, {}

    method = Adversary(roles=("student", "fake"))
    optimizers, state = setup(method)
    _, metrics = make_step(method, optimizers)(state, next(toys.Points()), 0)
    assert float(metrics["grad_norm/student"]) == 3 and float(metrics["grad_norm/fake"]) == 5


def test_a_bad_step_changes_nothing(toys):
    method, points = toys.Line(), toys.Points(bad=0)
    optimizers, state = setup(method)
    before = jax.device_get(state)
    state, metrics = make_step(method, optimizers)(state, next(points), 0)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))


def test_ema_follows_its_formula(toys):
    method, points = toys.Line(), toys.Points()
    optimizers, state = setup(method, ema_decay=0.2)
    step, expected = make_step(method, optimizers), 0.0
    for number in range(5):
        state, _ = step(state, next(points), number)
        decay = min(0.2, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * float(state.params["student"]["kernel"][0, 0])
    assert float(state.ema["student"]["kernel"][0, 0]) == pytest.approx(expected, rel=1e-5)
    assert state.averaged()["student"] is state.ema["student"]
    assert float(ema_decay(0.999, jnp.int32(0))) == pytest.approx(0.1)


def test_frozen_roles_reach_the_losses_and_stay_out_of_the_state(toys):
    class Pull(toys.Line):
        def losses(self, params, batch, key, step):
            return {"student": jnp.sum((params["student"]["kernel"] - params["teacher"]["kernel"]) ** 2)}, {}

    method = Pull(frozen={"teacher": {"kernel": jnp.full((1, 1), 7.0)}})
    optimizers, state = setup(method)
    state, metrics = make_step(method, optimizers)(state, next(toys.Points()), 0)
    assert float(metrics["loss/student"]) == 49 and set(state.params) == {"student"}
