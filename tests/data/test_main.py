import json

import numpy as np
import pytest
from PIL import Image

from magic141_jax.data.cache import Cache
from magic141_jax.pipelines.components import load_components
from magic141_jax.pipelines.engine import Engine
from magic141_jax.pipelines.options import resolve
from tests import published_pipelines
from tests.published_text import PROMPTS


@pytest.fixture
def call(command_line):
    """Runs the command line in this process; returns its exit code and stderr."""

    def run(*arguments):
        code, _, stderr = command_line("magic141_jax.data.__main__", *arguments)
        return code, stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("prepair", "SRC", "DST"), "invalid choice"),
        (("prepare", "SRC"), "DST"),
        (("prepare", "SRC", "DST", "--sise", "3"), "--sise"),
        (("prepare", "SRC", "DST", "--size", "60"), "nearest legal size is 64x64"),
        (("prepare", "SRC", "DST", "--size", "huge"), "HEIGHTxWIDTH"),
        (("prepare", "SRC", "DST", "--num_frames", "16"), "13 and 17"),
        (("prepare", "SRC", "DST", "--fps", "-1"), "--fps is -1.0"),
        (("prepare", "SRC", "DST", "--fps", "nan"), "--fps is nan"),
        (("prepare", "SRC", "DST", "--limit", "0"), "--limit is 0"),
        (("prepare", "nowhere", "DST"), "no folder or manifest nowhere"),
        (("prepare", "SRC", "SRC"), "not a prepared data set"),
        (("prepare", "emoji", "DST", "--size", "64x32"), "square"),
        (("prepare", "emoji:trian", "DST"), "Did you mean 'train'"),
        (("prepare", "emoji", "DST", "--windows", "2"), "--windows takes --weights"),
        (("prepare", "SRC", "DST", "--windows", "0"), "--windows is 0"),
        (("prepare", "emoji", "DST", "--fps", "24"), "8 frames a second"),
        (("prepare", "emoji", "DST", "--pack", "nowhere.zip"), "no emoji pack"),
        (("prepare", "SRC", "DST"), "no clip could be kept: the source is empty"),
        (("prepare", "tfds:no_such_set_here", "DST"), "no data set 'no_such_set_here'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(call, tmp_path, arguments, message):
    (tmp_path / "SRC").mkdir()
    (tmp_path / "SRC" / "captions.csv").write_text("file,caption\n")
    places = {"SRC": tmp_path / "SRC", "DST": tmp_path / "DST"}
    code, stderr = call(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["SRC"]


def test_emoji_are_composed(call, tmp_path):
    code, stderr = call("prepare", "emoji", tmp_path / "out", "--limit", "3", "--num_frames", "5")
    assert code == 0, stderr
    cache = Cache(tmp_path / "out")
    assert len(cache.source("images")) == len(cache.source("videos")) == 3
    assert cache.source("videos")[0]["frames"].shape == (5, 64, 64, 3)
    assert "anchor" in cache.source("images")[0]


def test_weights_give_latents_of_the_sizes_they_were_made_for(call, clip_folder, tmp_path, weights_folder):
    made_by = ("--weights", weights_folder, "--text_length", "7")
    code, stderr = call("prepare", clip_folder, tmp_path / "out", *made_by, "--num_frames", "5")
    assert code == 0, stderr
    cache = Cache(tmp_path / "out")
    record, null = cache.source("videos")[0], cache.null_text()
    sampling = json.loads((weights_folder / "model_index.json").read_text())["sampling"]
    assert record["latents"].shape[:3] == (2, sampling["height"] // 8, sampling["width"] // 8)
    assert np.abs(record["latents"]).max() > 0
    assert {k: (v.shape, v.dtype) for k, v in null.items()} == {k: (record[k].shape, record[k].dtype) for k in null}
    assert record["text"].shape[0] == 7
    assert record["text_mask"].sum() > null["text_mask"].sum()


def test_chains_of_windows(call, tmp_path, weights_folder):
    arguments = ("--weights", weights_folder, "--limit", "1", "--windows", "3")
    code, stderr = call("prepare", "emoji", tmp_path / "out", *arguments)
    assert code == 0, stderr
    cache = Cache(tmp_path / "out")
    assert cache.metadata["windows"] == 3 and cache.buckets("videos") == ("32x32x25",)
    assert len(cache.source("videos")[0]["latents"]) == 3 * 3
    assert len(cache.source("images")[0]["latents"]) == 1, "pictures of the same source are not cut"


@pytest.mark.heavy
def test_published_weights_read_each_clips_first_frame(call, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    published_pipelines.write(tmp_path / "weights", "concat")
    (tmp_path / "clips").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pictures = [Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)) for _ in range(5)]
        pictures[0].save(tmp_path / "clips" / f"{name}.webp", save_all=True, append_images=pictures[1:], lossless=True)
        pictures[0].save(tmp_path / "clips" / f"{name}.png")
    files = "".join(f"{name},{PROMPTS[0]}\n" for name in ("a.webp", "b.webp", "a.png"))
    (tmp_path / "clips" / "captions.csv").write_text("file,caption\n" + files)
    made_by = ("--weights", tmp_path / "weights", "--size", "32x48", "--num_frames", "5", "--fps", "0")
    code, stderr = call("prepare", tmp_path / "clips", tmp_path / "out", *made_by, "--text_length", "7")
    assert code == 2 and "--text_length" in stderr
    code, stderr = call("prepare", tmp_path / "clips", tmp_path / "out", *made_by)
    assert code == 0, stderr
    cache = Cache(tmp_path / "out")
    assert cache.image_tokens == 288 and cache.groups == ("videos",)
    first, second = (cache.source("videos")[i] for i in range(2))
    assert first["latents"].shape == (2, 4, 6, 16) and first["text"].shape == (540, 32)
    components = load_components(tmp_path / "weights")
    options = resolve({"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 3.0}, components)
    pictures = [record["anchor"].astype(np.float32) / 255 for record in (first, second)]
    assert not np.array_equal(*pictures)
    want = Engine(components).encode_text([PROMPTS[0]] * 2, options, images=pictures)
    for name, have in (("text", "states"), ("text_mask", "mask"), ("pooled", "pooled")):
        states = [*getattr(want.positive, have), getattr(want.negative, have)[0]]
        for record, expected in zip((first, second, cache.null_text()), states, strict=True):
            np.testing.assert_allclose(record[name].astype(np.float32), expected, rtol=1e-3, atol=1e-3)
    apart = np.abs(first["text"].astype(np.float32) - second["text"])[first["text_mask"]].max(-1)
    assert (apart > 0.01).mean() > 0.99, "picture rows and prompt rows alike have read the clip's own picture"


def test_a_good_run_ends_with_0(call, clip_folder, tmp_path):
    code, _ = call("prepare", clip_folder, tmp_path / "out", "--size", "32", "32x48", "--num_frames", "5", "--fps", "8")
    assert code == 0 and (tmp_path / "out" / "metadata.json").is_file()
    code, stderr = call("prepare", clip_folder, tmp_path / "out", "--size", "32", "--num_frames", "5")
    assert code == 2 and "--overwrite" in stderr
