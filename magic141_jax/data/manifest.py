"""Which clips a data set has and what they show: one JSON object a line.

    {"path": "clips/shark.mp4", "captions": ["a shark swims left"], "kind": "video", "tags": {"motion": "left"}}

`path` is relative to the manifest. `kind` follows from the file's ending where it is left out; `start` (seconds)
picks a part of a longer file. A plain folder with captions.csv or captions.jsonl reads as the same entries.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from magic141_jax.errors import UserError
from magic141_jax.settings import build

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "filename", "path", "video", "image")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")


class LeftOut(NamedTuple):
    """Something that can't be used: its name, the reason (the same words for the same kind), and particulars."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Entry:
    """One line of a manifest. Raises ValueError for a path without a known ending and without a kind."""

    path: str
    captions: tuple[str, ...] = ()
    kind: Literal["video", "image"] | None = None
    tags: dict[str, str] = field(default_factory=dict)
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.kind is None:
            object.__setattr__(self, "kind", kind_of(self.path))
        if self.kind is None:
            known = " ".join(VIDEO_ENDINGS + IMAGE_ENDINGS)
            raise ValueError(f"{self.path!r} is not a known kind of file ({known}); set kind to video or image")
        if not 0 <= self.start < 1e9:
            raise ValueError(f"start is {self.start}, it must be seconds from the beginning, 0 or more")


def kind_of(path: str) -> Literal["video", "image"] | None:
    """Video or image by the file's ending; None for other files."""
    ending = Path(path).suffix.lower()
    if ending in VIDEO_ENDINGS:
        return "video"
    return "image" if ending in IMAGE_ENDINGS else None


def read(path: Path) -> list[Entry]:
    """Reads a manifest strictly.

    Raises:
      UserError: no such file, or a line that is not such an object, named by its number.
    """
    return [build(Entry, record, where=f"{path} line {number}") for number, record in _json_lines(Path(path))]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a manifest; what stood there is replaced only once everything is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for entry in entries:
                stream.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_folder(folder: Path) -> tuple[list[Entry], list[LeftOut]]:
    """Matches the clips below a folder with the rows of its caption file; rows of one file are joined.

    Returns:
      The entries in the order of the caption file, and what does not match: rows without a file or without a
      caption, and files without a row.

    Raises:
      UserError: no caption file, more than one, or one without the needed columns.
    """
    folder = Path(folder)
    table = _caption_file(folder)
    rows = _csv_rows(table) if table.suffix == ".csv" else _jsonl_rows(table)
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if kind_of(path.name) and path.is_file() and not path.name.startswith(".")
    )
    known, entries, left_out = set(files), {}, []
    for where, row in rows:
        name, captions, entry = row.path, [c.strip() for c in row.captions if c.strip()], entries.get(row.path)
        if name not in known:
            left_out.append(LeftOut(name, "no such file", where))
        elif not captions:
            left_out.append(LeftOut(name, "empty caption", where))
        else:
            merged = (*entry.captions, *captions) if entry else tuple(captions)
            tags = {**(entry.tags if entry else {}), **row.tags}
            entries[name] = Entry(name, tuple(dict.fromkeys(merged)), tags=tags, start=row.start)
    named = {*entries, *(item.name for item in left_out)}
    left_out += [LeftOut(name, "no caption", f"not in {table.name}") for name in files if name not in named]
    return list(entries.values()), left_out


def _caption_file(folder: Path) -> Path:
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder} has no caption file; write captions.csv there with the columns file,caption"
            f" (also read: {', '.join(CAPTION_FILES[1:])})"
        )
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(f.name for f in found)}; keep one caption file")
    return found[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {error}; it must be UTF-8 text") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        yield number, record


def _column(path: Path, header: Iterable[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        for column in header:
            if column.strip().lower() == name:
                return column
    raise UserError(f"{path} has no column for the {wanted[0]}; name it one of {', '.join(wanted)}")


def _csv_rows(path: Path) -> Iterator[tuple[str, Entry]]:
    lines = _text(path).splitlines(keepends=True)
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = max(",;\t", key="".join(lines[:1]).count)
    reader = csv.DictReader(lines, restkey="", restval="", strict=True, delimiter=delimiter)
    try:
        header = reader.fieldnames or []
        if len({name.strip().lower() for name in header}) != len(header):
            raise UserError(f"{path} names a column twice: {', '.join(header)}")
        columns = _column(path, header, FILE_COLUMNS), _column(path, header, CAPTION_COLUMNS)
        for row in reader:
            if row.pop("", None):
                raise UserError(f"{path} line {reader.line_num} has too many columns; quote captions that hold a comma")
            yield _row(f"{path.name} line {reader.line_num}", row, *columns)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Entry]]:
    for number, record in _json_lines(path):
        columns = _column(path, record, FILE_COLUMNS), _column(path, record, CAPTION_COLUMNS)
        yield _row(f"{path.name} line {number}", record, *columns)


def _row(where: str, record: Mapping[str, Any], file_column: str, caption_column: str) -> tuple[str, Entry]:
    """One row as an entry; columns other than file, caption, start and tags become tags."""
    rest = {k.strip(): v for k, v in record.items() if k not in (file_column, caption_column)}
    tags, start = rest.pop("tags", {}), rest.pop("start", 0) or 0
    captions = record[caption_column]
    captions = list(captions) if isinstance(captions, list) else [captions]
    path = Path(str(record[file_column]).strip()).as_posix()
    try:
        start = float(start)
    except (TypeError, ValueError):
        raise UserError(f"{where}: start is {start!r}, it must be a number of seconds") from None
    tags = tags if isinstance(tags, Mapping) else {"tags": tags}
    tags = {k: str(v) for k, v in {**rest, **tags}.items() if v not in (None, "")}
    kind = kind_of(path) or "video"
    return where, build(
        Entry, {"path": path, "captions": captions, "kind": kind, "tags": tags, "start": start}, where=where
    )
