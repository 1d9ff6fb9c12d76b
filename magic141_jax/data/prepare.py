"""Any source to a prepared data set, with an account of what was kept and what was left out, and why.

Raw records keep the pixels (to train an autoencoder); with encoders, latents and text states are stored instead (to
train the transformer without running the autoencoder or the text encoder). A clip with several captions gives one
latent record for each of them. A text encoder that reads pictures sees a clip's first frame (its anchor) with each of
its captions, as in sampling, and a black picture with the empty caption; images have no place among such records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from magic141_jax.data import cache
from magic141_jax.data.decode import BadClip
from magic141_jax.data.manifest import LeftOut
from magic141_jax.data.sources import Sample, Source, item_name
from magic141_jax.errors import UserError

EXAMPLES = 3
BLACK = np.zeros((8, 8, 3), np.uint8)  # the empty caption's picture; encoders resize it


class Encoders(NamedTuple):
    """What makes latent records. Both functions always get `batch_size` items, so they compile once a shape.

    frames: uint8 (b, t, y, x, 3) -> normalised latents (b, f, h, w, c).
    text: captions, and pictures (y, x, 3) in [0, 1] one each, or None where `image_tokens` is 0
      -> states (b, s, e), mask (b, s) bool, pooled (b, e).
    image_tokens: how many leading text states are rows of the picture.
    """

    frames: Callable[[np.ndarray], Any]
    text: Callable[[list[str], list[np.ndarray] | None], tuple[Any, Any, Any]]
    batch_size: int = 8
    image_tokens: int = 0


def in_windows(encoders: Encoders, length: int) -> Encoders:
    """Encoders that cut clips into windows of `length` frames, each sharing one frame with the next.

    Every window is encoded by itself, as a sliding window will see it: in a causal VAE a latent from mid-clip is no
    first one. Latents of N windows follow each other, (b, N f, h, w, c). A picture is one window.
    """

    def frames(clips: np.ndarray) -> np.ndarray:
        starts = range(0, max(clips.shape[1] - 1, 1), length - 1)
        return np.concatenate([np.asarray(encoders.frames(clips[:, i : i + length])) for i in starts], axis=1)

    return encoders._replace(frames=frames)


@dataclass
class Report:
    """What `prepare` did: records by group and bucket, and everything that it left out."""

    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: list[LeftOut] = field(default_factory=list)

    def table(self) -> str:
        """Aligned text: a line for each bucket kept, and for each reason the count and the first examples."""
        rows = [("kept", str(count), f"{group} {bucket}") for (group, bucket), count in sorted(self.kept.items())]
        reasons = Counter(item.reason for item in self.left_out)
        for reason, count in reasons.most_common():
            same = [item for item in self.left_out if item.reason == reason][:EXAMPLES]
            examples = "; ".join(f"{item.name} ({item.detail})" if item.detail else item.name for item in same)
            more = "; ..." if count > EXAMPLES else ""
            rows.append((f"left out: {reason}", str(count), examples + more))
        if not self.left_out:
            rows.append(("left out", "0", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def prepare(
    source: Source,
    target: Path,
    *,
    metadata: Mapping[str, Any],
    encoders: Encoders | None = None,
    limit: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes a prepared data set; `target` appears, complete, only at the end.

    Args:
      source: samples by index; items that raise `BadClip` are left out. Its optional `left_out` joins the report.
      target: folder to make.
      metadata: JSON-ready facts to keep, such as the frame rate and where the clips came from.
      encoders: makes latent records; None keeps pixels.
      limit: use at most so many items, drawn by `seed`; the others are counted as left out.
      seed: of that draw.
      overwrite: whether a prepared data set that stands at `target` is replaced.
      progress: whether to show a bar on stderr.

    Raises:
      UserError: nothing could be kept, or `target` may not be written.
    """
    report = Report(left_out=list(getattr(source, "left_out", ())))
    order = _order(len(source), limit, seed)
    if len(order) < len(source):
        report.left_out.append(LeftOut(f"{len(source) - len(order)} items", "not drawn", f"--limit {limit}"))
    with cache.writing(target, overwrite=overwrite) as writer:
        kind = {"kind": "latent", "image_tokens": encoders.image_tokens} if encoders else {"kind": "raw"}
        writer.metadata = {**kind, **metadata}
        bar = tqdm(order, unit="clip", disable=not progress or not len(order), dynamic_ncols=True, mininterval=1)
        for group, bucket, record in _records(_usable(source, bar, report), encoders, report):
            writer.add(group, bucket, record)
            report.kept[group, bucket] += 1
            bar.set_postfix(kept=report.kept.total(), left_out=len(report.left_out), refresh=False)
        if not report.kept:
            counts = Counter(item.reason for item in report.left_out)
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "the source is empty"
            first = f"; first: {report.left_out[0].name} {report.left_out[0].detail}" if report.left_out else ""
            raise UserError(f"no clip could be kept: {reasons}{first}")
        if encoders:
            text = _text_fields(encoders, [("", BLACK)])[0]
            (writer.folder / cache.NULL_TEXT).write_bytes(save(text))
        lines = [json.dumps(item._asdict(), ensure_ascii=False) for item in report.left_out]
        (writer.folder / "left_out.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return report


def _order(length: int, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(seed).permutation(length)[:limit])


def _usable(source: Source, order: Any, report: Report) -> Iterator[tuple[str, Sample]]:
    for index in order:
        index = int(index)
        try:
            sample = source[index]
        except BadClip as error:
            report.left_out.append(LeftOut(item_name(source, index), error.reason, error.detail))
            continue
        yield item_name(source, index), sample


def _records(
    samples: Iterator[tuple[str, Sample]], encoders: Encoders | None, report: Report
) -> Iterator[tuple[cache.Group, str, dict[str, Any]]]:
    """(group, bucket, record) for each sample, or for each caption of each sample; encoded a full batch at a time."""
    waiting: dict[str, list[tuple[str, Sample]]] = {}
    for name, sample in samples:
        frames, height, width, _ = sample["frames"].shape
        bucket = f"{height}x{width}x{frames}"
        if encoders is None:
            yield _group(sample), bucket, sample
            continue
        if encoders.image_tokens and frames == 1:
            report.left_out.append(LeftOut(name, "a single image", "these weights animate a picture"))
            continue
        batch = waiting.setdefault(bucket, [])
        batch.append((name, sample))
        if len(batch) == encoders.batch_size:
            yield from _encoded(bucket, waiting.pop(bucket), encoders, report)
    for bucket, batch in waiting.items():
        yield from _encoded(bucket, batch, encoders, report)


def _group(sample: Sample) -> cache.Group:
    return "images" if len(sample["frames"]) == 1 else "videos"


def _encoded(
    bucket: str, batch: list[tuple[str, Sample]], encoders: Encoders, report: Report
) -> Iterator[tuple[cache.Group, str, dict[str, Any]]]:
    frames = np.stack([sample["frames"] for _, sample in batch])
    latents = np.asarray(encoders.frames(_padded(frames, encoders.batch_size)))[: len(batch)]
    with np.errstate(over="ignore"):  # looked at below, clip by clip
        latents = latents.astype(np.float16)
    anchors = [sample.get("anchor", sample["frames"][0]) for _, sample in batch]
    captions = [sample.get("captions") or [sample["caption"]] for _, sample in batch]
    shown = [(caption, anchor) for several, anchor in zip(captions, anchors, strict=True) for caption in several]
    texts = iter(_text_fields(encoders, shown))
    for (name, sample), latent, anchor, several in zip(batch, latents, anchors, captions, strict=True):
        fields = [next(texts) for _ in several]
        if not all(np.isfinite(x).all() for x in (latent, *(f["text"] for f in fields))):
            report.left_out.append(LeftOut(name, "not finite once encoded", "NaN, or outside float16"))
            continue
        common = {"latents": latent, "anchor": anchor, "tags": sample.get("tags", {})}
        for caption, text in zip(several, fields, strict=True):
            yield _group(sample), bucket, {**common, **text, "caption": caption}


def _text_fields(encoders: Encoders, shown: list[tuple[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The text part of a latent record for each caption with the picture (uint8) that it is read with."""
    fields = []
    for begin in range(0, len(shown), encoders.batch_size):
        part = shown[begin : begin + encoders.batch_size]
        full = part + [("", BLACK)] * (encoders.batch_size - len(part))
        pictures = [picture.astype(np.float32) / 255 for _, picture in full] if encoders.image_tokens else None
        states, mask, pooled = encoders.text([caption for caption, _ in full], pictures)
        rows = zip(np.asarray(states), np.asarray(mask), np.asarray(pooled), strict=True)
        fields += [
            {"text": s.astype(np.float16), "text_mask": m.astype(bool), "pooled": p.astype(np.float16)}
            for s, m, p in list(rows)[: len(part)]
        ]
    return fields


def _padded(frames: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([frames, np.repeat(frames[-1:], size - len(frames), axis=0)])
