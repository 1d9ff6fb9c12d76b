"""Surgery against least squares solved by hand and against an exhaustive search."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.sparsity import surgeon


def problem(layers=2, inputs=6, outputs=5, tokens=200, seed=0):
    """Kernels, and inputs of which some say nearly the same as others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(layers, tokens, inputs)) @ rng.normal(size=(layers, inputs, inputs))
    return rng.normal(size=(layers, inputs, outputs)).astype(np.float32), x.astype(np.float32)


def gram(x):
    return np.einsum("lti,ltj->lij", x, x)


def lost(kernel, x, made):
    """Sum of squared errors of the outputs, with what damping adds to the inputs."""
    h = gram(x).astype(np.float64)
    h += surgeon.DAMPING * np.trace(h, axis1=1, axis2=2)[:, None, None] / h.shape[-1] * np.eye(h.shape[-1])
    d = made - kernel
    return np.einsum("lio,lij,ljo->l", d, h, d)


def best_without(kernel, x, rows):
    """The kernel (in, out) with zeros in `rows` and the others solved for, in float64."""
    h = gram(x[None])[0].astype(np.float64)
    h += surgeon.DAMPING * np.trace(h) / len(h) * np.eye(len(h))
    kept = [i for i in range(len(h)) if i not in rows]
    made = np.zeros(kernel.shape)
    made[kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ kernel)[kept])
    return made


@pytest.mark.parametrize("size", [1, 2])
def test_one_unit_goes_as_an_exhaustive_search_would_have_it(size):
    kernel, x = problem()
    units = 6 // size
    kept, (made,) = surgeon.operate([kernel], [gram(x)], units=units, keep=units - 1)
    for layer in range(2):
        tries = [best_without(kernel[layer], x[layer], range(u * size, (u + 1) * size)) for u in range(units)]
        costs = [float(lost(kernel[layer][None], x[layer][None], t[None])[0]) for t in tries]
        best = int(np.argmin(costs))
        assert np.flatnonzero(~np.asarray(kept[layer])).tolist() == [best]
        np.testing.assert_allclose(made[layer], tries[best], rtol=2e-3, atol=2e-3)


def test_several_go_one_after_another_and_the_rest_is_the_best_there_is():
    kernel, x = problem(inputs=8)
    kept, (made,) = surgeon.operate([kernel], [gram(x)], units=8, keep=3)
    np.testing.assert_array_equal(np.asarray(kept).sum(-1), 3)
    for layer in range(2):
        gone = np.flatnonzero(~np.asarray(kept[layer]))
        np.testing.assert_array_equal(np.asarray(made[layer])[gone], 0)
        want = best_without(kernel[layer], x[layer], gone)
        np.testing.assert_allclose(made[layer], want, rtol=5e-3, atol=5e-3)
        all_costs = sorted(
            float(lost(kernel[layer][None], x[layer][None], best_without(kernel[layer], x[layer], rows)[None])[0])
            for rows in itertools.combinations(range(8), 5)
        )
        own = float(lost(kernel[layer][None], x[layer][None], np.asarray(made[layer])[None])[0])
        assert own <= all_costs[len(all_costs) // 4], "a greedy choice is among the better ones"


def test_maps_that_share_their_units_lose_the_same_ones():
    (one, x), (two, y) = problem(seed=1), problem(seed=2)
    kept, made = surgeon.operate([one, two], [gram(x), gram(y)], units=3, keep=1)
    assert kept.shape == (2, 3) and [m.shape for m in made] == [one.shape, two.shape]
    rows = np.repeat(np.asarray(kept), 2, axis=1)
    for kernel in made:
        np.testing.assert_array_equal((np.asarray(kernel) != 0).any(-1), rows)


def test_an_input_that_repeats_another_is_free():
    kernel, x = problem(layers=1)
    x[..., 4] = x[..., 1]
    kept, (made,) = surgeon.operate([kernel], [gram(x)], units=6, keep=5)
    assert np.flatnonzero(~np.asarray(kept[0]))[0] in (1, 4)
    np.testing.assert_allclose(x[0] @ made[0], x[0] @ kernel[0], atol=0.05 * np.abs(x[0] @ kernel[0]).max())


def test_all_stay_and_no_samples():
    kernel, x = problem()
    kept, (made,) = surgeon.operate([kernel], [gram(x)], units=6, keep=6)
    assert np.asarray(kept).all()
    np.testing.assert_allclose(made, kernel, rtol=1e-5)
    kept, (made,) = surgeon.operate([kernel], [jnp.zeros((2, 6, 6))], units=6, keep=2)
    np.testing.assert_allclose(np.asarray(made)[np.asarray(kept)], kernel[np.asarray(kept)], rtol=1e-5)
    norms = np.square(kernel).sum(-1)
    for layer in range(2):
        assert set(np.flatnonzero(kept[layer])) == set(np.argsort(norms[layer])[-2:]), "then the largest rows stay"
