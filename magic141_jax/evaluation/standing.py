"""How compared rows stand: a table, and a line for every later row that holds it against the first (the teacher).

The goal of a distilled sampler is to be at least as good as its teacher: `ASPECTS` says by which measures and by how
much it may fall short. Differences and ratios are formed seed by seed, on the same captions, first frames and noise,
so their deviation is that of the comparison, not of the captions. How sure a difference is, pairs of captions tell
(`paired`): where a comparison has values by caption, a second table holds them, with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from magic141_jax.evaluation.paired import Interval, interval
from magic141_jax.evaluation.report import COLUMNS, cell, markdown

BY_CAPTION = "by_caption"  # among the values of a kind: {measure: a value a caption}
KINDS = {"t2v": "T2V", "i2v": "I2V", "text": "T2V without a picture"}
GOAL = (
    "Goal: at least as good as the first row (within 1 point or 0.5 dB), at least 95 % of its motion and 85 % of its "
    "diversity, and video from text in at least 10 times less DiT time."
)
NOTES = (
    "Means over captions. Identity, *nearest*, motion: as in the model card. Fréchet distance, own features: of our 18 "
    "appearance and change statistics, to true clips of the same scenes; 0 is best, and it is comparable at equal "
    "numbers of captions only. Diversity: distance of samples of a caption under several noises, over the first row's "
    "(T2V: of the pictures). DiT seconds: the transformer alone, a clip, compiled, in batches of one size (T2V: "
    "picture and clip). Evaluations: of the network, a clip, both passes of guidance. DiT MB: what the transformer's "
    "parameters take on the device, 10^6 bytes. Bold: the best of a column, if its mean ± deviation lies apart from "
    "all others."
)
MORE_NOTES = {  # of what only some comparisons have measured
    "perceptual": "Perceptual distance, own features: to the true clip with the same first frame, frame by frame, of "
    "our 9 appearance and change features in 8 x 8 cells, in LPIPS's form; 0 is best.",
    "clip_text": "CLIP: 100 x cosine of embeddings of the published network that was given, means over frames. "
    "Perceptual and Fréchet distance by CLIP: of its last patch states, to the true clip; of all frames' embeddings, "
    "to those of true clips. They are no LPIPS and no FID: those are of other networks.",
    "video_frechet": "Fréchet distance by VideoMAE: of the published network that was given, clips to true clips. It "
    "is no FVD by I3D, and comparable at equal numbers of captions only.",
    "i3d_frechet": "Fréchet distance by I3D: FVD by the published network that was given, clips to true clips; "
    "comparable at equal numbers of captions, frames and sizes only.",
    BY_CAPTION: "Paired: differences to the first row over pairs of the same caption, first frame and noise, of all "
    "seeds, and the 95 % interval of the mean difference by the bootstrap; it does not cover the luck of a training. A "
    "difference is certain at 95 % where 0 (of ratios 100 %) lies outside. An interval of no width: no pair differs, "
    "which of n pairs still allows 3 / n of all. Bold: the whole interval is within the goal.",
}
ROUNDING = 1e-9


class Against(NamedTuple):
    """How a value is held against the first row's: what it makes of both, and how that is written."""

    of: Callable[[float, float], float]
    form: str
    unit: str


POINTS = Against(lambda a, b: 100 * (a - b), "{:+.1f}", "points")
DECIBELS = Against(lambda a, b: a - b, "{:+.1f}", "dB")
SCORE = Against(lambda a, b: a - b, "{:+.2f}", "of 100")
CHANGE = Against(lambda a, b: 100 * _ratio(a, b) - 100, "{:+.1f}", "% of the first row's")
PERCENT = Against(lambda a, b: 100 * _ratio(a, b), "{:.0f}", "%")
TIMES = Against(lambda a, b: _ratio(b, a), "{:.1f}", "times the speed")


