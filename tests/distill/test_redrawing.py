"""Windows from anywhere in a chain are learned out of noise, behind the chain's first picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.redrawing import Redrawing, RedrawingConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.models.lora import ContinuationConfig as Adapter
from magic141_jax.pytree import flatten

WALK = WalkConfig(steps=4, shift=3.0, sampler="euler")  # from 1, .9, .75 and .5
WINDOWS, FRAMES = 3, 4


def calls(toys, student, batch=64, **changes):
    """The loss, under `jax.disable_jit`, of a student on chains whose frame i is 100 (sample + 1) + i everywhere."""
    config = RedrawingConfig(walk=WALK, windows=WINDOWS, **{"refresh": 0.75, "refresh_steps": 3, **changes})
    method = Redrawing(config, toys.Formulas({STUDENT: student}, config))
    record = toys.record(b=batch, f=WINDOWS * FRAMES)
    values = 100.0 * (1 + jnp.arange(batch))[:, None] + jnp.arange(WINDOWS * FRAMES)[None]
    record |= {"latents": jnp.broadcast_to(values[:, :, None, None, None], record["latents"].shape)}
    with jax.disable_jit():
        found, metrics = method.losses({TEACHER: {}, STUDENT: 0.0}, {"video": record}, jax.random.key(0), 0)
    assert float(metrics["student/video_error"]) == float(found[STUDENT])
    return float(found[STUDENT])


def test_what_is_learned_and_what_is_seen(toys):
    seen = []

    def spy(p):
        return lambda x, t, cond: seen.append((x, t, cond)) or jnp.zeros_like(x)

    calls(toys, spy, batch=256)
    ((x, t, cond),) = seen
    assert x.shape[1] == FRAMES and cond.mask[:, 0].all() and not cond.mask[:, 1:].any()
    np.testing.assert_array_equal(cond.known[:, 0, 0, 0, 0], 100 * (1 + np.arange(256)), "the first picture is known")
    assert cond.text_mask[:, : cond.image_tokens].all(), "its tokens count"
    assert set(np.round(np.asarray(t), 4).tolist()) == {0.75, 0.5, 0.25}, "even steps"
    t = np.asarray(t)[:, None, None, None, None]
    clean = 100.0 * (1 + np.arange(256))[:, None, None, None, None]
    places = np.round(((np.asarray(x) - (1 - t) * clean) / (1 - t)).mean((2, 3, 4)))
    assert np.abs(np.median(places[:, 0])) <= 1, "the picture"
    assert np.abs(np.median(places[:, 1:] % FRAMES, axis=0) - np.arange(1, FRAMES)).max() <= 1
    assert set(range(WINDOWS)) <= set(np.unique(places[:, 2] // FRAMES)), "of all windows"


def test_who_draws_the_window_has_no_loss_and_an_error_counts_by_the_time(toys):
    def off_by(error):
        def student(p):
            def velocity(x, t, cond):
                t = t[:, None, None, None, None]
                nearest = jnp.round(x.mean((1, 2, 3, 4), keepdims=True) / (1 - t))  # the noise's mean is below 1/2
                return (x - (nearest + error)) / t

            return velocity

        return student

    exact, off = (calls(toys, off_by(error)) for error in (0.0, 30.0))
    assert exact < 30
    assert off - exact == pytest.approx(30**2 * np.mean([1 / 0.75**2, 1 / 0.5**2, 1 / 0.25**2]), rel=0.3)


def test_the_adapter_alone_is_trained_and_exported(toys):
    config = RedrawingConfig(
        roles=RolesConfig(student="adapter", rank=2), walk=WALK, refresh_steps=3, history_noise=0.3
    )
    method = Redrawing.build(config, toys.parts())
    (name, (model, found, adapter)), *others = method.components(method.init(jax.random.key(0))).items()
    assert (name, model, others) == ("continuation", "continuation", [])
    assert found == Adapter(rank=2, overlap_latents=1, history_noise=0.3, refresh=4 / 7, refresh_steps=3)
    assert all(path.endswith((".a", ".b")) for path in flatten(adapter))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roles": RolesConfig(student="full")}, "adapter"),
        ({"windows": 1}, "2 windows"),
        ({"refresh": 1.0}, "between 0 and 1"),
        ({"refresh_steps": 0}, "1 or more"),
        ({"history_noise": 2.0}, "level"),
    ],
)
def test_what_draws_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RedrawingConfig(walk=WALK, **values)
