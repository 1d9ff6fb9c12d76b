"""Published networks that judge, as tiny random ones in the published layout; against transformers' own path."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.errors import UserError
from magic141_jax.evaluation import networks
from magic141_jax.evaluation.features import frechet
from tests.published_text import clip_files, clip_text_sizes, clip_vision_sizes, randomise, tensors, videomae_sizes

CLIP = {
    "model_type": "clip",
    "projection_dim": 20,
    "text_config": clip_text_sizes(),
    "vision_config": clip_vision_sizes(image=28),
}


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    clip = randomise(torch, transformers.CLIPModel(transformers.CLIPConfig(**CLIP)))
    video = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**videomae_sizes()))
    return {"clip": clip, "video": randomise(torch, video)}


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    sizes = {"clip": (CLIP, 28, 3), "video": (videomae_sizes(), 16, 2)}
    made = {}
    for name, (config, side, resample) in sizes.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors(theirs[name]), folder / "model.safetensors")
        square = {"height": side, "width": side}
        processor = {"size": {"shortest_edge": side}, "crop_size": square, "resample": resample}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    clip_files(made["clip"])
    return made


@pytest.fixture(scope="module")
def both(folders):
    return networks.Networks.from_paths({"clip": folders["clip"], "videomae": folders["video"]})


def clips(seed, count=3):
    """Random clips of 5 frames, 28 x 28, that begin alike."""
    generator = np.random.default_rng(seed)
    first = np.random.default_rng(9).random((count, 1, 28, 28, 3))
    return np.concatenate([first, generator.random((count, 4, 28, 28, 3))], axis=1).astype(np.float32)


def test_scores_are_those_of_transformers(both, theirs, folders):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    captions = ["a small red boat", "zebras, 2 of them!", "the camera pans left"]
    frames = clips(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folders["clip"]))
    processor = transformers.CLIPImageProcessorPil.from_pretrained(str(folders["clip"]))
    flat = [np.round(255 * frame).astype(np.uint8) for frame in frames.reshape(-1, 28, 28, 3)]
    with torch.no_grad():
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
        text = theirs["clip"].get_text_features(ids)
        image = theirs["clip"].get_image_features(processor(flat, return_tensors="pt")["pixel_values"])
    text, image = (torch.nn.functional.normalize(getattr(x, "pooler_output", x), dim=-1).numpy() for x in (text, image))
    image = image.reshape(3, 5, -1)
    each, _ = both.clip.measure(frames, captions, None)
    np.testing.assert_allclose(each["clip_text"], 100 * np.einsum("ntp,np->n", image, text) / 5, atol=1e-2)
    first = 100 * np.einsum("ntp,np->nt", image[:, 1:], image[:, 0]).mean(1)
    np.testing.assert_allclose(each["clip_first"], first, atol=1e-2)
    neighbours = 100 * np.einsum("ntp,ntp->nt", image[:, 1:], image[:, :-1]).mean(1)
    np.testing.assert_allclose(each["clip_neighbours"], neighbours, atol=1e-2)


def test_the_same_clips_are_at_no_distance(both):
    frames, others = clips(0), clips(1)
    each, whole = both.measure(frames, ["a"] * 3, frames)
    assert each["clip_perceptual"] == pytest.approx(0, abs=1e-6) and each["clip_perceptual"].shape == (3,)
    assert whole == pytest.approx({"clip_frechet": 0, "video_frechet": 0}, abs=1e-4)
    still = np.repeat(frames[:, :1], 5, axis=1)
    each, _ = both.measure(still, ["a"] * 3, frames)
    assert each["clip_first"] == pytest.approx(100) and each["clip_neighbours"] == pytest.approx(100)
    _, whole = both.measure(others, ["a"] * 3, frames)
    assert whole["clip_frechet"] > 0.01 and whole["video_frechet"] > 0.01
    (video,) = both.videos
    assert whole["video_frechet"] == frechet(video.clips(others), video.clips(frames), shrink=False)


def test_frames_of_a_clip_are_taken_at_equal_distances(both):
    longer = np.repeat(clips(0)[:, [0, 1, 2, 3]], 4, axis=1)  # each frame four times: 0, 5, 10 and 15 are one of each
    (video,) = both.videos
    np.testing.assert_allclose(video.clips(longer), video.clips(clips(0)[:, [0, 1, 2, 3]]), atol=1e-5)


def test_what_is_no_such_network_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*missing; give one with a published clip"):
        networks.Networks.from_paths({"clip": tmp_path / "missing"})
    with pytest.raises(UserError, match="holds a 'clip'; here a 'videomae' is needed"):
        networks.Networks.from_paths({"videomae": folders["clip"]})
    with pytest.raises(UserError, match=r"no tensor logits\.conv3d\.bias"):
        networks.Networks.from_paths({"i3d": folders["clip"]})
    assert networks.identity({"clip": None, "videomae": folders["video"]}).keys() == {"videomae"}
    assert networks.Networks().measure(clips(0), ["a"] * 3, clips(1)) == ({}, {})
