"""Slices by name: chips and their memory; a wrong name is one clear line."""

import importlib.util

import pytest

from magic141_jax.aot import topology
from magic141_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "kind"),
    [
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5e:2x4", 8, "TPU v5 lite"),
        ("v5p:2x2x2", 8, "TPU v5"),
        ("v6e:1x1", 1, "TPU v6 lite"),
    ],
)
def test_a_chip_is_a_device(name, chips, kind, libtpu):
    made = topology.make(name)
    assert len(made.devices) == chips and made.compiles
    assert {device.device_kind for device in made.devices} == {kind}


def test_gpus_without_a_compiler_have_stand_ins(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = topology.make("h100:8")
    assert len(made.devices) == 8 and not made.compiles and 79 < made.chip.memory / topology.GIB < 80
    with pytest.raises(UserError, match="needs 800 CPU devices"):
        topology.make("h100:800")
    with pytest.raises(UserError, match=r"needs libtpu: pip install"):
        topology.make("v6e:2x2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:2x2x2", "unknown chip 'v5q'. Did you mean 'v5p'"),
        ("v5p", "look like v5p:2x2x2"),
        ("v5p:2x2", "look like v5p:2x2x2"),
        ("v6e:2x2x2", "look like v6e:2x2"),
        ("v6e:0x2", "look like v6e:2x2"),
        ("h100:2x4", "look like h100:8"),
    ],
)
def test_wrong_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        topology.make(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_sizes_that_no_slice_has_are_one_line(libtpu):
    with pytest.raises(UserError, match=r"v5p:3x2x1: .*not divisible") as caught:
        topology.make("v5p:3x2x1")
    assert "\n" not in str(caught.value)
