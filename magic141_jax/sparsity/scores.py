"""How much each weight matters: the score by which pruning chooses.

    magnitude     S_ij = |w_ij|                 (Han et al., arXiv 1506.02626)
    activation    S_ij = |w_ij| ||x_i||_2       (Wanda, arXiv 2306.11695), x_i the i-th input over calibration samples

A kernel maps `in` to `out` by x W, so i is its row. Kernels are (in, out) or stacked, (layers, in, out); the norms of
their inputs are (in,) or (layers, in). Everything is {dotted path: array}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.pytree import Params, flatten


def chosen(params: Params, paths: str) -> dict[str, Any]:
    """The kernels of a parameter tree, arrays or shape structs, in whose dotted path the regex `paths` is found.

    Biases and scales of stacked layers look like matrices, but are never among them.

    Raises:
      UserError: no kernel is found, or `paths` is no regex.
    """
    flat = flatten(params)
    kernels = {path: leaf for path, leaf in flat.items() if leaf.ndim >= 2 and not path.endswith(weights.VECTORS)}
    try:
        found = {path: leaf for path, leaf in kernels.items() if re.search(paths, path)}
    except re.error as error:
        raise UserError(f"pruning.paths {paths!r} is no regular expression: {error}") from None
    if not found:
        raise UserError(f"pruning.paths {paths!r} matches none of the kernels, such as {', '.join(list(kernels)[:3])}")
    return found


def scores(kernels: Mapping[str, jax.Array], norms: Mapping[str, Any] | None = None) -> dict[str, jax.Array]:
    """{path: scores (..., in, out), float32 and not negative}: by magnitude, or with `norms` activation-aware."""
    found = {path: jnp.abs(kernel.astype(jnp.float32)) for path, kernel in kernels.items()}
    if norms is None:
        return found
    return {path: score * jnp.asarray(norms[path], jnp.float32)[..., None] for path, score in found.items()}


def read_norms(file: Path, kernels: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The norms ||x_i||_2 of every kernel's inputs, {path: (..., in) float32}, from a safetensors file.

    Args:
      file: its tensors are named by the kernels' paths, with or without the name of the network in front.
      kernels: {path: array or shape struct}.

    Raises:
      UserError: no such file, a kernel without norms, norms of another shape, negative ones or no numbers.
    """
    file = Path(file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise UserError(f"no safetensors file {file} with the norms of the kernels' inputs (pruning.norms)")
    held = weights.read_tensors(file.parent, file.stem)
    found = {path: held.get(path, held.get(path.partition(".")[2])) for path in kernels}
    for path, kernel in kernels.items():
        values, wanted = found[path], tuple(kernel.shape[:-1])
        if values is None:
            raise UserError(f"{file} has no norms for {path}; calibrate the network that is pruned (pruning.norms)")
        if tuple(values.shape) != wanted:
            raise UserError(f"{file}: the norms of {path} have shape {tuple(values.shape)}, its inputs are {wanted}")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise UserError(f"{file}: the norms of {path} are negative or no numbers; calibrate again")
    return {path: np.asarray(values, np.float32) for path, values in found.items()}
