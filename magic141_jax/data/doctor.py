"""What is wrong with a data set before it is trained on, and how to mend it.

A prepared set is read record by record: that shards are whole, that arrays have the shapes which their bucket and the
encoders give them, that values are finite, that clips show something and captions say something, that no clip is there
twice, and that latents have mean 0 and deviation 1 over the set, which is what a VAE's own statistics make of them.
With the weights that it is for, also that these made it. A folder of clips, or a manifest, is read without its pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors import SafetensorError

from magic141_jax.data import cache, manifest
from magic141_jax.errors import UserError

PREPARE = "prepare the data again"
CAPTIONS = "write what the clip shows into its captions, and "
# Problem -> (whether it is wrong or only worth a look, what to do about it)
PROBLEMS: dict[str, tuple[Literal["wrong", "look"], str]] = {
    "encoders are others": ("wrong", f"{PREPARE} with --weights of those that train, or train with those that made it"),
    "encoders not told": ("look", "give --weights, the folder that will be trained, to have it compared"),
    "shard missing": ("wrong", f"copy the file here, or {PREPARE}"),
    "shard damaged": ("wrong", f"copy the file again, or {PREPARE}"),
    "records missing": ("wrong", f"copy the folder again, or {PREPARE}: the disk may have been full"),
    "records too many": ("wrong", f"{PREPARE}: shards of another set lie here"),
    "file not of the set": ("look", "delete it: nothing reads it"),
    "record damaged": ("wrong", f"copy the shard again, or {PREPARE}"),
    "array missing": ("wrong", f"{PREPARE}: it was written by other code"),
    "wrong number of frames": (
        "wrong",
        f"{PREPARE}: the VAE of --weights has another factor, or --windows is not told",
    ),
    "wrong size": ("wrong", f"{PREPARE}: the bucket's name does not tell its records' size"),
    "wrong channels": ("wrong", f"{PREPARE} with --weights of the VAE that will be trained with"),
    "text of another width": ("wrong", f"{PREPARE} with --weights of the text encoder that will be trained with"),
    "text of another length": ("wrong", f"{PREPARE}: all captions with the same --text_length"),
    "empty text mask": ("wrong", f"{PREPARE}: not even the special tokens of the caption are there"),
    "null text missing": ("wrong", f"{PREPARE} with --weights: dropping captions takes the states of an empty one"),
    "not finite": ("wrong", f"{PREPARE}, with encoders in float32: training would stop at such a record"),
    "mean far from 0": ("wrong", f"{PREPARE}: latent_mean of the VAE's config.json is not that of these clips"),
    "deviation far from 1": ("wrong", f"{PREPARE}: latent_std of the VAE's config.json is not that of these clips"),
    "blank clip": ("wrong", "leave out clips of a single colour: look at the files, they may not decode"),
    "empty caption": ("wrong", CAPTIONS + "prepare the data again"),
    "clip twice": ("look", "keep one row of it in the captions, unless it is to count twice, and prepare again"),
    "one caption for most": ("look", CAPTIONS + "tell clips apart: the text is learned from their differences"),
    "most left out": ("look", "read left_out.jsonl: it says why of each clip"),
    "no such file": ("wrong", "copy the clip to where the row says, or delete the row"),
    "no caption": ("wrong", "add a row for the file, or move it elsewhere"),
    "file empty": ("wrong", "copy the clip again"),
}
MOST = 0.5  # share of the records
FEW = 8  # records from which on shares and statistics tell something
MEAN, DEVIATION = 1.0, (0.25, 4.0)  # of all latents: beyond these the noise of training has the wrong size
LATENT_ARRAYS = ("latents", "text", "text_mask", "pooled", "anchor")


class Expected(NamedTuple):
    """What the weights that will be trained with take; None where that isn't known.

    digest: of the encoders, as `prepare` writes it; channels, spatial, temporal: of the VAE; text_width, pooled_width.
    """

    digest: str | None = None
    channels: int | None = None
    spatial: int | None = None
    temporal: int | None = None
    text_width: int | None = None
    pooled_width: int | None = None


@dataclasses.dataclass
class Report:
    """What was found: {(problem, where): how often}, an example of each, and how much was looked at."""

    found: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    looked: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, problem: str, where: str, example: object = "", *, count: int = 1) -> None:
        """Notes a problem of `PROBLEMS`."""
        assert problem in PROBLEMS
        self.found[problem, where] += count
        self.examples.setdefault((problem, where), str(example))

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; what is only worth a look may be there."""
        return all(PROBLEMS[problem][0] != "wrong" for problem, _ in self.found)

    def table(self) -> str:
        """Aligned text: what was looked at, then a line for each problem, with its mend below."""
        rows = [("looked at", str(count), where, "") for where, count in self.looked.items()]
        for (problem, where), count in sorted(self.found.items(), key=lambda item: PROBLEMS[item[0][0]][0] != "wrong"):
            level, mend = PROBLEMS[problem]
            example = self.examples[problem, where]
            rows.append((f"{level}: {problem}", str(count), f"{where} ({example})" if example else where, mend))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = []
        for what, count, where, mend in rows:
            lines.append(f"{what:<{widths[0]}}  {count:>{widths[1]}}  {where}".rstrip())
            lines += [f"    {mend}"] * bool(mend)
        wrong = sum(PROBLEMS[problem][0] == "wrong" for problem, _ in self.found)
        return "\n".join([*lines, f"{wrong} wrong, {len(self.found) - wrong} to look at"])


