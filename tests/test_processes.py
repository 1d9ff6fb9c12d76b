"""Where a process stands by its environment; several real ones, which share arrays, errors and votes."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
from jax._src import clusters

from magic141_jax import processes
from magic141_jax.errors import UserError
from magic141_jax.processes import ADDRESS, COUNT, INDEX, Place

SLURM = {"JOB_ID": "7", "STEP_NODELIST": "node[01-02]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
CLUSTER_VARIABLES = ("SLURM", "OMPI", "JAX_", "MAGIC141", "KUBERNETES", "TPU", "MEGASCALE")


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment, without anything else that could name a cluster."""
    for name in os.environ:
        if name.startswith(CLUSTER_VARIABLES) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)

    def set_to(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def slurm(**changes):
    return {f"SLURM_{name}": value for name, value in (SLURM | changes).items()}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, None),
        ({COUNT: "1"}, None),
        ({COUNT: "1", **slurm()}, None),
        ({ADDRESS: "a:1", COUNT: "2", INDEX: "1"}, Place("a:1", 2, 1)),
        ({ADDRESS: "a:1", COUNT: "2", INDEX: "0", **slurm()}, Place("a:1", 2, 0)),
        (slurm(NTASKS="1"), None),
        # one process a node has all of its devices
        (slurm(STEP_NUM_NODES="2"), Place("node01:61447", 2, 1)),
        (slurm(NTASKS="8", STEP_NUM_NODES="1", PROCID="5", LOCALID="5"), Place("node01:61447", 8, 5, [5])),
        ({ADDRESS: "a:1", **slurm(STEP_NUM_NODES="2")}, Place("a:1", 2, 1)),
        ({"JAX_COORDINATOR_PORT": "9", **slurm(STEP_NUM_NODES="2")}, Place("node01:9", 2, 1)),
    ],
)
def test_places(environment, values, place):
    environment(values)
    assert processes.find_place() == place


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({ADDRESS: "a:1"}, f"{ADDRESS} is set, but not {COUNT}, {INDEX}"),
        ({COUNT: "2", INDEX: "0"}, f"not {ADDRESS}"),
        ({COUNT: "two"}, f"{COUNT} is 'two'; it must be a whole number from 1"),
        ({ADDRESS: "a:1", COUNT: "2", INDEX: "-1"}, f"{INDEX} is '-1'"),
        ({ADDRESS: "a:1", COUNT: "2", INDEX: "2"}, "numbered from 0 to 1"),
        ({ADDRESS: "a", COUNT: "2", INDEX: "0"}, "write HOST:PORT"),
        ({ADDRESS: "a:", COUNT: "2", INDEX: "0"}, "write HOST:PORT"),
        (slurm(NTASKS="many"), "place by SlurmCluster"),
    ],
)
def test_contradictions_are_named(environment, values, message):
    environment(values)
    with pytest.raises(UserError, match=message):
        processes.find_place()


def test_a_pod_is_asked_only_where_its_chips_are_used(environment, monkeypatch):
    """A program for the CPU, on one host of a pod, is alone."""
    pods = [kind for kind in clusters.ClusterEnv._cluster_types if "tpu" in kind.name]
    assert len(pods) >= 2
    for kind in pods:
        monkeypatch.setattr(kind, "is_env_present", classmethod(lambda cls: pytest.fail("asked")))
    environment({})
    assert processes.find_place() is None


def test_one_process_is_the_first_and_votes_alone():
    assert processes.leads()
    done = []
    processes.once(lambda: done.append(1))
    assert done == [1]
    vote = processes.Vote()
    assert [vote(asked) for asked in (False, True, False)] == [False, True, False]


def together(script, count, tmp_path, **more):
    """(exit code, stdout, stderr) of processes of two CPU devices each that run a script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index in more.pop("indices", range(count)):
        values = {ADDRESS: f"127.0.0.1:{port}", COUNT: str(count), INDEX: str(index), "JAX_NUM_CPU_DEVICES": "2"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "MAGIC141_JAX_HEARTBEAT_SECONDS": "10"} | values | more
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    return [(process.returncode, *said) for process in running for said in [process.communicate(timeout=120)]]


def test_others_that_do_not_come_are_one_line(tmp_path):
    script = """
        from magic141_jax import errors, processes
        errors.run_entry_point(processes.start)
    """
    ended = together(script, 3, tmp_path, indices=[0, 1], MAGIC141_JAX_START_SECONDS="2")
    for index, (code, _, errors) in enumerate(ended):
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(said) == 1, errors
        assert f"error: process {index} of 3 waited 2 s at 127.0.0.1:" in said[0]


@pytest.mark.heavy
def test_processes_share_arrays_errors_and_votes(tmp_path):
    script = """
        import sys
        from pathlib import Path

        from magic141_jax import processes

        processes.start()
        processes.start()  # once is enough
        import jax
        import numpy as np
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

        from magic141_jax import sharding
        from magic141_jax.errors import UserError

        me = jax.process_index()
        assert jax.process_count() == 2 and processes.leads() == (me == 0)

        # devices of two hosts in turn, as on a torus: each has rows with a gap in between
        order = np.array([jax.devices()[i] for i in (0, 2, 1, 3)]).reshape(4, 1, 1, 1)
        mesh = Mesh(order, sharding.AXES, axis_types=(AxisType.Auto,) * 4)
        rows = sharding.batch_rows(8, mesh)
        assert rows.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]][me], rows
        whole = np.arange(24).reshape(8, 3)
        batch = sharding.shard_batch({"x": whole[rows], "n": np.float32(2)}, mesh)
        assert batch["x"].shape == (8, 3) and not batch["x"].is_fully_addressable
        np.testing.assert_array_equal(sharding.to_host(batch)["x"], whole)
        np.testing.assert_array_equal(sharding.to_host(batch["x"], chunk=60), whole)  # two rows at a time
        kept = sharding.to_host(batch, keep=processes.leads())
        assert (kept["x"] is None) == (me == 1) and kept["n"] == 2

        # the devices of a sequence that two processes share want the same rows in both
        shared = sharding.make_mesh(sharding.MeshConfig(data=1, context=4))
        assert sharding.batch_rows(8, shared).tolist() == list(range(8))
        np.testing.assert_array_equal(sharding.to_host(sharding.shard_batch(whole, shared)), whole)
        np.testing.assert_array_equal(sharding.to_host(sharding.spread(whole, mesh)), whole)
        moved = sharding.place(batch["x"], NamedSharding(mesh, PartitionSpec()))
        np.testing.assert_array_equal(moved, whole)

        file = Path(sys.argv[1]) / "written"
        processes.once(lambda: file.write_text("x" * (1 + file.exists())))
        assert file.read_text() == "x"

        def wrong():
            raise UserError("no such data")

        try:
            processes.once(wrong)
            raise SystemExit("not told")
        except UserError as error:
            assert str(error) == "no such data"

        vote = processes.Vote()
        asked = [False, me == 1, me == 0, False, False]
        assert [vote(a) for a in asked] == [False, False, True, True, False]
        print("well")
    """
    for code, output, errors in together(script, 2, tmp_path):
        assert code == 0 and output.splitlines()[-1] == "well", errors
