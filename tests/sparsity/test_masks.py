"""Counts, thresholds and shares against numpy, with ties, over seeds and patterns; what makes no sense is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.sparsity import masks

SEEDS = range(4)
SHAPES = {"a": (2, 16, 12), "b": (32, 24), "c": (3, 8, 4)}


def draw(seed, *, tied, shapes=SHAPES):
    """Random scores; tied ones are a few integers, as weights that come from int8 are."""
    rng = np.random.default_rng(seed)
    made = {path: rng.integers(0, 4, shape) if tied else rng.random(shape) for path, shape in shapes.items()}
    return {path: score.astype(np.float32) for path, score in made.items()}


def ones(scores):
    return {path: np.ones(score.shape, bool) for path, score in scores.items()}


@functools.cache
def program(pattern, distribution):
    return jax.jit(functools.partial(masks.make(pattern, distribution), {}))


def make(pattern, scores, sparsity, *, distribution="column", previous=None):
    """The masks, by a program that knows the sparsity only when it runs."""
    found = program(pattern, distribution)(scores, np.float32(sparsity), previous or ones(scores))
    assert all(found[path].shape == score.shape and found[path].dtype == bool for path, score in scores.items())
    return jax.device_get(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75])
def test_columns_drop_the_same_number_of_the_lowest(seed, tied, sparsity):
    scores = draw(seed, tied=tied)
    for path, mask in make("unstructured", scores, sparsity).items():
        rows = scores[path].shape[-2]
        dropped = round(sparsity * rows)
        # stable: of equal scores the first are dropped
        ranks = np.argsort(np.argsort(scores[path], axis=-2, kind="stable"), axis=-2, kind="stable")
        np.testing.assert_array_equal(mask, ranks >= dropped)
        np.testing.assert_array_equal(mask.sum(-2), rows - dropped)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 8), (32, 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_group_keeps_its_n_largest(seed, n, m, tied):
    scores = draw(seed, tied=tied, shapes={"a": (2, 128, 5), "b": (64, 3)})
    for path, mask in make(f"{n}:{m}", scores, 1 - n / m).items():
        for layer, own in zip(mask.reshape(-1, *mask.shape[-2:]), scores[path].reshape(-1, *mask.shape[-2:])):
            for start in range(0, own.shape[0], m):
                group, kept = own[start : start + m], layer[start : start + m]
                assert (kept.sum(0) == n).all()
                lowest_kept = np.where(kept, group, np.inf).min(0)
                assert (np.where(kept, -np.inf, group).max(0) <= lowest_kept).all()


def test_on_the_way_to_n_of_m_more_are_kept():
    scores = draw(0, tied=False, shapes={"a": (16, 6)})
    for sparsity, kept in ((0.0, 8), (0.2, 6), (0.375, 5), (0.5, 4), (0.9, 4)):
        counts = make("4:8", scores, sparsity)["a"].reshape(2, 8, 6).sum(1)
        assert (counts == kept).all(), "and never fewer than n"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distribution", ["column", "layer", "global", "erk"])
def test_blocks_are_kept_or_dropped_whole(seed, distribution):
    scores = draw(seed, tied=False)
    tiles = {path: s.reshape(*s.shape[:-2], s.shape[-2] // 4, 4, s.shape[-1] // 2, 2) for path, s in scores.items()}
    by_hand = make("unstructured", {p: t.mean((-3, -1)) for p, t in tiles.items()}, 0.5, distribution=distribution)
    dropped = 0
    for path, mask in make("block 4x2", scores, 0.5, distribution=distribution).items():
        blocks = mask.reshape(tiles[path].shape)
        np.testing.assert_array_equal(blocks.any((-3, -1)), blocks.all((-3, -1)))
        np.testing.assert_array_equal(blocks.any((-3, -1)), by_hand[path])
        dropped += (~mask).sum()
    assert dropped == pytest.approx(0.5 * sum(s.size for s in scores.values()), rel=0.03)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_have_thresholds_of_their_own(seed, sparsity, tied):
    scores = draw(seed, tied=tied)
    for path, mask in make("unstructured", scores, sparsity, distribution="layer").items():
        score = scores[path].reshape(-1, scores[path].shape[-2] * scores[path].shape[-1])
        k = round(sparsity * score.shape[1])
        for own, kept in zip(score, mask.reshape(score.shape)):
            np.testing.assert_array_equal(kept, own >= np.partition(own, k)[k])
            assert (~kept).sum() <= k if tied else (~kept).sum() == k


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("tied", [False, True])
def test_all_kernels_share_one_threshold(seed, sparsity, tied):
    scores = draw(seed, tied=tied)
    every = np.concatenate([score.ravel() for score in scores.values()])
    k = round(sparsity * every.size)
    found = make("unstructured", scores, sparsity, distribution="global")
    for path, mask in found.items():
        np.testing.assert_array_equal(mask, scores[path] >= np.partition(every, k)[k])
    dropped = sum((~mask).sum() for mask in found.values())
    assert dropped <= k if tied else dropped == k


def erk_by_hand(shapes, sparsity):
    """Kernels that would have to keep more than all of themselves are made full, one after the other."""
    full = set()
    while True:
        rest = {path: s for path, s in shapes.items() if path not in full}
        budget = (1 - sparsity) * sum(map(np.prod, shapes.values())) - sum(np.prod(shapes[path]) for path in full)
        e = budget / sum(np.prod(s) * (s[-2] + s[-1]) / (s[-2] * s[-1]) for s in rest.values())
        densities = {path: e * (s[-2] + s[-1]) / (s[-2] * s[-1]) for path, s in rest.items()}
        if max(densities.values()) <= 1:
            return densities | dict.fromkeys(full, 1.0)
        full.add(max(densities, key=densities.get))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_erk_densities_are_their_formula(sparsity):
    shapes = {"wide": (2, 64, 256), "square": (4, 64, 64), "thin": (64, 8), "tiny": (8, 4)}
    found = jax.jit(lambda s: masks.erk_densities(shapes, s))(sparsity)
    wanted = erk_by_hand(shapes, sparsity)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[path] for path in shapes], [wanted[path] for path in shapes], rtol=1e-5)
    kept = sum(float(found[path]) * np.prod(shape) for path, shape in shapes.items())
    assert kept == pytest.approx((1 - sparsity) * sum(map(np.prod, shapes.values())), rel=1e-5)
    assert set(map(float, masks.erk_densities(shapes, 0.0).values())) == {1.0}
    scores = draw(0, tied=False, shapes=shapes)
    for path, mask in make("unstructured", scores, sparsity, distribution="erk").items():
        assert mask.mean() == pytest.approx(wanted[path], abs=2 / np.prod(shapes[path][-2:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_bisection_finds_what_partition_finds(seed):
    rng = np.random.default_rng(seed)
    values = np.abs(np.concatenate([rng.normal(size=50), rng.normal(size=50) * 1e-30, [0, 0, np.inf, 1e38, 1e-45]]))
    values = values.astype(np.float32)
    keys = jnp.asarray(values.view(np.uint32))
    of_rank = jax.jit(lambda keys, rank: masks.of_rank(lambda guess: jnp.sum(keys < guess), rank))
    for rank in (0, 1, 2, 3, 40, 100, len(values) - 1):
        assert np.uint32(of_rank(keys, rank)).view(np.float32) == np.partition(values, rank)[rank]
    assert of_rank(keys, len(values)) > keys.max()


@pytest.mark.parametrize(
    ("pattern", "distribution"),
    [
        ("4:8", "column"),
        *((p, d) for p in ("unstructured", "block 4x2") for d in ("column", "layer", "global", "erk")),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_pruned_goes_first_and_counts(pattern, distribution, tied):
    before = make(pattern, draw(0, tied=False), 0.25, distribution=distribution)
    # scores that would keep just what is pruned
    adverse = {path: score + 9 * ~before[path] for path, score in draw(1, tied=tied).items()}
    after = make(pattern, adverse, 0.5, distribution=distribution, previous=before)
    for path, mask in after.items():
        assert not (mask & ~before[path]).any()
    dropped = sum((~mask).sum() for mask in after.values())
    if not tied or distribution == "column":
        assert dropped == pytest.approx(sum(mask.size for mask in after.values()) / 2, abs=16)  # one block


@pytest.mark.parametrize(
    ("pattern", "distribution", "complaint"),
    [
        ("random", "column", "it must be like one of unstructured, 2:4, block 16x16"),
        ("0:4", "column", "it must be like one of"),
        ("block 4x0", "column", "it must be like one of"),
        ("4:4", "column", "0 < n < m"),
        ("2:4", "global", "with distribution 'column'"),
        ("3:8", "column", r"is a sparsity of 0.625, not of 0.5"),
        ("3:6", "column", "the 16 rows of a don't divide by 6"),
        ("block 16x8", "column", r"block 16x8 does not divide a of shape \(2, 16, 12\)"),
    ],
)
def test_nonsense_is_refused(pattern, distribution, complaint):
    scores = draw(0, tied=False)
    with pytest.raises(UserError, match=complaint):
        masks.make(pattern, distribution)({}, scores, 0.5, ones(scores))


@pytest.mark.parametrize("pattern", ["unstructured", "block 4x2"])
@pytest.mark.parametrize(("distribution", "what"), [("column", "a column of"), ("layer", "a layer of")])
def test_something_is_kept(pattern, distribution, what):
    scores = draw(0, tied=False)
    with pytest.raises(UserError, match=f"0.999 leaves nothing of {what}"):
        masks.make(pattern, distribution)({}, scores, 0.999, ones(scores))


@pytest.mark.parametrize(
    ("pattern", "distribution"),
    [("4:8", "column"), *(("unstructured", d) for d in ("column", "layer", "global", "erk")), ("block 4x2", "column")],
)
def test_masks_do_not_depend_on_the_mesh(pattern, distribution):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    rules = ((r"a|c", ("fsdp", "tensor")), (r"b", ("tensor", "fsdp")))
    scores = draw(0, tied=True)
    laid = sharding.lay({path: jnp.asarray(score) for path, score in scores.items()}, mesh, rules)
    assert all(not score.sharding.is_fully_replicated for score in laid.values())
    wanted = make(pattern, scores, 0.5, distribution=distribution)
    for path, mask in make(pattern, laid, 0.5, distribution=distribution).items():
        np.testing.assert_array_equal(mask, wanted[path])