def examine(folder: Path, expected: Expected | None = None, *, limit: int | None = None) -> Report:
    """Looks at a prepared data set, a folder of clips with captions, or a manifest.

    Args:
      folder: where it is.
      expected: of the weights that a prepared set is for; None takes the set's own word.
      limit: at most so many records of each bucket are read, evenly spread; None reads all.

    Raises:
      UserError: it is none of these, or of another format.
    """
    folder, report = Path(folder), Report()
    if (folder / "metadata.json").is_file() or (folder.is_dir() and not _has_captions(folder)):
        _examine_prepared(folder, expected, limit, report)
    else:
        _examine_clips(folder, report)
    return report


def _has_captions(folder: Path) -> bool:
    return any((folder / name).is_file() for name in manifest.CAPTION_FILES)


def _examine_clips(path: Path, report: Report) -> None:
    """A folder with a caption file, or a manifest: what its rows name and say."""
    if path.is_dir():
        root, (entries, left_out) = path, manifest.read_folder(path)
        for item in left_out:
            report.add(item.reason, path.name, " ".join(filter(None, (item.name, item.detail))))
    else:
        root, entries = path.parent, manifest.read(path)
    report.looked[f"rows of {path.name}"] = len(entries)
    named = Counter((entry.path, entry.start) for entry in entries)
    for entry in entries:
        file = root / entry.path
        if not file.is_file():
            report.add("no such file", path.name, entry.path)
        elif not file.stat().st_size:
            report.add("file empty", path.name, entry.path)
        if not any(caption.strip() for caption in entry.captions):
            report.add("empty caption", path.name, entry.path)
    for (name, _), count in named.items():
        if count > 1:
            report.add("clip twice", path.name, name, count=count - 1)
    _repeated(Counter(caption for entry in entries for caption in entry.captions), len(named), path.name, report)


def _repeated(captions: Counter[str], clips: int, where: str, report: Report) -> None:
    """Notes a caption that most of the clips have."""
    for caption, count in captions.most_common(1):
        if clips >= FEW and count > MOST * clips:
            report.add("one caption for most", where, repr(caption), count=count)


def _examine_prepared(folder: Path, expected: Expected | None, limit: int | None, report: Report) -> None:
    metadata = cache.read_metadata(folder)
    latent = metadata["kind"] == "latent"
    if latent:
        _compare_encoders(metadata, expected, report)
    expected = expected or Expected()
    null = _null_text(folder, report) if latent else {}
    known = {folder / "metadata.json", folder / "left_out.jsonl", folder / cache.NULL_TEXT}
    kept = 0
    for group, buckets in metadata["groups"].items():
        for bucket, shards in buckets.items():
            kept += shards["count"]
            known |= {folder / name for name in shards["files"]}
            where = f"{group} {bucket}"
            look = _Look(where, bucket, metadata, expected=expected, null=null, report=report)
            for shard, number, record in _records(folder, shards, limit, look.where, report):
                look.at(record, f"record {number} of {shard}")
            look.end()
    for file in sorted(set(folder.rglob("*")) - known):
        if file.is_file():
            report.add("file not of the set", folder.name, file.relative_to(folder))
    left_out = folder / "left_out.jsonl"
    lines = left_out.read_text(encoding="utf-8").splitlines() if left_out.is_file() else []
    # A --limit is a single line, which says how many were not drawn.
    dropped = sum(json.loads(line).get("reason") != "not drawn" for line in lines if line.strip())
    if dropped > MOST * (kept + dropped):
        report.add("most left out", folder.name, f"{kept} kept", count=dropped)


def _compare_encoders(metadata: Mapping[str, Any], expected: Expected | None, report: Report) -> None:
    made = metadata.get("weights")
    if expected is None or expected.digest is None:
        report.add("encoders not told", "metadata.json")
    elif made != expected.digest:
        report.add("encoders are others", "metadata.json", f"made by {made}, trained with {expected.digest}")


def _null_text(folder: Path, report: Report) -> dict[str, np.ndarray]:
    try:
        return cache.Cache(folder).null_text()
    except UserError:
        report.add("null text missing", cache.NULL_TEXT)
        return {}


