"""The training loop: draw, step, log, watch, save, sample; stop cleanly. It knows no method and no network.

Metrics are read one step late, so that the host never waits for the step that it has just started. A run resumes
by being started again: `fit` goes on from the last checkpoint of its folder, with the same random keys and the same
data, so losses after a kill are those of a run that was never killed, bit for bit. Of several processes each runs the
loop, and all read the same numbers, so they go the same way; a signal to one of them is put to the vote.

A watch looks before checkpoints are saved, so what is saved at its steps is good. When it rolls back, the whole state
becomes that of the last good checkpoint, its step included: schedules, moments and averages fit each other, and
metrics.jsonl loses the lines of the bad path. Two things are not as they were there: the data goes on where it is, and
the state's key is folded with the number of rollbacks, so that another path is taken. A run that is killed afterwards
and started again walks the bad path once more, to the same breach and the same rollback.
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
from absl import logging

from magic141_jax.errors import UserError
from magic141_jax.processes import Vote
from magic141_jax.train.checkpoint import Batches, Checkpoints, abstract
from magic141_jax.train.metrics import MetricWriter, Window
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import Step
from magic141_jax.train.watch import Look, Watch


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


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What else a run calls.

    Attributes:
      callback: called with (state, step) every `TrainConfig.sample_every` steps, to draw samples.
      watch: looks at the trained parameters every `watch.config.every` steps, see `magic141_jax.train.watch`.
    """

    callback: Callable[[TrainState, int], None] | None = None
    watch: Watch | None = None


@dataclasses.dataclass
class _Progress:
    """The host's bookkeeping; saved with every checkpoint.

    `window` is averaged for the next log line and `watched` for the watch's next look; `starts` are the watch's.
    """

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    window: Window = dataclasses.field(default_factory=Window)
    watched: Window = dataclasses.field(default_factory=Window)
    starts: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    rollbacks: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "window": self.window.to_json(), "watched": self.watched.to_json()}

    def go_to(self, saved: dict[str, Any]) -> None:
        """Takes over what `to_json` gave; fields that an older checkpoint lacks stay."""
        vars(self).update(saved)
        self.window, self.watched = Window(saved["window"]), Window(saved.get("watched"))


def fit(
    train_step: Step,
    state: TrainState,
    batches: Batches,
    *,
    config: TrainConfig,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    place: Callable[[Any], Any] = jax.device_put,
    **hooks: Any,
) -> Result:
    """Trains until `config.steps`, from the last checkpoint if there is one.

    Args:
      train_step: see `magic141_jax.train.step`.
      state: the state to start from, in the layout to train in; donated.
      batches: endless iterator of host batches, see `checkpoint.Batches`.
      place: puts a host batch on the devices, as arrays with the samples on the leading axis.
      hooks: `callback` and `watch`, see `Hooks`.

    Raises:
      UserError: a loss or gradient was not finite, or the watch stops the run; names the last good checkpoint.
    """
    hooked = Hooks(**hooks)
    guard = _Guard(hooked.watch, config, checkpoints, writer)
    progress = _Progress()
    restored = checkpoints.restore(state, batches)
    if restored is not None:
        state, saved = restored
        progress.go_to(saved)
    writer.start(progress.step)
    reader = _Reader(progress, config, checkpoints, writer, watched=guard.every > 0)
    vote = Vote()
    with _stop_signals() as stop:
        step = progress.step
        stopping = False
        while step < config.steps and not stopping:
            batch = place(next(batches))
            state, metrics = train_step(state, batch, step)
            step += 1
            reader.push(step, metrics, _batch_size(batch))
            stopping = vote(stop.is_set())
            if guard.looks(step):
                reader.drain()
                crossed = guard.crossed(state, progress)
                if crossed:
                    state = guard.roll_back(state, progress, crossed)
                    step = progress.step
                    continue
            last = stopping or step == config.steps
            if last or step % config.save_every == 0:
                reader.drain()
                checkpoints.save(step, state, batches, progress.to_json())
            if hooked.callback is not None and config.sample_every and (last or step % config.sample_every == 0):
                reader.drain()
                hooked.callback(state, step)
        checkpoints.wait()
    return Result(state, step, step < config.steps)


