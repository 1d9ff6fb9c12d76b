"""Recipes: stages in order, done once, measured, and stopped at the gate."""

import json
import sys

import pytest

from magic141_jax.errors import UserError
from magic141_jax.recipe import __main__ as cli
from magic141_jax.recipe import stages

MAKE = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True); (p / 'model_index.json').write_text('{}')"


def comparison(lost):
    """A record of two rows, of which the second is `lost` points worse in one score."""
    good = {"first_identity": 0.9, "last_identity": 0.8, "motion": 1.0, "diversity": 1.0}
    worse = {**good, "last_identity": 0.8 - lost / 100}
    rows = {
        name: {"values": {"triples": {"0": {"t2v": values}, "1": {"t2v": values}}}}
        for name, values in (("dense", good), ("small", worse))
    }
    return {"rows": rows, "settings": {"splits": ["triples"]}}


def test_loss_is_in_points_below_the_first_row():
    lost = stages.loss(comparison(5))
    assert lost["T2V identity in the last, triples"] == pytest.approx(5)
    assert lost["T2V identity in the first frame, triples"] == pytest.approx(0)
    assert not [name for name in lost if "diversity" in name]  # a ratio, not points
    assert stages.loss(comparison(-3))["T2V identity in the last, triples"] == pytest.approx(-3)


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """What was compared, with the points that each stage loses in `points`."""
    seen = {"compared": [], "points": {}}

    def compared(recipe, name, weights, output):
        seen["compared"].append((name, str(weights)))
        return comparison(seen["points"].get(name, 0))

    monkeypatch.setattr(stages, "_compared", compared)
    return seen


def write(tmp_path, *tables, head='dense = "default"'):
    file = tmp_path / "recipe.toml"
    blocks = [head, *("\n".join(["[[stage]]", *(f"{k} = {json.dumps(v)}" for k, v in t.items())]) for t in tables)]
    file.write_text("\n\n".join(blocks) + "\n")
    return file


def test_stages_run_once_in_order_and_hand_on_their_weights(ran, tmp_path, capsys):
    log = tmp_path / "log"
    note = f"import sys; open({str(log)!r}, 'a').write(sys.argv[2] + '\\n'); " + MAKE
    first = {"name": "one", "command": ["-c", note, "{weights}", "{before}"], "gate": False}
    second = {"name": "two", "command": ["-c", note, "{work}/other", "{before}"], "weights": "{work}/other"}
    ran["points"] = {"one": 50}  # not gated
    file = write(tmp_path, first, second)
    cli.main([str(file), "--workdir", str(tmp_path / "run")])
    one, two = tmp_path / "run/one/weights", tmp_path / "run/two/other"
    assert log.read_text().splitlines() == ["default", str(one)]
    assert ran["compared"] == [("one", str(one)), ("two", str(two))]
    assert "one: points lost" in capsys.readouterr().out
    cli.main([str(file), "--workdir", str(tmp_path / "run")])
    assert len(log.read_text().splitlines()) == 2  # nothing is made twice


def test_the_gate_stops_before_the_next_stage(ran, tmp_path):
    ran["points"] = {"one": 2.5}
    made = {"command": ["-c", MAKE, "{weights}"]}
    file = write(tmp_path, {"name": "one", **made}, {"name": "two", **made})
    with pytest.raises(UserError, match=r"one has lost 2\.5 points of T2V identity in the last, triples, more than 2"):
        stages.run(stages.read(file), tmp_path / "run")
    assert not (tmp_path / "run/two").exists()
    stages.run(stages.read(write(tmp_path, {"name": "one", **made}, head="points = 3.0")), tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "a", "command": ["-c", "raise SystemExit(3)"]}, "exit code 3"),
        ({"name": "a", "command": ["-c", "pass"]}, "made no weights folder"),
        ({"name": "a b", "command": ["-c", "pass"]}, "a name of its own"),
        ({"name": "a", "commands": ["-c"]}, "command"),
    ],
)
def test_mistakes_are_one_line(ran, tmp_path, stage, message):
    with pytest.raises(UserError, match=message):
        stages.run(stages.read(write(tmp_path, stage)), tmp_path / "run")


def test_unreadable_recipes_are_told(tmp_path):
    with pytest.raises(UserError, match="can't read the recipe"):
        stages.read(tmp_path / "none.toml")
    with pytest.raises(UserError, match="a name of its own"):
        stages.read(write(tmp_path, head="stage = []"))


def test_the_comparison_is_called_with_both_rows(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(stages, "_python", lambda words, name: called.append(words))
    monkeypatch.setattr(stages.record, "read", lambda path: comparison(0))
    recipe = stages.Recipe((stages.Stage("one", ()),), compare=("--samples", "4"))
    stages._compared(recipe, "one", tmp_path / "w", tmp_path / "c.json")
    assert called[0][:5] == ["-m", "magic141_jax.evaluation", "compare", "--samples", "4"]
    assert f"one={tmp_path / 'w'}" in called[0] and sys.executable not in called[0]
