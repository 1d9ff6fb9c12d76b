"""What a compiled step tells, for people: lines for the terminal, and rows of docs/layouts.md from saved results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magic141_jax.aot.topology import GIB
from magic141_jax.errors import UserError

MARKERS = ("<!-- layouts:begin -->", "<!-- layouts:end -->")
COLUMNS = (
    "config, slice",
    "mesh",
    "clip a chip",
    "frozen",
    "trained",
    "arguments",
    "temporaries",
    "needed / HBM",
    "verdict",
    "10^15 operations a chip",
    "seconds at peak",
    "collectives",
    "compiled in",
)
UNKNOWN = "-"


def summary(results: Mapping[str, Any]) -> str:
    """The lines that the command prints, sizes in GiB on each chip."""
    lines = [f"{results['config']} on {results['topology']}: {results['chips']} chips, mesh {_mesh(results)}"]
    lines.append(f"step 0 of {results['method']} updates {' and '.join(results['roles'])}; {_clip(results)} a chip")
    lines += [f"  {name:<24}{_gib(size):>10}" for name, size in results["held"].items()]
    lines.append(f"  {'between steps, in all':<24}{_gib(sum(results['held'].values())):>10} GiB on a chip")
    lines += [f"  {name:<24}{_gib(size):>10}" for name, size in results.get("memory", {}).items()]
    for kind, found in results.get("collectives", {}).items():
        lines.append(f"  {kind:<24}{_gib(found['bytes']):>10} GiB in {found['count']}")
    lines.append(f"  {'10^15 operations a chip':<24}{_operations(results):>10}")
    lines.append(f"  {'seconds at peak':<24}{results['seconds_at_peak']:>10.3g}")
    if "refused" in results:
        lines.append(f"the compiler refuses: {results['refused']}")
    return "\n".join([*lines, f"{_verdict(results)}: {_needed(results)} GiB needed / of a chip"])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row a result; GiB are of one chip."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| --- | --- | --- |" + " ---: |" * 5 + " --- | ---: | ---: | --- | ---: |",
    ]
    return "\n".join([*lines, *("| " + " | ".join(_row(r)) + " |" for r in results)])


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The results saved in a folder, in order of their file names.

    Raises:
      UserError: no folder, no results in it, or a file that holds something else.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"no results (*.json) in {folder}; make some with --json {folder / 'name.json'}")
    found = []
    for file in files:
        try:
            found.append(json.loads(file.read_text()))
            _row(found[-1])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} holds no results of this command; remove it or make it anew") from None
    return found


def _row(results: Mapping[str, Any]) -> list[str]:
    held, memory = results["held"], results.get("memory", {})
    frozen = sum(size for name, size in held.items() if name.endswith("frozen"))
    trained = sum(size for name, size in held.items() if ", " in name) - frozen
    collectives = [
        f"{kind} {found['count']} ({_gib(found['bytes'])})" for kind, found in results.get("collectives", {}).items()
    ]
    seconds = results.get("seconds", {}).get("compile")
    return [
        f"{results['config']}, {results['topology']}",
        _mesh(results),
        _clip(results),
        _gib(frozen),
        _gib(trained),
        _gib(memory.get("arguments")),
        _gib(memory.get("temporaries")),
        _needed(results),
        _verdict(results),
        _operations(results),
        f"{results['seconds_at_peak']:.3g}",
        ", ".join(collectives) or UNKNOWN,
        UNKNOWN if seconds is None else f"{seconds:.0f} s",
    ]


def _mesh(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in results["mesh"].items() if size > 1) or "one chip"


def _clip(results: Mapping[str, Any]) -> str:
    frames, height, width = results["clip"]
    return f"{results['samples']:g} of {height}x{width}x{frames}"


def _needed(results: Mapping[str, Any]) -> str:
    return f"{_gib(results.get('memory', {}).get('total'))} / {_gib(results['chip_memory'])}"


def _operations(results: Mapping[str, Any]) -> str:
    return f"{results['flops'] / results['chips'] / 1e15:.3g}"


def _verdict(results: Mapping[str, Any]) -> str:
    return {True: "fits", False: "does not fit", None: "not compiled"}[results.get("fits")]


def _gib(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.1g}"
