"""Curves as an SVG file: quality over the rows of a comparison (`draw`), values by window, what training logged.

    draw         quality against training steps, evaluations or memory
    over_time    a long video's values, window by window
    training     losses and other scalars of runs, step by step

Of a comparison, rows named NAME@STEP are the points of one line NAME:

    axis "steps"         x is STEP; a row without one is a level that the lines are held against
    axis "evaluations"   x is measured: evaluations of the network a clip (`compare.evaluations`)
    axis "megabytes"     x is measured: bytes of the transformer; rows need no STEP

A point is the mean over seeds, and the band around a line one sample deviation to both sides. The same values make the
same file, byte by byte.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from magic141_jax.errors import UserError, nearest
from magic141_jax.evaluation.standing import KINDS, TABLE, paired

Axis = Literal["steps", "evaluations", "megabytes"]

AXES = {
    "steps": "training steps",
    "evaluations": "evaluations of the network a clip",
    "megabytes": "MB of the transformer",
}
MEASURED = {"evaluations": "evaluations", "megabytes": "dit_megabytes"}
MEASURES = ("last_identity", "motion", "frechet")
PANEL_INCHES = (3.6, 2.7)
STYLE = {"svg.hashsalt": "magic141_jax", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
MARKERS = "os^Dv<>P"
_STEP = re.compile(r"(.+)@(\d+)")


class Line(NamedTuple):
    """Points of one name in order of x: (n,) and their values (n, seeds); a level has x = None and n = 1."""

    name: str
    x: np.ndarray | None
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(n,) over seeds."""
        return self.values.mean(1)

    @property
    def deviation(self) -> np.ndarray:
        """(n,) over seeds; zero for one seed."""
        return self.values.std(1, ddof=1) if self.values.shape[1] > 1 else np.zeros(len(self.values))


def split_label(label: str) -> tuple[str, int | None]:
    """ "i2v@100" -> ("i2v", 100); a label without a step has None."""
    match = _STEP.fullmatch(label)
    return (match[1].strip(), int(match[2])) if match else (label, None)


def lines(rows: Mapping[str, Any], split: str, kind: str, *, measure: str, axis: Axis) -> list[Line]:
    """The lines of one panel, in order of their first rows."""
    points: dict[str, list[tuple[float | None, list[float]]]] = {}
    for label, row in rows.items():
        name, step = split_label(label)
        values = [seed[kind] for seed in row["values"][split].values()]
        x = step if axis == "steps" else values[0][MEASURED[axis]]
        points.setdefault(name, []).append((x, [v[measure] for v in values]))
    found = []
    for name, of in points.items():
        levels = [values for x, values in of if x is None]
        found += [Line(name, None, np.asarray([values], np.float64)) for values in levels]
        of = sorted(((x, values) for x, values in of if x is not None), key=lambda point: point[0])
        if of:
            x, values = zip(*of, strict=True)
            found.append(Line(name, np.asarray(x), np.asarray(values, np.float64)))
    return found


def draw(rows: Mapping[str, Any], split: str, *, axis: Axis, measures: Sequence[str] = MEASURES) -> str:
    """The SVG of one split: a row of panels for each kind of clip, a column for each measure.

    Args:
      rows: of a comparison (`record`).
      split: one of its splits.
      axis: what x is.
      measures: of `standing.TABLE`; one that a kind lacks leaves its panel empty.

    Raises:
      UserError: matplotlib isn't installed, nothing of `measures` was measured, or no row has a step although x is one.
    """
    matplotlib, figure_class = _matplotlib()
    if axis == "steps" and all(split_label(label)[1] is None for label in rows):
        raise UserError(f"no row is named NAME@STEP, so there is no curve to draw; the rows are {', '.join(rows)}")
    first = next(iter(next(iter(rows.values()))["values"][split].values()))
    kinds = [kind for kind in KINDS if set(measures) & set(first.get(kind, ()))]
    if not kinds:
        raise UserError(f"the comparison has none of the measures to plot: {', '.join(measures)}")
    size = (PANEL_INCHES[0] * len(measures), PANEL_INCHES[1] * len(kinds) + 0.4)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = figure_class(figsize=size, layout="constrained")
        panels = figure.subplots(len(kinds), len(measures), squeeze=False)
        for kind, of in zip(kinds, panels, strict=True):
            for measure, panel in zip(measures, of, strict=True):
                if measure in first[kind]:
                    _fill(panel, lines(rows, split, kind, measure=measure, axis=axis), axis)
                    panel.set_title(f"{KINDS[kind]}: {_label(measure)}", fontsize=9)
                else:
                    panel.set_axis_off()
        told = [zip(*reversed(panel.get_legend_handles_labels()), strict=True) for panel in panels.flat]
        names = {name: handle for pairs in told for name, handle in pairs}
        figure.legend(names.values(), names, loc="outside upper center", ncols=6, frameon=False)
        return _svg(figure)


def over_time(
    rows: Mapping[str, Mapping[str, Sequence[float]]], seconds: float, *, labels: Mapping[str, str], columns: int = 4
) -> str:
    """The SVG of values by window: a panel for each measure, a curve for each row.

    Args:
      rows: {label: {measure: a value for each window}}, such as `drift.measure_drift` makes.
      seconds: of the whole, whatever number of windows a row takes for it.
      labels: {measure: title of its panel}: what is drawn.
      columns: panels side by side.

    Raises:
      UserError: matplotlib isn't installed.
    """

    def curve(values: Sequence[float]) -> tuple[Any, Any]:
        return seconds * np.arange(1, len(values) + 1) / len(values), values

    curves = {
        title: {label: curve(windows[measure]) for label, windows in rows.items()} for measure, title in labels.items()
    }
    return _grid(curves, "seconds", columns)


