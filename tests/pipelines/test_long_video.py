"""The sliding window: lengths, seams, streaming, the anchor, one compilation."""

import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines import long_video
from magic141_jax.pipelines.long_video import count_windows, match_colors, overlap_frames, stream_video
from magic141_jax.pipelines.options import resolve

PROMPT = "a red shark moves left"


@pytest.mark.parametrize("total", [1, 8, 9, 10, 17, 18, 40])
@pytest.mark.parametrize("overlap", [1, 2])
def test_length(pipeline, total, overlap):
    parts = list(stream_video(pipeline, PROMPT, total_frames=total, overlap_latents=overlap))
    assert sum(map(len, parts)) == total
    assert len(parts) == count_windows(total, 9, 4 * (overlap - 1) + 1)
    assert all(len(p) for p in parts)


def test_one_window_is_the_short_video(pipeline):
    short = pipeline(PROMPT, seed=7)
    stream = stream_video(pipeline, PROMPT, total_frames=25, seed=7)
    np.testing.assert_array_equal(stream.image, short.images[0])
    np.testing.assert_array_equal(next(stream.frames), short.frames[0])


def test_a_longer_video_begins_like_a_shorter_one(pipeline):
    longer, shorter = (np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=n, seed=7))) for n in (30, 20))
    np.testing.assert_array_equal(longer[:20], shorter)


def test_windows_have_their_own_noise_and_share_programs(pipeline):
    list(stream_video(pipeline, PROMPT, total_frames=20, seed=1))
    pipeline.engine.seconds.clear()
    frames = np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=41, seed=1)))
    assert pipeline.engine.seconds["compile"] == 0
    assert set(pipeline.engine.seconds) >= {"text", "image", "video", "decode"}
    windows = frames[1:].reshape(5, 8, 32, 32, 3)
    assert all(np.abs(windows[i] - windows[i + 1]).max() > 1e-3 for i in range(4))


def test_the_known_frames_of_a_window_are_the_last_ones_encoded_anew(pipeline, monkeypatch):
    engine, given = pipeline.engine, []
    denoise = engine.denoise

    def spy(cond, *args, **kwargs):
        given.append((cond, kwargs))
        return denoise(cond, *args, **kwargs)

    monkeypatch.setattr(engine, "denoise", spy)
    frames = np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=13, overlap_latents=2, history_noise=0.3)))
    (_, _), (first, first_kwargs), (second, second_kwargs) = given
    options = resolve({"overlap_latents": 2}, pipeline.components)
    assert overlap_frames(options, 4) == 5
    known, mask = engine.encode_known(frames[None, 4:9], options, label="video")
    np.testing.assert_allclose(second.known, known, atol=1e-5)
    np.testing.assert_array_equal(second.mask, mask)
    assert np.asarray(first.mask)[0, :, 0, 0, 0].tolist() == [1, 0, 0]
    assert np.asarray(second.mask)[0, :, 0, 0, 0].tolist() == [1, 1, 0]
    np.testing.assert_array_equal(first.text, second.text)
    assert (first_kwargs["history_noise"], second_kwargs["history_noise"]) == (0.0, 0.3)


def test_match_colors():
    generator = np.random.default_rng(0)
    reference = generator.uniform(0.3, 0.6, (1, 2, 16, 16, 3)).astype(np.float32)
    drifted = 0.9 * reference + 0.05
    np.testing.assert_allclose(match_colors(drifted, reference, 1.0), reference, atol=0.03)
    np.testing.assert_array_equal(match_colors(drifted, reference, 0.0), drifted)


def test_every_window_is_matched_to_the_first(pipeline, monkeypatch):
    references = []

    def blacken(frames, reference, strength):
        references.append((np.asarray(reference), strength))
        return frames if len(references) == 1 else jnp.zeros_like(frames)

    monkeypatch.setattr(long_video, "match_colors", blacken)
    frames = np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=25, match_colors=0.5)))
    assert len(references) == 3
    for reference, strength in references:
        np.testing.assert_array_equal(reference[0], frames[:9])
        assert strength == 0.5
    assert not frames[9:].any()


def test_bad_calls(pipeline):
    for kwargs, message in (
        ({"total_frames": 0}, "at least 1"),
        ({"total_frames": 9, "latents": np.zeros(3)}, "its own noise"),
        ({"total_frames": 9, "image": "nowhere.png"}, "no image file"),
    ):
        with pytest.raises(UserError, match=message):
            stream_video(pipeline, PROMPT, **kwargs)
    with pytest.raises(UserError, match="prompt"):
        stream_video(pipeline, [PROMPT, PROMPT], total_frames=9)
