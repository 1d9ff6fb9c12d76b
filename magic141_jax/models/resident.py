"""Where a network's parameters are while nothing computes with them, so that the devices need not hold all at once.

Whoever opens a component makes a `Source` of it, and a `Lend` decides when it is read and how long it stays:

    at_once       read now; stays on the devices
    when_needed   read by the first program that takes it; stays on the devices
    Room.lender   on the devices while programs of its own component run; between them in the host's memory, and of
                  these parameters only those that the program reads are on the devices (`read_by`)

The last two give a `Lent` in the place of the parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from magic141_jax import pytree, sharding
from magic141_jax.models import stored
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Lent:
    """Parameters that are not there to stay: to be asked for anew by each program, and not kept beyond it.

    Attributes:
      shapes: of all of them, with their places on a mesh.
      bring: paths -> {path: array on its devices} of at least those of them that are there.
    """

    shapes: Params
    bring: Callable[[Collection[str]], Mapping[str, jax.Array]]

    def __call__(self) -> Params:
        """All of them."""
        return unflatten(self.bring(flatten(self.shapes)))


Held = Params | Lent


class Source(NamedTuple):
    """A component's parameters that have not been read.

    Attributes:
      network: whose they are.
      read: reads them onto a mesh by the rules; without one onto the default device.
      mesh: where programs want them.
      rules: how they lie over a mesh.
      check: (parameters by shape, mesh=) raises `UserError` where they don't fit onto it, or onto the default device.
    """

    network: Network
    read: Callable[[Mesh | None], Params]
    mesh: Mesh | None = None
    rules: sharding.Rules = ()
    check: Callable[..., Any] = lambda params, mesh: None

    @property
    def shapes(self) -> Params:
        """The parameters by shape, see `shapes`."""
        return shapes(self.network, self.mesh, self.rules)


Lend = Callable[[Source], Held]


def shapes(network: Network, mesh: Mesh | None = None, rules: sharding.Rules = ()) -> Params:
    """A network's parameters by shape, in the dtype that it computes in, laid over a mesh if there is one."""
    abstract = network.abstract_params
    params = stored.cast(abstract, jnp.dtype(getattr(network.config, "compute_dtype", "float32")))
    if mesh is None:
        return params
    where = sharding.shardings(abstract, mesh, rules)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, where)


def taken(params: Held) -> Params:
    """The parameters on their devices; to be asked for anew by each program, and not kept beyond it."""
    return params() if isinstance(params, Lent) else params


def require_match(params: Held, want: Mapping[str, Any], *, what: str) -> None:
    """`pytree.require_match` of what has been read; whoever reads the rest compares it himself."""
    if not isinstance(params, Lent):
        pytree.require_match(params, want, what=what)


def read_by(function: Callable[..., Any], params: Params, *arrays: Any) -> frozenset[str]:
    """The paths of those parameters that the results of `function(params, *arrays)` depend on; nothing is computed."""
    flat = flatten(params)
    traced = jax.jit(lambda flat, *arrays: function(unflatten(flat), *arrays)).trace(flat, *arrays)
    _, used = partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.out_avals))
    return frozenset(path for path, is_used in zip(sorted(flat), used, strict=False) if is_used)


def of_part(function: Callable[..., Any], shapes: Params) -> Callable[..., Any]:
    """`function(params, *arrays)` as one of {path: parameter} of those alone that it reads."""
    whole = flatten(shapes)

    def call(part: Mapping[str, Any], *arrays: Any) -> Any:
        # Zeros that nothing reads are in no program.
        others = {path: jnp.zeros(x.shape, x.dtype) for path, x in whole.items() if path not in part}
        return function(unflatten({**others, **part}), *arrays)

    return call


def at_once(source: Source) -> Params:
    """The parameters, read now."""
    source.check(source.network.abstract_params, mesh=source.mesh)
    return source.read(source.mesh)


def when_needed(source: Source) -> Lent:
    """The parameters, read when they are first taken."""
    read = functools.cache(lambda: flatten(at_once(source)))
    return Lent(source.shapes, lambda wanted: read())


class Room:
    """The devices' memory, with the parameters of one component at a time in it, and of these what is read.

    Between times they are in the host's memory. A CPU has no other, so there they are read from disk again whenever
    they are needed, a whole component at once. Of several processes each has all of them in its host's memory.

    Attributes:
      in_parts: whether there is a host's memory beside the devices', from where parts can come.
    """

    def __init__(self, *, on_host: bool | None = None) -> None:
        """An empty room; `on_host` false reads from disk each time, by default on a CPU only."""
        self.in_parts = jax.default_backend() != "cpu" if on_host is None else on_host
        self._inside: dict[object, dict[str, jax.Array]] = {}

    def there(self, paths: Collection[str], wanted: Collection[str]) -> set[str]:
        """Which of a component's `paths` are on the devices for a program that reads `wanted`."""
        return set(paths) & set(wanted) if self.in_parts else set(paths)

    def lender(self) -> Lend:
        """Lends one component's parameters, of one network or of several, which are on the devices together."""
        own: dict[object, dict[str, jax.Array]] = {}

        def lend(source: Source) -> Lent:
            shapes, name = source.shapes, object()
            paths = flatten(shapes).keys()
            fetch = (_from_host if self.in_parts else _from_disk)(source)

            def bring(wanted: Collection[str]) -> Mapping[str, jax.Array]:
                if self._inside is not own:
                    self._inside.clear()  # before anything comes in
                    self._inside = own
                there = own.setdefault(name, {})
                asked = self.there(paths, wanted)
                for path in there.keys() - asked:
                    del there[path]
                if missing := asked - there.keys():
                    there.update(fetch(missing))
                return dict(there)

            return Lent(shapes, bring)

        return lend


def _from_disk(source: Source) -> Callable[[Collection[str]], Mapping[str, jax.Array]]:
    """Parameters that are read whole each time; whether they fit is known at once."""
    source.check(source.network.abstract_params, mesh=source.mesh)
    return lambda paths: flatten(source.read(source.mesh))


def _from_host(source: Source) -> Callable[[Collection[str]], Mapping[str, jax.Array]]:
    """Parameters that are read once into the host's memory, and copied to their devices from there."""

    @functools.cache
    def on_host() -> Mapping[str, np.ndarray]:
        with sharding.on_host():
            source.check(source.network.abstract_params, mesh=None)
            return {path: np.asarray(leaf) for path, leaf in flatten(source.read(None)).items()}

    def fetch(paths: Collection[str]) -> Mapping[str, jax.Array]:
        def part(flat: Mapping[str, Any]) -> Params:
            return unflatten({path: flat[path] for path in paths})

        source.check(part(flatten(source.network.abstract_params)), mesh=source.mesh)
        made = part(on_host())
        return flatten(jax.device_put(made) if source.mesh is None else sharding.lay(made, source.mesh, source.rules))

    return fetch
