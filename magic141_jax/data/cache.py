"""Prepared data on disk: ArrayRecord shards of safetensors records, read at random.

    DST/metadata.json                        kind, sizes, counts, frame rate, shard files, image_tokens
    DST/{images,videos}/64x64x17-00000.array_record
    DST/null_text.safetensors                latent kind: the text states of the empty caption (for caption dropout)

A record is a dict of arrays and strings. Kind "raw": frames (uint8 t y x 3), caption, captions, tags. Kind "latent":
latents (float16 f h w c), text (float16 s e), text_mask (bool s), pooled (float16 e), anchor (uint8 y x 3: the first
frame), caption, tags. The first `image_tokens` of the s text states are rows of the anchor, where the text encoder read
it together with the caption; 0 (or no such key) elsewhere. Those of null_text.safetensors are rows of a black picture.

With `windows` N > 1 in metadata.json a clip is a chain: N windows of f latent frames, each encoded by itself, the last
pixel frame of one the first of the next; latents are then (N f, h, w, c).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from magic141_jax.errors import UserError
from magic141_jax.weights import read_json

Group = Literal["images", "videos"]
FORMAT = 1
STRINGS = "::json"
SHARD_BYTES = 512 << 20
SHARD_OPTIONS = "group_size:1,zstd:1"  # one record a group: random access reads nothing else
NULL_TEXT = "null_text.safetensors"


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Arrays as safetensors; everything else (strings, lists, dicts) together as one JSON text."""
    arrays = {k: np.ascontiguousarray(v) for k, v in record.items() if isinstance(v, np.ndarray)}
    rest = json.dumps({k: v for k, v in record.items() if k not in arrays}, ensure_ascii=False).encode()
    return save({**arrays, STRINGS: np.frombuffer(rest, np.uint8)})


def decode_record(data: bytes, *, strings: bool = True) -> dict[str, Any]:
    """The inverse of `encode_record`; `strings=False` gives the arrays alone."""
    record = load(data)
    rest = record.pop(STRINGS)
    return {**record, **(json.loads(rest.tobytes()) if strings else {})}