def training(runs: Mapping[str, Sequence[Mapping[str, float]]], names: Sequence[str] = (), *, columns: int = 3) -> str:
    """The SVG of what training runs logged, by step: a panel for each scalar, a curve for each run.

    Args:
      runs: {label: lines of its metrics.jsonl, from `train.metrics.read`}.
      names: scalars to draw; all that any run has unless given.
      columns: panels side by side.

    Raises:
      UserError: matplotlib isn't installed, no run has logged a line yet, or none has a scalar of such a name.
    """
    found = sorted({name for of in runs.values() for line in of for name in line} - {"step", "time"})
    if not found:
        raise UserError(f"nothing to draw: no line is logged yet by {', '.join(runs)}")
    for name in names:
        if name not in found:
            raise UserError(f"no run has logged {name!r}.{nearest(name, found)}")
    curves: dict[str, dict[str, Any]] = {}
    for name in names or found:
        points = {label: [(line["step"], line[name]) for line in of if name in line] for label, of in runs.items()}
        curves[name] = {label: tuple(zip(*of)) for label, of in points.items() if of}
    return _grid(curves, AXES["steps"], columns)


def _grid(curves: Mapping[str, Mapping[str, tuple[Any, Any]]], across: str, columns: int) -> str:
    """The SVG of {title: {label: (x, y)}}: a panel for each title, with the same colour for a label in all of them."""
    matplotlib, figure_class = _matplotlib()
    columns = min(columns, len(curves))
    height = -(-len(curves) // columns)
    labels = dict.fromkeys(label for of in curves.values() for label in of)
    colours = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = figure_class(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * height + 0.4), layout="constrained")
        panels = list(figure.subplots(height, columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for panel, (title, of) in zip(panels, curves.items()):
            for label, (x, y) in of.items():
                marker = "." if len(x) == 1 else ""  # a line of one point is invisible
                (line,) = panel.plot(x, np.asarray(y, np.float64), color=colours[label], marker=marker)
                handles.setdefault(label, line)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel(across)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=6, frameon=False)
        return _svg(figure)


def intervals(rows: Mapping[str, Any], split: str) -> str:
    """The SVG of paired differences to the first row with their intervals (`standing.paired`).

    A line of panels for each kind of clip, a panel for each unit, a point for each measure and later row; where nothing
    differs is a dashed line.

    Raises:
      UserError: matplotlib isn't installed.
    """
    matplotlib, figure_class = _matplotlib()
    found = {kind: paired(rows, split, kind) for kind in KINDS if _has_kind(rows, split, kind)}
    columns = {column.measure: column for column in TABLE}
    units = list(dict.fromkeys(columns[m].against.unit for of in found.values() for row in of.values() for m in row))
    shape = max(len(found), 1), max(len(units), 1)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = figure_class(figsize=(PANEL_INCHES[0] * shape[1], PANEL_INCHES[1] * shape[0]), layout="constrained")
        panels = figure.subplots(*shape, squeeze=False)
        for (kind, of), line in zip(found.items(), panels):
            for unit, panel in zip(units, line):
                measures = [m for m in columns if any(m in row for row in of.values())]
                measures = [m for m in measures if columns[m].against.unit == unit]
                if measures:
                    _draw_intervals(panel, of, measures, same=columns[measures[0]].against.of(1.0, 1.0))
                    panel.set_title(f"{KINDS[kind]}, {unit}", fontsize=9)
                else:
                    panel.set_axis_off()
        names = {name: h for panel in panels.flat for h, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        if names:
            figure.legend(names.values(), names, loc="outside upper center", ncols=6, frameon=False)
        return _svg(figure)


def _draw_intervals(panel: Any, rows: Mapping[str, Any], measures: Sequence[str], *, same: float) -> None:
    """A line a measure, on it a point with its interval for each row; dashed where nothing differs, at `same`."""
    for i, (label, row) in enumerate(rows.items()):
        y = np.arange(len(measures)) + 0.2 * (i - (len(rows) - 1) / 2)
        values = np.array([row[m][:3] for m in measures], np.float64).T
        errors = np.nan_to_num(np.abs(values[1:] - values[0]))
        panel.errorbar(values[0], y, xerr=errors, fmt="o", capsize=3, color=f"C{i % 10}", label=label)
    panel.axvline(same, color="grey", linestyle="--", linewidth=1)
    panel.set_yticks(range(len(measures)), [_label(m).split(" / ")[0] for m in measures])
    panel.set_ylim(len(measures) - 0.5, -0.5)


def _has_kind(rows: Mapping[str, Any], split: str, kind: str) -> bool:
    return all(kind in seed for row in rows.values() for seed in row["values"][split].values())


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install -r requirements-dev.txt") from None
    return matplotlib, Figure


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _fill(panel: Any, found: Sequence[Line], axis: Axis) -> None:
    """Draws the lines of one panel, each with its band; levels are dashed over the whole width."""
    for i, line in enumerate(found):
        low, high = line.mean - line.deviation, line.mean + line.deviation
        colour, marker = f"C{i % 10}", MARKERS[i % len(MARKERS)]
        if line.x is None:
            panel.axhline(line.mean[0], color=colour, linestyle="--", label=line.name)
            panel.axhspan(low[0], high[0], color=colour, alpha=0.15, linewidth=0)
        else:
            panel.plot(line.x, line.mean, color=colour, marker=marker, markersize=4, label=line.name)
            panel.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if axis == "evaluations":
        ticks = sorted({int(x) for line in found if line.x is not None for x in line.x})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(x) for x in ticks])
        panel.minorticks_off()
    panel.set_xlabel(AXES[axis])


def _label(measure: str) -> str:
    return next(column.label for column in TABLE if column.measure == measure)
