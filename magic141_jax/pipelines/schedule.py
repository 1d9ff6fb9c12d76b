"""What a long video shows when: prompts by their time in seconds.

    {"time": 0, "prompt": "a bee grows on a green background"}       one JSON object a line, in order of time
    {"time": 4.5, "prompt": "a bus moves right on a red background"}

A window shows the last prompt whose time is not after its first new frame. Each prompt is encoded once.
"""

from __future__ import annotations

import bisect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from magic141_jax.errors import UserError, nearest
from magic141_jax.pipelines.options import as_prompts

TOLERANCE = 1e-6  # seconds: a frame's number over the frame rate is not exact


class Cue(NamedTuple):
    """A prompt, and the second from which on it is shown."""

    time: float
    prompt: str


def read_schedule(path: Path) -> tuple[Cue, ...]:
    """Reads a JSONL file of cues; raises `UserError` for what `as_schedule` does, for a missing file and bad lines."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no schedule {path}")
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"the schedule {path} is not text in UTF-8") from None
    if not lines:
        raise UserError(f'the schedule {path} is empty; write lines like {{"time": 4.5, "prompt": "..."}}')
    return as_schedule([_read_line(line, number) for number, line in enumerate(lines, 1)])


def as_schedule(pairs: Iterable[tuple[float, str]]) -> tuple[Cue, ...]:
    """Pairs (seconds, prompt) as cues; raises `UserError`, naming the line, if they make no sense or are unsorted."""
    cues: list[Cue] = []
    for number, (time, prompt) in enumerate(pairs, 1):
        where = f"line {number} of the schedule"
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < math.inf:
            raise UserError(f"{where} has the time {time!r}; a time is a number of seconds, from 0")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where} has the prompt {prompt!r}; say what to show")
        if cues and time <= cues[-1].time:
            raise UserError(f"{where} is for {time:g} s, the one before for {cues[-1].time:g} s; put them in order")
        cues.append(Cue(float(time), prompt))
    return tuple(cues)


def opening(prompt: str | None, cues: Sequence[Cue]) -> tuple[str, tuple[Cue, ...]]:
    """The prompt of the first image, and all cues with it: the one given, or the first of the schedule, at 0.

    Raises:
      UserError: neither is there, or the prompt is empty.
    """
    if prompt is None and cues and cues[0].time > 0:
        raise UserError(f"line 1 of the schedule is for {cues[0].time:g} s; it must be for 0, or give a prompt as well")
    if prompt is None and cues:
        return cues[0].prompt, tuple(cues)
    (prompt,) = as_prompts(prompt if isinstance(prompt, str) else "")
    return prompt, (Cue(0.0, prompt), *cues)


def warn_beyond(cues: Sequence[Cue], seconds: float) -> None:
    """Warns of every line of a schedule that comes after the end of the video."""
    for number, cue in enumerate(cues, 1):
        if cue.time >= seconds - TOLERANCE:
            late = f"line {number} of the schedule is for {cue.time:g} s, and the video ends at {seconds:g} s"
            warnings.warn(f"{late}: never shown", stacklevel=3)


class Script:
    """The prompts of a video in the making. What is said meanwhile holds from the next window that isn't started."""

    def __init__(
        self,
        cues: Iterable[Cue],
        starts: Sequence[float],
        encode: Callable[[str], Any],
        *,
        encoded: Mapping[str, Any] | None = None,
    ) -> None:
        """Encodes what is to be shown.

        Args:
          cues: sorted, the first at 0.
          starts: the second of the first new frame of each window.
          encode: what to do with each distinct prompt, once.
          encoded: prompts with which that has been done.
        """
        self._cues, self._starts, self._window = list(cues), starts, 0
        self._encode, self._encoded = encode, dict(encoded or {})
        for window in range(len(starts)):
            self._prepare(self._due(window))

    def __bool__(self) -> bool:
        """Whether there are windows that aren't started."""
        return self._window < len(self._starts)

    def say(self, prompt: str) -> float | None:
        """Shows a prompt from the next window on that isn't started, until the schedule's next cue.

        Returns:
          The second of the video from which on it holds; None if all windows are started.

        Raises:
          UserError: the prompt is empty.
        """
        (prompt,) = as_prompts(prompt)
        if not self:
            return None
        self._prepare(prompt)
        start = self._starts[self._window]
        bisect.insort_right(self._cues, Cue(start + TOLERANCE, prompt), key=lambda cue: cue.time)
        return start

    def take(self) -> Any:
        """The prompt of the next window, encoded; the window counts as started."""
        self._window += 1
        return self._encoded[self._due(self._window - 1)]

    def _due(self, window: int) -> str:
        return [cue.prompt for cue in self._cues if cue.time <= self._starts[window] + TOLERANCE][-1]

    def _prepare(self, prompt: str) -> None:
        if prompt not in self._encoded:
            self._encoded[prompt] = self._encode(prompt)


def _read_line(line: str, number: int) -> tuple[Any, Any]:
    """The time and the prompt of a line; raises `UserError`, naming the line, unless it has just these."""
    where, like = f"line {number} of the schedule", '{"time": 4.5, "prompt": "..."}'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); write {like}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is no JSON object; write {like}")
    for key in found:
        if key not in Cue._fields:
            raise UserError(f"{where} has an unknown key {key!r}.{nearest(key, Cue._fields)}")
    for key in Cue._fields:
        if key not in found:
            raise UserError(f"{where} has no {key!r}; write {like}")
    return found["time"], found["prompt"]
