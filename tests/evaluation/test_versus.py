"""A report on two tiny samplers: what it holds, that its page loads nothing, and that it goes on after a cut."""

import json
import re

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import compare, record, versus
from magic141_jax.evaluation.__main__ import main
from magic141_jax.pipelines import media


@pytest.fixture(scope="module")
def made(weights_folder, tmp_path_factory):
    """The folder of a report, and its flags."""
    out = tmp_path_factory.mktemp("versus") / "out"
    flags = ["report", str(weights_folder), f"other={weights_folder}:steps=1", "--output", str(out), "--samples", "3"]
    flags += ["--seeds", "0", "--splits", "triples", "--kinds", "i2v", "--draws", "2", "--videos", "2"]
    assert main(flags) == 0
    return out, flags


def test_the_text(made, weights_folder):
    out, _ = made
    text = (out / versus.TEXT).read_text()
    assert text.startswith("# other against tiny\n")
    for head in (
        "## Held-out triples",
        "### I2V: true clip, tiny, other",
        "## What the columns are",
        "## How to repeat it",
    ):
        assert f"\n{head}\n" in text
    assert "Paired with tiny, 3 pairs, 95 % intervals:" in text and "I2V, other against tiny: " in text
    assert "No published network judged." in text and "perceptual distance (own features)" in text
    digest = json.loads((out / versus.RECORD).read_text())["rows"]["tiny"]["digests"]["folder"]
    assert f"| tiny | `tiny` | folder `{digest}` | 2 | 1 | 3 | euler |" in text
    assert "report tiny=tiny other=tiny:steps=1 --output=out --videos=2 --samples=3" in text
    assert str(weights_folder.parent) not in text and str(out.parent) not in text


def test_the_page_holds_all_it_shows(made):
    out, _ = made
    page, text = (out / versus.PAGE).read_text(), (out / versus.TEXT).read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == len(re.findall(r"!\[", text)) == 3
    assert all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r'src="[^"]+"', "", page) and page.count("<table>") == 3
    assert 'xmlns="http://www.w3.org/2000/svg"' in (out / versus.PLOTS / "triples.svg").read_text()


def test_videos_hold_the_true_clip_and_both_rows(made):
    out, _ = made
    videos = sorted((out / versus.VIDEOS).iterdir())
    assert [path.name for path in videos] == ["triples-i2v-0.webp", "triples-i2v-1.webp"]
    about = media.read_metadata(videos[0])
    assert about["rows"] == [versus.TRUE, "tiny", "other"] and about["prompt"].startswith("a ")


def test_it_goes_on(made, monkeypatch):
    """The seed that is there is not measured again, and the texts come out as they were."""
    out, flags = made
    before = (out / versus.TEXT).read_text()
    monkeypatch.setattr(compare, "make", None)
    assert main(flags) == 0
    assert (out / versus.TEXT).read_text() == before
    with pytest.raises(UserError, match="holds another comparison"):
        main([flag if flag != "3" else "4" for flag in flags])


def test_side_by_side():
    frames = versus.side_by_side({"a": np.zeros((2, 80, 80, 3)), "b": np.ones((2, 80, 80, 3))})
    assert frames.shape == (2, 160 + 14, 2 * 160, 3)
    assert frames[:, 14:, :160].max() == 0 and frames[:, 14:, 160:].min() == 1
    assert frames[0, :14].min() < 0.5, "the labels are written"


def test_what_is_certain_is_told(made):
    rows = record.read(made[0] / versus.RECORD)["rows"]
    for label, level in (("tiny", 0.0), ("other", 1.0)):
        each = rows[label]["values"]["triples"]["0"]["i2v"]["by_caption"]
        each |= {"motion": [level] * 3, "perceptual": [1 + level] * 3, "motion_amount": [2 - level] * 3}
    (line,) = versus.certain(rows, "triples")
    assert "**better**: direction (+100.0 [+100.0, +100.0] points)" in line
    assert re.search(r"\*\*worse\*\*: .*perceptual distance \(own features\) \(\+100.0 \[\+100.0, \+100.0\] %", line)
    assert re.search(r"\*\*other\*\*: amount of motion \(50 \[50, 50\] %\)", line)


def test_labels_may_be_left_out():
    assert compare.with_labels(("a/x:steps=4", "b=y")) == ("x=a/x:steps=4", "b=y")
    assert compare.with_labels(("runs/a/weights", "z/a")) == ("a=runs/a/weights", "a (2)=z/a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a"], "required"),
        (["a", "b"], "--output"),
        (["a", "b", "--output", "file"], "file is a file; name a folder"),
        (["a", "b", "--output", "out", "--videos", "99"], "--videos is 99"),
        (["a", "missing/weights/here", "--output", "out"], "no weights folder"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        main(["report", *flags])
    assert not (tmp_path / "out").exists()
