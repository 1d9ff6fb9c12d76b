"""What compiled programs tell, for people: lines for the terminal, and tables of docs/layouts.md from saved results.

Results that were saved before there were programs other than "train", or without their times, are read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from magic141_jax import sharding
from magic141_jax.aot import verdict
from magic141_jax.aot.topology import GIB
from magic141_jax.errors import UserError
from magic141_jax.evaluation.report import markdown

MARKERS = ("<!-- layouts:begin -->", "<!-- layouts:end -->")
CLIP_MARKERS = ("<!-- clips:begin -->", "<!-- clips:end -->")
WAITS = ("operations", "hbm", "interconnect")
TOTALS = ("roofline", "expected", "sum")
COLUMNS = (
    "config, slice",
    "program",
    "mesh",
    "clips at once",
    "held",
    "temporaries",
    "needed / HBM",
    "verdict",
    "what takes most",
    "roofline, s",
    "expected, s",
    "operations / HBM / links, s",
    "collectives",
    "compiled in",
)
STAGES = ("text", "encode", "sampler", "decode")
NEEDED_STAGES = {"encode", "sampler", "decode"}
CLIP_COLUMNS = (
    "config, slice",
    "mesh",
    "verdict",
    "clip",
    "roofline, s a clip",
    "expected, s a clip",
    "without overlap, s a clip",
    "seconds of video a second",
)
UNKNOWN = "-"


def summary(results: Mapping[str, Any]) -> str:
    """The lines that the command prints, sizes in GiB on each chip."""
    lines = [f"{results['config']} on {results['topology']}: {results['chips']} chips, mesh {_mesh(results)}"]
    held = f", kernels in {results['kernels']}" if "kernels" in results else ""
    lines.append(f"{_program(results)}: {_what(results)}{held}; {_clip(results)} at once")
    lines += [_line(name, _gib(size)) for name, size in results["held"].items()]
    lines.append(f"{_line('held, in all', _gib(_held(results)))} GiB on a chip")
    lines += [_line(name, _gib(size)) for name, size in results.get("memory", {}).items()]
    for kind, found in results.get("collectives", {}).items():
        lines.append(f"{_line(kind, _gib(found['bytes']))} GiB in {found['count']}")
    lines.append(_line("10^15 operations a chip", f"{results['flops'] / results['chips'] / 1e15:.3g}"))
    lines += [_line(f"seconds, {name}", _seconds(seconds)) for name, seconds in _times(results).items()]
    if "refused" in results:
        lines.append(f"the compiler refuses: {results['refused']}")
    lines.append(f"{_verdict(results)}: {_needed(results)} GiB needed / of a chip")
    return "\n".join([*lines, *(f"  {part}" for part in _reasons(results))])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, a row a result; GiB are of one chip."""
    return markdown(COLUMNS, [_row(each) for each in results])


def clips(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of seconds per clip, a row for each slice and mesh whose encode, sampler and decode are known,
    with kernels as arrays.

    The seconds of the stages of one call are added: encode + sampler + decode, and text before them where it is known.
    The last column is how many seconds of video are made in a second, by the expected time. Empty without such a row.
    """
    groups: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for each in results:
        if _program(each) in STAGES and "roofline" in _times(each) and "kernels" not in each:
            key = (each["config"], each["topology"], _mesh(each), _size(each))
            groups.setdefault(key, {})[_program(each)] = each
    whole = [group for group in groups.values() if group.keys() >= NEEDED_STAGES]
    whole.sort(key=lambda group: (group["sampler"]["config"], group["sampler"]["chips"]))
    return markdown(CLIP_COLUMNS, [_clip_row(group) for group in whole]) if whole else ""


def _clip_row(group: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ordered = [group[name] for name in STAGES if name in group]
    sums, cells = {}, []
    for total in TOTALS:
        parts = [_times(each)[total] / _clips(each) for each in ordered]
        sums[total] = sum(parts)
        cells.append(f"{' + '.join(map(_seconds, parts))} = {_seconds(sums[total])}")
    one = group["sampler"]
    lasts = one["clip"][0] / one["fps"]
    return [
        f"{one['config']}, {one['topology']}",
        _mesh(one),
        "fits" if all(each["fits"] for each in ordered) else "does not fit",
        f"{_size(one)}, {lasts:.2f} s",
        *cells,
        f"{lasts:.2f} / {_seconds(sums['expected'])} = {lasts / sums['expected']:.2f}",
    ]


def shardings(held: Mapping[str, Any]) -> str:
    """A Markdown table of trees of shape structs by name: shape and place of each leaf, and its size on a chip.

    A place names the mesh axes that each dimension is split over.
    """
    rows = []
    for name, tree in held.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            place = sharding.spec_text(leaf.sharding.spec) if any(leaf.sharding.spec) else "copied"
            size = sharding.bytes_per_device(leaf, leaf.sharding) / 2**20
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            array = jax.tree_util.keystr(path, simple=True, separator=".")
            rows.append([name, array, shape, str(leaf.dtype), place, f"{size:.4g}"])
    return markdown(("what", "array", "shape", "dtype", "split over", "MiB a chip"), rows)


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
    collectives = [
        f"{kind} {found['count']} ({_gib(found['bytes'])})" for kind, found in results.get("collectives", {}).items()
    ]
    times, compiled_in = _times(results), results.get("seconds", {}).get("compile")
    return [
        f"{results['config']}, {results['topology']}",
        ", ".join(filter(None, (_program(results), results.get("kernels")))),
        _mesh(results),
        _clip(results),
        _gib(_held(results)),
        _gib(results.get("memory", {}).get("temporaries")),
        _needed(results),
        _verdict(results),
        "; ".join(_reasons(results)) or UNKNOWN,
        *(_seconds(times.get(name)) for name in ("roofline", "expected")),
        " / ".join(_seconds(times.get(name)) for name in WAITS),
        ", ".join(collectives) or UNKNOWN,
        UNKNOWN if compiled_in is None else f"{compiled_in:.0f} s",
    ]


def _program(results: Mapping[str, Any]) -> str:
    return results.get("program", "train")


def _what(results: Mapping[str, Any]) -> str:
    return results.get("what") or f"step 0 of {results['method']} updates {' and '.join(results['roles'])}"


def _times(results: Mapping[str, Any]) -> Mapping[str, float]:
    return results.get("roofline") or {"operations": results["seconds_at_peak"]}


def _reasons(results: Mapping[str, Any]) -> list[str]:
    found = results.get("reasons") or (verdict.reasons(results) if "fits" in results else [])
    return [f"{reason['what']} {_gib(reason['bytes'])}" for reason in found]


def _held(results: Mapping[str, Any]) -> int:
    return sum(results["held"].values())


def _mesh(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in results["mesh"].items() if size > 1) or "one chip"


def _size(results: Mapping[str, Any]) -> str:
    frames, height, width = results["clip"]
    return f"{height}x{width}x{frames}"


def _clips(results: Mapping[str, Any]) -> float:
    return results["samples"] * results["chips"]


def _clip(results: Mapping[str, Any]) -> str:
    return f"{_clips(results):g} of {_size(results)}"


def _needed(results: Mapping[str, Any]) -> str:
    return f"{_gib(results.get('memory', {}).get('total'))} / {_gib(results['chip_memory'])}"


def _verdict(results: Mapping[str, Any]) -> str:
    return {True: "fits", False: "does not fit", None: "not compiled"}[results.get("fits")]


def _line(name: str, value: str) -> str:
    return f"  {name:<24}{value:>10}"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _gib(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.1g}"
