"""A record grows seed by seed, comes back as it was, goes on only with the same rows, and tells of no machine."""

import copy
import json
import math
from pathlib import Path

import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import record, report, standing
from magic141_jax.evaluation.record import PACKAGES

SETTINGS = {"seeds": (0, 1), "splits": ("train", "subjects"), "samples": 8, "draws": 2, "pack": "0f"}
ROWS = {
    label: {
        "digests": {"folder": label},
        "options": {},
        "settings": {"num_inference_steps": steps, "guidance_scale": 1.5, "shift": 3.0, "sampler": "euler"},
    }
    for label, steps in (("teacher", 50), ("student", 4))
}


def values(motion=0.9):
    """Of one seed: values[label][split][kind][measure]."""
    each = {"motion": [1.0, 0.0, 1.0], "first_frame_psnr": [30.125, math.nan, 31.0]}
    kind = {"last_identity": 0.8, "motion": motion, "frechet": math.nan, "evaluations": 4, standing.BY_CAPTION: each}
    return {label: {"train": {"t2v": kind, "i2v": kind}, "subjects": {"i2v": kind}} for label in ROWS}


def stored(path, seeds=(0,)):
    made = record.begin(ROWS, SETTINGS, "compare")
    for seed in seeds:
        made = record.add(made, seed, values(0.9 - seed / 10), seconds=1.26)
    report.write(path, report.to_json(made))
    return made


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "c.json"
    made = stored(path, seeds=(0, 3))
    found = record.read(path)
    assert found["settings"] == {**SETTINGS, "splits": ["train", "subjects"], "seeds": [0, 3]}
    of = found["rows"]["student"]["values"]["train"]["3"]["i2v"]
    assert (of["motion"], of["evaluations"]) == (pytest.approx(0.6), 4) and isinstance(of["evaluations"], int)
    assert math.isnan(of["frechet"])
    assert of[standing.BY_CAPTION]["motion"] == [1, 0, 1] and math.isnan(of[standing.BY_CAPTION]["first_frame_psnr"][1])
    assert '"first_frame_psnr": [30.125, null, 31.0]' in path.read_text()
    assert standing.section(found) == standing.section(made)
    assert found["standings"]["train"]["student"]["met"] is True
    provenance = found["made"]["3"]
    assert provenance["seconds"] == 1.3 and set(provenance["versions"]) == {"magic141_jax", "python", *PACKAGES}
    assert "CPU" in provenance["device"] and len(provenance["date"]) == 10


def test_adding_a_seed_leaves_the_old_record(tmp_path):
    made = record.begin(ROWS, SETTINGS, "")
    before = copy.deepcopy(made)
    record.add(made, 0, values(), seconds=1)
    assert made == before


def test_only_the_same_comparison_goes_on(tmp_path):
    path = tmp_path / "c.json"
    stored(path)
    before = record.read(path)
    again = record.resume(before, record.begin(ROWS, {**SETTINGS, "seeds": (7,)}, "another"), path)
    assert (again["settings"]["seeds"], again["command"]) == ([0], "another")
    student = ROWS["student"]
    others = {
        "settings.samples was 8 and is 9": (ROWS, {**SETTINGS, "samples": 9}),
        "settings.splits was": (ROWS, {**SETTINGS, "splits": ("train",)}),
        "settings.pack was 0f and is 1f": (ROWS, {**SETTINGS, "pack": "1f"}),
        "rows.student.digests.folder was student and is x": (
            {**ROWS, "student": {**student, "digests": {"folder": "x"}}},
            SETTINGS,
        ),
        "rows.student.digests.lora was None and is y": (
            {**ROWS, "student": {**student, "digests": {"folder": "student", "lora": "y"}}},
            SETTINGS,
        ),
        "order of rows": (dict(reversed(ROWS.items())), SETTINGS),
    }
    for message, (rows, settings) in others.items():
        with pytest.raises(UserError, match=f"holds another comparison.*{message}"):
            record.resume(before, record.begin(rows, settings, ""), path)


def drop(*keys):
    """Takes away what lies under a path of keys."""

    def change(held):
        for key in keys[:-1]:
            held = held[key]
        del held[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("rows"), "lacks rows; write it by"),
        (drop("rows", "student", "values"), "damaged .*values"),
        (drop("rows", "student", "values", "train"), "rows.student.values does not fit"),
        (drop("rows", "student", "values", "train", "0"), "rows.student.values.train does not fit"),
        (drop("made", "0"), "made does not fit"),
        (drop("settings", "splits"), "damaged .*splits"),
        (lambda held: held["rows"]["student"]["values"]["train"].update({"0": {"i2v": {"motion": "x"}}}), "no number"),
        (lambda held: held["rows"]["student"]["values"]["train"].update({"0": {"i2v": 3}}), "damaged"),
        (lambda held: held.update(rows=3), "damaged"),
        (lambda held: held["settings"].update(seeds=[]), "does not fit"),
    ],
)
def test_damaged_records_are_one_line(change, message, tmp_path):
    path = tmp_path / "c.json"
    stored(path)
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    with pytest.raises(UserError, match=message) as raised:
        record.read(path)
    assert "\n" not in str(raised.value) and "c.json" in str(raised.value)


def test_what_is_cut_off_or_missing_is_one_line(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(UserError, match="no file"):
        record.read(path)
    stored(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"can't read .*c.json"):
        record.read(path)


def test_paths_of_the_machine_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record.shown(str(tmp_path / "runs" / "a")) == str(Path("runs", "a"))
    assert record.shown(str(tmp_path.parent / "elsewhere" / "b")) == "b"
    assert [record.shown(text) for text in ("default", "runs/a", "")] == ["default", "runs/a", ""]