class Column(NamedTuple):
    """A column of the table: its head, its measure, its form, which way is better (1 up, -1 down, 0 neither), whether
    it is relative to the first row, and how it is held against that where there are values by caption.
    """

    label: str
    measure: str
    form: str = "{:.2f}"
    better: int = 1
    relative: bool = False
    against: Any = None  # an `Against`, where there are values by caption


TABLE = (
    Column("identity, first", "first_identity", against=POINTS),
    Column("identity, last", "last_identity", against=POINTS),
    Column("nearest, first", "first_nearest", against=POINTS),
    Column("nearest, last", "last_nearest", against=POINTS),
    Column("colour, last", "last_colour", against=POINTS),
    Column("direction", "motion", against=POINTS),
    Column("PSNR of the first frame (dB)", "first_frame_psnr", "{:.1f}", against=DECIBELS),
    Column("amount of motion / the data's", "motion_amount", better=0, against=PERCENT),
    Column("diversity / the first row's", "diversity", better=0, relative=True, against=PERCENT),
    Column("Fréchet distance (own features)", "frechet", better=-1),
    Column("perceptual distance (own features)", "perceptual", "{:.3f}", -1, against=CHANGE),
    Column("CLIP, text to frames", "clip_text", "{:.1f}", against=SCORE),
    Column("CLIP, frames to the first", "clip_first", "{:.1f}", against=SCORE),
    Column("CLIP, neighbouring frames", "clip_neighbours", "{:.2f}", against=SCORE),
    Column("perceptual distance (CLIP)", "clip_perceptual", "{:.3f}", -1, against=CHANGE),
    Column("Fréchet distance of frames (CLIP)", "clip_frechet", better=-1),
    Column("Fréchet distance of clips (VideoMAE)", "video_frechet", better=-1),
    Column("Fréchet distance of clips (I3D)", "i3d_frechet", better=-1),
    Column("evaluations", "evaluations", "{:.0f}", better=0),
    Column("DiT seconds", "dit_seconds", "{:.3g}", better=0),
    Column("DiT MB", "dit_megabytes", "{:.1f}", better=0),
)


class Aspect(NamedTuple):
    """A measure that the goal is about: the least that `against` may give, in the kinds that the goal is about."""

    label: str
    measure: str
    against: Against
    least: float
    judged: tuple[str, ...] = ("t2v", "i2v", "text")


ASPECTS = (
    Aspect("identity in the first frame", "first_identity", POINTS, -1),
    Aspect("identity in the last", "last_identity", POINTS, -1),
    Aspect("colour", "last_colour", POINTS, -1),
    Aspect("direction", "motion", POINTS, -1),
    Aspect("first frame", "first_frame_psnr", DECIBELS, -0.5),
    Aspect("motion", "motion_amount", PERCENT, 95),
    Aspect("diversity", "diversity", PERCENT, 85),
    Aspect("DiT", "dit_seconds", TIMES, 10, ("t2v", "text")),
)


def section(results: Mapping[str, Any]) -> str:
    """What is printed: for each split the tables of its kinds, and below them how the later rows stand.

    `results` has `rows` (`compare.compare`), `settings` and `command`.
    """
    rows, lines = results["rows"], [facts(results["settings"])]
    for split in results["settings"]["splits"]:
        lines += ["", *tables(rows, split), "", *(f"- {line}" for line in standing_lines(rows, split))]
    return "\n".join([*lines, "", GOAL, "", *notes([rows])])


