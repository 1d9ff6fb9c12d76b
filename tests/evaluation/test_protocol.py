"""The scenes of the three sets, and the measures on true clips; then all of it through tiny random weights."""

from types import SimpleNamespace

import numpy as np
import pytest

from magic141_jax.data.emoji import MOTIONS, is_held_out_triple
from magic141_jax.errors import UserError
from magic141_jax.evaluation import protocol
from magic141_jax.evaluation.templates import Search


@pytest.mark.parametrize("split", protocol.SPLITS)
def test_scenes_belong_to_their_split(pack, split):
    scenes = protocol.draw_scenes(pack, split, 60)
    subjects = set(pack.held_out if split == "subjects" else pack.trained)
    assert {s.subject for s in scenes} <= subjects
    assert len({s.subject for s in scenes[: len(subjects)]}) == min(60, len(subjects))
    if split != "subjects":
        assert {is_held_out_triple(pack, s) for s in scenes} == {split == "triples"}
    assert protocol.draw_scenes(pack, split, 60) == scenes
    assert protocol.draw_scenes(pack, split, 60, seed=1) != scenes


def test_the_start_says_nothing_about_the_motion(pack):
    """Means of place and size by motion differ by no more than chance (3.5 standard errors)."""
    scenes = protocol.draw_scenes(pack, "train", 1400)
    starts = np.array([[*s.centre, s.size] for s in scenes])
    for motion in MOTIONS:
        of = np.array([s.motion == motion for s in scenes])
        error = starts.std(0) / np.sqrt(of.sum())
        assert (np.abs(starts[of].mean(0) - starts.mean(0)) < 3.5 * error).all()


def test_true_clips_have_the_ceiling_and_others_do_not(pack, search, render, moving):
    clips = np.stack([render(s, 17) for s in moving])
    values = protocol.clip_values(clips, moving, clips)
    assert values == {"motion": 1.0, "motion_amount": pytest.approx(1)}
    frozen = np.repeat(clips[:, :1], 17, axis=1)
    values = protocol.clip_values(frozen, moving, clips)
    assert values == {"motion": pytest.approx(1 / 7), "motion_amount": 0}
    two = [moving[0], moving[7]]
    assert protocol.frame_values(clips[[0, 7], -1], two, search)["identity"] == 1
    swapped = protocol.frame_values(clips[[7, 0], -1], two, search)
    assert (swapped["identity"], swapped["colour"], swapped["drawn"]) == (0, 0, 1)


def test_vae_values_look_inside_the_subject(render, moving):
    truth = render(moving[0], 5)[None]
    off = truth.copy()
    off[:, :, :4, :4] = np.clip(off[:, :, :4, :4] + 0.3, 0, 1)
    scenes = moving[:1]
    clean, changed = (protocol.vae_values(d, truth, scenes) for d in (truth, off))
    assert clean["vae_ssim"] == pytest.approx(1)
    assert changed["vae_psnr"] < clean["vae_psnr"]
    everywhere = protocol.vae_values(np.clip(truth - 0.1, 0, 1), truth, scenes)
    assert everywhere["vae_subject_psnr"] == pytest.approx(20, abs=1.5)
    assert everywhere["vae_first_psnr"] == pytest.approx(20, abs=1.5)


def test_batches_are_of_one_size_and_lose_nothing():
    sizes = []

    def double(items):
        sizes.append(len(items))
        return 2 * items, items

    doubled, same = protocol._in_batches(double, np.arange(protocol.BATCH + 3))
    assert sizes == [protocol.BATCH] * 2
    np.testing.assert_array_equal(doubled, 2 * np.arange(protocol.BATCH + 3))
    np.testing.assert_array_equal(same, np.arange(protocol.BATCH + 3))


def test_all_measures_of_tiny_weights(pipeline, pack):
    search = Search(pack, protocol.frame_side(pipeline))
    told = []
    clips = protocol.make_clips(pipeline, pack, "subjects", 2, options={}, progress=told.append)
    assert {k: v.shape for k, v in clips.made.items()} == dict.fromkeys(("truth", "vae", "i2v"), (2, 9, 32, 32, 3))
    values = protocol.evaluate_clips(clips, search, progress=told.append)
    assert set(values) == {"truth", "vae", "i2v", "truth_first", "vae_first"}
    assert values["truth"]["motion_amount"] == 1
    assert values["i2v"]["identity"] == 0
    assert values["i2v"]["first_frame_psnr"] == pytest.approx(values["vae"]["vae_first_psnr"], abs=0.1)
    assert told[-1] == "vae_first scored"


@pytest.mark.parametrize("size", [(48, 32), (31, 31), (512, 512)])
def test_frames_that_can_not_be_measured(size):
    sampling = SimpleNamespace(width=size[0], height=size[1])
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}"):
        protocol.frame_side(SimpleNamespace(components=SimpleNamespace(sampling=sampling)))
