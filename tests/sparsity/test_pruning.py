"""The schedule, the optax wrapper against hostile gradients, what training starts from, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten
from magic141_jax.settings import build
from magic141_jax.sparsity import pruning, structured
from magic141_jax.sparsity.pruning import PruningConfig, PruningState, pruned
from magic141_jax.train import optim

KERNELS = {"net.blocks.qkv.kernel": (3, 16, 8), "net.blocks.mlp_up.kernel": (3, 8, 32)}


def params(seed=0):
    """A role with two stacked kernels that are pruned, a bias and a kernel that aren't, and an empty part."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {"qkv": {"kernel": draw(3, 16, 8), "bias": draw(3, 8)}, "mlp_up": {"kernel": draw(3, 8, 32)}}
    return {"net": {"blocks": blocks, "patch_in": {"kernel": draw(4, 16)}, "nothing": {}}}


def run(transform, tree, gradient, *, updates):
    """Yields (parameters, updates, state) after each update, jitted and with donated state."""

    @jax.jit
    def step(tree, state):
        changes, state = transform.update(gradient(tree, state), state, tree)
        return optax.apply_updates(tree, changes), changes, state

    state = jax.jit(transform.init)(tree)
    advance = jax.jit(step, donate_argnums=(1,))
    for _ in range(updates):
        tree, changes, state = advance(tree, state)
        yield jax.device_get((tree, changes, state))


def transformer():
    """A role with a small transformer of three blocks of each kind, four heads and 16 neurons."""
    config = dataclasses.replace(
        mmdit.debug(), heads=4, width=16, head_width=8, mlp_ratio=1.0, double_blocks=3, single_blocks=3
    )
    network = Network.create(mmdit.MMDiT, config)
    shapes = flatten(network.abstract_params)
    rng = np.random.default_rng(0)
    drawn = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in shapes.items()}
    return config, {"transformer": unflatten(drawn)}


def loud(tree, state):
    """Gradients that pull every pruned weight far away and shrink every other one toward zero."""
    kept = pruning.project(state, jax.tree.map(jnp.ones_like, tree))
    return jax.tree.map(lambda p, stays: jnp.where(stays == 0, -100.0, p), tree, kept)


@pytest.mark.parametrize(("start", "end", "initial"), [(0, 10, 0.0), (4, 20, 0.2)])
def test_the_schedule_is_cubic(start, end, initial):
    config = PruningConfig(sparsity=0.8, start=start, end=end, initial=initial)
    middle = (start + end) // 2
    for update, wanted in {
        start: initial,
        middle: 0.8 + (initial - 0.8) * 0.125,
        end: 0.8,
        end + 5: 0.8,
        end - 1: 0.8 + (initial - 0.8) * (1 / (end - start)) ** 3,
    }.items():
        found = jax.jit(lambda t, c=config: pruning.sparsity_at(c, t))(update)
        assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_one_shot_is_the_end_at_once():
    config = PruningConfig(sparsity=0.5, start=3, end=3, initial=0.1)
    assert float(pruning.sparsity_at(config, 3)) == 0.5
    assert [t for t in range(9) if pruning.renews(config, t)] == [3]


def test_masks_are_renewed_at_their_updates_and_at_the_end():
    config = PruningConfig(sparsity=0.5, start=2, end=9, every=3)
    assert [t for t in range(15) if pruning.renews(config, t)] == [2, 5, 8, 9]


@pytest.mark.parametrize(
    ("pattern", "distribution"),
    [("unstructured", "column"), ("4:8", "column"), ("block 4x4", "erk"), ("unstructured", "global")],
)
def test_nothing_regrows_over_a_schedule_of_hostile_gradients(pattern, distribution):
    config = PruningConfig(sparsity=0.5, pattern=pattern, distribution=distribution, start=1, end=7, every=2)
    transform = pruned(optax.adamw(0.01, weight_decay=0.1), config)
    before = {path: np.ones(shape, bool) for path, shape in KERNELS.items()}
    for update, (tree, _, state) in enumerate(run(transform, params(), loud, updates=9)):
        masks = flatten(state.masks)
        assert masks.keys() == KERNELS.keys() and state.count == update + 1
        for path, mask in masks.items():
            assert not (mask & ~before[path]).any(), "a pruned weight is back"
            np.testing.assert_array_equal(flatten(tree)[path] == 0, ~mask)
            if not pruning.renews(config, update):
                np.testing.assert_array_equal(mask, before[path])
            elif pattern == "unstructured" and distribution == "column":
                wanted = float(pruning.sparsity_at(config, update)) * mask.shape[-2]
                assert ((~mask).sum(-2) == round(wanted)).all()
        before = masks
    dropped, size = (sum(f(mask) for mask in before.values()) for f in (lambda m: (~m).sum(), np.size))
    assert dropped == pytest.approx(size / 2, abs=16), "to a block"
    assert float(pruning.pruned_share(state)) == pytest.approx(dropped / size)


