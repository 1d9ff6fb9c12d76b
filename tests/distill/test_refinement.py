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


def test_times_and_frames_are_those_that_are_drawn_anew(toys):
    seen = []

    def spy(p):
        def velocity(x, t, cond):
            seen.append((x, t, cond))
            return jnp.zeros_like(x)

        return velocity

    record = toys.record(b=256)
    loss(toys, spy, record, frames=2, strength=0.5, wear=0.0)
    x, t, cond = seen[0]
    assert x.shape == (256, 2, 2, 2, 4)
    assert 0 < float(t.min()) < 0.05 and 0.45 < float(t.max()) < 0.5
    assert not np.any(cond.known) and not np.any(cond.mask), "what is drawn anew is noised, not known"
    clean = (1 - t)[:, None, None, None, None] * record["latents"][:, :2]
    noise = (x - clean) / t[:, None, None, None, None]
    assert 0.9 < float(noise.std()) < 1.1


def test_wear_is_noise_on_the_data(toys):
    """Of zeros x / t is the noise, of mean square 1 + wear^2 / 3."""

    def blind(p):
        return lambda x, t, cond: jnp.zeros_like(x)

    record = toys.record(b=256) | {"latents": jnp.zeros((256, 1, 2, 2, 4))}
    assert loss(toys, blind, record, wear=0.0) == pytest.approx(1, rel=0.1)
    assert loss(toys, blind, record, wear=3.0) == pytest.approx(4, rel=0.25)


def test_the_adapter_alone_is_trained_and_exported(toys):
    config = RefinementConfig(roles=RolesConfig(student="adapter", rank=2), walk=WALK)
    method = Refinement.build(config, toys.parts())
    params = method.init(jax.random.key(0))
    (name, (model, found, adapter)), *others = method.components(params).items()
    assert (name, model, others) == ("refiner", "refiner", [])
    assert found == RefinerConfig(rank=2, strength=0.5, steps=6)
    assert all(path.endswith((".a", ".b")) for path in flatten(adapter))


@pytest.mark.parametrize(
    "values",
    [{"roles": RolesConfig(student="full")}, {"strength": 1.0}, {"steps": 0}, {"frames": 0}, {"wear": -1.0}],
)
def test_what_refines_nothing_is_refused(values):
    with pytest.raises(ValueError, match=r"adapter|strength|frames"):
        RefinementConfig(walk=WALK, **values)
