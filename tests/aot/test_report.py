"""Results as lines and as rows of tables, those of before there were programs and times among them."""

import json

import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magic141_jax import sharding
from magic141_jax.aot import report
from magic141_jax.aot.program import struct
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
TIMES = {"operations": 2.0, "hbm": 0.5, "interconnect": 1.25, "roofline": 2.0, "expected": 4.4444, "sum": 3.75}
SAMPLER = COMPILED | {
    "program": "sampler",
    "what": "4 euler steps",
    "fps": 16.0,
    "samples": 1 / 4,
    "roofline": TIMES,
    "reasons": [{"what": "temporaries", "bytes": 40 * GIB}, {"what": "mmdit", "bytes": 3 * GIB}],
}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def scaled(name, factor, **rest):
    return SAMPLER | {"program": name, "roofline": {k: factor * v for k, v in TIMES.items()}, **rest}


def test_a_row_of_each_kind():
    start = ["tiny, v5p:2x2x2", "train", "fsdp 8", "8 of 544x960x81", "6.50"]
    most = "teacher, frozen 3.00; student, moments 2.00; student, parameters 1.00"
    times = ["-", "-", "12.3 / - / -"]
    rows = cells(report.table([COMPILED, REFUSED, SHAPES, SAMPLER]))
    collected = ["all-gather 120 (25.00)", "90 s"]
    assert rows[0] == [
        *start,
        "40.00",
        "47.00 / 95.00",
        "fits",
        "temporaries 40.00; teacher, frozen 3.00; student, moments 2.00",
        *times,
        *collected,
    ]
    assert rows[1] == [*start, "-", "- / 95.00", "does not fit", most, *times, "-", "-"]
    assert rows[2] == [*start, "-", "- / 95.00", "not compiled", "-", *times, "-", "-"]
    assert rows[3][1:4] == ["sampler", "fsdp 8", "2 of 544x960x81"]
    assert rows[3][8:] == ["temporaries 40.00; mmdit 3.00", "2", "4.44", "2 / 0.5 / 1.25", *collected]
    assert {len(row) for row in rows} == {len(report.COLUMNS)}


def test_the_summary_tells_sizes_times_and_the_verdict():
    lines = report.summary(COMPILED).splitlines()
    assert lines[0] == "tiny on v5p:2x2x2: 8 chips, mesh fsdp 8"
    assert lines[1] == "train: step 0 of dmd updates student and fake; 8 of 544x960x81 at once"
    assert "  held, in all                  6.50 GiB on a chip" in lines
    assert "  10^15 operations a chip          5" in lines and "  seconds, operations           12.3" in lines
    assert lines[-4:-2] == ["fits: 47.00 / 95.00 GiB needed / of a chip", "  temporaries 40.00"]
    assert "the compiler refuses: RESOURCE_EXHAUSTED: it is too large" in report.summary(REFUSED)
    lines = report.summary(SAMPLER).splitlines()
    assert (
        "sampler: 4 euler steps; 2 of 544x960x81 at once" in lines and "  seconds, sum                  3.75" in lines
    )


def test_seconds_a_clip_are_those_of_its_stages():
    # The sampler makes two clips at once, the other two one.
    stages = [scaled("encode", 0.1, samples=1 / 8), SAMPLER, scaled("decode", 0.25, samples=1 / 8)]
    (row,) = cells(report.clips([*stages, COMPILED]))
    assert row[:4] == ["tiny, v5p:2x2x2", "fsdp 8", "fits", "544x960x81, 5.06 s"]
    assert row[4] == "0.2 + 1 + 0.5 = 1.7"
    assert row[6] == "0.375 + 1.88 + 0.938 = 3.19"
    assert row[7] == f"5.06 / 3.78 = {81 / 16 / (4.4444 * 0.85):.2f}"
    reading = scaled("text", 0.05, samples=1 / 8, fits=False)
    (row,) = cells(report.clips([*stages, reading]))
    assert row[4] == "0.1 + 0.2 + 1 + 0.5 = 1.8" and row[2] == "does not fit"


def test_clips_of_one_slice_and_mesh_only():
    stages = [scaled("encode", 0.1), SAMPLER, scaled("decode", 0.25)]
    assert report.clips(stages[:2]) == report.clips([]) == ""
    small = [each | {"topology": "v5p:2x2x1", "chips": 4} for each in stages]
    other = [each | {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "context": 8}} for each in stages]
    rows = cells(report.clips([*stages, *small, *other[:2]]))
    assert [row[0] for row in rows] == ["tiny, v5p:2x2x1", "tiny, v5p:2x2x2"]  # the smallest first
    # Without a compiled program there are no seconds.
    shapes = stages[2] | {"roofline": {"operations": 1.0}}
    assert report.clips([*stages[:2], shapes]) == ""


def test_a_folder_of_results(tmp_path):
    with pytest.raises(UserError, match="no results"):
        report.read_folder(tmp_path)
    for name, results in {"b": COMPILED, "a": SHAPES, "d": SAMPLER}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert report.read_folder(tmp_path) == [SHAPES, COMPILED, SAMPLER]
    for text in ("{", "[]", '{"config": "tiny"}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=r"c\.json holds no results"):
            report.read_folder(tmp_path)


def test_where_each_array_lies():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    tree = {
        "kernel": struct(jnp.zeros((1024, 2048)), NamedSharding(mesh, P(("fsdp", "context"), None))),
        "bias": struct(jnp.zeros(1024), NamedSharding(mesh, P(None))),
    }
    _, _, *rows = report.shardings({"student": tree}).splitlines()
    assert rows == [
        "| student | bias | 1024 | float32 | copied | 0.003906 |",
        "| student | kernel | 1024x2048 | float32 | fsdp x context, - | 2 |",
    ]
