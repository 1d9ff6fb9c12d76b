"""One program in several processes: joined at the start, told apart where files are written, agreed on when to stop.

On a TPU pod every host runs one process, on nodes of GPUs a host runs one or more. `start` joins them to one set of
devices; from then on each runs the same program, and whatever computes on arrays over the mesh must be called by all
of them in the same order. What must happen once, such as writing a file, goes through `once`.

    JAX_COORDINATOR_ADDRESS=HOST:PORT   where the first process listens
    JAX_NUM_PROCESSES, JAX_PROCESS_ID   how many there are, and which of them this is, from 0
    MAGIC141_JAX_START_SECONDS          how long to wait for the others at the start (300)
    MAGIC141_JAX_HEARTBEAT_SECONDS      how long a process may be silent until the others end (100)

The first three are not needed where JAX finds the cluster by itself: on TPU pods, under SLURM, Open MPI, Kubernetes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax._src import clusters, distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from magic141_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
START_SECONDS, HEARTBEAT_SECONDS = "MAGIC141_JAX_START_SECONDS", "MAGIC141_JAX_HEARTBEAT_SECONDS"
DAY_IN_MS = 86_400_000
_numbers = itertools.count()


class Place(NamedTuple):
    """A process's place among all. `devices` are the local ones that it takes; None takes all of its host."""

    address: str
    count: int
    index: int
    devices: list[int] | None = None


def start() -> None:
    """Joins the processes of one program; does nothing for a single one. To be called before JAX sees any device.

    Raises:
      UserError: the environment contradicts itself, or this process can't listen. A process that waits in vain for
        the others writes one line too, and ends with code 2.
    """
    if jax.distributed.is_initialized():
        return
    place = find_place()
    if place is None:
        return
    patience, heartbeat = _number(START_SECONDS, 300, least=1), _number(HEARTBEAT_SECONDS, 100, least=1)
    # It would catch SIGTERM and keep it to itself; see `Vote`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _ending_after(patience, f"{_name(place)} waited {patience} s at {place.address}: not all have come there"):
            jax.distributed.initialize(
                place.address,
                place.count,
                place.index,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=patience + 60,
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=heartbeat,
            )
    except RuntimeError as error:
        raise UserError(f"{_name(place)} can't join the others at {place.address}: {error}") from None
    if place.index:
        logging.set_verbosity(logging.ERROR)


def find_place() -> Place | None:
    """This process's place by the environment, or by what JAX knows of the cluster; None where it is alone.

    Raises:
      UserError: a variable is missing or makes no sense.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if COUNT in given and _number(COUNT, 1, least=1) == 1:
        return None
    cluster = None if len(given) == 3 else _cluster()
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if cluster is None and missing:
        if given:
            raise UserError(f"{', '.join(given)} is set, but not {', '.join(missing)}; to join processes set all three")
        return None
    return _place(given, cluster)


def _place(given: Mapping[str, str], cluster: Any) -> Place | None:
    """A place by the variables that are given, and by what the cluster says for the others."""
    try:
        count = _number(COUNT, 1, least=2) if COUNT in given else cluster.get_process_count()
        if count == 1:
            return None
        index = _number(INDEX, 0, least=0) if INDEX in given else cluster.get_process_id()
        address = given.get(ADDRESS) or cluster.get_coordinator_address(
            timeout_secs=_number(START_SECONDS, 300, least=1),
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
    except UserError:
        raise
    except Exception as error:  # whatever a cluster's interface may raise
        raise UserError(
            f"can't tell this process's place by {cluster.__name__} ({error!r}); set {COUNT}=1 for one alone, "
            f"or {ADDRESS}, {COUNT} and {INDEX}"
        ) from None
    if index >= count:
        raise UserError(f"{INDEX} is {index}, but {COUNT} is {count}: they are numbered from 0 to {count - 1}")
    if not address.rpartition(":")[2].isdecimal() or ":" not in address:
        raise UserError(f"{ADDRESS} is {address!r}; write HOST:PORT of the first process")
    return Place(address, count, index, _own_devices(cluster, count))


def leads() -> bool:
    """Whether this is the first process: the one that prints, logs and writes files."""
    return jax.process_index() == 0


def once(act: Callable[[], Any]) -> None:
    """Calls `act` in the first process, while the others wait. It must not compute on arrays over the mesh.

    Raises:
      UserError: in all processes, where `act` raised one; in the others, where it raised anything.
    """
    if jax.process_count() == 1:
        act()
        return
    client: Any = distributed.global_state.client
    key, said = f"magic141_jax/once/{next(_numbers)}", ""
    if not leads():
        said = client.blocking_key_value_get(key, DAY_IN_MS)
        if said != "done":
            raise UserError(said)
        return
    try:
        act()
        said = "done"
    except UserError as error:
        said = str(error)
        raise
    except BaseException as error:
        said = f"the first process failed: {error!r}"
        raise
    finally:
        client.key_value_set(key, said)


class Vote:
    """Whether any process wants to stop, told to all of them at the same step: a flag a device, added up by the mesh.

    The outcome is read one step late, so that no host waits for the step that it has just started. JAX has a service
    for this (`multihost_utils.reached_preemption_sync_point`). It can't be told of Ctrl-C, waits for a step number
    that must never go back, and loses a notice that comes before the first step of a resumed run.
    """

    def __init__(self) -> None:
        self._mesh = Mesh(np.array(jax.devices()), ("all",))
        self._any = jax.jit(jax.numpy.any, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._last: jax.Array | None = None

    def __call__(self, asked: bool) -> bool:
        """Whether any process asked in the call before; with one process, whether it asks now. All have to call it."""
        if jax.process_count() == 1:
            return asked
        split = NamedSharding(self._mesh, PartitionSpec("all"))
        flags = jax.make_array_from_callback((self._mesh.size,), split, lambda _: np.array([asked]))
        last, self._last = self._last, self._any(flags)
        return last is not None and bool(last)


def _cluster() -> Any:
    """JAX's class for the cluster that this process runs in; None on a single machine.

    Only on a TPU VM is anybody asked (its metadata server); elsewhere variables of the environment tell.
    """
    tpu = "tpu" in (jax.config.jax_platforms or "tpu")  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Kubernetes library that isn't installed
        return next((kind for kind in kinds if (tpu or "tpu" not in kind.name) and kind.is_env_present()), None)


def _own_devices(cluster: Any, count: int) -> list[int] | None:
    """The local devices of one of several processes on a host: JAX's choice, one each; None for a host's only one."""
    if cluster is None:
        return None  # JAX_LOCAL_DEVICE_IDS is JAX's own
    alone = {
        "slurm": os.environ.get("SLURM_STEP_NUM_NODES") == str(count),
        "ompi": os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1",
    }
    local = None if alone.get(cluster.name, True) else cluster.get_local_process_id()
    return None if local is None else [local]


def _number(name: str, default: int, *, least: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}; it must be a whole number from {least}")
    return int(text)


def _name(place: Place) -> str:
    return f"process {place.index} of {place.count}"


@contextlib.contextmanager
def _ending_after(seconds: int, message: str) -> Iterator[None]:
    """Ends this process with a line if its body takes longer: JAX's own end of waiting is an abort with a trace."""

    def end() -> None:
        sys.stderr.write(f"error: {message}; start them all, with the same address, and see that it can be reached\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
