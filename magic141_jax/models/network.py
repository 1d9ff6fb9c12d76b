"""A functional view of an NNX module: `init(key) -> params`, `network(params, *inputs) -> outputs`.

The module is built abstractly, split once into (graphdef, state) and merged inside the traced function, because
`nnx.jit` costs some 40 times `jax.jit` a call in Python and a jitted function of plain arrays can be donated,
sharded and checkpointed like any other. `params` is a nested dict of arrays (see `magic141_jax.pytree`).

Layers of a kind are stacked on a leading axis, in a module called `layers` or `..._blocks`, and `scan` runs them one
after the other. It also takes layers that lie `apart`, as programs for a CPU get them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from magic141_jax.pytree import Params, flatten, unflatten

STACKED = re.compile(r"(^|\.)(layers|\w*blocks)\.(?!\d)")  # in a path; modules of a list have numbers there


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


def apart(params: Params) -> Params:
    """The same parameters with a tuple of layers in the place of each stack, on one CPU; elsewhere as they are.

    XLA for a CPU copies the weights of a layer out of their stack whenever a scan comes to it. Arrays of their own are
    multiplied where they lie; here they are views of the stacks, so nothing is held twice. Packed kernels stay stacked,
    for a scan expands one layer at a time; of layers written out XLA expands all ahead of a walk.
    """
    flat = flatten(params)
    stacks = {path: leaf for path, leaf in flat.items() if STACKED.search(path)}
    if not all(isinstance(leaf, jax.Array) and _on_one_cpu(leaf) for leaf in stacks.values()):
        return params
    if any(leaf.dtype.itemsize == 1 for leaf in stacks.values()):
        return params
    return unflatten(flat | {path: tuple(map(jax.device_put, np.asarray(leaf))) for path, leaf in stacks.items()})


def scan(
    body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]], carry: Any, layers: nnx.State, *, others: Any = None
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, carry, (layers, others))`, and the same loop over layers that lie `apart`, written out."""

    def is_stack(x: Any) -> bool:
        return isinstance(x, tuple)

    stacks = jax.tree.leaves(layers, is_leaf=is_stack)
    if not is_stack(stacks[0]):
        return jax.lax.scan(body, carry, (layers, others))
    outputs, body = [], jax.jit(body)  # traced once
    for i in range(len(stacks[0])):
        layer = jax.tree.map(lambda stack, i=i: stack[i], layers, is_leaf=is_stack)
        carry, output = body(carry, (layer, jax.tree.map(lambda x, i=i: x[i], others)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jax.numpy.stack(x), *outputs)


def through(layers: nnx.Module, x: jax.Array, *others: Any) -> jax.Array:
    """x through stacked layers, one after the other, each called as layer(x, *others) -> x."""
    graphdef, stacked = nnx.split(layers)

    def step(x: jax.Array, inputs: tuple[nnx.State, None]) -> tuple[jax.Array, None]:
        return nnx.merge(graphdef, inputs[0])(x, *others), None

    return scan(step, x, stacked)[0]


def _on_one_cpu(array: jax.Array) -> bool:
    return [device.platform for device in array.devices()] == ["cpu"]


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
