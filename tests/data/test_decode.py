import zlib

import numpy as np
import pytest
from PIL import Image

from magic141_jax.data.buckets import make_buckets
from magic141_jax.data.decode import BadClip, fit, open_image, read_image, read_video

BUCKETS = make_buckets([(32, 32)], [5])


def levels(clip):
    return np.round(clip.mean(axis=(1, 2, 3)) / 10).astype(int).tolist()


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mp4"), ("mpeg4", "avi"), ("libvpx", "webm")])
def test_frames_are_those_on_screen_at_the_sampled_times(tmp_path, write_video, grey_ramp, codec, ending):
    path = tmp_path / f"clip.{ending}"
    write_video(path, grey_ramp(20), fps=16, codec=codec)
    assert levels(read_video(path, BUCKETS, fps=None)) == [0, 1, 2, 3, 4]
    assert levels(read_video(path, BUCKETS, fps=8)) == [0, 2, 4, 6, 8]
    assert levels(read_video(path, BUCKETS, fps=8, start=0.25)) == [4, 6, 8, 10, 12]
    assert levels(read_video(path, BUCKETS, fps=32)) == [0, 0, 1, 1, 2]


def test_a_late_start_is_reached_by_seeking(tmp_path, write_video):
    frames = np.arange(100, dtype=np.uint8)[:, None, None, None] * 2 + np.zeros((1, 32, 32, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=20)
    clip = read_video(tmp_path / "clip.mp4", BUCKETS, fps=20, start=3.0)
    np.testing.assert_allclose(clip.mean(axis=(1, 2, 3)) / 2, np.arange(60, 65), atol=1.0)


def test_the_clip_ends_with_its_last_frame(tmp_path, write_video, grey_ramp):
    write_video(tmp_path / "clip.mp4", grey_ramp(8), fps=16)
    assert levels(read_video(tmp_path / "clip.mp4", BUCKETS, fps=8)) == [0, 2, 4, 6, 7]
    with pytest.raises(BadClip, match=r"too short \(4 frames at 8 frames a second, 5 needed"):
        read_video(tmp_path / "clip.mp4", BUCKETS, fps=8, start=0.1)


def test_the_bucket_follows_aspect_ratio_and_length(tmp_path, write_video, grey_ramp):
    write_video(tmp_path / "wide.mp4", grey_ramp(10, 32, 64))
    buckets = make_buckets([(32, 32), (32, 64)], [1, 5, 9, 13])
    assert read_video(tmp_path / "wide.mp4", buckets).shape == (9, 32, 64, 3)


def test_gif_and_webp_keep_their_timing_and_lie_on_white(tmp_path):
    frames = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(6)]
    for k, frame in enumerate(frames):
        frame.paste((40 * k, 90, 0, 255), (0, 0, 8, 16))
    for name in ("clip.gif", "clip.webp"):
        options = {"quality": 100} if name.endswith("webp") else {"disposal": 2}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, loop=0, **options)
        clip = read_video(tmp_path / name, make_buckets([(16, 16)], [3, 5], temporal=2), fps=5)
        np.testing.assert_allclose(clip[:, 8, 2, 0], [0, 80, 160], atol=12)
        assert clip[:, :, 12:].min() > 250


def test_unusable_videos(tmp_path, write_video, grey_ramp):
    write_video(tmp_path / "good.mp4", grey_ramp(20))
    data = (tmp_path / "good.mp4").read_bytes()
    files = {
        "broken.mp4": b"no video at all" * 50,
        "empty.mp4": b"",
        "cut.mp4": data[: len(data) // 2],
        "x.gif": b"GIF89a",
    }
    reasons = {"absent.mp4": "no such file"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        reasons[name] = "empty file" if not content else "unreadable video"
    write_video(tmp_path / "thin.mp4", grey_ramp(5, 16, 512))
    reasons["thin.mp4"] = "absurd size"
    for name, reason in reasons.items():
        with pytest.raises(BadClip) as caught:
            read_video(tmp_path / name, BUCKETS)
        assert caught.value.reason == reason, name


def test_a_sound_file_has_no_video_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadClip, match="no video frames"):
        read_video(tmp_path / "sound.mp4", BUCKETS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "LA", "RGBA"])
def test_pictures_of_every_mode(tmp_path, mode):
    values = np.full((16, 24), 200, np.uint8)
    image = Image.fromarray(values.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(values).convert(mode)
    ending = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"picture.{ending}")
    result = np.asarray(open_image(tmp_path / f"picture.{ending}"))
    assert result.shape == (16, 24, 3) and result.dtype == np.uint8
    if mode != "1":
        np.testing.assert_allclose(result, 200, atol=3)


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(open_image(tmp_path / "clear.png")) == 255).all()
    palette = Image.new("P", (16, 16), 3)
    palette.putpalette([0] * 12)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert (np.asarray(open_image(tmp_path / "palette.png")) == 255).all()


def test_a_photo_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 16), "black")
    image.paste("white", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[274] = 6  # turn a quarter clockwise
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    upright = np.asarray(open_image(tmp_path / "photo.jpg"))
    assert upright.shape == (40, 16, 3)
    assert upright[:6].mean() > 240 and upright[12:].mean() < 15


def test_unusable_pictures(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    for name, side in (("huge", 9000), ("bomb", 30000)):
        data = bytearray((tmp_path / "dot.png").read_bytes())
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        (tmp_path / f"{name}.png").write_bytes(data)
    reasons = {"text": "not a picture", "cut": "unreadable picture", "none": "no such file"}
    reasons |= dict.fromkeys(("dot", "huge", "bomb"), "absurd size")
    for name, reason in reasons.items():
        with pytest.raises(BadClip) as caught:
            open_image(tmp_path / f"{name}.png")
        assert caught.value.reason == reason, name


def test_fit_cuts_around_the_centre_without_aliasing():
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 255
    assert fit(Image.fromarray(image), 16, 16)[:, 1:-1].min() > 250
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(fit(Image.fromarray(stripes), 8, 8).astype(int) - 127).max() < 8


def test_a_picture_becomes_one_frame(tmp_path):
    Image.new("RGB", (60, 30), "red").save(tmp_path / "wide.png")
    clip = read_image(tmp_path / "wide.png", make_buckets([(32, 32), (32, 64)], [17]))
    assert clip.shape == (1, 32, 64, 3)
    assert (clip == (255, 0, 0)).all()
