"""The page of experiments: tables and plots, made from logged comparisons (`compare --output`) and nothing else.

    RESULTS/index.toml    title, text and [[experiment]]: what was asked, how to repeat it (see `Experiment`)
    RESULTS/NAME.json     what `compare --output` wrote for the experiment with file = "NAME.json"
    DOCS/experiments.md   is made of them (or `page` of the index), with DOCS/experiments/NAME-SPLIT.svg for curves

The same results make the same page, byte by byte.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from magic141_jax import settings
from magic141_jax.errors import UserError, nearest
from magic141_jax.evaluation import plots, record, report, standing
from magic141_jax.evaluation.report import COLUMNS

INDEX, PAGE, PLOTS = "index.toml", "experiments.md", "experiments"
MADE_BY = "Made by `python -m magic141_jax.evaluation page` from the values in {results}; every number stands there."


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment as the index tells it.

    Attributes:
      file: the comparison beside the index, NAME.json; it may be missing, if the experiment hasn't been run yet.
      title: a line.
      text: what is asked and what the rows are; Markdown.
      commands: everything that makes the file, one line each.
      plot: the x axis of its curves (see `plots`), or "" for none.
      measures: what is plotted, names of `compare`.
      goal: whether the later rows are held against the first one and the project's goal.
    """

    file: str
    title: str
    text: str
    commands: tuple[str, ...]
    plot: Literal["", "steps", "evaluations", "megabytes"] = ""
    measures: tuple[str, ...] = plots.MEASURES
    goal: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+\.json", self.file):
            raise UserError(f"file is {self.file!r}; it must be the name of a JSON file beside the index")
        known = [column.measure for column in standing.TABLE]
        for measure in self.measures:
            if measure not in known:
                raise UserError(f"{self.file}: there is no measure {measure!r} to plot.{nearest(measure, known)}")


@dataclasses.dataclass(frozen=True)
class Index:
    """The index: the page's title, its opening text (Markdown), its experiments in their order, and its file name."""

    title: str
    text: str
    experiment: tuple[Experiment, ...]
    page: str = PAGE


def write(results: Path, docs: Path) -> list[Path]:
    """Writes the page and its plots into the folder `docs`; returns their paths.

    Raises:
      UserError: a missing folder or index; no results; a comparison that is damaged or that the index doesn't name.
    """
    index = read_index(results)
    found = read_results(results, index)
    if not docs.is_dir():
        raise UserError(f"no folder {docs} to write {index.page} into")
    if not results.resolve().is_relative_to(docs.resolve()):
        raise UserError(f"{results} is not below {docs}, so the page can't link to its values; move it there")
    files: dict[str, str] = {}
    for experiment in (e for e in index.experiment if e.file in found):
        files |= _plots(experiment, found[experiment.file])
    files[index.page] = text(index, found, where=results.resolve().relative_to(docs.resolve()).as_posix())
    for name, content in files.items():
        (docs / name).parent.mkdir(exist_ok=True)
        report.write(docs / name, content)
    return [docs / name for name in files]


def read_index(results: Path) -> Index:
    """Reads the index of a results folder; raises `UserError` where it is missing, malformed or names a file twice."""
    path = results / INDEX
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}: it names the experiments of a page, as evaluation/page.py says") from None
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None
    index = settings.build(Index, values, where=INDEX)
    files = [experiment.file for experiment in index.experiment]
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"{path} has {files.count(file)} experiments of the file {file}; each needs its own")
    return index


def read_results(results: Path, index: Index) -> dict[str, dict[str, Any]]:
    """The comparisons of a results folder by file name; every one must be in the index, and one at least be there."""
    files = sorted(path.name for path in results.glob("*.json"))
    known = [experiment.file for experiment in index.experiment]
    for file in files:
        if file not in known:
            raise UserError(f"{results / file} is no experiment of {INDEX}; add an [[experiment]] with its file")
    if not files:
        raise UserError(f"no results in {results} yet; the commands in {INDEX} make them")
    return {file: record.read(results / file) for file in files}


def text(index: Index, found: Mapping[str, Mapping[str, Any]], *, where: str) -> str:
    """The page as Markdown; `where` is the results folder, as seen from the page."""
    lines = [f"# {index.title}", "", index.text.strip(), "", MADE_BY.format(results=f"[{where}]({where})")]
    for experiment in index.experiment:
        lines += ["", f"## {experiment.title}", "", experiment.text.strip(), ""]
        made = found.get(experiment.file)
        lines += ["Not run yet."] if made is None else _body(experiment, made, f"{where}/{experiment.file}")
        if experiment.commands:
            shell = ["<!-- needs: hours -->", "```sh", *(c.strip() for c in experiment.commands), "```"]
            lines += ["", "To repeat it:", "", *shell]
    lines += ["", "## What the columns are", "", *standing.notes([made["rows"] for made in found.values()])]
    if any(e.goal for e in index.experiment):
        lines += ["", standing.GOAL]
    return "\n".join(lines) + "\n"


def provenance(made: Mapping[str, Mapping[str, Any]]) -> str:
    """On what, when and with which versions the seeds of a comparison were measured; each that differs is named."""
    dates = sorted({m["date"] for m in made.values()})
    devices = sorted({m["device"] for m in made.values()})
    versions = sorted({", ".join(f"{k} {v}" for k, v in m["versions"].items()) for m in made.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{' and '.join(devices)}, {when}; {' and '.join(versions)}."


def _body(experiment: Experiment, made: Mapping[str, Any], link: str) -> list[str]:
    """The lines of one experiment with results: facts, then for each split tables, plot and standing."""
    lines = [f"{standing.facts(made['settings'])} {provenance(made['made'])} [Values]({link})."]
    for split in made["settings"]["splits"]:
        lines += ["", *standing.tables(made["rows"], split)]
        if experiment.plot:
            words = f"{experiment.title}, {COLUMNS[split]}, against {plots.AXES[experiment.plot]}"
            lines += ["", f"![{words}]({_plot_path(experiment, split)})"]
        if experiment.goal:
            lines += ["", *(f"- {line}" for line in standing.standing_lines(made["rows"], split))]
    return lines


def _plots(experiment: Experiment, made: Mapping[str, Any]) -> dict[str, str]:
    """The plots of one experiment, by their paths from the page."""
    if not experiment.plot:
        return {}
    drawn = {}
    for split in made["settings"]["splits"]:
        try:
            svg = plots.draw(made["rows"], split, axis=experiment.plot, measures=experiment.measures)
        except UserError as error:
            raise UserError(f"{experiment.file}: {error}") from None
        drawn[_plot_path(experiment, split)] = svg
    return drawn


def _plot_path(experiment: Experiment, split: str) -> str:
    return f"{PLOTS}/{experiment.file.removesuffix('.json')}-{split}.svg"
