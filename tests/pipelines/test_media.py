"""Files written and read back: metadata, frame count, colours, and nothing left behind after a failure."""

import errno

import av
import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media

METADATA = {"prompt": "a héron \U0001f988", "seed": 3, "weights": "0123456789abcdef"}


@pytest.fixture
def clip():
    """Ten frames: a blue square that moves over a yellow ground."""
    frames = np.empty((10, 32, 48, 3), np.float32)
    frames[:] = (1.0, 0.8, 0.1)
    for i, frame in enumerate(frames):
        frame[8:24, 2 * i : 2 * i + 16] = (0.1, 0.2, 0.8)
    return frames


def write(path, frames, **kwargs):
    with (
        media.staged(path) as (temporary,),
        media.BackgroundWriter(temporary, 8, METADATA, **kwargs) as writer,
    ):
        for part in np.array_split(frames, 3):
            writer.write(part)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_metadata_round_trip(tmp_path, clip, suffix):
    path = tmp_path / f"out{suffix}"
    write(path, clip)
    assert media.read_metadata(path) == METADATA
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_mp4_frames_colours_and_rate(tmp_path, clip):
    path = tmp_path / "out.mp4"
    write(path, clip, upscale=2)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        assert container.metadata["title"] == METADATA["prompt"]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert frames.shape == (10, 64, 96, 3)
    assert np.abs(frames[:, ::2, ::2] / 255 - clip).mean() < 0.03


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_length(tmp_path, clip, suffix):
    write(tmp_path / f"out{suffix}", clip)
    with Image.open(tmp_path / f"out{suffix}") as picture:
        assert picture.n_frames == 10
        assert picture.size == (48, 32)


def test_full_disk_leaves_nothing(tmp_path, clip, monkeypatch):
    def full(self, frame):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media.Mp4Sink, "add", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out.mp4", np.concatenate([clip] * 8))
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_caller_keeps_the_old_file(tmp_path, clip):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with (
        pytest.raises(KeyboardInterrupt),
        media.staged(path) as (temporary,),
        media.BackgroundWriter(temporary, 8, {}) as writer,
    ):
        writer.write(clip)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_any_mode_is_read(tmp_path, mode):
    gray = Image.fromarray(np.tile(np.arange(0, 250, 10, dtype=np.uint8), (20, 1)))
    picture = Image.fromarray(np.asarray(gray, np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    path = tmp_path / {"CMYK": "in.jpg", "F": "in.tiff"}.get(mode, "in.png")
    picture.save(path)
    image = media.read_image(path)
    assert image.shape == (20, 25, 3)
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1
    if mode in ("RGB", "L", "I;16", "F"):
        np.testing.assert_allclose(image[0, :, 0], np.arange(0, 250, 10) / 255, atol=1e-3)


def test_transparency_becomes_white():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    np.testing.assert_array_equal(media.read_image(picture), np.ones((8, 8, 3), np.float32))


def test_fit_image_covers_and_centres():
    image = np.zeros((20, 60, 3), np.float32)
    image[:, 20:40] = 1
    assert media.fit_image(image, 20, 20).min() == 1
    assert media.fit_image(image, 10, 10)[:, 1:-1].min() > 0.95
    assert media.fit_image(image, 20, 60) is image


def test_bad_images(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (4000, 2)).save(tmp_path / "thin.png")
    with (tmp_path / "cut.png").open("wb") as stream:
        Image.effect_noise((64, 64), 50).save(stream, format="PNG")
        stream.truncate(500)
    cases = {"missing.png": "no image file", "text.png": "can't read", "thin.png": "4000x2", "cut.png": "can't read"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            media.read_image(tmp_path / name)
    for array in (np.zeros((4, 4)), np.full((4, 4, 3), 7.0), np.full((4, 4, 3), np.nan), np.zeros((4, 4, 3), int)):
        with pytest.raises(UserError, match="an image array is"):
            media.read_image(array)


def test_bad_outputs(tmp_path):
    cases = {"a.mov": "'.mp4'|Known", "a": "unknown extension", "no/a.mp4": "no folder", ".": "unknown extension"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            media.check_output(tmp_path / name, 10)
    with pytest.raises(UserError, match=r"write an \.mp4"):
        media.check_output(tmp_path / "a.gif", 10_000)
    media.check_output(tmp_path / "a.mp4", 10_000)


def test_write_video(tmp_path, clip):
    whole = media.write_video(tmp_path / "whole.mp4", clip, 8, metadata=METADATA, upscale=2)
    parts = media.write_video(
        str(tmp_path / "parts.mp4"), iter(np.array_split(clip, 3)), 8, metadata=METADATA, upscale=2
    )
    assert whole.read_bytes() == parts.read_bytes()
    assert media.read_metadata(parts) == METADATA
    with av.open(str(whole)) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(clip)

    def cut():
        yield clip
        raise OSError(errno.EIO, "torn")

    with pytest.raises(OSError, match="torn"):
        media.write_video(tmp_path / "cut.mp4", cut(), 8)
    with pytest.raises(UserError, match="unknown extension"):
        media.write_video(tmp_path / "clip.mov", clip, 8)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.mp4", "parts.mp4"}
