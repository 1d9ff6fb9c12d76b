import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media, provenance
from magic141_jax.pipelines.options import SamplingOptions

LOADING = {"weights": "tiny", "dtype": "float32"}


@pytest.fixture
def described(pipeline):
    """(a picture's file) -> the metadata of a video that begins with it."""

    def describe(image=None):
        told = {"frames": 9, "loading": LOADING, "image": image}
        return json.loads(json.dumps(provenance.describe(pipeline, "a cat", {"seed": 0}, **told)))

    return describe


def test_every_option_has_its_value(described):
    # What else there is stands by itself, or can't be asked of sample.py.
    apart = {"negative_prompt", "seed", "latents", "output_type", "callback"}
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == {*provenance.OPTIONS, *apart}
    about = described()
    assert set(about["options"]) == set(provenance.OPTIONS) and None not in about["options"].values()
    assert about["options"]["shift"] == 3.0 and about["format"] == provenance.FORMAT
    assert provenance.picture(about) is None


def test_a_picture_comes_along(described, tmp_path):
    rng = np.random.default_rng(0)
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(small)
    Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(large)
    whole, cut = media.read_image(small), media.fit_image(media.read_image(large), 32, 32)
    for file, want in ((small, whole), (large, cut)):
        about = described(file)
        file.unlink()
        np.testing.assert_array_equal(provenance.picture(about), want)


def test_a_large_picture_that_is_looked_at_whole_is_found_by_its_hash(described, tmp_path, monkeypatch, pipeline):
    monkeypatch.setattr(pipeline.components.text_encoder, "image_tokens", 4, raising=False)
    file = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(file)
    about = described(file)
    assert about["picture"] is None
    np.testing.assert_array_equal(provenance.picture(about), media.read_image(file))
    elsewhere = file.rename(tmp_path / "moved.png")
    np.testing.assert_array_equal(provenance.picture(about, elsewhere), media.read_image(elsewhere))
    with pytest.raises(UserError, match="not embedded"):
        provenance.picture(about)
    Image.new("RGB", (400, 300)).save(file)
    with pytest.raises(UserError, match=r"large.png is not what made it"):
        provenance.picture(about)


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp", ".png"])
def test_a_large_picture_fits_into_every_format(tmp_path, ending):
    about = dict.fromkeys(provenance.NEEDED, 1) | {"format": 2, "picture": "ab+/" * (provenance.MAX_PICTURE // 3)}
    path = tmp_path / f"out{ending}"
    with media.BackgroundWriter(path, 8, about) as writer:
        writer.write(np.zeros((3, 32, 32, 3), np.float32))
    assert provenance.read(path) == about


def test_metadata_of_the_first_format_are_read(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(dict.fromkeys(provenance.NEEDED, 1)))
    assert "format" not in provenance.read(path)


def test_compare_counts_frames(tmp_path):
    ramp = np.linspace(0, 0.5, 5, dtype=np.float32)[:, None, None, None] + np.zeros((1, 16, 16, 3), np.float32)
    ramp[..., 0] += np.linspace(0, 0.2, 16, dtype=np.float32)

    def write(name, frames):
        with media.BackgroundWriter(tmp_path / name, 8, {}) as writer:
            writer.write(frames)
        return tmp_path / name

    changed = ramp.copy()
    changed[3, 4, 4, 1] += 20 / 255
    one = write("one.png", ramp[:1])
    assert provenance.compare(one, one) == (1, None)
    assert provenance.compare(one, write("other.png", ramp[1:2]))[1].first == 0
    assert provenance.compare(one, write("wide.png", ramp[:1, :8]))[1].largest == 255
    whole = write("whole.mp4", ramp)
    assert provenance.compare(whole, write("same.mp4", ramp)) == (5, None)
    assert provenance.compare(whole, write("short.mp4", ramp[:4]))[1][2] == 255
    count, difference = provenance.compare(whole, write("changed.mp4", changed))
    assert count == 5 and difference.frames >= 1 and 0 < difference.largest < 255


def test_damaged_frames_are_one_line(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match="can't read"):
        list(media.read_frames(tmp_path / "out.mp4"))
