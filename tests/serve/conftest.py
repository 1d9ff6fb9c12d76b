"""A server over the tiny weights in this process, behind a real port on loopback."""

import contextlib
import io
import socket
import threading
import time
from types import SimpleNamespace

import openai
import pytest
import uvicorn
from PIL import Image

from magic141_jax.serve.app import make_app
from magic141_jax.serve.buckets import Limits, make_catalog
from magic141_jax.serve.jobs import Folder
from magic141_jax.serve.worker import Worker

LIMITS = Limits(seconds=3600, queue=8, upload_bytes=200_000, upload_pixels=512 * 512)


def png(size=(40, 30), mode="RGB"):
    """A black picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def catalog(pipeline):
    return make_catalog(pipeline.components, windows=[9, 5], upscale=2, limits=LIMITS)


@contextlib.contextmanager
def serve(worker, **options):
    """The worker's application behind a port; gives url, worker and client."""
    app = make_app(worker, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as port:
        thread = threading.Thread(target=server.run, args=[[port]], daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60)
        yield SimpleNamespace(url=url, worker=worker, client=client)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait(condition, seconds=60):
    """Waits until the condition holds and returns what it gives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.fixture(scope="session")
def server(pipeline, catalog, tmp_path_factory):
    """A server with a worker that is ready."""
    worker = Worker(pipeline, catalog, Folder(tmp_path_factory.mktemp("serve") / "state"))
    worker.start()
    with serve(worker) as served:
        wait(lambda: worker.ready)
        yield served
        worker.close(0)


@pytest.fixture
def idle(pipeline, catalog, tmp_path):
    """A server whose worker has not started: whatever is queued stays queued."""
    with serve(Worker(pipeline, catalog, Folder(tmp_path / "state"))) as served:
        yield served
