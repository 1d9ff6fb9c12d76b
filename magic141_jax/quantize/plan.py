"""Which kernel is held in which form: a main form for the many, a gentler one for the sensitive, packed where sparse.

In a transformer the main form is for the maps of attention and MLP in the blocks. What turns time and text into shifts,
scales and gates, the embedders at the start and the projection at the end are few, and an error there is in everything
after; by default they stay at 8 bits at least (as RT-Lynx, TurboDiffusion and others leave them out altogether).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax

from magic141_jax.errors import UserError, nearest
from magic141_jax.models import stored
from magic141_jax.models.stored import Form
from magic141_jax.quantize.compress import find_keep

FORMS = {
    "float32": Form("float32"),
    "bfloat16": Form("bfloat16"),
    "int8": Form("int8"),
    "int4": Form("int4", group=32),
    "float8": Form("float8_e4m3fn"),
    "int8_activations": Form("int8", activations="int8"),
    "float8_activations": Form("float8_e4m3fn", activations="float8_e4m3fn"),
}
MAIN = r"blocks\..*(qkv|attention_out|mlp_up|mlp_down)\.kernel$"
SMALLEST = 4096  # values of a layer, below which a kernel isn't worth rounding


def named(name: str) -> Form:
    """The form of a name of `FORMS`; raises `UserError` for another."""
    if name not in FORMS:
        raise UserError(f"no form is named {name!r}.{nearest(name, FORMS)}")
    return FORMS[name]


def plan(
    kernels: Mapping[str, jax.Array],
    main: Form,
    rest: Form | None = None,
    *,
    paths: str = MAIN,
    pack: bool = True,
    spare: frozenset[str] = frozenset(),
) -> dict[str, Form]:
    """The form of every kernel.

    Args:
      kernels: {path: dense kernel}.
      main: for those whose path the regex `paths` matches.
      rest: for the others, and for those in `spare`; None is bfloat16.
      paths: see `main`.
      pack: whether kernels that hold zeros in a regular number keep only the others, where that saves bytes.
      spare: paths that are too sensitive for the main form.

    Raises:
      UserError: no path matches, or `paths` is no regex.
    """
    try:
        chosen = {path for path in kernels if re.search(paths, path)}
    except re.error as error:
        raise UserError(f"the paths {paths!r} are no regular expression: {error}") from None
    if not chosen:
        raise UserError(f"no kernel's path matches {paths!r}, so none would be in the form {main.values}")
    made = {}
    for path, kernel in kernels.items():
        form = main if path in chosen and path not in spare else rest or FORMS["bfloat16"]
        made[path] = suited(kernel, form, pack=pack)
    return made


def suited(kernel: jax.Array, form: Form, *, pack: bool = True) -> Form:
    """A form as near to the given one as a kernel's shape allows, packed if it is sparse and smaller so."""
    _, shape = stored.split_stack(kernel.shape)
    rows = kernel.size // (kernel.shape[0] if kernel.ndim == 3 else 1) // shape[-1]
    if rows * shape[-1] < SMALLEST and form.values in stored.QUANTIZED:
        form = FORMS["bfloat16"]
    if form.group and rows % form.group:
        form = dataclasses.replace(form, group=0)
    if form.values == "int4" and rows % 2:
        form = FORMS["int8"]
    keep = find_keep(kernel) if pack else None
    packed = dataclasses.replace(form, keep=keep)
    return packed if keep and bits(packed, rows) < bits(form, rows) else form


def bits(form: Form, rows: int) -> float:
    """Bits that a weight of a kernel of so many rows takes, its share of mask and scales included."""
    width = {"float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}[form.values]
    scale = 8 * form.scale.itemsize / (form.group or rows) if form.values in stored.QUANTIZED else 0
    return width * form.kept(rows) / rows + bool(form.keep) + scale
