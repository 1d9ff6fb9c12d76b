"""Floating-point operations of a traced program: those of its matrix products and convolutions, loops counted in full.

XLA's own count takes a loop's body once, and stacked layers are loops. Here a body counts as often as its `scan` turns;
recomputation stands in the trace as well. A `while`, whose turns are drawn while the program runs (the walk of a
few-step student), counts once, and of branches the dearest. Everything else that a transformer does is small beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def _dot(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> float:
    kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
    # Every output value is a sum over the kernel's places and its input channels, those of one group.
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[spec[0]]


PRODUCTS: dict[str, Callable[[JaxprEqn], float]] = {"dot_general": _dot, "conv_general_dilated": _convolution}
# How often what is inside is done; inside a shard_map are the operations of one device.
TURNS: dict[str, Callable[[dict], int]] = {
    "scan": lambda params: params["length"],
    "shard_map": lambda params: params["mesh"].size,
}
