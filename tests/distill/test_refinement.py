"""The target of drawing anew is the data, from whatever is worn and noised; the adapter alone is exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.refinement import Refinement, RefinementConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.models.lora import RefinerConfig
from magic141_jax.pytree import flatten

WALK = WalkConfig(steps=4, shift=3.0, sampler="euler")


def loss(toys, student, record, seed=0, **changes):
    config = RefinementConfig(walk=WALK, caption_dropout=0.0, **changes)
    method = Refinement(config, toys.Formulas({STUDENT: student}, config))
    losses, metrics = method.losses({TEACHER: {}, STUDENT: 0.0}, {"video": record}, jax.random.key(seed), 0)
    assert float(metrics["student/video_error"]) == float(losses[STUDENT])
    return float(losses[STUDENT])


def toward(value):
    """The velocity that leads straight to a clip that is `value` everywhere."""
    return lambda p: lambda x, t, cond: (x - value) / t[:, None, None, None, None]


def test_who_knows_the_data_has_no_loss_however_worn_it_is(toys):
    record = toys.record(b=32) | {"latents": jnp.full((32, 3, 2, 2, 4), 2.0)}
    assert loss(toys, toward(2.0), record, wear=0.0) == pytest.approx(0, abs=1e-8)
    assert loss(toys, toward(2.0), record, wear=0.9) == pytest.approx(0, abs=1e-8)
    assert loss(toys, toward(1.0), record) > 1


def test_times_and_frames_are_those_of_the_last_steps_of_the_walk(toys):
    seen = []

    def spy(p):
        def velocity(x, t, cond):
            seen.append((x, t, cond))
            return jnp.zeros_like(x)

        return velocity

    record = toys.record(b=64)
    loss(toys, spy, record, frames=2, start=2, wear=0.0)
    x, t, cond = seen[0]
    assert x.shape == (64, 2, 2, 2, 4)
    times = np.asarray(WALK.times)
    assert set(np.round(np.asarray(t), 5)) == set(np.round(times[2:4], 5))
    assert not np.any(cond.known) and not np.any(cond.mask), "what is drawn anew is noised, not known"
    clean = (1 - t)[:, None, None, None, None] * record["latents"][:, :2]
    noise = (x - clean) / t[:, None, None, None, None]
    assert 0.9 < float(noise.std()) < 1.1


def test_wear_is_noise_on_the_data(toys):
    """A student that takes off just the noise leaves the wear, whose mean square is wear^2 / 3 over t^2 ((1 - t))^2."""

    def blind(p):
        return lambda x, t, cond: jnp.zeros_like(x)

    record = toys.record(b=256) | {"latents": jnp.zeros((256, 1, 2, 2, 4))}
    bare, worn = (loss(toys, blind, record, wear=wear) for wear in (0.0, 2.0))
    assert worn > bare == pytest.approx(1, rel=0.1), "of zeros x / t is the noise"


def test_the_adapter_alone_is_trained_and_exported(toys):
    config = RefinementConfig(roles=RolesConfig(student="adapter", rank=2), walk=WALK)
    method = Refinement.build(config, toys.parts())
    params = method.init(jax.random.key(0))
    (name, (model, found, adapter)), *others = method.components(params).items()
    assert (name, model, others) == ("refiner", "refiner", [])
    assert found == RefinerConfig(rank=2, steps=4, shift=3.0, start=2)
    assert all(path.endswith((".a", ".b")) for path in flatten(adapter))


@pytest.mark.parametrize(
    "values",
    [{"roles": RolesConfig(student="full")}, {"start": 0}, {"start": 4}, {"frames": 0}, {"wear": -1.0}],
)
def test_what_refines_nothing_is_refused(values):
    with pytest.raises(ValueError, match=r"adapter|start|frames"):
        RefinementConfig(walk=WALK, **values)
