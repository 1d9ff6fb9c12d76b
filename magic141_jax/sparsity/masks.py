"""Masks from scores: which weights stay (true) and which are pruned (false).

A pattern says what is kept or dropped as one, a distribution how much is dropped where:

    unstructured   single weights                column   the same number in every output column of every layer
    n:m            single weights, n of every    layer    the same share of every layer's matrix
                   m neighbours along `in`       global   one threshold for all kernels together
    block RxC      R x C blocks                  erk      a share for each kernel by its shape, see `erk_densities`
    heads, neurons, blocks: whole units of a transformer, see `sparsity.structured`

Columns compare the weights of one output, as Wanda does (arXiv 2306.11695), and pack into arrays of static shape; they
and n:m are exact in number, equal scores being dropped in the order of their index. Of the other distributions the
smallest score that stays is exact, but all weights equal to it stay too, so they drop fewer where scores are equal.

No scores are sorted. The bits of a float32 that is not negative are an integer in the same order, so the score of a
given rank is found bit by bit, in 32 passes that count what lies below a guess: sums, which every sharding knows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from magic141_jax.errors import UserError
from magic141_jax.sparsity import structured

Distribution = Literal["column", "layer", "global", "erk"]
Flat = Mapping[str, jax.Array]
Pattern = Callable[[Flat, Flat, Any, Flat], dict[str, jax.Array]]
Keys = Mapping[str, UInt32[Array, "... i o"]]


def make(pattern: str, distribution: Distribution = "column") -> Pattern:
    """The function (parameters, scores, sparsity, previous masks) -> masks of a pattern's name.

    All are {dotted path: array}: the parameters of the whole network, the others of the kernels that are pruned. The
    sparsity is the share to be dropped. It may be traced; a plain number is taken for the last one, and checked. What
    the previous masks prune is dropped before all else, and counts as dropped; where that is more than asked for, the
    result holds some of it again.

    Raises:
      UserError: an unknown pattern. The function raises it where blocks or groups do not divide a kernel, a column
        would keep nothing, or the numbers of the pattern do not go with each other or with the sparsity.
    """
    for form, function in PATTERNS.items():
        found = re.fullmatch(form, pattern)
        if found:
            return functools.partial(function, sizes=tuple(map(int, found.groups())), distribution=distribution)
    raise UserError(f"pruning.pattern is {pattern!r}; it must be like one of {', '.join(EXAMPLES)}")


def unstructured(
    params: Flat, scores: Flat, sparsity: Any, previous: Flat, *, sizes: tuple[int, ...], distribution: Distribution
) -> dict[str, jax.Array]:
    """Single weights."""
    del params, sizes
    return DISTRIBUTIONS[distribution](order(scores, previous), sparsity)


def n_of_m(
    params: Flat, scores: Flat, sparsity: Any, previous: Flat, *, sizes: tuple[int, int], distribution: Distribution
) -> dict[str, jax.Array]:
    """The n largest of every m neighbours along `in`; on the way there more than n, m - round(sparsity m) of them."""
    del params
    n, m = sizes
    if n >= m or distribution != "column":
        raise UserError(f"pruning.pattern {n}:{m} keeps n of m weights, 0 < n < m, with distribution 'column'")
    if _plain(sparsity) and sparsity and _share(sparsity, m) != m - n:
        raise UserError(f"pruning.pattern {n}:{m} is a sparsity of {1 - n / m:g}, not of {sparsity}: set it to that")
    keys = order(scores, previous)
    for path, key in keys.items():
        if key.shape[-2] % m:
            raise UserError(f"pruning.pattern {n}:{m}: the {key.shape[-2]} rows of {path} don't divide by {m}")
    groups = {path: key.reshape(*key.shape[:-2], -1, m, key.shape[-1]) for path, key in keys.items()}
    dropped = jnp.minimum(_share(sparsity, m), m - n)
    return {path: _without_lowest(key, dropped).reshape(keys[path].shape) for path, key in groups.items()}


def blocks(
    params: Flat, scores: Flat, sparsity: Any, previous: Flat, *, sizes: tuple[int, int], distribution: Distribution
) -> dict[str, jax.Array]:
    """Blocks of R rows (`in`) and C columns, by their mean score; the distribution is that of blocks."""
    del params
    rows, columns = sizes
    for path, score in scores.items():
        if score.shape[-2] % rows or score.shape[-1] % columns:
            raise UserError(f"pruning.pattern block {rows}x{columns} does not divide {path} of shape {score.shape}")

    def tiles(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)

    means = {path: tiles(jnp.where(previous[path], score, 0)).mean((-3, -1)) for path, score in scores.items()}
    alive = {path: tiles(mask).any((-3, -1)) for path, mask in previous.items()}
    kept = DISTRIBUTIONS[distribution](order(means, alive), sparsity)
    return {path: mask.repeat(rows, axis=-2).repeat(columns, axis=-1) for path, mask in kept.items()}


def whole(
    params: Flat,
    scores: Flat,
    sparsity: Any,
    previous: Flat,
    *,
    sizes: tuple[int, ...],
    distribution: Distribution,
    kind: str,
) -> dict[str, jax.Array]:
    """Heads, neurons or blocks of an MMDiT, the same number in every layer; `structured.shrink` then cuts them out."""
    del sizes
    if distribution != "column":
        raise UserError(
            f"pruning.pattern {kind} takes as many from every layer; leave pruning.distribution at 'column'"
        )
    return structured.units(params, scores, sparsity, previous, kind=kind)


def pruned_paths(params: Flat, pattern: str) -> list[str] | None:
    """The parameters that a pattern of whole units prunes, biases included; None of patterns of single weights."""
    if pattern not in structured.KINDS:
        return None
    return [
        path for group in structured.groups(structured.sizes_of(params), pattern) for path in structured.members(group)
    ]


# Form of a pattern's name -> its function; the numbers in the name are its `sizes`.
PATTERNS: dict[str, Callable[..., dict[str, jax.Array]]] = {
    r"unstructured": unstructured,
    r"([1-9]\d*):([1-9]\d*)": n_of_m,
    r"block ([1-9]\d*)x([1-9]\d*)": blocks,
    **{kind: functools.partial(whole, kind=kind) for kind in structured.KINDS},
}
EXAMPLES = ("unstructured", "2:4", "block 16x16", *structured.KINDS)


def order(scores: Flat, previous: Flat) -> dict[str, jax.Array]:
    """Integers (uint32) in the order of the scores, and 0, below all of these, for what is pruned already."""
    bits = {path: jax.lax.bitcast_convert_type(score, jnp.uint32) for path, score in scores.items()}
    return {path: jnp.where(previous[path], value + 1, 0) for path, value in bits.items()}


def column(keys: Keys, sparsity: Any) -> dict[str, jax.Array]:
    """Drops round(sparsity * in) from each column of each layer; raises `UserError` if that is all of it."""
    return {
        path: _without_lowest(key, _some(sparsity, key.shape[-2], f"a column of {path}")) for path, key in keys.items()
    }


def layer(keys: Keys, sparsity: Any) -> dict[str, jax.Array]:
    """Drops round(sparsity * in * out) from each layer's matrix; raises `UserError` if that is all of it."""
    return {
        path: _above_threshold(key, _some(sparsity, key.shape[-2] * key.shape[-1], f"a layer of {path}"))
        for path, key in keys.items()
    }