def test_updates_are_the_optimizers_own_bit_for_bit_but_where_pruned():
    inner = optax.adamw(0.01, weight_decay=0.1)
    config = PruningConfig(sparsity=0.5, end=2)
    tree = params()
    transform, state, plain = pruned(inner, config), pruned(inner, config).init(tree), inner.init(tree)
    for seed in range(3):
        grads = params(seed + 1)
        wanted, plain = inner.update(pruning.project(state, grads), plain, tree)
        changes, state = transform.update(grads, state, tree)
        masks = flatten(state.masks)
        for path, change in flatten(changes).items():
            expected = flatten(wanted)[path]
            if path in masks:
                expected = np.where(masks[path], expected, -flatten(tree)[path])
            np.testing.assert_array_equal(change, expected)
        tree = optax.apply_updates(tree, changes)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(plain), jax.device_get(state.inner))


def test_the_optimizer_sees_no_gradient_of_a_pruned_weight():
    config = PruningConfig(sparsity=0.75)
    transform = pruned(optax.trace(0.9), config)
    for _, _, state in run(transform, params(), lambda tree, _: jax.tree.map(jnp.ones_like, tree), updates=3):
        masks, moments = flatten(state.masks), flatten(state.inner.trace)
    for path, mask in masks.items():
        # once, before the mask was there
        np.testing.assert_allclose(moments[path], np.where(mask, 1 + 0.9 + 0.81, 0.81), rtol=1e-6)
    assert (moments["net.patch_in.kernel"] > 2).all()


