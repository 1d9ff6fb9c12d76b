"""What passes (the truth, the VAE's round trip) and what does not (blobs, silhouettes, others, wrong directions)."""

import numpy as np
import pytest
from scipy import ndimage

from magic141_jax import weights
from magic141_jax.data.emoji import COLOURS, MOTIONS, Scene
from magic141_jax.evaluation import metrics, scorers
from magic141_jax.evaluation.templates import Placement
from magic141_jax.pipelines.components import DEFAULT_FOLDER, load_model

OPPOSITE = {"left": "right", "up": "down", "grows": "shrinks", "still": "still"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}


def passed(search, frames, scenes):
    return [scorers.identify(search, f).shows(s.subject) for f, s in zip(frames, scenes, strict=True)]


@pytest.fixture(scope="module")
def frames(render, scenes):
    return [render(s)[0] for s in scenes]


def test_true_frames_pass(search, scenes, frames):
    assert np.mean(passed(search, frames, scenes)) >= 0.97


def test_no_blob_passes(search, scenes, frames):
    """The right subject, in its place and in its colours, blurred by 4 of its 36 pixels."""
    assert not any(passed(search, [ndimage.gaussian_filter(f, (4, 4, 0), mode="wrap") for f in frames], scenes))


def test_no_silhouette_passes(search, scenes, frames):
    """The right outline, sharp, filled with the subject's mean colour."""
    filled = []
    for frame, scene in zip(frames, scenes, strict=True):
        colour = np.float32(COLOURS[scene.colour]) / 255
        corner = tuple(float(round(c - 18) % 64) for c in scene.centre)
        alpha = search.draw(Placement(scene.subject, scene.phase, 36, corner, 0.0), colour)[1][..., None]
        mean = (frame - (1 - alpha) * colour).sum((0, 1)) / alpha.sum()
        filled.append((1 - alpha) * colour + alpha * mean)
    assert not any(passed(search, filled, scenes))


@pytest.mark.heavy
def test_round_trips_through_the_default_vae_pass(search, scenes, render):
    vae = load_model(weights.part(DEFAULT_FOLDER, "vae"))
    clips = np.stack([render(s, 5) for s in scenes])
    latents = vae.network(vae.params, clips, method="encode_latents")
    decoded = np.asarray(vae.network(vae.params, latents, method="decode_latents"))
    assert np.mean(passed(search, decoded[:, -1], scenes)) >= 0.97


def test_another_subject_does_not_pass(search, pack, render):
    found = scorers.identify(search, render(Scene(pack.index("cat"), "blue", "still", (32.0, 32.0), 36.0))[0])
    assert found.shows(pack.index("cat"))
    assert not found.shows(pack.index("dog"))
    assert not found.near(pack.index("bus"))


def test_a_plain_frame_shows_nobody(search):
    found = scorers.identify(search, np.full((64, 64, 3), 0.5, np.float32))
    assert not found.drawn


def test_noise_shows_nobody(search):
    assert not scorers.identify(search, np.random.default_rng(0).random((64, 64, 3))).drawn


def test_a_blur_lowers_outline_and_sharpness(search, frames):
    soft = ndimage.gaussian_filter(frames[0], (2, 2, 0), mode="wrap")
    sharp, blurred = (scorers.identify(search, f) for f in (frames[0], soft))
    assert sharp.sharpness == pytest.approx(1, abs=0.1)
    assert blurred.sharpness < 0.7
    assert blurred.outline < sharp.outline - 0.2


def test_agreements_of_equal_pictures_are_one(search):
    frame, alpha = search.draw(Placement(1, 0, 36, (10.0, 10.0), 0.0), np.float32([0.2, 0.5, 0.9]))
    assert scorers.outline_agreement(frame, frame, alpha > 0.5) == pytest.approx(1)
    assert scorers.interior_agreement(frame, frame, alpha) == pytest.approx(1, abs=1e-3)
    assert np.isnan(scorers.interior_agreement(frame, frame, alpha * 0.9))


def test_every_motion_is_read_from_starts_that_are_alike(render, moving):
    assert [scorers.read_motion(render(s, 17)) for s in moving] == [s.motion for s in moving]


def test_a_reversed_clip_moves_the_other_way(render, moving):
    for scene in moving:
        assert scorers.read_motion(render(scene, 17)[::-1]) == OPPOSITE[scene.motion]


def test_displacement_and_growth(render, moving):
    for scene in moving:
        displacement, growth = scorers.track(render(scene, 17))
        np.testing.assert_allclose(displacement, MOTIONS[scene.motion].velocity, atol=0.35)
        assert np.sign(MOTIONS[scene.motion].growth) * growth >= 0


def test_motion_is_in_units_of_64_pixels(render, moving):
    large, small = (scorers.track(render(moving[0], 9, size))[0] for size in (128, 64))
    np.testing.assert_allclose(large, small, atol=0.1)


def test_a_frozen_clip_stands_still(render, moving):
    assert scorers.read_motion(np.repeat(render(moving[0]), 17, axis=0)) == "still"


def test_an_empty_clip_stands_still():
    clip = np.full((9, 64, 64, 3), 0.3, np.float32)
    assert scorers.read_motion(clip) == "still"
    assert not metrics.foreground(clip, clip[0, 0, 0]).any()
