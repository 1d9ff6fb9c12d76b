"""Rows say what they hold for."""

import pytest

from magic141_jax.evaluation.speed import clock, table
from magic141_jax.evaluation.speed.stages import Piece

SETTINGS = {
    "size": "64x32",
    "fps": 8.0,
    "steps": 4,
    "guidance": 1.5,
    "devices": "2 cpu",
    "device_count": 2,
    "dtype": "float32",
    "weights": "tiny",
    "weights_digest": "0123",
    "window_frames": 17,
    "overlap_latents": 1,
    "cores": 2,
    "jax": "0",
}
CEILING = (clock.timing([clock.Lap(1.0, 1.0, 0.0)]), 8e9)
TAKEN = clock.timing([clock.Lap(2.0, 1.0, 1.0), clock.Lap(4.0, 2.0, 1.0), clock.Lap(3.0, 3.0, 1.0)])


def test_a_row():
    row = table.row("evaluation, clip", Piece(lambda: None, 17, 1, 4e9), TAKEN, CEILING, SETTINGS)
    assert [row[name] for name in table.COLUMNS] == [
        "evaluation, clip",
        "64x32",
        17,
        1,
        1.5,
        "2 cpu",
        "float32",
        "warm",
    ]
    assert row["rate"] == 2e9
    assert row["share_of_matmul"] == pytest.approx(4e9 / 1.0 / 8e9 / 2)  # of two devices
    assert "real_time_factor" not in row


def test_the_real_time_factor_is_time_per_second_of_video():
    row = table.row("clip", Piece(lambda: None, 16, 4), TAKEN, CEILING, SETTINGS)
    assert row["real_time_factor"] == 3.0 / 2.0 and "rate" not in row


def test_starts():
    runs = [
        {s: {"first frame": x + i, "finished": 2 * x + i, "cpu": x} for s, x in (("cold", 9.0), ("warm", 2.0))}
        for i in (0, 1)
    ]
    rows = table.start_rows(runs, 17, SETTINGS)
    found = {(row["what"], row["state"]): row["seconds"] for row in rows}
    assert found["start of sample.py: first frame", "warm"]["least"] == 2.0
    assert found["start of sample.py: finished", "cold"]["median"] == 18.5
    assert found["start of sample.py: first frame", "cold"]["cpu"] is None  # known of the whole run only


def test_the_table_has_a_cell_for_every_column():
    rows = [
        table.row("decode", Piece(lambda: None, 17), TAKEN, CEILING, SETTINGS),
        table.row("clip", Piece(lambda: None, 17, 4, 1e9), TAKEN, CEILING, SETTINGS),
    ]
    best = {"least": 1.0, "operations": 8e9}
    found = {"rows": rows, "settings": SETTINGS, "matmul": best, "peak_memory_megabytes": {"resident": 12.0}}
    lines = table.table(found).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "3 [2-4] of 3" in lines[2] and "8 GFLOP/s" in lines[-1] and "resident 12 MB" in lines[-1]
