"""A functional view of an NNX module: `init(key) -> params`, `network(params, *inputs) -> outputs`.

The module is built abstractly, split once into (graphdef, state) and merged inside the traced function, because
`nnx.jit` costs some 40 times `jax.jit` a call in Python and a jitted function of plain arrays can be donated,
sharded and checkpointed like any other. `params` is a nested dict of arrays (see `magic141_jax.pytree`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from magic141_jax.pytree import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """An NNX module class with its config, seen as pure functions of a parameter dict."""

    config: Any
    build: Callable[..., nnx.Module]
    graphdef: nnx.GraphDef
    abstract_state: nnx.State

    @classmethod
    def create(cls, module: Callable[..., nnx.Module], config: Any) -> Network:
        """Builds `module(config, rngs=...)` abstractly: no memory is allocated."""
        abstract = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        return cls(config, module, graphdef, state)

    def rebuilt(self, change: Callable[[str, nnx.Module, nnx.Rngs], None]) -> Network:
        """The same network with its modules altered: `change(dotted path, module, rngs)` is called on each, once built.

        What it puts in the place of parameters may be of other shapes; nothing is computed here.
        """

        def build(config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
            module = self.build(config, rngs=rngs)
            for path, node in list(nnx.iter_modules(module)):
                change(".".join(map(str, path)), node, rngs)
            return module

        return Network.create(build, self.config)

    @property
    def abstract_params(self) -> Params:
        """The parameter dict with `jax.ShapeDtypeStruct` leaves."""
        return _to_params(self.abstract_state)

    def init(self, key: jax.Array) -> Params:
        """Draws fresh parameters from a PRNG key."""

        def draw(key: jax.Array) -> Params:
            return _to_params(nnx.state(self.build(self.config, rngs=nnx.Rngs(key))))

        return jax.jit(draw)(key)

    def __call__(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls a method of the module with the given parameters; traceable."""
        return getattr(self.bind(params), method)(*args, **kwargs)

    def bind(self, params: Params) -> nnx.Module:
        """The module with the given parameters; traceable."""
        return nnx.merge(self.graphdef, _to_state(self.abstract_state, params))


def _to_params(state: nnx.State) -> Params:
    """An NNX state as a nested dict with string keys and bare arrays."""

    def plain(node: Any) -> Any:
        return {str(k): plain(v) for k, v in node.items()} if isinstance(node, dict) else node

    return plain(nnx.to_pure_dict(state))


def _to_state(abstract: nnx.State, params: Params) -> nnx.State:
    flat = nnx.to_flat_state(abstract)
    leaves = []
    for path, variable in flat:
        node: Any = params
        for key in path:
            node = node[str(key)]
        leaves.append((path, variable.replace(node)))
    return nnx.from_flat_state(leaves)
