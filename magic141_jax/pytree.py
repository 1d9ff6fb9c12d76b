"""Parameter trees: nested dicts of arrays whose paths are joined with dots ("double_blocks.image.q.kernel").

Everything outside `models/` sees a network's parameters in this form: optimizers, checkpoints, safetensors
files, sharding rules and conversion tables all speak of the same dotted paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.errors import UserError

Params = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted path: leaf}, in sorted order."""
    flat = {}
    for key in sorted(tree, key=str):
        path = f"{prefix}.{key}" if prefix else str(key)
        value = tree[key]
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def count(tree: Any) -> int:
    """The number of values in a tree of arrays or shape structs."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


def cast(tree: Any, dtype: Any) -> Any:
    """Casts every floating-point leaf, an array or a shape struct, to `dtype`; integers and booleans stay."""

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.update(dtype=dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.astype(dtype)

    return jax.tree.map(one, tree)


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """Lists, one line each, the paths that are missing, superfluous or of another shape in `have`."""
    have, want = flatten(have), flatten(want)
    lines = [f"missing {p} {tuple(want[p].shape)}" for p in want if p not in have]
    lines += [f"unexpected {p} {tuple(have[p].shape)}" for p in have if p not in want]
    lines += [
        f"{p} has shape {tuple(have[p].shape)}, the config wants {tuple(want[p].shape)}"
        for p in want
        if p in have and tuple(have[p].shape) != tuple(want[p].shape)
    ]
    return lines


def require_match(have: Mapping[str, Any], want: Mapping[str, Any], *, what: str, show: int = 4) -> None:
    """Raises `UserError` naming the first few differences unless both trees have the same paths and shapes."""
    lines = differences(have, want)
    if lines:
        rest = f" and {len(lines) - show} more" if len(lines) > show else ""
        raise UserError(f"{what} does not fit its config: {'; '.join(lines[:show])}{rest}")
