"""What tests of slices and nodes need."""

import jax
import pytest

from magic141_jax.aot import topology


@pytest.fixture(autouse=True)
def devices():
    """The session's eight CPU devices, there before a command could choose their number."""
    return jax.devices()


@pytest.fixture
def libtpu():
    """The TPU compiler; tests are skipped where it is not installed."""
    return pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is in requirements-dev.txt")


@pytest.fixture
def slice_of_four(libtpu):
    """A TPU slice of four chips that programs are compiled for."""
    return topology.make("v6e:2x2")


@pytest.fixture
def two_gpus():
    """Two GPUs that programs are compiled for; tests are skipped where XLA's CUDA plugin is not installed."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="XLA's CUDA plugin is not installed")
    return topology.make("h100:2")
