"""Features against closed forms; the distance against other formulas, and what must move it, on true clips."""

import numpy as np
import pytest
import scipy.linalg
from scipy import ndimage

from magic141_jax.data.emoji import COLOURS, MOTIONS, Scene
from magic141_jax.evaluation import features, protocol
from magic141_jax.evaluation.features import FeatureSpace, diversity, frechet, perceptual, scatter

COLOUR, DETAIL, CHANGE = slice(0, 3), slice(3, 6), slice(6, 9)


@pytest.fixture(scope="module")
def true_clips(pack):
    """96 clips of six subjects, 32 pixels and 9 frames."""
    rng = np.random.default_rng(1)
    scenes = [
        Scene(
            subject=i % 6,
            colour=str(rng.choice(list(COLOURS))),
            motion=str(rng.choice(list(MOTIONS))),
            centre=tuple(map(float, rng.integers(64, size=2))),
            size=float(rng.integers(32, 43)),
            phase=int(rng.integers(24)),
        )
        for i in range(96)
    ]
    return protocol.render_clips(pack, scenes, side=32, num_frames=9)


@pytest.fixture(scope="module")
def space(true_clips):
    return FeatureSpace.of(true_clips)


def test_a_plain_clip_has_its_colour_and_nothing_else():
    cells = scatter(np.full((3, 20, 20, 3), (0.1, 0.5, 0.9)))
    assert cells.shape == (3, 8, 8, 9)
    np.testing.assert_allclose(cells[..., COLOUR] - (0.1, 0.5, 0.9), 0, atol=1e-6)
    np.testing.assert_allclose(cells[..., 3:], 0, atol=1e-6)


def test_flicker_is_change_at_every_octave():
    clip = np.zeros((4, 16, 16, 3))
    clip[1::2] = 0.3
    cells = scatter(clip)
    np.testing.assert_allclose(cells[:3, ..., CHANGE], 0.3, atol=1e-6)
    np.testing.assert_allclose(cells[3, ..., CHANGE], 0)
    np.testing.assert_allclose(cells[..., DETAIL], 0, atol=1e-6)


@pytest.mark.parametrize(("period", "octave"), [(2, 0), (8, 1), (16, 2)])
def test_a_wave_is_detail_at_its_octave(period, octave):
    """Of a wave of frequency w, G_s leaves exp(-s^2 w^2 / 2); the mean of |cos| over whole periods is left."""
    wave = np.cos(2 * np.pi * np.arange(64) / period)
    clip = np.broadcast_to(0.5 + 0.4 * wave[None, None, :, None], (1, 64, 64, 3))
    left = [1, *(np.exp(-((s * 2 * np.pi / period) ** 2) / 2) for s in features.BLURS)]
    expected = -np.diff(left) * 0.4 * np.abs(wave).mean()
    found = scatter(clip)[0, ..., DETAIL].mean((0, 1))
    np.testing.assert_allclose(found, expected, atol=3e-3)
    assert found.argmax() == octave


def test_cells_say_where_and_statistics_do_not(space, true_clips):
    clip = true_clips[:1]
    moved = np.roll(clip, (8, 12), axis=(2, 3))
    maps = space.maps(np.concatenate([clip, moved]))
    np.testing.assert_allclose(np.roll(maps[0], (2, 3), axis=(1, 2)), maps[1], atol=1e-4)
    assert diversity([maps[:1], maps[1:]]) > 0.3
    np.testing.assert_allclose(space.statistics(clip), space.statistics(moved), atol=1e-4)


def test_units_are_the_deviations_of_true_clips(space, true_clips):
    np.testing.assert_allclose(space.maps(true_clips).std((0, 1, 2, 3)), 1, rtol=1e-3)
    plain = FeatureSpace.of(np.full((2, 3, 16, 16, 3), 0.5))
    assert np.isfinite(plain.statistics(true_clips[:2])).all()


def test_distance_of_one_dimension():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (50, 1)), rng.normal(2, 3, (80, 1))
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet(a, b) == pytest.approx(expected)


def test_distance_is_that_of_the_shrunk_covariances():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 4)) @ rng.normal(size=(4, 4)) + 0.3 for n in (36, 60))
    weight = 4 / (4 + 36)
    first, second = (np.cov(x.T) * (1 - weight * (1 - np.eye(4))) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root)
    assert frechet(a, b) == pytest.approx(expected)
    assert frechet(b, a) == pytest.approx(expected)


def test_fewer_samples_than_dimensions():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(3, 18)), rng.normal(size=(400, 18))
    assert frechet(few, few) == pytest.approx(0, abs=1e-6)
    near, far = frechet(few, many), frechet(few + 5, many)
    assert 0 < near < 2 * 18
    assert far > 18 * 4**2
    with pytest.raises(ValueError, match="two samples"):
        frechet(few[:1], many)


def blurred(clips, amount):
    return ndimage.gaussian_filter(clips, (0, 0, amount, amount, 0), mode="wrap")


