"""Batches from each kind of source, the empty caption, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save

from magic141_jax.data import cache
from magic141_jax.errors import UserError
from magic141_jax.train import streams
from magic141_jax.train.streams import DataConfig, RecordShape

SHAPE = RecordShape(channels=4, text_width=6, pooled_width=5)


def record(number, frames):
    return {
        "latents": np.full((frames, 2, 2, 4), number, np.float16),
        "text": np.zeros((3, 6), np.float16),
        "text_mask": np.ones(3, bool),
        "pooled": np.zeros(5, np.float16),
        "anchor": np.zeros((16, 16, 3), np.uint8),
    }


@pytest.fixture
def videos(tmp_path):
    """A prepared latent set without images."""
    with cache.writing(tmp_path / "videos") as writer:
        writer.metadata = {"kind": "latent", "fps": 8.0}
        for number in range(4):
            writer.add("videos", "16x16x9", record(number, 3))
    return str(tmp_path / "videos")


def test_random_records_have_the_shapes_of_prepared_ones():
    sizes = {"height": 16, "width": 24, "num_frames": 9, "text_length": 3}
    config = DataConfig(path="random", image_batch=2, video_batch=3, threads=0, **sizes)
    batch = next(streams.make_batches(config, seed=0, shape=SHAPE))
    assert batch["image"]["latents"].shape == (2, 1, 2, 3, 4)
    assert batch["video"]["latents"].shape == (3, 3, 2, 3, 4)
    assert {name: x.dtype for name, x in batch["video"].items()} == {n: x.dtype for n, x in record(0, 3).items()}
    assert batch["video"]["text_mask"].any(1).all()
    null = streams.null_text(config, SHAPE)
    assert null["text"].shape == (3, 6) and null["text_mask"].sum() == 1 and null["pooled"].shape == (5,)


def test_image_rows_are_some_of_the_text_states(tmp_path):
    sizes = {"height": 16, "width": 16, "num_frames": 5, "text_length": 7, "image_tokens": 4}
    config = DataConfig(path="random", video_batch=8, threads=0, **sizes)
    assert streams.image_tokens(config) == 4
    mask = next(streams.make_batches(config, seed=0, shape=SHAPE))["video"]["text_mask"]
    assert mask.shape == (8, 7) and mask[:, :5].all() and not mask.all()
    null = streams.null_text(config, SHAPE)
    assert null["text"].shape == (3, 6) and null["text_mask"].sum() == 1
    for name, metadata in {"old": {}, "new": {"image_tokens": 1}}.items():
        with cache.writing(tmp_path / name) as writer:
            writer.metadata = {"kind": "latent", **metadata}
            writer.add("videos", "16x16x9", record(0, 3))
            text = {**record(0, 3), "text": np.arange(18, dtype=np.float16).reshape(3, 6)}
            (writer.folder / cache.NULL_TEXT).write_bytes(save({k: text[k] for k in ("text", "text_mask", "pooled")}))
    old, new = (DataConfig(path=str(tmp_path / name)) for name in ("old", "new"))
    assert streams.image_tokens(old) == 0 and streams.null_text(old, SHAPE)["text"].shape == (3, 6)
    assert streams.image_tokens(new) == 1 and streams.null_text(new, SHAPE)["text_mask"].shape == (2,)
    np.testing.assert_array_equal(streams.null_text(new, SHAPE)["text"], np.arange(6, 18).reshape(2, 6))


def test_images_have_no_place_where_captions_have_read_a_picture(videos, tmp_path):
    with cache.writing(tmp_path / "rows") as writer:
        writer.metadata = {"kind": "latent", "image_tokens": 1}
        writer.add("videos", "16x16x9", record(0, 3))
    rows = str(tmp_path / "rows")
    for wrong in ({"path": rows}, {"path": videos, "image_path": rows}, {"path": rows, "image_path": videos}):
        with pytest.raises(UserError, match=r"set config\.data\.image_batch to 0"):
            streams.image_tokens(DataConfig(image_batch=2, **wrong))
        assert streams.image_tokens(DataConfig(**wrong)) == (wrong["path"] == rows)


def test_images_are_first_frames_where_there_are_none(videos):
    config = DataConfig(path=videos, image_batch=4, video_batch=4, threads=0)
    batch = next(streams.make_batches(config, seed=0))
    assert batch["image"]["latents"].shape == (4, 1, 2, 2, 4) and batch["video"]["latents"].shape == (4, 3, 2, 2, 4)
    assert set(batch["video"]["latents"][:, 0, 0, 0, 0]) == {0, 1, 2, 3}


def test_images_may_have_their_own_set(videos, tmp_path):
    with cache.writing(tmp_path / "images") as writer:
        writer.metadata = {"kind": "latent"}
        writer.add("images", "16x16x1", record(9, 1))
    config = DataConfig(path=videos, image_path=str(tmp_path / "images"), image_batch=1, video_batch=0, threads=0)
    batch = next(streams.make_batches(config, seed=0))
    assert set(batch) == {"image"} and batch["image"]["latents"].max() == 9


def test_emoji_are_composed_and_only_arrays_go_on():
    config = DataConfig(path="emoji", video_batch=2, height=32, width=32, num_frames=5, threads=0)
    host = next(streams.make_batches(config, seed=0))
    assert "caption" in host["video"]
    batch = streams.arrays(host)
    assert set(batch["video"]) == {"frames", "anchor"} and batch["video"]["frames"].shape == (2, 5, 32, 32, 3)
    with pytest.raises(UserError, match="emoji clips are square, not 32x64"):
        streams.make_batches(DataConfig(path="emoji", height=32, width=64), seed=0)


def test_wrong_data_is_refused(videos, tmp_path):
    with pytest.raises(UserError, match=r"set --config\.data\.path"):
        streams.open_cache("")
    with pytest.raises(UserError, match="holds latent records and this method needs raw ones"):
        streams.open_cache(videos, "raw")
    with pytest.raises(UserError, match="not a prepared data set"):
        streams.make_batches(DataConfig(path=str(tmp_path)), seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        DataConfig(image_batch=0, video_batch=0)
    with pytest.raises(ValueError, match="image_tokens are some of the 3"):
        DataConfig(text_length=3, image_tokens=3)


def test_chains_of_windows_are_for_methods_that_take_them(videos, tmp_path):
    sizes = {"height": 16, "width": 16, "num_frames": 9, "text_length": 3}
    config = DataConfig(path="random", image_batch=1, video_batch=2, threads=0, **sizes)
    shape = RecordShape(channels=4, text_width=6, pooled_width=5, windows=3)
    batch = next(streams.make_batches(config, seed=0, shape=shape))
    assert batch["video"]["latents"].shape[1] == 9 and batch["image"]["latents"].shape[1] == 1
    streams.require_windows(config, 3)
    streams.require_windows(DataConfig(path=videos), 1)
    with pytest.raises(UserError, match="clips of 1 window and this method takes 4: prepare it with --windows 4"):
        streams.require_windows(DataConfig(path=videos), 4)
    with cache.writing(tmp_path / "chains") as writer:
        writer.metadata = {"kind": "latent", "windows": 3}
        writer.add("videos", "16x16x25", record(0, 9))
    with pytest.raises(UserError, match="clips of 3 windows and this method takes 1"):
        streams.require_windows(DataConfig(path=str(tmp_path / "chains")), 1)
