"""Roles start as the teacher, are trained apart, are merged for export; a student is sampled by its own walk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.distill.consistency import Consistency, ConsistencyConfig
from magic141_jax.distill.dmd import DMD, DMDConfig
from magic141_jax.distill.roles import FAKE, STUDENT, TEACHER, Backbone, RolesConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.distill.trajectory import Trajectory, TrajectoryConfig
from magic141_jax.errors import UserError
from magic141_jax.models import seam
from magic141_jax.pytree import flatten, require_match
from magic141_jax.sparsity import structured
from magic141_jax.train.conditioner import ConditioningConfig

CLEAN = ConditioningConfig(known_frames=(0.0, 1.0), history_noise_probability=0.0, caption_dropout=0.0)


def backbone(toys, parts=None, **config):
    parts = parts or toys.parts()
    return Backbone.create(RolesConfig(**{"rank": 4, **config}), parts, parts.conditioner(CLEAN))


def velocities(made, params, toys, roles):
    record = toys.record()
    cond = made.conditioning(params, "video", record, jax.random.key(0))
    t = jnp.array([0.4, 0.9])

    @jax.jit
    def all_of(params):
        return {role: made.velocity(params, role)(record["latents"], t, cond) for role in roles}

    return all_of(params)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["adapter", "full"])
def test_roles_start_as_the_teacher_and_leave_it_when_trained(toys, layout):
    made = backbone(toys, student=layout, fake=layout)
    params = {role: made.init(role, jax.random.key(i)) for i, role in enumerate((STUDENT, FAKE))}
    params[TEACHER] = made.frozen
    v = velocities(made, params, toys, (TEACHER, STUDENT, FAKE))
    np.testing.assert_allclose(v[STUDENT], v[TEACHER], atol=1e-6)
    np.testing.assert_allclose(v[FAKE], v[TEACHER], atol=1e-6)
    params[STUDENT] = jax.tree.map(lambda x: x + 0.05, params[STUDENT])
    moved = velocities(made, params, toys, (TEACHER, STUDENT, FAKE))
    assert np.abs(moved[STUDENT] - v[STUDENT]).max() > 1e-2
    np.testing.assert_array_equal(moved[TEACHER], v[TEACHER])
    _, config, transformer = made.components(params)["transformer"]
    exported = seam.velocity_fn(made.network, transformer)
    record = toys.record()
    cond = made.conditioning(params, "video", record, jax.random.key(0))
    again = exported(record["latents"], jnp.array([0.4, 0.9]), cond)
    np.testing.assert_allclose(again, moved[STUDENT], atol=3e-5)
    assert config == toys.SIZES


@pytest.mark.heavy
def test_gradients_flow_only_where_asked(toys):
    made = backbone(toys, student="adapter")
    params = {STUDENT: made.init(STUDENT, jax.random.key(0)), TEACHER: made.frozen}
    record = toys.record()
    cond = made.conditioning(params, "video", record, jax.random.key(0))

    def size(params, trained):
        v = made.velocity(params, STUDENT, trained=trained)(record["latents"], jnp.array([0.4, 0.9]), cond)
        return jnp.mean(v**2)

    grads = [jax.grad(size)(params, trained)[STUDENT] for trained in (True, False)]
    largest = [max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree)) for tree in grads]
    assert largest[0] > 0 and largest[1] == 0


def test_the_weak_teacher_takes_a_share_of_the_fake_scores_adapter(toys):
    made, plain = backbone(toys, weak=0.25), backbone(toys)
    fake = jax.tree.map(lambda x: x + 0.05, made.init(FAKE, jax.random.key(0)))
    params = {FAKE: fake, TEACHER: made.frozen}
    quarter = {FAKE: jax.tree_util.tree_map_with_path(lambda p, x: x / 4 if p[-1].key == "b" else x, fake)}
    weak = velocities(made, params, toys, (TEACHER,))[TEACHER]
    expected = velocities(plain, {**params, **quarter}, toys, (FAKE,))[FAKE]
    np.testing.assert_allclose(weak, expected, atol=1e-5)
    with pytest.raises(ValueError, match="weak needs"):
        RolesConfig(weak=0.1, fake="full")


def test_a_guidance_embedding_may_be_gained_and_adds_nothing_at_first(toys):
    made = backbone(toys, toys.parts(guidance_embedding=True), student="full", fake="full")
    params = {STUDENT: made.init(STUDENT, jax.random.key(0)), TEACHER: made.frozen}
    v = velocities(made, params, toys, (TEACHER, STUDENT))
    np.testing.assert_allclose(v[STUDENT], v[TEACHER], atol=1e-6)
    with pytest.raises(UserError, match="'full'"):
        backbone(toys, toys.parts(guidance_embedding=True))


def test_another_teacher_is_refused_by_name(toys):
    with pytest.raises(UserError, match="differ in width"):
        backbone(toys, toys.parts(width=32, heads=4))


def pruned_student(toys):
    """What changes in the config with 1 head, 20 of 32 neurons, 8 of 16 conditions; the teacher's parameters so cut."""
    rng = np.random.default_rng(0)
    params = toys.parts().teacher()["transformer"][1]
    for kind, keep in (("heads", 1), ("neurons", 20)):
        scores = {path: rng.random(leaf.shape) for path, leaf in flatten(params).items() if path.endswith("kernel")}
        params = structured.silence(toys.SIZES, params, kind, scores, keep)
    config, small = structured.shrink(toys.SIZES, params)
    config, small = structured.condense(config, small, jnp.eye(16), 8)
    return {name: getattr(config, name) for name in ("heads", "mlp_ratio", "condition_width")}, small


