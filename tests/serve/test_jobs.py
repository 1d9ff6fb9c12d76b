"""The folder of jobs: what a crash leaves behind, and who may use it."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest

from magic141_jax.errors import UserError
from magic141_jax.serve import jobs
from magic141_jax.serve.jobs import Folder, Job, new_id


def a_job(number=1, **fields):
    told = {"model": "tiny", "prompt": "a cat", "seconds": 1.0, "size": "64x64", "steps": 2, "seed": 3}
    return Job(**{"id": new_id(), "number": number, "created_at": 1000, **told, **fields})


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "state")
    yield made
    made.close()


def test_round_trip_in_order(folder):
    written = [a_job(n, prompt_schedule=((0.5, "a dog"), (2.0, "ein Bär"))) for n in (10, 9, 11)]
    for job in written:
        folder.write(job)
    assert folder.read() == sorted(written, key=lambda job: job.number)


@pytest.mark.parametrize(
    ("status", "attempts", "video", "expected"),
    [
        ("queued", 0, False, "queued"),
        ("in_progress", 1, False, "queued"),
        ("in_progress", jobs.MAX_ATTEMPTS, False, "failed"),
        ("completed", 1, True, "completed"),
        ("completed", 1, False, "failed"),
        ("failed", 1, False, "failed"),
    ],
)
def test_after_a_crash(folder, status, attempts, video, expected):
    job = a_job(status=status, attempts=attempts, progress=40)
    folder.write(job)
    if video:
        folder.video(job.id).write_bytes(b"mp4")
    (found,) = folder.read()
    assert (found.status, found.attempts) == (expected, attempts)
    assert folder.read() == [found], "what was decided is on disk"
    assert (found.error is None) == (expected != "failed" or status == "failed")


def test_leavings_go_and_what_is_not_ours_stays(folder):
    job = a_job()
    folder.write(job)
    folder.write_image(job.id, b"png")
    for leaving in (f"jobs/.{job.id}.json-1", f"videos/.{job.id}-1.mp4", "images/video_gone", "videos/video_gone.mp4"):
        (folder.path / leaving).write_bytes(b"half")
    broken = [folder.path / "jobs" / f"video_{name}.json" for name in "abcd"]
    record = json.loads((folder.path / "jobs" / f"{job.id}.json").read_text())
    for file, text in zip(broken, ["{", "[]", '{"id": 1}', json.dumps(record)], strict=True):
        file.write_text(text)
    folder.video("video_a").write_bytes(b"mp4")
    assert folder.read() == [job]
    kept = sorted(p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*") if p.is_file())
    ours = [f"images/{job.id}", f"jobs/{job.id}.json", "lock", "videos/video_a.mp4"]
    assert kept == sorted([*ours, *(f"jobs/{file.name}" for file in broken)])


def test_removed(folder):
    job = a_job()
    folder.write(job)
    folder.write_image(job.id, b"png")
    folder.video(job.id).write_bytes(b"mp4")
    folder.remove(job.id)
    folder.remove(job.id)
    assert [p.name for p in folder.path.rglob("*") if p.is_file()] == ["lock"]


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    job = a_job()
    folder.write(job)

    def full(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(jobs.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        folder.write(dataclasses.replace(job, status="failed"))
    assert folder.read() == [job] and not list((folder.path / "jobs").glob(".*"))


def test_one_process_at_a_time(folder):
    with pytest.raises(UserError, match="another server uses"):
        Folder(folder.path)
    folder.close()
    Folder(folder.path).close()


def test_a_folder_that_can_not_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write into the --state folder"):
        Folder(Path(tmp_path / "file" / "state"))
