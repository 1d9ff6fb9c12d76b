"""What enters the linear maps of a network, on real inputs: the activation norms of activation-aware pruning.

A probe is a parameter beside a `Linear` whose gradient, whatever is differentiated, is the sum of x^2 over the tokens
(`layers.observe`). One backward pass so gives the norms of every map of every scanned layer, under any sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.models import layers as nn
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, flatten, unflatten

PROBE = ".probe"


def probed(network: Network) -> Network:
    """The same network with a probe at every `Linear`."""

    def add(path: str, node: nnx.Module, rngs: nnx.Rngs) -> None:
        del path, rngs
        if isinstance(node, nn.Linear):
            *stack, inputs, _ = node.kernel.shape
            node.probe = nnx.Param(jnp.zeros((*stack, inputs)))

    return network.rebuilt(add)


def square_sums(network: Network, params: Params, call: Callable[[Network, Params], Any]) -> dict[str, jax.Array]:
    """{path of a kernel: sums of x^2 over all tokens that enter it, (in,) or (layers, in)}; traceable.

    Args:
      network, params: without probes.
      call: what runs the network, (network, params) -> a tree of arrays of which something depends on every map.
    """
    observed = probed(network)
    known = flatten(params)
    probes = {path: leaf for path, leaf in flatten(observed.abstract_params).items() if path not in known}

    def run(probes: dict[str, jax.Array]) -> jax.Array:
        made = call(observed, unflatten({**known, **probes}))
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(made))

    sums = jax.grad(run)({path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in probes.items()})
    return {f"{path.removesuffix(PROBE)}.kernel": value for path, value in sums.items()}
