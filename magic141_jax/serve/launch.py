"""The command line that the server and the demo share, and the life of the process.

A first SIGTERM or Ctrl-C closes the port, ends event streams, gives the job that is being made a while and queues it
again if that was too short; the exit code is 0. A second Ctrl-C does not wait for connections.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from magic141_jax.errors import OneLineParser, UserError
from magic141_jax.pipelines.components import DEFAULT, default_dtype
from magic141_jax.pipelines.options import parse_size
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.serve.app import make_app
from magic141_jax.serve.buckets import Limits, make_catalog
from magic141_jax.serve.jobs import Folder
from magic141_jax.serve.worker import Worker
from magic141_jax.sharding import make_mesh, parse_mesh

KEY_VARIABLE = "MAGIC141_JAX_API_KEY"
CLOSING_SECONDS = 5  # for requests that are being answered when the process is to end
LOG = logging.getLogger(__name__)


def main(prog: str, doc: str, extend: Callable[[FastAPI, Worker], FastAPI] = lambda app, _: app) -> int:
    """Runs the command line of an entry point: its name, its docstring, and what it adds to the application."""
    return run(parse(prog, doc.splitlines()[0]), extend)


def parse(prog: str, description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags; raises `UserError`."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of the machine's")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--state", type=Path, default=Path("runs/serve"), help="folder of jobs and videos, kept over restarts")
    add("--api_key", help=f"what clients have to send; better in the variable {KEY_VARIABLE}, which ps does not show")
    add("--weights", default=DEFAULT, help='a weights folder, ours or in diffusers\' layout, a Hub id, or "default"')
    add("--image_weights", help="other weights that make the first image")
    add("--dtype", choices=("float32", "bfloat16"), help="of the large networks; by default bfloat16 but on a CPU")
    add("--mesh", help="devices, such as fsdp=2,context=4; one device unless given")
    add("--offload", action="store_true", help="one network on the devices at a time")
    add("--vae_tiles", type=int, help="squares of pixels in which the VAE works on larger pictures")
    add("--sizes", help="64x64,96x64 and so on, in the networks' pixels, the default first")
    add("--steps", help="numbers of steps, such as 4,8, the default first")
    add("--windows", help="frames of a window, such as 9,17: 4k + 1; a video takes the shortest that holds it")
    add("--upscale", type=int, help="enlarges what is written; by default to some 256 pixels, 1 keeps it")
    add("--max_seconds", type=float, default=Limits.seconds, help="of one video")
    add("--max_queue", type=int, default=Limits.queue, help="jobs that may wait; above it clients get 429")
    add("--max_upload_bytes", type=int, default=Limits.upload_bytes, help="of a first frame")
    add("--max_upload_pixels", type=int, default=Limits.upload_pixels, help="of a first frame")
    add("--keep_hours", type=float, default=Limits.keep_hours, help="how long finished videos are kept")
    add("--grace", type=float, default=10.0, help="seconds that a running job has to end after SIGTERM")
    args = parser.parse_args(argv)
    args.sizes = [parse_size(size, "--sizes") for size in _listed(args.sizes)]
    args.steps, args.windows = (
        [_number(value, flag) for value in _listed(given)]
        for given, flag in ((args.steps, "--steps"), (args.windows, "--windows"))
    )
    if not 0 <= args.port < 65536:
        raise UserError(f"--port is {args.port}; it must be from 0 to 65535")
    args.api_key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    return args


def run(args: argparse.Namespace, extend: Callable[[FastAPI, Worker], FastAPI]) -> int:
    """Serves until a signal; `extend` may add to the application. Raises `UserError` for what the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _listen(args.host, args.port) as port:
        worker = open_worker(args)
        app = extend(make_app(worker, api_key=args.api_key), worker)
        timing = {"timeout_graceful_shutdown": CLOSING_SECONDS}
        server = _Server(uvicorn.Config(app, log_level="warning", server_header=False, **timing), worker)
        worker.start(server.stop)
        LOG.info("listening on http://%s:%d; ready once /readyz says so", *port.getsockname()[:2])
        server.run([port])
    worker.close(args.grace)
    if isinstance(worker.failure, UserError):
        raise worker.failure
    code = 0 if worker.failure is None else 1
    if worker.busy:
        logging.shutdown()
        os._exit(code)  # a thread inside a compiled program would crash the interpreter's own way out
    return code


def open_worker(args: argparse.Namespace) -> Worker:
    """The worker of the flags, its weights read and its folder locked, but not started."""
    mesh = None if args.mesh is None else make_mesh(parse_mesh(args.mesh))
    limits = _limits(args)
    folder = Folder(args.state)
    how = {"dtype": args.dtype or default_dtype(), "offload": args.offload, "vae_tiles": args.vae_tiles}
    pipeline = TextToVideoPipeline.from_pretrained(args.weights, image_weights=args.image_weights, mesh=mesh, **how)
    shapes = {"sizes": args.sizes, "steps": args.steps, "windows": args.windows}
    catalog = make_catalog(pipeline.components, **shapes, upscale=args.upscale, limits=limits)
    # Videos go to strangers: of places they say no more than that it was the default.
    loading = how | ({"weights": DEFAULT} if args.weights == DEFAULT else {})
    return Worker(pipeline, catalog, folder, loading=loading)


class _Server(uvicorn.Server):
    """uvicorn, for which a signal is the end of the worker's queue, and no reason to die of it afterwards."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    def stop(self) -> None:
        """Ends the server from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        self._worker.closing = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """An open port; raises `UserError` if it is taken or not ours to take."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"can't listen on {host}:{port}: {error.strerror}; choose another --host or --port") from None


def _limits(args: argparse.Namespace) -> Limits:
    given = (args.max_seconds, args.max_queue, args.max_upload_bytes, args.max_upload_pixels, args.keep_hours)
    try:
        return Limits(*given)
    except ValueError as error:
        raise UserError(str(error)) from None


def _listed(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, flag: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{flag} has {text!r}; write whole numbers from 1, such as 4,8")
    return int(text)
