"""The table, the card and the sheet from made-up values."""

import json

import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError
from magic141_jax.evaluation import report

RESULTS = {
    "splits": {
        "train": {
            "vae": {"vae_psnr": 31.26, "motion": 0.9},
            "truth": {"motion": 1.0},
            "image": {"identity": 0.5},
            "i2v": {"motion": 0.75},
        },
        "subjects": {"vae": {"motion": 0.8}, "truth": {"motion": 0.96}, "i2v": {"motion": float("nan")}},
    },
    "settings": {
        "samples": 8,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "seed": 0,
        "subjects": 100,
        "minute": 2,
    },
    "weights": "abc",
    "command": "python -m magic141_jax.evaluation",
}
DRIFT = {k: [0.5] * 30 for k in ("identity", "nearest", "colour_error", "subject_psnr", "sharpness")}


def row(text, label):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_table():
    text = report.table(RESULTS)
    assert row(text, "VAE, PSNR of a clip (dB)") == ["31.3", "–", "31", "", ""]
    assert row(text, "T2I, subject identity") == ["0.50", "–", "0.85", "–", "–"]
    assert row(text, "I2V, motion from unleaky first frames") == ["0.75", "–", "0.9 (emoji 0.85)", "0.85", "0.98"]
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_rows_name_measures_once():
    keys = [(r.way, r.measure) for r in report.ROWS]
    assert len(set(keys)) == len(keys)


def test_drift_table_ends_with_the_last_window():
    text = report.drift_table(DRIFT | {"identity": list(np.linspace(1, 0, 30))})
    assert row(text, "end of window") == ["1", "2", "5", "10", "20", "30"]
    assert row(text, "subject identity")[-1] == "0.00"


def test_section_names_the_conditions():
    text = report.section(RESULTS | {"minute": DRIFT})
    assert "8 captions a column, 4 steps, guidance 2, seed 0, weights `abc`" in text
    assert "nearest of all 100" in text
    assert "mean of 2 captions" in text


def test_the_card_is_replaced_between_its_markers():
    card = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.update_card(card, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.update_card(once, "new") == once


@pytest.mark.parametrize("card", ["", report.BEGIN, f"{report.END}\n{report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"])
def test_a_card_without_markers(card):
    with pytest.raises(UserError, match="evaluation:begin"):
        report.update_card(card, "new")


def test_contact_sheet():
    clips = np.zeros((2, 17, 8, 8, 3))
    clips[1, 16] = 1.0
    sheet = np.asarray(report.contact_sheet(clips, ("a", "b")))
    height = 16 + report.LABEL_HEIGHT
    assert sheet.shape == (2 * height, 5 * 16, 3)
    assert (sheet[-16:, -16:] == 255).all()
    assert not sheet[-16:, :-16].any()
    assert report.contact_sheet(clips[:, :9], ("a", "b")).size == (3 * 16, 2 * height)


def test_json_has_no_nan():
    made = json.loads(report.to_json(RESULTS))
    assert made["splits"]["subjects"]["i2v"]["motion"] is None
    assert made["splits"]["train"]["vae"]["vae_psnr"] == 31.26


def test_write_replaces_and_leaves_nothing_behind(tmp_path):
    for content, name in (("text", "a.md"), (Image.new("RGB", (2, 2)), "a.png")):
        report.write(tmp_path / name, content)
    assert (tmp_path / "a.md").read_text() == "text"
    with pytest.raises(UserError, match="can't write"):
        report.write(tmp_path / "none" / "a.md", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.md", "a.png"]
