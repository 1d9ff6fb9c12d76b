"""DMD by its formulas: gradients, a Gaussian that is matched, roles, the guidance part, data forcing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion.timesteps import TimeDensity
from magic141_jax.distill.adversarial import DISCRIMINATOR, AdversarialConfig
from magic141_jax.distill.dmd import DMD, DMDConfig
from magic141_jax.distill.roles import FAKE, STUDENT, TEACHER, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.train import optim
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import make_step


def spread(t):
    return t[:, None, None, None, None]


def gaussian(p):
    """The velocity of the data N(mean, exp(log)^2), exactly."""

    def velocity(x, t, cond):
        t, variance = spread(t), jnp.exp(2 * p["log"])
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        return (x - (p["mean"] + gain * (x - (1 - t) * p["mean"]))) / jnp.maximum(t, 0.05)

    return velocity


def generator(p):
    """One step from noise: x0 = mean + scale noise."""
    return lambda x, t, cond: x - (p["mean"] + p["scale"] * x)


def toy(toys, **config):
    walk = WalkConfig(steps=1)
    config = DMDConfig(**{"guidance": 1.0, "walk": walk, **config})
    return DMD(config, toys.Formulas({TEACHER: gaussian, STUDENT: generator, FAKE: gaussian}))


def trainer(method, frozen, rates, *, updates):
    """The real step on a method of formulas, with `frozen` for the teacher's parameters, and its optimizers."""
    config = {"warmup_steps": 0, "weight_decay": 0.0, "decay": "constant", "ema_decay": 0.0, "b1": 0.0}
    optimizers = {r: optim.make(optim.OptimizerConfig(learning_rate=x, **config), updates) for r, x in rates.items()}
    seen = {"roles": method.roles, "cadence": method.cadence, "frozen": frozen, "losses": method.losses}
    return make_step(type("Toy", (), seen), optimizers), optimizers


def test_a_gaussian_is_matched_in_mean_and_in_deviation(toys):
    method = toy(toys, ratio=2)
    params = {
        STUDENT: {"mean": jnp.array(0.0), "scale": jnp.array(1.0)},
        FAKE: {"mean": jnp.array(0.0), "log": jnp.array(0.0)},
    }
    frozen = {TEACHER: {"mean": jnp.array(1.5), "log": jnp.log(0.5)}}
    step, optimizers = trainer(method, frozen, {STUDENT: 0.01, FAKE: 0.03}, updates=700)
    state = TrainState.create(params, optimizers)
    batch = {"video": {k: np.asarray(v) for k, v in toys.record(b=64, f=2).items()}}
    for number in range(700):
        state, metrics = step(state, batch, number)
    assert "student/video_matching" not in metrics, "step 699 does not update the student"
    student, fake = state.params[STUDENT], state.params[FAKE]
    assert float(student["mean"]) == pytest.approx(1.5, abs=0.15)
    assert abs(float(student["scale"])) == pytest.approx(0.5, abs=0.15)
    assert float(fake["mean"]) == pytest.approx(float(student["mean"]), abs=0.15)


def test_the_score_gradient_is_its_formula(toys):
    """Velocities that depend on the text alone: x0 = x_s - s v, and everything follows by hand."""

    def text_only(p):
        return lambda x, t, cond: jnp.zeros_like(x) + p * spread(cond.pooled.mean(-1))

    backbone = toys.Formulas({TEACHER: text_only, FAKE: text_only, STUDENT: text_only})
    params = {TEACHER: 2.0, FAKE: 0.5, STUDENT: 1.0}
    record = toys.record()
    cond = backbone.conditioning(params, "video", record, None)
    mask = cond.mask.at[:, 0].set(1.0)
    cond = dataclasses.replace(cond, mask=mask)
    x, word = jnp.zeros(record["latents"].shape), record["pooled"].mean(-1)
    for guidance in (1.0, 3.0):
        config = DMDConfig(guidance=guidance, score_range=(0.4999, 0.5))
        method = DMD(config, backbone)
        g, metrics = method.score_gradient(params, x, cond, record["latents"], jax.random.key(0))
        assert (np.asarray(g)[:, 0] == 0).all(), "known frames have no gradient"
        # x0 = noise / 2 - v / 2 here, and the empty caption's velocity is 0
        matching = -0.5 * 0.5 * word + 0.5 * 2.0 * word
        push = (guidance - 1) * (-0.5 * 2.0 * word)
        np.testing.assert_allclose(
            metrics["matching"], jnp.sqrt(jnp.mean(matching**2)), rtol=1e-3, err_msg=f"w = {guidance}"
        )
        np.testing.assert_allclose(metrics["guidance"], jnp.sqrt(jnp.mean(push**2)), rtol=1e-3, atol=1e-6)
        ratio = np.asarray(g)[:, 1:].mean((1, 2, 3, 4)) / np.asarray(matching - push)
        assert (ratio > 0).all(), "g points along fake minus real"


