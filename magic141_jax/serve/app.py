"""The routes, in the shape of OpenAI's /v1/videos: what its client sends is understood, what it gets it can read.

    POST   /v1/videos                 queue a job                   GET /healthz   the process answers
    GET    /v1/videos                 list jobs                     GET /readyz    503 until all buckets are compiled
    GET    /v1/videos/{id}            how far a job is              GET /metrics   for Prometheus
    GET    /v1/videos/{id}/events     the same, as it changes
    GET    /v1/videos/{id}/content    the mp4
    DELETE /v1/videos/{id}            cancel, forget, remove

Every error is {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import hmac
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magic141_jax.serve.jobs import Job
from magic141_jax.serve.requests import MAX_CUES, Order, Refusal, make_job, read_order, too_large
from magic141_jax.serve.worker import Worker

EVENT_SECONDS = 0.1  # between two looks at a job whose events are read
ALIVE_SECONDS = 15.0  # between two comments in a stream without events, which keep proxies from closing it
TEXT_BYTES = 2**20  # of a request beside its picture
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
SCHEDULE = "prompt_schedule"
PICTURE = "input_reference"
_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": Order.model_json_schema()},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {PICTURE: {"type": "string", "format": "binary"}}}
        },
    },
}


def _worker(request: Request) -> Worker:
    return request.app.state.worker


def _authorize(request: Request) -> None:
    """Raises `Refusal` unless the request has the server's key, if it has one."""
    key = request.app.state.api_key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if key is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), key.encode())):
        raise Refusal("send the API key as a bearer token", status=401, code="invalid_api_key")


def _find(worker: Worker, video_id: str) -> Job:
    if (job := worker.get(video_id)) is None:
        raise Refusal("there is no such video", status=404, code="not_found", param="video_id")
    return job


Served = Annotated[Worker, Depends(_worker)]
api = APIRouter(prefix="/v1", dependencies=[Depends(_authorize)])
operations = APIRouter()


@api.post("/videos", openapi_extra={"requestBody": _BODY})
async def create(request: Request, worker: Served) -> dict[str, Any]:
    """Queues a job."""
    fields, picture = await read_body(request)
    job = make_job(read_order(fields), worker.catalog, image=picture is not None)
    return show(await run_in_threadpool(worker.submit, job, picture), worker)


@api.get("/videos")
def index(
    worker: Served,
    *,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Lists jobs, the newest first unless asked otherwise."""
    jobs = worker.jobs()[:: 1 if order == "asc" else -1]
    if after is not None:
        place = _find(worker, after).number
        jobs = [job for job in jobs if (job.number > place) == (order == "asc") and job.id != after]
    page = [show(job, worker) for job in jobs[:limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(jobs) > limit, **ends}


@api.get("/videos/{video_id}")
def retrieve(worker: Served, video_id: str) -> dict[str, Any]:
    """How far a job is."""
    return show(_find(worker, video_id), worker)


@api.get("/videos/{video_id}/events")
async def events(worker: Served, video_id: str) -> StreamingResponse:
    """The job as it changes, as server-sent events."""
    _find(worker, video_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(worker, video_id), media_type="text/event-stream", headers=headers)


@api.get("/videos/{video_id}/content")
def content(worker: Served, video_id: str, variant: str = "video") -> FileResponse:
    """The mp4 of a completed job."""
    job = _find(worker, video_id)
    if variant != "video":
        raise Refusal(f"variant is {variant!r}; there is 'video' alone", code="invalid_value", param="variant")
    if job.status != "completed":
        raise Refusal(f"the video is {job.status}, so it has no content", code="video_not_ready", param="video_id")
    path = worker.folder.video(job.id)
    if not path.is_file():
        raise Refusal("the video is no longer on the server", status=404, code="not_found", param="video_id")
    return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")


@api.delete("/videos/{video_id}")
def delete(worker: Served, video_id: str) -> dict[str, Any]:
    """Cancels a job, or removes what it made."""
    if not worker.delete(video_id):
        _find(worker, video_id)
    return {"id": video_id, "object": "video.deleted", "deleted": True}


@api.get("/models")
def models(worker: Served) -> dict[str, Any]:
    """The one model."""
    model = {"id": worker.catalog.model, "object": "model", "created": 0, "owned_by": "magic141_jax"}
    return {"object": "list", "data": [model]}


@operations.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@operations.get("/readyz")
def readyz(worker: Served, response: Response) -> dict[str, Any]:
    """Whether every bucket is compiled, and which these are; 503 until then."""
    response.status_code = 200 if worker.ready else 503
    buckets = [
        {
            "size": bucket.size,
            "steps": bucket.steps,
            "window_frames": bucket.window,
            "window_seconds": bucket.window / worker.catalog.fps,
            "compiled": bucket in worker.compiled,
            "compile_seconds": worker.compiled.get(bucket),
        }
        for bucket in worker.catalog.buckets
    ]
    limits = {"max_seconds": worker.catalog.limits.seconds, "max_queue": worker.catalog.limits.queue}
    return {"ready": worker.ready, "model": worker.catalog.model, "buckets": buckets, "limits": limits}


@operations.get("/metrics")
def metrics(worker: Served) -> Response:
    """Counters for Prometheus."""
    return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def make_app(worker: Worker, *, api_key: str | None = None) -> FastAPI:
    """The application over a worker; with an `api_key`, /v1 wants it as a bearer token."""
    app = FastAPI(title="magic141_jax", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    app.state.worker, app.state.api_key = worker, api_key
    app.include_router(api)
    app.include_router(operations)
    app.add_middleware(Boundary, worker=worker)
    app.add_exception_handler(Refusal, lambda _, error: refuse(error))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _bad_parameters)
    app.add_exception_handler(Exception, _our_fault)
    return app


def show(job: Job, worker: Worker) -> dict[str, Any]:
    """A job as OpenAI's video object, with what it lacks behind: seed, steps, schedule, place in the queue."""
    expires = job.completed_at and job.completed_at + int(worker.catalog.limits.keep_hours * 3600)
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": expires,
        "prompt": job.prompt,
        "seconds": f"{job.seconds:g}",
        "size": job.size,
        "error": None if job.error is None else {"code": "generation_failed", "message": job.error},
        "seed": job.seed,
        "steps": job.steps,
        SCHEDULE: [{"time": time, "prompt": prompt} for time, prompt in job.prompt_schedule],
        "queue_position": worker.position(job) if job.status == "queued" else None,
    }


