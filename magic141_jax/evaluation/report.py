"""The evaluation as people read it: a markdown table, the model card's section, a contact sheet, a JSON file."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from magic141_jax.errors import UserError
from magic141_jax.evaluation import drift
from magic141_jax.evaluation.protocol import SPLITS

BEGIN, END = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"
COLUMNS = {"train": "training captions", "triples": "held-out triples", "subjects": "held-out emoji"}
SHEET_FRAMES = (0, 4, 8, 12, 16)
SHEET_SCALE = 2
LABEL_HEIGHT = 14
_LISTED = re.compile(r"\[\s+(?:(?:-?[\d.][\d.e+-]*|null),?\s+)+\]")


class Row(NamedTuple):
    """A line of the table: what it says, whose value, and which ways of making are its ceilings."""

    label: str
    way: str
    measure: str
    form: str = "{:.2f}"
    goal: str = ""
    ceilings: tuple[str, ...] = ("vae", "truth")


FIRST = ("vae_first", "truth_first")
ROWS = (
    Row("VAE, PSNR of a clip (dB)", "vae", "vae_psnr", "{:.1f}", "31", ()),
    Row("VAE, PSNR of the first frame (dB)", "vae", "vae_first_psnr", "{:.1f}", "32", ()),
    Row("VAE, PSNR inside the subject (dB)", "vae", "vae_subject_psnr", "{:.1f}", "", ()),
    Row("VAE, SSIM", "vae", "vae_ssim", "{:.3f}", "", ()),
    Row("T2I, subject identity", "image", "identity", goal="0.85", ceilings=FIRST),
    Row("T2I, subject nearest / any quality", "image", "nearest", ceilings=FIRST),
    Row("T2I, subject among the nearest 5", "image", "top5", ceilings=FIRST),
    Row("T2I, background colour", "image", "colour", goal="0.98", ceilings=FIRST),
    Row("T2V, subject identity in the last frame", "t2v", "identity"),
    Row("T2V, subject among the nearest 5, last frame", "t2v", "top5"),
    Row("T2V, motion", "t2v", "motion"),
    Row("T2V, amount of motion / the data's", "t2v", "motion_amount"),
    Row("I2V, PSNR of the first frame (dB)", "i2v", "first_frame_psnr", "{:.1f}", "", ()),
    Row("I2V, subject identity in the last frame", "i2v", "identity", goal="0.7"),
    Row("I2V, subject nearest / any quality, last frame", "i2v", "nearest"),
    Row("I2V, subject among the nearest 5, last frame", "i2v", "top5"),
    Row("I2V, background colour in the last frame", "i2v", "colour", goal="0.98"),
    Row("I2V, motion from unleaky first frames", "i2v", "motion", goal="0.9 (emoji 0.85)"),
    Row("I2V, amount of motion / the data's", "i2v", "motion_amount"),
)
NOTES = (
    "Identity: the right subject is the nearest of all {subjects} of the pack, aligned over place, size and moment, "
    "*and* it is really drawn (PSNR of the subject, outline and interior agree with the original); a blur or a plain "
    "silhouette of the right subject does not pass. Motion is read from the pixels; in I2V the first frame says "
    "nothing about it. The last two columns put true clips, as rendered and through the VAE, before the same scorers.",
)


def table(results: Mapping[str, Any]) -> str:
    """The markdown table of `results["splits"]`: split -> way -> measure -> value; absent values are dashes."""
    splits = results["splits"]
    names = [s for s in SPLITS if s in splits]
    head = ["", *(COLUMNS[s] for s in names), "goal", "VAE round trip", "ground truth"]
    lines = []
    for row in ROWS:
        cells = [cell(splits[s].get(row.way, {}).get(row.measure), row.form) for s in names]
        limits = [cell(_pooled(splits, way, row.measure), row.form) for way in row.ceilings] or ["", ""]
        lines.append([row.label, *cells, row.goal, *limits])
    return markdown(head, lines)


def drift_table(minute: Mapping[str, list[float]]) -> str:
    """The markdown table of `drift.measure_drift`: its measures at some windows, the last among them."""
    count = len(minute["identity"])
    shown = sorted({i for i in (0, 1, 4, 9, 19) if i < count} | {count - 1})
    forms = {"colour_error": "{:.0f}", "subject_psnr": "{:.1f}"}
    labels = {
        "identity": "subject identity",
        "nearest": "subject nearest / any quality",
        "colour_error": "background, error of 255",
        "subject_psnr": "PSNR of the subject to the nearest emoji (dB)",
        "sharpness": "sharpness / the emoji's",
    }
    lines = [[label, *(cell(minute[k][i], forms.get(k, "{:.2f}")) for i in shown)] for k, label in labels.items()]
    return markdown(["end of window", *(str(i + 1) for i in shown)], lines)


def drift_summary(rows: Mapping[str, Mapping[str, Any]], vae: Sequence[float]) -> str:
    """The markdown table of `drift.SUMMARY` for rows of {"summary": ...}, and a line on the autoencoder alone."""
    lines = [
        [label, *(cell(row["summary"][name], form) for name, (_, form) in drift.SUMMARY.items())]
        for label, row in rows.items()
    ]
    head = ["", *(label for label, _ in drift.SUMMARY.values())]
    trips = sorted({1, 2, 5, 10, 20, len(vae)} & set(range(1, len(vae) + 1)))
    told = ", ".join(f"{vae[n - 1]:.1f} after {n}" for n in trips)
    return f"{markdown(head, lines)}\n\nA picture through the autoencoder alone, again and again: PSNR {told} (dB)."


def section(results: Mapping[str, Any]) -> str:
    """Everything that stands between the markers of a model card."""
    how = results["settings"]
    lines = [
        f"{how['samples']} captions a column, {how['num_inference_steps']} steps, guidance {how['guidance_scale']:g}, "
        f"seed {how['seed']}, weights `{results['weights']}`; by `{results['command']}`.",
        "",
        table(results),
        "",
        *(note.format(**how) for note in NOTES),
    ]
    if "minute" in results:
        lines += ["", f"A minute of video, mean of {how['minute']} captions:", "", drift_table(results["minute"])]
    return "\n".join(lines)


def update_card(text: str, body: str, *, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """Puts `body` between the markers of a card; raises `UserError` if they are missing or out of order."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"the card needs one line {begin} and after it one line {end}: the table goes between them")
    return text[: text.index(begin) + len(begin)] + f"\n{body}\n" + text[text.index(end) :]


