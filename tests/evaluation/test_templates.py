"""The search against brute force and against what was rendered, on the torus."""

import numpy as np
import pytest

from magic141_jax.data.emoji import COLOURS, Scene
from magic141_jax.evaluation import metrics
from magic141_jax.evaluation.templates import Bank, Placement, _peaks, best_of_each, draw_all


def test_a_template_is_what_the_pack_renders(pack, search, render):
    scene = Scene(pack.index("tractor"), "pink", "still", (20.0, 30.0), 40.0, 7)
    colour = np.float32(COLOURS["pink"]) / 255
    frame, alpha = search.draw(Placement(scene.subject, 7, 40, (0.0, 10.0), 0.0), colour)
    assert metrics.psnr(frame, render(scene)[0]) > 40
    assert alpha[:, :9].max() < 0.01


def test_a_bank_gives_the_least_squared_error_over_all_shifts(pack):
    rng = np.random.default_rng(0)
    keys = np.array([[0, 0, 40], [5, 3, 30]])
    frame, colour = rng.random((16, 16, 3)).astype(np.float32), np.float32([0.2, 0.7, 0.4])
    bank = Bank(pack, keys, 16)
    for placement, picture in zip(bank.place(frame, colour), draw_all(pack, keys, 16), strict=True):
        flat = (picture[:3] + (1 - picture[3:]) * colour[:, None, None]).transpose(1, 2, 0)
        errors = [np.sum((frame - np.roll(flat, (y, x), (0, 1))) ** 2) for y in range(16) for x in range(16)]
        assert placement.error <= min(errors) + 1e-2
        assert placement.error > min(errors) - 0.1 * (max(errors) - min(errors))
        assert np.abs(np.array(placement.shift) - np.divmod(np.argmin(errors), 16)).max() <= 0.5


def test_peaks_are_found_between_pixels():
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"))
    surfaces = np.stack([-((grid[0] - y) ** 2) - (grid[1] - x) ** 2 for y, x in ((3.0, 4.5), (2.0, 5.0))])
    shifts, heights = _peaks(surfaces.astype(np.float64))
    np.testing.assert_allclose(shifts, [[3, 4.5], [2, 5]])
    np.testing.assert_allclose(heights, 0, atol=1e-6)


@pytest.mark.parametrize("centre", [(30.0, 33.0), (2.0, 61.0)])
def test_place_size_and_moment_are_found_across_the_border(pack, search, render, centre):
    scene = Scene(pack.index("locomotive"), "green", "still", centre, 37.0, 11)
    frame = render(scene)[0]
    found = search(frame, metrics.background(frame))
    corner = [round(c - 37 / 2) % 64 for c in centre]
    assert (found[0].subject, found[0].size) == (scene.subject, 37)
    assert np.abs((np.array(found[0].shift) - corner + 32) % 64 - 32).max() <= 0.5


def test_every_subject_is_ranked_once(pack, search, render):
    frame = render(Scene(3, "blue", "still", (32.0, 32.0), 36.0))[0]
    found = [p.subject for p in search(frame, metrics.background(frame))]
    assert sorted(found) == list(range(len(pack.subjects)))


def test_best_of_each():
    rows = [Placement(s, 0, 30, (0.0, 0.0), e) for s, e in ((1, 3.0), (2, 1.0), (1, 0.5), (2, 4.0))]
    assert [(p.subject, p.error) for p in best_of_each(rows)] == [(1, 0.5), (2, 1.0)]