class CacheWriter:
    """Writes records into a folder, a new shard whenever one is full. Made by `writing`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        """`folder` exists and is empty."""
        self.folder, self.shard_bytes = folder, shard_bytes
        self.groups: dict[str, dict[str, dict[str, Any]]] = {}
        self.metadata: dict[str, Any] = {}
        self._open: dict[tuple[str, str], tuple[ArrayRecordWriter, int]] = {}

    def add(self, group: Group, bucket: str, record: Mapping[str, Any]) -> None:
        """Appends a record; all records of one (group, bucket) have the same array shapes."""
        shards = self.groups.setdefault(group, {}).setdefault(bucket, {"count": 0, "files": []})
        key, data = (group, bucket), encode_record(record)
        writer, size = self._open.pop(key, (None, 0))
        if writer and size + len(data) > self.shard_bytes:
            _close(writer)
            writer = None
        if writer is None:
            name, size = f"{group}/{bucket}-{len(shards['files']):05d}.array_record", 0
            (self.folder / group).mkdir(exist_ok=True)
            shards["files"].append(name)
            writer = ArrayRecordWriter(str(self.folder / name), SHARD_OPTIONS)
        self._open[key] = writer, size + len(data)
        writer.write(data)
        shards["count"] += 1

    def close(self) -> None:
        """Ends the shards, reads their counts back and writes metadata.json."""
        self.close_shards()
        document = {"format": FORMAT, **self.metadata, "groups": self.groups}
        (self.folder / "metadata.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        for group in self.groups:
            Cache(self.folder).source(group)

    def close_shards(self) -> None:
        """Ends the open shards; a full disk shows here, as an OSError."""
        while self._open:
            _close(self._open.popitem()[1][0])


def _close(writer: ArrayRecordWriter) -> None:
    try:
        writer.close()
    except RuntimeError as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "an array_record shard") from None
        raise


@contextmanager
def writing(folder: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Iterator[CacheWriter]:
    """Gives a writer into a hidden folder beside `folder`, which takes its place only if nothing goes wrong.

    Raises:
      UserError: `folder` stands already (and `overwrite` is off, or it isn't a prepared data set), or can't be written.
    """
    folder = Path(folder)
    check_target(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"can't write beside {folder}: {error.strerror}") from None
    try:
        new = temporary / "new"
        new.mkdir()
        writer = CacheWriter(new, shard_bytes)
        yield writer
        writer.close()
        if folder.exists():
            folder.rename(temporary / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where a prepared data set must not be written to `folder`."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "metadata.json").is_file():
        raise UserError(f"{folder} exists and is not a prepared data set; it is left alone, choose another DST")
    if not overwrite:
        raise UserError(f"{folder} exists already; give --overwrite to replace it, or choose another DST")


class Cache:
    """A prepared data set."""

    def __init__(self, folder: Path):
        """Raises `UserError` where `folder` is not a prepared data set."""
        self.folder = Path(folder)
        self.metadata = read_metadata(self.folder)
        self.kind: Literal["raw", "latent"] = self.metadata["kind"]
        self.groups: tuple[str, ...] = tuple(self.metadata["groups"])
        self.image_tokens: int = self.metadata.get("image_tokens", 0)

    def buckets(self, group: Group) -> tuple[str, ...]:
        """The buckets of images or videos, as HEIGHTxWIDTHxFRAMES; empty where there are none."""
        return tuple(self.metadata["groups"].get(group, {}))

    def source(self, group: Group, bucket: str | None = None, *, strings: bool | None = None) -> CacheSource:
        """The records of one bucket, or of all of them.

        Args:
          group: "images" or "videos".
          bucket: one of `buckets(group)`; None takes all.
          strings: whether records hold captions and tags beside the arrays; None: only those of the raw kind do.

        Raises:
          UserError: no such records here, or shards that are missing or damaged.
        """
        buckets = self.metadata["groups"].get(group, {})
        chosen = list(buckets) if bucket is None else [bucket]
        if not chosen or not set(chosen) <= set(buckets):
            raise UserError(f"{self.folder} has no {bucket or ''} {group}; it has {self._contents()}")
        files = [self.folder / name for b in chosen for name in buckets[b]["files"]]
        count = sum(buckets[b]["count"] for b in chosen)
        return CacheSource(files, count, strings=self.kind == "raw" if strings is None else strings)

    def sources(self, group: Group, *, strings: bool | None = None) -> tuple[CacheSource, ...]:
        """One source for each bucket of the group."""
        return tuple(self.source(group, bucket, strings=strings) for bucket in self.buckets(group))

    def null_text(self) -> dict[str, np.ndarray]:
        """The text states of the empty caption: text (s, e), text_mask (s,), pooled (e,). Latent kind only."""
        path = self.folder / NULL_TEXT
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise UserError(f"can't read {path}: {error}; prepare the data again with --weights") from None

    def _contents(self) -> str:
        groups = self.metadata["groups"]
        return ", ".join(f"{b['count']} {group} of {name}" for group in groups for name, b in groups[group].items())


class CacheSource:
    """Random access to the records in some shards."""

    def __init__(self, files: list[Path], count: int, *, strings: bool):
        """Raises `UserError` where the shards don't hold `count` records."""
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            found = len(self._records)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"can't read {files[0].parent}: {error}; prepare the data again") from None
        if found != count:
            raise UserError(f"{files[0].parent} holds {found} of {count} records; it is damaged, or the disk was full")
        self._strings = strings

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return decode_record(self._records[index], strings=self._strings)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata.json of a prepared data set; `UserError` where there is none or it is of another format."""
    path = Path(folder) / "metadata.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared data set; make one with `python -m magic141_jax.data prepare`")
    metadata = read_json(path)
    if metadata.get("format") != FORMAT or "groups" not in metadata or metadata.get("kind") not in ("raw", "latent"):
        raise UserError(f"{path} is of another format; prepare the data again")
    return metadata


def require_source(folder: Path, source: Path) -> None:
    """Warns where clips or captions have changed since `folder` was prepared from them.

    Raises:
      UserError: it was prepared from another source.
    """
    path = Path(folder) / "metadata.json"
    recorded = read_json(path).get("source")
    if recorded is not None and Path(recorded).resolve() != source.resolve():
        raise UserError(f"{folder} was prepared from {recorded}, not from {source}; take another folder, or remove it")
    since = path.stat().st_mtime
    files = source.rglob("*") if source.is_dir() else [source]
    if any(file.is_file() and file.stat().st_mtime > since for file in files):
        logging.warning("%s has changed since %s was prepared from it; remove that to do so again", source, folder)
