"""Jobs and the folder that they live in, which outlives the process.

    STATE/lock                   held by the one process that may use the folder
    STATE/jobs/ID.json           a job: what was asked for, and how far it is
    STATE/images/ID              its first frame, as it was sent
    STATE/videos/ID.mp4          what was made

Every file is written under another name and renamed, and a job counts as completed only when its video is there. So
after a crash each job is as it was, or, if it was being made, queued again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from magic141_jax import settings
from magic141_jax.errors import UserError

MAX_ATTEMPTS = 3  # starts of one job, each ended with the process: it may be the job that ends it
FINAL = ("completed", "failed")
LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One video: what was asked for, and how far it is.

    Attributes:
      id: "video_" and 32 hex digits.
      number: jobs are made in order of it.
      created_at, completed_at: seconds since 1970.
      model, prompt, seconds, size, steps, seed: as in `requests.Order`, with nothing left open.
      prompt_schedule: (seconds, prompt) of other prompts.
      image: whether a first frame was sent.
      status: "queued", "in_progress", "completed" or "failed".
      progress: per cent of the frames; not kept over a restart.
      attempts: how often it has been started.
      error: why it failed, for its owner.
    """

    id: str
    number: int
    created_at: int
    model: str
    prompt: str
    seconds: float
    size: str
    steps: int
    seed: int
    prompt_schedule: tuple[tuple[float, str], ...] = ()
    image: bool = False
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    attempts: int = 0
    completed_at: int | None = None
    error: str | None = None

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL


def new_id() -> str:
    """An id that can't be guessed."""
    return f"video_{secrets.token_hex(16)}"


class Folder:
    """The files of all jobs. Whoever makes one holds its lock until the process ends or `close`."""

    def __init__(self, path: Path) -> None:
        """Makes the folder where there is none; raises `UserError` if it can't be written or another process has it."""
        self.path, self.videos = path, path / "videos"
        try:
            for name in ("jobs", "images", "videos"):
                (path / name).mkdir(parents=True, exist_ok=True)
            self._lock = (path / "lock").open("w")
        except OSError as error:
            raise UserError(f"can't write into the --state folder {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"another server uses the --state folder {path}; stop it, or name another folder") from None

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()

    def image(self, id: str) -> Path:
        """Where a job's first frame is."""
        return self.path / "images" / id

    def video(self, id: str) -> Path:
        """Where a job's video is, or will be."""
        return self.videos / f"{id}.mp4"

    def write(self, job: Job) -> None:
        """Stores a job."""
        _write(self._record(job.id), json.dumps(dataclasses.asdict(job), indent=2).encode() + b"\n")

    def write_image(self, id: str, data: bytes) -> None:
        """Stores a first frame."""
        _write(self.image(id), data)

    def remove(self, id: str) -> None:
        """Removes all files of a job, its record last."""
        for path in (self.video(id), self.image(id), self._record(id)):
            path.unlink(missing_ok=True)

    def read(self) -> list[Job]:
        """All jobs, in order; what the last process left unfinished is queued again, and its leavings are removed."""
        for folder in ("jobs", "images", "videos"):
            for leaving in (self.path / folder).glob(".*"):
                leaving.unlink()
        jobs = sorted(self._read_all(), key=lambda job: job.number)
        for file in (*(self.path / "images").iterdir(), *self.videos.iterdir()):
            if not self._record(file.stem).exists():
                file.unlink()
        return jobs

    def _record(self, id: str) -> Path:
        return self.path / "jobs" / f"{id}.json"

    def _read_all(self) -> Iterator[Job]:
        for file in (self.path / "jobs").glob("*.json"):
            try:
                job = settings.build(Job, json.loads(file.read_text()), where=file.name)
                if job.id != file.stem:
                    raise UserError(f"it is for {job.id}")
            except (OSError, ValueError, AttributeError) as error:
                LOG.warning("left out the job %s, which can't be read: %s", file, error)
                continue
            recovered = self._recovered(job)
            if recovered != job:
                self.write(recovered)
            yield recovered

    def _recovered(self, job: Job) -> Job:
        if job.status == "completed" and not self.video(job.id).is_file():
            return dataclasses.replace(job, status="failed", error="the video is no longer on the server")
        if job.status == "in_progress" and job.attempts >= MAX_ATTEMPTS:
            return dataclasses.replace(job, status="failed", error=f"the server ended {MAX_ATTEMPTS} times in the job")
        return job if job.final else dataclasses.replace(job, status="queued", progress=0)


def _write(path: Path, data: bytes) -> None:
    """All of a file or, after any failure, what was there before."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
