"""The API by OpenAI's own client over a real port: what it makes, what it refuses, and what it survives."""

import base64
import json
import socket
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest

from magic141_jax.pipelines import media, provenance
from magic141_jax.pipelines.long_video import stream_video
from tests.serve.conftest import LIMITS, png, serve, wait

PROMPT = "a red shark moves left"
LONG = "3600"  # seconds: never done before the test is


def call(url, data=None, **headers):
    """Status, headers and body of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def make(server, tmp_path, **asked):
    """The video object, and the file that was downloaded."""
    video = server.client.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=50, **asked)
    path = tmp_path / "video.mp4"
    server.client.videos.download_content(video.id).write_to_file(path)
    return video, path


def test_a_video(server, tmp_path):
    video, path = make(server, tmp_path, seconds="2.5", size="64x64", model="tiny", extra_body={"seed": 5, "steps": 2})
    assert (video.status, video.progress, video.seconds, video.size, video.model) == (
        *("completed", 100, "2.5", "64x64", "tiny"),
    )
    assert video.completed_at >= video.created_at and video.expires_at > video.completed_at and video.error is None
    about = media.read_metadata(path)
    assert (about["prompt"], about["seed"], about["frames"], about["id"]) == (PROMPT, 5, 20, video.id)
    assert about["options"]["num_frames"] == 9
    status, headers, part = call(f"{server.url}/v1/videos/{video.id}/content", Range="bytes=4-7")
    assert (status, headers["content-type"], part) == (206, "video/mp4", b"ftyp")


def test_a_short_one_takes_the_short_window(server, tmp_path):
    _, path = make(server, tmp_path, seconds="0.5")
    about = media.read_metadata(path)
    assert (about["frames"], about["options"]["num_frames"]) == (4, 5)


def test_what_it_makes_is_what_the_pipeline_makes(server, tmp_path, pipeline):
    _, path = make(server, tmp_path, seconds="1.125", extra_body={"seed": 9})
    direct = tmp_path / "direct.mp4"
    with media.BackgroundWriter(direct, 8, {}, upscale=2) as writer:
        for frames in stream_video(pipeline, PROMPT, total_frames=9, seed=9):
            writer.write(frames)
    with media.av.open(str(path)) as one, media.av.open(str(direct)) as two:
        pairs = zip(one.decode(video=0), two.decode(video=0), strict=True)
        difference = [np.abs(a.to_ndarray(format="rgb24").astype(int) - b.to_ndarray(format="rgb24")) for a, b in pairs]
    assert len(difference) == 9 and np.max(difference) <= 2


@pytest.mark.parametrize("form", [True, False])
def test_a_picture_and_a_schedule(server, tmp_path, form):
    cues = [{"time": 1.0, "prompt": "a blue cat"}, {"time": 1.5, "prompt": "a red cat"}]
    if form:
        evil = ("../../../etc/passwd.png", png(), "image/png")
        asked = {"prompt": PROMPT, "seconds": "2", "input_reference": evil}
        id = server.client.videos.create(**asked, extra_body={"prompt_schedule": cues}).id
    else:
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        asked = {"prompt": PROMPT, "seconds": 2, "input_reference": {"image_url": url}, "prompt_schedule": cues}
        status, _, body = call(
            f"{server.url}/v1/videos", json.dumps(asked).encode(), **{"content-type": "application/json"}
        )
        assert status == 200
        id = json.loads(body)["id"]
    assert server.client.videos.poll(id, poll_interval_ms=50).status == "completed"
    about = media.read_metadata(server.worker.folder.video(id))
    assert (about["image"], about["prompt_schedule"]) == ("input_reference", cues)
    assert "image_path" not in about and provenance.picture(about).shape == (30, 40, 3)
    wait(lambda: not list((server.worker.folder.path / "images").iterdir()))  # pictures go after their video is there


def test_listed_page_by_page(idle):
    made = [idle.client.videos.create(prompt=f"a cat {i}").id for i in range(5)]
    assert [video.id for video in idle.client.videos.list(limit=2)] == made[::-1]
    assert [video.id for video in idle.client.videos.list(limit=2, order="asc")] == made
    assert [model.id for model in idle.client.models.list()] == ["tiny"]
    video = idle.client.videos.retrieve(made[2])
    assert (video.status, video.queue_position) == ("queued", 2)


def test_events(server):
    video = server.client.videos.create(prompt=PROMPT, seconds="40")
    status, headers, body = call(f"{server.url}/v1/videos/{video.id}/events")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    names, data = zip(*(event.split("\n") for event in body.decode().strip().split("\n\n")), strict=True)
    told = [json.loads(line.removeprefix("data: ")) for line in data]
    assert names[-1] == "event: video.completed" and "event: video.in_progress" in names
    progress = [video["progress"] for video in told]
    assert progress == sorted(progress) and progress[-1] == 100 and len(set(progress)) > 2


def test_readers_that_leave_harm_nobody(server):
    video = server.client.videos.create(prompt=PROMPT, seconds="20")
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET /v1/videos/{video.id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
    assert server.client.videos.poll(video.id, poll_interval_ms=50).status == "completed"


def test_cancel(server):
    running = server.client.videos.create(prompt=PROMPT, seconds=LONG)
    queued = server.client.videos.create(prompt=PROMPT, seconds=LONG)
    wait(lambda: server.client.videos.retrieve(running.id).status == "in_progress")
    assert server.client.videos.delete(queued.id).deleted
    frames = server.worker.metrics.frames
    wait(lambda: server.worker.preview(running.id))
    with urllib.request.urlopen(f"{server.url}/v1/videos/{running.id}/events") as events:
        assert events.readline() == b"event: video.in_progress\n"
        server.client.videos.delete(running.id)
        assert b"event: video.deleted" in events.read()
    wait(lambda: server.worker.metrics.running._value.get() == 0, seconds=5)
    made = frames._value.get()
    for id in (running.id, queued.id):
        with pytest.raises(openai.NotFoundError):
            server.client.videos.retrieve(id)
    folder = server.worker.folder
    assert not [p for p in folder.path.rglob("*") if running.id in p.name or queued.id in p.name]
    assert server.client.videos.create_and_poll(prompt=PROMPT, seconds="1", poll_interval_ms=50).status == "completed"
    assert frames._value.get() == made + 8


BOMB = png((12_000, 12_000), "1")
MISTAKES = {
    "no prompt": ({}, 400, "prompt", "the prompt is empty"),
    "size": ({"prompt": "x", "size": "63x64"}, 400, "size", "this server makes 64x64"),
    "steps": ({"prompt": "x", "steps": 3}, 400, "steps", "this server makes 2"),
    "model": ({"prompt": "x", "model": "sora-2"}, 404, "model", "no model 'sora-2'"),
    "seconds": ({"prompt": "x", "seconds": 3601}, 400, "seconds", "at most 3600"),
    "negative": ({"prompt": "x", "seconds": -1}, 400, "seconds", "greater than 0"),
    "words": ({"prompt": "x", "seconds": "four"}, 400, "seconds", "valid number"),
    "seed": ({"prompt": "x", "seed": 2**32}, 400, "seed", "less than or equal"),
    "nul": ({"prompt": "x\0"}, 400, "prompt", "NUL"),
    "surrogate": ({"prompt": "\ud800"}, 400, "prompt", "prompt"),
    "unknown": ({"prompt": "x", "sead": 1}, 400, "sead", "unknown field 'sead'; known: prompt"),
    "late": ({"prompt": "x", "prompt_schedule": [{"time": 9, "prompt": "y"}]}, 400, "prompt_schedule", "line 1"),
    "order": (
        {"prompt": "x", "prompt_schedule": [{"time": 1, "prompt": "y"}] * 2},
        *(400, "prompt_schedule", "put them in order"),
    ),
    "link": (
        {"prompt": "x", "input_reference": {"image_url": "http://127.0.0.1/x.png"}},
        400,
        "input_reference",
        "send",
    ),
    "list": ([], 400, None, "no JSON object"),
}


def expect(answer, status, param, message):
    got, _, body = answer
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (got, error["param"]) == (status, param) and message in error["message"], error
    assert "Traceback" not in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(server, name):
    asked, *expected = MISTAKES[name]
    headers = {"content-type": "application/json"}
    expect(call(f"{server.url}/v1/videos", json.dumps(asked).encode(), **headers), *expected)


@pytest.mark.parametrize(
    ("picture", "status", "message"),
    [
        (b"", 400, "can't be read as a picture"),
        (b"\x89PNG\r\n\x1a\ngarbage", 400, "can't be read as a picture"),
        (png()[:60], 400, "can't be read as a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "can't be read as a picture"),
        (b"GIF89a" + b"\0" * 100, 400, "PNG, JPEG or WEBP"),
        (png((400, 2)), 400, "32:1"),
        (png((600, 600)), 413, "more than 262,144 pixels"),
        (BOMB, 413, "more than 262,144 pixels"),
        (b"\0" * (LIMITS.upload_bytes + 1), 413, "more than 200,000 bytes"),
        (b"\0" * 20_000_000, 413, "more than 200,000 bytes"),
    ],
    ids=["empty", "garbage", "cut", "svg", "gif", "long", "large", "bomb", "bytes", "many bytes"],
)
def test_pictures_that_are_refused(server, picture, status, message):
    assert len(BOMB) < LIMITS.upload_bytes
    with pytest.raises(openai.APIStatusError) as refused:
        server.client.videos.create(prompt=PROMPT, input_reference=("x.png", picture))
    assert refused.value.status_code == status and message in refused.value.body["message"]
    assert not list((server.worker.folder.path / "images").glob(".*"))


def test_an_upload_without_a_length_is_cut_off(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = ["POST /v1/videos HTTP/1.1", "Host: x", "Content-Type: application/json", "Transfer-Encoding: chunked"]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        try:
            for _ in range(2000):
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        except OSError:
            return  # closed on us, as it should
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("path", "data", "kind", "status"),
    [
        ("/v1/videos", b"{", "application/json", 400),
        ("/v1/videos", b"[" * 100_000, "application/json", 400),
        ("/v1/videos", b"\xff\xfe\xff", "application/json", 400),
        ("/v1/videos", b"prompt", "text/plain", 415),
        ("/v1/videos", b"garbage", "multipart/form-data", 400),
        ("/v1/videos", b"garbage", "multipart/form-data; boundary=x", 400),
        ("/v1/videos/video_0", None, "", 404),
        ("/v1/videos/..%2f..%2flock", None, "", 404),
        ("/v1/videos/video_0/content", None, "", 404),
        ("/v1/videos/video_0/events", None, "", 404),
        ("/v1/videos?limit=0", None, "", 400),
        ("/v1/videos?after=video_0", None, "", 404),
        ("/v1/nothing", None, "", 404),
        ("/healthz", b"", "", 405),
    ],
)
def test_garbage(server, path, data, kind, status):
    got, _, body = call(server.url + path, data, **{"content-type": kind})
    assert got == status and set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_content_that_is_not_there(idle):
    video = idle.client.videos.create(prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="the video is queued"):
        idle.client.videos.download_content(video.id)
    with pytest.raises(openai.BadRequestError, match="'video' alone"):
        idle.client.videos.download_content(video.id, variant="thumbnail")


def test_a_full_queue(idle):
    for _ in range(LIMITS.queue):
        idle.client.videos.create(prompt=PROMPT)
    with pytest.raises(openai.RateLimitError, match="8 jobs are waiting") as refused:
        idle.client.videos.create(prompt=PROMPT)
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    idle.client.videos.delete(next(iter(idle.client.videos.list())).id)
    assert idle.client.videos.create(prompt=PROMPT).status == "queued"


def test_readiness(idle, server):
    assert call(f"{idle.url}/healthz")[0] == call(f"{server.url}/healthz")[0] == 200
    status, _, body = call(f"{idle.url}/readyz")
    assert status == 503 and not any(bucket["compiled"] for bucket in json.loads(body)["buckets"])
    status, _, body = call(f"{server.url}/readyz")
    assert status == 200
    shapes = [(b["size"], b["steps"], b["window_frames"], b["compiled"]) for b in json.loads(body)["buckets"]]
    assert shapes == [("64x64", 2, 9, True), ("64x64", 2, 5, True)]


def test_metrics(server, tmp_path):
    make(server, tmp_path, seconds="1")
    text = call(f"{server.url}/metrics")[2].decode()
    assert 'magic141_jobs_total{outcome="completed"}' in text and "magic141_ready 1.0" in text
    assert 'magic141_http_requests_total{method="GET",route="/v1/videos/{video_id}",status="200"}' in text


def test_api_key(pipeline, catalog, idle):
    with serve(idle.worker, api_key="secret") as guarded:
        with pytest.raises(openai.AuthenticationError, match="API key") as refused:
            guarded.client.videos.create(prompt=PROMPT)
        assert refused.value.body["type"] == "authentication_error"
        assert guarded.client.with_options(api_key="secret").videos.create(prompt=PROMPT).status == "queued"
        assert call(f"{guarded.url}/healthz")[0] == 200


def test_our_mistakes_are_not_told(idle, monkeypatch):
    monkeypatch.setattr(idle.worker, "jobs", lambda: 1 / 0)
    status, _, body = call(f"{idle.url}/v1/videos")
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
    assert b"ZeroDivision" not in body and b"Traceback" not in body