def frozen(clips, amount):
    return (1 - amount / 2) * clips + amount / 2 * clips[:, :1]


def recoloured(clips, amount):
    return np.clip(clips + 0.2 * amount * np.float32([1, -1, 0]), 0, 1)


def noisy(clips, amount):
    return np.clip(clips + 0.03 * amount * np.random.default_rng(0).normal(size=clips.shape), 0, 1)


@pytest.mark.parametrize("harm", [blurred, frozen, recoloured, noisy])
def test_distance_grows_with_harm(harm, space, true_clips):
    clips = true_clips[:32]
    true = space.statistics(clips)
    distances = [frechet(space.statistics(harm(clips, amount)), true) for amount in (0.5, 1.0, 2.0)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert distances[2] > 2 * frechet(space.statistics(true_clips[32:64]), true)


def test_distance_grows_with_the_share_of_frozen_clips(space, true_clips):
    clips = true_clips[:32]
    mixed = [np.concatenate([frozen(clips[:k], 2.0), clips[k:]]) for k in (0, 8, 16, 32)]
    distances = [frechet(space.statistics(m), space.statistics(clips)) for m in mixed]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(distances) > 0.1).all()


def test_distance_of_true_clips_shrinks_with_their_number(space, true_clips):
    """Means over as many splittings as there are, since a single one varies."""
    values = space.statistics(true_clips)
    found = []
    for count in (4, 16, 48):
        starts = range(0, len(values) - 2 * count + 1, 2 * count)
        found.append(np.mean([frechet(values[i : i + count], values[i + count : i + 2 * count]) for i in starts]))
    assert found[0] > 1.5 * found[1]
    assert found[1] > 1.5 * found[2]


def test_diversity_is_the_mean_over_pairs_of_the_difference():
    draws = [np.full((2, 3, 4), value) for value in (0.0, 1.0, 3.0)]
    assert diversity(draws) == pytest.approx((1 + 3 + 2) / 3)
    assert diversity(draws[:1] * 2) == 0
    with pytest.raises(ValueError, match="two draws"):
        diversity(draws[:1])


def test_pixel_noise_is_little_diversity(space, true_clips):
    """Noise of a tenth of the range is less than another place, subject or colour."""
    rng = np.random.default_rng(0)
    clips = true_clips[:8, :1]
    drawn = [space.maps(np.clip(clips + rng.normal(0, 0.1, clips.shape), 0, 1)) for _ in range(2)]
    assert diversity(drawn) < 0.5 * diversity([space.maps(clips), space.maps(true_clips[8:16, :1])])


def gaussian(mean, covariance, count=64):
    """Rows whose sample mean and covariance are exactly these, of any rank."""
    d = len(mean)
    rows = np.random.default_rng(d).normal(size=(count, d))
    rows -= rows.mean(0)
    rows = np.linalg.qr(rows)[0] * np.sqrt(count - 1)
    values, vectors = np.linalg.eigh(np.asarray(covariance, float))
    return np.asarray(mean) + rows @ (vectors * np.sqrt(np.maximum(values, 0))).T


def test_frechet_of_gaussians_in_closed_form():
    """Covariances that commute: |mean difference|^2 + the sum of (root a - root b)^2 of their variances."""
    a, b = gaussian([0, 1, 2], np.diag([1, 4, 9])), gaussian([1, 1, 0], np.diag([4, 4, 1]))
    assert frechet(a, b, shrink=False) == pytest.approx(5 + 1 + 0 + 4)
    assert frechet(a[:, :1], b[:, :1], shrink=False) == pytest.approx(1 + 1)
    assert frechet(a, a + np.array([3, 0, 4]), shrink=False) == pytest.approx(25)
    flat = gaussian([0, 0, 0], np.diag([4, 0, 0]))  # of rank one
    assert frechet(flat, a - [0, 1, 2], shrink=False) == pytest.approx(1 + 4 + 9)


@pytest.mark.parametrize("d", [2, 12])
def test_frechet_agrees_with_a_general_matrix_root(d):
    generator = np.random.default_rng(d)
    s, t = (m @ m.T for m in generator.normal(size=(2, d, d)))
    wanted = np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert frechet(gaussian([0] * d, s), gaussian([0] * d, t), shrink=False) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_fewer_samples_than_dimensions_is_finite_and_symmetric():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 40))
    assert frechet(a, a, shrink=False) == pytest.approx(0, abs=1e-6)
    assert frechet(a, b, shrink=False) == pytest.approx(frechet(b, a, shrink=False)) and frechet(a, b, shrink=False) > 1


def test_perceptual_distance_is_of_directions():
    a = np.array([[[1.0, 0], [0, 1]]])[None]
    assert perceptual(a, a * 5) == pytest.approx(0)
    assert perceptual(a, a[..., ::-1]) == pytest.approx(2)
    assert perceptual(a, -a) == pytest.approx(4)
    assert perceptual(np.concatenate([a, a]), np.concatenate([a, -a])) == pytest.approx([0, 4])
