"""What follows a history is learned from the data, however the history is worn; the adapter alone is exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.continuation import Continuation, ContinuationConfig
from magic141_jax.distill.roles import STUDENT, TEACHER, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.models.lora import ContinuationConfig as Adapter
from magic141_jax.pytree import flatten

WALK = WalkConfig(steps=4, shift=3.0, sampler="euler")
QUIET = {"caption_dropout": 0.0, "history_noise_probability": 0.0}
CLIP = 12


def losses(toys, student, record, seed=0, **changes):
    """Runs the method under `jax.disable_jit`, so that a spy sees numbers."""
    config = ContinuationConfig(**{"walk": WALK, "frames": 4, **QUIET, **changes})
    method = Continuation(config, toys.Formulas({STUDENT: student}, config))
    with jax.disable_jit():
        found, metrics = method.losses({TEACHER: {}, STUDENT: 0.0}, {"video": record}, jax.random.key(seed), 0)
    assert float(metrics["student/video_error"]) == float(found[STUDENT])
    return metrics


def numbered(toys, b=16):
    """Clips whose latent frame i is 100 (sample + 1) + i everywhere."""
    record = toys.record(b=b, f=CLIP)
    values = 100.0 * (1 + jnp.arange(b))[:, None] + jnp.arange(CLIP)[None]
    return record | {"latents": jnp.broadcast_to(values[:, :, None, None, None], record["latents"].shape)}


def counts_on(error):
    """A velocity straight to latents that count on from the last known one, each `error` too many."""

    def student(p):
        def velocity(x, t, cond):
            last = cond.known[:, 1:2]
            steps = jnp.arange(x.shape[1])[None, :, None, None, None]
            return (x - (last + steps - 1 + error)) / t[:, None, None, None, None]

        return velocity

    return student


def test_who_counts_on_from_its_history_has_no_loss(toys):
    metrics = losses(toys, counts_on(0.0), numbered(toys), chain=3)
    assert float(metrics["student/video_error"]) == pytest.approx(0, abs=1e-5)


def test_a_later_window_goes_on_from_what_was_made_and_is_judged_by_the_data(toys):
    """An error of 1 a window is one of 1, then of 2; each divided by the time, of which the least is .43."""
    metrics = losses(toys, counts_on(1.0), numbered(toys, b=64), chain=2)
    first, last = (float(metrics[f"student/video_error_{name}"]) for name in ("first", "last"))
    squares = float(jnp.mean(1 / WALK.times[:-1] ** 2))
    assert first == pytest.approx(squares, rel=0.3)
    assert last == pytest.approx(4 * squares, rel=0.3)


def test_the_first_picture_stands_before_a_history_from_anywhere_in_the_clip(toys):
    seen = []

    def spy(p):
        def velocity(x, t, cond):
            seen.append((x, t, cond))
            return counts_on(0.0)(p)(x, t, cond)

        return velocity

    record = numbered(toys, b=64)
    losses(toys, spy, record, chain=2, history_noise_probability=1.0, history_noise_max=0.0)
    (x, t, first), (_, _, second) = seen
    known = np.asarray(first.known)[:, :, 0, 0, 0]
    sample = 100 * (1 + np.arange(64))
    np.testing.assert_array_equal(known[:, 0], sample)
    np.testing.assert_array_equal(np.asarray(first.mask)[0, :, 0, 0, 0], [1, 1, 0, 0])
    places = known[:, 1] - sample
    assert set(places.astype(int)) == set(range(1, CLIP - 4)), "every place that leaves room for two windows"
    np.testing.assert_allclose(np.asarray(second.known)[:, 1, 0, 0, 0] - known[:, 1], 2, atol=1e-3)
    assert set(np.round(np.asarray(t), 4).tolist()) == set(np.round(np.asarray(WALK.times[:-1]), 4).tolist())
    clean = np.stack([sample, *(known[:, 1] + i for i in range(3))], axis=1)[:, :, None, None, None]
    t = np.asarray(t)[:, None, None, None, None]
    assert 0.9 < float(((np.asarray(x) - (1 - t) * clean) / t).std()) < 1.1


def test_a_history_is_noised_and_the_first_picture_is_not(toys):
    seen = []

    def spy(p):
        return lambda x, t, cond: seen.append(cond) or jnp.zeros_like(x)

    losses(toys, spy, numbered(toys), chain=1, history_noise_probability=1.0, history_noise_max=0.5)
    known = np.asarray(seen[0].known)
    assert np.ptp(known[:, 0], axis=(1, 2, 3)).max() == 0
    assert np.ptp(known[:, 1], axis=(1, 2, 3)).min() > 0


def test_no_gradient_flows_through_a_history(toys):
    """With the history's share of the gradient, d loss / d p would be that of a sum of two errors."""
    config = ContinuationConfig(walk=WALK, frames=4, chain=2, **QUIET)
    method = Continuation(config, toys.Formulas({STUDENT: lambda p: counts_on(p)(p)}, config))
    record = numbered(toys, b=64)

    def loss(p):
        return method.losses({TEACHER: {}, STUDENT: p}, {"video": record}, jax.random.key(0), 0)[0][STUDENT]

    # errors p and 2 p over the mean of 1 / t^2; constants stand in for what is left of window 0
    value, slope = jax.value_and_grad(loss)(1.0)
    assert float(slope) < 1.5 * float(value), "2 (1 + 2) / (1 + 4) = 1.2 times the loss, not 2"


def test_the_adapter_alone_is_trained_and_exported(toys):
    config = ContinuationConfig(roles=RolesConfig(student="adapter", rank=2), walk=WALK, history_noise=0.3)
    method = Continuation.build(config, toys.parts())
    params = method.init(jax.random.key(0))
    (name, (model, found, adapter)), *others = method.components(params).items()
    assert (name, model, others) == ("continuation", "continuation", [])
    assert found == Adapter(rank=2, overlap_latents=2, history_noise=0.3)
    assert all(path.endswith((".a", ".b")) for path in flatten(adapter))


def test_samples_of_a_run_go_on_from_its_first_window(toys):
    config = ContinuationConfig(walk=WALK, frames=4, **QUIET)
    method = Continuation(config, toys.Formulas({STUDENT: counts_on(0.0), TEACHER: counts_on(0.0)}, config))
    params, record = {TEACHER: {}, STUDENT: 0.0}, numbered(toys, b=2)
    made = method.sample(params, record, jax.random.key(0), known=1)
    assert made.shape[1] == 4
    np.testing.assert_array_equal(made[:, :2], method.sampled(record)["latents"][:, :2])
    np.testing.assert_allclose(made[0, :, 0, 0, 0], [100, 103, 104, 105], atol=1e-3)
    short = method.sampled({"latents": record["latents"][:, :4]})["latents"]
    np.testing.assert_array_equal(short[0, :, 0, 0, 0], 100 + jnp.arange(4), err_msg="of one window")
    assert method.reference(params, record, jax.random.key(0), known=1, steps=2).shape[1] == 4


def test_clips_too_short_for_a_chain_are_told(toys):
    with pytest.raises(ValueError, match=r"12 latent frames; a chain takes 13 .* lower method.chain"):
        losses(toys, counts_on(0.0), numbered(toys), chain=6)


@pytest.mark.parametrize(
    "values",
    [{"roles": RolesConfig(student="full")}, {"overlap": 1}, {"overlap": 5}, {"chain": 0}, {"history_noise": 2.0}],
)
def test_what_goes_on_from_nothing_is_refused(values):
    with pytest.raises(ValueError, match=r"adapter|known|level"):
        ContinuationConfig(walk=WALK, **values)
