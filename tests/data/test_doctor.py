"""Every way in which a data set breaks, done to one that was prepared for real, is found and named."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.data import __main__ as command
from magic141_jax.data import cache, doctor
from magic141_jax.data.emoji import EmojiClips, EmojiConfig
from magic141_jax.data.prepare import prepare
from magic141_jax.errors import UserError


@pytest.fixture(scope="module")
def healthy(weights_folder, tmp_path_factory):
    """Latents of 12 clips and 12 images, by the tiny weights; their VAE's random latents are brought to unit size."""
    folder = tmp_path_factory.mktemp("data")
    made = ["--weights", str(weights_folder), "--limit", "12", "--text_length", "12"]
    command.main(["prepare", "emoji", str(folder / "as_made"), *made])
    size = np.std([cache.Cache(folder / "as_made").source("videos")[i]["latents"] for i in range(12)], dtype=float)
    _rewrite(folder / "as_made", folder / "set", lambda _, r: r | {"latents": _scaled(r["latents"], 1 / size)})
    return folder / "set"


@pytest.fixture
def expected(weights_folder):
    return command._expected(str(weights_folder))


@pytest.fixture
def broken(healthy, tmp_path):
    """A copy of the healthy set, to break."""
    return shutil.copytree(healthy, tmp_path / "broken")


def _scaled(latents, factor):
    return (latents * np.float32(factor)).astype(np.float16)


def _rewrite(source, target, change, count=None):
    """Writes a set with records changed by (number in its bucket, record) -> record."""
    given = cache.Cache(source)
    with cache.writing(target) as writer:
        writer.metadata = {k: v for k, v in given.metadata.items() if k not in ("format", "groups")}
        for group in given.groups:
            for bucket in given.buckets(group):
                records = given.source(group, bucket, strings=True)
                for number in range(len(records))[:count]:
                    writer.add(group, bucket, change(number, records[number]))
        for name in (cache.NULL_TEXT, "left_out.jsonl"):
            if (source / name).exists():
                shutil.copy(source / name, writer.folder / name)


def _found(report):
    return {problem for problem, _ in report.found}


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_well_is_said_to_be(healthy, expected, weights_folder, command_line):
    report = doctor.examine(healthy, expected)
    assert report.healthy and not report.found
    assert dict(report.looked) == {"images 32x32x1": 12, "videos 32x32x9": 12}
    assert doctor.examine(healthy, expected, limit=5).looked.total() == 8  # every third
    assert _found(doctor.examine(healthy)) == {"encoders not told"}
    code, told, _ = command_line("magic141_jax.data.__main__", "doctor", healthy, "--weights", weights_folder)
    assert code == 0 and told.splitlines()[-1] == "0 wrong, 0 to look at"


RECORDS = {  # problem -> the change of a record, made to the first two of each bucket
    "not finite": lambda r: r | {"latents": np.full_like(r["latents"], np.nan)},
    "wrong number of frames": lambda r: r | {"latents": np.concatenate([r["latents"]] * 2)},
    "wrong size": lambda r: r | {"latents": r["latents"][:, :2]},
    "wrong channels": lambda r: r | {"latents": r["latents"][..., :2]},
    "text of another width": lambda r: r | {"text": r["text"][:, :5]},
    "text of another length": lambda r: r | {"text": r["text"][:5], "text_mask": r["text_mask"][:5]},
    "empty text mask": lambda r: r | {"text_mask": np.zeros_like(r["text_mask"])},
    "array missing": lambda r: {k: v for k, v in r.items() if k != "pooled"},
    "empty caption": lambda r: r | {"caption": " "},
    "blank clip": lambda r: r | {"anchor": np.zeros_like(r["anchor"])},
}


@pytest.mark.parametrize("problem", RECORDS)
def test_records(healthy, expected, tmp_path, problem):
    _rewrite(healthy, tmp_path / "broken", lambda i, r: RECORDS[problem](r) if i < 2 else r)
    report = doctor.examine(tmp_path / "broken", expected)
    assert _found(report) == {problem} and not report.healthy
    assert set(report.found.values()) == {2}
    assert all(example.startswith("record 0 of ") for example in report.examples.values())


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("mean far from 0", lambda x: x + np.float16(3)),
        ("deviation far from 1", lambda x: _scaled(x, 8)),
        ("deviation far from 1", lambda x: _scaled(x, 0.05)),
    ],
)
def test_statistics(healthy, expected, tmp_path, problem, change):
    _rewrite(healthy, tmp_path / "broken", lambda i, r: r | {"latents": change(r["latents"])})
    assert problem in _found(doctor.examine(tmp_path / "broken", expected))


