"""A student that is consistent has no loss, one that isn't is pulled to the teacher's end point."""

import jax
import jax.numpy as jnp
import pytest

from magic141_jax.distill.consistency import Consistency, ConsistencyConfig
from magic141_jax.distill.roles import STUDENT, TEACHER
from magic141_jax.distill.rollout import WalkConfig


def spread(t):
    return t[:, None, None, None, None]


def to_a_point(p):
    """The velocity of data that is everywhere p."""
    return lambda x, t, cond: (x - p) / jnp.maximum(spread(t), 0.01)


def loss(toys, student, seed=0, **config):
    method = Consistency(
        ConsistencyConfig(guidance=1.0, **config), toys.Formulas({TEACHER: to_a_point, STUDENT: to_a_point})
    )
    record = toys.record(b=64, f=2) | {"latents": jnp.full((64, 2, 2, 2, 4), 3.0)}
    return method.losses({TEACHER: 3.0, STUDENT: student}, {"video": record}, jax.random.key(seed), 0)


def test_the_teachers_own_map_has_no_loss(toys):
    losses, metrics = loss(toys, 3.0)
    assert float(losses[STUDENT]) == pytest.approx(0, abs=1e-4)
    assert float(metrics["student/video_consistency"]) == pytest.approx(0, abs=1e-4)
    # A map that is wrong but the same along the path is only told so at the last step, whose target is the data.
    wrong, _ = loss(toys, 4.0)
    assert 0.2 / 50 < float(wrong[STUDENT]) < 5 / 50


def test_descent_leads_to_the_data(toys):
    method = Consistency(
        ConsistencyConfig(guidance=1.0, grid_steps=4), toys.Formulas({TEACHER: to_a_point, STUDENT: to_a_point})
    )
    record = toys.record(b=16, f=2) | {"latents": jnp.full((16, 2, 2, 2, 4), 3.0)}

    @jax.jit
    def step(p, key):
        def loss(p):
            return method.losses({TEACHER: 3.0, STUDENT: p}, {"video": record}, key, 0)[0][STUDENT]

        return p - 0.3 * jax.grad(loss)(p)

    p = jnp.array(0.0)
    for seed in range(120):
        p = step(p, jax.random.key(seed))
    assert float(p) == pytest.approx(3.0, abs=0.3)


def test_the_grid_is_finer_than_the_walk():
    with pytest.raises(ValueError, match="grid_steps"):
        ConsistencyConfig(grid_steps=2, walk=WalkConfig(steps=4))


def test_networks_build(toys):
    method = Consistency.build(ConsistencyConfig(known_frames=(0.0, 1.0)), toys.parts())
    params = method.init(jax.random.key(0)) | dict(method.frozen)
    losses, _ = jax.jit(method.losses)(params, {"image": toys.record(f=1)}, jax.random.key(0), 0)
    assert jnp.isfinite(losses[STUDENT]) and method.sampling()["guidance_scale"] == 1.0
    assert set(method.components(params)) == {"transformer"}
