"""Timings as rows that say what they hold for, and rows as a table."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from magic141_jax.evaluation.speed import clock
from magic141_jax.evaluation.speed.stages import Piece

COLUMNS = ("what", "pixels", "frames", "steps", "guidance", "devices", "dtype", "state")
TIMES = ("s, median [min-max] of n", "CPU s", "other cores", "GFLOP/s", "of matmul's rate", "s per s of video")
WHOLE = ("clip", "video")  # rows that have a real-time factor


def row(
    name: str, piece: Piece, taken: clock.Timing, ceiling: tuple[clock.Timing, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One warm row."""
    found = _row(name, piece.frames, piece.steps, settings) | {"state": "warm", "seconds": dataclasses.asdict(taken)}
    if piece.operations:
        found |= {
            "operations": piece.operations,
            "rate": piece.operations / taken.least,
            "share_of_matmul": clock.share(piece.operations, taken, ceiling) / settings["device_count"],
        }
    if name in WHOLE:
        found["real_time_factor"] = taken.median / (piece.frames / settings["fps"])
    return found


def start_rows(
    runs: Sequence[Mapping[str, Mapping[str, float]]], frames: int, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of starts: state -> moment -> seconds for each run."""
    rows = []
    for state, moment in itertools.product(runs[0], ("first frame", "finished")):
        laps = [clock.Lap(run[state][moment], run[state]["cpu"], None) for run in runs]
        seconds = dataclasses.asdict(clock.timing(laps))
        if moment != "finished":
            seconds |= dict.fromkeys(("cpu", "cpu_least", "cpu_most"))
        name = f"start of sample.py: {moment}"
        rows.append(_row(name, frames, settings["steps"], settings) | {"state": state, "seconds": seconds})
    return rows


def _row(name: str, frames: int, steps: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    guided = settings["guidance"] if steps else None
    told = {key: settings[key] for key in ("devices", "dtype")}
    return {"what": name, "pixels": settings["size"], "frames": frames, "steps": steps, "guidance": guided} | told


def table(found: Mapping[str, Any]) -> str:
    """All rows as markdown, with a line of what is the same for all of them."""
    lines = ["| " + " | ".join((*COLUMNS, *TIMES)) + " |", "| --- " * len((*COLUMNS, *TIMES)) + "|"]
    for each in found["rows"]:
        cells = [*(_text(each[name]) for name in COLUMNS), *_times(each)]
        lines.append("| " + " | ".join(cells) + " |")
    best = found["matmul"]
    memory = ", ".join(f"{name} {value:.0f} MB" for name, value in found["peak_memory_megabytes"].items())
    told = found["settings"]
    lines += [
        "",
        f"weights {told['weights']} ({told['weights_digest']}), {told['fps']:g} frames a second, windows of "
        f"{told['window_frames']} frames that share {told['overlap_latents']} latent frames; {told['cores']} cores, "
        f"jax {told['jax']}",
        f"matrix product: {best['operations'] / best['least'] / 1e9:.0f} GFLOP/s at best; peak memory: {memory or '?'}",
    ]
    return "\n".join(lines)


def _times(each: Mapping[str, Any]) -> list[str]:
    seconds = each["seconds"]
    rate, part, factor = (each.get(name) for name in ("rate", "share_of_matmul", "real_time_factor"))
    return [
        "{median:.4g} [{least:.4g}-{most:.4g}] of {repeats}".format(**seconds),
        _text(seconds["cpu"]),
        "" if seconds["other_cores"] is None else f"{seconds['other_cores']:.1f}",
        "" if rate is None else f"{rate / 1e9:.0f}",
        "" if part is None else f"{part:.0%}",
        _text(factor),
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
