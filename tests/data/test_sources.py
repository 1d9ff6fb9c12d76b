import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from magic141_jax.data.buckets import make_buckets
from magic141_jax.data.decode import BadClip
from magic141_jax.data.manifest import Entry, write
from magic141_jax.data.sources import FileClips, Joined, TfdsClips
from magic141_jax.errors import UserError

BUCKETS = make_buckets([(16, 16)], [5])


def _png(value):
    stream = io.BytesIO()
    Image.new("RGB", (30, 10), (value,) * 3).save(stream, "PNG")
    stream.seek(0)
    return stream


class TinyClips(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Tensor(shape=(None, 20, 20, 1), dtype=np.uint8),
                "still": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["push_up", "golf"]),
                "note": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, length in enumerate((6, 9, 3)):
            yield (
                i,
                {
                    "video": np.full((length, 20, 20, 1), 50 * i, np.uint8),
                    "still": _png(i),
                    "label": i % 2,
                    "note": f"note {i}" if i else " ",
                },
            )


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyClips(data_dir=folder).download_and_prepare()
    return folder


def test_tfds_videos_with_labels(tfds_dir):
    clips = TfdsClips("tiny_clips", buckets=BUCKETS, frames_key="video", text_key="label", data_dir=tfds_dir)
    by_value = {}
    for i in range(3):
        try:
            sample = clips[i]
            by_value[int(sample["frames"].max())] = sample
        except BadClip as error:
            assert error.reason == "too short" and "train[" in str(error)
    assert set(by_value) == {0, 50}
    assert by_value[50]["caption"] == "golf" and by_value[0]["caption"] == "push up"
    assert by_value[50]["frames"].shape == (5, 16, 16, 3) and by_value[50]["frames"].dtype == np.uint8


def test_tfds_images_with_text(tfds_dir):
    clips = TfdsClips("tiny_clips", buckets=BUCKETS, frames_key="still", text_key="note", data_dir=tfds_dir)
    found = {}
    for i in range(len(clips)):
        try:
            sample = clips[i]
        except BadClip as error:
            assert error.reason == "empty caption"
            continue
        found[sample["caption"]] = sample["frames"]
    assert set(found) == {"note 1", "note 2"}
    assert found["note 2"].shape == (1, 16, 16, 3) and (found["note 2"] == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames_key": "video"}, "several features could be the text: label, note; name one with --text_key"),
        ({"text_key": "label"}, "several features could be the frames"),
        ({"frames_key": "vidio", "text_key": "label"}, "Did you mean 'video'"),
        ({"split": "validation", "frames_key": "video"}, "split 'validation'"),
    ],
)
def test_tfds_mistakes(tfds_dir, options, message):
    with pytest.raises(UserError, match=message):
        TfdsClips("tiny_clips", buckets=BUCKETS, data_dir=tfds_dir, **options)


def test_tfds_unknown_name(tfds_dir):
    with pytest.raises(UserError, match="no data set 'no_such_set'"):
        TfdsClips("no_such_set", buckets=BUCKETS, data_dir=tfds_dir)


def test_a_folder_gives_samples(clip_folder):
    clips = FileClips.open(clip_folder, buckets=make_buckets([(32, 32)], [5]), fps=8)
    sample = clips[0]
    assert sample["frames"].shape == (5, 32, 32, 3)
    assert sample["caption"] == "grey gets lighter" and len(sample["captions"]) == 2
    assert sample["tags"] == {"speed": "slow"}
    assert clips[2]["frames"].shape == (1, 32, 32, 3)
    assert clips.name(1) == "more/b.mp4"
    reasons = {}
    for i in range(3, len(clips)):
        with pytest.raises(BadClip) as caught:
            clips[i]
        reasons[clips.name(i)] = caught.value.reason
    assert reasons == {"short.mp4": "too short", "broken.mp4": "unreadable video", "empty.mp4": "empty file"}


def test_joined_sources_follow_one_another(clip_folder):
    clips = FileClips.open(clip_folder, buckets=make_buckets([(32, 32)], [5]), fps=8)
    joined = Joined([clips, ["x", "y"]])
    assert len(joined) == len(clips) + 2 and joined.left_out == clips.left_out
    assert joined[len(clips) + 1] == "y" and joined.name(len(clips)) == "item 0"
    assert joined.name(1) == clips.name(1) and joined[2]["caption"] == clips[2]["caption"]
    with pytest.raises(IndexError):
        joined[len(joined)]


def test_a_manifest_gives_samples_relative_to_itself(clip_folder):
    write(clip_folder / "m.jsonl", [Entry("a.mp4", ("one",)), Entry("c.png")])
    clips = FileClips.open(clip_folder / "m.jsonl", buckets=make_buckets([(32, 32)], [5]))
    assert clips[0]["caption"] == "one"
    with pytest.raises(BadClip, match="no caption"):
        clips[1]
    with pytest.raises(UserError, match="neither a folder nor a manifest"):
        FileClips.open(clip_folder / "a.mp4", buckets=BUCKETS)
