"""The page: a form, the window that was made last, and the video. Its jobs are the server's jobs, in the same queue."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from gradio.themes import Base

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.serve.jobs import Job
from magic141_jax.serve.requests import Refusal, make_job, read_order
from magic141_jax.serve.worker import Worker

LOOK_SECONDS = 0.2  # between two looks at the job
PREVIEW_FRAMES, PREVIEW_SIDE = 24, 256  # a page gets no more of a window than this
CACHE_SECONDS = 3600  # how long gradio keeps its copies of pictures and videos
TITLE = "Magic 1-For-1"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # gradio's own come from another site
SCHEDULE_HELP = "a line each, such as: 4.5 a bus moves right on a red background"


def mount(app: FastAPI, worker: Worker) -> FastAPI:
    """Puts the page at the root of the server's application; its API key is the page's password, for any user name."""
    password = app.state.api_key

    def authorize(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    return gr.mount_gradio_app(
        app,
        build(worker),
        path="/",
        auth=None if password is None else authorize,
        allowed_paths=[str(worker.folder.videos.resolve())],
        max_file_size=worker.catalog.limits.upload_bytes,
        theme=Base(**FONTS),
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
    )


def build(worker: Worker) -> gr.Blocks:
    """The page over a worker."""
    catalog = worker.catalog
    hidden = {"api_visibility": "private"}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\nText or a picture to video, with the weights `{catalog.model}`.")
        with gr.Row():
            with gr.Column():
                form = _form(worker)
                with gr.Row():
                    make = gr.Button("Make the video", variant="primary", elem_id="make")
                    cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column():
                job = gr.State(None)
                status = gr.Markdown("", elem_id="status")
                preview = gr.HTML("", elem_id="preview")
                video = gr.Video(label="Video", interactive=False, autoplay=True, loop=True, elem_id="video")
                download = gr.DownloadButton("Download the mp4", interactive=False, elem_id="download")
                metadata = gr.JSON(label="What made it (in the mp4 too)", elem_id="metadata")
        shown = {"job": job, "status": status, "preview": preview, "video": video}
        shown |= {"download": download, "metadata": metadata}
        names = list(form)

        async def run(*values: Any) -> AsyncIterator[dict[Any, Any]]:
            async for changes in make_video(worker, dict(zip(names, values, strict=True))):
                yield {shown[name]: value for name, value in changes.items()}

        make.click(
            run,
            list(form.values()),
            list(shown.values()),
            concurrency_limit=None,
            show_progress="hidden",
            **hidden,
        )
        cancel.click(lambda id: id and worker.delete(id) and None, [job], None, queue=False, **hidden)
    return page


def _form(worker: Worker) -> dict[str, Any]:
    """The fields, by the names that `_submit` reads them by."""
    catalog = worker.catalog
    limits, window = catalog.limits, catalog.default_seconds
    example = "a shark moves left on a yellow background"
    return {
        "prompt": gr.Textbox(label="Prompt", placeholder=example, lines=2, elem_id="prompt"),
        "image": gr.Image(
            label="First frame (made from the prompt unless given)",
            type="filepath",
            image_mode=None,  # so that gradio decodes nothing: `check_image` does, within limits
            sources=["upload"],
            visible=catalog.from_image != "never",
            elem_id="image",
        ),
        "seconds": gr.Slider(
            min(1.0, window), limits.seconds, value=window, step=0.125, label="Seconds", elem_id="seconds"
        ),
        "size": gr.Dropdown(catalog.sizes, value=catalog.sizes[0], label="Size", visible=len(catalog.sizes) > 1),
        "steps": gr.Dropdown(catalog.steps, value=catalog.steps[0], label="Steps", elem_id="steps"),
        "seed": gr.Textbox(label="Seed", placeholder="drawn unless given", elem_id="seed"),
        "schedule": gr.Textbox(label="Other prompts by second", placeholder=SCHEDULE_HELP, lines=3, elem_id="schedule"),
    }


async def make_video(worker: Worker, form: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Queues the form's job and tells how far it is, as changes of the page by component, until it ends.

    A job whose page goes away is cancelled. What is wrong with the form is raised as `gr.Error`.
    """
    try:
        job = await asyncio.to_thread(_submit, worker, form)
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    shut = {"video": None, "download": gr.update(value=None, interactive=False), "metadata": None}
    yield {"job": job.id, "status": "Queued", "preview": "", **shut}
    last: Any = None
    try:
        while (now := worker.get(job.id)) is not None and not now.final and not worker.closing:
            preview = worker.preview(job.id)
            seen = (_status(now, worker), preview and preview[0])
            if seen != last:
                last = seen
                changes = {"status": seen[0]}
                if preview is not None:
                    changes["preview"] = await asyncio.to_thread(_animated, preview[1], worker.catalog.fps)
                yield changes
            await asyncio.sleep(LOOK_SECONDS)
    except (GeneratorExit, asyncio.CancelledError):
        if not worker.closing:
            worker.delete(job.id)
        raise
    yield {"job": None, **_ending(now, worker)}