def notes(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines that say what the columns of the rows of some comparisons are."""
    values = [v for rows in comparisons for row in rows.values() for v in row["values"].values()]
    measured = {name for of in values for kinds in of.values() for found in kinds.values() for name in found}
    return [NOTES, *(line for name, note in MORE_NOTES.items() if name in measured for line in ("", note))]


def facts(settings: Mapping[str, Any]) -> str:
    """How many captions, noises and seeds the values come from."""
    seeds = ", ".join(map(str, settings["seeds"]))
    many = "; mean ± deviation over seeds" if len(settings["seeds"]) > 1 else ""
    return f"{settings['samples']} captions a seed, {settings['draws']} noises for diversity, seeds {seeds}{many}."


def tables(rows: Mapping[str, Any], split: str) -> list[str]:
    """The lines of the tables of a split, one or two for each of its kinds, under their names."""
    lines: list[str] = []
    for kind, name in KINDS.items():
        if kind in _by_seed(rows, split)[0][0]:
            lines += [*([""] if lines else []), f"{name}, {COLUMNS[split]}:", "", table(rows, split, kind)]
            lines += paired_lines(rows, split, kind)
    return lines


def table(rows: Mapping[str, Any], split: str, kind: str) -> str:
    """The markdown table of one split and kind, one row a line."""
    values = [[seed[kind] for seed in row] for row in _by_seed(rows, split)]
    columns = []
    for column in (c for c in TABLE if c.measure in values[0][0]):
        numbers = [[v[column.measure] for v in of] for of in values]
        if column.relative:
            numbers = [[_ratio(n, first) for n, first in zip(of, numbers[0], strict=True)] for of in numbers]
        cells = [spread(of, column.form) for of in numbers]
        best = beyond_spread(numbers, column.better)
        columns.append((column.label, [f"**{cell}**" if i == best else cell for i, cell in enumerate(cells)]))
    settings = [row["settings"] for row in rows.values()]
    columns[:0] = [
        ("", list(rows)),
        ("steps", [str(how["num_inference_steps"]) for how in settings]),
        ("guidance", [f"{how['guidance_scale']:g}" for how in settings]),
    ]
    head, cells = zip(*columns, strict=True)
    return markdown(head, list(zip(*cells, strict=True)))


def paired(rows: Mapping[str, Any], split: str, kind: str) -> dict[str, dict[str, Interval]]:
    """Of every later row, by label and measure: how it stands against the first, over captions of all seeds.

    Measures without values by caption are left out, and seeds that lack them (of older versions) add no pairs.
    """
    first, *others = ([seed[kind].get(BY_CAPTION, {}) for seed in row] for row in _by_seed(rows, split))
    found: dict[str, dict[str, Interval]] = {}
    for label, of in zip(list(rows)[1:], others, strict=True):
        found[label] = {}
        for column in (c for c in TABLE if c.against is not None):
            both = [
                (a[column.measure], b[column.measure])
                for a, b in zip(of, first)
                if column.measure in a and column.measure in b
            ]
            if both:
                ours, theirs = (np.concatenate(values) for values in zip(*both, strict=True))
                found[label][column.measure] = interval(ours, theirs, column.against.of)
    return found


def paired_lines(rows: Mapping[str, Any], split: str, kind: str) -> list[str]:
    """The table of `paired` under its name, after an empty line; nothing without values by caption."""
    found = paired(rows, split, kind)
    shown = [c for c in TABLE if any(c.measure in of for of in found.values())]
    if not shown:
        return []
    pairs = {found[label][c.measure].pairs for label in found for c in shown if c.measure in found[label]}
    several = f"{max(pairs)} pairs" if len(pairs) == 1 else f"{min(pairs)} to {max(pairs)} pairs"
    least = {aspect.measure: aspect.least for aspect in ASPECTS if kind in aspect.judged}
    head = ["", *(f"{c.label.removesuffix(' (dB)').split(' / ')[0]} ({c.against.unit})" for c in shown)]
    lines = []
    for label, of in found.items():
        cells = []
        for column in shown:
            value = of.get(column.measure)
            text = "–" if value is None else written(value, column.against.form)
            sure = value is not None and value.low < value.high  # no pair that differs is no certainty
            safe = value is not None and sure and value.low >= least.get(column.measure, math.inf) - ROUNDING
            cells.append(f"**{text}**" if safe else text)
        lines.append([label, *cells])
    return ["", f"Paired with {next(iter(rows))}, {several}, 95 % intervals:", "", markdown(head, lines)]


def written(value: Interval, form: str) -> str:
    """ "-1.2 [-4.0, +1.6]"; the mean alone where there is no interval."""
    if not math.isfinite(value.low + value.high):
        return cell(value.value, form)
    return f"{form.format(value.value)} [{form.format(value.low)}, {form.format(value.high)}]"


def beyond_spread(numbers: Sequence[Sequence[float]], better: int) -> int | None:
    """Which of some rows' values by seed is best by more than the deviations, mean ± deviation apart from all others.

    `better` is 1 where more is better, -1 where less is. None where none stands out, or one seed tells no deviation.
    """
    values = better * np.asarray(numbers, np.float64)
    if not better or values.shape[1] < 2 or len(values) < 2 or not np.isfinite(values).all():
        return None
    mean, deviation = values.mean(1), values.std(1, ddof=1)
    best = int(mean.argmax())
    others = np.delete(mean + deviation, best)
    return best if mean[best] - deviation[best] > others.max() + ROUNDING else None


def standings(rows: Mapping[str, Any], split: str) -> dict[str, dict[str, Any]]:
    """Of every later row, by label: `aspects` by "kind measure" (values by seed), `missed`, and whether all is `met`.

    Where there are values by caption, `paired` by "kind measure" too: value, low, high, pairs. A measure that a split
    lacks is left out; one that can't be held against the first row's (nan) is missed.
    """
    first, *others = _by_seed(rows, split)
    made = {}
    for label, of in zip(list(rows)[1:], others, strict=True):
        aspects, missed = {}, []
        for aspect in ASPECTS:
            for kind in (k for k in KINDS if aspect.measure in of[0].get(k, {})):
                pairs = zip(of, first, strict=True)
                found = [aspect.against.of(a[kind][aspect.measure], b[kind][aspect.measure]) for a, b in pairs]
                aspects[f"{kind} {aspect.measure}"] = found
                if kind in aspect.judged and not np.mean(found) >= aspect.least - ROUNDING:
                    missed.append(f"{KINDS[kind]} {aspect.label}")
        made[label] = {"aspects": aspects, "missed": missed, "met": not missed}
    for kind in (k for k in KINDS if k in first[0]):
        for label, found in paired(rows, split, kind).items():
            if found:
                listed = {f"{kind} {measure}": value._asdict() for measure, value in found.items()}
                made[label].setdefault("paired", {}).update(listed)
    return made


def standing_lines(rows: Mapping[str, Any], split: str) -> list[str]:
    """One line for every later row: how it stands against the first, and whether it meets the goal."""
    lines = []
    for label, found in standings(rows, split).items():
        parts = []
        for aspect in ASPECTS:
            of = {k: found["aspects"].get(f"{k} {aspect.measure}") for k in KINDS}
            told = [f"{KINDS[k]} {spread(v, aspect.against.form)}" for k, v in of.items() if v is not None]
            if told:
                parts.append(f"{aspect.label} {', '.join(told)} {aspect.against.unit}")
        verdict = "meets the goal" if found["met"] else f"misses the goal: {', '.join(found['missed'])}"
        lines.append(f"{label} against {next(iter(rows))}: {'; '.join(parts)}. **{verdict}**")
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """The mean of the values of all seeds, ± their sample deviation where there are two or more; counts have none."""
    mean = cell(float(np.mean(values)), form)
    if len(values) < 2 or isinstance(values[0], int) or not math.isfinite(np.sum(values)):
        return mean
    return f"{mean} ± {cell(float(np.std(values, ddof=1)), form.replace('+', ''))}"


def _by_seed(rows: Mapping[str, Any], split: str) -> list[list[Mapping[str, Any]]]:
    """The values of a split: [row][seed], by kind and measure."""
    return [list(row["values"][split].values()) for row in rows.values()]


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