def erk(keys: Keys, sparsity: Any) -> dict[str, jax.Array]:
    """Drops from each layer's matrix as the densities of its kernel say."""
    densities = erk_densities({path: key.shape for path, key in keys.items()}, sparsity)
    return {
        path: _above_threshold(key, _share(1 - densities[path], key.shape[-2] * key.shape[-1]))
        for path, key in keys.items()
    }


def everywhere(keys: Keys, sparsity: Any) -> dict[str, jax.Array]:
    """Drops round(sparsity * all), wherever the lowest are. Counts beyond 2^24 are rounded to float32."""

    def below(guess: jax.Array) -> jax.Array:
        counts = [jnp.sum(key < guess, axis=(-2, -1), dtype=jnp.int32) for key in keys.values()]
        return sum(jnp.sum(count.astype(jnp.float32)) for count in counts)

    dropped = jnp.round(sparsity * float(sum(key.size for key in keys.values())))
    threshold = of_rank(below, dropped)
    return {path: key >= threshold for path, key in keys.items()}


DISTRIBUTIONS: dict[Distribution, Callable[[Keys, Any], dict[str, jax.Array]]] = {
    "column": column,
    "layer": layer,
    "global": everywhere,
    "erk": erk,
}


def erk_densities(shapes: Mapping[str, tuple[int, ...]], sparsity: Any) -> dict[str, jax.Array]:
    """The share that each kernel keeps by Erdos-Renyi-Kernel (RigL, arXiv 1911.11134), of kernels (..., in, out).

        density = min(1, e (in + out) / (in out)),    e such that 1 - sparsity of all weights are kept

    Wide matrices keep less than narrow ones. Kernels enter full in the order of (in + out) / (in out), so e is the one
    of the first number of full kernels that leaves the next below 1.
    """
    paths = list(shapes)
    ratio = np.array([(s[-2] + s[-1]) / (s[-2] * s[-1]) for s in shapes.values()])
    size = np.array([np.prod(s, dtype=float) for s in shapes.values()])
    first = np.argsort(-ratio, kind="stable")
    size, ratio = size[first] / size.sum(), ratio[first]
    full = np.cumsum(size) - size  # the share of all weights in the kernels before each
    left = np.cumsum((size * ratio)[::-1])[::-1]
    candidates = (1 - sparsity - jnp.asarray(full, jnp.float32)) / jnp.asarray(left, jnp.float32)
    fits = candidates * jnp.asarray(ratio, jnp.float32) <= 1
    # Nothing is dropped by rounding: without sparsity all are full, and where no number of full kernels fits.
    e = jnp.where(fits.any() & (sparsity > 0), candidates[jnp.argmax(fits)], jnp.inf)
    return {paths[i]: jnp.minimum(1.0, e * r) for i, r in zip(first, ratio)}


