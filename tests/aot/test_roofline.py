"""The three times of a program against numbers by hand."""

import jax
import pytest

from magic141_jax.aot import roofline, topology

CHIP = topology.Chip(memory=1, rate=100.0, bandwidth=10.0, interconnect=7.0, dimensions=0)


def times(**given):
    made = topology.Topology("a", CHIP, jax.devices()[:4], compiles=True, interconnect=2.0)
    return roofline.seconds(made, **given)


def test_a_program_waits_for_the_slowest():
    found = times(operations=1600.0, touched=30, received=1)
    assert found == pytest.approx(
        {
            "operations": 1600 / 4 / 100,  # of four chips together
            "hbm": 3.0,  # of one chip
            "interconnect": 0.5,  # the slice's own links, not all that the chip has
            "roofline": 4.0,
            "expected": 4 / 0.45,
            "sum": 7.5,
        }
    )
    assert times(operations=0.0, touched=30, received=70)["expected"] == 35


def test_without_a_compiled_program_only_operations_are_known():
    assert times(operations=1600.0) == {"operations": 4.0}


def test_a_single_chip_exchanges_nothing():
    made = topology.Topology("a", CHIP, jax.devices()[:1], compiles=True, interconnect=0.0)
    assert roofline.seconds(made, operations=100.0, touched=20, received=0)["sum"] == 3.0
