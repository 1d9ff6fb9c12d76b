"""What enters the linear maps of a network, on real inputs: the activation norms of activation-aware pruning.

A probe is a parameter beside a `Linear` whose gradient, whatever is differentiated, is the sum over the tokens of x^2,
or of x x^T (`layers.observe`). One backward pass so gives the norms of every map of every scanned layer, under any
sharding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.models import layers as nn
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, flatten, unflatten

PROBE = ".probe"


def probed(network: Network, products: str = "") -> Network:
    """The same network with a probe at every `Linear`: of squares, or of `products` at those that the regex finds."""

    def add(path: str, node: nnx.Module, rngs: nnx.Rngs) -> None:
        del rngs
        if isinstance(node, nn.Linear) and re.search(products, path):
            *stack, inputs, _ = node.kernel.shape
            node.probe = nnx.Param(jnp.zeros((*stack, inputs, *[inputs] * bool(products))))

    return network.rebuilt(add)


def square_sums(
    network: Network, params: Params, call: Callable[[Network, Params], Any], *, products: str = ""
) -> dict[str, jax.Array]:
    """{path of a kernel: sums of x^2 over all tokens that enter it, (in,) or (layers, in)}; traceable.

    Args:
      network, params: without probes.
      call: what runs the network, (network, params) -> a tree of arrays of which something depends on every map.
      products: a regex over dotted paths of maps; given, the sums are of x x^T, (in, in), and of these maps alone.
    """
    observed = probed(network, products)
    known = flatten(params)
    probes = {path: leaf for path, leaf in flatten(observed.abstract_params).items() if path not in known}

    def run(probes: dict[str, jax.Array]) -> jax.Array:
        made = call(observed, unflatten({**known, **probes}))
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(made))

    sums = jax.grad(run)({path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in probes.items()})
    return {f"{path.removesuffix(PROBE)}.kernel": value for path, value in sums.items()}
