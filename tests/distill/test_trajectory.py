"""Against the teacher's steps written out by hand; a student of the same straight path has no loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.roles import STUDENT, TEACHER
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.distill.trajectory import Trajectory, TrajectoryConfig

ONE_STEP = WalkConfig(steps=1, shift=3.0, sampler="euler")


def straight(p):
    """The velocity of data that is everywhere p: the paths from all noise are straight."""
    return lambda x, t, cond: (x - p) / jnp.maximum(t, 1e-3)[:, None, None, None, None]


def loss(toys, teacher, student, values, **config):
    config = TrajectoryConfig(**({"guidance": 1.0, "walk": WalkConfig(shift=3.0, sampler="euler")} | config))
    method = Trajectory(config, toys.Formulas({TEACHER: teacher, STUDENT: student}))
    record = toys.record(b=64, f=2) | {"latents": jnp.full((64, 2, 2, 2, 4), 3.0)}
    params = {TEACHER: values[0], STUDENT: values[1]}
    losses, metrics = method.losses(params, {"video": record}, jax.random.key(0), 0)
    assert float(metrics["student/video_error"]) == float(losses[STUDENT])
    return float(losses[STUDENT])


def test_many_steps_along_a_straight_path_are_one(toys):
    assert loss(toys, straight, straight, (jnp.array(3.0), jnp.array(3.0))) == pytest.approx(0, abs=1e-5)
    assert loss(toys, straight, straight, (jnp.array(3.0), jnp.array(4.0))) > 0.5


def test_the_target_is_the_teachers_end_point(toys):
    """From noise to data in one step of the student and four of a teacher that decays toward zero at a rate."""
    fine = np.asarray(3.0 * np.linspace(1, 0, 5) / (1 + 2.0 * np.linspace(1, 0, 5)))
    rate = 0.7
    shrink = np.prod(1 + rate * np.diff(fine))  # x' = x + (t' - t) rate x
    # the whole way is from t = 1 to 0, so the velocity that leads there is x - y = (1 - shrink) x

    def decay(p):
        return lambda x, t, cond: p * x

    exact, off = (jnp.array(1 - shrink + e, jnp.float32) for e in (0.0, 0.5))
    teacher = jnp.array(rate, jnp.float32)
    assert loss(toys, decay, decay, (teacher, exact), walk=ONE_STEP) == pytest.approx(0, abs=1e-10)
    assert loss(toys, decay, decay, (teacher, off), walk=ONE_STEP) == pytest.approx(
        0.25, rel=0.1
    )  # noise has unit size


def test_guidance_is_folded_in(toys):
    """The teacher says another thing without a caption; the student learns the extrapolation."""

    def by_text(p):
        def velocity(x, t, cond):
            captioned = (cond.text[:, 0, 0] != toys.NULL.text[0, 0]).astype(jnp.float32)
            return p + captioned[:, None, None, None, None] + jnp.zeros_like(x)

        return velocity

    # p + 1 with a caption, p without: guided by 2.5 it is p + 2.5
    values = (jnp.array(0.5), jnp.array(2.0))
    assert loss(toys, by_text, by_text, values, guidance=2.5) == pytest.approx(0, abs=1e-6)
    assert loss(toys, by_text, by_text, values, guidance=1.0) == pytest.approx(2.25, rel=1e-3)


def test_on_its_own_states_a_student_is_judged_where_it_goes(toys):
    """Off by e in its velocity it is off by e everywhere, but its walk leaves the data's: the teacher sees that."""
    seen = []

    def leaning(p):
        def velocity(x, t, cond):
            jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t)
            return jnp.full_like(x, p)

        return velocity

    def still(p):
        return lambda x, t, cond: jnp.zeros_like(x)

    values = (jnp.array(0.0), jnp.array(0.5))
    assert loss(toys, still, leaning, values, own_states=1.0, substeps=1) == pytest.approx(0.25)
    x, t = seen[-1]  # where the loss is taken, after the walk
    times = np.asarray(WalkConfig(shift=3.0, sampler="euler").times)
    noise = x - 0.5 * (t - 1)[:, None, None, None, None]  # a walk from 1 to t along a velocity of 0.5
    assert set(np.round(t, 4)) == set(np.round(times[:-1], 4)), "samples stand at all steps"
    assert noise.std() == pytest.approx(1, abs=0.05) and abs(noise.mean()) < 0.05, "no data is in it"
    seen.clear()
    loss(toys, still, leaning, values, own_states=0.0, substeps=1)
    assert abs(seen[-1][0].mean()) > 0.5, "data of 3, noised"


@pytest.mark.parametrize("values", [{"own_states": 1.5}, {"walk": WalkConfig(sampler="renoise")}, {"substeps": 0}])
def test_what_makes_no_trajectory_is_refused(values):
    with pytest.raises(ValueError, match=r"euler|substeps|own_states"):
        TrajectoryConfig(**values)
