"""From what a client sends to a job, or to a refusal that says what is wrong and how to mend it.

Nothing here trusts its input: numbers have bounds, a picture is measured before it is decoded and decoded before it is
kept, and file names are not looked at.
"""

from __future__ import annotations

import io
import secrets
import threading
import time
from typing import Annotated, Any

import pydantic
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.pipelines.options import MAX_SEED
from magic141_jax.pipelines.schedule import as_schedule, opening
from magic141_jax.serve.buckets import Catalog
from magic141_jax.serve.jobs import Job, new_id

MAX_PROMPT = 4000  # characters
MAX_CUES = 1000
PICTURES = ("PNG", "JPEG", "WEBP")
_DECODING = threading.Lock()  # one picture at a time, so that many uploads take no more memory than one


class Refusal(UserError):
    """A request that is not carried out, in the terms of OpenAI's errors.

    Attributes:
      status: of HTTP.
      code, param: for programs: what kind of mistake, and in which field.
      retry_after: seconds to wait before the same may be asked again.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("it has a NUL character")
    return text


Text = Annotated[str, pydantic.StringConstraints(max_length=MAX_PROMPT), pydantic.AfterValidator(_without_nul)]


class Cue(pydantic.BaseModel):
    """A prompt, and the second from which on it is shown."""

    model_config = pydantic.ConfigDict(extra="forbid")

    time: float
    prompt: Text


class Order(pydantic.BaseModel):
    """The fields of a request for a video. What is left out is the server's default; `seed` is drawn."""

    model_config = pydantic.ConfigDict(extra="forbid")

    prompt: Text | None = None
    model: str | None = None
    seconds: float | None = pydantic.Field(None, gt=0, allow_inf_nan=False)
    size: str | None = None
    seed: int | None = pydantic.Field(None, ge=0, le=MAX_SEED)
    steps: int | None = None
    prompt_schedule: list[Cue] = pydantic.Field([], max_length=MAX_CUES)


def read_order(fields: dict[str, Any]) -> Order:
    """Checks the types and bounds of a request's fields; raises `Refusal`."""
    try:
        return Order.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            known = ", ".join([*Order.model_fields, "input_reference"])
            raise Refusal(f"unknown field {param!r}; known: {known}", code="unknown_field", param=param) from None
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{where}: {first['msg']}", code="invalid_value", param=param) from None


def make_job(order: Order, catalog: Catalog, *, image: bool) -> Job:
    """The job that an order asks for, every field of it decided; raises `Refusal` for what the server does not make."""
    if order.model not in (None, catalog.model):
        message = f"there is no model {order.model!r} here; this server has {catalog.model!r}"
        raise Refusal(message, status=404, code="model_not_found", param="model")
    size = catalog.sizes[0] if order.size is None else order.size
    steps = catalog.steps[0] if order.steps is None else order.steps
    seconds = catalog.default_seconds if order.seconds is None else order.seconds
    for param, value, known in (("size", size, catalog.sizes), ("steps", steps, catalog.steps)):
        if value not in known:
            listed = ", ".join(map(str, known))
            raise Refusal(f"{param} is {value!r}; this server makes {listed}", code="invalid_value", param=param)
    if seconds > catalog.limits.seconds:
        message = f"seconds is {seconds:g}; this server makes at most {catalog.limits.seconds:g}"
        raise Refusal(message, code="invalid_value", param="seconds")
    if (image and catalog.from_image == "never") or (not image and catalog.from_image == "must"):
        need = "animate a picture: send one" if catalog.from_image == "must" else "take no picture: leave it out"
        raise Refusal(f"these weights {need}", code="invalid_value", param="input_reference")
    prompt, cues = _prompts(order, seconds)
    return Job(
        id=new_id(),
        number=0,
        created_at=int(time.time()),
        model=catalog.model,
        prompt=prompt,
        seconds=seconds,
        size=size,
        steps=steps,
        seed=secrets.randbelow(MAX_SEED + 1) if order.seed is None else order.seed,
        prompt_schedule=cues,
        image=image,
    )


def check_image(data: bytes, catalog: Catalog) -> None:
    """Raises `Refusal` unless the bytes are a whole picture in one of `PICTURES`, within the limits."""
    limits = catalog.limits
    if len(data) > limits.upload_bytes:
        raise too_large(limits.upload_bytes)
    wrong = f"input_reference can't be read as a picture; send a {', '.join(PICTURES[:-1])} or {PICTURES[-1]} file"
    unreadable = Refusal(wrong, code="invalid_image", param="input_reference")
    with _DECODING:
        try:
            with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
                if picture.width * picture.height <= limits.upload_pixels:
                    media.read_image(picture)
                    return
        except Image.DecompressionBombError:
            pass
        except UserError as error:
            raise Refusal(str(error), code="invalid_image", param="input_reference") from None
        except Exception:  # a decoder may raise anything over a damaged file
            raise unreadable from None
    message = f"input_reference has more than {limits.upload_pixels:,} pixels; send a smaller picture"
    raise Refusal(message, status=413, code="image_too_large", param="input_reference")


def too_large(limit: int) -> Refusal:
    """The refusal of an upload of more than `limit` bytes."""
    message = f"the upload has more than {limit:,} bytes; send a smaller picture"
    return Refusal(message, status=413, code="request_too_large", param="input_reference")


def _prompts(order: Order, seconds: float) -> tuple[str, tuple[tuple[float, str], ...]]:
    """The first prompt, and the schedule as it was sent."""
    try:
        cues = as_schedule([(cue.time, cue.prompt) for cue in order.prompt_schedule])
    except UserError as error:
        raise Refusal(str(error), code="invalid_value", param="prompt_schedule") from None
    for number, cue in enumerate(cues, 1):
        if cue.time >= seconds:
            message = f"line {number} of the schedule is for {cue.time:g} s, and the video ends at {seconds:g} s"
            raise Refusal(message, code="invalid_value", param="prompt_schedule")
    try:
        prompt, _ = opening(order.prompt, cues)
    except UserError as error:
        raise Refusal(str(error), code="missing_value", param="prompt") from None
    return prompt, tuple(map(tuple, cues))
