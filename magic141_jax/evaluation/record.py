"""A comparison on disk: one JSON file that grows by a seed at a time, so that what is cut off can go on.

    rows        {label: {digests, options, settings, values[split][seed][kind][measure]}}, see `compare.identity`;
                and values[split][seed][kind]["by_caption"][measure], a list, which older records lack
    settings    {seeds, splits, samples, draws, pack}, see `compare.Plan`; seeds are those that are measured
    made        {seed: {date, device, versions, seconds}}: a later seed may come from another day and machine
    standings   {split: ...}, see `standing.standings`
    command     the command line, its paths as `shown`

Nothing in it names a place on the machine: files are told by their digests.
"""

from __future__ import annotations

import copy
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from magic141_jax import __version__, weights
from magic141_jax.errors import UserError
from magic141_jax.evaluation import standing
from magic141_jax.pytree import flatten

PACKAGES = ("jax", "flax", "numpy")
KEYS = ("rows", "settings", "made", "standings", "command")


def begin(rows: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], command: str) -> dict[str, Any]:
    """A record of rows (`compare.identity` by label) before the first seed; the seeds of `settings` are left out."""
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}  # as in JSON
    splits = listed["splits"]
    return {
        "rows": {label: {**row, "values": {split: {} for split in splits}} for label, row in rows.items()},
        "settings": {**listed, "seeds": []},
        "made": {},
        "standings": {},
        "command": command,
    }


def resume(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What `path` holds, to go on with; `now` is the record that would be begun.

    Raises:
      UserError: it holds other rows, weights or settings; the first difference is named.
    """
    one, two = _identity(before), _identity(now)
    if one != two:
        key = next((k for k in sorted({*one, *two}) if one.get(k) != two.get(k)), "rows")
        raise UserError(
            f"{path} holds another comparison ({key} was {one.get(key)} and is {two.get(key)}); name another --output, "
            "or delete it to begin anew"
        )
    return {**before, "command": now["command"]}


def add(record: Mapping[str, Any], seed: int, values: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """The record with one more seed: its `values[label][split]` as `compare.compare` yields them, and how long it took.

    Date, device and versions are those of this moment and process.
    """
    new = copy.deepcopy(dict(record))
    for label, splits in values.items():
        for split, kinds in splits.items():
            new["rows"][label]["values"][split][str(seed)] = kinds
    new["settings"]["seeds"].append(seed)
    new["made"][str(seed)] = {**stamp(), "seconds": round(seconds, 1)}
    new["standings"] = {s: standing.standings(new["rows"], s) for s in new["settings"]["splits"]}
    return new


def read(path: Path) -> dict[str, Any]:
    """Reads a record; values that JSON can't hold (null) are nan again.

    Raises:
      UserError: no such file, no JSON, or not what `add` and `report.to_json` make; one line says where.
    """
    record = weights.read_json(path)
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise UserError(f"{path} is no comparison: it lacks {', '.join(missing)}; write it by `compare --output`")
    try:
        seeds = [str(seed) for seed in record["settings"]["seeds"]]
        _require(list(record["made"]), seeds, "made")
        _require(len(seeds) > 0, True, "settings.seeds")
        for label, row in record["rows"].items():
            _require(list(row["values"]), list(record["settings"]["splits"]), f"rows.{label}.values")
            for split, by_seed in row["values"].items():
                _require(list(by_seed), seeds, f"rows.{label}.values.{split}")
                row["values"][split] = {seed: _numbers(kinds) for seed, kinds in by_seed.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); write it anew by `compare --output`") from None
    return record


def shown(path: str) -> str:
    """A path as others may read it: relative to the working folder, and below another one its last part only."""
    if not Path(path).is_absolute():
        return path
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return Path(path).name


def stamp() -> dict[str, Any]:
    """When and by what numbers are made: date, device, versions."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "device": device(), "versions": versions()}


def device() -> str:
    """What computes, in words: its kind and number; of a CPU its architecture and cores."""
    first, count = jax.devices()[0], jax.device_count()
    if first.platform == "cpu":
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return f"{count} x {first.device_kind}" if count > 1 else first.device_kind


def versions() -> dict[str, str]:
    """The versions that the numbers may depend on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"magic141_jax": __version__, "python": platform.python_version(), **installed}


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two records must share to be one, flat: everything but the measured, and the order of the rows."""
    rows = {label: {k: v for k, v in row.items() if k != "values"} for label, row in record["rows"].items()}
    settings = {k: v for k, v in record["settings"].items() if k != "seeds"}
    return {**flatten({"rows": rows, "settings": settings}), "order of rows": list(rows)}


def _numbers(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values by kind and measure, those of captions too, None as nan; counts stay whole."""
    found: dict[str, dict[str, Any]] = {}
    for kind, of in kinds.items():
        found[kind] = {k: _number(v, f"{kind} {k}") for k, v in of.items() if k != standing.BY_CAPTION}
        if standing.BY_CAPTION in of:
            listed = of[standing.BY_CAPTION].items()
            found[kind][standing.BY_CAPTION] = {k: [_number(v, f"{kind} {k}") for v in each] for k, each in listed}
    return found


def _number(value: Any, where: str) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}, no number")
    return value


def _require(have: Any, want: Any, where: str) -> None:
    if have != want:
        raise ValueError(f"{where} does not fit settings: {have!r}")
