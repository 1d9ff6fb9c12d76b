"""The command, from its flags to its files, with tiny random weights."""

import json

import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import report
from magic141_jax.evaluation.__main__ import main


@pytest.mark.heavy
def test_table_card_sheet_and_json(weights_folder, tmp_path, capsys):
    card, output, sheet = (tmp_path / n for n in ("CARD.md", "evaluation.json", "sheet.png"))
    card.write_text(f"# Card\n{report.BEGIN}\n{report.END}\nrest\n")
    flags = ["--weights", weights_folder, "--samples", 2, "--output", output, "--card", card, "--sheet", sheet]
    assert main([str(f) for f in flags]) == 0
    results = json.loads(output.read_text())
    assert set(results["splits"]) == {"train", "triples", "subjects"}
    assert results["splits"]["train"]["t2v"]["identity"] == 0
    table = report.table(results)
    assert table in card.read_text()
    assert table in capsys.readouterr().out
    assert card.read_text().endswith("rest\n")
    assert sheet.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples is 0"),
        (["--samples", "many"], "samples"),
        (["--seed", "-1"], "--seed is -1"),
        (["--card", "missing.md"], "can't read the card"),
        (["--output", "missing/e.json"], "no folder missing"),
        (["--weights", "missing/weights/here"], "no weights folder"),
        (["--wieghts", "x"], "unrecognized"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(flags)


def test_a_card_without_markers_is_refused_before_any_work(tmp_path):
    card = tmp_path / "CARD.md"
    card.write_text("no markers")
    with pytest.raises(UserError, match="evaluation:begin"):
        main(["--card", str(card), "--weights", "missing/weights/here"])
