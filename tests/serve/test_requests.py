"""Orders become jobs with nothing left open; test_app.py has what is refused."""

import dataclasses
import io

import pytest
from PIL import Image, PngImagePlugin

from magic141_jax.serve.requests import MAX_CUES, MAX_PROMPT, PICTURES, Refusal, check_image, make_job, read_order


def job(catalog, image=False, **fields):
    return make_job(read_order(fields), catalog, image=image)


def test_defaults(catalog):
    made = job(catalog, prompt="a cat")
    assert (made.size, made.steps, made.seconds, made.model) == ("64x64", 2, 9 / 8, "tiny")
    assert (made.status, made.image, made.prompt_schedule) == ("queued", False, ())


def test_seeds_and_ids_are_drawn(catalog):
    made = [job(catalog, prompt="a cat") for _ in range(20)]
    assert len({one.seed for one in made}) == len({one.id for one in made}) == 20
    assert job(catalog, prompt="a cat", seed=0).seed == 0


def test_text_of_a_form(catalog):
    made = job(catalog, prompt="a cat", seconds="2.5", steps="2", seed="7")
    assert (made.seconds, made.steps, made.seed) == (2.5, 2, 7)


def test_a_schedule_may_begin_the_video(catalog):
    cues = [{"time": 0, "prompt": "a dog"}, {"time": 1, "prompt": "a cat"}]
    made = job(catalog, prompt_schedule=cues, seconds=2)
    assert (made.prompt, made.prompt_schedule) == ("a dog", ((0.0, "a dog"), (1.0, "a cat")))
    with pytest.raises(Refusal, match="it must be for 0, or give a prompt"):
        job(catalog, prompt_schedule=cues[1:], seconds=2)


@pytest.mark.parametrize(
    ("from_image", "image", "message"), [("never", True, "leave it out"), ("must", False, "send one")]
)
def test_weights_decide_about_pictures(catalog, from_image, image, message):
    catalog = dataclasses.replace(catalog, from_image=from_image)
    with pytest.raises(Refusal, match=message):
        job(catalog, image, prompt="a cat")
    assert job(catalog, not image, prompt="a cat").image is not image


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * (MAX_PROMPT + 1)},
        {"prompt_schedule": [{"time": n, "prompt": "x"} for n in range(MAX_CUES + 1)]},
        {"prompt_schedule": [{"time": 0, "prompt": "x", "size": 1}]},
        {"prompt": ["a cat"]},
        {"seconds": float("inf")},
        {"seed": "1" * 4000},
    ],
)
def test_bounds(fields):
    with pytest.raises(Refusal) as refused:
        read_order(fields)
    assert refused.value.status == 400 and refused.value.param in fields


@pytest.mark.parametrize("form", PICTURES)
def test_pictures(catalog, form):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, form)
    check_image(buffer.getvalue(), catalog)


def test_a_bomb_in_a_text_chunk(catalog):
    buffer, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text("comment", "x" * 100_000_000, zip=True)
    Image.new("L", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    assert len(buffer.getvalue()) < 200_000
    with pytest.raises(Refusal, match="can't be read as a picture"):
        check_image(buffer.getvalue(), catalog)