@pytest.mark.heavy
def test_a_pruned_student_learns_from_its_dense_teacher(toys):
    """Whole networks of their own sizes; a step of training on random data lowers the loss."""
    changes, small = pruned_student(toys)
    assert changes == {"heads": 1, "mlp_ratio": 1.25, "condition_width": 8}
    config = TrajectoryConfig(walk=WalkConfig(steps=2, sampler="euler"), guidance=2.0, substeps=2)
    method = Trajectory.build(config, toys.parts(**changes))
    params = method.init(jax.random.key(0))
    require_match(params[STUDENT]["transformer"], small, what="a fresh student")
    params[STUDENT] = {"transformer": small}

    @jax.jit
    def loss(student):
        both = {STUDENT: student, **method.frozen}
        return method.losses(both, {"video": toys.record()}, jax.random.key(1), 0)[0][STUDENT]

    before, grads = jax.value_and_grad(loss)(params[STUDENT])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda leaf, g: leaf - 1e-3 * g, params[STUDENT], grads)
    assert loss(moved) < before
    name, found, transformer = method.components(params)["transformer"]
    assert name == "mmdit" and found == dataclasses.replace(toys.SIZES, **changes)
    assert transformer is small


def test_a_pruned_student_has_a_fake_score_of_the_teachers_sizes(toys):
    changes, small = pruned_student(toys)
    for fake in ("adapter", "full"):
        made = backbone(toys, toys.parts(**changes), student="full", fake=fake)
        params = {FAKE: made.init(FAKE, jax.random.key(0)), TEACHER: made.frozen, STUDENT: {"transformer": small}}
        v = velocities(made, params, toys, (TEACHER, FAKE, STUDENT))
        np.testing.assert_allclose(v[FAKE], v[TEACHER], atol=1e-6)
        assert np.abs(v[STUDENT] - v[TEACHER]).max() > 1e-3
    with pytest.raises(
        UserError, match="must be 'full', since the student has another heads, mlp_ratio, condition_width"
    ):
        backbone(toys, toys.parts(**changes), student="adapter")


def test_a_student_walks_as_its_teacher_until_it_is_trained(toys):
    walk = WalkConfig(steps=3, sampler="euler")
    method = Consistency.build(ConsistencyConfig(walk=walk, guidance=1.0, known_frames=(0.0, 1.0)), toys.parts())
    params, record, key = method.init(jax.random.key(0)) | dict(method.frozen), toys.record(), jax.random.key(1)
    sample = jax.jit(method.sample, static_argnames=("known", "keep"))
    reference = jax.jit(method.reference, static_argnames=("known", "steps", "keep"))
    mine, other = sample(params, record, key, known=1), reference(params, record, key, known=1, steps=3)
    np.testing.assert_allclose(mine, other, atol=1e-5)
    np.testing.assert_array_equal(mine[:, 0], record["latents"][:, 0])
    own = sample(params, record, key, known=1, keep=False)
    assert np.abs(own[:, 0] - mine[:, 0]).max() > 1e-2
    np.testing.assert_array_equal(own[:, 1:], mine[:, 1:])
    moved = params | {STUDENT: jax.tree.map(lambda x: x + 0.05, params[STUDENT])}
    assert np.abs(sample(moved, record, key, known=1) - mine).max() > 1e-2
    np.testing.assert_array_equal(reference(moved, record, key, known=1, steps=3), other)


def test_the_reference_is_guided_and_never_weak(toys):
    def samples(**config):
        method = DMD.build(DMDConfig(known_frames=(1.0,), **config), toys.parts())
        params = method.init(jax.random.key(0)) | dict(method.frozen)
        params[FAKE] = jax.tree.map(lambda x: x + 0.05, params[FAKE])
        draw = jax.jit(method.reference, static_argnames=("known", "steps"))
        return np.asarray(draw(params, toys.record(), jax.random.key(1), known=0, steps=2))

    plain = samples(guidance=3.0)
    assert np.abs(samples(guidance=1.0) - plain).max() > 1e-3
    np.testing.assert_array_equal(samples(guidance=3.0, roles=RolesConfig(rank=4, weak=0.5)), plain)
