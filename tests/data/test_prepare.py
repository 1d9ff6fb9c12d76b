import json
import os
import subprocess
import sys

import numpy as np
import pytest

from magic141_jax.data.buckets import make_buckets
from magic141_jax.data.cache import Cache
from magic141_jax.data.loader import Stream, batches
from magic141_jax.data.prepare import Encoders, in_windows, prepare
from magic141_jax.data.sources import FileClips
from magic141_jax.errors import UserError

BUCKETS = make_buckets([(32, 32)], [5])
REASONS = {
    "unreadable video": "broken.mp4",
    "empty file": "empty.mp4",
    "too short": "short.mp4",
    "no such file": "absent.mp4",
    "empty caption": "silent.mp4",
    "no caption": "unlisted.mp4",
}


def fake_encoders(sizes, image_tokens=0):
    """Latents: the mean colour of 4 x 4 patches of every fourth frame. Text: a vector of the caption's length.

    Image rows: the picture's mean; the caption's rows have read it, so it is added to them.
    """

    def frames(clips):
        sizes.append(len(clips))
        b, _, y, x, c = clips.shape
        return clips[:, ::4].reshape(b, -1, y // 8, 8, x // 8, 8, c).mean(axis=(3, 5)) / 255

    def text(captions, pictures):
        sizes.append(len(captions))
        lengths = np.array([len(caption) for caption in captions], np.float32)
        mask = np.arange(6) < np.minimum(lengths, 6)[:, None]
        states = np.repeat(lengths[:, None, None], 6, 1).repeat(4, 2)
        if image_tokens:
            means = np.array([picture.mean() for picture in pictures], np.float32)[:, None, None]
            states = np.concatenate([np.broadcast_to(means, (2, image_tokens, 4)), states + means], 1)
            mask = np.concatenate([np.ones((2, image_tokens), bool), mask], 1)
        else:
            assert pictures is None
        return states, mask, lengths[:, None].repeat(4, 1)

    return Encoders(frames, text, batch_size=2, image_tokens=image_tokens)


def test_raw_clips_and_the_account_of_what_was_left_out(clip_folder, tmp_path):
    report = prepare(FileClips.open(clip_folder, buckets=BUCKETS, fps=8), tmp_path / "out", metadata={"fps": 8})
    assert dict(report.kept) == {("videos", "32x32x5"): 2, ("images", "32x32x1"): 1}
    assert {item.reason: item.name for item in report.left_out} == REASONS
    table = report.table()
    assert "kept" in table.splitlines()[0] and all(f"left out: {reason}" in table for reason in REASONS)
    lines = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == set(REASONS.values())
    sample = Cache(tmp_path / "out").source("videos")[0]
    assert sample["caption"] == "grey gets lighter" and sample["frames"].shape == (5, 32, 32, 3)
    assert len(sample["captions"]) == 2 and sample["tags"] == {"speed": "slow"}


def test_latents_are_encoded_in_full_batches_and_feed_the_loader(clip_folder, tmp_path):
    sizes = []
    source = FileClips.open(clip_folder, buckets=BUCKETS, fps=8)
    prepare(source, tmp_path / "out", metadata={"fps": 8}, encoders=fake_encoders(sizes))
    assert set(sizes) == {2}
    cache = Cache(tmp_path / "out")
    videos = cache.source("videos", strings=True)
    assert len(videos) == 3, "a record for each caption"
    assert {videos[i]["caption"] for i in range(3)} == {
        "grey gets lighter",
        "grey, lighter and lighter",
        "a wide one",
    }
    for i in range(3):
        record = videos[i]
        assert record["latents"].shape == (2, 4, 4, 3) and record["latents"].dtype == np.float16
        assert (record["text"] == len(record["caption"])).all() and record["text"].dtype == np.float16
        assert record["text_mask"].dtype == bool and record["anchor"].shape == (32, 32, 3)
        np.testing.assert_allclose(record["latents"][0].mean(), record["anchor"].mean() / 255, atol=1e-3)
    assert cache.metadata["image_tokens"] == cache.image_tokens == 0
    assert not cache.null_text()["text_mask"].any() and (cache.null_text()["pooled"] == 0).all()
    streams = {"image": Stream(cache.sources("images"), 2), "video": Stream(cache.sources("videos"), 4)}
    batch = next(batches(streams, seed=0))
    assert set(batch["video"]) == {"latents", "text", "text_mask", "pooled", "anchor"}
    assert batch["video"]["latents"].shape == (4, 2, 4, 4, 3) and batch["image"]["latents"].shape == (2, 1, 4, 4, 3)


def test_a_picture_reading_encoder_sees_each_clips_own_first_frame(tmp_path):
    def sample(grey, frames=5, **rest):
        return {
            "frames": np.full((frames, 32, 32, 3), grey, np.uint8) // (1 + np.arange(frames))[:, None, None, None]
        } | rest

    anchor = np.full((32, 32, 3), 255, np.uint8)
    clips = [
        sample(51, caption="same"),
        sample(102, caption="same", captions=["same", "other one"]),
        sample(204, caption="same", anchor=anchor),
        sample(204, frames=1, caption="same"),
    ]
    report = prepare(clips, tmp_path / "out", metadata={}, encoders=fake_encoders([], image_tokens=2))
    assert [(item.name, item.reason) for item in report.left_out] == [("item 3", "a single image")]
    made = Cache(tmp_path / "out")
    assert made.image_tokens == made.metadata["image_tokens"] == 2 and made.groups == ("videos",)
    records = [made.source("videos", strings=True)[i] for i in range(4)]
    assert [record["caption"] for record in records] == ["same", "same", "other one", "same"]
    for record, value in zip(records, (0.2, 0.4, 0.4, 1.0), strict=True):
        assert record["text"].shape == (8, 4) and record["text_mask"][:2].all()
        np.testing.assert_allclose(record["text"][:2], value, atol=1e-3)
        np.testing.assert_allclose(record["text"][2:], len(record["caption"]) + value, atol=1e-2)
        np.testing.assert_allclose(record["anchor"] / 255, value)
    null = made.null_text()
    assert null["text"].shape == (8, 4) and (null["text"] == 0).all() and null["text_mask"].sum() == 2
    with pytest.raises(UserError, match="no clip could be kept: 1 a single image; first: item 0 these weights animate"):
        prepare(clips[3:], tmp_path / "images", metadata={}, encoders=fake_encoders([], image_tokens=2))


def test_latents_that_overflow_are_left_out(clip_folder, tmp_path):
    good = fake_encoders([])
    bad = good._replace(frames=lambda clips: np.where(clips[:, ::4, ::8, ::8].mean() > 0, 1e9, 0) + good.frames(clips))
    with pytest.raises(UserError, match="3 not finite once encoded"):
        prepare(FileClips.open(clip_folder, buckets=BUCKETS, fps=8), tmp_path / "out", metadata={}, encoders=bad)


def test_a_limit_draws_by_seed_and_counts_the_rest(clip_folder, tmp_path):
    source = FileClips.open(clip_folder, buckets=BUCKETS, fps=8)
    source.entries = source.entries[:3]
    kept = []
    for i, seed in enumerate((0, 0, 1, 2, 3)):
        report = prepare(source, tmp_path / str(i), metadata={}, limit=1, seed=seed)
        assert report.kept.total() == 1
        assert any(item.reason == "not drawn" and item.name == "2 items" for item in report.left_out)
        cache = Cache(tmp_path / str(i))
        kept.append(cache.source(cache.groups[0])[0]["caption"])
    assert kept[0] == kept[1] and len(set(kept)) > 1


def test_nothing_kept_is_a_mistake_and_writes_nothing(clip_folder, tmp_path):
    source = FileClips.open(clip_folder, buckets=make_buckets([(32, 32)], [129]), fps=8)
    source.entries = [entry for entry in source.entries if entry.kind == "video"]
    with pytest.raises(UserError, match="no clip could be kept: 3 too short"):
        prepare(source, tmp_path / "out", metadata={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips"]


def command(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-m", "magic141_jax.data", *map(str, arguments)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


def test_the_command(clip_folder, tmp_path):
    run = command("prepare", clip_folder, tmp_path / "out", "--size", 32, "--num_frames", 5)
    assert run.returncode == 0, run.stderr
    assert all(f"left out: {reason}" in run.stdout and name in run.stdout for reason, name in REASONS.items())
    assert "clip" in run.stderr
    assert Cache(tmp_path / "out").metadata["fps"] == 8


def test_windows_are_encoded_each_by_itself_and_share_a_frame():
    """Four windows of 5 frames are 17; each latent is the mean of its own window's frame 0 or 4."""
    encoders = fake_encoders([])
    clips = np.random.default_rng(0).integers(0, 256, (2, 17, 16, 16, 3)).astype(np.uint8)
    made = in_windows(encoders, 5).frames(clips)
    apart = [encoders.frames(clips[:, start : start + 5]) for start in (0, 4, 8, 12)]
    np.testing.assert_array_equal(made, np.concatenate(apart, axis=1))
    assert made.shape == (2, 8, 2, 2, 3)
    np.testing.assert_array_equal(made[:, 1], made[:, 2], err_msg="the last frame of one is the first of the next")
    pictures = clips[:, :1]
    np.testing.assert_array_equal(in_windows(encoders, 5).frames(pictures), encoders.frames(pictures))
