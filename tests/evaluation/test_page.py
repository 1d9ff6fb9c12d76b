"""The page from records that `record` wrote: tables, plots, commands, and one line for what is wrong."""

import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation import page, record, report, standing

INDEX = """
title = "Distillation"
text = "What was tried."

[[experiment]]
file = "curve.json"
title = "Which student is faster"
text = "Both from the same teacher."
commands = ["python train.py --config=configs/debug.py", "python -m magic141_jax.evaluation compare"]
plot = "steps"
measures = ["motion"]

[[experiment]]
file = "steps.json"
title = "Fewer steps"
text = "Held against the teacher."
commands = ["make steps"]
plot = "evaluations"
goal = true

[[experiment]]
file = "later.json"
title = "Later"
text = "An idea."
commands = []
"""
LABELS = {"curve": ("teacher", "i2v@50", "i2v@100", "t2v@50"), "steps": ("teacher@50", "teacher@4", "student@4")}


def fill(results, name, *, seeds=(0, 1, 2), motion=(0.9, 0.5, 0.8, 0.4)):
    """Writes a comparison as `compare --output` does; the values change a little from seed to seed."""
    rows = {
        label: {"digests": {}, "options": {}, "settings": {"num_inference_steps": 4, "guidance_scale": 1.0}}
        for label in LABELS[name]
    }
    settings = {"splits": ("train",), "samples": 8, "draws": 2}
    made = record.begin(rows, settings, "compare")
    for seed in seeds:
        values = {
            label: {"train": {kind: measures(m + seed / 100, i) for kind in ("t2v", "i2v")}}
            for i, (label, m) in enumerate(zip(rows, motion, strict=False))
        }
        made = record.add(made, seed, values, seconds=1)
    report.write(results / f"{name}.json", report.to_json(made))
    return made


def measures(motion, index):
    return {"last_identity": 0.5, "motion": motion, "frechet": 0.4, "diversity": 0.1, "evaluations": 4 * 2**index}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "docs" / "results" / "distillation"
    folder.mkdir(parents=True)
    (folder / page.INDEX).write_text(INDEX)
    return folder


@pytest.fixture
def docs(tmp_path):
    return tmp_path / "docs"


def test_page(results, docs):
    curve, steps = fill(results, "curve"), fill(results, "steps")
    wrote = page.write(results, docs)
    names = ["experiments/curve-train.svg", "experiments/steps-train.svg", "experiments.md"]
    assert wrote == [docs / name for name in names] and all(path.is_file() for path in wrote)
    text = (docs / "experiments.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# Distillation", "## Which student is faster", "## Fewer steps", "## Later", "## What the columns are",
    ]  # fmt: skip
    for made in (curve, steps):
        assert standing.table(made["rows"], "train", "i2v") in text
    assert "8 captions a seed, 2 noises for diversity, seeds 0, 1, 2; mean ± deviation over seeds. CPU (" in text
    assert "(experiments/curve-train.svg)" in text and "[Values](results/distillation/curve.json)" in text
    assert "```sh\npython train.py --config=configs/debug.py\npython -m magic141_jax.evaluation compare\n```" in text
    assert text.count("- teacher@4 against teacher@50") == 1 and "against teacher:" not in text
    assert text.count(standing.GOAL) == 1
    assert "An idea.\n\nNot run yet.\n\n## What" in text
    assert str(docs.parent) not in text


def test_the_index_may_name_the_page(results, docs):
    fill(results, "curve")
    index = results / "index.toml"
    index.write_text('page = "other.md"\n' + index.read_text())
    assert docs / "other.md" in page.write(results, docs)
    assert not (docs / "experiments.md").exists()


def test_the_same_results_make_the_same_page(results, docs):
    fill(results, "curve")
    before = {path: path.read_bytes() for path in page.write(results, docs)}
    assert {path: path.read_bytes() for path in page.write(results, docs)} == before
    fill(results, "curve", motion=(0.9, 0.6, 0.8, 0.4))
    after = {path: path.read_bytes() for path in page.write(results, docs)}
    assert all(after[path] != before[path] for path in before)


def test_provenance_names_what_differs():
    one = {"date": "2030-01-02", "device": "TPU v6", "versions": {"jax": "1.0", "numpy": "2.0"}, "seconds": 1}
    assert page.provenance({"0": one, "1": one}) == "TPU v6, 2030-01-02; jax 1.0, numpy 2.0."
    other = {**one, "date": "2030-01-01", "device": "CPU", "versions": {"jax": "1.1", "numpy": "2.0"}}
    both = "CPU and TPU v6, 2030-01-01 to 2030-01-02; jax 1.0, numpy 2.0 and jax 1.1, numpy 2.0."
    assert page.provenance({"0": one, "1": other}) == both


def write_index(results, before, after):
    assert before in INDEX
    (results / page.INDEX).write_text(INDEX.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "Distillation"', "title = ", "can't read .*index.toml"),
        ('title = "Distillation"', "", "missing key index.toml.title"),
        ("goal = true", "gaol = true", "unknown key .*gaol.*goal"),
        ('plot = "steps"', 'plot = "stpes"', "'stpes'. Did you mean 'steps'"),
        ('["motion"]', '["moton"]', "no measure 'moton' to plot. Did you mean 'motion'"),
        ('"curve.json"', '"../curve.json"', "must be the name of a JSON file"),
        ('"later.json"', '"curve.json"', "2 experiments of the file curve.json"),
        ('"curve.json"', '"other.json"', "curve.json is no experiment of index.toml"),
    ],
)
def test_a_wrong_index_is_one_line(before, after, message, results, docs):
    fill(results, "curve")
    write_index(results, before, after)
    with pytest.raises(UserError, match=message) as raised:
        page.write(results, docs)
    assert "\n" not in str(raised.value) and not (docs / page.PAGE).exists()


def test_a_curve_without_steps_names_its_file(results, docs):
    made = fill(results, "curve")
    rows = dict(zip("abcd", made["rows"].values(), strict=True))
    report.write(results / "curve.json", report.to_json({**made, "rows": rows}))
    with pytest.raises(UserError, match=r"curve.json: no row is named NAME@STEP"):
        page.write(results, docs)


def test_what_is_missing_is_one_line(results, docs, tmp_path):
    with pytest.raises(UserError, match=r"no results in .*distillation yet; the commands in index.toml make them"):
        page.write(results, docs)
    fill(results, "curve")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        page.write(results, tmp_path / "nowhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="is not below"):
        page.write(results, tmp_path / "elsewhere")
    (results / page.INDEX).unlink()
    with pytest.raises(UserError, match=r"no file .*index.toml"):
        page.write(results, docs)


def test_a_broken_comparison_is_one_line(results, docs):
    fill(results, "curve")
    (results / "curve.json").write_text("{")
    with pytest.raises(UserError, match=r"can't read .*curve.json"):
        page.write(results, docs)
