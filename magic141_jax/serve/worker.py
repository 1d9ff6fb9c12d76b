"""The queue, and the one thread that owns the device.

Jobs are made one by one, window by window. Between two windows the thread looks whether the job is still wanted and
whether the process is to end; so a cancelled job costs at most the window that is being computed and the one started
ahead of it. All other threads only read jobs, or change them under one lock.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media, provenance
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.serve.buckets import Bucket, Catalog
from magic141_jax.serve.jobs import Folder, Job
from magic141_jax.serve.metrics import Metrics
from magic141_jax.serve.requests import Refusal, check_image

WINDOW_SECONDS = 30.0  # how long a process that ends waits for the window that is being computed
EXPIRY_CHECK = 60.0  # seconds between two looks for what is too old
RETRY_SECONDS = (1, 120)  # bounds of what a client that finds the queue full is told to wait
LOG = logging.getLogger(__name__)


class _Stop(Exception):
    """The job that is being made is no longer wanted, or has to wait for the next process."""


class Worker:
    """All jobs, and the thread that makes them."""

    def __init__(
        self,
        pipeline: TextToVideoPipeline,
        catalog: Catalog,
        folder: Folder,
        *,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes over the jobs of `folder`; `loading` says in the videos' metadata how the pipeline was loaded."""
        self.catalog, self.folder, self.metrics = catalog, folder, Metrics()
        self.compiled: dict[Bucket, float] = {}
        self.failure: BaseException | None = None
        self.closing = False
        self._pipeline, self._loading = pipeline, loading or {}
        self._on_failure: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._jobs = {job.id: job for job in folder.read()}
        self._number = max((job.number for job in self._jobs.values()), default=0)
        self._running: str | None = None
        self._preview: tuple[str, int, np.ndarray] | None = None
        self._interrupt = False
        self._mean_seconds = 5.0
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether every bucket is compiled and jobs are taken."""
        return len(self.compiled) == len(self.catalog.buckets) and not self.closing and self.failure is None

    @property
    def busy(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Starts the thread: it compiles every bucket, then makes jobs.

        When it can't go on, `failure` says why and `on_failure` is called, in the thread.
        """
        self._on_failure = on_failure
        self._thread.start()

    def close(self, grace: float) -> None:
        """Takes no more jobs; the one being made has `grace` seconds to end, else it is queued for the next process.

        Whatever still runs afterwards (a very long window, a compilation) may be ended with the process: as after a
        crash, nothing is half-written, and the job is queued again by the next one.
        """
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        self.metrics.ready.set(0)
        if len(self.compiled) < len(self.catalog.buckets):
            return  # a compilation can't be interrupted, and has nothing to lose
        self._thread.join(grace)
        self._interrupt = True
        self._thread.join(WINDOW_SECONDS)

    def submit(self, job: Job, image: bytes | None = None) -> Job:
        """Queues a job, with its first frame if it has one; it is on disk before this returns. Raises `Refusal`."""
        if image is not None:
            check_image(image, self.catalog)
        with self._changed:
            if self.closing:
                raise Refusal("the server is shutting down; try again soon", status=503, code="closing", retry_after=5)
            waiting = len(self._waiting())
            if waiting >= self.catalog.limits.queue:
                self.metrics.jobs.labels("refused").inc()
                message = f"{waiting} jobs are waiting, and no more are taken; try again later"
                raise Refusal(message, status=429, code="queue_full", retry_after=self._retry_after())
            self._number += 1
            job = dataclasses.replace(job, number=self._number)
            try:
                if image is not None:
                    self.folder.write_image(job.id, image)
                self.folder.write(job)
            except BaseException:
                self.folder.remove(job.id)
                raise
            self._jobs[job.id] = job
            self._measure()
            self._changed.notify_all()
            return job

    def get(self, id: str) -> Job | None:
        """A job as it is now; None if there is none."""
        return self._jobs.get(id)

    def jobs(self) -> list[Job]:
        """All jobs, in the order in which they came."""
        with self._changed:
            return sorted(self._jobs.values(), key=lambda job: job.number)

    def position(self, job: Job) -> int:
        """How many jobs wait before this one."""
        with self._changed:
            return sum(other.number < job.number for other in self._waiting())

    def preview(self, id: str) -> tuple[int, np.ndarray] | None:
        """Of the job that is being made: the number of its last window, from 1, and that window's frames."""
        preview = self._preview
        return None if preview is None or preview[0] != id else preview[1:]

    def delete(self, id: str) -> bool:
        """Forgets a job and its files; one that is being made stops at its next window. False if there is none."""
        with self._changed:
            job = self._jobs.pop(id, None)
            if job is None:
                return False
            self.folder.remove(id)
            if not job.final:
                self.metrics.jobs.labels("cancelled").inc()
            self._measure()
            return True

    def _waiting(self) -> list[Job]:
        return sorted((j for j in self._jobs.values() if j.status == "queued"), key=lambda job: job.number)

    def _retry_after(self) -> int:
        low, high = RETRY_SECONDS
        return int(min(max(self._mean_seconds, low), high))

    def _update(self, id: str, **changes: Any) -> Job:
        """Changes a job on disk and in memory; raises `_Stop` if it has been deleted meanwhile."""
        with self._changed:
            if id not in self._jobs:
                raise _Stop
            job = self._jobs[id] = dataclasses.replace(self._jobs[id], **changes)
            try:
                self.folder.write(job)
            except OSError:  # a full disk: the next process will find the job as it was, and this one goes on
                LOG.exception("the job %s could not be stored", id)
            self._measure()
            return job

    def _measure(self) -> None:
        self.metrics.queued.set(len(self._waiting()))
        self.metrics.running.set(self._running is not None)

    def _work(self) -> None:
        """The thread: compiles, then makes jobs until it is told to end. What a job raises ends that job alone."""
        try:
            self._compile()
            while (job := self._next()) is not None:
                self._run(job)
        except BaseException as error:
            self.failure = error
            LOG.error("the device thread ended", exc_info=not isinstance(error, UserError))
            self._on_failure()

    def _compile(self) -> None:
        """Makes the shortest video of every bucket, by which all its programs are compiled."""
        for bucket in self.catalog.buckets:
            if self.closing:
                return
            start = time.perf_counter()
            gray = np.full((bucket.height, bucket.width, 3), 0.5, np.float32)
            image = gray if self.catalog.from_image == "must" else None
            for _ in stream_video(self._pipeline, "a", total_frames=1, image=image, **bucket.options):
                pass
            seconds = self.compiled[bucket] = time.perf_counter() - start
            name = f"{bucket.size}, {bucket.steps} steps, {bucket.window} frames"
            self.metrics.compile_seconds.labels(name).set(seconds)
            LOG.info("compiled %s in %.1f s", name, seconds)
        self.metrics.ready.set(1)

    def _next(self) -> Job | None:
        """Waits for a job and marks it as being made; None when the process is to end."""
        while True:
            self._expire()
            with self._changed:
                if self.closing:
                    return None
                if waiting := self._waiting():
                    job = waiting[0]
                    self._running = job.id
                    return self._update(job.id, status="in_progress", attempts=job.attempts + 1)
                self._changed.wait(EXPIRY_CHECK)

    def _expire(self) -> None:
        oldest = time.time() - self.catalog.limits.keep_hours * 3600
        for job in self.jobs():
            if job.final and (job.completed_at or job.created_at) < oldest:
                self.delete(job.id)

    def _run(self, job: Job) -> None:
        """Makes a job and stores what became of it."""
        start = time.perf_counter()
        self.metrics.wait_seconds.observe(max(time.time() - job.created_at, 0))
        try:
            self._make(job)
            self._end(job, "completed", progress=100)
            seconds = time.perf_counter() - start
            self.metrics.job_seconds.observe(seconds)
            self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        except _Stop:
            if job.id in self._jobs:
                self._end(job, "requeued", status="queued", progress=0, attempts=job.attempts - 1)
        except UserError as error:
            self._end(job, "failed", error=str(error))
        except Exception as error:  # whatever it is, the next job may do better
            LOG.exception("the job %s failed", job.id)
            self._end(
                job, "failed", error=f"the video could not be made ({type(error).__name__}); see the server's log"
            )
        finally:
            self._preview = self._running = None
            if (now := self.get(job.id)) is None or now.final:
                self.folder.image(job.id).unlink(missing_ok=True)
            self._measure()

    def _end(self, job: Job, outcome: str, **changes: Any) -> None:
        if outcome in ("completed", "failed"):
            changes = {"status": outcome, "completed_at": int(time.time()), **changes}
        try:
            self._update(job.id, **changes)
            self.metrics.jobs.labels(outcome).inc()
        except _Stop:
            self.folder.remove(job.id)

    def _make(self, job: Job) -> None:
        """Makes the video's file; raises `_Stop` when it is no longer wanted or the process is to end."""
        bucket = self.catalog.pick(job.size, job.steps, job.seconds)
        if bucket is None or job.model != self.catalog.model:
            raise UserError(f"this server no longer makes {job.size} in {job.steps} steps with {job.model!r}")
        options = {**bucket.options, "seed": job.seed}
        total = self.catalog.frames(job.seconds)
        file = self.folder.image(job.id) if job.image else None
        about = provenance.describe(
            self._pipeline,
            job.prompt,
            options,
            schedule=job.prompt_schedule,
            frames=total,
            upscale=bucket.upscale,
            loading=self._loading,
            image=file,
        )
        about |= {"id": job.id, "image": "input_reference" if job.image else None}
        about.pop("image_path", None)  # where the server keeps its files is nobody's business
        image = media.read_image(file) if file else None
        told = {"total_frames": total, "image": image, "schedule": job.prompt_schedule}
        stream = stream_video(self._pipeline, job.prompt, **told, **options)
        with media.staged(self.folder.video(job.id)) as (temporary,):
            writer = media.BackgroundWriter(temporary, self.catalog.fps, about, upscale=bucket.upscale)
            with writer:
                self._windows(job, stream.frames, total, writer)
            self._check(job)

    def _windows(self, job: Job, windows: Any, total: int, writer: media.BackgroundWriter) -> None:
        done, start = 0, time.perf_counter()
        self._check(job)
        for number, frames in enumerate(windows, 1):
            writer.write(frames)
            done += len(frames)
            self._preview = (job.id, number, frames)
            self._check(job, progress=min(99, 100 * done // total))
            self.metrics.frames.inc(len(frames))
            self.metrics.window_seconds.observe(time.perf_counter() - start)
            start = time.perf_counter()

    def _check(self, job: Job, **changes: int) -> None:
        """Raises `_Stop` if the job has been deleted or has to wait; else tells how far it is, in memory alone."""
        with self._changed:
            if self._interrupt or job.id not in self._jobs:
                raise _Stop
            self._jobs[job.id] = dataclasses.replace(self._jobs[job.id], **changes)
