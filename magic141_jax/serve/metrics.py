"""What a server counts, for Prometheus; docs/serving.md lists it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        ProcessCollector(**own)  # memory, open files
        self.jobs = Counter("magic141_jobs", "Jobs by what became of them", ["outcome"], **own)
        self.queued = Gauge("magic141_queue_length", "Jobs that wait", **own)
        self.running = Gauge("magic141_jobs_running", "Jobs that are being made: 0 or 1", **own)
        self.ready = Gauge("magic141_ready", "1 once every bucket is compiled", **own)
        self.compile_seconds = Gauge("magic141_compile_seconds", "How long a bucket took", ["bucket"], **own)
        self.window_seconds = Histogram("magic141_window_seconds", "From window to window", buckets=SECONDS, **own)
        self.job_seconds = Histogram("magic141_job_seconds", "From start to file", buckets=SECONDS, **own)
        self.wait_seconds = Histogram("magic141_wait_seconds", "From request to start", buckets=SECONDS, **own)
        self.frames = Counter("magic141_frames", "Frames made", **own)
        self.requests = Counter("magic141_http_requests", "HTTP requests", ["method", "route", "status"], **own)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