def of_rank(below: Callable[[jax.Array], jax.Array], rank: Any) -> jax.Array:
    """The uint32 key of a rank, 0 being the smallest, bit by bit: so many keys, or fewer if it has equals, lie below.

    Args:
      below: how many keys lie below a guess, for each group of keys at once: uint32 -> numbers of the rank's dtype.
      rank: a scalar; of a rank that no key has the largest uint32 is found.
    """

    def refine(step: jax.Array, found: jax.Array) -> jax.Array:
        guess = found | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        return jnp.where(below(guess) <= rank, guess, found)

    groups = jax.eval_shape(below, jnp.uint32(0)).shape
    return jax.lax.fori_loop(0, 32, refine, jnp.zeros(groups, jnp.uint32))


def _plain(sparsity: Any) -> bool:
    """Whether a sparsity is a number that is known while the program is traced."""
    return isinstance(sparsity, float | int)


def _share(sparsity: Any, size: int) -> Any:
    """round(sparsity * size), in float32 whether traced or not: how many of `size` are dropped."""
    lib = np if _plain(sparsity) else jnp
    return lib.round(lib.float32(sparsity) * lib.float32(size)).astype(lib.int32)


def _some(sparsity: Any, size: int, what: str) -> Any:
    """As `_share`, but not all of them."""
    dropped = _share(sparsity, size)
    if _plain(sparsity) and dropped >= size:
        raise UserError(f"a sparsity of {sparsity} leaves nothing of {what}, {size} weights or blocks; lower it")
    return dropped


def _without_lowest(keys: UInt32[Array, "... i o"], dropped: jax.Array) -> Bool[Array, "... i o"]:
    """All but the `dropped` lowest of each column, exactly: of equal ones the first are dropped."""
    count = functools.partial(jnp.sum, axis=-2, keepdims=True, dtype=jnp.int32)
    threshold = of_rank(lambda guess: count(keys < guess), dropped)
    ties = keys == threshold
    left = dropped - count(keys < threshold)
    return (keys > threshold) | (ties & (jnp.cumsum(ties, axis=-2, dtype=jnp.int32) > left))


def _above_threshold(keys: UInt32[Array, "... i o"], dropped: jax.Array) -> Bool[Array, "... i o"]:
    """All but the `dropped` lowest of each matrix, and all that equal the lowest that stays."""
    count = functools.partial(jnp.sum, axis=(-2, -1), keepdims=True, dtype=jnp.int32)
    return keys >= of_rank(lambda guess: count(keys < guess), dropped)
