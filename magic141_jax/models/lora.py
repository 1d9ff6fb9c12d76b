"""Low-rank adapters (LoRA, arXiv 2106.09685) inside a network: y = x W + (x A) B beside every chosen linear map.

A (in, r) starts as LeCun's normal, B (r, out) at zero, so a fresh adapter changes nothing. Where layers are stacked so
are A and B, and a scan hands them out with W: W itself is never copied, and one frozen W serves any number of roles
(teacher: none, student: A and B, fake score: others), as MagicDistillation (arXiv 2503.13319) holds a 13B model once.

    adapter tree   {path: {"a", "b"}} beside {path: {"kernel", "bias"}}, path by path as in the parameters
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models import layers as nn
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, flatten, unflatten

# As W is cut over the mesh along its width, so is the side of A and B that meets the stream.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\.a$", ("fsdp", None)),
    (r"\.b$", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class ContinuationConfig:
    """An adapter of a transformer for all windows of a long video but the first (`distill.continuation`).

    Attributes:
      rank, paths: of the adapter, see `adapted`.
      overlap_latents: how many latents such a window knows: the first picture's, and the others of the window before.
      history_noise: the level of noise on those.
    """

    rank: int
    paths: str = ""
    overlap_latents: int = 2
    history_noise: float = 0.1


def adapted(network: Network, rank: int, *, paths: str = "") -> Network:
    """The same network with an adapter of `rank` at every `Linear` in whose dotted path the regex `paths` is found.

    Raises:
      UserError: the rank is below 1, or no linear map is found.
    """
    if rank < 1:
        raise UserError(f"a LoRA needs a rank of at least 1, not {rank}")

    found = []

    def adapt(path: str, node: nnx.Module, rngs: nnx.Rngs) -> None:
        if isinstance(node, nn.Linear) and re.search(paths, path):
            *stack, inputs, outputs = node.kernel.shape
            init = nn.LECUN_STACKED if stack else nn.LECUN
            node.a = nnx.Param(init(rngs.params(), (*stack, inputs, rank), jnp.float32))
            node.b = nnx.Param(jnp.zeros((*stack, rank, outputs)))
            found.append(path)

    made = network.rebuilt(adapt)
    if not found:
        raise UserError(f"no linear map of the network matches {paths!r}, so there is nothing to adapt")
    return made


def is_adapter(path: str) -> bool:
    """Whether a dotted path of an adapted network's parameters is one of the adapter's."""
    return path.endswith((".a", ".b"))


def fresh(network: Network, key: jax.Array) -> Params:
    """The adapter's part of an adapted network's fresh parameters; nothing else is drawn."""

    def draw(key: jax.Array) -> Params:
        return unflatten({path: leaf for path, leaf in flatten(network.init(key)).items() if is_adapter(path)})

    return jax.jit(draw)(key)  # one program, of which only this part is asked for


def join(params: Params, adapter: Params, scale: float = 1.0) -> Params:
    """Parameters of the adapted network: the frozen ones and `scale` times an adapter."""
    return unflatten({**flatten(params), **flatten(scaled(adapter, scale))})


def scaled(params: Params, scale: float | jax.Array) -> Params:
    """Parameters whose adapters, if any, count `scale` times: their B is scaled."""

    def scale_b(path: str, leaf: Any) -> Any:
        return jax.tree.map(lambda b: (b * scale).astype(b.dtype), leaf) if path.endswith(".b") else leaf

    return unflatten({path: scale_b(path, leaf) for path, leaf in flatten(params).items()})
