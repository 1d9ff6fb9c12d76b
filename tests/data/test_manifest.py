import pytest

from magic141_jax.data import manifest
from magic141_jax.data.manifest import Entry
from magic141_jax.errors import UserError


def test_round_trip(tmp_path):
    entries = [
        Entry("a.mp4", ("a cat", "eine Katze auf Möbeln"), tags={"colour": "red"}, start=1.5),
        Entry("sub/b.PNG", ("a dog",)),
        Entry("c.raw", ("x",), kind="image"),
    ]
    manifest.write(tmp_path / "m.jsonl", entries)
    assert manifest.read(tmp_path / "m.jsonl") == entries
    assert [entry.kind for entry in entries] == ["video", "image", "image"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"path": "a.mp4", "captons": []}', "line 2.captons.*captions"),
        ('{"path": "a.mp4", "captions": "one"}', "line 2.captions must be"),
        ('{"captions": ["x"]}', "line 2.*path"),
        ('{"path": "a.txt"}', "line 2.*'a.txt'.*kind"),
        ('{"path": "a.mp4", "start": -1}', "line 2.*start"),
    ],
)
def test_errors_name_the_line(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_text('{"path": "ok.mp4", "captions": ["fine"]}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path / "m.jsonl")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no file"):
        manifest.read(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        manifest.read(tmp_path / "m.jsonl")


def test_a_folder_is_matched_with_its_csv(clip_folder):
    entries, left_out = manifest.read_folder(clip_folder)
    first = entries[0]
    assert first.path == "a.mp4" and first.tags == {"speed": "slow"}
    assert first.captions == ("grey gets lighter", "grey, lighter and lighter")
    assert [e.path for e in entries[1:]] == ["more/b.mp4", "c.png", "short.mp4", "broken.mp4", "empty.mp4"]
    assert {(item.name, item.reason) for item in left_out} == {
        ("absent.mp4", "no such file"),
        ("silent.mp4", "empty caption"),
        ("unlisted.mp4", "no caption"),
    }


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_spreadsheets_have_their_own_commas(tmp_path, delimiter):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "captions.csv").write_text(f"file{delimiter}caption\nx.png{delimiter}one, two\n")
    entries, left_out = manifest.read_folder(tmp_path)
    assert entries == [Entry("x.png", ("one, two",))] and not left_out


def test_jsonl_captions_with_a_list_and_other_names(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": ["one", "two"], "start": 0, "n": 3}\n')
    entries, left_out = manifest.read_folder(tmp_path)
    assert entries == [Entry("x.png", ("one", "two"), tags={"n": "3"})] and not left_out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "write captions.csv there"),
        ({"captions.csv": "file,caption\n", "metadata.csv": "file,caption\n"}, "keep one"),
        ({"captions.csv": "name,caption\na,b\n"}, "no column for the file; name it one of file, file_name"),
        ({"captions.csv": "file,words\na,b\n"}, "no column for the caption"),
        ({"captions.csv": "file,file,caption\n"}, "twice"),
        ({"captions.csv": "file,caption\na.mp4,one, two\n"}, "line 2 has too many columns"),
        ({"captions.csv": ""}, "no column"),
        ({"captions.jsonl": '{"file": "a.mp4"}\n'}, "no column for the caption"),
    ],
)
def test_bad_caption_files(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.read_folder(tmp_path)
