"""Where a network's parameters are while nothing computes with them, so that the devices need not hold all at once.

Whoever opens a component makes a `Source` of it, and a `Lend` decides when it is read and how long it stays:

    at_once       read now; stays on the devices
    when_needed   read by the first program that takes it; stays on the devices
    Room.lender   on the devices while programs of its own component run; between them in the host's memory

The last two give a function in the place of the parameters, which `taken` calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from magic141_jax import pytree, sharding
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params

Held = Params | Callable[[], Params]


class Source(NamedTuple):
    """A component's parameters that have not been read.

    Attributes:
      network: whose they are.
      read: reads them onto a mesh by the rules; without one onto the default device.
      mesh: where programs want them.
      rules: how they lie over a mesh.
      check: raises `UserError` where they don't fit onto a mesh, or onto the default device.
    """

    network: Network
    read: Callable[[Mesh | None], Params]
    mesh: Mesh | None = None
    rules: sharding.Rules = ()
    check: Callable[[Mesh | None], Any] = lambda mesh: None


Lend = Callable[[Source], Held]


def taken(params: Held) -> Params:
    """The parameters on their devices; to be asked for anew by each program, and not kept beyond it."""
    return params() if callable(params) else params


def require_match(params: Held, want: Mapping[str, Any], *, what: str) -> None:
    """`pytree.require_match` of what has been read; whoever reads the rest compares it himself."""
    if not callable(params):
        pytree.require_match(params, want, what=what)


def at_once(source: Source) -> Params:
    """The parameters, read now."""
    source.check(source.mesh)
    return source.read(source.mesh)


def when_needed(source: Source) -> Callable[[], Params]:
    """The parameters, read when they are first taken."""
    return functools.cache(lambda: at_once(source))


class Room:
    """The devices' memory, with the parameters of one component at a time in it.

    Between times they are in the host's memory. A CPU has no other, so there they are read from disk again whenever
    they are needed. Of several processes each has all of them in its host's memory.
    """

    def __init__(self, *, on_host: bool | None = None) -> None:
        """An empty room; `on_host` false reads from disk each time, by default on a CPU only."""
        self._on_host = jax.default_backend() != "cpu" if on_host is None else on_host
        self._inside: dict[object, Params] = {}

    def lender(self) -> Lend:
        """Lends one component's parameters, of one network or of several, which are on the devices together."""
        own: dict[object, Params] = {}

        def lend(source: Source) -> Callable[[], Params]:
            source.check(source.mesh)
            fetch = _from_host(source) if self._on_host else functools.partial(source.read, source.mesh)
            name = object()

            def take() -> Params:
                if self._inside is not own:
                    self._inside.clear()  # before anything comes in
                    self._inside = own
                if name not in own:
                    own[name] = fetch()
                return own[name]

            return take

        return lend


def _from_host(source: Source) -> Callable[[], Params]:
    """Parameters that are read once into the host's memory, and copied to their devices from there."""

    @functools.cache
    def on_host() -> Params:
        with sharding.on_host():
            source.check(None)
            return jax.tree.map(np.asarray, source.read(None))

    def fetch() -> Params:
        if source.mesh is None:
            return jax.device_put(on_host())
        return sharding.lay(on_host(), source.mesh, source.rules)

    return fetch
