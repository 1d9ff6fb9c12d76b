"""Lines, levels and bands from made-up rows; the SVG is well formed, holds them, and is the same each time."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import plots
from magic141_jax.evaluation.standing import BY_CAPTION

SVG = "{http://www.w3.org/2000/svg}"


def row(*motions, evaluations=4, megabytes=20.9):
    """A row with one value of motion a seed."""
    one = {"last_identity": 0.5, "frechet": 1.0, "evaluations": evaluations, "dit_megabytes": megabytes}
    seeds = {str(i): {"t2v": {**one, "motion": m}, "i2v": {**one, "motion": m}} for i, m in enumerate(motions)}
    return {"values": {"train": seeds}}


ROWS = {
    "teacher": row(0.9, 1.0, evaluations=100),
    "i2v@200": row(0.7, 0.9),
    "t2v@50": row(0.1, 0.1),
    "i2v@50": row(0.2, 0.4, evaluations=8),
}


def test_labels():
    assert plots.split_label("i2v student@100") == ("i2v student", 100)
    assert plots.split_label("a@b@7") == ("a@b", 7)
    for label in ("teacher", "i2v@", "@5", "i2v@1.5"):
        assert plots.split_label(label) == (label, None)


def test_lines_over_steps_with_a_level():
    teacher, i2v, t2v = plots.lines(ROWS, "train", "t2v", measure="motion", axis="steps")
    assert (teacher.name, teacher.x, i2v.name, list(i2v.x), t2v.name, list(t2v.x)) == (
        "teacher", None, "i2v", [50, 200], "t2v", [50],
    )  # fmt: skip
    np.testing.assert_allclose(teacher.mean, [0.95])
    np.testing.assert_allclose(i2v.mean, [0.3, 0.8])
    np.testing.assert_allclose(i2v.deviation, [0.02**0.5, 0.02**0.5])


def test_lines_over_evaluations_have_no_level():
    teacher, i2v, t2v = plots.lines(ROWS, "train", "i2v", measure="motion", axis="evaluations")
    assert [list(line.x) for line in (teacher, i2v, t2v)] == [[100], [4, 8], [4]]
    np.testing.assert_allclose(i2v.mean, [0.8, 0.3])


def test_lines_over_memory_name_every_row():
    rows = {"dense": row(0.9), "int8": row(0.8, megabytes=10.6)}
    dense, small = plots.lines(rows, "train", "i2v", measure="motion", axis="megabytes")
    assert (list(dense.x), dense.name, list(small.x), small.name) == ([20.9], "dense", [10.6], "int8")


def test_one_seed_has_no_deviation():
    (line,) = plots.lines({"a@1": row(0.5)}, "train", "t2v", measure="motion", axis="steps")
    np.testing.assert_array_equal(line.deviation, [0])


@pytest.mark.parametrize("axis", ["steps", "evaluations", "megabytes"])
def test_svg(axis):
    text = plots.draw(ROWS, "train", axis=axis)
    assert text == plots.draw(ROWS, "train", axis=axis), "the same bytes each time"
    assert not re.search(r"\d{4}-\d\d-\d\d|matplotlib \d", text, re.IGNORECASE), "no date, no version"
    root = ElementTree.fromstring(text)
    words = {"".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")}
    assert root.tag == f"{SVG}svg" and {"teacher", "i2v", "t2v", plots.AXES[axis]} <= words
    titles = {"identity, last", "direction", "Fréchet distance (own features)"}
    assert {f"{kind}: {title}" for kind in ("T2V", "I2V") for title in titles} <= words


def test_curves_follow_the_values():
    other = {**ROWS, "i2v@50": row(0.2, 0.5, evaluations=8)}
    assert plots.draw(ROWS, "train", axis="steps") != plots.draw(other, "train", axis="steps")


def test_a_measure_that_a_kind_lacks_is_left_out():
    rows = {"a@1": row(0.5), "a@2": row(0.6)}
    for of in rows.values():
        of["values"]["train"]["0"]["i2v"]["first_frame_psnr"] = 30.0
    text = plots.draw(rows, "train", axis="steps", measures=("motion", "first_frame_psnr"))
    assert "I2V: PSNR of the first frame" in text and "T2V: PSNR" not in text
    text = plots.draw(rows, "train", axis="steps", measures=("first_frame_psnr",))
    assert "I2V: PSNR" in text and "T2V" not in text and ">a</text>" in text
    with pytest.raises(UserError, match="none of the measures to plot: colour"):
        plots.draw(rows, "train", axis="steps", measures=("colour",))


def test_nothing_to_draw():
    with pytest.raises(UserError, match="no row is named NAME@STEP"):
        plots.draw({"a": row(0.5), "b": row(0.5)}, "train", axis="steps")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-dev.txt"):
        plots.draw(ROWS, "train", axis="steps")


def test_intervals_are_grouped_by_their_units():
    each = {"motion": [1.0, 0.0, 1.0], "motion_amount": [1.0, 2.0, 1.5]}
    other = {"motion": [1.0, 1.0, 1.0], "motion_amount": [1.0, 1.0, 1.0]}
    rows = {
        label: {"values": {"train": {"0": {"i2v": {"motion": 0.5, BY_CAPTION: of}}}}}
        for label, of in (("teacher", each), ("student", other))
    }
    text = plots.intervals(rows, "train")
    assert text == plots.intervals(rows, "train")
    words = {"".join(n.itertext()).strip() for n in ElementTree.fromstring(text).iter(f"{SVG}text")}
    assert {"I2V, points", "I2V, %", "direction", "amount of motion", "student"} <= words and "teacher" not in words
