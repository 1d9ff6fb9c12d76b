"""(network, params) -> (network', params') with kernels in forms of fewer bytes; `stored.dense` is the way back.

Quantized values are qwix's, symmetric, with one scale for each column and group of rows. A value of 4 bits has sixteen
levels, so that where a group is clipped matters: of a few shares of its largest value the one is taken that leaves the
least squared error, each row counted as strongly as its input is (AWQ's clipping, arXiv 2306.00978 section 3).

What was pruned is zero and stays exactly zero: zero is a level of every symmetric form, and a mask says no more than
where other values stand.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from magic141_jax.models import stored
from magic141_jax.models.network import Network
from magic141_jax.models.stored import Form
from magic141_jax.pytree import Params, flatten, unflatten

CLIPS = {"int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}  # shares of the largest value; others are not clipped
PATTERNS = ((2, 4), (4, 8), (32, 64))  # that zeros are looked through for


def compress(
    network: Network, params: Params, forms: Mapping[str, Form], *, norms: Mapping[str, jax.Array] | None = None
) -> tuple[Network, Params]:
    """The network with the kernels of `forms` held so, and its parameters; the others stay as they are.

    Args:
      network, params: dense.
      forms: {dotted path of a kernel: its form}.
      norms: {path: (in,) or (layers, in)} of what enters a map, where it was measured (`models.probes`).

    Raises:
      UserError: a form that a kernel can't take; see `stored.stored`.
    """
    made = stored.stored(network, forms)
    flat = flatten(params)
    parts: dict[str, Any] = {}
    for path, leaf in flat.items():
        if path not in forms:
            parts[path] = leaf
            continue
        found = pack(leaf, forms[path], None if norms is None else norms.get(path))
        parts |= {f"{path}.{name}": value for name, value in found.items()}
    return made, unflatten(parts)


def pack(kernel: jax.Array, form: Form, norms: jax.Array | None = None) -> dict[str, jax.Array]:
    """The parts of a kernel in a form: {"values", "mask" if it keeps only some, "scale" if it is quantized}.

    Args:
      kernel: dense, (..., in, out), maybe of stacked layers (`stored.split_stack`).
      form: of which `keep` says how many values stay; others have to be zero already.
      norms: see `compress`.

    Raises:
      ValueError: the kernel has more values than the form keeps.
    """
    layers, shape = stored.split_stack(kernel.shape)
    matrix = jnp.asarray(kernel, jnp.float32).reshape(*layers, -1, shape[-1])
    parts: dict[str, jax.Array] = {}
    values = matrix
    if form.values in stored.QUANTIZED:
        quantized = quantize(matrix, form, norms)
        values, parts["scale"] = quantized.qvalue, quantized.scale
    if form.keep:
        mask = exactly(matrix != 0, form.keep)
        parts["mask"] = stored.pack_bits(mask)
        values = _kept(values, mask, form)
    values = stored.to_nibbles(values) if form.values == "int4" else values.astype(form.values)
    return {"values": values, **parts}


@functools.partial(jax.jit, static_argnums=1)
def quantize(matrix: jax.Array, form: Form, norms: jax.Array | None = None) -> qwix.QArray:
    """A matrix (..., in, out) as qwix holds it, with a scale for each column and group of rows."""
    rows = matrix.shape[-2]
    group, axis = form.group or rows, matrix.ndim - 2
    weight = 1.0 if norms is None else jnp.square(jnp.asarray(norms, jnp.float32))[..., None]
    channels = [i for i in range(matrix.ndim) if i != axis]
    best: Any = None
    least: Any = None
    for clip in CLIPS.get(form.values, (1.0,)):
        made = qwix.quantize(
            matrix,
            form.values,
            channelwise_axes=channels,
            tiled_axes={axis: group},
            calibration_method=f"absmax,{clip}",
            scale_dtype=form.scale,
        )
        error = weight * jnp.square(qwix.dequantize(made.astype(jnp.float32)) - matrix)
        error = error.reshape(*matrix.shape[:-2], rows // group, group, -1).sum(-2)
        if best is None:
            best, least = made, error
            continue
        better = error < least
        rowwise = jnp.repeat(better, group, axis=axis)
        values = jnp.where(rowwise, made.qvalue.astype(jnp.int8), best.qvalue.astype(jnp.int8))
        best = qwix.QArray(values, jnp.where(better, made.scale, best.scale))
        least = jnp.minimum(error, least)
    return best


def exactly(mask: jax.Array, keep: tuple[int, int]) -> jax.Array:
    """A mask (..., rows, out) filled up with the first free rows until every group of every column keeps n.

    Raises:
      ValueError: a group keeps more than n.
    """
    n, m = keep
    rows = mask.shape[-2]
    grouped = mask.reshape(*mask.shape[:-2], rows // (m or rows), m or rows, mask.shape[-1])
    most = int(grouped.sum(-2).max())
    if most > n:
        raise ValueError(f"a group of {m or rows} rows has {most} values, and the form keeps {n}")
    order = jnp.argsort(~grouped, axis=-2, stable=True)
    return (jnp.argsort(order, axis=-2) < n).reshape(mask.shape)


def find_keep(kernel: jax.Array) -> tuple[int, int] | None:
    """The (n, m) that a kernel's zeros follow: of some patterns, or (n, 0) if its columns are sparse; None if not.

    A pattern of small groups comes first where it is as sparse, for it expands without a gather.
    """
    layers, shape = stored.split_stack(kernel.shape)
    mask = (np.asarray(kernel) != 0).reshape(*layers, -1, shape[-1])
    rows = mask.shape[-2]
    if rows % 8:
        return None
    most = int(mask.sum(-2).max())
    for n, m in PATTERNS:
        fits = rows % m == 0 and int(mask.reshape(*layers, rows // m, m, -1).sum(-2).max()) <= n
        if fits and n * (rows // m) <= most + rows // 16:
            return n, m
    most += most % 2  # two in a byte
    return (most, 0) if 0 < most < rows else None


def _kept(values: jax.Array, mask: jax.Array, form: Form) -> jax.Array:
    """The values under a mask that keeps n of each group, in order: (..., kept, out)."""
    n, m = form.keep  # pyright: ignore[reportGeneralTypeIssues]
    rows = mask.shape[-2]
    grouped = (*mask.shape[:-2], rows // (m or rows), m or rows, mask.shape[-1])
    order = jnp.argsort(~mask.reshape(grouped), axis=-2, stable=True)[..., :n, :]
    kept = jnp.take_along_axis(values.reshape(grouped), order, axis=-2)
    return kept.reshape(*mask.shape[:-2], form.kept(rows), -1)
