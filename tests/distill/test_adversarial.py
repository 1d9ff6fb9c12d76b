"""Penalties by autodiff, and a discriminator that learns and leads on tiny features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magic141_jax import sharding
from magic141_jax.diffusion import conditioning, flow
from magic141_jax.distill import roles
from magic141_jax.distill.adversarial import (
    DISCRIMINATOR,
    AdversarialConfig,
    Critic,
    discriminator_fn,
    gradient_penalty,
    noised_latents,
)
from magic141_jax.distill.roles import STUDENT, TEACHER, Backbone, RolesConfig
from magic141_jax.models import SHARDING_RULES, mmdit
from magic141_jax.models.discriminator import FeatureHeads, FeatureHeadsConfig, sample_logits
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.models.seam import features_fn
from magic141_jax.train.adversarial import ADVERSARIAL_LOSSES
from magic141_jax.train.conditioner import ConditioningConfig

LAYERS = (0, 1)


def random_params(network, scale):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), network.abstract_params)


@pytest.fixture(scope="module")
def trunk():
    """A transformer of one double and one single block, without any initial zero, and its parameters."""
    network = Network.create(MMDiT, mmdit.SIZES["debug"]())
    return network, random_params(network, 0.3)


@pytest.fixture(scope="module")
def heads(trunk):
    network = Network.create(FeatureHeads, FeatureHeadsConfig.on(trunk[0].config, LAYERS, hidden=16))
    return network, random_params(network, 0.4)


def condition(latents, known, seed=0):
    """A conditioning whose first `known` latent frames are those of `latents`."""
    rng = np.random.default_rng(seed)
    b, f = latents.shape[:2]
    text = jnp.asarray(rng.normal(size=(b, 3, 12)), jnp.float32)
    pooled = jnp.asarray(rng.normal(size=(b, 12)), jnp.float32)
    return conditioning.Conditioning(
        text, jnp.ones((b, 3), bool), pooled, *conditioning.known_latents(latents, known, f)
    )


def draw(batch=4, seed=0, shape=(2, 4, 4, 4)):
    keys = jax.random.split(jax.random.key(seed), 2)
    x0, noise = (jax.random.normal(key, (batch, *shape)) for key in keys)
    return x0, noise, jnp.linspace(0.2, 0.8, batch)


def smooth(x, scale=1.0):
    """A small smooth D whose gradient differs from sample to sample."""
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(5, *x.shape[1:])), x.dtype)
    return scale * jnp.tanh(0.3 * jnp.einsum("bfhwc,kfhwc->bk", x, weights)).sum(1) + 0.1 * jnp.square(x).sum(
        (1, 2, 3, 4)
    )


@pytest.mark.parametrize("known", [0, 1])
def test_the_penalty_is_the_squared_gradient_norm_over_unknown_latents(known):
    x, *_ = draw(shape=(2, 2, 2, 2))
    mask = condition(x, known).mask
    gradient = jax.grad(lambda x: smooth(x).sum())(x) * (1 - mask)
    want = 0.5 * jnp.square(gradient).sum((1, 2, 3, 4)).mean()
    penalty = functools.partial(gradient_penalty, smooth, x, known=mask, weight=0.5, sigma=1e-2)
    got = jax.jit(jax.vmap(penalty))(jax.random.split(jax.random.key(0), 4000)).mean()
    np.testing.assert_allclose(got, want, rtol=0.06)


def test_training_on_the_penalty_is_training_on_the_gradient_norm():
    """The derivative by a parameter of D, which for the norm itself takes second derivatives."""
    x, *_ = draw(shape=(2, 2, 2, 2))
    none = condition(x, 0).mask

    def norm(scale):
        return jnp.square(jax.grad(lambda x: smooth(x, scale).sum())(x)).sum((1, 2, 3, 4)).mean()

    def penalty(scale, key):
        return gradient_penalty(lambda x: smooth(x, scale), x, key, known=none, sigma=1e-2)

    keys = jax.random.split(jax.random.key(1), 4000)
    got = jax.jit(jax.vmap(jax.grad(penalty), (None, 0)))(0.7, keys).mean()
    np.testing.assert_allclose(got, jax.grad(norm)(0.7), rtol=0.06)


def test_the_penalty_probes_along_noise_and_takes_logits():
    x, *_ = draw()
    mask = condition(x, 1).mask
    key = jax.random.key(2)
    seen = []

    def judge(x):
        seen.append(x)
        return smooth(x)

    whole = gradient_penalty(judge, x, key, known=mask)
    np.testing.assert_array_equal(seen[0], x)
    np.testing.assert_array_equal(seen[1][:, :1], x[:, :1])
    np.testing.assert_allclose((seen[1] - x)[:, 1:], 0.1 * flow.draw_noise(key, x.shape)[:, 1:], atol=1e-6)
    given = gradient_penalty(judge, x, key, known=mask, logits=smooth(x))
    assert given == whole and len(seen) == 3
    alone = jax.vmap(lambda i: jnp.square(smooth(seen[1][i][None]) - smooth(x[i][None])))(jnp.arange(4))
    np.testing.assert_allclose(alone.mean() / 0.1**2, whole, rtol=1e-4)


@pytest.fixture(scope="module")
def judged(trunk, heads):
    """The compiled logits as a function of everything that they may depend on."""

    def logits(trunk_params, heads_params, x0, noise, t, cond):
        features = features_fn(trunk[0], trunk_params, LAYERS)
        return discriminator_fn(features, heads[0], heads_params)(noised_latents(x0, noise, t, cond), t, cond)

    return jax.jit(logits)


def test_logits_are_those_of_the_heads_on_the_trunk(trunk, heads, judged):
    x0, noise, t = draw()
    cond = condition(x0[::-1], jnp.array([0, 1, 1, 2]))
    x = jnp.where(
        cond.mask > 0, cond.known, (1 - t)[:, None, None, None, None] * x0 + t[:, None, None, None, None] * noise
    )
    inputs = jnp.concatenate([x, cond.known, cond.mask], -1)
    given = (inputs, t, cond.text, cond.text_mask, cond.pooled)
    _, features = jax.jit(lambda p: trunk[0](p, *given, intermediates=LAYERS))(trunk[1])
    tokens = heads[0](heads[1], features, t, cond.pooled)
    want = sample_logits(tokens, cond.mask, trunk[0].config.patch)
    got = judged(trunk[1], heads[1], x0, noise, t, cond)
    assert got.shape == (4,) and got[3] == 0 and jnp.unique(got).size == 4
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_known_latents_have_no_say_and_no_gradient(trunk, heads, judged):
    x0, noise, t = draw()
    cond = condition(x0, jnp.array([1, 1, 1, 0]))
    logits = judged(trunk[1], heads[1], x0, noise, t, cond)
    wandered = judged(
        trunk[1], heads[1], jnp.where(cond.mask > 0, 9.0, x0), jnp.where(cond.mask > 0, -5.0, noise), t, cond
    )
    np.testing.assert_array_equal(wandered, logits)

    gradient = jax.jit(jax.grad(lambda x0: judged(trunk[1], heads[1], x0, noise, t, cond).sum()))(x0)
    assert not gradient[:3, :1].any()
    assert (jnp.abs(gradient).max((2, 3, 4)) > 1e-5).sum() == 5, "every unknown frame has one, and no other"


def test_logits_depend_on_no_neighbour_and_no_mesh(trunk, heads, judged):
    x0, noise, t = draw()
    cond = condition(x0, jnp.array([0, 1, 0, 1]))
    logits = judged(trunk[1], heads[1], x0, noise, t, cond)
    turned = jax.tree.map(lambda a: a[jnp.array([1, 2, 1, 0])], (x0, noise, t, cond))
    np.testing.assert_allclose(judged(trunk[1], heads[1], *turned)[1:], logits[2::-1], atol=2e-5)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = (mmdit.SHARDING_RULES, SHARDING_RULES["feature_heads"])
    spread = [jax.device_put(p[1], sharding.shardings(p[1], mesh, r, small=1)) for p, r in zip((trunk, heads), rules)]
    got = judged(*spread, *sharding.shard_batch((x0, noise, t, cond), mesh))
    np.testing.assert_allclose(got, logits, atol=2e-5)


def example(key, batch):
    """Real, then fake latents, in noise; the pattern that they differ by; what they are noised and judged with."""
    pattern = jnp.outer(jnp.array([0.7, 0.1, 0.7, 0.1]), jnp.array([1.0, -1, 0.5, 0]))
    pattern = jnp.tile(pattern, (2, 4, 1, 1)).at[0].set(0)[None]  # frame 0 is known, and alike in both
    keys = jax.random.split(key, 3)
    x0 = 0.7 * flow.draw_noise(keys[0], (2 * batch, 2, 4, 4, 4))
    shared = {"noise": flow.draw_noise(keys[1], x0[:batch].shape), "t": 0.6 * jax.random.uniform(keys[2], (batch,))}
    shared["cond"] = condition(jnp.zeros_like(x0[:batch]), 1)
    shared = jax.tree.map(lambda a: jnp.concatenate([a, a]), shared)
    return jnp.concatenate([x0[:batch] + pattern, x0[batch:] - pattern]), pattern[0], shared


def test_a_discriminator_learns_and_leads_fakes_towards_the_real_ones(trunk, heads):
    """100 steps of the relativistic loss with R1 and R2 on the heads alone; then new latents are told apart."""
    network, optimizer = heads[0], optax.adam(1e-2)
    features = features_fn(*trunk, LAYERS)
    discriminator, generator = ADVERSARIAL_LOSSES["relativistic"]

    def loss(params, key):
        x0, _, shared = example(key, 16)
        x, t, cond = noised_latents(x0, **shared), shared["t"], shared["cond"]
        judge = functools.partial(discriminator_fn(features, network, params), t=t, cond=cond)
        logits = judge(x)
        penalty = gradient_penalty(judge, x, key, known=cond.mask, logits=logits, weight=0.01)
        return discriminator(*jnp.split(logits, 2)) + penalty

    def step(carry, key):
        gradient = jax.grad(loss)(carry[0], key)
        updates, state = optimizer.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    fresh = network.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 100)
    (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, keys))((fresh, optimizer.init(fresh)))

    x0, pattern, shared = jax.jit(example, static_argnums=1)(jax.random.key(9), 64)

    def lead(x0):
        judge = discriminator_fn(features, network, params)
        real, fake = jnp.split(judge(noised_latents(x0, **shared), shared["t"], shared["cond"]), 2)
        return generator(real, fake), real > fake

    gradient, right = jax.jit(jax.grad(lead, has_aux=True))(x0)
    assert right.mean() > 0.9
    assert (jnp.einsum("bfhwc,fhwc->b", -gradient[64:], pattern) > 0).mean() > 0.9
    assert not gradient[:, 0].any()


class Linear:
    """Heads that are an inner product with their parameters (d,)."""

    config = FeatureHeadsConfig(layers=(0, 1), patch=(1, 1, 1))

    def __call__(self, params, features, t, pooled):
        return features @ params


def test_a_critics_losses_are_their_formulas(toys):
    """With linear heads, the difference of D at real and at generated latents and |grad D| have a closed form."""
    config = AdversarialConfig(weight=3.0, time_range=(0.25, 0.25), penalty=0.5, sigma=1e-2)
    critic, record = Critic(config, toys.Formulas({}), Linear()), toys.record(b=3)
    cond = toys.Formulas({}).conditioning({}, "video", record, None)
    real, made, w = record["latents"], toys.record(b=3, seed=1)["latents"], jnp.arange(8.0) / 8 - 0.3

    @jax.jit
    def run(real, made, key):
        return critic.losses({DISCRIMINATOR: w}, real, made, cond, key)

    losses, metrics = run(real, made, jax.random.key(0))
    told, same = metrics[DISCRIMINATOR, "adversarial"], run(real, real, jax.random.key(0))[1]
    assert same[DISCRIMINATOR, "real"] == same[DISCRIMINATOR, "generated"] == metrics[DISCRIMINATOR, "real"]
    # both are noised alike, so that the noise cancels
    difference = 0.75 * (made - real).mean((1, 2, 3)) @ w[:4]
    got = metrics[DISCRIMINATOR, "generated"] - metrics[DISCRIMINATOR, "real"]
    np.testing.assert_allclose(got, difference.mean(), rtol=1e-4)
    np.testing.assert_allclose(told, np.log1p(np.exp(difference)).mean(), rtol=1e-4)
    np.testing.assert_allclose(losses[STUDENT], np.log1p(np.exp(-difference)).mean(), rtol=1e-4)
    assert metrics[STUDENT, "adversarial"] == losses[STUDENT]
    penalties = [metrics[DISCRIMINATOR, name] for name in ("r1", "r2")]
    np.testing.assert_allclose(losses[DISCRIMINATOR], told + sum(penalties), rtol=1e-6)
    assert penalties[0] != penalties[1], "each has noise of its own"
    keys = jax.random.split(jax.random.key(1), 2000)
    drawn = jax.vmap(lambda key: run(real, made, key)[1][DISCRIMINATOR, "r2"])(keys)
    tokens = real[0, ..., 0].size  # each of them has a say of 1 / tokens
    np.testing.assert_allclose(drawn.mean(), 0.5 * jnp.square(w[:4]).sum() / tokens, rtol=0.1)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["adapter", "full"])
def test_gradients_of_a_critic_reach_its_heads_and_the_students_unknown_latents(toys, layout):
    """And never the trunk, here the fake score."""
    parts = toys.parts()
    clean = ConditioningConfig(known_frames=(0.0, 1.0), history_noise_probability=0.0)
    backbone = Backbone.create(RolesConfig(rank=2, fake=layout), parts, parts.conditioner(clean))
    critic = Critic.create(AdversarialConfig(trunk=roles.FAKE, hidden=8, penalty=0.0), backbone)
    assert critic.heads.config.layers == (0, 1)
    fake = jax.tree.map(lambda leaf: leaf + 0.05, backbone.init(roles.FAKE, jax.random.key(0)))
    params = {TEACHER: backbone.frozen, roles.FAKE: fake, DISCRIMINATOR: random_params(critic.heads, 0.4)}
    record, made = toys.record(), toys.record(seed=1)["latents"]
    cond = backbone.conditioning(params, "video", record, jax.random.key(1))

    @jax.jit
    def run(params, made):
        def losses(params, made):
            return critic.losses(params, record["latents"], made, cond, jax.random.key(2))

        _, pull, metrics = jax.vjp(losses, params, made, has_aux=True)
        sides = (STUDENT, DISCRIMINATOR)
        return metrics, {role: pull({side: jnp.float32(side == role) for side in sides}) for role in sides}

    metrics, grads = run(params, made)
    to_latents = np.abs(grads[STUDENT][1]).max((2, 3, 4))
    assert (to_latents[:, 0] == 0).all() and (to_latents[:, 1:] > 0).all()
    for to_params, _ in grads.values():
        largest = {name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(to_params[name])) for name in params}
        assert largest[TEACHER] == largest[roles.FAKE] == 0 < largest[DISCRIMINATOR]
    moved, _ = run(params | {roles.FAKE: jax.tree.map(lambda leaf: leaf + 0.05, fake)}, made)
    assert moved[DISCRIMINATOR, "real"] != metrics[DISCRIMINATOR, "real"], "the trunk is the fake score as it is now"


def test_adversarial_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="time_range must rise"):
        AdversarialConfig(time_range=(0.5, 0.2))
    with pytest.raises(ValueError, match="sigma and hidden must be positive"):
        AdversarialConfig(sigma=0.0)
