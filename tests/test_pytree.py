"""Dotted paths, there and back, and differences that a person can read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import pytree
from magic141_jax.errors import UserError

TREE = {"b": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "a": jnp.arange(4), "c": {"d": {"e": jnp.ones(())}}}


def test_flatten_gives_sorted_dotted_paths_and_unflatten_undoes_it():
    flat = pytree.flatten(TREE)
    assert list(flat) == ["a", "b.bias", "b.kernel", "c.d.e"]
    back = pytree.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    jax.tree.map(np.testing.assert_array_equal, back, TREE)


def test_paths_agree_with_those_of_jax():
    leaves = jax.tree_util.tree_leaves_with_path(TREE)
    assert [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves] == list(pytree.flatten(TREE))


def test_count():
    assert pytree.count(TREE) == 6 + 3 + 4 + 1
    assert pytree.count(jax.eval_shape(lambda: TREE)) == 14


def test_cast_leaves_integers_alone():
    types = {path: leaf.dtype for path, leaf in pytree.flatten(pytree.cast(TREE, jnp.bfloat16)).items()}
    assert types["a"] == TREE["a"].dtype
    assert all(types[path] == jnp.bfloat16 for path in ("b.bias", "b.kernel", "c.d.e"))
    shapes = jax.eval_shape(lambda: TREE)
    assert pytree.cast(shapes, jnp.bfloat16) == jax.eval_shape(lambda: pytree.cast(TREE, jnp.bfloat16))


def test_differences_name_missing_unexpected_and_misshapen_leaves():
    have = {"a": jnp.zeros(4), "b": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}, "c": TREE["c"]}
    assert pytree.differences(TREE, TREE) == []
    assert pytree.differences(have, TREE) == [
        "missing b.bias (3,)",
        "unexpected b.scale (3,)",
        "b.kernel has shape (3, 2), the config wants (2, 3)",
    ]


def test_require_match_shows_the_first_few():
    pytree.require_match(TREE, TREE, what="x")
    with pytest.raises(UserError, match=r"weights/vae does not fit its config: missing a \(4,\).* and 2 more"):
        pytree.require_match({}, TREE, what="weights/vae", show=2)
