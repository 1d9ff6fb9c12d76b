"""The process: its flags, one line for every mistake, and what survives when it is killed."""

import json
import signal
import socket
import sys
import urllib.request

import openai
import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.serve import launch
from tests.serve.conftest import wait

SERVE = "magic141_jax.serve"
PROMPT = "a red shark moves left"


def test_flags(monkeypatch):
    monkeypatch.setenv(launch.KEY_VARIABLE, "secret")
    args = launch.parse("x", "", ["--sizes", "64x32, 32", "--steps", "2,4"])
    assert (args.sizes, args.steps, args.windows) == ([(64, 32), (32, 32)], [2, 4], [])
    assert args.api_key == "secret" and launch.parse("x", "", ["--api_key", "other"]).api_key == "other"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "64x"], "--sizes is '64x'; write 64, or WIDTHxHEIGHT"),
        (["--steps", "0"], "--steps has '0'"),
        (["--port", "70000"], "--port is 70000"),
        (["--max_queue", "0"], "queue is 0; it must be above 0"),
        (["--weights", "nowhere"], "nowhere"),
        (["--host", "256.0.0.1"], "can't listen on 256.0.0.1"),
        (["--stat", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(command_line, tmp_path, flags, message):
    code, out, err = command_line(SERVE, "--port", 0, "--state", tmp_path / "state", *flags)
    assert code == 2 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_port_that_is_taken(command_line, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = command_line(SERVE, "--port", taken.getsockname()[1], "--state", tmp_path / "state")
    assert code == 2 and "choose another --host or --port" in err


@pytest.mark.parametrize(("module", "package"), [(SERVE, "fastapi"), ("magic141_jax.demo", "gradio")])
def test_a_missing_package(command_line, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith((SERVE, "magic141_jax.demo"))]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = command_line(module)
    assert (code, out) == (
        2,
        "",
    ) and err == f"error: the package '{package}' is missing: pip install -r requirements-serve.txt\n"


@pytest.mark.heavy
def test_killed_and_stopped(start_server, weights_folder, tmp_path):
    """Finished videos and the queue survive kill -9; SIGTERM queues the running job again and exits with 0."""
    state, flags = tmp_path / "state", ["--max_seconds", 36000]
    process, url = start_server(SERVE, state, *flags)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    done = client.videos.create_and_poll(prompt=PROMPT, seconds="1", extra_body={"seed": 4}, poll_interval_ms=50)
    content = client.videos.download_content(done.id).content
    endless = client.videos.create(prompt=PROMPT, seconds="36000")
    queued = client.videos.create(prompt="a blue cat", seconds="1", extra_body={"seed": 6})
    wait(lambda: client.videos.retrieve(endless.id).status == "in_progress")
    wait(lambda: list((state / "videos").glob(f".{endless.id}*")))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads((state / "jobs" / f"{endless.id}.json").read_text())["status"] == "in_progress"

    process, url = start_server(SERVE, state, *flags, "--grace", "0")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    with pytest.raises(UserError, match="another server uses"):
        launch.Folder(state)
    assert client.videos.download_content(done.id).content == content
    wait(lambda: client.videos.retrieve(endless.id).status == "in_progress")
    assert client.videos.retrieve(queued.id).status == "queued"
    client.videos.delete(endless.id)
    assert client.videos.poll(queued.id, poll_interval_ms=50).status == "completed"
    about = media.read_metadata(state / "videos" / f"{queued.id}.mp4")
    assert (about["prompt"], about["seed"]) == ("a blue cat", 6)

    endless = client.videos.create(prompt=PROMPT, seconds="36000")
    wait(lambda: list((state / "videos").glob(f".{endless.id}*")))
    with urllib.request.urlopen(f"{url}/v1/videos/{endless.id}/events") as events:
        process.send_signal(signal.SIGTERM)
        events.read()
    assert process.wait(30) == 0
    assert json.loads((state / "jobs" / f"{endless.id}.json").read_text())["status"] == "queued"
    assert sorted(p.stem for p in (state / "videos").iterdir()) == sorted([done.id, queued.id])


@pytest.mark.heavy
def test_the_default_weights(start_server, tmp_path):
    _, url = start_server(SERVE, tmp_path / "state", "--weights", "default")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    prompt = "a shark moves left on a yellow background"
    video = client.videos.create_and_poll(prompt=prompt, seconds="2", model="emoji64_4step", poll_interval_ms=100)
    assert (video.status, video.size) == ("completed", "128x128")
    path = tmp_path / "video.mp4"
    client.videos.download_content(video.id).write_to_file(path)
    with media.av.open(str(path)) as container:
        red, green, blue = next(container.decode(video=0)).to_ndarray(format="rgb24")[:4].mean((0, 1))
    assert min(red, green) > 150 and blue < 120, "yellow"
