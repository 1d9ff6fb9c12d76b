"""The training loop: draw, step, log, save, sample; stop cleanly. It knows no method and no network.

Metrics are read one step late, so that the host never waits for the step that it has just started. A run resumes
by being started again: `fit` goes on from the last checkpoint of its folder, with the same random keys and the same
data, so losses after a kill are those of a run that was never killed, bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from magic141_jax.errors import UserError
from magic141_jax.train.checkpoint import Batches, Checkpoints
from magic141_jax.train.metrics import MetricWriter, Window
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import Step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to do what besides.

    Attributes:
      steps: updates in the whole run.
      accumulate: micro-batches a step; the batch is split into as many parts.
      log_every: steps averaged into one line of metrics.jsonl.
      save_every: steps between checkpoints; the last step is always saved.
      sample_every: steps between calls of the sample callback; 0 is never.
      keep: checkpoints kept.
    """

    steps: int = 1000
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` ends with. `stopped` is true when a signal ended it before its last step."""

    state: TrainState
    step: int
    stopped: bool


@dataclasses.dataclass
class _Progress:
    """The host's bookkeeping; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    window: Window = dataclasses.field(default_factory=Window)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "window": self.window.to_json()}


def fit(
    train_step: Step,
    state: TrainState,
    batches: Batches,
    *,
    config: TrainConfig,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    place: Callable[[Any], Any] = jax.device_put,
    callback: Callable[[TrainState, int], None] | None = None,
) -> Result:
    """Trains until `config.steps`, from the last checkpoint if there is one.

    Args:
      train_step: see `magic141_jax.train.step`.
      state: the state to start from, in the layout to train in; donated.
      batches: endless iterator of host batches, see `checkpoint.Batches`.
      place: puts a host batch on the devices, as arrays with the samples on the leading axis.
      callback: called with (state, step) every `config.sample_every` steps, to draw samples.

    Raises:
      UserError: a loss or gradient was not finite; names the last good checkpoint.
    """
    progress = _Progress()
    restored = checkpoints.restore(state, batches)
    if restored is not None:
        state, saved = restored
        progress = _Progress(**{**saved, "window": Window(saved["window"])})
    writer.start(progress.step)
    reader = _Reader(progress, config, checkpoints, writer)
    with _stop_signals() as stop:
        step = progress.step
        last = False
        while step < config.steps and not last:
            batch = place(next(batches))
            state, metrics = train_step(state, batch, step)
            step += 1
            reader.push(step, metrics, _batch_size(batch))
            last = step == config.steps or stop.is_set() or checkpoints.preempted(step)
            if last or step % config.save_every == 0:
                reader.drain()
                checkpoints.save(step, state, batches, progress.to_json())
            if callback is not None and config.sample_every and (last or step % config.sample_every == 0):
                reader.drain()
                callback(state, step)
        checkpoints.wait()
    return Result(state, step, step < config.steps)


class _Reader:
    """Fetches metrics one step late, keeps the averages and the clock, and stops the run on a bad step."""

    def __init__(self, progress: _Progress, config: TrainConfig, checkpoints: Checkpoints, writer: MetricWriter):
        self._progress, self._config, self._checkpoints, self._writer = progress, config, checkpoints, writer
        self._pending: collections.deque[tuple[int, Any, int]] = collections.deque()
        self._clock = time.monotonic()

    def push(self, step: int, metrics: Any, samples: int) -> None:
        """Takes a step's metrics while they are still being computed, and reads those of the step before."""
        self._pending.append((step, metrics, samples))
        if len(self._pending) > 1:
            self._read()

    def drain(self) -> None:
        """Reads everything up to the present step."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics, samples = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("finite"):
            self._stop(step, values)
        now = time.monotonic()
        progress, elapsed = self._progress, now - self._clock
        self._clock = now
        progress.step, progress.seconds, progress.samples = step, progress.seconds + elapsed, progress.samples + samples
        progress.window.add(values)
        losses = {name.removeprefix("loss/"): f"{v:.4f}" for name, v in values.items() if name.startswith("loss/")}
        self._writer.advance({**losses, "samples/s": f"{samples / max(elapsed, 1e-9):.1f}"})
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._writer.scalars(step, progress.window.means())

    def _stop(self, step: int, values: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items() if name.startswith(("loss", "grad")))
        latest = self._checkpoints.latest
        good = f"the last good checkpoint is {latest}" if latest else "there is no checkpoint yet"
        raise UserError(
            f"step {step}: a loss or gradient is not finite ({shown}); the update was not applied and {good}. "
            "Lower the learning rate or clip_norm, or look at the data, and start the same command again"
        )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or the first Ctrl-C sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def handler(number: int, frame: Any) -> None:
        del frame
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _batch_size(batch: Any) -> int:
    """The number of samples: the leading axes of a batch's parts, summed over its tasks."""
    if isinstance(batch, dict) and all(isinstance(part, dict) for part in batch.values()):
        return sum(_batch_size(part) for part in batch.values())
    return int(jax.tree.leaves(batch)[0].shape[0])
