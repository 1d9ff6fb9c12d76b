"""A report that others can read and repeat: two samplers side by side, from a comparison (`record`) and its clips.

    DIR/comparison.json    all values, and those of each caption; the report is made of it and of the clips alone
    DIR/videos/*.webp      first captions of the first seed, rows side by side, beside the true clip where there is one
    DIR/plots/*.svg        paired differences with their intervals
    DIR/report.md, .html   the same text; the HTML holds plots and videos in itself, and loads nothing

Started again, it goes on with the seeds that are missing, as `compare` does.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from magic141_jax.errors import UserError
from magic141_jax.evaluation import networks, page, plots, report, standing
from magic141_jax.evaluation.compare import Made
from magic141_jax.evaluation.protocol import Clips
from magic141_jax.pipelines import media

RECORD, TEXT, PAGE, VIDEOS, PLOTS = "comparison.json", "report.md", "report.html", "videos", "plots"
TRUE = "true clip"
SHOWN_SIDE = 160  # pixels of a clip in a video, about
TYPES = {".svg": "image/svg+xml", ".webp": "image/webp"}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}"
    "td,th{border-bottom:1px solid #ccc;padding:.2rem .6rem;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}pre{overflow-x:auto;background:#f4f4f4;padding:.6rem}"
)


class Videos:
    """Writes the first clips of all rows side by side, as rows are made; to be given to `compare.compare` as `show`.

    Files are DIR/videos/SPLIT-KIND-NUMBER.webp, of one seed.
    """

    def __init__(self, folder: Path, labels: Sequence[str], *, seed: int, count: int, fps: float) -> None:
        self.folder, self.labels, self.seed, self.count, self.fps = folder, tuple(labels), seed, count, fps
        self._made: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, seed: int, split: str, label: str, clips: Clips, made: Made) -> None:
        """Keeps what a row made, and writes the files of a split when its last row is there."""
        if seed != self.seed or not self.count:
            return
        for kind, frames in made.clips.items():
            self._made.setdefault(kind, {})[label] = frames[: self.count].copy()
        if label != self.labels[-1]:
            return
        (self.folder / VIDEOS).mkdir(parents=True, exist_ok=True)
        for kind, rows in self._made.items():
            true = {TRUE: clips.made["truth"][: self.count]} if kind == "i2v" else {}
            for i, caption in enumerate(clips.captions[: self.count]):
                frames = side_by_side({name: of[i] for name, of in {**true, **rows}.items()})
                path = self.folder / VIDEOS / f"{split}-{kind}-{i}.webp"
                about = {"prompt": caption, "seed": seed, "rows": [*true, *rows]}
                with media.staged(path) as (new,), media.BackgroundWriter(new, self.fps, about) as writer:
                    writer.write(frames)
        self._made = {}


def side_by_side(clips: Mapping[str, np.ndarray]) -> np.ndarray:
    """Clips (t, y, x, 3) in [0, 1] by label -> one clip of them in a row, enlarged, each under its label."""
    height, width = next(iter(clips.values())).shape[1:3]
    scale = max(1, SHOWN_SIDE // height)
    labels = Image.new("RGB", (width * scale * len(clips), report.LABEL_HEIGHT), "white")
    for i, label in enumerate(clips):
        ImageDraw.Draw(labels).text((i * width * scale + 3, 1), label[: width * scale // 6], fill="black")
    head = np.asarray(labels, np.float32) / 255
    frames = [
        np.concatenate([media.enlarge(clip[t], scale) for clip in clips.values()], axis=1).astype(np.float32) / 255
        for t in range(len(next(iter(clips.values()))))
    ]
    return np.stack([np.concatenate([head, frame]) for frame in frames])


def write(folder: Path, found: Mapping[str, Any], sources: Mapping[str, str]) -> list[Path]:
    """Writes plots, report.md and report.html of a record into its folder; returns the two texts' paths.

    Args:
      folder: with `videos`, as far as they were made.
      found: a record of at least one seed.
      sources: what each row was loaded from, by label, as others may read it.

    Raises:
      UserError: matplotlib or Markdown isn't installed.
    """
    require_packages()
    (folder / PLOTS).mkdir(exist_ok=True)
    for split in found["settings"]["splits"]:
        report.write(folder / PLOTS / f"{split}.svg", plots.intervals(found["rows"], split))
    written = text(found, sources, videos=sorted(path.name for path in (folder / VIDEOS).glob("*.webp")), folder=folder)
    report.write(folder / TEXT, written)
    report.write(folder / PAGE, to_html(written, folder))
    return [folder / TEXT, folder / PAGE]


def require_packages() -> None:
    """Raises `UserError` unless what draws and writes is installed: before anything is measured."""
    try:
        import markdown  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install -r requirements-dev.txt") from None


def text(found: Mapping[str, Any], sources: Mapping[str, str], *, videos: Sequence[str], folder: Path) -> str:
    """The report as Markdown; `videos` are file names of `folder`/videos."""
    rows, settings = found["rows"], found["settings"]
    first, *others = rows
    lines = [f"# {' and '.join(others)} against {first}", ""]
    lines += [
        f"On the same captions, first frames and noise. {standing.facts(settings)}",
        "",
        _row_table(rows, sources),
    ]
    for split in settings["splits"]:
        lines += ["", f"## {report.COLUMNS[split].capitalize()}", ""]
        lines += [f"- {line}" for line in certain(rows, split)]
        lines += ["", f"![Paired differences, {report.COLUMNS[split]}]({PLOTS}/{split}.svg)", ""]
        lines += standing.tables(rows, split)
        for kind, name in standing.KINDS.items():
            shown = [video for video in videos if video.startswith(f"{split}-{kind}-")]
            if shown:
                lines += ["", f"### {name}: {', '.join(([TRUE] if kind == 'i2v' else []) + list(rows))}", ""]
            for video in shown:
                caption = media.read_metadata(folder / VIDEOS / video)["prompt"]
                lines += [f"{caption}", "", f"![{caption}]({VIDEOS}/{video})", ""]
    lines += ["", "## What the columns are", "", *standing.notes([rows])]
    judges = [f"{name} `{settings[name]}`" for name in networks.NAMES if name in settings]
    given = f"Published networks that judged: {', '.join(judges)}." if judges else "No published network judged."
    lines += ["", "## How to repeat it", "", page.provenance(found["made"]), given]
    lines += ["", f"All values: [{RECORD}]({RECORD}).", "", "```sh", found["command"], "```"]
    return "\n".join(lines) + "\n"


def certain(rows: Mapping[str, Any], split: str) -> list[str]:
    """One line for each later row and kind: where it is better, worse or other than the first one, certain at 95 %."""
    columns = {column.measure: column for column in standing.TABLE}
    first, lines = next(iter(rows)), []
    for kind in (k for k in standing.KINDS if k in next(iter(rows[first]["values"][split].values()))):
        for label, measures in standing.paired(rows, split, kind).items():
            told: dict[str, list[str]] = {"better": [], "worse": [], "other": [], "not told apart": []}
            for measure, value in measures.items():
                column = columns[measure]
                level = column.against.of(1.0, 1.0)
                sign = (value.low > level) - (value.high < level)
                words = "not told apart" if not sign else ("worse", "other", "better")[1 + sign * column.better]
                unit = column.against.unit
                shown = "" if not sign else f" ({standing.written(value, column.against.form)} {unit})"
                told[words].append(f"{column.label.split(' / ')[0]}{shown}")
            parts = ". ".join(f"**{words}**: {'; '.join(names)}" for words, names in told.items() if names)
            lines.append(f"{standing.KINDS[kind]}, {label} against {first}: {parts or 'nothing measured by caption'}")
    return lines


def to_html(written: str, folder: Path) -> str:
    """Markdown as a page that holds its pictures, which lie below `folder`, in itself."""
    import markdown

    body = markdown.markdown(written, extensions=["tables", "fenced_code"])

    def embedded(match: re.Match[str]) -> str:
        path = folder / html.unescape(match[1])
        data = base64.b64encode(path.read_bytes()).decode()
        return f'src="data:{TYPES[path.suffix]};base64,{data}"'

    body = re.sub(r'src="([^":]+)"', embedded, body)
    title = html.escape(written.splitlines()[0].removeprefix("# "))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _row_table(rows: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    head = ["", "weights", "digests", "steps", "guidance", "shift", "sampler"]
    lines = []
    for label, row in rows.items():
        how = row["settings"]
        digests = ", ".join(f"{part} `{value}`" for part, value in row["digests"].items())
        numbers = [str(how["num_inference_steps"]), f"{how['guidance_scale']:g}", f"{how['shift']:g}", how["sampler"]]
        lines.append([label, f"`{sources[label]}`", digests, *numbers])
    return report.markdown(head, lines)