async def read_body(request: Request) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a request for a video, in JSON or a form, and its picture; raises `Refusal` for garbage."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=2 * MAX_CUES + 20, max_part_size=TEXT_BYTES) as form:
            fields: dict[str, Any] = {name: value for name, value in form.items() if not name.startswith(SCHEDULE)}
            schedule = form.get(SCHEDULE)
            if cues := form.getlist(f"{SCHEDULE}[][time]"):  # how OpenAI's client writes a list of objects
                prompts = form.getlist(f"{SCHEDULE}[][prompt]")
                schedule = json.dumps([{"time": t, "prompt": p} for t, p in zip(cues, prompts, strict=False)])
            if isinstance(schedule, str):
                fields[SCHEDULE] = _json(schedule, SCHEDULE)
            picture = fields.pop(PICTURE, None)
            url = fields.pop(f"{PICTURE}[image_url]", None)
            if isinstance(picture, UploadFile):
                return fields, await picture.read()
            picture = {"image_url": url} if url is not None else picture
    elif kind == "application/json":
        fields = _json(await request.body(), None)
        if not isinstance(fields, dict):
            raise Refusal("the body is no JSON object", code="invalid_json")
        picture = fields.pop(PICTURE, None)
    else:
        raise Refusal("send multipart/form-data or application/json", status=415, code="unsupported_media_type")
    return fields, None if picture is None else _from_data_url(picture)


def _json(text: str | bytes, param: str | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{param or 'the body'} is not JSON: {error}", code="invalid_json", param=param) from None


def _from_data_url(picture: Any) -> bytes:
    """The bytes of {"image_url": "data:image/png;base64,..."}; nothing is fetched for a client."""
    url = picture.get("image_url") if isinstance(picture, dict) else None
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    try:
        if not (comma and head.startswith("data:") and head.endswith(";base64")):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error):
        message = f'send {PICTURE} as a file, or as {{"image_url": "data:image/png;base64,..."}}'
        raise Refusal(message, code="invalid_image", param=PICTURE) from None


async def _events(worker: Worker, id: str) -> AsyncIterator[str]:
    """Server-sent events: the job whenever it has changed, until it is final, deleted, or the server ends."""
    last, idle = None, 0.0
    while not worker.closing:
        job = worker.get(id)
        if job is None:
            yield _event("deleted", {"id": id, "object": "video.deleted", "deleted": True})
            return
        shown = show(job, worker)
        if shown != last:
            yield _event(job.status, shown)
            last, idle = shown, 0.0
        if job.final:
            return
        await asyncio.sleep(EVENT_SECONDS)
        idle += EVENT_SECONDS
        if idle >= ALIVE_SECONDS:
            yield ": alive\n\n"
            idle = 0.0


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: video.{name}\ndata: {json.dumps(data)}\n\n"


def refuse(error: Refusal) -> JSONResponse:
    """A refusal as an error of OpenAI's shape."""
    kind = KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    body = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": body}, error.status, headers)


def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return refuse(Refusal(str(error.detail), status=error.status_code, code=f"http_{error.status_code}"))


def _bad_parameters(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return refuse(Refusal(first["msg"], code="invalid_value", param=str(first["loc"][-1])))


def _our_fault(_: Request, error: Exception) -> JSONResponse:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    message = "no space left on the server" if full else "the server made a mistake; see its log"
    return refuse(Refusal(message, status=500, code="server_error"))


class Boundary:
    """The outermost layer: counts requests, and reads no further in a body than a request may be long."""

    def __init__(self, app: ASGIApp, worker: Worker) -> None:
        self._app, self._worker = app, worker
        self._upload_bytes = worker.catalog.limits.upload_bytes
        self._limit = self._upload_bytes * 4 // 3 + TEXT_BYTES  # a picture in JSON is in base64

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; other kinds of connections are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length, status = 0, 0

        async def counted() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self._limit:
                raise too_large(self._upload_bytes)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            declared = Headers(scope=scope).get("content-length", "0")
            if declared.isdecimal() and int(declared) > self._limit:
                await refuse(too_large(self._upload_bytes))(scope, receive, noted)
            else:
                await self._app(scope, counted, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._worker.metrics.requests.labels(scope["method"], route, status).inc()
