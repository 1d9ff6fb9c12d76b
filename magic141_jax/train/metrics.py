"""Where numbers go: averages between two log lines, metrics.jsonl, TensorBoard, the progress bar.

metrics.jsonl holds one JSON object a line, {"step": n, "time": seconds since the epoch, name: value, ...}; floats are
written so that they read back to the same bits. A resumed run drops the lines after the checkpoint that it starts
from, so the file is what one uninterrupted run would have written.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from magic141_jax.errors import UserError


class Window:
    """Means of scalars since the last log line; NaN values (no sample of that kind) are left out."""

    def __init__(self, sums: Mapping[str, Any] | None = None):
        self._sums = {name: list(pair) for name, pair in (sums or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds one step's scalars."""
        for name, value in values.items():
            pair = self._sums.setdefault(name, [0.0, 0])
            if not math.isnan(value):
                pair[0] += value
                pair[1] += 1

    def means(self) -> dict[str, float]:
        """The mean of each scalar that has a value, and empties the window."""
        means = {name: total / count for name, (total, count) in sorted(self._sums.items()) if count}
        self._sums = {}
        return means

    def to_json(self) -> dict[str, Any]:
        """What the constructor takes: saved with a checkpoint, so that resumed averages are the same to the bit."""
        return self._sums


class MetricWriter:
    """Writes scalars and videos of one run to its work folder and shows the progress bar."""

    def __init__(self, workdir: Path, *, steps: int, progress: bool = True):
        self._path = Path(workdir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._board_dir = Path(workdir) / "tensorboard"
        self._steps, self._progress = steps, progress
        self._board: Any = None  # this and the bar are there once it is started
        self._bar: Any = None

    def start(self, step: int) -> None:
        """Opens the files at `step`, dropping what was written after it: by a killed run, or before a rollback."""
        self.close()
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self._path)
        from tensorboardX import SummaryWriter  # it takes torch along where there is one: seconds of every start

        self._board = SummaryWriter(str(self._board_dir), purge_step=step + 1 if step else None)
        pause = 0.2 if sys.stderr.isatty() else 30.0  # a log file gets a line now and then
        self._bar = tqdm(
            total=self._steps,
            initial=step,
            unit="step",
            disable=not self._progress,
            dynamic_ncols=True,
            mininterval=pause,
        )

    def advance(self, postfix: Mapping[str, str]) -> None:
        """Moves the bar by one step; `postfix` is shown behind its rate and ETA."""
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and the same scalars to TensorBoard."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """Keeps frames (b, t, y, x, 3) in [0, 1], clips one below the other, as samples/<name>-<step>.gif.

        TensorBoard gets the same bytes as an image, which it plays.
        """
        b, t, y, x, _ = frames.shape
        pixels = np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
        sheet = pixels.transpose(1, 0, 2, 3, 4).reshape(t, b * y, x, 3)
        first, *rest = [Image.fromarray(frame) for frame in sheet]
        buffer = io.BytesIO()
        first.save(buffer, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        path = self._path.parent / "samples" / f"{name}-{step:06d}.gif"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        image = Summary.Image(height=b * y, width=x, colorspace=3, encoded_image_string=buffer.getvalue())
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


class SilentWriter(MetricWriter):
    """Writes nothing: the writer of every process but the first."""

    def __init__(self) -> None:
        pass

    def start(self, step: int) -> None:
        """Does nothing."""

    def advance(self, postfix: Mapping[str, str]) -> None:
        """Does nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; raises `UserError` where there is none."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}; train first, with --workdir={workdir}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _step_of(line: str) -> float:
    """The step of a line; infinity where a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