def test_data_forcing_shows_the_real_score_the_true_clip(toys):
    data = toys.record(b=4, seed=3)["latents"] + 5.0
    cond = toys.Formulas({}).conditioning({}, "video", toys.record(b=4), None)
    params = {
        TEACHER: {"mean": jnp.array(0.0), "log": jnp.array(1.0)},
        FAKE: {"mean": jnp.array(0.0), "log": jnp.array(1.0)},
    }
    x = jnp.zeros(data.shape)
    plain = toy(toys).score_gradient(params, x, cond, data, jax.random.key(0))[0]
    forced = toy(toys, data_forcing=1.0).score_gradient(params, x, cond, data, jax.random.key(0))[0]
    np.testing.assert_allclose(plain, 0, atol=1e-5)
    assert float(forced.mean()) < -0.3, "a step against g moves towards the data"


def test_the_guidance_part_may_look_at_noise_of_its_own(toys):
    cond = toys.Formulas({}).conditioning({}, "video", toys.record(), None)

    def worded(p):
        return lambda x, t, cond: p * x * spread(cond.pooled.mean(-1))

    backbone = toys.Formulas({TEACHER: worded, FAKE: worded})
    x, params = toys.record()["latents"], {TEACHER: 1.0, FAKE: 1.0}
    shared, own = (
        DMD(DMDConfig(own_guidance_time=flag), backbone).score_gradient(params, x, cond, x, jax.random.key(0))
        for flag in (False, True)
    )
    np.testing.assert_allclose(shared[1]["matching"], own[1]["matching"], atol=1e-6)
    assert abs(float(shared[1]["guidance"]) - float(own[1]["guidance"])) > 1e-4


@pytest.mark.heavy
def test_networks_are_trained_by_role(toys):
    config = DMDConfig(
        roles=RolesConfig(student="full", fake="adapter", rank=2),
        walk=WalkConfig(steps=2),
        known_frames=(0.0, 1.0),
        score_time=TimeDensity(kind="uniform", shift=5.0),
        ratio=2,
    )
    method = DMD.build(config, toys.parts())
    rates = optim.OptimizerConfig(learning_rate=1e-3, warmup_steps=0, clip_norm=0.0)
    optimizers = {role: optim.make(rates, 10) for role in method.roles}
    state, step = TrainState.create(method.init(jax.random.key(0)), optimizers), make_step(method, optimizers)
    before = jax.device_get(state.params)
    batch = {"image": toys.record(f=1), "video": toys.record()}
    state, metrics = step(state, batch, 0)
    assert metrics["finite"] and {"loss/student", "loss/fake", "student/image_guidance"} <= set(metrics)
    after = jax.device_get(state.params)
    state, metrics = step(state, batch, 1)
    later = jax.device_get(state.params)
    assert not any("student" in name for name in metrics)
    largest = {
        (role, when): max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), new[role], old[role])))
        for when, (new, old) in {"first": (after, before), "second": (later, after)}.items()
        for role in method.roles
    }
    assert largest[STUDENT, "first"] > 0 and largest[FAKE, "first"] > 0 and largest[FAKE, "second"] > 0
    assert largest[STUDENT, "second"] == 0
    assert method.sampling()["num_inference_steps"] == 2


def constants(**values):
    return {name: jnp.array(value) for name, value in values.items()}


FORMULAS = {
    STUDENT: constants(mean=0.3, scale=0.8),
    FAKE: constants(mean=0.2, log=0.1),
    TEACHER: constants(mean=1.5, log=-0.7),
}


def test_an_adversarial_term_is_added_and_changes_nothing_else(toys):
    plain, key, record = toy(toys, guidance=2.0), jax.random.key(3), toys.record()
    assert plain.roles == (STUDENT, FAKE), "its weight is 0"
    both = toy(toys, guidance=2.0, adversarial=AdversarialConfig(weight=0.25), matching=2.0)
    assert both.roles == (STUDENT, FAKE, DISCRIMINATOR)
    heads = both.init_role(DISCRIMINATOR, jax.random.key(0))
    part = jax.jit(lambda params: plain.part(params, "video", record, key))
    before, sizes = part(FORMULAS)
    part = jax.jit(lambda params: both.part(params, "video", record, key))
    after, found = part(FORMULAS | {DISCRIMINATOR: heads})
    assert before.keys() == {STUDENT, FAKE} and after.keys() == set(both.roles)
    assert after[FAKE] == before[FAKE] and {name: found[name] for name in sizes} == sizes
    np.testing.assert_allclose(after[STUDENT], 2 * before[STUDENT] + 0.25 * found[STUDENT, "adversarial"], rtol=1e-6)
    assert float(found[STUDENT, "adversarial"]) == pytest.approx(np.log(2)), "fresh heads find all latents alike"


