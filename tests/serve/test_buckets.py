"""What a server makes: every combination of its flags, checked against the weights, and the window for a duration."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest

from magic141_jax.errors import UserError
from magic141_jax.serve.buckets import Limits, make_catalog

LIMITS = Limits()


def test_what_the_weights_were_made_for(pipeline):
    catalog = make_catalog(pipeline.components, limits=LIMITS)
    (bucket,) = catalog.buckets
    assert (bucket.size, bucket.steps, bucket.window, bucket.upscale) == ("256x256", 2, 9, 8)
    assert bucket.options == {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    assert (catalog.model, catalog.fps, catalog.from_image, catalog.default_seconds) == ("tiny", 8, "may", 9 / 8)
    assert catalog.limits == LIMITS


def test_every_combination(pipeline):
    catalog = make_catalog(
        pipeline.components, sizes=[(64, 32), (32, 32)], steps=[2, 4], windows=[9, 5], upscale=1, limits=LIMITS
    )
    assert len(catalog.buckets) == 8
    assert (catalog.sizes, catalog.steps) == (["64x32", "32x32"], [2, 4])


@pytest.mark.parametrize(("seconds", "window"), [(0.01, 5), (0.625, 5), (0.7, 9), (1.125, 9), (60, 9)])
def test_the_shortest_window_that_holds_it(catalog, seconds, window):
    assert catalog.pick("64x64", 2, seconds).window == window


def test_no_such_bucket(catalog):
    assert catalog.pick("64x64", 3, 1) is None and catalog.pick("32x32", 2, 1) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [(33, 32)]}, "sides must divide by"),
        ({"steps": [100_000]}, "num_inference_steps"),
        ({"windows": [8]}, "4k"),
        ({"windows": [1]}, "can't go on"),
        ({"upscale": 1000}, "--upscale is 1000"),
        ({"sizes": [(32, 32), (32, 32)]}, "alike in the file: 256x256"),
    ],
)
def test_what_can_not_be_made(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        make_catalog(pipeline.components, **options, limits=LIMITS)


def with_parts(components, known, image_tokens):
    """The components as if of other weights."""
    config = copy.copy(components.transformer.network.config)
    object.__setattr__(config, "known", known)
    network = SimpleNamespace(config=config)
    text_encoder = SimpleNamespace(image_tokens=image_tokens)
    return dataclasses.replace(
        components, transformer=components.transformer._replace(network=network), text_encoder=text_encoder
    )


def test_weights_that_know_no_picture_or_need_one(pipeline):
    alone = make_catalog(with_parts(pipeline.components, "none", 0), windows=[5, 9], limits=LIMITS)
    assert (alone.from_image, alone.limits.seconds) == ("never", 9 / 8)
    reading = make_catalog(with_parts(pipeline.components, "channels", 4), limits=LIMITS)
    assert (reading.from_image, reading.limits.seconds) == ("must", LIMITS.seconds)


def test_limits():
    with pytest.raises(ValueError, match="queue is 0; it must be above 0"):
        Limits(queue=0)
