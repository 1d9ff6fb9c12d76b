"""Compiled stages: one compilation per shape, the clock, and the same image on one device and on two."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.pipelines.engine import Stage, clock
from magic141_jax.pipelines.text_to_image import TextToImagePipeline
from magic141_jax.sharding import MeshConfig, make_mesh


def test_a_stage_compiles_once_per_shape_and_static_value():
    traced, seconds = [], collections.Counter()

    def scaled(params, x, *, power):
        traced.append(x.shape)
        return params["scale"] * x**power

    stage = Stage(scaled, {"scale": jnp.float32(3)}, seconds)
    for values, power in (([1, 2], 1), ([3, 4], 1), ([1, 2], 2), ([1, 2, 3], 1)):
        expected = 3 * np.array(values, np.float32) ** power
        np.testing.assert_allclose(stage("work", np.array(values, np.float32), power=power), expected)
    assert traced == [(2,), (2,), (3,)]
    assert set(seconds) == {"compile", "work"}


def test_the_clock_counts_failures_too():
    seconds = collections.Counter()
    with pytest.raises(ZeroDivisionError), clock(seconds, "work"):
        raise ZeroDivisionError
    assert seconds["work"] > 0


def test_a_mesh_does_not_change_the_image(pipeline, weights_folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    on_mesh = TextToImagePipeline.from_pretrained(weights_folder, mesh=mesh)
    images = [p("a red shark", seed=2).images for p in (on_mesh, pipeline.text_to_image)]
    np.testing.assert_allclose(*images, atol=1e-3)
