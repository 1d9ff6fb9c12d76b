"""A window as a function, with stand-ins for the networks: what it is given, shows and leaves behind."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion.conditioning import Conditioning, known_latents
from magic141_jax.models.text import TextStates
from magic141_jax.pipelines.window import (
    BORDER,
    Colours,
    Plan,
    Stages,
    begin,
    border_colours,
    cross_fade,
    match_colors,
    step,
)

LATENTS, SIDE = 4, 16  # windows of 4 latent and 13 pixel frames

PICTURE = np.full((1, SIDE, SIDE, 3), 0.5, np.float32)
PICTURE[:, 2:6, 3:8] = np.random.default_rng(9).uniform(0, 1, (1, 4, 5, 3))


class Walk(NamedTuple):
    cond: Any
    negative: Any
    draws: Any
    history_noise: Any
    adapter: Any


def clip(seed, frames=13):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (1, frames, SIDE, SIDE, 3)).astype(np.float32)


def text(value):
    return TextStates(np.full((1, 3, 5), value, np.float32), np.ones((1, 3), bool), np.full((1, 2), value, np.float32))


class Networks:
    """Window w's frames are clip(w), its latents are w + 1 and the number of the latent frame."""

    def __init__(self):
        self.walks, self.encoded, self.decoded = [], [], []

    def denoise(self, walk):
        assert float(walk.adapter) == bool(self.walks)
        self.walks.append(walk)
        numbers = np.arange(LATENTS, dtype=np.float32)[None, :, None, None, None]
        return np.broadcast_to(10 * len(self.walks) + numbers, (1, LATENTS, 2, 2, 1))

    def decode(self, latents):
        self.decoded.append(np.asarray(latents)[0, :, 0, 0, 0].tolist())
        return clip(int(latents[0, -1, 0, 0, 0]) // 10 - 1)

    def encode(self, frames):
        self.encoded.append(np.asarray(frames))
        count = (frames.shape[1] - 1) // 4 + 1
        return known_latents(jnp.full((1, count, 2, 2, 1), -1.0), count, LATENTS)

    def look(self, images, text, mask):
        assert text.shape[1] == mask.shape[1] == 0
        return jnp.full((1, 2, 5), images.mean()), jnp.ones((1, 2), bool)


def run(plan, windows=3, history_noise=0.3):
    """The networks with what they were given, and the frames of each window."""
    known, mask = known_latents(np.full((1, 1, 2, 2, 1), -2.0, np.float32), 1, LATENTS)
    shown = np.ones((1, 5), bool)
    cond = Conditioning(np.full((1, 5, 5), 7.0, np.float32), shown, text(0).pooled, known, mask, image_tokens=2)
    walk = Walk(cond, None, np.array([[3, 0, 1]], np.uint32), np.float32(0), np.float32(0))
    networks = Networks()
    stages = Stages(networks.denoise, networks.decode, networks.encode, networks.look)
    state, frames = begin(walk, history_noise, PICTURE, plan=plan), []
    for window in range(windows):
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        made, state = step(stages, state, text(window), None, plan=plan)
        # What comes out can take the memory of what went in, and meets the same program.
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        frames.append(np.asarray(made))
    return networks, frames


def test_text_noise_and_history_are_a_windows_own():
    networks, frames = run(Plan(length=13, overlap=5))
    for window, walk in enumerate(networks.walks):
        assert np.asarray(walk.cond.text)[0, :, 0].tolist() == [7, 7, *[window] * 3], "the anchor stays before the text"
        assert np.asarray(walk.cond.pooled).tolist() == [[window] * 2]
        assert np.asarray(walk.draws).tolist() == [[3, 0, 1 + window]]
        assert float(walk.history_noise) == np.float32(0.3 if window else 0)
        assert np.asarray(walk.cond.mask)[0, :, 0, 0, 0].tolist() == [1, int(window > 0), 0, 0]
        np.testing.assert_array_equal(frames[window], clip(window))
        np.testing.assert_array_equal(networks.encoded[window], clip(window)[:, -5:])
    assert networks.walks[0].cond.known[0, 0, 0, 0, 0] == -2 and networks.walks[1].cond.known[0, 1, 0, 0, 0] == -1


def test_carried_latents_stand_behind_one_that_is_encoded_at_its_place():
    networks, _ = run(Plan(length=13, overlap=9, carried=2))
    known = np.asarray(networks.walks[1].cond.known)[0, :, 0, 0, 0]
    assert known.tolist() == [-1, 12, 13, 0], "latents 2 and 3 of window 0 stand for its last 8 frames"
    assert np.asarray(networks.walks[1].cond.mask)[0, :, 0, 0, 0].tolist() == [1, 1, 1, 0]
    np.testing.assert_array_equal(networks.encoded[0], clip(0)[:, 4:5])


def test_a_sink_is_the_first_pictures_latent_and_decoded_is_what_it_stands_in_the_place_of():
    networks, frames = run(Plan(length=13, overlap=9, carried=2, sink=True))
    known = [np.asarray(walk.cond.known)[0, :, 0, 0, 0].tolist() for walk in networks.walks]
    assert known == [[-2, 0, 0, 0], [-2, 12, 13, 0], [-2, 22, 23, 0]]
    assert np.asarray(networks.walks[1].cond.mask)[0, :, 0, 0, 0].tolist() == [1, 1, 1, 0]
    assert networks.decoded == [[10, 11, 12, 13], [11, 21, 22, 23], [21, 31, 32, 33]]
    assert not networks.encoded, "nothing is encoded anew"
    np.testing.assert_array_equal(frames[2], clip(2))


def test_the_first_picture_is_followed_to_where_the_shared_frames_begin(monkeypatch):
    own = clip

    def led(seed, frames=13):
        """The same noise, but in frame 8, the first of the last 5, where the picture is, moved by window w."""
        made = own(seed, frames)
        made[:, 8] = np.roll(PICTURE, (seed, -4), axis=(1, 2)) + 0.1 * (made[:, 8] - 0.5)
        return made

    monkeypatch.setattr(sys.modules[__name__], "clip", led)
    networks, frames = run(Plan(length=13, overlap=5, blend=True, follow=True))
    for window in range(3):
        np.testing.assert_array_equal(networks.encoded[window], np.roll(PICTURE, (window, -4), axis=(1, 2))[:, None])
        assert np.asarray(networks.walks[window].cond.mask)[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0]
    assert [walk.cond.known[0, 0, 0, 0, 0] for walk in networks.walks] == [-2, -1, -1]
    share = np.array([1, 2, 3, 4, 5])[None, :, None, None, None] / 6
    faded = (1 - share) * led(1)[:, -5:] + share * led(2)[:, :5]
    np.testing.assert_allclose(frames[2][:, :5], faded, atol=1e-6)


def test_without_an_anchor_the_image_is_the_windows_own_first_frame():
    networks, _ = run(Plan(length=13, overlap=5, anchor=False))
    assert np.asarray(networks.walks[0].cond.text)[0, :2, 0].tolist() == [7, 7]
    for window in (1, 2):
        tokens = np.asarray(networks.walks[window].cond.text)[0, :, 0]
        np.testing.assert_allclose(tokens, [*[clip(window - 1)[:, -5].mean()] * 2, *[window] * 3], rtol=1e-6)


def test_shared_frames_fade():
    networks, frames = run(Plan(length=13, overlap=5, blend=True))
    np.testing.assert_array_equal(frames[0], clip(0))
    for window in (1, 2):
        share = np.array([1, 2, 3, 4, 5])[None, :, None, None, None] / 6
        faded = (1 - share) * clip(window - 1)[:, -5:] + share * clip(window)[:, :5]
        np.testing.assert_allclose(frames[window][:, :5], faded, atol=1e-6)
        np.testing.assert_array_equal(frames[window][:, 5:], clip(window)[:, 5:])
        np.testing.assert_array_equal(
            networks.encoded[window], clip(window)[:, -5:], "a window goes on from its own frames"
        )
    np.testing.assert_array_equal(cross_fade(clip(0)[:, :0], clip(1), False), clip(1))


def test_every_window_has_the_colours_of_the_first():
    networks, frames = run(Plan(length=13, overlap=5, match_colors=1.0))
    reference = border_colours(clip(0))
    np.testing.assert_allclose(frames[0], clip(0), atol=1e-6)
    for window in (1, 2):
        np.testing.assert_allclose(frames[window], match_colors(clip(window), reference, 1.0), atol=1e-6)
        np.testing.assert_array_equal(networks.encoded[window], frames[window][:, -5:])


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize(("overlap", "dropped"), [(1, 0), (5, 0), (5, 4), (1, 4)])
def test_every_frame_of_a_video_is_shown_once(blend, overlap, dropped):
    plan = Plan(length=13 - dropped, overlap=overlap, dropped=dropped, blend=blend)
    for total in (1, 9, 13, 14, 30):
        windows, places = 0, []
        while len(places) < total:
            first = windows * (plan.length - plan.shared)
            places += [first + i for i in range(plan.length)[plan.shown(windows, total)]]
            assert plan.start(windows) == (first + plan.shared if windows else 0)
            windows += 1
        assert places == [*range(total)]


def test_what_is_dropped_is_neither_shown_nor_known():
    networks, frames = run(Plan(length=9, overlap=5, dropped=4, blend=True))
    np.testing.assert_array_equal(frames[0], clip(0)[:, 4:])
    np.testing.assert_allclose(frames[1][:, 0], (clip(0)[:, -1] + clip(1)[:, 4]) / 2, atol=1e-6)
    np.testing.assert_array_equal(networks.encoded[0], clip(0)[:, -5:])


def test_border_colours():
    frames = clip(0, 2)
    edge = SIDE // BORDER
    inside = np.zeros((SIDE, SIDE), bool)
    inside[edge:-edge, edge:-edge] = True
    border = frames[0][:, ~inside].reshape(-1, 3).astype(np.float64)
    for have, want in zip(border_colours(frames), (border.mean(0), border.std(0)), strict=True):
        assert have.shape == (1, 1, 1, 1, 3)
        np.testing.assert_allclose(have[0, 0, 0, 0], want, rtol=1e-5)
    frames[0][:, inside] = 0
    np.testing.assert_allclose(border_colours(frames).mean[0, 0, 0, 0], border.mean(0), rtol=1e-5)


def test_match_colors():
    reference = 0.3 + 0.3 * clip(0, 2)
    drifted = 0.9 * reference + 0.05
    wanted = border_colours(reference)
    np.testing.assert_allclose(match_colors(drifted, wanted, 1.0), reference, atol=0.03)
    np.testing.assert_array_equal(match_colors(drifted, wanted, 0.0), drifted)
    faint = Colours(wanted.mean, 100 * wanted.spread)
    bounded = border_colours(match_colors(reference, faint, 1.0))
    np.testing.assert_allclose(bounded.spread, 1.25 * wanted.spread, rtol=1e-4)
