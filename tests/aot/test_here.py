"""The devices at hand, as far as a CPU has any."""

import time

import jax
import pytest

from magic141_jax.aot import here
from magic141_jax.convert.memory import memory_free


def test_cpu_devices_share_the_hosts_memory():
    whole, part = memory_free(jax.devices()[0]), here.free_memory(jax.devices())
    assert part == pytest.approx(whole / len(jax.devices()), rel=0.2)


def test_a_device_that_does_not_say_is_not_guessed(monkeypatch):
    monkeypatch.setattr(here, "memory_free", lambda device: None)
    assert here.free_memory(jax.devices()) is None


def test_the_process_counts_where_it_shares_memory_with_the_device(monkeypatch):
    one, all_of_them = here.process_memory(jax.devices()[:1]), here.process_memory(jax.devices())
    assert 50e6 < one < memory_free(jax.devices()[0]) * 100 and all_of_them == pytest.approx(one / 8, rel=0.1)
    monkeypatch.setattr(here.Path, "read_text", lambda path: "Name:\tpython\n")
    assert here.process_memory(jax.devices()) == 0


def test_the_rate_is_measured(monkeypatch):
    monkeypatch.setitem(here.SIDES, "cpu", 256)
    monkeypatch.setattr(here, "SECONDS", 0.05)
    start = time.perf_counter()
    rate = here.matmul_rate(jax.devices(), "float32")
    taken = time.perf_counter() - start
    # One try takes no longer than all of it took.
    assert here.LAYERS * 2 * 256**3 / taken < rate < 1e14
