"""Results as lines and as rows of a table."""

import json

import pytest

from magic141_jax.aot import report
from magic141_jax.errors import UserError

GIB = 2**30
SHAPES = {
    "config": "tiny",
    "topology": "v5p:2x2x2",
    "chips": 8,
    "chip_memory": 95 * GIB,
    "method": "dmd",
    "mesh": {"data": 1, "fsdp": 8, "tensor": 1, "context": 1},
    "clip": [81, 544, 960],
    "samples": 1.0,
    "roles": ["student", "fake"],
    "held": {"teacher, frozen": 3 * GIB, "student, parameters": GIB, "student, moments": 2 * GIB, "batch": GIB // 2},
    "flops": 4e16,
    "seconds_at_peak": 12.3456,
}
MEMORY = {"arguments": 7 * GIB, "temporaries": 40 * GIB, "total": 47 * GIB}
COMPILED = SHAPES | {
    "memory": MEMORY,
    "fits": True,
    "collectives": {"all-gather": {"count": 120, "bytes": 25 * GIB}},
    "seconds": {"lower": 3.0, "compile": 90.4},
}
REFUSED = SHAPES | {"fits": False, "refused": "RESOURCE_EXHAUSTED: it is too large", "seconds": {"lower": 3.0}}


def cells(results):
    return [cell.strip() for cell in report.table([results]).splitlines()[2].strip("|").split("|")]


def test_a_row_of_each_kind():
    start = ["tiny, v5p:2x2x2", "fsdp 8", "1 of 544x960x81", "3.00", "3.00"]
    rest = ["7.00", "40.00", "47.00 / 95.00", "fits", "5", "12.3", "all-gather 120 (25.00)", "90 s"]
    assert cells(COMPILED) == start + rest
    assert cells(REFUSED) == [*start, "-", "-", "- / 95.00", "does not fit", "5", "12.3", "-", "-"]
    assert cells(SHAPES) == [*start, "-", "-", "- / 95.00", "not compiled", "5", "12.3", "-", "-"]
    assert len({line.count("|") for line in report.table([COMPILED, REFUSED]).splitlines()}) == 1


def test_the_summary_tells_sizes_and_the_verdict():
    lines = report.summary(COMPILED).splitlines()
    assert lines[0] == "tiny on v5p:2x2x2: 8 chips, mesh fsdp 8"
    assert "step 0 of dmd updates student and fake; 1 of 544x960x81 a chip" in lines
    assert "  between steps, in all         6.50 GiB on a chip" in lines
    assert "  10^15 operations a chip          5" in lines and "  seconds at peak               12.3" in lines
    assert lines[-1] == "fits: 47.00 / 95.00 GiB needed / of a chip"
    assert "the compiler refuses: RESOURCE_EXHAUSTED: it is too large" in report.summary(REFUSED)


def test_a_folder_of_results(tmp_path):
    with pytest.raises(UserError, match="no results"):
        report.read_folder(tmp_path)
    for name, results in {"b": COMPILED, "a": SHAPES}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert report.read_folder(tmp_path) == [SHAPES, COMPILED]
    for text in ("{", "[]", '{"config": "tiny"}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=r"c\.json holds no results"):
            report.read_folder(tmp_path)
