"""When parameters are read, where they lie meanwhile, and that one component at a time is on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.resident import (
    Lent,
    Room,
    Source,
    at_once,
    of_part,
    read_by,
    require_match,
    taken,
    when_needed,
)
from magic141_jax.sharding import MeshConfig, lay, make_mesh

NETWORK = Network.create(lambda config, rngs: nnx.Linear(4, 8, rngs=rngs), None)
RULES = ((r"kernel", (None, "fsdp")),)


def source(log, value=1.0, **options):
    """A component of which every reading is logged: where to, and on what device."""

    def read(mesh):
        params = {"kernel": jnp.full((4, 8), value), "bias": jnp.full((8,), value, jnp.bfloat16)}
        log.append((mesh, params["bias"].device))
        return lay(params, mesh, RULES)

    return Source(NETWORK, read, rules=RULES, **options)


def kernel(held):
    return taken(held)["kernel"]


def values(held):
    return float(kernel(held)[0, 0])


def test_at_once_and_when_needed_read_once():
    now, later = [], []
    held = at_once(source(now))
    assert len(now) == 1 and taken(held) is held
    held = when_needed(source(later))
    assert later == []
    assert kernel(held) is kernel(held) and len(later) == 1


@pytest.mark.parametrize("on_host", [False, True])
def test_a_room_holds_one_component(on_host):
    room, logs = Room(on_host=on_host), ([], [], [])
    one, other = room.lender(), room.lender()
    first, second, third = (lend(source(log, i)) for i, (lend, log) in enumerate(zip((one, one, other), logs)))
    before = jax.live_arrays()

    def there():
        new = [x for x in jax.live_arrays() if x.shape == (4, 8) and not any(x is other for other in before)]
        return sorted(float(x[0, 0]) for x in new)

    assert values(first) == 0 and values(second) == 1
    assert kernel(first) is kernel(first), "it stays as long as nothing else comes in"
    held = [0, 1, 0, 1] if on_host else [0, 1]  # of a CPU's arrays some are the host's copies
    assert there() == sorted(held)
    assert values(third) == 2 and there() == sorted([0, 1, 2, 2] if on_host else [2])
    assert values(first) == 0
    assert [len(log) for log in logs] == ([1, 1, 1] if on_host else [2, 1, 1])


def test_of_one_component_the_part_that_is_asked_for():
    room, log = Room(on_host=True), []
    lent = room.lender()(source(log))
    assert [x.shape for x in lent.bring({"kernel", "none of its own"}).values()] == [(4, 8)]
    assert set(lent.bring({"bias"})) == {"bias"}
    assert set(lent.bring({"kernel", "bias"})) == {"kernel", "bias"} == set(taken(lent)) and len(log) == 1
    assert lent.bring({"bias"})["bias"] is lent.bring({"bias"})["bias"], "it stays while it is asked for"
    whole = Room(on_host=False).lender()(source(log))
    assert set(whole.bring({"bias"})) == {"kernel", "bias"}, "from disk a component comes whole"


def test_what_a_program_reads_is_all_that_it_is_given():
    """Through a scan over stacks, of which it reads a part."""
    params = {"layers": {"a": jnp.arange(3.0), "b": jnp.ones(3)}, "c": jnp.ones(()), "d": {"e": jnp.ones(2)}}

    def function(params, x):
        made = jax.lax.scan(lambda x, layer: (x * 2 + layer["a"], None), x, params["layers"])[0]
        return made + 0 * jnp.sum(params["d"]["e"]).astype(int)

    assert read_by(function, jax.eval_shape(lambda: params), 1.0) == {"layers.a", "d.e"}
    part = {"layers.a": params["layers"]["a"], "d.e": params["d"]["e"]}
    program = jax.jit(of_part(function, jax.eval_shape(lambda: params)))
    assert program(part, 1.0) == function(params, 1.0) == 12


@pytest.mark.parametrize("on_host", [False, True])
def test_a_room_lays_parameters_over_the_mesh(on_host):
    mesh, log = make_mesh(MeshConfig(data=2, fsdp=4)), []
    held = Room(on_host=on_host).lender()(source(log, mesh=mesh))
    laid = kernel(held)
    assert laid.sharding.mesh == mesh and laid.sharding.spec == jax.P(None, "fsdp")
    assert taken(held)["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(laid, np.ones((4, 8)))
    assert log[0][0] == (None if on_host else mesh)


def test_what_does_not_fit_is_refused_before_it_is_read():
    log, places = [], []

    def check(params, mesh):
        places.append((set(params), mesh, next(iter(jnp.zeros(()).devices()))))
        if len(places) == limit:
            raise UserError("too large")

    limit, mesh, one = 2, make_mesh(MeshConfig(data=8)), jax.local_devices(backend="cpu")[0]
    held = Room(on_host=True).lender()(source(log, mesh=mesh, check=check))
    with pytest.raises(UserError, match="too large"):
        held.bring({"kernel"})
    assert places == [({"kernel"}, mesh, one), ({"kernel", "bias"}, None, one)], "the devices, then the host"
    for lend in (at_once, Room(on_host=False).lender()):
        limit = len(places) + 1
        with pytest.raises(UserError, match="too large"):
            lend(source(log, check=check))
    assert log == []


def test_only_what_is_there_is_compared():
    want = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    require_match(Lent(want, lambda wanted: 1 / 0), want, what="it")
    require_match({"kernel": np.zeros((2, 2))}, want, what="it")
    with pytest.raises(UserError, match="it does not fit"):
        require_match({"kernel": np.zeros((2, 3))}, want, what="it")
