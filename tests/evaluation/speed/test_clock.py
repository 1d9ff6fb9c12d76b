"""Timings against known times, and work that others do."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.evaluation.speed import clock


def test_medians_and_ranges():
    laps = [clock.Lap(wall, cpu, others) for wall, cpu, others in ((1, 0.5, 2), (4, 0.1, 2), (2, 0.9, 3))]
    found = clock.timing(laps)
    assert (found.repeats, found.median, found.least, found.most) == (3, 2, 1, 4)
    assert (found.cpu, found.cpu_least, found.cpu_most) == (0.5, 0.1, 0.9)
    assert found.other_cores == 1
    assert clock.timing([*laps, clock.Lap(1, 1, None)]).other_cores is None


def test_sleeping_takes_wall_time_and_no_cores():
    lap = clock.lap(lambda: time.sleep(0.05))
    assert lap.wall >= 0.05 and lap.cpu < 0.04


def test_working_takes_the_time_of_cores():
    def work():
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    lap = clock.lap(work)
    assert lap.cpu >= 0.05 and lap.wall >= 0.045


def test_sides_take_turns_after_a_first_call():
    order = []
    clock.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, shortest=0)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_short_calls_are_timed_many_at_a_time():
    calls = []
    found = clock.in_turns({"short": lambda: calls.append(time.sleep(0.005))}, 2, shortest=0.05)["short"]
    assert 2 + 2 * 3 <= len(calls) <= 2 + 2 * 10
    assert 0.005 <= found.least < 0.05


def test_results_are_waited_for():
    product = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, y: jnp.dot(x, y) / 300, x))
    x = np.ones((300, 300), np.float32)
    product(x).block_until_ready()
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    assert clock.lap(lambda: product(x)).wall > 0.1 * (time.perf_counter() - start)


def test_the_share_of_a_ceiling():
    best = clock.timing([clock.Lap(2.0, 1.0, None)])
    taken = clock.timing([clock.Lap(9.0, 4.0, None)])
    assert clock.share(100.0, taken, (best, 50.0)) == pytest.approx((100 / 4) / (50 / 1))  # by seconds of cores: a CPU
    found, operations = clock.matmul(jnp.float32, 2, side=16)
    assert operations == 2 * 16**3 and found.repeats == 2


def test_peak_memory_is_that_of_this_process():
    before = clock.peak_memory()["resident"]
    held = np.ones(40_000_000, np.float32)
    assert clock.peak_memory()["resident"] >= max(before, held.nbytes / 1e6)
