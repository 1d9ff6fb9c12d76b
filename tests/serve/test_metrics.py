"""Counters are a server's own."""

from magic141_jax.serve.metrics import Metrics


def test_two_servers_count_apart():
    one, two = Metrics(), Metrics()
    one.jobs.labels("completed").inc()
    assert b'magic141_jobs_total{outcome="completed"} 1.0' in one.text()
    assert b"completed" not in two.text() and b"process_resident_memory_bytes" in two.text()