def test_weights_may_regrow_where_asked():
    config = PruningConfig(sparsity=0.5, end=4, initial=0.5, regrow=True)
    seen = []
    for tree, _, state in run(pruned(optax.sgd(0.1), config), params(), loud, updates=6):
        masks = flatten(state.masks)
        for path, mask in masks.items():
            assert ((~mask).sum(-2) == mask.shape[-2] // 2).all()
            np.testing.assert_array_equal(flatten(tree)[path] == 0, ~mask)
        seen.append(masks)
    for path in seen[0]:
        assert (seen[1][path] == ~seen[0][path]).all(), "a step of 10 outscores every kept weight"
        assert (seen[5][path] == seen[4][path]).all(), "not after the end"


def test_zeros_may_be_inherited():
    tree = params()
    kernel = np.array(tree["net"]["blocks"]["qkv"]["kernel"])
    kernel[:, ::4] = 0
    kernel[0, :12, 0] = 0  # more than will be asked for
    tree["net"]["blocks"]["qkv"]["kernel"] = jnp.asarray(kernel)
    for sparsity in (0.0, 0.5):
        config = PruningConfig(sparsity=sparsity, inherit=True)
        assert config.active
        for now, _, state in run(pruned(optax.adam(0.1), config), tree, loud, updates=3):
            found = flatten(now)["net.blocks.qkv.kernel"]
            wanted = np.maximum((kernel == 0).sum(-2), round(sparsity * 16))
            np.testing.assert_array_equal((found == 0).sum(-2), wanted)
            assert (found[kernel == 0] == 0).all() and (flatten(state.masks)["net.blocks.mlp_up.kernel"].mean() <= 1)
    assert not PruningConfig().active


def test_norms_decide_which_stay():
    tree = params()
    norms = {path: np.ones(shape[:-1], np.float32) for path, shape in KERNELS.items()}
    norms["net.blocks.qkv.kernel"][1, :8] = 1e3
    transform = pruned(optax.sgd(0.0), PruningConfig(sparsity=0.5), norms)
    (_, _, state), *_ = run(transform, tree, loud, updates=1)
    mask = flatten(state.masks)["net.blocks.qkv.kernel"]
    assert mask[1, :8].all() and not mask[1, 8:].any() and mask[0, 8:].any()


def test_an_average_is_projected():
    tree = params()
    masks = {"net": {"blocks": {"qkv": {"kernel": tree["net"]["blocks"]["qkv"]["kernel"] > 0}}}}
    found = pruning.project(PruningState(masks, jnp.int32(0), None), tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for path, leaf in flatten(found).items():
        own = flatten(tree)[path]
        np.testing.assert_array_equal(leaf, jnp.maximum(own, 0) if path == "net.blocks.qkv.kernel" else own)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": -0.1}, "at least 0 and below 1"),
        ({"start": 5, "end": 4}, "0 <= start <= end"),
        ({"every": 0}, "1 <= every"),
        ({"sparsity": 0.2, "initial": 0.3}, "needs regrow"),
        ({"inherit": True, "regrow": True}, "choose one"),
        ({"pattern": "2 of 4"}, "must be like one of"),
        ({"distribution": "uniform"}, "distribution is 'uniform'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, complaint):
    with pytest.raises(UserError, match=complaint):
        build(PruningConfig, values)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"paths": "conv"}, "'conv' matches none of the kernels"),
        ({"end": 50}, "end 50 must be below the number of updates, 50"),
        ({"pattern": "3:6"}, "rows of net.blocks.mlp_up.kernel don't divide by 6"),
        ({"pattern": "1:4"}, "is a sparsity of 0.75, not of 0.5"),
        ({"score": "activation"}, "no safetensors file"),
        ({"sparsity": 0.97}, "leaves nothing of a column of net.blocks.mlp_up.kernel"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(values, complaint):
    optimizer, shapes = optim.make(optim.OptimizerConfig(), 50), jax.eval_shape(params)
    with pytest.raises(UserError, match=complaint):
        pruning.sparse(optimizer, PruningConfig(**{"sparsity": 0.5, **values}), shapes, updates=50)


def test_an_adapter_is_refused():
    optimizer = optim.make(optim.OptimizerConfig(), 50)
    with pytest.raises(UserError, match=r"set config.method.roles.student to 'full'"):
        pruning.sparse(optimizer, PruningConfig(sparsity=0.5), {"adapter": params()}, updates=50)


def test_an_optimizer_becomes_sparse(tmp_path):
    norms = {path.removeprefix("net."): np.ones(shape[:-1], np.float32) for path, shape in KERNELS.items()}
    save_file(norms, tmp_path / "norms.safetensors")
    config = PruningConfig(sparsity=0.5, score="activation", norms=str(tmp_path / "norms.safetensors"))
    optimizer = optim.make(optim.OptimizerConfig(), 50)
    made = pruning.sparse(optimizer, config, jax.eval_shape(params), updates=50)
    unchanged = {f.name for f in dataclasses.fields(made)} - {"transform", "project", "metrics"}
    assert all(getattr(made, name) is getattr(optimizer, name) for name in unchanged)
    (tree, _, state), *_ = run(made.transform, params(), loud, updates=1)
    assert float(made.metrics(state)["sparsity"]) == 0.5
    average = flatten(made.project(state, params()))
    assert all(((average[path] == 0) == (flatten(tree)[path] == 0)).all() for path in KERNELS)


def test_parameters_are_asked_for():
    transform, tree = pruned(optax.sgd(0.1), PruningConfig(sparsity=0.5)), params()
    with pytest.raises(ValueError, match="pruning needs the parameters"):
        transform.update(tree, transform.init(tree))


@pytest.mark.parametrize(
    ("kind", "sparsity", "left"),
    [
        ("heads", 0.5, {"heads": 2}),
        ("neurons", 0.25, {"mlp_width": 12}),
        ("blocks", 0.34, {"double_blocks": 2, "single_blocks": 2}),
    ],
)
def test_whole_units_are_silenced_on_schedule_and_then_cut_out(kind, sparsity, left):
    config, start = transformer()
    pruning_config = PruningConfig(sparsity=sparsity, pattern=kind, end=3)
    silent = []
    for tree, _, state in run(pruned(optax.sgd(0.05), pruning_config), start, loud, updates=6):
        zeros = {path: leaf == 0 for path, leaf in flatten(tree).items()}
        masks = flatten(state.masks)
        assert all((zeros[path][~mask]).all() for path, mask in masks.items())
        silent.append(sum(int((~mask).sum()) for mask in masks.values()))
    assert silent == sorted(silent) and silent[3] == silent[-1] > silent[0]
    shrunk, _ = structured.shrink(config, tree["transformer"])
    assert {name: getattr(shrunk, name) for name in left} == left
    assert any(path.endswith("bias") for path in masks), "a silent block adds no bias either"


def test_whole_units_need_a_transformer_and_equal_layers():
    with pytest.raises(UserError, match="this network is none"):
        pruning.first_masks(params(), PruningConfig(sparsity=0.5, pattern="heads"))
    with pytest.raises(UserError, match=r"leave pruning\.distribution at 'column'"):
        _, tree = transformer()
        chosen = PruningConfig(sparsity=0.5, pattern="neurons", distribution="global")
        pruning.new_masks(tree, chosen, pruning.first_masks(tree, chosen), norms=None, sparsity=0.5)
