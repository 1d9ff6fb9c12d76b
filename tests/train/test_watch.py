"""Measures against numpy, each line, and collapses provoked on toys that the real step and loop train."""

import itertools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import settings
from magic141_jax.errors import UserError
from magic141_jax.train import loop, metrics, watch
from magic141_jax.train.conditioner import ConditioningConfig
from magic141_jax.train.watch import Watch, WatchConfig

SHAPE = (3, 2, 5, 4, 4, 6)  # n prompts, m seeds, f frames, h, w, c


def clips(seed=0, shape=SHAPE, known=1):
    """Latents that begin with their known frames, and those."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal(shape).astype(np.float32) + rng.standard_normal(shape[-1]).astype(np.float32)
    frames = np.random.default_rng(9).standard_normal((shape[0], known, *shape[3:])).astype(np.float32)
    latents[:, :, :known] = frames[:, None]
    return latents, frames


@pytest.mark.parametrize("known", [0, 1, 2])
def test_motion_starts_at_the_last_known_frame(known):
    latents, frames = clips(known=known)
    steps = [np.abs(latents[:, :, i] - latents[:, :, i - 1]) for i in range(max(known, 1), SHAPE[2])]
    assert float(watch.motion(latents, frames)) == pytest.approx(np.mean(steps), rel=1e-5)
    if known:
        latents[:, :, :known] = 100  # what the walk made of the known frames is not what the clip shows
        assert float(watch.motion(latents, frames)) == pytest.approx(np.mean(steps), rel=1e-5)


def test_colour_mean_of_each_prompt_and_channel():
    latents, frames = clips(known=2)
    expected = [[latents[i, :, 2:, :, :, j].mean() for j in range(6)] for i in range(3)]
    np.testing.assert_allclose(watch.colour_mean(latents, frames), expected, atol=1e-6)


def test_first_frame_error_is_zero_where_known_frames_are_kept():
    latents, frames = clips(known=2)
    assert float(watch.first_frame_error(latents, frames)) == 0
    latents[:, :, 1] += 3
    assert float(watch.first_frame_error(latents, frames)) == pytest.approx(math.sqrt(9 / 2), rel=1e-6)


def test_diversity_over_pairs_of_seeds():
    latents, frames = clips(shape=(3, 4, *SHAPE[2:]))
    distances = [
        np.sqrt(np.mean((latents[i, a, 1:] - latents[i, b, 1:]) ** 2))
        for i in range(3)
        for a, b in itertools.combinations(range(4), 2)
    ]
    assert len(distances) == 18
    assert float(watch.diversity(latents, frames)) == pytest.approx(np.mean(distances), rel=1e-5)


def test_deviation_is_one_number_about_the_channels_means():
    latents, frames = clips()
    x = latents[:, :, 1:].reshape(-1, 6).astype(np.float64)
    assert float(watch.deviation(latents, frames)) == pytest.approx(np.sqrt(x.var(axis=0).mean()), rel=1e-5)


def test_measures_are_those_that_the_shapes_have():
    everything = {"motion", "first_frame_error", "diversity", "colour_mean", "deviation"}
    assert watch.measure(*clips()).keys() == everything
    images = clips(shape=(3, 1, 1, 4, 4, 6), known=0)
    assert watch.measure(*images).keys() == {"colour_mean", "deviation"}
    half = [jnp.asarray(x, jnp.bfloat16) for x in clips()]
    assert all(value.dtype == jnp.float32 for value in watch.measure(*half).values())


def make(latents, teacher=None, known=None, **changes):
    """A watch whose student gives `latents`, compared with clips(0)."""
    if teacher is None:
        teacher, known = clips()
    config = WatchConfig(**{"every": 1, "prompts": 3, "warmup": 0, **changes})
    return Watch.create(config, lambda params: jnp.asarray(latents), teacher=teacher, known=known)


def test_a_student_that_is_its_teacher_crosses_nothing():
    found = make(clips()[0]).look({}, {}, 1, {})
    assert found.crossed == () and found.starts == {}
    expected = {"motion": 1, "diversity": 1, "colour_shift": 0, "first_frame_error": 0}
    assert found.scalars == pytest.approx({f"watch/{name}": value for name, value in expected.items()})


def test_the_shift_of_one_channel_for_one_prompt_counts():
    latents, known = clips()
    moved = latents.copy()
    moved[1, ..., 4] += 2
    value = make(moved).look({}, {}, 1, {}).scalars["watch/colour_shift"]
    assert value == pytest.approx(2 / math.sqrt(3) / float(watch.deviation(latents, known)), rel=1e-4)


def test_first_frame_errors_are_compared_above_a_least_one():
    teacher, known = clips()
    student = teacher.copy()
    student[:, :, 0] += 1
    unit = float(watch.deviation(teacher, known))
    value = make(student).look({}, {}, 1, {}).scalars["watch/first_frame_error"]
    assert value == pytest.approx(1 / (watch.LEAST_ERROR * unit), rel=1e-4)
    teacher[:, :, 0] += 0.5
    value = make(student, teacher, known).look({}, {}, 1, {}).scalars["watch/first_frame_error"]
    assert value == pytest.approx(2, rel=1e-4)


def still(x):
    return np.repeat(x[:, :, :1], x.shape[2], axis=2)


CROSSINGS = [
    (still, {"diversity_low": 0.0, "colour_shift": 0.0}, r"^motion 0 of the teacher's is below 0.5$"),
    (lambda x: 3 * x, {"colour_shift": 0.0, "first_frame_error": 0.0}, r"^motion \S+ of the teacher's is above 2$"),
    (lambda x: np.repeat(x[:, :1], 2, axis=1), {}, r"^diversity 0 of the teacher's is below 0.5$"),
    (
        lambda x: x + 1,
        {"first_frame_error": 0, "motion_high": 0},
        r"^colour shift \S+ of the .*deviation is above 0.5$",
    ),
    (lambda x: np.concatenate([x[:, :, :1] + 1, x[:, :, 1:]], 2), {}, r"^first-frame error \S+ times .* is above 3$"),
]


@pytest.mark.parametrize(("change", "off", "said"), CROSSINGS)
def test_each_line_of_the_samples(change, off, said):
    latents = change(clips()[0])
    (crossed,) = make(latents, **off).look({}, {}, 1, {}).crossed
    assert re.search(said, crossed), crossed
    off = dict.fromkeys(["motion_low", "motion_high", "diversity_low", "colour_shift", "first_frame_error"], 0.0)
    assert make(latents, **off).look({}, {}, 1, {}).crossed == ()
    assert make(latents, warmup=1).look({}, {}, 1, {}).crossed == (), "the warm-up judges nothing"


def test_samples_that_are_not_finite_cross_the_lines():
    latents = clips()[0]
    latents[0, 0, 1, 0, 0, 0] = np.nan
    crossed = make(latents).look({}, {}, 1, {}).crossed
    assert "motion nan of the teacher's is not a number" in crossed and len(crossed) == 3


def losses(values, *, start=(1.0, 1.0), **changes):
    """A look at (generator, critic) losses after one at `start`."""
    held = make(clips()[0], critic="loss/critic", warmup=1, **changes)
    names = ("loss/student", "loss/critic")
    first = held.look({}, dict(zip(names, start, strict=True)), 1, {})
    assert not first.crossed
    return held.look({}, dict(zip(names, values, strict=True)), 2, first.starts)


@pytest.mark.parametrize(
    ("start", "values", "ratio", "stall"),
    [
        ((0.5, 0.5), (0.5, 0.5), 1, 1),
        ((0.5, 0.5), (2.0, 0.5), 4, 0.25),
        ((0.5, 0.5), (0.1, 2.0), 0.05, 20),
        ((0.5, 0.5), (0.1, 0.4), 0.25, 0),  # the critic is better than at its start
        ((4.0, 0.04), (0.7, 0.7), 0.01, 1),  # a critic that was far ahead at first and is met half-way
        ((0.02, 2.0), (0.02, 2.0), 1, 1),  # losses of another size
        ((0.5, 0.5), (0.0, 2.0), 0, math.inf),
        ((0.5, 0.5), (2.0, 0.0), math.inf, 0),
    ],
)
def test_ratio_and_stall(start, values, ratio, stall):
    scalars = losses(values, start=start, loss_ratio=0, critic_stall=0).scalars
    assert scalars["watch/loss_ratio"] == pytest.approx(ratio)
    assert scalars["watch/critic_stall"] == pytest.approx(stall)


def test_the_lines_of_the_losses():
    (crossed,) = losses((60.0, 1.0)).crossed
    assert crossed == "loss/student over loss/critic 60 times its start is above 50"
    (crossed,) = losses((0.1, 2.0)).crossed
    assert crossed == "critic stalled: loss/critic 20 times loss/student is above 10"
    assert losses((0.1, 2.0), critic_stall=0.0).crossed == ()


def test_gradient_norms_grow_from_the_mean_of_the_warm_up():
    held, name, starts = make(clips()[0], warmup=2), "grad_norm/student", {}
    for step, value in enumerate((0.0, 3.0), 1):
        starts = held.look({}, {name: value}, step, starts).starts
    assert starts == {name: [3.0]}, "zero is no start"
    assert held.look({}, {name: 30.0}, 3, starts).scalars["watch/grad_norm/student"] == pytest.approx(10)
    found = held.look({}, {name: 63.0}, 3, starts)
    assert found.crossed == ("grad_norm/student 21 times its start is above 20",) and found.starts == starts
    late = held.look({}, {name: 5.0, "grad_norm/late": 7.0}, 3, starts)
    assert late.scalars["watch/grad_norm/late"] == 1 and late.starts == {**starts, "grad_norm/late": [7.0]}
    assert starts == {name: [3.0]}, "a look changes nothing that it is given"


def test_losses_that_make_no_ratio_are_refused():
    held = make(clips()[0], critic="loss/critc")
    with pytest.raises(UserError, match=r"watch.critic is 'loss/critc'.*they have loss/critic, loss/student"):
        held.look({}, {"loss/student": 1.0, "loss/critic": 1.0}, 1, {})
    with pytest.raises(UserError, match="loss/student is -1"):
        losses((1.0, 1.0), start=(-1.0, 1.0))


def test_teachers_that_can_not_be_compared_with_are_refused():
    teacher, known = clips()
    with pytest.raises(UserError, match="teacher's motion on the watch's prompts is 0"):
        make(teacher, still(teacher), known)
    with pytest.raises(UserError, match="teacher's diversity on the watch's prompts is 0"):
        make(teacher, np.repeat(teacher[:, :1], 2, axis=1), known)
    with pytest.raises(ValueError, match="4 prompts and 2 seeds"):
        make(teacher, prompts=4)
    with pytest.raises(ValueError, match="nothing is left"):
        make(teacher, teacher[:, :, :1], known)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"every": -1}, "every must not be negative"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"motion_high": 0.4}, "motion_high 0.4 must be above motion_low 0.5"),
        ({"on_breach": "rolback"}, "rollback"),
    ],
)
def test_configs_that_make_no_sense_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        settings.build(WatchConfig, values)
    assert settings.build(WatchConfig, {"motion_high": 0.0}).motion_low == 0.5


# Collapse, provoked and caught


def moved(student):
    """Known frames, then frames to and fro by `gain`; seeds differ by `spread`, channel 0 is off by `colour`."""
    shown, known = (jnp.asarray(x) for x in clips())
    start, seeds = shown[:, :, :1], student["spread"] * shown[:, :, 1:2] / 2
    path = student["gain"] * jnp.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 4, 1, 1, 1)
    colour = student["colour"] * jnp.eye(1, 6).reshape(1, 1, 1, 1, 1, 6)
    return jnp.concatenate([start, start + path + seeds + colour], axis=2), known


@pytest.mark.parametrize(
    ("handle", "target", "said"),
    [("gain", 0.0, "motion"), ("spread", 0.0, "diversity"), ("colour", 3.0, "colour shift"), ("gain", 1.0, None)],
)
def test_a_collapsing_student_is_caught(toys, tmp_path, handle, target, said):
    class Collapsing(toys.Line):
        def init(self, key):
            return {"student": {"gain": jnp.ones(()), "spread": jnp.ones(()), "colour": jnp.zeros(())}}

        def losses(self, params, batch, key, step):
            return {"student": (params["student"][handle] - target) ** 2}, {}

    method = Collapsing()
    teacher, known = moved(method.init(None)["student"])
    config = WatchConfig(every=4, prompts=3, warmup=4)
    held = Watch.create(config, jax.jit(lambda params: moved(params["student"])[0]), teacher=teacher, known=known)
    arguments = {"config": loop.TrainConfig(steps=32, save_every=4), "optimizers": {"student": toys.sgd(0.05)}}
    if said is None:
        assert toys.train(method, toys.Points(), tmp_path, **arguments, watch=held).step == 32
        return
    with pytest.raises(UserError, match=rf"^step \d+: {said} \S+ of [^;]*; the watch stops .* checkpoint is \S+\d\. "):
        toys.train(method, toys.Points(), tmp_path, **arguments, watch=held)


class Shift:
    """Numbers around 0 that a generator moves to those around 2; a linear critic tells them apart (R3GAN's losses)."""

    roles = ("generator", "critic")

    def __init__(self, penalty=0.5):
        self.cadence, self.frozen, self.penalty = {}, {}, penalty

    def init(self, key):
        return {"generator": {"shift": jnp.zeros(())}, "critic": {"slope": jnp.full((), 0.5)}}

    def losses(self, params, batch, key, step):
        slope, x = params["critic"]["slope"], batch["x"] / 4
        made = x + params["generator"]["shift"]
        gap = slope * (2 - x - made)
        critic = jnp.mean(jax.nn.softplus(-gap)) + self.penalty * slope**2
        return {"generator": jnp.mean(jax.nn.softplus(gap)), "critic": critic}, {}


def adversarial(toys, folder, rates, penalty=0.5, **changes):
    """A run of 240 steps with the rates of (generator, critic); only the lines of losses and gradients are drawn."""
    lines = dict.fromkeys(["motion_low", "motion_high", "diversity_low", "colour_shift", "first_frame_error"], 0.0)
    names = {"generator": "loss/generator", "critic": "loss/critic"}
    return toys.train(
        Shift(penalty),
        toys.Points(64),
        folder,
        config=loop.TrainConfig(steps=240, save_every=20, log_every=20),
        optimizers={role: toys.sgd(rate) for role, rate in zip(Shift.roles, rates, strict=True)},
        watch=make(clips()[0], **{"every": 20, "warmup": 40, **names, **lines, **changes}),
    )


def test_a_critic_that_does_not_learn_is_caught(toys, tmp_path):
    with pytest.raises(UserError, match=r": critic stalled: loss/critic \S+ times loss/generator is above 10;"):
        adversarial(toys, tmp_path, (0.2, 0.0))
    stalls = [line["watch/critic_stall"] for line in metrics.read(tmp_path) if "watch/critic_stall" in line]
    assert len(stalls) > 3 and stalls[2] < 10 < stalls[-1]


def test_a_critic_that_learns_is_left_alone(toys, tmp_path):
    result = adversarial(toys, tmp_path, (0.2, 0.2))
    assert result.step == 240
    assert float(result.state.params["generator"]["shift"]) == pytest.approx(2, abs=0.2)
    assert max(line.get("watch/critic_stall", 0) for line in metrics.read(tmp_path)) < 2


def test_a_critic_that_runs_away_is_caught(toys, tmp_path):
    with pytest.raises(UserError, match=r": loss/generator over loss/critic \S+ times its start is above 10;"):
        adversarial(toys, tmp_path, (1e-4, 0.2), penalty=0.0, warmup=20, loss_ratio=10.0)


class Painter:
    """A method whose samples are the prompt's number plus noise: times the student's parameter, or the teacher's."""

    config = ConditioningConfig(known_frames=(0.0, 1.0))
    frozen: ClassVar = {"teacher": jnp.float32(2.0)}

    def sample(self, params, record, key, *, known, keep):
        assert known == 1 and not keep, "the walk's own version of the known frame"
        noise = jax.random.normal(key, record["latents"].shape)
        return record["latents"] + params["student"] * params["teacher"] * noise

    def reference(self, params, record, key, *, known, steps, keep):
        return self.sample({**params, "student": jnp.float32(steps)}, record, key, known=known, keep=keep)


def test_a_method_with_a_teacher_is_watched_on_fixed_prompts_and_noise():
    config = WatchConfig(every=1, prompts=3, seeds=2, warmup=0, teacher_steps=5, colour_shift=0.0)
    latents = np.arange(3, dtype=np.float32).repeat(2)[:, None, None, None, None] * np.ones((6, 3, 4, 4, 2), np.float32)
    made = Watch.of(config, Painter(), {"latents": jnp.asarray(latents)}, key=jax.random.key(0))
    assert made.known.shape == (3, 1, 4, 4, 2) and made.known[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    found = made.look({"student": jnp.float32(5.0)}, {}, 1, {})
    assert found.crossed == () and found.scalars["watch/diversity"] == pytest.approx(1)
    assert found.scalars["watch/first_frame_error"] == pytest.approx(1), "from the same noise as the teacher's"
    still = made.look({"student": jnp.float32(0.5)}, {}, 1, {})
    assert still.scalars["watch/diversity"] == pytest.approx(0.1, rel=1e-4)
    assert any(line.startswith("diversity 0.1 of the teacher's is below 0.5") for line in still.crossed)


def test_a_method_without_a_teacher_is_not_watched():
    with pytest.raises(UserError, match=r"this method has none: set config.watch.every to 0"):
        Watch.of(WatchConfig(every=1), object(), {"latents": jnp.zeros((16, 3, 4, 4, 2))}, key=jax.random.key(0))
