"""The loss is least at the flow of the data, and looks only at the walk's times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.regression import Regression, RegressionConfig
from magic141_jax.distill.roles import STUDENT, TEACHER
from magic141_jax.distill.rollout import WalkConfig

WALK = WalkConfig(steps=3, shift=4.0, sampler="euler")


def to_a_point(p):
    """The velocity of data that is everywhere p."""
    return lambda x, t, cond: (x - p) / t[:, None, None, None, None]


def losses(toys, velocity, student, value=3.0, seed=0):
    method = Regression(RegressionConfig(walk=WALK), toys.Formulas({TEACHER: to_a_point, STUDENT: velocity}))
    record = toys.record(b=64, f=2) | {"latents": jnp.full((64, 2, 2, 2, 4), value)}
    return method.losses({TEACHER: value, STUDENT: student}, {"video": record}, jax.random.key(seed), 0)


def test_the_flow_of_the_data_has_no_loss_and_another_one_a_known_one(toys):
    right, metrics = losses(toys, to_a_point, jnp.array(3.0))
    assert float(right[STUDENT]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["student/video_error"]) == pytest.approx(0, abs=1e-6)
    wrong, _ = losses(toys, to_a_point, jnp.array(4.0))
    possible = 1 / np.asarray(WALK.times[:-1]) ** 2  # (1 / t)^2 at each of the times
    assert possible.min() < float(wrong[STUDENT]) < possible.max()


def test_only_the_times_of_the_walk_are_seen(toys):
    """A velocity that is right at them and far off elsewhere has no loss either."""

    def right_there(p):
        def velocity(x, t, cond):
            far = jnp.min(jnp.abs(t[:, None] - WALK.times[None, :-1]), axis=1) > 1e-6
            return to_a_point(p)(x, t, cond) + 100.0 * far[:, None, None, None, None]

        return velocity

    for seed in range(4):
        assert float(losses(toys, right_there, jnp.array(3.0), seed=seed)[0][STUDENT]) == pytest.approx(0, abs=1e-6)


@pytest.mark.heavy
def test_a_step_down_the_gradient_lowers_the_loss_of_a_network(toys):
    method = Regression.build(RegressionConfig(walk=WALK, known_frames=(0.0, 1.0)), toys.parts())
    params = {**method.frozen, **method.init(jax.random.key(0))}
    batch = {"image": toys.record(f=1), "video": toys.record()}

    def loss(student):
        return method.losses({**params, STUDENT: student}, batch, jax.random.key(1), 0)[0][STUDENT]

    before, grads = jax.value_and_grad(loss)(params[STUDENT])
    assert float(loss(jax.tree.map(lambda p, g: p - 0.01 * g, params[STUDENT], grads))) < float(before)
    assert method.sampling() == {"num_inference_steps": 3, "shift": 4.0, "sampler": "euler", "guidance_scale": 1.0}