def contact_sheet(clips: np.ndarray, captions: tuple[str, ...]) -> Image.Image:
    """Rows of clips (n, t, y, x, 3) in [0, 1], frames 0, 4, 8, 12, 16 as far as there are, twice their size."""
    shown = [i for i in SHEET_FRAMES if i < clips.shape[1]]
    height, width = (s * SHEET_SCALE for s in clips.shape[2:4])
    sheet = Image.new("RGB", (len(shown) * width, len(clips) * (height + LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, words) in enumerate(zip(clips, captions, strict=True)):
        top = row * (height + LABEL_HEIGHT)
        draw.text((3, top + 1), words, fill="black")
        for column, index in enumerate(shown):
            pixels = np.round(np.clip(clip[index], 0, 1) * 255).astype(np.uint8)
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * width, top + LABEL_HEIGHT))
    return sheet


def to_json(results: Mapping[str, Any]) -> str:
    """The results as JSON; nan becomes null. A list of numbers takes one line."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(clean(results), indent=2)
    return _LISTED.sub(lambda match: f"[{' '.join(match[0][1:-1].split())}]", text) + "\n"


def require_folders(*paths: Path | None) -> None:
    """Raises `UserError` unless the folders of the files that are to be written are there; None asks for no file."""
    for path in filter(None, paths):
        if not path.absolute().parent.is_dir():
            raise UserError(f"no folder {path.parent} to write {path.name} into")


def write(path: Path, content: str | Image.Image) -> None:
    """Writes text or a picture to a temporary name and renames it; raises `UserError` where that can't be done."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        if isinstance(content, str):
            temporary.write_text(content)
        else:
            content.save(temporary)
        temporary.replace(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table, all columns but the first to the right."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(value: float | None, form: str) -> str:
    """A value in its form; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else form.format(value)


def _pooled(splits: Mapping[str, Any], way: str, measure: str) -> float | None:
    """The mean over the splits that have the value: they have equally many captions."""
    values = [v[way][measure] for v in splits.values() if measure in v.get(way, {})]
    return float(np.mean(values)) if values else None