def read_schedule(text: str) -> list[dict[str, Any]]:
    """Lines of a second and a prompt as the API's `prompt_schedule`; raises `UserError`, naming a line without."""
    cues = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        time, _, prompt = line.partition(" ")
        try:
            cues.append({"time": float(time.rstrip(":")), "prompt": prompt.strip()})
        except ValueError:
            raise UserError(
                f"line {number} of the other prompts begins with no second; write {SCHEDULE_HELP}"
            ) from None
    return cues


def _submit(worker: Worker, form: Mapping[str, Any]) -> Job:
    order: dict[str, Any] = {name: form[name] for name in ("prompt", "seconds", "size", "steps")}
    if seed := (form["seed"] or "").strip():
        order["seed"] = seed
    schedule = read_schedule(form["schedule"] or "")
    if schedule:
        order["prompt_schedule"] = schedule
        order["prompt"] = order["prompt"] or None  # the schedule may begin at 0
    data = None if form["image"] is None else Path(form["image"]).read_bytes()
    job = make_job(read_order(order), worker.catalog, image=data is not None)
    try:
        return worker.submit(job, data)
    except OSError as error:
        raise Refusal(f"the server can't store the job: {error.strerror}", status=500, code="server_error") from None


def _status(job: Job, worker: Worker) -> str:
    if job.status == "queued":
        ahead = worker.position(job)
        wait = "" if worker.ready else "; the programs are being compiled"
        return f"Queued, {ahead} before it{wait}" if ahead else f"Queued, next{wait}"
    preview = worker.preview(job.id)
    return f"Making: {job.progress} %" if preview is None else f"Making: {job.progress} %, window {preview[0]} is there"


def _ending(job: Job | None, worker: Worker) -> dict[str, Any]:
    """The page once nothing more will happen to a job."""
    if job is None:
        return {"status": "Cancelled", "preview": ""}
    if not job.final:
        return {"status": "The server is shutting down; the video will be made when it is back"}
    if job.status == "failed":
        return {"status": f"Failed: {job.error}", "preview": ""}
    path = worker.folder.video(job.id)
    return {
        "status": f"Done, with seed {job.seed}",
        "preview": "",
        "video": str(path.resolve()),
        "download": gr.update(value=str(path.resolve()), interactive=True),
        "metadata": media.read_metadata(path),
    }


def _animated(frames: np.ndarray, fps: float) -> str:
    """A window's frames (t, y, x, 3) in [0, 1] as an animated picture inside HTML, thinned out to what a page needs."""
    every = -(-len(frames) // PREVIEW_FRAMES)
    pictures = [media.to_pil(frame) for frame in frames[::every]]
    for picture in pictures:
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    buffer = io.BytesIO()
    animation = {"save_all": True, "append_images": pictures[1:], "duration": round(1000 * every / fps), "loop": 0}
    pictures[0].save(buffer, "WEBP", quality=80, **animation)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="the window made last" width="{PREVIEW_SIDE}" src="data:image/webp;base64,{data}">'