def _records(
    folder: Path, shards: Mapping[str, Any], limit: int | None, where: str, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(shard, number in it, record) of a bucket's shards, as far as they can be read."""
    readers: list[tuple[str, ArrayRecordReader, int]] = []
    damaged = False
    for name in shards["files"]:
        if not (folder / name).is_file():
            report.add("shard missing", where, name)
            damaged = True
            continue
        reader = ArrayRecordReader(str(folder / name))
        readers.append((name, reader, reader.num_records()))
        if not reader.ok():  # its footer is gone, and it counts no records
            report.add("shard damaged", where, name)
            damaged = True
    total = sum(count for _, _, count in readers)
    if total != shards["count"] and not damaged:
        kind = "records missing" if total < shards["count"] else "records too many"
        report.add(kind, where, f"{total} of {shards['count']}", count=abs(shards["count"] - total))
    every = 1 if limit is None else max(1, -(-total // limit))
    for name, reader, count in readers:
        for number in range(0, count, every):
            try:
                yield name, number, cache.decode_record(reader.read([number])[0])
            except (OSError, RuntimeError, ValueError, IndexError, KeyError, SafetensorError):
                report.add("record damaged", where, f"record {number} of {name}")
        with contextlib.suppress(RuntimeError):  # one that met damage says so again
            reader.close()


class _Look:
    """The records of one bucket: each by itself, and what they are together."""

    def __init__(
        self,
        where: str,
        bucket: str,
        metadata: Mapping[str, Any],
        *,
        expected: Expected,
        null: Mapping[str, np.ndarray],
        report: Report,
    ) -> None:
        self.where, self._report, self._latent = where, report, metadata["kind"] == "latent"
        height, width, frames = map(int, bucket.split("x"))
        self._frames = (frames, height, width)
        self._windows = metadata.get("windows", 1) if frames > 1 else 1
        self._factors = (expected.spatial, expected.temporal)
        self._channels, self._widths = expected.channels, [expected.text_width, expected.pooled_width]
        # The text states of the set have the shape of its empty caption's; without that, of the first record's.
        self._text = null["text"].shape if "text" in null else None
        self._captions: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._sums = np.zeros(3)  # values, their sum, the sum of their squares

    def at(self, record: Mapping[str, Any], name: str) -> None:
        """Looks at one record, called `name`."""
        self._report.looked[self.where] += 1
        for problem in self._problems(record):
            self._report.add(problem, self.where, name)

    def end(self) -> None:
        """Looks at all of them together."""
        _repeated(self._captions, sum(self._captions.values()), self.where, self._report)
        count, total, squares = self._sums
        if self._report.looked[self.where] < FEW or not count:
            return
        mean = total / count
        deviation = (squares / count - mean**2) ** 0.5
        if abs(mean) > MEAN:
            self._report.add("mean far from 0", self.where, f"{mean:.3g}")
        if not DEVIATION[0] <= deviation <= DEVIATION[1]:
            self._report.add("deviation far from 1", self.where, f"{deviation:.3g}")

    def _problems(self, record: Mapping[str, Any]) -> Iterator[str]:
        names = LATENT_ARRAYS if self._latent else ("frames",)
        if not all(isinstance(record.get(name), np.ndarray) for name in names):
            yield "array missing"
            return
        captions = record.get("captions") or [record.get("caption", "")]
        self._captions.update(captions)
        if not all(caption.strip() for caption in captions):
            yield "empty caption"
        shown = record["anchor"] if self._latent else record["frames"]
        if shown.max() == shown.min():
            yield "blank clip"
        content = record[names[0]]
        digest = hashlib.sha256(content.tobytes() + json.dumps(captions).encode()).digest()
        if digest in self._seen:
            yield "clip twice"
        self._seen.add(digest)
        want = self._latent_shape(content.shape) if self._latent else self._frames
        if content.ndim != 4 or content.shape[1:3] != want[1:]:
            yield "wrong size"
        elif len(content) != want[0]:
            yield "wrong number of frames"
        if self._latent:
            yield from self._latent_problems(record)

    def _latent_shape(self, found: tuple[int, ...]) -> tuple[int, int, int]:
        """What (f, h, w) the bucket's latents have, by the VAE's factors, or those of the first record, `found`.

        These are whole numbers, or they don't give back the shape that they are taken from.
        """
        frames, height, width = self._frames
        steps = (frames - 1) // self._windows  # of a window, behind its first frame
        if None in self._factors:
            self._factors = (height // max(found[1], 1), steps // max(found[0] // self._windows - 1, 1))
        spatial, temporal = (max(factor, 1) for factor in self._factors)
        return self._windows * (steps // temporal + 1), height // spatial, width // spatial

    def _latent_problems(self, record: Mapping[str, np.ndarray]) -> Iterator[str]:
        latents, text, pooled = (record[name].astype(np.float64) for name in ("latents", "text", "pooled"))
        self._channels = self._channels or latents.shape[-1]
        self._widths = [wanted or x.shape[-1] for wanted, x in zip(self._widths, (text, pooled), strict=True)]
        self._text = self._text or text.shape
        if latents.shape[-1] != self._channels:
            yield "wrong channels"
        if [text.shape[-1], pooled.shape[-1]] != self._widths or text.shape[-1] != self._text[-1]:
            yield "text of another width"
        if len(text) != self._text[0] or record["text_mask"].shape != text.shape[:1]:
            yield "text of another length"
        if not record["text_mask"].any():
            yield "empty text mask"
        if not all(np.isfinite(x).all() for x in (latents, text, pooled)):
            yield "not finite"
        else:
            self._sums += latents.size, latents.sum(), (latents**2).sum()
