"""Files of sample.py made again: equal frames, and one line for what can't be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.reproduce.__main__ import main

PROMPT = "a red shark moves left"
STORY = [{"time": 0, "prompt": PROMPT}, {"time": 1.125, "prompt": "a blue cat"}]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def video(weights_folder, tmp_path_factory):
    """A story of two windows that begins with a photo, which is gone since."""
    folder = tmp_path_factory.mktemp("made")
    photo, story = folder / "photo.png", folder / "story.jsonl"
    noise = np.random.default_rng(0).integers(0, 256, (200, 150, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    story.write_text("\n".join(map(json.dumps, STORY)))
    flags = ["--weights", str(weights_folder), "--image", str(photo), "--prompt_schedule", str(story), "--blend"]
    assert sample.main([*flags, "--duration", "2", "--seed", "3", "--output", str(folder / "out.mp4")]) == 0
    photo.unlink()
    story.unlink()
    return folder / "out.mp4"


@pytest.fixture
def copied(video, tmp_path):
    """(changes to the metadata, a suffix) -> the video's frames in a file of their own with these metadata."""

    def copy(suffix=".mp4", **changes):
        about = media.read_metadata(video) | changes
        path = tmp_path / f"copy{suffix}"
        frames = np.stack(list(media.read_frames(video)))
        with media.BackgroundWriter(path, about["fps"], {k: v for k, v in about.items() if v != "left out"}) as writer:
            writer.write(frames.astype(np.float32) / 255)
        return path

    return copy


def test_a_video_is_checked_and_made_again(video, tmp_path, capsys):
    before = names(video.parent)
    assert main([str(video), "--check"]) == 0
    assert capsys.readouterr().out == f"equal: all 16 frames of {video}\n"
    assert names(video.parent) == before
    assert main([str(video), "--output", str(tmp_path / "again.mp4")]) == 0
    assert names(tmp_path) == ["again.json", "again.mp4", "again.png"]
    assert (tmp_path / "again.mp4").read_bytes() == video.read_bytes()
    assert (tmp_path / "again.png").read_bytes() == video.with_suffix(".png").read_bytes()


def test_another_seed_differs(copied, capsys):
    assert main([str(copied(seed=4)), "--check"]) == 1
    told = capsys.readouterr().out
    # The first frame is the photo, so it differs by its encoding at most.
    assert told.startswith("different: ") and "of 16 frames" in told and "of 255" in told


def test_a_picture_alone(weights_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--weights", str(weights_folder), "--prompt", PROMPT, "--output", "out.png"]) == 0
    assert main(["out.png", "--check"]) == 0
    assert main(["out.json", "--output", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    changed = np.array(Image.open("out.png"))
    changed[0, 0] ^= 8
    media.write_image(Path("out.png"), changed / np.float32(255), media.read_metadata(Path("out.png")))
    assert main(["out.png", "--check"]) == 1


def test_other_weights_are_refused_unless_asked_for(video, copied, weights_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(weights_folder, other)
    shutil.copy(other / "vae" / "model.safetensors", other / "more.safetensors")
    asked = [str(video), "--check", "--weights", str(other)]
    with pytest.raises(UserError, match=r"is not what made it.*--weights, or go on with --other_weights"):
        main(asked)
    assert main([*asked, "--other_weights"]) == 0
    (other / "more.safetensors").unlink()
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index, indent=1))
    with pytest.raises(UserError, match=r"the configuration of .* is not what made it"):
        main(asked)
    assert main([str(copied(jax="0.0.1", device="abacus")), "--check"]) == 1  # encoded twice
    assert "warning: made with device abacus, here cpu; jax 0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"format": 3, "version": "9.9"}, [], r"newer version, 9.9 \(format 3"),
        ({"format": "new"}, [], "not ours"),
        ({"weights_digest": "left out"}, [], "lack weights_digest"),
        ({"picture": None}, [], "photo.png .* is not embedded .* say where it is with --image"),
        ({"picture": "####"}, [], "embedded picture is damaged"),
        ({"image": None}, ["--image", "photo.png"], "leave it out"),
        ({}, ["--image", "other.png"], "other.png is not what made it"),
        ({"loading": {"weights": "gone"}}, [], "no weights folder gone; say with --weights"),
        ({"loading": {}}, [], "weights called 'tiny'; say where they are"),
        ({}, ["--output", "copy.gif"], "would replace what is made again"),
        ({}, ["--check", "--output", "other.gif"], "end --output in .mp4"),
        ({}, ["--output", "nowhere/other.mp4"], "no folder nowhere"),
        ({}, ["--sheck"], "--sheck"),
    ],
)
def test_mistakes(copied, tmp_path, monkeypatch, changes, flags, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("other.png")
    file = copied(**changes)
    before = names(tmp_path)
    with pytest.raises(UserError, match=message):
        main([file.name, *flags])
    assert names(tmp_path) == before


def test_files_that_say_nothing(video, tmp_path, command_line):
    bare = tmp_path / "bare.webp"
    Image.new("RGB", (32, 32)).save(bare)
    for file, message in (
        (bare, "no bare.json beside it: what made it is not known"),
        (tmp_path / "missing.mp4", "no file"),
        (tmp_path / "clip.mov", "is none of .mp4"),
        (video.with_suffix(".json"), "has no frames"),
    ):
        if file.suffix == ".mov":
            file.write_bytes(b"")
        code, _, stderr = command_line("magic141_jax.reproduce.__main__", file, "--check")
        assert code == 2 and message in stderr and stderr.count("\n") == 1
    shutil.copy(video.with_suffix(".json"), tmp_path / "bare.json")
    about = json.loads((tmp_path / "bare.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps(about | {"format": 3}))
    code, _, stderr = command_line("magic141_jax.reproduce.__main__", bare)
    assert code == 2 and "newer version" in stderr
