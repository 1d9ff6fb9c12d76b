"""Formulas against values worked out by hand; background and colour on true frames."""

import math

import numpy as np
import pytest

from magic141_jax.data.emoji import COLOURS, Scene, poster
from magic141_jax.evaluation import metrics


def test_psnr():
    a = np.zeros((2, 4, 4, 3))
    assert metrics.psnr(a, a + 0.1) == pytest.approx(20)
    assert metrics.psnr(a, a) == metrics.PSNR_CEILING


def test_psnr_in_a_mask_sees_nothing_else():
    a = np.zeros((3, 4, 4, 3))
    b, mask = a.copy(), np.zeros((4, 4), bool)
    b[:, 0, 0], b[:, 1, 1], mask[1, 1] = 1.0, 0.01, True
    assert metrics.psnr(a, b, mask) == pytest.approx(40)
    assert math.isnan(metrics.psnr(a, b, np.zeros((4, 4), bool)))


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = np.full((16, 16, 3), 0.2), np.full((16, 16, 3), 0.6)
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)


def test_ssim_falls_with_noise_and_does_not_mix_frames():
    rng = np.random.default_rng(0)
    clip = rng.random((2, 24, 24, 3))
    noisy = clip.copy()
    noisy[1] += rng.normal(0, 0.2, clip[1].shape)
    assert metrics.ssim(clip, clip) == pytest.approx(1)
    assert metrics.ssim(clip, noisy) == pytest.approx((1 + metrics.ssim(clip[1], noisy[1])) / 2)
    assert metrics.ssim(clip[1], noisy[1]) < 0.95


@pytest.mark.parametrize("colour", list(COLOURS))
def test_background_of_a_large_subject_in_noise(render, pack, colour):
    frame = render(poster(pack.index("lion"), colour, "shrinks"))[0]
    noisy = np.clip(frame + np.random.default_rng(0).normal(0, 0.02, frame.shape), 0, 1)
    np.testing.assert_allclose(metrics.background(noisy), np.array(COLOURS[colour]) / 255, atol=0.02)
    assert metrics.colour_name(metrics.background(noisy)) == colour


def test_another_background_is_noticed(render, pack):
    frame = render(poster(pack.index("shark"), "orange", "left"))[0]
    assert metrics.colour_name(metrics.background(frame)) != "yellow"


def test_foreground_is_the_subject(render, pack):
    scene = Scene(pack.index("ladybug"), "white", "still", (32.0, 32.0), 40.0)
    mask = metrics.foreground(render(scene)[0], np.array(COLOURS["white"]) / 255)
    assert not mask[:8].any()
    assert mask[24:40, 24:40].mean() > 0.9


def test_motion_amount():
    clip = np.zeros((3, 2, 2, 3))
    clip[1] = 0.5
    assert metrics.motion_amount(clip) == pytest.approx(0.5)
    assert metrics.motion_amount(clip[:1].repeat(4, axis=0)) == 0


def test_sharpness_is_the_slope():
    ramp = np.broadcast_to(np.arange(16)[None, :, None] * 0.01, (16, 16, 3))
    inside = np.zeros((16, 16), bool)
    inside[4:12, 4:12] = True
    assert metrics.sharpness(ramp, inside) == pytest.approx(0.01 * math.sqrt(3))
    assert math.isnan(metrics.sharpness(ramp, ~inside & inside))
