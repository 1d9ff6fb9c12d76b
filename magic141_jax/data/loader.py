"""Batches for training: a Grain pipeline over random-access sources.

Order is decided on indices alone (shuffle, repeat, batch, mix of buckets, zip of streams), records are read last.
Batch n is a function of (seed, n), so a run resumes at the exact sample from `iterator.get_state()`. A process may
read some rows of every batch only, those that its devices hold (`sharding.batch_rows`): neither the batch over all
processes nor the position depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import numpy as np

from magic141_jax.data.sources import Sample, Source
from magic141_jax.errors import UserError

Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Stream:
    """One part of a batch, such as its images.

    sources: one for each bucket; a batch comes from one of them, in proportion to their lengths.
    batch_size: samples a step, over all processes.
    transform: applied to each sample with its own random generator.
    """

    sources: tuple[Source, ...]
    batch_size: int
    transform: Transform | None = None


def batches(
    streams: Mapping[str, Stream],
    *,
    seed: int,
    rows: Mapping[str, Sequence[int]] | None = None,
    threads: int = 4,
) -> grain.DatasetIterator:
    """Endless batches `{stream's name: {key: array (rows, ...)}}`, shuffled anew every epoch.

    Args:
      streams: for example `{"image": Stream(...), "video": Stream(...)}`.
      seed: 0 or more. Same seed, same batches.
      rows: {stream's name: which rows of its batches to read}; all of them unless given.
      threads: that read ahead; 0 reads when asked.

    Returns:
      An iterator with `get_state()` and `set_state(state)`; grain's checkpoint handlers take it as it is.

    Raises:
      UserError: no stream, an empty source, or an empty batch.
    """
    if not streams:
        raise UserError("no data to train on: give at least one stream")
    for name, stream in streams.items():
        if stream.batch_size < 1:
            raise UserError(f"the {name} batch size is {stream.batch_size}; it must be at least 1")
        if not stream.sources or not all(len(source) for source in stream.sources):
            raise UserError(f"the {name} data set is empty")
    plans = [_plan(stream, _derive(seed, number)) for number, stream in enumerate(streams.values())]
    steps = min(map(len, plans))  # endless either way, but zip wants equal lengths
    plans = [plan.slice(slice(0, steps)) for plan in plans]
    read = partial(_read, dict(streams), seed=seed, rows=rows or {})
    dataset = grain.experimental.ZipMapDataset(plans).map_with_index(read)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))


def random_caption(sample: Sample, rng: np.random.Generator) -> Sample:
    """A transform: one of the clip's captions at random."""
    captions = sample.get("captions") or [sample["caption"]]
    return {**{k: v for k, v in sample.items() if k != "captions"}, "caption": captions[rng.integers(len(captions))]}


def first_frame(sample: Sample, rng: np.random.Generator) -> Sample:
    """A transform that makes an image of a video: its first frame, or its first latent frame (encoded alone)."""
    del rng
    return {k: v[:1] if k in ("frames", "latents") else v for k, v in sample.items()}


def stack(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of equal shapes to one dict: arrays are stacked, anything else is listed."""
    return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}


def _stack(values: list[Any]) -> Any:
    return np.stack(values) if isinstance(values[0], np.ndarray | np.generic) else values


def _derive(seed: int, *numbers: int) -> int:
    return int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0])


def _plan(stream: Stream, seed: int) -> grain.MapDataset:
    """An endless data set of (number of the source, indices of a whole batch in it)."""
    parts = []
    for number, source in enumerate(stream.sources):
        order = grain.MapDataset.range(len(source)).shuffle(seed=_derive(seed, number)).repeat()
        parts.append(order.batch(stream.batch_size, drop_remainder=True).map(partial(_tag, number)))
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[len(source) for source in stream.sources])


def _tag(number: int, indices: np.ndarray) -> tuple[int, np.ndarray]:
    return number, indices


def _read(
    streams: Mapping[str, Stream],
    step: int,
    plan: Sequence[tuple[int, np.ndarray]],
    *,
    seed: int,
    rows: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Reads the wanted rows of batch `step`."""
    batch = {}
    for number, ((name, stream), (which, indices)) in enumerate(zip(streams.items(), plan, strict=True)):
        samples = []
        for row in rows.get(name, range(stream.batch_size)):
            sample = stream.sources[which][int(indices[row])]
            if stream.transform:
                sample = stream.transform(sample, np.random.default_rng((seed, number, step, int(row))))
            samples.append(sample)
        batch[name] = stack(samples)
    return batch
