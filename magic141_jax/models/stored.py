"""Kernels in fewer bytes: packed where they are sparse, quantized, and expanded only where they are used.

A dense kernel W (in, out), or (..., in, out) of a convolution with its taps counted as rows, is held as

    values (kept, out)        float, int8, float8, or int4 two in a byte: what stays of each column, in order
    mask   (in / 8, out)      where it stood, a bit a weight, if anything was pruned (little end first)
    scale  (in / group, out)  of the quantized values

A form keeps n of every m neighbouring rows in each column, (n, m), or n of all rows, (n, 0), and every column and layer
the same n: shapes are static, and an array is cut along its columns over a mesh like the kernel itself. For 2:4 the
mask takes the 4 bits a group that two indices of 2 bits take.

Layers of a kind are stacked, values (layers, kept, out), and a scan hands out one layer at a time; so one dense layer
is in memory at a time. Products are qwix's, which holds a matrix as values and scale, and with `activations` also
multiplies integers: each token is scaled by its own largest value.

Bytes of a weight, as a fraction of bfloat16's two: int8 1/2; n of m in bfloat16 n/m + 1/16, in int8 n/2m + 1/16;
int4 1/4 and as much for a scale of `group` rows as 1/group.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from magic141_jax import pytree, settings
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, flatten, unflatten

Values = Literal["float32", "bfloat16", "int8", "int4", "float8_e4m3fn"]
QUANTIZED = ("int8", "int4", "float8_e4m3fn")
KERNEL = ".kernel"
KEY = "kernels"  # of a component's config.json: {path of a kernel: its form}
EXPAND = "write plain ones with python -m magic141_jax.quantize SRC DST --expand"
SELECT = 8  # kept values of a group up to which choosing among them beats a gather


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kernel is held.

    Attributes:
      values: dtype of what is kept.
      keep: (n, m): n of m neighbouring rows, or (n, 0): n of all rows, the same in every column; null is all.
      group: rows that share a scale; 0 is all rows of a column.
      activations: what the inputs are rounded to before the product; empty leaves them and widens the weights.
    """

    values: Values = "bfloat16"
    keep: tuple[int, int] | None = None
    group: int = 0
    activations: Literal["", "int8", "float8_e4m3fn"] = ""

    def __post_init__(self) -> None:
        if self.group < 0:
            raise UserError(f"groups of {self.group} rows that share a scale; 0 is a whole column")
        if self.activations and (self.values not in QUANTIZED or self.group):
            raise UserError(f"activations in {self.activations} need quantized weights with a scale a column")
        if self.group and self.values not in QUANTIZED:
            raise UserError(f"{self.values} values have no scales, so no groups of {self.group} rows that share one")

    def check(self, rows: int) -> None:
        """Raises `UserError` unless a kernel of so many rows can be held so."""
        n, m = self.keep or (rows, 0)
        if not 0 < n <= (m or rows) or rows % (m or rows):
            raise UserError(f"{rows} rows can't keep {n} of every {m or rows}")
        if self.keep and rows % 8:
            raise UserError(f"a mask of {rows} rows: packed kernels have a multiple of 8 rows")
        if rows % (self.group or rows):
            raise UserError(f"{rows} rows don't divide into groups of {self.group} that share a scale")
        if self.values == "int4" and self.kept(rows) % 2:
            raise UserError(f"int4 values stand two in a byte, and {self.kept(rows)} rows are kept")

    @property
    def scale(self) -> Any:
        """The dtype of scales: float32 of whole columns, where that costs next to nothing."""
        return jnp.dtype("bfloat16" if self.group else "float32")

    def kept(self, rows: int) -> int:
        """How many values a column of so many rows has."""
        n, m = self.keep or (rows, 0)
        return n * (rows // m) if m else n


class Stored(nnx.Module):
    """A kernel in some form, in the place of its parameter: `kernel[...]` is dense, and `kernel.dot(x)` is x W."""

    def __init__(self, shape: tuple[int, ...], form: Form, *, layers: tuple[int, ...] = ()) -> None:
        """Of a dense `shape` (..., in, out); `layers` is (), or (layers,) of a stack."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        form.check(rows)
        self.layer, self.form = tuple(shape), form
        kept, dtype = form.kept(rows), jnp.dtype("uint8" if form.values == "int4" else form.values)
        kept //= 2 if form.values == "int4" else 1
        self.values = nnx.Param(jnp.zeros((*layers, kept, columns), dtype))
        self.mask = nnx.Param(jnp.zeros((*layers, rows // 8, columns), jnp.uint8)) if form.keep else None
        scales = (*layers, rows // (form.group or rows), columns)
        self.scale = nnx.Param(jnp.ones(scales, form.scale)) if form.values in QUANTIZED else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense kernel, its layers in front."""
        return (*self.values.shape[:-2], *self.layer)

    def __getitem__(self, _: Any) -> jax.Array:
        """The dense kernel in float32, of a stack every layer's."""
        return self._dense().reshape(self.shape)

    def dot(self, x: jax.Array) -> jax.Array:
        """x (..., in) -> x W (..., out) in the dtype of x."""
        held, dtype = self._matrix(x.dtype), x.dtype
        act = self.form.activations
        given = qwix.quantize(x, act, channelwise_axes=range(x.ndim - 1)) if act else x
        return qwix.dot(given, held).astype(dtype)

    def _dense(self) -> jax.Array:
        held = self._matrix(jnp.float32)
        return qwix.dequantize(held) if isinstance(held, qwix.QArray) else held

    def _matrix(self, dtype: Any) -> jax.Array | qwix.QArray:
        """The kernel (..., in, out): values in `dtype`, or quantized ones with a scale in it."""
        values = self.values[...]
        if self.form.values == "int4":
            values = from_nibbles(values)
        if self.mask is not None:
            rows = 8 * self.mask.shape[-2]
            values = expand(values, self.mask[...], rows // (self.form.keep[1] or rows))
        if self.scale is None:
            return values.astype(dtype)
        return qwix.QArray(values, self.scale[...].astype(dtype))


def stored(network: Network, forms: Mapping[str, Form]) -> Network:
    """The same network with the kernels at these dotted paths held in these forms.

    Raises:
      UserError: a path that is no kernel of the network, or a form that doesn't suit its shape.
    """
    found = set()

    def change(path: str, node: nnx.Module, rngs: nnx.Rngs) -> None:
        del rngs
        form = forms.get(f"{path}{KERNEL}")
        kernel = getattr(node, "kernel", None)
        if form is None or not isinstance(kernel, nnx.Variable):
            return
        layers, shape = split_stack(kernel.shape)
        try:
            node.kernel = Stored(shape, form, layers=layers)  # pyright: ignore[reportAttributeAccessIssue]
        except UserError as error:
            raise UserError(f"{path}{KERNEL}: {error}") from None
        found.add(f"{path}{KERNEL}")

    made = network.rebuilt(change)
    missing = [path for path in forms if path not in found]
    if missing:
        raise UserError(f"the network has no kernel {missing[0]} to hold in another form")
    return made


def dense(network: Network, params: Params) -> Params:
    """The parameters of the plain network that computes with the same kernels: stored ones in float32."""
    module, flat = network.bind(params), flatten(params)
    found = {path: node for path, node in nnx.iter_modules(module) if isinstance(node, Stored)}
    for path, node in found.items():
        dotted = ".".join(map(str, path))
        for part in ("values", "mask", "scale"):
            flat.pop(f"{dotted}.{part}", None)
        flat[dotted] = node[...]
    return unflatten(flat)


def cast(params: Params, dtype: Any) -> Params:
    """Floating-point parameters in `dtype`, but for the parts of stored kernels, which are as their forms say."""
    flat = flatten(params)
    return unflatten({path: leaf if is_part(path) else pytree.cast(leaf, dtype) for path, leaf in flat.items()})


def read_forms(values: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Form]:
    """Forms as a config.json has them; raises `UserError` for an unknown key or a wrong type."""
    if not isinstance(values, Mapping) or not all(isinstance(form, Mapping) for form in values.values()):
        raise UserError(f"{where}: {KEY!r} must map the paths of kernels to their forms")
    return {path: settings.build(Form, form, where=f"{where} {path}") for path, form in values.items()}


def as_written(network: Network, forms: Any, where: str) -> Network:
    """The network with the kernels held as a config.json says under `KEY`, if it says anything."""
    return stored(network, read_forms(forms, where)) if forms is not None else network


def is_part(path: str) -> bool:
    """Whether a dotted path of a parameter is a part of a stored kernel."""
    return re.search(rf"\{KERNEL}\.(values|mask|scale)$", path) is not None


def split_stack(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A kernel's shape -> (the layers in front, the shape of one): of rank 3 it is a stack, above a convolution's."""
    return (tuple(shape[:1]), tuple(shape[1:])) if len(shape) == 3 else ((), tuple(shape))


def pack_bits(mask: jax.Array) -> jax.Array:
    """A mask (..., rows, out) of bools -> bytes (..., rows / 8, out)."""
    return jnp.packbits(mask, axis=-2, bitorder="little")


def expand(values: jax.Array, mask: jax.Array, groups: int) -> jax.Array:
    """values (..., kept, out) and mask bytes (..., rows / 8, out) -> (..., rows, out), zeros where the mask is 0.

    Each of the `groups` of neighbouring rows holds the same number of values.
    """
    bits = jnp.unpackbits(mask, axis=-2, bitorder="little")
    *stack, rows, columns = bits.shape
    grouped = (*stack, groups, -1, columns)
    bits, values = bits.reshape(grouped), values.reshape(grouped)
    rank = jnp.cumsum(bits, axis=-2, dtype=jnp.int32) - bits  # how many are kept before this one
    if values.shape[-2] <= SELECT:
        dense = sum(jnp.where(rank == i, values[..., i : i + 1, :], 0) for i in range(values.shape[-2]))
    else:
        dense = jnp.take_along_axis(values, jnp.minimum(rank, values.shape[-2] - 1), axis=-2)
    return jnp.where(bits == 1, dense, jnp.zeros((), values.dtype)).astype(values.dtype).reshape(*stack, rows, columns)


def to_nibbles(values: jax.Array) -> jax.Array:
    """int8 (..., rows, out) within -8..7 -> uint8 (..., rows / 2, out), the even row in the low half."""
    pairs = values.astype(jnp.uint8).reshape(*values.shape[:-2], -1, 2, values.shape[-1])
    return (pairs[..., 0, :] & 15) | (pairs[..., 1, :] << 4)


def from_nibbles(values: jax.Array) -> jax.Array:
    """The inverse of `to_nibbles`."""
    low = jax.lax.shift_right_arithmetic((values << 4).astype(jnp.int8), jnp.int8(4))
    high = jax.lax.shift_right_arithmetic(values.astype(jnp.int8), jnp.int8(4))
    pairs = jnp.stack([low, high], axis=-2)
    return pairs.reshape(*values.shape[:-2], -1, values.shape[-1])
