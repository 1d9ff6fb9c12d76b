"""What tests of slices and nodes need."""

import jax
import pytest


@pytest.fixture(autouse=True)
def devices():
    """The session's eight CPU devices, there before a command could choose their number."""
    return jax.devices()


@pytest.fixture
def libtpu():
    """The TPU compiler; tests are skipped where it is not installed."""
    return pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is in requirements-dev.txt")