@pytest.mark.heavy
@pytest.mark.parametrize("loss", ["relativistic", "non_saturating"])
def test_without_matching_the_adversary_alone_leads_the_student_to_the_data(toys, loss):
    """The data are N(1.5, 0.5^2), which no score says: neither the fake one nor the teacher is looked at."""
    adversarial = AdversarialConfig(weight=1.0, loss=loss, hidden=16, time_range=(0.05, 0.6))
    method = toy(toys, ratio=2, matching=0.0, adversarial=adversarial)
    assert method.roles == (STUDENT, DISCRIMINATOR)
    step, optimizers = trainer(method, {TEACHER: {}}, {STUDENT: 0.02, DISCRIMINATOR: 0.01}, updates=600)
    params = {
        STUDENT: constants(mean=0.0, scale=1.0),
        DISCRIMINATOR: method.init_role(DISCRIMINATOR, jax.random.key(0)),
    }
    state, record = TrainState.create(params, optimizers), toys.record(b=64, f=2)
    batch = {"video": {k: np.asarray(v) for k, v in record.items()}}
    batch["video"]["latents"] = 1.5 + 0.5 * batch["video"]["latents"]
    means = []
    for number in range(600):
        state, metrics = step(state, batch, number)
        means.append(float(state.params[STUDENT]["mean"]))
    assert not any("student" in name for name in metrics), "step 599 does not update the student"
    assert {"loss/discriminator", "discriminator/video_adversarial", "discriminator/video_r1"} < set(metrics)
    assert np.mean(means[-100:]) == pytest.approx(1.5, abs=0.2)


@pytest.mark.heavy
def test_a_students_step_is_down_its_own_loss(toys):
    """Nothing of the critic's loss comes in: twice the weight is twice the gradient."""
    norms = []
    for weight in (1.0, 2.0):
        method = toy(toys, matching=0.0, adversarial=AdversarialConfig(weight=weight, hidden=8))
        step, optimizers = trainer(method, {TEACHER: {}}, {STUDENT: 0.02, DISCRIMINATOR: 0.01}, updates=2)
        network = method.critic.heads
        params = {STUDENT: constants(mean=0.0, scale=1.0), DISCRIMINATOR: toys.random_params(network)}
        _, metrics = step(TrainState.create(params, optimizers), {"video": toys.record()}, 0)
        norms.append(float(metrics["grad_norm/student"]))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4) and norms[0] > 0


def test_the_fake_score_is_left_out_unless_something_looks_at_it():
    def roles(trunk, **config):
        return DMD(DMDConfig(adversarial=AdversarialConfig(weight=1.0, trunk=trunk), **config), None).roles

    assert roles("teacher", matching=0.0) == (STUDENT, DISCRIMINATOR)
    assert roles("fake", matching=0.0) == roles("teacher") == (STUDENT, FAKE, DISCRIMINATOR)


@pytest.mark.heavy
def test_networks_are_trained_against_an_adversary(toys):
    config = DMDConfig(
        roles=RolesConfig(student="adapter", rank=2),
        walk=WalkConfig(steps=1),
        known_frames=(0.0, 1.0),
        matching=0.0,
        adversarial=AdversarialConfig(weight=1.0, hidden=8, penalty=0.0),
        ratio=1,
    )
    method = DMD.build(config, toys.parts())
    rates = optim.OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0)
    optimizers = {role: optim.make(rates, 10) for role in method.roles}
    state, step = TrainState.create(method.init(jax.random.key(0)), optimizers), make_step(method, optimizers)
    norms = []
    for number in range(2):
        state, metrics = step(state, {"video": toys.record()}, number)
        norms.append({role: float(metrics[f"grad_norm/{role}"]) for role in method.roles})
    assert metrics["finite"] and norms[0][DISCRIMINATOR] > 0
    assert norms[0][STUDENT] == 0 < norms[1][STUDENT], "heads that find all alike lead nowhere, trained ones do"
    assert method.components(method.frozen | state.params).keys() == {"transformer"}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="score_range must rise"):
        DMDConfig(score_range=(0.5, 0.2))
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        DMDConfig(ratio=0)
    with pytest.raises(ValueError, match="must not both be 0"):
        DMDConfig(matching=0.0)
    with pytest.raises(ValueError, match="which matching=0 leaves out"):
        DMDConfig(matching=0.0, adversarial=AdversarialConfig(weight=1.0), roles=RolesConfig(weak=0.1))
