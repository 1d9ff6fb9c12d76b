"""The folder that VBench's tool reads, with tiny random weights: names, seeds, and going on after a cut."""

import json

import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.evaluation import vbench
from magic141_jax.evaluation.__main__ import main
from magic141_jax.pipelines import media

PROMPTS = ("a red shark moves left", "a blue cat, camera pans left")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "1-1"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{prompt}.jpg")
    return folder


def suite(path, *changes):
    """A list in the suite's form; the first prompt comes twice, as it does there for several dimensions."""
    entries = [
        {"prompt_en": PROMPTS[0], "image_name": f"{PROMPTS[0]}.jpg", "dimension": ["i2v_subject"]},
        {"prompt_en": PROMPTS[1], "image_name": f"{PROMPTS[1]}.jpg", "dimension": ["camera_motion"]},
        {"prompt_en": PROMPTS[0], "image_name": f"{PROMPTS[0]}.jpg", "dimension": ["imaging_quality"]},
        *changes,
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.heavy
def test_videos_and_their_seeds_and_going_on(images, weights_folder, tmp_path, capsys):
    out, flags = (
        tmp_path / "out",
        ["vbench", "--weights", str(weights_folder), "--images", str(images), "--samples", "2"],
    )
    flags += ["--steps", "1", "--prompts", str(suite(tmp_path / "info.json")), str(out)]
    assert main([*flags, "--dimensions", "i2v_subject"]) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == [f"{PROMPTS[0]}-0.mp4", f"{PROMPTS[0]}-1.mp4"]
    assert f"--videos_path {out} --dimension i2v_subject --ratio 1-1" in capsys.readouterr().out
    lost = f"{PROMPTS[0]}-1.mp4"
    (out / lost).unlink()
    assert main(flags) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2))
    made = json.loads((tmp_path / "out.json").read_text())
    seeds = [sample["seed"] for sample in made["samples"].values()]
    assert sorted(made["samples"]) == names and len(set(seeds)) == 4
    assert (out / f"{PROMPTS[0]}-0.mp4").read_bytes() == first[f"{PROMPTS[0]}-0.mp4"]
    again = media.read_metadata(out / lost)
    assert again["seed"] == vbench.sample_seed(0, PROMPTS[0], 1) and again["prompt"] == PROMPTS[0]
    assert again["num_inference_steps"] == 1 and again["image"] == f"{PROMPTS[0]}.jpg"
    assert (out / lost).read_bytes() == first[lost], "the same video again"
    with pytest.raises(UserError, match="holds samples of num_inference_steps 1, not 2"):
        main([flag if flag != "1" else "2" for flag in flags])


def test_names_of_pictures_are_prompts(images):
    assert [task.prompt for task in vbench.read_tasks(images, None)] == sorted(PROMPTS)


def test_ratios():
    assert [vbench.nearest_ratio(*size) for size in ((64, 64), (720, 1280), (512, 832))] == ["1-1", "16-9", "8-5"]


def test_what_is_wrong_is_one_line(images, tmp_path):
    info = tmp_path / "info.json"
    cases = [
        (lambda: vbench.read_tasks(tmp_path / "none", None), "no folder"),
        (lambda: vbench.read_tasks(tmp_path, None), "no pictures"),
        (lambda: vbench.read_tasks(images, None, ["i2v_subject"]), "--prompts file"),
        (lambda: vbench.read_tasks(images, suite(info), ["i2v_subjekt"]), "Did you mean 'i2v_subject'"),
        (
            lambda: vbench.read_tasks(images, suite(info, {"prompt_en": "x"})),
            "entry 3 .* lacks prompt_en or image_name",
        ),
        (
            lambda: vbench.read_tasks(images, suite(info, {"prompt_en": "x", "image_name": "y.jpg"})),
            "1 pictures are miss",
        ),
        (
            lambda: vbench.read_tasks(images, suite(info, {"prompt_en": PROMPTS[0], "image_name": "y.jpg"})),
            "two pictures",
        ),
        (
            lambda: vbench.read_tasks(images, suite(info, {"prompt_en": "a/b", "image_name": "y.jpg"})),
            "can't be a file",
        ),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    info.write_text("{}")
    with pytest.raises(UserError, match="holds no list"):
        vbench.read_tasks(images, info)


def test_other_files_are_left_alone(images, pipeline, tmp_path):
    tasks, out = vbench.read_tasks(images, None), tmp_path / "out"
    out.mkdir()
    (out / "mine.mp4").write_text("x")
    about = vbench.describe(pipeline, tasks, {}, samples=1, seed=0)
    with pytest.raises(UserError, match=r"holds mine\.mp4, which is none of these samples"):
        next(vbench.write(pipeline, tasks, out, about, options={}))
    assert [path.name for path in out.iterdir()] == ["mine.mp4"] and not (tmp_path / "out.json").exists()