def test_captions_and_clips_that_repeat(healthy, expected, tmp_path):
    _rewrite(healthy, tmp_path / "broken", lambda i, r: r | {"caption": "a clip"} if i > 3 else r)
    report = doctor.examine(tmp_path / "broken", expected)
    assert _found(report) == {"one caption for most"} and report.healthy
    first = cache.Cache(healthy).source("videos", strings=True)[0]
    _rewrite(healthy, tmp_path / "twice", lambda i, r: first if len(r["latents"]) > 1 and i == 5 else r)
    report = doctor.examine(tmp_path / "twice", expected)
    assert _found(report) == {"clip twice"} and report.healthy


def _shard(folder):
    return next((folder / "videos").iterdir())


def _truncate(folder):
    _shard(folder).write_bytes(_shard(folder).read_bytes()[:5000])


def _flip(folder):
    data = bytearray(_shard(folder).read_bytes())
    data[1000] ^= 255  # of the first record; the footer stays
    _shard(folder).write_bytes(data)


def _miscount(by):
    def change(folder):
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata["groups"]["videos"]["32x32x9"]["count"] += by
        (folder / "metadata.json").write_text(json.dumps(metadata))

    return change


def _narrow_null(folder):
    null = cache.Cache(folder).null_text()
    save_file(null | {"text": null["text"][:, :5].copy()}, folder / cache.NULL_TEXT)


def _leave_out(folder):
    lines = [{"name": "x", "reason": "too short", "detail": ""}] * 40
    (folder / "left_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("problem", "damage"),
    [
        ("shard missing", lambda folder: _shard(folder).unlink()),
        ("shard damaged", _truncate),
        ("shard damaged", lambda folder: _shard(folder).write_bytes(b"")),
        ("record damaged", _flip),
        ("records missing", _miscount(+3)),
        ("records too many", _miscount(-3)),
        ("null text missing", lambda folder: (folder / cache.NULL_TEXT).unlink()),
        ("null text missing", lambda folder: (folder / cache.NULL_TEXT).write_bytes(b"\x00" * 30)),
        ("text of another width", _narrow_null),
        ("encoders are others", lambda folder: _edit(folder / "metadata.json", weights="0" * 32)),
        ("file not of the set", lambda folder: (folder / "videos" / "notes.txt").write_text("")),
        ("most left out", _leave_out),
    ],
)
def test_files(broken, expected, problem, damage):
    damage(broken)
    report = doctor.examine(broken, expected)
    assert problem in _found(report)
    assert report.healthy == (doctor.PROBLEMS[problem][0] == "look")
    assert f"{problem} " in report.table() and doctor.PROBLEMS[problem][1] in report.table()


def test_raw_frames(tmp_path):
    clips = EmojiClips(EmojiConfig(kind="video", size=32, num_frames=5, length=3))
    prepare(clips, tmp_path / "raw", metadata={"source": "emoji"})
    assert doctor.examine(tmp_path / "raw").found == {}
    _rewrite(tmp_path / "raw", tmp_path / "black", lambda i, r: r | {"frames": np.zeros_like(r["frames"])}, count=1)
    assert _found(doctor.examine(tmp_path / "black")) == {"blank clip"}
    _rewrite(tmp_path / "raw", tmp_path / "short", lambda i, r: r | {"frames": r["frames"][:3]})
    assert _found(doctor.examine(tmp_path / "short")) == {"wrong number of frames"}


def test_a_folder_of_clips(clip_folder, command_line):
    (clip_folder / "captions.csv").open("a").write("a.mp4,grey gets lighter,\n")
    code, told, _ = command_line("magic141_jax.data.__main__", "doctor", clip_folder)
    assert code == 1
    for problem, name in (
        ("no such file", "absent.mp4"),
        ("empty caption", "silent.mp4"),
        ("no caption", "unlisted.mp4"),
        ("file empty", "empty.mp4"),
    ):
        assert f"wrong: {problem} " in told and name in told


def test_a_manifest(clip_folder, tmp_path):
    lines = [{"path": "clips/a.mp4", "captions": ["grey"]}] * 2 + [{"path": "clips/lost.mp4", "captions": [""]}]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _found(doctor.examine(path)) == {"clip twice", "no such file", "empty caption"}


def test_mistakes(tmp_path, broken, command_line):
    _edit(broken / "metadata.json", format=9)
    for arguments, message in (
        ((tmp_path,), "is not a prepared data set"),
        ((broken,), "of another format"),
        ((tmp_path / "missing.jsonl",), "no file"),
        ((tmp_path, "--limit", "0"), "--limit is 0"),
        ((tmp_path, "--weights", "./missing"), "no weights folder"),
    ):
        code, _, stderr = command_line("magic141_jax.data.__main__", "doctor", *arguments)
        assert code == 2 and message in stderr and stderr.count("\n") == 1
    with pytest.raises(UserError, match="no file"):
        doctor.examine(tmp_path / "nothing.jsonl")
