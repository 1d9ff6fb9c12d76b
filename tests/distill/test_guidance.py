"""One pass equals the teacher's two: exactly at the right answer, for one scale and for a scale that is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.guidance import GuidanceConfig, GuidanceDistillation
from magic141_jax.distill.roles import STUDENT, TEACHER, RolesConfig


def spread(t):
    return t[:, None, None, None, None]


def teacher(p):
    """A velocity of the caption, zero for the empty one, plus one of x."""
    return lambda x, t, cond: x + p * spread(cond.pooled.mean(-1))


def student(p):
    """The same with the caption's part grown by the scale it is told."""
    return lambda x, t, cond, w=1.0: x + p * spread(jnp.broadcast_to(w, t.shape)) * spread(cond.pooled.mean(-1))


@pytest.mark.parametrize("scale", [(3.0, 3.0), (1.0, 6.0)])
def test_the_guided_velocity_has_no_loss(toys, scale):
    method = GuidanceDistillation(GuidanceConfig(scale=scale), toys.Formulas({TEACHER: teacher, STUDENT: student}))
    batch = {"video": toys.record(b=8)}
    right, wrong = (method.losses({TEACHER: 2.0, STUDENT: p}, batch, jax.random.key(0), 0)[0] for p in (2.0, 1.0))
    assert float(right[STUDENT]) == pytest.approx(0, abs=1e-8) and float(wrong[STUDENT]) > 1e-2


def test_a_range_needs_an_embedding_and_gets_it(toys):
    with pytest.raises(ValueError, match="guidance_embedding"):
        GuidanceDistillation.build(GuidanceConfig(scale=(1.0, 6.0)), toys.parts())
    config = GuidanceConfig(scale=(1.0, 6.0), roles=RolesConfig(fake="full"), known_frames=(0.0, 1.0))
    method = GuidanceDistillation.build(config, toys.parts(guidance_embedding=True))
    params = method.init(jax.random.key(0)) | dict(method.frozen)
    grads = jax.jit(jax.grad(lambda p: method.losses(p, {"video": toys.record()}, jax.random.key(0), 0)[0][STUDENT]))
    assert float(jnp.abs(grads(params)[STUDENT]["transformer"]["guidance_in"]["down"]["kernel"]).max()) > 0
    assert method.sampling() == {"guidance_scale": 3.5}
    with pytest.raises(ValueError, match="scale must not fall"):
        GuidanceConfig(scale=(3.0, 1.0))


def test_samples_are_looked_at_with_the_middle_of_the_scales(toys):
    formulas = toys.Formulas({TEACHER: lambda p: teacher(2.0), STUDENT: student})
    method = GuidanceDistillation(GuidanceConfig(scale=(1.0, 6.0)), formulas)
    params, record, key = {TEACHER: {}, STUDENT: 2.0}, toys.record(), jax.random.key(0)
    made = method.sample(params, record, key, known=0)
    np.testing.assert_allclose(made, method.reference(params, record, key, known=0, steps=12), atol=1e-3)
    assert method.guidance == 3.5 and method.walk.sampler == "euler"
