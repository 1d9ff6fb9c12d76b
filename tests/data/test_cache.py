import json
import os

import numpy as np
import pytest

from magic141_jax.data.cache import Cache, decode_record, encode_record, require_source, writing
from magic141_jax.errors import UserError


def record(i):
    return {"latents": np.full((2, 3, 3, 4), i, np.float16), "mask": np.array([True, False]), "caption": f"Nº {i}"}


def fill(folder, count=5, kind="latent", **options):
    with writing(folder, **options) as writer:
        writer.metadata = {"kind": kind, "fps": 8}
        for i in range(count):
            writer.add("videos", "24x24x5", record(i))
        writer.add("images", "24x24x1", {"latents": np.zeros((1, 3, 3, 4), np.float16)})


def test_a_record_survives_bytes():
    values = {**record(3), "tags": {"a": "b"}, "captions": ["x", "y"], "view": np.arange(12).reshape(3, 4).T}
    back = decode_record(encode_record(values))
    assert back.keys() == values.keys()
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            assert back[key].dtype == value.dtype
            np.testing.assert_array_equal(back[key], value)
        else:
            assert back[key] == value
    assert set(decode_record(encode_record(values), strings=False)) == {"latents", "mask", "view"}


def test_shards_are_read_at_random(tmp_path):
    fill(tmp_path / "data", shard_bytes=500)
    cache = Cache(tmp_path / "data")
    assert len(list((tmp_path / "data" / "videos").iterdir())) > 1
    assert set(cache.groups) == {"videos", "images"} and cache.buckets("videos") == ("24x24x5",)
    source = cache.source("videos", strings=True)
    assert len(source) == 5
    for i in (4, 0, 2):
        assert source[i]["caption"] == f"Nº {i}" and (source[i]["latents"] == i).all()
    assert "caption" not in cache.source("videos")[0]
    with pytest.raises(UserError, match="has no 8x8x5 videos; it has 5 videos of 24x24x5"):
        cache.source("videos", "8x8x5")


def test_a_failure_leaves_nothing_and_keeps_what_stood_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "data") as writer:
        writer.metadata = {"kind": "raw"}
        writer.add("videos", "24x24x5", record(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "data", count=2)
    with pytest.raises(OSError, match="full"), writing(tmp_path / "data", overwrite=True) as writer:
        raise OSError(28, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(Cache(tmp_path / "data").source("videos")) == 2


def test_overwriting_is_asked_for_and_spares_other_folders(tmp_path):
    fill(tmp_path / "data", count=2)
    with pytest.raises(UserError, match="--overwrite"):
        fill(tmp_path / "data")
    fill(tmp_path / "data", count=3, overwrite=True)
    assert len(Cache(tmp_path / "data").source("videos")) == 3
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("precious")
    with pytest.raises(UserError, match="not a prepared data set"):
        fill(tmp_path / "photos", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a prepared data set"):
        fill(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match="can't write"):
        fill(tmp_path / "file" / "below")


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a prepared data set"):
        Cache(tmp_path)
    fill(tmp_path / "data")
    shard = next((tmp_path / "data" / "videos").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="videos"):
        Cache(tmp_path / "data").source("videos")
    shard.unlink()
    with pytest.raises(UserError, match="videos"):
        Cache(tmp_path / "data").source("videos")
    with pytest.raises(UserError, match="--weights"):
        Cache(tmp_path / "data").null_text()
    (tmp_path / "data" / "metadata.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="another format"):
        Cache(tmp_path / "data")


def test_a_prepared_folder_knows_its_source(tmp_path, caplog):
    clips, others, target = tmp_path / "clips", tmp_path / "others", tmp_path / "prepared"
    clips.mkdir()
    (clips / "captions.csv").write_text("file,caption\n")
    with writing(target) as writer:
        writer.metadata = {"source": str(clips)}
    require_source(target, clips)
    assert not caplog.records
    with pytest.raises(UserError, match=r"was prepared from .*clips, not from .*others; take another"):
        require_source(target, others)
    later = (target / "metadata.json").stat().st_mtime + 5
    os.utime(clips / "captions.csv", (later, later))
    require_source(target, clips)
    assert "has changed since" in caplog.text
