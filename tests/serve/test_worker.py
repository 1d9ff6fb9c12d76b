"""The device thread: one job after the other, whatever happens to the one before."""

import dataclasses
import errno
import functools
import time

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines.long_video import VideoStream
from magic141_jax.serve import worker as module
from magic141_jax.serve.jobs import Folder
from magic141_jax.serve.requests import Refusal
from magic141_jax.serve.worker import Worker
from tests.serve.conftest import png, wait
from tests.serve.test_jobs import a_job


class Device:
    """Stands for the networks: windows of one gray frame each, as many as are let through."""

    def __init__(self):
        self.windows, self.failing = 10**6, {}

    def lets(self, number, prompt):
        return self.windows > number or prompt == "a"

    def stream(self, pipeline, prompt, *, total_frames, **options):
        if prompt in self.failing:
            raise self.failing[prompt]

        def frames():
            for number in range(total_frames):
                wait(functools.partial(self.lets, number, prompt))
                time.sleep(0.005)
                yield np.full((1, 32, 32, 3), 0.5, np.float32)

        return VideoStream(np.zeros((32, 32, 3)), frames())


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(module, "stream_video", made.stream)
    return made


@pytest.fixture
def start(pipeline, catalog, tmp_path, device):
    """start() -> a worker over the same folder as the one before, which must have been closed."""
    started = []

    def make(**changes):
        made = Worker(pipeline, dataclasses.replace(catalog, **changes), Folder(tmp_path / "state"))
        made.start()
        started.append(made)
        return made

    yield make
    device.windows = 10**6
    for worker in started:
        worker.close(20)
        worker.folder.close()


def outcome(worker, job):
    return wait(lambda: (now := worker.get(job.id)) is None or (now.final and now), seconds=10)


def test_in_the_order_in_which_they_came(start):
    worker = start()
    jobs = [worker.submit(a_job()) for _ in range(4)]
    assert [outcome(worker, job).status for job in jobs] == ["completed"] * 4
    assert [job.number for job in worker.jobs()] == [1, 2, 3, 4]
    assert all(worker.folder.video(job.id).is_file() for job in jobs)


def test_a_failure_ends_one_job(start, device):
    device.failing = {"mine": UserError("a picture is missing"), "ours": RuntimeError("secret")}
    worker = start()
    jobs = [worker.submit(a_job(prompt=prompt)) for prompt in ("mine", "ours", "a cat")]
    made = [outcome(worker, job) for job in jobs]
    assert [job.status for job in made] == ["failed", "failed", "completed"]
    assert made[0].error == "a picture is missing"
    assert "RuntimeError" in made[1].error and "secret" not in made[1].error
    assert not list(worker.folder.videos.glob(".*"))


def test_a_window_may_be_the_last(start, device):
    device.windows = 3
    worker = start()
    with pytest.raises(Refusal, match="picture"):
        worker.submit(a_job(), b"no picture")
    job = worker.submit(a_job(seconds=20.0), png())
    wait(lambda: worker.get(job.id).progress)
    assert (worker.preview(job.id)[1].shape, worker.preview("another")) == ((1, 32, 32, 3), None)
    assert worker.delete(job.id) and not worker.delete(job.id) and worker.get(job.id) is None
    device.windows = 4
    other = worker.submit(a_job(seconds=0.3))
    assert outcome(worker, other).status == "completed"
    assert [p.stem for p in worker.folder.videos.iterdir()] == [other.id]


def test_closing_queues_again(start, device):
    device.windows = 3
    worker = start()
    running, queued = (worker.submit(a_job(seconds=s)) for s in (20.0, 1.0))
    wait(lambda: worker.get(running.id).progress)
    device.windows = 10**6
    worker.close(0)
    with pytest.raises(Refusal, match="shutting down"):
        worker.submit(a_job())
    assert not worker.busy and worker.get(running.id).status == "queued" and not worker.ready
    worker.folder.close()
    after = start()
    assert [outcome(after, job).status for job in (running, queued)] == ["completed"] * 2
    assert after.get(running.id).attempts == 1, "a stop in order is no attempt"


def test_closing_gives_time(start, device):
    worker = start()
    job = worker.submit(a_job(seconds=20.0))
    wait(lambda: worker.get(job.id).status == "in_progress")
    worker.close(30)
    assert worker.get(job.id).status == "completed"


def test_other_weights(start):
    worker = start()
    made = outcome(worker, worker.submit(a_job(model="other")))
    assert made.status == "failed" and "no longer makes 64x64 in 2 steps with 'other'" in made.error


def test_the_old_go(start, catalog):
    worker = start(limits=dataclasses.replace(catalog.limits, keep_hours=1e-6))
    old = worker.submit(a_job())
    wait(lambda: worker.get(old.id) is None or worker.get(old.id).final)
    time.sleep(1.1)  # stored times are whole seconds
    worker.submit(a_job(seconds=0.1))
    wait(lambda: worker.get(old.id) is None)
    assert not worker.folder.video(old.id).exists()


def test_a_disk_that_is_full_for_a_while(start, device, monkeypatch):
    device.windows = 3
    worker = start()
    job = worker.submit(a_job(seconds=1.0))
    wait(lambda: worker.get(job.id).progress)

    def full(_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(worker.folder, "write", full)
        with pytest.raises(OSError, match="full"):
            worker.submit(a_job())
        device.windows = 10**6
        assert outcome(worker, job).status == "completed"
    assert len(worker.jobs()) == 1
    assert outcome(worker, worker.submit(a_job())).status == "completed"


def test_what_can_not_be_compiled(start, device, pipeline, catalog, tmp_path):
    device.failing = {"a": RuntimeError("out of memory")}
    worker, told = Worker(pipeline, catalog, Folder(tmp_path / "state")), []
    worker.start(lambda: told.append(True))
    wait(lambda: told)
    assert isinstance(worker.failure, RuntimeError) and not worker.ready
    worker.folder.close()
