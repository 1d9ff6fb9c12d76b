"""Training checkpoints: the whole state, the position in the data and the host's bookkeeping, in one atomic step.

Orbax writes in the background and renames a finished step into place, so a kill at any moment leaves the last
finished one intact. Restoring takes the state's current layout, and the position in the data is one for all processes,
so a run can go on on another mesh and with another number of processes, which have to see the same folder. Nothing is
unpickled; frozen roles are not stored.
"""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp

from magic141_jax.errors import UserError
from magic141_jax.train.state import TrainState


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved and restored exactly."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The position: bytes or a JSON-ready value."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` gave."""
        ...


class Checkpoints:
    """The checkpoints of one run, below `folder`."""

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> Path | None:
        """The folder of the last finished checkpoint."""
        steps = self.steps
        return self.folder / str(steps[-1]) if steps else None

    @property
    def steps(self) -> list[int]:
        """The steps of all finished checkpoints, in order."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, batches: Batches, progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint after `step` steps; copies to the host before it returns."""
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)),
            position=ocp.args.JsonSave(_position(batches)),
            # Orbax writes it later, when the run has gone on.
            progress=ocp.args.JsonSave(copy.deepcopy(progress)),
        )
        self._manager.save(step, args=args)

    def restore(
        self, state: TrainState, batches: Batches | None, *, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The checkpoint of `step` (the last one), or None if there is none.

        Args:
          state: arrays, or shape structs with shardings; the result has its layout.
          batches: is moved to the checkpoint's position; None stays where it is.
          step: one of `steps`.

        Raises:
          UserError: the checkpoint holds other parameters than `state`.
        """
        step = self._manager.latest_step() if step is None else step
        if step is None:
            return None
        wanted = _tree(abstract(state))
        items = {"state": ocp.args.StandardRestore(wanted), "progress": ocp.args.JsonRestore()}
        # Checkpoints used to hold the position once for each process, in files that all said the same.
        former = sorted((self.folder / str(step) / "data").glob("process_*"))
        if not former:
            items["position"] = ocp.args.JsonRestore()
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"the checkpoint {self.folder / str(step)} does not fit this config ({reason}); "
                "use the config that it was made with or another --workdir"
            ) from error
        if batches is not None:
            _go_to(batches, json.loads(former[0].read_text()) if former else restored["position"])
        return TrainState(**restored["state"]), restored["progress"]

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`: the run goes back to it, and they would be taken for what follows."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def wait(self) -> None:
        """Waits for what is being written, and raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and stops the background threads."""
        self._manager.close()


def read_step(folder: Path, state: TrainState, step: int) -> TrainState:
    """The state after `step` steps of a run whose checkpoints lie in `folder`; `state` as in `Checkpoints.restore`.

    Raises:
      UserError: there is no such checkpoint; those that are kept are named.
    """
    kept: list[int] = []
    if Path(folder).is_dir():
        checkpoints = Checkpoints(folder)
        try:
            kept = checkpoints.steps
            if step in kept:
                return checkpoints.restore(state, None, step=step)[0]
        finally:
            checkpoints.close()
    there = f"there are {', '.join(map(str, kept))}" if kept else "there is none"
    raise UserError(f"no checkpoint of step {step} in {folder}: {there}; train.keep says how many a run keeps")


def _position(batches: Batches) -> dict[str, Any]:
    """A data iterator's position as JSON; bytes in base 64."""
    state = batches.get_state()
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"json": state}


def _go_to(batches: Batches, held: dict[str, Any]) -> None:
    batches.set_state(base64.b64decode(held["base64"]) if "base64" in held else held["json"])


def abstract(state: TrainState) -> TrainState:
    """The state's shapes and dtypes with its shardings, without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _tree(state: TrainState) -> dict[str, Any]:
    return {field: getattr(state, field) for field in ("step", "key", "params", "opt_state", "ema")}