class _Reader:
    """Fetches metrics one step late, keeps the averages and the clock, and stops the run on a bad step."""

    def __init__(
        self,
        progress: _Progress,
        config: TrainConfig,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        *,
        watched: bool,
    ):
        self._progress, self._config, self._checkpoints, self._writer = progress, config, checkpoints, writer
        self._watched = watched
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
        if self._watched:
            progress.watched.add(values)
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


class _Guard:
    """Asks the watch at its steps, and stops the run or takes it back where a line is crossed."""

    def __init__(self, watch: Watch | None, config: TrainConfig, checkpoints: Checkpoints, writer: MetricWriter):
        self._watch: Any = watch  # not asked for anything where there is none
        self._checkpoints, self._writer = checkpoints, writer
        self.every = watch.config.every if watch is not None else 0
        if self.every and (config.save_every % self.every or config.steps % self.every):
            raise UserError(
                f"train.save_every {config.save_every} and train.steps {config.steps} must be multiples of watch.every "
                f"{self.every}, so that no checkpoint is saved without a look"
            )

    def looks(self, step: int) -> bool:
        """Whether the watch looks after `step` steps. The checkpoints of such steps, and only those, are good."""
        return bool(self.every) and step % self.every == 0

    def crossed(self, state: TrainState, progress: _Progress) -> tuple[str, ...]:
        """Looks, logs what was seen, and returns the lines crossed.

        It looks at the parameters being trained: their averages hide a collapse for as long as they reach back.
        """
        look: Look = self._watch.look(state.params, progress.watched.means(), progress.step, progress.starts)
        progress.starts = look.starts
        self._writer.scalars(progress.step, {**look.scalars, "watch/rollbacks": progress.rollbacks})
        return look.crossed

    def roll_back(self, state: TrainState, progress: _Progress, crossed: tuple[str, ...]) -> TrainState:
        """The state of the last good checkpoint with another key; `progress` goes back to it, its totals go on.

        Raises:
          UserError: the watch is to stop, has no rollback left, or there is no good checkpoint.
        """
        config, breach = self._watch.config, f"step {progress.step}: {'; '.join(crossed)}"
        good = [step for step in self._checkpoints.steps if self.looks(step)]
        where = f"the last good checkpoint is {self._checkpoints.folder / str(good[-1])}" if good else ""
        if config.on_breach == "stop" or progress.rollbacks >= config.max_rollbacks or not good:
            after = f" after {progress.rollbacks} rollbacks" if progress.rollbacks else ""
            raise UserError(
                f"{breach}; the watch stops the run{after} and {where or 'there is no checkpoint yet'}. Lower the "
                "learning rates, or move the line in the watch's config, and start the same command again"
            )
        # Two states might not fit in memory together.
        layout = abstract(state)
        jax.tree.map(lambda x: x.delete(), state)
        self._checkpoints.delete_after(good[-1])
        state, saved = self._checkpoints.restore(layout, None, step=good[-1])  # pyright: ignore[reportGeneralTypeIssues]
        totals = {"seconds": progress.seconds, "samples": progress.samples, "rollbacks": progress.rollbacks + 1}
        progress.go_to({**saved, **totals})
        logging.warning("%s; rollback %d of %d, %s", breach, progress.rollbacks, config.max_rollbacks, where)
        self._writer.start(progress.step)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), progress.rollbacks)
        return dataclasses.replace(state, key=jax.device_put(jax.random.key_data(key), state.key.sharding))


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
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None was not set by Python


def _batch_size(batch: Any) -> int:
    """The number of samples: the leading axes of a batch's parts, summed over its tasks."""
    if isinstance(batch, dict) and all(isinstance(part, dict) for part in batch.values()):
        return sum(_batch_size(part) for part in batch.values())
    return int(jax.tree.leaves(batch)[0].shape[0])
