"""Heads, neurons and blocks: the network without what is silent computes the same, forward and backward."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import settings, weights
from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, require_match, unflatten
from magic141_jax.sparsity.structured import (
    KINDS,
    OUTER,
    WRITERS,
    condense,
    groups,
    keep_best,
    members,
    mlp_ratio,
    operate,
    shrink,
    silence,
    sizes_of,
    unit_masks,
    unit_scores,
    units,
)

CONFIG = dataclasses.replace(
    mmdit.debug(), heads=3, head_width=8, double_blocks=2, single_blocks=3, refiner_blocks=2, mlp_ratio=1.5
)
BARE = dataclasses.replace(CONFIG, refiner_blocks=0, known="replace", in_channels=4)
STACKS = {"double_blocks": 2, "single_blocks": 3}


def random_params(config, seed=0):
    """Every parameter random, so that nothing is silent by itself."""
    rng = np.random.default_rng(seed)
    flat = flatten(Network.create(MMDiT, config).abstract_params)
    return unflatten({path: np.float32(rng.normal(0, 0.3, leaf.shape)) for path, leaf in flat.items()})


def random_scores(config, seed=1):
    """A score for each weight of the maps out of units, and for each block; layers differ in what is best."""
    rng = np.random.default_rng(seed)
    flat = flatten(Network.create(MMDiT, config).abstract_params)
    scores = {path: rng.random(leaf.shape) ** 8 for path, leaf in flat.items() if path.endswith("kernel")}
    return scores | {stack: rng.random(getattr(config, stack)) for stack in STACKS}


def silenced(config, params, **keep):
    """All but the best of each kind set to zero."""
    for kind, count in keep.items():
        params = silence(config, params, kind, random_scores(config), count)
    return params


@pytest.fixture(scope="module")
def run():
    """(config, params) -> the output, and the gradients of its weighted sum by x, text and pooled; compiled once."""
    programs = {}
    keys = jax.random.split(jax.random.key(7), 4)
    x = jax.random.normal(keys[0], (2, 2, 4, 4, 9))
    text, pooled = jax.random.normal(keys[1], (2, 6, 12)), jax.random.normal(keys[2], (2, 12))
    mask = jnp.arange(6)[None] < jnp.array([[6], [3]])
    weight = jax.random.normal(keys[3], (2, 2, 4, 4, 4))

    def run(config, params):
        if config not in programs:
            network = Network.create(MMDiT, config)
            known = jnp.zeros((2, 2, 4, 4, 1)).at[:, 0].set(1) if config.known == "replace" else None

            def loss(args, params):
                x, text, pooled = args
                out = network(params, x, jnp.array([0.2, 0.9]), text, mask, pooled, known=known)
                return (weight * out).sum(), out

            programs[config] = jax.jit(jax.grad(loss, has_aux=True))
        grads, out = programs[config]((x[..., : config.in_channels], text, pooled), params)
        return [out, *grads]

    return run


def assert_same(run, config, params, small):
    """A smaller network is what its config says, and computes the same."""
    network = Network.create(MMDiT, small[0])
    require_match(small[1], network.abstract_params, what="the smaller network")
    for have, want in zip(run(*small), run(config, params), strict=True):
        scale = float(jnp.abs(want).max())
        assert scale > 1e-3
        np.testing.assert_allclose(have, want, atol=2e-6 * max(scale, 1))


CASES = {
    "blocks": (CONFIG, {"blocks": {"double_blocks": 1, "single_blocks": 2}}, {"double_blocks": 1, "single_blocks": 2}),
    "all, no refiner": (
        BARE,
        {"blocks": {"single_blocks": 1}, "heads": 1, "neurons": 5},
        {"single_blocks": 1, "heads": 1, "mlp_ratio": 5 / 16},
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_the_smaller_network_computes_the_same(run, name):
    config, keep, sizes = CASES[name]
    params = random_params(config)
    silent = silenced(config, params, **keep)
    small = shrink(config, silent)
    assert small[0] == dataclasses.replace(config, **sizes)
    assert_same(run, config, silent, small)
    dense = run(config, params)[0]
    assert np.abs(run(config, silent)[0] - dense).max() > 1e-2, "what was silenced mattered"


def test_layers_that_are_silent_unequally_often(run):
    """Each keeps as many heads and neurons as the loudest: silent units fill up, whichever they are."""
    params = random_params(CONFIG)
    flat = flatten(silenced(CONFIG, params, heads=2, neurons=17))
    for path, rows in (("single_blocks.joint", 8), ("text_in.blocks", 8)):
        kernel = np.array(flat[f"{path}.attention_out.kernel"])
        kernel[0, : 2 * rows] = 0  # one more, or two, in the first layer alone; what leads in stays
        flat[f"{path}.attention_out.kernel"] = kernel
    kernel = np.array(flat["double_blocks.text.mlp_down.kernel"])
    kernel[1] = 0
    flat["double_blocks.text.mlp_down.kernel"] = kernel
    silent = unflatten(flat)
    small = shrink(CONFIG, silent)
    assert (small[0].heads, small[0].mlp_width) == (2, 17)
    assert_same(run, CONFIG, silent, small)


def test_what_is_chosen():
    """Heads with the largest sums of squares, of both streams where these share them; columns and rows go together."""
    params, scores = random_params(CONFIG), random_scores(CONFIG)
    scores["double_blocks.text.attention_out.kernel"][1, 16:] += 1
    silent = flatten(silence(CONFIG, params, "heads", scores, 1))
    streams = ("double_blocks.video", "double_blocks.text")
    sums = sum(np.square(scores[f"{s}.attention_out.kernel"]).reshape(2, 3, -1).sum(-1) for s in streams)
    best = sums.argmax(-1)
    assert len(set(best)) > 1, "else layers could share a choice"
    for stream in streams:
        for layer, head in enumerate(best):
            for path, axis in (
                (f"{stream}.qkv.kernel", -1),
                (f"{stream}.qkv.bias", -1),
                (f"{stream}.attention_out.kernel", 0),
            ):
                have, want = silent[path][layer], flatten(params)[path][layer]
                size = have.shape[axis] // 3
                kept = np.zeros(have.shape[axis], bool)
                kept[head * size : (head + 1) * size] = True
                kept = kept[:, None] if axis == 0 else kept
                np.testing.assert_array_equal(have, np.where(kept, want, 0))
    untouched = set(silent) - {p for p in silent if "qkv." in p or "attention_out.kernel" in p}
    assert all(np.array_equal(silent[path], flatten(params)[path]) for path in untouched)


def test_blocks_are_chosen_by_their_scores():
    params = random_params(CONFIG)
    scores = {"double_blocks": np.array([0.1, 0.2]), "single_blocks": np.array([3.0, 1.0, 2.0])}
    silent = silence(CONFIG, params, "blocks", scores, {"double_blocks": 1, "single_blocks": 2})
    config, small = shrink(CONFIG, silent)
    assert (config.double_blocks, config.single_blocks) == (1, 2)
    for stack, kept in (("double_blocks", [1]), ("single_blocks", [0, 2])):
        want = jax.tree.map(lambda leaf, kept=kept: leaf[kept], params[stack])
        jax.tree.map(np.testing.assert_array_equal, small[stack], want)
    jax.tree.map(np.testing.assert_array_equal, small["text_in"], params["text_in"])


def test_silent_streams_of_a_double_block_must_both_be_silent():
    flat = flatten(random_params(CONFIG))
    for leaf in ("attention_out.kernel", "attention_out.bias", "mlp_down.kernel", "mlp_down.bias"):
        flat[f"double_blocks.video.{leaf}"][0] = 0
    assert shrink(CONFIG, unflatten(flat))[0].double_blocks == 2
    flat = flatten(random_params(CONFIG))
    for leaf in ("attention_out.kernel", "mlp_down.kernel"):
        flat[f"single_blocks.joint.{leaf}"][1] = 0
    assert shrink(CONFIG, unflatten(flat))[0].single_blocks == 3, "its bias is added still"


def test_something_always_stays(run):
    """A head, a neuron and a block of each kind, however silent all of them are."""
    flat = flatten(random_params(BARE))
    silent = {k: np.zeros_like(v) if "blocks" in k and ("_out." in k or "_down." in k) else v for k, v in flat.items()}
    config, params = shrink(BARE, unflatten(silent))
    assert (config.heads, config.mlp_width, config.double_blocks, config.single_blocks) == (1, 1, 1, 1)
    require_match(params, Network.create(MMDiT, config).abstract_params, what="what stays")


@pytest.mark.parametrize("ratio", [1.5, 2.7])
def test_a_network_without_silent_units_stays_as_it_is(ratio):
    """Also its ratio of widths, which may not be the one of its neurons: 2.7 * 16 = 43.2."""
    config = dataclasses.replace(CONFIG, mlp_ratio=ratio)
    params = random_params(config)
    made, same = shrink(config, params)
    assert made == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_ratios_give_just_so_many_neurons():
    rng = np.random.default_rng(0)
    for width in (1, 3, 7, 16, 49, 255, 256, 1000, 3072, 5119):
        for neurons in {1, 2, 3, width, *rng.integers(1, 5 * width + 1, 300).tolist()}:
            ratio = json.loads(json.dumps(mlp_ratio(width, neurons)))
            assert MMDiTConfig(width=width, mlp_ratio=ratio).mlp_width == neurons, (width, neurons)
            assert float(str(ratio)) == ratio


def test_a_smaller_network_is_an_ordinary_component(tmp_path):
    config, params = shrink(CONFIG, silenced(CONFIG, random_params(CONFIG), heads=2, neurons=7))
    weights.save(tmp_path / "net", {"model": "mmdit", **settings.to_dict(config)}, params)
    written, read = weights.load(tmp_path / "net")
    assert written.pop("model") == "mmdit"
    again = settings.build(MMDiTConfig, written)
    assert again == config and (again.heads, again.mlp_width) == (2, 7)
    require_match(read, Network.create(MMDiT, again).abstract_params, what="what was read")
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_exactly_as_many_are_kept_where_scores_are_equal():
    kept = keep_best(jnp.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]]), 2)
    np.testing.assert_array_equal(kept, [[True, True, False], [False, True, True]])


@pytest.mark.parametrize("kind", ["heads", "neurons", "blocks"])
def test_masks_and_scores_of_units(kind):
    """A mask has the share of zeros that its units have, in every parameter of the group."""
    flat = flatten(Network.create(MMDiT, CONFIG).abstract_params)
    found = groups(CONFIG, kind)
    paths = [member.path for group in found for member in (*group.inner, *group.outer)]
    assert len(paths) == len(set(paths)) and set(paths) <= set(flat)
    for group in found:
        scores = {member.path: jnp.ones(flat[member.path].shape) for member in group.outer}
        values = unit_scores(group, scores)
        assert values.shape == ((group.layers,) if kind == "blocks" else (group.layers, group.units))
        entries = sum(flat[m.path].size for m in group.outer if m.path.endswith("kernel"))
        np.testing.assert_allclose(values, entries / values.size)
        kept = jnp.arange(group.units) > 0
        kept = kept if kind == "blocks" else jnp.broadcast_to(kept, values.shape)
        shapes = {member.path: flat[member.path].shape for member in (*group.inner, *group.outer)}
        for path, mask in unit_masks(group, kept, shapes).items():
            assert mask.shape == shapes[path] and mask.dtype == bool
            assert mask.mean() == pytest.approx(1 - 1 / group.units)


@pytest.mark.parametrize("config", [CONFIG, BARE])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_shapes_tell_the_sizes(config, prefix):
    flat = {prefix + path: leaf for path, leaf in flatten(Network.create(MMDiT, config).abstract_params).items()}
    found = sizes_of(flat)._asdict()
    assert found.pop("prefix") == prefix
    assert found == {name: getattr(config, name) for name in found}
    with pytest.raises(UserError, match="this network is none"):
        sizes_of({"layers.kernel": flat[f"{prefix}patch_in.kernel"]})


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_are_silent_go_first(kind):
    """Whatever their scores say: a mask made within another one has no unit that the other lacks."""
    flat = flatten(random_params(CONFIG))
    paths = [path for group in groups(CONFIG, kind) for path in members(group)]
    scores = {path: jnp.abs(flat[path]) for path in paths}
    everything = {path: jnp.ones(flat[path].shape, bool) for path in paths}
    first = units(flat, scores, 0.34, everything, kind=kind)
    assert first.keys() == everything.keys()
    turned = {path: jnp.where(first[path], score, 100 + score) for path, score in scores.items()}
    second = units(flat, turned, 0.67, first, kind=kind)
    for path, mask in second.items():
        assert not (mask & ~first[path]).any(), path
        assert mask.mean() <= first[path].mean() < 1
    assert any((mask != first[path]).any() for path, mask in second.items())
    last = units(flat, scores, 0.999, everything, kind=kind)
    assert all(mask.any() for mask in last.values()), "one always stays"


def test_mistakes_are_told():
    params, scores = random_params(CONFIG), random_scores(CONFIG)
    with pytest.raises(UserError, match="takes heads, neurons or blocks, not 'layers'"):
        silence(CONFIG, params, "layers", scores, 1)
    for kind, keep, message in (
        ("heads", 0, "double_blocks has 3 heads, of which 1 to all can be kept, not 0"),
        ("heads", 4, "not 4"),
        ("neurons", 25, "double_blocks has 24 neurons"),
        ("blocks", {"double_blocks": 0}, "double_blocks has 2 blocks"),
        ("blocks", {"single_blocks": 4}, "single_blocks has 3 blocks"),
        ("blocks", {"single": 1}, "no stack of blocks is named 'single'"),
    ):
        with pytest.raises(UserError, match=message):
            silence(CONFIG, params, kind, scores, keep)


@pytest.mark.parametrize(("kind", "keep"), [("heads", 2), ("neurons", 5)])
def test_surgery_takes_out_whole_units_and_moves_the_maps_out_of_them(kind, keep):
    """What is left shrinks without a change; with the Gram matrices of inputs that nothing correlates nothing moves."""
    params = random_params(CONFIG)
    kernels = {path: leaf for path, leaf in flatten(params).items() if re.search(OUTER[kind], path[: -len(".kernel")])}
    assert kernels.keys() == {m.path for group in groups(CONFIG, kind) for m in group.outer}
    rng = np.random.default_rng(0)
    x = {path: rng.normal(size=(leaf.shape[0], 40, leaf.shape[1])) for path, leaf in kernels.items()}
    grams = {path: np.einsum("lti,ltj->lij", v, v) for path, v in x.items()}
    made = operate(CONFIG, params, kind, grams, keep)
    small, left = shrink(CONFIG, made)
    assert getattr(small, {"heads": "heads", "neurons": "mlp_width"}[kind]) == keep
    plain = operate(
        CONFIG, params, kind, {p: np.eye(g.shape[-1])[None].repeat(len(g), 0) for p, g in grams.items()}, keep
    )
    for path, kernel in kernels.items():
        rows = (np.asarray(flatten(made)[path]) != 0).any(-1)
        errors = [
            np.linalg.norm(np.einsum("lti,lio->lto", x[path], np.where(rows[..., None], w, 0) - kernel))
            for w in (flatten(made)[path], kernel)
        ]
        assert errors[0] < errors[1], f"{path}: moving the others helps"
        stays = (np.asarray(flatten(plain)[path]) != 0).any(-1)
        np.testing.assert_allclose(np.asarray(flatten(plain)[path])[stays], kernel[stays], rtol=1e-5)
    require_match(left, Network.create(MMDiT, small).abstract_params, what="what is left")


@pytest.mark.parametrize("keep", [0, 99, {"blocks": 1}])
def test_surgery_that_makes_no_sense_is_refused(keep):
    with pytest.raises(UserError, match=r"can be kept|no stack of blocks"):
        operate(CONFIG, random_params(CONFIG), "heads", {}, keep)


@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["channels", "replace"])
def test_conditions_that_repeat_others_cost_nothing(run, config):
    """Half of the condition's values are copies of the others: without them the network computes the same."""
    params = flatten(random_params(config))
    half = config.width // 2
    for path, leaf in params.items():
        if re.search(WRITERS, path):
            params[path] = np.concatenate([leaf[..., :half], leaf[..., :half]], -1)
    params = unflatten(params)
    rows = np.random.default_rng(3).normal(size=(200, half))
    rows = np.concatenate([rows, rows], 1)
    small, cut = condense(config, params, jnp.asarray(rows.T @ rows), half)
    assert small == dataclasses.replace(config, condition_width=half)
    require_match(Network.create(MMDiT, small).abstract_params, cut, what="cut")
    for after, before in zip(run(small, cut), run(config, params)):
        # the surgeon's damping keeps the maps a percent or so from the exact solution
        np.testing.assert_allclose(after, before, rtol=0.05, atol=0.02 * float(jnp.abs(before).max()))


@pytest.mark.parametrize("keep", [0, 17])
def test_conditions_that_make_no_sense_are_refused(keep):
    with pytest.raises(UserError, match=f"1 to all can be kept, not {keep}"):
        condense(CONFIG, random_params(CONFIG), jnp.eye(16), keep)
