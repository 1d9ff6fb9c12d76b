"""The same videos with one component on the devices at a time, with cached text and with a tiled VAE; what it saves."""

import gc

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models.resident import Room, taken
from magic141_jax.pipelines import engine
from magic141_jax.pipelines.components import load_components
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.text_to_image import TextToImagePipeline
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.sharding import MeshConfig, make_mesh

PROMPT = "a red shark moves left"
STAGES = ("text", "image", "video", "decode")


def video(pipeline):
    """A picture and two windows."""
    stream = stream_video(pipeline, PROMPT, total_frames=13, seed=3)
    return np.concatenate([stream.image[None], *stream])


def watched(monkeypatch, pipeline):
    """The video, and (stage, bytes of all new arrays) at the end of every stage."""
    gc.collect()
    start, seen, clock = live(), [], engine.clock

    class Watching(engine.contextlib.ContextDecorator):
        def __init__(self, seconds, label):
            self.label, self.clock = label, clock(seconds, label)

        def __enter__(self):
            self.clock.__enter__()

        def __exit__(self, *failure):
            if self.label in STAGES:
                seen.append((self.label, live() - start))
            return self.clock.__exit__(*failure)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "clock", Watching)
        return video(pipeline), seen


def live():
    return sum(x.nbytes for x in jax.live_arrays())


def sizes(pipelines):
    """Bytes of each component, by stage and engine."""
    return [sum(x.nbytes for x in jax.tree.leaves(taken(model.params))) for c in pipelines for model in parts(c)]


def parts(components):
    return (components.transformer, components.vae, components.image_encoder, components.text_encoder)


@pytest.mark.parametrize("image_weights", [False, True], ids=["one network", "another for the image"])
def test_one_component_is_on_the_devices_at_a_time(weights_folder, monkeypatch, quick_compilation, image_weights):
    options = {"image_weights": weights_folder} if image_weights else {}
    plain = TextToVideoPipeline.from_pretrained(weights_folder, **options)
    components = {id(e): e.components for e in (plain.engine, plain.text_to_image.engine)}.values()
    held = sizes(components)
    want, before = watched(monkeypatch, plain)
    saving = TextToVideoPipeline.from_pretrained(weights_folder, offload=True, **options)
    have, after = watched(monkeypatch, saving)
    np.testing.assert_array_equal(have, want)
    assert [stage for stage, _ in after] == [stage for stage, _ in before]
    # Prompts, latents and frames are the same in both, so that the difference is the parameters.
    there = [now - then for (_, now), (_, then) in zip(after, before, strict=True)]
    assert set(there) <= set(held), "at every stage exactly one component is there"
    assert max(there) == max(held) < 0.5 * sum(held)
    assert len(set(there)) == 4 and saving.engine.seconds["move"] > 0
    assert "move" not in plain.engine.seconds


def test_from_the_hosts_memory_and_over_a_mesh(weights_folder, quick_compilation):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    for where in (None, mesh):
        want, have = (
            TextToImagePipeline.from_pretrained(weights_folder, mesh=where, offload=offload)(PROMPT).images
            for offload in (False, Room(on_host=True))
        )
        np.testing.assert_array_equal(have, want)


def test_no_text_encoder_is_read_for_cached_prompts(weights_folder, tmp_path, monkeypatch, quick_compilation):
    def loaded(folder, load=weights.load):
        assert folder.name != "text_encoder", "the parameters of the text encoder are read"
        return load(folder)

    want = TextToVideoPipeline.from_pretrained(weights_folder)(PROMPT, seed=1).frames
    for offload in (False, True):
        cache = tmp_path / str(offload)
        options = {"text_cache": cache, "offload": offload}
        made = [TextToVideoPipeline.from_pretrained(weights_folder, **options)(PROMPT, seed=1).frames]
        assert {path.suffix for path in cache.iterdir()} == {".safetensors", ".digest"}
        with monkeypatch.context() as patch:
            patch.setattr(weights, "load", loaded)
            pipeline = TextToVideoPipeline.from_pretrained(weights_folder, **options)
            made.append(pipeline(PROMPT, seed=1).frames)
            with pytest.raises(AssertionError, match="are read"):
                pipeline("a blue cat")
        for frames in made:
            np.testing.assert_array_equal(frames, want)


def test_tiles_change_the_vae_alone(weights_folder):
    plain, tiled = (load_components(weights_folder, vae_tiles=side) for side in (None, 64))
    assert (tiled.vae.network.config.tiling.size, tiled.vae.network.config.tiling.stride) == (64, 48)
    assert tiled.vae.network.config.tiling.frames is plain.vae.network.config.tiling.frames is None
    assert plain.vae.network.config.tiling.size is None
    jax.tree.map(np.testing.assert_array_equal, tiled.vae.params, plain.vae.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae_tiles": 100}, "multiple of 32"),
        ({"vae_tiles": 0}, "multiple of 32"),
        ({"ofload": True}, "'offload'"),
        ({"text_cache": 3}, "text_cache"),
    ],
)
def test_bad_options(weights_folder, options, message):
    with pytest.raises(UserError, match=message):
        load_components(weights_folder, **options)
