"""Floating-point operations of a traced program: those of its matrix products and convolutions, loops counted in full.

XLA's own count takes a loop's body once, and stacked layers are loops. Here a body counts as often as its `scan` turns;
recomputation stands in the trace as well. A `while`, whose turns are drawn while the program runs (the walk of a
few-step student), counts once, and of branches the dearest. Everything else that a transformer does is small beside it.

Attention kernels hide their products from XLA's count. A Pallas kernel is traced as the work on one block, which is
done once in every cell of its grid. Cells of a block-sparse mask that the kernel looks at and skips count all the same:
where a mask doesn't shrink the grid, the count is an upper bound. cuDNN's attention is known by its formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


def count(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Operations of a program, a multiplication with its addition being two: of all devices together.

    Args:
      jaxpr: such as `jax.jit(function).trace(*arguments).jaxpr`.
    """
    return sum(_operations(equation) for equation in jaxpr.eqns)


def _operations(equation: JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return PRODUCTS[name](equation)
    inner = [count(each) for each in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * TURNS.get(name, lambda params: 1)(params)


def _shape(operand: Any) -> tuple[int, ...]:
    return operand.aval.shape


def _dot(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> float:
    kernel, spec = _shape(equation.invars[1]), equation.params["dimension_numbers"].rhs_spec
    # Every output value is a sum over the kernel's places and its input channels, those of one group.
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) / kernel[spec[0]]


def _cudnn_attention(products: int) -> Callable[[JaxprEqn], float]:
    """So many products of every query with every key: q k and s v forward; these, dv, dp, dq and dk less s v backward.

    The first operands are q (b, t, n, h) and k (b, s, n', h), or (b, n, t, h) and (b, n', s, h) in layout 1.
    """

    def operations(equation: JaxprEqn) -> float:
        query, key = map(_shape, equation.invars[:2])
        keys = key[2 if equation.params["layout"] else 1]
        return 2.0 * products * math.prod(query) * keys

    return operations


def _shards(params: Mapping[str, Any]) -> int:
    """Inside a shard_map are the operations of one device of the axes that it is over."""
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])


PRODUCTS: dict[str, Callable[[JaxprEqn], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _cudnn_attention(2),
    "dot_product_attention_bwd_wrapper": _cudnn_attention(5),
}
# How often what is inside is done
TURNS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "scan": lambda params: params["length"],
    "shard_map": _shards,
    # A size of the grid that is known only when the program runs counts once.
    "pallas_call": lambda params: math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int)),
}
