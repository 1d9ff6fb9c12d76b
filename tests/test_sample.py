"""The command line: what it writes, and one line for every mistake."""

import errno
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.pipelines import media
from magic141_jax.pipelines.long_video import VideoStream

SCRIPT = Path(__file__).resolve().parents[1] / "sample.py"
PROMPT = "a red shark moves left"


@pytest.fixture(scope="module")
def sample():
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(sample, weights_folder, tmp_path):
    """Runs the command with the tiny weights in an empty folder; returns that folder."""
    folder = tmp_path / "made"
    folder.mkdir()

    def call(*flags, output="out.mp4", prompt=PROMPT):
        head = ["--weights", str(weights_folder), "--output", str(folder / output), "--prompt", prompt]
        assert sample.main([*head, *flags]) == 0
        return folder

    call.folder = folder
    return call


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def read_frames(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_a_longer_video(run, capsys):
    folder = run("--duration", "2.6", "--seed", "5", "--steps", "2", "--upscale", "2")
    assert names(folder) == ["out.json", "out.mp4", "out.png"]
    frames = read_frames(folder / "out.mp4")
    assert frames.shape == (21, 64, 64, 3)
    still = np.asarray(Image.open(folder / "out.png"))
    assert still.shape == (64, 64, 3)
    about = json.loads((folder / "out.json").read_text())
    assert about == media.read_metadata(folder / "out.mp4") == media.read_metadata(folder / "out.png")
    assert (about["prompt"], about["seed"], about["frames"], about["fps"]) == (PROMPT, 5, 21, 8)
    assert len(about["weights_digest"]) == len(about["config_digest"]) == 16
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert all(word in last for word in ("text", "image", "video", "decode", "compile", "real-time factor"))


def test_several_videos_have_their_own_seeds(run):
    folder = run("--num_videos", "2", "--seed", "5", output="out.webp")
    assert names(folder) == [f"out-{i}.{e}" for i in range(2) for e in ("json", "png", "webp")]
    assert [media.read_metadata(folder / f"out-{i}.webp")["seed"] for i in range(2)] == [5, 6]
    assert (folder / "out-0.png").read_bytes() != (folder / "out-1.png").read_bytes()


def test_a_story(run, sample, weights_folder, tmp_path, capsys):
    story, folder = tmp_path / "story.jsonl", run.folder
    lines = [{"time": 0, "prompt": PROMPT}, {"time": 1.125, "prompt": "a blue cat"}, {"time": 9, "prompt": "a cat"}]
    story.write_text("\n".join(map(json.dumps, lines)))
    made = ["--weights", str(weights_folder), "--output", str(folder / "out.mp4"), "--duration", "2"]
    assert sample.main([*made, "--prompt_schedule", str(story)]) == 0
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "line 3 of the schedule is for 9 s" in told
    about = json.loads((folder / "out.json").read_text())
    assert (about["prompt"], about["prompt_schedule"]) == (PROMPT, lines)
    assert len(read_frames(folder / "out.mp4")) == 16


def test_mistakes_of_a_story(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    story = tmp_path / "story.jsonl"
    story.write_text('{"time": 2, "prompt": "a cat"}\n{"time": 1, "prompt": "a dog"}\n')
    for file, message in (("story.jsonl", "line 2 of the schedule"), ("missing.jsonl", "no schedule")):
        with pytest.raises(UserError, match=message):
            sample.main(["--prompt_schedule", file])
    story.write_text('{"time": 2, "prompt": "a cat"}\n')
    with pytest.raises(UserError, match="line 1 of the schedule is for 2 s; it must be for 0"):
        sample.main(["--prompt_schedule", "story.jsonl"])
    assert names(tmp_path) == ["story.jsonl"]


def test_a_picture_is_animated(run, tmp_path):
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((50, 40)).save(photo)
    folder = run("--image", str(photo), "--upscale", "1", output="out.gif")
    still = np.asarray(Image.open(folder / "out.png")) / 255
    np.testing.assert_allclose(still, media.fit_image(media.read_image(photo), 32, 32), atol=0.01)
    assert media.read_metadata(folder / "out.gif")["image"] == "photo.png"


def test_a_mesh_makes_the_same_picture(run):
    still = [
        run("--upscale", "1", *mesh, output="out.png") / "out.png" for mesh in ((), ("--mesh", "fsdp=2,context=2"))
    ]
    pictures = [np.asarray(Image.open(path), int) for path in still]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_short_of_memory_the_picture_is_the_same(run, tmp_path, capsys):
    saving = ["--offload", "--text_cache", str(tmp_path / "cache"), "--vae_tiles", "32"]
    stills = []
    for flags in ([], saving, saving):
        stills.append(Image.open(run("--upscale", "1", *flags, output="out.png") / "out.png").tobytes())
        assert ("move" in capsys.readouterr().out) == bool(flags)
    assert stills[0] == stills[1] == stills[2]
    assert len(names(tmp_path / "cache")) == 2


def test_of_several_processes_the_first_one_writes(run, sample, monkeypatch, capsys):
    monkeypatch.setattr(sample.processes, "leads", lambda: False)
    assert names(run("--duration", "1")) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("leads", [True, False])
def test_no_process_computes_a_video_for_a_png(run, sample, monkeypatch, leads):
    def windows():
        raise AssertionError("a process that does not write computes what the others don't, and waits for ever")
        yield

    still = VideoStream(np.zeros((32, 32, 3), np.float32), windows())
    monkeypatch.setattr(sample.processes, "leads", lambda: leads)
    monkeypatch.setattr(sample.provenance, "stream_video", lambda *_, **__: still)
    assert names(run(output="out.png")) == ["out.json", "out.png"] * leads


def test_png_is_the_image_alone(run):
    assert names(run(output="out.png")) == ["out.json", "out.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--promt", "x"], "'--prompt'"),
        (["extra"], "in quotes"),
        (["--prompt", " "], "prompt is empty"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "two"], "--steps"),
        (["--num_videos", "0"], "--num_videos"),
        (["--duration", "0"], "--duration is 0"),
        (["--duration", "-3"], "--duration is -3"),
        (["--duration", "nan"], "--duration is nan"),
        (["--duration", "inf"], "--duration is inf"),
        (["--duration", "3601"], "at most 3600"),
        (["--duration", "600", "--output", "long.gif"], "write an .mp4"),
        (["--guidance", "-1"], "guidance_scale"),
        (["--seed", "-1"], "seed"),
        (["--match_colors", "2"], "match_colors is 2"),
        (["--carry", "frames"], "--carry"),
        (["--carry", "latents", "--overlap_latents", "1"], "raise overlap_latents"),
        (["--size", "40"], "32x32 and 48x48"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--size", "999999"], "to 4096"),
        (["--upscale", "0"], "--upscale"),
        (["--image", "missing.png"], "no image file"),
        (["--image", "photo.png", "--output", "out.png"], "alone"),
        (["--output", "out.mov"], "unknown extension"),
        (["--output", "missing/out.mp4"], "no folder"),
        (["--weights", "./missing"], "no weights folder"),
        (["--vae_tiles", "100"], "multiple of 32"),
        (["--text_cache", str(SCRIPT)], "can't make the folder"),
        (["--mesh", "fdsp=2"], "'fdsp'.*Did you mean 'fsdp'"),
        (["--mesh", "fsdp=two"], "'two'"),
        (["--mesh", "fsdp=3"], "does not fit 8 devices"),
        (["--fsdp", "2"], "unknown flag --fsdp"),
    ],
)
def test_mistakes(sample, weights_folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        sample.main(["--prompt", PROMPT, "--weights", str(weights_folder), *flags])
    assert names(tmp_path) == []


def test_no_prompt(sample):
    with pytest.raises(UserError, match="--prompt is missing"):
        sample.main([])


def damage_index(folder):
    (folder / "model_index.json").unlink()


def damage_tensors(folder):
    file = folder / "vae" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def damage_config(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"double_blocks": 1', '"double_blocks": 2'))


def damage_key(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"heads"', '"head"'))


def damage_model(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"mmdit"', '"mmditt"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "no file .*model_index.json"),
        (damage_tensors, "truncated or damaged"),
        (damage_config, "does not fit its config: double_blocks.*has shape.*and .* more"),
        (damage_key, "'heads'"),
        (damage_model, "'mmdit'"),
    ],
)
def test_damaged_weights(sample, weights_folder, tmp_path, damage, message):
    folder = tmp_path / "weights"
    shutil.copytree(weights_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        sample.main(["--prompt", PROMPT, "--weights", str(folder), "--output", str(tmp_path / "out.mp4")])
    assert names(tmp_path) == ["weights"]


def test_full_disk(run, monkeypatch):
    def full(self, frame):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media.Mp4Sink, "add", full)
    with pytest.raises(OSError, match="No space"):
        run("--duration", "5")
    assert names(run.folder) == []


def test_one_line_and_exit_code_2(tmp_path):
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "--prompt", "x", "--output", str(tmp_path / "out.avi")],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2
    assert made.stderr.count("\n") == 1
    assert made.stderr.startswith("error: can't write 'out.avi'")
    assert made.stdout == ""
