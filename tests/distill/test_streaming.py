"""The student goes on from its own windows: histories as a sliding window would make them, targets of clean ones."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.roles import STUDENT, TEACHER
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.distill.streaming import Streaming, StreamingConfig

FRAMES, WINDOWS = 2, 3
WALK = WalkConfig(steps=2, shift=3.0, sampler="euler")


def config(**changes):
    quiet = {"history_noise_probability": 0.0, "known_frames": (0.0, 1.0), "caption_dropout": 0.0, "restart": 0.0}
    return StreamingConfig(**{"walk": WALK, "windows": WINDOWS, **quiet, **changes})


@dataclasses.dataclass
class LossyVAE:
    """A pixel frame is a latent frame; each round trip adds `error`."""

    error: float = 0.0
    config: types.SimpleNamespace = dataclasses.field(default_factory=lambda: types.SimpleNamespace(temporal_factor=1))

    def __call__(self, params, x, *, method):
        return x + params if method == "decode_latents" else x + self.error


def method_of(toys, teacher, student, vae=None, **changes):
    drawn = config(**changes)
    return Streaming(drawn, toys.Formulas({TEACHER: teacher, STUDENT: student}, drawn), vae or LossyVAE())


def params_of(student, vae=0.0):
    """Formulas take their parameters as they are; the VAE's lie beside the teacher's."""
    return {TEACHER: {"vae": jnp.float32(vae)}, STUDENT: jnp.float32(student)}


def follow_known(p):
    """A velocity whose data is the first known latent frame plus p, in every frame: paths are straight."""

    def velocity(x, t, cond):
        gain = p if isinstance(p, jax.Array) else 0.0
        return (x - cond.known[:, :1] - gain) / jnp.maximum(t, 1e-3)[:, None, None, None, None]

    return velocity


def chain(toys, b=4):
    record = toys.record(b=b, f=FRAMES * WINDOWS)
    return record, record["latents"].reshape(b, WINDOWS, FRAMES, *record["latents"].shape[2:])


@pytest.mark.parametrize("resume", [0, 1])
@pytest.mark.parametrize("overlap", [1, 2])
def test_histories_are_the_last_frames_of_the_window_before(toys, resume, overlap):
    """Each window shows its first known frame plus .5, and a round trip through the VAE adds .25 and .125."""
    method = method_of(toys, follow_known, follow_known, LossyVAE(0.125), resume=resume, overlap=overlap)
    record, windows = chain(toys)
    windows = jnp.tile(windows, (1, 1, 2, 1, 1, 1))  # four frames, of which two may be known
    cond = method.backbone.conditioning({}, "video", record | {"latents": windows[:, 0]}, jax.random.key(0))
    made = method.histories(params_of(0.5, 0.25), windows, cond, jax.random.key(1))
    assert made.shape == (4, WINDOWS, overlap, 2, 2, 4)
    np.testing.assert_array_equal(made[:, 0], windows[:, 0, :overlap])
    for w in (1, 2):
        # what is known is put back as it is, so the last frame holds its first known one, moved by all three
        want = made[:, w - 1, :1] + 0.5 + 0.25 + 0.125
        np.testing.assert_allclose(made[:, w, -1:], want, atol=1e-4)


def test_a_walk_that_starts_anew_has_the_errors_of_one_window(toys):
    """Round trips add .1: every history is off by it once, where no window is told what the one before made."""
    record, windows = chain(toys)
    windows = jnp.broadcast_to(windows[:, :1, :1], windows.shape)  # nothing moves
    for restart, want in ((1.0, (0.1, 0.1)), (0.0, (0.1, 0.2))):
        method = method_of(toys, follow_known, lambda p: follow_known(None), LossyVAE(0.1), resume=0, restart=restart)
        cond = method.backbone.conditioning({}, "video", record | {"latents": windows[:, 0]}, jax.random.key(0))
        made = method.histories(params_of(0.0), windows, cond, jax.random.key(1)) - windows[:, :, :1]
        np.testing.assert_allclose(made[:, 1:].mean((0, 2, 3, 4, 5)), want, atol=1e-4)


def test_a_window_from_pure_noise_knows_nothing_of_the_data(toys):
    """From step 0 only what is known decides; from step 1 the data shows through."""
    record, windows = chain(toys)
    other = windows.at[:, :, 1].add(1.0)

    def still(p):
        return lambda x, t, cond: jnp.zeros_like(x)

    for resume, same in ((0, True), (1, False)):
        method = method_of(toys, still, still, resume=resume)
        cond = method.backbone.conditioning({}, "video", record | {"latents": windows[:, 0]}, jax.random.key(0))
        one, two = (method.histories(params_of(0), x, cond, jax.random.key(1)) for x in (windows, other))
        assert np.allclose(one[:, 1:], two[:, 1:]) == same


def losses(method, params, record, seed=0):
    (found, metrics) = method.losses(params, {"video": record}, jax.random.key(seed), 0)
    return float(found[STUDENT]), {name.removeprefix("student/video_"): float(x) for name, x in metrics.items()}


def test_who_is_as_good_as_the_teacher_on_true_frames_learns_from_its_own(toys):
    """Teacher and student agree where the first frame is true; a lossy VAE makes the later ones wrong."""
    record, _ = chain(toys, b=16)
    method = method_of(toys, follow_known, follow_known, LossyVAE(), resume=0)
    _, found = losses(method, params_of(0.0), record)
    assert found["error_first"] == pytest.approx(0, abs=1e-6)
    _, found = losses(method, params_of(0.0, vae=0.5), record)
    assert found["error_first"] == pytest.approx(0, abs=1e-6) and found["error_last"] > found["error"] > 0.01


def test_a_student_that_mends_has_no_loss(toys):
    """It takes off what the round trip added, which the teacher never sees."""

    def true_first(p):
        return lambda x, t, cond: (x - 3.0) / jnp.maximum(t, 1e-3)[:, None, None, None, None]

    method = method_of(toys, true_first, true_first, LossyVAE(0.3))
    record, _ = chain(toys)
    record["latents"] = jnp.full_like(record["latents"], 3.0)
    loss, found = losses(method, params_of(0.0, vae=0.2), record)
    assert loss == pytest.approx(0, abs=1e-8) and found["history"] == pytest.approx(0.25, rel=1e-3)


def test_gradients_flow_through_the_last_step_only(toys):
    """Histories are constants: the gradient is that of the loss with them held."""
    method = method_of(toys, follow_known, follow_known, LossyVAE(0.1), resume=0)
    record, windows = chain(toys)

    def loss(p):
        return method.losses({**params_of(0.0), STUDENT: p}, {"video": record}, jax.random.key(0), 0)[0][STUDENT]

    def moved(p):
        cond = method.backbone.conditioning({}, "video", record | {"latents": windows[:, 0]}, jax.random.key(0))
        return method.histories({**params_of(0.0), STUDENT: p}, windows, cond, jax.random.key(1)).sum()

    assert float(jax.grad(moved)(jnp.float32(0.2))) == 0
    assert float(jax.grad(loss)(jnp.float32(0.2))) != 0


def test_images_are_learned_as_in_a_trajectory(toys):
    method = method_of(toys, follow_known, follow_known)
    found, metrics = method.losses(params_of(0.5), {"image": toys.record(f=1)}, jax.random.key(0), 0)
    assert set(metrics) == {"student/image_error"} and float(found[STUDENT]) > 0


@pytest.mark.heavy
def test_samples_are_of_one_window(toys):
    drawn = config()
    made = Streaming.build(drawn, toys.parts(lambda: (LossyVAE(), jnp.float32(0.0))))
    params = {TEACHER: {**made.backbone.frozen}, STUDENT: made.init(jax.random.key(0))[STUDENT]}
    assert set(made.components(params)) == {"transformer"}
    record, _ = chain(toys)
    for sample in (made.sample, lambda *args, **kw: made.reference(*args, steps=1, **kw)):
        assert sample(params, record, jax.random.key(0), known=1).shape == (4, FRAMES, 2, 2, 4)


@pytest.mark.parametrize("values", [{"windows": 1}, {"overlap": 0}, {"resume": 2}, {"resume": -1}, {"restart": 2}])
def test_what_makes_no_chain_is_refused(values):
    with pytest.raises(ValueError, match=r"chain|resume|restart"):
        config(**values)
