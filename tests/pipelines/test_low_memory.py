"""The same videos with one component on the devices at a time, with cached text and with a tiled VAE; what it saves."""

import gc
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models import resident
from magic141_jax.models.resident import Room, taken, when_needed
from magic141_jax.pipelines import engine
from magic141_jax.pipelines.components import load_components
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.low_memory import LowMemory
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


def sizes(components):
    """Bytes of each network of some components, which are read for it."""
    networks = [(c.transformer, c.vae, c.image_encoder, c.text_encoder) for c in components]
    return [sum(x.nbytes for x in jax.tree.leaves(taken(part.params))) for parts in networks for part in parts]


@pytest.fixture
def all_there(weights_folder, monkeypatch):
    """A pipeline that runs the same programs as one whose parameters come and go, over parameters that stay."""
    with monkeypatch.context() as patch:
        patch.setattr(LowMemory, "lenders", lambda self: dict.fromkeys(weights.COMPONENTS, when_needed))
        return TextToVideoPipeline.from_pretrained(weights_folder, image_weights=weights_folder)


@pytest.mark.parametrize("in_parts", [False, True])
def test_one_component_is_on_the_devices_at_a_time(weights_folder, monkeypatch, all_there, in_parts):
    held = sizes([all_there.components, all_there.text_to_image.components])
    want, before = watched(monkeypatch, all_there)
    # What lies in the host's memory is no array of JAX then.
    monkeypatch.setattr(resident, "np", SimpleNamespace(asarray=np.array))
    options = {"image_weights": weights_folder, "offload": Room(on_host=in_parts)}
    saving = TextToVideoPipeline.from_pretrained(weights_folder, **options)
    have, after = watched(monkeypatch, saving)
    np.testing.assert_array_equal(have, want)
    plain = TextToVideoPipeline.from_pretrained(weights_folder, image_weights=weights_folder)
    np.testing.assert_allclose(video(plain), want, atol=1e-5)
    assert [stage for stage, _ in after] == [stage for stage, _ in before]
    assert saving.engine.seconds["move"] > 0 and "move" not in plain.engine.seconds
    # Prompts, latents and frames are the same in both, so that the difference is the parameters.
    there = {now - then for (_, now), (_, then) in zip(after, before, strict=True)}
    transformer, vae, *others = held[:4]
    if not in_parts:
        assert there == {transformer, vae, *others}, "at every stage exactly one component is there"
        return
    parts = there - set(others)
    assert len(parts) == 4, "what prepares and what evaluates, what decodes and what encodes"
    assert sum(parts) == transformer + vae and max(parts) < 0.6 * max(held)


def picture(weights_folder, prompt=PROMPT, **options):
    return TextToImagePipeline.from_pretrained(weights_folder, **options)(prompt, seed=1).images


def test_from_the_hosts_memory_over_a_mesh(weights_folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), devices=jax.devices()[:2])
    want, have = (picture(weights_folder, mesh=mesh, offload=offload) for offload in (False, Room(on_host=True)))
    np.testing.assert_array_equal(have, want)


def test_no_text_encoder_is_read_for_cached_prompts(weights_folder, tmp_path, monkeypatch):
    def loaded(folder, load=weights.load):
        assert folder.name != "text_encoder", "the parameters of the text encoder are read"
        return load(folder)

    want = picture(weights_folder)
    np.testing.assert_array_equal(picture(weights_folder, text_cache=tmp_path / "cache"), want)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".safetensors", ".digest"}
    monkeypatch.setattr(weights, "load", loaded)
    for offload in (False, True):
        options = {"text_cache": tmp_path / "cache", "offload": offload}
        components = load_components(weights_folder, **options)
        assert np.asarray(components.text_encoder.encode([PROMPT]).states).any()
        with pytest.raises(AssertionError, match="are read"):
            components.text_encoder.encode(["a blue cat"])
    np.testing.assert_array_equal(picture(weights_folder, **options), want)


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
