"""Slices by name: chips and their memory; a wrong name is one clear line."""

import importlib.util

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

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
    ("kind", "sizes", "links"),
    [
        ("v6e", (2, 4), 1 + 3 / 2),  # one neighbour along two, two for half of four
        ("v6e", (4, 4), 3 / 2 + 3 / 2),
        ("v5e", (16, 16), 4),  # rings
        ("v5e", (8, 16), 7 / 4 + 2),
        ("v6e", (1, 1), 0),
        ("v5p", (2, 2, 2), 3),
        ("v5p", (4, 4, 8), 6),
        ("v4", (2, 2, 4), 1 + 1 + 3 / 2),  # less than a cube of 4x4x4 is open all round
    ],
)
def test_links_of_a_chip(kind, sizes, links):
    chip = topology.CHIPS[kind]
    assert topology.share_of_links(chip, sizes) == pytest.approx(links / (2 * chip.dimensions))


def test_a_slice_has_its_own_links(libtpu):
    assert topology.make("v6e:2x4").interconnect == topology.CHIPS["v6e"].interconnect * 2.5 / 4


def test_published_rates_agree_among_each_other():
    """A chip does at least a hundred operations on a byte of its HBM, and its links are slower than that."""
    for chip in topology.CHIPS.values():
        assert 100 < chip.rate / chip.bandwidth < 1000
        assert chip.bandwidth / 10 < chip.interconnect < chip.bandwidth


def test_jax_takes_gpus_for_there_and_forgets_it(monkeypatch):
    gpu = topology.Topology("h100:1", topology.CHIPS["h100"], jax.devices()[:1], compiles=True, interconnect=1.0)
    before = cudnn.check_cudnn_version
    with pytest.raises(KeyError), topology.as_if_there(gpu):
        assert cudnn.check_cudnn_version() == topology.CUDNN_VERSION
        assert cudnn.check_compute_capability("8.0") and not cudnn.check_compute_capability("10.0")
        assert cudnn.is_cuda_compute_capability_equal("9.0") and not cudnn.is_cuda_compute_capability_equal("8.0")
        raise KeyError
    assert cudnn.check_cudnn_version is before
    with topology.as_if_there(topology.Topology("v6e:1x1", topology.CHIPS["v6e"], (), True, 1.0)):
        assert cudnn.check_cudnn_version is before


@pytest.mark.parametrize("count", [1, 4, 16])
def test_gpus_by_their_compiler(count, two_gpus):
    made = topology.make(f"h100:{count}")
    assert len(made.devices) == count and made.compiles and {d.platform for d in made.devices} == {"gpu"}
    with pytest.raises(UserError, match="h100:12: more than 8 GPUs are whole nodes of 8"):
        topology.make("h100:12")


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
