"""The command, from its flags to its files, with tiny random weights."""

import json
import shlex
from pathlib import Path

import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import compare, page, plots, record, report, standing
from magic141_jax.evaluation.__main__ import main, parse_compare


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


@pytest.mark.heavy
def test_compare_goes_on_after_a_cut(weights_folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "comparison.json"
    rows = [f"teacher={weights_folder}:steps=2,guidance=1.5", f"student={weights_folder}:steps=1"]
    flags = ["--row", rows[0], "--row", rows[1], "--samples", 2, "--draws", 2, "--seeds", "0,1", "--splits", "train"]
    flags = ["compare", *map(str, flags), "--output", str(output)]

    calls, measure = [], compare.measure

    def cut_once(*args, **options):
        calls.append(args)
        if len(calls) == 4:  # the last of two rows under two seeds
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(compare, "measure", cut_once)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    half = json.loads(output.read_text())
    assert half["settings"]["seeds"] == [0]
    assert main(flags) == 0
    assert len(calls) == 6, "the second run measures the second seed only"
    results = json.loads(output.read_text())
    assert results["settings"]["seeds"] == [0, 1] and list(results["made"]) == ["0", "1"]
    for label, row in half["rows"].items():
        assert results["rows"][label]["values"]["train"]["0"] == row["values"]["train"]["0"], "times included"
    assert str(tmp_path) not in output.read_text()
    assert list(results["rows"]) == ["teacher", "student"]
    teacher, student = (row["values"]["train"] for row in results["rows"].values())
    assert list(teacher) == list(student) == ["0", "1"]
    assert [v["1"]["t2v"]["evaluations"] for v in (teacher, student)] == [8, 2]
    psnr = [[v[seed]["i2v"]["first_frame_psnr"] for seed in "01"] for v in (teacher, student)]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.1)
    assert psnr[0][0] != psnr[0][1]
    assert results["standings"]["train"]["student"]["met"] is False
    printed = capsys.readouterr().out
    assert standing.section(results) in printed
    assert "- student against teacher: " in printed


def test_page(tmp_path, capsys):
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    experiment = '[[experiment]]\nfile = "a.json"\ntitle = "A"\ntext = "Why."\ncommands = ["make a"]\n'
    (results / "index.toml").write_text(f'title = "Page"\ntext = "All."\n{experiment}')
    with pytest.raises(UserError, match=r"no results in .* yet; the commands in index.toml make them"):
        main(["page", str(results), str(tmp_path / "docs")])
    row = {"settings": {"num_inference_steps": 4, "guidance_scale": 1.0}}
    settings = {"splits": ["train"], "samples": 2, "draws": 2}
    measured = {"train": {"i2v": {"frechet": 0.5}}}
    made = record.add(record.begin({"a": row, "b": row}, settings, ""), 0, {"a": measured, "b": measured}, seconds=1)
    report.write(results / "a.json", report.to_json(made))
    assert main(["page", str(results), str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'docs' / 'experiments.md'}\n"
    assert "| a | 4 | 1 | 0.50 |" in (tmp_path / "docs" / "experiments.md").read_text()
    with pytest.raises(UserError, match="required: DOCS"):
        main(["page", str(results)])


def test_the_commands_of_the_repositorys_page_are_read():
    results = Path(__file__).parents[2] / "docs" / "results" / "distillation"
    for experiment in page.read_index(results).experiment:
        words = shlex.split(experiment.commands[-1].replace("\\\n", " "))
        assert words[:4] == ["python", "-m", "magic141_jax.evaluation", "compare"]
        args, rows, plan = parse_compare(words[4:])
        assert args.output.name == experiment.file and len(plan.seeds) >= 3
        steps = [plots.split_label(row.label)[1] for row in rows]
        assert any(steps) == bool(experiment.plot), "a curve has points"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "at least two --row"),
        (["--row", "a=default"], "at least two --row"),
        (["--row", "a=x", "--row", "b=missing/weights/here"], "no weights folder"),
        (["--samples", "1"], "--samples is 1"),
        (["--draws", "1"], "--draws is 1"),
        (["--seeds", "0,x"], "--seeds is '0,x'"),
        (["--splits", "tests"], "--splits names 'tests'"),
        (["--row", "a=x", "--row", "b=x", "--output", "missing/c.json"], "no folder missing"),
        (["--rwo", "x"], "unrecognized"),
    ],
)
def test_bad_flags_of_compare(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=message):
        main(["compare", *flags])


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
