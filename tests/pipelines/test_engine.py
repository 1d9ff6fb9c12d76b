"""Compiled stages: one compilation per shape, the clock, the compilation cache, and the same videos on any mesh."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from magic141_jax.models.resident import Lent
from magic141_jax.pipelines.engine import Stage, clock
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.text_to_image import TextToImagePipeline
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.sharding import MeshConfig, make_mesh

PROMPT, PICTURE = "a red shark moves left", np.linspace(0, 1, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
TOLERANCE = 5e-4  # of frames in [0, 1]: float32 sums in another order, after two steps


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


def test_a_stage_that_is_not_waited_for_takes_the_memory_of_what_it_is_given(monkeypatch):
    stage = Stage(lambda params, x, y: (x + y, y), {}, collections.Counter(), donate=[0], wait=False)
    monkeypatch.setattr(jax, "block_until_ready", lambda made: pytest.fail("waited"))
    x, y = jnp.ones((64, 64)), jnp.ones((64, 64))
    made, _ = stage("work", x, y)
    np.testing.assert_array_equal(made, 2)
    assert x.is_deleted() and not y.is_deleted()


def test_parameters_that_come_and_go_are_fetched_for_each_call():
    fetched, seconds, params = [], collections.Counter(), {"scale": jnp.float32(3), "other": jnp.zeros(())}

    def bring(wanted):
        fetched.append(set(wanted))
        return params

    stage = Stage(lambda params, x: params["scale"] * x, Lent(jax.eval_shape(lambda: params), bring), seconds)
    for _ in range(2):
        np.testing.assert_allclose(stage("work", np.ones(2, np.float32)), [3, 3])
    assert fetched == 2 * [{"scale"}] and set(seconds) == {"compile", "work", "move"}


def test_over_a_mesh_arrays_of_the_host_and_of_other_stages_meet_the_same_program():
    mesh, traced = make_mesh(MeshConfig(data=2, context=4)), []

    def doubled(params, x):
        traced.append(x.shape)
        return jax.lax.with_sharding_constraint(2 * x, jax.P(None, "context"))

    stage = Stage(doubled, {}, collections.Counter(), mesh=mesh)
    once = stage("work", np.ones((2, 8), np.float32))
    np.testing.assert_array_equal(stage("work", once), 4)
    assert once.sharding.spec == jax.P(None, "context") and traced == [(2, 8)]


def test_the_clock_counts_failures_too():
    seconds = collections.Counter()
    with pytest.raises(ZeroDivisionError), clock(seconds, "work"):
        raise ZeroDivisionError
    assert seconds["work"] > 0


def videos(pipeline):
    """All that the pipelines make, and the first frames alone: two windows share two latent frames."""
    made = pipeline(PROMPT, seed=3)
    animated = pipeline.image_to_video(PROMPT, image=PICTURE, seed=3)
    ways = {"long": {"match_colors": 0.5}, "followed": {"carry": "picture", "blend": True}}
    long = {
        name: np.concatenate([*stream_video(pipeline, PROMPT, total_frames=13, seed=3, overlap_latents=2, **way)])
        for name, way in ways.items()
    }
    return {"image": made.images, "video": made.frames, "animated": animated.frames, **long}


@pytest.fixture(scope="module")
def expected(weights_folder):
    return videos(TextToVideoPipeline.from_pretrained(weights_folder))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "axes",
    [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"context": 8}, {"fsdp": 2, "tensor": 2, "context": 2}],
    ids=str,
)
def test_a_mesh_does_not_change_the_videos(weights_folder, expected, axes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **axes}))
    pipeline = TextToVideoPipeline.from_pretrained(weights_folder, mesh=mesh)
    laid = jax.tree.leaves((pipeline.components.text_encoder.params, pipeline.components.image_encoder.params))
    assert all(leaf.sharding.mesh == mesh for leaf in laid)
    for name, frames in videos(pipeline).items():
        assert isinstance(frames, np.ndarray)
        np.testing.assert_allclose(frames, expected[name], atol=TOLERANCE, err_msg=name)


def test_a_mesh_does_not_change_a_guided_batch(pipeline, weights_folder):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    on_mesh = TextToImagePipeline.from_pretrained(weights_folder, mesh=mesh)
    made = [p(["a red shark", "a cat"], seed=2, guidance_scale=2.0).images for p in (on_mesh, pipeline.text_to_image)]
    np.testing.assert_allclose(*made, atol=TOLERANCE)


def test_a_second_start_over_a_mesh_compiles_nothing(weights_folder, tmp_path):
    found = collections.Counter()

    def count(event, **_):
        found[event.rpartition("/")[2]] += "compilation_cache" in event

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.monitoring.register_event_listener(count)
    try:
        compilation_cache.reset_cache()
        jax.config.update(names[0], str(tmp_path))
        jax.config.update(names[1], 0)
        for _ in range(2):
            found.clear()
            mesh = make_mesh(MeshConfig(data=1, context=2), devices=jax.devices()[:2])
            TextToImagePipeline.from_pretrained(weights_folder, mesh=mesh)(PROMPT)
    finally:
        jax.monitoring.unregister_event_listener(count)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert found["cache_hits"] == found["compile_requests_use_cache"] >= 3
    assert not found["cache_misses"]
