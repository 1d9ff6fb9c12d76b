"""Building the pack from a folder in the layout of the npm packages."""

import numpy as np
import pytest
from PIL import Image

from magic141_jax.data import emoji_pack
from magic141_jax.data.emoji import EmojiPack
from magic141_jax.errors import UserError


def write_animation(path, frames):
    """A square that walks through a transparent picture."""
    pictures = []
    for i in range(frames):
        rgba = np.zeros((64, 64, 4), np.uint8)
        rgba[20:40, 10 + i // 4 : 30 + i // 4] = (200, 4 * i, 40, 255)  # no two frames alike, or they would be merged
        pictures.append(Image.fromarray(rgba))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=42)


def test_a_pack_is_built_cropped_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_pack, "SUBJECTS", {"1f988": ("shark",), "1f98a": ("fox", "vixen")})
    for code in ("1f988", "1f98a"):
        write_animation(tmp_path / "npm" / "assets" / f"{code}.webp", 48)
    report = emoji_pack.build(tmp_path / "npm", tmp_path / "out" / "emoji.zip")
    assert report["subjects"] == 2
    pack = EmojiPack(tmp_path / "out" / "emoji.zip")
    assert [s.names for s in pack.subjects] == [("shark",), ("fox", "vixen")]
    assert [s.held_out for s in pack.subjects] == [False, True]
    frames = pack.frames(0)
    assert frames.shape == (24, 96, 96, 4)
    columns = np.flatnonzero((frames[..., 3] > 128).any(axis=(0, 1)))
    assert columns[0] <= 2
    assert columns[-1] >= 93  # the crop is the square around all frames


def test_missing_and_still_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_pack, "SUBJECTS", {"1f988": ("shark",)})
    (tmp_path / "npm").mkdir()
    with pytest.raises(UserError, match="1f988"):
        emoji_pack.build(tmp_path / "npm", tmp_path / "emoji.zip")
    write_animation(tmp_path / "npm" / "1f988.webp", 1)
    with pytest.raises(UserError, match="1 frames"):
        emoji_pack.build(tmp_path / "npm", tmp_path / "emoji.zip")
    assert not (tmp_path / "emoji.zip").exists()
