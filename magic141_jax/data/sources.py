"""Random-access sources of clips: a folder or manifest of files, and TensorFlow Datasets read without TensorFlow.

A source has a length, `source[i]` gives a sample and `source.name(i)` what to call it in a report. A sample is

    {"frames": uint8 (t, y, x, 3), "caption": str, "captions": all of them, "tags": {str: str}}

with t = 1 for an image. `source[i]` raises `BadClip` where item i can't be used; `left_out` lists what was not even
listed as an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from magic141_jax.data import manifest
from magic141_jax.data.buckets import Bucket, longest_fit, nearest_size
from magic141_jax.data.decode import BadClip, fit, read_image, read_video
from magic141_jax.errors import UserError, nearest

Sample = dict[str, Any]


class Source(Protocol):
    """What the loader and `prepare` need."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Joined:
    """Several sources as one, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = tuple(parts)
        self.left_out = tuple(item for part in parts for item in getattr(part, "left_out", ()))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        part, index = self._find(index)
        return part[index]

    def name(self, index: int) -> str:
        """The part's name for the item."""
        return item_name(*self._find(index))

    def _find(self, index: int) -> tuple[Source, int]:
        for part in self.parts:
            if 0 <= index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)


def item_name(source: Source, index: int) -> str:
    """What to call an item in a report: `source.name(index)` where the source has names."""
    name = getattr(source, "name", None)
    return f"item {index}" if name is None else name(index)


class FileClips:
    """Video and image files with captions, cut to buckets."""

    def __init__(
        self,
        root: Path,
        entries: Sequence[manifest.Entry],
        *,
        buckets: Sequence[Bucket],
        fps: float | None = None,
        left_out: Sequence[manifest.LeftOut] = (),
    ):
        """Entries' paths are relative to `root`; `fps` None keeps the files' own rate."""
        self.root, self.entries, self.buckets, self.fps = Path(root), tuple(entries), tuple(buckets), fps
        self.left_out = tuple(left_out)

    @classmethod
    def open(cls, path: Path, *, buckets: Sequence[Bucket], fps: float | None = None) -> FileClips:
        """Opens a folder with a caption file, or a manifest. Raises `UserError` where there is neither."""
        path = Path(path)
        if path.is_dir():
            entries, left_out = manifest.read_folder(path)
            return cls(path, entries, buckets=buckets, fps=fps, left_out=left_out)
        if path.suffix != ".jsonl":
            raise UserError(f"{path} is neither a folder nor a manifest (.jsonl)")
        return cls(path.parent, manifest.read(path), buckets=buckets, fps=fps)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        captions = [caption for caption in entry.captions if caption.strip()]
        if not captions:
            raise BadClip(entry.path, "no caption")
        if entry.kind == "image":
            frames = read_image(self.root / entry.path, self.buckets)
        else:
            frames = read_video(self.root / entry.path, self.buckets, fps=self.fps, start=entry.start)
        return {"frames": frames, "caption": captions[0], "captions": captions, "tags": dict(entry.tags)}

    def name(self, index: int) -> str:
        """The file's path in the manifest."""
        return self.entries[index].path


class TfdsClips:
    """A data set of tensorflow_datasets stored as array_record: any video or image feature with any text or label."""

    def __init__(
        self,
        name: str,
        *,
        buckets: Sequence[Bucket],
        split: str = "train",
        frames_key: str | None = None,
        text_key: str | None = None,
        data_dir: Path | None = None,
    ):
        """Prepares (downloads where needed) and opens the data set.

        Args:
          name: as tfds knows it, `ucf101/ucf101_1` for a config.
          buckets: legal shapes of a clip.
          split: a split, or a part of one such as `train[:10%]`.
          frames_key: feature with the frames; None takes the only one of shape (t, y, x, 1 or 3) or (y, x, 1 or 3).
          text_key: feature with the caption: text, or a label whose class names are used; None takes the only one.
          data_dir: where tfds keeps its data; None is its own default.

        Raises:
          UserError: unknown data set, split or feature, or one that only TensorFlow can read.
        """
        self.source, self.left_out, self.buckets = _open_tfds(name, split, data_dir), (), tuple(buckets)
        self.features = self.source.dataset_info.features
        self.frames_key = _feature(self.features, frames_key, "frames", _is_frames)
        self.text_key = _feature(self.features, text_key, "text", _is_text)
        self.split = split

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            record = self.source[index]
        except ImportError as error:
            raise UserError(
                f"this data set can't be read without TensorFlow ({error}); pip install tensorflow"
            ) from None
        frames = _cut(np.asarray(record[self.frames_key]), self.buckets, self.name(index))
        caption = self._caption(record[self.text_key]).strip()
        if not caption:
            raise BadClip(self.name(index), "empty caption")
        return {"frames": frames, "caption": caption, "captions": [caption], "tags": {}}

    def name(self, index: int) -> str:
        """The split and the number."""
        return f"{self.split}[{index}]"

    def _caption(self, value: Any) -> str:
        label = self.features[self.text_key]
        if hasattr(label, "int2str"):
            return label.int2str(int(value)).replace("_", " ")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _open_tfds(name: str, split: str, data_dir: Path | None) -> Any:
    # Imported here: tensorflow_datasets takes a second, and only this source needs it.
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, split=split, data_dir=data_dir and str(data_dir))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(f"tfds has no data set {name!r}.{nearest(name, known)[:200]}") from None
    except (ImportError, NotImplementedError) as error:
        raise UserError(f"tfds can't give {name!r} without TensorFlow: {error}") from None
    except (ValueError, KeyError, OSError, AssertionError) as error:
        raise UserError(f"tfds can't open {name!r} split {split!r}: {error}") from None


def _is_frames(feature: Any) -> bool:
    shape: Any = getattr(feature, "shape", None) or ()
    return len(shape) in (3, 4) and shape[-1] in (1, 3) and feature.np_dtype == np.uint8


def _is_text(feature: Any) -> bool:
    return hasattr(feature, "int2str") or type(feature).__name__ == "Text"


def _feature(features: Any, key: str | None, what: str, matches: Any) -> str:
    """The named feature, or the only one that fits."""
    fitting = [name for name, feature in features.items() if matches(feature)]
    if key is not None:
        if key in fitting:
            return key
        raise UserError(f"no {what} feature {key!r} in this data set.{nearest(key, fitting or features)}")
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(fitting or features)
    fault = "several features could be" if fitting else "no feature looks like"
    raise UserError(f"{fault} the {what}: {found}; name one with --{what}_key")


def _cut(array: np.ndarray, buckets: Sequence[Bucket], name: str) -> np.ndarray:
    """(t, y, x, c) or (y, x, c) with c = 1 or 3 to the nearest bucket's shape."""
    image = array.ndim == 3
    array = array[None] if image else array
    if array.size == 0:
        raise BadClip(name, "no video frames")
    size = nearest_size(buckets, *array.shape[1:3])
    bucket = Bucket(*size, 1) if image else longest_fit(buckets, size, len(array))
    if bucket is None:
        raise BadClip(name, "too short", f"{len(array)} frames, {min(b.num_frames for b in buckets)} needed")
    rgb = np.broadcast_to(array[: bucket.num_frames], (bucket.num_frames, *array.shape[1:3], 3))
    return np.stack([fit(Image.fromarray(np.ascontiguousarray(frame)), *size) for frame in rgb])
