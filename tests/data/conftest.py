"""Writers of small real video files, and a folder that holds every kind of good and bad clip."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


def _write_video(path, frames, fps=16, codec="libx264"):
    frames = np.asarray(frames, np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _grey_ramp(count, height=32, width=32):
    """Frame k is grey of value 10 k."""
    return np.broadcast_to((10 * np.arange(count))[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


@pytest.fixture
def write_video():
    return _write_video


@pytest.fixture
def grey_ramp():
    return _grey_ramp


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    """Two good videos (one with two captions), a picture, and one clip for each reason to leave it out."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    _write_video(folder / "a.mp4", _grey_ramp(16))
    _write_video(folder / "more" / "b.mp4", _grey_ramp(16, 32, 48), codec="mpeg4")
    _write_video(folder / "short.mp4", _grey_ramp(3))
    _write_video(folder / "silent.mp4", _grey_ramp(16))
    Image.fromarray(np.full((20, 30, 4), 128, np.uint8), "RGBA").save(folder / "c.png")
    (folder / "broken.mp4").write_bytes(b"this is no video" * 20)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "captions.csv").write_text(
        "File,Caption,speed\n"
        "a.mp4,grey gets lighter,slow\n"
        'a.mp4,"grey, lighter and lighter",\n'
        "more/b.mp4,a wide one,\n"
        "c.png,a translucent square,\n"
        "short.mp4,too short,\n"
        "broken.mp4,broken,\n"
        "empty.mp4,nothing,\n"
        "absent.mp4,not there,\n"
        "silent.mp4,  ,\n"
    )
    _write_video(folder / "unlisted.mp4", _grey_ramp(5))
    return folder
